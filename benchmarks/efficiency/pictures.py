"""The base model's pictures and the methods' after the whole budget, same captions and seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

from benchmarks.efficiency.trials import Trial

mpl.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = 8  # captions; the strips begin with each training caption once
ROW, HEAD = 1.0, 0.85  # inches


def median(trials: list[tuple[Trial, dict[str, Any]]]) -> Trial:
    """The seed in the middle by judged alignment on training captions."""
    order = sorted(trials, key=lambda t: t[1]["judge"]["train"]["after"])
    return order[len(order) // 2][0]


def sheet(done: dict[str, list[tuple[Trial, dict[str, Any]]]], runs: Path, file: Path) -> None:
    """Rows of pictures as a PNG, each method's of its median seed, beside the same seed's before.

    A method whose run's folder is gone is left out; nothing is written if all are.
    """
    rows, captions = [], []
    for method, trials in done.items():
        folder = runs / median(trials).name
        steps = sorted((folder / "pictures").glob("step-*"))
        if not steps:
            continue
        first = json.loads((folder / "evaluations" / f"{steps[0].name}_train.json").read_text())
        captions = first["prompts"][:COLUMNS]
        before, after = (_cut(step / "train_strip.png") for step in (steps[0], steps[-1]))
        rows.append((method, before, after))
    if not rows:
        return
    height = ROW * len(rows) + HEAD
    figure, axes = plt.subplots(len(rows), 2 * COLUMNS, figsize=(17, height), squeeze=False)
    for row, (method, *both) in zip(axes, rows, strict=True):
        for half, pictures in enumerate(both):
            for column, picture in enumerate(pictures):
                axis = row[half * COLUMNS + column]
                axis.imshow(picture)
                axis.set_xticks([])
                axis.set_yticks([])
                axis.grid(visible=False)
        row[0].set_ylabel(method, rotation=0, ha="right", va="center", fontsize=9)
    for column, caption in enumerate(captions * 2):
        words = caption.replace(" a ", "\na ").replace(" below", "\nbelow")
        axes[0, column].set_title(words, fontsize=5.5)
    top, title = 1 - HEAD / height, 1 - 0.25 / height
    figure.subplots_adjust(left=0.12, right=0.995, top=top, bottom=0.02, wspace=0.06, hspace=0.06)
    figure.text(0.34, title, "before", ha="center", fontsize=11)
    figure.text(0.78, title, "after the whole budget", ha="center", fontsize=11)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def _cut(strip: Path) -> list[np.ndarray]:
    whole = np.asarray(Image.open(strip).convert("RGB"))
    side = whole.shape[0]
    return [whole[:, j * side : (j + 1) * side] for j in range(COLUMNS)]
