"""Checkpoints with one random damage each: what they decode is exact, or they are refused in one line.

    python -m tests.fuzz.checkpoints --inputs 5000 --seed 1

Exact means: after every token of a text the probabilities are transformers' for the same folder or, where
transformers cannot load it, those of the sound model. Each input follows from the seed and its number; ``--only N``
runs one again.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from safetensors.torch import load_file

from launch.preflight import clear
from pipeinfer.core.config import Config
from pipeinfer.core.errors import UserError
from pipeinfer.core.ports import GREEDY, Sampling
from pipeinfer.core.sampling import exact
from pipeinfer.engine.generation import DEFAULTS, model_sampling
from stages.models.pair import CheckpointPair
from tests.fuzz.damage import PICKLED, WHOLE, damage
from tests.models import tiny, tiny_generic
from tests.models.walk import prefill

TEXT = [17, 301, 5, 488, 92, 260, 33, 410, 7, 151, 64, 9, 9, 44, 130, 501, 3, 77]
CONTEXT = 32  # served; the windows of some models are shorter
CLOSE = 3e-3  # of natural logarithms in 32 bits, on a text of that length
MOST_CHARACTERS = 320  # of a message, beside the folder's name
HANG_S, MEMORY = 60, 12 << 30
SMALL = {"num_hidden_layers": 2, "max_position_embeddings": 64}
WINDOWS: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"sliding_window": 12},
    "Qwen2ForCausalLM": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
}
GENERIC = {"gpt2": {"n_layer": 2, "n_positions": 64}, "phi3": SMALL}


@dataclass(frozen=True)
class Sound:
    """An undamaged model; ``logps`` [tokens, vocabulary] after each token of TEXT."""

    folder: Path
    logps: torch.Tensor


def make_sound(work: Path) -> list[Sound]:
    """Models of the Llama family, some with windows, and of other architectures; in one file, in parts, pickled."""
    folders = []
    for name in tiny.CONFIGS:
        folders.append(tiny.make_tiny(work / name, name, **SMALL, tie_word_embeddings=name.startswith("Qwen3")))
    for name, more in WINDOWS.items():
        folders.append(tiny.make_tiny(work / f"{name}-window", name, **SMALL, **more))
    folders.append(tiny.make_tiny(work / "parts", "LlamaForCausalLM", max_shard_size="100KB", **SMALL))
    for name, more in GENERIC.items():
        folders.append(tiny_generic.make_model(work / name, name, **more))
    pickled = shutil.copytree(work / "LlamaForCausalLM", work / "pickled")
    torch.save(load_file(pickled / WHOLE), pickled / PICKLED)
    (pickled / WHOLE).unlink()
    for folder in [*folders, pickled]:
        if not (folder / "generation_config.json").exists():
            (folder / "generation_config.json").write_text("{}")
    return [Sound(folder, reference(folder)) for folder in [*folders, pickled]]


@torch.no_grad()
def reference(folder: Path) -> torch.Tensor:
    """transformers' natural logarithms of probabilities [tokens, vocabulary] after each token of TEXT."""
    auto: Any = transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    if report["missing_keys"]:  # as by names that wrappers left: transformers makes such tensors up
        raise ValueError(f"missing {min(report['missing_keys'])}")
    logps: torch.Tensor = model(torch.tensor([TEXT])).logits[0].float().log_softmax(-1)
    return logps


def ours(folder: Path) -> list[list[tuple[int, float]]]:
    """Eight choices after each token of TEXT, as a job of one rank computes them."""
    cleared = clear(Config(str(folder), (), context=CONTEXT), 1)
    spec = cleared.target[0]
    pair = CheckpointPair(cleared.target, (), "fp32")
    shard: Any = pair.stage(range(spec.layer_count), CONTEXT)
    return prefill([shard], TEXT, list(range(len(TEXT))), 7)


def differs(choices: list[list[tuple[int, float]]], logps: torch.Tensor) -> str | None:
    """Where the choices are not the best eight of ``logps``; None where they are, or where nothing is finite."""
    if not bool(logps.isfinite().all()):
        return None
    for row, best in enumerate(choices):
        wanted = logps[row].topk(len(best)).values
        for rank, (token, logp) in enumerate(best):
            most = CLOSE * max(1, abs(logp))
            if abs(logp - float(logps[row, token])) > most or abs(logp - float(wanted[rank])) > most:
                return f"after token {row} choice {rank} is {token} at {logp:.4f}, not {float(logps[row, token]):.4f}"
    return None


