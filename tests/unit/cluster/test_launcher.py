"""The launcher files as Ray reads them, the versions they name, and what a job would upload."""

from __future__ import annotations

import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "cluster").glob("*.yaml"))
PINS = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
CLOUDS = [file for file in FILES if file.stem in ("aws", "gcp")]


def prepared(file: Path) -> dict:
    return prepare_config(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_ray_accepts_it(file: Path) -> None:
    validate_config(prepared(file))


@pytest.mark.parametrize("file", CLOUDS, ids=lambda file: file.stem)
def test_samplers_come_and_go_on_spot_and_the_head_stays(file: Path) -> None:
    types = prepared(file)["available_node_types"]
    head, workers = types["head"], types["gpu_spot"]
    assert (head["min_workers"], head["max_workers"]) == (0, 0)
    assert 0 < workers["min_workers"] < workers["max_workers"]
    spot = re.compile("spot", re.I)
    assert spot.search(str(workers["node_config"])) and not spot.search(str(head["node_config"]))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_node_asks_for_the_token_and_the_dashboard_stays_on_the_head(file: Path) -> None:
    config = prepared(file)
    starts = {
        role: [c for c in config[f"{role}_start_ray_commands"] if "ray start" in c]
        for role in ("head", "worker")
    }
    assert all(len(found) == 1 for found in starts.values())
    assert all("RAY_AUTH_MODE=token" in found[0] for found in starts.values())
    assert "--dashboard-host=127.0.0.1" in starts["head"][0]
    assert "~/.ray/auth_token" in config["file_mounts"].values()
    local = [v for v in config["file_mounts"].values() if not v.startswith("~")]
    assert [v for v in local if not (ROOT / v).exists()] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_job_has_time_to_stop_and_a_place_for_its_runs(file: Path) -> None:
    start = " ".join(prepared(file)["head_start_ray_commands"])
    assert int(re.search(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", start)[1]) >= 30
    assert re.search(r"B2RAY_HOME=(/|\$HOME/)", start)


def test_versions_are_those_of_the_constraints() -> None:
    named = 0
    for file in [*FILES, *(ROOT / "cluster").glob("*.sh"), *(ROOT / "cluster").glob("*.md")]:
        text = file.read_text()
        for package, version in re.findall(r"\b([\w-]+)==([\w.]+)", text):
            assert PINS[package] == version, f"{file.name}: {package}"
            named += 1
        for version in re.findall(r"rayproject/ray:([\d.]+)-", text):
            assert PINS["ray"] == version, file.name
            named += 1
    assert named >= len(FILES)


def test_the_constraints_hold_all_that_a_node_needs() -> None:
    """The launcher files install them as they are, without the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", d)[0].lower() for d in project["dependencies"]}
    assert names - {name.lower() for name in PINS} == set()


def test_the_slurm_script_parses() -> None:
    script = ROOT / "cluster" / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True, timeout=20)
    # sbatch reads its options up to the first command only.
    head = script.read_text().partition("set -euo")[0]
    for option in ("requeue", "no-kill", "signal=B:USR1@", "open-mode=append"):
        assert f"#SBATCH --{option}" in head


# --- what `ray job submit --working-dir .` uploads ---------------------------------------------


def uploaded(folder: Path, package: Path) -> zipfile.ZipFile:
    excludes = get_runtime_env_default_excludes()  # .git, for example
    create_package(str(folder), package, include_gitignore=True, excludes=excludes)
    return zipfile.ZipFile(package)


def test_a_job_uploads_the_package_and_little_else(tmp_path: Path) -> None:
    with uploaded(ROOT, tmp_path / "package.zip") as package:
        names = package.namelist()
    assert (tmp_path / "package.zip").stat().st_size < 20e6
    tops = {name.partition("/")[0] for name in names}
    assert tops >= {"b2ray", "configs", "constraints.txt"}
    assert tops.isdisjoint({"docs", "tests", "benchmarks", "tools", "deploy"})


def test_what_work_leaves_behind_is_not_uploaded(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    left = [
        *("runs/mine/lora/x.safetensors", "mlruns/0/meta.yaml", "mlartifacts/1/x", "mlflow.db"),
        *(".venv/bin/python", "b2ray/__pycache__/run.pyc", ".mypy_cache/x", ".b2ray-slurm-1/token"),
        *("docs/picture.png", "deploy/grafana.json", "tests/x.py", "build-out/x", "dist/x.whl"),
    ]
    for name in ("b2ray/run.py", *left):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("x")
    for name in (".gitignore", ".rayignore"):
        (checkout / name).write_text((ROOT / name).read_text())
    with uploaded(checkout, tmp_path / "package.zip") as package:
        files = [name for name in package.namelist() if not name.endswith("/")]
    assert sorted(files) == [".gitignore", ".rayignore", "b2ray/run.py"]
