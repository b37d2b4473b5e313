"""Train pipeinfer's built-in model pair on the Python standard library's source text.

One run makes a byte-level BPE tokenizer, a target model, a draft model distilled from the target, an evaluation of
both and a model card:

    python -m benchmarks.train_pair --out pipeinfer/builtin

Progress is kept in ``--work-dir``: the same command, started again after an interruption, goes on from the last
checkpoint; delete the folder to start over. ``--smoke`` runs every stage with toy sizes in seconds, from nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks.pair.card import Facts, write_card
from benchmarks.pair.corpus import Corpus, encode, read_corpus, train_tokenizer
from benchmarks.pair.evaluation import Scores, evaluate
from benchmarks.pair.model import build_model, check_forward, load, store
from benchmarks.pair.plan import FULL_PLAN, SMOKE_PLAN, Plan
from benchmarks.pair.training import Training, distillation_loss, text_loss

LEAST_AGREEMENT = 0.6


def parse() -> argparse.Namespace:
    """Read the command line."""
    work = Path(tempfile.gettempdir()) / "pipeinfer-train-pair"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Train pipeinfer's built-in model pair.")
    parser.add_argument("--out", type=Path, required=True, help="where the pair goes")
    parser.add_argument("--work-dir", type=Path, default=work, help=f"where checkpoints go (default: {work})")
    parser.add_argument("--seed", type=int, default=20240607)
    parser.add_argument("--target-steps", type=int)
    parser.add_argument("--draft-steps", type=int)
    parser.add_argument("--device", type=torch.device, default=device, help=f"cpu or cuda (default: {device})")
    parser.add_argument("--threads", type=int, help="CPU threads (1 is best on busy cores; default: PyTorch's)")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, in seconds; without --work-dir")
    return parser.parse_args()


def fingerprint(plan: Plan, tokenizer: Any, corpus: Corpus, seed: int) -> str:
    """Name a checkpoint by what it depends on, except the step counts."""
    fixed = replace(plan, target_steps=0, draft_steps=0)
    digest = hashlib.sha256(repr((fixed, seed)).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for name in sorted(corpus.train):
        digest.update(corpus.train[name].encode())
    return digest.hexdigest()[:12]


def train_pair(plan: Plan, seed: int, device: torch.device, out: Path, work: Path) -> Scores:
    """Run every stage: tokenizer, target, draft, evaluation, card."""
    corpus = read_corpus(Path(sysconfig.get_path("stdlib")), plan.max_files)
    tokenizer = train_tokenizer(corpus.train, plan)
    documents = encode(tokenizer, corpus.train)
    tokens = sum(len(document) for document in documents)
    print(f"{len(documents)} files, {tokens} tokens, {len(corpus.held_out)} held out; on {device.type}", flush=True)
    target = build_model(plan.target, plan, seed).to(device)
    draft = build_model(plan.draft, plan, seed + 1).to(device)
    sizes = target.num_parameters(), draft.num_parameters()
    print(f"target {sizes[0]} parameters, draft {sizes[1]}, ratio {sizes[0] / sizes[1]:.2f}", flush=True)
    if sizes[1] * 6 > sizes[0]:
        raise SystemExit("the draft may have at most a sixth of the target's parameters")
    for model in (target, draft):
        check_forward(model, documents[0][None, : plan.context].to(device))
    mark = fingerprint(plan, tokenizer, corpus, seed)

    first = Training("target", target, text_loss, plan, plan.target_steps, seed, work / f"target-{mark}.pt")
    first.run(documents)
    store(target, tokenizer, out / "target")
    teacher = load(out / "target", device)
    loss = distillation_loss(teacher, plan.hard_label_weight)
    second = Training("draft", draft, loss, plan, plan.draft_steps, seed + 2, work / f"draft-{mark}.pt")
    second.run(documents)
    store(draft, tokenizer, out / "draft")

    stored_tokenizer = AutoTokenizer.from_pretrained(out / "draft", local_files_only=True)
    scores = evaluate(teacher, load(out / "draft", device), stored_tokenizer, corpus, plan, seed)
    minutes = first.seconds / 60, second.seconds / 60
    write_card(out, Facts(plan, seed, tokens, sizes, minutes, scores), corpus, device)
    print(f"agreement {scores.ranks[0]:.3f} on held-out text, {scores.greedy_ranks[0]:.3f} on greedy continuations")
    return scores


def main() -> None:
    """Train the pair."""
    options = parse()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = SMOKE_PLAN if options.smoke else FULL_PLAN
    plan = replace(
        plan,
        target_steps=options.target_steps or plan.target_steps,
        draft_steps=options.draft_steps or plan.draft_steps,
    )
    with tempfile.TemporaryDirectory() as empty:
        work = Path(empty) if options.smoke else options.work_dir
        work.mkdir(parents=True, exist_ok=True)
        scores = train_pair(plan, options.seed, options.device, options.out, work)
    if not options.smoke and scores.ranks[0] < LEAST_AGREEMENT:
        raise SystemExit(f"the agreement is below {LEAST_AGREEMENT}: train longer")


if __name__ == "__main__":
    main()
