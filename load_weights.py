"""A model folder becomes a model: safetensors by hand, memory-mapped; config.json; strict loading.

The format (https://huggingface.co/docs/safetensors) fits in three lines:
    8 bytes     N, the length of the header, a little-endian integer
    N bytes     JSON: {"name": {"dtype": "BF16", "shape": [2, 8], "data_offsets": [0, 32]}, ...}
    the rest    the numbers of all tensors without a gap; offsets count from here
So a tensor is a slice of the file, and nothing is read until it is used: a weight that keeps its
dtype on the CPU *is* the file's page in memory. What may be wrong is judged in checks/.

    lm = load_model("Qwen/Qwen2.5-0.5B-Instruct")
"""
import json
import mmap
import os
import struct
from pathlib import Path

import torch

from checks.config import check_config
from checks.files import check_target, parse_json, read_json, regular_file, whole_file
from checks.hub import find_kept
from checks.safetensors import check_folder, check_header, check_index, check_shard, check_start
from checks.weights import check_dtype, check_layers, check_weights
from model import CausalLM, Config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_DTYPES = {      # what weights come in; torch has a type for each
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def read_safetensors(path):
    """-> {name: tensor}, copy-on-write views of the mapped file. ValueError for a bad one."""
    with open(regular_file(path), "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)   # disk never changes
    check_start(path, mapped)
    begin_data = 8 + struct.unpack("<Q", mapped[:8])[0]
    header = parse_json(mapped[8:begin_data], path)
    check_header(path, header, len(mapped) - begin_data, SAFETENSORS_DTYPES)
    header.pop("__metadata__", None)
    data = torch.frombuffer(mapped, dtype=torch.uint8)[begin_data:]     # keeps the map alive
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        piece = data[begin:end]
        if piece.storage_offset() % dtype.itemsize:     # legal, but nothing that a view can do
            piece = piece.clone()
        tensors[name] = piece.view(dtype).view(entry["shape"])
    return tensors


def write_safetensors(path, tensors):
    """{name: tensor} of the dtypes above -> one file or none. ValueError or OSError names it."""
    check_target(path)
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                     # so that the numbers begin aligned
    with whole_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().view(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def read_weights(folder):
    """The tensors of model.safetensors, or of the shards that the index beside it lists."""
    single, index = Path(folder, "model.safetensors"), Path(folder, "model.safetensors.index.json")
    check_folder(folder)
    if os.path.lexists(single):
        return read_safetensors(single)
    raw = read_json(index, limit=16 << 20)
    check_index(index, raw)
    tensors = {}
    for shard in sorted(set(raw["weight_map"].values())):
        found = read_safetensors(Path(folder, shard))
        check_shard(index, raw["weight_map"], shard, found)
        tensors |= found
    return tensors


def read_config(folder):
    """config.json, in the spelling of transformers 4 or 5 -> Config. ValueError names the field."""
    path = Path(folder, "config.json")
    raw = read_json(path, limit=4 << 20)
    check_config(path, raw)
    given = {name: value for name, value in raw.items() if value is not None}
    family, heads = given["model_type"], given["num_attention_heads"]
    bias = given.get("attention_bias", False) and family != "qwen2"
    as_it_stands = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                    "num_attention_heads", "max_position_embeddings", "rms_norm_eps")
    return Config(
        **{name: given[name] for name in as_it_stands},
        num_key_value_heads=given.get("num_key_value_heads", heads),
        head_dim=given.get("head_dim", given["hidden_size"] // heads),
        tie_word_embeddings=given.get("tie_word_embeddings", False),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=family == "llama" and given.get("mlp_bias", False),
        qk_norm=family == "qwen3", rope=read_rope(given),
        dtype=given.get("dtype", given.get("torch_dtype", "")).removeprefix("torch.") or None)


def read_rope(given):
    """-> one flat dict. transformers 5 has `rope_parameters`; 4 has `rope_theta` beside
    `rope_scaling`, where "type" may stand for "rope_type"."""
    rope = {"rope_theta": 10000.0, "beta_fast": 32, "beta_slow": 1, "truncate": True}
    beside = ("rope_theta", "original_max_position_embeddings")
    rope |= {name: given[name] for name in beside if name in given}
    inside = given.get("rope_parameters") or given.get("rope_scaling") or {}
    rope |= {name: value for name, value in inside.items() if value is not None}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope


def load_model(folder, device="cpu", dtype="auto", part=None):
    """A folder, or a name for `find_model` -> CausalLM, frozen, in evaluation mode.

    dtype: "float32", "bfloat16", "float16", or "auto": what config.json names, else what the file
    holds (of others, float32). Built without memory, on `meta`, it takes the file's tensors.
    part: a function of a weight's name and the weight -> what is kept of it; see speed/parallel.py.
    Strict: every weight, no other, in its shape, or one line of ValueError.
    """
    check_dtype(dtype, DTYPES)
    folder = find_model(folder)
    config = read_config(folder)
    tensors = {name: tensor for name, tensor in read_weights(folder).items()
               if not name.endswith("rotary_emb.inv_freq")}     # tables that old exporters stored
    check_layers(folder, config, tensors)       # before anything of the announced size is built
    embedding = tensors.get("model.embed_tokens.weight")
    if config.tie_word_embeddings:
        tensors.setdefault("lm_head.weight", embedding)
    with torch.device("meta"):
        lm = CausalLM(config)
    check_weights(folder, config, tensors, lm.state_dict())
    lm.load_state_dict(tensors, strict=True, assign=True)
    lm.tie_weights()                            # assignment has made two parameters of the one

    if dtype == "auto":
        dtype = config.dtype or embedding.dtype
    dtype = DTYPES.get(str(dtype).removeprefix("torch."), torch.float32)
    del tensors, embedding                      # a file stays mapped while a weight is a view of it
    for name, parameter in lm.named_parameters():   # one at a time: one copy on its way, no more
        weight = part(name, parameter.data) if part else parameter.data
        parameter.data = weight.to(device=device, dtype=dtype)
    lm.model.rotary_emb.to(device)
    return lm.eval().requires_grad_(False)


def find_model(name):
    """A folder, a name that `python -m convert` keeps, or a hub id -> the folder: checks/hub.py."""
    return Path(name) if os.path.isdir(name) else find_kept(name)
