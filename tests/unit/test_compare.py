"""Comparing: what is the same is not called different, what is different is, and few samples prove nothing."""

from __future__ import annotations

import random

from benchmarks.compare import compare


def noisy(middle: float, count: int, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [middle * rng.uniform(0.97, 1.03) for _ in range(count)]


def words(old: dict[str, list[float]], new: dict[str, list[float]]) -> list[str]:
    return [verdict.label for verdict in compare(old, new).values()]


def test_a_tenth_faster_or_slower_is_seen() -> None:
    old = {"a": noisy(100, 12, 1), "b": noisy(100, 12, 2), "c": noisy(100, 12, 3)}
    new = {"a": noisy(110, 12, 4), "b": noisy(90, 12, 5), "c": noisy(100, 12, 6), "d": [1.0]}
    assert words(old, new) == ["faster", "slower", "no difference shown"]
    verdict = compare(old, new)["a"]
    assert verdict.low < verdict.ratio < verdict.high
    assert 1.05 < verdict.low < verdict.high < 1.15


def test_equal_noise_is_hardly_ever_called_a_difference() -> None:
    old = {str(seed): noisy(100, 10, seed) for seed in range(200)}
    new = {str(seed): noisy(100, 10, 1000 + seed) for seed in range(200)}
    assert sum(label != "no difference shown" for label in words(old, new)) <= 2


def test_three_samples_prove_nothing() -> None:
    assert words({"a": [1.0, 1.1, 1.2]}, {"a": [2.0, 2.1, 2.2]}) == ["no difference shown"]
    assert words({"a": [1.0]}, {"a": [2.0]}) == ["no difference shown"]
