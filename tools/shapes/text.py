"""Stage ``text`` makes the tokenizer and trains the text encoder of the base model.

The contrastive training has few steps, so that the encoder knows the words but binds colours to
shapes imperfectly, as the text encoders of real text-to-image models do. Each caption also competes
with the caption of the opposite relation. Otherwise the encoder would ignore the order of words,
and the base model would draw both orders equally often.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from transformers import CLIPTextModel

from b2ray.shapes.captions import OPPOSITE
from b2ray.shapes.render import render_batch
from tools.shapes.common import Settings, begin, draw_captions, replacing, to_tensor, train
from tools.shapes.contrast import embed_images, embed_texts, make_clip, other_scenes
from tools.shapes.facts import record
from tools.shapes.words import make_tokenizer

STEPS, BATCH, RATE, PICTURES = 500, 64, 2e-3, 10_000
WIDTH, HEADS, LAYERS = 64, 2, 2


def build(settings: Settings) -> None:
    """Train the encoder and save ``base/tokenizer`` and ``base/text_encoder``."""
    start = time.perf_counter()
    rng = begin(settings, 2)
    tokenizer = make_tokenizer()
    clip = make_clip(tokenizer, WIDTH, HEADS, LAYERS, LAYERS)
    captions = draw_captions(settings.count(PICTURES, BATCH), rng)
    pictures = render_batch(captions, settings.seed + 2)

    opposites = [replace(c, relation=OPPOSITE[c.relation]) for c in captions]

    def loss_of(step: int) -> torch.Tensor:
        picked = rng.integers(len(captions), size=BATCH).tolist()
        image = embed_images(clip, to_tensor(pictures[picked]))
        texts = [*(captions[i].text for i in picked), *(opposites[i].text for i in picked)]
        own, opposite = embed_texts(clip, tokenizer, texts).chunk(2)
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
            "minutes": (time.perf_counter() - start) / 60,
        },
    )
