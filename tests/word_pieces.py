"""A tokenizer of whole words, as transformers reads it and as the sentencepiece model that llama.cpp's converter wants.

It is as those of Llama 2, Mistral 7B, Gemma and Phi 3 are: a space is a mark in front of a word, pieces are joined in the order
of their scores, and what no piece holds is told byte by byte. So the same words can be read in transformers and in llama.cpp.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tests.models.families import Family

PAD, UNKNOWN = "<pad>", "<unk>"
_PIECES = 500
_ENDS = ("<s>", "</s>")
_SPACE = "▁"
_WORD = re.compile(rf"{_SPACE}?[\w']+|{_SPACE}?[^\w\s'{_SPACE}]")
_BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
# What a sentencepiece model calls its kinds of pieces.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
# What it says behind them: that they are joined by their scores, and that there are bytes.
_TRAINER = bytes.fromhex("12 05 18 02 98 02 01")


@dataclass(frozen=True)
class Words:
    """How a tokenizer reads texts.

    Attributes:
        of_bytes: as Qwen's does, and then it is no sentencepiece model.
        spaced: what begins a text or follows a mark is read as if a space stood before it.
        stripping: marks take the white space behind them along.
    """

    of_bytes: bool = False
    spaced: bool = True
    stripping: bool = False


def make_tokenizer(texts: Iterable[str], family: Family, words: Words) -> PreTrainedTokenizerFast:
    """A tokenizer of the words of some texts, with a family's chat template and marks; token 0 pads."""
    core = _of_bytes(texts) if words.of_bytes else _of_words(texts, words.spaced)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=family.closing,
        bos_token=family.begin or None,
        additional_special_tokens=[
            AddedToken(name, special=True, normalized=False, rstrip=words.stripping) for name in family.markers
        ],
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in family.plain_markers])
    return tokenizer


def _of_bytes(texts: Iterable[str]) -> Tokenizer:
    core = Tokenizer(BPE())
    core.pre_tokenizer = Sequence([Split(Regex(PRETOKENIZE_REGEX), "isolated"), ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        BpeTrainer(vocab_size=_PIECES, initial_alphabet=alphabet, special_tokens=[PAD], show_progress=False),
    )
    return core


def _of_words(texts: Iterable[str], spaced: bool) -> Tokenizer:
    pieces = _learned(texts)
    known = set(pieces)
    # Whichever way a piece can be put together, as sentencepiece has it.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    vocabulary = {piece: place for place, piece in enumerate([PAD, UNKNOWN, *_ENDS, *_BYTES, *pieces])}
    core = Tokenizer(BPE(vocabulary, merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    marked = normalizers.Replace(" ", _SPACE)
    core.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), marked]) if spaced else marked
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spaced else steps)
    return core


def _learned(texts: Iterable[str]) -> list[str]:
    """Letters first, and then pieces, from the first that was put together to the last."""
    core = Tokenizer(BPE())
    # A word is a text of its own here, so that no piece reaches over its end.
    words = (word for text in texts for word in _WORD.findall(f"{_SPACE}{text}".replace(" ", _SPACE)))
    core.train_from_iterator(words, BpeTrainer(vocab_size=_PIECES, show_progress=False))
    vocabulary = core.get_vocab()
    return sorted(vocabulary, key=lambda piece: vocabulary[piece])


def write_sentencepiece(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a tokenizer of words as a sentencepiece model, which is a list of pieces in protobuf's form."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    written = b""
    for piece, place in sorted(vocabulary.items(), key=lambda entry: entry[1]):
        kind = _UNKNOWN if piece == UNKNOWN else _CONTROL if place in added else _BYTE if piece in _BYTES else _NORMAL
        text = piece.encode()
        entry = b"\x0a" + _number(len(text)) + text + b"\x15" + struct.pack("<f", -place) + b"\x18" + _number(kind)
        written += b"\x0a" + _number(len(entry)) + entry
    (folder / "tokenizer.model").write_bytes(written + _TRAINER)
    # The converter reads there which of them are text, and that no text begins with a token of its own.
    plain = {token.content: place for place, token in added.items() if not token.special}
    (folder / "added_tokens.json").write_text(json.dumps(plain), encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    known = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps({**known, "add_bos_token": False}), encoding="utf-8")


def _number(value: int) -> bytes:
    """A whole number in protobuf's form: seven bits a byte, the lowest first."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _number(value >> 7)
