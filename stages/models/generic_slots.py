"""Our key/value slots behind transformers' own interfaces: a Cache, a mask function and two attention functions.

A model built by transformers calls three interfaces, and this module implements each. Its base model calls a *mask
function* for the mask: transformers hands over a predicate on the places of query and key in plain text (causal, within
a sliding window, within the same chunk), which is evaluated on the rows' and the slots' positions and joined with
``visible_slots``; a window is thus exact in a tree. Its layers ask a *Cache* to keep keys and values, and get back all
slots up to the span. And they ask an *attention function* for the mixture, which knows no mask but the one given.

Nothing here is per model. ``IMPLEMENTATIONS`` names what is registered, once, when this module is imported.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

from stages.kernels.finite import may_stand, tamed
from stages.kernels.library import library
from stages.models.generic_kernels import Attended, attend, attend_by_rows, fits

IMPLEMENTATIONS = {True: "pipeinfer_sdpa", False: "pipeinfer_eager"}
"""Names of the attention functions: for models whose attention torch's fused kernel computes, and for the others."""

# Arguments that ask an attention function for nothing beyond what the mask says already.
_SAID_BY_THE_MASK = {"sliding_window", "is_causal", "position_ids", "use_cache", "layer_idx", "output_attentions"}


class UnsupportedError(Exception):
    """The model asks for something that slots, masks and positions cannot give; the message says what."""


class Probed(Exception):  # not an error: how a probe leaves a layer
    """A layer has reached its attention."""


@dataclass(frozen=True, slots=True)
class View:
    """The slots as the rows of one pass see them."""

    slots: Tensor  # int64 [rows]: the slot that each row writes
    positions: Tensor  # int64 [rows]
    slot_positions: Tensor  # int64 [span]
    visible: Tensor  # bool [rows, span]
    masks: list[Tensor] = field(default_factory=list)  # what the mask function has answered so far
    seen: dict[int, Attended] = field(default_factory=dict)  # by the place of a mask among them
    probing: bool = False  # a layer is left where its attention begins
    bad: Tensor | None = None  # bool [rows]: where it is given, rows that are not finite are noted, and zeros written


_VIEW: ContextVar[View] = ContextVar("pipeinfer_view")


@contextmanager
def looking(view: View) -> Iterator[None]:
    """Answer mask requests for ``view`` meanwhile."""
    token = _VIEW.set(view)
    try:
        yield
    finally:
        _VIEW.reset(token)


def _mask(*, mask_function: Callable[..., Tensor], dtype: torch.dtype, use_vmap: bool = False, **_: object) -> Tensor:
    """The mask [1, 1, rows, span] to add to scores: 0 where allowed, else the lowest finite number (see LlamaShard)."""
    if use_vmap:
        raise UnsupportedError("a mask of its own")
    view = _VIEW.get()
    zero = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=view.positions.device)
    queries, keys = view.positions[None, None, :, None], view.slot_positions[None, None, None, :]
    allowed = mask_function(zero, zero, queries, keys) & view.visible
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    mask.masked_fill_(~allowed, torch.finfo(dtype).min)
    view.masks.append(mask)
    return mask


def _check(mask: Tensor | None) -> int:
    """A layer must attend under the mask it was given; with another one it would decode something else. Which of the
    masks it is."""
    view, address = _VIEW.get(), None if mask is None else (mask.shape, mask.data_ptr())
    ours = [(one.shape, one.data_ptr()) for one in view.masks]
    if address is None or address not in ours:
        raise UnsupportedError("attention under a mask of its own making")
    if view.probing:
        raise Probed
    return ours.index(address)


def _seen(place: int) -> Attended | None:
    """The slots that each row sees under the mask at ``place``; None where torch has to compute."""
    view = _VIEW.get()
    if library() is None or view.slots.device.type != "cpu":
        return None
    if place not in view.seen:
        view.seen[place] = Attended.under(view.masks[place][0, 0], view.slot_positions, view.slots)
    return view.seen[place]


