"""What a worker's imports cost, with garbage collection and without.

    python benchmarks/imports.py [--rounds 7]

Fresh processes by turns, processor time; docs/performance.md has the table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from tables import fill, markdown
from tqdm import trange
from turns import quartiles

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
MODULES = {
    "sampler and learner": "b2ray.diffusion.policy",
    "scorer with CLIP": "b2ray.rewards.clip",
}
CODE = """
import time
{before}
import {module}
print(time.process_time())
"""


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    rows = [[who, *compared(module, given.rounds)] for who, module in MODULES.items()]
    heads = ["actor", "collecting", "not collecting", "ratio (quartiles)"]
    found = markdown(heads, rows)
    print(found)
    fill(PAGE, {"imports": found})


def compared(module: str, rounds: int) -> list[str]:
    """Medians of both ways, and the ratio within each round."""
    ways: dict[str, list[float]] = {"": [], "import gc; gc.disable()": []}
    for _ in trange(rounds + 1, desc=module, leave=False):  # the first warms up
        for before, times in ways.items():
            code = CODE.format(before=before, module=module)
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
            times.append(float(done.stdout))
    one, other = (np.array(times[1:]) for times in ways.values())
    seconds = [f"{np.median(times):.2f} s" for times in (one, other)]
    return [*seconds, quartiles(other / one)]


if __name__ == "__main__":
    main()
