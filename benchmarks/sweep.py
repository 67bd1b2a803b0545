"""Closer looks at a model: SLOT by prompt length and steps, memory, and every way to a product.

    SLOT = that + steps × this      that = W h        2 n V d FLOP, one product for all positions
                                    this = W δ, Wᵀ r  2 b V d bytes, the head read twice
                                           E c, Eᵀ s  2 · 4 n V bytes, the exponentials read twice
                                    W h, of what of E does not fit into the memory
"""
from itertools import cycle
from statistics import median

import torch

from benchmarks.machine import timed, working
from benchmarks.stages import STEPS
from speed import linear
from speed.delta import KEPT, optimize_delta_fast

MEMORY = 1 << 30                    # what generate.py gives it
POINTS = [(n, STEPS) for n in (16, 64, 200, 512, 1024, 2048)] + [(200, s) for s in (1, 2, 10, 20)]
LONG = 8192                         # measured once, with its memory, in a process of its own
ROWS = (linear.TRAINED, 1, 4, 8, 32, 160, 1024)     # of the products


def call_of(lm, n, steps):
    """-> SLOT on n + 1 random tokens, as a function to call."""
    draw, (V, d) = torch.Generator().manual_seed(1), lm.lm_head.weight.shape
    hidden = torch.randn(1, n + 1, d, generator=draw).to(lm.lm_head.weight.dtype)
    tokens = torch.randint(0, V, (n + 1,), generator=draw).tolist()
    return lambda: optimize_delta_fast(hidden, tokens, lm.lm_head, steps, 0.01, MEMORY)


def sweep(subject, rates, count, in_child, say):
    """Print ms by length and steps -> a list of rows, for the JSON."""
    (V, d), b = subject.lm.lm_head.weight.shape, subject.bytes
    seconds = {point: [] for point in POINTS}
    for _ in range(count):
        for (n, steps), spent in seconds.items():
            spent.append(timed(call_of(subject.lm, n, steps)))
            say(f"{subject.title}: {n} tokens, {steps} steps {spent[-1]:.4f} s")
    long = in_child(subject)
    seconds[LONG, STEPS] = [long["seconds"]]
    print(f"\nSLOT, closed form, {subject.title}, ms\n{'tokens':>8}{'steps':>7}{'min':>11}"
          f"{'median':>11}{'max':>11}{'limit':>11}   reached")
    rows = []
    for (n, steps), spent in seconds.items():
        kept = min(n, int(KEPT * MEMORY) // (4 * V))
        product = rates.limit([(b * V * d, 2 * n * V * d)], subject.dtype)
        step = rates.limit([(2 * b * V * d + 8 * kept * V, 0)], subject.dtype)
        least = product + steps * (step + product * (1 - kept / n))
        rows.append(dict(n=n, steps=steps, seconds=spent, limit=least))
        ms = [1e3 * x for x in (min(spent), median(spent), max(spent), least)]
        cells = "".join(f"{x:>11,.1f}" for x in ms)
        print(f"{n:>8,}{steps:>7}{cells}{ms[3] / ms[1]:>9.0%}")
    print(f"  {LONG:,} tokens: {long['peak_mib']:,.0f} MiB at the peak over the model; "
          f"--slot-memory is {MEMORY >> 20:,}")
    return rows + [long]


def products(subject, count, say):
    """Print ms of every way, and what `linear.use` chose -> a list of rows, for the JSON."""
    lm, found = subject.lm, []
    names = [way.__name__ for way in linear.ways_for(lm.lm_head.weight.dtype, 1)]  # one row has all
    head = "".join(f"{name:>10}" for name in names)
    print(f"\nproducts of {subject.title}, ms\n{'':<12}{'rows':>6}{head}    chosen   best/chosen")
    for name in ("gate_proj", "down_proj", "lm_head"):
        modules = [each for path, each in lm.named_modules() if path.endswith(name)]
        swapped = getattr(modules[0].forward, "args", None)
        for rows in ROWS:
            say(f"{subject.title}: {name}, {rows} rows")
            x, matrices = linear.factors([module.weight for module in modules], rows)
            spent = {way: [] for way in working(linear.ways_for(x.dtype, rows), x[:1], matrices)}
            for _ in range(count):                  # in turns, so that a slow minute hits all
                for way, times in spent.items():
                    turns = cycle(matrices)         # of all layers: the cache holds one of them
                    times.append(timed(lambda: way(x, next(turns), None), 0.05))
            ms = {way.__name__: 1e3 * median(times) for way, times in spent.items()}
            chosen = linear.way_of(swapped[1], rows).__name__ if swapped else "plain"
            share = min(ms.values()) / ms[chosen]
            found.append(dict(matrix=name, rows=rows, ms=ms, chosen=chosen, share=share))
            cells = "".join(f"{ms[way]:>10.3f}" if way in ms else " " * 10 for way in names)
            print(f"{name:<12}{rows:>6}{cells}{chosen:>10}{share:>10.2f}")
    return found
