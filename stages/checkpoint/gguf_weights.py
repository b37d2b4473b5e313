"""The weights of a model in a GGUF file: which tensors there must be, whether they are there, and reading some of them.

Only the bytes of what is asked for are read: rows of a matrix, of each row the blocks that have the wanted inputs, and
of the tensor that all experts share the wanted expert's. Files of the architecture llama have the rows of q and k in
the order in which llama.cpp rotates neighbours; here they come in the order of Hugging Face layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.checkpoint.checkpoint import EMBEDDING, HEAD, Weights, expected
from stages.checkpoint.extents import Extent, is_redirected, read_extent, read_strided
from stages.checkpoint.folder import AGAIN, printable, refuse, said, shown
from stages.checkpoint.gguf_file import GGUFTensor, read_gguf
from stages.checkpoint.gguf_names import expert_name, gguf_name
from stages.checkpoint.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from stages.quantization.matrix import Matrix

FLOATS = ("F32", "F16", "BF16")
DENSE_NUMBERS = 16 << 20
"""Numbers of a quantised matrix that are made dense at a time."""
IGNORED = ("rope_freqs.weight", ".attn_rot_embd.weight", ".attn_rot_embd")
"""Ends of names of tensors that say nothing that the metadata do not, or that gguf_rope reads."""
PAIRED = (".ffn_gate", ".ffn_up")
ROTATED = (".self_attn.q_proj.", ".self_attn.k_proj.")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of ours is. ``shape``: ours; ``first``: the first of its rows in the file's tensor; ``head_dim``:
    the size of heads whose rows are in llama.cpp's order, else 0."""

    tensor: GGUFTensor
    shape: tuple[int, ...]
    first: int = 0
    head_dim: int = 0

    def stored_rows(self, rows: range) -> range:
        """Rows of the file's tensor that have the ``rows`` of ours."""
        size = self.head_dim if len(self.shape) > 1 and self.head_dim else 1
        return range(self.first + rows.start // size * size, self.first + -(-rows.stop // size) * size)


class GGUFCheckpoint(Weights):
    """The weights in the file ``path``, or in the files of which it is the first. ``spec``: what the file says of its
    model (see ModelSpec.read). Raises CheckpointError for a damaged header and for tensors that are missing or of
    another shape."""

    def __init__(self, path: str | Path, spec: ModelSpec) -> None:
        self.path, self._file = Path(path), read_gguf(path)
        rotates_neighbours = self._file.metadata.get("general.architecture") == "llama"
        self._head_dim = spec.head_dim if rotates_neighbours else 0
        self._places = {name: self._place(name, shape) for name, shape in expected(spec)}
        self._is_quantized = any(place.tensor.kind not in FLOATS for place in self._places.values())
        self._refuse_others(spec)

    def _place(self, name: str, shape: tuple[int, ...]) -> _Place:
        expert = expert_name(name)
        stored, index = (gguf_name(name), 0) if expert is None else (expert[0], expert[2])
        if expert is not None and stored not in self._file.tensors and expert[1] in self._file.tensors:
            stored, expert = expert[1], None
        tensor = self._file.tensors.get(stored)
        if tensor is None:
            refuse(f"{self.path}: tensor {stored} {shown(list(shape))} is missing", AGAIN)
        found = tensor.shape
        if expert is not None:
            found = found[1:] if len(found) == 3 and index < found[0] else ()
        if found != shape:
            asked = f"the metadata ask for {shown(list(shape))}"
            refuse(f"{tensor.path}: tensor {stored} has shape {shown(list(tensor.shape))}, {asked}", AGAIN)
        if len(shape) == 1 and tensor.kind not in FLOATS:
            refuse(f"{tensor.path}: tensor {stored} is {tensor.kind}, but a vector", f"use {', '.join(FLOATS)} for it")
        is_rotated = any(part in name for part in ROTATED)
        first = index * shape[0] if expert is not None else 0
        return _Place(tensor, shape, first, self._head_dim if is_rotated else 0)

    def _refuse_others(self, spec: ModelSpec) -> None:
        """Refuse a file with a tensor that nothing here computes with."""
        used = {place.tensor.name for place in self._places.values()}
        for name in self._file.tensors:
            if name not in used and not name.endswith(IGNORED):
                known = f"no {spec.architecture} of {spec.layer_count} layers has the tensor {printable(name)}"
                refuse(f"{self.path}: {known}", "use the model's directory")

    def stored_name(self, name: str) -> str:
        """See Weights: a tied model has no head of its own."""
        return EMBEDDING if name == HEAD and HEAD not in self._places else name

    def read(
        self, names: Iterable[str], dtype: torch.dtype, slices: Mapping[str, tuple[slice, ...]] | None = None
    ) -> dict[str, torch.Tensor]:
        """See Weights."""
        return {name: self._dense(name, dtype, slices[name] if slices else ()) for name in names}

    def matrices(
        self, names: Iterable[str], dtype: torch.dtype, slices: Mapping[str, tuple[slice, ...]] | None = None
    ) -> dict[str, Matrix]:
        """See Weights."""
        read: dict[str, Matrix] = {}
        for name in names:
            place, part = self._known(name), slices[name] if slices else ()
            if place.tensor.kind in FLOATS:
                read[name] = self._dense(name, self._exact(place, dtype), part)
            else:
                read[name] = self._stored(place, *self._cut(place, part))
        return read

    def _exact(self, place: _Place, dtype: torch.dtype) -> torch.dtype:
        """In what a float matrix is given for ``dtype``: where others are quantised, in what has all its numbers, as
        float16, which such files have, has not those of other types. Gate and up are one layer of the kernels: one of
        them beside a quantised one is in float32, as that is then."""
        import torch

        if not self._is_quantized:
            return dtype
        if any(part in place.tensor.name for part in PAIRED):
            return torch.float32
        wider = {"F32": torch.float32, "BF16": torch.bfloat16}
        return wider.get(place.tensor.kind, dtype) if dtype == torch.float16 else dtype

    def extents(self, names: Iterable[str], slices: Mapping[str, tuple[slice, ...]] | None = None) -> list[Extent]:
        """See Weights: whole rows, and of the rows of q and k whole heads."""
        found = []
        for name in names:
            place = self._known(name)
            rows, columns = range(1), range(place.shape[-1])
            if len(place.shape) > 1:
                rows, columns = self._cut(place, slices[name] if slices else ())
            extent = _extent(place.tensor, place.stored_rows(rows))
            found.append(replace(extent, is_shared=len(columns) < place.shape[-1]))
        return sorted((one for one in found if one.nbytes), key=lambda one: (one.path, one.start))

    def _known(self, name: str) -> _Place:
        if name not in self._places:
            refuse(f"{self.path}: tensor {name} is missing", AGAIN)
        return self._places[name]

    def _cut(self, place: _Place, part: tuple[slice, ...]) -> tuple[range, range]:
        """Rows and inputs of the ``part`` of a matrix."""
        rows, columns = (*part, slice(None), slice(None))[:2]
        return range(place.shape[0])[rows], range(place.shape[1])[columns]

    def _dense(self, name: str, dtype: torch.dtype, part: tuple[slice, ...]) -> torch.Tensor:
        """A tensor's ``part`` as ``dtype``."""
        import torch

        place = self._known(name)
        if len(place.shape) == 1:
            vector: Any = _decoded(place.tensor, range(1), range(place.shape[0]))
            vector = vector[0][_order(place.shape[0], place.head_dim)] if place.head_dim else vector[0]
            cut: torch.Tensor = vector[part[:1]].to(dtype, copy=True)
            return cut
        rows, columns = self._cut(place, part)
        found = torch.empty((len(rows), len(columns)), dtype=dtype)
        step = max(1, DENSE_NUMBERS // max(1, len(columns)))
        step = -(-step // place.head_dim) * place.head_dim if place.head_dim else step
        for start in range(0, len(rows), step):
            matrix: Any = self._stored(place, rows[start : start + step], columns)
            found[start : start + step] = matrix if isinstance(matrix, torch.Tensor) else matrix.dense()
        return found

    def _stored(self, place: _Place, rows: range, columns: range) -> Matrix:
        """These rows and inputs of a matrix as the file has them."""
        size, wanted = place.head_dim, slice(None)
        if size:  # whole heads are read
            wanted = slice(rows.start % size, rows.start % size + len(rows))
        block, stored = place.tensor.block, place.stored_rows(rows)
        blocks = range(columns.start // block, -(-columns.stop // block))
        matrix = _decoded(place.tensor, stored, blocks)
        if size:
            matrix = matrix[_order(len(stored), size)[wanted]]
        skipped = columns.start - blocks.start * block
        if skipped or len(columns) < len(blocks) * block:
            matrix = matrix[:, skipped : skipped + len(columns)]
        return matrix


def _order(rows: int, size: int) -> torch.Tensor:
    """Where in heads of ``size`` rows, in llama.cpp's order, each row of Hugging Face's order is."""
    import torch

    return torch.arange(rows).view(-1, size // 2, 2).transpose(1, 2).reshape(-1)


def _decoded(tensor: GGUFTensor, rows: range, blocks: range) -> Matrix:
    """Whole blocks of some of a tensor's rows, as its type has them."""
    import torch

    raw = _raw(tensor, rows, blocks)
    if tensor.kind in FLOATS:
        kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        return raw.view(kinds[tensor.kind])
    from stages.quantization.gguf_blocks import decode

    try:
        return decode(tensor.kind, raw.numpy(), tensor.block_nbytes)
    except ValueError as error:
        refuse(f"{tensor.path}: tensor {tensor.name} ({tensor.kind}) cannot be used: {said(error)}", AGAIN)


def _extent(tensor: GGUFTensor, rows: range) -> Extent:
    """Where whole rows lie."""
    start = tensor.offset + rows.start * tensor.row_nbytes
    return Extent(tensor.path, start, len(rows) * tensor.row_nbytes, tensor.state)


def _raw(tensor: GGUFTensor, rows: range, blocks: range) -> torch.Tensor:
    """Bytes of these blocks: uint8 [rows, bytes]. Of part of a row the rest is left in the file, unless somebody reads
    whole rows ahead."""
    nbytes, skipped = len(blocks) * tensor.block_nbytes, blocks.start * tensor.block_nbytes
    if nbytes == tensor.row_nbytes or is_redirected():
        whole = read_extent(_extent(tensor, rows)).view(len(rows), tensor.row_nbytes)
        return whole[:, skipped : skipped + nbytes].contiguous()
    return read_strided(_extent(tensor, rows), tensor.row_nbytes, skipped, nbytes)
