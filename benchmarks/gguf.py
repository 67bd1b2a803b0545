"""A model folder as a GGUF file without tokenizer, for llama.cpp: convert/ read backwards."""
import json
from pathlib import Path

from convert.folder import FIELDS, NAMES

MODULES = {ours: theirs for theirs, ours in NAMES.items()}


def gguf_name(name):
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight"""
    module, end = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        return f"blk.{layer}.{MODULES[module]}.{end}"
    return f"{MODULES[module]}.{end}"


def write_gguf(folder, path, dtype):
    """dtype: of the matrices; vectors are float32, as in llama.cpp's own files. -> path.
    ValueError where the file could not say what config.json says."""
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter

    from load_weights import DTYPES, load_model, read_config
    config, raw = read_config(folder), json.loads(Path(folder, "config.json").read_text())
    part = Path(f"{path}.part")
    if config.rope["rope_type"] != "default":
        raise ValueError(f"rotary type {config.rope['rope_type']}: no GGUF of it is written here")

    writer = GGUFWriter(part, raw["model_type"])
    writer.add_string("tokenizer.ggml.model", "none")
    values = vars(config) | config.rope
    for name, ours in {**FIELDS, "attention.value_length": "head_dim", "vocab_size": "vocab_size",
                       "rope.dimension_count": "head_dim"}.items():
        real = ours in ("rope_theta", "rms_norm_eps")               # even where JSON has 10000
        add = writer.add_float32 if real else writer.add_uint32
        add(f"{raw['model_type']}.{name}", values[ours])

    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    for name, tensor in load_model(folder).named_parameters():      # a tied head comes once
        kind = torch.float32 if tensor.ndim == 1 else DTYPES[dtype]
        if raw["model_type"] == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = tensor.unflatten(0, (heads, 2, -1))            # (heads, 2, D/2, ...)
            tensor = halves.transpose(1, 2).flatten(0, 2)
        data = tensor.to(kind).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(gguf_name(name), data, raw_dtype=GGMLQuantizationType[kinds[kind]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return part.rename(path)
