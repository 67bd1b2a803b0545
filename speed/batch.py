"""Many prompts at once: each gets what it gets alone, sooner: weights are read once for all.

    prefill   every prompt goes through the decoder by itself, as in slot.py, so that no padding and
              no other prompt is ever near it; its keys and values move into one common cache
    fit       every prompt's own hidden states, handed to `optimize_delta` alone: one δ per prompt
    decode    one token of every prompt in each forward pass; prompts that have ended leave

    prompt 1    a  b  c  d | x  y  z        the cache: shorter prompts stand to the right, so that
    prompt 2    .  .  e  f | u  v           all write the same column next; `mask` hides the dots

`prefill`, `decode` and the greedy choice in `chosen` are slot.py's, written anew for many prompts.
Where slot.py's own `prefill`, `decode` or `likeliest` has been edited, generate.py and the study
call that, one prompt at a time: what you read runs.

Letters: B prompts, T tokens of one of them, d width, V vocabulary.
"""
import contextlib
import hashlib
import inspect
import sys

import torch

import slot
from model import KVCache

TWIN = "8fe3a492322d56a6"           # `digest` of those three when this was written
CLOSED_FORM = "4016f440d14dba19"    # of what speed/delta.py stands for


def digest(*functions):
    source = "".join(map(inspect.getsource, functions))
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def stands_for_slot():
    """Whether slot.py's functions are those that are written anew below. Says so if not."""
    return unedited(TWIN, "likeliest, prefill or decode has been edited: it is asked itself, "
                    "prompts are answered one by one", slot.prefill, slot.likeliest, slot.decode)


def closed_form_stands_for_slot():
    """Whether slot.py's loop is the one that speed/delta.py stands for. Says so if not."""
    return unedited(CLOSED_FORM, "prompt_loss or optimize_delta has been edited: --slot-fast does "
                    "not run it", slot.prompt_loss, slot.optimize_delta)


def unedited(digest_then, what_if_not, *functions):
    with contextlib.suppress(OSError, TypeError):       # where Python finds no source of them
        if digest(*functions) == digest_then:
            return True
    print(f"note      slot.py's {what_if_not}", file=sys.stderr, flush=True)
    return False


def limits_of(max_new_tokens, count):
    """One number for all prompts, or already a list of one for each -> that list."""
    return max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * count


@torch.no_grad()
def prefill(lm, prompts, max_new_tokens):
    """prompts: B lists of ids -> their hidden states, a list of (1, T, d), and one cache for all,
    with room for max_new_tokens, a number or B of them. ValueError as from slot.prefill."""
    W, longest = lm.lm_head.weight, max(map(len, prompts))
    limits = limits_of(max_new_tokens, len(prompts))
    cache = KVCache(lm.config, len(prompts), longest + max(limits), W.device, W.dtype)
    cache.pos = longest
    if min(map(len, prompts)) < longest:
        cache.mask = torch.ones(len(prompts), cache.max_len, dtype=torch.bool, device=W.device)
    hiddens = []
    for row, tokens in enumerate(prompts):
        hidden, alone = slot.prefill(lm, tokens, limits[row])
        begin = longest - len(tokens)
        cache.k[:, row, :, begin:longest] = alone.k[:, 0, :, :len(tokens)]
        cache.v[:, row, :, begin:longest] = alone.v[:, 0, :, :len(tokens)]
        if cache.mask is not None:
            cache.mask[row, :begin] = False
        hiddens.append(hidden)
    return hiddens, cache


@torch.no_grad()
def decode(lm, hiddens, cache, max_new_tokens, deltas=None, choose=slot.likeliest, eos_ids=()):
    """Answer B prefilled prompts: yields, a token at a time, a list with an id for each prompt, or
    None once its answer has ended. As in slot.decode the end id is not yielded.

    max_new_tokens: of every answer, or B of them: an answer that has its own many ends there.
    deltas: B tensors of d numbers, or None, the plain model. choose: a function from logits (V,) to
    an id, or a list of them, one for each prompt.
    """
    W, B = lm.lm_head.weight, len(hiddens)
    hidden = torch.cat([each[:, -1:] for each in hiddens])                      # (B, 1, d)
    if deltas is not None:
        deltas = torch.stack([delta.reshape(1, -1) for delta in deltas])        # (B, 1, d)
        W_delta = lm.lm_head(deltas.to(W.dtype)).float()                        # (B, 1, V)
    limits = limits_of(max_new_tokens, B)
    rows = list(range(B))                           # the prompts that are still being answered
    for count in range(max(limits)):
        if count > 0:
            new = torch.tensor([[ids[row]] for row in rows], device=W.device)
            hidden = lm.model(new, cache)                                       # (rows, 1, d)
        logits = lm.lm_head(hidden).float()                                     # (rows, 1, V)
        if deltas is not None:
            logits = slot.steer(logits, W_delta, hidden, count)
        if not logits.sum().isfinite():         # a sum is, only if all its terms are: one pass
            raise ValueError(f"the logits are not finite: a weight is not, or {W.dtype} overflows")

        # choose, and let the prompts go whose answer ends here
        ids = [None] * B
        for row, id in zip(rows, chosen(logits[:, 0], rows, choose)):
            if id not in eos_ids and count < limits[row]:
                ids[row] = id
        alive = [place for place, row in enumerate(rows) if ids[row] is not None]
        if not alive:
            return
        if len(alive) < len(rows):
            rows = [rows[place] for place in alive]
            keep_rows(cache, alive)
            if deltas is not None:
                W_delta = W_delta[alive]
        yield ids


def collected(columns, count):
    """What `decode` or `generate_batch` yields -> the answers of `count` prompts, lists of ids."""
    answers = [[] for _ in range(count)]
    for ids in columns:
        for answer, id in zip(answers, ids):
            if id is not None:
                answer.append(id)
    return answers


def chosen(logits, rows, choose):
    """logits (rows, V) -> an id for each row."""
    if choose is slot.likeliest:
        return logits.argmax(-1).tolist()
    if callable(choose):
        return [choose(each) for each in logits]
    return [choose[row](each) for row, each in zip(rows, logits)]


def keep_rows(cache, rows):
    """Go on with these rows of the batch only."""
    cache.k, cache.v = cache.k[:, rows], cache.v[:, rows]
    if cache.mask is not None:
        cache.mask = cache.mask[rows]


def generate_batch(lm, prompts, max_new_tokens, steps=0, lr=0.01, choose=slot.likeliest, eos_ids=(),
                   optimize=None):
    """Answer several prompts, lists of ids: yields what `decode` yields. optimize: another function
    in the place of slot.optimize_delta, with its arguments."""
    optimize = optimize or slot.optimize_delta
    hiddens, cache = prefill(lm, prompts, max_new_tokens)
    deltas = None
    if steps > 0:
        deltas = [optimize(hidden, tokens, lm.lm_head, steps, lr)[0]
                  for hidden, tokens in zip(hiddens, prompts)]
    yield from decode(lm, hiddens, cache, max_new_tokens, deltas, choose, eos_ids)
