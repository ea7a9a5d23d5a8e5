"""The page: one file that needs nothing else, says what came of the run, and can be read by all."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from b2ray.config import Config
from b2ray.report import FILE, images, try_to_write, words, write
from b2ray.report.page import page, stamp
from b2ray.report.record import Record
from b2ray.tracking import branch_trees as trees
from tests.unit.report.runs import event, settings, tree, write_run

VOID = {"meta", "link", "img", "br", "input"}
LIMIT = 3_000_000


class Page(HTMLParser):
    """What is in a page: elements with their attributes and their texts, and whether all close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.found: list[tuple[str, dict[str, str], str]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {k: v or "" for k, v in attrs}
        if tag in VOID:
            self.found.append((tag, values, ""))
        else:
            self.open.append((tag, values))
            self.texts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {k: v or "" for k, v in attrs}, ""))

    def handle_endtag(self, tag: str) -> None:
        opened, values = self.open.pop()
        assert opened == tag
        text = self.texts.pop()
        self.found.append((tag, values, " ".join(text.split())))
        if self.texts:
            self.texts[-1] += f" {text}"

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data

    def all(self, tag: str, **wanted: str) -> list[tuple[dict[str, str], str]]:
        return [
            (values, text)
            for name, values, text in self.found
            if name == tag and all(values.get(k.rstrip("_")) == v for k, v in wanted.items())
        ]

    def text(self, tag: str, **wanted: str) -> str:
        ((_, text),) = self.all(tag, **wanted)
        return text


def read(config: Config, **how: object) -> Page:
    folder = write_run(config, **how)
    return Page(write(folder.path, config).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str]:
    config = settings(tmp_path_factory.mktemp("runs"))
    folder = write_run(config)
    times = [line["time"] for line in folder.metrics()]
    folder.append_event(event("ready", times[0] - 9))
    folder.append_event(event("died", np.mean(times), doing="denoising", cause="lost <it>"))
    folder.append_event(event("ready", times[-1], seconds=3.25))
    text = write(folder.path, config).read_text(encoding="utf-8")
    return Page(text), text


def test_the_verdict_is_a_line(finished):
    found, _ = finished
    said = found.text("p", class_="verdict")
    assert re.fullmatch(
        r"The reward rose from 0\.3\d+ to 0\.6\d+ on training prompts and from [\d.]+ to [\d.]+ on "
        r"unseen prompts; judge, which is not trained on, rose from .* unseen prompts\.",
        said,
    )
    assert not found.all("p", class_="warning")


@pytest.mark.parametrize(
    ("rises", "judged", "said", "warned"),
    [
        (0.3, -0.1, "judge, which is not trained on, fell from", True),
        (0.0, 0.0, "The reward did not change measurably, from", False),
        (-0.2, -0.2, "The reward fell from", False),
    ],
)
def test_the_verdict_goes_by_the_same_seeds(tmp_path, rises, judged, said, warned):
    config = settings(tmp_path)
    record = Record.read(write_run(config, rises=rises, judged=judged).path, config)
    assert said in words.verdict(record)
    assert bool(words.warning(record)) == warned


def test_it_needs_nothing_else(finished):
    found, text = finished
    sources = [v for _, values, _ in found.found for k, v in values.items() if k in ("src", "href")]
    assert len(sources) > 40
    local = [s for s in sources if not s.startswith(("data:", "#"))]
    assert local == []
    assert "@import" not in text and "url(http" not in text
    assert not found.all("script")
    (policy,) = [v for v, _ in found.all("meta") if "http-equiv" in v]
    assert policy["content"].startswith("default-src 'none'")


