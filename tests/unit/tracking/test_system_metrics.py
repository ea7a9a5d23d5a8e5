"""system.jsonl: each machine once a moment, and read on from where a reader was."""

from __future__ import annotations

import json
from pathlib import Path

from b2ray.actors.system_metrics import Reading
from b2ray.tracking.system_metrics import SystemMetrics, read
from tests.runner import when

HOUR = 3600.0  # the driver's own readings come later than these tests end


def reading(at: float, host: str = "a", value: float = 1.0) -> Reading:
    return Reading(at, host, {"cpu_utilization_percentage": value})


def test_workers_of_one_machine_count_once(tmp_path: Path):
    machines = SystemMetrics(tmp_path / "system.jsonl", HOUR)
    machines.add([reading(0, value=1), reading(10, value=2), reading(HOUR)])
    machines.add([reading(5, value=3), reading(HOUR + 5, "b")])
    machines.close()
    lines, _ = read(tmp_path / "system.jsonl")
    assert [(x["time"], x["host"]) for x in lines] == [(0, "a"), (HOUR, "a"), (HOUR + 5, "b")]
    assert lines[0]["cpu_utilization_percentage"] == 1


def test_the_drivers_own_machine_is_read_without_workers(tmp_path: Path):
    machines = SystemMetrics(tmp_path / "system.jsonl", 0.05)

    def there() -> bool:
        machines.add()
        return len(read(tmp_path / "system.jsonl")[0]) >= 2

    when(there, within=60)
    machines.close()


def test_nothing_is_written_when_it_is_off(tmp_path: Path):
    machines = SystemMetrics(tmp_path / "system.jsonl", 0)
    machines.add([reading(0)])
    machines.close()
    assert not (tmp_path / "system.jsonl").exists()


def test_a_disk_that_is_full_fails_nothing(tmp_path: Path):
    machines = SystemMetrics(tmp_path / "nowhere" / "system.jsonl", HOUR)
    machines.add([reading(0)])
    machines.close()


def test_a_reader_goes_on_where_it_was_and_waits_for_whole_lines(tmp_path: Path):
    file = tmp_path / "system.jsonl"
    assert read(file, 0) == ([], 0)
    whole, half = json.dumps({"time": 1, "host": "a"}) + "\n", '{"time": 2, "ho'
    file.write_text(whole + half)
    lines, offset = read(file)
    assert [x["time"] for x in lines] == [1] and offset == len(whole)
    file.write_text(whole + half + "\n" + json.dumps({"time": 3, "host": "a"}) + "\n")
    lines, offset = read(file, offset)
    assert [x["time"] for x in lines] == [3]  # a process died over the second
    assert read(file, offset) == ([], file.stat().st_size)
