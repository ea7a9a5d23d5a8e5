"""Stage ``reward``: the CLIP that rewards pictures for showing their caption.

Trained plainly, CLIP learns which words occur and little about which colour belongs to which
shape. Here every caption competes with its five near misses, and every picture with pictures of
a near miss and with broken ones, some of them passed through the autoencoder, because that is
where a base model's mistakes lie.
"""

from __future__ import annotations

import time

import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from b2ray.shapes.build.common import Settings, begin, replacing, to_tensor, train
from b2ray.shapes.build.contrast import (
    embed_images,
    embed_texts,
    image_processor,
    make_clip,
    other_scenes,
)
from b2ray.shapes.build.facts import record
from b2ray.shapes.build.families import Family, draw_families, draw_pictures
from b2ray.shapes.build.words import make_tokenizer

STEPS, FAMILIES_PER_STEP, FAMILIES, RATE = 3_000, 21, 8_000, 1e-3
WIDTH, HEADS, TEXT_LAYERS, VISION_LAYERS = 96, 3, 3, 4
LARGEST_SCALE = 30.0  # a cap on the softmax scale keeps the cosines spread out
NOISE = 0.06  # largest standard deviation of pixel noise, pictures from −1 to 1


def build(settings: Settings) -> None:
    """Trains the reward and saves it with its processor in ``reward``."""
    started = time.perf_counter()
    rng = begin(settings, 3)
    vae = AutoencoderKL.from_pretrained(settings.base / "vae").eval()
    tokenizer = make_tokenizer()
    clip = make_clip(tokenizer, WIDTH, HEADS, TEXT_LAYERS, VISION_LAYERS)
    families = draw_families(settings.count(FAMILIES, 2 * FAMILIES_PER_STEP), rng)
    pictures = draw_pictures(families, vae, rng)

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
