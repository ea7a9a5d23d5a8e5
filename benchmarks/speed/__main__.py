"""What a stage costs beside its UNet evaluations alone, and beside others who do the same.

    python -m benchmarks.speed [--repetitions 5] [--stages 4]   # docs/evidence/performance.md
    python -m benchmarks.speed --cost-growth                    # its plot
    python -m benchmarks.speed --inside                         # processor time inside the actors
    python -m benchmarks.speed --quick                          # does everything run?

For each workload (benchmarks/speed/workloads.py) one after the other, so often: the floor (a bare
loop of the same UNet evaluations in as many processes as there are cores), b2ray (the command, with
a sampler, a scorer and a rank of the learner for every core), the schedule of the released code,
and trl's DDPOTrainer, which gets an environment of its own under --folder and is left out, with a
message, if it cannot be installed. Nothing else should run on the machine, but for --inside, which
counts time on a processor.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed import growth, inside, ours, peer, report
from benchmarks.speed.floor import SIZES, Floor
from benchmarks.speed.released import Released
from benchmarks.speed.workloads import WORKLOADS, Workload, layout, quick, work
from benchmarks.tables import fill

PAGE = Path(__file__).parents[2] / "docs" / "evidence" / "performance.md"
RIVALS = ("released", "peer")


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="tiny work, once; figures say nothing")
    parser.add_argument("--cost-growth", action="store_true", help="stage time by sizes, as a plot")
    parser.add_argument("--inside", action="store_true", help="what actors do around the UNet")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--stages", type=int, default=4, help="of each run; medians are taken")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--workloads", type=int, nargs="+", default=[0, 1, 2, 3], help="by number")
    parser.add_argument("--without", nargs="+", choices=RIVALS, default=[])
    parser.add_argument("--folder", type=Path, default=Path("runs/speed"), help="of all files")
    parser.add_argument(
        "--output",
        type=Path,
        help="by default docs/evidence/performance.md, or with --quick the screen alone",
    )
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    output = given.output or (None if given.quick else PAGE)
    if given.cost_growth:
        found = growth.measure(folder, given.cores, given.stages, given.quick)
        picture = (output.with_suffix("") if output else folder) / "growth.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        growth.plot(found, picture)
        print(growth.table(found))
        if output:
            shown = (
                f"![How a stage's time grows with its sizes]({picture.parent.name}/{picture.name})"
            )
            fill(output, {"growth": f"{growth.table(found)}\n\n{shown}"})
        return
    chosen = [WORKLOADS[j] for j in given.workloads]
    if given.quick:
        chosen, given.repetitions, given.stages = [quick(w) for w in chosen], 1, 1
    if given.inside:
        parts = {
            "inside": inside.table({w.name: inside.measure(w.config()) for w in chosen}),
            "batches": inside.batches(inside.by_batch(chosen[0].config(), sizes(given))),
        }
        print("\n\n".join(parts.values()))
        if output:
            fill(output, parts)
        return
    with Bench(chosen, given, folder) as bench:
        for repetition in range(given.repetitions):
            for workload in chosen:
                bench.measure(workload, repetition)
                report.save(folder / "results.json", bench.found)
    parts = {"speed": report.speed(bench.found), "phases": report.phases(bench.found)}
    print("\n\n".join(parts.values()))
    if output:
        fill(output, {**parts, "machine": report.machine(given)})


def sizes(given: argparse.Namespace) -> tuple[int, ...]:
    """Batch sizes that are tried."""
    return (2, 4) if given.quick else SIZES


class Bench:
    """Everybody who is measured, made ready once.

    Attributes:
        found: what was measured so far.
    """

    def __init__(self, workloads: list[Workload], given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder = given, folder
        self.found: list[dict[str, Any]] = []
        wanted = {r for w in workloads for r in w.rivals} - set(given.without)
        self.peer = peer.install(folder / "peer-env") if "peer" in wanted else None
        self.released = "released" in wanted
        self.floors = {w.name: Floor(w.config(), given.cores, sizes(given)) for w in workloads}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for floor in self.floors.values():
            floor.close()

    def measure(self, workload: Workload, repetition: int) -> None:
        """Everybody once."""
        given, cores = self.given, self.given.cores
        words = workload.command(layout(cores))
        config = workload.config()
        asked = work(config)

        def note(who: str, seconds: float, **more: Any) -> None:
            entry = {"workload": workload.name, "who": who, "repetition": repetition}
            entry |= {"seconds": seconds, "images": asked.pictures, **more}
            self.found.append(entry)
            print(f"{workload.name}: {who} {seconds:.2f} s", file=sys.stderr, flush=True)

        floor = self.floors[workload.name]
        passed = floor.measure(asked)
        note("floor", passed.seconds, parts=passed.parts, best=floor.best)

        ran = ours.run(words, self.folder / "run", given.stages)
        if ran.evaluations != asked.evaluations:
            raise SystemExit(
                f"{workload.name}: a stage counted {ran.evaluations:,.0f} UNet evaluations, the "
                f"floor does {asked.evaluations:,}: rewards tied, or the count is wrong"
            )
        note("b2ray", ran.stage, stages=ran.seconds, start=ran.start, figures=ran.figures)

        if self.released and "released" in workload.rivals:
            other = Released(words, self.folder / "released", cores)
            parts = other.stage()
            note("released", sum(parts.values()), parts=parts, bytes=other.size())
        if self.peer is not None and "peer" in workload.rivals:
            settings = peer.settings(config, self.folder / "models", cores, given.stages)
            epochs = self.peer.epochs(settings)
            seconds = sorted(e["seconds"] for e in epochs)
            note("peer", seconds[len(seconds) // 2], epochs=epochs)


if __name__ == "__main__":
    main()
