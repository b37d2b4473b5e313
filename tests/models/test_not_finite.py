"""Numbers that are not finite: the rows are named, and nobody else's numbers change by a bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeinfer.core.ports import Request, Sampling, SamplingInputs
from pipeinfer.placement.roles import split_layers
from stages.kernels.top_tokens import top_tokens
from stages.models.generic import GenericShard
from stages.models.generic_spec import GenericSpec
from stages.models.kernel_shard import KernelShard
from tests.models import tiny_generic
from tests.models.in_process import POLICIES, damage, decode, pair_of, plain
from tests.models.tiny import make_tiny_pair
from tests.models.walk import NO_KERNELS, compute, load_shards, make_batch, prefill

INF, NAN = math.inf, math.nan
PROMPT = [17, 301, 5, 488, 92, 260, 33]
BAD = 300
"""A token whose embedding is infinite in models that are damaged so."""
BADS = (3, 512, 20)
"""Many such tokens: the first, one past the last, and how far apart."""
EMBEDDINGS = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_model(folder: Path, kind: str, **overrides: Any) -> Path:
    overrides = {"tie_word_embeddings": False} | overrides
    return tiny_generic.make_model(folder, kind, **overrides)


def load(folder: Path, kind: str, shards: int = 2, dtype: str = "fp32") -> list[Any]:
    """By the Llama family's shard, for ``kernels llama`` on the C kernels, or for ``gpt2`` and ``any llama`` by the one
    for any architecture."""
    if kind in ("llama", "kernels llama"):
        return load_shards(folder, shards, DTYPES[dtype], kind="torch" if kind == "llama" else "kernels")
    spec = GenericSpec.read(folder)
    pieces = split_layers(spec.layer_count, [1] * shards)
    return [GenericShard.load(spec, layers, DTYPES[dtype], 160) for layers in pieces]


def slots_of(shard: Any) -> list[torch.Tensor]:
    if isinstance(shard, KernelShard):
        return [shard._kv]
    return [shard._all_kv] if hasattr(shard, "_all_kv") else list(shard._states())


ON_KERNELS = pytest.param("kernels llama", marks=NO_KERNELS)
LLAMAS = ("llama", ON_KERNELS, "any llama")
KINDS = (*LLAMAS, "gpt2")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_guess_that_is_not_finite_changes_no_bit_of_any_other_row(kind: str, dtype: str, tmp_path: Path) -> None:
    """Siblings in its run, and rows of later runs that have its slot in their span, read it with a weight of 0."""
    name = kind.split()[-1]
    folder = make_model(tmp_path, name)
    damage(folder, EMBEDDINGS[name], BAD, INF)
    found = []
    for guess in (BAD, 301):
        shards = load(folder, kind, dtype=dtype)
        prompt = set(range(len(PROMPT)))
        prefill(shards, PROMPT, range(len(PROMPT)), 5)
        # Slot 8 holds the guess, slot 9 a child of it; slots 7 and 10 do not see them.
        seen = [prompt, prompt, prompt | {8}, prompt | {7}]
        tree = make_batch([40, guess, 41, 42], [7, 7, 8, 8], [7, 8, 9, 10], seen)
        said = shards[-1].sample(compute(shards, tree), [0, 3], 8)
        assert shards[0].faults == ({1: 0} if guess == BAD else {})
        later = make_batch([43], [9], [11], [prompt | {7, 10}])
        said += shards[-1].sample(compute(shards, later), [0], 8)
        assert all(states.isfinite().all() for shard in shards for states in slots_of(shard))
        assert not shards[0].faults or guess == BAD
        found.append(said)
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", LLAMAS)
def test_a_guess_whose_keys_would_overflow_a_score_is_one_of_them(kind: str, tmp_path: Path) -> None:
    """Finite, but its product with any query is not: though hidden, it would spoil another row's softmax."""
    folder = make_model(tmp_path, "llama")

    # Only BAD has anything in the last dimension, and the first layer's keys magnify that.
    damage(folder, EMBEDDINGS["llama"], (slice(None), -1), 0.0)
    damage(folder, EMBEDDINGS["llama"], (BAD, -1), 1.0)
    damage(folder, "model.layers.0.self_attn.k_proj.weight", (slice(None), -1), 1e37)
    found = []
    for guess in (BAD, 301):
        shards = load(folder, kind)
        prompt = set(range(len(PROMPT)))
        prefill(shards, PROMPT, range(len(PROMPT)), 5)
        tree = make_batch([40, guess], [7, 7], [7, 8], [prompt, prompt])
        said = shards[-1].sample(compute(shards, tree), [0], 8)
        assert shards[0].faults == ({1: 0} if guess == BAD else {})
        later = make_batch([43], [8], [9], [prompt | {7}])
        said += shards[-1].sample(compute(shards, later), [0], 8)
        found.append(said)
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_stage_passes_on_is_finite(kind: str, tmp_path: Path) -> None:
    name = kind.split()[-1]
    folder = make_model(tmp_path, name)
    damage(folder, EMBEDDINGS[name], BAD, NAN)
    first, last = load(folder, kind)
    batch = make_batch([1, BAD, 2], [0, 1, 1], [0, 1, 2], [set(), {0}, {0}])
    hidden = compute([first], batch)
    assert hidden.isfinite().all()
    assert (first.faults, bool(hidden[1].any())) == ({1: 0}, False)
    last.sample(_push(last, batch, hidden), [0, 1, 2], 1)
    assert last.faults == {}, "the stage before has said it"


