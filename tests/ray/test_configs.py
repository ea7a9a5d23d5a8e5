"""The files in configs/: one of each code path as a short run on small models of the same classes,
and what can be refused before a run of all the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from b2ray.config.load import merge, parse
from b2ray.errors import ConfigError
from b2ray.preflight import check_files
from b2ray.rewards import check
from b2ray.run import main
from b2ray.shapes.demonstrations import main as demonstrations
from tests.captioning import save_captioning
from tests.models import ZERO_SNR, pipeline, sdxl
from tests.runner import ROOT, Runner

CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.yaml"))
# Stable Diffusion 1, 2 with v-prediction and XL; gradient checkpointing; a captioner as reward.
RUN = ("sd14_template1", "sd21", "sdxl", "sd15_low_memory", "sd14_template1_bertscore")
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


@pytest.fixture
def small(
    models: Path, bases: Path, captioner: Path, tmp_path: Path
) -> Callable[[str], dict[str, Any]]:
    """The values of a file in configs/ on small models, for a run of one stage."""

    def values(name: str) -> dict[str, Any]:
        config = parse(["--config", str(ROOT / "configs" / f"{name}.yaml")]).config
        family = "sdxl" if "xl" in name else "sd2" if "sd2" in name else "sd1"
        settings = merge(config.model_dump(mode="json"), SMALL)
        settings["branching"]["images"] = max(4, 2 * config.branching.branches)
        if not config.model.path.startswith("b2ray/"):
            settings["model"] |= {"path": str(bases / family), "revision": None, "variant": None}
        if config.demonstrations.path:
            folder = tmp_path / "demonstrations"
            settings["demonstrations"]["path"] = str(folder)
            assert demonstrations([str(folder), "--count", "8"]) == 0
        for section, field in ((settings, "rewards"), (settings["evaluation"], "heldout_rewards")):
            section[field] = [stand_in(reward, models, captioner) for reward in section[field]]
        return settings | {"runs": str(tmp_path), "name": f"config-{name}"}

    return values


def file_of(values: dict[str, Any], folder: Path) -> str:
    """A configuration file with these values."""
    file = folder / f"{values['name']}.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


@pytest.mark.parametrize("name", RUN)
def test_a_configuration_runs(
    runner: Runner, small: Callable[[str], dict[str, Any]], tmp_path: Path, name: str
) -> None:
    values = small(name)
    assert runner.call(main, ["--config", file_of(values, tmp_path)]) == 0
    summary = json.loads((tmp_path / f"config-{name}" / "summary.json").read_text())
    assert summary["stages"] == 1
    assert summary["unet_evals"] > 0
    assert set(summary) >= {reward["name"] for reward in values["rewards"]}


def test_the_others_name_files_and_rewards_that_are_there(
    small: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    others = [name for name in CONFIGS if name not in RUN]
    assert len(others) + len(RUN) == len(CONFIGS) > len(RUN)
    problems = []
    for name in others:
        try:
            config = parse(["--config", file_of(small(name), tmp_path)]).config
            prompts = check_files(config)
            for reward in config.all_rewards:
                check(reward)
        except ConfigError as error:
            problems.append(f"{name}: {error}")
            continue
        if not prompts.train.texts:
            problems.append(f"{name}: it has no prompt to train on")
    assert problems == []
