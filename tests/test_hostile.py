"""
Folders from strangers: two tables. Every broken one is refused in one line that says what is wrong, by the library and by the
command; every odd but valid one gives the logits of the plain folder, to the last bit, and the same text.

An entry of a table is a name, a function that writes the folder, and (if broken) words that the line must contain.
"""
import functools
import json
import math
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

from hostile import ROOT, SPECIAL, TEMPLATE, VOCAB, build, command, safetensors, shards, write

from generate import generate
from load_weights import load_model, read_safetensors
from tokenizer import load_tokenizer

GONE = object()
CANARY = Path(f"/tmp/canary-{os.getpid()}")             # what a hostile file would create if anything of it ever ran
PROMPT = "hello " + "a" * 40
QUESTION = [{"role": "user", "content": PROMPT}]


# ---- ways to write a folder ------------------------------------------------------------------------------------------------------

def files(change, family="qwen2"):
    """The folder after `change` has had its files in hand: a table of contents, see hostile.build."""
    def make(folder):
        contents = build(family)
        change(contents)
        write(folder, contents)
    return make


def then(change, family="qwen2"):
    """The good folder after `change` has been let loose on it, on disk."""
    def make(folder):
        write(folder, build(family))
        change(folder)
    return make


def put(name, *path, family="qwen2"):
    """One value of a JSON file, at path[:-1], becomes path[-1], or goes."""
    def change(contents):
        *way, key, value = path
        node = functools.reduce(lambda node, step: node[step], way, contents[name])
        if value is GONE:
            del node[key]
        else:
            node[key] = value
    return files(change, family)


def config(family="qwen2", **fields):
    def change(contents):
        table = contents["config.json"] | fields
        contents["config.json"] = {key: value for key, value in table.items() if value is not GONE}
    return files(change, family)


def rope(family="llama", **fields):
    return config(family, rope_scaling={key: value for key, value in fields.items() if value is not GONE})


LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def content(name, data):
    return files(lambda contents: contents.update({name: data}))


def text_of(name, change):
    """A JSON file whose text `change` rewrites."""
    return files(lambda contents: contents.update({name: change(json.dumps(contents[name]))}))


def header(change=None, family="qwen2", **options):
    """model.safetensors with a header that `change` rewrites, or other options of hostile.safetensors."""
    def rewrite(contents):
        contents["model.safetensors"] = safetensors(contents["model.safetensors"], **{"metadata": {"format": "pt"}, **options}, change=change)
    return files(rewrite, family)


def entry(field, value, name="model.norm.weight"):
    return header(lambda entries: entries[name].update({field: value}))


def tensors(change, family="qwen2", **fields):
    """Other tensors: `change` has the table of them in hand."""
    def rewrite(contents):
        contents["config.json"] |= fields
        change(contents["model.safetensors"])
    return files(rewrite, family)


def sharded(change=lambda contents, index: None, family="qwen2"):
    def rewrite(contents):
        contents |= shards(contents.pop("model.safetensors"))
        change(contents, contents["model.safetensors.index.json"])
    return files(rewrite, family)


def instead(name, make):
    """Something else stands where a file should be."""
    def change(folder):
        (folder / name).unlink()
        make(folder / name)
    return then(change)


def model_file(data):
    return content("model.safetensors", data)


def move(folder, name, to):
    """As in a hub cache: the file lies elsewhere, a link leads there."""
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder / name, to)
    (folder / name).symlink_to(os.path.relpath(to, folder))


def template(text):
    return put("tokenizer_config.json", "chat_template", text)


class Payload:
    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Payload()))


SPLIT, BYTES = ("pre_tokenizer", "pretokenizers", 0), ("pre_tokenizer", "pretokenizers", 1)
TOKENS, SETTINGS = "tokenizer.json", "tokenizer_config.json"
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
HTML = b"<!DOCTYPE html>\n<html><head><title>401</title></head></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 988097824\n"


def nested(depth, node, inner):
    for _ in range(depth):
        node = {"type": "Sequence", inner: [node]}
    return node


def vocab_and_merges(c):
    model = c.pop(TOKENS)["model"]
    c |= {"vocab.json": model["vocab"], "merges.txt": "#version: 0.2\n" + "\n".join(model["merges"]) + "\n"}
    c[SETTINGS]["added_tokens_decoder"] = {str(id): {"content": text, "special": True} for text, id in SPECIAL.items()}


# ---- what must be refused: name, folder, words of the line -----------------------------------------------------------------------

