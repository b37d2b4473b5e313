"""Many requests at once on real ranks are each what they are alone; see under_load.py for more of them."""

from __future__ import annotations

import random
from functools import cache

import pytest

from pipeinfer import Engine
from pipeinfer.engine.answer import Completion
from tests.mpi.under_load import CONTEXT, Asked, alone, differences, requests, together

pytestmark = pytest.mark.slow
COUNT = 12


@cache
def reference(dtype: str) -> tuple[int, list[Asked], list[Completion]]:
    """A seed, its requests, and what they answer alone."""
    seed = random.randrange(2**32)
    asked = requests(COUNT, seed)
    return seed, asked, alone(asked, dtype)


@pytest.mark.parametrize(
    ("ranks", "policy", "dtype", "more"),
    [
        (1, "plain", "bf16", {"kv_memory": "2M"}),  # little: requests are preempted
        (1, "continuous", "bf16", {}),
        (2, "continuous", "bf16", {"tp": 2}),
        (3, "continuous", "fp32", {"drafters": 2}),
        (2, "benchmarks/baselines/sync-tree.toml", "bf16", {}),
    ],
    ids=["plain", "alone", "group", "three", "rounds"],
)
def test_each_is_what_it_is_alone(ranks: int, policy: str, dtype: str, more: dict[str, object]) -> None:
    seed, asked, wanted = reference(dtype)
    with Engine(ranks=ranks, policy=policy, dtype=dtype, context=CONTEXT, **more) as engine:  # type: ignore[arg-type]
        assert engine is not None
        found = together(engine, asked, at_once=12)
    lines = differences(asked, found, wanted)
    assert not lines, f"seed {seed}: " + "\n".join(lines)
    assert sum(one.finish_reason != "cancelled" for one in found) > COUNT // 2
