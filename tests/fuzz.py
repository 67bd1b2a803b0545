"""
Damaged files by the thousand: each either loads with the values that an independent reading finds,
or is refused in one line.

    python tests/fuzz.py                        12,000 safetensors files, 3,000 config, index,
                                                tokenizer and template files
    python tests/fuzz.py --seconds 600 --seed 7 as many as fit, in the same proportion
    python tests/fuzz.py --only header:4711     one case again; its files stay in ./fuzz-case

A case is drawn from its own seed, "seed/kind/number", so a case that fails is found again by its
name. Anything but a loaded folder or a ValueError or FileNotFoundError of one line of at most 400
printable characters is a failure, and so are 5 seconds, or 200 MB more memory than at the start,
and a file that is refused although the rules below allow it.
"""
import argparse
import copy
import functools
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from pathlib import Path

import regex
import torch

from hostile import INDEX, MODEL, NAMES, PATTERN, build, byte_alphabet, safetensors, shards, write

from load_weights import load_model, read_safetensors
from tokenizer import load_tokenizer

torch.set_num_threads(1)
PROPORTIONS = {"header": 120, "config": 12, "generation": 2, "index": 4, "tokenizer": 10,
               "settings": 2, "template": 0.4}
SECONDS, MEGABYTES = 5, 200


# ---- an independent reading of safetensors -------------------------------------------------------
# Written from the format's page, and from what this project adds: no key twice, nothing that is no
# Unicode, no NaN, no absurd number.

ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
            "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1}


def reading(file):
    """bytes -> {name: (dtype, shape, bytes)}, or None for a file that breaks a rule."""
    def once(pairs):
        assert len({key for key, _ in pairs}) == len(pairs)
        return dict(pairs)

    def whole(value):
        assert isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2 ** 63
        return value

    def no_number(text):
        raise AssertionError

    try:
        length, = struct.unpack_from("<Q", file)
        assert 0 < length <= len(file) - 8 and length <= 100_000_000
        text, data = file[8:8 + length].decode(), file[8 + length:]
        assert text[0] == "{"
        header = json.loads(text, object_pairs_hook=once, parse_constant=no_number)
        json.dumps(header, ensure_ascii=False).encode()
        assert finite(header)
        metadata = header.pop("__metadata__", {})
        assert isinstance(metadata, dict)
        assert all(isinstance(value, str) for value in metadata.values())
        used, found = 0, {}
        in_order = sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
        for name, entry in in_order:
            begin, end = map(whole, entry["data_offsets"])
            shape = tuple(map(whole, entry["shape"]))
            assert isinstance(entry["shape"], list) and isinstance(entry["data_offsets"], list)
            assert begin == used and end - begin == math.prod(shape) * ITEMSIZE[entry["dtype"]]
            assert math.prod(filter(None, shape)) < 2 ** 60
            found[name], used = (entry["dtype"], shape, data[begin:end]), end
        assert used == len(data)
        return found
    except (AssertionError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
            struct.error):
        return None


