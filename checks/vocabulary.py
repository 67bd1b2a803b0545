"""What may be wrong with a tokenizer's files, and with what is given to it.

Each judge returns nothing, or raises ValueError: one line that says where, what is wrong, what to
do. Every field of tokenizer.json that changes ids is implemented, or refused here by its name.
"""
import json
import operator
import os
import re

import regex

from checks.files import refuse, show

MAX_ID = 1 << 22                # no vocabulary in use has a million tokens
MAX_ADDED, MAX_SIZES = 1 << 20, 64      # letters of all added tokens, and their lengths; 20,000, 30
MAX_MARKS = 500                 # combining marks in a row, which cost their square; 10 in use
CODES = *range(33, 127), *range(161, 173), *range(174, 192), *range(194, 245), *range(256, 324)
LETTERS = set(map(chr, CODES))  # that a vocabulary has for the bytes of UTF-8
USE = "use a Llama 3, Qwen2, Qwen3 or SmolLM2 folder"


def must(right, where, what, do="download it again"):
    if not right:
        refuse(where, what, do)


def check_folder(folder):
    if not folder.is_dir():
        refuse(folder, "no such folder", "give the folder of a model", FileNotFoundError)
    if os.path.lexists(folder / "tokenizer.json"):
        return
    what, do = "holds no tokenizer.json", "download this file too"
    if not os.path.lexists(folder / "config.json"):
        what, do = "holds no tokenizer.json and no config.json", "give the folder of a model"
    if any(os.path.lexists(folder / name) for name in ("vocab.json", "tokenizer.model")):
        what += ", only an older form of it"
        do = "make one: transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    refuse(folder, what, do, FileNotFoundError)


def check_tokenizer_json(path, data):
    """All of tokenizer.json but its expressions and added tokens, which have their own judges."""
    model = data.get("model")
    must(isinstance(model, dict), path, f"model is {show(model)}, not an object of type 'BPE'", USE)
    kind = model.get("type", "BPE")
    must(kind == "BPE", path, f"model.type is {show(kind)}, not 'BPE'", USE)
    cutters = steps_of(path, data, "pre_tokenizer", "pretokenizers")
    normalizers = steps_of(path, data, "normalizer", "normalizers")
    kinds = {str(step.get("type")) for step in cutters + normalizers}
    right = model.get("byte_fallback") in (None, False) and not kinds & {"Metaspace", "Prepend"}
    what = "is a SentencePiece vocabulary (Llama 2, Mistral, Gemma), not byte-level BPE"
    must(right, path, what, USE)
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        value = model.get(field)
        what = f"model.{field} is {show(value)}; it is not implemented"
        must(value in (None, ""), path, what, USE)
    whole, added = model.get("ignore_merges", False), data.get("added_tokens") or []
    must(isinstance(whole, bool), path, f"model.ignore_merges is {show(whole)}, not true or false")
    must(isinstance(added, list), path, f"added_tokens is {show(added)}, not a list")

    for step in cutters:
        check_cutter(path, step, step is cutters[-1])
    last = cutters[-1].get("type") if cutters else None
    must(last == "ByteLevel", path, "pre_tokenizer does not end in ByteLevel", USE)
    for step in normalizers:
        implemented(path, "normalizer", step, step.get("type") == "NFC")
    for step in steps_of(path, data, "decoder", "decoders") or [{}]:
        implemented(path, "decoder", step, step.get("type") == "ByteLevel")
    for step in steps_of(path, data, "post_processor", "processors"):
        if step.get("type") == "TemplateProcessing":
            check_template_processing(path, step)
        else:
            implemented(path, "post_processor", step, step.get("type") == "ByteLevel")
    check_vocab(path, model)


def implemented(path, field, step, right):
    what = f"{field} {show(step.get('type'))} is not implemented as {show(step, 120)}"
    must(right, path, what, USE)


def steps_of(path, data, field, inner, depth=0):
    """The steps of a field: none, one, or those of a Sequence."""
    node = data.get(field)
    must(depth < 9, path, f"{field} holds a Sequence in a Sequence, deeper than any in use")
    must(isinstance(node, (dict, type(None))), path, f"{field} is {show(node)}, not an object")
    if node is None or node.get("type") != "Sequence":
        return [] if node is None else [node]
    must(isinstance(node.get(inner), list), path, f"{field}.{inner} is {show(node.get(inner))}")
    steps = []
    for child in node[inner]:
        steps += steps_of(path, {field: child}, field, inner, depth + 1)
    return steps


