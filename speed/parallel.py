"""One model over many devices: torchrun starts N processes, *ranks*; each has 1/N of the weights.

    torchrun --nproc-per-node 8 generate.py --model DIR --slot-steps 5

    weights              a rank keeps                   its product is         summed over ranks
    q, k, v, gate, up    rows: some heads or numbers    these heads, numbers   nothing
    o, down              columns: the same              one summand            (T, d), twice a layer
    head                 rows: some tokens              their logits           (T, V)
    embedding, norms     all

All ranks do the same with the same numbers: what the last column sums arrives at each with the same
bits, and so hidden states, δ, logits and ids are the same everywhere. h is whole on every rank, so
δ is added as it is: nothing is ever divided by N. The embedding stays whole because its rows are
only looked up; in a tied model the head is a part of it and costs nothing.

slot.py runs as it stands. `Head` gives it whole logits, so that any loss that a reader writes into
it works, and sums δ's gradient. For long prompts there is the closed form, where a rank has its own
logits only. How numbers travel is torch's affair: NCCL between GPUs, gloo between CPUs.

Letters: T tokens of the prompt, n = T - 1 of them predict one, d width, V vocabulary.
"""
import os
import sys
import traceback
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import load_weights
from checks.ranks import check_parts, check_ranks
from speed.delta import transposed

TIMEOUT = timedelta(minutes=10)     # a rank that is silent for so long is taken for dead


# ---- ranks

def start(device, ranks=None):
    """Join the ranks of one model -> this rank's device, how many ranks, and which model: 0, 1, ...

    ranks: so many form a model (default: all); the next as many form another, which knows nothing
    of the first. Only the first rank of each prints. ValueError if the numbers do not fit.
    """
    check_ranks(os.environ, device, ranks)
    place, world, local = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    ranks = ranks or world
    model, own = divmod(place, ranks)
    store, _, _ = together(next, dist.rendezvous("env://", timeout=TIMEOUT))
    together(dist.init_process_group, store=dist.PrefixStore(f"model {model}", store), rank=own,
             world_size=ranks, timeout=TIMEOUT)
    if own > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")         # errors know sys.__stderr__
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
    return f"cuda:{local}" if device == "cuda" else device, ranks, model


def size():
    """How many ranks form the model: 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Which of them this one is."""
    return dist.get_rank() if size() > 1 else 0


def together(operation, *arguments, **more):
    """Whatever needs the other ranks. ConnectionError, one line, if one of them is gone."""
    try:
        return operation(*arguments, **more)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split("] ", 1)[-1][:60]
        raise ConnectionError(f"another rank has ended or does not answer ({reason}); see what it "
                              "says, then start all of them again") from None


def total(x, **operation):
    """x becomes its sum over all ranks -> x, with the same bits on each. op=...: or the maximum."""
    together(dist.all_reduce, x, **operation)
    return x


def first(make):
    """What make() returns on rank 0, on every rank: standard input has one reader."""
    box = [make() if rank() == 0 else None]
    if size() > 1:
        together(dist.broadcast_object_list, box)
    return box[0]


def agreed(choose):
    """choose: logits (V,) -> id. The same for all ranks: rank 0 draws and tells the others."""
    def told(logits):
        id = torch.tensor(choose(logits) if rank() == 0 else 0)
        together(dist.broadcast, id, 0)
        return id.item()
    return told if size() > 1 else choose


# ---- the model in parts

