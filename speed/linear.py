"""y = x Wᵀ at this machine's speed: several ways to the same product, a stopwatch, a choice.

No way is the best everywhere: torch's own product can take twice as long as another, or half, by
processor, dtype, matrix and number of rows. So nothing here asks what the processor is called:
`use` times the ways on the model's own matrices, once, and takes the fastest. SLOT_PRODUCTS=plain
in the environment leaves torch's own.
"""
import functools
import itertools
import math
import os
import time
from contextlib import suppress

import torch
import torch.nn.functional as F

from checks.memory import free_memory

TRAINED = 0             # a class of its own: one row that needs a gradient, as δ in slot.py's loop
# up to so many rows of x: timed with so many
CLASSES = {TRAINED: TRAINED, 1: 1, 2: 2, 4: 4, 8: 8, 32: 32, 1 << 62: 64}
MARGIN = 0.9            # another way must take less than this share of torch's own time
SMALL = 1 << 20         # numbers in the largest matrix: below, any way will do
LOOK = 0.002            # seconds that a way is looked at, at least, three times
COLD = 7                # layers, and 16ths of the head, timed in turn: few caches hold them all


def plain(x, W, b):
    return F.linear(x, W, b)


def onednn(x, W, b):
    """oneDNN by the entry that torch's compiler uses, on the packed copy of W if there is one."""
    of, version, copy = getattr(W, "packed", (W, None, None))
    if version == W._version and of.data_ptr() == W.data_ptr():     # W is still what was packed
        W = copy
    return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")


def pack(W):
    """Keep, with W, a copy in oneDNN's own layout: else it rearranges W in every product."""
    with suppress(RuntimeError, AttributeError):        # not for this processor, or this torch
        copy = torch.ops.mkldnn._reorder_linear_weight(W.detach())
        W.packed = W.detach(), W._version, copy


def vector(x, W, b):
    """One row as a vector, for which torch has another kernel."""
    y = torch.mv(W, x[0])[None]
    return y if b is None else y + b


def float32(x, W, b):
    """16 bits multiplied in float32, a block of W at a time: its copy stays in the cache. As
    (W xᵀ)ᵀ: x Wᵀ takes twice as long in some processes, it seems where one core reads what another
    has copied."""
    out = x.new_empty(len(x), len(W))
    x, rows = x.float(), max(64, (1 << 20) // W.shape[1])
    copy = W.new_empty(rows, W.shape[1], dtype=torch.float32)
    for y, block in zip(out.split(rows, 1), W.split(rows)):
        y.copy_((copy[:len(block)].copy_(block) @ x.T).T)
    return out if b is None else out + b


BITS_16 = (plain, onednn, float32)
WAYS = {torch.float32: (plain, onednn), torch.bfloat16: BITS_16, torch.float16: BITS_16}


def ways_for(dtype, rows):
    if rows == TRAINED:
        return plain, vector                            # autograd has no gradient of the others
    return WAYS.get(dtype, (plain,)) + (vector,) * (rows == 1)


def factors(matrices, rows):
    """-> x and the W's as a class is timed. Of a row that needs a gradient that is Wᵀ r, for a row
    r: emulated bfloat16 can make it 20 times as slow as the product itself."""
    matrices = [W.T if rows == TRAINED else W for W in matrices]
    return torch.randn(max(1, rows), matrices[0].shape[1]).to(matrices[0].dtype), matrices


def fastest(ways, x, matrices):
    """-> the way with the least time; ways[0] unless another is faster by the MARGIN."""
    least, turns = dict.fromkeys(ways, math.inf), itertools.cycle(matrices)
    for look in range(3):                               # in turns; the first warms up
        for way in ways:
            if look == 2 and least[way] > 2 * min(least.values()):
                continue                                # it will not win any more
            began, calls, spent = time.perf_counter(), 0, 0
            with suppress(RuntimeError, AttributeError):        # this torch does not have it
                while spent < LOOK:
                    way(x, next(turns), None)
                    calls, spent = calls + 1, time.perf_counter() - began
                least[way] = min(least[way], spent / calls)
    best = min(least, key=least.get)
    return best if least[best] < MARGIN * least[ways[0]] else ways[0]


def pays(matrices):
    """Pack them, and tell whether one row is multiplied sooner than without: else a copy of all
    weights, which takes seconds to make, is not worth its memory."""
    for W in matrices:
        pack(W)
    bare = lambda x, W, b: onednn(x, W.detach(), b)             # whose packed copy is not found
    return hasattr(matrices[0], "packed") and fastest(
        (bare, onednn), *factors(matrices, 1)) is onednn


def choices(matrices):
    """-> {most rows: the way for up to so many}, a way for each of CLASSES."""
    return {most: fastest(ways_for(matrices[0].dtype, rows), *factors(matrices, rows))
            for most, rows in CLASSES.items()}


@torch.no_grad()
def use(lm):
    """Swap the products of lm's nn.Linear for this machine's fastest; same values up to rounding.
    -> their names, for the statistics line. Takes 0.3 to 0.8 s, nothing for a small model or on a
    GPU. Where packing pays, and twice the weights' memory is free, they are written once more: save
    lm.state_dict() then, not lm. Later changes of W are noticed, but not W.data[...] = in place."""
    head = lm.lm_head.weight
    small = head.numel() < SMALL
    if head.is_cpu and small:
        torch.set_num_threads(1)                        # a second thread would come too late
    if not head.is_cpu or small or os.environ.get("SLOT_PRODUCTS") == "plain":
        return "plain"
    matrices = [layer.mlp.gate_proj.weight.detach() for layer in lm.model.layers[:COLD]]
    pieces = head.split(len(head) // 16 + 1)[:COLD]     # larger: another may win
    size = sum(W.nbytes for W in lm.parameters()) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    room = 2 * size < free_memory("cpu") < math.inf
    packs = room and pays(matrices) and pays(pieces)
    if not packs:
        matrices, pieces = ([W.detach() for W in each] for each in (matrices, pieces))
    of_layers, of_head = choices(matrices), choices(pieces)
    for module in lm.modules():
        if type(module).forward is torch.nn.Linear.forward:     # not what a reader has written
            table = of_head if module is lm.lm_head else of_layers
            vars(module.weight).pop("packed", None)
            if packs and onednn in table.values():
                pack(module.weight)
            module.forward = functools.partial(product, module, table)
    return ", ".join(sorted({way.__name__ for way in (*of_layers.values(), *of_head.values())}))


def way_of(table, rows):
    """The way for so many rows, of what `choices` found."""
    return next(way for most, way in table.items() if rows <= most)


def product(module, table, x):
    """What stands in the place of torch.nn.Linear.forward: x (..., inputs) -> (..., outputs)."""
    W, b = module.weight, module.bias
    rows = x.reshape(-1, x.shape[-1])
    trained = torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in (x, W, b))
    if len(rows) == 0 or trained and len(rows) > 1:
        return F.linear(x, W, b)
    way = way_of(table, TRAINED if trained else len(rows))
    return way(rows, W, b).view(*x.shape[:-1], len(W))
