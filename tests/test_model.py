"""
The model against the reference library, and against itself.

tests/golden/ holds small random models and what transformers 5.23.0 computes on them (see make_golden.py): Llama, Qwen2 and
Qwen3, every rope type, both config spellings, tied and untied, one file and shards. Everything is float32 on the CPU here,
so tolerances are rounding only: the largest difference of a logit measured is 8e-6 where 2e-4 is allowed.
"""
import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import linear
from load_weights import load_model
from model import KVCache

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir())
HALF = {"llama_bf16": torch.bfloat16, "qwen2_f16": torch.float16}

all_folders = pytest.mark.parametrize("name", FOLDERS)


@functools.cache
def load(name, dtype="float32"):
    lm = load_model(GOLDEN / name, dtype=dtype)
    values = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / name / "golden.npz").items()}
    return lm, values


def difference(a, b):
    return (a.float() - b.float()).abs().max().item()


def relative_rms(a, b):
    return ((a.double() - b.double()).pow(2).mean() / b.double().pow(2).mean()).sqrt().item()


def new_cache(lm, batch_size, max_len):
    return KVCache(lm.config, batch_size, max_len, "cpu", next(lm.parameters()).dtype)


def test_there_are_goldens():
    """A renamed folder would let every parametrised test below pass by running nothing."""
    assert len(FOLDERS) == 15


@all_folders
@torch.no_grad()
def test_hidden_and_logits(name):
    """One wrong norm, bias, head order, rotary pair or frequency moves some logit by more than 1e-2."""
    lm, golden = load(name)
    hidden = lm.model(golden["prompt"])
    logits = lm.lm_head(hidden)
    assert hidden.shape == golden["hidden"].shape and logits.shape == golden["logits"].shape
    off_hidden, off_logits = difference(hidden, golden["hidden"]), difference(logits, golden["logits"])
    assert off_hidden < 2e-4, f"{name}: hidden states differ by {off_hidden:.2e}"
    assert off_logits < 2e-4, f"{name}: logits differ by {off_logits:.2e}"


@all_folders
@torch.no_grad()
def test_greedy_with_cache(name):
    """Decoding through the cache: a position that is off by one changes the rotation of every later query, and soon a token."""
    lm, golden = load(name)
    prompt, expected = golden["prompt"], golden["greedy"]
    cache = new_cache(lm, prompt.size(0), prompt.size(1) + expected.size(1))
    hidden, new = lm.model(prompt, cache), []
    for _ in range(expected.size(1)):
        new.append(lm.lm_head(hidden[:, -1]).argmax(-1, keepdim=True))
        hidden = lm.model(new[-1], cache)
    new = torch.cat(new, dim=1)
    wrong = (new != expected).nonzero()
    assert len(wrong) == 0, f"{name}: row {wrong[0, 0]}, new token {wrong[0, 1]}: {new[tuple(wrong[0])]} for {expected[tuple(wrong[0])]}"


@all_folders
@torch.no_grad()
def test_every_split_of_the_prompt(name):
    """Prefill in two parts, cut at every point: the second part's queries must see all cached keys and not their own future.

    PyTorch's `is_causal=True` aligns its triangle to the top left, so with a filled cache it hides the cached keys. That
    only shows when the second part has more than one token, and never in ordinary decoding.
    """
    lm, golden = load(name)
    prompt = golden["prompt"]
    T, whole = prompt.size(1), lm.model(prompt)
    worst = 0.0
    for split in range(1, T):
        cache = new_cache(lm, prompt.size(0), T)
        parts = [lm.model(prompt[:, :split], cache), lm.model(prompt[:, split:], cache)]
        assert cache.pos == T, f"{name}: split at {split}: cache.pos is {cache.pos}, not {T}"
        worst = max(worst, difference(torch.cat(parts, dim=1), whole))
        assert worst < 1e-4, f"{name}: split at {split}: hidden states differ by {worst:.2e}"


@all_folders
@pytest.mark.parametrize("chunk", [1, 5])
@torch.no_grad()
def test_chunked_prefill(name, chunk):
    """One token at a time, and in chunks of five, give the hidden states of the one pass; the cache moves once per forward."""
    lm, golden = load(name)
    prompt = golden["prompt"]
    cache = new_cache(lm, prompt.size(0), prompt.size(1))
    parts = []
    for part in prompt.split(chunk, dim=1):
        before = cache.pos
        parts.append(lm.model(part, cache))
        assert cache.pos == before + part.size(1), f"{name}: cache.pos went from {before} to {cache.pos} for {part.size(1)} tokens"
    off = difference(torch.cat(parts, dim=1), lm.model(prompt))
    assert off < 1e-4, f"{name}: chunks of {chunk}: hidden states differ by {off:.2e}"


