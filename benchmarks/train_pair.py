"""Train pipeinfer's built-in model pair on the Python standard library's source text.

One run makes a byte-level BPE tokenizer, a target model, a draft model distilled from the target, an
evaluation of both and a model card:

    python benchmarks/train_pair.py --out pipeinfer/builtin

Progress is kept in ``--work-dir``: the same command, started again after an interruption, goes on from the
last checkpoint (``--fresh`` starts over). ``--smoke`` runs every stage with toy sizes in under a minute.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import random
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

END_OF_TEXT = "<|endoftext|>"
LEAST_AGREEMENT = 0.6
REPOSITORY = Path(__file__).resolve().parent.parent

# Folders of the library that hold tests, generated tables or other people's packages rather than ordinary source.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "msilib", "__pycache__"}
)
SKIPPED_FILES = frozenset({"html/entities.py", "__phello__.py"})
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
HELD_OUT = (
    "bisect.py",
    "calendar.py",
    "csv.py",
    "fractions.py",
    "getopt.py",
    "glob.py",
    "heapq.py",
    "html/parser.py",
    "json/decoder.py",
    "queue.py",
    "sched.py",
    "shlex.py",
    "statistics.py",
    "textwrap.py",
)


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
    """Everything that fixes the result: sizes, step counts and learning rates."""

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
    max_files=30,
    prompts=4,
    prompt_tokens=32,
    new_tokens=16,
)


@dataclass
class Corpus:
    """Source text of the library, by path relative to its root."""

    train: dict[str, str] = field(default_factory=dict)
    held_out: dict[str, str] = field(default_factory=dict)


def log(message: str) -> None:
    """Print one line at once, so that a log file can be followed."""
    print(message, flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Data and tokenizer


def read_corpus(root: Path, max_files: int | None) -> Corpus:
    """Read the library's modules, split into training and held-out text."""
    corpus = Corpus()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if SKIPPED_FOLDERS & set(relative.parts) or name in SKIPPED_FILES:
            continue
        if any(part.startswith(SKIPPED_PREFIXES) for part in relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip():
            continue
        (corpus.held_out if name in HELD_OUT else corpus.train)[name] = text
    missing = set(HELD_OUT) - set(corpus.held_out)
    if missing:
        raise SystemExit(f"held-out modules not found in the library: {sorted(missing)}")
    if max_files is not None:
        corpus.train = dict(list(corpus.train.items())[:max_files])
    return corpus


def train_tokenizer(texts: list[str], vocab: int, context: int) -> Any:
    """Train a byte-level BPE tokenizer that gives back every text exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )
    if len(wrapped) != vocab:
        raise SystemExit(f"the tokenizer has {len(wrapped)} entries instead of {vocab}")
    return wrapped


def encode(tokenizer: Any, texts: dict[str, str]) -> list[torch.Tensor]:
    """Encode each document, with the separator behind it, and check that it decodes to the same text."""
    end = tokenizer.eos_token_id
    documents = []
    for name, text in texts.items():
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        if tokenizer.decode(ids) != text:
            raise SystemExit(f"{name} does not survive encoding and decoding")
        documents.append(torch.tensor([*ids, end], dtype=torch.long))
    return documents


def batches(documents: list[torch.Tensor], length: int, rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield (rows, length + 1) windows for ever, each epoch over a new order of documents and windows."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(documents, len(documents))
        stream = torch.cat([order[0][rng.randrange(len(order[0])) :], *order[1:]])
        count = (len(stream) - 1) // length
        if count < rows:
            raise SystemExit("the corpus is too small for one batch")
        starts = [index * length for index in range(count)]
        rng.shuffle(starts)
        for first in range(0, count - rows + 1, rows):
            yield torch.stack([stream[start : start + length + 1] for start in starts[first : first + rows]])


def schedule(documents: list[torch.Tensor], plan: Plan, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield one batch a step: short windows first, windows as long as the context at the end."""
    short_steps = int(steps * plan.short_share)
    short = batches(documents, plan.short_context, plan.tokens_per_step // plan.short_context, seed)
    full = batches(documents, plan.context, plan.tokens_per_step // plan.context, seed + 1)
    for step in range(steps):
        yield next(short if step < short_steps else full)


# ---------------------------------------------------------------------------------------------------------------
# Models


def build_model(shape: Shape, plan: Plan, seed: int) -> Any:
    """Make an untrained Llama model with fp32 weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=plan.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=32,
        max_position_embeddings=plan.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    make_generation_config: Any = GenerationConfig
    model.generation_config = make_generation_config(bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=False)
    return model.float()


def count_parameters(model: Any) -> int:
    """Count the parameters, the tied embedding once."""
    return sum(parameter.numel() for parameter in model.parameters())


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embeddings to (batch, heads, length, head_dim) states."""
    left, right = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-right, left), dim=-1) * sin


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention; on a CPU in blocks of 128 rows, measured about twice as fast there as PyTorch's kernel."""
    length = query.shape[2]
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    block = 128
    query = query * query.shape[-1] ** -0.5
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        scores = query[:, :, start:stop] @ key[:, :, :stop].transpose(-1, -2)
        mask = torch.full((stop - start, stop), float("-inf"), dtype=scores.dtype).triu(start + 1)
        outputs.append((scores + mask).softmax(dim=-1) @ value[:, :, :stop])
    return torch.cat(outputs, dim=2)


def logits_of(model: Any, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Run the model's own weights through a compact Llama forward pass computed in ``dtype``."""
    config = model.config
    rows, length = ids.shape
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden, eps = config.hidden_size, config.rms_norm_eps
    powers = torch.arange(0, size, 2, device=ids.device, dtype=torch.float32) / size
    angles = torch.outer(torch.arange(length, device=ids.device, dtype=torch.float32), 10000.0**-powers)
    cos, sin = (part.repeat(1, 2).to(dtype) for part in (angles.cos(), angles.sin()))
    embedding = model.model.embed_tokens.weight
    states = F.embedding(ids, embedding).to(dtype)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        normed = F.rms_norm(states, (hidden,), layer.input_layernorm.weight.to(dtype), eps)
        weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        mixed = F.linear(normed, weight.to(dtype)).view(rows, length, heads + 2 * kv_heads, size).transpose(1, 2)
        turned = rotate(mixed[:, : heads + kv_heads], cos, sin)
        key = turned[:, heads:].repeat_interleave(heads // kv_heads, dim=1)
        value = mixed[:, heads + kv_heads :].repeat_interleave(heads // kv_heads, dim=1)
        output = causal_attention(turned[:, :heads], key, value).transpose(1, 2).reshape(rows, length, heads * size)
        states = states + F.linear(output, attention.o_proj.weight.to(dtype))
        normed = F.rms_norm(states, (hidden,), layer.post_attention_layernorm.weight.to(dtype), eps)
        weight = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        gate, up = F.linear(normed, weight.to(dtype)).chunk(2, dim=-1)
        states = states + F.linear(F.silu(gate) * up, mlp.down_proj.weight.to(dtype))
    states = F.rms_norm(states, (hidden,), model.model.norm.weight.to(dtype), eps)
    return F.linear(states, embedding.to(dtype)).float()


def check_forward(model: Any, ids: torch.Tensor) -> None:
    """Stop when the compact forward pass and the one of transformers differ."""
    with torch.no_grad():
        gap = (logits_of(model, ids, torch.float32) - model(input_ids=ids, use_cache=False).logits).abs().max()
    log(f"largest logit difference to transformers: {float(gap):.1e}")
    if not float(gap) < 1e-3:
        raise SystemExit("the training forward pass disagrees with transformers")


# ---------------------------------------------------------------------------------------------------------------
# Training

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss of the next token in nats."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def distillation_loss(teacher: Any, hard_label_weight: float, dtype: torch.dtype) -> Loss:
    """Make a loss: KL(teacher || student) and a little cross-entropy on the text itself."""

    def loss(logits: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(logits_of(teacher, inputs, dtype), dim=-1).flatten(0, 1)
        given = F.log_softmax(logits, dim=-1).flatten(0, 1)
        divergence = F.kl_div(given, wanted, reduction="batchmean", log_target=True)
        return divergence + hard_label_weight * F.nll_loss(given, labels.flatten())

    return loss


@dataclass
class Training:
    """One model's training run, with what is needed to go on after an interruption."""

    name: str
    model: Any
    plan: Plan
    steps: int
    seed: int
    loss: Loss
    checkpoint: Path
    device: torch.device
    dtype: torch.dtype
    seconds: float = 0.0

    def restore(self, optimizers: list[torch.optim.Optimizer]) -> int:
        """Load the checkpoint if there is one; give the number of steps done."""
        if not self.checkpoint.exists():
            return 0
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if state["steps"] != self.steps:
            same_until = min(state["steps"], self.steps) * (1.0 - self.plan.decay_share)
            if state["step"] > same_until:
                raise SystemExit(f"{self.name}: the checkpoint is past the point where step counts part; use --fresh")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.seconds = float(state["seconds"])
        log(f"{self.name}: going on after step {state['step']}")
        return int(state["step"])

    def save(self, optimizers: list[torch.optim.Optimizer], step: int, seconds: float) -> None:
        """Write a checkpoint under another name, then rename it."""
        part = self.checkpoint.with_suffix(".part")
        saved = [optimizer.state_dict() for optimizer in optimizers]
        state = {"model": self.model.state_dict(), "optimizers": saved, "seconds": seconds}
        torch.save({**state, "step": step, "steps": self.steps}, part)
        part.replace(self.checkpoint)

    def run(self, documents: list[torch.Tensor]) -> None:
        """Train to the last step, with a checkpoint every 100 steps."""
        optimizers = make_optimizers(self.model, self.plan)
        base = [float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers]
        done = self.restore(optimizers)
        began = time.monotonic() - self.seconds
        smooth = 0.0
        for step, batch in enumerate(schedule(documents, self.plan, self.steps, self.seed)):
            if step < done:
                continue
            factor = rate(step, self.steps, self.plan)
            for optimizer, lr in zip(optimizers, base, strict=True):
                optimizer.param_groups[0]["lr"] = lr * factor
                optimizer.zero_grad()
            inputs, labels = batch[:, :-1].to(self.device), batch[:, 1:].to(self.device)
            value = self.loss(logits_of(self.model, inputs, self.dtype), inputs, labels)
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            latest = float(value.detach())
            smooth = latest if step == done else 0.95 * smooth + 0.05 * latest
            self.seconds = time.monotonic() - began
            if step % 20 == 0 or step + 1 == self.steps:
                log(f"{self.name}: step {step + 1}/{self.steps} loss {smooth:.3f} minutes {self.seconds / 60:.1f}")
            if (step + 1) % 100 == 0 or step + 1 == self.steps:
                self.save(optimizers, step + 1, self.seconds)


# ---------------------------------------------------------------------------------------------------------------
# Saving


def store(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write one model in bf16 with its tokenizer; every file appears under its name only when complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".storing-") as name:
        part = Path(name)
        copy: Any = LlamaForCausalLM(model.config)
        copy.load_state_dict(model.state_dict())
        copy = copy.to(torch.bfloat16)
        copy.generation_config = model.generation_config
        copy.save_pretrained(part)
        tokenizer.save_pretrained(part)
        for stored in ("config.json", "tokenizer_config.json"):
            content = json.loads((part / stored).read_text(encoding="utf-8"))
            for key in ("_name_or_path", "name_or_path", "is_local", "local_files_only"):
                content.pop(key, None)
            if "tokenizer_class" in content:
                content["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every transformers release knows
            (part / stored).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for stored_path in sorted(part.iterdir()):
            stored_path.chmod(0o644)
            stored_path.replace(folder / stored_path.name)


def load(folder: Path, device: torch.device) -> Any:
    """Load a stored model through transformers, upcast to fp32."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.to(device).eval()


# ---------------------------------------------------------------------------------------------------------------
# Evaluation


@dataclass
class Scores:
    """What the evaluation found; ranks[k] is the share of tokens where the target's choice is the draft's k-th."""

    target_loss: float
    draft_loss: float
    target_bits: float
    draft_bits: float
    agreement: float
    ranks: list[float]
    target_accuracy: float
    draft_accuracy: float
    greedy_agreement: float
    greedy_ranks: list[float]
    greedy_run: float
    samples: list[tuple[str, str]]


def rank_shares(ranks: torch.Tensor) -> list[float]:
    """Turn ranks (0 = first choice) into the shares of the first eight."""
    return [float((ranks == place).float().mean()) for place in range(8)]


def ranks_of(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Count, for each position, how many tokens the logits put above the chosen one."""
    return (logits > logits.gather(-1, chosen.unsqueeze(-1))).sum(dim=-1)


@torch.no_grad()
def forced_scores(target: Any, draft: Any, documents: list[torch.Tensor], context: int) -> dict[str, Any]:
    """Losses, ranks and accuracies with the held-out text itself as input."""
    losses = [0.0, 0.0]
    hits = [0, 0]
    tokens = 0
    ranks = []
    for document in documents:
        for start in range(0, len(document) - 1, context):
            piece = document[start : start + context + 1].to(target.device)
            inputs, labels = piece[:-1].unsqueeze(0), piece[1:]
            pair = [model(input_ids=inputs, use_cache=False).logits[0] for model in (target, draft)]
            for index, logits in enumerate(pair):
                losses[index] += float(F.cross_entropy(logits, labels, reduction="sum"))
                hits[index] += int((logits.argmax(dim=-1) == labels).sum())
            ranks.append(ranks_of(pair[1], pair[0].argmax(dim=-1)).cpu())
            tokens += len(labels)
    return {"losses": losses, "hits": hits, "tokens": tokens, "ranks": torch.cat(ranks)}


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


@torch.no_grad()
def continue_greedily(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Append the model's first choice again and again, with its key-value cache; never stop early."""
    cache = None
    step = ids
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
    forced = forced_scores(target, draft, documents, plan.context)
    size = sum(len(text.encode("utf-8")) for text in corpus.held_out.values())
    bits = [loss / math.log(2) / size for loss in forced["losses"]]
    losses = [loss / forced["tokens"] for loss in forced["losses"]]
    accuracies = [hits / forced["tokens"] for hits in forced["hits"]]
    prompts = greedy_prompts(documents, plan, seed).to(target.device)
    whole = continue_greedily(target, prompts, plan.new_tokens)
    logits = draft(input_ids=whole[:, :-1], use_cache=False).logits[:, plan.prompt_tokens - 1 :]
    greedy = ranks_of(logits, whole[:, plan.prompt_tokens :]).cpu()
    misses = int((greedy > 0).sum())
    examples = [tokenizer(text, return_tensors="pt").input_ids.to(target.device) for text in SAMPLE_PROMPTS]
    samples = []
    for text, ids in zip(SAMPLE_PROMPTS, examples, strict=True):
        full = continue_greedily(target, ids, plan.new_tokens)
        samples.append((text, str(tokenizer.decode(full[0, ids.shape[1] :]))))
    return Scores(
        target_loss=losses[0],
        draft_loss=losses[1],
        target_bits=bits[0],
        draft_bits=bits[1],
        agreement=float((forced["ranks"] == 0).float().mean()),
        ranks=rank_shares(forced["ranks"]),
        target_accuracy=accuracies[0],
        draft_accuracy=accuracies[1],
        greedy_agreement=float((greedy == 0).float().mean()),
        greedy_ranks=rank_shares(greedy),
        greedy_run=(greedy.numel() - misses) / max(misses, 1),
        samples=samples,
    )


# A prompt should not end with a line break: a break and the indentation behind it are one token.
SAMPLE_PROMPTS = (
    'def count_words(text):\n    """Return how often each word occurs in text."""',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):",
    "import argparse\nimport sys\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
)


def load_tokenizer(folder: Path) -> Any:
    """Load a stored tokenizer through transformers."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


# ---------------------------------------------------------------------------------------------------------------
# Model card


@dataclass
class Facts:
    """What the model card tells beside the scores."""

    plan: Plan
    corpus: Corpus
    tokens: int
    parameters: tuple[int, int]
    minutes: tuple[float, float]
    device: torch.device
    seed: int


def machine(device: torch.device) -> str:
    """Name the class of machine, not the machine."""
    if device.type == "cuda":
        return f"1 GPU ({torch.cuda.get_device_name(device)})"
    return f"{os.cpu_count()} CPU cores"


def card_models(facts: Facts) -> list[str]:
    """Tell the two models' shapes."""
    plan = facts.plan
    lines = [
        "## The pair",
        "",
        "Two causal language models of the Llama architecture (`LlamaForCausalLM`) with one shared byte-level BPE",
        f"tokenizer of {plan.vocab} entries. `{END_OF_TEXT}` separates documents; nothing is put before a text by",
        "itself, and every text comes back exactly from encoding and decoding. Both models were trained from random",
        "weights for this project.",
        "",
        "| | target | draft |",
        "|---|---|---|",
        f"| parameters | {facts.parameters[0]:,} | {facts.parameters[1]:,} |",
    ]
    rows = ("layers", "hidden size", "attention heads", "key-value heads", "feed-forward size")
    for row, name in zip(rows, ("layers", "hidden", "heads", "kv_heads", "ffn"), strict=True):
        lines.append(f"| {row} | {getattr(plan.target, name)} | {getattr(plan.draft, name)} |")
    lines += [
        "| head dimension | 32 | 32 |",
        f"| longest context | {plan.context} | {plan.context} |",
        "| embeddings | tied | tied |",
        "| stored weights | bf16 | bf16 |",
        "",
        f"The target is {facts.parameters[0] / facts.parameters[1]:.2f} times as large as the draft.",
        "RoPE theta is 10000, RMSNorm epsilon 1e-5.",
    ]
    return lines


def card_data(facts: Facts) -> list[str]:
    """Tell what the pair was trained on."""
    corpus = facts.corpus
    size = sum(len(text.encode("utf-8")) for text in corpus.train.values())
    held_size = sum(len(text.encode("utf-8")) for text in corpus.held_out.values())
    return [
        "## Data",
        "",
        f"The source text of the Python {platform.python_version()} standard library: {len(corpus.train)} files,",
        f"{size:,} bytes, {facts.tokens:,} tokens. Left out were the library's tests, the tables of `encodings`,",
        "`html.entities`, `msilib` and `pydoc_data`, generated configuration modules and installed packages.",
        f"Held out from both the tokenizer and the training ({len(corpus.held_out)} modules, {held_size:,} bytes):",
        ", ".join(f"`{name}`" for name in sorted(corpus.held_out)) + ".",
        "",
        "The text is under the Python Software Foundation License Version 2. The weights, the tokenizer and this card",
        "are under the Apache License 2.0.",
    ]


def card_training(facts: Facts) -> list[str]:
    """Tell how the pair was trained."""
    plan = facts.plan
    counts = f"--seed {facts.seed} --target-steps {plan.target_steps} --draft-steps {plan.draft_steps}"
    seen = [steps * plan.tokens_per_step / 1e6 for steps in (plan.target_steps, plan.draft_steps)]
    return [
        "## Training",
        "",
        f"Windows of {plan.short_context} tokens for the first {plan.short_share:.0%} of the steps, of {plan.context}",
        f"for the rest; {plan.tokens_per_step:,} tokens a step.",
        f"Muon for the layers' matrices (learning rate {plan.muon_lr:g} scaled to AdamW's update size, weight decay",
        f"{plan.muon_decay:g}), AdamW for the embedding and the norms ({plan.adam_lr:g}, betas 0.9 and 0.95,",
        f"no decay). {plan.warmup_steps} steps of warm-up, a constant rate, then a linear decay to zero over the last",
        f"{plan.decay_share:.0%}. Gradient norm clipped at 1. fp32 weights, bf16 arithmetic.",
        "The draft learned from the finished (stored) target: the divergence KL(target || draft) over the whole",
        f"vocabulary on the same corpus, plus {plan.hard_label_weight:g} times the cross-entropy on the text.",
        "",
        "| | target | draft |",
        "|---|---|---|",
        f"| steps | {plan.target_steps:,} | {plan.draft_steps:,} |",
        f"| tokens seen (millions) | {seen[0]:.1f} | {seen[1]:.1f} |",
        f"| wall-clock minutes | {facts.minutes[0]:.0f} | {facts.minutes[1]:.0f} |",
        "",
        f"Machine: {machine(facts.device)}, PyTorch {torch.__version__}; the minutes are as they passed, with whatever",
        "else the machine was doing. To train the pair again:",
        "",
        "```",
        f"python benchmarks/train_pair.py --out pipeinfer/builtin {counts}",
        "```",
        "",
        "The library's text differs between Python versions, and arithmetic between machines and numbers of threads,",
        "so another run elsewhere gives a similar pair, not the same bits.",
    ]


def card_scores(facts: Facts, scores: Scores) -> list[str]:
    """Tell what the evaluation found."""
    plan = facts.plan
    head = " | ".join(["1st", "2nd", "3rd", *(f"{place}th" for place in range(4, 9))])
    forced, greedy = (" | ".join(f"{share:.3f}" for share in row) for row in (scores.ranks, scores.greedy_ranks))
    return [
        "## Evaluation",
        "",
        "On the held-out modules, with the stored bf16 weights computed in fp32, windows of",
        f"{plan.context} tokens that do not overlap:",
        "",
        "| | target | draft |",
        "|---|---|---|",
        f"| loss, nats a token | {scores.target_loss:.3f} | {scores.draft_loss:.3f} |",
        f"| loss, bits a byte | {scores.target_bits:.3f} | {scores.draft_bits:.3f} |",
        f"| next token right | {scores.target_accuracy:.3f} | {scores.draft_accuracy:.3f} |",
        "",
        "How often the target's first choice is the draft's first, second, ... eighth choice:",
        "",
        f"| input | {head} |",
        "|---|" + "---|" * 8,
        f"| held-out text | {forced} |",
        f"| the target's greedy continuations | {greedy} |",
        "",
        f"Top-1 agreement is thus {scores.agreement:.3f} on held-out text and {scores.greedy_agreement:.3f} on greedy",
        f"continuations ({plan.prompts} held-out prompts of {plan.prompt_tokens} tokens, {plan.new_tokens} new tokens",
        f"each); in the latter the draft is right {scores.greedy_run:.1f} times for each time it is wrong. Greedy",
        "continuations tend to repeat themselves, which makes them easy for the draft.",
    ]


def card_samples(facts: Facts, scores: Scores) -> list[str]:
    """Show the target's greedy continuations as they came."""
    lines = [
        "## Samples",
        "",
        f"The target's greedy continuations of {facts.plan.new_tokens} tokens, unselected. The prompt ends at the mark",
        "`<<<`, which is not part of it.",
    ]
    for prompt, completion in scores.samples:
        shown = [line.rstrip() for line in f"{prompt}<<<{completion}".split("\n")]
        lines += ["", "```python", *shown, "```"]
    return lines


def write_card(out: Path, facts: Facts, scores: Scores) -> None:
    """Write MODEL_CARD.md."""
    parts = [
        ["# pipeinfer's built-in pair", "", "Written by `benchmarks/train_pair.py`; do not edit by hand."],
        card_models(facts),
        [
            "## Use and limits",
            "",
            "The pair is there so that pipeinfer's commands, tests and measurements have a real target and a real",
            "draft without a download. It continues Python text in the style of the standard library. It is not an",
            "assistant: it follows no instructions, knows nothing but its corpus, repeats itself under greedy",
            "decoding, writes code that mostly does not run, and may recite passages of the library. Speeds and",
            "acceptance rates measured with it say nothing about large models.",
        ],
        card_data(facts),
        card_training(facts),
        card_scores(facts, scores),
        card_samples(facts, scores),
    ]
    part = out / "MODEL_CARD.md.part"
    part.write_text("\n\n".join("\n".join(lines) for lines in parts) + "\n", encoding="utf-8")
    part.replace(out / "MODEL_CARD.md")


# ---------------------------------------------------------------------------------------------------------------
# The whole run


def pick_device(name: str) -> torch.device:
    """Take the GPU if there is one, unless told otherwise."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train pipeinfer's built-in model pair.")
    parser.add_argument("--out", type=Path, default=None, help="where the pair goes (default: pipeinfer/builtin)")
    parser.add_argument("--work-dir", type=Path, default=None, help="checkpoints (default: below the temporary folder)")
    parser.add_argument("--seed", type=int, default=20240607)
    parser.add_argument("--target-steps", type=int, default=None)
    parser.add_argument("--draft-steps", type=int, default=None)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads (0: PyTorch's default; 1 is best on busy cores)"
    )
    parser.add_argument("--fresh", action="store_true", help="ignore checkpoints of an earlier run")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, under a minute; needs --out")
    options = parser.parse_args(arguments)
    if options.smoke and options.out is None:
        parser.error("--smoke needs --out, so that it does not replace the built-in pair")
    return options


def fingerprint(plan: Plan, tokenizer: Any, corpus: Corpus, seed: int) -> str:
    """Name a checkpoint by what it depends on, except the step counts."""
    fixed = replace(plan, target_steps=0, draft_steps=0)
    digest = hashlib.sha256(repr((fixed, seed)).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for name in sorted(corpus.train):
        digest.update(corpus.train[name].encode())
    return digest.hexdigest()[:12]


def train_pair(options: argparse.Namespace, plan: Plan, out: Path, work: Path) -> None:
    """Run every stage: tokenizer, target, draft, evaluation, card."""
    device = pick_device(options.device)
    seed = int(options.seed)
    corpus = read_corpus(Path(sysconfig.get_path("stdlib")), plan.max_files)
    tokenizer = train_tokenizer(list(corpus.train.values()), plan.vocab, plan.context)
    documents = encode(tokenizer, corpus.train)
    tokens = sum(len(document) for document in documents)
    log(f"{len(documents)} files, {tokens} tokens, {len(corpus.held_out)} held out; training on {device.type}")
    target = build_model(plan.target, plan, seed).to(device)
    draft = build_model(plan.draft, plan, seed + 1).to(device)
    sizes = count_parameters(target), count_parameters(draft)
    log(f"target {sizes[0]} parameters, draft {sizes[1]}, ratio {sizes[0] / sizes[1]:.2f}")
    if sizes[1] * 6 > sizes[0]:
        raise SystemExit("the draft may have at most a sixth of the target's parameters")
    for name, model in (("target", target), ("draft", draft)):
        check_forward(model, torch.stack([documents[0][: plan.context]]).to(device))
        if not (out / name / "model.safetensors").exists():
            store(model, tokenizer, out / name)
    mark = fingerprint(plan, tokenizer, corpus, seed)
    dtype = torch.bfloat16

    def hard_labels(logits: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits, labels)

    first = Training(
        "target", target, plan, plan.target_steps, seed, hard_labels, work / f"target-{mark}.pt", device, dtype
    )
    first.run(documents)
    store(target, tokenizer, out / "target")
    teacher = load(out / "target", device)
    loss = distillation_loss(teacher, plan.hard_label_weight, dtype)
    second = Training("draft", draft, plan, plan.draft_steps, seed + 2, loss, work / f"draft-{mark}.pt", device, dtype)
    second.run(documents)
    store(draft, tokenizer, out / "draft")
    scores = evaluate(teacher, load(out / "draft", device), load_tokenizer(out / "draft"), corpus, plan, seed)
    facts = Facts(plan, corpus, tokens, sizes, (first.seconds / 60, second.seconds / 60), device, seed)
    write_card(out, facts, scores)
    log(f"agreement {scores.agreement:.3f} on held-out text, {scores.greedy_agreement:.3f} on greedy continuations")
    if not options.smoke and scores.agreement < LEAST_AGREEMENT:
        raise SystemExit(f"the agreement is below {LEAST_AGREEMENT}: train longer")


def main(arguments: list[str] | None = None) -> int:
    """Train the pair."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    options = parse(arguments)
    plan = SMOKE_PLAN if options.smoke else FULL_PLAN
    if options.target_steps is not None:
        plan = replace(plan, target_steps=options.target_steps)
    if options.draft_steps is not None:
        plan = replace(plan, draft_steps=options.draft_steps)
    if options.threads:
        torch.set_num_threads(options.threads)
    out = options.out or REPOSITORY / "pipeinfer" / "builtin"
    work = options.work_dir or Path(tempfile.gettempdir()) / "pipeinfer-train-pair"
    if options.fresh or options.smoke:
        shutil.rmtree(work / "smoke" if options.smoke else work, ignore_errors=True)
    work = work / "smoke" if options.smoke else work
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    train_pair(options, plan, out, work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