BAD = [
    # the files themselves
    ("folder is a file", lambda folder: folder.write_bytes(b"x"), "folder"),
    ("folder missing", lambda folder: None, "no such folder"),
    ("folder empty", lambda folder: folder.mkdir(), ""),
    ("config missing", then(lambda f: (f / "config.json").unlink()), "config.json no such file"),
    ("config empty", content("config.json", b""), "config.json empty"),
    ("config blank", content("config.json", b" \n"), "config.json empty"),
    ("config is a folder", instead("config.json", os.mkdir), "config.json a folder"),
    ("config is a pipe", instead("config.json", os.mkfifo), "config.json pipe"),
    ("config is a device", instead("config.json", lambda p: p.symlink_to("/dev/zero")), "config.json device"),
    ("config is a kernel file", instead("config.json", lambda p: p.symlink_to("/proc/kmsg")), "config.json empty"),
    ("config link dangles", instead("config.json", lambda p: p.symlink_to("nowhere")), "config.json link"),
    ("config link loops", instead("config.json", lambda p: p.symlink_to("config.json")), "config.json cannot be opened"),
    ("weights missing", then(lambda f: (f / MODEL).unlink()), "model.safetensors"),
    ("weights are a pipe", instead(MODEL, os.mkfifo), "model.safetensors pipe"),
    ("weights are a folder", instead(MODEL, os.mkdir), "model.safetensors a folder"),
    ("weights link dangles", instead(MODEL, lambda p: p.symlink_to("../../blobs/5d2e")), "model.safetensors link"),
    ("weights are a device", instead(MODEL, lambda p: p.symlink_to("/dev/urandom")), "model.safetensors device"),
    ("tokenizer is a pipe", instead(TOKENS, os.mkfifo), "tokenizer.json pipe"),
    ("tokenizer missing", then(lambda f: (f / TOKENS).unlink()), "tokenizer.json"),
    ("tokenizer link dangles", instead(TOKENS, lambda p: p.symlink_to("gone")), "tokenizer.json link"),
    ("tokenizer settings are a folder", instead(SETTINGS, os.mkdir), "tokenizer_config.json a folder"),
    ("generation config is a pipe", instead("generation_config.json", os.mkfifo), "generation_config.json pipe"),
    ("template file is a pipe", then(lambda f: os.mkfifo(f / "chat_template.jinja")), "chat_template.jinja pipe"),
    ("index is a pipe", then(lambda f: ((f / MODEL).unlink(), os.mkfifo(f / INDEX))), "index.json pipe"),
    ("only a pickle", then(lambda f: ((f / MODEL).unlink(), (f / "pytorch_model.bin").write_bytes(pickle.dumps(Payload())))),
     "pytorch_model.bin pickle safe_serialization"),
    ("only a .pth", then(lambda f: ((f / MODEL).unlink(), archive(f / "consolidated.00.pth"))), "consolidated.00.pth pickle"),
    ("weights are a pickle", model_file(pickle.dumps(Payload())), "model.safetensors pickle"),
    ("weights are an archive", instead(MODEL, archive), "model.safetensors archive"),
    ("weights are GGUF", model_file(b"GGUF\3\0\0\0" + bytes(64)), "model.safetensors GGUF"),
    ("weights are an LFS pointer", model_file(LFS), "model.safetensors LFS"),
    ("weights are a web page", model_file(HTML), "model.safetensors web page"),
    ("config is an LFS pointer", content("config.json", LFS), "config.json LFS"),
    ("config is a web page", content("config.json", HTML), "config.json web page"),
    ("tokenizer is an LFS pointer", content(TOKENS, LFS), "tokenizer.json LFS"),

    # JSON, by the rules of JSON
    ("config cut", text_of("config.json", lambda text: text[:200]), "config.json not JSON"),
    ("config is a list", content("config.json", b"[]"), "config.json not an object"),
    ("config twice a key", text_of("config.json", lambda text: text.replace("{", '{"hidden_size": 16, ', 1)), "hidden_size twice"),
    ("config NaN", config(rms_norm_eps=math.nan), "config.json NaN"),
    ("config Infinity", config(rope_theta=math.inf), "config.json Infinity"),
    ("config 1e999", text_of("config.json", lambda text: text.replace("1e-05", "1e999")), "config.json 1e999"),
    ("config 10,000 digits", text_of("config.json", lambda text: text.replace("300", "3" * 10_000)), "config.json too large"),
    ("config half a character", text_of("config.json", lambda text: text.replace("silu", "\\ud800")), "config.json half a character"),
    ("config nested", text_of("config.json", lambda text: '{"a": ' + "[" * 100_000), "config.json nested"),
    ("config not UTF-8", text_of("config.json", lambda text: text.encode().replace(b"silu", b"sil\xfc")), "config.json UTF-8"),
    ("config UTF-16", text_of("config.json", lambda text: text.encode("utf-16")), "config.json UTF-8"),
    ("config with a byte order mark", text_of("config.json", lambda text: "\ufeff" + text), "config.json not JSON"),
    ("config 80 MB", instead("config.json", lambda p: (p.touch(), os.truncate(p, 80 << 20))), "config.json limit"),
    ("config terminal escapes", config(model_type="\x1b[2J\n\rllama" * 50), "model_type \\x1b[2J"),
    ("generation config cut", text_of("generation_config.json", lambda text: text[:20]), "generation_config.json not JSON"),
    ("generation config twice a key", content("generation_config.json", b'{"eos_token_id": 1, "eos_token_id": 1}'), "eos_token_id twice"),
    ("tokenizer cut", text_of(TOKENS, lambda text: text[:3000]), "tokenizer.json not JSON"),
    ("tokenizer with a byte order mark", text_of(TOKENS, lambda text: "\ufeff" + text), "tokenizer.json not JSON"),
    ("tokenizer not UTF-8", text_of(TOKENS, lambda text: text.encode("latin-1").replace(b"BPE", b"BP\xc9")), "tokenizer.json UTF-8"),
    ("tokenizer settings are a list", content(SETTINGS, b"[1]"), "tokenizer_config.json not an object"),

    # config.json, field by field
    ("no model_type", config(model_type=GONE), "model_type"),
    ("model_type unknown", config(model_type="mamba"), "model_type mamba"),
    ("model_type a list", config(model_type=["llama"]), "model_type"),
    ("architecture of another kind", config(architectures=["Qwen2ForSequenceClassification"]), "architectures"),
    ("architecture of another family", config(architectures=["LlamaForCausalLM"]), "architectures"),
    ("activation unknown", config(hidden_act="gelu"), "hidden_act gelu"),
    ("activation missing", config(hidden_act=GONE), "hidden_act"),
    ("vocab_size missing", config(vocab_size=GONE), "vocab_size"),
    ("vocab_size null", config(vocab_size=None), "vocab_size"),
    ("vocab_size true", config(vocab_size=True), "vocab_size True"),
    ("vocab_size text", config(vocab_size="300"), "vocab_size '300'"),
    ("vocab_size not whole", config(vocab_size=300.0), "vocab_size 300.0"),
    ("hidden_size 0", config(hidden_size=0), "hidden_size 0"),
    ("hidden_size negative", config(hidden_size=-16), "hidden_size -16"),
    ("hidden_size absurd", config(hidden_size=10 ** 12), "hidden_size 1000000000000"),
    ("sizes too large together", config(hidden_size=1 << 20, intermediate_size=1 << 20, num_attention_heads=1 << 10), "shape"),
    ("sizes past 2**63 together", config(hidden_size=1 << 24, num_attention_heads=1 << 24, head_dim=1 << 24), "num_attention_heads"),
    ("head_dim absurd", config(head_dim=1 << 24), "head_dim"),
    ("layers 0", config(num_hidden_layers=0), "num_hidden_layers"),
    ("layers absurd", config(num_hidden_layers=10 ** 9), "num_hidden_layers"),
    ("layers more than in the file", config(num_hidden_layers=4000), "num_hidden_layers 4000"),
    ("layers fewer than in the file", config(num_hidden_layers=1), "num_hidden_layers"),
    ("heads do not divide", config(num_attention_heads=5), "num_key_value_heads 5"),
    ("heads do not divide the width", config(num_attention_heads=6), "num_attention_heads 16"),
    ("key heads zero", config(num_key_value_heads=0), "num_key_value_heads"),
    ("head_dim odd", config(head_dim=7), "head_dim"),
    ("head_dim missing", config("qwen3", head_dim=GONE), "head_dim"),
    ("eps missing", config(rms_norm_eps=GONE), "rms_norm_eps"),
    ("eps zero", config(rms_norm_eps=0), "rms_norm_eps"),
    ("eps text", config(rms_norm_eps="1e-5"), "rms_norm_eps"),
    ("eps negative", config(rms_norm_eps=-1e-5), "rms_norm_eps"),
    ("tie text", config(tie_word_embeddings="false"), "tie_word_embeddings 'false'"),
    ("tie number", config(tie_word_embeddings=1), "tie_word_embeddings"),
    ("bias text", config("llama", attention_bias="true"), "attention_bias"),
    ("positions missing", config(max_position_embeddings=GONE), "max_position_embeddings"),
    ("positions negative", config(max_position_embeddings=-1), "max_position_embeddings"),
    ("rope_theta missing", config(rope_theta=GONE), "rope_theta"),
    ("rope_theta zero", config(rope_theta=0), "rope_theta"),
    ("rope_theta negative", config(rope_theta=-10000.0), "rope_theta"),
    ("rope_theta text", config(rope_theta="10000"), "rope_theta"),
    ("rope_theta true", config(rope_theta=True), "rope_theta"),
    ("rope type unknown", rope(rope_type="dynamic", factor=2.0), "rope_type dynamic"),
    ("rope type null", rope(rope_type=None, factor=2.0), "rope_type"),
    ("rope type empty", rope(rope_type=""), "rope_type"),
    ("rope scaling a list", config("llama", rope_scaling=[1]), "rope_scaling"),
    ("rope factor missing", rope(rope_type="linear"), "factor"),
    ("rope factor zero", rope(**LINEAR | {"factor": 0}), "factor"),
    ("rope factor negative", rope(**LINEAR | {"factor": -2.0}), "factor"),
    ("rope low above high", rope(**LLAMA3 | {"low_freq_factor": 8.0}), "high_freq_factor"),
    ("rope without an original length", rope(**YARN | {"original_max_position_embeddings": GONE}), "original_max_position_embeddings"),
    ("rope truncate text", rope(**YARN, truncate="no"), "truncate"),
    ("rope sections", rope(rope_type="default", mrope_section=[16, 24, 24]), "mrope_section"),
    ("rope in two spellings that differ", config(rope_scaling=LINEAR, rope_parameters=YARN | {"rope_theta": 1e4}), "rope_parameters"),
    ("rope_theta in two places that differ", config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "rope_theta"),
    ("rotation in part", config(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ("rotation true", config(partial_rotary_factor=True), "partial_rotary_factor"),
    ("sliding window in use", config(use_sliding_window=True), "use_sliding_window"),
    ("sliding window in a layer", config(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    ("layer types too few", config(layer_types=["full_attention"]), "layer_types"),
    ("quantised", config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config"),
    ("dtype unknown", config(torch_dtype="float8_e4m3fn"), "torch_dtype"),
    ("dtype a number", config(torch_dtype=32), "torch_dtype"),
    ("eos a text", config(eos_token_id="<|im_end|>"), "eos_token_id"),
    ("eos true", config(eos_token_id=True), "eos_token_id"),
    ("eos negative", config(eos_token_id=-1), "eos_token_id"),
    ("eos past the vocabulary", config(eos_token_id=VOCAB), "eos_token_id"),
    ("eos list with a float", put("generation_config.json", "eos_token_id", [278, 1.0]), "generation_config.json eos_token_id"),
    ("eos of generation past the vocabulary", put("generation_config.json", "eos_token_id", [278, 10 ** 6]), "eos_token_id"),
    ("eos lists a list", config(eos_token_id=[[278]]), "config.json eos_token_id"),
    ("bos a text", config(bos_token_id="<s>"), "bos_token_id"),
    ("pad a float", config(pad_token_id=276.0), "pad_token_id"),
    ("eos lists true", config(eos_token_id=[278, True]), "config.json eos_token_id"),
    ("sliding window a text", config(sliding_window="32"), "sliding_window"),
    ("window layers true", config(max_window_layers=True), "max_window_layers"),

    # safetensors
    ("file empty", model_file(b""), "model.safetensors empty"),
    ("file of 5 bytes", model_file(b"\x08\0\0\0\0"), "model.safetensors cut short"),
    ("header length 0", header(length=0), "header of 0"),
    ("header length beyond the file", header(length=1 << 30), "model.safetensors cut short"),
    ("header length 2**64 - 1", header(length=2 ** 64 - 1), "model.safetensors 18446744073709551615"),
    ("header length over the limit", instead(MODEL, lambda p: (p.write_bytes(struct.pack("<Q", 100_000_001) + b"{"), os.truncate(p, 200 << 20))),
     "100000001"),
    ("header cut", files(lambda c: c.update({MODEL: safetensors(c[MODEL])[:500]})), "model.safetensors cut short"),
    ("data cut by a byte", files(lambda c: c.update({MODEL: safetensors(c[MODEL])[:-1]})), "model.safetensors cut short"),
    ("data with a byte more", files(lambda c: c.update({MODEL: safetensors(c[MODEL]) + b"\0"})), "model.safetensors bytes"),
    ("header not JSON", header(header=b"{'a': 1}"), "model.safetensors not JSON"),
    ("header a list", header(header=b"[1, 2, 3]"), "model.safetensors {"),
    ("header after a space", header(header=b" {}"), "model.safetensors {"),
    ("header not UTF-8", header(header=b'{"\xff": 1}'), "model.safetensors UTF-8"),
    ("header twice a key", header(header=b'{"a": 1, "a": 1}'), "model.safetensors 'a' twice"),
    ("header NaN", entry("extra", math.nan), "model.safetensors NaN"),
    ("header half a character", header(lambda h: h.update({"\udc00": h.pop("lm_head.weight")})), "half a character"),
    ("header nested", header(header=b'{"a":' * 100_000), "model.safetensors nested"),
    ("header of a million lists", header(header=b'{"a": [' + b"[]," * 1_500_000 + b"[]]}"), "model.safetensors"),
    ("config of a million lists", content("config.json", b'{"a": [' + b"[]," * 1_500_000 + b"[]]}"), "config.json"),
    ("header absurd digits", entry("data_offsets", [0, 10 ** 400]), "model.safetensors too large"),
    ("entry null", header(lambda h: h.update({"model.norm.weight": None})), "model.norm.weight"),
    ("dtype unknown to the format", entry("dtype", "F31"), "model.norm.weight 'F31'"),
    ("dtype missing", header(lambda h: h["model.norm.weight"].pop("dtype") and None), "dtype model.norm.weight"),
    ("dtype a list", entry("dtype", ["F32"]), "dtype model.norm.weight"),
    ("shape missing", header(lambda h: h["model.norm.weight"].pop("shape") and None), "shape model.norm.weight"),
    ("shape true", entry("shape", [True]), "shape model.norm.weight"),
    ("shape float", entry("shape", [16.0]), "shape model.norm.weight"),
    ("shape negative", entry("shape", [-4, -4]), "shape model.norm.weight"),
    ("shape overflows", entry("shape", [2 ** 62, 2 ** 62]), "model.norm.weight"),
    ("shape overflows beside 0", entry("shape", [0, 2 ** 62, 2 ** 62]), "model.norm.weight"),
    ("shape of 1000 dimensions", entry("shape", [1] * 1000), "model.norm.weight"),
    ("shape and bytes disagree", entry("shape", [17]), "model.norm.weight 68"),
    ("offsets swapped", header(lambda h: h["model.norm.weight"]["data_offsets"].reverse()), "data_offsets model.norm.weight"),
    ("offsets three", entry("data_offsets", [0, 1, 2]), "data_offsets model.norm.weight"),
    ("offsets float", entry("data_offsets", [0.0, 64.0]), "data_offsets model.norm.weight"),
    ("offsets negative", entry("data_offsets", [-64, 0]), "data_offsets model.norm.weight"),
    ("offsets past 2**63", entry("data_offsets", [2 ** 63, 2 ** 63 + 64]), "data_offsets model.norm.weight"),
    ("offsets past the end", entry("data_offsets", [10 ** 9, 10 ** 9 + 64]), "byte beyond"),
    ("overlap", header(lambda h: h["model.layers.1.input_layernorm.weight"].update(data_offsets=h["model.norm.weight"]["data_offsets"])), "byte"),
    ("hole", header(lambda h: h.pop("model.layers.0.input_layernorm.weight") and None), "byte beyond"),
    ("metadata not texts", header(metadata={"format": 1}), "__metadata__"),
    ("metadata null", header(lambda h: h.update(__metadata__=None)), "__metadata__"),
    ("metadata a list", header(lambda h: h.update(__metadata__=["pt"])), "__metadata__"),
    ("name of a megabyte", header(lambda h: h.update({"x\n" * 500_000: h.pop("model.norm.weight")})), "model.norm.weight"),

    # shards
    ("index not JSON", sharded(lambda c, i: c.update({INDEX: b"{"})), "index.json not JSON"),
    ("index without weight_map", sharded(lambda c, i: i.pop("weight_map")), "weight_map"),
    ("index with an empty weight_map", sharded(lambda c, i: i.update(weight_map={})), "weight_map"),
    ("index with a list", sharded(lambda c, i: i.update(weight_map=list(i["weight_map"]))), "weight_map"),
    ("shard missing", sharded(lambda c, i: c.pop("model-00002-of-00003.safetensors")), "model-00002-of-00003.safetensors"),
    *((f"shard named {name!r:.30}", sharded(lambda c, i, name=name: i["weight_map"].update({"lm_head.weight": name})), "weight_map")
      for name in ("../model.safetensors", "/etc/passwd", "a\\b.safetensors", "a\0.safetensors", "", "sub/a.safetensors", "..", "model.bin",
                   ".safetensors", None, 5, ["a.safetensors"], "x" * 5000, "a\n.safetensors", "\u202e.safetensors")),
    ("shard without the tensor", sharded(lambda c, i: c["model-00001-of-00003.safetensors"].pop("model.embed_tokens.weight")), "embed_tokens"),
    ("tensor in another shard", sharded(lambda c, i: i["weight_map"].update({"model.embed_tokens.weight": "model-00002-of-00003.safetensors"})),
     "embed_tokens"),
    ("tensor in two shards", sharded(lambda c, i: c["model-00002-of-00003.safetensors"].update(
        {"model.embed_tokens.weight": torch.zeros(VOCAB, 16)})), "embed_tokens"),
    ("tensor in no list", sharded(lambda c, i: i["weight_map"].pop("model.norm.weight")), "model.norm.weight"),
    ("shard cut", sharded(lambda c, i: c.update({"model-00003-of-00003.safetensors": safetensors(c["model-00003-of-00003.safetensors"])[:-8]})),
     "model-00003-of-00003.safetensors cut short"),

    # weights against the config
    ("weight missing", tensors(lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    ("head missing", tensors(lambda t: t.pop("lm_head.weight")), "lm_head.weight"),
    ("layer missing", tensors(lambda t: [t.pop(n) for n in list(t) if ".1." in n]), "num_hidden_layers"),
    ("layers with a gap", tensors(lambda t: [t.update({n.replace(".1.", ".2."): t.pop(n)}) for n in list(t) if ".1." in n]), "model.layers.1"),
    ("weight unexpected", tensors(lambda t: t.update({"model.extra.weight": torch.zeros(2)})), "model.extra.weight"),
    ("bias not announced", tensors(lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(16)})), "o_proj.bias"),
    ("bias announced, missing", tensors(lambda t: None, "llama", mlp_bias=True), "bias"),
    ("q norm not announced", tensors(lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(4)})), "q_norm"),
    ("adapter", tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16)})), "lora_A"),
    ("weight transposed", tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.contiguous()})), "lm_head.weight shape"),
    ("vocabulary of another size", config(vocab_size=301), "embed_tokens shape 301"),
    ("width of another size", config(hidden_size=32), "shape"),
    ("tied but different", config(tie_word_embeddings=True), "tie_word_embeddings lm_head.weight"),
    *((f"weight of {dtype}", tensors(lambda t, dtype=dtype: t.update({"model.norm.weight": t["model.norm.weight"].to(dtype)})), "model.norm.weight")
      for dtype in (torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64)),
    ("weights NaN", tensors(lambda t: t["model.layers.1.mlp.down_proj.weight"].fill_(math.nan)), "model.layers.1.mlp.down_proj.weight NaN"),
    ("weights infinite", tensors(lambda t: t["model.norm.weight"].fill_(math.inf)), "model.norm.weight"),
    ("one row of the head NaN", tensors(lambda t: t["lm_head.weight"][299].fill_(math.nan)), "lm_head.weight"),
    ("one number of the head -inf", tensors(lambda t: t["lm_head.weight"][299, 3].fill_(-math.inf)), "lm_head.weight"),
    ("one number of the head +inf", tensors(lambda t: t["lm_head.weight"][299, 3].fill_(math.inf)), "lm_head.weight"),
    ("numbers that overflow", tensors(lambda t: t["lm_head.weight"].fill_(3e38)), "not finite"),

    # tokenizer
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
    ("bytes missing", put(TOKENS, "model", "vocab", "A", GONE), "bytes"),
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
    ("SentencePiece", files(lambda c: (c.pop(TOKENS), c.update({"tokenizer.model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"}))), "SentencePiece"),
    ("Meta's file cut", files(lambda c: (c.pop(TOKENS), c.update({"tokenizer.model": b"QQ== 0\nQg== 1\nQw="}))), "tokenizer.model"),
    ("added token of a page", put(TOKENS, "added_tokens", 0, "content", "x" * 3000), "3000 characters"),
    ("added token id absurd", put(TOKENS, "added_tokens", 0, "id", 1 << 40), "1099511627776"),
    ("byte_fallback a number", put(TOKENS, "model", "byte_fallback", 1), "SentencePiece"),
    ("normalizers in normalizers", put(TOKENS, "normalizer", nested(300, {"type": "NFC"}, "normalizers")), "normalizer deeper"),
    ("pre_tokenizers in pre_tokenizers", put(TOKENS, "pre_tokenizer", nested(12, {"type": "ByteLevel"}, "pretokenizers")), "deeper"),
    ("merges.txt of strange words", files(lambda c: (vocab_and_merges(c), c.update({"merges.txt": "Ġ t\nqq zz\n"}))), "merges.txt: merge 1"),
    ("merges.txt not UTF-8", files(lambda c: (vocab_and_merges(c), c.update({"merges.txt": b"\xc4\xa0 t\n\xff x\n"}))), "merges.txt: UTF-8"),
    ("added_tokens.json ids clash", files(lambda c: (vocab_and_merges(c), c[SETTINGS].pop("added_tokens_decoder"), c.update(
        {"added_tokens.json": {"<|a|>": 276, "<|b|>": 276}}))), "added_tokens.json: <|b|>"),
    ("special_tokens_map of numbers", content("special_tokens_map.json", {"eos_token": 5}), "special_tokens_map.json: eos_token"),
    ("merges.txt missing", files(lambda c: c.update({"vocab.json": c.pop(TOKENS)["model"]["vocab"]})), "merges.txt"),

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
]


