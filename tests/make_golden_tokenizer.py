"""What the reference libraries answer, for tests/test_tokenizer*.py, which need none of them.

    python tests/make_golden_tokenizer.py        needs tokenizers, transformers and jinja2, and says their versions

golden_tokenizer.json     48 small tokenizers (`tokenizer_json(seed)`) and texts (`texts(seed)`), made again by the test: the ids.
                          Many are such as no training yields: ids in any order, pairs whose result a different pair made before,
                          tokens that no pair makes, shuffled merges. There a BPE by token id (tiktoken's) and one by list part.
golden_tokenizers/NAME/   a folder for each published way to cut text: the settings of the published tokenizer.json, a vocabulary
                          of 400 pairs trained here; answers.json: the ids of TEXTS, the text and ids of CHATS.

The chat templates in these folders are the published ones (Qwen3 and R1 without their parts for tools). llama3 has the
template of Llama 3.2, llama31 that of Llama 3.1 and 3.3.
"""
import json
import random
import sys
from pathlib import Path

FILE = Path(__file__).with_name("golden_tokenizer.json")
FOLDERS = Path(__file__).with_name("golden_tokenizers")
SEEDS = range(48)

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTER = {byte: chr(byte) for byte in PRINTABLE}
LETTER |= {byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in LETTER)}


# ---- how published models cut text -----------------------------------------------------------------------------------------------

def split(pattern, **more):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, **more}


def level(**more):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, **more}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CUTS = {
    "gpt2": level(),
    "llama3": sequence(split(LLAMA), level(use_regex=False)),
    "qwen2": sequence(split(QWEN), level(trim_offsets=False, use_regex=False)),
    "smollm2": sequence({"type": "Digits", "individual_digits": True}, level(use_regex=True)),
    "deepseek-coder": sequence(split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"),
                               split("[一-龥\u0800-一가-\ud7ff]+"), {"type": "Digits", "individual_digits": True}, level(use_regex=False)),
}
CUTS |= {"qwen3": CUTS["qwen2"], "llama31": CUTS["llama3"], "r1-distill-llama": CUTS["llama3"], "r1-distill-qwen": CUTS["qwen2"]}

