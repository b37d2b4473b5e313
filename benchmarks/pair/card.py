"""The model card."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.pair.corpus import END_OF_TEXT, Corpus, byte_count
from benchmarks.pair.evaluation import Scores
from benchmarks.pair.plan import Plan

CARD = """\
# pipeinfer's built-in pair

Written by `benchmarks/train_pair.py`; do not edit by hand.

## The pair

Two causal language models of the Llama architecture (`LlamaForCausalLM`) with one shared byte-level BPE
tokenizer of {plan.vocab} entries. `{end_of_text}` separates documents; nothing is put before a text by
itself, and every text comes back exactly from encoding and decoding. Both models were trained from random
weights for this project.

| | target | draft |
|---|---|---|
| parameters | {parameters[0]:,} | {parameters[1]:,} |
| layers | {plan.target.layers} | {plan.draft.layers} |
| hidden size | {plan.target.hidden} | {plan.draft.hidden} |
| attention heads | {plan.target.heads} | {plan.draft.heads} |
| key-value heads | {plan.target.kv_heads} | {plan.draft.kv_heads} |
| feed-forward size | {plan.target.ffn} | {plan.draft.ffn} |
| head dimension | 32 | 32 |
| longest context | {plan.context} | {plan.context} |
| embeddings | tied | tied |
| stored weights | bf16 | bf16 |

The target is {ratio:.2f} times as large as the draft.
RoPE theta is 10000, RMSNorm epsilon 1e-5.

## Use and limits

The pair is there so that pipeinfer's commands, tests and measurements have a real target and a real
draft without a download. It continues Python text in the style of the standard library. It is not an
assistant: it follows no instructions, knows nothing but its corpus, repeats itself under greedy
decoding, writes code that mostly does not run, and may recite passages of the library. Speeds and
acceptance rates measured with it say nothing about large models.

## Data

The source text of the Python {python} standard library: {files} files,
{size:,} bytes, {tokens:,} tokens. Left out were the library's tests, the tables of `encodings`,
`html.entities`, `msilib` and `pydoc_data`, generated configuration modules and installed packages.
Held out from both the tokenizer and the training ({held_out_files} modules, {held_out_size:,} bytes):
{held_out}.

The text is under the Python Software Foundation License Version 2. The weights, the tokenizer and this card
are under the Apache License 2.0.

## Training

Windows of {plan.short_context} tokens for the first {plan.short_share:.0%} of the steps, of {plan.context}
for the rest; {plan.tokens_per_step:,} tokens a step.
Muon for the layers' matrices (learning rate {plan.muon_lr} scaled to AdamW's update size, weight decay
{plan.muon_decay}), AdamW for the embedding and the norms ({plan.adam_lr}, betas 0.9 and 0.95,
no decay). {plan.warmup_steps} steps of warm-up, a constant rate, then a linear decay to zero over the last
{plan.decay_share:.0%}. Gradient norm clipped at 1. fp32 weights, bf16 arithmetic.
The draft learned from the finished (stored) target: the divergence KL(target || draft) over the whole
vocabulary on the same corpus, plus {plan.hard_label_weight} times the cross-entropy on the text.

| | target | draft |
|---|---|---|
| steps | {plan.target_steps:,} | {plan.draft_steps:,} |
| tokens seen (millions) | {seen[0]:.1f} | {seen[1]:.1f} |
| wall-clock minutes | {minutes[0]:.0f} | {minutes[1]:.0f} |

Machine: {machine}, PyTorch {torch}; the minutes are as they passed, with whatever
else the machine was doing. To train the pair again:

```
python -m benchmarks.train_pair --out pipeinfer/builtin {arguments}
```

The library's text differs between Python versions, and arithmetic between machines and numbers of threads,
so another run elsewhere gives a similar pair, not the same bits.

## Evaluation

On the held-out modules, with the stored bf16 weights computed in fp32, windows of
{plan.context} tokens that do not overlap:

| | target | draft |
|---|---|---|
| loss, nats a token | {scores.losses[0]:.3f} | {scores.losses[1]:.3f} |
| loss, bits a byte | {scores.bits[0]:.3f} | {scores.bits[1]:.3f} |
| next token right | {scores.accuracies[0]:.3f} | {scores.accuracies[1]:.3f} |

How often the target's first choice is the draft's first, second, ... eighth choice:

| input | 1st | 2nd | 3rd | 4th | 5th | 6th | 7th | 8th |
|---|---|---|---|---|---|---|---|---|
| held-out text | {ranks} |
| the target's greedy continuations | {greedy_ranks} |

Top-1 agreement is thus {scores.ranks[0]:.3f} on held-out text and {scores.greedy_ranks[0]:.3f} on greedy
continuations ({plan.prompts} held-out prompts of {plan.prompt_tokens} tokens, {plan.new_tokens} new tokens
each); in the latter the draft is right {scores.greedy_run:.1f} times for each time it is wrong. Greedy
continuations tend to repeat themselves, which makes them easy for the draft.

## Samples

The target's greedy continuations of {plan.new_tokens} tokens, unselected. The prompt ends at the mark
`<<<`, which is not part of it.
"""


@dataclass
class Facts:
    """What the model card tells; two numbers are the target's and the draft's."""

    plan: Plan
    seed: int
    tokens: int
    parameters: tuple[int, int]
    minutes: tuple[float, float]
    scores: Scores


def row(shares: list[float]) -> str:
    """Set shares as slots of a table."""
    return " | ".join(f"{share:.3f}" for share in shares)


def write_card(out: Path, facts: Facts, corpus: Corpus, device: torch.device) -> None:
    """Write MODEL_CARD.md."""
    plan, scores = facts.plan, facts.scores
    gpu = device.type == "cuda"
    card = CARD.format(
        **vars(facts),
        end_of_text=END_OF_TEXT,
        ratio=facts.parameters[0] / facts.parameters[1],
        python=platform.python_version(),
        files=len(corpus.train),
        size=byte_count(corpus.train),
        held_out_files=len(corpus.held_out),
        held_out_size=byte_count(corpus.held_out),
        held_out=", ".join(f"`{name}`" for name in sorted(corpus.held_out)),
        seen=[steps * plan.tokens_per_step / 1e6 for steps in (plan.target_steps, plan.draft_steps)],
        machine=f"1 GPU ({torch.cuda.get_device_name(device)})" if gpu else f"{os.cpu_count()} CPU cores",
        torch=torch.__version__,
        arguments=f"--seed {facts.seed} --target-steps {plan.target_steps} --draft-steps {plan.draft_steps}",
        ranks=row(scores.ranks),
        greedy_ranks=row(scores.greedy_ranks),
    )
    for prompt, completion in scores.samples:
        shown = "\n".join(line.rstrip() for line in f"{prompt}<<<{completion}".split("\n"))
        card += f"\n```python\n{shown}\n```\n"
    part = out / "MODEL_CARD.md.part"
    part.write_text(card, encoding="utf-8")
    part.replace(out / "MODEL_CARD.md")
