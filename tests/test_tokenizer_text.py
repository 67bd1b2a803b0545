"""tokenizer/text.py: added tokens, decoding, text from a stream; and the real Qwen2 vocabulary, where it is there."""
import json
import random
import unicodedata
from pathlib import Path

import pytest

from small_tokenizer import ends, line_of, spec, token, write
from tokenizer import load_tokenizer
from tokenizer.text import AddedTokens, compose

QWEN2 = Path(__file__).parents[2] / "shared" / "data" / "tokenizers" / "qwen2"


def test_qwen2_vocabulary_and_chat():
    if not QWEN2.is_dir():
        pytest.skip(f"the Qwen2 vocabulary is not at {QWEN2}")
    ours = load_tokenizer(QWEN2)
    texts = (QWEN2 / "vocab_test.inp").read_text().split("\n__ggml_vocab_test__\n")
    rows = (QWEN2 / "vocab_test.out").read_text().split("\n")[:len(texts)]
    assert len(texts) == 47
    for text, row in zip(texts, rows, strict=True):
        assert ours.encode(text) == [int(id) for id in row.split()]
        assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text)
    for case in json.loads((QWEN2 / "chat_golden.json").read_text()):
        assert ours.chat(case["messages"]) == case["text"]
        assert ours.chat_ids(case["messages"]) == case["ids"] == ours.encode(case["text"], allow_special=True)
    assert ours.eos_ids == {151645} and ours.bos_ids == [] and ours.vocab_size == 151936
    for text in ("a" * 200_000, " " * 300_000 + "a", "\n \t" * 50_000):
        with ends():
            assert ours.decode(ours.encode(text)) == text


def test_added_tokens(tmp_path):
    added = [token(300, "<|x|>"), token(301, "<|x"), token(302, "<t>", special=False), token(303, "K!", normalized=True),
             token(304, "<|y|>", special=False, normalized=True)]
    ours = load_tokenizer(write(tmp_path, spec(added=added)))
    assert ours.encode("<|x|><|x<t>", allow_special=True) == [300, 301, 302]        # the longest of several
    assert ours.encode("<|x|><t>") == [*b"<|x|>", 302]                              # special ones are text, the others never
    assert ours.encode("\u212a!", allow_special=True) == [303]                      # the Kelvin sign is K after NFC
    assert ours.encode("<|y|>") == [304]
    assert ours.decode([300, 302, 104]) == "<|x|><t>h" and ours.decode([300, 302, 104], skip_special=True) == "<t>h"
    assert ours.decode([299, 10_000]) == ""                                         # rows of the embedding that no token has
    for id in (-1, True, 1.0, "1", None):
        with pytest.raises(ValueError) as error:
            ours.decode([id])
        assert "token id" in line_of(error)
    with pytest.raises(ValueError) as error:
        ours.encode("a\ud800")
    assert "surrogate" in line_of(error) and "position 1" in line_of(error)


def test_added_tokens_are_found_leftmost_and_longest():
    assert list(AddedTokens({}).cut("ab")) == [("ab", None)]
    r = random.Random(1)
    for _ in range(2000):
        ids = {"".join(r.choice("abé\n") for _ in range(r.randrange(1, 5))): id for id in range(r.randrange(1, 7))}
        refused = frozenset(id for id in ids.values() if r.random() < 0.3)
        text, expected, plain, i = "".join(r.choice("abéc\n") for _ in range(20)), [], "", 0
        while i < len(text):
            found = max((token for token in ids if text.startswith(token, i)), key=len, default="")
            if found and ids[found] not in refused:
                expected += [(plain, None), (found, ids[found])]
                plain = ""
            else:
                plain += found or text[i]
            i += len(found) or 1
        assert list(AddedTokens(ids).cut(text, refused)) == [*expected, (plain, None)]


@pytest.mark.parametrize("content", ["<|s_{}|>", "{}" + "<|" * 40, "<|" * 40 + "{}", "a{}"], ids=["short", "begun", "late", "letters"])
def test_thousands_of_added_tokens_cost_linear_time(tmp_path, content):
    added = [token(1000 + i, content.format(i)) for i in range(5000)]
    with ends():
        ours = load_tokenizer(write(tmp_path, spec(added=added)))
        for text in ("<" * 150_000, "<|" * 75_000, "a" * 150_000, added[7]["content"] * 2500, "plain text, and so on " * 7_500):
            assert ours.decode(ours.encode(text, allow_special=True)) == text


def test_many_lengths_of_added_token_costs_linear_time(tmp_path):
    ours = load_tokenizer(write(tmp_path, spec(added=[token(1000 + i, "a" * i + "b") for i in range(1, 65)])))
    with ends():
        assert len(ours.encode("a" * 100_000)) == 100_000
    ours = load_tokenizer(write(tmp_path, spec(added=[token(1000 + i, "a" * i) for i in range(2, 66)])))
    with ends():
        assert len(ours.encode("ab" * 50_000, allow_special=True)) == 100_000


def test_long_runs_of_combining_marks_are_refused_and_short_ones_are_linear(tmp_path):
    ours = load_tokenizer(write(tmp_path, spec()))
    for count in (501, 1_000_000):
        with pytest.raises(ValueError) as error:
            ours.encode("a" + "\u0301\u0316" * count)
        assert "combining marks" in line_of(error)
    text = ("a" + "\u0301\u0316" * 250) * 1000
    with ends():
        assert ours.decode(ours.encode(text)) == compose(text)


# ---- text from a stream ----------------------------------------------------------------------------------------------------------

def test_stream_is_decode_and_never_half_a_character(tmp_path):
    ours, r = load_tokenizer(write(tmp_path, spec(added=[token(300, "<é>")]))), random.Random(0)
    for _ in range(3000):
        kind = r.random()
        ids = [r.choice([*range(256), 300, 400, 0xE2, 0xF0, 0x9F, 0x80]) for _ in range(r.randrange(8))] if kind < 0.7 else \
            [*"".join(r.choice("aé数😀👨‍👩‍👧\u0301") for _ in range(4)).encode()[r.randrange(3):]]
        stream = ours.stream()
        parts = [stream.add(id) for id in ids] + [stream.end()]
        assert "".join(parts) == ours.decode(ids) == b"".join(ours.bytes_of(id) for id in ids).decode("utf-8", "replace")
    stream = ours.stream()
    assert [stream.add(id) for id in "😀".encode()] == ["", "", "", "😀"] and stream.end() == ""
    skipping = ours.stream(skip_special=True)
    assert skipping.add(300) == "" and skipping.add(104) == "h"