# Added tokens, in the order of their ids: those marked special, then the others. Names of special tokens. What UTF-8 uses and the
# vocabulary lacks.
CONTROL = {
    "gpt2": (["<|endoftext|>"], []),
    "llama3": (["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
                "<|python_tag|>"], []),
    "qwen2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"], ["<tool_call>", "</tool_call>", "<|fim_prefix|>"]),
    "qwen3": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
              ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]),
    "smollm2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>", "<gh_stars>", "<empty_output>"], []),
    "r1-distill-llama": (["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<|start_header_id|>"],
                         ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]),
    "r1-distill-qwen": (["<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<|quad_start|>"],
                        ["<｜User｜>", "<｜Assistant｜>", "<|EOT|>", "<think>", "</think>"]),
    "deepseek-coder": (["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], ["<|EOT|>"]),
}
NAMED = {"gpt2": ["<|endoftext|>"] * 2, "llama3": ["<|begin_of_text|>", "<|eot_id|>"], "qwen2": [None, "<|im_end|>"],
         "qwen3": [None, "<|im_end|>"], "smollm2": ["<|im_start|>", "<|im_end|>"], "deepseek-coder": ["<｜begin▁of▁sentence｜>", "<|EOT|>"],
         **dict.fromkeys(("r1-distill-llama", "r1-distill-qwen"), ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"])}
CONTROL["llama31"], NAMED["llama31"] = CONTROL["llama3"], NAMED["llama3"]
LACKING = {"smollm2": [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2]}


TEXTS = [
    "", "a", " ", "Hello, world!", "The quick brown fox jumps over the lazy dog.", "  two  spaces   three ", "I'm sure they'LL say it's fine; we'd've",
    "don't DON'T 'tis 'S 'ſ", "tabs\tand\t\ttabs", "line\nline\r\nline\n\n\nline\r", " \n \n  x", "x \n", "trailing   ", "\n", "\r\n\r\n",
    "0 1 12 123 1234 12345 123456", "3.14159, 1,000,000 and -5e-10", "２０２４年 ½ ² Ⅷ ①②③ ٣٤٥ १२३", "a1b22c333", "7  8   9", "12 \n 34", "1 000 000",
    "def f(x):\n    return x ** 2  # square\n", "for (int i = 0; i < n; ++i) { a[i] <<= 1; }", "if (a && b || !c) {\n\t\treturn x->y;\n}",
    "SELECT * FROM t WHERE a <> 'b' -- c", "<div class=\"x\">&nbsp;</div>", "\\frac{1}{2} \\boxed{42} $x^2$", "https://example.org/a?b=c&d=%20#e", "{\"k\": [1, 2.5e3, null]}",
    "#!/bin/sh\nrm -rf \"$TMP\" | grep -v '^#'", "a_b-c.d/e\\f|g", "...!!!???", "«» “quotes” ‘s’ — – …", "()[]{}<>|||", "== != >= <= => -> ::", "@@ #tag @user",
    "Größe naïve façade Ångström", "e\u0301 a\u0308\u0323 \u212b \ufb01 \u1e9b\u0323", "Россия и Україна", "Ελληνικά", "עברית שלום", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก",
    "你好，世界！这是一个测试。", "日本語のテキストとカタカナ ー", "한국어 텍스트입니다 \u1112\u1161\u11ab", "混合text与English和123", "数学 ∑ ∫ √2 ≠ ∞",
    "😀 👍🏽 🇺🇸 ❤️ 👨‍👩‍👧", "emoji😀in🎉words", "zero\u200bwidth\u00a0nbsp\u3000wide\u2028sep", "\x00\x01\x02 nul", "\x1b[31mred\x1b[0m", "bell\x07 back\x08 form\x0c vt\x0b",
    "\x1c\x1d\x1e\x1f\x7f\x85", "!\x04! a\x06b \x13\x14 \x16\x1d", "h\x04e\x04l\x04l\x04o", "\U0001f9ff\U000e0041\U00100000\U00040000", "\U00080000a\U000b1234", "\ufeffbom \ufffd",
    "<|endoftext|>", "<|im_start|>user\nhi<|im_end|>\n", "a<|eot_id|>b<|begin_of_text|>", "x<think>\nhm\n</think>\n\ny", "<｜User｜>u<｜Assistant｜>a<｜end▁of▁sentence｜>",
    "<tool_call>\n{}\n</tool_call><tool_response>", "<|im_end", "|im_end|>", "<<|im_end|>>", "<|im_<|im_end|>end|>", "<|EOT|> <|fim_prefix|><repo_name>x<file_sep>",
    " <|im_end|> ", "é<|im_end|>\u0301", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "          " * 5 + "x", "\n" * 30, "ab" * 40,
]

TALK = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi <b>\n"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello & bye"}, {"role": "user", "content": "数学 {{ 7*7 }} {% raw %} é 1234"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}]
CALLS = [TALK[1], {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]},
         {"role": "tool", "content": "<2>"}, {"role": "assistant", "content": "two | 2"}]
CHATS = [{"messages": talk, "add_generation_prompt": prompt, "date_string": "26 Jul 2024", **more}
         for talk in (TALK, TALK[1:2], TALK[1:3]) for prompt in (True, False) for more in ({}, {"enable_thinking": False})]
TOOL_CHATS = [{"messages": talk, "add_generation_prompt": prompt, "date_string": "26 Jul 2024", **tools} for talk in (TALK[:2], CALLS)
              for prompt in (True, False) for tools in ({"tools": TOOLS}, {})]
SEARCH = [TALK[1], {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {
    "name": "brave_search", "arguments": {"query": "a <b>", "lang": "é"}}}]}, {"role": "ipython", "content": {"found": ["<c>"]}}]
BUILTIN_CHATS = [{"messages": talk, "add_generation_prompt": True, "builtin_tools": ["code_interpreter", "brave_search"], **more}
                 for talk in (TALK, CALLS, SEARCH) for more in ({}, {"tools": TOOLS, "tools_in_user_message": False})]
NAMES = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
CONTROLS = """  {% for m in messages %}
    {% generation %}
    {% set x = loop.index %}{{ x }}:{{ m.content }}
    {% endgeneration %}
    {% if loop.index == 2 %}
        {% break %}
    {% endif %}
{% endfor %}
{{ x is defined }} {{ {"é<": [1, none, true], "a": {}} | tojson }} {{ messages | tojson(indent=2) }} {{ eos_token }}|{{ pad_token }}|{{ tools }}|{{ documents }}
{% generation %}{% set y = 1 %}{{ y }}{% endgeneration %}{{ y is defined }}
{{ dict(a=1) }} {{ 'x' if tools is none else 'y' }} {{ undefined_name }}{{ missing is defined }}
"""


