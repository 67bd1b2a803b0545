"""The tokenizer files of a model folder -> a Tokenizer.

    tokenizer.json            the vocabulary, the pairs, how text is cut, the added tokens
    tokenizer_config.json     names of special tokens, more added tokens, the chat template
    special_tokens_map.json   the same names, in older folders
    chat_template.jinja       the chat template, in newer folders
    config.json, generation_config.json    the ids that end an answer

What may be wrong with them is judged in checks/vocabulary.py; here they are read.
"""
import itertools
import os
from pathlib import Path

from checks.files import read_bytes, read_json
from checks.vocabulary import (check_added, check_folder, check_ids, check_published,
                               check_settings, check_size, check_template, check_tokenizer_json)
from tokenizer.bpe import DIGIT, GPT2, PUBLISHED, BytePairs, from_letters
from tokenizer.text import Tokenizer, compose

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(folder):
    """The Tokenizer of a model folder, or ValueError, FileNotFoundError: one line on the reason."""
    folder = Path(folder)
    check_folder(folder)
    path = folder / "tokenizer.json"
    data = read_json(path)
    check_tokenizer_json(path, data)
    settings, names = read_settings(folder)

    # byte-pair encoding
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    cuts = expressions_of(steps_of(data.get("pre_tokenizer"), "pretokenizers"))
    check_published(path, cuts, PUBLISHED)
    pairs = BytePairs(vocab, merges, cuts, data["model"].get("ignore_merges", False))

    # added tokens, and the bytes of every id
    normalize = compose if steps_of(data.get("normalizer"), "normalizers") else str
    added = added_tokens(folder, data, settings, names, normalize)
    added_ids = {text: entry["id"] for text, entry in added.items()}
    words = [b""] * (max([*vocab.values(), *added_ids.values()]) + 1)
    for token, id in vocab.items():
        words[id] = from_letters(token)
    for text, id in added_ids.items():
        words[id] = text.encode()

    # the ids that begin a text, and those that end an answer
    ids_of = {name: [added[text]["id"]] for name, text in names.items() if text in added}
    bos_ids = first_ids(steps_of(data.get("post_processor"), "processors"))
    if settings.get("add_bos_token") and not bos_ids:
        bos_ids = ids_of.get("bos_token", [])
    eos_ids = set(ids_of.get("eos_token", []))
    size = read_if_there(folder / "config.json").get("vocab_size")
    check_size(path, words, bos_ids, size)
    for name in ("config.json", "generation_config.json"):
        table = read_if_there(folder / name)
        check_ids(folder / name, table, "eos_token_id", size)
        ids = table.get("eos_token_id")
        eos_ids |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    template = read_template(folder, settings)
    return Tokenizer(pairs, words, added, normalize, bos_ids, eos_ids, template, names)


def read_if_there(path):
    """The JSON object in a file, {} without one. A dangling link is there, and will be reported."""
    return read_json(path) if os.path.lexists(path) else {}


def read_settings(folder):
    """-> tokenizer_config.json with what special_tokens_map.json adds; {"eos_token": text, ...}"""
    settings = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if "added_tokens_decoder" not in settings:
            table = read_if_there(folder / name)
            check_settings(folder / name, table, NAMES)
            settings |= table
    tokens = {name: settings[name] for name in NAMES if settings.get(name) is not None}
    for name, token in tokens.items():
        tokens[name] = token["content"] if isinstance(token, dict) else token
    return settings, tokens


def read_template(folder, settings):
    """The chat template or None: a file of its own, a setting, or one of several settings."""
    path, template = folder / "chat_template.jinja", settings.get("chat_template")
    if os.path.lexists(path):
        template = read_bytes(path)
        check_template(path, template)
        return template.decode()
    if isinstance(template, list):
        return {each["name"]: each["template"] for each in template}["default"]
    return template or None


def steps_of(node, inner):
    """The steps of a field of tokenizer.json: none, one, or those of a Sequence."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    return [step for child in node[inner] for step in steps_of(child, inner)]


def expressions_of(steps):
    """What cuts text into pieces: Split, Digits, and ByteLevel, which has GPT-2's expression."""
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
    """What TemplateProcessing puts before a text, Sequence A."""
    for step in steps:
        if step["type"] == "TemplateProcessing":
            before = itertools.takewhile(lambda item: "Sequence" not in item, step["single"])
            names = [item["SpecialToken"]["id"] for item in before]
            return [id for name in names for id in step["special_tokens"][name]["ids"]]
    return []


def added_tokens(folder, data, settings, names, normalize):
    """{text: {"id", "special", "normalized"}} of tokenizer.json, then tokenizer_config.json. What
    is only named there, as eos_token, may stand in the vocabulary."""
    vocab = data["model"]["vocab"]
    entries = [(folder / "tokenizer.json", entry) for entry in data.get("added_tokens") or []]
    for id, entry in settings.get("added_tokens_decoder", {}).items():
        entries.append((folder / "tokenizer_config.json", {**entry, "id": int(id)}))
    check_added(entries, vocab, normalize)
    added = {text: {"id": vocab[text], "special": True, "normalized": False}
             for text in names.values() if text in vocab}
    for _, entry in entries:
        special = entry.get("special", False)
        normalized = entry.get("normalized", not special)
        added[entry["content"]] = {"id": entry["id"], "special": special, "normalized": normalized}
    return added
