"""How a stage's time grows with its sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np

from benchmarks.speed import ours
from benchmarks.speed.workloads import WORKLOADS, Workload, layout, quick, work
from benchmarks.tables import markdown

mpl.use("Agg")
import matplotlib.pyplot as plt

# One size at a time; the others stay as they are in `BASE`.
BASE = {"groups": 16, "branches": 4, "interval": 5}
SIZES: Mapping[str, Sequence[int]] = {
    "groups": (4, 8, 16, 32, 64),
    "branches": (2, 4, 8, 16),
    "interval": (2, 4, 6, 8, 10),
    "samplers": (1, 2, 4),
}


@dataclass(frozen=True)
class Point:
    """A run.

    Attributes:
        size: of what is changed.
        seconds: of a stage.
        evaluations: of the UNet in it, a backward pass as two.
    """

    size: int
    seconds: float
    evaluations: int


def measure(folder: Path, cores: int, stages: int, small: bool) -> dict[str, list[Point]]:
    """Stages of every size, by what is changed; `small`: two tiny ones each."""
    found: dict[str, list[Point]] = {}
    for what, sizes in SIZES.items():
        for size in sizes[:2] if small else sizes:
            workload = sized(what, size, small)
            place = {**layout(cores)}
            if what == "samplers":
                place |= {"fleet.samplers.min": size, "fleet.samplers.max": size}
            asked = work(workload.config())
            ran = ours.run(workload.command(place), folder / "growth", 1 if small else stages)
            evaluations = asked.evaluations + 2 * asked.trained
            found.setdefault(what, []).append(Point(size, ran.stage, evaluations))
            print(f"{what} {size}: {ran.stage:.2f} s", flush=True)
    return found


def sized(what: str, size: int, small: bool = False) -> Workload:
    """The workload with one size changed: T = 10, all leaves trained on, one pass."""
    base = quick(WORKLOADS[0]) if small else WORKLOADS[0]
    sizes = {**({"groups": 4, "branches": 2, "interval": 2} if small else BASE)}
    if what in sizes:
        sizes[what] = size
    fields = {
        **base.fields,
        **{"objective.step_weights": "none", "objective.kl_weight": 0},
        **{"learner.timestep_fraction": 1, "learner.inner_epochs": 1},
        **{"branching.images": sizes["groups"] * sizes["branches"]},
        **{"branching.branches": sizes["branches"]},
        **{"curriculum.start": sizes["interval"], "curriculum.end": sizes["interval"]},
    }
    return Workload(f"{what} {size}", (), fields)


def slope(points: Sequence[Point]) -> float:
    """Exponent of the time in the size, by least squares over all points: 1 is linear."""
    x, y = np.log([p.size for p in points]), np.log([p.seconds for p in points])
    return float(np.polyfit(x, y, 1)[0])


def table(found: Mapping[str, Sequence[Point]]) -> str:
    """Seconds of a stage by size, and the exponent."""
    rows = [
        [
            what,
            ", ".join(f"{p.size}: {p.seconds:.1f}" for p in points),
            f"{slope(points):.2f}",
        ]
        for what, points in found.items()
    ]
    return markdown(["what grows", "seconds of a stage", "exponent"], rows)


def plot(found: Mapping[str, Sequence[Point]], file: Path) -> None:
    """Stage time over each size, beside what its UNet evaluations alone would make of the first
    point's time."""
    plt.style.use("seaborn-v0_8-whitegrid")
    figure, axes = plt.subplots(1, len(found), figsize=(3.4 * len(found), 3.2), squeeze=False)
    for axis, (what, points) in zip(axes[0], found.items(), strict=True):
        sizes = [p.size for p in points]
        axis.plot(sizes, [p.seconds for p in points], "o-", label="stage")
        first = points[0]
        unet = [first.seconds * p.evaluations / first.evaluations for p in points]
        axis.plot(sizes, unet, "--", color="grey", label="in proportion to UNet work")
        axis.set_xlabel(what)
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.set_title(f"exponent {slope(points):.2f}", fontsize=9)
    axes[0, 0].set_ylabel("seconds of a stage")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