# ---- what must load: name, folder, family whose plain folder it equals ---------------------------------------------------------------

def order(key):
    return files(lambda c: c.update({MODEL: safetensors(c[MODEL], order=sorted(c[MODEL], key=key))}))


def cast(*dtypes, family="qwen2"):
    def change(t):
        for i, name in enumerate(t):
            t[name] = t[name].to(dtypes[i % len(dtypes)])
    return tensors(change, family)


def hub(change=lambda contents: None):
    """As Hugging Face's tools keep a folder: every file a link to a blob named by its hash."""
    def make(folder):
        contents = build()
        change(contents)
        write(folder, contents)
        for i, name in enumerate(sorted(p.name for p in folder.iterdir())):
            move(folder, name, folder.parent / "blobs" / f"{i:064x}")
    return make


def widened(weights, size):
    """The same model with room for more tokens, whose logits are 0."""
    rows = {name: torch.zeros(size, t.shape[1], dtype=t.dtype) for name, t in weights.items() if len(t) == VOCAB and t.ndim == 2}
    for name, t in rows.items():
        t[:VOCAB] = weights[name]
    return weights | rows


def tied(c):
    c["config.json"]["tie_word_embeddings"] = True
    c[MODEL]["model.embed_tokens.weight"] = c[MODEL]["lm_head.weight"]


