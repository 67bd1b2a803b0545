"""checks/vocabulary.py: every field that changes ids is implemented or refused by its name, in one line, by the library and by the command.

The first table changes a small tokenizer.json (small_tokenizer.py), the second a whole model folder (hostile.py).
"""
import functools

import pytest

import make_golden_tokenizer as golden
from hostile import (CANARY, GONE, MODEL, SETTINGS, TEMPLATE, TOKENS, VOCAB, check_loads, check_refused, content, files, put)
from small_tokenizer import LEVEL, A, M, P, S, V, changed, line_of, spec, token, write
from tokenizer import load_tokenizer

# Patterns of strangers: what does not compile, what engines read differently, what never ends or takes gigabytes, and what is harmless.
PATTERNS = ["(", "[a", "a**", r"\p{Nope}", "x{99999999999}", "(" * 5000, r"\w+", r"\h", "^a", "a$", ".", "a*", "", "[[:alpha:]]", "[a&&b]", "(?<=a)b", r"(a)\1",
            "(?i:straße)", "(?i:ss)", "(?i:[a-z])", "(?x: a)", r"\R", r"\X", "a{1,2}+", "(?#c)a", r"\b", "(?P<n>a)", "(?:a+a+)+b", "a++" * 40 + "^",
            "(?:" * 20 + "a" + "){99}" * 20, "|".join(["(?:a|a)+b"] * 40), "[" + "a" * 1_000_000 + "]+", r"\p{L}{3000000}", "a+", golden.QWEN + " ", golden.QWEN[1:]]

REFUSED = [
    (("model", "type"), "Unigram", "'BPE'"), (("model",), None, "'BPE'"), (("model",), [1], "'BPE'"), (("model",), "BPE", "'BPE'"),
    (V, None, "model.vocab"), (V, {}, "model.vocab"), (V, [1], "model.vocab"), (M, None, "model.merges"), (M, {"a": 1}, "model.merges"),
    *(((*V, "hi"), id, "whole number") for id in (-1, True, 1.5, "7", None)),
    ((*V, "hi"), 5, "taken"),
    (M, ["h i", "q q"], "merge 1"), (M, ["hi"], "merge 0"), (M, ["h i j"], "merge 0"), (M, [["h"]], "merge 0"), (M, [["h", 1]], "merge 0"),
    (M, [{"h": 1, "i": 2}], "merge 0"), (M, [None], "merge 0"), (M, [" hi"], "merge 0"), (M, [["h", ["i"]]], "merge 0"),
    (("model", "dropout"), 0.1, "dropout"), (("model", "continuing_subword_prefix"), "##", "continuing_subword_prefix"),
    (("model", "end_of_word_suffix"), "</w>", "end_of_word_suffix"), (("model", "ignore_merges"), 1, "ignore_merges"),
    (("model",), lambda m: m | {"unk_token": "hi", "vocab": {k: i for k, i in m["vocab"].items() if k != "A"}}, "unk_token"),
    (("model", "byte_fallback"), True, "SentencePiece"), (P, {"type": "Metaspace"}, "SentencePiece"),
    (("normalizer",), {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}, "SentencePiece"),
    (("normalizer",), {"type": "NFKC"}, "NFKC"), (("normalizer",), "NFC", "normalizer"), (("normalizer",), {"type": "Sequence"}, "normalizers"),
    (("normalizer",), {"type": "Lowercase"}, "Lowercase"), (P, None, "pre_tokenizer"), (P, {"type": "Whitespace"}, "Whitespace"),
    (P, [LEVEL], "pre_tokenizer"), (P, {"type": "Sequence", "pretokenizers": [LEVEL, golden.split("a")]}, "ByteLevel"),
    (P, {**LEVEL, "add_prefix_space": True}, "add_prefix_space"), ((*S, "behavior"), "MergedWithNext", "MergedWithNext"),
    ((*S, "behavior"), "Removed", "Removed"), ((*S, "invert"), "no", "invert"), ((*S, "pattern"), "x", "Split"), ((*S, "pattern"), {"Regex": 1}, "Split"), ((*S, "pattern"), {}, "Split"),
    ((*S, "behavior"), "Removed", "behavior"), (S, {**golden.split(golden.QWEN, behavior="Removed"), "invert": True}, "pre_tokenizer"),
    (S, {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}, "Split"),
    (P, golden.sequence({"type": "Digits", "individual_digits": False}, LEVEL), "Digits"), (P, golden.sequence({"type": "Digits"}, LEVEL), "Digits"),
    (P, golden.sequence({"type": "Digits", "individual_digits": True}, golden.split(golden.QWEN), LEVEL), "pattern"), (P, LEVEL, "pattern"),
    (P, golden.sequence(golden.split(golden.QWEN), {**LEVEL, "use_regex": True}), "pattern"),
    *(((*S, "pattern"), {"Regex": text}, "pattern") for text in PATTERNS),
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


def test_a_text_begins_with_ids_of_the_vocabulary(tmp_path):
    data = spec(added=[token(290, "<|s|>")])
    data["post_processor"] = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|s|>"}}, {"Sequence": {"id": "A"}}],
                              "special_tokens": {"<|s|>": {"ids": [499]}}}
    assert load_tokenizer(write(tmp_path, data, config__json={"vocab_size": 500})).bos_ids == [499]
    with pytest.raises(ValueError) as error:
        load_tokenizer(write(tmp_path, data, config__json={"vocab_size": 499}))
    assert "tokenizer.json: post_processor holds 499" in line_of(error)


