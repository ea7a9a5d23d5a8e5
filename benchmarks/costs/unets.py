"""The UNets of the models that configs/ names: their shapes, and the work of one call."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

# What the models' unet/config.json says beside the class's defaults.
SD1 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {
    "CompVis/stable-diffusion-v1-4": SD1,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD1,
    "stabilityai/stable-diffusion-2-1": SD2,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
}


def forward_tflop(shape: dict) -> float:
    """Work of one UNet call on one latent, in TFLOP (a multiplication and an addition are two)."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**shape)
        latent = torch.empty(1, 4, shape["sample_size"], shape["sample_size"])
        text = torch.empty(1, 77, shape["cross_attention_dim"])
        more = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        step = torch.ones(1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(latent, step, text, added_cond_kwargs=more)
    return counter.get_total_flops() / 1e12
