"""A batch gives each prompt what it gets alone: hidden states, δ and losses to the last bit, greedy and
sampled tokens, whatever the others are, however much padding stands beside it, and whoever has finished
already. Three families of golden models, both forms of SLOT.
"""
import numpy as np
import pytest
import torch

pytest.importorskip("speed.batch", reason="there is no speed/")

import slot
from generate import sampler
from load_weights import load_model
from slot import generate, optimize_delta, prefill
from slot_cases import (FAMILIES, GOLDEN, MODELS, both_forms, float64_delta, golden_prompt, golden_runs,
                        greedy, largest, load)
from speed import batch as speed_batch
from speed.batch import generate_batch

families = pytest.mark.parametrize("family", FAMILIES)
DENSE, PADDED = [9, 9, 9, 9], [9, 2, 17, 5]
shapes = pytest.mark.parametrize("lengths", [DENSE, PADDED], ids=["dense", "padded"])
NEW = 12


def prompts(family, lengths):
    """Pieces of the golden prompts, of these lengths."""
    flat = golden_prompt(family).flatten().tolist()
    return [flat[7 * k:7 * k + length] for k, length in enumerate(lengths)]


def answers_of(steps):
    """What generate_batch or decode yields -> the new ids of each prompt."""
    answers = []
    for ids in steps:
        answers = answers or [[] for _ in ids]
        for answer, id in zip(answers, ids):
            if id is not None:
                answer.append(id)
    return answers


# ---- prefill and fit -------------------------------------------------------------------------------------


@families
@shapes
def test_prefill_is_each_prompt_alone(family, lengths):
    """Hidden states, and keys and values behind the padding, to the last bit; no forward pass sees
    padding."""
    lm, batch, shapes_seen = load(GOLDEN / family), prompts(family, lengths), []
    watch = lm.model.register_forward_pre_hook(
        lambda module, arguments: shapes_seen.append((tuple(arguments[0].shape), arguments[2:])))
    try:
        hiddens, cache = speed_batch.prefill(lm, batch, NEW)
    finally:
        watch.remove()
    assert shapes_seen == [((1, length), ()) for length in lengths]
    assert cache.pos == max(lengths) and cache.max_len == max(lengths) + NEW
    assert (cache.mask is None) == (lengths == DENSE)
    for row, (tokens, hidden) in enumerate(zip(batch, hiddens)):
        alone, own = prefill(lm, tokens, NEW)
        assert torch.equal(hidden, alone)
        begin = cache.pos - len(tokens)
        for together, single in ((cache.k, own.k), (cache.v, own.v)):
            assert torch.equal(together[:, row, :, begin:cache.pos], single[:, 0, :, :len(tokens)])
            assert (together[:, row, :, :begin] == 0).all()
        if lengths == PADDED:
            assert cache.mask[row].tolist() == [False] * begin + [True] * (cache.max_len - begin)


@both_forms
@families
@shapes
def test_delta_of_a_batch(family, lengths, optimize):
    """To the last bit: every row's own hidden states are handed to the fit alone, once, in order."""
    lm, batch, fits = load(GOLDEN / family), prompts(family, lengths), []

    def watched(hidden, tokens, *rest):
        fits.append((tokens, optimize(hidden, tokens, *rest)))
        return fits[-1][1]

    answers_of(generate_batch(lm, batch, 1, 5, 0.1, optimize=watched))
    assert [tokens for tokens, _ in fits] == batch
    for tokens, (delta, losses) in fits:
        own, own_losses = optimize(prefill(lm, tokens, 1)[0], tokens, lm.lm_head, 5, 0.1)
        assert torch.equal(delta, own) and torch.equal(losses, own_losses)