@torch.no_grad()
def test_cache_refuses_more_than_it_holds():
    """Writing past the end must not wrap around or be dropped: both give fluent nonsense."""
    lm, golden = load("qwen2")
    cache = new_cache(lm, 1, 8)
    lm.model(golden["prompt"][:1, :8], cache)
    with pytest.raises(ValueError):
        lm.model(golden["prompt"][:1, 8:9], cache)


@all_folders
@torch.no_grad()
def test_a_row_alone_is_a_row_in_the_batch(name):
    """Nothing may leak between the samples of a batch, neither in the forward pass nor through the cache."""
    lm, golden = load(name)
    prompt = golden["prompt"]
    cache = new_cache(lm, 2, prompt.size(1))
    together = torch.cat([lm.model(prompt[:, :-1], cache), lm.model(prompt[:, -1:], cache)], dim=1)
    for row in range(2):
        off = difference(lm.model(prompt[row:row + 1]), together[row:row + 1])
        assert off < 1e-4, f"{name}: row {row} alone differs from the row in the batch by {off:.2e}"


@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("name", ["llama31", "qwen2", "qwen3_tied_yarn"])
@torch.no_grad()
def test_padding_changes_nothing(name, side):
    """Rows of different length, garbage in the padding: each real token's hidden state is that of its row alone.

    A model that lets a real token see padding fails at once. One that takes the column for the position does not, with the
    padding on one side: rotary positions count only by their differences. Padding in the middle of a row shows it.
    Then three tokens are decoded through the cache of the left-padded batch.
    """
    lm, golden = load(name)
    T, cut = golden["prompt"].size(1), 9
    rows = [golden["prompt"][0], golden["prompt"][1, :T - cut]]
    tokens = torch.randint(0, lm.config.vocab_size, (2, T), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, T, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = {"left": torch.arange(T - len(row), T), "right": torch.arange(len(row)),
                 "middle": torch.arange(len(row)) + (T - len(row)) * (torch.arange(len(row)) >= 5)}[side]
        tokens[i, where], mask[i, where] = row, True
    cache = new_cache(lm, 2, T + 3)
    hidden = lm.model(tokens, cache, mask)
    for i, row in enumerate(rows):
        off = difference(hidden[i, mask[i]], lm.model(row[None])[0])
        assert off < 1e-4, f"{name}: {side}-padded row {i} differs from the row alone by {off:.2e}"
    if side == "left":
        for step in range(3):
            rows = [torch.cat([row, golden["greedy"][i, step:step + 1]]) for i, row in enumerate(rows)]
            hidden = lm.model(golden["greedy"][:, step:step + 1], cache)
            for i, row in enumerate(rows):
                off = difference(hidden[i, -1], lm.model(row[None])[0, -1])
                assert off < 1e-4, f"{name}: new token {step} of padded row {i} differs by {off:.2e}"


@pytest.mark.parametrize("name", HALF)
@torch.no_grad()
def test_half_precision_folders(name):
    """In their own dtype these folders stay in it, and their logits stay near the float32 ones.

    The tolerance is on the root mean square, relative to that of the logits: 3 % for bfloat16 (8 bits), 0.5 % for float16
    (11 bits). transformers, on the same folders, is off by 2.0 % and 0.25 %; small sharp random models amplify rounding.
    """
    lm, golden = load(name, "auto")
    assert {p.dtype for p in lm.parameters()} == {HALF[name]}, f"{name} was loaded as {next(lm.parameters()).dtype}"
    prompt, expected = golden["prompt"], golden["logits"]
    for rows, chunk in [(2, prompt.size(1)), (1, 1), (2, 1), (2, 5)]:           # one row, few and many take different kernels
        cache = new_cache(lm, rows, prompt.size(1))
        logits = torch.cat([lm.lm_head(lm.model(part, cache)) for part in prompt[:rows].split(chunk, dim=1)], dim=1)
        assert logits.dtype == HALF[name]
        off = relative_rms(logits, expected[:rows])
        assert off < {torch.bfloat16: 0.03, torch.float16: 0.005}[HALF[name]], \
            f"{name}, {rows} rows in chunks of {chunk}: relative rms error {off:.2e}"


CLOSE = {torch.bfloat16: 0.004, torch.float16: 0.0005, torch.float32: 5e-6}


@pytest.mark.parametrize("outputs, inputs", [(5, 64), (100, 64), (1024, 64), (2500, 64), (4096, 64), (20001, 64), (16, 4104)])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 1), (2, 20), (520,)])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", CLOSE)
@torch.no_grad()
def test_products(dtype, native, rows, outputs, inputs, monkeypatch):
    """Linear takes different ways for one row, few and many, long weights in blocks, and by what the CPU can: each is x Wᵀ + b,
    rounded once. Both ways are tried on every CPU (one without 16-bit products in hardware computes them slowly)."""
    monkeypatch.setitem(linear.NATIVE_GEMM, dtype, native)
    g = torch.Generator().manual_seed(0)
    layer = linear.Linear(inputs, outputs, bias=True)
    layer.weight.data = torch.randn(outputs, inputs, generator=g).to(dtype)
    layer.bias.data = torch.randn(outputs, generator=g).to(dtype)
    x = torch.randn(*rows, inputs, generator=g).to(dtype)
    y = layer(x)
    assert y.shape == (*rows, outputs) and y.dtype == dtype
    off = relative_rms(y.double(), x.double() @ layer.weight.double().T + layer.bias.double())
    assert off < CLOSE[dtype], f"relative rms error {off:.1e}"
    z = linear.product(x.view(-1, inputs), layer.weight)
    assert z.shape == (x.numel() // inputs, outputs) and z.dtype == (dtype if native else torch.float32)
    off = relative_rms(z.double(), x.double().view(-1, inputs) @ layer.weight.double().T)
    assert off < CLOSE[dtype], f"relative rms error of W h {off:.1e}"


@pytest.mark.parametrize("outputs", [5, 100, 4096, 9001])
@pytest.mark.parametrize("dtype", CLOSE)
def test_transposed_products(dtype, outputs):
    """r W, by itself and as the gradient that autograd asks for: of x alone where the weight is frozen, of all where it is not."""
    g = torch.Generator().manual_seed(0)
    layer = linear.Linear(64, outputs, bias=True).to(dtype)
    layer.weight.data = torch.randn(outputs, 64, generator=g).to(dtype)
    layer.bias.data = torch.randn(outputs, generator=g).to(dtype)
    for B in (1, 3):
        r = torch.randn(B, outputs, generator=g).to(dtype)
        true = r.double() @ layer.weight.double()
        off = relative_rms(linear.transposed_cpu(r, layer.weight).double(), true)
        assert off < CLOSE[dtype], f"relative rms error of r W {off:.1e}"
        for frozen in (True, False):
            layer.requires_grad_(not frozen)
            x = torch.randn(B, 64, generator=g).to(dtype).requires_grad_()
            y = layer(x)
            y.backward(r)
            assert relative_rms(y.double(), x.double() @ layer.weight.double().T + layer.bias.double()) < CLOSE[dtype]
            assert relative_rms(x.grad.double(), true) < CLOSE[dtype]
            assert (layer.weight.grad is None) == frozen
            if not frozen:
                assert relative_rms(layer.weight.grad.double(), r.double().T @ x.double()) < CLOSE[dtype]
                assert relative_rms(layer.bias.grad.double(), r.double().sum(0)) < CLOSE[dtype]
                layer.weight.grad = layer.bias.grad = None


def test_a_bias_alone_can_be_trained():
    """As in BitFit: the weight is frozen, its bias is not."""
    for rows in (1, 3):
        layer = linear.Linear(4, 5, bias=True)
        layer.weight.requires_grad_(False).zero_()
        layer(torch.ones(rows, 4)).sum().backward()
        assert layer.bias.grad.tolist() == [rows] * 5


def test_a_slice_is_multiplied_without_a_copy_of_the_weight():
    """hidden[:, :-1], which SLOT takes, is a case in which torch would copy the whole weight, once for every sample."""
    layer = linear.Linear(64, 1 << 16).requires_grad_(False)
    layer.weight.data.zero_()
    x = torch.zeros(2, 30, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        layer(x[:, :-1])
        layer(x[:1, :-1])
        layer(x[:, -1:])
    made = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert made < 2.5 * 4 * (3 * 29 + 2) * (1 << 16), f"{made} bytes were allocated on the way"


@pytest.mark.parametrize("name", HALF)
def test_rotary_angles_stay_float32(name):
    """A table of frequencies in bfloat16 is off by up to 0.4 %: at position 10,000 that is many whole turns, on the few
    dozen tokens of the goldens it hides in the rounding of everything else. So the table is looked at by itself, far out."""
    far = torch.tensor([[0, 1, 10_000, 100_000]])
    for own, wide in zip(load(name, "auto")[0].model.rotary_emb(far), load(name)[0].model.rotary_emb(far)):
        assert own.dtype == torch.float32, f"{name}: cos and sin are {own.dtype}"
        assert difference(own, wide) == 0, f"{name}: cos or sin differ by {difference(own, wide):.1e} from the float32 model's"


@all_folders
def test_tied_head_is_one_matrix(name):
    """A tied model keeps one matrix, not two equal ones; an untied one must not lose its own head."""
    lm, _ = load(name)
    tied = lm.lm_head.weight.data_ptr() == lm.model.embed_tokens.weight.data_ptr()
    assert tied == ("tied" in name) == lm.config.tie_word_embeddings
