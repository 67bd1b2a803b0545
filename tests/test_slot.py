"""SLOT against its authors' public code, against calculus, and against itself.

golden/slot_*.npz: the authors' loop on three golden models (make_golden.py, which first shows that its
copy of that loop reproduces runs of their own code). shared/data/slot_reference, where it is present:
those runs.

The tests run twice: with the loop of slot.py, and with the closed form of speed/delta.py, whose
arguments and results are the same. AdamW divides by the size of the gradient, so rounding in a tiny
gradient can come out as a step of up to lr: that, and not another method, is what the tolerances on δ
leave room for. Measured here: 5e-6 against the authors' runs where 1e-4 is allowed, 6e-6 against
float64 where 2e-5 is.
"""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from load_weights import load_model
from slot import decode, generate, likeliest, optimize_delta, prefill, prompt_loss, steer
from slot_cases import (FAMILIES, GOLDEN, MODELS, REFERENCE, both_forms, float64_delta, float64_loss,
                        golden_prompt, golden_runs, greedy, hidden_of, largest, load, random_case)

models = pytest.mark.parametrize("name", MODELS)


# ---- against the authors' code ---------------------------------------------------------------------------


@both_forms
@models
def test_authors_runs_on_golden_models(name, optimize):
    """δ, every step's loss and 32 greedy tokens. An unshifted loss, another optimiser setting or a δ
    that misses the last prompt position changes one of the three."""
    lm, prompt = load(GOLDEN / name), golden_prompt(name)
    assert len(golden_runs(name)) == 10
    for run in golden_runs(name):
        tokens, steps, lr = prompt[run["row"]].tolist(), int(run["steps"]), float(run["lr"])
        delta, losses = optimize(hidden_of(lm, tokens), tokens, lm.lm_head, steps, lr)
        assert delta.shape == (1, 1, lm.config.hidden_size) and delta.dtype == torch.float32
        assert losses.shape == (steps + 1,) and losses.dtype == torch.float32
        what = f"{name} row {run['row']}, {steps} steps of {lr}"
        off = largest(delta[0, 0] - torch.from_numpy(run["delta"]))
        assert off < 1e-4, f"{what}: delta differs by {off:.1e}"
        if steps:                                       # the authors' loop sees a loss before each step only
            off = largest(losses[:-1] - torch.from_numpy(run["losses"]))
            assert off < 1e-5, f"{what}: losses differ by {off:.1e}"
        assert greedy(lm, tokens, delta, len(run["new"])) == run["new"].tolist(), f"{what}: tokens differ"


@both_forms
@pytest.mark.skipif(not REFERENCE.exists(), reason="no shared/data/slot_reference: the authors' own runs")
def test_authors_own_runs(optimize):
    """Six of six."""
    lm, runs = load(REFERENCE / "model"), np.load(REFERENCE / "runs.npz")
    for k in range(6):
        tokens, (steps, lr), new = runs[f"ids{k}"].flatten().tolist(), runs[f"set{k}"], runs[f"new{k}"]
        delta, _ = optimize(hidden_of(lm, tokens), tokens, lm.lm_head, int(steps), float(lr))
        off = largest(delta[0, 0] - torch.from_numpy(runs[f"delta{k}"]))
        assert off < 1e-4, f"run {k} ({steps:.0f} steps of {lr}): delta differs by {off:.1e}"
        assert greedy(lm, tokens, delta, len(new)) == new.tolist(), f"run {k}: tokens differ"


@both_forms
@models
def test_decoding_is_the_authors_run(name, optimize):
    """Through the cache, W δ as a constant on the logits: δ must count for the very first new token,
    which comes from the last prompt position, and for every one after it."""
    lm, prompt = load(GOLDEN / name), golden_prompt(name)
    for run in golden_runs(name):
        tokens, expected = prompt[run["row"]].tolist(), run["new"].tolist()
        steps, lr = int(run["steps"]), float(run["lr"])
        hidden, cache = prefill(lm, tokens, len(expected))
        delta, _ = optimize(hidden, tokens, lm.lm_head, steps, lr)
        new = list(decode(lm, hidden, cache, len(expected), delta))
        at = next((i for i, (a, b) in enumerate(zip(new, expected)) if a != b), min(len(new), len(expected)))
        what = f"{name} row {run['row']}, {steps} steps of {lr}"
        assert new == expected, f"{what}: differs from new token {at + 1} on"
        if optimize is optimize_delta:
            whole = list(generate(lm, tokens, len(expected), steps, lr))
            assert whole == expected, f"{what}: generate() gives other tokens"


