"""Layers with experts on the C kernels: transformers' tokens, right sums, and the same bits in any company."""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeinfer import Engine
from pipeinfer.core.ports import Request
from pipeinfer.core.slots import batch_in_order
from stages.checkpoint.checkpoint import Checkpoint, expert_tensors, router_name
from stages.checkpoint.spec import ModelSpec
from stages.kernels.library import CLinear, CModel, CRows, Library, library
from stages.kernels.linear import padded
from stages.models.experts import Experts
from stages.models.kernel_shard import KernelShard
from tests.models.expert_bits import ROUTERS, ExpertWeights, draw_expert_world, draw_experts
from tests.models.in_process import POLICIES, damage, decode, pair_of
from tests.models.kernel_bits import check_world, draw_world, logits_of, push, same_as
from tests.models.tiny_generic import make_model, make_pair
from tests.models.walk import Reference, compute, greedy, load_shards

pytestmark = pytest.mark.skipif(library() is None, reason="there is no library of kernels")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral-odd": ("mixtral", {"intermediate_size": 36, "num_local_experts": 17, "num_experts_per_tok": 5}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe-plain-weights": ("qwen3_moe", {"norm_topk_prob": False, "attention_bias": True}),
}
PROMPTS = ([17, 301, 5, 488, 92, 260, 33, 410, 7, 151, 64], [9, 9, 44, 130], [501, 3, 77, 210, 398, 12, 480, 66, 205])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def lib() -> Iterator[Library]:
    found = library()
    assert found is not None
    isa, threads = found.isa, found.threads
    yield found
    found.use(isa)
    found.set_threads(threads)


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, keys = KINDS[request.param]
    return make_model(tmp_path_factory.mktemp(request.param), name, **keys)


def test_tokens_are_those_of_transformers(model: Path, lib: Library) -> None:
    reference = Reference(model)
    texts = [reference.greedy(prompt, 48) for prompt in PROMPTS]
    assert sum(len(set(text)) for text in texts) > 36, "texts that loop would hide errors"
    for isa in lib.available:
        lib.use(isa)
        for shards, chunk in ((1, 5), (3, 4)):
            parts = load_shards(model, shards, kind="kernels")
            assert [greedy(parts, prompt, 48, chunk) for prompt in PROMPTS] == texts, isa


@torch.no_grad()
def test_logits_are_those_of_transformers(model: Path) -> None:
    text = [(17 * place * place + 5) % 512 for place in range(150)]
    truth: Tensor = Reference(model).model(torch.tensor([text])).logits[0]
    shards = load_shards(model, 2, kind="kernels")
    ours, _ = logits_of(shards[-1], push(shards, batch_in_order(text))[-1])
    assert (ours - truth).norm() <= 2e-5 * truth.norm()


def test_weights_of_16_bits(tmp_path: Path) -> None:
    """Only keys and values are rounded; of experts that are chosen by little, others may then be chosen."""
    text = [(17 * place * place + 5) % 512 for place in range(100)]
    folder = make_model(tmp_path, "mixtral", torch.bfloat16, initializer_range=0.1)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        shards = load_shards(folder, 1, dtype, kind="kernels")
        found.append(logits_of(shards[-1], push(shards, batch_in_order(text))[-1])[0])
        assert shards[0]._experts._layers[0].router.packed.dtype is torch.float32
    errors = (found[0] - found[1]).norm(dim=-1) / found[1].norm(dim=-1)
    assert 0 < errors.median() <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("seeds", [range(part, 24, 4) for part in range(4)], ids=lambda seeds: f"from {seeds.start}")
def test_a_row_in_any_company_has_the_bits_that_it_has_alone(seeds: range) -> None:
    for seed in seeds:
        check_world(seed, cases=6, draw=draw_expert_world)


def test_the_random_worlds_have_what_they_should() -> None:
    worlds = [draw_expert_world(seed) for seed in range(24)]
    routers = [world.weights.router for world in worlds if isinstance(world.weights, ExpertWeights)]
    assert set(routers) == set(ROUTERS) and len(routers) == 24
    experts = [world.spec.experts for world in worlds if world.spec.experts is not None]
    assert {one.block for one in experts} == {"mlp", "block_sparse_moe"} and len(experts) == 24
    assert {one.is_normalised for one in experts} == {False, True}
    assert any(one.chosen == one.count for one in experts) and any(1 < one.chosen < one.count for one in experts)
    assert any(world.weights.bad is not None for world in worlds) and draw_world(0).spec.experts is None


