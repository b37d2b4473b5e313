"""One rank of a job that spawn.py started. Rank 0 also carries words between the job and whoever started it."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from dataclasses import asdict

from launch.job import Job
from launch.lines import Lines
from launch.mpi import World
from pipeinfer.config import Config
from pipeinfer.ports import Request, Sampling
from pipeinfer.preflight import clear


def main(path: str, words: str) -> None:
    """``path``: the socket of whoever started us. ``words``: the job's Config as JSON."""
    world = World()
    try:
        play(world, path, Config.of(json.loads(words)))
    except BaseException as error:
        world.fail(error)
    world.close()


def play(world: World, path: str, config: Config) -> None:
    """Load this rank's share and work until the job is over."""
    import torch

    from stages.pair import CheckpointPair

    torch.set_num_threads(world.threads)
    cleared = clear(config, world.size)
    pair = CheckpointPair(cleared.target, cleared.drafts, config.dtype, config.forced_acceptance)
    job = Job(config, cleared.plan, cleared.context, pair, world)
    if not world.is_head:
        job.serve()
        return
    with contextlib.suppress(ConnectionError):  # whoever started us may end before we do
        talk(job, path)
    job.close()


def talk(job: Job, path: str) -> None:
    """Serve requests from the socket at ``path`` until its other end is closed."""
    with socket.socket(socket.AF_UNIX) as wire:
        wire.connect(path)
        lines = Lines(wire)
        lines.say({"ranks": job.ranks})
        while (asked := lines.hear()) is not None:
            if not asked:
                continue  # a request was withdrawn, and has ended
            stop_tokens, sampling = frozenset(asked["stop"]), Sampling(**asked["sampling"])
            request = Request(tuple(asked["prompt"]), asked["max_new_tokens"], stop_tokens, sampling)
            with contextlib.closing(job.submit(request)) as answer:
                for news in answer:
                    lines.say(asdict(news))
                    if news.tally is None and lines.is_spoken_to:
                        job.withdraw()  # there is nothing else that could be said now


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
