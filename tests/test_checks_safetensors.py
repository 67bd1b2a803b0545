"""checks/safetensors.py: every rule of the format, and of the index of several files. Broken files
are refused in one line; odd but valid ones give the values of the plain file."""
import json
import math
import os
import struct

import pytest
import torch

from hostile import (INDEX, MODEL, PROMPT, VOCAB, build, check_line, check_loads, check_refused,
                     command, content, files, hub, instead, safetensors, shards, write)
from load_weights import read_safetensors

NORM = "model.norm.weight"
ONE, TWO, THREE = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))


def header(change=None, **options):
    """model.safetensors with a header that `change` rewrites, or other options of
    hostile.safetensors."""
    def rewrite(contents):
        given = {"metadata": {"format": "pt"}, **options}
        contents[MODEL] = safetensors(contents[MODEL], change=change, **given)
    return files(rewrite)


def entry(field, value, name=NORM):
    return header(lambda entries: entries[name].update({field: value}))


def without(field):
    """The entry of one tensor lacks a field."""
    def change(entries):
        del entries[NORM][field]
    return header(change)


def whole(change):
    """The bytes of model.safetensors, changed."""
    return files(lambda c: c.update({MODEL: change(safetensors(c[MODEL]))}))


def sharded(change=lambda contents, index: None):
    def rewrite(contents):
        contents |= shards(contents.pop(MODEL))
        change(contents, contents[INDEX])
    return files(rewrite)


def names(name):
    """The index names another file for one weight."""
    return sharded(lambda c, index: index["weight_map"].update({"lm_head.weight": name}))


