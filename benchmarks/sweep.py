"""What SLOT costs, as a function of everything: benchmark.py --sweep. Random hidden states and heads; no model is needed.

    SLOT = that + steps × this      that = W h        2 n V d FLOP          one product with the head, for every prompt position
                                    this = W δ, Wᵀ r  2 b V d bytes         the head read twice
                                           E c, Eᵀ s  2 · 4 n V bytes       the exponentials read twice
    published loop = steps × (6 n V d FLOP): W (h + δ), its gradient for h + δ, and its gradient for W

E (n, V) float32 is kept where --slot-memory has room for it; else W h itself, in 16 bits if the hardware makes it in 16 bits. What
has no room in that way either is made again in every step: that is W h per step.
"""
import time
from importlib.util import find_spec
from statistics import median

import torch

from benchmarks.machine import Rates
from benchmarks.random_model import SHAPES, config_of, weight_shapes
from linear import NATIVE_GEMM, Linear
from slot import optimize_delta_fast, room_to_keep

MEMORY = 1 << 30                # of generate.py --slot-memory
LONG = 8192                     # tokens: measured once, in a process of its own, with its memory
BASE = dict(n=200, steps=5, V=151936, d=896, B=1)
SWEEPS = {                      # what is varied: its values, and what else differs from BASE so that it fits into a minute
    "prompt": ("n", [16, 64, 200, 512, 1024, 2048, LONG], {}),
    "steps": ("steps", [0, 1, 2, 3, 5, 10, 20], {}),
    "vocabulary": ("V", [8192, 32000, 65536, 128256, 151936], {}),
    "width": ("d", [256, 896, 2048, 4096, 8192], {"V": 32000}),
    "batch": ("B", [1, 2, 4, 8, 16, 32], {"V": 32000}),
}


def random_case(n, V, d, B, dtype, **_):
    """-> hidden (B, n + 1, d), tokens (B, n + 1), head, such that logits spread as a model's do."""
    draw = torch.Generator().manual_seed(0)
    head = Linear(d, V)
    head.weight = torch.nn.Parameter(torch.empty(V, d, dtype=dtype), requires_grad=False)
    block = torch.randn(min(V, 8192), d, generator=draw) * 2 / d ** 0.5         # repeated: nothing here depends on its numbers
    for part in head.weight.split(len(block)):
        part.copy_(block[:len(part)])
    return torch.randn(B, n + 1, d, generator=draw).to(dtype), torch.randint(0, V, (B, n + 1), generator=draw), head


