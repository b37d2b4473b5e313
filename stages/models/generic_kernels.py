"""Transformers' code on the C kernels: what GenericShard computes so that a row has the same bits in any company.

Four things in transformers' code would give a row other bits in other company. Products with weights: ``Weight`` takes
the place of each parameter that activations are multiplied by, and computes the product by a packed ``Linear``.
Attention: ``attend`` computes it by the kernel, over each row's slots in order of position; where a model asks for more
than the kernel knows, ``attend_by_rows`` runs the model's own function on one row at a time. Functions such as sigmoid,
which torch computes by another formula for the last numbers of a tensor: ``Even`` completes each row to whole vectors.
Sums over a very long row, as of the logits: ``log_totals``. All else is computed in float32 by torch, number by number
or row by row.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable
from ctypes import addressof
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from stages.kernels.library import CLayer, CModel, CRows, library
from stages.kernels.linear import FORMATS, Linear, padded
from stages.quantization.matrix import Matrix

POSITIONS = 256
"""As in native/kernels.c: positions of a chunk of attention."""
VECTOR = 32
"""Numbers that torch computes at once by a vector formula; what is left of a tensor has another one."""
GRAIN = 32768
"""Tensors of so many numbers and more are divided among torch's threads, anywhere."""
UNEVEN = {
    *(torch.sigmoid, torch.Tensor.sigmoid, F.silu, F.gelu, F.softplus, F.mish, F.logsigmoid, F.elu, F.selu),
}
"""Functions whose last numbers have another formula; tests/models/test_generic_company.py looks for others."""
_MATMUL = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}