def check_cutter(path, step, last):
    """A step of pre_tokenizer: Split by an expression, each digit alone, at the end ByteLevel."""
    right, pattern = False, step.get("pattern")
    if step.get("type") == "ByteLevel":
        right = last and step.get("add_prefix_space") is False
        right = right and isinstance(step.get("use_regex", True), bool)
    elif step.get("type") == "Digits":
        right = step.get("individual_digits") is True
    elif step.get("type") == "Split" and isinstance(pattern, dict):
        right = step.get("behavior") == "Isolated" and step.get("invert", False) is False
        right = right and isinstance(pattern.get("Regex"), str)
    implemented(path, "pre_tokenizer", step, right)


def check_published(path, cuts, published):
    """The expressions are those of a published model, letter by letter: no other is ever run."""
    known = {expression for each in published for expression in each}
    new = [expression for expression in cuts if expression not in known] or [cuts]
    what = f"pre_tokenizer pattern {show(new[0], 120)} is of no model known here"
    must(cuts in published, path, what, USE)


def check_template_processing(path, step):
    try:
        for item in step["single"]:
            if "Sequence" in item:
                break
            for id in step["special_tokens"][item["SpecialToken"]["id"]]["ids"]:
                must(type(id) is int and 0 <= id < MAX_ID, path, f"post_processor id {show(id)}")
    except (KeyError, TypeError):
        must(False, path, f"post_processor {show(step, 120)} lacks a part")


def check_vocab(path, model):
    """model.vocab {letters: id} and model.merges ["a b" or ["a", "b"], ...]"""
    vocab, merges, seen = model.get("vocab"), model.get("merges"), set()
    right = vocab and isinstance(vocab, dict)
    must(right, path, f"model.vocab is {show(vocab)}, not an object of tokens and ids")
    must(isinstance(merges, list), path, f"model.merges is {show(merges)}, not a list")
    unknown = model.get("unk_token")
    what = f"model.unk_token is {show(unknown)} for bytes without a token; it is not implemented"
    must(unknown is None or LETTERS <= vocab.keys(), path, what, USE)
    for text, id in vocab.items():
        if type(id) is not int or not 0 <= id < MAX_ID or id in seen:
            taken = type(id) is int and id in seen
            why = "taken by another token" if taken else f"not a whole number below {MAX_ID}"
            must(False, path, f"vocab: the id {show(id)} of {show(text)} is {why}")
        seen.add(id)
    for place, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        try:
            a, b = pair
            fits = type(pair) is list and a in vocab and b in vocab and a + b in vocab
        except (TypeError, ValueError):
            fits = False
        if not fits or " " in a + b:
            what = "not two tokens of the vocabulary that make a third"
            must(False, path, f"merge {place} is {show(merge, 120)}, {what}")


def check_settings(path, settings, names):
    """tokenizer_config.json or special_tokens_map.json; names: the fields that name a token."""
    for name in names:
        text = settings.get(name)
        text = text.get("content", 0) if isinstance(text, dict) else text
        right = isinstance(text, (str, type(None)))
        must(right, path, f"{name} is {show(settings.get(name))}, not a text", "correct it")
    listed = settings.get("added_tokens_decoder", {})
    must(isinstance(listed, dict), path, f"added_tokens_decoder is {show(listed)}, not an object")
    for id, entry in listed.items():
        right = re.fullmatch("[0-9]{1,10}", id) and isinstance(entry, dict)
        must(right, path, f"added_tokens_decoder leads from {show(id)} to {show(entry)}")
    first, template = settings.get("add_bos_token") or False, settings.get("chat_template")
    must(isinstance(first, bool), path, f"add_bos_token is {show(first)}, not true or false")
    if isinstance(template, list):
        try:
            template = {each["name"]: each["template"] for each in template}["default"]
        except (KeyError, TypeError):
            template = 0
    right = isinstance(template, (str, type(None)))
    must(right, path, "chat_template is no text, and no list with one named default", "correct it")


def check_template(path, data):
    """chat_template.jinja"""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        must(False, path, f"is not UTF-8 (byte {error.start})")