def too_long(path):
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{")
    os.truncate(path, 200 << 20)


def overlap(entries):
    """One number of the tensor before belongs to it as well."""
    begin, end = entries[NORM]["data_offsets"]
    entries[NORM]["data_offsets"] = [begin - 4, end - 4]


def one_on_another(entries):
    other = "model.layers.1.input_layernorm.weight"
    entries[other]["data_offsets"] = entries[NORM]["data_offsets"]


def hole(entries):
    del entries["model.layers.0.input_layernorm.weight"]


# name, folder, words of the line
FORMAT = [
    ("file empty", content(MODEL, b""), "model.safetensors empty"),
    ("file of 5 bytes", content(MODEL, b"\x08\0\0\0\0"), "model.safetensors cut short"),
    ("header length 0", header(length=0), "header of 0"),
    ("header length beyond the file", header(length=1 << 30), "model.safetensors cut short"),
    ("header length 2**64 - 1", header(length=2 ** 64 - 1),
     "model.safetensors 18446744073709551615"),
    ("header length over the limit", instead(MODEL, too_long), "100000001"),
    ("header cut", whole(lambda data: data[:500]), "model.safetensors cut short"),
    ("data cut by a byte", whole(lambda data: data[:-1]), "model.safetensors cut short"),
    ("data with a byte more", whole(lambda data: data + b"\0"), "model.safetensors bytes"),
    ("header not JSON", header(header=b"{'a': 1}"), "model.safetensors not JSON"),
    ("header a list", header(header=b"[1, 2, 3]"), "model.safetensors {"),
    ("header after a space", header(header=b" {}"), "model.safetensors {"),
    ("header not UTF-8", header(header=b'{"\xff": 1}'), "model.safetensors UTF-8"),
    ("header twice a key", header(header=b'{"a": 1, "a": 1}'), "model.safetensors 'a' twice"),
    ("header NaN", entry("extra", math.nan), "model.safetensors NaN"),
    ("header half a character",
     header(lambda h: h.update({"\udc00": h.pop("lm_head.weight")})), "half a character"),
    ("header nested", header(header=b'{"a":' * 100_000), "model.safetensors nested"),
    ("header of a million lists", header(header=b'{"a": [' + b"[]," * 1_500_000 + b"[]]}"),
     "model.safetensors"),
    ("header absurd digits", entry("data_offsets", [0, 10 ** 400]), "model.safetensors too large"),
    ("entry null", header(lambda h: h.update({NORM: None})), NORM),
    ("dtype unknown to the format", entry("dtype", "F31"), f"{NORM} 'F31'"),
    ("dtype missing", without("dtype"), f"dtype {NORM}"),
    ("dtype a list", entry("dtype", ["F32"]), f"dtype {NORM}"),
    ("shape missing", without("shape"), f"shape {NORM}"),
    ("shape true", entry("shape", [True]), f"shape {NORM}"),
    ("shape float", entry("shape", [16.0]), f"shape {NORM}"),
    ("shape negative", entry("shape", [-4, -4]), f"shape {NORM}"),
    ("shape overflows", entry("shape", [2 ** 62, 2 ** 62]), NORM),
    ("shape overflows beside 0", entry("shape", [0, 2 ** 62, 2 ** 62]), NORM),
    ("shape of 1000 dimensions", entry("shape", [1] * 1000), NORM),
    ("shape and bytes disagree", entry("shape", [17]), f"{NORM} 68"),
    ("offsets swapped", header(lambda h: h[NORM]["data_offsets"].reverse()),
     f"data_offsets {NORM}"),
    ("offsets three", entry("data_offsets", [0, 1, 2]), f"data_offsets {NORM}"),
    ("offsets missing", without("data_offsets"), f"data_offsets {NORM}"),
    ("offsets float", entry("data_offsets", [0.0, 64.0]), f"data_offsets {NORM}"),
    ("offsets negative", entry("data_offsets", [-64, 0]), f"data_offsets {NORM}"),
    ("offsets past 2**63", entry("data_offsets", [2 ** 63, 2 ** 63 + 64]), f"data_offsets {NORM}"),
    ("offsets past the end", entry("data_offsets", [10 ** 9, 10 ** 9 + 64]), "byte beyond"),
    ("one on another", header(one_on_another), "byte beyond"),
    ("overlap", header(overlap), "byte inside"),
    ("hole", header(hole), "byte beyond"),
    ("metadata not texts", header(metadata={"format": 1}), "__metadata__"),
    ("metadata null", header(lambda h: h.update(__metadata__=None)), "__metadata__"),
    ("metadata a list", header(lambda h: h.update(__metadata__=["pt"])), "__metadata__"),
    ("name of a megabyte", header(lambda h: h.update({"x\n" * 500_000: h.pop(NORM)})), NORM),
    ("long name without a dtype",
     header(lambda h: h.update({"base." * 40 + "self_attn.k_norm.weight": {}})),
     "dtype self_attn.k_norm.weight"),
]
EMBED = "model.embed_tokens.weight"
SHARDS = [
    ("index not JSON", sharded(lambda c, i: c.update({INDEX: b"{"})), "index.json not JSON"),
    ("index without weight_map", sharded(lambda c, i: i.pop("weight_map")), "weight_map"),
    ("index with an empty weight_map", sharded(lambda c, i: i.update(weight_map={})),
     "weight_map"),
    ("index with a list", sharded(lambda c, i: i.update(weight_map=list(i["weight_map"]))),
     "weight_map"),
    ("shard missing", sharded(lambda c, i: c.pop(TWO)), TWO),
    *((f"shard named {name!r:.30}", names(name), "weight_map") for name in (
        "../model.safetensors", "/etc/passwd", "a\\b.safetensors", "a\0.safetensors", "",
        "sub/a.safetensors", "..", "model.bin", ".safetensors", None, 5, ["a.safetensors"],
        "x" * 5000, "a\n.safetensors", "\u202e.safetensors")),
    ("shard without the tensor", sharded(lambda c, i: c[ONE].pop(EMBED)), "embed_tokens"),
    ("tensor in another shard", sharded(lambda c, i: i["weight_map"].update({EMBED: TWO})),
     "embed_tokens"),
    ("tensor in two shards", sharded(lambda c, i: c[TWO].update({EMBED: torch.zeros(VOCAB, 16)})),
     "embed_tokens"),
    ("tensor in no list", sharded(lambda c, i: i["weight_map"].pop(NORM)), NORM),
    ("shard cut", sharded(lambda c, i: c.update({THREE: safetensors(c[THREE])[:-8]})),
     f"{THREE} cut short"),
]
BAD = FORMAT + SHARDS


@pytest.mark.parametrize("make, words", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_file(make, words, folder):
    check_refused(make, words, folder)


def order(key):
    """The data of the tensors in another order."""
    def change(contents):
        names = sorted(contents[MODEL], key=key)
        contents[MODEL] = safetensors(contents[MODEL], order=names)
    return files(change)


def escaped_names(contents):
    """Every letter of every name as \\u0061."""
    entries = {}
    safetensors(contents[MODEL], change=entries.update)
    parts = []
    for name, value in entries.items():
        letters = "".join(f"\\u{ord(letter):04x}" for letter in name)
        parts.append(f'"{letters}":{json.dumps(value)}')
    text = "{" + ",".join(parts) + "}"
    contents[MODEL] = safetensors(contents[MODEL], header=text.encode())


ODD = [
    *((f"data begins at byte {n} of 8", header(pad=n)) for n in range(1, 8)),
    ("header padded with 10,000 spaces", header(pad=10_000)),
    ("data in reverse order", order(lambda name: [-ord(letter) for letter in name])),
    ("header in another order than the data", order(lambda name: name[::-1])),
    ("no metadata", header(metadata=None)),
    ("metadata empty", header(metadata={})),
    ("metadata of any text", header(metadata={"": "\0\n\u202e", "é": "x" * 10_000})),
    ("unknown key beside dtype", entry("note", [1, {"a": None}])),
    ("names escaped", files(escaped_names)),
    ("three shards", sharded()),
    ("a shard for every tensor", files(lambda c: c.update(shards(c.pop(MODEL), 27)))),
    ("index without metadata", sharded(lambda c, i: i.pop("metadata"))),
    ("index with odd metadata", sharded(lambda c, i: i.update(metadata=None, extra=[1]))),
    ("index beside the whole file", files(lambda c: c.update(shards(c[MODEL])))),
    ("hub links", hub()),
    ("hub links to shards", hub(lambda c: c.update(shards(c.pop(MODEL))))),
]


@pytest.mark.parametrize("make", [case[1] for case in ODD], ids=[case[0] for case in ODD])
def test_odd_file(make, folder):
    check_loads(make, "qwen2", folder)


def test_sparse_terabyte(folder):
    """A file that claims a terabyte and has it, as a hole: refused by its shapes, and nothing of it
    is read into memory."""
    write(folder, build())
    claim = {"lm_head.weight": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}
    text = json.dumps(claim).encode()
    with open(folder / MODEL, "r+b") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        try:
            file.truncate(8 + len(text) + (1 << 40))
        except OSError:
            pytest.skip("no file of a terabyte here")
    result = command()(["--model", folder, PROMPT])
    assert result.status == 1 and result.err.count("\n") == 1 and result.growth < 200, result


def test_truncated_anywhere(folder):
    """Every prefix of a small file is refused."""
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    good = safetensors(tensors, metadata={"format": "pt"})
    folder.mkdir()
    for length in range(len(good)):
        path = folder / f"{length}.safetensors"
        path.write_bytes(good[:length])
        with pytest.raises(ValueError) as caught:
            read_safetensors(path)
        check_line(str(caught.value), "")
