"""Weights rescaled by activations before they are rounded (AWQ, arXiv:2306.00978).

Few inputs of a linear are much larger than the others, and errors of their weights matter most. The weights of input i
are multiplied by s_i, and the input is divided by it; the product stays the same, and the error of the weights of large
inputs becomes smaller. s = (mean |x|)^alpha, with the alpha of a grid that gives the least error of the outputs.

The division is folded into what computes the input, so the stored model is an ordinary one: the norm for q, k, v and
for gate and up; the rows of v for o; the rows of up for down. Query heads that share a value head share its scales.
Norms are stored rounded; the weights are multiplied by what the stored norm divides by, so that this costs nothing.

The model runs on a text layer by layer, in float32, with the weights as they were. In memory are one layer and the
activations of MOST_TOKENS tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.checkpoint.checkpoint import EMBEDDING, Checkpoint, dense_tensors
from stages.checkpoint.quantizer import BLOCK, AsStored, torch_dtype
from stages.checkpoint.spec import ModelSpec
from stages.models.rope import cosines_sines, inverse_frequencies
from stages.quantization.rounding import quantize_matrix

WINDOW = 512
"""Tokens of the text that see each other."""
MOST_TOKENS = 8192
KEPT = 1024
"""Inputs of each linear by which alphas are compared."""
QUICK = (1.0, 0.85, 0.7)
"""Shares of the largest scale that are tried while alphas are compared."""
ALPHAS = tuple(step / 20 for step in range(20))
SHARED = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
"""What computes an input, and the linears that read it."""


def windows_of(tokens: Sequence[int], spec: ModelSpec) -> Tensor:
    """int64 [windows, length]: up to MOST_TOKENS of ``tokens``, in windows spread over all of them."""
    length = min(WINDOW, spec.context, spec.window or WINDOW, len(tokens))
    whole = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length).clamp_max(spec.vocab_size - 1)
    count = min(len(whole), max(1, MOST_TOKENS // length))
    return whole[torch.linspace(0, len(whole) - 1, count).long()]


@dataclass(slots=True)
class _Inputs:
    """What is known of the inputs of a linear: sums of |x| and x^2 over ``count`` of them, and some of them."""

    count: int = 0
    magnitudes: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))
    kept: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, keep: int) -> None:
        """The inputs ``x`` [tokens, inputs], of which ``keep`` are kept."""
        self.count += len(x)
        self.magnitudes = self.magnitudes + x.abs().sum(0)
        self.squares = self.squares + x.square().sum(0)
        self.kept.append(x[torch.linspace(0, len(x) - 1, keep).long()])


class Calibrated(AsStored):
    """The weights of ``checkpoint``, rescaled for rounding to ``format`` in groups of ``group``; ``windows``: of
    ``windows_of``. Layers are asked for in their order. A layer's linears are float32."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, windows: Tensor, format: str, group: int) -> None:
        super().__init__(checkpoint)
        assert spec.experts is None, "experts are not rescaled"
        self._spec, self._stored, self._how = spec, checkpoint, (format, group)
        self._layer, self._tensors = -1, dict[str, Tensor]()
        self._importance: dict[str, Tensor] = {}
        self.alphas: list[list[float]] = []
        """Of each layer: those of SHARED."""
        frequencies, factor = inverse_frequencies(spec.rope, spec.head_dim, spec.context)
        self._rotations = cosines_sines(torch.arange(windows.shape[1]), frequencies, factor)
        self._x = self._embedded(windows)

    def rows(self, name: str, rows: slice) -> Tensor:
        """See Source."""
        return self._tensors[name][rows] if self._reaches(name) else super().rows(name, rows)

    def importance(self, name: str) -> Tensor | None:
        """See Source: the mean square of each input."""
        return self._importance.get(name)

    def _reaches(self, name: str) -> bool:
        """Whether ``name`` is of a layer; that layer is then at hand."""
        if not name.startswith("model.layers."):
            return False
        layer = int(name.split(".")[2])
        assert layer >= self._layer, "layers come in order"
        while self._layer < layer:
            self._layer += 1
            with torch.inference_mode():
                self._prepare(f"model.layers.{self._layer}.")
        return True

    def _embedded(self, windows: Tensor) -> Tensor:
        """The first layer's input [windows, length, hidden_size]."""
        size = self._spec.hidden_size
        x, step = torch.empty((*windows.shape, size)), max(1, BLOCK // size)
        for start in range(0, self._spec.vocab_size, step):
            rows = super().rows(self._stored.stored_name(EMBEDDING), slice(start, start + step)).float()
            here = (windows >= start) & (windows < start + step)
            x[here] = rows[windows[here] - start]
        return x

    def _prepare(self, prefix: str) -> None:
        """Read a layer, compute its output, and rescale its weights."""
        names = dense_tensors(self._spec, self._layer)
        read = self._stored.read(names, torch.float32)
        self._tensors = {name.removeprefix(prefix): tensor for name, tensor in read.items()}
        seen = {source: _Inputs() for source in SHARED}
        keep = -(-KEPT // len(self._x))
        for index in range(len(self._x)):
            self._x[index] = self._compute(self._x[index], seen, keep)
        self._importance = {}
        self.alphas.append([self._rescale(prefix, source, inputs) for source, inputs in seen.items()])
        self._tensors = {prefix + name: self._as_stored(prefix + name, one) for name, one in self._tensors.items()}

    def _as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor``; what is not going to be rounded, in its own type."""
        return tensor if tensor.dim() == 2 else tensor.to(torch_dtype(self._stored.tensors[name]))

    def _compute(self, x: Tensor, seen: dict[str, _Inputs], keep: int) -> Tensor:
        """The layer's output [tokens, hidden_size] of a window ``x``; what linears read is added to ``seen``."""
        spec, tensors = self._spec, self._tensors

        def linear(name: str, given: Tensor) -> Tensor:
            return F.linear(given, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

        def normed(name: str, given: Tensor) -> Tensor:
            return F.rms_norm(given, given.shape[-1:], tensors[f"{name}.weight"], spec.norm_eps)

        def observed(source: str, given: Tensor) -> Tensor:
            seen[source].add(given, keep)
            return given

        entered = observed("input_layernorm", normed("input_layernorm", x))
        queries, keys, values = (
            linear(f"self_attn.{letter}_proj", entered).view(len(x), -1, spec.head_dim) for letter in "qkv"
        )
        if spec.qk_norm:
            queries, keys = normed("self_attn.q_norm", queries), normed("self_attn.k_norm", keys)
        parts = (part.transpose(0, 1)[None] for part in (self._rotated(queries), self._rotated(keys), values))
        query, key, value = parts
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        mixed = mixed[0].transpose(0, 1).flatten(1)
        x = x + linear("self_attn.o_proj", observed("self_attn.v_proj", mixed))
        entered = observed("post_attention_layernorm", normed("post_attention_layernorm", x))
        inner = F.silu(linear("mlp.gate_proj", entered)) * linear("mlp.up_proj", entered)
        return x + linear("mlp.down_proj", observed("mlp.up_proj", inner))

    def _rotated(self, heads: Tensor) -> Tensor:
        """``heads`` [tokens, n, head_dim] at their positions."""
        cosines, sines = (part[: len(heads), None] for part in self._rotations)
        left, right = heads.chunk(2, -1)
        return torch.cat((left * cosines - right * sines, right * cosines + left * sines), -1)

    def _rescale(self, prefix: str, source: str, inputs: _Inputs) -> float:
        """Rescale the linears that read what ``source`` computes, and ``source``; returns alpha."""
        names = [f"{name}.weight" for name in SHARED[source]]
        weights = [self._tensors[name] for name in names]
        magnitudes, squares = inputs.magnitudes / inputs.count, inputs.squares / inputs.count
        copies = self._spec.head_count // self._spec.kv_head_count if source == "self_attn.v_proj" else 1
        if copies > 1:
            magnitudes = self._shared(magnitudes)
        types = [torch_dtype(self._stored.tensors[prefix + name]) for name in names]
        errors = {}
        for alpha in ALPHAS:
            scales = scales_of(magnitudes, alpha)
            errors[alpha] = self._error(weights, types, scales, squares, torch.cat(inputs.kept))
        best = min(errors, key=lambda alpha: errors[alpha])
        scales = self._fold(prefix, source, scales_of(magnitudes, best), copies)
        for name, weight in zip(names, weights, strict=True):
            self._tensors[name] = weight * scales
            self._importance[prefix + name] = squares / scales.square()
        return best

    def _shared(self, magnitudes: Tensor) -> Tensor:
        """``magnitudes`` of o's inputs, with their mean for those that come from one output of v."""
        by_head = magnitudes.view(self._spec.kv_head_count, -1, self._spec.head_dim)
        return by_head.mean(1, keepdim=True).expand_as(by_head).flatten()

    def _error(
        self, weights: list[Tensor], types: list[torch.dtype], scales: Tensor, squares: Tensor, x: Tensor
    ) -> float:
        """The squared error of the outputs of ``weights`` for the inputs ``x``, if they are rescaled and rounded."""
        error = 0.0
        for weight, stored in zip(weights, types, strict=True):
            rounded = quantize_matrix(weight * scales, *self._how, squares / scales.square(), stored, QUICK)
            error += float(F.linear(x, rounded.dense().div_(scales).sub_(weight)).square().sum())
        return error

    def _fold(self, prefix: str, source: str, scales: Tensor, copies: int) -> Tensor:
        """Divide the outputs of ``source`` by ``scales``; returns what they are divided by as it is stored."""
        weight = self._tensors[f"{source}.weight"]
        if weight.dim() == 1:
            stored = (weight / scales).to(torch_dtype(self._stored.tensors[f"{prefix}{source}.weight"]))
            self._tensors[f"{source}.weight"] = stored
            return torch.where(stored == 0, scales, weight / stored.float())
        size, rows = self._spec.head_dim, scales
        if copies > 1:
            rows = scales.view(-1, copies, size)[:, 0].flatten()
        self._tensors[f"{source}.weight"] = weight / rows[:, None]
        bias = self._tensors.get(f"{source}.bias")
        if bias is not None:
            self._tensors[f"{source}.bias"] = bias / rows
        return scales


def scales_of(magnitudes: Tensor, alpha: float) -> Tensor:
    """What the weights of each input are multiplied by: ``magnitudes``^alpha, around 1."""
    scales = magnitudes.clamp_min(1e-4).pow(alpha)
    return scales / (scales.max() * scales.min()).sqrt()
