"""A quantised copy of a model directory's weights: the linears of all layers in few bits, everything else as it is.

Weights are read, rounded and written in blocks of rows, so memory is bounded by BLOCK, whatever the model's size.
Checks read headers only. Embeddings, norms, biases, the routers of experts and the head keep their type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from stages.checkpoint.checkpoint import HEAD, Checkpoint, dense_tensors, expected, expert_tensors
from stages.checkpoint.folder import plain, read_config, refuse
from stages.checkpoint.safetensors_file import StoredTensor
from stages.checkpoint.safetensors_writer import SafetensorsWriter
from stages.checkpoint.spec import FAMILIES, ModelSpec, architecture_of, is_llama_family

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 24
"""Weights that are in memory at a time."""
MULTIPLE = 32
"""Groups are multiples of so many inputs."""
GROUPS = (256, 128, 64, 32)
"""Groups that a refusal proposes."""
Tell = Callable[[int, str], None]
"""Is told how many weights are done, and which tensor is next."""


class Source(Protocol):
    """Where the weights come from, tensor by tensor in the order of ``expected``."""

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """These rows of a tensor."""
        ...

    def importance(self, name: str) -> torch.Tensor | None:
        """Float32 [inputs]: how much an error of a matrix counts, by its input; None: all alike."""
        ...


class AsStored(Source):
    """The weights of ``checkpoint``, in the types that they are stored in."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """See Source."""
        return self._checkpoint.read([name], torch_dtype(self._checkpoint.tensors[name]), {name: (rows,)})[name]

    def importance(self, name: str) -> torch.Tensor | None:
        """See Source."""
        return None


def torch_dtype(stored: StoredTensor) -> torch.dtype:
    """The type of ``stored``, one of FLOAT_NBYTES."""
    import torch

    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored.dtype]


def open_source(directory: Path) -> tuple[ModelSpec, Checkpoint]:
    """The model in ``directory``, its headers checked. Raises CheckpointError for what cannot be quantised."""
    _, config = read_config(directory)
    method = config.get("quantization_config")
    if method is not None:
        name = method.get("quant_method") if isinstance(method, dict) else None
        said = f" ({plain(name)})" if name else ""
        refuse(f"{directory} is quantised already{said}", "give the model's float32, float16 or bfloat16 release")
    if not is_llama_family(directory):
        refuse(
            f"{directory}: {plain(architecture_of(directory))} cannot be quantised", f"use one of {', '.join(FAMILIES)}"
        )
    spec = ModelSpec.read(directory)
    checkpoint = Checkpoint(directory)
    checkpoint.validate(spec)
    return spec, checkpoint


def linears(spec: ModelSpec) -> list[str]:
    """The matrices that are quantised."""
    found = []
    for layer in range(spec.layer_count):
        found += [name for name, shape in dense_tensors(spec, layer).items() if len(shape) == 2]
        for expert in range(spec.experts.count if spec.experts else 0):
            found += expert_tensors(spec, layer, expert)
    return found


def refuse_group(spec: ModelSpec, checkpoint: Checkpoint, group: int) -> None:
    """Refuse groups that do not divide the inputs of a linear. ``group`` 0: one scale an output."""
    if group < 0 or group % MULTIPLE:
        refuse(f"--group {group}", f"use a multiple of {MULTIPLE}, or 0 for one scale an output")
    shapes = {name: checkpoint.tensors[name].shape for name in linears(spec)}
    for name, (_, inputs) in shapes.items():
        if group and inputs % group:
            able = [f"{size}" for size in GROUPS if not any(inputs % size for _, inputs in shapes.values())]
            fix = f"use --group {' or '.join([*able, '0 (one scale an output)'])}"
            refuse(f"--group {group} does not divide the {inputs} inputs of {name}", fix)


def layout(spec: ModelSpec, checkpoint: Checkpoint, format: str, group: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of the quantised model, by name: dtype in safetensors' spelling and shape."""
    from stages.quantization.packing import stored_shapes

    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    quantized = set(linears(spec))
    for name in _names(spec, checkpoint):
        stored = checkpoint.tensors[name]
        if name not in quantized:
            tensors[name] = stored.dtype, stored.shape
            continue
        outputs, inputs = stored.shape
        stem = name.removesuffix("weight")
        for end, (dtype, shape) in stored_shapes(outputs, inputs, format, group).items():
            tensors[stem + end] = dtype or stored.dtype, shape
        tensors[f"{stem}weight_shape"] = "I64", (2,)
    return tensors


def _names(spec: ModelSpec, checkpoint: Checkpoint) -> Iterator[str]:
    """The model's tensors, in order, by the names that they are stored under."""
    names = dict.fromkeys(checkpoint.stored_name(name) if spec.tied else name for name, _ in expected(spec))
    yield from names
    if spec.tied and HEAD in checkpoint.tensors and HEAD not in names:
        yield HEAD


def weight_count(spec: ModelSpec, checkpoint: Checkpoint) -> int:
    """Numbers in all tensors."""
    return sum(math.prod(checkpoint.tensors[name].shape) for name in _names(spec, checkpoint))


def write(
    writer: SafetensorsWriter,
    spec: ModelSpec,
    checkpoint: Checkpoint,
    source: Source,
    format: str,
    group: int,
    tell: Tell,
) -> None:
    """Write all tensors of ``layout`` with ``writer``. Raises CheckpointError for weights that cannot be rounded."""
    import torch

    done, quantized = 0, set(linears(spec))
    for name in _names(spec, checkpoint):
        stored = checkpoint.tensors[name]
        width = stored.shape[1] if len(stored.shape) == 2 else 1
        step = max(1, BLOCK // width)
        for start in range(0, stored.shape[0], step):
            tell(done, name)
            rows = source.rows(name, slice(start, start + step))
            if name in quantized:
                _write_rounded(writer, name, stored, rows, start, (format, group, source.importance(name)))
            else:
                writer.write(name, rows, start)
            done += rows.numel()
        if name in quantized:
            writer.write(f"{name}_shape", torch.tensor(stored.shape))


def _write_rounded(
    writer: SafetensorsWriter,
    name: str,
    stored: StoredTensor,
    rows: torch.Tensor,
    start: int,
    how: tuple[str, int, torch.Tensor | None],
) -> None:
    """Round ``rows``, those from ``start`` on of the matrix ``name``, and write them. ``how``: the format, the group
    and the importance of inputs."""
    from stages.quantization.packing import stored_tensors
    from stages.quantization.rounding import quantize_matrix

    try:
        matrix = quantize_matrix(rows, *how, torch_dtype(stored))
    except ValueError as error:
        refuse(f"{stored.path}: tensor {stored.name} cannot be quantised: {error}", "download or export it again")
    for end, tensor in stored_tensors(matrix).items():
        writer.write(name.removesuffix("weight") + end, tensor, start)
