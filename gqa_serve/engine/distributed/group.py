"""`RankGroup`: what tensor-parallel ranks tell each other, over torch.distributed.

Owns the process group and the order of additions. Knows neither the model nor plans. Every call is a
collective: all ranks make the same ones in the same order, or all of them wait.
Invariant: an exact sum is the ranks' parts added in their order, whatever the number of rows; so on a CPU,
and on CUDA with --deterministic, what a request gives does not depend on the batch it is in. NCCL's own sum,
which is faster, may order additions by the size of the tensor.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_PATIENCE = datetime.timedelta(
    hours=1
)  # a rank that hangs is seen by the engine's watchdog, which knows more


class RankGroup:
    """This process as rank `rank` of `size`, on `device`; the others rendezvous at the file `meeting`.

    `exact`: sums in the order of ranks. Returns when all ranks are there.
    """

    def __init__(self, meeting: Path, rank: int, size: int, device: torch.device, *, exact: bool) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.exact = exact or device.type != "cuda"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=meeting.as_uri(),
            rank=rank,
            world_size=size,
            timeout=_PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )
        self.gather_numbers(rank)  # a rank may still be reading the file when others have done with it

    def close(self) -> None:
        """Leave the group, whether or not the others are still there."""
        if self.device.type == "cuda":
            # Destroying waits for sums under way, and may wait for other ranks: for ever, if they are dead.
            distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()

    def add_up(self, x: torch.Tensor) -> None:
        """x becomes the sum of all ranks' x, in place."""
        if not self.exact:
            dist.all_reduce(x)
            return
        first, *others = self._gathered(x)
        x.copy_(first)
        for part in others:
            x.add_(part)

    def join_columns(self, x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """The ranks' [R, widths[rank]] side by side: [R, sum(widths)]."""
        most = max(widths)
        if x.shape[1] < most:
            x = torch.nn.functional.pad(x, (0, most - x.shape[1]))
        parts = self._gathered(x.contiguous())  # [ranks, R, most]
        if min(widths) == most:
            return parts.transpose(0, 1).reshape(x.shape[0], -1)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def send(self, x: torch.Tensor) -> None:
        """From the first rank to all others, which `receive` it."""
        dist.broadcast(x.contiguous(), 0)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What the first rank sends."""
        x = torch.empty(shape, dtype=dtype, device=self.device)
        dist.broadcast(x, 0)
        return x

    def gather_numbers(self, number: int) -> list[int]:
        """Every rank's number, in the order of ranks."""
        return self._gathered(torch.tensor([number], device=self.device)).flatten().tolist()

    def _gathered(self, x: torch.Tensor) -> torch.Tensor:
        """[ranks, *x.shape] of a contiguous x."""
        parts = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(parts.unbind()), x)
        return parts
