"""A cluster of three raylets on this machine whose nodes can be killed, drained and added."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from b2ray.fleet import nodes
from tests.runner import when

STORE = 100 * 2**20  # bytes of each node's object store
# A killed node is noticed in 2 s instead of 12. Objects of more than a kilobyte are kept on their
# node, as a real model's latents are: those of the small models would travel with the answers, and
# no node could lose them.
SETTINGS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
    "health_check_timeout_ms": 1000,
    "max_direct_call_object_size": 1024,
}


class Raylets:
    """The head, which the driver is on, and two nodes with two fake GPUs each."""

    def __init__(self) -> None:
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 4,
                "include_dashboard": False,
                "object_store_memory": STORE,
                "_system_config": SETTINGS,
            },
        )
        self._ballast: list[Any] = []
        self.mend()
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="error")

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> str:
        """One more node with two GPUs; returns its id. Only in the main thread."""
        node = self.cluster.add_node(num_cpus=4, num_gpus=2, object_store_memory=STORE)
        return str(node.node_id)

    def kill(self, node_id: str) -> None:
        """What a power cut does to a node."""
        node = next(n for n in self.cluster.worker_nodes if n.node_id == node_id)
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node_id: str) -> None:
        """What a cloud does before it takes a spot node back."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        command += ["--address", self.address, "--node-id", node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command += ["--deadline-remaining-seconds", "600"]
        subprocess.run(command, check=True, capture_output=True)

    def mend(self) -> None:
        """Two nodes with GPUs that stay, and empty stores."""
        self._ballast.clear()
        if ray.is_initialized():
            # A node that drains ends by itself when it is idle.
            staying = nodes.alive() - nodes.draining()
            for node in list(self.cluster.worker_nodes):
                if node.node_id not in staying:
                    self.cluster.remove_node(node, allow_graceful=False)
        while len(self.cluster.worker_nodes) < 2:
            self.add()

    def only_one(self) -> None:
        """Only one node with GPUs, and everybody knows."""
        for node in list(self.cluster.worker_nodes)[1:]:
            self.cluster.remove_node(node, allow_graceful=False)
        when(lambda: len(nodes.alive()) == 2)

    def fill(self, share: float) -> None:
        """Fill the object store of every node up to a share of it."""
        make = ray.remote(num_cpus=0)(_ballast)
        piece = 4 * 2**20
        count = int(share * STORE / piece)
        for node in sorted(nodes.alive()):
            # One task: every task of no CPU would have a process of its own.
            here = make.options(
                num_returns=count,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            self._ballast += here.remote(piece, count)
        ray.wait(self._ballast, num_returns=len(self._ballast), fetch_local=False, timeout=60)

    def close(self) -> None:
        self._ballast.clear()
        ray.shutdown()
        self.cluster.shutdown()


def _ballast(size: int, count: int) -> list[np.ndarray]:
    return [np.ones(size, np.uint8) for _ in range(count)]
