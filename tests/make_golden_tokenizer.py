"""What the reference libraries answer, for tests/test_tokenizer.py, which needs neither of them: tests/golden_tokenizer.json.

    python tests/make_golden_tokenizer.py        # needs tokenizers, transformers and jinja2 (not in requirements.txt)

`tokenizer_json(seed)` and `texts(seed)` make small tokenizers and texts; the test makes them again and compares the ids. Many of the
tokenizers are such as no training yields: ids in any order, pairs whose result a different pair made before, tokens that
no pair makes, merges in a shuffled order. They are where a BPE by token id (tiktoken) and one by merge list (the reference) part.
"""
import json
import random
import sys
from pathlib import Path

FILE = Path(__file__).with_name("golden_tokenizer.json")
SEEDS = range(48)

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTER = {byte: chr(byte) for byte in PRINTABLE}
LETTER |= {byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in LETTER)}

PATTERNS = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"[ab]+|\s",                                                    # leaves gaps between the matches
    r"[!-/:-@][A-Za-z]+|[一-龥]+|\s?\p{L}+|\p{N}{1,2}",
]
ADDED = ["<|x|>", "<|x|", "<|im_end|>", "<think>", "ab", "a", "e\u0301", "[P]", "  ", "x|>", " <s>", "\u212b", "\n", "s"]


def tokenizer_json(seed):
    r = random.Random(seed)
    style = "plain shuffled every-split partial".split()[seed % 4]
    base = [bytes([byte]) for byte in range(256)]
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
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}

    def split(pattern, behavior="Isolated"):
        return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": behavior == "Removed"}

    steps = [[split({"Regex": PATTERNS[seed % 3]})], [split({"Regex": r.choice(PATTERNS)}, "Removed")], [],
             [{"type": "Digits", "individual_digits": r.random() < 0.5}, split({"Regex": r.choice(PATTERNS)})],
             [split({"String": r.choice(["a", " ", "."])}), split({"Regex": r.choice(PATTERNS)})]][max(0, seed % 8 - 3)]
    whole = {**level, "use_regex": not steps and r.random() < 0.5}
    listed = seed % 2 == 0
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": sorted(added, key=lambda each: each["id"]),
        "normalizer": [None, {"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}][seed // 2 % 3],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, whole]} if steps else whole,
        "post_processor": None, "decoder": {**level, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": seed // 4 % 2 == 0, "vocab": vocab,
                  "merges": [["".join(LETTER[byte] for byte in part) for part in merge] if listed
                             else " ".join("".join(LETTER[byte] for byte in part) for part in merge) for merge in merges]},
    }


def texts(seed):
    r = random.Random(1000 + seed)
    added = [each["content"] for each in tokenizer_json(seed)["added_tokens"]] + ["<|x|>", "<think>"]
    odd = ["'s", "'S", "'ſ", "'ll", " ", "  ", "\n", "\r\n", "\t", "   ", "\u00a0", "\u3000", "\x1c", "\x85", "\u200b", "é", "e\u0301",
           "가", "\u1100\u1161", "😀", "\u0338", "<", "|", "\u212b", "ﬁ", "א", "一", "\U0001f468\u200d\U0001f469"]
    for length in (1, 4, 12, 30):
        yield "".join(r.choice([r.choice("abc"), r.choice("abcs 1'"), r.choice(odd), r.choice(added), str(r.randrange(2000)), r.choice("AD.,?")])
                      for _ in range(length))
        yield "".join(r.choice("abc s'1é") for _ in range(length))


QWEN3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

LLAMA3 = r"""{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message #}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}

{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

R1 = (r"{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, "
      r"is_tool=false, is_output_first=true, system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}"
      r"{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}"
      r"{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}"
      r"{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}"
      r"{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
      r"{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
      r"{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\n'}}{% endif %}")

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

TALK = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi <b>\n"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello & bye"}, {"role": "user", "content": "数学 {{ 7*7 }} {% raw %} é"}]
TEMPLATES = {"qwen3": QWEN3, "llama3": LLAMA3, "r1": R1, "controls": CONTROLS}
CASES = [{"messages": talk, "add_generation_prompt": prompt, "date_string": "26 Jul 2024", **more}
         for talk in (TALK, TALK[1:2], TALK[1:3]) for prompt in (True, False) for more in ({}, {"enable_thinking": False})]
NAMES = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}


def main():
    import tokenizers
    import transformers
    from transformers.utils.chat_template_utils import render_jinja_template

    ids = {}
    for seed in SEEDS:
        reference = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(seed)))
        ids[seed] = []
        for text in texts(seed):
            row = []
            for split_special in (False, True):
                reference.encode_special_tokens = split_special
                row.append(reference.encode(text, add_special_tokens=False).ids)
            ids[seed].append(row)
    rendered = {name: [render_jinja_template([case["messages"]], chat_template=template, **NAMES,
                                             **{key: value for key, value in case.items() if key != "messages"})[0][0] for case in CASES]
                for name, template in TEMPLATES.items()}
    versions = {"tokenizers": tokenizers.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    FILE.write_text(json.dumps({"versions": versions, "ids": ids, "rendered": rendered}, separators=(",", ":")) + "\n")
    print(FILE, FILE.stat().st_size, "bytes", versions)


if __name__ == "__main__":
    main()
