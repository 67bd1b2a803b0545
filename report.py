"""From evaluate.py's result lines to summary.md and the plot. All comparisons are paired: same samples, plain model beside.

A *gain* is an accuracy that rose (sign test, Holm-corrected p < 0.05) or an answer loss that fell (interval below 0). It stands in
bold. The letter r, w, u behind it says that this control reaches it, too: that SLOT, at the same setting, is not shown to be
better than the control (same tests, SLOT against control).

The section "Time" stands last, because it alone differs between two runs.
"""
import sys

import numpy as np

from stats import bootstrap_mean, bootstrap_ratio, holm, sign_test, wilson

LETTERS = {"random": "r", "wrong-prompt": "w", "unigram": "u"}


class Table:
    """The results as columns: table["slot 5 0.1", "strict"] is an array over the samples of one kind, in order."""

    def __init__(self, rows):
        self.samples = sorted({row["sample"] for row in rows})
        self.columns = {}
        for row in sorted(rows, key=lambda row: row["sample"]):
            for key in ("strict", "paper", "format", "answer_loss", "prompt_loss", "tokens"):
                self.columns.setdefault((row["setting"], key), []).append(row[key])

    def __getitem__(self, key):
        return np.array([np.nan if x is None else x for x in self.columns[key]], dtype=np.float64)

    def __len__(self):
        return len(self.samples)

    def mean(self, setting, key):
        return float(self[setting, key].mean())

    def change(self, key, a, b="plain"):
        """(mean, low, high) of a - b."""
        return bootstrap_mean(self[a, key] - self[b, key])

    def flips(self, a, b="plain"):
        """(fixed, broken): right in a and wrong in b, and the reverse."""
        difference = self[a, "strict"] - self[b, "strict"]
        return int((difference > 0).sum()), int((difference < 0).sum())


def label(point):
    return f"lr {point[1]:g}, {point[0]} step{'s' * (point[0] > 1)}"


def name(what, point):
    return f"{what} {point[0]} {point[1]:g}"


def percent(x):
    return "–" if x != x else f"{100 * x:.1f}"


def interval(figures, sign="+"):
    mean, low, high = figures
    return f"{mean:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"


def p_value(p):
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def write(args, settings, rows, notes):
    """DIR/summary.md, and the plot if matplotlib is there."""
    kinds = list(dict.fromkeys(row["kind"] for row in sorted(rows, key=lambda row: row["sample"])))
    grid = [(steps, lr) for what, steps, lr in settings if what == "slot"]
    order = {kind: sorted({row["sample"] for row in rows if row["kind"] == kind}) for kind in kinds}
    half = {sample: place % 2 for samples in order.values() for place, sample in enumerate(samples)}
    tables = {kind: Table([row for row in rows if row["kind"] == kind and not (args.split and half[row["sample"]])]) for kind in kinds}
    text = [f"# SLOT against the plain model: {args.task}", "", *(f"- {line}" for line in notes + findings(kinds, tables, grid, args.control))]
    if args.split and grid:
        text += ["", "## Chosen on one half, reported on the other (all other tables, and the plot, are of the first)", "",
                 *chosen(kinds, tables, grid, rows, half)]
    for kind in kinds:
        text += ["", f"## {kind}: {len(tables[kind])} samples", "", *main_table(tables[kind], grid, args.control, holm_of(kinds, tables, grid)[kind])]
    if grid and args.control:
        text += ["", "## Controls: accuracy %, and change of the answer loss", "", *control_table(kinds, tables, grid, args.control)]
    if grid and "unigram" in args.control:
        text += ["", "## Why: how much of it a plain unigram bias of the same norm reaches", "", *why_table(kinds, tables, grid)]
    text += ["", "## Time", "", *time_table(rows, grid)]
    path = args.out / "summary.md"
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    drawn = plot(args, kinds, tables, grid)
    print(f"report    {path}" + drawn, file=sys.stderr)


def holm_of(kinds, tables, grid):
    """{kind: {point: (p, corrected p)}}: one family over all kinds and settings."""
    tests = [(kind, point) for kind in kinds for point in grid]
    p = [sign_test(*tables[kind].flips(name("slot", point))) for kind, point in tests]
    found = {kind: {} for kind in kinds}
    for (kind, point), *both in zip(tests, p, holm(p)):
        found[kind][point] = both
    return found


def accuracy_gain(table, point, corrected):
    fixed, broken = table.flips(name("slot", point))
    return fixed > broken and corrected < 0.05


def loss_gain(table, point):
    return table.change("answer_loss", name("slot", point))[2] < 0


def reached(table, point, controls, key):
    """The letters of the controls that SLOT is not shown to beat."""
    slot, letters = name("slot", point), []
    for control in controls:
        other = name(control, point)
        if key == "strict":
            better, worse = table.flips(slot, other)
            beaten = better > worse and sign_test(better, worse) < 0.05
        else:
            beaten = table.change(key, slot, other)[2] < 0
        if not beaten:
            letters.append(LETTERS[control])
    return " ".join(sorted(letters))


