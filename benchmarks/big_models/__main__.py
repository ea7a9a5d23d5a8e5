"""SD 1.5- and SDXL-shaped models through the whole job: memory of each actor, pictures per second.

    python -m benchmarks.big_models --family sd15 [--small] [--gpu] [-- --section.field=value …]

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
from pathlib import Path
from typing import Any

import torch

from b2ray.config.load import parse
from benchmarks.big_models.models import make
from benchmarks.big_models.peak import flops, matrix_peak, shares
from benchmarks.speed.workloads import work

SHAPES = Path("b2ray/shapes")


def main() -> None:
    """Make the model, check it, run it, and print what was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.big_models", description=__doc__.splitlines()[0]
    )
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
        "learner.inner_epochs": 2,
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


if __name__ == "__main__":
    main()
