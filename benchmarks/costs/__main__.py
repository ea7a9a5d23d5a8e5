"""The estimated cost of every experiment in configs/: the figures in their first lines.

    python -m benchmarks.costs [--tflops 100] [configs/sdxl.yaml …]

UNet evaluations are counted (`b2ray.algorithm.cost`), learning as the best and the worst leaf of
every group. The work of one UNet call is counted by torch on UNets of the models' shapes, without
weights. The speed is assumed, and the VAE, the rewards and waiting come on top.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from b2ray.algorithm.cost import plan_cost
from b2ray.config.load import parse
from benchmarks.costs.unets import UNETS, forward_tflop


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.costs", description=__doc__.splitlines()[0]
    )
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


if __name__ == "__main__":
    main()
