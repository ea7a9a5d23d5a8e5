"""The builder, at a few thousandths of its size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from b2ray.config import Reward
from b2ray.rewards import load
from b2ray.shapes import BASE, all_captions, render_batch
from tools.shapes import degrade
from tools.shapes.__main__ import STAGES, main
from tools.shapes.common import replacing
from tools.shapes.evaluate import area_under_curve


@pytest.fixture
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("same_threads")
def test_a_tiny_build_leaves_folders_that_load(tmp_path):
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel, CLIPProcessor

    for stage in STAGES:
        assert main(["--out", str(tmp_path), "--scale", "0.002", "--only", stage]) == 0
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        ["a red circle above a blue square"],
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert images.shape == (1, 32, 32, 3)
    CLIPModel.from_pretrained(tmp_path / "reward")
    CLIPProcessor.from_pretrained(tmp_path / "reward")
    for kind in ("aesthetic", "imagereward"):
        spec = Reward(name=kind, kind=kind, path=str(tmp_path / kind))
        pictures = (images * 255).astype(np.uint8)
        reward = load(spec, torch.device("cpu"))
        scores = reward.score(pictures, ["a red circle above a blue square"])
        assert scores.shape == (1,) and np.isfinite(scores).all()
    assert "Measured" in (tmp_path / "README.md").read_text()
    assert len((tmp_path / "prompts" / "heldout.txt").read_text().splitlines()) == 64
    assert not list(tmp_path.rglob(".*"))


def test_stages_run_side_by_side_and_a_failure_is_told(tmp_path, capsys):
    tiny = ["--out", str(tmp_path), "--scale", "0.002"]
    assert main([*tiny, "--only", "prompts,text"]) == 0
    assert (tmp_path / "prompts" / "train.txt").exists()
    assert (tmp_path / "base" / "text_encoder" / "config.json").exists()
    assert main([*tiny, "--only", "card,prompts"]) == 1
    assert "Stage card failed" in capsys.readouterr().err


def test_help_names_the_tool_and_every_stage(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # so that no line is broken
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "usage: python -m tools.shapes" in text and ", ".join(STAGES) in text


def test_an_unknown_stage_is_refused(capsys):
    assert main(["--only", "vea"]) == 2
    assert "Unknown stage 'vea'" in capsys.readouterr().err


def test_stages_come_after_those_they_need():
    names = list(STAGES)
    assert all(names.index(n) < names.index(s) for s, needs in STAGES.items() for n in needs)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with replacing(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), replacing(target) as folder:
        (folder / "b").write_text("2")
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["a"]
    with replacing(target) as folder:
        (folder / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_area_under_the_curve_counts_ties_half():
    right = np.array([1.0, 1.0, 0.0, 0.0])
    assert area_under_curve(np.array([3.0, 2.0, 1.0, 0.0]), right) == 1.0
    assert area_under_curve(np.array([1.0, 1.0, 1.0, 1.0]), right) == 0.5
    assert area_under_curve(np.array([1.0, 3.0, 2.0, 0.0]), right) == 0.75


@pytest.mark.parametrize("way", degrade._WAYS)
def test_a_stronger_degradation_is_farther_from_the_picture(way):
    pictures = render_batch(all_captions()[::700], seed=0)
    distance = []
    for strength in (0.0, 0.2, 0.5, 1.0):
        rng = np.random.default_rng(0)
        worse = np.stack([way(picture, strength, rng) for picture in pictures])
        assert (worse.shape, worse.dtype) == (pictures.shape, np.uint8)
        distance.append(np.abs(worse.astype(float) - pictures).mean())
    assert distance[0] == 0 and distance == sorted(distance) and distance[-1] > distance[1]


def test_noisier_latents_decode_to_worse_pictures():
    vae = AutoencoderKL.from_pretrained(BASE / "vae").eval()
    pictures = render_batch(all_captions()[::700], seed=0)
    distance = []
    for noise in (0.0, 0.3, 1.0):
        decoded = degrade.through(vae, pictures, np.full(len(pictures), noise))
        distance.append(np.abs(decoded.astype(float) - pictures).mean())
    assert distance == sorted(distance)


def test_degradations_of_the_same_seed_are_the_same():
    vae = AutoencoderKL.from_pretrained(BASE / "vae").eval()
    pictures = render_batch(all_captions()[::200], seed=0)
    strength = np.linspace(0.1, 1, len(pictures))
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(degrade.degrade(pictures, strength, vae, np.random.default_rng(1)))
    assert np.array_equal(*made)
    assert (made[0] != pictures).any((1, 2, 3)).all()
