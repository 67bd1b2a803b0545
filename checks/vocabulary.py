"""What may be wrong with the files of a tokenizer. Each judge returns nothing, or raises ValueError: one line that names the file
and the field, what is wrong, and what to do. Every field that changes ids is one that tokenizer/ implements, or refused here.
"""
import os
import re

from checks.files import show

MAX_ID = 1 << 22                # no vocabulary in use has a million tokens
MAX_TEXT = 200                  # letters of an added token; those in use have thirty
USE = "use a Llama 3, Qwen2, Qwen3 or SmolLM2 folder"
SENTENCEPIECE = "is a SentencePiece vocabulary (Llama 2, Mistral, Gemma), not byte-level BPE"
MAKE = ("make one with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")


def refuse(path, what, do="download it again"):
    raise ValueError(f"{show(path, 140)}: {what}; {do}")


def check_folder(folder):
    if not folder.is_dir():
        raise FileNotFoundError(f"{show(folder, 140)}: no such folder; give the folder of a model")
    if not os.path.lexists(folder / "tokenizer.json"):
        older = [name for name in ("vocab.json", "tokenizer.model") if os.path.lexists(folder / name)]
        what = f"holds {older[0]}, but no tokenizer.json" if older else "holds no tokenizer.json"
        raise FileNotFoundError(f"{show(folder, 140)}: {what}; {MAKE if older else 'download this file too'}")


def check_tokenizer_json(path, data):
    """All of tokenizer.json but the expressions (`check_published`) and the added tokens (`check_added`)."""
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        refuse(path, f"model.type is {show(model.get('type') if isinstance(model, dict) else model)}, not 'BPE'", USE)
    cutters = steps_of(path, data, "pre_tokenizer", "pretokenizers")
    normalizers = steps_of(path, data, "normalizer", "normalizers")
    sentencepiece = any(step.get("type") in ("Metaspace", "Prepend") for step in cutters + normalizers)
    if model.get("byte_fallback") not in (None, False) or sentencepiece:
        refuse(path, SENTENCEPIECE, USE)
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field) not in (None, ""):
            refuse(path, f"model.{field} is {show(model[field])}; it is not implemented", USE)
    if not isinstance(model.get("ignore_merges", False), bool):
        refuse(path, f"model.ignore_merges is {show(model['ignore_merges'])}, not true or false", "correct it")
    if not isinstance(data.get("added_tokens") or [], list):
        refuse(path, f"added_tokens is {show(data['added_tokens'])}, not a list")

    for step in cutters:
        check_cutter(path, step, last=step is cutters[-1])
    if not cutters or cutters[-1].get("type") != "ByteLevel":
        refuse(path, "pre_tokenizer does not end in ByteLevel; only byte-level BPE is read", USE)
    for step in normalizers:
        if step.get("type") != "NFC":
            unknown(path, "normalizer", step)
    for step in steps_of(path, data, "decoder", "decoders") or [{}]:
        if step.get("type") != "ByteLevel":
            unknown(path, "decoder", step)
    for step in steps_of(path, data, "post_processor", "processors"):
        if step.get("type") == "TemplateProcessing":
            check_template_processing(path, step)
        elif step.get("type") != "ByteLevel":
            unknown(path, "post_processor", step)
    check_vocab(path, model.get("vocab"), model.get("merges"), model.get("unk_token"))


def unknown(path, field, step):
    rest = {key: value for key, value in step.items() if key != "type"}
    refuse(path, f"{field} {show(step.get('type'))} with {show(rest, 120)} is not implemented", USE)


def steps_of(path, data, field, inner, depth=0):
    """The steps of a field: none, one, or those of a Sequence."""
    node = data.get(field)
    if depth > 8:
        refuse(path, f"{field} holds a Sequence in a Sequence, and so on, deeper than any in use")
    if node is None:
        return []
    if not isinstance(node, dict):
        refuse(path, f"{field} is {show(node)}, not an object")
    if node.get("type") != "Sequence":
        return [node]
    if not isinstance(node.get(inner), list):
        refuse(path, f"{field}.{inner} is {show(node.get(inner))}, not a list")
    return [step for child in node[inner] for step in steps_of(path, {field: child}, field, inner, depth + 1)]


def check_cutter(path, step, last):
    """A step of pre_tokenizer: Split by an expression, each digit alone, and at the end ByteLevel."""
    kind, pattern = step.get("type"), step.get("pattern")
    if kind == "ByteLevel":
        right = last and step.get("add_prefix_space") is False and isinstance(step.get("use_regex", True), bool)
    elif kind == "Digits":
        right = step.get("individual_digits") is True
    else:
        right = (kind == "Split" and isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str)
                 and step.get("behavior") == "Isolated" and step.get("invert", False) is False)
    if not right:
        unknown(path, "pre_tokenizer", step)


def check_published(path, expressions, published):
    """The expressions that cut text into pieces are those of a published model, known letter by letter: none is ever run."""
    if expressions not in published:
        new = [text for text in expressions if not any(text in known for known in published)] or expressions
        refuse(path, f"pre_tokenizer pattern {show(new[0] if new else None, 120)} is that of no model known here", USE)


