"""A target that drafts for itself: what its draft's weights are, that they draft, and that no token changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.preflight import clear
from pipeinfer.cli import main
from pipeinfer.core.config import Config, model_directory
from pipeinfer.core.errors import UserError
from pipeinfer.core.ports import Request
from pipeinfer.text import Text
from stages.checkpoint.checkpoint import EMBEDDING, HEAD, Checkpoint, Weights, expected_tensors, router_name
from stages.checkpoint.random_weights import RandomCheckpoint
from stages.checkpoint.spec import MIXTRAL_EXPERTS, ModelSpec
from stages.models.pair import CheckpointPair
from stages.models.self_draft import SelfDraftWeights, rounded, self_draft
from stages.quantization.matrix import QuantizedMatrix, dense, floats_of
from stages.quantization.rounding import quantize_matrix
from tests.models.in_process import POLICIES, decode, plain

TARGET = model_directory("builtin", "target")
SPEC = ModelSpec.read(TARGET)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def builtin() -> tuple[ModelSpec, Weights]:
    return SPEC, Checkpoint(TARGET)


def test_the_weights_are_the_targets_rounded_layer_by_layer() -> None:
    (spec, weights), target = self_draft("self:int4,layers=3", builtin()), Checkpoint(TARGET)
    assert spec == replace(SPEC, layer_count=3)
    for name in expected_tensors(spec):
        theirs = name.replace("layers.1.", "layers.4.").replace("layers.2.", "layers.7.")
        whole = target.read([theirs], torch.bfloat16)[theirs]
        found = weights.matrices([name], torch.bfloat16)[name]
        if whole.dim() == 1:
            assert torch.equal(dense(found), whole), name
            continue
        assert isinstance(found, QuantizedMatrix) and (found.bits, found.group) == (4, 32), name
        error = (found.dense() - whole.float()).square().mean().sqrt() / whole.float().std()
        assert 0.02 < error < 0.12, (name, error)
        wide = dense(weights.matrices([name], torch.float32)[name])
        assert torch.equal(weights.read([name], torch.float32)[name], wide)


@pytest.mark.parametrize("part", [(slice(64, 96),), (slice(None), slice(32, 160))], ids=str)
@pytest.mark.parametrize("name", ["self:int8", "self:fp6-4", "self:layers=2"])
def test_a_rank_of_a_group_has_a_part_of_the_same_numbers(name: str, part: tuple[slice, ...]) -> None:
    _, weights = self_draft(name, builtin())
    whole = dense(weights.matrices([Q_PROJ], torch.bfloat16)[Q_PROJ])
    found = weights.matrices([Q_PROJ], torch.bfloat16, {Q_PROJ: part})[Q_PROJ]
    assert torch.equal(dense(found), whole[part])


def test_ends_of_a_tied_model_and_routers() -> None:
    _, weights = self_draft("self:int4", builtin())
    assert weights.stored_name(HEAD) == EMBEDDING
    experts = replace(MIXTRAL_EXPERTS, count=4)
    spec = replace(SPEC, experts=experts, layer_count=2)
    weights = SelfDraftWeights(spec, RandomCheckpoint(spec), [1], lambda matrix, dtype: dense(matrix) * 0)
    router = router_name(experts, 0)
    assert weights.read([router], torch.float32)[router].abs().min() > 0
    expert = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    assert not weights.read([expert], torch.float32)[expert].any()


def test_what_is_stored_in_few_bits_already() -> None:
    matrix = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    four, six = quantize_matrix(matrix, "int4", 32), quantize_matrix(matrix, "fp6")
    for format in ("int4", "fp6-4", "fp6", "int8"):
        assert rounded(four, torch.float32, format, 32) is four
    assert rounded(six, torch.float32, "fp6", 0) is six
    plane = rounded(six, torch.float32, "fp6-4", 64)
    assert isinstance(plane, QuantizedMatrix)
    numbers = floats_of(plane.kind)[plane.codes.int()]
    assert torch.equal(numbers, floats_of("e3m0")[six.codes.int() >> 2]), "only the plane of what is stored"
    smaller = rounded(six, torch.bfloat16, "int4", 64)
    assert isinstance(smaller, QuantizedMatrix) and (smaller.bits, smaller.group) == (4, 64)


@pytest.mark.parametrize(("format", "less", "fits"), [("int4", "int4", ""), ("int8", "int8", "fp6")])
def test_a_target_in_few_bits_already(format: str, less: str, fits: str, tmp_path: Path) -> None:
    """Refused by headers where no matrix becomes smaller; ``layers=N`` drafts as it is."""
    target = str(tmp_path / "target")
    assert main(["quantize", str(TARGET), "--format", format, "--out", target]) == 0

    def cleared(name: str) -> Any:
        return clear(Config(target, (name,), {"name": "continuous"}), 2)

    with pytest.raises(UserError, match=f"--draft self:{less}: the target has .* bits a weight already; ask for fewer"):
        cleared(f"self:{less}")
    _, weights = cleared("self:layers=2").drafts[0]
    assert isinstance(weights.matrices([Q_PROJ], torch.bfloat16)[Q_PROJ], QuantizedMatrix)
    assert {extent.path.name for extent in weights.extents([Q_PROJ])} == {"model.safetensors"}
    if fits:
        found = cleared(f"self:{fits}").drafts[0][1].matrices([Q_PROJ], torch.bfloat16)[Q_PROJ]
        assert isinstance(found, QuantizedMatrix) and found.kind == "e3m2"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("self:layers=8", "the target has 8 layers"),
        ("self:first=9", "the target has 8 layers"),
        ("self:int4,layers=9", "the target has 8 layers"),
        ("self:int4-48", "groups of 48 inputs; use a multiple of 32"),
        ("self:int4-512", "groups of 512 do not divide rows of 256 inputs"),
        ("self:int4-256", "groups of 256 do not divide rows of 640 inputs"),
        ("self:int4-0", "groups of 0 inputs"),
        ("self:half", "unknown word 'half'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(name: str, says: str) -> None:
    with pytest.raises(UserError) as refused:
        clear(Config(drafts=(name,), policy={"name": "continuous", "prompt_lookup": 0}), 1)
    assert says in str(refused.value) and name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_all_layers_in_fewer_bits_are_a_draft() -> None:
    cleared = clear(Config(drafts=("self:int8,layers=8", "builtin"), policy={"name": "continuous"}), 4)
    assert [spec.layer_count for spec, _ in cleared.drafts] == [8, 2]
    assert cleared.config.draft_dtypes == (cleared.config.dtype, "bf16" if cleared.config.dtype == "bf16" else "fp32")


def test_a_model_that_transformers_computes_is_refused(tmp_path: Path) -> None:
    class Generic:
        architecture = "OPTForCausalLM"

    target: Any = Generic(), Checkpoint(TARGET)
    with pytest.raises(UserError, match="no draft is made of a OPTForCausalLM; use a model of Llama"):
        self_draft("self:int4", target)


def test_a_weight_that_is_not_finite_is_named() -> None:
    class Damaged(Checkpoint):
        def matrices(self, *args: Any) -> Any:
            return {name: dense(matrix) * float("nan") for name, matrix in super().matrices(*args).items()}

    _, weights = self_draft("self:int8", (SPEC, Damaged(TARGET)))
    with pytest.raises(UserError, match=f"tensor {Q_PROJ} cannot be rounded: a weight is not finite"):
        weights.matrices([Q_PROJ], torch.bfloat16)


PROMPTS = [
    json.loads(line)["prompt"]
    for line in (Path(__file__).parents[2] / "benchmarks" / "prompts" / "python.jsonl").read_text().splitlines()[:2]
]


@pytest.mark.parametrize(
    "name", ["self:int8", "self:int4", "self:fp6", "self:fp6-4", "self:layers=5", "self:int4,layers=7", "self:first=7"]
)
def test_no_token_changes_and_most_guesses_are_right(name: str) -> None:
    """Real weights under the simulator's clock, so that the schedule drafts on any machine."""
    target, text = builtin(), Text(TARGET)
    pair = CheckpointPair(target, [self_draft(name, target)], "bf16")
    prompts = [text.encode(prompt)[:20] for prompt in PROMPTS]
    answers = decode(pair, POLICIES["continuous"], [Request(prompt, 14) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == plain(pair, prompt, 14)[0], name
    emitted = sum(len(answer.tokens) for answer in answers)
    accepted = sum(answer.stats.accepted for answer in answers if answer.stats)
    assert accepted > 0.4 * emitted, (name, accepted, emitted)
