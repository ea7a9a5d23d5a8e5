"""The estimated cost of every experiment in configs/: the figures in their first lines.

    python benchmarks/experiment_costs.py [--tflops 100] [configs/sdxl.yaml …]

UNet evaluations are counted (`b2ray.cost`), learning as the best and the worst leaf of
every group. The work of one UNet call is counted by torch on UNets of the models' shapes, without
weights. The speed is assumed, and the VAE, the rewards and waiting come on top.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from b2ray.cost import plan_cost
from b2ray.options import parse

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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tflops", type=float, default=100.0, help="sustained, TFLOP per second")
    parser.add_argument("files", nargs="*", type=Path)
    arguments = parser.parse_args()
    work = {path: forward_tflop(shape) for path, shape in UNETS.items()}
    for path, tflop in work.items():
        print(f"{path}: {tflop:.2f} TFLOP for one UNet call on one latent")
    print(f"\n{HEAD.format(arguments.tflops)}")
    for file in arguments.files or sorted(Path("configs").glob("*.yaml")):
        config = parse([f"--config={file}"]).config
        if config.model.path not in work:
            continue
        cost = plan_cost(config)
        cells = [
            file.stem,
            f"{cost.reward_queries:,}",
            f"{cost.unet_evals_sampling:,}",
            f"{cost.unet_evals_learning:,}",
            f"{cost.unet_evals / 1e6:.2f} million",
            f"{cost.hours(work[config.model.path], arguments.tflops):.0f} h",
            f"{cost.bytes_per_stage / 2**30:.1f} GiB",
        ]
        print(f"| {' | '.join(cells)} |")


HEAD = """\
| experiment | reward queries | sampling | learning | UNet evaluations | at {:g} TFLOP/s | a stage |
|---|---|---|---|---|---|---|"""


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


if __name__ == "__main__":
    main()
