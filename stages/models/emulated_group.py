"""Emulated groups: the emulated model split among ranks that live in one process, under the real GroupShard and
Follower (stages.models.group_shard).

The sum over the slots that a row sees is taken modulo 2^64, so a slot's key can be split additively:

    key     = key[0] + ... + key[N - 1]
    key[r]  = mix(key ^ salt[r])  for r < N - 1; the last rank has the rest
    sum     = sum[0] + ... + sum[N - 1], each rank's over its own slots

Each rank adds up its own slots. One exchange a layer brings the sums together. N ranks give exactly the tokens of the
undivided model. A rank that misses a pass, a layer or a row adds another number, which changes the tokens. What is
drawn after a row is split and brought together alike.

Ranks take turns: what the leader tells is done by the others before it goes on itself. A follower therefore leaves
its sum and rests; the leader finds all sums there, or an exchange has no partner: where real ranks would wait for ever,
StallError is raised. What real ranks would survive and should not do is a LocalProtocolError: a pass that was not
stopped, slots that were not cleared.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from pipeinfer.core.errors import LocalProtocolError, StallError
from pipeinfer.core.ports import Batch, SampledToken, SamplingInputs
from stages.models.emulated import EmulatedShard, EmulatedSpec, Pace, Words, mix, stirred
from stages.models.group_shard import Follower, GroupShard

FUSED_ROWS = 4
"""Up to so many rows exchanges are said to be fused: a rank that takes the other path has no partner."""
KEPT = 4
"""Exchanges whose sums are kept; nobody may be so late."""


def share(words: Words, rank: int, size: int, salt: int) -> Words:
    """What rank ``rank`` of ``size`` holds of ``words``; all shares with one ``salt`` add up to them modulo 2^64."""
    if rank < size - 1:
        return mix(words ^ np.uint64((salt << 8) + rank + 1))
    found = words.copy()
    for other in range(size - 1):
        found -= mix(words ^ np.uint64((salt << 8) + other + 1))
    return found


class EmulatedTeam:
    """The side of rank ``rank`` of ``size`` in an emulated group; see Team. ``others``: those that the leader commands;
    None on a rank that follows.

    ``late``: a rank takes up to this share of a layer longer than another one; ``seed`` decides by how much."""

    def __init__(
        self, rank: int, size: int, others: Sequence[EmulatedTeam] | None, late: float = 0.0, seed: int = 0
    ) -> None:
        self.rank, self.size, self.others, self.leads = rank, size, others or (), others is not None
        self.parts: list[Any] = []
        self.is_fused = True
        self.path = {0: True, FUSED_ROWS + 1: False}
        self.is_computing = False
        self._late, self._rng = late, random.Random(f"{seed} {rank}")
        self._given: dict[int, tuple[bool, Words, float]] = {}  # by the number of the exchange
        self._count = 0
        self._follower = Follower(self)

    def fuses(self, rows: int) -> bool:
        """See Team."""
        return self.path[max(known for known in self.path if known <= rows)]

    def tell(self, command: object) -> None:
        """See Team; all others have done it on return. Raises LocalProtocolError where one of them goes on with a pass
        that was to be over."""
        data = pickle.dumps(command, protocol=5)
        for other in self.others:
            if other.is_computing and command not in ("layer", "stop"):
                raise LocalProtocolError(f"part {other.rank} is in a pass that was to be over")
            other._follower.handle(pickle.loads(data))

    def give(self, words: Words, layer_s: float = 0.0) -> None:
        """Begin the next exchange with this rank's ``words``, found in ``layer_s`` seconds if it was not late."""
        self._count += 1
        self._given.pop(self._count - KEPT, None)
        if self._late:
            layer_s *= 1 + self._late * self._rng.random()
        self._given[self._count] = (self.is_fused, words, layer_s)

    def take(self, team: Sequence[EmulatedTeam]) -> tuple[Words, float]:
        """What the ranks of ``team`` gave to the exchange, added up, and the seconds of the slowest. Raises StallError
        where one of them gave nothing, or by another path."""
        total, slowest_s = np.zeros_like(self._given[self._count][1]), 0.0
        for other in team:
            is_fused, words, layer_s = other._given.get(self._count, (None, total, 0.0))
            if is_fused is not self.is_fused:
                raise StallError(f"part {self.rank} waits for part {other.rank} in exchange {self._count}")
            if len(words) != len(total):
                raise LocalProtocolError(f"part {other.rank} brings {len(words)} rows, part {self.rank} {len(total)}")
            total, slowest_s = total + words, max(slowest_s, layer_s)
        return total, slowest_s


