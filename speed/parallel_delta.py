"""SLOT in closed form for a model in parts: delta.py where a rank has the logits of its own tokens.

Letters: n positions predict a token, d width, V vocabulary, of which each of N ranks has V/N rows;
z, x, a, s, r as in delta.py.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F

from speed.delta import transposed
from speed.ranks import total


@torch.no_grad()
def optimize_delta_fast(hidden, tokens, head, steps, lr, memory=1 << 30):
    """delta.optimize_delta_fast for parallel.py's `Head`: same arguments and results on every rank.

    A rank has the columns of its own tokens of z = W(h + δ), nobody has all. Over the ranks go, in
    every step, the maximum and the partition sum of each position, and the gradient of δ. memory:
    bytes for z and its like; W h is made anew in every step where it does not fit.
    """
    W, device = head.weight, hidden.device
    h, n = hidden[0, :-1], hidden.shape[1] - 1
    x = torch.tensor(list(tokens[1:]), dtype=torch.int64, device=device) - head.mine.start
    rows = max(1, min(memory // (16 * len(W)), n))              # positions at a time
    blocks = list(zip(h.split(rows), x.split(rows)))
    kept = F.linear(h, W).float() if len(blocks) == 1 else None

    delta = torch.zeros(1, 1, hidden.shape[-1], device=device)
    optimizer = torch.optim.AdamW([delta], lr=lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=1e-8)
    losses = []
    for step in range(steps + 1):
        b = F.linear(delta[0].to(W.dtype), W).float()                       # W δ (1, V/N)
        loss, r = torch.zeros((), device=device), torch.zeros_like(b[0])
        for part_h, part_x in blocks:
            Wh = F.linear(part_h, W).float() if kept is None else kept
            loss += loss_and_difference(Wh + b, part_x, r)
        losses.append(loss / n)
        if step < steps:                                        # the last round only measures
            delta.grad = total(transposed(r / max(n, 1), W))[None, None]
            optimizer.step()

    if total((~b.isfinite()).sum()) > 0:                        # on whichever rank
        raise ValueError(f"SLOT: W(h + δ) leaves {W.dtype}'s range at lr {lr:g}; take a lower one "
                         "or a wider dtype")
    return delta, torch.stack(losses)


def loss_and_difference(z, x, r):
    """z (rows, V/N): the logits of this rank's tokens. x (rows,): the token that came next, 0 being
    the first of this rank. Adds prediction minus truth to r (V/N,) -> the sum of the losses."""
    here = ((x >= 0) & (x < z.shape[1])).nonzero()[:, 0]        # positions whose token is ours
    right = x[here]
    z -= total(z.amax(1), op=dist.ReduceOp.MAX)[:, None]
    log_a = z.new_zeros(len(z))
    log_a[here] = z[here, right]
    E = z.exp_()
    E[here, right] = 0                                          # the right token apart: delta.py
    others, log_a = total(torch.stack((E.sum(1), log_a)))       # over all V
    a = log_a.exp()
    s = others + a
    r.addmv_(E.T, 1 / s)
    r.index_add_(0, right, -(others / s)[here])
    return torch.where(a > others, (others / a).log1p(), s.log() - log_a).sum()