def share(count):
    """-> the slice of `count` rows that this rank keeps; parts differ by one row at most."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def parts_of(config):
    """-> {module: (dimension of its weight, slice that this rank keeps)}; all others stay whole.

    Attention is divided by heads, or stays whole where they do not divide (9 heads, 2 ranks). Where
    there are more ranks than key/value heads, some ranks keep the same one.
    """
    H, K, D, ranks = (config.num_attention_heads, config.num_key_value_heads, config.head_dim,
                      size())
    check_parts(config, ranks)
    inner = share(config.intermediate_size)
    parts = {"gate_proj": (0, inner), "up_proj": (0, inner), "down_proj": (1, inner)}
    if H % ranks == 0 and (K % ranks == 0 or ranks % K == 0):
        queries, begin = share(H * D), K * rank() // ranks * D
        keys = slice(begin, begin + max(1, K // ranks) * D)
        parts |= {"q_proj": (0, queries), "k_proj": (0, keys), "v_proj": (0, keys),
                  "o_proj": (1, queries)}
    if not config.tie_word_embeddings:
        parts["lm_head"] = 0, share(config.vocab_size)
    return parts


def part(parts, name, weight):
    """What this rank keeps of a weight: a copy, so that the file's own pages can go."""
    module, kind = name.split(".")[-2:]
    dimension, mine = parts.get(module, (0, slice(None)))
    if dimension == 0:
        kept = weight[mine]
    elif kind == "weight":
        kept = weight[:, mine]
    else:                               # o, down: a sum needs its bias once, so rank 0 brings it
        kept = weight if rank() == 0 else torch.zeros_like(weight)
    return kept.clone(memory_format=torch.contiguous_format)


def load_model(folder, device="cpu", dtype="auto"):
    """As load_weights.load_model, but only this rank's part of each weight is read and kept.
    -> the model, and a few words on how it is divided."""
    config = load_weights.read_config(load_weights.find_model(folder))
    parts = parts_of(config)
    lm = load_weights.load_model(folder, device, dtype, partial(part, parts))
    for layer in lm.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, x, y: total(y))
        if "o_proj" in parts:
            layer.self_attn.o_proj.register_forward_hook(lambda module, x, y: total(y))
    lm.lm_head = Head(lm.lm_head.weight, config.vocab_size)
    ranks, H, K = size(), config.num_attention_heads, config.num_key_value_heads
    if "o_proj" not in parts:
        return lm, (f"MLP and head divided over {ranks} ranks, attention whole on each, which "
                    f"cannot share {H} and {K} heads")
    lm.config = replace(config, num_key_value_heads=max(1, K // ranks))     # of this rank's cache
    repeated = ", key/value heads repeated" if K < ranks else ""
    return lm, f"heads, MLP and head divided over {ranks} ranks{repeated}"


class Head(nn.Module):
    """In the place of lm_head: hidden (..., d) -> logits (..., V), whole on every rank. weight
    (V/N, d): the rows of this rank's tokens, mine.start to mine.stop."""

    def __init__(self, weight, vocabulary):
        super().__init__()
        self.vocabulary, self.mine = vocabulary, share(vocabulary)
        self.weight = weight
        if len(weight) == vocabulary:                           # tied: rows of the embedding
            self.weight = nn.Parameter(weight[self.mine], requires_grad=False)

    def forward(self, hidden):
        return WholeLogits.apply(hidden, self)


class WholeLogits(torch.autograd.Function):
    """A rank has its own logits and 0 for the others, so that their sum is exact, whatever the size
    of the parts. Backwards it has one summand of the gradient, from its own rows."""

    @staticmethod
    def forward(ctx, hidden, head):
        ctx.head = head
        logits = hidden.new_zeros(*hidden.shape[:-1], head.vocabulary)
        logits[..., head.mine] = F.linear(hidden, head.weight)
        return total(logits)

    @staticmethod
    def backward(ctx, gradient):
        head = ctx.head
        return total((gradient[..., head.mine] @ head.weight).float()), None


# ---- SLOT in closed form

@torch.no_grad()
def optimize_delta_fast(hidden, tokens, head, steps, lr, memory=1 << 30, watch=None):
    """speed.delta.optimize_delta_fast for a `Head`: same arguments, same results, on every rank.

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
        if watch:
            watch(step, delta.clone())
        if step < steps:                                        # the last round only measures
            delta.grad = total(transposed(r / max(n, 1), W))[None, None]
            optimizer.step()

    if total((~b.isfinite()).sum()) > 0:                        # on whichever rank
        raise ValueError(f"SLOT: δ leaves {W.dtype}'s range at lr {lr:g}; take a lower one")
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
