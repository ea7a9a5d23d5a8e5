"""The plots of the page, drawn by matplotlib as SVG.

Every plot is drawn twice, for a wide screen and for a phone, and the page's style shows one of
them. The SVG refers to the page's colours, so that a plot follows the light or dark theme.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import MaxNLocator

from b2ray.report.record import PHASES, SETS, Record

WIDE, NARROW = 1000, 350  # pixels across
PANEL = 170  # height of a panel in pixels
BINS = 120  # the most bars of a plot, and the most markers side by side
# Placeholders: `_inline` replaces these colours by those of the page.
INK, RULE = "#000101", "#000102"
SERIES = ("#000201", "#000202", "#000203", "#000204", "#000205")
COLOURS = {
    INK: "currentColor",
    RULE: "var(--rule)",
    **{sign: f"var(--series-{i})" for i, sign in enumerate(SERIES, 1)},
}
SETTINGS: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.titlecolor": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 11,
}
# Events of workers that are drawn, with their marker and label.
HAPPENED = {"died": ("X", "died"), "drains": ("v", "leaves its node"), "ready": ("o", "back")}


def progress(record: Record) -> str:
    """Plot every reward over the reward queries, with the interval of each stage below."""
    config = record.config
    # Each panel is a title with its curves, as (metric, label, line and marker, colour).
    panels: list[tuple[str, list[tuple[str, str, str, int]]]] = []
    if config.rewards:
        stage = ("reward/mean", "each stage's own pictures", "-", 2)
        panels.append(("reward, which is trained on", [stage, *_fixed("reward")]))
        if len(config.rewards) > 1:
            panels += [(f"{r.name}, a part of it", _fixed(r.name)) for r in config.rewards]
    else:
        kl = [("demonstrations/kl", "each stage's", "-", 2)]
        panels.append(("nats from the demonstrations", kl))
    for reward in config.evaluation.heldout_rewards:
        panels.append((f"{reward.name}, not trained on", _fixed(reward.name)))

    def draw(figure: Figure) -> None:
        axes = _panels(figure, [1.0] * len(panels) + [0.8])
        for axis, (title, lines) in zip(axes, panels, strict=False):
            axis.set_title(title)
            _lines(axis, record, lines)
        _interval(axes[-1], record)
        _below(axes[-1], record)

    sentences = [f"{title}: {_in_words(record, lines)}" for title, lines in panels]
    n = record.series("interval")[1]
    if len(n):
        sentences.append(f"the interval goes from {n[0]:.0f} to {n[-1]:.0f} steps")
    return _in_two_widths(draw, "progress", PANEL * (len(panels) + 1) + 40, "; ".join(sentences))


def diversity(record: Record) -> str | None:
    """Plot how much the pictures of a prompt differ; None if the run has not measured it."""
    titles = {
        "diversity/pairwise": "distance of two pictures of a prompt",
        "diversity/vendi": "Vendi score of the pictures of a prompt",
    }
    measured = {k: v for k, v in titles.items() if len(record.series(k)[0])}
    if not measured:
        return None

    def draw(figure: Figure) -> None:
        axes = _panels(figure, [1.0] * len(measured))
        for axis, (name, title) in zip(axes, measured.items(), strict=True):
            axis.set_title(title)
            _lines(axis, record, [(name, "", "o-", 0)])
            axis.set_ylim(bottom=0)
        _below(axes[-1], record)

    sentences = [f"{t}: {_in_words(record, [(n, '', '', 0)])}" for n, t in measured.items()]
    return _in_two_widths(draw, "diversity", PANEL * len(measured) + 40, "; ".join(sentences))


def seconds(record: Record) -> str | None:
    """Plot the seconds of each phase of every stage, with the events of the workers below.

    Returns None if no time was measured yet.
    """
    parts, edges = _binned(record, phases(record))
    if not parts:
        return None
    events = [e for e in record.events if e.get("what") in HAPPENED and _is_news(e)]

    def draw(figure: Figure) -> None:
        heights = [1.5, 0.25 + 0.16 * len({e["slot"] for e in events})]
        axes = _panels(figure, heights if events else heights[:1])
        axes[0].set_title("seconds of each stage")
        below = np.zeros(len(edges) - 1)
        for i, (name, values) in enumerate(parts.items()):
            axes[0].stairs(
                below + values, edges, baseline=below, fill=True, color=SERIES[i], label=name
            )
            below = below + values
        axes[0].set_ylim(bottom=0)
        _legend(axes[0])
        if events:
            _fleet(axes[1], record, events)
        axes[-1].set_xlabel("stage")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes[-1].set_xlim(edges[0], edges[-1])

    total = {name: values.sum() for name, values in parts.items()}
    totals = ", ".join(f"{name} {value:.0f} s" for name, value in total.items())
    slots = len({e["slot"] for e in events})
    height = int(PANEL * 1.5) + 60 + (70 + 27 * slots if events else 0)
    label = f"time by stage, in all: {totals}; {len(events)} fleet events"
    return _in_two_widths(draw, "seconds", height, label)


def phases(record: Record) -> dict[str, np.ndarray]:
    """Return the seconds of each phase in every line of the record, each of shape (N,).

    `other` is the time outside of all phases, such as for commits and pictures. With
    `learner.max_lag` phases overlap and may sum to more than the stage took; `other` is 0 then.
    Phases that never took time are left out.
    """
    lines = record.lines
    by_phase = {p: np.array([line.get(f"time/{p}", 0.0) for line in lines]) for p in PHASES}
    total = np.diff([0.0, *(line.get("time/total", 0.0) for line in lines)])
    by_phase["other"] = np.maximum(0.0, total - sum(by_phase.values()))
    return {name: values for name, values in by_phase.items() if values.any()}


def _binned(
    record: Record, parts: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Average the seconds over neighbouring stages, so that there are at most `BINS` bars.

    Returns:
        The heights of the bars by phase, and the edges of the bars on the axis of stages.
    """
    lines = record.lines
    if not parts:
        return {}, np.zeros(0)
    bins = np.array_split(np.arange(len(lines)), min(BINS, len(lines)))
    edges = [lines[b[0]]["step"] - 0.5 for b in bins] + [lines[-1]["step"] + 0.5]
    return {n: np.array([v[b].mean() for b in bins]) for n, v in parts.items()}, np.array(edges)


