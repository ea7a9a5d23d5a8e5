"""One Ray for all tests that need it, and one undisturbed run to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runner import Cluster, Runner


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.fspath).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.ray)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    import ray

    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        logging_level="error",
    )
    raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid
    yield Cluster(ray.get_runtime_context().gcs_address, raylet)
    ray.shutdown()


@pytest.fixture(scope="session")
def runner(
    models: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runner]:
    yield Runner(models, tmp_path_factory.mktemp("runs"), cluster.address)


@pytest.fixture(scope="session")
def undisturbed(runner: Runner) -> str:
    """The name of a run that nothing happened to, with one sampler."""
    assert runner.here("undisturbed", fleet__samplers__max=1) == 0
    return "undisturbed"