# ---- against calculus ------------------------------------------------------------------------------------


@both_forms
@pytest.mark.parametrize("steps, lr", [(1, 0.1), (5, 0.1), (20, 0.1), (20, 0.01)])
@pytest.mark.parametrize("n, V, d, scale", [
    (2, 50, 16, 1), (17, 300, 32, 1), (64, 1000, 64, 4), (40, 257, 48, 30), (40, 257, 48, 100)])
def test_both_forms_are_the_method(n, V, d, scale, steps, lr, optimize):
    """Against float64, from a two-token prompt to heads whose rows are so large that b = Wδ spreads
    over hundreds of nats: there, E c underflows in float32 and δ becomes NaN, unless the closed form
    takes another way."""
    hidden, tokens, head = random_case(n, V, d, scale)
    exact, exact_losses = float64_delta(hidden, tokens, head, steps, lr)
    delta, losses = optimize(hidden, tokens, head, steps, lr)
    off = largest(delta[0, 0] - exact)
    assert off < 2e-5, f"delta differs from float64 by {off:.1e}"
    off = largest((losses - exact_losses) / exact_losses.clamp(min=1))
    assert off < 1e-5, f"losses differ from float64 by {off:.1e} of their size"


@both_forms
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_the_last_loss_is_that_of_the_delta(steps, optimize):
    """What the fit reached, which is the figure that people look for: the loss at the δ that is returned."""
    hidden, tokens, head = random_case(30, 200, 24)
    delta, losses = optimize(hidden, tokens, head, steps, 0.1)
    assert len(losses) == steps + 1
    at_zero, at_delta = (float64_loss(hidden, tokens, head, d) for d in (0, delta[0, 0].double()))
    assert abs(losses[0] - at_zero) < 1e-5 and abs(losses[-1] - at_delta) < 1e-5
    assert steps == 0 or losses[-1] < losses[0] - 0.01


@both_forms
def test_loss_falls(optimize):
    """The loss is convex in δ and the first steps are far from its minimum."""
    lm, tokens = load(GOLDEN / "qwen2"), golden_prompt("qwen2")[0].tolist()
    _, losses = optimize(hidden_of(lm, tokens), tokens, lm.lm_head, 5, 0.05)
    assert (losses.diff() < 0).all(), f"losses {losses.tolist()}"


def test_another_loss():
    """`loss` gets the logits of every position that predicts a token, and what came next."""
    hidden, tokens, head = random_case(30, 200, 24)
    seen = []

    def last_ten(logits, targets):
        seen.append((logits.shape, logits.dtype, targets.tolist()))
        return F.cross_entropy(logits[-10:], targets[-10:])

    delta, losses = optimize_delta(hidden, tokens, head, 4, 0.1, loss=last_ten)
    assert seen == [((29, 200), torch.float32, tokens[1:])] * 5
    exact, exact_losses = float64_delta(hidden[:, -11:], tokens[-11:], head, 4, 0.1)
    assert largest(delta[0, 0] - exact) < 2e-5 and largest(losses - exact_losses) < 1e-5

    def with_entropy(logits, targets):
        p = logits.softmax(-1)
        return prompt_loss(logits, targets) - 0.5 * (p * logits.log_softmax(-1)).sum(-1).mean()

    sharper, _ = optimize_delta(hidden, tokens, head, 4, 0.1, loss=with_entropy)
    plain, _ = optimize_delta(hidden, tokens, head, 4, 0.1)
    assert largest(sharper - plain) > 1e-3


# ---- what must not change --------------------------------------------------------------------------------


