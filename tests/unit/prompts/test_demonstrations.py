"""Demonstrations: what a folder may be, which of them a stage uses, and how they are fitted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from b2ray.algorithm.demonstrations import demonstration_units, draw
from b2ray.config import Config, Demonstrations, Prompts
from b2ray.config.load import validated
from b2ray.diffusion.noise import Domain
from b2ray.errors import ConfigError
from b2ray.preflight import check_files
from b2ray.prompts.demonstrations import (
    Demonstration,
    read_folder,
    too_small,
)
from b2ray.rollout.work import picture_files


def save(folder: Path, name: str, size: tuple[int, int] = (8, 8), **options: object) -> None:
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", size, "red").save(folder / name, **options)


def listed(folder: Path, *lines: object) -> None:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(text) + "\n", encoding="utf-8")


# --- folders ---------------------------------------------------------------------------------


def test_captions_stand_in_metadata(tmp_path):
    save(tmp_path, "b.png", (8, 6))
    save(tmp_path, "deep/a.JPG")
    listed(
        tmp_path,
        {"file_name": "b.png", "text": " a red\n square ", "more": 1},
        "",
        {"file_name": "deep/a.JPG", "text": "a circle"},
    )
    assert read_folder(str(tmp_path)) == (
        Demonstration(tmp_path / "b.png", "a red square", (6, 8)),
        Demonstration(tmp_path / "deep/a.JPG", "a circle", (8, 8)),
    )


def test_captions_stand_beside_the_pictures(tmp_path):
    for name in ("b.webp", "a.png", "c.jpeg"):
        save(tmp_path, name)
        (tmp_path / name).with_suffix(".txt").write_text(f"\ufeffpicture {name}\n", "utf-8")
    (tmp_path / "notes.md").write_text("not a picture")
    found = read_folder(str(tmp_path))
    assert [d.caption for d in found] == ["picture a.png", "picture b.webp", "picture c.jpeg"]


METADATA = [
    (["{"], ["line 1 is not JSON", "one object a line"]),
    ([[1]], ["line 1 needs a file and a caption", "file_name"]),
    ([{"file_name": "a.png"}], ["line 1 needs a file and a caption"]),
    ([{"file_name": "a.png", "text": "  "}], ["line 1 needs a file and a caption"]),
    ([{"file_name": "a.png", "text": "x"}, {"text": "y"}], ["line 2 needs a file"]),
    ([{"file_name": "../a.png", "text": "x"}], ["'../a.png' is no picture in the folder"]),
    ([{"file_name": "/a.png", "text": "x"}], ["'/a.png' is no picture in the folder"]),
    ([{"file_name": "a.gif", "text": "x"}], ["'a.gif' is no picture in the folder", ".webp"]),
    ([{"file_name": "b.png", "text": "x"}], ["there is no file 'b.png'", "delete the line"]),
    ([], ["a.png has no caption", "add a line"]),
]


@pytest.mark.parametrize(("lines", "words"), METADATA)
def test_metadata_that_says_too_little_is_refused(tmp_path, lines, words):
    save(tmp_path, "a.png")
    listed(tmp_path, *lines)
    refused(tmp_path, *words)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_folder(str(folder))
    message = str(caught.value)
    assert message.startswith("demonstrations.path: ") and "\n" not in message
    assert [w for w in words if w not in message] == []


def test_a_picture_without_a_caption_is_refused(tmp_path):
    save(tmp_path, "a.png")
    refused(tmp_path, "a.png has no caption", "a.txt", "metadata.jsonl")
    (tmp_path / "a.txt").write_text(" \n")
    refused(tmp_path, "a.txt is empty")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, "a.txt is not UTF-8")


def test_a_folder_without_pictures_is_refused(tmp_path):
    refused(tmp_path, "has no pictures", ".png")
    refused(tmp_path / "missing", "there is no folder", "docs/howto/demonstrations.md")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "there is no folder")


@pytest.mark.parametrize("what", ["cut", "text", "empty"])
def test_a_broken_picture_is_named(tmp_path, what):
    save(tmp_path, "good.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "bad.png")
    whole = (tmp_path / "bad.png").read_bytes()
    broken = {"cut": whole[: len(whole) // 2], "text": b"no picture", "empty": b""}
    (tmp_path / "bad.png").write_bytes(broken[what])
    listed(tmp_path, *({"file_name": n, "text": "x"} for n in ("good.png", "bad.png")))
    refused(tmp_path, "bad.png cannot be read as a picture", "take it out")


# --- a run's prompts -------------------------------------------------------------------------


def config(folder: Path, models: Path, **over: object) -> Config:
    values: dict[str, object] = {
        "preset": "sqil",
        "model": {"path": str(models / "base")},
        "demonstrations": {"path": str(folder)},
        "sampling": {"steps": 4},
        "branching": {"images": 12, "unit_groups": 4},
    }
    return validated({**values, **over})


@pytest.fixture
def folder(tmp_path) -> Path:
    for i, caption in enumerate(("one", "two", "two")):
        save(tmp_path, f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption)
    return tmp_path


def test_captions_are_the_prompts_as_often_as_they_are_shown(models, folder):
    found = check_files(config(folder, models))
    assert (found.train.texts, found.train.weights) == (("one", "two"), (1.0, 2.0))
    assert found.trained() == ("one", "two")
    assert [d.caption for d in found.demonstrations] == ["one", "two", "two"]


def test_a_prompt_file_without_a_name_is_no_leave_to_use_captions(models, folder):
    with pytest.raises(ConfigError, match=r"prompts\.train: there is no file ''"):
        check_files(config(folder, models, prompts={"train": ""}))


def test_prompts_of_their_own_are_drawn_instead(models, folder):
    prompts = {"train": str(models / "prompts.txt")}
    found = check_files(config(folder, models, prompts=prompts))
    assert "one" not in found.train.texts
    assert set(found.trained()) == {*found.train.texts, "one", "two"}


# --- stages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("available", "count"), [(3, 6), (7, 3), (5, 5), (1, 4), (8, 3)])
def test_every_demonstration_is_drawn_before_one_is_drawn_again(available, count):
    drawn: Counter[int] = Counter()
    for stage in range(12):
        found = draw(5, stage, available, count)
        assert len(found) == count
        for j in found:
            drawn[j] += 1
            assert max(drawn.values()) - min(drawn[k] for k in range(available)) <= 1


def test_seed_and_stage_decide_the_draw():
    assert draw(0, 3, 20, 20) == draw(0, 3, 20, 20)
    assert len({tuple(draw(seed, stage, 20, 20)) for seed in (0, 1) for stage in (0, 1)}) == 4


def test_units_name_pictures_and_captions(models, folder):
    settings = config(folder, models)
    known = read_folder(str(folder))
    units = demonstration_units(settings, known, stage=2, version=1, n=3, first=5)
    assert [u.index for u in units] == [5, 6] and settings.groups == 6
    assert {(u.domain, u.stage, u.version, u.branches, u.fork) for u in units} == {
        (Domain.DEMONSTRATE, 2, 1, 1, 1)
    }
    groups = [g for u in units for g in u.groups]
    assert [g.index for g in groups] == [*range(6)]
    captions = {str(d.file): d.caption for d in known}
    assert all(captions[g.picture] == g.prompt for g in groups)
    assert picture_files(units[1])[0] == Path(units[1].groups[0].picture).read_bytes()


def test_a_picture_that_went_away_is_named(models, folder):
    known = read_folder(str(folder))
    units = demonstration_units(config(folder, models), known, 0, 0, 4, 1)
    (folder / "1.png").unlink()
    with pytest.raises(ConfigError, match=r"1\.png cannot be read any more .*resume"):
        [picture_files(unit) for unit in units]


def test_small_pictures_are_told():
    known = [Demonstration(Path("a.png"), "x", (8, 8)), Demonstration(Path("b.png"), "x", (16, 9))]
    assert too_small(known, (8, 8)) is None
    told = too_small(known, (16, 9))
    assert told and "1 of 2 demonstrations" in told and "a.png (8 × 8)" in told


def test_a_configuration_may_leave_prompts_out(folder, models):
    made = Config(
        preset="sqil",
        demonstrations=Demonstrations(path=str(folder)),
        branching=config(folder, models).branching,
        selection=config(folder, models).selection,
        advantage=config(folder, models).advantage,
    )
    assert made.prompts == Prompts()
