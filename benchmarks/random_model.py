"""A model folder of a published shape with random weights: to measure on without a download."""
import json
import os
import shutil
from pathlib import Path

#                  d   inner layers  H  K    D       V  tied   (Qwen2.5; 70b: Llama 3.1)
SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, 64, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 128, 152064, False),
    "70b": (8192, 28672, 80, 64, 8, 128, 128256, False),
}


def config_of(shape, layers=None):
    """-> config.json. layers: fewer than the shape has, where memory demands it."""
    d, inner, full, heads, kv_heads, head_dim, vocab, tied = SHAPES[shape]
    return dict(
        model_type="llama" if shape == "70b" else "qwen2", hidden_act="silu", hidden_size=d,
        intermediate_size=inner, num_hidden_layers=layers or full, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=vocab, rms_norm_eps=1e-6,
        max_position_embeddings=32768, rope_theta=1e6, tie_word_embeddings=tied,
        use_sliding_window=False, torch_dtype="bfloat16")


def write_random_model(folder, shape, layers=None):
    """-> the folder, in bfloat16. ValueError if in two dtypes it would not fit into memory."""
    import torch

    from load_weights import read_config, write_safetensors
    from model import CausalLM
    folder = Path(folder)
    work = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "config.json").write_text(json.dumps(config_of(shape, layers), indent=1))
    with torch.device("meta"):
        lm = CausalLM(read_config(work))
    sizes = {name: parameter.shape for name, parameter in lm.named_parameters()}    # tied: once
    need = 6 * sum(size.numel() for size in sizes.values())
    if need > 0.7 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise ValueError(f"--shape {shape}: in bfloat16 and float32 its weights take "
                         f"{need / 2**30:.0f} GiB, too much here; give fewer --layers")
    draw, tensors = torch.Generator().manual_seed(0), {}
    for name, size in sizes.items():
        values = torch.randn(size, generator=draw) * (0.1 if len(size) == 1 else 0.02)
        tensors[name] = (values + ("norm" in name)).bfloat16()
    write_safetensors(work / "model.safetensors", tensors)
    return work.rename(folder)
