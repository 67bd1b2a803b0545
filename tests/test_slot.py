"""
The test-time loop against the method authors' public code, against calculus, and against itself.

golden/slot_*.npz: the authors' loop on three golden models (make_golden.py, which first shows that its copy of that loop
reproduces runs of their own code). shared/data/slot_reference, where it is present: those runs themselves.

AdamW divides by the size of the gradient, so rounding in a tiny gradient can come out as a step of up to lr: that, and not a
different method, is what the tolerances on δ leave room for. Measured here: 8e-6 against the authors' runs where 1e-4 is
allowed, 5e-6 against float64 where 2e-5 is.
"""
import functools
import math
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import linear
from linear import Linear
from load_weights import load_model
from model import KVCache
import slot
from slot import optimize_delta, optimize_delta_fast

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = Path(__file__).resolve().parents[2] / "shared/data/slot_reference"
MODELS = sorted(p.stem.removeprefix("slot_") for p in GOLDEN.glob("slot_*.npz"))

both_forms = pytest.mark.parametrize("optimize", [optimize_delta, optimize_delta_fast])


@functools.cache
def load(folder):
    return load_model(folder, dtype="float32")


@functools.cache
def golden_runs(name):
    values = np.load(GOLDEN / f"slot_{name}.npz")
    return [{key: values[f"{key}{k}"] for key in ("steps", "lr", "row", "delta", "losses", "new")} for k in range(values["runs"])]


@functools.cache
def golden_prompt(name):
    return torch.from_numpy(np.load(GOLDEN / name / "golden.npz")["prompt"])


@torch.no_grad()
def decode(lm, prompt, delta, new_tokens):
    """Greedy decoding with h + δ, written out here so that this file tests slot.py alone. prompt (B, T), delta (B, 1, d)."""
    cache = KVCache(lm.config, prompt.size(0), prompt.size(1) + new_tokens, "cpu", torch.float32)
    hidden, new = lm.model(prompt, cache), []
    for _ in range(new_tokens):
        new.append(lm.lm_head(hidden[:, -1:] + delta).argmax(-1))
        hidden = lm.model(new[-1], cache)
    return torch.cat(new, dim=1)


class Head(Linear):
    """A random output head of width d over V tokens."""
    def __init__(self, d, V, scale=1.0, seed=0):
        super().__init__(d, V)
        self.weight.data = torch.randn(V, d, generator=torch.Generator().manual_seed(seed)) * scale / d ** 0.5
        self.requires_grad_(False)


def random_case(n, V, d, scale=1.0, B=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, n, d, generator=g), torch.randint(0, V, (B, n), generator=g), Head(d, V, scale, seed + 1)


