"""SLOT (Hu et al. 2025, arXiv 2505.12392): fit one vector δ to a prompt at test time, then decode with it.

    tokens ──► decoder ──► h (B, T, d) ──► h + δ ──► W ──► logits

The decoder runs once. Its hidden states are constants from then on; the only unknown is δ, one vector per sample, fitted so
that W(h + δ) predicts the prompt itself better. The same δ is then used for every token of the answer.

    (1)  z_t = W (h_t + δ)                                      the model with δ; δ = 0 is the plain model
    (2)  L(δ) = -1/(n-1) Σ_{t<n} log softmax(z_t)[x_{t+1}]      "Prompt Stage": what the steps minimise
    (3)  δ ← AdamW(δ, ∇L)                                       for a few steps, from δ = 0
    (4)  x_{t+1} ~ softmax(W (h_t + δ))                         "Generation Stage", from the last prompt position on

    paper       here                    checkpoint                  shape
    x           tokens                                              (B, T)
    H           hidden                  output of model.norm        (B, T, d)
    W_LM        lm_head                 lm_head.weight, or          (V, d)
                                        model.embed_tokens.weight if the head is tied
    δ           delta                                               (B, 1, d) float32
    T, η        steps, lr               3, 0.01 in the paper's text; 5, 0.1 in its code
    W_LM δ      lm_head(delta)                                      (B, 1, V)      "logit modulation vector"
(Equations are numbered by this file; the stages are the paper's names.)

Two functions with the same arguments and the same numbers. Read `optimize_delta`: it is the method. `optimize_delta_fast`
is what generate.py runs: the same steps for a few matrix-vector products each, with bounded memory.

What differs from the authors' public code, and why:
  - one δ per sample over its own tokens; theirs is shared by a whole batch and fitted to the padding as well;
  - only δ receives a gradient; theirs also accumulates one for the whole of W, and throws it away;
  - W h is computed once; theirs multiplies by W again in every step;
  - δ and the loss are float32 even in a bfloat16 model, where a step of 0.01 would vanish in the rounding of h.

Letters: B batch, T tokens, d width, V vocabulary, n predicted tokens of one sample (T - 1 without padding).
"""
import math
import warnings

import torch
import torch.nn.functional as F

from linear import product, transposed_cpu

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-5, 1e-8     # of the authors' AdamW
KEPT = 0.85                                             # share of the bound on memory for what is kept; the rest is work space


def optimize_delta(hidden, tokens, lm_head, steps, lr, mask=None):
    """Fit δ to each prompt: the readable form.

    hidden (B, T, d): what the decoder made of `tokens` (B, T); constants here. lm_head: maps (..., d) to logits (..., V).
    mask (B, T) bool, True = a token of the prompt; None = all. A pair (t, t+1) counts where both are.
    -> delta (B, 1, d) float32, and losses (steps, B): the mean cross entropy of every sample *before* each step, in nats.
    Raises ValueError for steps < 0, an lr that is not a positive number, or shapes that do not belong together.
    """
    targets, n = next_tokens(hidden, tokens, steps, lr, mask)               # (B, T-1), (B,)
    dtype = next(lm_head.parameters()).dtype
    with torch.no_grad():
        # W(h + δ) = W h + W δ. The first part never changes, so it is computed once, outside the loop and outside autograd.
        base = lm_head(hidden[:, :-1]).float()                              # (B, T-1, V)
    delta = torch.zeros(hidden.shape[0], 1, hidden.shape[2], device=hidden.device, requires_grad=True)
    optimizer = torch.optim.AdamW([delta], lr=lr, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    losses = []
    for _ in range(steps):
        with torch.enable_grad():                                           # callers often stand inside no_grad
            logits = base + lm_head(delta.to(dtype)).float()                # (B, T-1, V) + (B, 1, V)
            nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)   # (B, T-1)
            loss = nll.sum(1) / n                                           # (B,); nll is 0 where nothing counts
            # No sample's loss depends on another's δ: the gradient of the sum is every sample's own gradient.
            delta.grad, = torch.autograd.grad(loss.sum(), delta)            # of δ alone, even if W is trainable
        optimizer.step()
        losses.append(loss.detach())
    return delta.detach(), torch.stack(losses) if steps else torch.zeros(0, hidden.shape[0], device=hidden.device)


