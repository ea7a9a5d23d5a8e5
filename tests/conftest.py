"""What all tests share: small models on disk, one thread, no network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.runner import Cluster, ColdRunner, Runner

# Before torch or transformers are imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Set explicitly, so that nothing depends on a token in the home directory.
os.environ["RAY_AUTH_MODE"] = "disabled"


# Where tests may use Ray; those of tests/unit never do.
ON_RAY = ("tests/ray/", "tests/docs/test_commands.py", "tests/docs/test_figures.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Which of several processes (`make test`) gets which tests.

    One has all tests that may use Ray, and so their actors. The tests of any other file stay
    together in one process, too, and so make their fixtures once.

    pytest-xdist has the mark `xdist_group` for this, but its version 3.8 loses it under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(ON_RAY) else nodeid.partition("::")[0]

    return Together(config, log)


# How long an example takes is the machine's affair.
settings.register_profile("b2ray", deadline=None)
settings.load_profile("b2ray")


FOLDERS = Path(__file__).parent
COLD = ("chaos", "browser")  # all that is in them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs Ray, and what starts processes that no other test uses."""
    for item in items:
        folder = item.path.relative_to(FOLDERS).parts[0]
        fixtures = getattr(item, "fixturenames", ())
        if folder in COLD or "cold_runner" in fixtures:
            item.add_marker(pytest.mark.cold)
        if folder in ("ray", "chaos") or "cluster" in fixtures:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `reward` and `prompts.txt` (tests.models.save_all)."""
    import torch

    from tests.models import save_all

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    save_all(folder)
    return folder


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Ray of this session, which all tests share."""
    import ray

    from tests.runner import Cluster

    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        # Ray's workers would wait for the tests of the other process, at a niceness of 15.
        _system_config={"worker_niceness": 0},
        log_to_driver=False,
        logging_level="error",
    )
    raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid
    yield Cluster(ray.get_runtime_context().gcs_address, raylet)
    ray.shutdown()


@pytest.fixture(scope="session")
def runner(models: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Runs whose actors are used again: for all that no process has to be started or killed for."""
    from tests.runner import Runner
    from tests.warm import Pool

    return Runner(models, tmp_path_factory.mktemp("runs"), Pool())


@pytest.fixture(scope="session")
def cold_runner(runner: Runner, cluster: Cluster) -> ColdRunner:
    """Runs in the same folder with processes of their own; a test that takes it is `cold`."""
    from tests.runner import ColdRunner

    return ColdRunner(runner.models, runner.runs, None, cluster.address)