@pytest.mark.parametrize("shape", [(-1,), (1, -1), (1, 1, -1)])
def test_a_delta_of_any_shape_stays_with_its_prompt(shape):
    """A reader's optimize_delta that returns (1, d), not (1, 1, d), once gave every prompt the δ of the first."""
    lm, batch = load(GOLDEN / "qwen2"), prompts("qwen2", (4, 9, 6))

    def flat(*given):
        delta, losses = slot.optimize_delta(*given)
        return delta.reshape(shape), losses

    assert answers_of(generate_batch(lm, batch, 6, 20, 0.5, optimize=flat)) == answers_of(generate_batch(lm, batch, 6, 20, 0.5))


@both_forms
@pytest.mark.parametrize("name", MODELS)
def test_authors_runs_as_a_batch(name, optimize):
    """The authors' code has one δ for a whole batch; here each prompt gets what it gets alone."""
    lm, runs = load(GOLDEN / name), [run for run in golden_runs(name) if run["steps"] == 5]
    batch = [golden_prompt(name)[run["row"]].tolist() for run in runs]
    new = answers_of(generate_batch(lm, batch, len(runs[0]["new"]), 5, 0.1, optimize=optimize))
    assert new == [run["new"].tolist() for run in runs]


@both_forms
@families
def test_a_prompt_of_one_token_beside_others(family, optimize):
    """It has nothing to learn from; the others get what they get alone."""
    lm, batch = load(GOLDEN / family), prompts(family, [9, 1, 6])
    alone = [answers_of(generate_batch(lm, [tokens], NEW, 5, 0.1, optimize=optimize))[0] for tokens in batch]
    assert answers_of(generate_batch(lm, batch, NEW, 5, 0.1, optimize=optimize)) == alone
    assert alone[1] == greedy(lm, batch[1], 0, NEW) and alone[0] != greedy(lm, batch[0], 0, NEW)


# ---- decode ----------------------------------------------------------------------------------------------


SAMPLING = {"greedy": None, "warm": dict(temperature=1.0), "cut": dict(temperature=1.3, top_k=20, top_p=0.9)}


@both_forms
@families
@shapes
@pytest.mark.parametrize("steps, lr, sampling", [(0, 0.1, "greedy"), (5, 0.1, "greedy"), (5, 0.1, "warm"),
                                                 (3, 0.01, "cut")])
def test_a_batch_answers_as_each_prompt_alone(family, lengths, steps, lr, sampling, optimize, monkeypatch):
    """A function for each row: every row draws from its own random numbers, whoever stands beside it."""
    lm, batch, settings = load(GOLDEN / family), prompts(family, lengths), SAMPLING[sampling]
    monkeypatch.setattr(slot, "optimize_delta", optimize)

    def chooses():
        return [slot.likeliest if settings is None else sampler(**settings, seed=row) for row in range(4)]

    alone = [list(generate(lm, tokens, NEW, steps, lr, choose)) for tokens, choose in zip(batch, chooses())]
    assert answers_of(generate_batch(lm, batch, NEW, steps, lr, chooses())) == alone
    backwards = generate_batch(lm, batch[::-1], NEW, steps, lr, chooses()[::-1])
    assert answers_of(backwards) == alone[::-1]
    if settings is None:
        assert answers_of(generate_batch(lm, batch, NEW, steps, lr)) == alone
    else:
        assert len({tuple(ids) for ids in alone}) == 4


@families
def test_one_function_for_all_rows(family):
    """It is called for the rows in order, with the logits that the row has alone."""
    lm, batch, seen = load(GOLDEN / family), prompts(family, PADDED), []

    def third(logits):
        seen.append(logits)
        return logits.topk(3).indices[2].item()

    together = answers_of(generate_batch(lm, batch, 3, choose=third))
    rows, seen = seen, []
    alone = [list(generate(lm, tokens, 3, choose=third)) for tokens in batch]
    assert together == alone
    for row in range(4):
        for step in range(3):
            assert rows[4 * step + row].shape == (lm.config.vocab_size,)
            assert largest(rows[4 * step + row] - seen[3 * row + step]) < 1e-4


