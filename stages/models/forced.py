"""Forced acceptance for real models: they compute as always, and an emulated model says the words.

So a pair's speed can be measured at any acceptance, on any machine, even with weights that mean nothing. The emulated
model (emulated.py) has one layer and is given the shard's own rows and slots: its words depend on all that a row
sees, and plain decoding under the same forcing remains the oracle. The real shard's head and choice are computed and
ignored, for their time; the hashes beside them take some microseconds a row.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

from pipeinfer.core.ports import Batch, Payload, SampledToken, SamplingInputs, ShardModel
from stages.models.emulated import EmulatedShard, EmulatedSpec, Words, finish

FORCED_TOKENS = 512
"""Tokens that a forced text is made of: 0 up to, not including, this one. Fewer than any model knows whose speed
matters, so that a target and a draft need not know the same ones."""


class ForcedShard:
    """``shard`` with ``capacity`` slots, which chooses tokens, but others than its own.

    A draft's k-th choice is the target's with probability ``ranks[k]``, and it claims as much."""

    def __init__(self, shard: ShardModel, ranks: Sequence[float], capacity: int, is_draft: bool = False) -> None:
        spec = EmulatedSpec(layers=1, vocab=FORCED_TOKENS, ranks=tuple(ranks))
        self._shard = shard
        self._speaker = EmulatedShard(spec, range(1), capacity, is_draft=is_draft)
        self._words: Words

    @property
    def faults(self) -> Mapping[int, int]:
        """Those of the real shard."""
        return self._shard.faults

    @property
    def weight_nbytes(self) -> int:
        """Those of the real shard."""
        return self._shard.weight_nbytes

    def forward(self, batch: Batch, hidden: Payload | None) -> Generator[float, None, Payload]:
        """See ShardModel."""
        self._words = finish(self._speaker.forward(batch, None))
        return (yield from self._shard.forward(batch, hidden))

    def sample(
        self, hidden: Payload, rows: Sequence[int], count: int, draw: SamplingInputs | None = None
    ) -> list[list[SampledToken]]:
        """See ShardModel; ``rows`` are those of the last ``forward``."""
        self._shard.sample(hidden, rows, count, draw)
        return self._speaker.sample(self._words, rows, count, draw)