def finite(value):
    """No number of 40 digits, none that is infinite: absurd numbers are refused, wherever they
    stand."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    if isinstance(value, int):
        return len(str(value)) < 40
    return not isinstance(value, float) or math.isfinite(value)


def same(tensors, found):
    more = {"U16": "uint16", "U32": "uint32", "U64": "uint64", "F8_E5M2": "float8_e5m2"}
    codes = {str(getattr(torch, dtype)): code for code, dtype in {**NAMES, **more}.items()}
    assert tensors.keys() == found.keys(), "other names"
    for name, tensor in tensors.items():
        raw = b""
        if tensor.numel():
            raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        has = codes[str(tensor.dtype)], tuple(tensor.shape), raw
        assert has == found[name], f"{name} has other values"


# ---- damage --------------------------------------------------------------------------------------

ODD = [None, True, False, 0, 1, 2, -1, 7, 1.5, -0.0, 1e308, 2 ** 31, 2 ** 32, 2 ** 53 + 1,
       2 ** 63 - 1, 2 ** 63, 2 ** 64 - 1, 2 ** 64, 10 ** 30, 10 ** 400, math.nan, math.inf, "", "0",
       "true", "\ud800", "\0", "a" * 1000, "é\u0301", "\n\x1b[2J", "F32", "silu", "../x", "yarn",
       [], [0], [1, 2, 3], [[]], {}, {"a": 1}, [None], "Sequence", "<|im_end|>", [0, 2 ** 63],
       list(range(300)), {"__metadata__": {}}]
SNIPPETS = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\ud800", b"\\u0000", b"\0", b"\xff",
            b"\xc3", b"1e999", b"-", b"NaN", b"Infinity", b"00", b" ", b"\n", b"\t", b"null",
            b"true", b'"a":1,', b'"dtype":"F32",', b"[" * 3000, b"9" * 5000, b"\xef\xbb\xbf",
            b"'", b"/**/", b"0x1"]


def places(value, path=()):
    """Every place in a JSON value: paths of keys and indices."""
    yield path
    items = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, child in items:
        yield from places(child, path + (key,))


def damage(value, draw, spots=None):
    """A JSON value with one place changed, removed, doubled, moved or renamed: a new value."""
    value = copy.deepcopy(value)
    path = draw.choice(spots or list(places(value))[1:] or [()])
    if not path:
        return draw.choice(ODD)
    node, key = value, path[-1]
    try:
        for step in path[:-1]:
            node = node[step]
        old, how = node[key], draw.randrange(9)
        if how == 0:
            del node[key]
        elif how == 1 and isinstance(old, int) and not isinstance(old, bool):
            node[key] = old + draw.choice([-8, -4, -1, 1, 4, 8, 2 ** 32])
        elif how == 2 and isinstance(node, dict):
            names = [str(key) + "x", "", "__metadata__", "dtype", "\ud800", str(key)[:-1]]
            node[draw.choice(names)] = node.pop(key)
        elif how == 3 and isinstance(node, list):
            node.insert(draw.randrange(len(node) + 1), copy.deepcopy(old))
        elif how == 4 and isinstance(node, (list, dict)):           # swap with a sibling
            other = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node[key], node[other] = node[other], node[key]
        elif how == 5 and isinstance(old, (int, float)):
            node[key] = draw.choice([str(old), float(old), [old], -old, bool(old), old * 2])
        elif how == 6 and isinstance(old, str):
            at = draw.randrange(len(old) + 1)
            new = draw.choice(["", " ", "é", "\0", "(", "+", "{{", "%}", "\\", old])
            node[key] = old[:at] + new + old[at + draw.randrange(2):]
        elif how == 7 and isinstance(node, dict):
            node[draw.choice(["extra", "a\nb"])] = copy.deepcopy(draw.choice(ODD))
        else:
            node[key] = copy.deepcopy(draw.choice(ODD))
    except (KeyError, IndexError, TypeError, OverflowError):
        pass                                    # the place went with an earlier change
    return value


def text_of(value, draw):
    """JSON as bytes, sometimes in an odd but legal layout, sometimes with a key twice or a lone
    surrogate as raw bytes."""
    separators = draw.choice([(",", ":"), (", ", ": "), (" ,\n", "\t:  ")])
    text = json.dumps(value, ensure_ascii=draw.random() < 0.7, separators=separators)
    if draw.random() < 0.03:
        text = draw.choice([" ", "\n", "\ufeff"]) + text
    if draw.random() < 0.05:
        text = "{" + text[text.find("{") + 1:text.find(",") + 1] + text[text.find("{") + 1:]
    return text.encode("utf-8", "surrogatepass")


def spoil(data, draw):
    """Bytes with some flipped, cut, doubled or put in."""
    at = draw.randrange(len(data) + 1)
    how = draw.randrange(5)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + draw.choice(SNIPPETS) + data[at + draw.randrange(3):]
    if how == 2 and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1:]
    if how == 3:
        return data[:at] + data[at + draw.randrange(1, 20):]
    end = min(len(data), at + draw.randrange(1, 30))
    return data[:end] + data[at:end] + data[end:]


# ---- the kinds of case ---------------------------------------------------------------------------

KINDS = ["float32", "float16", "bfloat16", "float64", "int64", "uint8", "bool", "int32",
         "complex64", "float8_e4m3fn"]
SHAPES = [(), (3,), (2, 3), (0,), (4, 0, 2), (1, 1, 1), (5, 2)]
LENGTHS = [0, 1, 2 ** 31, 2 ** 63, 2 ** 64 - 1, 100_000_001]


def header_case(draw, folder):
    """A file of a few small tensors of all dtypes: structure, then bytes, then the whole file."""
    tensors = {}
    for i in range(draw.randrange(5)):
        shape = draw.choice(SHAPES)
        raw = [draw.randrange(2) for _ in range(math.prod(shape))]
        raw = torch.tensor(raw, dtype=torch.uint8).view(shape)
        name = draw.choice(["w", "model.norm.weight", "é", "", " ", "a/b"]) + str(i)
        tensors[name] = raw.to(getattr(torch, draw.choice(KINDS)))
    order, header = draw.sample(list(tensors), len(tensors)), {}
    file = safetensors(tensors, metadata=draw.choice([None, {}, {"format": "pt"}]), order=order,
                       change=header.update)
    data = file[8 + struct.unpack_from("<Q", file)[0]:]
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        header = damage(header, draw)
    text = text_of(header, draw)
    if draw.random() < 0.25:
        text = spoil(text, draw)
    text += b" " * draw.choice([0, 0, 0, 1, 8])
    length = len(text)
    if draw.random() > 0.9:
        length = draw.choice([*LENGTHS, length - 1, length + 1])
    file = struct.pack("<Q", max(0, length)) + text + data
    if draw.random() < 0.25:
        cut = file[:draw.randrange(len(file) + 1)]
        file = draw.choice([file + b"\0", file[:-1], cut, spoil(file, draw)])
    path = folder / "case.safetensors"
    path.unlink(missing_ok=True)                # a new file: the old one may still be mapped
    path.write_bytes(file)
    expected = reading(file)
    try:
        tensors = read_safetensors(path)
    except ValueError as error:
        assert expected is None, f"refused although it is valid: {error}"
        raise
    assert expected is not None, "loaded although it is not valid"
    same(tensors, expected)


ROPES = [None, None, {"rope_type": "linear", "factor": 2.0},
         {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
         {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}]


def whole_folder(name, spots=None, chance=0.25):
    """A case that damages one JSON file of a good folder and then loads the folder."""
    def case(draw, folder):
        tensors, whole, parts = good_folder(draw.choice(["llama", "qwen2", "qwen3"]))
        files = dict(parts if name == INDEX else whole)
        files["config.json"] = {**files["config.json"], "rope_scaling": draw.choice(ROPES)}
        value = files[name]
        for _ in range(draw.choice([0, 1, 1, 2])):
            value = damage(value, draw, spots and spots(value))
        text = text_of(value, draw)
        files[name] = spoil(text, draw) if draw.random() < chance else text
        shutil.rmtree(folder)
        write(folder, files)
        try:
            raw = json.loads(files[name].decode())
        except (ValueError, RecursionError):
            raw = None
        if name.startswith(("tokenizer", "generation")):
            tokenizer = load_tokenizer(folder)
            check_tokenizer(tokenizer, raw if name == "tokenizer.json" else None)
        else:
            lm = load_model(folder)
            check_model(lm, tensors, json.loads((folder / "config.json").read_bytes()))
        assert isinstance(raw, dict), "loaded although it is no JSON object"
        if name == INDEX:
            assert raw["weight_map"] == parts[name]["weight_map"], "another weight_map"
    return case


@functools.cache
def good_folder(family):
    """-> its tensors; its files with the weights in one file; and in shards."""
    files = build(family)
    tensors = files.pop(MODEL)
    parts = shards(tensors, 2)
    for name in parts:
        if name != INDEX:
            parts[name] = safetensors(parts[name])
    return tensors, {**files, MODEL: safetensors(tensors)}, {**files, **parts}


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "max_position_embeddings")
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")


def check_model(lm, tensors, raw):
    """Sizes are those of the file, weights those of the file, and numbers come out."""
    for name in SIZES:
        same = type(raw[name]) is int and getattr(lm.config, name) == raw[name]
        assert same, f"{name} is not the file's"
    eps = raw["rms_norm_eps"]
    assert type(eps) is float and lm.config.rms_norm_eps == eps
    assert lm.config.tie_word_embeddings is False
    assert raw.get("tie_word_embeddings") in (None, False)
    given = [raw, raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}]
    bases = [place.get("rope_theta") for place in given]
    missing = bases == [None] * 3 and raw["model_type"] == "llama"
    assert lm.config.rope["rope_theta"] in bases or missing
    assert all(type(raw.get(name)) in (bool, type(None)) for name in SWITCHES)
    for name, weight in lm.state_dict().items():
        expected = tensors[name].to(weight.dtype).float()
        assert torch.equal(weight.float(), expected), f"{name} has other values"
    with torch.no_grad():
        lm(torch.tensor([[1, 2, 299]]))


TEXT = "The other thing: 12 éèe\u0301 \t\n ones <|im_end|>\0 <|im_sta\U0001F600"
GOOD = build()["tokenizer.json"]
LETTERS = byte_alphabet()


def check_tokenizer(tokenizer, data):
    """Any id decodes; text survives, but for bytes that the vocabulary lacks; where only vocabulary
    and merges differ, the ids are those of byte-pair encoding by hand."""
    ids = tokenizer.encode(TEXT)
    for id in (*ids, *range(0, 310, 7), 2 ** 40, *tokenizer.eos_ids):
        tokenizer.decode([id])
    if data is None:
        assert tokenizer.decode(ids) in texts_left(GOOD["model"]["vocab"]), "other text"
    elif data["pre_tokenizer"] == GOOD["pre_tokenizer"]:
        assert tokenizer.decode(ids) in texts_left(data["model"]["vocab"]), "other text"
        fields = ("normalizer", "pre_tokenizer", "added_tokens")
        if all(data.get(field) == GOOD[field] for field in fields) \
                and data["model"].get("ignore_merges") is False:
            by_hand = encode_by_hand(unicodedata.normalize("NFC", TEXT), data["model"])
            assert ids == by_hand, "other ids than by hand"


def texts_left(vocab):
    """TEXT as it is and composed, without the bytes that a vocabulary lacks."""
    found = []
    for text in (TEXT, unicodedata.normalize("NFC", TEXT)):
        kept = bytes(byte for byte in text.encode() if LETTERS[byte] in vocab)
        found.append(kept.decode("utf-8", "replace"))
    return found


def encode_by_hand(text, model):
    """Byte-pair encoding as the papers have it: of all pairs the one earliest in the list, all its
    places from the left, again. Bytes that the vocabulary lacks are left out before."""
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    rank = {merge: place for place, merge in enumerate(merges)}
    ids = []
    for match in regex.finditer(PATTERN, text):
        parts = [LETTERS[byte] for byte in match.group().encode()]
        parts = [part for part in parts if part in model["vocab"]]
        while known := [pair for pair in zip(parts, parts[1:]) if pair in rank]:
            best, joined = min(known, key=rank.get), []
            while parts:
                take = 2 if tuple(parts[:2]) == best else 1
                joined.append("".join(parts[:take]))
                parts = parts[take:]
            parts = joined
        ids += [model["vocab"][part] for part in parts]
    return ids


WORDS = ["{{", "}}", "{%", "%}", " for x in messages ", " endfor ", " if ", " endif ", "messages",
         "['content']", "|tojson", "|length", ".pop()", " set a = a + a ", " range(99999999) ",
         "raise_exception('no')", ".__class__", "'a' * 10 ** 9", " macro f() ", " endmacro ", "f()",
         "strftime_now('%Y')", "[0:1]", " + 1", "loop.index", "namespace(a=1)", "{#", "\0", "'",
         "-"]


def template_case(draw, folder):
    files = copy.deepcopy({**good_folder("qwen2")[1], MODEL: None})
    del files[MODEL]
    template = files["tokenizer_config.json"]["chat_template"]
    for _ in range(draw.randrange(1, 5)):
        at = draw.randrange(len(template) + 1)
        template = template[:at] + draw.choice(WORDS) + template[at + draw.randrange(4):]
    files["tokenizer_config.json"]["chat_template"] = template
    shutil.rmtree(folder)
    write(folder, files)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.chat_ids([{"role": "user", "content": "<|im_end|> hello"}])
    assert all(type(id) is int and 0 <= id < 300 for id in ids)


def tokenizer_spots(value):
    """Not 256 letters of the vocabulary for every other field: each part of the file alike."""
    few, many = [], []
    for spot in list(places(value))[1:]:
        crowded = spot[:2] in (("model", "vocab"), ("model", "merges"))
        (many if crowded else few).append(spot)
    return few + many[::7]


CASES = {"header": header_case, "config": whole_folder("config.json"),
         "generation": whole_folder("generation_config.json"), "index": whole_folder(INDEX),
         "tokenizer": whole_folder("tokenizer.json", tokenizer_spots, 0.1),
         "settings": whole_folder("tokenizer_config.json"), "template": template_case}


# ---- the run -------------------------------------------------------------------------------------

class Hang(BaseException):
    """Not an Exception: nothing may catch it on its way."""


def hang(*_):
    raise Hang


def run_case(kind, number, seed, folder):
    """-> "loaded" or "refused", or the reason why this is a failure."""
    draw = random.Random(f"{seed}/{kind}/{number}")
    folder.mkdir(exist_ok=True)
    signal.setitimer(signal.ITIMER_REAL, SECONDS * (1 if kind != "template" else 2))
    try:
        CASES[kind](draw, folder)
        return "loaded"
    except AssertionError as error:
        return f"wrong: {error}"
    except (ValueError, FileNotFoundError) as error:
        line, kind = str(error), type(error)
        if kind in (ValueError, FileNotFoundError) and 0 < len(line) <= 400 and line.isprintable():
            return "refused"
        return f"not one printable line of a ValueError: {kind.__name__} {line[:500]!r}"
    except Hang:
        return f"did not end in {SECONDS} s"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def fuzz(seed=0, seconds=None, hundreds=1, say=print):
    """-> (Counter of (kind, result), failures, megabytes of growth, seconds). hundreds: how many
    times 120 headers, 12 configs, and so on."""
    previous = signal.signal(signal.SIGALRM, hang)
    counts, failures, began = Counter(), [], time.monotonic()

    def late():
        return seconds is not None and time.monotonic() - began > seconds

    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as place:
        for kind in CASES:                      # once each: what is imported late is no growth
            run_case(kind, -1, seed, Path(place) / kind)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        due, number = dict.fromkeys(CASES, 0.0), Counter()
        while not late() and (seconds or number["header"] < hundreds * PROPORTIONS["header"]):
            for kind, share in PROPORTIONS.items():
                due[kind] += share
                while number[kind] < due[kind] and not late():
                    result = run_case(kind, number[kind], seed, Path(place) / kind)
                    if result.startswith("did not end"):    # the machine may have stood still
                        result = run_case(kind, number[kind], seed, Path(place) / kind)
                    if result not in ("loaded", "refused"):
                        failures.append(f"{kind}:{number[kind]} {result}")
                        say(failures[-1])
                        result = "FAILED"
                    counts[kind, result] += 1
                    number[kind] += 1
    signal.signal(signal.SIGALRM, previous)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if growth > MEGABYTES:
        failures.append(f"memory grew by {growth:.0f} MB")
    return counts, failures, growth, time.monotonic() - began


def summary(seed, counts, failures, growth, seconds):
    parts = [f"{kind} {counts[kind, 'loaded']} + {counts[kind, 'refused']}" for kind in CASES]
    return (f"seed {seed}: {sum(counts.values()):,} files in {seconds:.0f} s, {len(failures)} "
            f"failures, +{growth:.0f} MB; loaded + refused: {', '.join(parts)}")


def main():
    parser = argparse.ArgumentParser(
        description="Damaged files: loaded with the right values, or refused in one line.")
    parser.add_argument("--seconds", type=float,
                        help="how long (default: 12,000 headers and 3,000 others, however long)")
    parser.add_argument("--seed", default=0, help="0 by default, the one of the test suite")
    parser.add_argument("--only", metavar="KIND:NUMBER",
                        help="one case, with its traceback if it fails")
    args = parser.parse_args()
    if args.only:
        kind, number = args.only.split(":")
        folder = Path("fuzz-case")
        folder.mkdir(exist_ok=True)
        signal.signal(signal.SIGALRM, hang)
        print(run_case(kind, int(number), args.seed, folder))
        CASES[kind](random.Random(f"{args.seed}/{kind}/{int(number)}"), folder)
        return
    result = fuzz(args.seed, args.seconds, 100)
    print(summary(args.seed, *result))
    sys.exit(bool(result[1]))


if __name__ == "__main__":
    main()
