"""What the user sees of a run: progress bars, the table at its end, sheets of pictures."""

from __future__ import annotations

import contextlib
import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

# The layout of a sheet, in pixels; pictures smaller than MIN_CELL are enlarged.
MARGIN, GAP, TITLE, LABEL, MIN_CELL = 4, 24, 26, 160, 96
ROWS, COLUMNS = 8, 4  # prompts, and pictures of each, that a sheet has at most


class Progress:
    """A progress bar of the stages, and below it one of the phase that is going on.

    Without a terminal, the bars become lines in the log.

    Args:
        stages: the number of stages; 0 shows no bar for them.
        done: how many of the stages are done already.
    """

    def __init__(self, stages: int, done: int) -> None:
        self._live = sys.stderr.isatty()
        self._stages = tqdm(
            total=stages,
            initial=done,
            desc="stages",
            unit="stage",
            disable=not (self._live and stages),  # only a run has stages, other commands do not
        )

    @contextlib.contextmanager
    def bar(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], Any]]:
        """Show a progress bar for one phase.

        Args:
            what: the label of the bar.
            total: the number of units; 0 shows the time that has passed instead.
            unit: the name of a unit, such as `image`.

        Yields:
            The function that moves the bar by a number of units.
        """
        # In a log file the bar is a line every 30 seconds, and phases shorter than that have none.
        interval = 0.1 if self._live else 30.0
        with tqdm(
            total=total,
            desc=what,
            bar_format=None if total else "{desc} ({elapsed})",
            unit=unit,
            position=0 if self._stages.disable else 1,
            leave=False,
            mininterval=interval,
            maxinterval=interval,
            delay=0.0 if self._live else interval,
        ) as bar:
            yield bar.update

    def line(self, text: str) -> None:
        """Print a line that stays on the screen, above the bars."""
        tqdm.write(text, file=sys.stderr)

    def stage_done(self) -> None:
        """Move the bar of the stages by one."""
        self._stages.update()

    def close(self) -> None:
        """Remove the bars from the screen."""
        self._stages.close()


def sheet(prompts: Sequence[str], blocks: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
    """Lay out pictures for comparison: one row per prompt, one block of columns per title.

    Args:
        prompts: the prompt of each of N pictures.
        blocks: (title, uint8 pictures of shape (N, height, width, 3)) of the same seeds.
    """
    # Which pictures belong to each prompt.
    by_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(i)
    rows = list(by_prompt.items())[:ROWS]

    # The size of the sheet.
    columns = min(COLUMNS, max(len(indices) for _, indices in rows))
    height, width = blocks[0][1].shape[1:3]
    scale = max(1, round(MIN_CELL / min(height, width)))
    cell_w, cell_h = width * scale + MARGIN, height * scale + MARGIN
    font = ImageFont.load_default(size=14)
    widest = max(math.ceil(font.getlength(title)) for title, _ in blocks)
    block_w = max(columns * cell_w, widest) + GAP
    page = Image.new("RGB", (LABEL + len(blocks) * block_w, TITLE + len(rows) * cell_h), "white")

    draw = ImageDraw.Draw(page)
    for b, (title, pictures) in enumerate(blocks):
        left = LABEL + b * block_w
        draw.text((left, MARGIN), title, "black", font)
        for r, (prompt, indices) in enumerate(rows):
            top = TITLE + r * cell_h
            if b == 0:
                text = textwrap.fill(prompt, 20, max_lines=5)
                draw.multiline_text((MARGIN, top), text, "black", font)
            for c, i in enumerate(indices[:columns]):
                image = Image.fromarray(pictures[i]).resize(
                    (width * scale, height * scale), Image.Resampling.NEAREST
                )
                page.paste(image, (left + c * cell_w, top))
    return page


def strip(pictures: np.ndarray) -> Image.Image:
    """Join uint8 pictures of shape (N, height, width, 3) side by side; `cut` is the inverse."""
    return Image.fromarray(np.concatenate(list(pictures), axis=1))


def cut(file: Path, count: int) -> np.ndarray:
    """Read a file that `strip` made.

    Args:
        file: the file.
        count: the number of pictures in it.

    Returns:
        The uint8 pictures, shape (count, height, width, 3).
    """
    with Image.open(file) as image:
        return np.stack(np.split(np.asarray(image.convert("RGB")), count, axis=1))


def save_png(image: Image.Image, file: Path) -> None:
    """Write a PNG file under another name, then rename it; its folder is made if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    image.save(part, format="PNG")
    part.replace(file)


def closing_table(summary: dict[str, Any], page: Path | None = None) -> None:
    """Print the table at the end of a run, and where its files are.

    Args:
        summary: the content of summary.json.
        page: the file of the run's page; not mentioned if it does not exist.
    """
    table = Table(title=f"{summary['name']}: before and after", title_justify="left")
    for column, justify in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    if "reward" in summary:
        table.add_row("reward, training prompts", *_pair(summary["reward"], "{:.3f}"))
    for name, sets in summary.items():
        if not isinstance(sets, dict) or "train" not in sets:
            continue
        for which, label in (("train", "training prompts"), ("heldout", "unseen prompts")):
            if which in sets:
                table.add_row(f"{name}, {label}", *_pair(sets[which], "{:.3f}"))
    for name, pair in summary["diversity"].items():
        table.add_row(f"diversity ({name})", *_pair(pair, "{:.3f}"))
    console = Console()
    console.print(table)
    console.print(
        f"{summary['reward_queries']:,} reward queries, {summary['unet_evals']:,} UNet evaluations,"
        f" {summary['seconds']:.0f} s"
    )
    files = {**summary["files"], **({"page": page} if page and page.exists() else {})}
    for what, where in files.items():
        console.print(f"{what:9} {where}", soft_wrap=True, highlight=False)


def _pair(pair: dict[str, float], form: str) -> tuple[str, str]:
    return form.format(pair["before"]), form.format(pair["after"])