# --- parts of plots ----------------------------------------------------------------------------


def _fixed(name: str) -> list[tuple[str, str, str, int]]:
    """Return the curves of a reward's evaluations: (metric, label, line and marker, colour)."""
    styles = {"train": ("o-", 0), "heldout": ("s--", 1)}
    return [
        (f"eval/{which}/{name}", f"fixed seeds, {SETS[which]}", *styles[which]) for which in SETS
    ]


def _panels(figure: Figure, heights: Sequence[float]) -> list[Axes]:
    """Stack panels of these relative heights, which share their x axis."""
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    for axis in axes[:, 0]:
        axis.grid(linewidth=0.6)
        axis.set_axisbelow(True)
    return list(axes[:, 0])


def _lines(axis: Axes, record: Record, lines: Sequence[tuple[str, str, str, int]]) -> None:
    """Draw curves, each given as (metric, label, line and marker, colour)."""
    for name, label, line_and_marker, colour in lines:
        x, y = record.series(name)
        finite = np.isfinite(y)
        if finite.any():
            # A single point has no line, so it needs a marker.
            form = "o" if finite.sum() == 1 else line_and_marker
            width = 1.8 if colour < 2 else 1.2
            style: dict[str, Any] = {"linewidth": width, "markersize": 5, "clip_on": False}
            axis.plot(x[finite], y[finite], form, color=SERIES[colour], label=label, **style)
    if any(label for _, label, _, _ in lines):
        _legend(axis)


def _interval(axis: Axes, record: Record) -> None:
    """Draw how many of the last denoising steps each stage trains, as a filled area."""
    steps = record.config.sampling.steps
    axis.set_title(f"interval: the last n of {steps} steps are trained")
    done = [line for line in record.lines if "interval" in line]
    if done:
        before = [line for line in record.lines if line["step"] < done[0]["step"]]
        edges = np.concatenate([record.axis(before)[-1:] if before else [0.0], record.axis(done)])
        values = [line["interval"] for line in done]
        axis.stairs(values, edges, baseline=0, fill=True, color=SERIES[3], alpha=0.8)
    axis.set_ylim(0, steps)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=2))


def _below(axis: Axes, record: Record) -> None:
    """Set the label, ticks and limits of the x axis that all panels share."""
    axis.set_xlabel("reward queries" if record.by_queries else "stage")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=2))
    x = record.axis(record.lines)
    if len(x):
        axis.set_xlim(0, max(float(x[-1]), 1.0))


