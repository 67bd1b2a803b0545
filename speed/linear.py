"""y = x Wᵀ at this machine's speed: several ways to the same product, a stopwatch, a choice.

No way is the best everywhere: torch's own product can be half as fast as another, or the other way
round, by the processor, the dtype and the number of rows of x. So nothing here asks what the
processor is called: `use` times the ways on the model's own matrices, once, and takes the fastest.
SLOT_PRODUCTS=plain in the environment leaves torch's own; SLOT_PRODUCTS=NAME forces one, for tests.
"""
import functools
import os
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

PARTS = 8               # a product in so many parts keeps so many cores busy
CLASSES = (1, 4, 32, 1 << 62)           # rows of x: up to 1, up to 4, ...; each has its own choice
MEASURED = (1, 4, 32, 128)              # the rows that stand for a class when it is timed
MARGIN = 0.9            # another way must take less than this share of torch's own time
SMALL = 1 << 20         # numbers in the largest matrix: below, any way will do
chosen = {}             # (dtype, class) -> a way; (dtype, "transposed") -> a way


def plain(x, W, b):
    return F.linear(x, W, b)


def onednn(x, W, b):
    """oneDNN by the entry that torch's compiler uses; F.linear asks MKL for float32."""
    return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")


def native(x, W, b):
    """torch's own loop instead of oneDNN's, for 16 bits: one row reads W at memory speed."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return F.linear(x, W, b)
    finally:
        torch._C._set_mkldnn_enabled(before)


def parts(x, W, b):
    """One row as a batch of partial products: MKL may give a single one to one core only."""
    outputs, inputs = W.shape
    if outputs % PARTS or len(x) > 1:
        return F.linear(x, W, b)
    y = torch.bmm(W.view(PARTS, -1, inputs), x.T.expand(PARTS, inputs, 1)).view(1, outputs)
    return y if b is None else y + b


def vector(x, W, b):
    """One row as a vector, for which torch has another kernel."""
    if len(x) > 1:
        return F.linear(x, W, b)
    y = torch.mv(W, x[0])[None]
    return y if b is None else y + b


def float32(x, W, b):
    """16 bits multiplied in float32, a block of W at a time: its copy stays in the cache."""
    out = x.new_empty(len(x), len(W))
    x, rows = x.float(), max(64, (1 << 20) // W.shape[1])
    for i in range(0, len(W), rows):
        out[:, i:i + rows] = F.linear(x, W[i:i + rows].float())
    return out if b is None else out + b


def whole(r, W):
    return r @ W


def summed(r, W):
    """Wᵀ r as partial products, summed in float32: they keep all cores busy, and the caches."""
    most = len(r) - len(r) % 256
    columns = W[:most].view(256, most // 256, W.shape[1])           # (256, V/256, d)
    y = torch.bmm(r[:most].view(256, 1, -1), columns).float().sum((0, 1))
    return y + r[most:].float() @ W[most:].float()


WAYS = {torch.float32: (plain, onednn, parts, vector),
        torch.bfloat16: (plain, native, vector, float32),
        torch.float16: (plain, native, vector, float32)}


def fastest(ways, call, rounds=3):
    """-> the way with the least time; ways[0] unless another is faster by the MARGIN."""
    seconds = {}
    for way in list(ways) * (rounds + 1):               # in turns; the first round warms up
        began = time.perf_counter()
        try:
            call(way)
        except (RuntimeError, AttributeError):          # this torch does not have it
            seconds[way] = [float("inf")]
            continue
        seconds.setdefault(way, []).append(time.perf_counter() - began)
    least = {way: min(times[1:] or times) for way, times in seconds.items()}
    best = min(least, key=least.get)
    return best if least[best] < MARGIN * least[ways[0]] else ways[0]


@torch.no_grad()
def use(lm):
    """Swap the products of lm's nn.Linear for this machine's fastest; same values up to rounding.
    -> their names, for the statistics line. Takes 0.2 to 0.3 s for a model of 0.5 B parameters,
    nothing for a small one or on a GPU."""
    head, matrix = lm.lm_head.weight, lm.model.layers[0].mlp.gate_proj.weight
    forced, dtype = os.environ.get("SLOT_PRODUCTS"), head.dtype
    ways = {way.__name__: way for way in WAYS.get(dtype, (plain,))}
    if head.is_cpu and head.numel() < SMALL:
        torch.set_num_threads(1)                        # done before a second thread has begun
    if not head.is_cpu or forced == "plain" or (head.numel() < SMALL and not forced):
        return "plain"
    part = head[:max(SMALL // head.shape[1], 1) * 16]   # more than a core's own cache holds
    for rows, size in zip(MEASURED, CLASSES):
        sample = part if rows == 1 else matrix
        x = torch.randn(rows, sample.shape[1]).to(dtype)
        chosen[dtype, size] = ways.get(forced) or fastest(
            list(ways.values()), lambda way: way(x, sample, None))
    r = torch.randn(len(part)).to(dtype)
    chosen[dtype, "transposed"] = fastest((whole, summed), lambda way: way(r, part))
    for module in lm.modules():
        if isinstance(module, nn.Linear):
            module.forward = functools.partial(product, module)
    return ", ".join(sorted({chosen[dtype, size].__name__ for size in CLASSES}))


def product(module, x):
    """What stands in the place of nn.Linear.forward: x (..., inputs) -> (..., outputs)."""
    W, b = module.weight, module.bias
    trained = x.requires_grad or W.requires_grad or (b is not None and b.requires_grad)
    if torch.is_grad_enabled() and trained:
        return F.linear(x, W, b)
    rows = x.reshape(-1, x.shape[-1])
    size = next(size for size in CLASSES if len(rows) <= size)
    return chosen[W.dtype, size](rows, W, b).view(*x.shape[:-1], len(W))


def transposed(r, W):
    """Wᵀ r for r (V,) float32 -> (d,) float32: the gradient of SLOT. In 16 bits r is scaled first:
    float16 has no numbers as small as most entries of r."""
    scale = r.abs().amax().clamp(min=1e-30)
    way = chosen.get((W.dtype, "transposed"), whole)
    return way((r / scale).to(W.dtype), W).float() * scale
