"""From logits to the next token: the likeliest, or one drawn at random.

temperature     logits / temperature before softmax: below 1 sharper, above 1 flatter; 0 is greedy
top_k           only the k likeliest can be drawn (Fan et al. 2018, arXiv 1805.04833)
top_p           only the likeliest that together have probability p (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751)
"""
import math

import torch


def choose(lm, logits, temperature, top_k, top_p, draws):
    """logits (rows, V) float32 -> one id a row: the likeliest, or drawn from softmax(logits / temperature), cut to top_k, top_p.

    draws: a torch.Generator for every row. Raises ValueError for logits that are not finite, naming the weight of lm that is not."""
    best, ids = logits.max(-1)
    if not torch.isfinite(logits).all():
        bad = next((name for name, p in lm.named_parameters() if not p.isfinite().all()), None)
        raise ValueError(f"the logits are not finite: {bad} holds NaN or infinity; download the weights again" if bad else
                         f"the logits are not finite: the numbers overflow {lm.lm_head.weight.dtype}; try --dtype float32")
    if temperature == 0:
        return ids.tolist()
    logits = (logits - best[:, None]) / temperature
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        p, order = probabilities.sort(descending=True, stable=True)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)             # the token that crosses top_p stays
        probabilities = torch.zeros_like(p).scatter(-1, order, p)
    return [torch.multinomial(p, 1, generator=draw).item() for p, draw in zip(probabilities, draws)]
