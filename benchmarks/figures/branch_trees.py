"""The pictures of docs/explanation/algorithm.md: branch trees of a run, and what stages train.

    python -m benchmarks.figures.branch_trees [--runs runs] [--output docs/explanation/algorithm]

The run is the quickstart, shortened, with an interval that grows from 3 to all 10 steps, a step a
stage: a few minutes on two cores. It is not run again if it is there.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image

from b2ray.algorithm.curriculum import interval
from b2ray.run import main as run
from b2ray.tracking.branch_trees import Tree, load

mpl.use("Agg")
import matplotlib.pyplot as plt

NAME, STEPS, START = "branch_trees", 10, 3
COMMAND = [
    *("--config", "configs/quickstart.yaml", f"--name={NAME}", "--selection.kind=best_worst"),
    *(f"--curriculum.start={START}", f"--curriculum.end={STEPS}"),
    *(f"--curriculum.stages={STEPS - START + 1}", "--branching.images=64", "--evaluation.trees=8"),
    *("--evaluation.every=0", "--evaluation.images=32", "--evaluation.final_images=32"),
]
SHOWN = (3, 5, 7, 9, 10)  # intervals
GREEN, RED, GREY = "#1a7f37", "#b42318", "#8c8c8c"


def main(argv: Sequence[str] | None = None) -> int:
    """Run it if need be, and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures.branch_trees", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run is kept")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("docs/explanation/algorithm"),
        help="folder of the pictures",
    )
    arguments = parser.parse_args(argv)
    folder = arguments.runs / NAME
    if not (folder / "summary.json").exists():
        code = run([*COMMAND, f"--runs={arguments.runs}"])
        if code:
            return code
    trees = {n: widest(load(folder, n - START + 1)) for n in range(START, STEPS + 1)}
    arguments.output.mkdir(parents=True, exist_ok=True)
    one_tree(trees[9]).savefig(arguments.output / "tree.png", dpi=110)
    intervals([trees[n] for n in SHOWN]).savefig(arguments.output / "intervals.png", dpi=110)
    schedules().savefig(arguments.output / "schedule.png", dpi=110)
    return 0


def widest(trees: Sequence[Tree]) -> Tree:
    """Of a stage's groups the one whose leaves differ most: the others look no more different."""
    return max(trees, key=lambda tree: float(np.std([leaf.reward for leaf in tree.leaves])))


def one_tree(tree: Tree) -> plt.Figure:
    """A group from x_T to its leaves, with rewards and advantages."""
    count, n = len(tree.leaves), tree.interval
    figure, axis = plt.subplots(figsize=(10, 6.4), layout="constrained")
    axis.set_xlim(-1.0, 10.0)
    axis.set_ylim(count - 0.3, -1.1)
    axis.axis("off")
    middle = (count - 1) / 2
    noise = np.random.default_rng(0).normal(0.5, 0.25, (32, 32, 3)).clip(0, 1)
    show(axis, noise, -0.2, middle, 1.5)
    show(axis, picture(tree.fork), 3.2, middle, 1.5)
    axis.text(-0.2, middle + 1.15, "$x_T$: noise", ha="center", fontsize=10)
    axis.text(3.2, middle + 1.15, "the fork, as the\nmodel foresees it", ha="center", va="top")
    arrow(axis, (0.55, middle), (2.45, middle), GREY)
    note = f"prefix\n{STEPS - n} of {STEPS} steps,\nonce for all"
    axis.text(1.5, middle - 0.15, note, ha="center", va="bottom", fontsize=10)
    axis.text(4.9, -0.75, f"{count} branches, {n} steps each:\nthe interval", ha="center")
    axis.text(8.15, -0.75, "reward", ha="center")
    axis.text(9.35, -0.75, "advantage", ha="center")
    for k, leaf in enumerate(tree.leaves):
        colour = GREY if not leaf.selected else GREEN if leaf.advantage > 0 else RED
        arrow(axis, (3.95, middle), (6.2, k), colour, 2.2 if leaf.selected else 1)
        show(axis, picture(leaf.picture), 6.75, k, 0.86, colour if leaf.selected else None)
        weight = "bold" if leaf.selected else "normal"
        said = {"ha": "center", "va": "center", "weight": weight, "color": colour}
        axis.text(8.15, k, number(leaf.reward), **{**said, "color": "black"})
        axis.text(9.35, k, number(leaf.advantage, "+"), **said)
    figure.suptitle(f"“{tree.prompt}”", fontsize=12)
    return figure


