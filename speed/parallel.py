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
it works, and sums δ's gradient. For long prompts there is parallel_delta.py, where a rank has its
own logits only. How the ranks talk: ranks.py.

Letters: T tokens of the prompt, d width, V vocabulary.
"""
from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import load_weights
from checks.ranks import check_parts
from speed.ranks import rank, size, total


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
        tied = len(weight) == vocabulary
        self.weight = weight[self.mine].detach() if tied else weight     # rows of the embedding

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
