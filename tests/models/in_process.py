"""Real shards under the simulator's clock: a whole job of real models in one process, and plain decoding beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeinfer.core.ports import Request, SampledToken
from pipeinfer.sim.world import Answer, World, WorldSpec
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import Placement
from stages.checkpoint.checkpoint import Checkpoint
from stages.checkpoint.spec import ModelSpec
from stages.models.generic_spec import GenericSpec
from stages.models.grammar import Grammars
from stages.models.pair import CheckpointPair
from tests.models.walk import compute, make_batch

POLICIES = {
    "continuous": Policy("test", max_rows=6, topk=3, draft_batch=3, max_ahead=18),
    "rounds": Policy("test", schedule="rounds", num_steps=3, max_rows=8, topk=3, draft_batch=3, max_ahead=12),
    "pipeinfer": Policy("test", schedule="pipeinfer", max_rows=3, max_ahead=12, p_accept=0.1, p_recovery=0.2),
    "plain": Policy("plain", speculate=False),
}


def pair_of(
    target: Path, draft: Path, dtype: str = "fp32", is_generic: bool = False, grammars: Grammars | None = None
) -> CheckpointPair:
    """The two models, by the Llama family's shard or by the one for any architecture."""
    read: Callable[[Path], Any] = GenericSpec.read if is_generic else ModelSpec.read
    models = [(read(folder), Checkpoint(folder)) for folder in (target, draft)]
    return CheckpointPair(models[0], models[1:], dtype, grammars=grammars)


def decode(
    pair: CheckpointPair, policy: Policy, requests: Sequence[Request], stages: int = 2, placement: Placement = "spread"
) -> list[Answer]:
    """What a job of ``stages`` stages and a drafter answers."""
    spec = WorldSpec(
        1, policy, stages, tuple(requests), context=224, placement=placement, draft_contexts=pair.draft_contexts
    )
    return World(spec, pair=_PacedPair(pair)).run()


class _PacedPair:
    """``pair`` with shards whose every step takes a tenth of a second of the simulator's time."""

    def __init__(self, pair: CheckpointPair) -> None:
        self._pair = pair

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pair, name)

    def stage(self, layers: range, capacity: int) -> Any:
        return _Paced(self._pair.stage(layers, capacity))

    def draft(self, index: int, capacity: int) -> Any:
        return _Paced(self._pair.draft(index, capacity))


class _Paced:
    """``shard``, whose every step takes a tenth of a second of the simulator's time."""

    def __init__(self, shard: Any) -> None:
        self._shard = shard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shard, name)

    def forward(self, batch: Any, hidden: Any) -> Any:
        steps = self._shard.forward(batch, hidden)
        try:
            while True:
                next(steps)
                yield 0.1
        except StopIteration as done:
            return done.value
        finally:
            steps.close()


def plain(pair: CheckpointPair, prompt: Sequence[int], count: int) -> tuple[list[int], int | None]:
    """Plain greedy decoding, token by token, up to the first row that is not finite: the tokens, and its layer."""
    shard, tokens, choices = (
        pair.stage(range(pair.layers), len(prompt) + count),
        list(prompt),
        list[list[SampledToken]](),
    )
    for position in range(len(prompt) + count - 1):
        batch = make_batch([tokens[position]], [position], [position], [set(range(position))])
        hidden = compute([shard], batch)  # type: ignore[list-item]
        is_wanted = position >= len(prompt) - 1
        choices = shard.sample(hidden, [0] if is_wanted else [], 1)
        if shard.faults:
            return tokens[len(prompt) :], shard.faults[0]
        if is_wanted:
            tokens.append(choices[0][0][0])
    return tokens[len(prompt) :], None


def damage(folder: Path, name: str, place: Any, value: float) -> None:
    """Set a part of the tensor ``name`` of the checkpoint in ``folder``."""
    for path in folder.glob("*.safetensors"):
        tensors: dict[str, torch.Tensor] = load_file(path)
        if name in tensors:
            tensors[name][place] = value
            save_file(tensors, path, {"format": "pt"})
            return
    raise KeyError(name)
