"""Run clients that others wrote against a server, in order, with one verdict a line. README.md has the commands.

python benchmarks/clients/run.py --url URL --tokenizer DIR/target [--plain-url URL] [--venvs DIR] [--only NAME,...]

The exit code is 1 if a verdict is bad. What is not installed is not run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MOST_S = 900
REFUSED = {"chat-tool-calling", "chat-image-input", "chat-error-handling"}
"""Tests of llm-comply that the server does not pass: it has neither tools nor images, and `model` may be absent."""
TASKS = {"pipeinfer_lines": "exact_match", "pipeinfer_choices": "acc"}
"""Our tasks for lm-eval, and their metrics."""
Verdict = tuple[bool, str]


class Clients:
    """The clients, one method each. ``args``: the command line; ``out``: where logs and results go."""

    def __init__(self, args: argparse.Namespace, out: Path) -> None:
        self.url, self.plain_url, self.tokenizer = args.url, args.plain_url, args.tokenizer
        self.venvs, self.model, self.out = args.venvs, args.model, out

    def openai(self) -> Verdict:
        done = self.ran("openai", "python", str(HERE / "openai_client.py"), self.url, "--model", self.model)
        return done.returncode == 0, done.stdout.splitlines()[-1] if done.stdout else "see its log"

    def llm_comply(self) -> Verdict:
        options = ["--format", "openai-chat", "-u", f"{self.url}/v1", "-k", "none", "-m", self.model, "--json"]
        told = json.loads(self.ran("llm-comply", "llm-comply", *options).stdout)
        failed = {test["id"] for test in told["results"] if test["status"] == "failed"}
        summary = told["summary"]
        numbers = ", ".join(f"{summary[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
        return failed <= REFUSED, f"{numbers}; failed: {', '.join(sorted(failed)) or 'none'}"

    def lm_eval(self) -> Verdict:
        urls = {"url": self.url} | ({"plain-url": self.plain_url} if self.plain_url else {})
        scores, texts = zip(*(self._evaluated(name, url) for name, url in urls.items()), strict=True)
        told = ", ".join(f"--{name}: {score}" for name, score in zip(urls, scores, strict=True))
        is_equal = all(one == texts[0] for one in texts)
        remark = f"; {len(texts[0])} answers {'equal' if is_equal else 'DIFFER'}" if len(texts) > 1 else ""
        return is_equal, f"{told}{remark}"

    def _evaluated(self, name: str, url: str) -> tuple[str, list[Any]]:
        """The scores and the answers of our tasks; those of the second one are log-probabilities."""
        out = self.out / f"lm-eval-{name}"
        numbers = f"tokenizer={self.tokenizer},num_concurrent=8,max_retries=1"
        done = self.ran(
            "lm-eval", "lm_eval", "--model", "local-completions",
            "--model_args", f"model={self.model},base_url={url}/v1/completions,{numbers}",
            "--include_path", str(HERE / "lm_eval"), "--tasks", ",".join(TASKS),
            "--output_path", str(out), "--log_samples",
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"lm_eval ended with {done.returncode}")
        results = json.loads(newest(out, "results_*.json").read_text())["results"]
        answers = list[Any]()
        for task in TASKS:
            samples = map(json.loads, newest(out, f"samples_{task}_*.jsonl").read_text().splitlines())
            answers += sorted((sample["doc_id"], sample["resps"]) for sample in samples)
        return ", ".join(f"{metric} {results[task][f'{metric},none']}" for task, metric in TASKS.items()), answers

    def guidellm(self) -> Verdict:
        out = self.out / "guidellm.json"
        done = self.ran(
            "guidellm", "guidellm", "run",
            "--backend", f"kind=openai_http,target={self.url},model={self.model},request_format=/v1/completions",
            "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=20",
            "--tokenizer", f"kind=huggingface_auto,model={self.tokenizer}",
            "--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=32",
            "--output", f"kind=json,path={out}", "--disable-console-interactive",
        )  # fmt: skip
        benchmark = json.loads(out.read_text())["benchmarks"][0]
        totals, requests = benchmark["metrics"]["request_totals"], benchmark["requests"]["successful"]
        told = sum(bool((one["response_metrics"] or {}).get("speculative_decoding")) for one in requests)
        line = f"{totals['successful']} successful, {totals['errored']} errored; speculation told by {told} of them"
        return done.returncode == 0 and totals["successful"] == totals["total"] > 0, line

    def aiperf(self) -> Verdict:
        out = self.out / "aiperf"
        done = self.ran(
            "aiperf", "aiperf", "profile", "--model", self.model, "--url", self.url,
            "--endpoint-type", "completions", "--streaming", "--tokenizer", self.tokenizer, "--concurrency", "4",
            "--request-count", "20", "--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "32",
            "--extra-inputs", "ignore_eos:true", "--ui-type", "none", "--output-artifact-dir", str(out),
        )  # fmt: skip
        told = json.loads((out / "profile_export_aiperf.json").read_text())
        requests, errors = told["request_count"]["avg"], told.get("error_summary") or []
        length = told.get("spec_decode_acceptance_length")
        speculation = f"acceptance length {length['avg']:.2f}" if length else "no speculation section"
        return (
            done.returncode == 0 and not errors,
            f"{requests:g} requests, {len(errors)} kinds of errors; {speculation}",
        )

    def schemathesis(self) -> Verdict:
        options = ["-n", "60", "--seed", "1", "--continue-on-failure", "--no-color"]
        done = self.ran("schemathesis", "schemathesis", "run", f"{self.url}/openapi.json", *options)
        lines = [line.strip(" =") for line in done.stdout.splitlines() if "generated" in line or " in " in line]
        return done.returncode == 0, "; ".join(lines[-2:])

    def ran(self, package: str, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``program`` of a ``package``, after its end; its output is also in a log. Raises FileNotFoundError."""
        more = {"PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "benchmarks.clients.schemathesis_hooks"}
        environment = os.environ | (more if package == "schemathesis" else {})
        command = [self.found(package, program), *arguments]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=MOST_S)
        (self.out / f"{package}.log").write_text(done.stdout + done.stderr)
        return done

    def found(self, package: str, program: str) -> str:
        """The path of ``program``."""
        own = None if self.venvs is None else shutil.which(program, path=str(self.venvs / package / "bin"))
        if path := own or (None if program == "python" else shutil.which(program)):
            return path
        raise FileNotFoundError(f"not installed (pip install {package})")