def layer_of(dice: random.Random, router: str) -> tuple[ModelSpec, ExpertWeights]:
    """A layer with experts, and weights whose router is one of ROUTERS."""
    experts = replace(draw_experts(dice), count=dice.choice((5, 8, 33)), chosen=dice.choice((1, 2, 4)))
    sizes = {"hidden_size": dice.choice((30, 65, 128)), "intermediate_size": dice.choice((33, 80))}
    spec = replace(draw_world(0).spec, **sizes, mlp_bias=False, experts=experts)
    return spec, ExpertWeights(spec, dice.randrange(1000), None, router)


def exact(spec: ModelSpec, weights: ExpertWeights, normed: Tensor) -> Tensor:
    """What the experts make of the rows ``normed``, in float64."""
    experts = spec.experts
    assert experts is not None
    rows, router = normed.double(), weights._tensor(router_name(experts, 0)).double()
    shares = (rows[:, None] * router).sum(-1).softmax(-1)
    order = shares.argsort(dim=-1, descending=True, stable=True)[:, : experts.chosen]
    best = shares.gather(-1, order)
    best = best / best.sum(-1, keepdim=True) if experts.is_normalised else best
    found = torch.zeros_like(rows)
    for expert in range(experts.count):
        gate, up, down = (weights._tensor(name).double() for name in expert_tensors(spec, 0, expert))
        made = (torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)) @ down.T
        found += made * (best * (order == expert)).sum(-1, keepdim=True)
    return found


def passed(experts: Experts, spec: ModelSpec, normed: Tensor, x: Tensor) -> tuple[Tensor, list[int]]:
    """The rows ``x`` after the experts' layer, and which are at fault."""
    wide = torch.nn.functional.pad(normed, (0, padded(spec.hidden_size) - spec.hidden_size)).contiguous()
    out, faults = x.clone(), np.zeros(len(x), np.int32)
    sizes = CModel(hidden=spec.hidden_size)
    places = {"x": out.data_ptr(), "normed": wide.data_ptr(), "faults": faults.ctypes.data}
    experts.run(0, ctypes.addressof(sizes), CRows(count=len(x), layer=6, **places))
    return out, faults.tolist()


def numbers(dice: random.Random, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(dice.getrandbits(32)))


@pytest.mark.parametrize("router", ROUTERS)
def test_sums_are_right_whoever_chooses_which_expert(router: str, lib: Library) -> None:
    """As in float64; equal scores go to the first experts, so nobody has the last. The bits are those of rows alone."""
    dice = random.Random(router)
    for _ in range(6):
        spec, weights = layer_of(dice, router)
        experts = Experts.load(spec, weights, range(1), torch.float32)
        assert experts is not None
        x, normed = numbers(dice, 50, spec.hidden_size), numbers(dice, 50, spec.hidden_size)
        normed = normed.abs() if router == "one" else normed
        truth, made = torch.empty_like(x), exact(spec, weights, normed)
        lib.set_threads(1)
        for row in range(50):
            truth[row], faults = passed(experts, spec, normed[row : row + 1], x[row : row + 1])[0][0], [0]
        assert faults == [0] and ((truth - x) - made).abs().max() <= 2e-5 * made.abs().max()
        for isa in same_as(lib.isa, lib):
            for threads in (1, 2, 3):
                lib.use(isa)
                lib.set_threads(threads)
                rows = dice.sample(range(50), dice.choice((1, 2, 7, 50)))
                found, faults = passed(experts, spec, normed[rows], x[rows])
                assert torch.equal(found, truth[rows]) and not any(faults), (isa, threads, rows)


