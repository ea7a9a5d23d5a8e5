"""docs/howto/rewards.md keeps step with the code, and its examples run."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from b2ray.config import Reward
from b2ray.rewards import http, load
from b2ray.rewards.options import OPTIONS

GUIDE = (Path(__file__).parents[3] / "docs" / "howto" / "rewards.md").read_text(encoding="utf-8")
CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
PROMPTS = ["a red circle", "a blue square", "a dog"]


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def rows(heading: str) -> dict[str, str]:
    """First column → rest of the rows of the table under a heading; empty cells repeat."""
    lines = GUIDE.partition(f"{heading}\n")[2].partition("\n#")[0].splitlines()
    table: dict[str, str] = {}
    key = ""
    for line in [x for x in lines if x.startswith("|")][2:]:
        first, _, rest = line.strip("| ").partition("|") if line[2] != "|" else ("", "", line)
        key = first.strip() or key
        table[key] = table.get(key, "") + rest
    return table


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_kind_and_option_has_its_row(kind):
    assert f"`{kind}`" in rows("## Kinds")
    described = "".join(text for name, text in rows("### Options").items() if f"`{kind}`" in name)
    for name, field in OPTIONS[kind].model_fields.items():
        (row,) = re.findall(rf"\| *`?{name}`? \| ([^|]*) \|", f"| {described}")
        if not field.is_required():
            default = "empty" if field.default is None else field.default
            number = isinstance(default, int | float)
            found = row.strip("` ")
            assert (float(found) if number else found) == default


def test_no_option_is_described_that_is_not_there():
    known = {name for model in OPTIONS.values() for name in model.model_fields}
    text = " | ".join(f"| {row}" for row in rows("### Options").values())
    assert set(re.findall(r"\| *`(\w+)` \|", text)) == known


def test_the_usual_models_are_those_of_the_code():
    from b2ray.rewards.bertscore import PAPER_CAPTIONER
    from b2ray.rewards.clip import Clip, PickScore
    from b2ray.rewards.hps import Hps

    usual = {"clip": Clip, "pickscore": PickScore, "hps": Hps}
    table = rows("## Kinds")
    for kind, reward in usual.items():
        assert f"`{reward.usual}`" in table[f"`{kind}`"]
    assert f"`{PAPER_CAPTIONER}`" in table["`bertscore`"]


def test_the_example_rewards_run(tmp_path, monkeypatch):
    (tmp_path / "myrewards.py").write_text(examples("python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    red = np.zeros((3, 4, 4, 3), np.uint8)
    red[..., 0] = 255
    colour = load(Reward(name="c", kind="myrewards:NamedColour"), CPU)
    np.testing.assert_allclose(colour.score(red, PROMPTS), [1, -0.5, 0])
    redness = load(Reward(name="r", kind="myrewards:red"), CPU)
    shares = IMAGES.mean((1, 2)) / 255
    np.testing.assert_allclose(
        redness.score(IMAGES, PROMPTS), shares[:, 0] - shares[:, 1:].mean(1), rtol=1e-6
    )
    np.testing.assert_allclose(redness.score(red, PROMPTS), 1)


def test_the_example_server_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.1)
    (tmp_path / "server.py").write_text(examples("python")[1])
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    server = subprocess.Popen([sys.executable, tmp_path / "server.py", str(port)])
    try:
        options = {"url": f"http://127.0.0.1:{port}/", "retries": 8}
        scores = load(Reward(name="mine", kind="http", options=options), CPU)
        np.testing.assert_allclose(
            scores.score(IMAGES, PROMPTS), IMAGES.mean((1, 2, 3)) / 255, rtol=1e-6
        )
    finally:
        server.kill()
        server.wait()
