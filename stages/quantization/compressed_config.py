"""What a configuration of compressed-tensors says: which modules are quantised, and how each group of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.quantization.compressed import AGAIN, SCALE, IntegerPacking
from stages.quantization.float8 import DYNAMIC, FLOAT8, Float8Packing
from stages.quantization.grid import Grid
from stages.quantization.scheme import quoted, refuse, refuse_group
from stages.quantization.settings import CORRECT, Settings, compiled

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
LINEAR = "Linear"  # torch's class of what we know as matrices
CAN = "use a release in pack-quantized, int-quantized or float-quantized"
ORDERS = (None, False, "static", "weight")  # of inputs when they were quantised; these leave them in their place
Packed = IntegerPacking | Float8Packing


@dataclass(frozen=True, slots=True)
class Targets:
    """Modules by name, by regular expression ("re:..."), or by torch's class."""

    names: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, texts: tuple[str, ...], within: str) -> Targets:
        """Raises SchemeError."""
        patterns = [compiled(text[3:], within) for text in texts if text.startswith("re:")]
        return cls(frozenset(texts), tuple(patterns))

    def has(self, module: str) -> bool:
        """Whether ``module`` is named, or matches a pattern."""
        return module in self.names or any(pattern.match(module) for pattern in self.patterns)

    @property
    def has_all(self) -> bool:
        """Whether all linear layers are meant."""
        return LINEAR in self.names


@dataclass(frozen=True, slots=True)
class CompressedScheme:
    """See Scheme."""

    groups: tuple[tuple[Targets, Packed], ...]
    ignored: Targets
    note: str

    def packing(self, module: str, stored: Mapping[str, str]) -> Packed | None:
        """See Scheme."""
        kind = stored.get("weight", "")
        tensor = "weight_packed" if "weight_packed" in stored else "weight"
        if tensor == "weight" and kind != "I8" and not kind.startswith("F8"):
            return None
        if "weight_g_idx" in stored:
            refuse("is of inputs out of their order (actorder group)", "use actorder static or null", "weight_g_idx")
        named = [packing for targets, packing in self.groups if targets.has(module)]
        named += [packing for targets, packing in self.groups if targets.has_all]
        if not named or self.ignored.has(module) or self.ignored.has_all:
            refuse("is packed, but config.json does not say how (targets, ignore)", AGAIN, tensor)
        (found, *_) = named
        wanted = FLOAT8 if isinstance(found, Float8Packing) else "I8" if not found.is_packed else ""
        if wanted != kind:
            what = f"is {kind}" if kind else "is packed"
            refuse(f"{what}, but config.json asks for {found.format}", AGAIN, tensor)
        return found


def read_compressed(settings: Settings) -> CompressedScheme:
    """What ``settings`` say of a checkpoint of compressed-tensors. Raises SchemeError."""
    _refuse_sparse(settings)
    usual = settings.first("format", default="dense")
    if usual not in (*FORMATS, "mixed-precision", "dense"):
        refuse(f"format {quoted(usual)} of compressed-tensors is not supported", CAN)
    groups, notes = [], set()
    listed = settings.inner("config_groups")
    for name in listed.content if listed else ():
        assert listed is not None
        group = listed.inner(name)
        if group is None:
            continue
        weights = group.inner("weights")
        if weights is None:
            continue
        form = group.first("format", default=usual)
        targets = Targets.of(group.texts("targets"), group.within)
        groups.append((targets, _packing(weights, form)))
        if group.first("input_activations", "output_activations") is not None:
            notes.add(DYNAMIC)
    ignored = Targets.of(settings.texts("ignore"), settings.within)
    return CompressedScheme(tuple(groups), ignored, " ".join(notes))


def _refuse_sparse(settings: Settings) -> None:
    sparsity = settings.inner("sparsity_config")
    if sparsity is None:
        return
    form = sparsity.first("format", default="dense")
    if form != "dense":
        refuse(f"sparse weights ({quoted(form)}) of compressed-tensors are not supported", CAN)


def _packing(weights: Settings, form: Any) -> Packed:
    """How a group's weights are stored in the format ``form``."""
    if form not in FORMATS:
        refuse(f"format {quoted(form)} of compressed-tensors is not supported", CAN)
    kind = weights.first("type", default="int")
    order = weights.content.get("actorder")
    if order not in ORDERS or (order == 0 and order is not False):
        fix = "use a release with actorder static or null"
        refuse(f"actorder {quoted(order)} of compressed-tensors is not supported", fix)
    if weights.first("dynamic", default=False) is not False:
        refuse(f"{weights.within}.dynamic must be false", CORRECT)
    if kind not in ("int", "float"):
        refuse(f"{weights.within}.type {quoted(kind)} is not supported", CAN)
    is_float = kind == "float"
    if is_float != (form == "float-quantized") and form != "naive-quantized":
        refuse(f"{weights.within}.type {kind} contradicts format {form}", CORRECT)
    among = (8,) if is_float else (2, 3, 4, 5, 6, 7, 8)
    bits = weights.bits("num_bits", among=among)
    grid = _grid(weights)
    is_symmetric = weights.flag("symmetric", True)
    if not is_float:
        return IntegerPacking(bits, grid, is_symmetric, form == "pack-quantized")
    if not is_symmetric:
        refuse(f"{weights.within}: floats with zero points are not supported", CAN)
    return Float8Packing((grid,), SCALE)


def _grid(weights: Settings) -> Grid:
    group = weights.first("group_size")
    default = "tensor" if group is None else "channel" if group == -1 else "group"
    strategy = weights.first("strategy", default=default)
    if strategy == "tensor":
        return Grid("tensor")
    if strategy == "channel":
        return Grid("channel")
    if strategy == "group":
        size = refuse_group(group, f"{weights.within}.group_size")
        return Grid("channel") if size == -1 else Grid("group", 1, size)
    block = weights.first("block_structure")
    if strategy == "block" and isinstance(block, list) and len(block) == 2 and type(block[0]) is int and block[0] > 0:
        columns = refuse_group(block[1], f"{weights.within}.block_structure")
        if columns > 0:
            return Grid("block", block[0], columns)
    refuse(f"strategy {quoted(strategy)} of compressed-tensors is not supported", "use tensor, channel, group or block")
