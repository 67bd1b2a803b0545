"""
Can the suite fail? One mistake at a time is written into a copy of the sources, and the tests must turn red.

    OMP_NUM_THREADS=1 python tests/mutations.py             # all, 3 to 4 minutes, prints the table of tests/README.md
    OMP_NUM_THREADS=1 python tests/mutations.py rope eps    # those whose description holds one of the words

A mutation is a text to find in one file, which must be there exactly once, and a text to put in its place; whoever
rewrites such a line gets an error here and updates the mutation. A mutant that only crashes on import proves nothing, so
tests must run and fail (pytest's exit status 1), and the first failing one is reported with its message. A few mutations
are listed as invisible: they change no number that a test could see, and the table says so. Those of compiled.py need a
C++ compiler.
"""
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch  # noqa: F401  imported once here, so that the forked children need not

ROOT = Path(__file__).resolve().parents[1]
MODEL, ROPE, SLOT, TOKENIZER, COMPILED = (f"tests/test_{name}.py" for name in ("model", "rope", "slot", "tokenizer", "compiled"))
STREAM = f"{TOKENIZER} -k stream"
RED, INVISIBLE = "red", "invisible"

# description, file, old text, new text, tests to run, expected
MUTATIONS = [
    # --- model.py: rotary embedding
    ("rope pairs neighbours (2i, 2i+1) instead of halves", "model.py", "    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)",
     "    cos, sin = (torch.stack(t.chunk(2, dim=-1), dim=-1).flatten(-2) for t in (cos, sin))\n"
     "    return (x * cos + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin).to(x.dtype)", MODEL, RED),
    ("rope turns the other way", "model.py", "torch.cat((-sin, sin), dim=-1)", "torch.cat((sin, -sin), dim=-1)", MODEL, RED),
    ("rope on q only", "model.py", "rotate(q, cos, sin), rotate(k, cos, sin)", "rotate(q, cos, sin), k", MODEL, RED),
    ("cached positions shifted by one", "model.py", "positions = torch.arange(past, past + T, device=device)[None]",
     "positions = torch.arange(past, past + T, device=device)[None] + (past > 0)", MODEL, RED),
    ("positions of a padded batch count the padding", "model.py", "positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]",
     "positions = torch.arange(past, past + T, device=device)[None]", MODEL, RED),
    ("llama3 rope: the two bands swapped", "model.py", "return keep * inv_freq + (1 - keep) * inv_freq / rope[\"factor\"], 1.0",
     "return (1 - keep) * inv_freq + keep * inv_freq / rope[\"factor\"], 1.0", MODEL, RED),
    ("llama3 rope: no smooth passage between the bands", "model.py", "keep = ((turns - low) / (high - low)).clamp(0, 1)",
     "keep = ((turns - low) / (high - low)).clamp(0, 1).round()", MODEL, RED),
    ("linear rope: factor ignored", "model.py", "return inv_freq / rope[\"factor\"], 1.0\n    if rope[\"rope_type\"] == \"llama3\"",
     "return inv_freq, 1.0\n    if rope[\"rope_type\"] == \"llama3\"", MODEL, RED),
    ("yarn: attention factor dropped", "model.py", "rope[\"factor\"], rope.get(\"attention_factor\", factor)", "rope[\"factor\"], 1.0", MODEL, RED),
    ("yarn: explicit attention_factor ignored", "model.py", "rope.get(\"attention_factor\", factor)", "factor", MODEL, RED),
    ("yarn: mscale pair ignored", "model.py", "both = \"mscale\" in rope and \"mscale_all_dim\" in rope", "both = False", MODEL, RED),
    ("yarn: `truncate: false` ignored", "model.py", "if rope[\"truncate\"]:", "if True:", MODEL, RED),
    ("yarn: beta_fast and beta_slow swapped", "model.py", "pair_with_turns(rope[\"beta_fast\"]), pair_with_turns(rope[\"beta_slow\"])",
     "pair_with_turns(rope[\"beta_slow\"]), pair_with_turns(rope[\"beta_fast\"])", MODEL, RED),
    ("yarn: upper bound D/2 - 1 instead of D - 1", "model.py", "min(high, D - 1)", "min(high, D // 2 - 1)", f"{MODEL} {ROPE}", RED),
    # --- model.py: norm, attention, MLP
    ("norm: epsilon outside the square root", "model.py", "torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)",
     "(1 / (x32.pow(2).mean(-1, keepdim=True).sqrt() + self.eps))", MODEL, RED),
    ("norm: weight left out", "model.py", "return self.weight * x32.to(x.dtype)", "return x32.to(x.dtype)", MODEL, RED),
    ("the two norms of a layer swapped", "model.py",
     "x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)\n        return x + self.mlp(self.post_attention_layernorm(x))",
     "x = x + self.self_attn(self.post_attention_layernorm(x), cos, sin, mask, cache)\n        return x + self.mlp(self.input_layernorm(x))",
     MODEL, RED),
    ("final norm left out", "model.py", "return self.norm(x)", "return x", MODEL, RED),
    ("all biases dropped", "linear.py", "(rows, weight, bias)", "(rows, weight, None)", MODEL, RED),
    ("v bias dropped", "model.py", "v = self.v_proj(x).view", "v = F.linear(x, self.v_proj.weight).view", MODEL, RED),
    ("o bias dropped", "model.py", "return self.o_proj(out.reshape(B, -1, T, self.D).transpose(1, 2).reshape(B, T, -1))",
     "return F.linear(out.reshape(B, -1, T, self.D).transpose(1, 2).reshape(B, T, -1), self.o_proj.weight)", MODEL, RED),
    ("q norm skipped", "model.py", "self.q_norm(self.q_proj(x).view(B, T, -1, self.D))", "(self.q_proj(x).view(B, T, -1, self.D))", MODEL, RED),
    ("q/k norm after the rotation", "model.py", "q, k = rotate(q, cos, sin), rotate(k, cos, sin)",
     "q = self.q_norm(rotate(self.q_proj(x).view(B, T, -1, self.D).transpose(1, 2), cos, sin))\n        k = rotate(k, cos, sin)", MODEL, RED),
    ("key/value heads repeated in the wrong order (prefill)", "model.py",
     "F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)",
     "F.scaled_dot_product_attention(q, *(t.repeat(1, q.shape[1] // t.shape[1], 1, 1) for t in (k, v)), attn_mask=mask, is_causal=mask is None)",
     MODEL, RED),
    ("key/value heads repeated in the wrong order (decoding)", "model.py",
     "F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, self.D).to(k.dtype), k, v, attn_mask=mask)",
     "F.scaled_dot_product_attention(q.reshape(B, -1, k.shape[1], self.D).transpose(1, 2), k, v, attn_mask=mask)"
     ".transpose(1, 2).reshape(B, k.shape[1], -1, self.D)", MODEL, RED),
    ("attention scaled by hidden_size / heads instead of head_dim", "model.py", "attn_mask=mask, is_causal=mask is None, enable_gqa=True)",
     "attn_mask=mask, is_causal=mask is None, enable_gqa=True, scale=(x.shape[-1] / q.shape[1]) ** -0.5)", MODEL, RED),
    ("gate and up swapped", "model.py", "F.silu(self.gate_proj(x)) * self.up_proj(x)", "F.silu(self.up_proj(x)) * self.gate_proj(x)", MODEL, RED),
    ("16-bit product in blocks: every block from the first rows", "linear.py", "part = weight[i:i + size]", "part = weight[:len(weight[i:i + size])]", MODEL, RED),
    # --- model.py: cache and mask
    ("is_causal also behind a filled cache", "model.py", "if T == 1 or past == 0:", "if True:", MODEL, RED),
    ("a new token does not see itself behind a cache", "model.py", "see = (keys <= queries)[None, None]",
     "see = ((keys < queries) | (keys == 0))[None, None]", MODEL, RED),
    ("cache off by one: new keys overwrite the last old one", "model.py", "past = cache.pos if cache is not None else 0",
     "past = max(cache.pos - 1, 0) if cache is not None else 0", MODEL, RED),
    ("cache position moved once per layer", "model.py", "        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]",
     "        self.pos = end\n        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]", MODEL, RED),
    ("cache written for the first layer only", "model.py", "self.v[layer, :, :, self.pos:end] = v", "self.v[0, :, :, self.pos:end] = v", MODEL, RED),
    ("padding visible to real tokens", "model.py", "see = see & (mask[:, None, None, :] | (keys == queries))", "pass", MODEL, RED),
    # --- load_weights.py and config
    ("tie_word_embeddings ignored", "config.py", "tie_word_embeddings=flag(\"tie_word_embeddings\", False)", "tie_word_embeddings=False", MODEL, RED),
    ("folders always loaded as float32", "load_weights.py", "    dtype = DTYPES.get(dtype, dtype)\n", "    dtype = torch.float32\n", MODEL, RED),
    ("rotary table in the model's dtype", "load_weights.py", "lm.model.rotary_emb.to(device)", "lm.model.rotary_emb.to(device, dtype)", MODEL, RED),
    ("rope_theta of the old spelling ignored", "config.py", "for name in (\"rope_theta\", \"original_max_position_embeddings\"):",
     "for name in (\"original_max_position_embeddings\",):", MODEL, RED),
    # --- slot.py
    ("loss not shifted: each token predicts itself", "slot.py", "targets = tokens[:, 1:]\n", "targets = tokens[:, :-1]\n", SLOT, RED),
    ("padding in the loss", "slot.py", "targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)", "pass", SLOT, RED),
    ("left padding predicts the first real token", "slot.py", "~(mask[:, 1:] & mask[:, :-1])", "~mask[:, 1:]", SLOT, RED),
    ("one loss for the batch: mean over all its tokens", "slot.py", "loss = nll.sum(1) / n ", "loss = nll.sum(1) / n.sum() ", SLOT, RED),
    ("Adam eps 1e-8 instead of 1e-5", "slot.py", "BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-5, 1e-8", "BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 1e-8", SLOT, RED),
    ("beta2 0.99 instead of 0.999", "slot.py", "BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999)", "BETAS, EPS, WEIGHT_DECAY = (0.9, 0.99)", SLOT, RED),
    ("weight decay 1e-2 (torch's default)", "slot.py", "1e-5, 1e-8     #", "1e-5, 1e-2     #", SLOT, RED),
    ("weight decay 0", "slot.py", "1e-5, 1e-8     #", "1e-5, 0.0     #", SLOT, INVISIBLE),
    ("fast: Adam bias correction left out", "slot.py", "unbias = [1 - beta ** (step + 1) for beta in BETAS]", "unbias = [1, 1]", SLOT, RED),
    ("fast: wide b not guarded", "slot.py", "if not widest < 60:", "if False:", SLOT, RED),
    ("fast: mean over positions forgotten", "slot.py", "g = weight_gradient(c * p / n[:, None] - y, weight)", "g = weight_gradient(c * p / n[:, None] - y, weight) * n[:, None]", SLOT, RED),
    ("fast: wide b left out of the softmax", "slot.py", "product(h, weight).float().add_(b[i]) if wide else", "product(h, weight) if wide else", SLOT, RED),
    ("fast: z where it is kept taken for E", "slot.py", "[kept] if keep_E and not wide", "[kept] if kept is not None and not wide", SLOT, RED),
    ("fast: loss without max b", "slot.py", "above = above + top_b[i] - b[i][x]", "above = above - b[i][x]", SLOT, RED),
    ("fast: memory that is kept is not counted", "slot.py", "budget -= kept.nbytes", "pass", SLOT, RED),
    ("delta kept in the head's dtype", "slot.py", "delta = torch.zeros(hidden.shape[0], 1, hidden.shape[2], device=hidden.device, requires_grad=True)",
     "delta = torch.zeros(hidden.shape[0], 1, hidden.shape[2], device=hidden.device, requires_grad=True, dtype=dtype)", SLOT, RED),
    # --- generate.py
    ("delta missing at the last prompt position", "generate.py", "        if bias is not None:\n            logits =",
     "        if bias is not None and count > 0:\n            logits =", SLOT, RED),
    ("delta for the first new token only", "generate.py", "        if bias is not None:\n            logits =",
     "        if bias is not None and count == 0:\n            logits =", SLOT, RED),
    ("steps and lr of the command not handed on", "generate.py", "(hidden, tokens, lm.lm_head, steps, lr, mask, **more)",
     "(hidden, tokens, lm.lm_head, steps, 0.01, mask, **more)", SLOT, RED),
    # --- tokenizer.py
    ("streaming: the held-back bytes are dropped at the end", "tokenizer.py", "return self.decoder.decode(b\"\", final=True)", "return \"\"", STREAM, RED),
    ("streaming: every token decoded by itself", "tokenizer.py", "return self.decoder.decode(self.tokenizer.bytes_of(id, self.skip_special))",
     "return self.tokenizer.bytes_of(id, self.skip_special).decode(\"utf-8\", \"replace\")", STREAM, RED),
    ("an added token found before a longer one", "tokenizer.py", "for text in sorted(self.texts, key=len, reverse=True):",
     "for text in sorted(self.texts, key=len):", TOKENIZER, RED),
    # --- bpe.py
    ("merges ranked backwards", "bpe.py", "enumerate(merges or ()):", "enumerate(merges[::-1] if merges else ()):", TOKENIZER, RED),
    ("a token trusted without its joins", "bpe.py", "if len(parts) > 1 or any(self.place(*pair) is None for pair in joins):", "if len(parts) > 1:",
     TOKENIZER, RED),
    ("further pairs of a token forgotten", "bpe.py", "self.more[a, b] = place", "pass", TOKENIZER, RED),
    ("ignore_merges ignored", "bpe.py", "if self.ignore_merges and piece in self.ranks:", "if False:", TOKENIZER, RED),
    # --- compiled.py
    ("compiled: attention sees one key too many", "compiled.py", "device=token.device) > position", "device=token.device) > position + 1", COMPILED, RED),
    ("compiled: every part of the layers with the first part's cache", "compiled.py", "position, keys[part], values[part])",
     "position, keys[parts[0]], values[parts[0]])", COMPILED, RED),
    ("compiled: the span never grows", "compiled.py", "if cache.pos >= span:", "if not span:", COMPILED, RED),
    ("compiled: compiling moves the cache on", "compiled.py", "    cache.pos = start ", "    pass ", COMPILED, RED),
    ("compiled: the halves of a pair swapped", "linear.py", "x[:, 0::2].contiguous()", "x[:, 1::2].contiguous()", COMPILED, RED),
    # --- linear.py
    ("the last rows of W left out of the gradient", "linear.py", "return sums + r[:, most:].float() @ weight[most:].float()", "return sums", MODEL, RED),
    ("gradient of one row: W upside down", "linear.py", "return transposed_cpu(r, ctx.saved_tensors[0])",
     "return transposed_cpu(r, ctx.saved_tensors[0].flip(0))", SLOT, RED),
    ("bias dropped where 16 bits go by way of float32", "linear.py", "out[:, i:i + size] = y if bias is None else y.add_(bias[i:i + size])",
     "out[:, i:i + size] = y", MODEL, RED),
    ("one row, a long x: the parts of W in the wrong order", "linear.py", "parts.transpose(1, 2)).view(1, outputs)", "parts.flip(0).transpose(1, 2)).view(1, outputs)", MODEL, RED),
    ("bias dropped by oneDNN's float32 product", "linear.py", "ONEDNN(x, weight, bias,", "ONEDNN(x, weight, None,", MODEL, RED),
]


