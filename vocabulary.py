"""The tokenizer files of a model folder, read and checked: what `tokenizer.load_tokenizer` builds on.

Three spellings of the same thing, byte-level BPE: `tokenizer.json` (every field that changes ids is implemented or refused by
its name), `vocab.json` + `merges.txt` (GPT-2's release), Meta's `tokenizer.model`. Around them `tokenizer_config.json`,
`special_tokens_map.json`, `added_tokens.json` and `generation_config.json` name the added tokens and where an answer ends.
"""
import base64
import operator
import os
import re
from pathlib import Path

import regex

from bpe import GPT2, LLAMA3, QWEN2, nfc
from checks import read_bytes, read_json, show, token_ids

MAX_ID = 1 << 22                # no vocabulary in use has a million tokens
USE = "use a Llama 3, Qwen2 or Qwen3 folder"
SENTENCEPIECE = "is a SentencePiece vocabulary (Llama 2, Mistral, Gemma), not byte-level BPE"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
META_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
                "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
                "<|eot_id|>", "<|python_tag|>", "<|image|>"] + [f"<|reserved_special_token_{i}|>" for i in range(2, 246)]

# What may stand in an expression: only what all engines read alike.
CLASS = r"\\[pP]\{[A-Z][a-z]?\} | \\[srntSdD] | \\\W"
SAFE = re.compile(rf"""(?: {CLASS} | \[\^?(?: {CLASS} | [^\[\]\\&|~] | (?<![&|~])[&|~](?![&|~]) )+\]
    | \((?: (?!\?) | \?: | \?! | \?= ) | [)|] | \(\?i: (?: (?!ss|st|ff|fi|fl) ['a-z|] )* \)
    | [*+?]\+? | \{{\d+(?:,\d*)?\}} (?![+?*]) | [^\\\[\](){{}}*+?|^$.] )*""", re.VERBOSE)

# Vocabulary files spell bytes as characters: printable ones as themselves, the other 68 as U+0100, U+0101, ... (space: "Ġ").
OTHERS = [byte for byte in range(256) if not (33 <= byte < 127 or 161 <= byte < 173 or byte > 173)]
BYTE_OF = {256 + i: byte for i, byte in enumerate(OTHERS)} | dict.fromkeys(OTHERS, 0xFFFF)      # 0xFFFF: not in this alphabet


