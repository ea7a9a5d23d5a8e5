"""The shipped weights load in plain diffusers and transformers, and do what the card says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import b2ray.shapes
from b2ray.config import Reward
from b2ray.rewards import load
from b2ray.shapes import (
    AESTHETIC,
    BASE,
    IMAGEREWARD,
    REWARD,
    WEIGHTS,
    Judge,
    all_captions,
    render_batch,
)
from b2ray.shapes.captions import near_misses
from tools.shapes.evaluate import area_under_curve


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(BASE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def reward():
    from transformers import CLIPModel, CLIPProcessor

    return CLIPModel.from_pretrained(REWARD).eval(), CLIPProcessor.from_pretrained(REWARD)


def test_the_pipeline_is_stable_diffusion_in_small(pipe):
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe.scheduler.config.clip_sample is False
    assert pipe.unet.config.in_channels == 4 and pipe.unet.config.sample_size == 8
    assert pipe.vae_scale_factor == 4
    assert pipe.tokenizer.model_max_length <= 16
    assert pipe.safety_checker is None and pipe.feature_extractor is None
    modules = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.float32}


def test_each_word_is_one_token_and_no_caption_is_cut(pipe):
    for caption in all_captions()[::13]:
        ids = pipe.tokenizer(caption.text).input_ids
        assert len(ids) == len(caption.text.split()) + 2 <= pipe.tokenizer.model_max_length
        assert pipe.tokenizer.decode(ids, skip_special_tokens=True).strip() == caption.text


def test_the_scaling_factor_gives_latents_of_unit_variance(pipe):
    pictures = render_batch(all_captions()[::55], seed=1)
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(x).latent_dist.sample() * pipe.vae.config.scaling_factor
    assert 0.9 < float(latents.std()) < 1.1


def test_samples_are_right_far_above_chance(pipe):
    picked = np.random.default_rng(3).integers(len(all_captions()), size=64)
    texts = [all_captions()[i].text for i in picked]
    images = pipe(
        texts,
        num_inference_steps=10,
        guidance_scale=2.0,
        eta=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    scores = Judge().score((images * 255).round().astype(np.uint8), texts)
    assert 0.15 < scores.mean() < 0.7  # chance is one in 1 740


def test_the_reward_ranks_the_caption_above_its_near_misses(reward):
    clip, processor = reward
    rng = np.random.default_rng(0)
    captions = [all_captions()[i] for i in rng.integers(len(all_captions()), size=64)]
    pictures = [Image.fromarray(p) for p in render_batch(captions, seed=2)]
    texts = [c.text for caption in captions for c in (caption, *near_misses(caption, rng))]
    inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = clip(**inputs)
    scores = (out.image_embeds[:, None] * out.text_embeds.view(64, 6, -1)).sum(-1)
    assert (scores[:, :1] > scores[:, 1:]).float().mean() > 0.95
    assert (scores.argmax(1) == 0).float().mean() > 0.85


def built_in(kind: str, folder: Path):
    return load(Reward(name=kind, kind=kind, path=str(folder)), torch.device("cpu"))


def test_the_aesthetic_reward_rates_clean_pictures_above_blurred_ones():
    captions = all_captions()[::29]
    clean = render_batch(captions, seed=3)
    blur = ImageFilter.GaussianBlur(1.2)
    blurred = np.stack([np.asarray(Image.fromarray(p).filter(blur)) for p in clean])
    reward, texts = built_in("aesthetic", AESTHETIC), [c.text for c in captions]
    high, low = reward.score(clean, texts), reward.score(blurred, texts)
    assert (high > low).mean() > 0.95
    assert 0 < low.mean() < high.mean() - 1 < 10


def test_imagereward_ranks_the_caption_above_its_near_misses():
    rng = np.random.default_rng(0)
    captions = [all_captions()[i] for i in rng.integers(len(all_captions()), size=64)]
    texts = [c.text for caption in captions for c in (caption, *near_misses(caption, rng))]
    pictures = render_batch(captions, seed=2).repeat(6, axis=0)
    scores = built_in("imagereward", IMAGEREWARD).score(pictures, texts).reshape(64, 6)
    assert (scores[:, :1] > scores[:, 1:]).mean() > 0.9
    assert 0.2 < scores.std() < 3


def test_imagereward_agrees_with_the_judge_on_the_models_own_samples(pipe):
    picked = np.random.default_rng(4).integers(len(all_captions()), size=96)
    texts = [all_captions()[i].text for i in picked]
    images = pipe(
        texts,
        num_inference_steps=10,
        guidance_scale=2.0,
        eta=1.0,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    ).images
    pictures = (images * 255).round().astype(np.uint8)
    scores = built_in("imagereward", IMAGEREWARD).score(pictures, texts)
    assert area_under_curve(scores, Judge().score(pictures, texts)) > 0.85


def test_the_package_is_small_and_holds_no_pickles():
    files = [p for p in Path(b2ray.shapes.__file__).parent.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 18_000_000
    weights = [p for p in files if WEIGHTS in p.parents and p.stat().st_size > 200_000]
    assert {p.suffix for p in weights} == {".safetensors"}


def test_no_configuration_names_a_folder_of_the_machine_that_built_it():
    for path in WEIGHTS.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text())


def test_the_card_tells_the_measured_figures():
    facts = json.loads((WEIGHTS / "facts" / "evaluate.json").read_text())
    card = (WEIGHTS / "README.md").read_text()
    assert facts["reward_auc"] >= 0.95
    assert f"{facts['reward_auc']:.3f}" in card
    auc = json.loads((WEIGHTS / "facts" / "imagereward.json").read_text())["auc"]
    assert auc >= 0.9
    assert f"{auc:.3f}" in card
    assert f"{facts['judged_10_steps_guidance_2_eta_1']:.1%}" in card
