"""How long from the command to the first rollout: the demo, and with an actor of each role a core.

    python -m benchmarks.startup [--rounds 3] [--other CHECKOUT]

By turns, with another checkout of the project beside this one if there is one, such as
`git worktree add ../other COMMIT`. Nothing else should run on the machine;
docs/evidence/performance.md has the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import trange

from benchmarks.speed import ours
from benchmarks.speed.workloads import LEAST, layout
from benchmarks.tables import fill, markdown

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--other", type=Path, help="another checkout, which is measured, too")
    parser.add_argument("--folder", type=Path, default=Path("runs/startup"), help="of all files")
    given = parser.parse_args()
    layouts = {"the demo": {}, "two of each role": layout(2)}
    places = {"this": ROOT} | ({"other": given.other.resolve()} if given.other else {})
    found: dict[str, dict[str, list[float]]] = {who: {p: [] for p in places} for who in layouts}
    for _ in trange(given.rounds):
        for who, fields in layouts.items():
            words = [f"--{k}={v}" for k, v in {**LEAST, **fields}.items()]
            for name, checkout in places.items():
                found[who][name].append(seconds(checkout, words, given.folder.resolve()))
    rows = [[who, *map(spread, each.values())] for who, each in found.items()]
    told = markdown(["actors", *(f"{name} checkout" for name in places)], rows)
    print(told)
    fill(ROOT / "docs" / "evidence" / "performance.md", {"startup": told})


def seconds(checkout: Path, words: Sequence[str], folder: Path) -> float:
    """From the command to the first rollout of a run of one stage."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    where = (f"--runs={folder}", "--name=run", "--curriculum.stages=1")
    config = f"--config={checkout / 'configs' / 'quickstart.yaml'}"
    command = [sys.executable, "-m", "b2ray.run", config, *where, *words]
    began = time.time()
    subprocess.run(
        command,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        check=True,
        capture_output=True,
    )
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return ours.read([json.loads(line) for line in lines], began).start


def spread(found: Sequence[float]) -> str:
    """The median, the least and the most."""
    middle = statistics.median(found)
    return f"{middle:.1f} s ({min(found):.1f} – {max(found):.1f})"


if __name__ == "__main__":
    main()