def relayout(**options):
    def change(c):
        for name in [n for n in c if n.endswith(".json")]:
            c[name] = json.dumps(c[name], **options).replace("\n", "\r\n").encode() + b"\r\n\r\n"
    return files(change)


ODD = [
    ("plain", files(lambda c: None)),
    ("plain llama", files(lambda c: None, "llama"), "llama"),
    ("plain qwen3", files(lambda c: None, "qwen3"), "qwen3"),

    # the file of weights
    *((f"data begins at byte {n} of 8", header(pad=n)) for n in range(1, 8)),
    ("header padded with 10,000 spaces", header(pad=10_000)),
    ("data in reverse order", order(lambda name: [-ord(letter) for letter in name])),
    ("header in another order than the data", order(lambda name: name[::-1])),
    ("no metadata", header(metadata=None)),
    ("metadata empty", header(metadata={})),
    ("metadata of any text", header(metadata={"": "\0\n\u202e", "é": "x" * 10_000})),
    ("unknown key beside dtype", entry("note", [1, {"a": None}])),
    ("names escaped", files(lambda c: c.update({MODEL: safetensors(c[MODEL], header=b"".join(
        [b"{", b",".join(b'"%s":%s' % ("".join(f"\\u{ord(x):04x}" for x in name).encode(), json.dumps(value).encode())
                         for name, value in json_header(c[MODEL]).items()), b"}"]))}))),
    ("float16", cast(torch.float16)),
    ("bfloat16", cast(torch.bfloat16)),
    ("float64", cast(torch.float64)),
    ("all four dtypes mixed", cast(torch.float64, torch.bfloat16, torch.float32, torch.float16)),
    ("dtype of the config not that of the file", config(torch_dtype="bfloat16")),
    ("leftover inv_freq", tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
                                                      "model.rotary_emb.inv_freq": torch.zeros(0)}))),
    ("tied", files(tied), "tied"),
    ("tied without a head in the file", files(lambda c: (tied(c), c[MODEL].pop("lm_head.weight"))), "tied"),
    ("many readers: hard links", then(lambda f: os.link(f / MODEL, f / "second-name"))),
    ("read-only", then(lambda f: [p.chmod(0o444) for p in f.iterdir()] + [f.chmod(0o555)])),

    # shards
    ("three shards", sharded()),
    ("a shard for every tensor", files(lambda c: c.update(shards(c.pop(MODEL), 27)))),
    ("index without metadata", sharded(lambda c, i: i.pop("metadata"))),
    ("index with odd metadata", sharded(lambda c, i: i.update(metadata=None, extra=[1]))),
    ("index beside the whole file", files(lambda c: c.update(shards(c[MODEL])))),
    ("hub links", hub()),
    ("hub links to shards", hub(lambda c: c.update(shards(c.pop(MODEL))))),

    # config.json
    ("new spelling", config(rope_theta=GONE, rope_scaling=GONE, torch_dtype=GONE, dtype="float32",
                            rope_parameters={"rope_type": "default", "rope_theta": 10000.0})),
    ("both spellings", config(dtype="float32", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})),
    ("Llama 2 without rope_theta", config("llama", rope_theta=GONE, rope_scaling=GONE, attention_bias=GONE, mlp_bias=GONE), "llama"),
    ("nulls", config("llama", attention_bias=None, mlp_bias=None, head_dim=None, rope_parameters=None, quantization_config=None,
                     partial_rotary_factor=None, layer_types=None, pad_token_id=None, sliding_window=None, torch_dtype=None), "llama"),
    ("rope_theta whole", config(rope_theta=10000)),
    ("rope_scaling empty", config(rope_scaling={})),
    ("rope default by name", config(rope_scaling={"type": "default"})),
    ("rope default by both names", config(rope_scaling={"type": "default", "rope_type": "default"})),
    ("rope factor 1", config(rope_scaling={"type": "linear", "factor": 1})),
    ("partial_rotary_factor 1.0", config(partial_rotary_factor=1.0)),
    ("head_dim given", config(head_dim=4)),
    ("unknown keys", config(_name_or_path="../x", transformers_version="9.9", pretraining_tp=1, id2label={"0": "é"}, x=[[{}]], max_length=20)),
    ("remote code that is not run", files(lambda c: (c["config.json"].update(auto_map={"AutoModelForCausalLM": "modeling_x.Evil"}),
                                                     c.update({"modeling_x.py": f"open('{CANARY}', 'w')", "torch.py": f"open('{CANARY}', 'w')"})))),
    ("window off, its size left", config(sliding_window=4096, use_sliding_window=False, max_window_layers=0)),
    ("window on from a layer that is not there", config(use_sliding_window=True, max_window_layers=2)),
    ("window on without a size", config(use_sliding_window=True, sliding_window=None)),
    ("layer types all full", config(layer_types=["full_attention"] * 2)),
    ("no architectures", config(architectures=GONE)),
    ("activation by its other name", config(hidden_act="swish")),
    ("no dtype", config(torch_dtype=GONE)),
    ("dtype float64", config(torch_dtype="float64")),
    ("eos only in generation_config", config(eos_token_id=GONE)),
    ("eos a list", config(eos_token_id=[278, 276])),
    ("pad a list", config(pad_token_id=[278, 276])),
    ("no generation_config", then(lambda f: (f / "generation_config.json").unlink())),
    ("generation_config empty", content("generation_config.json", b"{}")),
    ("generation_config of many things", content("generation_config.json", b'{"eos_token_id": 278, "temperature": 1e-1, "x": {"y": null}}')),
    ("JSON indented, CRLF", relayout(indent=4)),
    ("JSON compact, no escapes", relayout(separators=(",", ":"), ensure_ascii=False)),
    ("JSON keys sorted", relayout(sort_keys=True)),

    # tokenizer
    ("merges as lists", files(lambda c: c[TOKENS]["model"].update(merges=[m.split(" ") for m in c[TOKENS]["model"]["merges"]]))),
    ("vocab.json and merges.txt", files(vocab_and_merges)),
    ("vocab.json, added_tokens.json", files(lambda c: (vocab_and_merges(c), c[SETTINGS].pop("added_tokens_decoder"),
                                                       c[SETTINGS].update(additional_special_tokens=["<|im_start|>"]),
                                                       c.update({"added_tokens.json": SPECIAL})))),
    ("thousands of added tokens", files(lambda c: (c["config.json"].update(vocab_size=9000), c.update({MODEL: widened(c[MODEL], 9000)}),
        c[TOKENS]["added_tokens"].extend({"id": 300 + i, "content": f"<|s_{i}|>" + "<|" * 40, "special": True} for i in range(8000))))),
    ("added tokens with holes", files(lambda c: c[TOKENS]["added_tokens"].append(
        {"id": 298, "content": "<|far|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}))),
    ("tokenizer.model beside tokenizer.json", content("tokenizer.model", b"\n\x0e\n\x05<unk>")),
    ("special_tokens_map of objects", content("special_tokens_map.json", {"eos_token": {"content": "<|im_end|>", "lstrip": False}})),
    ("template in a file", files(lambda c: c.update({"chat_template.jinja": c[SETTINGS].pop("chat_template")}))),
    ("templates by name", put(SETTINGS, "chat_template", [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}])),
    ("settings of many things", files(lambda c: c[SETTINGS].update(model_max_length=10 ** 12, clean_up_tokenization_spaces=False, x=None))),

    # the folder
    ("other files beside", then(lambda f: ((f / "pytorch_model.bin").write_bytes(pickle.dumps(Payload())), (f / "README.md").write_bytes(b"\xff"),
                                           (f / ".gitattributes").touch(), (f / "original").mkdir(), os.mkfifo(f / "pipe")))),
]
PLACES = ["a folder with spaces", "Ordner-äöü-模型-\U0001F600", "two\nlines", "tab\tand\\backslash", "'quotes\" $HOME `x`", "*?[a]", "-dash", "~", "x" * 200, "%s{0}"]


def json_header(tensors):
    seen = {}
    safetensors(tensors, change=seen.update)
    return seen


# ---- the tests -------------------------------------------------------------------------------------------------------------------

class Late(BaseException):
    pass


@pytest.fixture
def folder(tmp_path):
    yield tmp_path / "model"
    assert not CANARY.exists(), "something in the folder was executed"


def late(*_):
    raise Late


@pytest.fixture(autouse=True)
def alarm():
    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def answer(folder):
    """Everything that a folder is for, by the library."""
    tokenizer = load_tokenizer(folder)
    lm = load_model(folder)
    return list(generate(lm, tokenizer.chat_ids(QUESTION), 3, eos_ids=tokenizer.eos_ids))


def check_line(line, words):
    assert 0 < len(line) <= 400 and line.isprintable(), repr(line)
    for word in words.split():
        assert word in line, f"{word!r} is not in: {line}"


def snapshot(folder):
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.parent.rglob("*")}


@pytest.mark.parametrize("make, words", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_folder(make, words, folder):
    """Refused by the library with one line in a ValueError or FileNotFoundError, and by the command with that line."""
    make(folder)
    before = snapshot(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        answer(folder)
    check_line(str(caught.value), words)

    result = command()(["--model", folder, "--prompt", PROMPT, "--max-new-tokens", "3"])
    assert result.status == 1, result
    *progress, line = result.err.split("\n")[:-1]
    assert line.startswith("generate.py: "), result.err
    check_line(line.removeprefix("generate.py: "), words)
    assert all(other.startswith(("model ", "prompt ")) for other in progress), result.err
    assert result.seconds < 10 and result.growth < 200, result
    assert snapshot(folder) == before, "files have changed"


@pytest.mark.parametrize("make, words", [case[1:] for case in BAD if case[0].startswith(("eos", "bos", "pad", "sliding", "window"))])
def test_load_model_alone_reads_all_of_config(make, words, folder):
    make(folder)
    with pytest.raises(ValueError) as caught:
        load_model(folder)
    check_line(str(caught.value), words)


@functools.cache
def plain(family):
    """Logits of the plain folder and its tokenizer: qwen2, llama, qwen3, or qwen2 with a tied head."""
    with tempfile.TemporaryDirectory() as place:
        (files(tied) if family == "tied" else files(lambda c: None, family))(Path(place) / "model")
        return logits(Path(place) / "model"), load_tokenizer(Path(place) / "model")


@torch.no_grad()
def logits(folder):
    return load_model(folder, dtype="float32")(torch.arange(0, VOCAB, 7)[None])[..., :VOCAB]


@pytest.mark.parametrize("make, family", [(*case, "qwen2")[1:3] for case in ODD], ids=[case[0] for case in ODD])
def test_odd_folder(make, family, folder):
    """Valid, however odd: the logits of the plain folder bit for bit, the same ids for a chat, and the command works."""
    make(folder)
    before = snapshot(folder)
    expected, other = plain(family)
    assert torch.equal(logits(folder), expected)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_ids(QUESTION) == other.chat_ids(QUESTION) and tokenizer.eos_ids <= other.eos_ids
    result = command()(["--model", folder, "--prompt", PROMPT, "--dtype", "float32", "--max-new-tokens", "3"])
    assert result.status == 0 and "generate.py:" not in result.err, result
    assert snapshot(folder) == before, "files have changed"


@pytest.mark.parametrize("place", PLACES)
def test_odd_place(place, tmp_path):
    """A folder may have any name that the system allows, absolute, relative, or behind a link."""
    write(tmp_path / place, build())
    assert torch.equal(logits(tmp_path / place), plain("qwen2")[0])
    for name, cwd in ((tmp_path / place, None), (f"{tmp_path / place}/", None), (f"./{place}", tmp_path)):
        result = command()([f"--model={name}", "--prompt", PROMPT, "--max-new-tokens", "1"], cwd=cwd)
        assert result.status == 0, result
        assert len(result.err.splitlines()) <= 3 and all(line.isprintable() for line in result.err.splitlines()), result.err
    (tmp_path / "link").symlink_to(place)
    assert command()(["--model", tmp_path / "link", "--prompt", PROMPT, "--max-new-tokens", "1"]).status == 0


@pytest.mark.parametrize("setting, below", [("HF_HUB_CACHE", "."), ("HUGGINGFACE_HUB_CACHE", "."), ("HF_HOME", "hub"),
                                            ("XDG_CACHE_HOME", "huggingface/hub"), ("HOME", ".cache/huggingface/hub")])
def test_hub_cache(setting, below, tmp_path):
    """A hub id is found where Hugging Face's tools keep it: snapshots of links to blobs, refs/main names the snapshot."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / below / "models--some-one--Model-0.5B"
    hub()(repo / "snapshots" / commit)
    write(repo / "refs", {"main": commit})
    unset = dict.fromkeys(("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"), "")
    arguments = ["--model", "some-one/Model-0.5B", "--prompt", PROMPT, "--max-new-tokens", "1"]
    result = command()(arguments, **unset | {setting: str(tmp_path)})
    assert result.status == 0, result
    for ref in ("../../../../etc", commit[:-1], "", "\0", "x" * 100_000):      # a broken ref is as good as none
        write(repo / "refs", {"main": ref})
        result = command()(arguments, **unset | {setting: str(tmp_path)})
        assert result.status == 1 and result.err.startswith("generate.py: --model 'some-one/Model-0.5B'"), result
        assert result.err.count("\n") == 1


def test_sparse_terabyte(folder):
    """A file that claims a terabyte and has it, as a hole: refused by its shapes, and nothing of it is read into memory."""
    write(folder, build())
    path = folder / MODEL
    with open(path, "r+b") as file:
        text = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
        file.write(struct.pack("<Q", len(text)) + text)
        try:
            file.truncate(8 + len(text) + (1 << 40))
        except OSError:
            pytest.skip("no file of a terabyte here")
    result = command()(["--model", folder, "--prompt", "hello"])
    assert result.status == 1 and result.err.count("\n") == 1 and result.growth < 200, result


def test_nothing_is_written_through_the_map(folder):
    """The weights are views of the file: changing one in memory changes neither the file nor what others read."""
    write(folder, build())
    before = (folder / MODEL).read_bytes()
    tensors = read_safetensors(folder / MODEL)
    tensors["lm_head.weight"].fill_(7)
    assert (folder / MODEL).read_bytes() == before
    assert not (read_safetensors(folder / MODEL)["lm_head.weight"] == 7).any()


def test_truncated_anywhere(folder):
    """Every prefix of a file is refused: of a small one every length, of its data's middle some."""
    good = safetensors({"a": torch.arange(6.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, metadata={"format": "pt"})
    folder.mkdir()
    for length in range(len(good)):
        path = folder / f"{length}.safetensors"
        path.write_bytes(good[:length])
        with pytest.raises(ValueError) as caught:
            read_safetensors(path)
        check_line(str(caught.value), "")


REAL = ["config is a pipe", "header length over the limit", "weights are a pickle", "weights NaN", "template loops"]


@pytest.mark.parametrize("name", REAL)
def test_bad_folder_for_real(name, folder):
    """Some of the table through a process of their own, as a user starts it."""
    make, words = next(case[1:] for case in BAD if case[0] == name)
    make(folder)
    run = subprocess.run([sys.executable, ROOT / "generate.py", "--model", folder, "--prompt", "hello"], capture_output=True, text=True,
                         timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})
    *progress, line = run.stderr.splitlines()
    assert run.returncode == 1 and line.startswith("generate.py: ") and "Traceback" not in run.stderr, run
    check_line(line.removeprefix("generate.py: "), words)


def test_the_counts(record_testsuite_property, capsys):
    names = [case[0] for case in BAD + ODD]
    assert len(set(names)) == len(names) and len(BAD) >= 120 and len(ODD) >= 30
    with capsys.disabled():
        print(f"\nhostile input: {len(BAD)} bad folders, {len(ODD) + len(PLACES)} odd ones that load, {len(REAL)} in processes of their own")