# ---- whole folders ---------------------------------------------------------------------------------------------------------------

SPLIT, BYTES = ("pre_tokenizer", "pretokenizers", 0), ("pre_tokenizer", "pretokenizers", 1)


def template(text):
    return put(SETTINGS, "chat_template", text)


def nested(depth, node, inner):
    for _ in range(depth):
        node = {"type": "Sequence", inner: [node]}
    return node


def widened(tensors, rows):
    """A larger vocabulary for the two tensors that have a row for each id."""
    import torch
    more = {name: torch.zeros(rows, tensor.shape[1]) for name, tensor in tensors.items() if name in ("model.embed_tokens.weight", "lm_head.weight")}
    for name, tensor in more.items():
        tensor[:len(tensors[name])] = tensors[name]
    return tensors | more


# name, folder, words of the line
BAD = [
    ("tokenizer not BPE", put(TOKENS, "model", "type", "Unigram"), "Unigram BPE"),
    ("tokenizer without a model", put(TOKENS, "model", GONE), "tokenizer.json model"),
    ("vocabulary empty", put(TOKENS, "model", "vocab", {}), "vocab"),
    ("vocabulary a list", put(TOKENS, "model", "vocab", ["a", "b"]), "vocab"),
    ("id text", put(TOKENS, "model", "vocab", "A", "32"), "vocab 'A'"),
    ("id negative", put(TOKENS, "model", "vocab", "A", -1), "vocab 'A'"),
    ("id true", put(TOKENS, "model", "vocab", "A", True), "vocab 'A'"),
    ("id float", put(TOKENS, "model", "vocab", "A", 32.0), "vocab 'A'"),
    ("id twice", put(TOKENS, "model", "vocab", "A", 33), "vocab 33"),
    ("id past the embedding", put(TOKENS, "model", "vocab", "A", VOCAB), "300"),
    ("merges missing", put(TOKENS, "model", "merges", GONE), "merges"),
    ("merge of unknown parts", put(TOKENS, "model", "merges", 0, "Q Z"), "merge 'Q Z'"),
    ("merge without a result", put(TOKENS, "model", "merges", 3, "t t"), "merge 't t'"),
    ("merge of one part", put(TOKENS, "model", "merges", 0, "he"), "merge 'he'"),
    ("merge of three parts", put(TOKENS, "model", "merges", 0, ["h", "e", "r"]), "merge"),
    ("merge a number", put(TOKENS, "model", "merges", 0, 7), "merge"),
    ("byte fallback", put(TOKENS, "model", "byte_fallback", True), "SentencePiece"),
    ("dropout", put(TOKENS, "model", "dropout", 0.1), "dropout"),
    ("prefix of subwords", put(TOKENS, "model", "continuing_subword_prefix", "##"), "continuing_subword_prefix"),
    ("ignore_merges text", put(TOKENS, "model", "ignore_merges", "true"), "ignore_merges"),
    ("pre-tokeniser unknown", put(TOKENS, *SPLIT, "type", "Whitespace"), "pre_tokenizer 'Whitespace'"),
    ("pre-tokeniser missing", put(TOKENS, "pre_tokenizer", None), "pre_tokenizer"),
    ("pre-tokeniser nested", put(TOKENS, "pre_tokenizer", functools.reduce(
        lambda inner, _: {"type": "Sequence", "pretokenizers": [inner]}, range(400), {"type": "ByteLevel"})), "pre_tokenizer"),
    ("pre-tokeniser adds a space", put(TOKENS, *BYTES, "add_prefix_space", True), "pre_tokenizer"),
    ("use_regex text", put(TOKENS, *BYTES, "use_regex", "false"), "use_regex"),
    ("pattern does not compile", put(TOKENS, *SPLIT, "pattern", {"Regex": "(a|["}), "pattern"),
    ("pattern of another engine", put(TOKENS, *SPLIT, "pattern", {"Regex": r"(?<=a)\Gb\h"}), "pattern"),
    ("pattern without end", put(TOKENS, *SPLIT, "pattern", {"Regex": r"(?:\p{L}|\p{L})+\p{N}"}), "pattern"),
    ("pattern with a count of millions", put(TOKENS, *SPLIT, "pattern", {"Regex": r"\p{L}{3000000}"}), "pattern"),
    ("pattern of a megabyte", put(TOKENS, *SPLIT, "pattern", {"Regex": "[" + "a" * 1_000_000 + "]+"}), "pattern"),
    ("pattern empty", put(TOKENS, *SPLIT, "pattern", {"Regex": ""}), "pattern"),
    ("behaviour unknown", put(TOKENS, *SPLIT, "behavior", "MergedWithNext"), "pre_tokenizer"),
    ("normaliser unknown", put(TOKENS, "normalizer", {"type": "Lowercase"}), "normalizer Lowercase"),
    ("decoder unknown", put(TOKENS, "decoder", {"type": "WordPiece"}), "decoder WordPiece"),
    ("decoder missing", put(TOKENS, "decoder", None), "decoder"),
    ("post-processor unknown", put(TOKENS, "post_processor", {"type": "BertProcessing"}), "post_processor"),
    ("post-processor without its tokens", put(TOKENS, "post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}],
                                                                         "special_tokens": {}}), "post_processor"),
    ("added tokens not a list", put(TOKENS, "added_tokens", {"a": 1}), "added_tokens"),
    ("added token a number", put(TOKENS, "added_tokens", 0, 5), "added token"),
    ("added token without text", put(TOKENS, "added_tokens", 0, "content", ""), "added token"),
    ("added token without id", put(TOKENS, "added_tokens", 0, "id", GONE), "added token"),
    ("added tokens with one id", put(TOKENS, "added_tokens", 0, "id", 277), "277"),
    ("added token over a word", put(TOKENS, "added_tokens", 0, "id", 40), "40"),
    ("added token past the embedding", put(TOKENS, "added_tokens", 0, "id", VOCAB + 5), "305"),
    ("added token strips", put(TOKENS, "added_tokens", 0, "lstrip", True), "lstrip"),
    ("added token flag text", put(TOKENS, "added_tokens", 0, "special", "true"), "special"),
    ("settings name a list", put(SETTINGS, "eos_token", [1]), "eos_token"),
    ("settings id not a number", put(SETTINGS, "added_tokens_decoder", {"one": {"content": "x"}}), "added_tokens_decoder"),
    ("settings bos text", put(SETTINGS, "add_bos_token", "false"), "add_bos_token"),
    ("added token of a page", put(TOKENS, "added_tokens", 0, "content", "x" * 3000), "3000 characters"),
    ("added token id absurd", put(TOKENS, "added_tokens", 0, "id", 1 << 40), "1099511627776"),
    ("byte_fallback a number", put(TOKENS, "model", "byte_fallback", 1), "SentencePiece"),
    ("normalizers in normalizers", put(TOKENS, "normalizer", nested(300, {"type": "NFC"}, "normalizers")), "normalizer deeper"),
    ("pre_tokenizers in pre_tokenizers", put(TOKENS, "pre_tokenizer", nested(12, {"type": "ByteLevel"}, "pretokenizers")), "deeper"),
    ("special_tokens_map of numbers", content("special_tokens_map.json", {"eos_token": 5}), "special_tokens_map.json: eos_token"),
    # chat templates
    ("template a number", template(5), "chat_template"),
    ("template does not parse", template("{% for %}"), "chat template"),
    ("template refuses", template("{{ raise_exception('Only user turns, please') }}"), "Only user turns, please"),
    ("template loops", template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"), "chat template 1.5 seconds"),
    ("template range", template("{% for i in range(10**12) %}{% endfor %}"), "chat template"),
    ("template power", template("{{ 9**(9**9) }}"), "chat template"),
    ("template 10 GB", template("{{ 'a' * 10**10 }}"), "chat template"),
    ("template doubles", template("{% set n = namespace(a='aaaaaaaa') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}"), "chat template"),
    ("template prints 100 MB", template("{% for i in range(99999) %}" + "a" * 1000 + "{% endfor %}"), "chat template"),
    ("template recurses", template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "chat template"),
    ("template nested", template("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"), "chat template"),
    ("template reads a file", template("{% include '/etc/passwd' %}"), "chat template"),
    ("template opens a file", template(f"{{{{ open('{CANARY}', 'w') }}}}"), "chat template"),
    ("template climbs to os", template(f"{{{{ cycler.__init__.__globals__.os.system('touch {CANARY}') }}}}"), "chat template"),
    ("template climbs to subclasses", template("{{ ''.__class__.__mro__[1].__subclasses__() }}{{ 1/0 }}"), "chat template"),
    ("template climbs by a format", template("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}{{ 1/0 }}"), "chat template"),
    ("template imports", template("{% import 'os' as os %}{{ os.system('x') }}"), "chat template"),
    ("template yields half a character", template("{{ '\\ud800' }}"), "chat template"),
    ("template file not UTF-8", content("chat_template.jinja", b"\xff\xfe"), "chat_template.jinja UTF-8"),
    ("templates without a default", put(SETTINGS, "chat_template", [{"name": "tool_use", "template": "x"}]), "chat_template"),
    ("only vocab.json and merges.txt", files(lambda c: c.update({"vocab.json": c.pop(TOKENS)["model"]["vocab"], "merges.txt": "h e"})), "tokenizer.json AutoTokenizer"),
    ("only Meta's file", files(lambda c: (c.pop(TOKENS), c.update({"tokenizer.model": b"QQ== 0\nQg== 1\nQw="}))), "tokenizer.json AutoTokenizer"),
    ("added tokens of a book", files(lambda c: c[TOKENS].update(added_tokens=[{"id": 300 + i, "content": f"{i:0120}"} for i in range(9000)])), "added_tokens longer"),
    ("added tokens of seventy lengths", files(lambda c: c[TOKENS].update(added_tokens=[{"id": 300 + i, "content": "<" * i} for i in range(2, 72)])), "added_tokens lengths"),
    ("template strips tags, and more", template("{{ messages[0].content | striptags }}{{ 1/0 }}"), "chat template ZeroDivisionError"),
]


