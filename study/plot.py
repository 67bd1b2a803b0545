"""plot.svg and plot.png: accuracy, and the change of the answer loss, against SLOT steps."""
import io

import numpy as np

from study.results import write_whole
from study.settings import name
from study.stats import wilson

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]      # Okabe and Ito: told apart by all eyes


def plot(args, tables):
    """-> what to say about it."""
    if not args.points:
        return ""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return ("; no plot: matplotlib is not installed (pip install matplotlib, then the same "
                "command draws it)")
    matplotlib.rcParams.update({"svg.hashsalt": "slot", "font.size": 13, "axes.spines.top": False,
                                "axes.spines.right": False})
    steps = [0, *sorted({steps for steps, _ in args.points})]
    panels = {} if args.only else {"strict": "right answers, %"}
    panels["answer_loss"] = "held-out answer: change of loss, nats/token"
    figure, all_axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 5.6), squeeze=False,
                                    layout="constrained")
    for axes, (key, title) in zip(all_axes[0], panels.items()):
        curves(axes, args, tables, key, steps)
        axes.set_title(title, loc="left")
        axes.set_xlabel("SLOT steps (0 is the plain model)")
        axes.set_xticks(range(len(steps)), map(str, steps))
        axes.grid(axis="y", color="0.9")
    all_axes[0, 0].set_ylim(bottom=None if args.only else 0)
    axes.axhline(0, color="0.4", linewidth=1)
    losses = [f"{kind} {table.mean('plain', 'answer_loss'):.3f}" for kind, table in tables.items()]
    axes.text(0.02, 0.98, "plain: " + ", ".join(losses), transform=axes.transAxes, va="top",
              color="0.3")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=3)
    for kind in ("svg", "png"):
        image, date = io.BytesIO(), {"Date": None} if kind == "svg" else None
        figure.savefig(image, format=kind, dpi=130, metadata=date)
        write_whole(args.out / f"plot.{kind}", image.getvalue())
    plt.close(figure)
    return ", plot.svg, plot.png"


def curves(axes, args, tables, key, steps):
    """One curve a kind (its colour) and learning rate (its line; the highest's is solid)."""
    rates = sorted({lr for _, lr in args.points}, reverse=True)
    pairs = [(kind, lr) for kind in tables for lr in rates[::-1]]
    for number, (kind, lr) in enumerate(pairs):
        table, place, x, y = tables[kind], rates.index(lr), [], []
        for count in [0] + [s for s in steps if (s, lr) in args.points]:
            setting = name("slot", (count, lr)) if count else "plain"
            if key == "strict":
                right = int(table[setting, key].sum())
                ends = wilson(right, table.count)
                y.append([100 * share for share in (right / table.count, *ends)])
            else:
                y.append(table.change(key, setting))
            x.append(steps.index(count) + 0.06 * (number - (len(pairs) - 1) / 2))   # side by side
        middle, low, high = np.array(y).T
        axes.errorbar(x, middle, yerr=np.clip([middle - low, high - middle], 0, None),
                      label=f"{kind}, lr {lr!r}", color=COLOURS[[*tables].index(kind) % 4],
                      linestyle=["-", "--", ":", "-."][place % 4], marker="so^D"[place % 4],
                      markerfacecolor="white" if place else None, capsize=3, linewidth=2,
                      elinewidth=1.2, markersize=6)