@both_forms
def test_model_is_untouched(optimize):
    """Not one weight may change, nor anything but δ get a gradient: the head's would be as large as the
    head."""
    lm, tokens = load_model(GOLDEN / "qwen2", dtype="float32"), golden_prompt("qwen2")[0].tolist()
    before = {name: weight.clone() for name, weight in lm.state_dict().items()}
    hidden = hidden_of(lm, tokens)
    kept = hidden.clone()
    lm.requires_grad_(True)                             # even when a caller forgot to freeze the model
    hidden.requires_grad_(True)
    delta, losses = optimize(hidden, tokens, lm.lm_head, 3, 0.1)
    assert not delta.requires_grad and not losses.requires_grad
    computed = [name for name, weight in lm.named_parameters() if weight.grad is not None]
    assert hidden.grad is None and computed == [], "a gradient beside δ's was computed"
    assert torch.equal(hidden, kept)
    assert all(torch.equal(weight, before[name]) for name, weight in lm.state_dict().items())
    assert all(weight.requires_grad for weight in lm.parameters()), "requires_grad of the weights was changed"


def test_an_answer_leaves_the_model_untouched():
    lm, tokens = load_model(GOLDEN / "qwen2", dtype="float32"), golden_prompt("qwen2")[0].tolist()
    before = {name: weight.clone() for name, weight in lm.state_dict().items()}
    first = list(generate(lm, tokens, 8, 5, 0.1))
    assert list(generate(lm, tokens, 8)) != first == list(generate(lm, tokens, 8, 5, 0.1))
    assert all(torch.equal(weight, before[name]) for name, weight in lm.state_dict().items())
    assert all(weight.grad is None for weight in lm.parameters())


@both_forms
def test_works_inside_no_grad(optimize):
    """Callers decode under no_grad; the loop must switch gradients on for itself, or δ silently stays
    zero."""
    hidden, tokens, head = random_case(10, 40, 16)
    outside, _ = optimize(hidden, tokens, head, 2, 0.1)
    with torch.no_grad():
        inside, _ = optimize(hidden, tokens, head, 2, 0.1)
    assert largest(outside) > 0.01 and torch.equal(inside, outside)


@both_forms
def test_global_state_is_untouched(optimize):
    """No seed, no gradient mode, no default dtype: two runs give the same bits, and the caller's random
    numbers go on."""
    hidden, tokens, head = random_case(10, 40, 16)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, _ = optimize(hidden, tokens, head, 4, 0.1)
    assert torch.equal(torch.rand(1), expected) and torch.is_grad_enabled()
    assert torch.equal(optimize(hidden, tokens, head, 4, 0.1)[0], first)


def test_a_slice_is_multiplied_without_a_copy_of_the_weight():
    """hidden[:, :-1] is a case in which torch can choose to copy the whole weight, once for each sample."""
    hidden, tokens, head = random_case(4, 1 << 16, 64)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        optimize_delta(hidden, tokens, head, 1, 0.1)
    made = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert made < head.weight.nbytes, f"{made} bytes were allocated on the way"


# ---- 16 bits ---------------------------------------------------------------------------------------------


@both_forms
@pytest.mark.parametrize("V", [200, 203])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_head_gets_a_float32_delta(dtype, V, optimize):
    """In bfloat16 a step of 0.01 is lost beside a hidden state of size 4. δ stays float32, near that of the
    float32 head. (203 is odd: a product in eight parts must not forget the rest.)"""
    hidden, tokens, head = random_case(24, V, 32, seed=5)
    hidden, head = hidden.to(dtype), head.to(dtype)
    exact, _ = float64_delta(hidden, tokens, head, 5, 0.01)
    delta, losses = optimize(hidden, tokens, head, 5, 0.01)
    assert delta.dtype == torch.float32, f"delta is {delta.dtype}"
    assert losses.dtype == torch.float32 and torch.isfinite(losses).all()
    off = largest(delta[0, 0] - exact)
    assert off < 5e-3, f"{dtype}: delta differs from the float64 one by {off:.1e} (one step is 1e-2)"


@both_forms
def test_large_logits_in_bfloat16(optimize):
    """Above 128 a bfloat16 number is a whole one, above 256 an even one. So the rounding of W h alone
    can move an entry of δ by half its size. No form is to blame: both give nearly the same δ, and so
    does the authors' order of operations. The first line would fail if this were no longer so, the
    second if it were worse."""
    hidden, tokens, head = random_case(64, 2000, 128, scale=100, seed=3)
    hidden, head = hidden.bfloat16(), head.bfloat16()
    assert 400 < largest(hidden.double() @ head.weight.double().T) < 500
    exact, _ = float64_delta(hidden, tokens, head, 5, 0.1)
    delta, _ = optimize(hidden, tokens, head, 5, 0.1)
    other, _ = optimize_delta(hidden, tokens, head, 5, 0.1)
    assert largest(delta[0, 0] - exact) > 0.05
    assert (delta[0, 0] - exact).norm() < 0.15 * exact.norm() and largest(delta - other) < 0.02


