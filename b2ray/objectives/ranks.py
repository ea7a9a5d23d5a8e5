"""Data parallelism of the learner: ranks with the same weights, which sum their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from b2ray.errors import RankLost

Item = TypeVar("Item")


class Ranks:
    """The communication of one rank with the others; each rank computes a share of every batch.

    A single rank makes no process group, and its sums are its own values. Several ranks have to
    call the same methods in the same order, and all get the same bytes.

    Args:
        rank: index of this rank, 0 .. world - 1.
        world: number of ranks.
        address: "host:port" of rank 0, to which all ranks connect.
        timeout: seconds to wait for the other ranks when connecting, and at every sum.
        device: the device on which sums are computed: by NCCL on a GPU, of which every rank needs
            one for itself, and by Gloo on the CPU.

    Raises:
        RankLost: another rank did not connect in time.
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
        """The items of this rank: each item belongs to one rank, and a share may be empty."""
        return items[self.rank :: self.world]

    @torch.no_grad()
    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the ranks.

        All tensors are summed in float32, by a single message.

        Raises:
            RankLost: another rank died, or did not call `sum` within the timeout.
        """
        if self.world == 1:
            return
        bucket = torch.cat([t.flatten().to(self.device, torch.float32) for t in tensors])
        try:
            # NCCL, too, raises here if `wait` has a timeout; otherwise it would end the process.
            dist.all_reduce(bucket, async_op=True).wait(self.timeout)
        except RuntimeError as error:
            raise self._lost("summing", error) from error
        sums = bucket.split([t.numel() for t in tensors])
        for tensor, summed in zip(tensors, sums, strict=True):
            tensor.copy_(summed.view_as(tensor))

    def mean(self, values: Sequence[float]) -> float:
        """The mean over the values of all ranks; 0 if there are no values."""
        total = torch.tensor([sum(values), len(values)], dtype=torch.float64)
        self.sum([total])
        return float(total[0] / total[1].clamp(min=1))

    def largest(self, value: torch.Tensor) -> torch.Tensor:
        """The largest of the ranks' scalars; NaN if one of them is NaN."""
        values = value.new_zeros(self.world)
        values[self.rank] = value
        self.sum([values])
        return values.max()

    def close(self) -> None:
        """Leave the process group; a rank that still waits for this one gets `RankLost`."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _lost(self, activity: str, error: RuntimeError) -> RankLost:
        cause = (str(error).splitlines() or [""])[0]
        return RankLost(
            f"rank {self.rank} of {self.world} is alone while {activity}: another rank died, "
            f"failed, or took more than {self.timeout.total_seconds():g} s ({cause})"
        )
