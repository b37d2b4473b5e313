"""Shapes: the sizes of a model, from which its weights and its arithmetic follow.

    weights of a layer  = hidden * (2 D (heads + KV heads) + m * intermediate)       m = 3 with a gated MLP, else 2
    weights of the head = vocabulary * hidden
    bytes of a KV slot  = 2 * KV heads * D * slot_bits / 8                           per layer; D is the size of a head

Norms and biases are left out; they are less than a thousandth of a layer. benchmarks/models has the shapes of the
studies. Any directory of the Llama family in Hugging Face format, and any GGUF file of it, is a shape too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from pipeinfer.core.config import DTYPES, model_directory
from pipeinfer.core.errors import refuse
from pipeinfer.costs.hardware import WEIGHTS
from pipeinfer.costs.paths import find
from pipeinfer.costs.tables import Table
from stages.checkpoint.checkpoint import layer_tensors
from stages.checkpoint.folder import is_gguf_name
from stages.checkpoint.opening import open_weights
from stages.checkpoint.spec import ModelSpec

DTYPE_NBYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's sizes. ``gated``: the MLP has three matrices, not two. ``tied``: the head is the embedding.
    ``weight_bits``: average bits of a stored weight. ``dtype``: of arithmetic and activations. ``slot_bits``: bits of a
    number in a KV slot. ``format``: of quantised weights, as in "q4_k"; empty for others or where it is not known."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    gated: bool
    tied: bool
    weight_bits: float
    dtype: str
    slot_bits: float
    format: str = ""

    @property
    def layer_numel(self) -> int:
        """Number of weights of one layer."""
        attention = 2 * self.head_dim * (self.heads + self.kv_heads)
        return self.hidden * (attention + (3 if self.gated else 2) * self.intermediate)

    @property
    def head_numel(self) -> int:
        """Number of weights of the output head; the embedding has as many."""
        return self.vocab * self.hidden

    @property
    def numel(self) -> int:
        """Number of all weights."""
        return self.layers * self.layer_numel + (1 if self.tied else 2) * self.head_numel

    @property
    def head_in_layers(self) -> float:
        """Weights of the output head / weights of a layer."""
        return self.head_numel / self.layer_numel

    @property
    def slot_nbytes(self) -> float:
        """Bytes of one position's keys and values in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.slot_bits / 8

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row's activations between layers."""
        return self.hidden * DTYPE_NBYTES[self.dtype]

    @property
    def stored_as_computed(self) -> bool:
        """Whether weights are stored in the dtype of the arithmetic, not quantised."""
        return self.weight_bits == 8 * DTYPE_NBYTES[self.dtype]

    def nbytes(self, numel: int) -> float:
        """Bytes of ``numel`` weights."""
        return numel * self.weight_bits / 8

    def held_in(self, dtype: str) -> Shape:
        """The same model with weights and slots in ``dtype``."""
        bits = 8.0 * DTYPE_NBYTES[dtype]
        return replace(self, dtype=dtype, weight_bits=bits, slot_bits=bits, format="")


def read_shape(name: str) -> Shape:
    """The shape in the file ``name``, of that name in benchmarks/models, or of the model in the directory or the GGUF
    file ``name`` (``builtin``: the built-in target): in fp32, or with the bits of its weights if they are quantised.
    Raises UserError for a shape that is missing, lacks a number or a source, or has an unknown key."""
    directory = model_directory(name, "target")
    if directory.is_dir() or is_gguf_name(directory):
        spec = ModelSpec.read(directory)
        found, bits = of_spec(spec, name), stored_bits(directory, spec)
        return replace(found, weight_bits=bits) if bits < 8 * DTYPE_NBYTES["bf16"] else found
    file = Table.read(find("models", name))
    file.only(("title", "shape", "weights", "arithmetic", "kv_cache"))
    file.text("title")
    shape, weights, arithmetic, kv_cache = map(file.table, ("shape", "weights", "arithmetic", "kv_cache"))
    counts = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab")
    shape.only((*counts, "gated", "tied", "source"))
    weights.only(("bits", "format", "source"))
    arithmetic.only(("dtype", "source"))
    kv_cache.only(("bits", "source"))
    for table in (shape, weights, arithmetic, kv_cache):
        table.text("source")
    sizes = {count: shape.count(count) for count in counts}
    if sizes["heads"] % sizes["kv_heads"]:
        shape.bad("kv_heads", f"must divide the {sizes['heads']} heads, not {sizes['kv_heads']}")
    return Shape(
        name=file.path.stem,
        **sizes,
        gated=shape.flag("gated"),
        tied=shape.flag("tied"),
        weight_bits=weights.number("bits"),
        dtype=arithmetic.text("dtype", DTYPES),
        slot_bits=kv_cache.number("bits"),
        format=weights.text("format", WEIGHTS) if "format" in weights.words else "",
    )


def stored_bits(model: Path, spec: ModelSpec) -> float:
    """Average bits of a layer's weights in the files of ``model``, scales included. Raises CheckpointError."""
    weights = open_weights(model, spec)
    shapes = [shape for layer in range(spec.layer_count) for shape in layer_tensors(spec, layer).items()]
    nbytes = sum(extent.nbytes for name, shape in shapes if len(shape) == 2 for extent in weights.extents([name]))
    return 8 * nbytes / sum(math.prod(shape) for _, shape in shapes if len(shape) == 2)


def of_spec(spec: ModelSpec, name: str) -> Shape:
    """The shape of a model of the Llama family, in fp32. Raises UserError for one with experts."""
    if spec.experts is not None:
        refuse(f"{name}: shapes have no experts", "name a model whose layers have one MLP each")
    return Shape(
        name=name,
        layers=spec.layer_count,
        hidden=spec.hidden_size,
        heads=spec.head_count,
        kv_heads=spec.kv_head_count,
        head_dim=spec.head_dim,
        intermediate=spec.intermediate_size,
        vocab=spec.vocab_size,
        gated=True,
        tied=spec.tied,
        weight_bits=32.0,
        dtype="fp32",
        slot_bits=32.0,
    )