@families
@pytest.mark.parametrize("steps", [0, 5])
def test_finished_rows_leave_and_nobody_notices(family, steps):
    lm, batch = load(GOLDEN / family), prompts(family, PADDED)
    free = [list(generate(lm, tokens, NEW, steps, 0.1)) for tokens in batch]
    eos_ids = {free[0][2], free[2][7]}                  # some answers end early, at different times
    ended = []
    for ids in free:
        end = next((place for place, id in enumerate(ids) if id in eos_ids), NEW)
        ended.append(ids[:end])
    assert len(set(map(len, ended))) > 1
    assert answers_of(generate_batch(lm, batch, NEW, steps, 0.1, eos_ids=eos_ids)) == ended
    assert [list(generate(lm, tokens, NEW, steps, 0.1, eos_ids=eos_ids)) for tokens in batch] == ended

    # an ended answer costs no more products: one row in a pass for each token but an answer's first
    hiddens, cache = speed_batch.prefill(lm, batch, NEW)
    rows, forward = [], lm.model.forward
    lm.model.forward = lambda tokens, *rest: rows.append(len(tokens)) or forward(tokens, *rest)
    try:
        yielded = list(speed_batch.decode(lm, hiddens, cache, NEW, eos_ids=eos_ids))
    finally:
        del lm.model.forward
    plain = answers_of(yielded)
    assert sum(rows) == sum(min(len(ids), NEW - 1) for ids in plain)
    assert len(yielded) == max(map(len, plain)) and all(len(ids) == 4 for ids in yielded)


def test_all_answers_end_at_once():
    lm, batch = load(GOLDEN / "qwen2"), prompts("qwen2", PADDED)
    first = {next(generate(lm, tokens, 1)) for tokens in batch}
    assert list(generate_batch(lm, batch, NEW, eos_ids=first)) == []
    assert list(generate_batch(lm, batch, 0)) == []


@families
def test_the_parts_put_together_by_hand(family):
    """prefill, one's own δ for each prompt, decode: the same as generate_batch; another δ, another answer."""
    lm, batch = load(GOLDEN / family), prompts(family, PADDED)
    hiddens, cache = speed_batch.prefill(lm, batch, NEW)
    pairs = list(zip(hiddens, batch))
    deltas = [optimize_delta(hidden, tokens, lm.lm_head, 5, 0.1)[0] for hidden, tokens in pairs]
    answers = answers_of(speed_batch.decode(lm, hiddens, cache, NEW, deltas))
    assert answers == answers_of(generate_batch(lm, batch, NEW, 5, 0.1))

    deltas[1] = torch.zeros_like(deltas[1])             # this prompt is answered plainly
    cache = speed_batch.prefill(lm, batch, NEW)[1]
    mixed = answers_of(speed_batch.decode(lm, hiddens, cache, NEW, deltas))
    assert mixed == [answers[0], greedy(lm, batch[1], 0, NEW), *answers[2:]]


# ---- padding ---------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("delta", [False, True])
def test_garbage_in_the_padding_changes_nothing(family, delta):
    """Not one bit of the logits depends on what the cache holds where a row is padded."""
    lm, batch = load(GOLDEN / family), prompts(family, PADDED)
    hiddens, cache = speed_batch.prefill(lm, batch, NEW)
    deltas = [float64_delta(h, t, lm.lm_head, 3, 0.1)[0].float()[None, None] for h, t in zip(hiddens, batch)]
    seen = []
    for garbage in (0, 1e4, -1e4):
        cache.pos = max(PADDED)
        for row, tokens in enumerate(batch):
            cache.k[:, row, :, :cache.pos - len(tokens)] = garbage
            cache.v[:, row, :, :cache.pos - len(tokens)] = garbage
        logits = []

        def choose(each):
            logits.append(each)
            return slot.likeliest(each)

        list(speed_batch.decode(lm, hiddens, cache, NEW, deltas if delta else None, choose))
        seen.append(torch.stack(logits))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@families
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_even_nan_can_be_padding(family, value):
    """Every embedding that no prompt and no answer needs is no number."""
    lm, batch = load_model(GOLDEN / family, dtype="float32"), prompts(family, PADDED)
    answers = answers_of(generate_batch(lm, batch, 3, 3, 0.1))
    used = {id for ids in batch + answers for id in ids}
    unused = [id for id in range(lm.config.vocab_size) if id not in used]
    # an untied head keeps its rows: a logit that is no number would be an error, and rightly
    lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.clone(), requires_grad=False)
    lm.model.embed_tokens.weight.data[unused] = value
    assert answers_of(generate_batch(lm, batch, 3, 3, 0.1)) == answers


