"""Training: the schedule, the optimisers, the two losses, and checkpoints to go on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.pair.corpus import batches
from benchmarks.pair.model import logits_of
from benchmarks.pair.plan import Plan

ARITHMETIC = torch.bfloat16

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of logits, inputs and labels


def schedule(documents: list[torch.Tensor], plan: Plan, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield one batch a step: short windows first, windows as long as the context at the end."""
    short_steps = int(steps * plan.short_share)
    short = batches(documents, plan.short_context, plan.tokens_per_step // plan.short_context, seed)
    full = batches(documents, plan.context, plan.tokens_per_step // plan.context, seed + 1)
    yield from islice(short, short_steps)
    yield from islice(full, steps - short_steps)


def rate(step: int, steps: int, plan: Plan) -> float:
    """Give the learning rate's factor: warm-up, a constant part, then a linear decay to zero."""
    warmup = min(1.0, (step + 1) / plan.warmup_steps)
    decay = min(1.0, (steps - step) / (steps * plan.decay_share))
    return warmup * decay


def make_optimizers(model: Any, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed_tokens" not in name else others).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=plan.muon_lr, weight_decay=plan.muon_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adam]


def text_loss(logits: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Give the mean loss of the next token in nats."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def distillation_loss(teacher: Any, hard_label_weight: float) -> Loss:
    """Make a loss: KL(teacher || student) and a little cross-entropy on the text itself."""

    def loss(logits: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(logits_of(teacher, inputs, ARITHMETIC), dim=-1).flatten(0, 1)
        given = F.log_softmax(logits, dim=-1).flatten(0, 1)
        divergence = F.kl_div(given, wanted, reduction="batchmean", log_target=True)
        return divergence + hard_label_weight * F.nll_loss(given, labels.flatten())

    return loss


@dataclass
class Training:
    """One model's training run, with what is needed to go on after an interruption."""

    name: str
    model: Any
    loss: Loss
    plan: Plan
    steps: int
    seed: int
    checkpoint: Path
    seconds: float = 0.0

    def restore(self, optimizers: list[torch.optim.Optimizer]) -> int:
        """Load the checkpoint if there is one; give the number of steps done."""
        if not self.checkpoint.exists():
            return 0
        state = torch.load(self.checkpoint, map_location=self.model.device, weights_only=True)
        same_until = min(state["steps"], self.steps) * (1.0 - self.plan.decay_share)
        if state["steps"] != self.steps and state["step"] > same_until:
            raise SystemExit(f"{self.checkpoint} is past the step where the runs of both step counts part; delete it")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.seconds = float(state["seconds"])
        print(f"{self.name}: going on after step {state['step']}", flush=True)
        return int(state["step"])

    def save(self, optimizers: list[torch.optim.Optimizer], step: int) -> None:
        """Write a checkpoint under another name, then rename it."""
        part = self.checkpoint.with_suffix(".part")
        saved = [optimizer.state_dict() for optimizer in optimizers]
        state = {"model": self.model.state_dict(), "optimizers": saved, "seconds": self.seconds}
        torch.save({**state, "step": step, "steps": self.steps}, part)
        part.replace(self.checkpoint)

    def run(self, documents: list[torch.Tensor]) -> None:
        """Train to the last step, with a checkpoint every 100 steps."""
        optimizers = make_optimizers(self.model, self.plan)
        done = self.restore(optimizers)
        began = time.monotonic() - self.seconds
        smooth = 0.0
        planned = enumerate(schedule(documents, self.plan, self.steps, self.seed))
        for step, batch in islice(planned, done, None):
            factor = rate(step, self.steps, self.plan)
            for optimizer, lr in zip(optimizers, (self.plan.muon_lr, self.plan.adam_lr), strict=True):
                optimizer.param_groups[0]["lr"] = lr * factor
                optimizer.zero_grad()
            window = batch.to(self.model.device)
            inputs, labels = window[:, :-1], window[:, 1:]
            value = self.loss(logits_of(self.model, inputs, ARITHMETIC), inputs, labels)
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            latest = float(value.detach())
            smooth = latest if step == done else 0.95 * smooth + 0.05 * latest
            self.seconds = time.monotonic() - began
            last = step + 1 == self.steps
            if step % 20 == 0 or last:
                minutes = self.seconds / 60
                print(f"{self.name}: step {step + 1}/{self.steps} loss {smooth:.3f} minutes {minutes:.1f}", flush=True)
            if (step + 1) % 100 == 0 or last:
                self.save(optimizers, step + 1)
