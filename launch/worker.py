"""One rank of a job that spawn.py started. Rank 0 also carries words between the job and whoever started it."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import sys
from dataclasses import asdict
from typing import Any

from launch.job import Job, News
from launch.mpi import World
from pipeinfer.config import Config
from pipeinfer.ports import Request, Tally
from pipeinfer.preflight import clear


def main(path: str, words: str) -> None:
    """``path``: the socket of whoever started us. ``words``: the job's Config as JSON."""
    world = World()
    try:
        play(world, path, Config(**json.loads(words)))
    except BaseException as error:
        world.fail(error)
    world.close()


def play(world: World, path: str, config: Config) -> None:
    """Load this rank's share and work until the job is over."""
    import torch

    from stages.pair import CheckpointPair

    torch.set_num_threads(world.threads)
    cleared = clear(config, world.size)
    pair = CheckpointPair(cleared.target, cleared.draft, config.dtype)
    job = Job(config, cleared.plan, cleared.context, pair, world)
    if not world.is_head:
        job.serve()
        return
    with contextlib.suppress(ConnectionError):  # whoever started us may end before we do
        talk(job, path)
    job.close()


def talk(job: Job, path: str) -> None:
    """Serve requests from the socket at ``path`` until its other end is closed."""
    wire = socket.socket(socket.AF_UNIX)
    wire.connect(path)
    with wire, wire.makefile("rw", encoding="utf-8", newline="\n") as stream:

        def say(words: dict[str, Any]) -> None:
            print(json.dumps(words), file=stream, flush=True)

        say({"ranks": job.ranks})
        for line in stream:
            asked = json.loads(line)
            if not asked:
                continue  # a request was withdrawn, and had ended by itself
            request = Request(tuple(asked["prompt"]), asked["max_new_tokens"], frozenset(asked["stop"]))
            answer = job.submit(request)
            for news in answer:
                say(asdict(news))
                if not news.tally and select.select([wire], [], [], 0)[0]:
                    answer.close()  # a word in between: the request is withdrawn
                    say(asdict(News(news.at_s, reason="withdrawn", tally=Tally())))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
