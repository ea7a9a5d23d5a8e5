"""The pictures of docs/howto/read_figures.md and reward_hacking.md: a run healthy and ill.

    python -m benchmarks.figures.healthy_curves [--runs runs/curves] [--output docs/howto]

Each is the quickstart with 16 stages and one thing changed; they take a few minutes on two cores.
What is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from PIL import Image

from b2ray.run import main as run

mpl.use("Agg")
import matplotlib.pyplot as plt

COMMON = [
    *("--config", "configs/quickstart.yaml", "--curriculum.stages=16", "--evaluation.every=4"),
    *("--evaluation.images=128", "--evaluation.final_images=128", "--evaluation.previews=16"),
]
BUSY = '[{"name": "busy", "kind": "jpeg_incompressibility"}]'
RUNS = {
    "healthy": ("healthy", []),
    "too_fast": ("learner.lr ten times larger", ["--learner.lr=4e-2"]),
    "too_late": (
        "interval of 4 of 10 steps",
        [
            *("--curriculum.start=4", "--curriculum.end=4"),
            "--objective.step_weights=inverse_gradient",
        ],
    ),
    "hacked": (
        "a reward for busy pictures",
        [f"--rewards={BUSY}", "--objective.kl_weight=0"],
    ),
}
ROWS = (
    *("reward/mean", "heldout/judge", "branch/within_share"),
    *("policy/clip_fraction", "policy/kl_reference", "diversity/pairwise"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures.healthy_curves", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/curves"))
    parser.add_argument(
        "--output", type=Path, default=Path("docs/howto"), help="folder of the two pages' folders"
    )
    arguments = parser.parse_args(argv)
    for name, (_, changes) in RUNS.items():
        if not (arguments.runs / name / "summary.json").exists():
            code = run([*COMMON, *changes, f"--runs={arguments.runs}", f"--name={name}"])
            if code:
                return code
    drawn = arguments.output / "read_figures" / "curves.png"
    hacked = arguments.output / "reward_hacking" / "before_after.png"
    for file in (drawn, hacked):
        file.parent.mkdir(parents=True, exist_ok=True)
    curves(arguments.runs).savefig(drawn, dpi=100)
    before_after = arguments.runs / "hacked" / "pictures" / "before_after_train.png"
    with Image.open(before_after) as picture:
        picture.save(hacked, optimize=True)
    return 0


def curves(runs: Path) -> plt.Figure:
    """A column for each run, a row for each figure."""
    size = (2.6 * len(RUNS), 1.45 * len(ROWS))
    figure, axes = plt.subplots(len(ROWS), len(RUNS), figsize=size, layout="constrained")
    for column, (name, (title, _)) in enumerate(RUNS.items()):
        lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").open()]
        for row, key in enumerate(ROWS):
            axis = axes[row][column]
            found = [(line["step"], line[key]) for line in lines if key in line]
            if not found:  # a divergence that does not count is not measured
                axis.axis("off")
                continue
            marker = "o" if key.startswith(("heldout", "diversity")) else ""
            axis.plot(*zip(*found, strict=True), marker=marker, markersize=3.5, linewidth=1.6)
            axis.set_xlim(0, lines[-1]["step"])
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=8)
            if key != "reward/mean":  # the hacked reward has another unit
                _share(axes[row])
            if not column:
                axis.set_ylabel(key.replace("/", "/\n"), fontsize=8)
        axes[0][column].set_title(title, fontsize=10)
        axes[-1][column].set_xlabel("stage", fontsize=9)
    return figure


def _share(axes: Sequence[plt.Axes]) -> None:
    """The same range in a row, so that the columns can be compared."""
    drawn = [axis for axis in axes if axis.lines]
    low = min(min(axis.lines[0].get_ydata()) for axis in drawn)
    high = max(max(axis.lines[0].get_ydata()) for axis in drawn)
    margin = 0.08 * (high - low) or 0.01
    for axis in drawn:
        axis.set_ylim(low - margin, high + margin)


if __name__ == "__main__":
    raise SystemExit(main())