def spelled(token):
    """The bytes that a vocabulary entry stands for; b"" where its characters are not of the byte alphabet."""
    try:
        return token.translate(BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:
        return b""


def refuse(path, what, do="download it again"):
    raise ValueError(f"{show(path, 140)}: {what}; {do}")


def read_tokenizer_files(folder):
    """All that a Tokenizer is made of, a dict:

        vocab {bytes: id}, merges [(bytes, bytes)] or None, splits [(expression, keep the gaps)], nfc, ignore_merges   the BPE
        words [bytes], one for every id; added {text: {"id", "special", "normalized"}}                                 the ids
        bos_ids, eos_ids, template (a text or None), names {"eos_token": text, ...}
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{show(folder, 140)}: no such folder; give the folder of a model")

    def there(name):
        return os.path.lexists(folder / name)                       # a dangling link is there, and will be reported

    def read(name):
        return read_json(folder / name) if there(name) else {}

    config, settings = read("config.json"), read("tokenizer_config.json")
    names = special_names(folder / "tokenizer_config.json", settings)
    if "added_tokens_decoder" not in settings:                      # older folders name special tokens in a file of their own
        older = read("special_tokens_map.json")
        names |= special_names(folder / "special_tokens_map.json", older)
        settings = {**settings, **older}

    path = next((folder / name for name in ("tokenizer.json", "vocab.json", "tokenizer.model") if there(name)), None)
    if path is None:
        raise FileNotFoundError(f"{show(folder, 140)}: holds no tokenizer.json, vocab.json + merges.txt or tokenizer.model; "
                                "download these files too")
    if path.name == "tokenizer.json":
        parts = from_tokenizer_json(path)
    elif path.name == "vocab.json":
        parts = from_vocab_and_merges(path, settings, config)
    else:
        parts = from_meta(path)
    vocab, texts = parts["vocab"], parts.pop("texts")
    missing = [byte for byte in range(256) if bytes([byte]) not in vocab and byte not in (0xC0, 0xC1, *range(0xF5, 256))]
    if missing:                                                     # but for those that UTF-8 never uses
        refuse(path, f"has no token for {len(missing)} of the 256 bytes (0x{missing[0]:02X}), so some texts have no ids", USE)
    words = [b""] * (max(max(vocab.values()), max(texts.values(), default=0)) + 1)
    for text, id in texts.items():
        words[id] = text.encode()
    for token, id in vocab.items():
        words[id] = token

    entries = [(path, entry) for entry in parts["added"]]           # each with the file that names it
    entries += [(folder / "tokenizer_config.json", entry) for entry in listed_tokens(folder / "tokenizer_config.json", settings)]
    if path.name == "vocab.json" and "added_tokens_decoder" not in settings:
        more = settings.get("additional_special_tokens")
        special = [*names.values(), *(more if isinstance(more, list) else [])]
        entries += [(folder / "added_tokens.json", {"content": text, "id": id, "special": text in special})
                    for text, id in read("added_tokens.json").items()]
    known = {str(entry.get("content")) for _, entry in entries if isinstance(entry, dict)}
    entries += [(path, {"content": text, "id": texts[text], "special": True})   # named special, and only in the vocabulary
                for text in dict.fromkeys(names.values()) if text in texts and text not in known]
    added = checked_added(entries, texts, words, parts["nfc"])

    size, last = config.get("vocab_size"), len(words) - 1
    if type(size) is int and last >= size:
        refuse(path, f"token {show(words[last])} has the id {last}, but config.json has a vocab_size of {size}",
               "the two files must be of one model")
    named = {name: [added[text]["id"]] for name, text in names.items() if text in added}
    bos_ids, eos_ids = parts["bos_ids"], parts["eos_ids"] + named.get("eos_token", [])
    if settings.get("add_bos_token") not in (None, True, False):
        refuse(folder / "tokenizer_config.json", f"add_bos_token is {show(settings['add_bos_token'])}, not true or false", "correct it")
    if settings.get("add_bos_token") is True and not bos_ids:       # tokenizer.json has the first word on it
        bos_ids = named.get("bos_token", [])
    for name, table in (("config.json", config), ("generation_config.json", read("generation_config.json"))):
        eos_ids += token_ids(folder / name, table, "eos_token_id", size if type(size) is int else 1 << 31)

    template = settings.get("chat_template")
    if isinstance(template, list):                                  # several, each with a name
        defaults = [each.get("template") for each in template if isinstance(each, dict) and each.get("name") == "default"]
        template = defaults[0] if defaults else False
    if template is not None and not isinstance(template, str):
        refuse(folder / "tokenizer_config.json", "chat_template is no text, and no list with one named default", "correct it")
    if there("chat_template.jinja"):
        template = read_text(folder / "chat_template.jinja")
    return parts | {"words": words, "added": added, "bos_ids": bos_ids, "eos_ids": eos_ids, "template": template or None,
                    "names": names}


def special_names(path, settings):
    """{"eos_token": its text, ...} from tokenizer_config.json, where a token is a text or an object with a text."""
    names = {}
    for name in NAMES:
        text = settings.get(name)
        text = text.get("content") if isinstance(text, dict) else text
        if isinstance(text, str):
            names[name] = text
        elif text is not None:
            refuse(path, f"{name} is {show(text)}, not a text", "correct it")
    return names


def listed_tokens(path, settings):
    """The added tokens that tokenizer_config.json lists by id, in the form of tokenizer.json."""
    listed = settings.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        refuse(path, f"added_tokens_decoder is {show(listed)}, not an object", "correct it")
    for id, entry in listed.items():
        if not (re.fullmatch("[0-9]{1,10}", id) and isinstance(entry, dict)):
            refuse(path, f"added_tokens_decoder[{show(id)}] is {show(entry)}; it leads from ids to objects", "correct it")
    return [{**entry, "id": int(id)} for id, entry in listed.items()]


def read_text(path):
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        refuse(path, f"is not UTF-8 (byte {error.start})")


def nodes_of(path, data, field, inner, depth=0):
    """The steps of a field of tokenizer.json: none, one, or those of a Sequence."""
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
    return [step for child in node[inner] for step in nodes_of(path, {field: child}, field, inner, depth + 1)]


def from_tokenizer_json(path):
    """The file of the `tokenizers` library. Every field that changes ids is implemented, or refused by its name."""
    data = read_json(path)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        refuse(path, f"model.type is {show(model.get('type') if isinstance(model, dict) else model)}, not 'BPE'", USE)
    steps = nodes_of(path, data, "pre_tokenizer", "pretokenizers")
    normalizers = nodes_of(path, data, "normalizer", "normalizers")
    if model.get("byte_fallback") not in (None, False) or any(step.get("type") in ("Metaspace", "Prepend") for step in steps + normalizers):
        refuse(path, SENTENCEPIECE, USE)
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field) not in (None, ""):
            refuse(path, f"model.{field} is {show(model[field])}; it is not implemented", USE)
    if not isinstance(model.get("ignore_merges", False), bool):
        refuse(path, f"model.ignore_merges is {show(model['ignore_merges'])}, not true or false", "correct it")

    def unknown(field, step):
        rest = {key: value for key, value in step.items() if key != "type"}
        refuse(path, f"{field} {show(step.get('type'))} with {show(rest, 120)} is not implemented", USE)

    splits = []
    for step in steps:
        kind, pattern = step.get("type"), step.get("pattern")
        keep = {"Isolated": True, "Removed": False if step.get("invert") else None}.get(str(step.get("behavior")))
        if any(not isinstance(step.get(flag, False), bool) for flag in ("invert", "use_regex", "individual_digits")):
            unknown("pre_tokenizer", step)
        elif kind == "ByteLevel" and step is steps[-1] and step.get("add_prefix_space") is False:
            splits += [(GPT2, True)] if step.get("use_regex", True) else []
        elif kind == "Digits":
            splits.append((r"\p{N}" if step.get("individual_digits") else r"\p{N}+", True))
        elif kind == "Split" and keep is not None and isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
            splits.append((pattern["Regex"], keep))
        elif kind == "Split" and keep is not None and isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
            splits.append((regex.escape(pattern["String"]), keep))
        else:
            unknown("pre_tokenizer", step)
    if not steps or steps[-1].get("type") != "ByteLevel":
        refuse(path, "pre_tokenizer does not end in ByteLevel; only byte-level BPE is read", USE)
    for text, _ in splits:
        if len(text) > 2000 or re.search(r"\{[\d,]*\d{3}", text):       # compiling a count of millions takes all memory
            refuse(path, f"pre_tokenizer pattern {show(text)} is longer, or counts further, than any in use", USE)
        try:
            matches_nothing = regex.compile(text).fullmatch("")
        except (regex.error, RecursionError, OverflowError) as error:
            refuse(path, f"pre_tokenizer pattern {show(text)} is no regular expression ({show(str(error))})", "correct it")
        if matches_nothing or not SAFE.fullmatch(text):
            refuse(path, f"pre_tokenizer pattern {show(text, 120)} has parts that different engines read differently", USE)
    for step in normalizers:
        if step.get("type") != "NFC":
            unknown("normalizer", step)
    for step in nodes_of(path, data, "decoder", "decoders") or [{}]:
        if step.get("type") != "ByteLevel":
            unknown("decoder", step)

    bos_ids = []
    for step in nodes_of(path, data, "post_processor", "processors"):
        if step.get("type") == "TemplateProcessing":                # what stands before Sequence A
            try:
                for item in step["single"]:
                    if "Sequence" in item:
                        break
                    bos_ids += [operator.index(id) for id in step["special_tokens"][item["SpecialToken"]["id"]]["ids"]]
            except (KeyError, TypeError):
                refuse(path, f"post_processor {show(step, 120)} lacks a part")
        elif step.get("type") != "ByteLevel":
            unknown("post_processor", step)
    added = data.get("added_tokens") or []
    if not isinstance(added, list):
        refuse(path, f"added_tokens is {show(added)}, not a list")
    vocab, pairs = checked_vocab(path, model.get("vocab"), model.get("merges"))
    return {"vocab": vocab, "texts": model["vocab"], "merges": pairs, "splits": splits, "nfc": bool(normalizers),
            "ignore_merges": model.get("ignore_merges", False), "added": added, "bos_ids": bos_ids, "eos_ids": []}


def from_vocab_and_merges(path, settings, config):
    """The two files of GPT-2's release. They do not say how text is cut into pieces; the name of the tokenizer's class does."""
    by_model = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "gpt2": "GPT2Tokenizer"}
    name = settings.get("tokenizer_class") or by_model.get(str(config.get("model_type")))
    expression = {"Qwen2Tokenizer": QWEN2, "GPT2Tokenizer": GPT2}.get(str(name).removesuffix("Fast"))
    space = settings.get("add_prefix_space")
    if expression is None or space:
        refuse(path.with_name("tokenizer_config.json"), f"tokenizer_class {show(name)} with add_prefix_space {show(space)}: "
               "vocab.json is read only for Qwen2Tokenizer and GPT2Tokenizer without it", USE)
    merges_path = path.with_name("merges.txt")
    lines = [line.rstrip("\r") for line in read_text(merges_path).split("\n")]
    texts = read_json(path)
    vocab, pairs = checked_vocab(path, texts, [line for line in lines if line], merges_path)
    return {"vocab": vocab, "texts": texts, "merges": pairs, "splits": [(expression, True)], "nfc": expression == QWEN2,
            "ignore_merges": False, "added": [], "bos_ids": [], "eos_ids": []}


def from_meta(path):
    """Meta's file: on each line a token in base64 and its rank. Any two neighbours may join; 256 control tokens follow."""
    vocab = {}
    for line in read_bytes(path).split(b"\n"):
        if line.strip():
            try:
                token, rank = line.split()
                token = base64.b64decode(token, validate=True)
                fits = token and token not in vocab and int(rank) == len(vocab)
            except ValueError:
                fits = False
            if not fits and not vocab:
                refuse(path, SENTENCEPIECE, USE)
            if not fits:
                refuse(path, f"token {len(vocab)} is {show(line)}, not base64 and the rank {len(vocab)}")
            vocab[token] = len(vocab)
    ids = {text: len(vocab) + place for place, text in enumerate(META_SPECIAL)}
    return {"vocab": vocab, "texts": {}, "merges": None, "splits": [(LLAMA3, True)], "nfc": False, "ignore_merges": True,
            "added": [{"content": text, "id": id, "special": True} for text, id in ids.items()],
            "bos_ids": [ids["<|begin_of_text|>"]], "eos_ids": [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]]}


