"""SD 1.5- and SDXL-shaped models through the whole job: memory of each actor, pictures per second.

    python benchmarks/big_models.py --family sd15 [--small] [--gpu] [-- --section.field=value …]

Weights are random: time and memory do not depend on them. Everything runs as for a user:
`b2ray check` for the memory, `b2ray run` for the speed. `--small` keeps the classes and the layout
and takes a sixteenth of the channels, so that the script runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from experiment_costs import SD1, SDXL
from speed.workloads import Work, work
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from b2ray.checks import check_files
from b2ray.config import Config
from b2ray.cost import BACKWARD
from b2ray.diffusion.policy import Policy
from b2ray.options import parse
from b2ray.shapes.build.words import make_tokenizer

SHAPES = Path("b2ray/shapes")


def main() -> None:
    """Make the model, check it, run it, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=("sd15", "sdxl"), required=True)
    parser.add_argument("--small", action="store_true", help="a sixteenth of the channels")
    parser.add_argument("--gpu", action="store_true", help="three actors share one GPU")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("more", nargs="*", help="further fields, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "base"
        make(arguments.family, arguments.small, getattr(torch, arguments.dtype)).save_pretrained(
            base
        )
        words = [*fields(base, Path(place), arguments), *arguments.more]
        config = parse(words).config
        asked = work(config)  # refuses what it cannot count before anything is run
        checked = json.loads(command("b2ray.commands.check", [*words, "--json"]))
        command("b2ray.run", [*words, "--name=big"])
        lines = (Path(place) / "big" / "metrics.jsonl").read_text().splitlines()
        report(checked, [json.loads(line) for line in lines])
        device = torch.device("cuda" if arguments.gpu else "cpu")
        peak = matrix_peak(getattr(torch, arguments.dtype), device)
        print(f"{'matrix products, at most':40} {peak / 1e12:.2f} TFLOP/s")
        for name, share in shares(
            asked, flops(config, device), json.loads(lines[-1]), peak
        ).items():
            print(f"{name:40} {share:.1%} of that")


def make(family: str, small: bool, dtype: torch.dtype) -> Any:
    """A pipeline of the family's shape with random weights."""
    share = 16 if small else 1
    xl = family == "sdxl"
    shape = dict(SDXL if xl else SD1)
    channels = shape.get("block_out_channels", [320, 640, 1280, 1280])
    shape["block_out_channels"] = [c // share for c in channels]
    if small:
        shape |= {"attention_head_dim": 2, "norm_num_groups": 10}
    parts: dict[str, Any] = {
        "vae": vae(share),
        "tokenizer": make_tokenizer(),
        "text_encoder": CLIPTextModel(text(768, 12)),
        "unet": UNet2DConditionModel(**shape),
        "scheduler": DDIMScheduler.from_pretrained(SHAPES / "weights" / "base" / "scheduler"),
    }
    if xl:
        second = CLIPTextModelWithProjection(text(1280, 20))
        parts |= {"text_encoder_2": second, "tokenizer_2": make_tokenizer()}
        return StableDiffusionXLPipeline(**parts, add_watermarker=False).to(dtype)
    none = {"safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(**parts, **none, requires_safety_checker=False).to(dtype)


def vae(share: int) -> AutoencoderKL:
    """Stable Diffusion's decoder and encoder: eight pixels to an element of a latent."""
    return AutoencoderKL(
        block_out_channels=[c // share for c in (128, 256, 512, 512)],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=min(32, 128 // share),
    )


def text(width: int, heads: int) -> CLIPTextConfig:
    """A text encoder of CLIP's width; its vocabulary does not matter here."""
    tokens = make_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12,
        num_attention_heads=heads,
        projection_dim=width,
        max_position_embeddings=tokens.model_max_length,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def fields(base: Path, runs: Path, arguments: argparse.Namespace) -> list[str]:
    """The run: one stage, the released lengths, small enough to end."""
    big = arguments.family == "sdxl" and not arguments.small
    pixels = 64 if arguments.small else 1024 if big else 512
    values = {
        "runs": runs,
        "model.path": base,
        "model.dtype": arguments.dtype,
        "model.gradient_checkpointing": big,
        "model.lora.rank": 4,
        "model.lora.alpha": 4,
        "selection.kind": "best_worst",
        "objective.step_weights": "inverse_gradient",
        "objective.kl_weight": 0,
        "learner.passes": 2,
        "learner.timestep_fraction": 1,
        "prompts.train": SHAPES / "prompts" / "train.txt",
        "prompts.heldout": SHAPES / "prompts" / "heldout.txt",
        "sampling.steps": 20,
        "sampling.guidance": 5,
        "sampling.height": pixels,
        "sampling.width": pixels,
        "curriculum.stages": 2,
        "curriculum.start": 6,
        "curriculum.end": 6,
        "branching.images": 10 if arguments.small else 40,
        "branching.branches": 5,
        "branching.unit_groups": 2 if big or arguments.small else 4,
        "branching.branch_batch": 10 if big or arguments.small else 20,
        "learner.batch": 8,
        "learner.microbatch": 2 if big else 4,
        "learner.recompute_log_probs": True,
        "evaluation.every": 0,
        "evaluation.images": 4,
        "evaluation.final_images": 4,
        "evaluation.batch": 4,
        "evaluation.previews": 0,
        "evaluation.heldout_rewards": "[]",
        "rewards": json.dumps(
            [{"name": "clip", "kind": "clip", "path": str(SHAPES / "weights" / "reward")}]
        ),
    }
    if arguments.gpu:
        values |= {"fleet.samplers.gpus": 0.25, "fleet.scorers.gpus": 0.25}
        values |= {"fleet.learner.gpus": 0.5, "fleet.stall_timeout": 3600}
    values["fleet.samplers.max"] = 1
    return [f"--{name}={value}" for name, value in values.items()]


def command(module: str, words: list[str]) -> str:
    """What the command prints; its progress goes to the screen."""
    whole = [sys.executable, "-m", module, *words]
    return subprocess.run(whole, check=True, stdout=subprocess.PIPE, text=True).stdout


def report(checked: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """Memory from the check, times from the last stage."""
    for finding in checked["findings"]:
        if "memory" in finding["what"] or finding["what"] == "ratio":
            print(f"{finding['what']:40} {finding['found']}")
    last = lines[-1]
    for name in ("time/sample", "time/update", "throughput/images_per_second"):
        print(f"{name:40} {last[name]:.2f}")


def flops(config: Config, device: torch.device) -> int:
    """Floating-point operations of one guided evaluation of one latent."""
    policy = Policy(config, device)
    (prompt, *_) = check_files(config).trained()
    policy.prepare([prompt])  # a run encodes once, too
    step, x = torch.zeros(1, dtype=torch.int64), torch.zeros(1, *policy.latent_shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        policy.predict(step.to(device), x.to(device, policy.dtype), [prompt])
    return int(counter.get_total_flops())


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of the fastest square matrix product that was found."""
    best = 0.0
    for size in (4096, 8192, 16384) if device.type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        for _ in range(3):
            wait(device)
            began = time.perf_counter()
            a @ b
            wait(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shares(asked: Work, each: int, stage: dict[str, Any], peak: float) -> dict[str, float]:
    """What sampling and learning reach of the peak in a stage, all that they do counted as time.

    A way back counts as two ways there; activations that are computed again do not count.

    Args:
        asked: of a stage.
        each: operations of an evaluation.
        stage: its line of metrics.jsonl.
        peak: operations a second.
    """
    learnt = asked.scored_again + (1 + BACKWARD) * asked.trained
    return {
        "sampling": asked.sampled * each / stage["time/sample"] / peak,
        "learning": learnt * each / stage["time/update"] / peak,
    }


if __name__ == "__main__":
    main()
