"""A shard that lets an answer follow a grammar: it tells the shard within which tokens each row may choose."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from pipeinfer.core.ports import Batch, Payload, SampledToken, SamplingInputs, ShardModel
from stages.models.grammar import Grammars

ANYTHING = np.zeros(0, np.bool_)
"""The mask of a row without a grammar."""


class GuidedShard:
    """``shard``, which chooses tokens, under ``grammars``; see ShardModel."""

    def __init__(self, shard: ShardModel, grammars: Grammars) -> None:
        self.shard, self._grammars = shard, grammars

    @property
    def faults(self) -> Mapping[int, int]:
        """Those of the shard."""
        return self.shard.faults

    @property
    def weight_nbytes(self) -> int:
        """Those of the shard."""
        return self.shard.weight_nbytes

    def forward(self, batch: Batch, hidden: Payload | None) -> Generator[float, None, Payload]:
        """See ShardModel."""
        return self.shard.forward(batch, hidden)

    def clear(self, slots: int) -> None:
        """See ShardModel, where the shard can."""
        clear = getattr(self.shard, "clear", None)
        if clear is not None:
            clear(slots)

    def sample(
        self, hidden: Payload, rows: Sequence[int], count: int, draw: SamplingInputs | None = None
    ) -> list[list[SampledToken]]:
        """See ShardModel."""
        if draw is not None and any(sampling.grammar for sampling in draw.samplings):
            given = zip(draw.samplings, draw.generated, strict=True)
            masks = [self._grammars.mask(one.grammar, text) if one.grammar else ANYTHING for one, text in given]
            draw = replace(draw, masks=tuple(masks))
        return self.shard.sample(hidden, rows, count, draw)
