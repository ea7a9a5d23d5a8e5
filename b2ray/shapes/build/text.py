"""Stage ``text``: tokenizer and text encoder of the base model.

Trained contrastively for few steps, so that it knows the words but binds colours to shapes
imperfectly, as the text encoders of real text-to-image models do. Each caption also competes
with its own reversed relation: without that the encoder ignores the order of words, and a base
model built on it draws either order as often as the other.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from transformers import CLIPTextModel

from b2ray.shapes.build.common import Settings, begin, draw_captions, replacing, to_tensor, train
from b2ray.shapes.build.contrast import embed_images, embed_texts, make_clip, other_scenes
from b2ray.shapes.build.facts import record
from b2ray.shapes.build.words import make_tokenizer
from b2ray.shapes.captions import OPPOSITE
from b2ray.shapes.render import render_batch

STEPS, BATCH, RATE, PICTURES = 500, 64, 2e-3, 10_000
WIDTH, HEADS, LAYERS = 64, 2, 2


def build(settings: Settings) -> None:
    """Trains and saves ``base/tokenizer`` and ``base/text_encoder``."""
    started = time.perf_counter()
    rng = begin(settings, 2)
    tokenizer = make_tokenizer()
    clip = make_clip(tokenizer, WIDTH, HEADS, LAYERS, LAYERS)
    captions = draw_captions(settings.count(PICTURES, BATCH), rng)
    pictures = render_batch(captions, settings.seed + 2)

    reversed_ = [replace(c, relation=OPPOSITE[c.relation]) for c in captions]

    def loss_of(step: int) -> torch.Tensor:
        picked = rng.integers(len(captions), size=BATCH).tolist()
        image = embed_images(clip, to_tensor(pictures[picked]))
        told = [*(captions[i].text for i in picked), *(reversed_[i].text for i in picked)]
        own, opposite = embed_texts(clip, tokenizer, told).chunk(2)
        scale = clip.logit_scale.exp().clamp(max=100)
        logits = other_scenes(scale * image @ own.T, [captions[i] for i in picked])
        wrong = scale * (image * opposite).sum(1, keepdim=True)
        target = torch.arange(BATCH)
        cross_entropy = torch.nn.functional.cross_entropy
        to_text = cross_entropy(torch.cat([logits, wrong], 1), target)
        return (to_text + cross_entropy(logits.T, target)) / 2

    steps = settings.count(STEPS)
    loss = train("text", list(clip.parameters()), steps, RATE, loss_of)
    clip.eval()
    with replacing(settings.base / "tokenizer") as folder:
        tokenizer.save_pretrained(folder)
    with replacing(settings.base / "text_encoder") as folder:
        encoder = CLIPTextModel(clip.config.text_config)
        encoder.load_state_dict(clip.text_model.state_dict())
        encoder.save_pretrained(folder)
    record(
        settings,
        "text",
        {
            "steps": steps,
            "loss": loss,
            "parameters": sum(p.numel() for p in encoder.parameters()),
            "minutes": (time.perf_counter() - started) / 60,
        },
    )
