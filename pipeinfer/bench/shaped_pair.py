"""A target of 620 million weights and a draft of 99 million, random but alike: a pair to measure with.

    python -m pipeinfer.bench.shaped_pair DIR

makes DIR/target and DIR/draft, Llama models in bf16. The draft is the first three layers of the target between the
target's own embedding and norm. What the target's later layers add to the hidden state is scaled down, by a factor that
is found by bisection, so that the draft's choice is the target's in about three quarters of the tokens. Guesses are
wrong where the best two tokens are close, as those of a trained draft are. Queries are scaled up: a row attends to few
tokens, and the next token depends on all of the text; else greedy text soon repeats.

Nobody can read the text: most of the tokens have no characters. The same command gives the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeinfer.bench.chain import ShardEvaluator, decode, run_pass
from pipeinfer.bench.inflate import weight_count
from pipeinfer.bench.passes import random_model, whole_shard
from pipeinfer.core.config import BUILTIN, model_directory
from pipeinfer.core.errors import PipeinferError, refuse
from pipeinfer.core.ports import ShardModel
from pipeinfer.core.slots import batch_in_order
from stages.checkpoint.checkpoint import NORM, Weights, expected_tensors
from stages.checkpoint.random_weights import RandomCheckpoint
from stages.checkpoint.spec import ModelSpec

if TYPE_CHECKING:
    import torch

SPEC = replace(
    random_model(layers=24, hidden=1536, intermediate=4096, heads=16, kv_heads=4, vocab=16000),
    context=2048,
    tied=True,
    eos_tokens=(0,),
    dtype="bfloat16",
)
DRAFT_LAYERS = 3
AGREEMENT = 0.75
"""Share of the tokens in which draft and target are to agree."""
QUERY_SCALE = 4.0
"""Scores then have a standard deviation of about 4."""
LOGIT_SCALE = 8.0
"""Logits then have a standard deviation of about 8: the best token has a probability of a half or so."""
STEPS_PER_OCTAVE = 4
MOST_STEPS = 8 * STEPS_PER_OCTAVE
"""The factor is 2 ** (-step / STEPS_PER_OCTAVE). The steps are wide: rounding hardly ever decides which one it is."""
TOKENS = 192
PROMPT = [3 + 97 * index % 2000 for index in range(32)]
FACTS = "pair.json"


@dataclass(frozen=True, slots=True)
class Facts:
    """What was measured of a pair over ``tokens`` greedy tokens of the target: the share in which the draft's choice is
    the same, and the share of different tokens. ``factor``: of what later layers add."""

    agreement: float
    distinct: float
    tokens: int
    factor: float


class PairWeights(Weights):
    """The weights of the target ``spec`` (see Weights), which begin with those of its draft. They are made when they
    are first read, and kept as bf16."""

    def __init__(self, spec: ModelSpec, draft_layers: int) -> None:
        self.factor = 1.0
        """Of what the layers from ``draft_layers`` on add."""
        self._random = RandomCheckpoint(spec)
        self._draft_layers = draft_layers
        self._made: dict[str, torch.Tensor] = {}

    def stored_name(self, name: str) -> str:
        """See Weights."""
        return self._random.stored_name(name)

    def read(
        self, names: Iterable[str], dtype: torch.dtype, slices: Mapping[str, tuple[slice, ...]] | None = None
    ) -> dict[str, torch.Tensor]:
        """See Weights."""
        return {name: self.tensor(name)[slices[name] if slices else ...].to(dtype) for name in names}

    def tensor(self, name: str) -> torch.Tensor:
        """One of them, as it is stored."""
        import torch

        if name not in self._made:
            self._made |= self._random.read([name], torch.bfloat16)
        scale = self._scale(name)
        return self._made[name] if scale == 1.0 else self._made[name] * scale

    def _scale(self, name: str) -> float:
        if name == NORM:
            return LOGIT_SCALE
        if name.endswith("q_proj.weight"):
            return QUERY_SCALE
        is_late = name.startswith("model.layers.") and int(name.split(".")[2]) >= self._draft_layers
        return self.factor if is_late and name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0


def make_pair(
    directory: str | Path, spec: ModelSpec = SPEC, draft_layers: int = DRAFT_LAYERS, tokens: int = TOKENS
) -> Facts:
    """Write a target like ``spec`` and a draft of its first ``draft_layers`` layers to ``directory``, whole or not at
    all, having measured them over ``tokens`` tokens; a pair that is there already is kept. Raises UserError."""
    place = Path(directory)
    if place.exists():
        if not (place / FACTS).is_file() or ModelSpec.read(place / "target") != spec:
            refuse(f"{place} is there and is no such pair", "name a directory that does not exist")
        return Facts(**json.loads((place / FACTS).read_text(encoding="utf-8")))
    draft = replace(spec, layer_count=draft_layers)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{place.name}-", dir=place.parent) as scratch:
            weights = PairWeights(spec, draft_layers)
            facts = _fit(weights, spec, draft, tokens)
            whole = Path(scratch) / "whole"
            for part, model in (("target", spec), ("draft", draft)):
                write_model(whole / part, model, weights)
            (whole / FACTS).write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")
            whole.rename(place)
    except OSError as error:
        refuse(f"{place} cannot be written ({error.strerror})", "name one where there is room for it")
    return facts


def _fit(weights: PairWeights, spec: ModelSpec, draft: ModelSpec, tokens: int) -> Facts:
    """Set the factor of ``weights``; what was measured with it.

    The draft's own text does not depend on the factor: twice as many tokens of it are decoded once, and bisection asks
    for the target's choices in it. A text that the target decodes is then what is measured."""
    capacity = len(PROMPT) + 2 * tokens
    early = whole_shard(draft, "fp32", capacity, weights)
    drafted = decode(ShardEvaluator(early), None, PROMPT, 2 * tokens)
    batch = batch_in_order(PROMPT + drafted[:-1])
    hidden = run_pass(early, batch)

    def agreement(step: int) -> float:
        weights.factor = _factor(step)
        late = _later_layers(spec, draft.layer_count, capacity, weights)
        found = late.sample(run_pass(late, batch, hidden), range(len(PROMPT) - 1, capacity - 1), 1)
        return _share([one[0][0] for one in found], drafted)

    weights.factor = _factor(_nearest_step(agreement))
    return _measure(weights, spec, early, tokens)


