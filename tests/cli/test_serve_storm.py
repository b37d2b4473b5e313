"""Many clients at once, a part of them bad; see serve_storm.py."""

from __future__ import annotations

import random

import pytest

from tests.cli.serve_storm import run


@pytest.mark.slow
def test_bad_clients_do_not_touch_the_others() -> None:
    seed = random.randrange(2**32)
    problems = run(requests=160, clients=16, distinct=12, seed=seed, ranks=2)
    assert not problems, "\n".join(problems)