def test_it_is_readable_for_all(finished):
    found, _ = finished
    assert found.all("html")[0][0]["lang"] == "en"
    assert found.text("title") == "mine · b2ray"
    levels = [int(tag[1]) for tag, _, _ in found.found if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert all(values["alt"] for values, _ in found.all("img"))
    assert all(v["role"] == "img" and v["aria-label"] for v, _ in found.all("svg"))
    assert all(v["scope"] in ("col", "row") for v, _ in found.all("th"))
    scrolled = found.all("div", class_="scroll")
    assert all(v["tabindex"] == "0" and v["role"] == "region" for v, _ in scrolled)
    ids = Counter(v["id"] for _, v, _ in found.found if "id" in v)
    assert max(ids.values()) == 1
    named = {v[k] for _, v, _ in found.found for k in ("aria-labelledby", "for") if k in v}
    assert named <= ids.keys()


def test_the_drawings_refer_to_themselves_and_have_the_pages_colours(finished):
    found, text = finished
    ids = {v["id"] for _, v, _ in found.found if "id" in v}
    refers = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert refers and refers <= ids
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert "currentColor" in drawn and "var(--series-1)" in drawn
    assert not re.search(r"#[0-9a-f]{6}\b", drawn)
    defined = set(re.findall(r"(--[\w-]+):", text))
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= defined


def test_trees_show_what_leaves_got(finished):
    found, _ = finished
    leaves = [text for v, text in found.all("li") if "leaf" in v.get("class", "").split()]
    assert len(leaves) == 6 * 2 * 4
    chosen = [text for _, text in found.all("li", class_="leaf chosen")]
    assert len(chosen) == 6 * 2 * 2
    assert chosen[0] == "reward 1 advantage +1.5 ✓ more like this"
    assert chosen[1] == "reward 0.25 advantage −1.5 ✗ less like this"
    stages = [text for _, text in found.all("summary") if text.startswith("Stage")]
    assert stages[0] == "Stage 1: the last 4 of 10 steps are branched"
    assert [int(s.split(":")[0][6:]) for s in stages] == [1, 2, 3, 4, 5, 6]
    forks = [v["alt"] for v, _ in found.all("img") if v["alt"].startswith("foreseen")]
    assert len(forks) == 12 and forks[0] == "foreseen at the fork: a <blue> square & more"


def test_pictures_of_the_same_seeds_stand_side_by_side(finished):
    found, _ = finished
    alts = [v["alt"] for v, _ in found.all("img")]
    for when in ("before", "after"):
        assert alts.count(f"{when}: a red circle") == 2 * 2  # two of four pictures, two sets
    pairs = [text for v, text in found.all("div", class_="pair")]
    assert len(pairs) == 2 * 4
    headings = [text for _, text in found.all("h3")]
    assert headings == [
        "Training prompts: before, and after stage 6",
        "Unseen prompts: before, and after stage 6",
    ]


def test_the_fleets_troubles_are_shown(finished):
    found, _ = finished
    (figure,) = {v["aria-label"] for v, _ in found.all("svg") if "time by stage" in v["aria-label"]}
    assert "2 fleet events" in figure  # the first time ready is none
    cells = [text for _, text in found.all("td")]
    assert "denoising: lost <it>" in cells and "ready after 3.25 s" in cells


def test_the_configuration_and_the_command_are_there(finished):
    found, _ = finished
    command, configuration = (text for _, text in found.all("pre"))
    assert command.startswith("python -m b2ray.run") and command.endswith("--name mine-again")
    assert "curriculum: stages: 6" in configuration and "max_ratio_drift" in configuration


@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_run_that_goes_on_is_shown_as_far_as_it_is(tmp_path, done):
    found = read(settings(tmp_path), done=done)
    said = found.text("p", class_="verdict")
    assert not found.all("p", class_="warning")
    begun = f"After {done} of 6 stages the reward rose from" if done > 1 else f"{done} of 6 stages"
    assert said.startswith(begun)


def test_a_run_that_has_nothing_yet_has_a_page(tmp_path):
    config = settings(tmp_path)
    folder = write_run(config, done=-1)
    found = Page(write(folder.path, config).read_text(encoding="utf-8"))
    assert "has begun" in found.text("p", class_="verdict")


def test_stages_that_never_committed_are_not_shown_and_all_files_stay_as_they_were(tmp_path):
    config = settings(tmp_path)
    folder = write_run(config, done=4)
    lines = folder.metrics_file.read_text().splitlines(keepends=True)
    folder.metrics_file.write_text("".join(lines[:4]))  # as resuming after a crash leaves it
    before = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    file = write(folder.path, config)
    after = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file() and p != file}
    assert file == folder.path / FILE and after == before
    found = Page(file.read_text(encoding="utf-8"))
    stages = [text for _, text in found.all("summary") if text.startswith("Stage")]
    assert len(stages) == 3
    assert "After 3 of 6 stages" in found.text("p", class_="verdict")
    assert {text for _, text in found.all("h3")} == {"Training prompts: before, and after stage 2"}


