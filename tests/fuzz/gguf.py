"""GGUF files with one random damage each: they are refused in one line, or read as a model of the shapes they announce.

    python -m tests.fuzz.gguf --inputs 5000 --seed 1

What is read without a word must be finite in its scales, and a text that its tokenizer reads must have tokens. Each
input follows from the seed and its number; ``--only N`` runs one again.
"""

from __future__ import annotations

import faulthandler
import random
import struct
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch

from launch.preflight import clear
from pipeinfer.core.config import Config
from pipeinfer.core.errors import UserError
from pipeinfer.text import Text
from stages.checkpoint.checkpoint import expected
from stages.checkpoint.spec import ModelSpec
from tests.fuzz.checkpoints import HANG_S, command_line, judge_refusal
from tests.models.gguf_files import convert
from tests.models.tiny import make_tiny

ODD = (0, 1, 2, 3, 7, 8, 9, 31, 33, 255, 256, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
MOST_READ = 4  # tensors of a model that was not refused


def make_sound(work: Path) -> list[bytes]:
    """Files that are not damaged: of a Llama in Q4_K and others, and of a Qwen in floats."""
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    llama = make_tiny(work / "llama", "LlamaForCausalLM", **wide)
    qwen = make_tiny(work / "qwen", "Qwen3ForCausalLM", num_hidden_layers=1)
    files = convert(llama, work / "llama.gguf", "Q4_K"), convert(qwen, work / "qwen.gguf", "F16")
    return [file.read_bytes() for file in files]


def damaged(dice: random.Random, data: bytes) -> tuple[str, bytes]:
    """The damage in words, and the damaged file. Most are in the header, of which the strings are most."""
    header = data.index(b"tokenizer.ggml.tokens")
    infos = data.index(b"token_embd.weight")
    place = dice.choice((dice.randrange(8, header), dice.randrange(infos - 8, infos + 700), dice.randrange(len(data))))
    match dice.randrange(7):
        case 0:
            return f"cut at {place}", data[:place]
        case 1:
            number = dice.choice(ODD)
            return f"{number} at {place}", data[:place] + struct.pack("<Q", number) + data[place + 8 :]
        case 2:
            number = dice.choice(ODD) % 2**32
            return f"{number} at {place}, 4 bytes", data[:place] + struct.pack("<I", number) + data[place + 4 :]
        case 3:
            noise = dice.randbytes(dice.randrange(1, 64))
            return f"noise at {place}", data[:place] + noise + data[place + len(noise) :]
        case 4:
            count = dice.randrange(1, 40)
            return f"{count} bytes less at {place}", data[:place] + data[place + count :]
        case 5:
            return f"bytes twice at {place}", data[:place] + data[place - 30 if place > 30 else 0 :]
        case _:
            bit = 1 << dice.randrange(8)
            return f"bit {bit} at {place}", data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]


def judge(path: Path, dice: random.Random) -> tuple[str, str | None]:
    """How a damaged file ends, as ``read`` or ``refused``, and the fault if it is one."""
    try:
        spec, weights = clear(Config(target=str(path), drafts=()), 1).target
        assert isinstance(spec, ModelSpec)
        shapes = dict(expected(spec))
        for name in dice.sample(list(shapes), min(MOST_READ, len(shapes))):
            found = weights.read([name], torch.float32)[name]
            if found.shape != shapes[name]:
                return "read", f"{name} has the shape {found.shape}, announced is {shapes[name]}"
        text = Text(path)
        if not text.encode("The ferry leaves at 7."):
            return "read", "a text has no tokens"
        text.decode([1, 2, 300])
    except UserError as error:
        return "refused", judge_refusal(error, path)
    except Exception:
        return "raised", traceback.format_exc()
    return "read", None


def run(seed: int, numbers: range, work: Path) -> tuple[Counter[str], list[str]]:
    """Judge these inputs; returns how many ended how, and the faults, each with what is needed to see it again."""
    sounds, ends, faults = make_sound(work), Counter[str](), list[str]()
    for number in numbers:
        dice = random.Random(f"{seed}/{number}")
        said, data = damaged(dice, dice.choice(sounds))
        path = work / f"damaged-{number % 2}.gguf"
        path.write_bytes(data)
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        end, fault = judge(path, dice)
        faulthandler.cancel_dump_traceback_later()
        ends[end] += 1
        if fault is not None:
            faults.append(f"seed {seed}, input {number}: {said}\n{fault}")
            print(f"{faults[-1]}\n", file=sys.stderr, flush=True)
    return ends, faults


if __name__ == "__main__":
    command_line("GGUF files", run)