def check_template_processing(path, step):
    """What it puts before Sequence A: [{"SpecialToken": {"id": name}}, ...] with {name: {"ids": [...]}} beside it."""
    try:
        for item in step["single"]:
            if "Sequence" in item:
                break
            ids = step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
            if not isinstance(ids, list) or any(type(id) is not int or not 0 <= id < MAX_ID for id in ids):
                raise TypeError
    except (KeyError, TypeError):
        refuse(path, f"post_processor {show(step, 120)} lacks a part")


def check_vocab(path, vocab, merges, unknown_token):
    """{letters: id} and ["a b" or ["a", "b"], ...]"""
    if not isinstance(vocab, dict) or not vocab:
        refuse(path, f"model.vocab is {show(vocab)}, not an object of tokens and ids")
    if not isinstance(merges, list):
        refuse(path, f"model.merges is {show(merges)}, not a list")
    seen = set()
    for text, id in vocab.items():
        if type(id) is not int or not 0 <= id < MAX_ID:
            refuse(path, f"vocab: the id of {show(text)} is {show(id)}, not a whole number from 0 to {MAX_ID - 1}")
        if id in seen:
            refuse(path, f"vocab: the id {id} of {show(text)} is taken by another token")
        seen.add(id)
    for place, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        fits = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str)
        if not (fits and pair[0] in vocab and pair[1] in vocab and pair[0] + pair[1] in vocab) or " " in pair[0] + pair[1]:
            refuse(path, f"merge {place} is {show(merge, 120)}, not two tokens of the vocabulary that make a third")


def check_settings(path, settings, names):
    """tokenizer_config.json or special_tokens_map.json; names: the fields that name a special token."""
    for name in names:
        text = settings.get(name)
        text = text.get("content") if isinstance(text, dict) else text
        if text is not None and not isinstance(text, str):
            refuse(path, f"{name} is {show(text)}, not a text", "correct it")
    listed = settings.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        refuse(path, f"added_tokens_decoder is {show(listed)}, not an object", "correct it")
    for id, entry in listed.items():
        if not (re.fullmatch("[0-9]{1,10}", id) and isinstance(entry, dict)):
            refuse(path, f"added_tokens_decoder[{show(id)}] is {show(entry)}; it leads from ids to objects", "correct it")
    if not isinstance(settings.get("add_bos_token") or False, bool):
        refuse(path, f"add_bos_token is {show(settings['add_bos_token'])}, not true or false", "correct it")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = [each.get("template") for each in template if isinstance(each, dict) and each.get("name") == "default"]
        template = named[0] if named else False
    if template is not None and not isinstance(template, str):
        refuse(path, "chat_template is no text, and no list with one named default", "correct it")


def check_text(path, data):
    try:
        data.decode()
    except UnicodeDecodeError as error:
        refuse(path, f"is not UTF-8 (byte {error.start})")


def check_added(entries, vocab, compose):
    """[(file, an added token as tokenizer.json has it), ...]: each text has one id, and each id one text.

    compose: the function that normalised text goes through; two texts that it makes alike are one.
    """
    text_of, id_of, spelling = {id: text for text, id in vocab.items()}, {}, {}
    for path, entry in entries:
        check_added_token(path, entry)
        text, id = entry["content"], entry["id"]
        normalized = entry.get("normalized", not entry.get("special", False))
        alike = spelling.setdefault(compose(text) if normalized else text, text)
        if alike != text or id_of.setdefault(text, id) != id or vocab.get(text, id) != id:
            refuse(path, f"added token {show(text)} with the id {id} clashes: the same text has another id")
        other = text_of.setdefault(id, text)
        if other != text:
            refuse(path, f"added token {show(text)} clashes: its id {id} is that of {show(other)}")


def check_added_token(path, entry):
    text, id = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
    if not isinstance(text, str) or not text or type(id) is not int or not 0 <= id < MAX_ID:
        refuse(path, f"added token {show(entry, 120)} lacks a text, or an id from 0 to {MAX_ID - 1}")
    for flag in ("special", "normalized", "lstrip", "rstrip", "single_word"):
        if not isinstance(entry.get(flag, False), bool):
            refuse(path, f"added token {show(text)}: {flag} is {show(entry[flag])}, not true or false", "correct it")
    for flag in ("lstrip", "rstrip", "single_word"):
        if entry.get(flag, False):
            refuse(path, f"added token {show(text)}: {flag} is not implemented", USE)
    if len(text) > MAX_TEXT:
        refuse(path, f"added token {show(text)} has {len(text)} characters, more than any in use")


def check_ids(path, settings, name, vocab_size):
    """config.json or generation_config.json: `name` is an id, a list of ids, or absent."""
    ids, size = settings.get(name), vocab_size if type(vocab_size) is int else 1 << 31
    for id in ids if isinstance(ids, list) else [] if ids is None else [ids]:
        if type(id) is not int or not 0 <= id < size:
            refuse(path, f"{name} holds {show(id)}, not an id of the vocabulary", "correct it")


def check_size(path, words, vocab_size):
    """The ids of tokenizer.json are rows of the model's embedding, as many as config.json says."""
    last = len(words) - 1
    if type(vocab_size) is int and last >= vocab_size:
        refuse(path, f"token {show(words[last])} has the id {last}, but config.json has a vocab_size of {vocab_size}",
               "the two files must be of one model")