# ---- errors ----------------------------------------------------------------------------------------------


def test_more_positions_than_the_model_knows():
    lm = load(GOLDEN / "qwen2")
    with pytest.raises(ValueError, match="200 prompt tokens and 57 new ones exceed .* 256 positions"):
        next(generate_batch(lm, [[5] * 3, [5] * 200], 57))
    # a short prompt beside a long one is not short of positions: its own count from 0
    assert len(list(generate_batch(lm, [[5] * 3, [5] * 200], 56))) == 56


def test_a_limit_for_each_prompt():
    """Each answer is what it is alone with that many tokens, in one batch, whichever ends first."""
    lm, batch, limits = load(GOLDEN / "qwen2"), [[5] * 3, [7, 8, 9, 5] * 50, [6] * 9], [9, 56, 1]
    alone = [answers_of(generate_batch(lm, [tokens], limit, 3, 0.1))[0] for tokens, limit in zip(batch, limits)]
    assert [len(ids) for ids in alone] == limits
    assert answers_of(generate_batch(lm, batch, limits, 3, 0.1)) == alone


def test_logits_that_are_no_numbers():
    lm = load_model(GOLDEN / "qwen2", dtype="float32")
    lm.lm_head.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="the logits are not finite"):
        next(generate_batch(lm, [[5, 6], [7]], 4))


@pytest.mark.parametrize("folder", ["llama_bf16", "qwen2_f16"])
def test_half_precision(folder):
    """In 16 bits tokens may differ where logits nearly tie. The logits are those of the row alone, as
    near as the dtype allows; hidden states and δ to the last bit."""
    lm = load_model(GOLDEN / folder)
    golden = np.load(GOLDEN / folder / "golden.npz")["prompt"].tolist()
    batch = [golden[0], golden[1][:7]]
    hiddens, cache = speed_batch.prefill(lm, batch, 4)
    logits = []

    def first(each):
        logits.append(each)
        return 5

    list(speed_batch.decode(lm, hiddens, cache, 4, choose=first))
    for row, tokens in enumerate(batch):
        hidden, cache = prefill(lm, tokens, 4)
        assert torch.equal(hidden, hiddens[row])
        together, logits_of = logits[row::2], []
        list(slot.decode(lm, hidden, cache, 4, choose=lambda each: logits_of.append(each) or 5))
        for a, b in zip(together, logits_of):
            assert a.dtype == torch.float32 and (a - b).norm() < 0.03 * b.norm()


def test_an_edited_loop_is_said_to_be_left_out(monkeypatch, capsys):
    """speed/delta.py stands for slot.py's loop as it is; a reader's own is not what --slot-fast runs."""
    assert speed_batch.closed_form_stands_for_slot() and capsys.readouterr().err == ""
    monkeypatch.setattr(slot, "prompt_loss", lambda logits, targets: -torch.nn.functional.cross_entropy(logits, targets))
    assert not speed_batch.closed_form_stands_for_slot()
    assert "prompt_loss or optimize_delta has been edited: --slot-fast does not run it" in capsys.readouterr().err
