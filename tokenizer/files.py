"""The tokenizer files of a model folder -> a Tokenizer.

    tokenizer.json            the vocabulary, the pairs, how text is cut, the added tokens
    tokenizer_config.json     the names of special tokens, more added tokens, the chat template
    special_tokens_map.json   the same names, in older folders
    chat_template.jinja       the chat template, in newer folders
    config.json, generation_config.json    the ids that end an answer

What may be wrong with them is judged in checks/vocabulary.py; here they are read.
"""
import os
from pathlib import Path

from checks.files import read_bytes, read_json
from checks.vocabulary import (check_added, check_folder, check_ids, check_published, check_settings, check_size,
                               check_text, check_tokenizer_json)
from tokenizer.bpe import DIGIT, GPT2, PUBLISHED, BytePairs, bytes_of_letters
from tokenizer.text import Tokenizer, compose

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(folder):
    """The Tokenizer of a model folder.

    Raises ValueError (FileNotFoundError for a file that is not there), one line that names the file and what is wrong.
    """
    folder = Path(folder)
    check_folder(folder)
    path = folder / "tokenizer.json"
    data = read_json(path)
    check_tokenizer_json(path, data)
    config, generation = read_if_there(folder, "config.json"), read_if_there(folder, "generation_config.json")
    settings, names = read_settings(folder)

    # text -> pieces -> ids
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    cuts = expressions_of(steps_of(data.get("pre_tokenizer"), "pretokenizers"))
    check_published(path, cuts, PUBLISHED)
    nfc = bool(steps_of(data.get("normalizer"), "normalizers"))
    words = [b""] * (max(vocab.values()) + 1)
    for token, id in vocab.items():
        words[id] = bytes_of_letters(token)
    pairs = BytePairs(vocab, merges, words, PUBLISHED[cuts], data["model"].get("ignore_merges", False))

    # added tokens, and entries of the vocabulary that are none of byte-pair encoding
    for token, id in vocab.items():
        words[id] = words[id] or token.encode()
    added = added_tokens(folder, data, settings, names, vocab, compose if nfc else str)
    last = max((entry["id"] for entry in added.values()), default=0)
    words += [b""] * (last + 1 - len(words))
    for text, entry in added.items():
        words[entry["id"]] = text.encode()
    check_size(path, words, config.get("vocab_size"))

    # ids that begin a text, and ids that end an answer
    bos_ids = first_ids(steps_of(data.get("post_processor"), "processors"))
    if settings.get("add_bos_token") is True and not bos_ids and names.get("bos_token") in added:
        bos_ids = [added[names["bos_token"]]["id"]]
    eos_ids = [added[names["eos_token"]]["id"]] if names.get("eos_token") in added else []
    size = config.get("vocab_size")
    for name, table in (("config.json", config), ("generation_config.json", generation)):
        check_ids(folder / name, table, "eos_token_id", size)
        ids = table.get("eos_token_id")
        eos_ids += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return Tokenizer(pairs, words, added, nfc, bos_ids, eos_ids, read_template(folder, settings), names)


def read_if_there(folder, name):
    """The JSON object in a file, {} without the file. A dangling link is there, and will be reported."""
    return read_json(folder / name) if os.path.lexists(folder / name) else {}


def read_settings(folder):
    """-> tokenizer_config.json with what special_tokens_map.json adds; {"eos_token": its text, ...}"""
    settings = read_if_there(folder, "tokenizer_config.json")
    check_settings(folder / "tokenizer_config.json", settings, NAMES)
    older = {}
    if "added_tokens_decoder" not in settings:
        older = read_if_there(folder, "special_tokens_map.json")
        check_settings(folder / "special_tokens_map.json", older, NAMES)
    names = {}
    for table in (settings, older):
        for name in NAMES:
            text = table.get(name)
            text = text.get("content") if isinstance(text, dict) else text
            if text is not None:
                names[name] = text
    return {**settings, **older}, names


def read_template(folder, settings):
    """The chat template or None. It has a file of its own, or stands in tokenizer_config.json, maybe as one of several."""
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        data = read_bytes(path)
        check_text(path, data)
        return data.decode()
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = [each["template"] for each in template if each.get("name") == "default"][0]
    return template or None


def steps_of(node, inner):
    """The steps of a field of tokenizer.json: none, one, or those of a Sequence."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    return [step for child in node[inner] for step in steps_of(child, inner)]


def expressions_of(steps):
    """What cuts text into pieces, step after step: Split, Digits, and ByteLevel, which may do so by GPT-2's expression."""
    expressions = []
    for step in steps:
        if step["type"] == "Split":
            expressions.append(step["pattern"]["Regex"])
        elif step["type"] == "Digits":
            expressions.append(DIGIT)
        elif step.get("use_regex", True):
            expressions.append(GPT2)
    return tuple(expressions)


def first_ids(steps):
    """What TemplateProcessing puts before a text: {"single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": ...}]}"""
    ids = []
    for step in steps:
        if step["type"] == "TemplateProcessing":
            for item in step["single"]:
                if "Sequence" in item:
                    break
                ids += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    return ids


def added_tokens(folder, data, settings, names, vocab, compose):
    """{text: {"id", "special", "normalized"}}: of tokenizer.json, then of tokenizer_config.json, then special tokens that
    are only named, and stand in the vocabulary."""
    entries = [(folder / "tokenizer.json", entry) for entry in data.get("added_tokens") or []]
    for id, entry in settings.get("added_tokens_decoder", {}).items():
        entries.append((folder / "tokenizer_config.json", {**entry, "id": int(id)}))
    check_added(entries, vocab, compose)

    added = {}
    for _, entry in entries:
        special = entry.get("special", False)
        normalized = entry.get("normalized", not special)
        added[entry["content"]] = {"id": entry["id"], "special": special, "normalized": normalized}
    for text in names.values():
        if text in vocab and text not in added:
            added[text] = {"id": vocab[text], "special": True, "normalized": False}
    return added
