"""The processes that `mlx.launch` starts. All of them run the engine's loop on the commands that rank 0 shares."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_overlay_server.engine.commands import Command, Submit
from mlx_overlay_server.settings import rank


class Ranks:
    """This process's place among the ranks, and the way in which rank 0 shares its commands with the others."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """Join the group, and give all ranks the same random seed, so that they draw the same tokens.

        Without a launcher, no group is looked for: MLX would try MPI, which starts a daemon that listens, and may hang.
        """
        group = mx.distributed.init() if rank(environ) is not None else None
        self.group: Any = group if group is not None and group.size() > 1 else None
        """MLX's group; None where this process is the only one."""
        if self.group is not None:
            state: Any = mx.random.state
            seed: Any = mx.distributed.all_sum(state[0]).view(mx.uint64).item()
            mx.random.seed(seed)

    def share(self, commands: Sequence[Command]) -> list[Command]:
        """Return rank 0's commands on every rank. All ranks call it in each turn; only rank 0's argument counts."""
        if self.group is None:
            return list(commands)
        return self._send(commands) if self.group.rank() == 0 else self._receive()

    def least(self, number: int) -> int:
        """Return the smallest of the ranks' numbers, on every rank."""
        if self.group is None:
            return number
        smallest: Any = mx.distributed.all_min(mx.array(number, dtype=mx.int64), stream=mx.cpu).item()
        return int(smallest)

    @staticmethod
    def _send(commands: Sequence[Command]) -> list[Command]:
        if not commands:
            mx.eval(mx.distributed.all_sum(mx.array(0), stream=mx.cpu))
            return []
        # Matchers cannot be pickled; each rank makes its own from the constraint.
        plain = [replace(each, matcher=None) if isinstance(each, Submit) else each for each in commands]
        data = mx.array(list(pickle.dumps(plain)), dtype=mx.uint8)
        mx.eval(mx.distributed.all_sum(mx.array(data.size), stream=mx.cpu))
        mx.eval(mx.distributed.all_sum(data, stream=mx.cpu))
        return plain

    @staticmethod
    def _receive() -> list[Command]:
        size: Any = mx.distributed.all_sum(mx.array(0), stream=mx.cpu).item()
        if size == 0:
            return []
        data = mx.distributed.all_sum(mx.zeros(size, dtype=mx.uint8), stream=mx.cpu)
        content: Any = data.tolist()
        return list(pickle.loads(bytes(content)))  # noqa: S301 - from rank 0, which started us


def slowest(seconds: float, group: Any) -> float:
    """Return the longest of the times that a group's ranks took, on each of them; `group`: None for one process."""
    if group is None:
        return seconds
    longest: Any = mx.distributed.all_max(mx.array(seconds), group=group, stream=mx.cpu).item()
    return float(longest)