@pytest.mark.parametrize("make, words", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_folder(make, words, folder):
    check_refused(make, words, folder)


# name, folder
ODD = [
    ("merges as lists", files(lambda c: c[TOKENS]["model"].update(merges=[m.split(" ") for m in c[TOKENS]["model"]["merges"]]))),
    ("thousands of added tokens", files(lambda c: (c["config.json"].update(vocab_size=9000), c.update({MODEL: widened(c[MODEL], 9000)}),
        c[TOKENS]["added_tokens"].extend({"id": 300 + i, "content": f"<|s_{i}|>" + "<|" * 40, "special": True} for i in range(8000))))),
    ("added tokens with holes", files(lambda c: c[TOKENS]["added_tokens"].append(
        {"id": 298, "content": "<|far|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}))),
    ("tokenizer.model beside tokenizer.json", content("tokenizer.model", b"\n\x0e\n\x05<unk>")),
    ("vocab.json beside tokenizer.json", content("vocab.json", {"a": 1})),
    ("a letter that has no token", put(TOKENS, "model", "vocab", "A", GONE)),
    ("a token for the unknown, which no byte is", put(TOKENS, "model", "unk_token", "h")),
    ("no normalizer", put(TOKENS, "normalizer", None)),
    ("Llama 3's pattern", put(TOKENS, *SPLIT, "pattern", "Regex", golden.LLAMA)),
    ("special_tokens_map of objects", content("special_tokens_map.json", {"eos_token": {"content": "<|im_end|>", "lstrip": False}})),
    ("template in a file", files(lambda c: c.update({"chat_template.jinja": c[SETTINGS].pop("chat_template")}))),
    ("templates by name", put(SETTINGS, "chat_template", [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}])),
    ("settings of many things", files(lambda c: c[SETTINGS].update(model_max_length=10 ** 12, clean_up_tokenization_spaces=False, x=None))),
]


@pytest.mark.parametrize("make", [case[1] for case in ODD], ids=[case[0] for case in ODD])
def test_odd_folder(make, folder):
    check_loads(make, "qwen2", folder)


def test_no_pattern_of_a_stranger_is_ever_compiled(tmp_path, monkeypatch):
    """The class of attacks is gone: regex.compile sees the five known lists and no other text."""
    import regex
    seen, compile = [], regex.compile
    monkeypatch.setattr(regex, "compile", lambda pattern, *more, **named: seen.append(pattern) or compile(pattern, *more, **named))
    data = spec()
    for pattern in PATTERNS:
        changed(data, (*S, "pattern"), {"Regex": pattern})
        with pytest.raises(ValueError):
            load_tokenizer(write(tmp_path, data))
    assert seen == []
    load_tokenizer(write(tmp_path, spec()))
    assert f"({golden.QWEN})" in seen
