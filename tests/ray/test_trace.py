"""tracking.trace: a stage's trace of every actor, and nothing else is different."""

from __future__ import annotations

import gzip
import json

from tests.runner import ColdRunner


def test_every_actor_writes_what_it_did_in_one_stage(
    cold_runner: ColdRunner, undisturbed: str
) -> None:
    over = {"learner__ranks": 2, "fleet__samplers__min": 2, "tracking__trace": 2}
    assert cold_runner.here("traced", **over) == 0
    files = sorted((cold_runner.runs / "traced" / "traces").iterdir())
    assert [f.name for f in files] == [
        *("learner-0-rank-0.json.gz", "learner-0-rank-1.json.gz"),
        *("sampler-0.json.gz", "sampler-1.json.gz", "scorer-0.json.gz"),
    ]
    for file in files[:2]:
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        names = {event.get("name", "") for event in events}
        assert "aten::convolution" in names and "aten::convolution_backward" in names


def test_a_trace_changes_no_byte(cold_runner: ColdRunner, undisturbed: str) -> None:
    assert cold_runner.here("traced-alone", tracking__trace=1) == 0
    assert cold_runner.lora("traced-alone") == cold_runner.lora(undisturbed)
    assert not (cold_runner.runs / undisturbed / "traces").exists()
