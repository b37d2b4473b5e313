"""Probing a model without weights: the state that its layers keep, and the inputs that a row depends on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from stages.checkpoint.folder import refuse, said
from stages.models.generic_skeleton import Call, Skeleton, build, find_ends, find_layers
from stages.models.generic_slots import ProbeCache, Probed, UnsupportedError, View, looking

# Out of order, with a gap, and as many as hardly any model has heads: a tensor's dimension of this size holds rows.
POSITIONS = (3, 0, 9, 4, 12, 7, 1, 10, 6, 2, 11)
# Classes that attend in code of their own, not through transformers' interface. They were read and are tested: they add
# nothing to the mask they are given.
READ = {"CodeGenAttention", "FalconAttention", "GPTJAttention"}
FIX = "use a model whose layers follow from tokens, positions and cached keys and values"


@dataclass(frozen=True, slots=True)
class Findings:
    """See GenericSpec, which has the same fields."""

    hidden_size: int
    kv_shapes: tuple[tuple[int, int, int], ...]
    tuples: bool
    tied: bool
    entry: tuple[str, ...]
    exit: tuple[str, ...]
    layer_numel: int
    exit_numel: int


@torch.inference_mode()
def probe(path: Path, config: PreTrainedConfig, whole: PreTrainedModel) -> Findings:
    """Build, run and check the model that ``config``, read from ``path``, describes. ``whole``: all of it, without
    memory. Raises CheckpointError."""
    model_class = type(whole)
    about = f"{path}: {model_class.__name__}"
    takes = inspect.signature(model_class.forward).parameters
    for name in ("input_ids", "position_ids", "past_key_values"):
        if name not in takes:
            refuse(f"{about} takes no {name}", FIX)
    try:
        skeleton, *_ = build(model_class, config, {}, torch.float32)
        return _findings(skeleton, whole)
    except UnsupportedError as error:
        refuse(f"{about} cannot be cut into stages: it has {error}", FIX)
    except Exception as error:  # whatever a model does that was never meant to be run like this
        refuse(f"{about} cannot be cut into stages ({said(error)})", FIX)


def _findings(skeleton: Skeleton, whole: PreTrainedModel) -> Findings:
    notes, straight = skeleton.notes, list(range(len(POSITIONS)))
    try:
        entered, calls, view = _enter(skeleton, straight)
    except (UnsupportedError, IndexError):  # taking apart what should have been a tuple ends in either
        notes.tuples = True
        entered, calls, view = _enter(skeleton, straight)
    if len(calls) != len(skeleton.layers):
        raise UnsupportedError(f"{len(skeleton.layers)} layers, of which it runs {len(calls)}")
    entry = tuple(dict.fromkeys(notes.used[: notes.used_before]))
    _check_masks(calls, view)
    _check_rows(skeleton, straight, entered, calls, view)
    _check_tokens(skeleton, straight, calls, view)
    kv_shapes = tuple(_kv_shape(index, skeleton.layers[index], entered, call, view) for index, call in enumerate(calls))
    skeleton.leave(entered[0])
    last = tuple(dict.fromkeys(notes.used[notes.used_before :]))
    if set(entry) & set(last):
        raise UnsupportedError(f"{min(set(entry) & set(last))} both before and after its layers")
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in _ends(whole).items()}
    tied = bool(whole.config.tie_word_embeddings) and bool(getattr(whole, "_tied_weights_keys", None))
    idle = sizes.keys() - {*entry, *last}
    if idle:
        raise UnsupportedError(f"weights in {min(idle)}, which plain text does not use")
    return Findings(
        hidden_size=entered.shape[-1],
        kv_shapes=kv_shapes,
        tuples=notes.tuples,
        tied=tied,
        entry=entry,
        exit=last,
        layer_numel=max(sum(weight.numel() for weight in layer.parameters()) for layer in skeleton.layers),
        exit_numel=sum(sizes[name] for name in last),
    )


def _ends(whole: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules with weights beside the layers, as they are before anything replaces them."""
    names = find_ends(whole, find_layers(whole, whole.config.num_hidden_layers))
    return {name: whole.get_submodule(name) for name in names}


def _enter(skeleton: Skeleton, order: list[int], shift: int = 0, seen: int = 0) -> tuple[Tensor, list[Call], View]:
    """Run the skeleton on the rows POSITIONS in this order; slots stay where they are, one for each row. Each row's
    token follows from its position and ``shift``; the cache claims to have ``seen`` tokens."""
    places = torch.tensor(POSITIONS)
    rows = torch.tensor(order)
    view = View(rows, places[rows], places, torch.ones(len(rows), len(rows), dtype=torch.bool))
    entered, calls = skeleton.enter((places[rows] + shift) % 5, view, ProbeCache(view, seen))
    return entered, calls, view