def exact_delta(hidden, tokens, head, steps, lr):
    """The method in float64 with autograd, one sample: what both forms approximate. -> δ (d), losses (steps)."""
    hidden, W = hidden.double(), head.weight.double()
    delta = torch.zeros(hidden.size(-1), dtype=torch.float64, requires_grad=True)
    optimizer, losses = torch.optim.AdamW([delta], lr=lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=1e-8), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy((hidden[:-1] + delta) @ W.T, tokens[1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return delta.detach(), torch.tensor(losses, dtype=torch.float64)


# --- against the authors' code --------------------------------------------------------------------------------------------


@both_forms
@pytest.mark.parametrize("name", MODELS)
def test_authors_runs_on_golden_models(name, optimize):
    """δ, every step's loss and 32 greedy tokens. An unshifted loss, another optimiser setting or a δ that misses the last
    prompt position changes one of the three."""
    lm, prompt = load(GOLDEN / name), golden_prompt(name)
    assert len(golden_runs(name)) == 10
    for run in golden_runs(name):
        row, steps, lr = prompt[run["row"]][None], int(run["steps"]), float(run["lr"])
        delta, losses = optimize(lm.model(row), row, lm.lm_head, steps, lr)
        assert delta.shape == (1, 1, lm.config.hidden_size) and delta.dtype == torch.float32 and losses.shape == (steps, 1)
        off = (delta[0, 0] - torch.from_numpy(run["delta"])).abs().max().item()
        off_loss = (losses[:, 0] - torch.from_numpy(run["losses"])).abs().max().item() if steps else 0.0
        what = f"{name} row {run['row']}, {steps} steps of {lr}"
        assert off < 1e-4, f"{what}: delta differs by {off:.1e}"
        assert off_loss < 1e-5, f"{what}: losses differ by {off_loss:.1e}"
        assert decode(lm, row, delta, len(run["new"]))[0].tolist() == run["new"].tolist(), f"{what}: tokens differ"


@both_forms
@pytest.mark.parametrize("name", MODELS)
def test_authors_runs_as_a_batch(name, optimize):
    """The authors' code has one δ for a whole batch; here each prompt of a batch gets what it gets alone."""
    lm, prompt = load(GOLDEN / name), golden_prompt(name)
    runs = [r for r in golden_runs(name) if r["steps"] == 5]
    delta, losses = optimize(lm.model(prompt), prompt, lm.lm_head, 5, 0.1)
    new = decode(lm, prompt, delta, len(runs[0]["new"]))
    assert losses.shape == (5, 2)
    for run in runs:
        off = (delta[run["row"], 0] - torch.from_numpy(run["delta"])).abs().max().item()
        assert off < 1e-4, f"{name} row {run['row']} of the batch: delta differs by {off:.1e}"
        assert new[run["row"]].tolist() == run["new"].tolist(), f"{name} row {run['row']} of the batch: tokens differ"


@both_forms
@pytest.mark.skipif(not REFERENCE.exists(), reason="shared/data/slot_reference is not here: runs of the authors' own code")
def test_authors_own_runs(optimize):
    """Six of six."""
    lm, runs = load(REFERENCE / "model"), np.load(REFERENCE / "runs.npz")
    for k in range(6):
        prompt, (steps, lr) = torch.from_numpy(runs[f"ids{k}"]).long().view(1, -1), runs[f"set{k}"]
        delta, _ = optimize(lm.model(prompt), prompt, lm.lm_head, int(steps), float(lr))
        off = (delta[0, 0] - torch.from_numpy(runs[f"delta{k}"])).abs().max().item()
        assert off < 1e-4, f"run {k} ({steps:.0f} steps of {lr}): delta differs by {off:.1e}"
        assert decode(lm, prompt, delta, len(runs[f"new{k}"]))[0].tolist() == runs[f"new{k}"].tolist(), f"run {k}: tokens differ"


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_generate_is_the_authors_run(name, fast):
    """generate.py's own path, W δ as a constant on the logits: δ must count for the very first new token, which comes from
    the last prompt position, and for every one after it."""
    from generate import generate

    lm, prompt = load(GOLDEN / name), golden_prompt(name)
    for run in golden_runs(name):
        steps, lr, expected = int(run["steps"]), float(run["lr"]), run["new"].tolist()
        new = list(generate(lm, prompt[run["row"]], len(expected), slot_steps=steps, slot_lr=lr, slot_fast=fast))
        at = next((i for i, (a, b) in enumerate(zip(new, expected)) if a != b), min(len(new), len(expected)))
        assert new == expected, f"{name} row {run['row']}, {steps} steps of {lr}: differs from new token {at + 1} on"


# --- the two forms, and calculus ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps,lr", [(1, 0.1), (5, 0.1), (20, 0.1), (20, 0.01)])
@pytest.mark.parametrize("n,V,d,scale", [(2, 50, 16, 1), (17, 300, 32, 1), (64, 1000, 64, 4), (40, 257, 48, 30), (40, 257, 48, 100)])
def test_both_forms_are_the_method(n, V, d, scale, steps, lr):
    """Against float64, from a two-token prompt to heads whose rows are so large that b = Wδ spreads over hundreds of nats:
    there, E c underflows in float32 and δ becomes NaN, unless the fast form notices and takes another way."""
    hidden, tokens, head = random_case(n, V, d, scale)
    exact, exact_losses = exact_delta(hidden[0], tokens[0], head, steps, lr)
    delta, losses = optimize_delta(hidden, tokens, head, steps, lr)
    fast, fast_losses = optimize_delta_fast(hidden, tokens, head, steps, lr)
    for form, d_, l_ in [("readable", delta, losses), ("fast", fast, fast_losses)]:
        off, off_loss = (d_[0, 0] - exact).abs().max().item(), ((l_[:, 0] - exact_losses).abs() / exact_losses.clamp(min=1)).max().item()
        assert off < 2e-5, f"{form} form: delta differs from float64 by {off:.1e}"
        assert off_loss < 1e-5, f"{form} form: losses differ from float64 by {off_loss:.1e} of their size"
    off = (delta - fast).abs().max().item()
    assert off < 2e-5, f"the two forms differ by {off:.1e}"


@pytest.mark.parametrize("scale", [1, 60])
def test_gradient_of_the_fast_form(scale, monkeypatch):
    """g = Wᵀ(p - y), as the fast form hands it to AdamW in each of four steps, against autograd and against finite
    differences, both in float64 at the δ of that step. AdamW hides the gradient's size, so δ alone would not show all of it."""
    hidden, tokens, head = random_case(20, 120, 24, scale)
    seen, inner = [], slot.weight_gradient
    monkeypatch.setattr(slot, "weight_gradient", lambda *args: seen.append(inner(*args)) or seen[-1])
    optimize_delta_fast(hidden, tokens, head, 4, 0.1)
    seen = seen[-4:]                    # a wide spread of b makes the loop run twice; the second run counts

    def loss(delta):
        return F.cross_entropy((hidden[0, :-1].double() + delta) @ head.weight.double().T, tokens[0, 1:])

    for step, g in enumerate(seen):
        delta = exact_delta(hidden[0], tokens[0], head, step, 0.1)[0].requires_grad_(True)
        exact, = torch.autograd.grad(loss(delta), delta)
        bumps = 1e-6 * torch.eye(24, dtype=torch.float64)
        finite = torch.stack([(loss(delta.detach() + e) - loss(delta.detach() - e)) / 2e-6 for e in bumps])
        size = exact.abs().max().item()
        off, off_finite = (g[0] - exact).abs().max().item() / size, (g[0] - finite).abs().max().item() / size
        assert off < 1e-4, f"step {step}: gradient differs from autograd by {off:.1e} of its size"
        assert off_finite < 1e-4, f"step {step}: gradient differs from finite differences by {off_finite:.1e} of its size"


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-4)])
def test_small_memory_same_numbers(dtype, tolerance, native, monkeypatch):
    """With room for E of all positions; for z of some; for nothing: slower, but the same δ and losses."""
    monkeypatch.setitem(linear.NATIVE_GEMM, dtype, native)
    hidden, tokens, head = random_case(33, 150, 24, B=2)
    hidden, head = hidden.to(dtype), head.to(dtype)
    delta, losses = optimize_delta_fast(hidden, tokens, head, 5, 0.1)
    for memory in (1, 24 * 150 * 5, 24 * 150 * 20):
        blocked, blocked_losses = optimize_delta_fast(hidden, tokens, head, 5, 0.1, memory=memory)
        off, off_loss = (blocked - delta).abs().max().item(), (blocked_losses - losses).abs().max().item()
        assert off < tolerance and off_loss < tolerance, f"memory={memory}: delta differs by {off:.1e}, losses by {off_loss:.1e}"