def findings(kinds, tables, grid, controls):
    """The result in words: counted, not chosen."""
    if not grid:
        return ["Only the plain model was run."]
    corrected = holm_of(kinds, tables, grid)
    tests = [(kind, point) for kind in kinds for point in grid]
    rose = [t for t in tests if accuracy_gain(tables[t[0]], t[1], corrected[t[0]][t[1]][1])]
    fell = [(kind, point) for kind, point in tests if corrected[kind][point][1] < 0.05 and (kind, point) not in rose]
    lower = [t for t in tests if loss_gain(tables[t[0]], t[1])]
    higher = [(kind, point) for kind, point in tests if tables[kind].change("answer_loss", name("slot", point))[1] > 0]
    text = [f"Accuracy: {len(tests)} hypotheses ({len(grid)} settings, {len(kinds)} kind{'s' * (len(kinds) > 1)}). After Holm's correction it rose in "
            f"{len(rose)} and fell in {len(fell)}.",
            f"Loss on the unseen reference answer: its 95 % interval lies below 0 in {len(lower)} of {len(tests)} and above 0 in {len(higher)} "
            f"(not corrected: {0.05 * len(tests):.1f} would stray from 0 by luck)."]
    gains = [(*t, "strict") for t in rose] + [(*t, "answer_loss") for t in lower]
    if gains:
        text.append(f"These {len(gains)} gains stand in bold." if not controls else f"These {len(gains)} gains stand in bold. A control reaches "
                    f"{sum(reached(tables[kind], point, controls, key) != '' for kind, point, key in gains)} of them, marked "
                    + ", ".join(f"{LETTERS[c]} ({c})" for c in sorted(controls)) + ".")
    return text


