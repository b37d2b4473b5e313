"""A shard whose layers are spread over the ranks of a group. To whoever uses it on the leader it is like any other.

The leader tells the others, in one order, every batch, every layer, every choice and every clearing of slots. It says
``layer`` before each layer, and ``stop`` where a pass is abandoned: all ranks begin and end the same layers, and no
exchange is left without a partner. A rank that only follows has no machine and no messages of its own.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.ports import Batch, Payload, SampledToken, SamplingInputs


class Part(Protocol):
    """One rank's part of a shard: a ShardModel, whose activations are numpy arrays or tensors, and ``choose``."""

    faults: dict[int, int]

    @property
    def weight_nbytes(self) -> int:
        """See ShardModel."""
        ...

    def forward(self, batch: Batch, hidden: Payload | None) -> Generator[float, None, Payload]:
        """See ShardModel."""
        ...

    def sample(
        self, hidden: Payload, rows: Sequence[int], count: int, draw: SamplingInputs | None = None
    ) -> list[list[SampledToken]]:
        """See ShardModel; on the leader, with ``choose`` on the others."""
        ...

    def choose(self, x: Payload, draw: SamplingInputs | None, count: int) -> object:
        """This rank's share of choosing after the rows ``x``."""
        ...

    def clear(self, slots: int) -> None:
        """See ShardModel."""
        ...


class Team(Protocol):
    """The group, as far as its leader commands it: stages.kernels.group.Group, or an emulated one.

    ``parts``: this rank's of all shards that the group shares, in the same order on all ranks. ``is_fused``: by which
    path the next exchanges go; ``path``: which one passes of so many rows take, from each number of rows on."""

    parts: list[Any]
    is_fused: bool
    path: dict[int, bool]

    def fuses(self, rows: int) -> bool:
        """Which path a pass of ``rows`` rows is to take."""
        ...

    def tell(self, command: object) -> None:
        """What all others are to do next."""
        ...


class GroupShard:
    """This rank's ``part`` of the next shard that ``group`` shares. The leader uses it; see ShardModel."""

    def __init__(self, part: Part, group: Team) -> None:
        self._part, self._group, self._index = part, group, len(group.parts)
        self._last: Payload | None = None  # what the last pass returned; the others have it too
        group.parts.append(part)

    @property
    def faults(self) -> dict[int, int]:
        """See ShardModel."""
        return self._part.faults

    @property
    def weight_nbytes(self) -> int:
        """Bytes of weights that this rank holds."""
        return self._part.weight_nbytes

    def clear(self, slots: int) -> None:
        """See ShardModel."""
        self._group.tell(("clear", self._index, slots))
        self._part.clear(slots)

    def forward(self, batch: Batch, hidden: Payload | None) -> Generator[float, None, Payload]:
        """See ShardModel."""
        group = self._group
        group.is_fused = group.fuses(len(batch.slots))
        group.tell(("forward", self._index, group.is_fused, batch, None if hidden is None else np.asarray(hidden)))
        passes, is_over = self._part.forward(batch, hidden), False
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
            x = None if hidden is self._last else np.asarray(hidden)[list(rows)]
            told = draw if draw is None or not draw.masks else replace(draw, masks=())  # the leader alone draws by them
            self._group.tell(("choose", self._index, x, list(rows), told, count))
        return self._part.sample(hidden, rows, count, draw)


class Follower:
    """What a rank that follows in ``group`` does, command by command."""

    def __init__(self, group: Team) -> None:
        self._group = group
        self._passes: Generator[float, None, Payload] | None = None  # the pass under way
        self._of = 0  # which part makes it
        self._last: dict[int, Payload] = {}  # what each part's last pass returned

    def handle(self, command: Any) -> bool:
        """Do what the leader says. Returns whether more will come."""
        if command == "end":
            return False
        if command == "layer":
            self._compute()
        elif command == "stop":
            self._stop()
        else:
            name, index, *given = command
            if name == "forward":
                if self._passes is not None:
                    raise LocalProtocolError("a pass begins before the last one has ended")
                self._group.is_fused, batch, hidden = given
                self._passes, self._of = self._group.parts[index].forward(batch, hidden), index
            elif name == "clear":
                self._group.parts[index].clear(*given)
            else:
                x, rows, draw, count = given
                self._group.parts[index].choose(self._last[index][rows] if x is None else x, draw, count)
        return True

    def _compute(self) -> None:
        if self._passes is None:
            raise LocalProtocolError("a layer of no pass")
        try:
            next(self._passes)
        except StopIteration as done:
            self._last[self._of], self._passes = done.value, None

    def _stop(self) -> None:
        if self._passes is not None:
            self._passes.close()
        self._passes = None
