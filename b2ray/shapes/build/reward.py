"""Stage ``reward``: the CLIP that rewards pictures for showing their caption.

Trained plainly, CLIP learns which words occur and little about which colour belongs to which
shape. Here every caption competes with its five near misses, and every picture with pictures of
a near miss and with broken ones, some of them passed through the autoencoder, because that is
where a base model's mistakes lie.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from b2ray.shapes.build.common import (
    Settings,
    begin,
    draw_captions,
    replacing,
    to_pixels,
    to_tensor,
    train,
)
from b2ray.shapes.build.contrast import (
    embed_images,
    embed_texts,
    image_processor,
    make_clip,
    other_scenes,
)
from b2ray.shapes.build.facts import record
from b2ray.shapes.build.words import make_tokenizer
from b2ray.shapes.captions import Caption, near_misses
from b2ray.shapes.render import draw, place, render

STEPS, FAMILIES_PER_STEP, FAMILIES, RATE = 3_000, 21, 8_000, 1e-3
WIDTH, HEADS, TEXT_LAYERS, VISION_LAYERS = 96, 3, 3, 4
LARGEST_SCALE = 30.0  # a cap on the softmax scale keeps the cosines spread out
NOISE = 0.06  # largest standard deviation of pixel noise, pictures from −1 to 1


@dataclass(frozen=True, slots=True)
class Family:
    """A caption and a near miss of it, each with the captions it must be told from."""

    captions: tuple[Caption, Caption]
    wrong: tuple[list[Caption], list[Caption]]


def build(settings: Settings) -> None:
    """Trains the reward and saves it with its processor in ``reward``."""
    started = time.perf_counter()
    rng = begin(settings, 3)
    vae = AutoencoderKL.from_pretrained(settings.base / "vae").eval()
    tokenizer = make_tokenizer()
    clip = make_clip(tokenizer, WIDTH, HEADS, TEXT_LAYERS, VISION_LAYERS)
    families = _families(settings.count(FAMILIES, 2 * FAMILIES_PER_STEP), rng)
    pictures = _pictures(families, vae, rng)

    def loss_of(step: int) -> torch.Tensor:
        picked = rng.choice(len(families), FAMILIES_PER_STEP, replace=False)
        images = to_tensor(pictures[picked].swapaxes(0, 1).reshape(-1, *pictures.shape[2:]))
        images = images + NOISE * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)
        image = embed_images(clip, images)
        return _loss(clip, image, [families[i] for i in picked], tokenizer)

    steps = settings.count(STEPS)
    loss = train("reward", list(clip.parameters()), steps, RATE, loss_of)
    clip.eval()
    with replacing(settings.reward) as folder:
        clip.save_pretrained(folder)
        CLIPProcessor(image_processor(), tokenizer).save_pretrained(folder)
    record(
        settings,
        "reward",
        {
            "steps": steps,
            "loss": loss,
            "parameters": sum(p.numel() for p in clip.parameters()),
            "minutes": (time.perf_counter() - started) / 60,
        },
    )


def _loss(
    clip: CLIPModel, image: torch.Tensor, picked: list[Family], tokenizer: CLIPTokenizer
) -> torch.Tensor:
    """Cross-entropy both ways.

    Args:
        image: ``(3 · families, width)``: pictures of the captions, pictures of their near
            misses, broken pictures.
    """
    captions = [f.captions[side] for side in (0, 1) for f in picked]
    wrong = [f.wrong[side] for side in (0, 1) for f in picked]
    everything = list(dict.fromkeys([*captions, *(w for group in wrong for w in group)]))
    row = {caption: i for i, caption in enumerate(everything)}
    text = embed_texts(clip, tokenizer, [caption.text for caption in everything])
    own = text[[row[c] for c in captions]]
    hard = text[[[row[w] for w in group] for group in wrong]]  # (captions, 5, width)
    scale = clip.logit_scale.exp().clamp(max=LARGEST_SCALE)
    good, broken = image[: len(captions)], image[len(captions) :]
    among = scale * good @ own.T  # pictures × captions
    missed = scale * torch.einsum("nd,nkd->nk", good, hard)
    to_text = torch.cat([other_scenes(among, captions), missed], 1)
    to_image = torch.cat([other_scenes(among.T, captions), scale * own @ broken.T], 1)
    target = torch.arange(len(captions))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(to_text, target) + cross_entropy(to_image, target)) / 2


def _families(count: int, rng: np.random.Generator) -> list[Family]:
    out = []
    for caption in draw_captions(count, rng):
        wrong = near_misses(caption, rng)
        twin = wrong[rng.integers(len(wrong))]
        out.append(Family((caption, twin), (wrong, near_misses(twin, rng))))
    return out


@torch.no_grad()
def _pictures(families: list[Family], vae: AutoencoderKL, rng: np.random.Generator) -> np.ndarray:
    """uint8 ``(families, 3, 32, 32, 3)``: of the caption, of its near miss, broken.

    Half of the good pictures and all of the broken ones come out of the autoencoder's decoder,
    some from noisy latents, as a denoiser's results do. A broken picture lacks an object, or
    lies halfway between the two others.
    """
    out = np.empty((len(families), 3, 32, 32, 3), np.uint8)
    for i, family in enumerate(families):
        seed = [int(s) for s in rng.integers(2**31, size=2)]
        for side in (0, 1):
            # Often the same seed: same places and sizes, so that only the attribute differs.
            out[i, side] = render(family.captions[side], seed[side if i % 3 == 0 else 0])
        lone = place(family.captions[0], rng)
        out[i, 2] = draw([lone[rng.integers(2)]], rng)
    for start in tqdm(range(0, len(families), 128), desc="reward pictures", mininterval=2):
        part = out[start : start + 128]
        _decode(part, vae, rng)
    return out


def _decode(part: np.ndarray, vae: AutoencoderKL, rng: np.random.Generator) -> None:
    """Passes pictures through the autoencoder, in place; see `_pictures`."""
    count = len(part)
    latents = vae.encode(to_tensor(part.reshape(-1, 32, 32, 3))).latent_dist.mean
    latents = latents.view(count, 3, *latents.shape[1:])
    weight = torch.from_numpy(rng.uniform(0.3, 0.7, count)).float().view(-1, 1, 1, 1)
    between = latents[:, 0] * (1 - weight) + latents[:, 1] * weight
    blend = torch.from_numpy(rng.random(count) < 0.6).view(-1, 1, 1, 1)
    latents[:, 2] = torch.where(blend, between, latents[:, 2])
    noise = torch.rand(count, 3, 1, 1, 1) ** 2 * 0.3 / vae.config.scaling_factor
    latents = latents + noise * torch.randn_like(latents)
    decoded = to_pixels(vae.decode(latents.flatten(0, 1)).sample).reshape(part.shape)
    keep = rng.random((count, 3)) < 0.5
    keep[:, 2] = False
    part[~keep] = decoded[~keep]