def judge_refusal(error: UserError, folder: Path) -> str | None:
    """What is wrong with a message; None for nothing."""
    said = str(error).replace(str(folder), "")
    if "\n" in said or not said.isprintable():
        return f"a message of several lines: {said!r}"
    if len(said) > MOST_CHARACTERS or "; " not in said:
        return f"a message of {len(said)} characters: {said!r}"
    return None


def judge(sound: Sound, folder: Path) -> tuple[str, str | None]:
    """How a damaged folder ends, as ``exact`` or ``refused``, and the fault if it is one."""
    try:
        choices = ours(folder)
        found = model_sampling(folder).sampling
    except UserError as error:
        return "refused", judge_refusal(error, folder)
    except Exception:
        return "raised", traceback.format_exc()
    try:
        theirs = reference(folder)
        fault = differs(choices, theirs)
    except Exception as error:  # transformers cannot load it: then the damage must be neutral
        fault = differs(choices, sound.logps)
        fault = fault and f"{fault}; transformers says {type(error).__name__}: {str(error)[:200]}"
    return "exact", fault or judge_sampling(folder, found)


def judge_sampling(folder: Path, found: Sampling) -> str | None:
    """Whether transformers draws as ``found`` says."""
    try:
        said: Any = transformers.GenerationConfig.from_pretrained(folder)
        wanted = GREEDY
        if said.do_sample:
            values = {name: getattr(said, name) for name in DEFAULTS}
            wanted = Sampling(**{name: DEFAULTS[name] if value is None else value for name, value in values.items()})
        penalty = 1.0 if said.repetition_penalty is None else said.repetition_penalty
        wanted = exact(Sampling(wanted.temperature, wanted.top_k, wanted.top_p, wanted.min_p, penalty))
    except Exception:
        return None  # it cannot say
    return None if wanted == found else f"sampling {found}, for transformers {wanted}"


def one_input(sounds: list[Sound], scratch: Path, seed: int, number: int) -> tuple[str, str, str | None]:
    """The input's description, how it ends, and the fault if there is one."""
    dice = random.Random(f"{seed}/{number}")
    sound = dice.choice(sounds)
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(sound.folder, scratch)
    said = damage(dice, scratch)
    faulthandler.dump_traceback_later(HANG_S, exit=True)  # a hang in C code cannot be interrupted
    try:
        return f"{sound.folder.name}, {said}", *judge(sound, scratch)
    finally:
        faulthandler.cancel_dump_traceback_later()


def run(seed: int, numbers: range, work: Path) -> tuple[Counter[str], list[str]]:
    """Judge these inputs; returns how many ended how, and the faults (also printed at once), each with what is needed
    to see it again."""
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    ends: Counter[str] = Counter()
    faults = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sounds = make_sound(work)
        for number in numbers:
            print(f"\rseed {seed}, input {number}", end="", file=sys.stderr, flush=True)  # for what ends the process
            said, end, fault = one_input(sounds, work / "damaged", seed, number)
            ends[end] += 1
            if fault is not None:
                faults.append(f"seed {seed}, input {number}: {said}\n{fault}")
                print(f"\r{faults[-1]}\n", file=sys.stderr, flush=True)
    return ends, faults


def command_line(what: str, run: Callable[[int, range, Path], tuple[Counter[str], list[str]]]) -> NoReturn:
    """Of a program that damages ``what`` and prints the faults. ``run``: as here."""
    parser = argparse.ArgumentParser(description=f"Damage {what}; print the faults.")
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="this input alone")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    numbers = range(args.inputs) if args.only is None else range(args.only, args.only + 1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        ends, faults = run(args.seed, numbers, Path(work))
    took = f"{len(numbers)} inputs in {time.monotonic() - began:.0f} s"
    print(f"seed {args.seed}: {took}, {dict(ends)}, {len(faults)} faults")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    command_line("checkpoints", run)
