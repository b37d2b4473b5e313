"""Decode requests by many engines, one after the other on parts of one MPI job; rank 0 writes down what they said.
Started by tests/mpi/matrix.py.

Argument: a JSON file with ``tasks``, a list of ``ranks`` (the first ones of the job), ``engine`` (keywords of Engine)
and ``requests`` (keywords of its ``generate``); and ``answers``, the file to write: a line of JSON for each task.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from mpi4py import MPI

from launch.backoff import LONGEST_S
from launch.mpi import politely
from pipeinfer import Engine, Sampling


def main(path: str) -> None:
    order = json.loads(Path(path).read_text())
    world = MPI.COMM_WORLD
    for task in order["tasks"]:
        part = world.Split(0 if world.rank < task["ranks"] else MPI.UNDEFINED)
        if part != MPI.COMM_NULL:
            said = decode(part, task["engine"], task["requests"])
            if said is not None:
                with Path(order["answers"]).open("a") as file:
                    file.write(json.dumps(said) + "\n")
            part.Free()
        politely(world.Ibarrier(), long_s=LONGEST_S)


def decode(comm: Any, words: dict[str, Any], requests: list[dict[str, Any]]) -> dict[str, Any] | None:
    """On the head of ``comm``: each request's tokens with their log-probabilities, and what they cost together."""
    with Engine(**words, comm=comm, timeout_s=300.0) as engine:
        if engine is None:
            return None
        done = [engine.generate(**request | {"sampling": Sampling(**request["sampling"])}) for request in requests]
    measured = [answer.metrics for answer in done if answer.tokens]
    costs = {name: sum(metrics[name] for metrics in measured) for name in ("runs", "cancelled_runs")}
    lengths = [metrics["accept_length"] for metrics in measured]
    texts = ("tokens", "logprobs", "top_logprobs", "prompt_logprobs", "prompt_top_logprobs")
    said = {name: [getattr(answer, name) for answer in done] for name in texts}
    return {**said, **costs, "accept_length": sum(lengths) / max(1, len(lengths))}


if __name__ == "__main__":
    main(sys.argv[1])
    gc.freeze()  # or Python looks through all of torch for garbage before it ends