def chats(name):
    """The cases for a published folder. Those of Qwen2.5 and Llama have their parts for tools here."""
    return CHATS + TOOL_CHATS * (name in ("qwen2", "llama3", "llama31")) + BUILTIN_CHATS * (name == "llama31")


def published(name):
    """tokenizer.json with the settings of a published one, trained on TEXTS: a small vocabulary, 400 pairs."""
    import tokenizers
    special, others = CONTROL[name]
    lacking = [LETTER[byte] for byte in LACKING.get(name, [])]
    letters = [LETTER[byte] for byte in range(256) if LETTER[byte] not in lacking and byte not in (0xC0, 0xC1, *range(0xF5, 256))]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.Tokenizer.from_str(json.dumps(bare(CUTS[name]))).pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=len(letters) + 400, initial_alphabet=letters, show_progress=False)
    plain = [text for text in TEXTS if not any(LETTER[byte] in lacking for byte in text.encode())]
    trained.train_from_iterator(plain * 2 + [Path(__file__).read_text()[:6000]], trainer)
    merges = json.loads(trained.to_str())["model"]["merges"]

    vocab = {}
    for token in (special if name == "smollm2" else []) + letters + [a + b for a, b in merges] + (special if name == "gpt2" else []):
        vocab.setdefault(token, len(vocab))
    if CUTS[name] == CUTS["llama3"]:                                # all pairs that make a token, as converted from Meta's file
        merges = [[token[:i], token[i:]] for token in vocab for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
    added = [{"id": vocab.setdefault(text, len(vocab)), "content": text, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": name == "gpt2", "special": text in special} for text in special + others]
    if name not in ("gpt2", "smollm2"):
        vocab = {text: id for text, id in vocab.items() if text not in special + others}
    data = bare(CUTS[name])
    data["added_tokens"] = added
    data["normalizer"] = {"type": "NFC"} if CUTS[name] == CUTS["qwen2"] else None
    if name == "deepseek-coder":
        data["normalizer"] = {"type": "Sequence", "normalizers": []}
    first = NAMED[name][0]
    if name in ("llama3", "llama31", "r1-distill-llama", "r1-distill-qwen", "deepseek-coder"):
        single = [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        known = {first: {"id": first, "ids": [next(each["id"] for each in added if each["content"] == first)], "tokens": [first]}}
        data["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": known}
    data["model"] |= {"ignore_merges": CUTS[name] == CUTS["llama3"], "vocab": vocab, "merges": merges}
    if name in ("gpt2", "smollm2"):
        data["model"]["merges"] = [" ".join(pair) for pair in merges]
    return data


def bare(cut):
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": cut,
            "post_processor": level(trim_offsets=False), "decoder": level(add_prefix_space=True),
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                      "fuse_unk": False, "byte_fallback": False, "vocab": {}, "merges": []}}


# ---- tokenizers that no training yields ------------------------------------------------------------------------------------------

ADDED = ["<|x|>", "<|x|", "<|im_end|>", "<think>", "ab", "a", "e\u0301", "[P]", "  ", "x|>", " <s>", "\u212b", "\n", "s"]


def tokenizer_json(seed):
    r = random.Random(seed)
    style = "plain shuffled every-split partial".split()[seed % 4]
    base = [bytes([byte]) for byte in range(256)]
    if seed % 5 == 4:                                               # some lack bytes
        base = [byte for byte in base if byte not in (b"\x04", b"A", b"\xe3", b"?")]
    pool, merges = [b"a", b"b", b"c", b" ", b"'", b"s", b"1", b"\xc3", b"\xa9"], []
    for _ in range(r.choice([3, 10, 40, 120])):
        a, b = r.choice(pool), r.choice(pool)
        if len(a + b) <= 10:
            merges.append((a, b))
            pool.append(a + b)
    tokens = list(dict.fromkeys(base + [a + b for a, b in merges]))
    if style == "shuffled":
        r.shuffle(merges)
    if style == "every-split":                                      # as Llama 3's tokenizer.json: all pairs that make a token
        rank = {token: i for i, token in enumerate(tokens)}
        merges = [(token[:i], token[i:]) for token in tokens for i in range(1, len(token)) if token[:i] in rank and token[i:] in rank]
    if style == "partial":                                          # tokens without a merge
        merges = [merge for merge in merges if r.random() < 0.7]
        tokens = list(dict.fromkeys(tokens + [r.choice(pool) + r.choice(pool) for _ in range(6)]))
    ids = list(range(len(tokens)))
    if seed % 3:
        r.shuffle(ids)
    vocab = {"".join(LETTER[byte] for byte in token): id for token, id in zip(tokens, ids)}
    added, following = [], len(vocab)
    for content in r.sample(ADDED, r.choice([0, 2, 5])):
        id = vocab.get(content, following)
        following += id == following
        added.append({"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
                      "normalized": r.random() < 0.4, "special": r.random() < 0.5})
    data = bare(r.choice([CUTS[name] for name in ("gpt2", "llama3", "qwen2", "smollm2", "deepseek-coder")]))
    spelled = [["".join(LETTER[byte] for byte in part) for part in merge] for merge in merges]
    data["added_tokens"] = sorted(added, key=lambda each: each["id"])
    data["normalizer"] = [None, {"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}][seed // 2 % 3]
    data["post_processor"] = None
    data["model"] |= {"ignore_merges": seed // 4 % 2 == 0, "vocab": vocab,
                      "merges": spelled if seed % 2 == 0 else [" ".join(pair) for pair in spelled]}
    return data


def texts(seed):
    r = random.Random(1000 + seed)
    added = [each["content"] for each in tokenizer_json(seed)["added_tokens"]] + ["<|x|>", "<think>"]
    odd = ["'s", "'S", "'ſ", "'ll", " ", "  ", "\n", "\r\n", "\t", "   ", "\u00a0", "\u3000", "\x1c", "\x85", "\u200b", "é", "e\u0301", "\x04",
           "가", "\u1100\u1161", "😀", "\u0338", "<", "|", "\u212b", "ﬁ", "א", "一", "\U0001f468\u200d\U0001f469", "か", "A?A"]
    for length in (1, 4, 12, 30):
        yield "".join(r.choice([r.choice("abc"), r.choice("abcs 1'"), r.choice(odd), r.choice(added), str(r.randrange(2000)), r.choice("AD.,?")])
                      for _ in range(length))
        yield "".join(r.choice("abc s'1é") for _ in range(length))


# ---- the reference's answers -----------------------------------------------------------------------------------------------------

def ids_of(reference, text):
    """[ids with special tokens as tokens, ids with them as ordinary text]"""
    row = []
    for reference.encode_special_tokens in (False, True):
        row.append(reference.encode(text, add_special_tokens=False).ids)
    return row


def write_folder(name):
    import tokenizers
    import transformers
    folder = FOLDERS / name
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(published(name), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text + "\n")
    names = {key: text for key, text in zip(("bos_token", "eos_token"), NAMED[name]) if text}
    (folder / "tokenizer_config.json").write_text(json.dumps(names, ensure_ascii=False) + "\n")
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    answers = {"ids": [ids_of(reference, text) for text in TEXTS], "chats": []}
    if (folder / "chat_template.jinja").exists():
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)
        tokenizer.chat_template = (folder / "chat_template.jinja").read_text()
        for case in chats(name):
            case = dict(case)
            messages = case.pop("messages")
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, **case)
            ids = tokenizer.apply_chat_template(messages, tokenize=True, **case)["input_ids"]
            answers["chats"].append([rendered, ids])
    (folder / "answers.json").write_text(json.dumps(answers, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(folder, [path.stat().st_size for path in sorted(folder.iterdir())])


def main():
    import tokenizers
    import transformers
    from transformers.utils.chat_template_utils import render_jinja_template

    ids = {}
    for seed in SEEDS:
        reference = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(seed)))
        ids[seed] = [ids_of(reference, text) for text in texts(seed)]
    rendered = [render_jinja_template([case["messages"]], chat_template=CONTROLS, **NAMES,
                                      **{key: value for key, value in case.items() if key != "messages"})[0][0] for case in CHATS]
    versions = {"tokenizers": tokenizers.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    FILE.write_text(json.dumps({"versions": versions, "ids": ids, "controls": rendered}, separators=(",", ":")) + "\n")
    print(FILE, FILE.stat().st_size, "bytes", versions)
    for name in CUTS:
        write_folder(name)


if __name__ == "__main__":
    main()