def next_tokens(hidden, tokens, steps, lr, mask):
    """Check the arguments -> targets (B, T-1): the token each position must predict, or -100 where nothing counts (which
    cross_entropy ignores); and n (B,): how many count, at least 1."""
    if hidden.ndim != 3 or tuple(tokens.shape) != tuple(hidden.shape[:2]) or hidden.shape[1] == 0:
        raise ValueError(f"hidden {tuple(hidden.shape)} and tokens {tuple(tokens.shape)} must be (B, T, d) and (B, T), T > 0")
    if mask is not None and tuple(mask.shape) != tuple(tokens.shape):
        raise ValueError(f"mask {tuple(mask.shape)} must have the shape of tokens {tuple(tokens.shape)}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps is {steps!r}; needs an integer of 0 or more")
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr is {lr!r}; needs a finite number above 0")
    targets = tokens[:, 1:]
    if mask is not None:
        mask = mask.to(torch.bool)
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    n = (targets != -100).sum(1)
    if steps and bool((n == 0).any()):
        warnings.warn("a prompt of one token has no next token to learn from: its δ stays 0", stacklevel=3)
    return targets, n.clamp(min=1)


@torch.no_grad()
def optimize_delta_fast(hidden, tokens, lm_head, steps, lr, mask=None, memory=1 << 30):
    """Fit δ to each prompt: the same arguments and numbers as `optimize_delta`, without autograd.

    `lm_head` is read as a matrix: what counts of it is `lm_head.weight`, without a bias. In 16 bits the two forms agree up to
    the rounding of W h. `memory`: bound in bytes on what is kept and made on the way, a copy of hidden aside. If E, below, does not
    fit for all positions, z is kept instead, which takes half of that where it has 16 bits; and where that does not fit, W h is
    made again in every step.

    The gradient of (2) in closed form. Let z = W h and E = exp(z - max z) (n, V), once before the loop. In every step
        b = W δ,  c = exp(b - max b)        (V,)    the constant that δ adds to all logits
        s = E c                             (n,)    so that softmax(z + b)[t, v] = E[t, v] c[v] / s[t]
        p = c ⊙ Eᵀ(1/s) / n                 (V,)    the mean predicted distribution
        g = Wᵀ(p - y)                       (d,)    y: the mean of what really came next, one-hot
        L = mean(log s + max z - z[x]) + max b - <b, y>
    That is four matrix-vector products, two with W and two with E, where autograd needs (n, V) exponentials and derivatives.
    (From z alone, E is made anew a few positions at a time: exponentials again, but not W h.)
    E c is exact enough in float32 while b spreads over less than 60: every s is then at least e^-60, and the entries that
    underflow in E, below e^-87, cannot matter. The spread is looked at once, after the last step, so that a GPU is never
    waited for; if it was wider, the loop is run again with the softmax of z + b itself, right for any b.
    """
    targets, n = next_tokens(hidden, tokens, steps, lr, mask)
    (B, _, d), V, weight = hidden.shape, lm_head.weight.shape[0], lm_head.weight
    rows = max(1, memory // (32 * V))           # positions at a time: their logits in float32 take an eighth of memory
    samples = [(i, hidden[i, :-1][targets[i] != -100], targets[i][targets[i] != -100]) for i in range(B)]
    budget = room_to_keep(memory, steps, B, V)
    keep_E = 4 * V * sum(len(x) for _, _, x in samples) <= budget               # else z, of as many positions as can be
    blocks, y = [], torch.zeros(B, V, device=hidden.device)                     # y (B, V)
    for i, all_h, all_x in samples:
        for h, x in zip(all_h.split(rows), all_x.split(rows)):                  # (r, d), (r,)
            y[i].index_add_(0, x, torch.ones_like(x, dtype=y.dtype) / n[i])
            kept, top, above = None, None, None
            if budget >= 4 * V * len(x):
                kept = product(h, weight)                                       # z (r, V)
                top, above = against_top(kept, x)                               # (r, 1), (r,)
                kept = kept.float().sub_(top).exp_() if keep_E else kept
                budget -= kept.nbytes
            blocks.append((i, h, x, kept, top, above))

    def fit(wide):
        delta, mean, square = torch.zeros(3, B, d, device=hidden.device)        # δ and AdamW's two moments
        losses, widest = torch.zeros(steps, B, device=hidden.device), torch.zeros((), device=hidden.device)
        for step in range(steps):
            b = lm_head(delta.to(weight.dtype)).float() if step else torch.zeros_like(y)    # (B, V); δ starts at 0
            top_b = b.amax(1, keepdim=True)                                     # (B, 1)
            widest = torch.maximum(widest, (top_b[:, 0] - b.amin(1)).amax())
            c = torch.ones_like(b) if wide else (b - top_b).exp_()              # (B, V)
            p = torch.zeros_like(b)                                             # (B, V)
            for i, h, x, kept, top, above in blocks:
                if kept is None:
                    kept = product(h, weight).float().add_(b[i]) if wide else product(h, weight)
                    top, above = against_top(kept, x)
                if not wide:
                    above = above + top_b[i] - b[i][x]
                for E in [kept] if keep_E and not wide else exponentials(kept, top):
                    s = E @ c[i]                                                # (r,)
                    p[i].addmv_(E.T, 1 / s)
                    losses[step, i] += s.log().sum() / n[i]
                losses[step, i] += above.sum() / n[i]
            g = weight_gradient(c * p / n[:, None] - y, weight)                 # (B, d)
            # AdamW, as torch.optim.AdamW does it: decay, moments, bias correction, step
            delta *= 1 - lr * WEIGHT_DECAY
            mean = BETAS[0] * mean + (1 - BETAS[0]) * g
            square = BETAS[1] * square + (1 - BETAS[1]) * g * g
            unbias = [1 - beta ** (step + 1) for beta in BETAS]
            delta -= lr * (mean / unbias[0]) / ((square / unbias[1]).sqrt() + EPS)
        return delta[:, None], losses, widest

    delta, losses, widest = fit(wide=False)
    if not widest < 60:                                                         # so written that NaN counts as wide
        blocks = [(i, h, x, None, None, None) for i, h, x, *_ in blocks]        # what was kept makes room
        delta, losses, _ = fit(wide=True)
    return delta, losses


def room_to_keep(memory, steps, B, V):
    """-> bytes of `memory` for E or z. A single step has no use for them; some eight vectors (B, V) are alive at a time."""
    return int(KEPT * memory) - 8 * 4 * B * V if steps > 1 else 0


def against_top(z, x):
    """Logits z (r, V) and the true next tokens x (r,) -> max z (r, 1) and max z - z[x] (r,), float32."""
    top = z.amax(1, keepdim=True).float()
    return top, (top - z.gather(1, x[:, None]))[:, 0]


def exponentials(z, top):
    """exp(z - top) for logits z (r, V) and top (r, 1): yields (some rows, V) float32, every piece in the place of the one
    before, which is overwritten. On a CPU a piece stays in the cache until it has been used."""
    few = max(1, (1 << (20 if z.is_cpu else 24)) // z.shape[1])
    room = torch.empty(min(few, len(z)), z.shape[1], device=z.device)
    for z, top in zip(z.split(few), top.split(few)):
        yield room[:len(z)].copy_(z).sub_(top).exp_()


def weight_gradient(r, weight):
    """Wᵀ r of every sample: r (B, V) float32, weight (V, d) -> (B, d) float32."""
    scale = r.abs().amax(1, keepdim=True).clamp(min=1e-30)          # float16 has no numbers as small as most entries of r
    r = (r / scale).to(weight.dtype)
    return (transposed_cpu(r, weight) if weight.is_cpu else (r @ weight).float()) * scale