def terms(n, steps, V, d, B, dtype, rates):
    """-> {term: seconds at least}"""
    if not steps:
        return {"W h": 0.0, "head": 0.0, "E": 0.0, "W h again": 0.0}
    rows = n * B
    z = dtype.itemsize if NATIVE_GEMM.get(dtype) else 4                                          # bytes of an entry of W h
    room = room_to_keep(MEMORY, steps, B, V)
    keep_E = 4 * rows * V <= room
    kept = rows if keep_E else min(rows, room // (z * V))
    seen = (2 * 4 if keep_E else z) * kept * V                                                  # E is read twice, z once
    product = max(2 * rows * V * d / rates.multiply(dtype), dtype.itemsize * V * d / rates.read)
    return {"W h": product, "head": steps * (1 + B) * dtype.itemsize * V * d / rates.read,      # Wᵀ r goes sample by sample
            "E": steps * seen / rates.read, "W h again": (steps - 1) * product * (1 - kept / rows)}


def long_prompt(what):
    """-> the call whose memory benchmark.py measures in a process of its own."""
    hidden, tokens, head = random_case(dtype=getattr(torch, what["dtype"]), **{**BASE, "n": what["n"]})
    optimize_delta_fast(hidden[:, :3], tokens[:, :3], head, 2, 0.01)
    return lambda: optimize_delta_fast(hidden, tokens, head, BASE["steps"], 0.01, memory=MEMORY)


def sweep(args, in_child, say):
    """Measure, print, plot -> the figures for the JSON."""
    if args.plot and not find_spec("matplotlib"):
        raise ValueError("--plot: matplotlib is not installed; pip install matplotlib, or leave the option out")
    dtype = getattr(torch, args.dtype[0])
    rates, seconds = Rates([dtype]), {}
    for i in range(args.rounds):
        rates.measure()
        for name, (varied, values, other) in SWEEPS.items():
            for value in (v for v in values if (name, v) != ("prompt", LONG)):
                point = {**BASE, **other, varied: value}
                case = random_case(dtype=dtype, **point)
                began = time.perf_counter()
                optimize_delta_fast(*case, point["steps"], 0.01, memory=MEMORY)
                seconds.setdefault((name, value), []).append(time.perf_counter() - began)
                say(f"round {i + 1}/{args.rounds}  {name} {value}: {seconds[name, value][-1]:.4f} s")
    say(f"prompt {LONG}, in a process of its own")
    long = in_child(stage="long SLOT", dtype=args.dtype[0], n=LONG)
    seconds["prompt", LONG] = [long["seconds"]]
    print(f"{'rates':<12}{rates.text()}")
    print(f"\nSLOT, fast form, {args.dtype[0]}, one call: " + ", ".join(f"{k} = {v:,}" for k, v in BASE.items())
          + " unless said otherwise. Shares are those of the limit.")
    found = []
    for name, (varied, values, other) in SWEEPS.items():
        title = name + "".join(f" ({k} = {v:,})" for k, v in other.items())
        print(f"\n{title:<24}{'min ms':>9}{'median':>9}{'max':>9}{'limit':>9}{'reached':>9}   {'us/position':>11}   dominated by")
        for value in values:
            found.append(row(name, value, {**BASE, **other, varied: value}, seconds[name, value], dtype, rates))
    print(f"\n{LONG:,} tokens: {long['peak_mib']:,.0f} MiB at the peak over hidden states and head (wanted: at most 1,024); a "
          f"position costs {long['seconds'] / LONG / (median(seconds['prompt', 200]) / 200):.2f} x what it does with 200 tokens")
    this, that = line([(s, median(seconds["steps", s])) for s in SWEEPS["steps"][1] if s > 1])
    one = terms(dtype=dtype, rates=rates, **BASE)
    print(f"SLOT = that + steps × this, fitted to the rows of `steps`: {1e3 * that:.0f} ms + steps × {1e3 * this:.1f} ms; at the "
          f"limit {1e3 * one['W h']:.0f} ms + steps × {1e3 * (one['head'] + one['E']) / BASE['steps']:.1f} ms")
    paper = on_paper(rates, dtype)
    if args.plot:
        plot(args.plot, found)
    return {"dtype": args.dtype[0], "rates": rates.as_dict(), "points": found, "long": long, "that_s": that, "this_s": this,
            "paper": paper}


def row(name, value, point, seconds, dtype, rates):
    parts = terms(dtype=dtype, rates=rates, **point)
    limit, middle = sum(parts.values()), median(seconds)
    largest = max(parts, key=parts.get)
    share = f"{largest} ({parts[largest] / limit:.0%})" if limit else "nothing to do"
    print(f"{value:<24,}" + "".join(f"{1e3 * x:>9,.1f}" for x in (min(seconds), middle, max(seconds), limit))
          + f"{limit / middle:>9.0%}   {1e6 * middle / point['n'] / point['B']:>11,.0f}   {share}")
    return dict(sweep=name, value=value, **point, seconds=seconds, limit=limit, terms=parts)


def line(points):
    """Least squares -> slope, intercept."""
    x, y = (sum(values) / len(points) for values in zip(*points))
    slope = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
    return slope, y - slope * x


def on_paper(rates, dtype):
    """Whole models in bfloat16, on this machine's rates and on an H100's data sheet: n = 200, 5 steps, 512 tokens. -> rows"""
    machines = {"this CPU": (rates.read, rates.multiply(dtype)), "H100": (3.35e12, 989e12)}
    n, steps, b = BASE["n"], BASE["steps"], 2
    print(f"\nOn paper, bfloat16, n = {n}, {steps} steps, then 512 tokens:\n{'':<8}{'V':>9}{'d':>7}{'W h':>11}{'a step':>10}"
          f"{'published':>12}{'prefill':>11}{'a token':>10}" + "".join(f"   SLOT / 512 tokens, {m}" for m in machines))
    rows = []
    for name in SHAPES:
        shapes = weight_shapes(config_of(name))
        V, d = shapes["model.embed_tokens.weight"]
        layers = sum(torch.Size(s).numel() for key, s in shapes.items() if key.startswith("model.layers"))
        product, each, token = 2 * n * V * d, 2 * b * V * d + 8 * n * V, b * (layers + V * d)
        seconds = {m: (max(product / flops, b * V * d / read) + steps * each / read, 512 * token / read)
                   for m, (read, flops) in machines.items()}
        rows.append(dict(shape=name, V=V, d=d, product_flop=product, step_bytes=each, published_flop=3 * steps * product,
                         prefill_flop=2 * n * layers, token_bytes=token, seconds=seconds))
        print(f"{name:<8}{V:>9,}{d:>7,}{product / 1e9:>7,.0f} GF{each / 1e9:>8.2f} GB{3 * steps * product / 1e9:>9,.0f} GF"
              f"{2 * n * layers / 1e9:>8,.0f} GF{token / 1e9:>7.1f} GB" +
              "".join(f"{s:>13.4g} s / {t:>6.4g} s = {s / t:.2%}" for s, t in seconds.values()))
    return rows


def plot(file, found):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.5), sharey=True)
    for axis, name in zip(axes.flat, SWEEPS):
        points = [p for p in found if p["sweep"] == name and p["steps"]]
        x = [p["value"] for p in points]
        axis.loglog(x, [1e3 * median(p["seconds"]) for p in points], "o-", label="measured")
        axis.loglog(x, [1e3 * p["limit"] for p in points], "--", label="limit: the sum of")
        for term, what in {"W h": "W h, once", "head": "W δ and Wᵀ r, in every step", "E": "E, or W h where it is kept, read in every step",
                           "W h again": "W h again, where it is not kept"}.items():
            axis.loglog(x, [1e3 * p["terms"][term] or None for p in points], ".:", label=what)
        axis.set_title(name + "".join(f" ({k} = {v:,})" for k, v in SWEEPS[name][2].items()), fontsize=10)
        axis.set_xticks(x, [f"{value:,}" for value in x], fontsize=7, rotation=45, ha="right", rotation_mode="anchor")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("ms a call")
    axes.flat[-1].axis("off")
    key = axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center", fontsize=8, title_fontsize=8,
                               title="SLOT, " + ", ".join(f"{k} = {v:,}" for k, v in BASE.items()))
    key.set_in_layout(False)                                        # wider than a panel
    figure.tight_layout()
    figure.savefig(file, dpi=120)