def newest(folder: Path, pattern: str) -> Path:
    """The newest file of that name below ``folder``."""
    return max(folder.rglob(pattern), key=lambda path: path.stat().st_mtime)


def verdict(client: Callable[[], Verdict]) -> Verdict | None:
    """What ``client`` says; None: it is not installed."""
    try:
        return client()
    except FileNotFoundError as error:
        if "not installed" in str(error):
            return None
        return False, f"it wrote no results ({error.filename}); see its log"
    except (RuntimeError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        return False, f"{type(error).__name__}: {error}; see its log"


def main() -> int:
    parser = argparse.ArgumentParser(description="Run clients that others wrote against a server.")
    parser.add_argument("--url", required=True, help="http://HOST:PORT of the server")
    parser.add_argument("--plain-url", help="a server without speculation, whose answers lm-eval compares")
    parser.add_argument("--tokenizer", required=True, help="the target's directory, for guidellm and aiperf")
    parser.add_argument("--model", default="builtin", help="the model's id (default: builtin)")
    parser.add_argument("--venvs", type=Path, help="directory with an environment for each package, under its name")
    parser.add_argument("--out", type=Path, help="directory for logs (default: a new temporary one)")
    parser.add_argument("--only", help="names of clients, separated by commas")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="pipeinfer-clients-"))
    out.mkdir(parents=True, exist_ok=True)
    clients = Clients(args, out)
    runs = {
        "openai": clients.openai, "llm-comply": clients.llm_comply, "lm-eval": clients.lm_eval,
        "guidellm": clients.guidellm, "aiperf": clients.aiperf, "schemathesis": clients.schemathesis,
    }  # fmt: skip
    wanted = re.split(r",\s*", args.only) if args.only else list(runs)
    print(f"# logs: {out}", flush=True)
    is_bad = False
    for name in wanted:
        found = verdict(runs[name])
        is_bad |= found is not None and not found[0]
        word = "not installed" if found is None else "ok" if found[0] else "BAD"
        print(f"{name:<13}{word}{'' if found is None else ': ' + found[1]}", flush=True)
    return 1 if is_bad else 0


if __name__ == "__main__":
    sys.exit(main())
