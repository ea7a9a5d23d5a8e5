"""Data parallelism of the learner: processes with equal weights that add up their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from b2ray.errors import RankLost

Item = TypeVar("Item")


class Ranks:
    """This process among those that learn together; each has a share of every batch.

    One rank makes no process group, and its sums are its own values. With more, every rank calls
    the same methods in the same order, and all get the same bytes.

    Args:
        rank: 0 .. world - 1.
        world: how many ranks there are.
        address: "host:port" of rank 0, where all meet.
        timeout: seconds that the others may take to come, and to each sum.
        device: where sums are made, by NCCL on a GPU (one of its own for every rank), else by Gloo.

    Raises:
        RankLost: another rank did not come.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        address: str = "",
        timeout: float = 900.0,
        device: torch.device | None = None,
    ) -> None:
        self.rank, self.world = rank, world
        self.timeout = timedelta(seconds=timeout)
        self.device = device or torch.device("cpu")
        if world == 1:
            return
        on_gpu = self.device.type == "cuda"
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                init_method=f"tcp://{address}",
                timeout=self.timeout,
                world_size=world,
                rank=rank,
                device_id=self.device if on_gpu else None,
            )
        except RuntimeError as error:
            raise self._lost(f"meeting at {address}", error) from error

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's items: every item is one rank's, by its position; a share may be empty."""
        return items[self.rank :: self.world]

    @torch.no_grad()
    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put the sum over the ranks into each tensor; added in float32, in one message.

        Raises:
            RankLost: another rank died, or did not come within the time-out.
        """
        if self.world == 1:
            return
        bucket = torch.cat([t.flatten().to(self.device, torch.float32) for t in tensors])
        try:
            # With a time-out of its own NCCL raises here too; else it would end the process.
            dist.all_reduce(bucket, async_op=True).wait(self.timeout)
        except RuntimeError as error:
            raise self._lost("summing", error) from error
        for tensor, found in zip(tensors, bucket.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(found.view_as(tensor))

    def mean(self, values: Sequence[float]) -> float:
        """The mean of the values of all ranks; 0 if there are none."""
        total = torch.tensor([sum(values), len(values)], dtype=torch.float64)
        self.sum([total])
        return float(total[0] / total[1].clamp(min=1))

    def largest(self, value: torch.Tensor) -> torch.Tensor:
        """The largest of every rank's scalar; NaN if one is."""
        seats = value.new_zeros(self.world)
        seats[self.rank] = value
        self.sum([seats])
        return seats.max()

    def close(self) -> None:
        """Leave; a rank that still waits for this one gets `RankLost`."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _lost(self, doing: str, error: RuntimeError) -> RankLost:
        cause = (str(error).splitlines() or [""])[0]
        return RankLost(
            f"rank {self.rank} of {self.world} is alone while {doing}: another rank died, failed, "
            f"or took more than {self.timeout.total_seconds():g} s ({cause})"
        )
