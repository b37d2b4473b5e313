"""The linear layers of one decoder layer, and the bytes that they take packed; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from stages.checkpoint.spec import ModelSpec
from stages.kernels.library import PANEL
from stages.models.split import Split

T = TypeVar("T")

LINEARS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The modules of each, by its name in ``struct layer``."""


def linears_of(spec: ModelSpec) -> list[str]:
    """Which of LINEARS each layer has: those of attention alone where it has experts."""
    return list(LINEARS) if spec.experts is None else ["qkv", "output"]


def weight_names(layer: int, kind: str) -> list[str]:
    """The matrices of the linear layer ``kind`` of ``layer``."""
    return [f"model.layers.{layer}.{module}.weight" for module in LINEARS[kind]]


def within_layer(read: Mapping[str, T]) -> dict[str, T]:
    """Tensors of one layer by their names within it."""
    return {name.split(".", 3)[3]: tensor for name, tensor in read.items()}


def linear_shape(split: Split, kind: str) -> tuple[int, int]:
    """Outputs and inputs of the linear layer ``kind``: the part that ``split`` has. Gate and up have whole panels."""
    local = split.local
    heads, keys, inner = local.head_count * local.head_dim, len(split.kv_heads) * local.head_dim, len(split.inner)
    shapes = {
        "qkv": (heads + 2 * keys, local.hidden_size),
        "output": (local.hidden_size, heads),
        "gate_up": (2 * panels(inner), local.hidden_size),
        "down": (local.hidden_size, inner),
    }
    return shapes[kind]


def module_outputs(split: Split, module: str) -> int:
    """Outputs of ``module``, such as "k_proj": the part that ``split`` has."""
    local = split.local
    heads, keys, inner = local.head_count * local.head_dim, len(split.kv_heads) * local.head_dim, len(split.inner)
    named = {"q_proj": heads, "k_proj": keys, "v_proj": keys, "gate_proj": inner, "up_proj": inner}
    return named.get(module, local.hidden_size)


def packed_nbytes(outputs: int, inputs: int, itemsize: int) -> int:
    """Bytes of a packed matrix, of numbers of ``itemsize`` bytes."""
    return panels(outputs) * 2 * (-(-inputs // 2)) * itemsize


def panels(outputs: int) -> int:
    """``outputs`` in whole panels."""
    return -(-outputs // PANEL) * PANEL