class Weight:
    """Stands where a parameter was: a matrix, or a stack of them, as of experts, stored in the checkpoint's dtype.

    Activations times it are computed by the kernels. It is packed for that when it is first multiplied, which shows
    what its dimensions mean; a quantised one, which is known to be [outputs, inputs], at once. Whatever else is done
    with it is done with its numbers in float32."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, tensor: Tensor, quantized: Matrix | None = None) -> None:
        self.shape = tensor.shape
        self._tensor: Tensor | None = tensor if tensor.ndim == 2 and quantized is None else None
        self._packed: Linear | None = None if quantized is None else Linear.pack(quantized)
        self._is_turned = False
        self._parts = [Weight(part) for part in tensor] if tensor.ndim == 3 else []
        self._group = [self]  # all are packed with the first of them, or the stack's memory would not be freed
        for part in self._parts:
            part._group = self._parts

    @property
    def nbytes(self) -> int:
        """Bytes of the stored numbers."""
        own = (self._tensor, self._packed)
        return sum(stored.nbytes for stored in (*self._parts, *own) if stored is not None)

    def __getitem__(self, index: Any) -> Weight | Tensor:
        return self._parts[int(index)] if self._parts else self.dense()[index]

    def float(self) -> Weight:
        """Itself: its products are in float32."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself where float32 is asked for, as routers do."""
        is_same = args in ((torch.float32,), (self.device,)) and not kwargs
        return self if is_same else self.dense().to(*args, **kwargs)

    type = to

    def __mul__(self, other: Any) -> Any:
        return self.dense() * other

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What torch calls instead of ``func`` where a Weight is among the arguments."""
        kwargs = kwargs or {}
        second = args[1] if len(args) > 1 else None
        if isinstance(second, Weight):
            if func is F.linear:
                return second.product(args[0], False, *args[2:], **kwargs)
            if func in _MATMUL:
                return second.product(args[0], True)
            if func is F.embedding:
                return second.rows(args[0])
        if func is torch.addmm and isinstance(args[2], Weight) and not kwargs:
            return args[2].product(args[1], True, args[0])
        dense = [arg.dense() if isinstance(arg, Weight) else arg for arg in args]
        return func(*dense, **{key: arg.dense() if isinstance(arg, Weight) else arg for key, arg in kwargs.items()})

    def product(self, x: Tensor, is_turned: bool, bias: Tensor | None = None) -> Tensor:
        """``x`` [..., inputs] times it, plus ``bias``: float32 [..., outputs]. ``is_turned``: it is [inputs, outputs],
        not [outputs, inputs]."""
        if self._parts:
            return torch.stack([part.product(each, is_turned) for part, each in zip(self._parts, x, strict=True)])
        for part in self._group:
            part._pack(is_turned)
        if self._packed is None or self._is_turned != is_turned:
            y = x.float() @ (self.dense() if is_turned else self.dense().T)  # no model is known that does both
        else:
            y = self._packed(x.float().reshape(-1, x.shape[-1])).contiguous()
            y = y.view(*x.shape[:-1], self._packed.outputs)
        return y if bias is None else y + bias

    def rows(self, index: Tensor) -> Tensor:
        """Its rows ``index`` [...]: float32 [..., columns]."""
        if self._tensor is not None:
            return F.embedding(index, self._tensor).float()
        return self.dense()[index] if self._is_turned else self._unpacked(index)

    def dense(self) -> Tensor:
        """All of it, in float32."""
        if self._parts:
            return torch.stack([part.dense() for part in self._parts])
        if self._packed is None:
            assert self._tensor is not None
            return self._tensor.float()
        found = self._unpacked(torch.arange(self._packed.outputs))
        return found.T if self._is_turned else found

    def _unpacked(self, index: Tensor) -> Tensor:
        """The weights of the outputs ``index`` [...] of the packed layer: float32 [..., inputs]."""
        packed, places = self._packed, index.contiguous()
        assert packed is not None
        found = torch.empty((*index.shape, packed.inputs))
        packed.lib.kernels.embed(addressof(packed.c), places.data_ptr(), places.numel(), found.data_ptr())
        return found

    def _pack(self, is_turned: bool) -> None:
        if self._tensor is not None:
            self._packed = Linear.pack(self._tensor.T if is_turned else self._tensor)
            self._tensor, self._is_turned = None, is_turned


class Even(TorchFunctionMode):
    """While it is active, functions of single numbers give a number the same bits in any tensor."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What torch calls instead of ``func``."""
        kwargs = kwargs or {}
        if func not in UNEVEN or not args or args[0].ndim == 0 or args[0].numel() == 0:
            return func(*args, **kwargs)
        x, *rest = args
        width = x.shape[-1]
        rows = F.pad(x.reshape(-1, width), (0, -width % VECTOR)).contiguous()
        parts = torch.split(rows, max(1, (GRAIN - 1) // rows.shape[1]))
        return torch.cat([func(part, *rest, **kwargs) for part in parts])[:, :width].reshape(x.shape)


def use_kernels(
    modules: Iterable[nn.Module], quantized: Callable[[Tensor], Matrix | None] = lambda parameter: None
) -> list[Weight]:
    """Let ``modules``, whose weights are loaded, compute in float32 and by the kernels: their matrices, which it
    returns, in the dtype they have, everything else in float32. ``quantized``: the matrix that a parameter stands
    for."""
    by_parameter: dict[int, Weight] = {}
    for root in modules:
        own_code: set[nn.Module] = set()
        for module in list(root.modules()):
            if type(module).__name__ == "FalconLinear":
                module.__class__ = nn.Linear  # the same arithmetic, without a transpose
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not _is_multiplied(module, name, parameter):
                    continue
                if id(parameter) not in by_parameter:
                    by_parameter[id(parameter)] = Weight(parameter.detach(), quantized(parameter))
                weight = by_parameter[id(parameter)]
                del module._parameters[name]
                setattr(module, name, weight)
                if type(module).forward not in _PLAIN and not isinstance(module, nn.Embedding):
                    own_code.add(module)
        nn.Module.float(root)
        for child in root.children():
            inner = list(child.modules())
            uneven = [child] if own_code & set(inner) else filter(_is_activation, inner)
            for module in uneven:
                _even_out(module)
    return list(by_parameter.values())


_PLAIN = {nn.Linear.forward, Conv1D.forward}


def _is_multiplied(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether activations are multiplied by it, or it is looked up in."""
    if parameter.dtype not in FORMATS or "Norm" in type(module).__name__ or "bias" in name:
        return False
    return parameter.ndim == 3 or (parameter.ndim == 2 and name == "weight")


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ in ("torch.nn.modules.activation", "transformers.activations")


def _even_out(module: nn.Module) -> None:
    """Run ``module`` with its functions ``Even``. In it may be all that has matrices of its own, as routers."""
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with Even():
            return inner(*args, **kwargs)

    module.forward = forward


@dataclass(frozen=True, slots=True)
class Attended:
    """The slots that each row attends to under one mask, in order of position."""

    slots: Tensor  # int64 [any]: those of one row after those of another
    ends: Tensor  # int64 [rows]: where each row's end

    @classmethod
    def under(cls, mask: Tensor, positions: Tensor, own: Tensor) -> Attended:
        """Where ``mask`` [rows, span] is 0; ``positions`` [span] are the slots'. A row that sees nothing has only the
        slot ``own`` [rows] that it writes."""
        allowed = mask == 0
        blind = (~allowed.any(1)).nonzero()[:, 0]
        allowed[blind, own[blind]] = True
        columns = allowed.any(0).nonzero()[:, 0]
        columns = columns[positions[columns].argsort()]
        allowed = allowed[:, columns]
        return cls(columns[allowed.nonzero()[:, 1]], allowed.sum(1).cumsum(0))

    def by_row(self) -> tuple[Tensor, ...]:
        """Each row's slots."""
        return self.slots.tensor_split(self.ends[:-1])


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether ``attend`` can compute it: ``query`` [1, heads, rows, size], ``key`` and ``value`` [1, kv heads, span,
    size] of slots as the shard sets them up."""
    size = query.shape[-1]
    return (
        query.dtype == key.dtype == torch.float32
        and key.shape == value.shape
        and key.stride() == value.stride()
        and key.shape[-1] == size
        and key.stride()[2:] == (padded(size), 1)
        and query.shape[1] % key.shape[1] == 0
    )


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, seen: Attended) -> Tensor:
    """Attention of what ``fits``: [1, rows, heads, size]."""
    lib = library()
    assert lib is not None
    _, heads, rows, size = query.shape
    kv_heads, stride = key.shape[1], key.stride(2)
    wide = query.transpose(1, 2).contiguous()
    mixed = torch.empty_like(wide)
    scale = size**-0.5 if scaling is None else scaling
    model = CModel(0, heads, kv_heads, size, stride, 0, key.stride(1) // stride, FORMATS[key.dtype], 0.0, scale)
    layer = CLayer(keys=key.data_ptr(), values=value.data_ptr())
    queries, most = heads // kv_heads, int(seen.ends.diff(prepend=seen.ends.new_zeros(1)).max())
    partial_size = -(-most // POSITIONS) * queries * (2 + stride) + queries * stride
    threads = lib.threads
    partial = torch.empty(threads * partial_size)
    nothing, empty = np.zeros(rows, np.int64), (ctypes.c_void_p * 1)()
    batch = CRows(
        count=rows,
        sequence=nothing.ctypes.data,
        prefix=nothing.ctypes.data,
        canonical=ctypes.addressof(empty),
        ancestors=seen.slots.data_ptr(),
        ends=seen.ends.data_ptr(),
        wide=wide.data_ptr(),
        mixed=mixed.data_ptr(),
        partial=partial.data_ptr(),
        partial_size=partial_size,
        threads=threads,
    )
    lib.kernels.attention(addressof(model), addressof(layer), addressof(batch))
    return mixed


def attend_by_rows(own: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, seen: Attended) -> Tensor:
    """The attention function ``own`` of query, key, value and mask, on one row at a time: [1, rows, heads, size]."""
    mixed = []
    for row, slots in enumerate(seen.by_row()):
        states = [states.index_select(2, slots) for states in (key, value)]
        mask = torch.zeros((1, 1, 1, len(slots)))
        mixed.append(own(query[:, :, row : row + 1].contiguous(), *states, mask)[0])
    return torch.cat(mixed, 1)


def log_totals(logits: Tensor) -> Tensor:
    """The logarithms of the sums of e^logit of each row: float32 [rows, 1]."""
    return torch.stack([row.logsumexp(-1, keepdim=True) for row in logits])
