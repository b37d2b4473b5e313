"""Decode the same prompts on parts of one MPI job; its rank 0 writes all tokens as JSON. Started by
test_same_tokens.py.

Argument: a JSON file with ``models`` {name: [target, draft]}, ``prompts`` {name: [[token, ...], ...]}, ``sizes``,
``new_tokens``, ``answers`` (the file to write).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mpi4py import MPI

from launch.mpi import politely
from pipeinfer import Engine


def main(path: str) -> None:
    order = json.loads(Path(path).read_text())
    world = MPI.COMM_WORLD
    answers: dict[str, list[list[int]]] = {}
    for name, (target, draft) in order["models"].items():
        runs = [(size, "continuous") for size in order["sizes"]] + [(max(order["sizes"]), "plain")]
        for size, policy in runs:
            part = world.Split(0 if world.rank < size else MPI.UNDEFINED)
            if part != MPI.COMM_NULL:
                found = decode(part, target, draft, policy, order["prompts"][name], order["new_tokens"])
                if found:
                    answers[f"{name} {policy} {size}"] = found
                part.Free()
            politely(world.Ibarrier())
    if answers:
        Path(order["answers"]).write_text(json.dumps(answers))


def decode(comm: Any, target: str, draft: str, policy: str, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Every prompt's tokens, on the head of ``comm``."""
    with Engine(target, draft, policy=policy, comm=comm) as engine:
        if engine is None:
            return []
        return [engine.generate(prompt, count, ignore_eos=True).tokens for prompt in prompts]


if __name__ == "__main__":
    main(sys.argv[1])
