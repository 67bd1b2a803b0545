"""y = x Wᵀ at this machine's speed: several ways to the same product, a stopwatch, a choice.

No way is the best everywhere: torch's own product can take twice as long as another, or half, by
processor, dtype, matrix and number of rows. So nothing here asks what the processor is called:
`use` times the ways on the model's own matrices, once, and takes the fastest. SLOT_PRODUCTS=plain
in the environment leaves torch's own; SLOT_PRODUCTS=NAME forces another where it can be.
"""
import functools
import math
import os
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

CLASSES = {1: 1, 4: 4, 32: 32, 1 << 62: 128}    # up to so many rows of x: timed with so many
MARGIN = 0.9            # another way must take less than this share of torch's own time
SMALL = 1 << 20         # numbers in the largest matrix: below, any way will do
PIECE = 1 << 24         # numbers of the head that are timed: more than a core's own cache holds


def plain(x, W, b):
    return F.linear(x, W, b)


def onednn(x, W, b):
    """oneDNN by the entry that torch's compiler uses; F.linear asks MKL for float32."""
    return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")


def vector(x, W, b):
    """One row as a vector, for which torch has another kernel."""
    y = torch.mv(W, x[0])[None]
    return y if b is None else y + b


def float32(x, W, b):
    """16 bits multiplied in float32, a block of W at a time: its copy stays in the cache."""
    out = x.new_empty(len(x), len(W))
    x, rows = x.float(), max(64, (1 << 20) // W.shape[1])
    for i in range(0, len(W), rows):
        out[:, i:i + rows] = F.linear(x, W[i:i + rows].float())
    return out if b is None else out + b


BITS_16 = (plain, float32)
WAYS = {torch.float32: (plain, onednn), torch.bfloat16: BITS_16, torch.float16: BITS_16}


def fastest(ways, x, W, rounds=4):
    """-> the way with the least time; ways[0] unless another is faster by the MARGIN."""
    least = {}
    for way in list(ways) * rounds:                     # in turns; the first round warms up
        if least.get(way, 0) > 4 * min(least.values(), default=0):
            continue                                    # hopeless: once was enough
        began = time.perf_counter()
        try:
            way(x, W, None)
        except (RuntimeError, AttributeError):          # this torch does not have it
            began = -math.inf
        least[way] = min(least.get(way, math.inf), time.perf_counter() - began)
    best = min(least, key=least.get)
    return best if least[best] < MARGIN * least[ways[0]] else ways[0]


@torch.no_grad()
def use(lm):
    """Swap the products of lm's nn.Linear for this machine's fastest; same values up to rounding.
    -> their names, for the statistics line. Takes 0.1 to 0.3 s for a model of 0.5 B parameters,
    0.6 where 16 bits are emulated, nothing for a small one or on a GPU."""
    head, matrix = lm.lm_head.weight, lm.model.layers[0].mlp.gate_proj.weight
    forced, dtype = os.environ.get("SLOT_PRODUCTS"), head.dtype
    if head.is_cpu and head.numel() < SMALL:
        torch.set_num_threads(1)                        # done before a second thread has begun
    if not head.is_cpu or forced == "plain" or (head.numel() < SMALL and not forced):
        return "plain"

    tables = []
    for W in (matrix, head[:PIECE // head.shape[1]]):   # the head is so large that it differs
        tables.append({})
        for most, rows in CLASSES.items():
            ways = WAYS.get(dtype, (plain,)) + (vector,) * (rows == 1)
            ways = [way for way in ways if way.__name__ == forced] or ways
            tables[-1][most] = fastest(ways, torch.randn(rows, W.shape[1]).to(dtype), W)
    for module in lm.modules():
        if isinstance(module, nn.Linear):
            module.forward = functools.partial(product, module, tables[module is lm.lm_head])
    return ", ".join(sorted({way.__name__ for table in tables for way in table.values()}))


def way_of(table, rows):
    return next(way for most, way in table.items() if rows <= most)


def product(module, table, x):
    """What stands in the place of nn.Linear.forward: x (..., inputs) -> (..., outputs)."""
    W, b = module.weight, module.bias
    trained = x.requires_grad or W.requires_grad or (b is not None and b.requires_grad)
    if torch.is_grad_enabled() and trained:
        return F.linear(x, W, b)
    rows = x.reshape(-1, x.shape[-1])
    return way_of(table, len(rows))(rows, W, b).view(*x.shape[:-1], len(W))


def transposed(r, W):
    """Wᵀ r for r (V,) float32 -> (d,) float32: the gradient of SLOT. 16 bits are multiplied in
    float32, a block of W at a time; rounded to 16 bits, most of r would be lost or nothing."""
    if W.dtype == torch.float32:
        return r @ W
    rows = 512 if W.is_cpu else 1 << 14                 # on the CPU its copy stays in the cache
    y = torch.zeros(W.shape[1], device=W.device)
    for some, block in zip(r.split(rows), W.split(rows)):
        y.addmv_(block.float().T, some)
    return y
