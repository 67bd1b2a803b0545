"""
A batch gives every prompt what it gets alone: hidden states, δ, greedy and sampled tokens, whatever the others are, however
much padding stands beside it, and whoever has finished already. Three families of golden models, both forms of SLOT.
"""
import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from generate import decode, generate, generate_batch, prefill, slot_bias
from load_weights import load_model
from model import KVCache
from slot import optimize_delta, optimize_delta_fast

GOLDEN = Path(__file__).parent / "golden"
families = pytest.mark.parametrize("family", ["llama31", "qwen2", "qwen3_tied_yarn"])
forms = pytest.mark.parametrize("fast", [True, False])
NEW = 12


@functools.cache
def load(family):
    return load_model(GOLDEN / family, dtype="float32")


def prompts(family, lengths):
    """Rows and shifted rows of the golden prompt, cut to lengths."""
    rows = torch.from_numpy(np.load(GOLDEN / family / "golden.npz")["prompt"])
    flat = rows.flatten().tolist()
    return [flat[7 * k:7 * k + length] for k, length in enumerate(lengths)]


DENSE, PADDED = [9, 9, 9, 9], [9, 2, 17, 5]
shapes = pytest.mark.parametrize("lengths", [DENSE, PADDED], ids=["dense", "padded"])


def run(lm, batch, **options):
    """-> the new ids of every prompt."""
    answers = [[] for _ in batch]
    for ids in generate_batch(lm, batch, NEW, **options):
        for answer, id in zip(answers, ids):
            if id is not None:
                answer.append(id)
    return answers


@families
@shapes
def test_hidden_states_of_a_batch(family, lengths):
    lm, batch = load(family), prompts(family, lengths)
    hidden, tokens, mask, cache = prefill(lm, batch, NEW)
    assert (mask is None) == (lengths == DENSE) and cache.pos == max(lengths)
    for row, ids in enumerate(batch):
        alone, *_ = prefill(lm, [ids], NEW)
        torch.testing.assert_close(hidden[row, -len(ids):], alone[0], atol=1e-5, rtol=1e-5)


@families
@shapes
@forms
@pytest.mark.parametrize("steps, lr, sampling", [
    (0, 0.1, {}), (5, 0.1, {}), (5, 0.1, dict(temperature=1.0, seed=3)), (3, 0.01, dict(temperature=1.3, top_k=20, top_p=0.9, seed=4))])
def test_a_batch_answers_as_each_prompt_alone(family, lengths, fast, steps, lr, sampling):
    lm, batch = load(family), prompts(family, lengths)
    options = dict(slot_steps=steps, slot_lr=lr, slot_fast=fast, **sampling)
    alone = [list(generate(lm, ids, NEW, **options)) for ids in batch]
    assert run(lm, batch, **options) == alone
    assert run(lm, batch[::-1], **options) == alone[::-1]


@families
@shapes
@forms
def test_delta_of_a_batch(family, lengths, fast):
    lm, batch, optimize = load(family), prompts(family, lengths), optimize_delta_fast if fast else optimize_delta
    hidden, tokens, mask, _ = prefill(lm, batch, 0)
    delta, losses = optimize(hidden, tokens, lm.lm_head, 5, 0.1, mask)
    for row, ids in enumerate(batch):
        alone, alone_losses = optimize(prefill(lm, [ids], 0)[0], torch.tensor([ids]), lm.lm_head, 5, 0.1)
        torch.testing.assert_close(delta[row], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(losses[:, row], alone_losses[:, 0], atol=1e-5, rtol=1e-5)


@families
def test_finished_rows_leave_and_nobody_notices(family):
    lm, batch = load(family), prompts(family, PADDED)
    free = [list(generate(lm, ids, NEW)) for ids in batch]
    eos = {free[0][2], free[2][7]}                                      # some answers end early, at different times
    ended = [ids[:next((k + 1 for k, id in enumerate(ids) if id in eos), NEW)] for ids in free]
    assert len(set(map(len, ended))) > 1
    assert run(lm, batch, eos_ids=eos) == ended
    assert [list(generate(lm, ids, NEW, eos_ids=eos)) for ids in batch] == ended
    widths, forward = [], lm.model.forward
    lm.model.forward = lambda tokens, *rest: widths.append(len(tokens)) or forward(tokens, *rest)
    try:
        run(lm, batch, eos_ids=eos)
    finally:
        del lm.model.forward
    assert sum(widths[1:]) == sum(len(ids) for ids in ended) - len(batch)               # an ended answer costs no more products


@families
@forms
def test_garbage_in_the_padding_changes_nothing(family, fast):
    lm, batch = load(family), prompts(family, PADDED)
    hidden, tokens, mask, cache = prefill(lm, batch, NEW)
    torch.manual_seed(0)
    other_tokens = torch.where(mask, tokens, torch.randint_like(tokens, lm.config.vocab_size))
    assert not torch.equal(other_tokens, tokens)
    other_cache = KVCache(lm.config, len(batch), tokens.shape[1] + NEW)
    with torch.no_grad():
        other_hidden = lm.model(other_tokens, other_cache, mask)
    assert torch.equal(other_hidden[mask], hidden[mask])
    other_hidden = torch.where(mask[:, :, None], other_hidden, 1e4 * torch.randn_like(hidden))
    column = (mask.logical_not()[None, :, None, :, None])                                # and in the cache
    for x in (other_cache.k, other_cache.v):
        x[:, :, :, :mask.shape[1]] = torch.where(column, 1e4 * torch.randn_like(x[:, :, :, :mask.shape[1]]), x[:, :, :, :mask.shape[1]])
    answers = []
    for h, t, c in ((hidden, tokens, cache), (other_hidden, other_tokens, other_cache)):
        bias, losses = slot_bias(lm, h, t, mask, 5, 0.1, fast)
        answers.append((bias, losses, list(decode(lm, h[:, -1:], c, NEW, bias))))
    assert torch.equal(answers[0][0], answers[1][0]) and torch.equal(answers[0][1], answers[1][1]) and answers[0][2] == answers[1][2]
