"""tokenizer.py against open_clip's tokenizer; open_clip contains the vocabulary file."""

import gzip
import random
import string
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from config import Config
from datasets import LABEL_SETS
from errors import UserError
from tokenizer import END, START, _vocabulary, tokenize

PACKAGE = find_spec("open_clip")                           # the import itself would take seconds
VOCAB = str(Path(PACKAGE.origin).with_name("bpe_simple_vocab_16e6.txt.gz")) if PACKAGE else ""
needs_vocab = pytest.mark.skipif(not Path(VOCAB).is_file(), reason="needs the vocabulary file of open_clip")

@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip("open_clip").SimpleTokenizer()


def words(row):
    return row[1:int(row.argmax())].tolist()


@needs_vocab
def test_complete_vocabulary(peer):
    _, ids = _vocabulary(VOCAB)
    assert len(ids) == 49406 == START and all(peer.encoder[symbol] == n for symbol, n in ids.items())
    assert END == 49407


@needs_vocab
def test_prompts_of_all_label_sets(peer):
    names = {name for labels in LABEL_SETS.values() for name in labels.classes}
    prompts = [Config().prompt.replace("{class}", name.lower().replace("-", " ")) for name in names]
    assert len(names) > 25 and torch.equal(tokenize([*names, *prompts], VOCAB), peer([*names, *prompts]))


@needs_vocab
def test_generated_ascii(peer):
    rng = random.Random(0)
    pieces = ["don't", "we'll", "I'VE", "'s", "'S ", "'RE", "''", " ", "   ", "\t", "person", "HAT", "Left-Arm", "...",
              "__", "3.14", "2024", "&amp;", "&lt;", "&gt;", "&quot;", "&#39;", "&#x41;", "&amp;amp;",
              "&amp;amp;amp;lt;", "&eacute;", "&nbsp;", "&copy", "&notit;", "<b>", "</b>", "&", ";", "-"]
    compared = 0
    for _ in range(2_000):
        text = "".join(rng.choice(pieces) if rng.random() < 0.4 else rng.choice(string.printable[:95])
                       for _ in range(rng.randint(0, 25)))
        ids = peer.encode(text)
        if len(ids) <= 75:
            compared += 1
            assert words(tokenize([text], VOCAB)[0]) == ids, repr(text)
    assert compared > 1_900


@needs_vocab
def test_other_alphabets(peer):
    same = ["café", "cafe\u0301", "naïve Ärmel", "рука", "手 腕", "يد", "😀👍", "χέρι!", "हाथ", "٣٤"]
    other = ["½arm", "ⅧⅧ", "cafÃ©", "“hat”", "ﬁt", "ｈａｔ", "&EACUTE;", "a\x00b"]      # see tokenizer.py
    assert all(words(tokenize([text], VOCAB)[0]) == peer.encode(text) for text in same)
    assert all(words(tokenize([text], VOCAB)[0]) != peer.encode(text) for text in other)


def test_without_vocabulary_each_byte_is_a_token():
    ids = words(tokenize(["Hat é"], "")[0])
    first, last = "é".encode()                             # 0xC3 0xA9; printable bytes come first in the vocabulary
    assert ids[:3] == [ord("h") - 33, ord("a") - 33, ord("t") - 33 + 256]
    assert ids[3:] == [94 + 12 + first - 174, 94 + last - 161 + 256]
    assert tokenize([], "").shape == (0, 77) and words(tokenize([""], "")[0]) == []


@needs_vocab
def test_a_prompt_that_is_too_long():
    assert tokenize(["hat " * 75], VOCAB)[0, 76] == 49407
    with pytest.raises(UserError, match="78 tokens"):
        tokenize(["hat " * 76], VOCAB)
    with pytest.raises(UserError, match="each byte is a token"):
        tokenize(["a photo of a " + "very " * 20 + "long coat"], "")


@needs_vocab
def test_damaged_and_wrong_vocabulary_files(tmp_path):
    packed = Path(VOCAB).read_bytes()
    text = gzip.decompress(packed)
    flipped = packed[:900_000] + b"?" + packed[900_001:]
    cases = {"cut.gz": (packed[:500_000], "damaged"), "flipped.gz": (flipped, "damaged"),
             "empty.gz": (b"", "not CLIP's"), "short.txt": (text[:-9], "not CLIP's")}
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            tokenize(["hat"], str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
        assert "python download.py" in str(caught.value)
    (tmp_path / "unpacked.txt").write_bytes(text)
    assert words(tokenize(["hat"], str(tmp_path / "unpacked.txt"))[0]) == [3801]
