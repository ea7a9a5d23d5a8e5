"""How long b2ray takes until it stands where trl's DDPOTrainer ends, by the judged alignment.

    python benchmarks/to_alignment.py [--folder runs/to_alignment]   # docs/performance.md's table

trl's trainer trains the embedded model on the comparison's terms (benchmarks/efficiency/base.yaml:
1,536 pictures in 12 epochs) with DDPO's settings and its own best of four learning rates, which two
seeds choose that are not reported. `b2ray evaluate` judges the LoRA that it saves. b2ray is the
quickstart, looked at every four stages. Seconds are those of the whole command, from its start, for
b2ray without its evaluations. Nothing else should run on the machine. Finished runs are kept in
the folder and not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efficiency.curves import crossing
from speed import ours, peer
from speed.workloads import layout
from tables import fill, markdown

from b2ray.options import parse
from b2ray.tracking.folder import write_atomically

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
BASE = ROOT / "benchmarks" / "efficiency" / "base.yaml"
RATES = (3.0e-4, 7.5e-4, 1.5e-3, 3.0e-3)
TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
# DDPO-IS as benchmarks/efficiency/methods.yaml has it, with the rank of trl's adapter and calls as
# large as its trainer is fastest with.
DDPO = (
    *("--preset=ddpo", "--learner.batch=16", "--learner.passes=1"),
    *("--model.lora.rank=4", "--model.lora.alpha=4", "--branching.branch_batch=64"),
)
JUDGED = 512  # pictures of the training captions, after trl's training
LOOKED = 256  # pictures that a run of b2ray is looked at with on its way


class Measured:
    """Runs of both, kept as files in a folder."""

    def __init__(self, folder: Path, cores: int) -> None:
        self.folder, self.cores = folder, cores
        folder.mkdir(parents=True, exist_ok=True)
        trl = peer.install(folder / "peer-env")
        if trl is None:
            raise SystemExit("without trl there is nothing to compare with")
        self.trl = trl

    def _kept(self, name: str, make: Any) -> Any:
        file = self.folder / f"{name}.json"
        if not file.exists():
            found = make()
            write_atomically(file, json.dumps(found))
            print(f"{name}: {found}", file=sys.stderr, flush=True)
        return json.loads(file.read_text())

    def peer(self, rate: float, seed: int) -> dict[str, float]:
        """trl's run: `seconds` of the whole command, its final `judged` share, and its `reward`."""
        return dict(self._kept(f"trl-lr{rate:g}-s{seed}", lambda: self._peer(rate, seed)))

    def ours(self, seed: int) -> list[list[float]]:
        """b2ray's run: (seconds, judged share) of its evaluations."""
        return list(self._kept(f"b2ray-s{seed}", lambda: self._ours(seed)))

    def _peer(self, rate: float, seed: int) -> dict[str, float]:
        words = [f"--config={BASE}", *DDPO, f"--learner.lr={rate}", f"--seed={seed}"]
        config = parse(words).config
        lora = self.folder / f"trl-lr{rate:g}-s{seed}"
        asked = peer.settings(
            config, self.folder / "models", self.cores, config.curriculum.stages
        ) | {"lora": str(lora)}
        began = time.perf_counter()
        self.trl.epochs(asked)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, **judged(lora, seed)}

    def _ours(self, seed: int) -> list[tuple[float, float]]:
        looked = {
            "evaluation.every": 4,
            "evaluation.images": LOOKED,
            "evaluation.final_images": LOOKED,
            "evaluation.previews": 0,
        }
        whole = {**layout(self.cores), **looked, "seed": seed}
        where = (f"--runs={self.folder}", f"--name=b2ray-s{seed}")
        words = (f"--config={QUICKSTART}", *where, *(f"--{k}={v}" for k, v in whole.items()))
        began = time.time()
        ours.execute([sys.executable, "-m", "b2ray.run", *words], "b2ray.run")
        text = (self.folder / f"b2ray-s{seed}" / "metrics.jsonl").read_text()
        return looks([json.loads(line) for line in text.splitlines()], began)


def judged(lora: Path, seed: int) -> dict[str, float]:
    """What a LoRA's pictures of the training captions are worth: `judged` share, and `reward`."""
    words = (f"--config={QUICKSTART}", f"--lora={lora}", f"--seed={seed}", f"--images={JUDGED}")
    more = ("--prompts=b2ray/shapes/prompts/train.txt", f"--output={lora / 'judged'}", "--json")
    command = [str(Path(sys.executable).with_name("b2ray")), "evaluate", *words, *more]
    document = json.loads(ours.execute(command, "b2ray evaluate"))
    (entry,) = document["sets"].values()
    *_, policy = document["policies"]
    figures = entry["figures"][policy["name"]]
    return {"judged": figures["judge"]["mean"], "reward": figures["reward"]["mean"]}


def looks(lines: Sequence[dict[str, Any]], began: float) -> list[tuple[float, float]]:
    """A run's evaluations: seconds from the command on, less those of evaluations, and the judge's
    share of training captions.

    Args:
        lines: of metrics.jsonl, from before the first stage.
        began: `time.time()` when the command was started.
    """
    found, looking = [], 0.0
    for line in lines:
        looking += line.get("time/evaluate", 0.0)
        if "heldout/judge" in line:
            found.append((line["time"] - began - looking, line["heldout/judge"]))
    return found


def table(rate: float, found: Sequence[tuple[int, dict[str, float], Sequence[Any]]]) -> str:
    """Both, seed by seed, and the median of the ratios; 0 stands for never."""
    rows, ratios = [], []
    for seed, trl, points in found:
        seconds = crossing(*zip(*points, strict=True), trl["judged"])
        ratio = trl["seconds"] / seconds if seconds else 0.0
        ratios.append(ratio)
        cells = [f"{points[0][1]:.1%}", f"{trl['judged']:.1%}", f"{trl['seconds']:.0f} s"]
        cells += [f"{seconds:.0f} s" if seconds else "never", f"{ratio:.1f}" if seconds else "–"]
        rows.append([str(seed), *cells, f"{points[-1][1]:.1%}", f"{points[-1][0]:.0f} s"])
    heads = ["seed", "judged before", f"trl at its end (lr {rate:g})", "trl's seconds"]
    heads += ["b2ray there after", "ratio", "b2ray at its end", "b2ray's seconds"]
    return f"{markdown(heads, rows)}\n\nMedian of the ratios: {statistics.median(ratios):.1f}."


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/to_alignment"))
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "performance.md")
    given = parser.parse_args()
    both = Measured(given.folder.absolute(), given.cores)
    tuned = {r: [both.peer(r, seed)["judged"] for seed in TUNING_SEEDS] for r in RATES}
    rate = max(tuned, key=lambda r: sum(tuned[r]))
    found = [(seed, both.peer(rate, seed), both.ours(seed)) for seed in SEEDS]
    text = table(rate, found)
    print(text)
    fill(given.output, {"alignment": text})


if __name__ == "__main__":
    main()
