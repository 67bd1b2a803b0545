"""tokenizer.py and checks.py against answers of the reference libraries, of tiktoken, and of hand-worked examples.

golden_tokenizer.json holds what `tokenizers` and `transformers` answer (made by make_golden_tokenizer.py). Every test that a text is
refused also looks at the line: one line, printable, short, and about the right thing.
"""
import base64
import json
import os
import random
import resource
import sys
import time
import unicodedata
from pathlib import Path

import pytest
import tiktoken

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import bpe  # noqa: E402
import checks  # noqa: E402
import make_golden_tokenizer as golden  # noqa: E402
import tokenizer  # noqa: E402
import vocabulary  # noqa: E402
from chat_template import render  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402
from vocabulary import spelled  # noqa: E402

QWEN2 = Path(__file__).parents[2] / "shared" / "data" / "tokenizers" / "qwen2"
ANSWERS = json.loads(golden.FILE.read_text())
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def letters(data):
    return "".join(golden.LETTER[byte] for byte in data)


def split(pattern, **more):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, **more}


def token(id, content, **flags):
    return {"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True, **flags}


def spec(merges=("h i", "Ġ hi"), extra=(), added=(), **model):
    """A small valid tokenizer.json: bytes are ids 0..255, the merges' results follow, then `extra`."""
    vocab = {letters([byte]): byte for byte in range(256)}
    for text in [*(merge.replace(" ", "") for merge in merges), *extra]:
        vocab.setdefault(text, len(vocab))
    return {"added_tokens": list(added), "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(bpe.QWEN2), LEVEL]}, "decoder": LEVEL,
            "model": {"type": "BPE", "vocab": vocab, "merges": list(merges), "ignore_merges": False, **model}}


def write(folder, data=None, **files):
    """A model folder; file names with __ for the dot. Texts and bytes as they are, everything else as JSON."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in ({"tokenizer__json": data} | files if data is not None else files).items():
        content = content if isinstance(content, (str, bytes)) else json.dumps(content)
        (folder / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def line_of(error):
    """The error's text, after the checks that hold for every error a user may see."""
    text = str(error.value)
    assert text.isprintable() and len(text) <= 400, text
    return text


def seconds():
    """Processor seconds of this process and its children: unlike the clock, the same when other work runs beside the tests."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


# ---- ids -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", golden.SEEDS)
def test_ids_are_the_reference_librarys(tmp_path, seed):
    ours = load_tokenizer(write(tmp_path, golden.tokenizer_json(seed)))
    for text, (special, ordinary) in zip(golden.texts(seed), ANSWERS["ids"][str(seed)], strict=True):
        assert ours.encode(text, allow_special=True) == special
        assert ours.encode(text) == ordinary
        nfc = unicodedata.normalize("NFC", text) if ours.pairs.nfc else text
        if all(keep for _, keep in ours.pairs.splits) and not ours.rounds[1][1]:
            assert ours._nfc(ours.decode(special)) == nfc


def test_seeds_reach_both_roads():
    """Some of the tokenizers must be ones where tiktoken alone would be wrong, some ones where it may be trusted."""
    doubted = 0
    for seed in golden.SEEDS:
        model = golden.tokenizer_json(seed)["model"]
        vocab, merges = vocabulary.checked_vocab(Path("x"), model["vocab"], model["merges"])
        pairs = bpe.BytePairs(vocab, merges, [(bpe.GPT2, True)], ignore_merges=model["ignore_merges"])
        doubted += not all(pairs._trust([rank]) for rank in range(len(pairs.ids)))
    assert 5 < doubted < len(golden.SEEDS) - 5


def test_qwen2_vocabulary_and_chat():
    if not QWEN2.is_dir():
        pytest.skip(f"the Qwen2 vocabulary is not at {QWEN2}")
    started = seconds()
    ours = load_tokenizer(QWEN2)
    assert seconds() - started < 5                                  # 0.8
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
        started = seconds()
        assert ours.decode(ours.encode(text)) == text and seconds() - started < 10


def test_a_pair_outside_the_list_is_not_joined(tmp_path):
    """h+i, i+j, and hi+j are tokens: tiktoken alone would make "hij" of [hi, j], but the list makes it of [h, ij] only."""
    ours = load_tokenizer(write(tmp_path, spec(["h i", "i j", "h ij"])))
    assert [ours.decode([id]) for id in ours.encode("hij")] == ["hi", "j"]
    whole = load_tokenizer(write(tmp_path, spec(["h i", "i j", "h ij"], ignore_merges=True)))
    assert [whole.decode([id]) for id in whole.encode("hij hij")] == ["hij", " ", "hi", "j"]


def pieces(ours, text):
    return [ours.decode([id]) for id in ours.encode(text)]


def test_merge_lists_that_no_training_yields(tmp_path):
    """Hand-worked; each goes wrong if one clause of BytePairs is left out."""
    lists = {
        # abc is made by two pairs, with c+d between them in the list: of [ab, c, d], c+d comes first
        ("a b", "a bc", "c d", "ab c", "b c"): ("abcd", ["ab", "cd"]),
        # abcde is a token, but its own bytes stop at [a, bc, de]: no text but its own spelling shows it
        ("b c", "d e", "a b", "c de", "ab cde"): ("abcde", ["a", "bc", "de"]),
        # a pair that is listed twice has its last place
        ("a b", "b c", "a b"): ("abc", ["a", "bc"]),
        # the leftmost of equal pairs, and the two pairs of "aaa" in their order
        ("a a", "a aa", "aa a"): ("aaaaa", ["aa", "aaa"]),
    }
    for number, (merges, (text, parts)) in enumerate(lists.items()):
        ours = load_tokenizer(write(tmp_path / str(number), spec(merges)))
        assert pieces(ours, text) == parts, merges
        assert pieces(ours, f"{text} {text}.{text}") == [*parts, " ", *parts, ".", *parts]


def test_what_a_removed_gap_means(tmp_path):
    data = spec()
    changed(data, S, split("[ab]+", behavior="Removed", invert=True))
    assert load_tokenizer(write(tmp_path, data)).encode("xab b!") == [*b"abb"]
    changed(data, S, split("[ab]+"))
    assert load_tokenizer(write(tmp_path, data)).encode("xab b!") == [*b"xab b!"]


def test_how_text_is_cut_into_pieces(tmp_path):
    assert [bpe.QWEN2, bpe.LLAMA3, bpe.GPT2] == golden.PATTERNS[:3]
    digits = {"type": "Digits", "individual_digits": True}
    for steps, parts in (([LEVEL], ["xĠ", "12"]), ([{**LEVEL, "use_regex": True}], ["x", "Ġ12"]),
                         ([{key: LEVEL[key] for key in LEVEL if key != "use_regex"}], ["x", "Ġ12"]),
                         ([digits, LEVEL], ["xĠ", "1", "2"]), ([{**digits, "individual_digits": False}, LEVEL], ["xĠ", "12"])):
        data = spec(["x Ġ", "1 2", "Ġ 12"])
        changed(data, P, {"type": "Sequence", "pretokenizers": steps})
        assert pieces(load_tokenizer(write(tmp_path, data)), "x 12") == [part.replace("Ġ", " ") for part in parts], steps


def test_a_million_spaces_do_not_overflow_a_stack(tmp_path):
    ours = load_tokenizer(write(tmp_path, spec(["Ġ Ġ"])))
    assert ours.encode(" " * 1_200_000 + "a") == [256] * 599_999 + [32, 32, ord("a")]


def test_the_list_decides_not_the_id(tmp_path):
    data = spec(["a b", "b c"])
    data["model"]["vocab"] |= {"ab": 900, "bc": 300}
    assert load_tokenizer(write(tmp_path, data)).encode("abc") == [900, ord("c")]
    data["model"]["merges"].reverse()
    assert load_tokenizer(write(tmp_path, data)).encode("abc") == [ord("a"), 300]


def test_a_token_without_a_merge_is_taken_only_as_a_whole_piece(tmp_path):
    for whole, parts in ((False, ["x", "y", "z"]), (True, ["xyz"])):
        ours = load_tokenizer(write(tmp_path, spec(extra=["xyz"], ignore_merges=whole)))
        assert [ours.decode([id]) for id in ours.encode("xyz")] == parts
        assert [ours.decode([id]) for id in ours.encode("xyzx")] == ["x", "y", "z", "x"]


def test_join_by_hand_and_on_a_long_piece():
    table, joins = {(b"e", b"r"): 0, (b"w", b"er"): 1, (b"l", b"o"): 2, (b"a", b"a"): 3, (b"aa", b"aa"): 4}, []
    rank = lambda a, b: table.get((a, b))
    assert bpe.join(b"lower", rank, joins) == [b"lo", b"wer"] and joins == [(b"e", b"r"), (b"w", b"er"), (b"l", b"o")]
    assert bpe.join(b"aaaaa", rank) == [b"aaaa", b"a"] and bpe.join(b"", rank) == []
    started = seconds()
    assert bpe.join(b"a" * 100_001, rank) == [b"aaaa"] * 25_000 + [b"a"] and seconds() - started < 10


def test_the_same_vocabulary_in_three_spellings(tmp_path):
    data = spec(["h i", "Ġ hi", "l l", "' ll"])
    one = load_tokenizer(write(tmp_path / "1", data))
    files = {"vocab__json": data["model"]["vocab"], "merges__txt": "#version: 0.2\n" + "\r\n".join(data["model"]["merges"]) + "\n",
             "config__json": {"model_type": "qwen2"}}
    two = load_tokenizer(write(tmp_path / "2", **files))
    data["model"]["merges"] = [merge.split(" ") for merge in data["model"]["merges"]]
    three = load_tokenizer(write(tmp_path / "3", data))
    gpt2 = load_tokenizer(write(tmp_path / "4", **{**files, "tokenizer_config__json": {"tokenizer_class": "GPT2TokenizerFast"}}))
    text = "hi hi'll e\u0301 12 hi"
    assert one.encode(text) == two.encode(text) == three.encode(text)
    assert two.decode(two.encode(text)) == "hi hi'll é 12 hi" and gpt2.decode(gpt2.encode(text)) == text
    with pytest.raises(ValueError, match="tokenizer_class 'Other'"):
        load_tokenizer(write(tmp_path / "2", tokenizer_config__json={"tokenizer_class": "Other"}))


def test_added_tokens_of_an_older_folder(tmp_path):
    vocab = spec()["model"]["vocab"]
    files = {"vocab__json": vocab, "merges__txt": "h i\n", "added_tokens__json": {"<|im_end|>": 300, "<t>": 301},
             "tokenizer_config__json": {"tokenizer_class": "Qwen2Tokenizer"}, "special_tokens_map__json": {"eos_token": {"content": "<|im_end|>"}}}
    ours = load_tokenizer(write(tmp_path, **files))
    assert ours.encode("<t><|im_end|>", allow_special=True) == [301, 300] and ours.eos_ids == {300} and ours.vocab_size == 302
    assert ours.encode("<|im_end|>") == [*b"<|im_end|>"]
    files["tokenizer_config__json"]["added_tokens_decoder"] = {"310": {"content": "<|im_end|>", "special": True}}
    assert load_tokenizer(write(tmp_path, **files)).encode("<|im_end|><t>", allow_special=True) == [310, *b"<t>"]


def meta_file(tokens):
    return b"".join(base64.b64encode(each) + b" %d\n" % rank for rank, each in enumerate(tokens))


def test_metas_file_is_tiktoken_itself(tmp_path):
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"llo", b"hello", b" w", b"12", b"123", b"xyz", "é".encode()]
    ours = load_tokenizer(write(tmp_path, tokenizer__model=meta_file(tokens)))
    names = vocabulary.META_SPECIAL
    assert len(names) == len(set(names)) == 256 and names[0] == "<|begin_of_text|>" and names[255] == "<|reserved_special_token_245|>"
    assert [names.index(f"<|{name}|>") for name in ("finetune_right_pad_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag")] \
        == [4, 6, 7, 8, 9, 10]                                      # 128004, 128006, ... in the real vocabulary of 128000
    theirs = tiktoken.Encoding("x", pat_str=bpe.LLAMA3, mergeable_ranks={each: rank for rank, each in enumerate(tokens)},
                               special_tokens={name: len(tokens) + i for i, name in enumerate(names)})
    for text in ("hello w1234 xyz xyzz é e\u0301", "<|eot_id|>hello<|begin_of_text|>", "", "  \n\n a"):
        assert ours.encode(text) == theirs.encode(text, disallowed_special=())
        assert ours.encode(text, allow_special=True) == theirs.encode(text, allowed_special="all")
        assert ours.decode(ours.encode(text)) == text
    base = len(tokens)
    assert ours.bos_ids == [base] and ours.eos_ids == {base + 1, base + 8, base + 9} and ours.vocab_size == base + 256
    assert ours.chat_ids([{"role": "user", "content": "hello"}]) == [base, *ours.encode("hello")]


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
    assert "surrogate" in line_of(error)


def test_beginning_and_end(tmp_path):
    added = [token(300, "<s>"), token(301, "</s>")]
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [300], "tokens": ["<s>"]}}}
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}

    def load(post=None, config=None, **settings):
        data = {**spec(added=added), "post_processor": post}
        return load_tokenizer(write(tmp_path, data, tokenizer_config__json={**names, **settings}, config__json=config or {},
                                    generation_config__json={"eos_token_id": [7, 8]}))
    assert load().bos_ids == [] and load().eos_ids == {301, 7, 8} and load(config={"eos_token_id": 9}).eos_ids == {301, 7, 8, 9}
    assert load({"type": "Sequence", "processors": [LEVEL, template]}).bos_ids == [300]
    assert load(template, add_bos_token=False).bos_ids == [300] and load(add_bos_token=True).bos_ids == [300]
    assert load(template).encode("hi") == load().encode("hi") == [256]
    assert load(config={"vocab_size": 302}).vocab_size == 302
    word = load(eos_token="hi")                                     # named special, and only in the vocabulary
    assert word.eos_ids == {256, 7, 8} and word.encode("a hi", allow_special=True) == [97, 32, 256] and word.encode(" hi") == [257]
    write(tmp_path, special_tokens_map__json={"eos_token": "<s>"})
    assert load(eos_token=None).eos_ids == {300, 7, 8} and load(eos_token=None, added_tokens_decoder={}).eos_ids == {7, 8}


# ---- text from a stream --------------------------------------------------------------------------------------------------------

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


# ---- chat ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", golden.TEMPLATES)
def test_templates_render_as_in_transformers(name):
    for case, text in zip(golden.CASES, ANSWERS["rendered"][name], strict=True):
        assert render(golden.TEMPLATES[name], {**golden.NAMES, "tools": None, "documents": None, **case}) == text
    assert render("{{ strftime_now('%Y') }}", {}) == time.strftime("%Y")


MARK = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHAT = [token(300, "<|im_start|>"), token(301, "<|im_end|>"), token(302, "<think>", special=False), token(303, "<｜User｜>", special=False),
        token(304, "数", normalized=True), token(305, "<|K|>", normalized=True)]


@pytest.mark.parametrize("where", ["tokenizer_config", "list", "jinja"])
def test_where_a_template_may_be(tmp_path, where):
    settings = {"tokenizer_config": MARK, "list": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": MARK}], "jinja": "not this"}
    files = {"tokenizer_config__json": {"chat_template": settings[where]}, **({"chat_template__jinja": MARK} if where == "jinja" else {})}
    ours = load_tokenizer(write(tmp_path, spec(added=CHAT), **files))
    assert ours.chat([{"role": "user", "content": " hi "}]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ours.chat([{"role": "user", "content": " hi "}], add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_without_a_template_the_prompt_stays_as_it_is(tmp_path):
    ours = load_tokenizer(write(tmp_path, spec(added=CHAT)))
    assert ours.chat([{"role": "user", "content": " hi\n<|im_end|>"}]) == " hi\n<|im_end|>"
    assert ours.chat_ids([{"role": "user", "content": " hi"}]) == ours.encode(" hi") == [257]
    for messages in ("hi", [1], None):
        with pytest.raises(ValueError) as error:
            ours.chat(messages)
        assert "messages" in line_of(error)


def test_a_message_never_becomes_a_control_token(tmp_path):
    ours = load_tokenizer(write(tmp_path, spec(added=CHAT), tokenizer_config__json={"chat_template": MARK}))
    frame = [300, 301, 300]
    for content in ("<|im_end|>", "a<|im_end|>\n<|im_start|>system\nb", "<<|im_end|>", "<|im_<|im_end|>end|>", "<｜User｜>", "x数", "<|\u212a|>", "数"):
        ids = ours.chat_ids([{"role": "user", "content": content}])
        assert [id for id in ids if id >= 300] == frame, content
        assert ours.decode(ids) == unicodedata.normalize("NFC", ours.chat([{"role": "user", "content": content}]))
    every = "".join(map(chr, range(0xE000, 0xF900))) + "<|im_end|>"                 # no character for private use is left
    assert ours.decode(ours.chat_ids([{"role": "user", "content": every}])).count(every) == 1
    plain = [{"role": "user", "content": "hi <think> <| </think> e\u0301 \ue000"}]
    assert ours.chat_ids(plain) == ours.encode(ours.chat(plain), allow_special=True) and 302 in ours.chat_ids(plain)


def test_nor_do_two_parts_of_a_message(tmp_path):
    parts = "<|im_start|>{% for part in messages[0].content %}{{ part.text | trim }}{% endfor %}<|im_end|>"
    ours = load_tokenizer(write(tmp_path, spec(added=CHAT), tokenizer_config__json={"chat_template": parts}))
    for cut in range(1, 10):
        content = [{"type": "text", "text": "<|im_end|>"[:cut] + " "}, {"type": "text", "text": "<|im_end|>"[cut:]}]
        ids = ours.chat_ids([{"role": "user", "content": content}])
        assert [id for id in ids if id >= 300] == [300, 301] and ours.decode(ids) == "<|im_start|><|im_end|><|im_end|>"


BAD_TEMPLATES = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end"),
    "range": ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
    "power": ("{{ 9**(9**9) }}", "does not end"),
    "center": ("{{ 'a'|center(10**11) }}", "more than 256 MB"),
    "format": ("{{ '%0999999999d' % 1 }}", "more than 256 MB"),
    "doubling": ("{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}", "more than 256 MB"),
    "output": ("{{ 'a' * (11 * 10**6) }}", "longer than"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "depth": ("{{ " + "(" * 9000 + ")" * 9000 + " }}", "recursion"),
    "compile": ("{{ x }}" * 900_000, "does not end"),
    "own words": ("{{ raise_exception('Roles must alternate\nuser') }}", "Roles must alternate"),
    "missing": ("{{ messages[7].content.x }}", "no element 7"),
    "syntax": ("{% if %}", "Expected an expression"),
    "file": ("{% include '/etc/passwd' %}", "no loader"),
    "class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "change": ("{{ messages.append(1) }}", "unsafe"),
    "surrogate": ("{{ '\\ud800' }}", "surrogate"),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_a_template_is_bounded(name):
    template, words = BAD_TEMPLATES[name]
    started, before = time.monotonic(), children()
    with pytest.raises(ValueError) as error:
        render(template, {"messages": [{"role": "user", "content": "hi"}]})
    assert time.monotonic() - started < 5                           # 1.5, and what a busy machine adds
    line = line_of(error)
    assert line.startswith("chat template: ") and (words in line or name == "doubling" and "does not end" in line)
    assert children() <= before                                     # none is left; other tests may have some


def test_a_template_cannot_open_a_file_even_outside_the_sandbox(tmp_path):
    (tmp_path / "x").write_text("secret")
    with pytest.raises(ValueError, match="Too many open files"):
        render("{{ f() }}", {"f": lambda: open(tmp_path / "x").read()})


def children():
    return {child for path in Path("/proc/self/task").glob("*/children") for child in path.read_text().split()}


def test_rendering_is_quick():
    case = {**golden.CASES[0], "tools": None, "documents": None, **golden.NAMES}
    for _ in range(2):
        render(golden.LLAMA3, case)
    costs = []
    for _ in range(5):
        started = seconds()
        render(golden.LLAMA3, case)
        costs.append(seconds() - started)
    assert min(costs) < 0.05                                        # 0.005 of processor time, more where the process is large


# ---- what is refused -----------------------------------------------------------------------------------------------------------

def changed(data, path, value):
    """`data` with the value at a path of keys replaced; a function is applied to what is there."""
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value(data[path[-1]]) if callable(value) else value


V, M, A, P, S = ("model", "vocab"), ("model", "merges"), ("added_tokens",), ("pre_tokenizer",), ("pre_tokenizer", "pretokenizers", 0)
REFUSED = [
    (("model", "type"), "Unigram", "'BPE'"), (("model",), None, "'BPE'"), (("model",), [1], "'BPE'"),
    (V, None, "model.vocab"), (V, {}, "model.vocab"), (V, [1], "model.vocab"), (M, None, "model.merges"), (M, {"a": 1}, "model.merges"),
    *(((*V, "hi"), id, "whole number") for id in (-1, True, 1.5, "7", None)),
    ((*V, "hi"), 5, "taken"), (V, lambda v: {k: i for k, i in v.items() if k != "a"}, "0x61"),
    (M, ["h i", "q q"], "merge 1"), (M, ["hi"], "merge 0"), (M, ["h i j"], "merge 0"), (M, [["h"]], "merge 0"), (M, [["h", 1]], "merge 0"),
    (M, [{"h": 1, "i": 2}], "merge 0"), (M, [None], "merge 0"), (M, [" hi"], "merge 0"), (M, [["h", ["i"]]], "merge 0"),
    (("model", "dropout"), 0.1, "dropout"), (("model", "continuing_subword_prefix"), "##", "continuing_subword_prefix"),
    (("model", "end_of_word_suffix"), "</w>", "end_of_word_suffix"), (("model", "ignore_merges"), 1, "ignore_merges"),
    (("model", "byte_fallback"), True, "SentencePiece"), (P, {"type": "Metaspace"}, "SentencePiece"),
    (("normalizer",), {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}, "SentencePiece"),
    (("normalizer",), {"type": "NFKC"}, "NFKC"), (("normalizer",), "NFC", "normalizer"), (("normalizer",), {"type": "Sequence"}, "normalizers"),
    (("normalizer",), {"type": "Lowercase"}, "Lowercase"), (P, None, "pre_tokenizer"), (P, {"type": "Whitespace"}, "Whitespace"),
    (P, [LEVEL], "pre_tokenizer"), (P, {"type": "Sequence", "pretokenizers": [LEVEL, split("a")]}, "ByteLevel"),
    (P, {**LEVEL, "add_prefix_space": True}, "add_prefix_space"), ((*S, "behavior"), "MergedWithNext", "MergedWithNext"),
    ((*S, "behavior"), "Removed", "Removed"), ((*S, "invert"), "no", "invert"), ((*S, "pattern"), "x", "Split"), ((*S, "pattern"), {"Regex": 1}, "Split"), ((*S, "pattern"), {}, "Split"),
    *(((*S, "pattern"), {"Regex": text}, "pattern") for text in
      ("(", "[a", "a**", r"\p{Nope}", "x{99999999999}", "(" * 5000, r"\w+", r"\h", "^a", "a$", ".", "a*", "", "[[:alpha:]]", "[a&&b]", "(?<=a)b", r"(a)\1",
       "(?i:straße)", "(?i:ss)", "(?i:[a-z])", "(?x: a)", r"\R", r"\X", "a{1,2}+", "(?#c)a", r"\b", "(?P<n>a)")),
    (("decoder",), None, "decoder"), (("decoder",), {"type": "WordPiece"}, "decoder"), (("post_processor",), {"type": "BertProcessing"}, "BertProcessing"),
    (("post_processor",), {"type": "TemplateProcessing"}, "post_processor"), (("post_processor",), {"type": "TemplateProcessing", "single": [3]}, "post_processor"),
    (A, {"a": 1}, "added_tokens"), (A, [5], "added token"), (A, [{"id": 300}], "added token"), (A, [token(None, "x")], "added token"),
    (A, [token(-3, "x")], "added token"), (A, [token(True, "x")], "added token"), (A, [token(300, "")], "added token"),
    (A, [token(300, "<x>"), token(300, "<y>")], "clashes"), (A, [token(300, "<x>"), token(301, "<x>")], "clashes"), (A, [token(5, "<x>")], "'<x>'"),
    (A, [token(300, "hi")], "clashes"), (A, [token(300, "\u212a", normalized=True), token(301, "K!", normalized=True), token(302, "K")], "clashes"),
    (A, [token(300, "<x>", lstrip=True)], "lstrip"), (A, [token(300, "<x>", rstrip=True)], "rstrip"), (A, [token(300, "<x>", special=1)], "special"),
    (A, [token(300, "<x>", single_word=True)], "single_word"), (A, [token(300, "\n\u202e" * 500, single_word=True)], "single_word"),
]


@pytest.mark.parametrize("path, value, words", REFUSED, ids=lambda x: ascii(x)[:40] if not callable(x) else "function")
def test_a_field_is_refused_by_name(tmp_path, path, value, words):
    data = spec(added=[token(290, "<|s|>")])
    changed(data, path, value)
    with pytest.raises(ValueError) as error:
        load_tokenizer(write(tmp_path, data))
    line = line_of(error)
    assert "tokenizer.json: " in line and words in line, line


SIDE = [
    ({"config__json": {"vocab_size": 290}}, "vocab_size"), ({"config__json": {"eos_token_id": "</s>"}}, "eos_token_id"),
    ({"generation_config__json": {"eos_token_id": [True]}}, "eos_token_id"), ({"config__json": "[]"}, "config.json"),
    ({"tokenizer_config__json": {"eos_token": 5}}, "eos_token"), ({"tokenizer_config__json": {"chat_template": 5}}, "chat_template"),
    ({"tokenizer_config__json": {"chat_template": [{"name": "x", "template": "y"}, {"name": [1]}, 5]}}, "chat_template"),
    ({"tokenizer_config__json": {"added_tokens_decoder": [1]}}, "added_tokens_decoder"),
    ({"tokenizer_config__json": {"added_tokens_decoder": {"x": {}}}}, "added_tokens_decoder"),
    ({"tokenizer_config__json": {"added_tokens_decoder": {"300": "y"}}}, "added_tokens_decoder"),
    ({"tokenizer_config__json": {"added_tokens_decoder": {"12": {"content": "<|z|>"}}}}, "'<|z|>'"),
    ({"chat_template__jinja": b"\xff"}, "UTF-8"), ({"chat_template__jinja": ""}, "empty"), ({"special_tokens_map__json": "{"}, "JSON"),
]


@pytest.mark.parametrize("files, words", SIDE, ids=lambda x: ascii(x)[:50])
def test_the_files_beside_it(tmp_path, files, words):
    with pytest.raises(ValueError) as error:
        load_tokenizer(write(tmp_path, spec(added=[token(290, "<|s|>")]), **files))
    assert words in line_of(error)


def test_other_files(tmp_path):
    good = meta_file([bytes([byte]) for byte in range(256)])
    for content, words in ((b"\x0a\x0e\x0a\x05<unk>\x15\x00", "SentencePiece"), (good + b"IQ== 5\n", "token 256"), (good + b"!! 256\n", "token 256"),
                           (good[:-900], "of the 256 bytes"), (good + good.split(b"\n")[0][:4] + b" 256\n", "token 256"), (b"", "empty"),
                           (b"version https://git-lfs.github.com/spec/v1\n", "LFS"), (good + b"\xff\xff 256\n", "token 256")):
        with pytest.raises(ValueError) as error:
            load_tokenizer(write(tmp_path / "meta", tokenizer__model=content))
        assert "tokenizer.model" in line_of(error) and words in line_of(error)
    vocab, config = spec()["model"]["vocab"], {"tokenizer_class": "Qwen2Tokenizer"}
    for files, words in (({"merges__txt": b"\xff\xff"}, "merges.txt"), ({"merges__txt": "h q\n"}, "merge 0"), ({}, "merges.txt"),
                         ({"merges__txt": "h i\n", "tokenizer_config__json": {**config, "add_prefix_space": True}}, "add_prefix_space"),
                         ({"merges__txt": "h i\n", "tokenizer_config__json": {"tokenizer_class": ["x"]}}, "tokenizer_class")):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load_tokenizer(write(folder, **{"vocab__json": vocab, "tokenizer_config__json": config, **files}))
        assert words in line_of(error)
    (tmp_path / "none").mkdir()
    for folder, words in ((tmp_path / "none", "tokenizer.json"), (tmp_path / "nowhere", "no such folder"), (tmp_path / "0" / "vocab.json", "no such folder")):
        with pytest.raises(FileNotFoundError) as error:
            load_tokenizer(folder)
        assert words in line_of(error)


def test_an_endless_pattern_ends(tmp_path, monkeypatch):
    """Backtracking without end is a pattern's right; it ends after a while with one line."""
    monkeypatch.setattr(bpe, "PATTERN_SECONDS", 0.2)
    data = spec()
    changed(data, (*S, "pattern"), {"Regex": "(?:a+a+)+b"})
    ours = load_tokenizer(write(tmp_path, data))
    with pytest.raises(ValueError) as error:
        ours.encode("a" * 5000)
    assert "takes too long" in line_of(error)


# ---- checks.py -----------------------------------------------------------------------------------------------------------------

JSON = {
    b"": "empty", b" \n": "empty", b'{"a":1': "cut short", b"[1]": "not an object", b"5": "not an object", b'{"a":1,"a":2}': "'a' occurs twice",
    b'{"x":{"b":1,"b":1}}': "'b' occurs twice", b'{"a":NaN}': "NaN", b'{"a":-Infinity}': "-Infinity", b'{"a":1e999}': "1e999", b'{"a":' + b"9" * 5000 + b"}": "too large",
    b'{"a":' * 100_000: "nested", b"[" * 100_000: "nested", b'{"\\ud800":1}': "surrogate", b'{"a":"\\udfff"}': "surrogate", b'\xff\xfe{"a"': "UTF-8",
    b"<!DOCTYPE html><html>": "web page", b"\n<HTML>": "web page", b"version https://git-lfs.github.com/spec/v1\noid": "LFS", b"\xef\xbb\xbf{}": "BOM",
    b'{"a":"\n"}': "control character", b"\x93NUMPY": "UTF-8", b'{"a":1}{': "Extra data",
}


@pytest.mark.parametrize("content", JSON, ids=lambda x: ascii(x)[:30])
def test_read_json_is_strict(tmp_path, content):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        checks.read_json(tmp_path / "f.json")
    assert "f.json: " in line_of(error) and JSON[content] in line_of(error)


def test_read_json_reads(tmp_path):
    (tmp_path / "f.json").write_bytes(b' {"a": [1, 2.5e3, "\\ud83d\\ude00", null, {"b": -7}], "a ": true}\n')
    (tmp_path / "link.json").symlink_to("f.json")
    assert checks.read_json(tmp_path / "link.json") == {"a": [1, 2500.0, "😀", None, {"b": -7}], "a ": True}


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    big = tmp_path / "big"
    with open(big, "wb") as file:
        file.truncate(checks.MAX_JSON + 1)
    for name, words in ((tmp_path / "fifo", "pipe"), (tmp_path, "a folder"), ("/dev/zero", "device"), (tmp_path / "dangling", "link to a file"),
                        (tmp_path / "nothing", "no such file"), (tmp_path / "loop", "cannot be opened"), ("a\0b", "cannot be opened"),
                        (tmp_path / ("x" * 3000), "cannot be opened"), (tmp_path / "\n\u202e", "no such file"), (big, "over the limit")):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            checks.read_json(name)
        assert words in line_of(error)
        assert isinstance(error.value, FileNotFoundError) == (words in ("link to a file", "no such file"))


def test_show_is_short_and_printable():
    for value in ("a" * 10**6, "\n\u202e\x1b[31m" * 50, b"\xff" * 500, [["x" * 500] * 500] * 500, {"k" * 99: "v" * 99}, 10**50, None, Path("x" * 500 + "\n")):
        text = checks.show(value)
        assert len(text) <= 60 and text.isprintable()
    assert checks.show("it's") == '"it\'s"' and checks.show(Path("a/b.json")) == "a/b.json" and spelled("Ġhi") == b" hi"
