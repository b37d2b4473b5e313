"""Everything that fixes the trained pair, for the real run and for a rehearsal in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The size of one Llama model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int


@dataclass(frozen=True)
class Plan:
    """Sizes, step counts and learning rates. Checkpoints are named after this class's repr, see train_pair."""

    vocab: int
    context: int
    target: Shape
    draft: Shape
    target_steps: int
    draft_steps: int
    tokens_per_step: int
    short_context: int
    short_share: float = 0.8
    warmup_steps: int = 100
    decay_share: float = 0.25
    muon_lr: float = 0.006
    adam_lr: float = 0.003
    muon_decay: float = 0.1
    hard_label_weight: float = 0.1
    max_files: int | None = None
    prompts: int = 24
    prompt_tokens: int = 128
    new_tokens: int = 128


FULL_PLAN = Plan(
    vocab=2048,
    context=1024,
    target=Shape(hidden=256, layers=8, heads=8, kv_heads=4, ffn=640),
    draft=Shape(hidden=160, layers=2, heads=5, kv_heads=5, ffn=480),
    target_steps=1740,
    draft_steps=2000,
    tokens_per_step=4096,
    short_context=512,
)
SMOKE_PLAN = Plan(
    vocab=512,
    context=128,
    target=Shape(hidden=96, layers=4, heads=3, kv_heads=1, ffn=256),
    draft=Shape(hidden=32, layers=1, heads=1, kv_heads=1, ffn=64),
    target_steps=8,
    draft_steps=8,
    tokens_per_step=512,
    short_context=64,
    warmup_steps=2,
    max_files=10,
    prompts=2,
    prompt_tokens=32,
    new_tokens=16,
)
