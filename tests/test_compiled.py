"""
The compiled step is the model: the same logits at every position, also where the span of the cache that it looks at grows, the
same greedy tokens with SLOT and without. Compiling takes some ten seconds a model, so there are few of them here: together they
have biases, q/k norm, tied heads, a scaled rotation, and each dtype.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import compiled
import linear
from generate import decode, generate, prefill
from load_weights import load_model
from model import KVCache

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")          # torch's own, while it compiles
needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler (g++, or CXX)")


def load(name, dtype):
    golden = np.load(GOLDEN / name / "golden.npz")
    return load_model(GOLDEN / name, dtype=dtype), torch.from_numpy(golden["prompt"]), torch.from_numpy(golden["greedy"])


@needs_compiler
@pytest.mark.parametrize("name, dtype, tolerance", [
    ("llama_biases", "float32", 1e-4), ("qwen3_tied_yarn", "float32", 1e-4), ("qwen2_tied", "bfloat16", 0.03), ("qwen2_f16", "float16", 0.005)])
@torch.no_grad()
def test_logits_are_the_models(name, dtype, tolerance, monkeypatch):
    """float32: the largest difference. 16 bits: the root mean square of what is off from float32, relative to the logits', as in
    test_model.py."""
    monkeypatch.setattr(compiled, "SPAN", 8)                        # grows three times on the way
    monkeypatch.setattr(compiled, "TOGETHER", 1)                    # one program for every layer in turn
    lm, prompt, greedy = load(name, dtype)
    exact = load(name, "float32")[0]
    row = torch.cat([prompt, greedy], 1)[:1, :26]
    caches = [KVCache(lm.config, 1, 26, dtype=m.lm_head.weight.dtype) for m in (exact, lm)]
    for m, cache in zip((exact, lm), caches):
        m.model(row[:, :5], cache)
    step = compiled.compile_step(lm, caches[1])
    assert caches[1].pos == 5, "compiling moved the cache on"
    programs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for i in range(5, 26):
        token = torch.tensor([[row[0, i].item()]])                  # as decode() makes it: a slice of another layout is compiled for
        true, got = exact(token, caches[0])[:, -1], step(token)
        assert got.shape == true.shape and got.dtype == torch.float32 and caches[1].pos == i + 1
        off = (got - true).abs().max() if dtype == "float32" else (got - true).pow(2).mean().sqrt() / true.pow(2).mean().sqrt()
        assert off < tolerance, f"{name}, position {i}: logits differ by {off:.1e}"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == programs > 0, "something was compiled in mid-answer"
    with pytest.raises(ValueError, match="one more token does not fit in max_len 26"):
        step(row[:, :1])


@needs_compiler
def test_generate_gives_the_same_tokens():
    lm, prompt, greedy = load("qwen3_tied_yarn", "float32")
    ids = prompt[0].tolist()
    plain = list(generate(lm, ids, len(greedy[0]), compiled=True))
    assert plain == greedy[0].tolist()
    slot = dict(slot_steps=5, slot_lr=0.1)
    assert list(generate(lm, ids, 20, compiled=True, **slot)) == list(generate(lm, ids, 20, **slot)) != plain[:20]
    assert list(generate(lm, ids, 0, compiled=True)) == []


@needs_compiler
def test_a_cache_put_back_is_answered_from_again():
    """--compare answers twice from one prefill."""
    lm, prompt, greedy = load("qwen3_tied_yarn", "float32")
    hidden, tokens, _, cache = prefill(lm, [prompt[0].tolist()], len(greedy[0]))
    step = compiled.compile_step(lm, cache)
    for _ in range(2):
        cache.pos = tokens.shape[1]
        assert [ids[0] for ids in decode(lm, hidden[:, -1:], cache, len(greedy[0]), step=step)] == greedy[0].tolist()


@pytest.mark.parametrize("dtype, shape", [
    (torch.float32, (7, 12)), (torch.float16, (7, 12)), (torch.bfloat16, (7, 12)), (torch.bfloat16, (7, 9)), (torch.bfloat16, (7, 8192))])
def test_products_of_pairs(dtype, shape):
    """The loop's arithmetic, uncompiled: exact, of weights at an odd place in a file too."""
    g = torch.Generator().manual_seed(0)
    for start in (0, 1):
        stored = torch.randn(start + shape[0] * shape[1], generator=g).to(dtype)
        weight, x = stored[start:].view(shape), torch.randn(1, shape[1], generator=g)
        y = linear.one_row_compiled(x, linear.weight_words(weight), torch.ones(7, dtype=dtype))
        assert y.dtype == torch.float32 and torch.allclose(y, x @ weight.float().T + 1, atol=3e-6 * shape[1] ** 0.5)


def test_batches_are_refused():
    lm, prompt, _ = load("qwen2", "float32")
    with pytest.raises(ValueError, match="decodes one prompt, not a batch"):
        compiled.compile_step(lm, KVCache(lm.config, 2, 4))


def test_no_compiler_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "generate.py", "--compile", "--raw", "--prompt", "a"], capture_output=True, text=True,
                          env=os.environ | {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith("generate.py: --compile: torch.compile fails here") and "g++" in last and "/no/such/compiler" in last
