"""A transformers model without its layers: it prepares the inputs of the layers and turns their output into logits.

No architecture is known here. The model's own ``forward`` is run with a stub in the place of each layer. A stub notes
what it is called with (masks, rotary embeddings, positions) and returns its input as it came, so one run of the empty
model yields everything its layers need; they are then run one by one, with pauses in between. Afterwards the empty
model is run again, and the last stub returns the real activations: final norm, head and soft-capping are the model's
own too.

A shard holds the weights of its own layers and ends only. The rest of the model is built on the meta device, which
costs nothing, and replaced before transformers loads the weights, so transformers reads the tensors that are left and
no others, with its own renaming, conversion (fused experts) and tying.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from stages.models.generic_slots import IMPLEMENTATIONS, SlotCache, UnsupportedError, View, looking
from stages.quantization.matrix import Matrix


@dataclass(frozen=True, slots=True)
class Call:
    """What a layer is called with, beside the activations."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool  # the activations are passed as hidden_states=

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Call ``layer``; activations are [1, rows, hidden_size]."""
        named = {"hidden_states": hidden} if self.by_name else {}
        unnamed = () if self.by_name else (hidden,)
        out = layer(*unnamed, *self.args, **named, **self.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


@dataclass(slots=True)
class Notes:
    """What the stubs of one model share."""

    tuples: bool = False  # the layers of this model return tuples
    answer: Tensor | None = None  # what the last stub returns instead of its input
    calls: list[Call] = field(default_factory=list)
    entered: Tensor | None = None  # the first layer's input
    passed: Tensor | None = None  # what the last stub that was called returned
    used: list[str] = field(default_factory=list)  # stand-ins called, in order
    used_before: int = 0  # of them, before the first layer


class LayerStub(nn.Module):
    """Takes the place of a layer. The layer is kept outside torch's module tree."""

    def __init__(self, layer: nn.Module, last: bool, notes: Notes) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)
        self.last, self.notes = last, notes

    def __getattr__(self, name: str) -> Any:
        """Some models read the type of their layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the call; return the activations unchanged."""
        notes, by_name = self.notes, not args
        hidden = kwargs.pop("hidden_states") if by_name else args[0]
        if notes.entered is None:
            notes.entered, notes.used_before = hidden, len(notes.used)
        elif hidden is not notes.passed:
            raise UnsupportedError("something between its layers that changes their activations")
        notes.calls.append(Call(args[1:], kwargs, by_name))
        notes.passed = notes.answer if self.last and notes.answer is not None else hidden
        return (notes.passed,) if notes.tuples else notes.passed


class StandIn(nn.Module):
    """Stands where an embedding, a norm or a head of another shard was: shapes as theirs, no weights.

    An embedding's stand-in returns its indices, so that a probe sees what follows from tokens and positions."""

    weight: Tensor

    def __init__(self, name: str, module: nn.Module, dtype: torch.dtype, notes: Notes) -> None:
        super().__init__()
        self.name, self.notes = name, notes
        self.looks_up = isinstance(module, nn.Embedding)
        self.width: int | None = getattr(module, "embedding_dim" if self.looks_up else "out_features", None)
        # Some models read the device and the type of their embedding.
        self.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """[..., width] from indices [...] or from activations [..., any]."""
        self.notes.used.append(self.name)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if self.looks_up:
            indices = [tensor for tensor in tensors if not tensor.is_floating_point()][-1]
            assert self.width is not None
            return indices[..., None].to(self.weight.dtype).expand(*indices.shape, self.width)
        if self.width is None:
            return tensors[0].clone()  # as any norm, a tensor of its own
        return tensors[0][..., :1].expand(*tensors[0].shape[:-1], self.width)


def find_layers(model: nn.Module, layer_count: int) -> str:
    """The name of the one list of ``layer_count`` modules that is in no other list. Raises UnsupportedError."""
    lists: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    sizes = {name: sum(1 for _ in model.get_submodule(name).children()) for name in outer}
    found = [name for name, size in sizes.items() if size == layer_count]
    if len(found) != 1:
        raise UnsupportedError(f"{len(found) or 'no'} lists of {layer_count} layers")
    (name,) = found
    return name


def find_ends(model: nn.Module, layers: str) -> list[str]:
    """Names of the modules beside the layers that hold weights. Raises UnsupportedError."""
    ends = []
    for name, module in model.named_modules():
        if name.startswith(f"{layers}.") or not module.state_dict(keep_vars=True):
            continue
        own = {key for key in module.state_dict(keep_vars=True) if "." not in key}
        if own and next(module.children(), None) is not None:
            raise UnsupportedError(f"weights of its own in {name or 'the model itself'}")
        if own:
            ends.append(name)
    return ends