def check_added(entries, vocab, normalize):
    """[(file, an added token), ...]: each text has one id, and each id one text.

    normalize: what normalized text goes through; two texts that it makes alike are one.
    """
    text_of, id_of, alike = {id: text for text, id in vocab.items()}, {}, {}
    letters, sizes = 0, set()
    for path, entry in entries:
        must(isinstance(entry, dict), path, f"added token {show(entry)} is not an object")
        text, id = entry.get("content"), entry.get("id")
        right = text and isinstance(text, str) and type(id) is int and 0 <= id < MAX_ID
        must(right, path, f"added token {show(entry, 120)} lacks a text, or an id below {MAX_ID}")
        token = f"added token {show(text)}"
        for flag in ("special", "normalized", "lstrip", "rstrip", "single_word"):
            value = entry.get(flag, False)
            what = f"{token}: {flag} is {value!r:.20}, "
            must(isinstance(value, bool), path, what + "not true or false")
            known = not value or flag in ("special", "normalized")
            must(known, path, what + "not implemented", USE)
        letters += len(text)
        must(len(text) <= 128, path, f"{token} has {len(text)} characters, more than any in use")
        sizes.add(len(text))
        must(letters <= MAX_ADDED, path, "added_tokens are longer than any in use")
        must(len(sizes) <= MAX_SIZES, path, "added_tokens have more lengths than any in use")

        normalized = entry.get("normalized", not entry.get("special", False))
        same = alike.setdefault(normalize(text) if normalized else text, text) == text
        same = same and id_of.setdefault(text, id) == id == vocab.get(text, id)
        must(same, path, f"{token} with the id {id} clashes: the same text has another id")
        other = text_of.setdefault(id, text)
        must(other == text, path, f"{token} clashes: its id {id} is that of {show(other)}")


def check_ids(path, settings, name, vocab_size):
    """config.json or generation_config.json: `name` is an id, a list of ids, or absent."""
    ids, size = settings.get(name), vocab_size if type(vocab_size) is int else 1 << 31
    for id in ids if isinstance(ids, list) else [] if ids is None else [ids]:
        right = type(id) is int and 0 <= id < size
        must(right, path, f"{name} holds {show(id)}, not an id of the vocabulary", "correct it")


def check_size(path, words, bos_ids, vocab_size):
    """The ids are rows of the model's embedding, as many as config.json says."""
    last = len(words) - 1
    what = f"token {show(words[last])} has the id {last}, vocab_size in config.json is {vocab_size}"
    right = type(vocab_size) is not int or last < vocab_size
    must(right, path, what, "the two files must be of one model")
    check_ids(path, {"post_processor": bos_ids}, "post_processor", vocab_size)


def check_text(text):
    half = re.search("[\ud800-\udfff]", text)
    what = f"half a character (lone surrogate) at position {half and half.start()}"
    must(not half, "text", what, "pass valid Unicode")


def check_marks(text):
    most = max(map(len, regex.findall(r"\p{M}+", text)), default=0)
    must(most <= MAX_MARKS, "text", f"has {most} combining marks in a row", "shorten them")


def check_id(id):
    try:
        right = not isinstance(id, bool) and operator.index(id) >= 0
    except TypeError:
        right = False
    must(right, "token id", "not a whole number of 0 or more", "pass ids as encode gives them")


def check_messages(given):
    """given {"messages": [{...}, ...], other variables of the template}"""
    messages = given["messages"]
    right = isinstance(messages, (list, tuple)) and all(isinstance(each, dict) for each in messages)
    must(right, "messages", show(messages), 'pass a list like [{"role": "user", "content": "Hi"}]')
    try:
        json.dumps(given, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        must(False, "messages", "half a character (lone surrogate)", "pass valid Unicode")


def check_veil(letters, veil):
    right = len(letters) == len(veil)
    must(right, "messages", "have every character for private use", "leave one out")


def check_typed(added, ids, veiled_ids):
    """The texts that a template made of typed and of veiled messages have the same added tokens."""
    tokens = {entry["id"] for entry in added.values()}
    right = [id for id in ids if id in tokens] == [id for id in veiled_ids if id in tokens]
    what = "the chat template changes the letter that a control token begins with"
    must(right, "messages", f"{what}, so typed tokens look like its own", "leave that letter out")
