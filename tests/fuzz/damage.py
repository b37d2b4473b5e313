"""What can happen to a checkpoint's files: one random damage at a time, which follows from the generator alone."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

WHOLE, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
DROP = object()
HUGE = "@huge@"  # stands for an integer of 400 digits, which Python would rather not print
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, -1, -7, 0.0, 0.5, -0.5, 1.5, 1e-30, 1e30, 1e308, 2**31, 2**63, 10**12, HUGE,
    float("nan"), float("inf"), "", "x", "7", "full_attention", "a\nb\r\n\x1b[0m\ud800", "long " * 3000, [], [1],
    [None], ["x"], [[1]], [1] * 50, {}, {"a": 1}, {"a": {"b": {"c": []}}},
)  # fmt: skip
# Keys that a config may have although the sound one does not, with values that mean something.
MORE: dict[str, tuple[Any, ...]] = {
    "sliding_window": (4, 12, 4096), "use_sliding_window": (True,), "max_window_layers": (0, 1, 9),
    "layer_types": (["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention"], ["chunked_attention"] * 2),
    "rope_theta": (700.0, 1, 1.0000001), "attention_bias": (True,), "mlp_bias": (True,), "pretraining_tp": (2,),
    "partial_rotary_factor": (0.5, 1.0), "quantization_config": ({"bits": 4},), "per_layer_config": ({},),
    "rope_scaling": (
        {"type": "linear", "factor": 2.0}, {"type": "yarn", "factor": 4.0}, {"type": "dynamic", "factor": 2},
    ),
    "rope_parameters": (
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
        {"rope_type": "longrope", "long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
    ),
    "auto_map": ({"AutoConfig": "mine.Config"},), "is_encoder_decoder": (True,), "text_config": ({},),
    "num_local_experts": (2, 10**9), "head_dim": (8, 16, 32), "tie_word_embeddings": (True, False),
    "attn_logit_softcapping": (3.0,), "scale_attn_weights": (False,), "reorder_and_upcast_attn": (True,),
    "scale_attn_by_inverse_layer_idx": (True,), "activation_function": ("relu",), "layer_norm_eps": (0.1,),
    "use_bidirectional_attention": (True,), "output_attentions": (True,), "return_dict": (False,),
    "use_cache": (False,), "add_cross_attention": (True,), "torch_dtype": ("float16", "nothing"),
    "dtype": ("bfloat16", "nothing"),
}  # fmt: skip
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id", "num_beams")
Damage = Callable[[random.Random, Path], str]


def written(content: object) -> str:
    """``content`` as JSON, with whatever JSON should not have."""
    return json.dumps(content).replace(f'"{HUGE}"', "9" * 400)


def _places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in nested objects something may be changed."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found = []
    for key, value in items:
        found += [(*path, key), *_places(value, (*path, key))]
    return found


def _set(content: Any, path: tuple[Any, ...], value: object) -> None:
    for key in path[:-1]:
        content = content[key]
    if value is DROP:
        del content[path[-1]]
    else:
        content[path[-1]] = value


def _other(dice: random.Random, value: object) -> object:
    """Another value for a field, often a near one."""
    near: list[object] = [DROP, [value], {"a": value}, str(value)]
    if isinstance(value, int | float):
        near += [value + 1, value - 1, value * 2, value // 2, float(value), -value]
    return dice.choice(near) if dice.random() < 0.4 else dice.choice((DROP, *ODD))


def damage_json(dice: random.Random, path: Path, more: dict[str, tuple[Any, ...]] | None = None) -> str:
    """Change a field of a JSON object, or add one; now and then the text itself."""
    text = path.read_text()
    if dice.random() < 0.06:
        return damage_bytes(dice, path, len(text))
    content = json.loads(text)
    if more and dice.random() < 0.35:
        key = dice.choice(list(more))
        place: tuple[Any, ...] = (key,)
        value = dice.choice((*more[key], *more[key], dice.choice(ODD)))
    else:
        place = dice.choice(_places(content) or [("a",)])
        old = content
        for key in place:
            old = old.get(key) if isinstance(old, dict) else old[key]
        value = _other(dice, old)
    if value is not DROP or len(place) > 1 or place[0] in content:
        _set(content, place, value)
    path.write_text(written(content))
    return f"{path.name}: {'.'.join(map(str, place))}={'(dropped)' if value is DROP else repr(value)[:60]}"


def damage_bytes(dice: random.Random, path: Path, within: int) -> str:
    """Change, lose or add bytes among the first ``within`` ones, or cut the file short."""
    data, at = bytearray(path.read_bytes()), dice.randrange(within)
    how = dice.choice(("flip", "flip", "flip", "set", "lose", "add", "cut"))
    if how == "flip":
        data[at] ^= 1 << dice.randrange(8)
    elif how == "set":
        data[at] = dice.randrange(256)
    elif how == "lose":
        del data[at : at + dice.choice((1, 8))]
    elif how == "add":
        data[at:at] = dice.randbytes(dice.choice((1, 8)))
    else:
        del data[dice.choice((at, dice.randrange(len(data)))) :]
    path.write_bytes(data)
    return f"{path.name}: {how} at byte {at}"


def damage_header(dice: random.Random, path: Path) -> str:
    """Change a safetensors file's length, its header's bytes, or what the header says."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    if dice.random() < 0.6:
        return damage_bytes(dice, path, 8 + length)
    if dice.random() < 0.2:
        new = dice.choice((0, 1, length - 1, length + 1, length + 8, len(data), 2**32, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", new) + data[8:])
        return f"{path.name}: length {new}"
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    one, two = dice.choice(names), dice.choice(names)
    text = None
    how = dice.choice(("type", "shape", "extent", "swap", "same", "twice", "drop", "name", "field", "metadata", "pad"))
    if how == "type":
        header[one]["dtype"] = dice.choice(("F16", "BF16", "F64", "I32", "U8", "F8_E4M3", "", 4, None))
    elif how == "shape":
        shape = header[one]["shape"]
        odd: tuple[object, ...] = ([], [0], [-1, *shape], [1 << 62, 4], "x", [1.5], [HUGE])
        header[one]["shape"] = dice.choice((shape[::-1], [*shape, 1], *odd))
    elif how == "extent":
        start, stop = header[one]["data_offsets"]
        near: tuple[object, ...] = ([start, stop + 4], [start - 4, stop], [stop, start], [start], [0, stop - start])
        header[one]["data_offsets"] = dice.choice((*near, [HUGE, HUGE], [-4, 0], None))
    elif how == "swap":
        header[one], header[two] = header[two], header[one]
    elif how == "same":
        header[one] = header[two]
    elif how == "drop":
        del header[one]
    elif how == "name":
        header[dice.choice((f"module.{two}", one.removeprefix("model."), f"_orig_mod.{one}", one[:-1], "", "a\nb"))] = (
            header.pop(one)
        )
    elif how == "field":
        header[one] = dice.choice((None, [], {}, 3, {**header[one], "more": 1}))
    elif how == "metadata":
        header["__metadata__"] = dice.choice((None, [], {}, {"format": 1}, {"format": "pt", "a": None}, "x"))
    elif how == "twice":
        text = written(header)[:-1] + f', "{one}": {json.dumps(header[dice.choice((one, two))])}' + "}"
    text = written(header) if text is None else text
    text += " " * dice.randrange(9) if how == "pad" else ""
    raw = text.encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    return f"{path.name}: {how} of {one} (and {two})"


def damage_index(dice: random.Random, path: Path) -> str:
    """Change what an index of weights says."""
    if dice.random() < 0.3:
        return damage_json(dice, path)
    content = json.loads(path.read_text())
    weight_map = content["weight_map"]
    name, files = dice.choice(list(weight_map)), sorted(set(weight_map.values()))
    how = dice.choice(("drop", "file", "odd", "rename", "more"))
    if how == "drop":
        del weight_map[name]
    elif how == "file":
        weight_map[name] = dice.choice((*files, *files, "nothing.safetensors", "..", "", "../x", f"./{files[0]}"))
    elif how == "odd":
        weight_map[name] = dice.choice(ODD)
    elif how == "rename":
        weight_map[dice.choice((f"module.{name}", name[1:], ""))] = weight_map.pop(name)
    else:
        weight_map[dice.choice(("more", f"module.{name}"))] = files[0]
    path.write_text(written(content))
    return f"{path.name}: {how} {name}"


def damage_pickle(dice: random.Random, path: Path) -> str:
    """Change a pickled file before its first tensor's numbers begin, or behind the last ones."""
    data = path.read_bytes()
    pickled, directory = data.index(b"data/0"), data.rindex(b"PK\x05\x06")
    if dice.random() < 0.7:
        return damage_bytes(dice, path, pickled)
    changed, at = bytearray(data), dice.randrange(directory, len(data))
    changed[at] ^= 1 << dice.randrange(8)
    path.write_bytes(changed)
    return f"{path.name}: flip at byte {at}"


def damage(dice: random.Random, folder: Path) -> str:
    """Damage one file of ``folder``; returns what was done."""
    if dice.random() < 0.5:
        return damage_json(dice, folder / "config.json", MORE)
    if dice.random() < 0.3:
        odd = dict.fromkeys(SAMPLING, (*ODD, 0.5, 20))
        return damage_json(dice, folder / "generation_config.json", odd)
    if (folder / INDEX).exists():
        parts = sorted(folder.glob("*.safetensors"))
        return damage_index(dice, folder / INDEX) if dice.random() < 0.5 else damage_header(dice, dice.choice(parts))
    if (folder / PICKLED).exists():
        return damage_pickle(dice, folder / PICKLED)
    return damage_header(dice, folder / WHOLE)
