"""Where one engine process stands among those that share a machine: which replica it is of, which rank.

    replica 0   rank 0  rank 1        a replica is a whole model with a KV cache and a scheduler of its own
    replica 1   rank 0  rank 1        (--data-parallel-size); its ranks each hold a part of the model
                                      (--tensor-parallel-size)

Owns what follows from that: the GPU, the share of the cores and of the machine's memory. Knows no torch.
Invariant: processes of one server never share a GPU, and on a CPU their threads together are no more than
the cores.
"""

from __future__ import annotations

import msgspec


class Placement(msgspec.Struct, frozen=True):
    """Process `rank` of `num_ranks` of replica `replica` of `num_replicas`; by itself, the only one."""

    replica: int = 0
    num_replicas: int = 1
    rank: int = 0
    num_ranks: int = 1

    @property
    def num_processes(self) -> int:
        """Processes that compute, on this machine."""
        return self.num_replicas * self.num_ranks

    @property
    def index(self) -> int:
        """Of this process among them; on CUDA, of its GPU."""
        return self.replica * self.num_ranks + self.rank

    def share(self, cores: int) -> int:
        """Of so many cores, this process's: at least one, the first processes get what is over."""
        return max(1, cores // self.num_processes + (self.index < cores % self.num_processes))


ALONE = Placement()
"""The only process that computes."""