@both_forms
@pytest.mark.parametrize("steps, lr, scale", [(1, 1e5, 1), (5, 1e5, 1), (1, 3e3, 1e2), (3, 3e3, 1e2)])
def test_delta_beyond_float16(steps, lr, scale, optimize):
    """δ itself, or W δ, is more than 65,504: an error, where it would be NaN in every logit."""
    hidden, tokens, head = random_case(12, 40, 16, scale)
    with pytest.raises(ValueError, match=f"leaves torch.float16's range at lr {lr:g}; take a lower one or"):
        optimize(hidden.half(), tokens, head.half(), steps, lr)


@both_forms
@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf")])
def test_settings_that_would_be_silently_wrong(lr, optimize):
    hidden, tokens, head = random_case(5, 40, 16)
    with pytest.raises(ValueError) as error:
        optimize(hidden, tokens, head, 3, lr)
    assert "\n" not in str(error.value) and ("lr" in str(error.value) or "learning rate" in str(error.value))


# ---- edges -----------------------------------------------------------------------------------------------


@both_forms
def test_zero_steps_is_the_plain_model(optimize):
    hidden, tokens, head = random_case(7, 40, 16)
    delta, losses = optimize(hidden, tokens, head, 0, 0.1)
    assert delta.shape == (1, 1, 16) and delta.dtype == torch.float32 and (delta == 0).all()
    assert losses.shape == (1,)
    assert torch.equal(head(hidden + delta), head(hidden))


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_of_one_token_has_nothing_to_learn(dtype, optimize):
    """No next token, no loss: a mean over nothing, NaN. But one NaN in δ would be a NaN in every logit."""
    hidden, tokens, head = random_case(1, 40, 16)
    delta, losses = optimize(hidden.to(dtype), tokens, head.to(dtype), 3, 0.1)
    assert (delta == 0).all() and losses.shape == (4,) and losses.isnan().all()


@pytest.mark.parametrize("folder", FAMILIES)
def test_an_answer_to_a_prompt_of_one_token(folder):
    lm = load(GOLDEN / folder)
    plain = greedy(lm, [5], 0, 6)
    assert list(generate(lm, [5], 6)) == list(generate(lm, [5], 6, steps=3, lr=0.1)) == plain


# ---- prefill, decode, generate ---------------------------------------------------------------------------


def plain_logits(lm, tokens, new):
    """-> (N, V): the model's own logits before each token of `new`, through its cache, without
    slot.decode."""
    hidden, cache = prefill(lm, tokens, len(new))
    logits = []
    with torch.no_grad():
        for id in new:
            logits.append(lm.lm_head(hidden[:, -1:])[0, 0].float())
            hidden = lm.model(torch.tensor([[id]]), cache)
    return torch.stack(logits)


@pytest.mark.parametrize("folder", FAMILIES + ["llama_bf16", "qwen2_f16"])
def test_without_steps_it_is_the_plain_model_bit_for_bit(folder):
    """The logits that a token is chosen from: float32, (V,), the model's own to the last bit; δ = 0 as
    well."""
    lm, tokens = load_model(GOLDEN / folder), golden_prompt(folder)[0].tolist()
    for delta in (None, torch.zeros(1, 1, lm.config.hidden_size)):
        seen = []

        def choose(logits):
            seen.append(logits.clone())
            return likeliest(logits)

        hidden, cache = prefill(lm, tokens, 12)
        new = list(decode(lm, hidden, cache, 12, delta, choose))
        assert len(new) == 12 and cache.pos == len(tokens) + 11
        assert seen[0].shape == (lm.config.vocab_size,) and seen[0].dtype == torch.float32
        assert torch.equal(torch.stack(seen), plain_logits(lm, tokens, new))
    assert new == list(generate(lm, tokens, 12)) == list(generate(lm, tokens, 12, steps=0, lr=0.5))