def test_a_run_on_demonstrations_has_a_page(tmp_path):
    over = {
        "preset": "sqil",
        "rewards": [],
        "demonstrations": {"path": "folder"},
        "branching": {"images": 64},
        "prompts": {},
    }
    found = read(settings(tmp_path, **over), with_trees=False)
    assert "Judge, which is not trained on, rose" in found.text("p", class_="verdict")
    figures = [v["aria-label"] for v, _ in found.all("svg")]
    assert "nats from the demonstrations: each stage's from 1 to 0.167" in figures[0]


def test_a_run_without_previews_trees_or_judge_has_a_page(tmp_path):
    config = settings(tmp_path, evaluation={"every": 0, "previews": 0})
    found = read(config, with_trees=False)
    assert not found.all("img")
    assert "The reward rose" in found.text("p", class_="verdict")


def test_several_rewards_are_told_apart(tmp_path):
    rewards = [{"name": "clip", "kind": "clip"}, {"name": "size", "kind": "jpeg", "weight": 0.5}]
    found = read(settings(tmp_path, rewards=rewards))
    rows = [text for v, text in found.all("th", scope="row")]
    assert rows[:6] == ["reward", "reward", "clip", "clip", "judge", "judge"]


def test_a_long_run_with_large_pictures_stays_small(tmp_path, monkeypatch):
    """Noise is the worst there is to compress. A third of the limits shows what they do."""
    rest = LIMIT - images.COMPARED - images.BRANCHED
    compared, branched = images.COMPARED // 3, images.BRANCHED // 3
    monkeypatch.setattr(images, "COMPARED", compared)
    monkeypatch.setattr(images, "BRANCHED", branched)
    config = settings(
        tmp_path,
        curriculum={"stages": 300, "start": 4, "end": 9},
        branching={"images": 64, "branches": 4},
        evaluation={"every": 150, "previews": 24},
    )
    folder = write_run(config, size=256, with_trees=False)
    kept = range(10, 301, 10)
    for stage in kept:
        trees.save(folder.path, stage, [tree(config, stage, group, 256) for group in range(2)])
    for i in range(3000):
        folder.append_event(event("died", i, slot=f"sampler {i % 8}", cause="x" * 300))
    text = write(folder.path, config).read_text(encoding="utf-8")
    found = Page(text)
    stages = [int(t.split(":")[0][6:]) for _, t in found.all("summary") if t.startswith("Stage")]
    assert stages[-1] == 300 and 2 < len(stages) < len(kept)
    pictures = [(v["alt"], len(v["src"])) for v, _ in found.all("img")]
    paired = [size for alt, size in pictures if alt.startswith(("before", "after"))]
    assert 4 <= len(paired) < 2 * 2 * images.PAIRS and sum(paired) <= compared
    whole = sum(size for _, size in pictures)
    assert 0.7 * (branched + compared) < whole <= branched + compared
    assert len(text.encode()) - whole < rest
    assert len(found.all("tr")) < 500


def test_a_page_that_cannot_be_made_is_a_warning(tmp_path, capsys):
    config = settings(tmp_path)
    folder = write_run(config, done=2)
    (file,) = folder.path.glob("evaluations/step-00002_train.json")
    file.write_text("{")
    assert try_to_write(folder.path, config) is None
    assert "warning: the run's page could not be made (JSONDecodeError" in capsys.readouterr().err
    assert not list(folder.path.glob("report.html*"))


def test_a_page_that_is_served_looks_for_news_while_there_may_be_some(tmp_path):
    config = settings(tmp_path)
    folder = write_run(config, done=2)
    text = page(folder.path, config, live=True)
    assert f'const stamp = "{stamp(folder.path)}"' in text and "setInterval" in text
    before = stamp(folder.path)
    folder.append_event(event("died", 1.0))
    assert stamp(folder.path) != before
    other = settings(tmp_path, name="done", curriculum={"stages": 1})
    assert "<script>" not in page(write_run(other).path, other, live=True)


def test_scores_that_are_missing_are_no_fault(tmp_path):
    """A held-out reward that a run was resumed without is not compared."""
    config = settings(tmp_path)
    folder = write_run(config)
    file = folder.path / "evaluations" / "step-00006_train.json"
    kept = json.loads(file.read_text())
    del kept["scores"]["judge"]
    file.write_text(json.dumps(kept))
    assert "Judge" not in Page(page(folder.path, config)).text("p", class_="verdict")
