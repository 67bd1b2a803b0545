"""Write a model folder of a published shape with random weights: what speed and memory are measured on, without a download.

    python benchmarks/random_model.py /tmp/qwen-0.5b --shape 0.5b --shards 2 --tokenizer FOLDER_WITH_TOKENIZER_JSON
    python generate.py --model /tmp/qwen-0.5b --slot-steps 3 --max-new-tokens 32

Weights are normal with a standard deviation of 0.02, norms are near 1: the numbers stay in range and the text is nonsense. The
files are written tensor by tensor, so that memory holds one weight at a time; a folder appears whole or not at all.
"""
import argparse
import json
import shutil
import struct
import sys
from pathlib import Path

#                  d   inner layers  H  K    D       V  tied   (Qwen2.5, and Llama 3.1 for 70b)
SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, 64, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 128, 152064, False),
    "70b": (8192, 28672, 80, 64, 8, 128, 128256, False),
}


def config_of(shape, layers=None, dtype="bfloat16"):
    d, inner, full, heads, kv_heads, head_dim, vocab, tied = SHAPES[shape]
    family = "llama" if shape == "70b" else "qwen2"
    return dict(
        architectures=["LlamaForCausalLM" if family == "llama" else "Qwen2ForCausalLM"], model_type=family, hidden_act="silu",
        hidden_size=d, intermediate_size=inner, num_hidden_layers=layers or full, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=vocab, max_position_embeddings=32768, rms_norm_eps=1e-6,
        rope_theta=1000000.0, tie_word_embeddings=tied, use_sliding_window=False, torch_dtype=dtype)


def weight_shapes(config):
    """-> {checkpoint name: shape}"""
    d, inner, D = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, k = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, rows, columns in (("self_attn.q_proj", q, d), ("self_attn.k_proj", k, d), ("self_attn.v_proj", k, d),
                                    ("self_attn.o_proj", d, q), ("mlp.gate_proj", inner, d), ("mlp.up_proj", inner, d),
                                    ("mlp.down_proj", d, inner)):
            shapes[f"{layer}{name}.weight"] = (rows, columns)
            if config["model_type"] == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                shapes[f"{layer}{name}.bias"] = (rows,)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (d,)
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    return shapes


def write_random_model(folder, shape="0.5b", shards=1, dtype="bfloat16", layers=None, tokenizer=None, seed=0):
    """-> the folder. dtype: float32, bfloat16 or float16. layers: fewer than the shape has, where memory demands it."""
    import torch
    folder, config = Path(folder), config_of(shape, layers, dtype)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it first or give another name")
    work = folder.with_name(folder.name + ".part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    kind, size = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}[dtype]
    generator = torch.Generator().manual_seed(seed)
    shapes = weight_shapes(config)
    total = sum(size * torch.Size(s).numel() for s in shapes.values())
    parts, filled = [{}], 0
    for name, s in shapes.items():
        if filled >= total * len(parts) / shards:
            parts.append({})
        parts[-1][name] = s
        filled += size * torch.Size(s).numel()
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, s in part.items():
            header[name] = dict(dtype=kind, shape=list(s), data_offsets=[end, end + size * torch.Size(s).numel()])
            end, weight_map[name] = header[name]["data_offsets"][1], file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(work / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name, s in part.items():
                weight = torch.randn(s, generator=generator) * (0.1 if len(s) == 1 else 0.02) + ("norm" in name)
                out.write(weight.to(getattr(torch, dtype)).view(torch.uint8).numpy().data)
    if len(parts) > 1:
        index = dict(metadata=dict(total_size=total), weight_map=weight_map)
        (work / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (work / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if tokenizer and (Path(tokenizer) / name).exists():
            shutil.copyfile(Path(tokenizer) / name, work / name)
    work.rename(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="copy tokenizer.json and tokenizer_config.json from there")
    args = parser.parse_args()
    folder = write_random_model(args.folder, args.shape, args.shards, args.dtype, args.layers, args.tokenizer)
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e9:.2f} GB in {len(list(folder.iterdir()))} files", file=sys.stderr)
