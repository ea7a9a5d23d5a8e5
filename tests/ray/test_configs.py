"""Every file in configs/ as a short run on small models of the same classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from b2ray.options import merge, parse
from b2ray.run import main
from b2ray.shapes.demonstrations import main as demonstrations
from tests.captioning import save_captioning
from tests.models import ZERO_SNR, pipeline, sdxl
from tests.runner import ROOT, Runner

CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.yaml"))
SHAPES = ROOT / "b2ray" / "shapes" / "weights"
SMALL = {
    "curriculum": {"stages": 1},
    "branching": {"unit_groups": 2, "branch_batch": 4},
    "sampling": {"height": None, "width": None},
    "learner": {"batch": 4, "microbatch": 8, "threads": 1},
    "evaluation": {"every": 0, "images": 4, "final_images": 4, "batch": 4, "previews": 2},
    "fleet": {
        "samplers": {"min": 1, "max": 1, "cpus": 0.5, "gpus": 0},
        "scorers": {"count": 1, "cpus": 0.25, "gpus": 0},
        "learner": {"cpus": 0.5, "gpus": 0},
    },
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline for each family that a configuration names."""
    root = tmp_path_factory.mktemp("bases")
    pipeline().save_pretrained(root / "sd1")
    pipeline(**ZERO_SNR).save_pretrained(root / "sd2")
    sdxl().save_pretrained(root / "sdxl")
    return root


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models for BERTScore."""
    place = tmp_path_factory.mktemp("captioning")
    save_captioning(place)
    return place


def stand_in(reward: dict[str, Any], models: Path, captioner: Path) -> dict[str, Any]:
    """The same reward on a small model; what ships with the package stays as it is."""
    if reward["path"]:
        return reward
    small: dict[str, dict[str, Any]] = {
        "clip": {"path": str(models / "reward")},
        "aesthetic": {"path": str(SHAPES / "aesthetic")},
        "imagereward": {"path": str(SHAPES / "imagereward")},
        "bertscore": {
            "path": str(captioner / "blip"),
            "options": {"text_model": str(captioner / "bert"), "max_new_tokens": 4},
        },
    }
    return {**reward, **small.get(reward["kind"], {}), "revision": None}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_runs(
    runner: Runner, bases: Path, captioner: Path, tmp_path: Path, name: str
) -> None:
    config = parse(["--config", str(ROOT / "configs" / f"{name}.yaml")]).config
    family = "sdxl" if "xl" in name else "sd2" if "sd2" in name else "sd1"
    values = merge(config.model_dump(mode="json"), SMALL)
    branches = config.branching.branches
    values["branching"]["images"] = max(4, 2 * branches)
    if not config.model.path.startswith("b2ray/"):
        values["model"] |= {"path": str(bases / family), "revision": None, "variant": None}
    if config.demonstrations.path:
        values["demonstrations"]["path"] = str(tmp_path / "demonstrations")
        assert demonstrations([values["demonstrations"]["path"], "--count", "8"]) == 0
    for section, field in ((values, "rewards"), (values["evaluation"], "heldout_rewards")):
        section[field] = [stand_in(r, runner.models, captioner) for r in section[field]]
    values |= {"runs": str(runner.runs), "name": f"config-{name}"}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    assert main(["--config", str(file)]) == 0
    summary = json.loads((runner.runs / f"config-{name}" / "summary.json").read_text())
    assert summary["stages"] == 1
    assert summary["unet_evals"] > 0
    assert set(summary) >= {r["name"] for r in values["rewards"]}