def intervals(trees: Sequence[Tree]) -> plt.Figure:
    """A row for each length of the interval: the fork, then the leaves."""
    columns = 1 + len(trees[0].leaves)
    figure, axes = plt.subplots(len(trees), columns, figsize=(10, 1.28 * len(trees) + 0.3))
    figure.subplots_adjust(0.17, 0.01, 0.995, 0.9, wspace=0.08, hspace=0.32)
    for row, tree in zip(axes, trees, strict=True):
        spread = np.std([leaf.reward for leaf in tree.leaves])
        label = f"n = {tree.interval} of {STEPS}\nstd {spread:.2f}"
        row[0].text(-0.35, 0.5, label, transform=row[0].transAxes, ha="right", va="center")
        pictures = [tree.fork, *(leaf.picture for leaf in tree.leaves)]
        for place, (axis, content) in enumerate(zip(row, pictures, strict=True)):
            axis.imshow(picture(content), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if place:
                axis.set_title(number(tree.leaves[place - 1].reward), fontsize=9, pad=2)
    axes[0][0].set_title("the fork", fontsize=9, pad=2)
    figure.text(0.6, 0.965, "leaves of one group, with their rewards", ha="center", fontsize=11)
    return figure


def schedules() -> plt.Figure:
    """Which of 20 denoising steps each of 100 stages trains."""
    total, stages = 20, 100
    kinds = {"b2: from half of the steps": 10, "b2_released: from 14 of 20": 14}
    figure, axes = plt.subplots(1, len(kinds), figsize=(10, 3), sharey=True, layout="constrained")
    for axis, (title, start) in zip(axes, kinds.items(), strict=True):
        lengths = np.array([interval(i, stages, start, total) for i in range(stages)])
        fork = total - lengths
        axis.fill_between(range(stages), 0, fork, step="post", color="#d7d9de", label="prefix")
        axis.fill_between(
            range(stages), fork, total, step="post", color="#5b7fc7", label="interval: trained"
        )
        axis.set(title=title, xlabel="stage", xlim=(0, stages - 1), ylim=(total, 0))
    axes[0].set_ylabel("denoising step\n(the image is below)")
    axes[0].set_yticks([0, 5, 10, 15, 20])
    axes[0].legend(loc="lower right")
    return figure


def number(value: float, sign: str = "") -> str:
    """A figure with a true minus."""
    return f"{value:{sign}.2f}".replace("-", "−")


def picture(content: bytes) -> np.ndarray:
    """A picture file's pixels, uint8."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def show(
    axis: plt.Axes, pixels: np.ndarray, x: float, y: float, size: float, frame: str | None = None
) -> None:
    """A picture centred on a point; `size` is its height in units of the axis."""
    box = axis.get_position()
    across = abs(np.diff(axis.get_xlim())[0]) / (box.width * axis.figure.get_figwidth())
    down = abs(np.diff(axis.get_ylim())[0]) / (box.height * axis.figure.get_figheight())
    half = size / 2 * across / down
    around = (x - half, x + half, y + size / 2, y - size / 2)
    axis.imshow(pixels, extent=around, aspect="auto", interpolation="nearest", zorder=3)
    if frame:
        low = (x - half, y - size / 2)
        axis.add_patch(plt.Rectangle(low, 2 * half, size, fill=False, ec=frame, lw=2.5, zorder=4))


def arrow(
    axis: plt.Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    width: float = 1.4,
) -> None:
    """An arrow between two points."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=style)


if __name__ == "__main__":
    raise SystemExit(main())