def test_experts_that_are_computed_in_parts(lib: Library) -> None:
    """As on several ranks: each part computes its experts' outputs, and the last one finds all of them."""
    dice = random.Random(5)
    spec, weights = layer_of(dice, "random")
    experts = Experts.load(spec, weights, range(1), torch.float32)
    assert experts is not None and spec.experts is not None
    x, normed = numbers(dice, 20, spec.hidden_size), numbers(dice, 20, spec.hidden_size)
    whole, _ = passed(experts, spec, normed, x)
    c, nbytes = experts._layers[0].c, ctypes.sizeof(CLinear)
    begin = c.gate_up, c.down
    for tensor in experts._scratch._held[-3:]:
        tensor.zero_()
    found = []
    for first, end in ((0, 2), (2, 2), (2, spec.experts.count)):
        c.first, c.end, c.gate_up, c.down = first, end, *(place + first * nbytes for place in begin)
        found.append(passed(experts, spec, normed, x)[0])
    assert torch.equal(found[-1], whole)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], whole)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("tensor", ["router", "expert"])
def test_rows_that_are_not_finite_are_named(tensor: str, value: float, tmp_path: Path) -> None:
    """Whoever has an expert that is damaged, or everybody by a router with NaN; other rows keep their bits. An infinite
    weight of the router is a fault for rows whose score is, but for those with the score minus infinity."""
    folder, layer = make_model(tmp_path, "mixtral"), 2
    text, name = [(17 * place * place + 5) % 512 for place in range(30)], f"model.layers.{layer}.block_sparse_moe."
    sound = compute(load_shards(folder, kind="kernels"), batch_in_order(text))
    damage(folder, name + ("gate.weight" if tensor == "router" else "experts.1.w2.weight"), (1, 7), value)
    (shard,) = load_shards(folder, kind="kernels")
    own = [batch_in_order([token], place) for place, token in enumerate(text)]
    faults = []
    for batch in own:
        compute([shard], batch)
        faults += [shard.faults.get(0)]
    assert set(faults) == ({layer} if tensor == "router" and math.isnan(value) else {None, layer}), faults
    (shard,) = load_shards(folder, kind="kernels")
    found = compute([shard], batch_in_order(text))
    assert shard.faults == {row: layer for row, fault in enumerate(faults) if fault == layer}
    first = faults.index(layer)
    assert torch.equal(found[:first], sound[:first]) and found.isfinite().all()


def test_a_row_that_is_not_finite_leaves_the_others_alone(lib: Library) -> None:
    dice = random.Random(8)
    for router in ("random", "equal"):
        spec, weights = layer_of(dice, router)
        experts = Experts.load(spec, weights, range(1), torch.float32)
        assert experts is not None
        x, normed = numbers(dice, 9, spec.hidden_size), numbers(dice, 9, spec.hidden_size)
        truth, _ = passed(experts, spec, normed, x)
        for threads in (1, 3):
            lib.set_threads(threads)
            for value in (math.nan, math.inf, -math.inf):
                bad = normed.clone()
                bad[4, dice.randrange(spec.hidden_size)] = value
                found, faults = passed(experts, spec, bad, x)
                assert faults == [7 * (row == 4) for row in range(9)]
                kept = [row for row in range(9) if row != 4]
                assert torch.equal(found[kept], truth[kept]) and not found[4].any()


def test_bytes_of_weights(model: Path) -> None:
    """The router's stay 32 bits; panels are filled up."""
    spec, stored = ModelSpec.read(model), Checkpoint(model).tensors
    numel = sum(math.prod(tensor.shape) for tensor in stored.values())
    (shard,) = load_shards(model, kind="kernels")
    assert isinstance(shard, KernelShard) and spec.experts is not None
    assert 4 * numel <= shard.weight_nbytes < 1.3 * 4 * numel
    halves = load_shards(model, 2, kind="kernels")
    assert sum(half.weight_nbytes for half in halves) == shard.weight_nbytes


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_whole_job_with_speculation(name: str, tmp_path: Path) -> None:
    target, draft = make_pair(tmp_path, name)
    expected = Reference(target).greedy(PROMPTS[0], 40)
    with Engine(str(target), str(draft)) as engine:
        found = engine.generate(PROMPTS[0], max_new_tokens=40, ignore_eos=True)
    assert found.tokens == expected
    models, requests = pair_of(target, draft), [Request(tuple(prompt), 24) for prompt in PROMPTS]
    truth = [Reference(target).greedy(prompt, 24) for prompt in PROMPTS]
    for schedule, policy in POLICIES.items():
        told = decode(models, policy, requests)
        assert [list(answer.tokens) for answer in told] == truth, schedule
