"""A real pair: the target's shards and the draft model, loaded from checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pipeinfer.core.errors import refuse
from pipeinfer.core.ports import Payload, ShardModel
from stages.checkpoint.checkpoint import Weights
from stages.checkpoint.spec import ModelSpec
from stages.models.forced import ForcedShard
from stages.models.generic_spec import GenericSpec
from stages.models.llama import LlamaShard

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class CheckpointPair:
    """The models in ``target`` and ``drafts``, each a spec and where its weights are; see Pair. ``forced``: how often a
    draft's choices are right, if that is forced (see stages.models.forced)."""

    def __init__(
        self,
        target: tuple[ModelSpec | GenericSpec, Weights],
        drafts: Sequence[tuple[ModelSpec | GenericSpec, Weights]],
        dtype: str,
        forced: Sequence[float] = (),
    ) -> None:
        self._target = target
        self._drafts = drafts
        self._dtype = DTYPES[dtype]
        self._forced = forced
        self.layers = target[0].layer_count
        self.draft_contexts = tuple(spec.context for spec, _ in drafts)

    def stage(self, layers: range, capacity: int) -> ShardModel:
        """See Pair."""
        shard = self._load(*self._target, layers, capacity)
        chooses = layers.stop == self.layers
        return ForcedShard(shard, self._forced, capacity) if self._forced and chooses else shard

    def draft(self, index: int, capacity: int) -> ShardModel:
        """See Pair."""
        spec, checkpoint = self._drafts[index]
        # The tokenizer is the same, but embeddings may have different numbers of rows.
        vocabulary = self._target[0].vocab_size
        shard = self._load(spec, checkpoint, range(spec.layer_count), capacity, vocabulary)
        return ForcedShard(shard, self._forced, capacity, is_draft=True) if self._forced else shard

    def _load(
        self,
        spec: ModelSpec | GenericSpec,
        checkpoint: Weights,
        layers: range,
        capacity: int,
        vocabulary: int | None = None,
    ) -> ShardModel:
        try:
            return self._read(spec, checkpoint, layers, capacity, vocabulary)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            refuse(
                f"there is not enough memory for layers {layers.start} to {layers.stop - 1} with {capacity} slots",
                "use more ranks, --dtype bf16 or a smaller --context",
            )

    def _read(
        self,
        spec: ModelSpec | GenericSpec,
        checkpoint: Weights,
        layers: range,
        capacity: int,
        vocabulary: int | None,
    ) -> ShardModel:
        if isinstance(spec, ModelSpec):
            return LlamaShard.load(spec, checkpoint, layers, self._dtype, capacity, vocabulary=vocabulary)
        from stages.models.generic import GenericShard  # transformers takes a second to import

        return GenericShard.load(spec, layers, self._dtype, capacity, vocabulary=vocabulary)

    def pack(self, hidden: Payload) -> npt.NDArray[np.uint8]:
        """See Pair; ``hidden``: a tensor [rows, hidden_size]."""
        data: npt.NDArray[np.uint8] = hidden.contiguous().view(torch.uint8).numpy()
        return data

    def unpack(self, data: npt.NDArray[np.uint8], rows: int) -> Payload:
        """See Pair."""
        return torch.from_numpy(data).view(self._dtype).view(rows, -1)
