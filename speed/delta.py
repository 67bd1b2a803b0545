"""SLOT without autograd: the numbers of slot.optimize_delta for four products a step.

Let z = W h, for the n = T - 1 positions that predict a token. W h never changes, so neither does

    E = exp(z - max z), but 0 for the token that came next                 (n, V), once
    a = exp(z - max z) at that token                                       (n,)

With δ the logits are z + b, where b = W δ is the same for all positions. So in every step

    b = W δ,  c = exp(b - max b)                                           (V,)
    o = E c,  a' = a c[x]            weight of all other tokens, and of the right one    (n,)
    s = o + a'                       so that softmax(z + b)[t, v] = E[t, v] c[v] / s[t]
    r = (c ⊙ Eᵀ(1/s) - Σ_t o/s at x_t) / n        mean of prediction minus truth         (V,)
    g = Wᵀ r                                      the gradient of equation (2)           (d,)

Four products with a vector, two with W and two with E, where autograd needs exponentials of n × V
numbers. To keep the right token apart costs nothing, and counts where the model is nearly sure:
p - 1 would cancel there, o/s does not, and AdamW divides even a tiny gradient by its size.
E c is exact enough in float32 while b spreads over less than SPREAD; beyond, E is made of z + b.
"""
import torch

SPREAD = 60             # exp(-60) is still a number in float32 with room below it
KEPT = 0.75             # share of the memory for E; the rest is for work


@torch.no_grad()
def optimize_delta_fast(hidden, tokens, lm_head, steps, lr, memory=1 << 30):
    """Fit δ to one prompt: arguments and results of slot.optimize_delta.

    memory: bytes, a bound on all (n, V) that is kept or made. Where E does not fit, it is kept for
    as many positions as do, and made again in every step for the others. ValueError as there.
    """
    W = lm_head.weight
    V, device = len(W), hidden.device
    n = hidden.shape[1] - 1
    h, x = hidden[0, :-1], torch.tensor(list(tokens[1:]), dtype=torch.int64, device=device)
    rows = max(1, int(min(memory // (32 * V), n)))      # positions at a time, in eight (rows, V)
    fit = int(KEPT * memory) // (4 * V)                 # positions whose E is kept, float32
    blocks = []
    for begin in range(0, n, rows):
        part = h[begin:begin + rows], x[begin:begin + rows]
        kept = exponentials(lm_head, *part) if begin + rows <= max(fit, rows) else None
        blocks.append((*part, kept))

    delta = torch.zeros(1, 1, hidden.shape[-1], device=device)
    optimizer = torch.optim.AdamW([delta], lr=lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=1e-8)
    losses = []
    for step in range(steps + 1):
        b = lm_head(delta[0].to(W.dtype))[0].float()                        # (V,)
        loss, r = loss_and_difference(lm_head, blocks, b, n)
        losses.append(loss)
        if step < steps:                                # the last round only measures
            delta.grad = transposed(r, W)[None, None]
            optimizer.step()

    if not b.isfinite().all():
        raise ValueError(f"SLOT: W(h + δ) leaves {W.dtype}'s range at lr {lr:g}; take a lower one "
                         "or a wider dtype")
    return delta, torch.stack(losses)


def exponentials(lm_head, h, x, b=None):
    """h (r, d), x (r,) -> E (r, V), and log a (r,): see above; of z + b where b (V,) is given."""
    z = lm_head(h).float()                                                  # (r, V)
    if b is not None:
        z += b
    z -= z.amax(1, keepdim=True)
    log_a = z.gather(1, x[:, None])[:, 0]
    return z.exp_().scatter_(1, x[:, None], 0), log_a


def loss_and_difference(lm_head, blocks, b, n):
    """-> equation (2), and r (V,), the mean of prediction minus truth, for the logits z + b."""
    wide = not b.max() - b.min() < SPREAD               # so written that NaN counts as wide
    if wide:
        shift, c = torch.zeros_like(b), torch.ones_like(b)
    else:
        shift = b - b.max()
        c = shift.exp()
    total, r, truth = torch.zeros((), device=b.device), torch.zeros_like(b), torch.zeros_like(b)
    for h, x, kept in blocks:
        if wide:
            E, log_a = exponentials(lm_head, h, x, b)
        else:
            E, log_a = kept or exponentials(lm_head, h, x)
        log_a = log_a + shift[x]
        others, a = E @ c, log_a.exp()                                      # (r,) each
        s = others + a
        r.addmv_(E.T, 1 / s)
        truth.index_add_(0, x, others / s)
        # log s - log a, without cancellation where the model is nearly sure
        total += torch.where(a > others, (others / a).log1p(), s.log() - log_a).sum()
        del E                       # before the next block is made
    return total / n, (c * r - truth) / max(n, 1)         # n = 0: no loss, and nothing to learn


def transposed(r, W):
    """Wᵀ r for r (V,) float32 -> (d,) float32: the gradient of SLOT. W in 16 bits is multiplied in
    float32, a block of rows at a time; r in 16 bits would lose digits, in float16 most entries."""
    if W.dtype == torch.float32:
        return r @ W
    rows = 512 if W.is_cpu else (1 << 24) // W.shape[1]     # on the CPU the copy stays in the cache
    y = torch.zeros(W.shape[1], device=W.device)
    for some, block in zip(r.split(rows), W.split(rows)):
        y.addmv_(block.float().T, some)
    return y
