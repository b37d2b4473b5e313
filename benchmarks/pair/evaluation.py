"""Evaluation: losses on held-out text, and how often the draft foresees the target's choice."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.pair.corpus import Corpus, byte_count, encode
from benchmarks.pair.plan import Plan

# A prompt should not end with a line break: a break and the indentation behind it are one token.
SAMPLE_PROMPTS = (
    'def count_words(text):\n    """Return how often each word occurs in text."""',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):",
    "import argparse\nimport sys\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
)


@dataclass
class Scores:
    """What was found; two numbers are the target's and the draft's.

    ``ranks[k]`` is the share of tokens where the target's first choice is the draft's k-th, counted from 0.
    """

    losses: list[float]
    bits: list[float]
    accuracies: list[float]
    ranks: list[float]
    greedy_ranks: list[float]
    greedy_run: float
    samples: list[tuple[str, str]]


def ranks_of(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Count, for each position, how many tokens the logits put above the chosen one."""
    return (logits > logits.gather(-1, chosen.unsqueeze(-1))).sum(dim=-1)


def rank_shares(ranks: torch.Tensor) -> list[float]:
    """Turn ranks into the shares of the first eight."""
    return [float((ranks == place).float().mean()) for place in range(8)]


def forced_scores(
    target: Any, draft: Any, documents: list[torch.Tensor], context: int
) -> tuple[list[float], list[int], torch.Tensor]:
    """Both models' summed losses and right choices, and the ranks, with the held-out text itself as input."""
    losses, hits, ranks = [0.0, 0.0], [0, 0], []
    for document in documents:
        for start in range(0, len(document) - 1, context):
            piece = document[start : start + context + 1].to(target.device)
            inputs, labels = piece[:-1].unsqueeze(0), piece[1:]
            pair = [model(input_ids=inputs, use_cache=False).logits[0] for model in (target, draft)]
            for index, logits in enumerate(pair):
                losses[index] += float(F.cross_entropy(logits, labels, reduction="sum"))
                hits[index] += int((logits.argmax(dim=-1) == labels).sum())
            ranks.append(ranks_of(pair[1], pair[0].argmax(dim=-1)).cpu())
    return losses, hits, torch.cat(ranks)


def greedy_prompts(documents: list[torch.Tensor], plan: Plan, seed: int) -> torch.Tensor:
    """Cut prompts of equal length from the held-out documents, spread over all of them."""
    rng = random.Random(seed)
    usable = [document for document in documents if len(document) > plan.prompt_tokens]
    rows = []
    for index in range(plan.prompts):
        document = usable[index % len(usable)]
        start = rng.randrange(len(document) - plan.prompt_tokens)
        rows.append(document[start : start + plan.prompt_tokens])
    return torch.stack(rows)


def continue_greedily(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Append the model's first choice again and again, with its key-value cache; never stop early."""
    cache, step = None, ids
    for _ in range(new_tokens):
        result = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        step = result.logits[:, -1:].argmax(dim=-1)
        ids = torch.cat([ids, step], dim=1)
    return ids


@torch.no_grad()
def evaluate(target: Any, draft: Any, tokenizer: Any, corpus: Corpus, plan: Plan, seed: int) -> Scores:
    """Measure the stored pair on the held-out modules."""
    documents = encode(tokenizer, corpus.held_out)
    losses, hits, ranks = forced_scores(target, draft, documents, plan.context)
    prompts = greedy_prompts(documents, plan, seed).to(target.device)
    whole = continue_greedily(target, prompts, plan.new_tokens)
    logits = draft(input_ids=whole[:, :-1], use_cache=False).logits[:, plan.prompt_tokens - 1 :]
    greedy = ranks_of(logits, whole[:, plan.prompt_tokens :]).cpu()
    misses = int((greedy > 0).sum())
    samples = []
    for text in SAMPLE_PROMPTS:
        ids = tokenizer(text, return_tensors="pt").input_ids.to(target.device)
        full = continue_greedily(target, ids, plan.new_tokens)
        samples.append((text, str(tokenizer.decode(full[0, ids.shape[1] :]))))
    return Scores(
        losses=[loss / len(ranks) for loss in losses],
        bits=[loss / math.log(2) / byte_count(corpus.held_out) for loss in losses],
        accuracies=[count / len(ranks) for count in hits],
        ranks=rank_shares(ranks),
        greedy_ranks=rank_shares(greedy),
        greedy_run=(greedy.numel() - misses) / max(misses, 1),
        samples=samples,
    )
