"""Random models with quantised weights for kernel_bits: the same bits for a row alone and in every company.

Each kind of matrix of a world has a format of its own, or stays as it is; activations are floats or bytes.

``python -m tests.models.quantized_worlds --worlds 200 --seed 1`` looks through two hundred worlds; with ``--groups`` on
groups of ranks."""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from stages.checkpoint.checkpoint import EMBEDDING, HEAD
from stages.checkpoint.spec import ModelSpec
from stages.kernels.library import library
from stages.quantization.matrix import Matrix, QuantizedMatrix
from tests.models.expert_bits import ExpertWeights, draw_expert_world
from tests.models.grouped import check_groups
from tests.models.kernel_bits import World, check_world, draw_world
from tests.models.quantized_matrices import FORMATS

PLAIN = "plain"
ENDS = (EMBEDDING, HEAD)


class QuantizedWeights(ExpertWeights):
    """``formats``: of each kind of matrix, by the last part of its name, one of FORMATS or PLAIN."""

    def __init__(self, spec: ModelSpec, seed: int, bad: int | None, formats: Mapping[str, str], router: str) -> None:
        super().__init__(spec, seed, bad, router)
        self.formats = formats

    def matrices(self, names: Iterable[str], dtype: torch.dtype, slices: Any = None) -> dict[str, Matrix]:
        found: dict[str, Matrix] = {}
        for name in names:
            form = self.formats.get(name.rsplit(".", 2)[1], PLAIN)
            if form == PLAIN:
                found |= self.read([name], dtype, slices)
            else:
                part = slices[name] if slices else ()
                found[name] = self._quantized(name, form)[part + (slice(None),) * (2 - len(part))]
        return found

    def _quantized(self, name: str, form: str) -> QuantizedMatrix:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6]))
        outputs, inputs = self.shapes[name]
        made: QuantizedMatrix = FORMATS[form](generator, outputs, inputs)
        size = 1.5 if name == EMBEDDING else 2.5 * inputs**-0.5
        numbers = made.dense().abs().mean().item()
        scales, minima = made.scales.float() * (size / (2 * numbers)), made.minima
        if minima is not None:
            minima = (minima.float() * (size / (2 * numbers))).to(minima.dtype)
        if name == EMBEDDING and self.bad is not None:
            scales[self.bad] = (torch.nan, torch.inf)[self.seed % 2]
        return replace(made, scales=scales.to(made.scales.dtype), minima=minima)


def draw_quantized_world(seed: int) -> World:
    """A world of kernel_bits, of expert_bits now and then, with quantised weights."""
    dice = random.Random(f"quantized {seed}")
    world = draw_expert_world(seed) if dice.random() < 0.2 else draw_world(seed, long_texts=False)
    names = (*FORMATS, PLAIN)
    of_all = dice.choice(names) if dice.random() < 0.5 else None
    kinds = {name.rsplit(".", 2)[1] for name in world.weights.shapes if len(world.weights.shapes[name]) == 2}
    formats = {kind: of_all or dice.choice(names) for kind in sorted(kinds)}
    if dice.random() < 0.7:  # as files have it: queries and keys, gate and up alike
        formats |= {"k_proj": formats["q_proj"], "up_proj": formats.get("gate_proj", PLAIN)}
    router = world.weights.router if isinstance(world.weights, ExpertWeights) else "random"
    world.weights = QuantizedWeights(world.spec, seed, world.weights.bad, formats, router)
    world.arithmetic = dice.choice(("fp32", "int8"))
    return world


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worlds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--groups", action="store_true")
    args, lib, groups = parser.parse_args(), library(), 0
    assert lib is not None
    torch.set_num_threads(1)
    for seed in range(args.seed * 1000, args.seed * 1000 + args.worlds):
        if args.groups:
            groups += check_groups(seed, lib, world=draw_quantized_world(seed))
        else:
            check_world(seed, 6, draw=draw_quantized_world)
    print(f"{args.worlds} worlds{f' on {groups} groups' if args.groups else ''}: all bits are equal")


if __name__ == "__main__":
    main()
