"""The ruler runs: the floor, the command, the released schedule, and a peer that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_the_ruler_measures_everybody(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text((ROOT / "docs/evidence/performance.md").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--cores=2"]
    command += ["--workloads", "2", "3", f"--folder={tmp_path}", f"--output={page}"]
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    # An index that is not there: the peer cannot be installed.
    env |= {"PIP_NO_INDEX": "1", "PIP_RETRIES": "0"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trl is left out: it cannot be installed (" in done.stderr

    found = json.loads((tmp_path / "results.json").read_text())
    by = {(m["workload"], m["who"]): m for m in found}
    assert [who for _, who in by] == ["floor", "b2ray", "released", "floor", "b2ray"]
    assert all(m["seconds"] > 0 for m in found)
    released = next(m for (_, who), m in by.items() if who == "released")
    assert set(released["parts"]) == {"sample", "score", "train"}
    assert released["bytes"] > 0
    ours = next(m for (_, who), m in by.items() if who == "b2ray")
    assert 0 < ours["figures"]["time/unet_share_learner"] <= 1
    text = page.read_text(encoding="utf-8")
    assert "the released schedule" in text and "time / floor" in text