def checked_vocab(path, vocab, merges, merges_path=None):
    """{spelled token: id} and merges, "a b" or ["a", "b"] -> {bytes: id} and [(bytes, bytes)]."""
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
    spelling = {text: spelled(text) for text in vocab}
    pairs = []
    for place, merge in enumerate(merges):
        if isinstance(merge, str):
            if merge.startswith("#version"):
                continue
            merge = merge.split(" ")
        try:
            a, b = merge
            pair = spelling[a], spelling[b]
            fits = all(pair) and spelling[a + b] and isinstance(merge, list)
        except (TypeError, ValueError, KeyError):
            fits = False
        if not fits:
            refuse(merges_path or path, f"merge {place} is {show(merges[place], 120)}, not two tokens of the vocabulary that make a third")
        pairs.append(pair)
    return {token: vocab[text] for text, token in spelling.items() if token}, pairs


def checked_added(entries, texts, words, composed):
    """(file, added token), ... -> {text: {"id", "special", "normalized"}}; `words` receives the texts. A later entry for the
    same text and id replaces an earlier one."""
    added, owner, canonical = {}, {}, {}
    for path, entry in entries:
        text, id = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(text, str) or not text or type(id) is not int or not 0 <= id < MAX_ID:
            refuse(path, f"added token {show(entry, 120)} lacks a text, or an id from 0 to {MAX_ID - 1}")
        flags = {flag: entry.get(flag, False) for flag in ("special", "lstrip", "rstrip", "single_word")}
        flags["normalized"] = entry.get("normalized", not flags["special"])
        for flag, value in flags.items():
            if not isinstance(value, bool):
                refuse(path, f"added token {show(text)}: {flag} is {show(value)}, not true or false", "correct it")
            if value and flag not in ("special", "normalized"):
                refuse(path, f"added token {show(text)}: {flag} is not implemented", USE)
        if len(text) > 500:
            refuse(path, f"added token {show(text)} has {len(text)} characters, more than any in use")
        same = canonical.setdefault(nfc(text) if composed and flags["normalized"] else text, text)
        if same != text or added.get(text, entry)["id"] != id or texts.get(text, id) != id:
            refuse(path, f"added token {show(text)} with the id {id} clashes: the same text has another id")
        taken = id < len(words) and words[id] and id not in owner
        if owner.setdefault(id, text) != text or taken and texts.get(text) != id:
            other = owner[id] if owner[id] != text else words[id]
            refuse(path, f"added token {show(text)} clashes: its id {id} is that of {show(other)}")
        added[text] = {"id": id, "special": flags["special"], "normalized": flags["normalized"]}
    words += [b""] * (max(owner, default=0) + 1 - len(words))
    for text, entry in added.items():
        words[entry["id"]] = text.encode()
    return added
