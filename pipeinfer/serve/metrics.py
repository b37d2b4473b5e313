"""Counters for Prometheus under vLLM's names, in its text format (version 0.0.4).

The writer is our own: three kinds of metrics with one label need no library, and the prometheus_client package would
bring a registry for the whole process that two servers in one process would share."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeinfer.serve.served import Served, steps_of

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# The bounds of vLLM's histograms, so that dashboards made for them fit: seconds, and tokens.
FIRST_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
WHOLE_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
TOKENS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))
REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}


class Histogram:
    """Counts of observations up to each of ``bounds`` and above, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Suffix of the name, further labels, value."""
        total = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            yield "_bucket", {"le": "+Inf" if bound == float("inf") else repr(bound)}, total
        yield "_sum", {}, self.sum
        yield "_count", {}, total


@dataclass(slots=True)
class Totals:
    """Counts of all requests together."""

    prompt_tokens: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0


class Metrics:
    """What the server has counted for ``model``, since its start."""

    def __init__(self, model: str) -> None:
        self._labels = {"model_name": model}
        self.ended = Totals()
        self._reasons = dict.fromkeys(REASONS.values(), 0)
        self._first, self._gap, self._token = Histogram(FIRST_S), Histogram(TOKEN_S), Histogram(TOKEN_S)
        self._whole, self._prompt, self._new = Histogram(WHOLE_S), Histogram(TOKENS), Histogram(TOKENS)

    def finish(self, served: Served) -> None:
        """Count a request that is over, or that nobody wants any more."""
        completion, ended = served.completion, self.ended
        ended.prompt_tokens += len(completion.prompt_tokens)
        ended.tokens += len(completion.tokens)
        reason = REASONS.get(completion.finish_reason, "abort")
        self._reasons[reason] += 1
        if served.stats is not None:
            ended.drafted += served.stats.drafted
            ended.accepted += served.stats.accepted
            ended.steps += sum(steps_of(served.stats))
        for gap_s in served.gaps_s:
            self._gap.observe(gap_s)
        if completion.metrics:
            self._first.observe(1e-3 * completion.metrics["ttft_ms"])
        if completion.metrics and reason in ("stop", "length"):
            self._token.observe(1e-3 * completion.metrics["tpot_ms"])
            self._whole.observe(1e-3 * completion.metrics["e2el_ms"])
            self._prompt.observe(len(completion.prompt_tokens))
            self._new.observe(len(completion.tokens))

    def totals(self, served: Iterable[Served]) -> Totals:
        """The counts with those of requests that are still ``served``."""
        ended = self.ended
        found = Totals(ended.prompt_tokens, ended.tokens, ended.drafted, ended.accepted, ended.steps)
        for one in served:
            found.prompt_tokens += len(one.completion.prompt_tokens)
            found.tokens += len(one.completion.tokens)
        return found

    def text(self, served: Iterable[Served], running: int, waiting: int, kv_usage: float) -> str:
        """All metrics."""
        totals, lines = self.totals(served), Lines(self._labels)
        lines.gauge("num_requests_running", "Requests that are being decoded.", running)
        lines.gauge("num_requests_waiting", "Requests that wait to be decoded.", waiting)
        lines.gauge("kv_cache_usage_perc", "KV slots in use by requests that are decoded; 1 is all.", kv_usage)
        lines.counter("prompt_tokens_total", "Tokens of prompts.", totals.prompt_tokens)
        lines.counter("generation_tokens_total", "Tokens of answers.", totals.tokens)
        reasons = [({"finished_reason": name}, count) for name, count in self._reasons.items()]
        lines.counters("request_success_total", "Requests that have ended, by the reason.", reasons)
        lines.counter("spec_decode_num_drafts_total", "Corrections after drafted tokens.", totals.steps)
        lines.counter("spec_decode_num_draft_tokens_total", "Drafted tokens sent to the target.", totals.drafted)
        lines.counter("spec_decode_num_accepted_tokens_total", "Drafted tokens that were emitted.", totals.accepted)
        lines.histogram("time_to_first_token_seconds", "From a request to its first token.", self._first)
        lines.histogram("inter_token_latency_seconds", "Between emissions of one request.", self._gap)
        lines.histogram("request_time_per_output_token_seconds", "Mean time of a request's tokens.", self._token)
        lines.histogram("e2e_request_latency_seconds", "From a request to its last token.", self._whole)
        lines.histogram("request_prompt_tokens", "Tokens of a prompt.", self._prompt)
        lines.histogram("request_generation_tokens", "Tokens of an answer.", self._new)
        return str(lines)


class Lines:
    """The lines of a page of metrics, each of which has ``labels``."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self._lines: list[str] = []

    def gauge(self, name: str, what: str, value: float) -> None:
        """A number that goes up and down."""
        self._family(name, "gauge", what, [("", {}, value)])

    def counter(self, name: str, what: str, value: float) -> None:
        """A number that only grows."""
        self._family(name, "counter", what, [("", {}, value)])

    def counters(self, name: str, what: str, values: Iterable[tuple[dict[str, str], float]]) -> None:
        """Several counters of one name, which labels tell apart."""
        self._family(name, "counter", what, [("", labels, value) for labels, value in values])

    def histogram(self, name: str, what: str, histogram: Histogram) -> None:
        """A histogram."""
        self._family(name, "histogram", what, histogram.samples())

    def _family(self, name: str, kind: str, what: str, samples: Iterable[tuple[str, Mapping[str, str], float]]) -> None:
        full = f"vllm:{name}"
        self._lines += [f"# HELP {full} {what}", f"# TYPE {full} {kind}"]
        for suffix, labels, value in samples:
            told = ",".join(f'{key}="{_escaped(text)}"' for key, text in {**self._labels, **labels}.items())
            self._lines.append(f"{full}{suffix}{{{told}}} {float(value)!r}")

    def __str__(self) -> str:
        return "\n".join([*self._lines, ""])


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
