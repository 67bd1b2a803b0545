"""
Writes tests/golden/: what the reference library computes on small random models, so that model.py can be held against
it on a machine where that library is not installed.

    python3 -m venv /opt/hf && /opt/hf/bin/pip install torch==2.13.0 && /opt/hf/bin/pip install transformers==5.23.0
    /opt/hf/bin/python tests/make_golden.py            # everything, 20 s; made with transformers 5.23.0, torch 2.13.0

Each case is a model folder as `save_pretrained` writes it, or with its config.json rewritten to the spelling of folders
published before transformers 5, and beside the weights a golden.npz:

    prompt (B, T) ids    hidden (B, T, d) after the final norm    logits (B, T, V)    greedy (B, N) ids

all float32, eager attention (the bf16 and f16 folders: weights upcast first). slot_*.npz hold runs of the SLOT method as
its authors' public code does it; that loop is written out below, not imported from slot.py. rope.json holds the inverse
frequencies of published parameter sets.

A golden value proves nothing if a wrong model reproduces it. So norm weights are not ones, biases are not zeros, q and k
are large enough that attention is far from uniform, eps is large enough to be seen, scaled rotary frequencies differ at
these prompt lengths; and each of this is asserted here, when the values are made. Seeds are searched until greedy decoding
never has to choose between two tokens closer than MARGIN: a test may then ask for equal tokens.
"""

import copy
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

GOLDEN = Path(__file__).parent / "golden"
SLOT_REFERENCE = Path(__file__).resolve().parents[2] / "shared/data/slot_reference"
NEW_TOKENS = 16
SLOT_NEW_TOKENS = 32
SLOT_SETTINGS = [(0, 0.1), (1, 0.1), (3, 0.01), (5, 0.1), (20, 0.05)]
SLOT_CASES = ["llama2_published", "qwen2", "qwen3_tied_yarn"]
MARGIN = 0.01