def _check_masks(calls: list[Call], view: View) -> None:
    """Every layer must be given a mask of ours as it is, and none may show a later token."""
    later = view.slot_positions[None, :] > view.positions[:, None]
    if any(bool((mask[0, 0][later] == 0).any()) for mask in view.masks):
        raise UnsupportedError("attention to later tokens")
    ours = {id(mask) for mask in view.masks}
    for index, call in enumerate(calls):
        given = [
            value for value in _tensors((call.args, call.kwargs)) if value.ndim == 4 and value.shape[-1] == len(later)
        ]
        if not any(id(tensor) in ours for tensor in given):
            raise UnsupportedError(f"a mask of its own making in layer {index}, as for alibi")


def _check_rows(skeleton: Skeleton, straight: list[int], entered: Tensor, calls: list[Call], view: View) -> None:
    """Shuffle the rows: what the layers are given must be shuffled alike, or it follows from the order of rows or from
    how many there were before."""
    order = straight[::-1]
    again, calls_again, view_again = _enter(skeleton, order, seen=7)
    masks = {id(mask) for mask in (*view.masks, *view_again.masks)}
    one = _tensors((entered, [(call.args, call.kwargs) for call in calls]))
    two = _tensors((again, [(call.args, call.kwargs) for call in calls_again]))
    for before, after in zip(one, two, strict=True):
        if id(before) in masks:
            continue
        rows = [dim for dim, size in enumerate(before.shape) if size == len(order)]
        expected = before.index_select(rows[0], torch.tensor(order)) if rows else before
        if not torch.equal(after, expected):
            raise UnsupportedError("layers that are given something that follows from the order of rows")


def _check_tokens(skeleton: Skeleton, order: list[int], calls: list[Call], view: View) -> None:
    """Change the tokens: only activations may change, for they alone travel to the next shard."""
    _, calls_again, view_again = _enter(skeleton, order, shift=1)
    masks = {id(mask) for mask in (*view.masks, *view_again.masks)}
    one, two = (_tensors([(call.args, call.kwargs) for call in made]) for made in (calls, calls_again))
    if any(id(before) not in masks and not torch.equal(before, after) for before, after in zip(one, two, strict=True)):
        raise UnsupportedError("layers that are given more of the tokens than the activations")


def _kv_shape(index: int, layer: nn.Module, entered: Tensor, call: Call, view: View) -> tuple[int, int, int]:
    """Key/value heads, key size and value size of one layer, run on the meta device up to its attention."""
    found = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, ProbeCache)]
    if len(found) != 1:
        raise UnsupportedError(f"a layer {index} that is not given the slots")
    cache, on_meta = found[0], Call(_to_meta(call.args), _to_meta(call.kwargs), call.by_name)
    before = str(_form(on_meta.kwargs))
    try:
        with looking(replace(view, masks=_to_meta(view.masks), probing=True)):
            on_meta.run(layer.eval(), entered.to("meta"))
    except Probed:
        pass
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(f"state other than keys and values in layer {index} ({said(error)})") from error
    else:
        if not READ & {type(module).__name__ for module in layer.modules()}:
            raise UnsupportedError(f"attention in code of its own in layer {index}, which may add a mask of its own")
    if str(_form(on_meta.kwargs)) != before:
        raise UnsupportedError(f"state that layer {index} leaves for later layers")
    if list(cache.shapes) != list(range(index + 1)):
        raise UnsupportedError(f"no keys and values of its own in layer {index}")
    keys, values = cache.shapes[index]
    if keys[:3] != values[:3] or keys[0] != 1 or keys[2] != len(POSITIONS):
        raise UnsupportedError(f"keys and values of another form in layer {index}")
    return keys[1], keys[3], values[3]


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_map(item, change) for item in value])
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return value


def _form(value: Any) -> Any:
    """What is nested in ``value``; refuses what could carry state from one layer to the next unseen."""
    if isinstance(value, (tuple, list)):
        return [_form(item) for item in value]
    if isinstance(value, dict):
        return {key: _form(item) for key, item in value.items()}
    if value is not None and not isinstance(value, (Tensor, ProbeCache, bool, int, float, str, torch.dtype)):
        raise UnsupportedError(f"layers that are given a {type(value).__name__}")
    return type(value).__name__


def _to_meta(value: Any) -> Any:
    return _map(value, lambda tensor: tensor.to("meta"))


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    _map(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found
