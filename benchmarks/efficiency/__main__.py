"""Every algorithm that the paper builds on, beside B²-DiffuRL, on the embedded world.

    python -m benchmarks.efficiency [--runs runs/efficiency] [--jobs 2] [--methods NAME …]

Tunes each method on its own small grid (benchmarks/efficiency/methods.yaml), runs each at its best
on other seeds, and writes the tables into docs/evidence/comparison.md and the curves beside it.
What finished runs found is kept in benchmarks/efficiency/results.jsonl and unfinished runs are
resumed: start it again after an interruption; move that file away to measure everything anew.
`--report` only writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.efficiency.report import write
from benchmarks.efficiency.trials import (
    ABLATIONS,
    METHODS,
    RESULTS,
    Results,
    reported,
    run_all,
    tuning,
)

NAMES = [*METHODS, *ABLATIONS]


def main() -> None:
    """Tune, run, report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.efficiency", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/efficiency"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="write what there is, run nothing")
    parser.add_argument("more", nargs="*", help="further fields for every run, after --")
    given = parser.parse_args()
    results, jobs = Results(given.results, given.more), 0 if given.report else given.jobs
    first = [t for m in given.methods if m in METHODS for t in tuning(m)]
    run_all(first, results, given.runs, jobs, "tuning")
    second = [t for m in given.methods for t in reported(m, results)]
    run_all(second, results, given.runs, jobs, "seeds")
    write(results, given.runs)


if __name__ == "__main__":
    main()
