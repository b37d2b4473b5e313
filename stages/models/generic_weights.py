"""The tensors of a checkpoint for a model that transformers builds: compared before the model is run, and handed over
unread, so that each shard reads its own.

Renaming, conversion and tying are transformers' own (as of fused experts, or of a base model that was saved alone).
What is added here is only that nothing is missing, double, misshapen or not a float.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from stages.checkpoint.checkpoint import Checkpoint, numpy_windows, refuse_unlike, torch_windows
from stages.checkpoint.folder import AGAIN, printable, refuse
from stages.checkpoint.names import refuse_collisions
from stages.checkpoint.safetensors_file import FLOAT_NBYTES, StoredTensor

if TYPE_CHECKING:
    from stages.quantization.matrix import Matrix

FREE_BUFFER_NUMEL = 1 << 26  # numbers beside the weights (as tables of angles) that a model may always make up


def whole(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """All of the model, without memory."""
    with torch.device("meta"):
        return model_class(config)


def refuse_by_tensors(path: Path, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Compare what is stored with what ``model``, without memory, has. Raises CheckpointError."""
    state = model.state_dict(keep_vars=True)
    tensors, direct = checkpoint.quantized.logical(), dict[str, StoredTensor]()
    seen: list[tuple[str, str]] = []
    is_converted = False
    for name, meant, by_converter in _renamed(tensors, model, state):
        stored = tensors[name]
        is_converted |= by_converter
        packing = checkpoint.quantized.packing(name)
        if packing is not None and by_converter:
            fix = "use a bfloat16 release, or a model of the Llama family on the kernels"
            refuse(f"{stored.path}: {printable(name, 80)} is quantised, and transformers fuses it with others", fix)
        if meant not in state:
            continue
        if packing is not None:
            checkpoint.quantized.refuse_unlike(name, packing, tuple(state[meant].shape))
            if packing.early:
                with numpy_windows() as window:
                    checkpoint.quantized.refuse_numbers(name, packing, window)
        if stored.dtype not in FLOAT_NBYTES:
            refuse(f"{stored.path}: tensor {stored.name} is {stored.dtype}", f"use one of {', '.join(FLOAT_NBYTES)}")
        if not by_converter:
            seen.append((stored.name, meant))
            direct[meant] = stored
    refuse_collisions(checkpoint.directory, seen)
    checkpoint.quantized.refuse_unused(checkpoint.directory)
    for meant, stored in direct.items():
        if checkpoint.quantized.packing(stored.name) is None:
            refuse_unlike(stored, tuple(state[meant].shape))
    if not is_converted:  # else the converted have names that only conversion knows; loading will miss what is missing
        _refuse_missing(checkpoint, model, direct.keys() & state.keys())
    made_up = sum(buffer.numel() for buffer in model.buffers())
    if made_up > FREE_BUFFER_NUMEL + 4 * sum(weight.numel() for weight in model.parameters()):
        refuse(f"{path} asks for {made_up:g} numbers beside the weights", "correct it or export the model again")


def _renamed(names: Iterable[str], model: PreTrainedModel, state: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Of each stored tensor its name, the model's name for it, and whether a conversion makes that of several."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    for name in names:
        meant, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if meant not in state and name in state:  # as in transformers: the rule does not apply
            meant, pattern = name, None
        yield name, meant, pattern is not None


def _refuse_missing(checkpoint: Checkpoint, model: PreTrainedModel, there: set[str]) -> None:
    tied: dict[str, str] = model.all_tied_weights_keys
    one_of = {frozenset(pair) for pair in tied.items()}  # either may stand for both
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name not in there and not any(name in pair and pair & there for pair in one_of):
            refuse(f"{checkpoint.directory}: tensor {printable(name, 80)} {list(weight.shape)} is missing", AGAIN)


class Mapped:
    """A pickled tensor: read, into memory of its own, when a loader asks for it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index].clone()


class Quantized:
    """The quantised matrices of ``checkpoint`` while transformers builds a model whose weights are of ``dtype``. It is
    given dense tensors or, where ``is_packed``, tensors that take no memory: ``matrix`` then reads what one stands
    for."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, is_packed: bool) -> None:
        self._checkpoint, self._dtype, self._is_packed = checkpoint, dtype, is_packed
        self._names: dict[int, str] = {}  # by the address of the one number that a tensor has in memory
        self._numbers: list[torch.Tensor] = []

    def tensor(self, name: str) -> torch.Tensor:
        """What transformers is given for the matrix ``name``."""
        checkpoint = self._checkpoint
        if not self._is_packed:
            return checkpoint.read([name], self._dtype)[name]
        packing = checkpoint.quantized.packing(name)
        assert packing is not None
        shape = checkpoint.quantized.shape(name, packing, torch_windows())
        # Not a number: one that is never replaced is noticed.
        number = torch.full((), torch.nan, dtype=self._dtype)
        self._names[number.data_ptr()] = name
        self._numbers.append(number)
        return number.expand(shape)

    def matrix(self, parameter: torch.Tensor) -> Matrix | None:
        """The matrix that ``parameter`` stands for; None for one that has numbers of its own. Raises
        CheckpointError."""
        name = self._names.get(parameter.data_ptr()) if parameter.numel() else None
        return None if name is None else self._checkpoint.matrices([name], self._dtype)[name]


class _Later:
    """A matrix of ``quantized``, made when a loader asks for it."""

    def __init__(self, quantized: Quantized, name: str) -> None:
        self._quantized, self._name = quantized, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._quantized.tensor(self._name)[index]


def unread(checkpoint: Checkpoint, quantized: Quantized) -> dict[str, Any]:
    """The checkpoint's tensors, by the names of ``Checkpoint.tensors``, and its quantised matrices as ``quantized`` has
    them: ``tensor[...]`` reads one of them."""
    found: dict[str, Any] = {}
    window = torch_windows()
    for name, stored in checkpoint.quantized.logical().items():
        if checkpoint.quantized.packing(name) is not None:
            found[name] = _Later(quantized, name)
        else:
            tensor = window(stored)
            found[name] = Mapped(tensor) if isinstance(tensor, torch.Tensor) else tensor
    return found
