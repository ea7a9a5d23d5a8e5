"""A cluster to break, and what is left of each run that was broken."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from b2ray.fleet.dispatch import Dispatcher
from tests.chaos.faults import Saboteur, Strike
from tests.chaos.raylets import Raylets
from tests.runner import ColdRunner, Runner
from tests.warm import Pool

# The learner and the sampler take a node each. One sampler, so that its loss holds the run up.
FLEET: dict[str, object] = {
    "fleet.learner.gpus": 2,
    "fleet.samplers.gpus": 2,
    "fleet.samplers.max": 1,
    "fleet.stall_timeout": 240,
    "curriculum.stages": 4,
}
MARKS = ("<!-- chaos -->", "<!-- /chaos -->")


@dataclass(frozen=True)
class Row:
    """A line of the table in docs/evidence/reliability.md."""

    fault: str
    happened: str
    seconds: float | None
    equal: bool


@pytest.fixture(scope="package")
def raylets() -> Iterator[Raylets]:
    import ray

    assert not ray.is_initialized(), "the chaos tests need Ray for themselves: run them alone"
    found = Raylets()
    yield found
    found.close()


@pytest.fixture(scope="package")
def rows() -> Iterator[list[Row]]:
    """The table. B2RAY_CHAOS_TABLE names a document whose part between the marks it becomes."""
    found: list[Row] = []
    yield found
    if file := os.environ.get("B2RAY_CHAOS_TABLE"):
        text = Path(file).read_text(encoding="utf-8")
        before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
        lines = ["| fault | what happened | seconds to recover | bytes equal |", "|" + "---|" * 4]
        for row in found:
            seconds = "–" if row.seconds is None else f"{row.seconds:.1f}"
            equal = "yes" if row.equal else "**no**"
            lines.append(f"| {row.fault} | {row.happened} | {seconds} | {equal} |")
        table = "\n".join(lines)
        Path(file).write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}", encoding="utf-8")


class Ward(ColdRunner):
    """Runs the command while things happen to its fleet."""

    raylets: Raylets

    def disturbed(self, name: str, strikes: list[Strike], **over: object) -> Saboteur:
        """A run that must end well, with these faults; all of them must have struck."""
        saboteur = Saboteur(self.raylets, strikes)
        send = Dispatcher._send

        def sent(self: Dispatcher, slot: Any, call: Any, plan: Any = None) -> None:
            send(self, slot, call, plan)
            saboteur.after_send(self, slot, call)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Dispatcher, "_send", sent)
            assert self.here(name, **{**FLEET, **over}) == 0
        assert len(saboteur.struck) == len(strikes), "not every fault happened"
        return saboteur

    def events(self, name: str) -> list[dict[str, Any]]:
        """What the run wrote about its fleet."""
        lines = (self.runs / name / "fleet.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="package")
def ward(
    models: Path, raylets: Raylets, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ward]:
    found = Ward(models, tmp_path_factory.mktemp("chaos"), None, raylets.address)
    found.raylets = raylets
    yield found


@pytest.fixture(scope="package")
def undisturbed(ward: Ward) -> Callable[..., bytes]:
    """LoRA bytes of a run with these settings to which nothing happens, on warm actors: which fleet
    it has does not matter."""
    calm = Runner(ward.models, ward.runs, Pool())
    known: dict[str, bytes] = {}

    def lora(**over: object) -> bytes:
        key = json.dumps(over, sort_keys=True, default=str)
        if key not in known:
            name = f"undisturbed{len(known)}"
            assert calm.here(name, **{**FLEET, **over}) == 0
            known[key] = calm.lora(name)
        return known[key]

    return lora


@pytest.fixture(autouse=True)
def whole_again(raylets: Raylets) -> Iterator[None]:
    """Every test finds, and leaves behind, two nodes with GPUs."""
    raylets.mend()
    yield
    raylets.mend()