def _push(shard: Any, batch: Any, hidden: Any) -> Any:
    steps = shard.forward(batch, hidden)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


LLAMA_LAYER, GPT_LAYER = "model.layers.4.", "transformer.h.4."
WHERE = [
    ("llama", LLAMA_LAYER + "mlp.down_proj.weight", 4),
    ("llama", LLAMA_LAYER + "self_attn.k_proj.weight", 4),
    ("llama", LLAMA_LAYER + "self_attn.v_proj.weight", 4),
    ("llama", "lm_head.weight", 6),
    pytest.param("kernels llama", LLAMA_LAYER + "mlp.down_proj.weight", 4, marks=NO_KERNELS),
    pytest.param("kernels llama", LLAMA_LAYER + "self_attn.k_proj.weight", 4, marks=NO_KERNELS),
    pytest.param("kernels llama", LLAMA_LAYER + "self_attn.v_proj.weight", 4, marks=NO_KERNELS),
    pytest.param("kernels llama", "lm_head.weight", 6, marks=NO_KERNELS),
    ("any llama", LLAMA_LAYER + "mlp.down_proj.weight", 4),
    ("any llama", LLAMA_LAYER + "self_attn.k_proj.weight", 4),
    ("any llama", "lm_head.weight", 6),
    ("gpt2", GPT_LAYER + "mlp.c_proj.weight", 4),
    ("gpt2", GPT_LAYER + "attn.c_attn.weight", 4),
]


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(("kind", "tensor", "layer"), WHERE)
def test_the_first_layer_is_named(kind: str, tensor: str, layer: int, value: float, tmp_path: Path) -> None:
    folder = make_model(tmp_path, kind.split()[-1])
    # Of an infinite head only NaN is a fault for every row: minus infinity is a logit of tokens that are never chosen.
    damage(folder, tensor, (slice(3, 4), slice(0, 2)), NAN if "head" in tensor else value)
    shards = load(folder, kind)
    batch = make_batch(PROMPT[:2], range(2), range(2), [set(), {0}])
    shards[-1].sample(compute(shards, batch), [0, 1], 1)
    assert [shard.faults for shard in shards] == [{}, {0: layer, 1: layer}]
    assert all(states.isfinite().all() for shard in shards for states in slots_of(shard))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_is_given_up_leaves_finite_slots(kind: str, tmp_path: Path) -> None:
    name = kind.split()[-1]
    folder = make_model(tmp_path, name)
    damage(folder, EMBEDDINGS[name], BAD, INF)
    (shard,) = load(folder, kind, shards=1)
    steps = shard.forward(make_batch([BAD], [0], [0], [set()]), None)
    for _ in range(3):
        next(steps)
    is_finite = all(states.isfinite().all() for states in slots_of(shard))
    assert is_finite == isinstance(shard, KernelShard), "only the kernels write nothing else in the first place"
    steps.close()
    assert all(states.isfinite().all() for states in slots_of(shard))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0.8, top_k=5, top_p=0.9, min_p=0.01, seed=3), Sampling(repetition_penalty=1.3)],
    ids=["greedy", "drawn", "penalised"],
)
@pytest.mark.parametrize("is_guess", [False, True])
def test_nothing_is_chosen_from_logits_that_are_not_finite(sampling: Sampling, count: int, is_guess: bool) -> None:
    torch.manual_seed(1)
    logits = torch.randn(5, 40)
    logits[1, 7], logits[2], logits[3, 0] = NAN, NAN, INF
    draw = SamplingInputs((sampling,) * 5, np.arange(5), tuple(np.array([-3, 1, 2]) for _ in range(5)), is_guess)
    choices = top_tokens(logits, count, draw)
    assert [bool(found) for found in choices] == [True, False, False, False, True]
    for row in (0, 4):
        alone = SamplingInputs((sampling,), np.array([row]), (np.array([1, 2]),), is_guess)
        assert choices[row] == top_tokens(logits[row : row + 1], count, alone)[0]


@pytest.mark.parametrize("schedule", POLICIES)
@pytest.mark.parametrize("kind", LLAMAS)
def test_decoding_with_guesses_ends_where_plain_decoding_ends(
    kind: str, schedule: str, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, where tokens do not hang on the order of sums; for bf16 see the test of other rows' bits."""
    if kind == "llama":
        monkeypatch.setattr("stages.models.pair.library", lambda: None)
    models = pair_of(*pair, is_generic=kind == "any llama")
    prompts = ([412, 34, 137, 64], [351, 205, 425, 113], [411, 413, 1, 375], [4, BADS[0], 8])
    wanted = [plain(models, prompt, 24) for prompt in prompts]
    assert wanted[3] == ([], 0), "a token of the prompt"
    assert any(fault is None for _, fault in wanted)
    assert any(fault is not None and tokens for tokens, fault in wanted)
    told = decode(models, POLICIES[schedule], [Request(tuple(prompt), 24) for prompt in prompts])
    assert [(answer.tokens, answer.fault) for answer in told] == wanted


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target in which one token in twenty is not finite, and a draft that knows nothing of that."""
    target, draft = make_tiny_pair(tmp_path_factory.mktemp("pair"), "LlamaForCausalLM", tie_word_embeddings=False)
    damage(target, EMBEDDINGS["llama"], slice(*BADS), INF)
    return target, draft