def test_greedy_answers_are_the_reference_librarys():
    for folder in FAMILIES:
        golden = np.load(GOLDEN / folder / "golden.npz")
        for tokens, new in zip(golden["prompt"].tolist(), golden["greedy"].tolist()):
            assert list(generate(load(GOLDEN / folder), tokens, len(new))) == new


def test_prefill_is_one_pass_and_is_used_again():
    """hidden and cache serve the fit and any number of answers: --compare puts the cache back and goes on."""
    lm, tokens = load(GOLDEN / "qwen2"), golden_prompt("qwen2")[0].tolist()
    hidden, cache = prefill(lm, tokens, 10)
    assert torch.equal(hidden, hidden_of(lm, tokens)) and not hidden.requires_grad
    assert cache.pos == len(tokens) and cache.max_len == len(tokens) + 10
    delta, _ = optimize_delta(hidden, tokens, lm.lm_head, 5, 0.1)
    plain, steered = list(generate(lm, tokens, 10)), list(generate(lm, tokens, 10, steps=5, lr=0.1))
    assert plain != steered
    for d, answer in ((None, plain), (delta, steered), (None, plain)):
        assert list(decode(lm, hidden, cache, 10, d)) == answer
        cache.pos = len(tokens)


def test_an_answer_ends():
    lm, tokens = load(GOLDEN / "qwen2"), golden_prompt("qwen2")[0].tolist()
    free = list(generate(lm, tokens, 12))
    end = free.index(free[7])
    assert list(generate(lm, tokens, 12, eos_ids=[free[7]])) == free[:end], "the end id is not yielded"
    assert list(generate(lm, tokens, 12, eos_ids={free[0]})) == []
    assert list(generate(lm, tokens, 5)) == free[:5] and list(generate(lm, tokens, 0)) == []
    answer = generate(lm, tokens, 12)
    assert [next(answer), next(answer)] == free[:2], "ids come one at a time"


def test_choose_takes_the_place_of_the_likeliest():
    lm, tokens = load(GOLDEN / "qwen2"), golden_prompt("qwen2")[0].tolist()
    assert likeliest(torch.tensor([1.0, 3.0, 2.0])) == 1
    second = list(generate(lm, tokens, 4, choose=lambda logits: logits.topk(2).indices[1].item()))
    assert second[0] != next(generate(lm, tokens, 4))
    logits = plain_logits(lm, tokens, second)
    assert second == logits.topk(2).indices[:, 1].tolist()


def test_steer_is_where_delta_enters(monkeypatch):
    """A reader who edits it edits what decoding does, at every new token."""
    import slot
    lm, tokens = load(GOLDEN / "qwen2"), golden_prompt("qwen2")[0].tolist()
    assert torch.equal(steer(torch.ones(1, 1, 3), torch.arange(3.0), None, 0), torch.tensor([[[1.0, 2, 3]]]))
    seen = []
    monkeypatch.setattr(slot, "steer", lambda logits, W_delta, *others: seen.append((logits, *others)) or W_delta)
    hidden, cache = prefill(lm, tokens, 4)
    delta, _ = optimize_delta(hidden, tokens, lm.lm_head, 5, 0.1)
    assert list(decode(lm, hidden, cache, 4, delta)) == [lm.lm_head(delta).argmax().item()] * 4
    for place, (logits, hidden, count) in enumerate(seen):
        assert count == place and torch.equal(lm.lm_head(hidden), logits)
    assert len(seen) == 4
    assert list(generate(lm, tokens, 4)) == greedy(lm, tokens, 0, 4), "without δ nothing is steered"


@pytest.mark.parametrize("tokens, new", [(256, 1), (200, 57), (257, 0)])
def test_more_positions_than_the_model_knows(tokens, new):
    lm = load(GOLDEN / "qwen2")
    reason = f"{tokens} prompt tokens and {new} new ones exceed .* 256 positions"
    with pytest.raises(ValueError, match=reason):
        list(generate(lm, [5] * tokens, new))
    assert len(list(generate(lm, [5] * 200, 56))) == 56


def test_logits_that_are_no_numbers():
    """Greedy decoding would take NaN for the largest."""
    lm, tokens = load_model(GOLDEN / "qwen2", dtype="float32"), golden_prompt("qwen2")[0].tolist()
    lm.lm_head.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="the logits are not finite"):
        next(generate(lm, tokens, 4))
