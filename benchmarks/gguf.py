"""A model folder's weights as a GGUF file, for llama.cpp: what benchmark.py --peers compares with. Qwen2 only.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, the number of tensors and of settings;
the settings (key, type, value); a line for every tensor (name, sizes from the innermost out, type, offset); the numbers.
"""
import json
import struct
from pathlib import Path

NAMES = {   # the checkpoint's -> llama.cpp's
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}
U32, F32, STRING = 4, 6, 8          # types of settings
ALIGNMENT = 32


def write_gguf(folder, path, dtype):
    """dtype: "float32" or "bfloat16", of the matrices; vectors are float32, as in llama.cpp's own files. -> path"""
    import torch
    from load_weights import read_weights
    config = json.loads((Path(folder) / "config.json").read_text())
    if config["model_type"] != "qwen2":
        raise ValueError(f"{folder}: a GGUF is written for qwen2 models only, not {config['model_type']}")
    text = lambda s: struct.pack("<Q", len(s)) + s.encode()
    settings = [("general.architecture", STRING, "qwen2"), ("tokenizer.ggml.model", STRING, "none")]
    settings += [(f"qwen2.{key}", U32, config[name]) for key, name in (
        ("block_count", "num_hidden_layers"), ("context_length", "max_position_embeddings"), ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"), ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"), ("vocab_size", "vocab_size"))]
    settings += [("qwen2.rope.freq_base", F32, config["rope_theta"]),
                 ("qwen2.attention.layer_norm_rms_epsilon", F32, config["rms_norm_eps"])]
    tensors = {gguf_name(name): t for name, t in read_weights(folder).items()}
    kinds = {name: torch.float32 if t.ndim == 1 else getattr(torch, dtype) for name, t in tensors.items()}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings))
    pack = {STRING: text, U32: lambda value: struct.pack("<I", value), F32: lambda value: struct.pack("<f", value)}
    for key, kind, value in settings:
        head += text(key) + struct.pack("<I", kind) + pack[kind](value)
    offset = 0
    for name, t in tensors.items():
        head += text(name) + struct.pack(f"<I{t.ndim}Q", t.ndim, *reversed(t.shape))
        head += struct.pack("<IQ", {torch.float32: 0, torch.bfloat16: 30}[kinds[name]], offset)
        offset += -(-t.numel() * kinds[name].itemsize // ALIGNMENT) * ALIGNMENT
    part = Path(f"{path}.part")
    with open(part, "wb") as file:
        file.write(head + b"\0" * (-len(head) % ALIGNMENT))
        for name, t in tensors.items():
            file.write(t.to(kinds[name]).contiguous().view(torch.uint8).numpy().data)
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
    part.rename(path)
    return path


def gguf_name(name):
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight"""
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        return f"blk.{layer}.{NAMES[module]}.{kind}"
    return f"{NAMES[module]}.{kind}"