def _eager(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """What the model's own file computes: [1, heads, rows, head_dim] to [1, rows, heads, head_dim]. One row at a time,
    unless an option may have a part for each row or slot."""
    seen = _seen(_check(attention_mask))
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise UnsupportedError("an attention function of its own")
    rest = [value for name, value in options.items() if name not in _SAID_BY_THE_MASK]
    if seen is not None and not any(isinstance(value, Tensor) and value.ndim > 1 for value in rest):
        return attend_by_rows(functools.partial(own, module, **options), query, key, value, seen), None
    mixed: tuple[Tensor, Tensor | None] = own(module, query, key, value, attention_mask, **options)
    return mixed


def _sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """As ``_eager``, by our kernel or by torch's; an option that changes scores in another way goes to the model's own
    file."""
    if any(value is not None and name not in _SAID_BY_THE_MASK for name, value in options.items()):
        return _eager(module, query, key, value, attention_mask, scaling=scaling, **options)
    seen = _seen(_check(attention_mask))

    def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor]:
        is_grouped = query.shape[1] != key.shape[1]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=is_grouped)
        return (mixed.transpose(1, 2).contiguous(),)

    if seen is None:
        return *fused(query, key, value, attention_mask), None
    if not fits(query, key, value):
        return attend_by_rows(fused, query, key, value, seen), None
    return attend(query, key, value, scaling, seen), None


for _name, _attention in ((IMPLEMENTATIONS[True], _sdpa), (IMPLEMENTATIONS[False], _eager)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _mask)


class LayerSlots(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's slots; ``keys`` and ``values``: [1, kv_heads, capacity, head_dim], or None for a layer elsewhere."""

    is_sliding = False  # a window is the mask's business, no slot is ever dropped here

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing left to do: slots are set up when a shard is loaded."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the rows' keys and values ``[1, kv_heads, rows, head_dim]``; return the slots of the view's span."""
        view: View = kwargs["view"]
        if self.keys is None or self.values is None:
            raise UnsupportedError("a layer that writes the slots of another shard")
        if view.bad is not None:
            for states in (key_states, value_states):
                view.bad.logical_or_(~may_stand(states[0]).all(-1).all(0))
            key_states, value_states = tamed(key_states), tamed(value_states)
        self.keys.index_copy_(2, view.slots, key_states)
        self.values.index_copy_(2, view.slots, value_states)
        span = len(view.slot_positions)
        return self.keys[:, :, :span], self.values[:, :, :span]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: the mask function takes its sizes from the view."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Slots have no order; whatever wants a place in the text is given positions."""
        return 0

    def get_max_length(self) -> int:
        """As get_seq_length: no length that a model may count with."""
        return -1


class SlotCache(Cache):
    """The slots of all layers during one pass; ``written``: the layers that have updated theirs."""

    def __init__(self, layers: list[LayerSlots], view: View) -> None:
        super().__init__(layers=list(layers))
        self.view = view
        self.written: list[int] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See LayerSlots.update."""
        self.written.append(layer_idx)
        layer = self.layers[layer_idx]
        assert isinstance(layer, LayerSlots)
        return layer.update(key_states, value_states, view=self.view)


class ProbeCache(SlotCache):
    """Has no slots, but claims to have ``seen`` tokens; notes in ``shapes`` what each layer would write."""

    def __init__(self, view: View, seen: int) -> None:
        super().__init__([], view)
        self.seen = seen
        self.shapes: dict[int, tuple[torch.Size, torch.Size]] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Base models ask before they look whether they were given positions; a layer that asks counts on an order."""
        if _VIEW.get().probing:
            raise UnsupportedError(f"layers that count their slots, as layer {layer_idx}")
        return self.seen

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return what was given: the rows are all there is."""
        if layer_idx in self.shapes:
            raise UnsupportedError(f"two sets of keys and values in layer {layer_idx}")
        self.shapes[layer_idx] = key_states.shape, value_states.shape
        return key_states, value_states
