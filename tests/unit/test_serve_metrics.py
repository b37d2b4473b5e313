"""/metrics, as Prometheus reads it."""

from __future__ import annotations

import re

from pipeinfer.core.config import Config
from pipeinfer.serve.metrics import Histogram, Lines
from pipeinfer.serve.served import Served
from pipeinfer.serve.server import Server
from tests.unit.scripted_engine import HANG_S, Scripted, asked, completed, counted, is_watched, served, stream

SAMPLE = re.compile(r'([a-z0-9_:]+)\{((?:[a-z_]+="(?:[^"\\]|\\.)*",?)*)\} (\S+)')


def samples(server: Server) -> dict[str, float]:
    """The samples by name and labels beside the model's. Each family has its kind and a sentence first."""
    with asked(server, "/metrics") as response:
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        lines = response.read().decode().splitlines()
    found: dict[str, float] = {}
    family = ""
    for line in lines:
        if line.startswith("#"):
            family = line.split()[2]
            continue
        match = SAMPLE.fullmatch(line)
        assert match is not None, line
        name, labels, value = match.groups()
        assert name.startswith(family)
        labels = labels.removeprefix('model_name="mine"').removeprefix(",")
        assert (name + labels) not in found
        found[name.removeprefix("vllm:") + labels] = float(value)
    return found


def test_counts_grow_while_requests_are_decoded() -> None:
    engine = Scripted()
    with served(engine, max_queue=3) as server:
        with stream(server, prompt="xyz"), stream(server, prompt="x"):
            now = samples(server)
            assert (now["num_requests_running"], now["num_requests_waiting"]) == (1, 1)
            assert (now["prompt_tokens_total"], now["generation_tokens_total"]) == (4, 4)
            assert now["time_to_first_token_seconds_count"] == 0
            assert now["kv_cache_usage_perc"] == 0.25
        for _ in range(2):
            assert engine.cancelled.acquire(timeout=HANG_S)
        while server._front.is_busy:
            asked(server, "/health").close()
        now = samples(server)
    assert (now["num_requests_running"], now["num_requests_waiting"]) == (0, 0)
    assert (now["prompt_tokens_total"], now["generation_tokens_total"]) == (4, 4)
    assert now['request_success_totalfinished_reason="abort"'] == 2
    assert now["e2e_request_latency_seconds_count"] == 0
    assert now["kv_cache_usage_perc"] == 0, "nothing is decoded"


def test_several_requests_are_decoded_at_once() -> None:
    class Full(Scripted):
        config = Config(max_num_seqs=8)

    with served(Full(), max_queue=3) as server, stream(server), stream(server):
        now = samples(server)
        assert (now["num_requests_running"], now["num_requests_waiting"]) == (2, 0)


def test_requests_that_have_ended() -> None:
    with served(Scripted(is_brief=True)) as server:
        completed(server, prompt="x")
        completed(server, prompt="x", n=2)  # one sequence
        now = samples(server)
    assert now['request_success_totalfinished_reason="length"'] == 2
    for name in ("time_to_first_token", "e2e_request_latency", "request_time_per_output_token"):
        assert now[f"{name}_seconds_count"] == 2
    assert now["time_to_first_token_seconds_sum"] == 2.0
    assert now['time_to_first_token_seconds_bucketle="0.75"'] == 0
    assert now['time_to_first_token_seconds_bucketle="1.0"'] == 2
    assert now['time_to_first_token_seconds_bucketle="+Inf"'] == 2
    assert now["request_generation_tokens_sum"] == 4
    if is_watched():
        assert now["spec_decode_num_draft_tokens_total"] == 8
        assert now["inter_token_latency_seconds_sum"] == 1.0


def test_a_histogram_counts_up_to_each_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    found = [(suffix, labels.get("le"), value) for suffix, labels, value in histogram.samples()]
    assert found == [
        ("_bucket", "1.0", 2), ("_bucket", "2.0", 3), ("_bucket", "+Inf", 4), ("_sum", None, 12.0), ("_count", None, 4),
    ]  # fmt: skip


def test_labels_are_escaped() -> None:
    lines = Lines({"model_name": 'a"b\\c\nd'})
    lines.gauge("x", "what", 1)
    assert str(lines).splitlines()[-1] == r'vllm:x{model_name="a\"b\\c\nd"} 1.0'


def test_speculation_is_counted_at_the_end() -> None:
    found = Served(range(1))
    found.stats = counted(5, 2, 3, [0, 2])
    with served(Scripted(is_brief=True)) as server:
        found.handle = Scripted(is_brief=True).submit([120], 2, False, Scripted.sampling)
        server._front.metrics.finish(found)
        now = samples(server)
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    assert [now[f"spec_decode_{name}_total"] for name in names] == [2, 5, 2]