def main_table(table, grid, controls, corrected):
    head = ["setting", "accuracy % [95 % CI]", "fixed / broken", "p", "Holm p", "answer loss (unseen)", "its change [95 % CI]", "prompt loss (seen)",
            "format %", "tokens", "paper's scorer %", "scorers differ"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for point in [None, *grid]:
        slot = "plain" if point is None else name("slot", point)
        right, n = int(table[slot, "strict"].sum()), len(table)
        low, high = wilson(right, n)
        known = ~np.isnan(table[slot, "paper"])                     # where the paper's rule says something
        differ = int((table[slot, "strict"] != table[slot, "paper"])[known].sum())
        cells = ["plain" if point is None else label(point), f"{percent(right / n)} [{percent(low)}, {percent(high)}]"]
        if point is None:
            cells += ["", "", "", f"{table.mean(slot, 'answer_loss'):.4f}", ""]
        else:
            p, holm_p = corrected[point]
            fixed, broken = table.flips(slot)
            change = interval(table.change("answer_loss", slot))
            if accuracy_gain(table, point, holm_p):
                cells[1] = f"**{cells[1]}** {reached(table, point, controls, 'strict')}".strip()
            if loss_gain(table, point):
                change = f"**{change}** {reached(table, point, controls, 'answer_loss')}".strip()
            cells += [f"{fixed} / {broken}", p_value(p), p_value(holm_p), f"{table.mean(slot, 'answer_loss'):.4f}", change]
        cells += [f"{table.mean(slot, 'prompt_loss'):.4f}", percent(table.mean(slot, "format")), f"{table.mean(slot, 'tokens'):.1f}",
                  percent(table[slot, "paper"][known].mean()) if known.any() else "–", str(differ) if known.any() else "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def control_table(kinds, tables, grid, controls):
    columns = ["slot", *controls]
    lines = ["| kind | setting | " + " | ".join("SLOT" if c == "slot" else c for c in columns) + " |", "|---|---" + "|---:" * len(columns) + "|"]
    for kind in kinds:
        for point in grid:
            cells = [f"{percent(tables[kind].mean(name(c, point), 'strict'))}; {interval(tables[kind].change('answer_loss', name(c, point)))}"
                     for c in columns]
            lines.append(f"| {kind} | {label(point)} | " + " | ".join(cells) + " |")
    return lines


def why_table(kinds, tables, grid):
    lines = ["| kind | setting | prompt loss, change by SLOT | by unigram | share of SLOT's change | answer loss, change by SLOT | by unigram |",
             "|---|---|---:|---:|---:|---:|---:|"]
    for kind in kinds:
        for point in grid:
            slot, unigram = name("slot", point), name("unigram", point)
            share = bootstrap_ratio(*(tables[kind][what, "prompt_loss"] - tables[kind]["plain", "prompt_loss"] for what in (unigram, slot)))
            cells = [interval(tables[kind].change("prompt_loss", slot)), interval(tables[kind].change("prompt_loss", unigram)),
                     "{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * x for x in share)),
                     interval(tables[kind].change("answer_loss", slot)), interval(tables[kind].change("answer_loss", unigram))]
            lines.append(f"| {kind} | {label(point)} | " + " | ".join(cells) + " |")
    return lines


def chosen(kinds, tables, grid, rows, half):
    """--split: the setting with the best accuracy on the tune half (of equals the lower answer loss), on the test half."""
    best = {kind: max(grid, key=lambda point: (tables[kind].mean(name("slot", point), "strict"), -tables[kind].mean(name("slot", point), "answer_loss")))
            for kind in kinds}
    test = {kind: Table([row for row in rows if row["kind"] == kind and half[row["sample"]]]) for kind in best}
    test = {kind: table for kind, table in test.items() if len(table)}
    corrected = holm([sign_test(*table.flips(name("slot", best[kind]))) for kind, table in test.items()])
    lines = ["| kind | chosen on the tune half | n | plain % | SLOT % [95 % CI] | fixed / broken | Holm p | change of answer loss [95 % CI] |",
             "|---|---|---:|---:|---:|---:|---:|---:|"]
    for (kind, table), p in zip(test.items(), corrected):
        slot, n = name("slot", best[kind]), len(table)
        low, high = wilson(int(table[slot, "strict"].sum()), n)
        fixed, broken = table.flips(slot)
        lines.append(f"| {kind} | {label(best[kind])} | {n} | {percent(table.mean('plain', 'strict'))} | {percent(table.mean(slot, 'strict'))} "
                     f"[{percent(low)}, {percent(high)}] | {fixed} / {broken} | {p_value(p)} | {interval(table.change('answer_loss', slot))} |")
    return lines


def time_table(rows, grid):
    lines = ["| setting | seconds a sample | of which fitting δ | decoding | overhead of δ, % of the plain run |", "|---|---:|---:|---:|---:|"]

    def means(setting):
        return np.mean([[row["seconds"][part] for part in ("prefill", "fit", "decode")] for row in rows if row["setting"] == setting], axis=0)

    plain = means("plain")
    for point in [None, *grid]:
        prefill, fit, decode = plain if point is None else means(name("slot", point))
        lines.append(f"| {'plain' if point is None else label(point)} | {prefill + fit + decode:.4f} | {fit:.4f} | {decode:.4f} | "
                     f"{100 * fit / (plain[0] + plain[2]):.1f} |")
    total = sum(row["seconds"]["fit"] + row["seconds"]["decode"] for row in rows)
    return [*lines, "", f"A share of a batch's seconds, means over all samples. All settings and controls together: {total:,.0f} s of fitting and decoding."]


# ---- the plot

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]              # told apart by colour-blind eyes, too (Okabe and Ito)


def plot(args, kinds, tables, grid):
    """plot.svg and plot.png -> what to say about it."""
    if not grid:
        return ""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "; no plot: matplotlib is not installed (pip install matplotlib, then the same command draws it)"
    matplotlib.rcParams.update({"svg.hashsalt": "slot", "font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    steps, rates = sorted({s for s, _ in grid}), sorted({lr for _, lr in grid})
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    curves = [(kind, lr) for kind in kinds for lr in rates]
    for number, (kind, lr) in enumerate(curves):
        table, place = tables[kind], rates.index(lr)
        style = dict(color=COLOURS[kinds.index(kind) % len(COLOURS)], linestyle=["-", "--", ":", "-."][(len(rates) - 1 - place) % 4], marker="os^D"[place % 4],
                     markerfacecolor="white" if place < len(rates) - 1 else None, capsize=3, linewidth=2, elinewidth=1.2, markersize=6)
        x = np.arange(len(steps) + 1) + 0.06 * (number - (len(curves) - 1) / 2)         # side by side, so that intervals can be seen
        names = ["plain"] + [name("slot", (s, lr)) for s in steps]
        hits = [int(table[n, "strict"].sum()) for n in names]
        shares = [100 * k / len(table) for k in hits]
        ends = [[100 * e for e in wilson(k, len(table))] for k in hits]
        left.errorbar(x, shares, yerr=distances(shares, ends), label=f"{kind}, lr {lr:g}", **style)
        changes = [(0.0, 0.0, 0.0)] + [table.change("answer_loss", n) for n in names[1:]]
        right.errorbar(x, [c[0] for c in changes], yerr=distances([c[0] for c in changes], [c[1:] for c in changes]), **style)
    right.axhline(0, color="0.4", linewidth=1)
    for axes, title in ((left, "right answers, %"), (right, "unseen answer: change of loss, nats/token")):
        axes.set_title(title, loc="left")
        axes.set_xlabel("SLOT steps (0 is the plain model)")
        axes.set_xticks(range(len(steps) + 1), ["0", *map(str, steps)])
        axes.grid(axis="y", color="0.9")
    losses = [table.mean("plain", "answer_loss") for table in tables.values()]
    right.text(0.02, 0.98, "plain: " + ", ".join(f"{kind} {loss:.3f}" for kind, loss in zip(kinds, losses)), transform=right.transAxes, va="top", color="0.3")
    left.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=len(kinds) if len(rates) > 1 else len(curves), frameon=False)
    for kind in ("svg", "png"):
        figure.savefig(args.out / f"plot.{kind}", dpi=130, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)
    return ", plot.svg, plot.png"


def distances(middles, ends):
    return np.array([[max(0.0, m - low), max(0.0, high - m)] for m, (low, high) in zip(middles, ends)]).T
