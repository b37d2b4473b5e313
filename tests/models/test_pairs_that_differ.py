"""A target and a draft of one tokenizer whose embeddings differ in height, or whose contexts do, decode exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from pipeinfer.core.ports import Request, Sampling, SamplingInputs
from speculation.schedules.schedule import Placement
from stages.models.pair import CheckpointPair
from tests.models.in_process import POLICIES, decode, pair_of, plain
from tests.models.tiny_generic import MODELS, make_model, make_pair
from tests.models.walk import compute, make_batch

HIGH, LOW = 512, 300
SHORT = 24
"""Positions that a short draft was made for."""
PROMPTS = ([17, 201, 5], [9, 299, 44, 130], [1, 2, 3, 4, 5, 6, 7, 8] * 4)
NEW = 26
WHERE: list[tuple[int, Placement]] = [(2, "spread"), (1, "alone")]
LAYERS = {"llama": {"num_hidden_layers": 2}, "gpt2": {"n_layer": 2}}
CONTEXT = {"llama": "max_position_embeddings", "gpt2": "n_positions"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_part(folder: Path, name: str, whole: Path, **overrides: int) -> Path:
    """A model of another form, with as much of the weights of ``whole`` as both have."""
    make_model(folder, name, **(LAYERS[name] | overrides))
    net = getattr(transformers, MODELS[name][0]).from_pretrained(folder, dtype=torch.float32)
    theirs = {key: tensor for path in whole.glob("*.safetensors") for key, tensor in load_file(path).items()}
    with torch.no_grad():
        for key, weight in net.state_dict().items():
            if key in theirs:
                rows = min(len(weight), len(theirs[key]))
                weight[:rows] = theirs[key][:rows]
    net.save_pretrained(folder)
    return folder


Known = tuple[CheckpointPair, list[list[int]]]
"""A pair, and what its target says by plain decoding after PROMPTS."""


def load(target: Path, draft: Path, name: str) -> Known:
    models = pair_of(target, draft, is_generic=name == "gpt2")
    return models, [plain(models, prompt, NEW)[0] for prompt in PROMPTS]


def check(known: Known, schedule: str, stages: int, placement: Placement) -> None:
    models, wanted = known
    requests = [Request(tuple(prompt), NEW) for prompt in PROMPTS]
    told = decode(models, POLICIES[schedule], requests, stages, placement)
    assert [answer.tokens for answer in told] == wanted
    assert all(answer.reason == "length" for answer in told)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module", params=["the target is higher", "the draft is higher"])
def heights(request: pytest.FixtureRequest, name: str, tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("heights")
    rows = (HIGH, LOW) if request.param == "the target is higher" else (LOW, HIGH)
    target = make_model(folder / "target", name, **LAYERS[name], vocab_size=rows[0], tie_word_embeddings=False)
    draft = make_part(folder / "draft", name, target, vocab_size=rows[1], tie_word_embeddings=False)
    return load(target, draft, name)


@pytest.mark.parametrize("schedule", sorted(POLICIES.keys() - {"plain"}))
@pytest.mark.parametrize(("stages", "placement"), WHERE, ids=["spread", "alone"])
def test_embeddings_of_different_heights(heights: Known, schedule: str, stages: int, placement: Placement) -> None:
    check(heights, schedule, stages, placement)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, seed=5)], ids=["greedy", "drawn"])
def test_no_token_is_proposed_that_the_target_has_no_row_for(heights: Known, sampling: Sampling) -> None:
    """And a token that the draft has no row for is embedded as its last one."""
    draft = heights[0].draft(0, 64)
    batch = make_batch([7, HIGH - 1, LOW - 1], range(3), range(3), [set(), {0}, {0, 1}])
    draw = SamplingInputs((sampling,) * len(batch.positions), batch.positions + 1, is_guess=True)
    choices = draft.sample(compute([draft], batch), range(3), HIGH, draw)  # type: ignore[list-item]
    assert {token for row in choices for token, _ in row} == set(range(LOW))


@pytest.fixture(scope="module")
def short(name: str, tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("short")
    target, draft = make_pair(folder, name, **LAYERS[name])
    make_part(folder / "short", name, draft, **{CONTEXT[name]: SHORT})
    return load(target, folder / "short", name)


@pytest.mark.parametrize("schedule", sorted(POLICIES.keys() - {"plain"}))
@pytest.mark.parametrize(("stages", "placement"), WHERE, ids=["spread", "alone"])
def test_a_draft_made_for_fewer_positions_than_are_decoded(
    short: Known, schedule: str, stages: int, placement: Placement
) -> None:
    """Two prompts end before the draft's last position and go beyond it; the third one begins there."""
    assert short[0].draft_contexts == (SHORT,)
    check(short, schedule, stages, placement)