SMALL = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, vocab_size=96, max_position_embeddings=256)
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# name: config class, its fields, and how the folder is written:
#   T prompt length, dtype of the saved weights, shard size, the seed to start searching from,
#   old: the config spelling of published folders; "type" or "rope_type" is the key that they use inside rope_scaling
CASES = {
    "llama2_published": dict(cls=LlamaConfig, seed=10, T=24, shard="20KB", old="type", inv_freq=True,
        heads=4, kv=4, rms_norm_eps=1e-5, rope={"rope_type": "default", "rope_theta": 10000.0}),
    "llama_biases": dict(cls=LlamaConfig, T=24,
        heads=4, kv=2, rms_norm_eps=1e-2, attention_bias=True, mlp_bias=True, rope={"rope_type": "default", "rope_theta": 500000.0}),
    "llama31": dict(cls=LlamaConfig, seed=1, T=40, shard="20KB",
        heads=4, kv=2, head_dim=16, rms_norm_eps=1e-5, rope={**LLAMA3, "factor": 8.0, "rope_theta": 1000.0}),
    "llama32_tied": dict(cls=LlamaConfig, T=32, old="rope_type",
        heads=4, kv=1, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=True, rope={**LLAMA3, "factor": 32.0, "rope_theta": 700.0}),
    "llama_linear": dict(cls=LlamaConfig, seed=3, T=32, old="type",
        heads=4, kv=4, rms_norm_eps=1e-3, rope={"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}),
    "llama_head_dim": dict(cls=LlamaConfig, T=24, num_hidden_layers=3,
        heads=4, kv=1, head_dim=8, rms_norm_eps=1e-3, rope={"rope_type": "default", "rope_theta": 10000.0}),
    "llama_bf16": dict(cls=LlamaConfig, T=24, dtype=torch.bfloat16, old="rope_type",
        heads=4, kv=2, rms_norm_eps=1e-5, rope={**LLAMA3, "factor": 8.0, "rope_theta": 1000.0}),
    "qwen2": dict(cls=Qwen2Config, seed=110, T=24, old="type",
        heads=4, kv=2, rms_norm_eps=1e-6, rope={"rope_type": "default", "rope_theta": 1000000.0}),
    "qwen2_tied": dict(cls=Qwen2Config, T=24, shard="20KB",
        heads=4, kv=1, rms_norm_eps=1e-3, tie_word_embeddings=True, rope={"rope_type": "default", "rope_theta": 1000000.0}),
    "qwen2_yarn": dict(cls=Qwen2Config, T=40, old="type",
        heads=2, kv=1, rms_norm_eps=1e-6, rope={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 100.0}),
    "qwen2_yarn_factor": dict(cls=Qwen2Config, seed=1, T=40,
        heads=2, kv=1, rms_norm_eps=1e-6, rope={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
            "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.37, "rope_theta": 50.0}),
    "qwen2_yarn_mscale": dict(cls=Qwen2Config, seed=1, T=40,
        heads=2, kv=2, rms_norm_eps=1e-6, rope={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32,
            "mscale": 3.0, "mscale_all_dim": 0.7, "truncate": False, "rope_theta": 100.0}),
    "qwen2_f16": dict(cls=Qwen2Config, T=24, dtype=torch.float16,
        heads=4, kv=2, rms_norm_eps=1e-6, rope={"rope_type": "default", "rope_theta": 1000000.0}),
    "qwen3": dict(cls=Qwen3Config, T=24, old="rope_type", shard="20KB",
        heads=4, kv=2, head_dim=16, rms_norm_eps=1e-2, rope={"rope_type": "default", "rope_theta": 1000000.0}),
    "qwen3_tied_yarn": dict(cls=Qwen3Config, seed=788, T=32, old="rope_type",
        heads=4, kv=1, head_dim=24, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 100.0}),
}

# Published parameter sets and two corners, for rope.json (inverse frequencies alone: no weights needed).
ROPES = {
    "llama2": dict(head_dim=128, rope={"rope_type": "default", "rope_theta": 10000.0}),
    "llama31": dict(head_dim=128, max_position_embeddings=131072, rope={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    "llama32": dict(head_dim=64, max_position_embeddings=131072, rope={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    "qwen25_yarn": dict(head_dim=128, max_position_embeddings=131072, rope={"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0,
        "original_max_position_embeddings": 32768}),
    "yarn_mscale_no_truncate": dict(head_dim=64, max_position_embeddings=131072, rope={"rope_type": "yarn", "rope_theta": 10000.0,
        "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False}),
    "yarn_betas": dict(head_dim=64, max_position_embeddings=131072, rope={"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0,
        "original_max_position_embeddings": 4096, "beta_fast": 64.0, "beta_slow": 4.0, "attention_factor": 1.25}),
    "yarn_upper_bound": dict(head_dim=64, max_position_embeddings=16384, rope={"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0,
        "original_max_position_embeddings": 4096}),          # not published: the ramp ends beyond the last pair
    "linear": dict(head_dim=128, max_position_embeddings=8192, rope={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
}


def build(case, seed):
    """A model whose every parameter matters: see the module's docstring."""
    fields = {k: v for k, v in case.items() if k not in ("cls", "T", "shard", "old", "dtype", "inv_freq", "heads", "kv", "rope", "seed")}
    config = case["cls"](**{**SMALL, "num_attention_heads": case["heads"], "num_key_value_heads": case["kv"],
                            "rope_parameters": dict(case["rope"]), "bos_token_id": 1, "eos_token_id": 2, **fields})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if "norm" in name:                       p.data = 1 + 0.3 * noise
        elif name.endswith("bias"):              p.data = 0.5 * noise
        elif "q_proj" in name or "k_proj" in name: p.data = 0.25 * noise
        elif "embed_tokens" in name:             p.data = 0.15 * noise
        else:                                    p.data = 0.2 * noise
        p.data = p.data.to(case.get("dtype", torch.float32)).float()      # golden values are of the weights as saved
    return model.eval()


def write_folder(model, case, folder):
    """save_pretrained, then, for about half of the cases, the config spelling and the leftovers of published folders."""
    copy.deepcopy(model).to(case.get("dtype", torch.float32)).save_pretrained(folder, max_shard_size=case.get("shard", "50GB"))
    if case.get("inv_freq"):       # the published Llama 2 files hold a buffer per layer that nobody reads
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        shard = index["weight_map"]["model.norm.weight"]
        tensors = load_file(folder / shard)
        for layer in range(model.config.num_hidden_layers):
            name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            tensors[name] = model.model.rotary_emb.inv_freq.clone()
            index["weight_map"][name] = shard
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    if "old" in case:
        path = folder / "config.json"
        c = json.loads(path.read_text())
        rope = c.pop("rope_parameters")
        theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
        if not case.get("inv_freq"):           # Llama 2 never named its rope_theta
            c["rope_theta"] = theta
        c["rope_scaling"] = None if kind == "default" else {case["old"]: kind, **rope}
        c["torch_dtype"] = c.pop("dtype")
        c["transformers_version"] = "4.44.0"
        c.pop("layer_types", None)
        c.pop("pad_token_id", None)
        if "head_dim" not in case:
            c.pop("head_dim", None)
        if case["cls"] is LlamaConfig:
            if not case.get("attention_bias"): c.pop("attention_bias"), c.pop("mlp_bias")
            if case["kv"] == case["heads"]: c.pop("num_key_value_heads")
            if not case.get("tie_word_embeddings"): c.pop("tie_word_embeddings")
        else:                                    # switched off, but with a window, as real Qwen folders have it
            c.update(use_sliding_window=False, sliding_window=16, max_window_layers=1)
        path.write_text(json.dumps(dict(sorted(c.items())), indent=2) + "\n")


@torch.no_grad()
def greedy(model, prompt, new_tokens):
    """Greedy ids without a cache, and the smallest lead that a chosen token ever had over the second."""
    ids, margin = prompt, float("inf")
    for _ in range(new_tokens):
        top = model(ids).logits[:, -1].topk(2)
        margin = min(margin, (top.values[:, 0] - top.values[:, 1]).min().item())
        ids = torch.cat([ids, top.indices[:, :1]], dim=1)
    return ids[:, prompt.size(1):], margin


@torch.no_grad()
def check_power(model, case, prompt, logits):
    """What this case claims to test must show in its numbers. Returns the sharpest statistics for the report."""
    attention = model(prompt, output_attentions=True).attentions
    peak = torch.stack(attention)[:, :, :, -1].max(dim=-1).values.mean().item()
    assert peak > 3 / prompt.size(1), f"attention is nearly uniform: mean peak {peak}"
    if case["rope"]["rope_type"] == "default":
        return peak, 0.0
    rotary = model.model.rotary_emb
    plain, _ = rotary.compute_default_rope_parameters(model.config)
    ratio = plain / rotary.inv_freq
    if case["rope"]["rope_type"] == "llama3":
        kept, scaled = ratio == 1, (ratio - case["rope"]["factor"]).abs() < 1e-4
        assert kept.any() and scaled.any() and (~kept & ~scaled).any(), f"a band of the llama3 frequencies is empty: {ratio}"
    if case["rope"]["rope_type"] == "yarn":
        assert ((ratio > 1.01) & (ratio < 0.99 * case["rope"]["factor"])).sum() >= 3, f"no ramp between the yarn bands: {ratio}"
    kept = rotary.inv_freq.clone(), rotary.attention_scaling
    effects = []
    for inv_freq, scaling in [(plain, kept[1]), (kept[0], 1.0)]:
        rotary.inv_freq.copy_(inv_freq)
        rotary.attention_scaling = scaling
        effects.append((model(prompt).logits - logits).abs().max().item())
    rotary.inv_freq.copy_(kept[0])
    rotary.attention_scaling = kept[1]
    assert effects[0] > 0.1, f"rope scaling does not show: {effects}"
    assert case["rope"]["rope_type"] != "yarn" or effects[1] > 0.05, f"the attention factor does not show: {effects}"
    return peak, effects[0]


def make_case(name, case):
    for seed in range(case.get("seed", 0), 1000):
        model = build(case, seed)
        prompt = torch.randint(3, SMALL["vocab_size"], (2, case["T"]), generator=torch.Generator().manual_seed(seed))
        continuation, margin = greedy(model, prompt, NEW_TOKENS)
        if margin < MARGIN or (name in SLOT_CASES and min(r["margin"] for r in slot_runs(model, prompt)) < MARGIN):
            continue
        break
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    write_folder(model, case, folder)
    with torch.no_grad():
        hidden = model.model(prompt).last_hidden_state
        logits = model(prompt).logits
        reloaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        assert torch.equal(reloaded(prompt).logits, logits), f"{name}: the folder does not compute what was saved"
        own = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        assert own.dtype == case.get("dtype", torch.float32)
        low = (own(prompt).logits.float() - logits).abs().max().item()
    peak, effect = check_power(model, case, prompt, logits)
    np.savez_compressed(folder / "golden.npz", prompt=prompt.numpy(), hidden=hidden.numpy(), logits=logits.numpy(),
                        greedy=continuation.numpy())
    if name in SLOT_CASES:
        save_slot(name, slot_runs(model, prompt))
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name:20s} seed {seed:3d}  T {case['T']}  max|logit| {logits.abs().max():5.2f}  greedy lead {margin:.3f}  "
          f"attention peak {peak:.2f}  rope effect {effect:.2f}  own-dtype error {low:.1e}  {size / 1e3:.0f} kB")


# --- SLOT as the authors' public code does it on its Hugging Face path ----------------------------------------------------


def slot_run(model, prompt, steps, lr, new_tokens=SLOT_NEW_TOKENS):
    """One prompt (1, n). The losses are those that the loop sees, before each update."""
    with torch.no_grad():
        out = model.model(prompt, use_cache=True)
    hidden, cache = out.last_hidden_state.detach(), out.past_key_values
    delta = torch.nn.Parameter(torch.zeros(1, 1, hidden.size(-1)))
    optimizer = torch.optim.AdamW([delta], lr=lr, weight_decay=1e-8, eps=1e-5)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model.lm_head(hidden + delta)
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.size(-1)), prompt[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.zero_grad()              # full autograd: the head's weight had a gradient too, unused
    delta, new, margin = delta.detach(), [], float("inf")
    with torch.no_grad():
        for _ in range(new_tokens):
            top = model.lm_head(hidden[:, -1:] + delta)[0, 0].topk(2)
            margin = min(margin, (top.values[0] - top.values[1]).item())
            new.append(top.indices[0].item())
            out = model.model(top.indices[:1].view(1, 1), past_key_values=cache, use_cache=True)
            hidden, cache = out.last_hidden_state, out.past_key_values
    return dict(steps=steps, lr=lr, delta=delta[0, 0].numpy(), losses=np.array(losses, np.float32), new=np.array(new), margin=margin)


def slot_runs(model, prompt):
    return [slot_run(model, row[None], steps, lr) | {"row": i} for steps, lr in SLOT_SETTINGS for i, row in enumerate(prompt)]


def save_slot(name, runs):
    arrays = {f"{key}{k}": run[key] for k, run in enumerate(runs) for key in ("steps", "lr", "row", "delta", "losses", "new")}
    np.savez_compressed(GOLDEN / f"slot_{name}.npz", runs=len(runs), **arrays)
    print(f"{'slot_' + name:20s} {len(runs)} runs, smallest lead {min(r['margin'] for r in runs):.3f}, "
          f"max|delta| {max(np.abs(r['delta']).max() for r in runs):.2f}")


def check_slot_against_reference():
    """The loop above, against runs of the authors' own code. Without those the SLOT goldens are not to be trusted."""
    if not SLOT_REFERENCE.exists():
        sys.exit(f"{SLOT_REFERENCE} is missing: it shows that this script's SLOT loop is the authors'")
    model = AutoModelForCausalLM.from_pretrained(SLOT_REFERENCE / "model", attn_implementation="eager", dtype=torch.float32)
    runs, worst = np.load(SLOT_REFERENCE / "runs.npz"), 0.0
    for k in range(6):
        steps, lr = runs[f"set{k}"]
        run = slot_run(model, torch.tensor(runs[f"ids{k}"]).view(1, -1), int(steps), float(lr), len(runs[f"new{k}"]))
        assert (run["new"] == runs[f"new{k}"]).all(), f"run {k}: tokens differ"
        worst = max(worst, float(np.abs(run["delta"] - runs[f"delta{k}"]).max()))
    assert worst < 1e-3, worst
    print(f"the authors' six runs: all tokens equal, max |delta - theirs| {worst:.1e}")


def make_ropes():
    out = {}
    for name, case in ROPES.items():
        config = LlamaConfig(hidden_size=4 * case["head_dim"], num_attention_heads=4, head_dim=case["head_dim"],
                             max_position_embeddings=case.get("max_position_embeddings", 4096), rope_parameters=dict(case["rope"]))
        kind = case["rope"]["rope_type"]
        if kind == "default":
            inv_freq, scaling = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        else:
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config)
        out[name] = {**case, "inv_freq": [float(f"{x:.9g}") for x in inv_freq.tolist()], "attention_scaling": scaling}
    (GOLDEN / "rope.json").write_text(json.dumps(out, indent=1) + "\n")


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    GOLDEN.mkdir(exist_ok=True)
    check_slot_against_reference()
    names = sys.argv[1:] or list(CASES)
    for name in names:
        make_case(name, CASES[name])
    make_ropes()
    (GOLDEN / "VERSIONS.json").write_text(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__,
                                                      "numpy": np.__version__, "by": "tests/make_golden.py"}, indent=1) + "\n")
    print(f"total {sum(f.stat().st_size for f in GOLDEN.rglob('*') if f.is_file()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
