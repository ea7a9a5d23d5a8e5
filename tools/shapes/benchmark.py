"""Stage ``benchmark`` measures the time of denoisers of other shapes on one thread.

At 8 × 8 latents the time of a denoiser is dominated by its convolutions at the full resolution.
Therefore its attention and most of its width are at the lower resolution.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from tqdm import tqdm

from tools.shapes.common import Settings, begin
from tools.shapes.facts import record
from tools.shapes.unet import SHAPE, make_unet
from tools.shapes.words import CONTEXT

BATCH, ROUNDS = 32, 7
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]

_EVERYWHERE = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
_SINGLE = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "shipped": {},
    "48, 96; attention below": {"block_out_channels": (48, 96)},
    "64, 128; attention below": {"block_out_channels": (64, 128)},
    "48, 96; attention below; no mid block": {
        "block_out_channels": (48, 96),
        "mid_block_type": None,
    },
    "40, 80; attention everywhere": {"block_out_channels": (40, 80), **_EVERYWHERE},
    "40, 80; attention everywhere; two layers": {
        "block_out_channels": (40, 80),
        "layers_per_block": 2,
        **_EVERYWHERE,
    },
    "64; one level": {"block_out_channels": (64,), **_SINGLE},
    "96; one level": {"block_out_channels": (96,), **_SINGLE},
}
"""Name → the differences from the shipped shape."""


def build(settings: Settings) -> None:
    """Write ``facts/benchmark.json``, with one row per variant and times in ms per sample."""
    begin(settings, 6)
    rows = [
        {"shape": name, **_measure({**SHAPE, **change}, settings.count(ROUNDS, 1))}
        for name, change in tqdm(VARIANTS.items(), desc="benchmark")
    ]
    record(settings, "benchmark", {"batch": BATCH, "rows": rows})


def _measure(shape: dict[str, Any], rounds: int) -> dict[str, float]:
    """Parameters and times of a denoiser, also when only a LoRA is trained."""
    unet = make_unet(**shape)
    parameters = sum(p.numel() for p in unet.parameters())
    inputs = (torch.randn(BATCH, 4, 8, 8), torch.tensor(500), torch.randn(BATCH, CONTEXT, 64))
    with torch.no_grad():
        forward = _median(lambda: unet(*inputs), rounds)
    forward_backward = _median(lambda: _backward(unet, inputs), rounds)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS))
    lora = _median(lambda: _backward(unet, inputs), rounds)
    return {
        "parameters": parameters,
        "forward_ms": forward,
        "forward_backward_ms": forward_backward,
        "forward_backward_lora_ms": lora,
    }


def _backward(unet: UNet2DConditionModel, inputs: tuple[torch.Tensor, ...]) -> None:
    unet(*inputs).sample.square().mean().backward()


def _median(call: Callable[[], Any], rounds: int) -> float:
    """Median time in milliseconds per sample, after two warm-up calls."""
    seconds = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[2:]) / BATCH * 1e3)
