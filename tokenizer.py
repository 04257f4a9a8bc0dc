"""CLIP's byte-pair tokenizer on the standard library (paper §3.1: the class names go through CLIP's text tower).

Reference: github.com/openai/CLIP (MIT), which needs the packages `regex` and `ftfy`. Equal to it for a line of ASCII,
HTML entities included, and nearly always beyond ASCII. Not implemented: the repairs of `ftfy` (wrongly decoded text,
curly quotes, ligatures, full-width letters, control characters, entities in capitals such as &EACUTE;), numerals other
than decimal digits ("½" counts as a letter), and special tokens inside a text (they are plain characters here).
"""

import gzip
import hashlib
import html
import re
import unicodedata
import zlib
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from errors import UserError, reading

CONTEXT = 77                                               # tokens of the text tower
START, END = 49406, 49407
VOCAB_SIZE = 49408                                         # bytes, bytes with end-of-word marker, merges, START, END
MERGES = VOCAB_SIZE - 2 * 256 - 2                          # the vocabulary file has more, which CLIP does not use
TEXT_SHA256 = "67603cfda2e032ad77b5f8808af37789d590db664b26df8705d2bf8b3c553fc8"       # of the unpacked file

# Contractions, letters, one digit at a time, or anything else but whitespace.
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")
ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")


def tokenize(texts: list[str], vocab_path: str) -> Tensor:
    """Token ids of each text between START and END, padded with zeros: int64 (K, 77).

    `vocab_path` "" means no merges: one token per byte, for random weights only.
    """
    merges, ids = _vocabulary(str(vocab_path))
    tokens = torch.zeros(len(texts), CONTEXT, dtype=torch.int64)
    for row, text in zip(tokens, texts):
        words = WORD.findall(_clean(text))
        encoded = [START, *(ids[symbol] for word in words for symbol in _merge(word, merges)), END]
        if len(encoded) > CONTEXT:
            hint = "" if vocab_path else "; without a vocab each byte is a token"
            raise UserError(f"prompt, classes: {text[:60]!r} has {len(encoded)} tokens, CLIP takes {CONTEXT}{hint}")
        row[:len(encoded)] = torch.tensor(encoded)
    return tokens


def _clean(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    if "<" not in text:                                    # ftfy's rule: a text with < is HTML, escaped on purpose
        while (opened := ENTITY.sub(lambda match: html.unescape(match[0]), text)) != text:
            text = opened
    return html.unescape(html.unescape(text)).lower()


def _merge(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """The symbols of a word: its bytes, adjacent ones merged greedily, lowest rank first."""
    symbols = [BYTE_SYMBOLS[byte] for byte in word.encode("utf-8")]
    symbols[-1] += "</w>"
    while len(symbols) > 1:
        best = min(zip(symbols, symbols[1:]), key=lambda pair: merges.get(pair, MERGES))
        if best not in merges:
            break
        joined, n = [], 0
        while n < len(symbols):
            size = 2 if tuple(symbols[n:n + 2]) == best else 1
            joined.append("".join(symbols[n:n + size]))
            n += size
        symbols = joined
    return symbols


def _byte_symbols() -> list[str]:
    """A printable character for each byte: itself, or one from 256 upwards for whitespace and control characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


BYTE_SYMBOLS = _byte_symbols()


@lru_cache(maxsize=4)
def _vocabulary(path: str) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """The ranks of the merges and the ids of all symbols."""
    merges = [tuple(line.split()) for line in _read(Path(path)).split("\n")[1:MERGES + 1]] if path else []
    symbols = sorted(BYTE_SYMBOLS)                         # bytes that are their own symbol come first
    symbols += [f"{symbol}</w>" for symbol in symbols] + ["".join(merge) for merge in merges]
    return {merge: rank for rank, merge in enumerate(merges)}, {symbol: n for n, symbol in enumerate(symbols)}


def _read(path: Path) -> str:
    """The unpacked vocabulary, checked: any other file would silently change the token ids."""
    try:
        with reading(path, "vocabulary", "; `python download.py` gets CLIP's"):
            data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: is damaged or cut off; get it again with `python download.py`") from None
    if hashlib.sha256(data).hexdigest() != TEXT_SHA256:
        raise UserError(f"{path}: is not CLIP's vocabulary; get it with `python download.py`")
    return data.decode("utf-8")