class Skeleton:
    """A model whose layers are stubs. ``layers`` are the real ones, those of other shards without memory."""

    def __init__(self, model: PreTrainedModel, notes: Notes) -> None:
        self.model, self.notes = model, notes
        self.matrix: Callable[[Tensor], Matrix | None] = lambda parameter: None  # what a parameter stands for
        base: Any = model
        self.base: nn.Module = base.get_decoder()  # all but the head
        name = find_layers(model, model.config.num_hidden_layers)
        places: Any = model.get_submodule(name)
        self.layers: list[nn.Module] = []
        for index, layer in enumerate(places):
            self.layers.append(layer.layer if isinstance(layer, LayerStub) else layer)
            places[index] = LayerStub(self.layers[index], index == len(places) - 1, notes)

    def to(self, device: str, layers: range) -> None:
        """Move the ends and these layers to ``device``."""
        for module in (self.model, *(self.layers[index] for index in layers)):
            nn.Module.to(module, device)

    def enter(self, tokens: Tensor, view: View, cache: SlotCache) -> tuple[Tensor, list[Call]]:
        """What the first layer is given for ``tokens`` [rows], as [1, rows, hidden_size], and every layer's call."""
        out = self._run(self.base, tokens, view, cache)[0]
        if self.notes.entered is None or out.shape[:-1] != self.notes.entered.shape[:-1]:
            raise UnsupportedError("something around its layers that changes the form of their activations")
        return self.notes.entered, self.notes.calls

    def leave(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of the last layer's activations ``hidden`` [rows, hidden_size]."""
        rows = torch.arange(len(hidden), device=hidden.device)
        view = View(rows, rows, rows, torch.ones(len(rows), len(rows), dtype=torch.bool, device=hidden.device))
        self.notes.answer = hidden[None]
        try:
            logits: Tensor = self._run(self.model, torch.zeros_like(rows), view, SlotCache([], view)).logits
        finally:
            self.notes.answer = None
        return logits[0]

    def _run(self, module: nn.Module, tokens: Tensor, view: View, cache: SlotCache) -> Any:
        notes = self.notes
        notes.calls, notes.used = [], []
        notes.entered = notes.passed = None
        with looking(view):
            return module(
                input_ids=tokens[None], position_ids=view.positions[None], past_key_values=cache, use_cache=True
            )


def build(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    weights: dict[str, Any],
    dtype: torch.dtype,
    layers: Iterable[int] = (),
    ends: Iterable[str] = (),
) -> tuple[Skeleton, set[str], set[tuple[str, torch.Size, torch.Size]]]:
    """The model with the weights of ``layers`` and of the modules ``ends``; the names of tensors that were not among
    ``weights`` (see stages/models/generic_weights.py); and names, stored and wanted shapes of those that did not fit.
    Everything else keeps the meta device or gets a stand-in."""
    notes, kept_layers, kept_ends = Notes(), set(layers), set(ends)

    def prune(model: PreTrainedModel, config: PreTrainedConfig) -> None:
        model_class.__init__(model, config)
        name = find_layers(model, config.num_hidden_layers)
        for end in set(find_ends(model, name)) - kept_ends:
            parent, _, child = end.rpartition(".")
            setattr(model.get_submodule(parent), child, StandIn(end, model.get_submodule(end), dtype, notes))
        places: Any = model.get_submodule(name)
        for index in set(range(len(places))) - kept_layers:
            places[index] = LayerStub(places[index], index == len(places) - 1, notes)
        there = set(model.state_dict())
        tied: dict[str, str] = model.all_tied_weights_keys
        model.all_tied_weights_keys = {key: source for key, source in tied.items() if {key, source} <= there}

    # The name stays: transformers finds its conversions by it. Tensors of other shards need no warning.
    cut = type(
        model_class.__name__,
        (model_class,),
        {"__init__": prune, "__module__": model_class.__module__, "_keys_to_ignore_on_load_unexpected": [".*"]},
    )
    fused = bool(getattr(model_class, "_supports_sdpa", False))
    with quiet():
        model, report = cut.from_pretrained(  # type: ignore[attr-defined]
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            attn_implementation="sdpa" if fused else "eager",  # some classes know no other names when they are built
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported
        )
    model.config._attn_implementation = IMPLEMENTATIONS[fused]
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.config._experts_implementation = "eager"  # one expert after another
    model.config.pad_token_id = None  # nothing is padded, and a token of that id deserves no warning
    return Skeleton(model, notes), set(report["missing_keys"]), set(report["mismatched_keys"])


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers neither draw progress bars nor print reports meanwhile: what counts is refused in one line."""
    bar, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hf_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def model_class_of(name: str) -> type[PreTrainedModel]:
    """A model class of transformers by its name."""
    found: type[PreTrainedModel] = getattr(transformers, name)
    return found
