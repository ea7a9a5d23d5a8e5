"""Stage ``reward`` trains the CLIP that rewards pictures for showing their caption.

With its usual loss, CLIP learns which words occur, but hardly which colour belongs to which shape.
Here every caption competes with its five near misses, and every picture with pictures of a near
miss and with broken ones. Some pictures pass through the autoencoder, because the mistakes of the
base model look like that.
"""

from __future__ import annotations

import time

import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from tools.shapes.common import Settings, begin, replacing, to_tensor, train
from tools.shapes.contrast import (
    embed_images,
    embed_texts,
    image_processor,
    make_clip,
    other_scenes,
)
from tools.shapes.facts import record
from tools.shapes.families import CaptionFamily, draw_families, draw_pictures
from tools.shapes.words import make_tokenizer

STEPS, FAMILIES_PER_STEP, FAMILIES, RATE = 3_000, 21, 8_000, 1e-3
WIDTH, HEADS, TEXT_LAYERS, VISION_LAYERS = 96, 3, 3, 4
LARGEST_SCALE = 30.0  # a cap on the softmax scale keeps the cosines spread out
NOISE = 0.06  # largest standard deviation of pixel noise, pictures from −1 to 1


def build(settings: Settings) -> None:
    """Train the reward and save it with its processor in ``reward``."""
    start = time.perf_counter()
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
            "minutes": (time.perf_counter() - start) / 60,
        },
    )


def _loss(
    clip: CLIPModel, image: torch.Tensor, picked: list[CaptionFamily], tokenizer: CLIPTokenizer
) -> torch.Tensor:
    """The mean of the cross-entropies from pictures to captions and from captions to pictures.

    Args:
        clip: the reward.
        image: embeddings of the pictures of the captions, of those of their near misses, and of
            broken pictures, ``(3 · families, width)``.
        picked: the families of the batch.
        tokenizer: the tokenizer of the reward.
    """
    captions = [f.captions[side] for side in (0, 1) for f in picked]
    wrong = [f.wrong[side] for side in (0, 1) for f in picked]
    distinct = list(dict.fromkeys([*captions, *(w for group in wrong for w in group)]))
    rows = {caption: i for i, caption in enumerate(distinct)}
    text = embed_texts(clip, tokenizer, [caption.text for caption in distinct])
    own = text[[rows[c] for c in captions]]
    near = text[[[rows[w] for w in group] for group in wrong]]  # (captions, 5, width)
    scale = clip.logit_scale.exp().clamp(max=LARGEST_SCALE)
    intact, broken = image[: len(captions)], image[len(captions) :]
    logits = scale * intact @ own.T  # pictures × captions
    near_logits = scale * torch.einsum("nd,nkd->nk", intact, near)
    to_text = torch.cat([other_scenes(logits, captions), near_logits], 1)
    to_image = torch.cat([other_scenes(logits.T, captions), scale * own @ broken.T], 1)
    target = torch.arange(len(captions))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(to_text, target) + cross_entropy(to_image, target)) / 2
