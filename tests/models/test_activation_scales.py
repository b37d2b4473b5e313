"""Activation-aware scales: the model is run as it is, rescaling does not change it, and rounding it then costs less."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeinfer.core.slots import batch_in_order
from stages.checkpoint.checkpoint import Checkpoint, Weights, dense_tensors
from stages.checkpoint.spec import ModelSpec
from stages.models.activation_scales import ALPHAS, Calibrated, windows_of
from stages.models.llama import LlamaShard
from stages.quantization.rounding import quantize_matrix
from tests.models.tiny import make_tiny
from tests.models.walk import compute

FORMAT, GROUP, LAYERS, LENGTH = "int4", 32, 2, 48


class Replaced(Weights):
    """``base`` with other tensors for some."""

    def __init__(self, base: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
        self._base, self._tensors = base, tensors

    def stored_name(self, name: str) -> str:
        return self._base.stored_name(name)

    def read(
        self, names: Iterable[str], dtype: torch.dtype, slices: Mapping[str, tuple[slice, ...]] | None = None
    ) -> dict[str, torch.Tensor]:
        asked = list(names)
        mine = {name: self._tensors[name].to(dtype) for name in asked if name in self._tensors}
        return mine | self._base.read([name for name in asked if name not in mine], dtype, slices)


def outliers(model: Any) -> None:
    """Some inputs of every linear are much larger than the others, as in large models."""
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[5::17] *= 25
        layer.self_attn.v_proj.weight[3::13] *= 12
        layer.mlp.up_proj.weight[7::19] *= 12


@pytest.fixture(params=["Qwen2ForCausalLM", "Qwen3ForCausalLM"], scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, Checkpoint]:
    folder = tmp_path_factory.mktemp("calibrated")
    make_tiny(folder, request.param, edit=outliers, num_hidden_layers=LAYERS, intermediate_size=96)
    return ModelSpec.read(folder), Checkpoint(folder)


def hidden_of(spec: ModelSpec, weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    shard = LlamaShard.load(spec, weights, range(spec.layer_count), torch.float32, LENGTH)
    return torch.as_tensor(compute([shard], batch_in_order(tokens.tolist(), 0)))


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far ``found`` is from ``wanted``, by its length."""
    return float((found - wanted).norm() / wanted.norm())


def rows(spec: ModelSpec, source: Calibrated, is_rounded: bool) -> dict[str, torch.Tensor]:
    """All tensors of the layers as ``source`` has them; the linears of ``is_rounded`` ones as they are stored."""
    found = {}
    for layer in range(spec.layer_count):
        for name, shape in dense_tensors(spec, layer).items():
            found[name] = source.rows(name, slice(None))
            if is_rounded and len(shape) == 2:
                found[name] = quantize_matrix(found[name], FORMAT, GROUP, source.importance(name)).dense()
    return found


def test_rescaling_keeps_the_model_and_makes_rounding_cheaper(model: tuple[ModelSpec, Checkpoint]) -> None:
    spec, checkpoint = model
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(spec.vocab_size, (9, LENGTH), generator=generator)
    held_out = torch.randint(spec.vocab_size, (LENGTH,), generator=generator)
    source = Calibrated(spec, checkpoint, tokens, FORMAT, GROUP)
    rescaled = rows(spec, source, is_rounded=False)
    wanted = hidden_of(spec, checkpoint, held_out)
    assert distance(hidden_of(spec, Replaced(checkpoint, rescaled), held_out), wanted) < 1e-4
    assert distance(source._x[4], hidden_of(spec, checkpoint, tokens[4])) < 1e-4
    assert all(alpha in ALPHAS for alphas in source.alphas for alpha in alphas)
    assert max(max(alphas) for alphas in source.alphas) > 0.2, "large inputs are worth larger weights"

    def error(tensors: Mapping[str, torch.Tensor]) -> float:
        return distance(hidden_of(spec, Replaced(checkpoint, tensors), held_out), wanted)

    plain = {name: checkpoint.read([name], torch.float32)[name] for name in rescaled}
    linears = {name: quantize_matrix(one, FORMAT, GROUP).dense() for name, one in plain.items() if one.dim() > 1}
    again = Calibrated(spec, checkpoint, tokens, FORMAT, GROUP)
    assert error(rows(spec, again, is_rounded=True)) < 0.8 * error(plain | linears)


def test_norms_are_stored_rounded_at_no_cost(tmp_path: Path) -> None:
    """Weights of bfloat16: what a norm's rounding changes, the weights behind it make good."""
    folder = make_tiny(
        tmp_path, "LlamaForCausalLM", edit=outliers, dtype=torch.bfloat16, num_hidden_layers=1, intermediate_size=96
    )
    spec, checkpoint = ModelSpec.read(folder), Checkpoint(folder)
    source = Calibrated(spec, checkpoint, torch.arange(LENGTH)[None], FORMAT, GROUP)
    before = checkpoint.read(dense_tensors(spec, 0), torch.float32)
    norm, name = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.k_proj.weight"
    stored = source.rows(norm, slice(None))
    assert stored.dtype == torch.bfloat16 and not torch.equal(stored.float(), before[norm])
    product = source.rows(name, slice(None)) * stored.float()
    assert torch.allclose(product, before[name] * before[norm], rtol=1e-6)


def test_windows_are_spread_over_the_text() -> None:
    spec = ModelSpec.read(Path(__file__).resolve().parents[2] / "pipeinfer/builtin/target")
    short, long = windows_of(list(range(100)), spec), windows_of(list(range(2000)) * 50, spec)
    assert short.shape == (1, 100) and long.shape == (16, 512)
    assert int(long[0, 0]) == 0 and len({tuple(window.tolist()) for window in long}) == 16
    assert int(windows_of([5000] * 100, spec).max()) == spec.vocab_size - 1
