"""A shard whose layers are spread over the ranks of a group. To whoever uses it on the leader it is like any other.

The leader tells the others, in one order, every batch, every layer, every choice and every clearing of slots. It says
``layer`` before each layer, and ``stop`` where a pass is abandoned: all ranks begin and end the same layers, and no
exchange is left without a partner. A rank that only follows has no machine and no messages of its own.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeinfer.core.ports import Batch, Payload, SampledToken, SamplingInputs
from stages.kernels.group import Group
from stages.models.kernel_shard import KernelShard


class GroupShard:
    """This rank's part, ``shard``, of the next model that ``group`` shares. The leader uses it; see ShardModel."""

    def __init__(self, shard: KernelShard, group: Group) -> None:
        self._shard, self._group, self._index = shard, group, len(group.parts)
        group.parts.append(shard)
        self._last: Payload | None = None  # what the last pass returned; the others have it too

    @property
    def faults(self) -> dict[int, int]:
        """See ShardModel."""
        return self._shard.faults

    @property
    def weight_nbytes(self) -> int:
        """Bytes of weights that this rank holds."""
        return self._shard.weight_nbytes

    def clear(self, slots: int) -> None:
        """See ShardModel."""
        self._group.tell(("clear", self._index, slots))
        self._shard.clear(slots)

    def forward(self, batch: Batch, hidden: Payload | None) -> Generator[float, None, Payload]:
        """See ShardModel."""
        group = self._group
        given = None if hidden is None else torch.as_tensor(hidden, dtype=torch.float32).numpy()
        group.is_fused = group.fuses(len(batch.slots))
        group.tell(("forward", self._index, group.is_fused, batch, given))
        passes, is_over = self._shard.forward(batch, hidden), False
        try:
            while True:
                group.tell("layer")
                try:
                    rest_s = next(passes)
                except StopIteration as done:
                    is_over, self._last = True, done.value
                    return done.value
                yield rest_s
        finally:
            if not is_over:
                group.tell("stop")

    def sample(
        self, hidden: Payload, rows: Sequence[int], count: int, draw: SamplingInputs | None = None
    ) -> list[list[SampledToken]]:
        """See ShardModel."""
        if rows:
            x: Any = list(rows)
            if hidden is not self._last:
                x = torch.as_tensor(hidden, dtype=torch.float32)[x].numpy()
            self._group.tell(("choose", self._index, x, count, draw))
        return self._shard.sample(hidden, rows, count, draw)


@torch.inference_mode()
def follow(group: Group) -> None:
    """On the other ranks: do what the leader says until it says ``end``."""
    last: list[Tensor | None] = [None] * len(group.parts)
    while (command := group.hear()) != "end":
        name, index, *given = command
        shard: KernelShard = group.parts[index]
        if name == "clear":
            shard.clear(*given)
        elif name == "forward":
            group.is_fused, batch, hidden = given
            last[index] = _follow_pass(group, shard, batch, hidden)
        else:
            rows, count, draw = given
            x = torch.from_numpy(rows) if isinstance(rows, np.ndarray) else _rows(last[index], rows)
            shard.choose(x.contiguous(), draw, count)


def _rows(hidden: Tensor | None, rows: list[int]) -> Tensor:
    assert hidden is not None, "choices come after a pass"
    return hidden[rows]


def _follow_pass(group: Group, shard: KernelShard, batch: Batch, hidden: Any) -> Tensor | None:
    passes = shard.forward(batch, hidden)
    while group.hear() == "layer":
        try:
            next(passes)
        except StopIteration as done:
            found: Tensor = done.value
            return found
    passes.close()
    return None