def _factor(step: int) -> float:
    return float(2.0 ** (-step / STEPS_PER_OCTAVE))


def _nearest_step(agreement: Callable[[int], float]) -> int:
    """The step at which ``agreement``, which grows with it, comes closest to AGREEMENT."""
    low, high, found = 0, MOST_STEPS, {0: 0.0, MOST_STEPS: 1.0}
    while high - low > 1:
        middle = (low + high) // 2
        found[middle] = agreement(middle)
        low, high = (low, middle) if found[middle] >= AGREEMENT else (middle, high)
    return min(low, high, key=lambda step: abs(found[step] - AGREEMENT))


def _later_layers(spec: ModelSpec, first: int, slots: int, weights: PairWeights) -> ShardModel:
    import torch

    from stages.models.pair import load_llama

    return load_llama(spec, weights, range(first, spec.layer_count), torch.float32, slots)


def _measure(weights: PairWeights, spec: ModelSpec, draft: ShardModel, tokens: int) -> Facts:
    """Decode ``tokens`` tokens of the target, and ask the draft for each of them."""
    target = whole_shard(spec, "fp32", len(PROMPT) + tokens, weights)
    text = decode(ShardEvaluator(target), None, PROMPT, tokens)
    guesses = ShardEvaluator(draft).choices(PROMPT + text[:-1], 0, tokens)
    return Facts(_share(guesses, text), len(set(text)) / tokens, tokens, weights.factor)


def _share(guesses: list[int], text: list[int]) -> float:
    return sum(guess == token for guess, token in zip(guesses, text, strict=True)) / len(text)


def write_model(folder: Path, spec: ModelSpec, weights: PairWeights) -> None:
    """Write the model ``spec`` to ``folder``, with the built-in pair's tokenizer."""
    folder.mkdir(parents=True)
    source = model_directory(BUILTIN, "target")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, folder / name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | _config(spec)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with (folder / "model.safetensors").open("wb") as file:
        _write_weights(file, spec, weights)


def _config(spec: ModelSpec) -> dict[str, Any]:
    """The keys of config.json that say what ``spec`` says."""
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layer_count,
        "num_attention_heads": spec.head_count,
        "num_key_value_heads": spec.kv_head_count,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.context,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope.theta},
    }


def _write_weights(file: BinaryIO, spec: ModelSpec, weights: PairWeights) -> None:
    """A safetensors file, tensor by tensor: no more than one is in memory for it."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, shapes = 0, expected_tensors(spec)
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    file.write(len(written).to_bytes(8, "little") + written)
    for name in shapes:
        file.write(weights.tensor(name).view(torch.uint8).numpy().data)


def main() -> int:
    """Write the pair where the command line says, and say what it is."""
    parser = argparse.ArgumentParser(prog="python -m pipeinfer.bench.shaped_pair", description=make_pair.__doc__)
    parser.add_argument("directory", help="where to write it")
    args = parser.parse_args()
    try:
        facts = make_pair(args.directory)
    except PipeinferError as error:
        print(f"pipeinfer.bench.shaped_pair: {error}", file=sys.stderr)
        return error.exit_code
    sizes = [weight_count(model) / 1e6 for model in (SPEC, replace(SPEC, layer_count=DRAFT_LAYERS))]
    print(f"{args.directory}: {sizes[0]:.0f}M and {sizes[1]:.0f}M weights; over {facts.tokens} greedy tokens", end=" ")
    print(f"the draft agrees in {facts.agreement:.2f}, {facts.distinct:.2f} are different")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
