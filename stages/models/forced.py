"""Forced acceptance for real models: the real shards compute as usual, and an emulated model supplies the tokens.

A pair's speed can therefore be measured at any acceptance, on any machine, also with random weights. The emulated model
(emulated.py) has one layer and uses the shard's own rows and slots. Its tokens depend on everything that a row attends
to, so plain decoding under the same forcing remains the oracle. The real shard's head and choice are computed for their
time and ignored. The hashes take some microseconds per row.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

from pipeinfer.core.ports import Batch, Payload, SampledToken, SamplingInputs, ShardModel
from stages.models.emulated import EmulatedShard, EmulatedSpec, Words, finish

FORCED_TOKENS = 512
"""A forced text has tokens below this number. Models whose speed matters have larger vocabularies, so target and draft
may have different vocabularies."""


class ForcedShard:
    """``shard`` with ``capacity`` slots, whose chosen tokens are replaced by forced ones.

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

    def clear(self, slots: int) -> None:
        """Make the first ``slots`` slots as they were before any pass, where the real shard can."""
        self._speaker.clear(slots)
        clear = getattr(self._shard, "clear", None)
        if clear is not None:
            clear(slots)

    def sample(
        self, hidden: Payload, rows: Sequence[int], count: int, draw: SamplingInputs | None = None
    ) -> list[list[SampledToken]]:
        """See ShardModel; ``rows`` are those of the last ``forward``."""
        self._shard.sample(hidden, rows, count, draw)
        return self._speaker.sample(self._words, rows, count, draw)