def copy_sources(to):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, to)
    (to / "tests").mkdir()
    for path in (ROOT / "tests").iterdir():
        if path.suffix == ".py":
            shutil.copy(path, to / "tests")
        elif path.name != "__pycache__":
            (to / "tests" / path.name).symlink_to(path)
    for path in ROOT.iterdir():
        if path.is_dir() and path.name != "tests" and not path.name.startswith((".", "__")):
            (to / path.name).symlink_to(path)
    if (ROOT.parent / "shared").exists():
        (to.parent / "shared").symlink_to(ROOT.parent / "shared")


def run_tests(root, tests):
    """-> exit status of pytest, the first failing test, its message. In a forked child, so that nothing stays imported."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(root)
        os.dup2(write, 1), os.dup2(write, 2)
        status = 3
        try:
            sys.path[0] = str(root)
            sys.dont_write_bytecode = True
            status = int(pytest.main(["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-rf", *tests.split()]))
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        output = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    failed = re.search(r"^FAILED \S*?::(\S+)(?: - (.*))?", output, re.M)
    message = re.search(r"^\S+?:\d+: (.*)", output, re.M)
    return status, failed[1] if failed else "", message[1] if message else output.strip()[-200:]


def main(words):
    torch.set_num_threads(1)
    chosen = [m for m in MUTATIONS if not words or any(w in m[0] for w in words)]
    wrong = []
    for tests in sorted({m[4] for m in chosen}):
        status, test, message = run_tests(ROOT, tests)
        if status:
            sys.exit(f"without any mutation {tests} is red already: {test} {message}")
    print("| mistake | file | first test to turn red | what it says |\n|---|---|---|---|", flush=True)
    for description, file, old, new, tests, expected in chosen:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "main"
            root.mkdir()
            copy_sources(root)
            source = (root / file).read_text()
            if source.count(old) != 1:
                wrong.append(f"{description}: its text occurs {source.count(old)} times in {file}, not once")
                continue
            (root / file).write_text(source.replace(old, new))
            status, test, message = run_tests(root, tests)
        if status not in (0, 1):
            wrong.append(f"{description}: pytest ended with status {status}: {message}")
        elif (status == 1) != (expected == RED):
            wrong.append(f"{description}: expected {expected}, but the tests are {'red' if status else 'green'} {test} {message}")
        message = re.sub(r"^(E +)?AssertionError: ", "", message.replace(f"{root}/", "")).split(" assert ")[0].replace("|", "/")[:110]
        print(f"| {description} | {file} | {f'`{test}`' if status else 'none: invisible'} | {message if status else ''} |", flush=True)
    red = sum(m[-1] == RED for m in chosen)
    print(f"\n{len(chosen)} mutations, {red} must turn red; {len(wrong)} went otherwise", *wrong, sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