@pytest.mark.parametrize("lr", [0.1, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_a_bound(dtype, lr, monkeypatch):
    """Products W h that are alive at a time, and what is made of them, stay below `memory`; as many as fit are kept. At the large
    lr b spreads so far that the steps are repeated without what was kept."""
    n, V, B, steps = 300, 2000, 2, 4
    hidden, tokens, head = random_case(n + 1, V, 16, B=B)
    hidden, head = hidden.to(dtype), head.to(dtype)
    alive, most, calls = [], 0, 0

    def product(h, weight):
        nonlocal alive, most, calls
        z = linear.product(h, weight)
        alive, calls = [ref for ref in alive if ref() is not None] + [weakref.ref(z)], calls + 1
        most = max(most, sum(ref().nbytes for ref in alive))
        return z

    monkeypatch.setattr(slot, "product", product)
    memory = 4 * V * n * B // 3                                     # E of a third
    rows = memory // (32 * V)
    blocks = B * math.ceil(n / rows)
    optimize_delta_fast(hidden, tokens, head, steps, lr, memory=memory)
    assert most < memory, f"{most} bytes of {memory}"
    passes = 1 if lr < 1 else 2
    assert (passes - 1) * steps * blocks + blocks < calls < passes * steps * blocks, f"{calls} products of {blocks} blocks"


@both_forms
def test_model_is_untouched(optimize):
    """Not one weight may change, nor anything but δ get a gradient: the head's would be as large as the head itself."""
    lm, prompt = load_model(GOLDEN / "qwen2", dtype="float32"), golden_prompt("qwen2")
    before = {k: v.clone() for k, v in lm.state_dict().items()}
    hidden = lm.model(prompt)
    kept = hidden.clone()
    for p in lm.parameters():          # even when a caller forgot to freeze the model
        p.requires_grad_(True)
    hidden.requires_grad_(True)
    delta, losses = optimize(hidden, prompt, lm.lm_head, 3, 0.1)
    assert not delta.requires_grad and not losses.requires_grad
    assert hidden.grad is None and all(p.grad is None for p in lm.parameters()), "a gradient beside δ's was computed"
    assert torch.equal(hidden, kept) and all(torch.equal(v, before[k]) for k, v in lm.state_dict().items())
    assert all(p.requires_grad for p in lm.parameters()), "requires_grad of the caller's weights was changed"


@both_forms
def test_works_inside_no_grad(optimize):
    """Callers decode under no_grad; the loop must switch gradients on for itself, or δ silently stays zero."""
    hidden, tokens, head = random_case(10, 40, 16)
    outside, _ = optimize(hidden, tokens, head, 2, 0.1)
    with torch.no_grad():
        inside, _ = optimize(hidden, tokens, head, 2, 0.1)
    assert outside.abs().max() > 0.01 and torch.equal(inside, outside)


@both_forms
def test_global_state_is_untouched(optimize):
    """No seed, no gradient mode, no default dtype: two runs give the same bits, and the caller's random numbers go on."""
    hidden, tokens, head = random_case(10, 40, 16)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, _ = optimize(hidden, tokens, head, 4, 0.1)
    assert torch.equal(torch.rand(1), expected) and torch.is_grad_enabled()
    assert torch.equal(optimize(hidden, tokens, head, 4, 0.1)[0], first)


@both_forms
@pytest.mark.parametrize("V", [200, 203])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_head_gets_a_float32_delta(dtype, V, optimize):
    """In bfloat16 a step of 0.01 is lost beside a hidden state of size 4. δ stays float32, near that of the float32 head.
    (203 is odd: a product in eight parts must not forget the rest.)"""
    hidden, tokens, head = random_case(24, V, 32, seed=5)
    exact, _ = exact_delta(hidden[0].to(dtype), tokens[0], head.to(dtype), 5, 0.01)
    delta, losses = optimize(hidden.to(dtype), tokens, head, 5, 0.01)
    assert delta.dtype == torch.float32, f"delta is {delta.dtype}"
    assert torch.isfinite(losses).all()
    off = (delta[0, 0] - exact).abs().max().item()
    assert off < 5e-3, f"{dtype}: delta differs from the float64 one by {off:.1e} (one step is 1e-2)"


# --- edges ----------------------------------------------------------------------------------------------------------------


@both_forms
def test_zero_steps_is_the_plain_model(optimize):
    hidden, tokens, head = random_case(7, 40, 16, B=3)
    delta, losses = optimize(hidden, tokens, head, 0, 0.1)
    assert delta.shape == (3, 1, 16) and delta.dtype == torch.float32 and (delta == 0).all()
    assert losses.shape == (0, 3)
    assert torch.equal(head(hidden + delta), head(hidden))


@pytest.mark.filterwarnings("ignore:a prompt of one token")
@both_forms
def test_one_token_prompt_has_nothing_to_learn(optimize):
    """No next token, no loss: the mean over nothing is NaN, and one NaN in δ is a NaN in every logit."""
    hidden, tokens, head = random_case(1, 40, 16, B=2)
    other = torch.nn.Linear(16, 40, bias=False).requires_grad_(False)
    other.weight.data = head.weight.data
    for lm_head in (head, other):
        delta, losses = optimize(hidden, tokens, lm_head, 3, 0.1)
        assert (delta == 0).all() and losses.shape == (3, 2) and torch.isfinite(losses).all()


@pytest.mark.filterwarnings("ignore:a prompt of one token")
@both_forms
def test_one_token_row_in_a_batch(optimize):
    """The same for one row of a batch: it gets zero, and the others what they get alone."""
    hidden, tokens, head = random_case(9, 40, 16, B=2)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :-1] = False
    delta, losses = optimize(hidden, tokens, head, 3, 0.1, mask)
    alone, _ = optimize(hidden[:1], tokens[:1], head, 3, 0.1)
    off, off_other = delta[1].abs().max().item(), (delta[0] - alone[0]).abs().max().item()
    assert off == 0, f"delta of a row with one token is {off:.1e}"
    assert off_other < 1e-5, f"delta of the row beside it differs from the prompt alone by {off_other:.1e}"
    assert torch.isfinite(losses).all()


@both_forms
@pytest.mark.parametrize("steps,lr", [(-1, 0.1), (1.5, 0.1), (3, 0.0), (3, -0.1), (3, float("nan")), (3, float("inf"))])
def test_impossible_settings(steps, lr, optimize):
    hidden, tokens, head = random_case(5, 40, 16)
    with pytest.raises(ValueError) as error:
        optimize(hidden, tokens, head, steps, lr)
    assert "\n" not in str(error.value) and ("step" in str(error.value) or "lr" in str(error.value)), str(error.value)


@both_forms
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_learnt_from(side, optimize):
    """A batch of prompts of length 4, 11 and 19 gives each what it gets alone, whatever stands in the padding.

    Left padding has one more trap: the last padding column must not be made to predict the first real token.
    """
    lengths, T, V, d = [4, 11, 19], 19, 60, 24
    hidden, tokens, head = random_case(T, V, d, B=3, seed=2)
    hidden, mask = hidden * 3, torch.zeros(3, T, dtype=torch.bool)
    parts = []
    for i, n in enumerate(lengths):
        where = slice(T - n, T) if side == "left" else slice(0, n)
        mask[i, where] = True
        parts.append((hidden[i:i + 1, where].clone(), tokens[i:i + 1, where].clone()))
    hidden[~mask] = 1e4 * torch.randn(int((~mask).sum()), d, generator=torch.Generator().manual_seed(0))
    delta, losses = optimize(hidden, tokens, head, 5, 0.1, mask)
    for i, (h, t) in enumerate(parts):
        alone, alone_losses = optimize(h, t, head, 5, 0.1)
        off, off_loss = (delta[i] - alone[0]).abs().max().item(), (losses[:, i] - alone_losses[:, 0]).abs().max().item()
        assert off < 1e-5, f"{side}-padded row {i}: delta differs from the prompt alone by {off:.1e}"
        assert off_loss < 1e-5, f"{side}-padded row {i}: losses differ by {off_loss:.1e}"


@both_forms
def test_loss_falls(optimize):
    """The loss is convex in δ and the first steps are far from its minimum."""
    lm, prompt = load(GOLDEN / "qwen2"), golden_prompt("qwen2")
    _, losses = optimize(lm.model(prompt), prompt, lm.lm_head, 5, 0.05)
    assert (losses.diff(dim=0) < 0).all(), f"losses {losses.tolist()}"
