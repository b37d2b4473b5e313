"""Random SentencePiece models, written without training one."""

from __future__ import annotations

import random
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # kinds of pieces


def write_model(dice: random.Random, path: Path) -> None:
    """A model with byte fallback: unigram or BPE, with the usual control pieces."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = dice.choice([1, 2])
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.normalizer_spec.add_dummy_prefix = dice.random() < 0.7
    pieces = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), ("<user>", USER_DEFINED)]
    pieces += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    words = ["▁", *"helloabt.é", "▁h", "▁he", "ll", "▁t", "▁th", "▁the", "llo", "▁hello", "☃"]
    dice.shuffle(words)
    for name, kind in [*pieces, *((word, NORMAL) for word in dict.fromkeys(words))]:
        piece = model.pieces.add()
        piece.piece, piece.type, piece.score = name, kind, -float(len(model.pieces)) if kind == NORMAL else 0.0
    path.write_bytes(model.SerializeToString())
