"""How busy a machine is, read on this one."""

from __future__ import annotations

import socket
import time

import pytest

from b2ray.actors.system_metrics import Reading, Usage
from b2ray.actors.worker import Worker
from b2ray.config import Config, Prompts, Reward, Tracking
from tests.runner import when


def config(every: float) -> Config:
    rewards = (Reward(name="clip", kind="clip"),)
    return Config(prompts=Prompts(train="p.txt"), rewards=rewards, tracking=Tracking(system=every))


def collected(source: Usage | Worker, count: int) -> list[Reading]:
    """So many readings, as they come."""
    found: list[Reading] = []

    def enough() -> bool:
        whole = isinstance(source, Usage)
        new = source.taken() if whole else source.receipt(source.timer()).readings
        found.extend(new)
        return len(found) >= count

    when(enough, within=60)
    return found


def test_it_reads_this_machine_under_mlflows_names():
    began = time.time()
    usage = Usage(0.05)
    first, second = collected(usage, 2)[:2]
    usage.stop()
    assert first.host == socket.gethostname()
    assert began < first.time < second.time <= time.time()
    figures = second.figures
    assert 0 <= figures["cpu_utilization_percentage"] <= 100
    assert 0 < figures["system_memory_usage_percentage"] < 100
    assert figures["system_memory_usage_megabytes"] > 50  # this process alone has as much
    assert figures["disk_available_megabytes"] > 0
    assert figures["network_receive_megabytes_per_second"] >= 0


def test_what_a_machine_does_not_tell_is_left_out(monkeypatch):
    def broken(*_: object) -> float:
        raise OSError("no /proc here")

    monkeypatch.setattr("psutil.cpu_percent", broken)
    usage = Usage(0.05)
    (reading, *_) = collected(usage, 1)
    usage.stop()
    assert "cpu_utilization_percentage" not in reading.figures
    assert "system_memory_usage_percentage" in reading.figures


def test_a_reading_travels_with_one_receipt_only():
    worker = Worker()
    assert worker.receipt(worker.timer()).readings == ()
    worker.observe(config(0.05))
    times = [r.time for r in collected(worker, 3)]
    assert times == sorted(set(times))
    worker.usage.stop()


def test_it_can_be_turned_off():
    worker = Worker()
    worker.observe(config(0))
    assert worker.usage is None


def test_gpus_are_read_where_there_is_a_driver():
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        count = 0
    usage = Usage(0.05)
    (reading, *_) = collected(usage, 1)
    usage.stop()
    told = {name.split("_")[1] for name in reading.figures if name.startswith("gpu_")}
    assert told == {str(i) for i in range(count)}
