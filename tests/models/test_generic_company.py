"""A row of a model that runs through transformers' code has the same bits in any company, in bf16 as in fp32."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from stages.kernels.library import library
from stages.models.generic import GenericShard
from stages.models.generic_kernels import UNEVEN, Even, Weight
from stages.models.generic_spec import GenericSpec
from tests.models.kinds_of_choices import mixed_draw
from tests.models.tiny_generic import MODELS, make_model
from tests.models.walk import compute, make_batch

pytestmark = pytest.mark.skipif(library() is None, reason="there is no library of kernels")
OWN_ATTENTION = {"gptj", "codegen", "falcon", "falcon-new"}
"""These attend in code of their own, by torch's products over all slots: exact up to rounding only."""
LEFT_TO_TORCH = [
    *(torch.tanh, torch.exp, torch.cos, torch.sin, torch.erf, torch.rsqrt, F.relu, torch.log1p, torch.expm1, torch.log),
    *(lambda x: x.softmax(-1), lambda x: x.pow(2).mean(-1, keepdim=True), lambda x: F.layer_norm(x, x.shape[-1:])),
    *(lambda x: x.sum(-1, keepdim=True), lambda x: torch.pow(x, 3.0), lambda x: F.rms_norm(x, x.shape[-1:])),
]
CAPACITY = 96
DTYPES = [torch.float32, torch.bfloat16]
Text = tuple[int, ...]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def all_texts(dice: random.Random) -> list[Text]:
    """Every beginning of two texts, longer than a window, and of three branches of the first."""
    roots = [tuple(dice.randrange(512) for _ in range(count)) for count in (24, 15)]
    ends = [roots[0] + tuple(dice.randrange(512) for _ in range(4)) for _ in range(3)]
    return sorted({text[:count] for text in (*roots, *ends) for count in range(1, len(text) + 1)}, key=len)


def told(shard: GenericShard, texts: list[Text], dice: random.Random, most: int) -> dict[Text, Any]:
    """What ``shard`` says at the end of each of ``texts``, which come in batches of up to ``most`` rows, shuffled, in
    slots that hold what earlier rows left there: activations and choices."""
    free, slots, found = list(range(CAPACITY)), dict[Text, int](), dict[Text, Any]()
    dice.shuffle(free)
    left = list(texts)
    while left:
        size = dice.randint(1, most)
        here = [text for text in left if text[:-1] in slots or len(text) == 1 or text[:-1] in left[:size]][:size]
        left = [text for text in left if text not in here]
        slots |= {text: free.pop() for text in here}
        dice.shuffle(here)
        seen = [{slots[text[:count]] for count in range(1, len(text))} for text in here]
        rows = [text[-1] for text in here], [len(text) - 1 for text in here], [slots[text] for text in here]
        hidden = compute([shard], make_batch(*rows, seen))  # type: ignore[list-item]
        choices = shard.sample(hidden, range(len(here)), 8)
        drawn = shard.sample(hidden, range(len(here)), 1, mixed_draw([len(text) for text in here]))
        found |= {text: (hidden[row].tolist(), choices[row] + drawn[row]) for row, text in enumerate(here)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS.keys() - OWN_ATTENTION))
def test_a_row_has_the_same_bits_in_any_company(name: str, tmp_path: Path) -> None:
    """In one of both types, in turn: layers are the same in both, and so are the products that differ."""
    dtype = DTYPES[sorted(MODELS).index(name) % 2]
    spec, dice = GenericSpec.read(make_model(tmp_path, name)), random.Random(name)
    shard = GenericShard.load(spec, range(spec.layer_count), dtype, CAPACITY)
    texts = all_texts(dice)
    torch.set_num_threads(1)
    alone = told(shard, texts, dice, 1)
    for most, threads in ((7, 2), (60, 3)):
        torch.set_num_threads(threads)
        in_company = told(shard, texts, dice, most)
        assert [text for text in texts if in_company[text] != alone[text]] == []


@pytest.mark.parametrize("without", ["functions", "attention", "products"])
def test_torch_has_other_bits_in_company(without: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test would notice, and each part of generic_kernels is needed."""
    spec, dice = GenericSpec.read(make_model(tmp_path, "gemma", intermediate_size=100)), random.Random(1)
    if without == "functions":
        monkeypatch.setattr("stages.models.generic_kernels.UNEVEN", set())
    elif without == "attention":
        monkeypatch.setattr("stages.models.generic_slots._seen", lambda _: None)
    else:
        monkeypatch.setattr(Weight, "product", lambda self, x, turned, bias=None: F.linear(x, self.dense(), bias))
    shard = GenericShard.load(spec, range(spec.layer_count), torch.float32, CAPACITY)
    texts = all_texts(dice)
    assert told(shard, texts, dice, 1) != told(shard, texts, dice, 12)


@pytest.mark.parametrize("func", sorted(UNEVEN, key=str))
def test_a_function_gives_a_number_the_same_bits_in_any_tensor(func: Any) -> None:
    torch.manual_seed(1)
    for width in (1, 4, 16, 56, 64, 100, 896):
        x = torch.randn(1, 61, width) * 4
        with Even():
            whole = func(x)
            assert torch.equal(whole, one_by_one(func, x))
            assert torch.equal(whole, func(x.transpose(1, 2).contiguous().transpose(1, 2)))
        torch.testing.assert_close(whole, func(x))


@pytest.mark.parametrize("func", LEFT_TO_TORCH)
def test_what_is_left_to_torch_gives_rows_the_same_bits(func: Any) -> None:
    torch.manual_seed(1)
    for width in (1, 4, 16, 56, 64, 100, 896):
        x = torch.randn(1, 61, width).abs() * 4
        assert torch.equal(func(x), one_by_one(func, x)), width


def one_by_one(func: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([func(x[:, row : row + 1].clone()) for row in range(x.shape[1])], 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_multiplies_as_its_numbers_do(dtype: torch.dtype) -> None:
    matrix, stack, bias = torch.randn(30, 45).to(dtype), torch.randn(3, 45, 20).to(dtype), torch.randn(30)
    x, index = torch.randn(2, 7, 45), torch.tensor([[3, 0], [29, 3]])
    weight, turned, experts = (cast(Any, Weight(stored)) for stored in (matrix, matrix, stack))
    dense = matrix.float()
    assert torch.equal(F.embedding(index, weight), dense[index])
    torch.testing.assert_close(F.linear(x, weight, bias), F.linear(x, dense, bias))
    assert torch.equal(F.embedding(index, weight), dense[index]), "packed"
    torch.testing.assert_close(torch.addmm(bias[:20], x[0], experts[0]), x[0] @ stack[0].float() + bias[:20])
    torch.testing.assert_close(x[0, :, :30] @ turned, x[0, :, :30] @ dense)
    assert torch.equal(turned.dense(), dense) and torch.equal(weight.dense(), dense)
    torch.testing.assert_close(x[0] @ experts[torch.tensor(1)], x[0] @ stack[1].float())
    torch.testing.assert_close(torch.bmm(x[[0, 1, 0]], experts), torch.bmm(x[[0, 1, 0]], stack.float()))
    assert torch.equal(experts.dense(), stack.float()) and weight.shape == (30, 45)
    assert torch.equal(torch.sum(weight), dense.sum()) and torch.equal(weight.to(torch.float32) * 2, dense * 2)
