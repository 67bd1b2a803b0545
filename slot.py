"""SLOT (Hu et al. 2025, arXiv 2505.12392): fit one vector δ to a prompt, then decode with it.

    tokens ──► decoder ──► h (1, T, d) ──► h + δ ──► W ──► logits

The decoder reads the prompt once. Its hidden states h are constants from then on; δ is fitted so
that W(h + δ) predicts the prompt itself better, and then helps with every token of the answer.

    (1)  z_t = W (h_t + δ)  =  W h_t + W δ                     δ = 0 is the plain model
    (2)  L(δ) = -1/(T-1) Σ_{t<T} log softmax(z_t)[x_{t+1}]     what the steps minimise
    (3)  δ ← AdamW(δ, ∇L)                                      a few steps, from δ = 0
    (4)  x_{t+1} from softmax(W (h_t + δ))                     from the last prompt position on

    paper    here       checkpoint                           shape
    x        tokens                                          a list of T ids
    H        hidden     output of `model.norm`               (1, T, d)
    W_LM     lm_head    `lm_head.weight` (tied: embeddings)  (V, d)
    δ        delta                                           (1, 1, d) float32
    η        lr         0.01 in the paper's text, 0.1 in its code
    T        steps      3 in its text, 5 in its code; below, T is the prompt's length

What differs from the authors' public code: δ belongs to one prompt, never to a batch and its
padding; only δ receives a gradient, W none; W h is computed once, not in every step; δ and the loss
are float32 even in a bfloat16 model, where a step of 0.01 would vanish beside h. The equations are
numbered by this file. Letters: T tokens of the prompt, d width, V vocabulary.
"""
import torch
import torch.nn.functional as F

from model import KVCache


@torch.no_grad()
def prefill(lm, tokens, max_new_tokens):
    """One forward pass over the prompt, a list of ids -> hidden (1, T, d), and the filled cache
    with room for max_new_tokens. ValueError if that exceeds the positions the model knows."""
    T = len(tokens)
    most = lm.config.max_position_embeddings
    if T + max_new_tokens > most:
        raise ValueError(f"{T} prompt tokens and {max_new_tokens} new ones exceed the model's "
                         f"{most} positions (max_position_embeddings); shorten one of them")
    W = lm.lm_head.weight
    cache = KVCache(lm.config, 1, T + max_new_tokens, W.device, W.dtype)
    hidden = lm.model(torch.tensor([list(tokens)], device=W.device), cache)
    return hidden, cache


def prompt_loss(logits, targets):
    """Equation (2): logits (T-1, V) float32, the tokens that came next (T-1,) -> nats, a scalar."""
    return F.cross_entropy(logits, targets)


@torch.enable_grad()
def optimize_delta(hidden, tokens, lm_head, steps, lr, loss=prompt_loss):
    """Fit δ to one prompt. This loop is the method.

    hidden (1, T, d): what the decoder made of the list of ids `tokens`; a constant here.
    -> delta (1, 1, d) float32, and losses (steps + 1,): before every step and, last, after all.
    ValueError if the steps lead beyond the numbers of the model's dtype.
    """
    targets = torch.tensor(list(tokens[1:]), dtype=torch.int64, device=hidden.device)   # (T-1,)
    W = lm_head.weight
    with torch.no_grad():                           # h never changes: no gradient, computed once
        Wh = lm_head(hidden[:, :-1]).float()                                # (1, T-1, V)

    delta = torch.zeros(1, 1, hidden.shape[-1], device=hidden.device, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [delta], lr=lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=1e-8)
    losses = []
    for step in range(steps + 1):
        logits = Wh + lm_head(delta.to(W.dtype)).float()                    # = W(h + δ)
        nll = loss(logits[0], targets)
        losses.append(nll.detach())
        if step < steps:                            # the last round only measures
            nll.backward(inputs=[delta])
            optimizer.step()
            optimizer.zero_grad()

    if not logits.isfinite().all():
        raise ValueError(f"SLOT: W(h + δ) leaves {W.dtype}'s range at lr {lr:g}; take a lower one "
                         "or a wider dtype")
    return delta.detach(), torch.stack(losses)


def likeliest(logits):
    """Greedy choice: logits (V,) -> the id of the largest."""
    return logits.argmax().item()


def steer(logits, W_delta, hidden, count):
    """Equation (4), where δ enters the answer: W h and W δ, both (..., V) float32 -> W(h + δ).
    hidden (..., d): h. count: the answer's tokens so far. Both are for ideas of your own; many
    positions may stand before the last dimension, so decide with torch.where, not with `if`."""
    return logits + W_delta


@torch.no_grad()
def decode(lm, hidden, cache, max_new_tokens,
           delta=None, choose=likeliest, eos_ids=()):
    """Answer from the prefilled prompt: yields ids as they come, at most max_new_tokens.

    delta (1, 1, d) or None, the plain model. choose: a function from logits (V,) float32 to an id.
    One of eos_ids ends the answer and is not yielded. ValueError if logits are not finite.
    """
    W = lm.lm_head.weight
    if delta is not None:
        W_delta = lm.lm_head(delta.to(W.dtype)).float()                     # (1, 1, V)
    for count in range(max_new_tokens):
        if count > 0:                   # one token through the decoder; the cache has the rest
            hidden = lm.model(torch.tensor([[id]], device=W.device), cache)
        logits = lm.lm_head(hidden[:, -1:]).float()                         # (1, 1, V)
        if delta is not None:
            logits = steer(logits, W_delta, hidden[:, -1:], count)          # = W(h + δ)
        if not logits.isfinite().all():
            raise ValueError(
                f"the logits are not finite: a weight is not, or {W.dtype} overflows")
        id = choose(logits[0, 0])
        if id in eos_ids:
            return
        yield id


def generate(lm, tokens, max_new_tokens,
             steps=0, lr=0.01, choose=likeliest, eos_ids=()):
    """Answer a prompt, a list of ids, plainly or with `steps` of SLOT: yields ids as they come.
    For use from Python: the commands call its three parts themselves, to show what happens."""
    hidden, cache = prefill(lm, tokens, max_new_tokens)
    delta = None
    if steps > 0:
        delta, _ = optimize_delta(hidden.detach(), tokens, lm.lm_head, steps, lr)
    yield from decode(lm, hidden, cache, max_new_tokens, delta, choose, eos_ids)
