"""A real pair: the target's shards and the draft model, loaded from checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pipeinfer.core.config import ACTIVATIONS, NUMERICS
from pipeinfer.core.errors import refuse
from pipeinfer.core.ports import Payload, ShardModel
from stages.checkpoint.checkpoint import Weights
from stages.checkpoint.spec import ModelSpec
from stages.kernels.group import Group
from stages.kernels.library import library
from stages.models.forced import ForcedShard
from stages.models.generic_spec import GenericSpec
from stages.models.grammar import Grammars
from stages.models.group_shard import GroupShard
from stages.models.guided import GuidedShard
from stages.models.kernel_shard import KernelShard
from stages.models.llama import LlamaShard
from stages.models.split import can_split

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_llama(
    spec: ModelSpec,
    weights: Weights,
    layers: range,
    dtype: torch.dtype,
    capacity: int,
    vocabulary: int | None = None,
    device: str = "cpu",
    memory: int = 0,
) -> KernelShard | LlamaShard:
    """The shard of ``layers`` of a model of the Llama family: on the kernels if they can be had, else in torch. Raises
    UserError for a model with experts where torch would compute."""
    if library() is not None and device == "cpu":
        return KernelShard.load(spec, weights, layers, dtype, capacity, vocabulary, memory=memory)
    if spec.experts is not None:
        refuse(f"{spec.architecture} has experts, which need the C kernels", "use a device and a host that have them")
    return LlamaShard.load(spec, weights, layers, dtype, capacity, device, vocabulary)


class CheckpointPair:
    """The models in ``target`` and ``drafts``, each a spec and where its weights are; see Pair. ``forced``: how often a
    draft's choices are right, if that is forced (see stages.models.forced). ``dtype``: of the target's weights;
    ``draft_dtypes``: of each draft's, by default the same. ``numerics``, ``arithmetic``: see Config, ``activations``.
    ``group``: of ranks that share all models of this one. ``grammars``: those that answers may follow; None: none can
    be asked for.

    ``weights_memory``: bytes for the target's weights on this rank, 0 for all of them (see KernelShard.load).
    ``activations``: the dtype of what stages send each other."""

    def __init__(
        self,
        target: tuple[ModelSpec | GenericSpec, Weights],
        drafts: Sequence[tuple[ModelSpec | GenericSpec, Weights]],
        dtype: str,
        forced: Sequence[float] = (),
        draft_dtypes: Sequence[str] = (),
        numerics: str = NUMERICS[0],
        group: Group | None = None,
        grammars: Grammars | None = None,
        weights_memory: int = 0,
        arithmetic: str = ACTIVATIONS[0],
    ) -> None:
        self._target = target
        self._drafts = drafts
        self._dtype = DTYPES[dtype]
        self._draft_dtypes = [DTYPES[name] for name in draft_dtypes] or [self._dtype] * len(drafts)
        self.activations = self._dtype
        if (kernels := library()) is not None:
            kernels.numerics, kernels.activations = numerics, arithmetic
            self.activations = torch.float32
        self._forced = forced
        self._group, self._weights_memory = group, weights_memory
        self._grammars = grammars
        self.layers = target[0].layer_count
        self.draft_contexts = tuple(spec.context for spec, _ in drafts)

    def stage(self, layers: range, capacity: int) -> ShardModel:
        """See Pair."""
        shard = self._load(*self._target, layers, self._dtype, capacity, memory=self._weights_memory)
        chooses = layers.stop == self.layers
        if not chooses:
            return shard
        return ForcedShard(shard, self._forced, capacity) if self._forced else self._guided(shard)

    def draft(self, index: int, capacity: int) -> ShardModel:
        """See Pair."""
        spec, checkpoint = self._drafts[index]
        # The tokenizer is the same, but embeddings may have different numbers of rows.
        vocabulary = self._target[0].vocab_size
        layers, dtype = range(spec.layer_count), self._draft_dtypes[index]
        shard = self._load(spec, checkpoint, layers, dtype, capacity, vocabulary)
        return ForcedShard(shard, self._forced, capacity, is_draft=True) if self._forced else self._guided(shard)

    def _guided(self, shard: ShardModel) -> ShardModel:
        return shard if self._grammars is None else GuidedShard(shard, self._grammars)

    def _load(
        self,
        spec: ModelSpec | GenericSpec,
        checkpoint: Weights,
        layers: range,
        dtype: torch.dtype,
        capacity: int,
        vocabulary: int | None = None,
        memory: int = 0,
    ) -> ShardModel:
        try:
            return self._read(spec, checkpoint, layers, dtype, capacity, vocabulary, memory)
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
        dtype: torch.dtype,
        capacity: int,
        vocabulary: int | None,
        memory: int,
    ) -> ShardModel:
        if self._group is not None and isinstance(spec, ModelSpec) and can_split(spec, self._group.size):
            part = KernelShard.load(spec, checkpoint, layers, dtype, capacity, vocabulary, self._group, memory)
            return GroupShard(part, self._group)
        if isinstance(spec, ModelSpec):
            return load_llama(spec, checkpoint, layers, dtype, capacity, vocabulary, memory=memory)
        from stages.models.generic import GenericShard  # transformers takes a second to import

        return GenericShard.load(spec, layers, dtype, capacity, vocabulary=vocabulary)

    def pack(self, hidden: Payload) -> npt.NDArray[np.uint8]:
        """See Pair; ``hidden``: a tensor [rows, hidden_size]."""
        data: npt.NDArray[np.uint8] = hidden.to(self.activations).contiguous().view(torch.uint8).numpy()
        return data

    def unpack(self, data: npt.NDArray[np.uint8], rows: int) -> Payload:
        """See Pair."""
        return torch.from_numpy(data).view(self.activations).view(rows, -1)

    def blank(self, rows: int) -> Payload:
        """See Pair."""
        return torch.zeros(rows, self._target[0].hidden_size, dtype=self.activations)