class EmulatedPart(EmulatedShard):
    """The part of an EmulatedShard that one rank of ``group`` has; see Part. Every layer rests, a draft's too."""

    def __init__(
        self,
        group: EmulatedGroup,
        team: EmulatedTeam,
        spec: EmulatedSpec,
        layers: range,
        capacity: int,
        layer_s: Pace = lambda rows, context: 0.0,
        is_draft: bool = False,
    ) -> None:
        super().__init__(spec, layers, capacity, layer_s, is_draft)
        self._group, self._team = group, team
        self._index = len(team.parts)

    def forward(self, batch: Batch, hidden: Words | None) -> Generator[float, None, Words]:
        """See ShardModel; the leader rests for as long as the slowest rank takes for a layer."""
        team = self._team
        words, places, sees, pace = self._enter(batch, hidden)
        team.is_computing = True
        try:
            for index, layer in enumerate(self._layers):
                keys = mix(words ^ self._salts[index] ^ places)
                self._kv[index][batch.slots] = self._share(keys, layer)
                team.give(np.einsum("ij,j->i", sees, self._kv[index][: sees.shape[1]]), pace)
                if not team.leads:
                    yield 0.0  # the leader's sum comes after this one
                sums, layer_s = team.take(self._group.teams)
                words = mix(words + sums)
                if team.leads:
                    self._note_faults(words, range(len(words)), layer)
                    yield layer_s
        finally:
            team.is_computing = False
        return words

    def sample(
        self, hidden: Words, rows: Sequence[int], count: int, draw: SamplingInputs | None = None
    ) -> list[list[SampledToken]]:
        """See Part."""
        if not rows:
            return []
        wanted = hidden[list(rows)]
        self._note_faults(wanted, rows, self._spec.layers)
        self.choose(wanted, draw, count)
        return self._choices(self._team.take(self._group.teams)[0], wanted, count, draw)

    def choose(self, x: Words, draw: SamplingInputs | None, count: int) -> None:
        """See Part."""
        self._team.give(self._share(x if draw is None else stirred(x, draw), count))

    def clear(self, slots: int) -> None:
        """See Part. Raises LocalProtocolError on the leader where another rank still holds something."""
        super().clear(slots)
        for other in self._team.others:
            if other.parts[self._index].holds(slots):
                raise LocalProtocolError(f"part {other.rank} has not cleared {slots} slots")

    def holds(self, slots: int) -> bool:
        """Whether one of the first ``slots`` slots is not as it was before any pass."""
        return bool(self._kv[:, :slots].any())

    def _share(self, words: Words, salt: int) -> Words:
        return share(words, self._team.rank, self._team.size, salt)


class EmulatedGroup:
    """A group of ``size`` ranks in this process; ``late`` and ``seed``: see EmulatedTeam."""

    def __init__(self, size: int, late: float = 0.0, seed: int = 0) -> None:
        others = [EmulatedTeam(rank, size, None, late, seed) for rank in range(1, size)]
        self.teams = [EmulatedTeam(0, size, others, late, seed), *others]

    def shard(
        self,
        spec: EmulatedSpec,
        layers: range,
        capacity: int,
        layer_s: Pace = lambda rows, context: 0.0,
        is_draft: bool = False,
    ) -> GroupShard:
        """A shard that all ranks share, for the leader to use; see EmulatedShard."""
        parts = [EmulatedPart(self, team, spec, layers, capacity, layer_s, is_draft) for team in self.teams]
        shards = [GroupShard(part, team) for part, team in zip(parts, self.teams, strict=True)]
        return shards[0]