def _fleet(axis: Axes, record: Record, events: Sequence[dict[str, Any]]) -> None:
    """Draw a marker for every event, one row per worker."""
    slots = sorted({e["slot"] for e in events})
    grain = max(1, record.stage) / BINS
    for i, (what, (marker, label)) in enumerate(HAPPENED.items()):
        of_kind = [e for e in events if e["what"] == what]
        # Events that are closer than `grain` stages share one marker.
        places = {
            (round(record.stage_at(e["time"]) / grain), slots.index(e["slot"])) for e in of_kind
        }
        x, y = [grain * place for place, _ in places], [slot for _, slot in places]
        if of_kind:
            style: dict[str, Any] = {
                "markersize": 7,
                "linestyle": "none",
                "color": SERIES[(1, 4, 2)[i]],
            }
            axis.plot(x, y, marker, label=label, **style)
    axis.set_title("what happened to the fleet")
    axis.set_yticks(range(len(slots)), slots)
    axis.set_ylim(-0.6, len(slots) - 0.4)
    _legend(axis)


def _is_news(event: dict[str, Any]) -> bool:
    """Return whether an event is drawn: all are, except that a worker is ready for the first time.

    Only a worker that is ready again has the seconds for which it was gone.
    """
    return event["what"] != "ready" or event.get("seconds") is not None


def _legend(axis: Axes) -> None:
    """Add a legend with the labels that no panel above has.

    It stands where it hides nothing: to the right of a wide panel, and between the title and a
    narrow panel.
    """
    figure = axis.figure
    known = {text.get_text() for legend in figure.findobj(Legend) for text in legend.get_texts()}
    handles, labels = axis.get_legend_handles_labels()
    labelled = zip(labels, handles, strict=True)
    new = {label: handle for label, handle in labelled if label not in known}
    if not new:
        return
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02)}
    if figure.bbox.width < WIDE:
        columns = 3 if max(map(len, new)) < 16 else 1
        rows = math.ceil(len(new) / columns)
        axis.set_title(axis.get_title("left"), loc="left", pad=6 + 16 * rows)
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": columns}
    axis.legend(
        new.values(), new.keys(), borderaxespad=0.2, handlelength=1.8, labelspacing=0.2, **place
    )


def _in_words(record: Record, lines: Sequence[tuple[str, str, str, int]]) -> str:
    """Describe curves by their first and last values, for people who cannot see the plot."""
    ranges = []
    for name, label, _, _ in lines:
        _, y = record.series(name)
        if len(y):
            ranges.append(f"{label} from {y[0]:.3g} to {y[-1]:.3g}".strip())
    return ", ".join(ranges) or "not measured yet"


# --- from matplotlib into the page -------------------------------------------------------------


def _in_two_widths(draw: Callable[[Figure], None], name: str, height: int, label: str) -> str:
    """Draw a plot for a wide page and for a narrow one, of which the page's style shows one.

    Args:
        draw: draws into an empty figure.
        name: makes the ids in the SVG unique within the page.
        height: pixels of the wide plot.
        label: describes the plot to people who cannot see it.

    Returns:
        Two HTML elements.
    """
    return "".join(
        f'<div class="{size}">{_svg(draw, f"{name}-{size}", width, pixels, label)}</div>'
        for size, width, pixels in (("wide", WIDE, height), ("narrow", NARROW, height * 1.35))
    )


def _svg(draw: Callable[[Figure], None], name: str, width: int, height: float, label: str) -> str:
    """Draw a plot as inline SVG, whose units are pixels."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        draw(figure)
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    return _inline(file.getvalue(), name, label)


def _inline(svg: str, name: str, label: str) -> str:
    """Turn an SVG file into an element of the page."""
    # Remove what only a file needs: the XML declaration, the doctype and metadata.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    svg = re.sub(
        r"<svg\b[^>]*>",
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box[1]}" role="img" aria-label="{html.escape(label)}">',
        svg,
        count=1,
    )
    # Make ids unique within the page, and use the fonts and colours of the page.
    for before in ('\\bid="', r"url\(#", 'href="#'):
        svg = re.sub(f"({before})", rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    for sign, colour in COLOURS.items():
        svg = svg.replace(sign, colour)
    return svg
