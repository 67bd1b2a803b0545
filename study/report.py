"""From result lines to summary.md, the plot, and the few lines of --quick. All comparisons are
paired: same samples, plain model beside.

A *gain* is an accuracy that rose (sign test, Holm-corrected p < 0.05) or an answer loss that fell
(interval below 0). It stands in bold. The letter r, w, u behind it says that this control reaches
it, too: that SLOT, at the same point, is not shown to be better (same tests, SLOT against control).

The section "Time" stands last, because it alone differs between two runs.
"""
import numpy as np

from study.plot import plot
from study.results import write_whole
from study.settings import label, name
from study.stats import bootstrap_mean, bootstrap_rank, bootstrap_ratio, holm, sign_test, wilson

LETTERS = {"random": "r", "wrong-prompt": "w", "unigram": "u"}
LOSS_HEAD = ["answer loss (held out)", "its change [95 % CI]", "prompt loss (seen)"]
ACCURACY_HEAD = ["accuracy % [95 % CI]", "fixed / broken", "p", "Holm p"]
ANSWER_HEAD = ["format %", "tokens", "paper's scorer %", "scorers differ", "flexible scorer %",
               "right of those in format %"]


class Table:
    """The results of one kind, by column: table["slot 5 0.1", "strict"] is an array of samples."""

    def __init__(self, rows):
        self.columns, self.decoded = {}, all("strict" in row for row in rows)
        for row in sorted(rows, key=lambda row: row["sample"]):
            for key, value in row.items():
                self.columns.setdefault((row["setting"], key), []).append(value)
        self.samples = self.columns["plain", "sample"]
        self.count = len(self.samples)

    def __getitem__(self, key):
        return np.array([np.nan if x is None else x for x in self.columns[key]], dtype=np.float64)

    def mean(self, setting, key):
        return float(self[setting, key].mean())

    def change(self, key, a, b="plain"):
        """(mean, low, high) of a - b."""
        return bootstrap_mean(self[a, key] - self[b, key])

    def flips(self, a, b="plain"):
        """(fixed, broken): right in a and wrong in b, and the reverse."""
        difference = self[a, "strict"] - self[b, "strict"]
        return int((difference > 0).sum()), int((difference < 0).sum())


def tables_of(rows):
    kinds = dict.fromkeys(row["kind"] for row in sorted(rows, key=lambda row: row["sample"]))
    return {kind: Table([row for row in rows if row["kind"] == kind]) for kind in kinds}


# ---- the words of a cell

def percent(x):
    return "–" if x != x else f"{100 * x:.1f}"


def interval(figures):
    return "–" if figures[0] != figures[0] else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*figures)


def p_value(p):
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def accuracy(table, setting):
    low, high = wilson(int(table[setting, "strict"].sum()), table.count)
    return f"{percent(table.mean(setting, 'strict'))} [{percent(low)}, {percent(high)}]"


def flips(table, setting):
    return "{} / {}".format(*table.flips(setting))


def markdown(head, rows, left=1):
    """Lines of a table whose first `left` columns are words."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * left + "---:|" * (len(head) - left)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


# ---- the whole

def write(args, rows, notes):
    """DIR/summary.md, and the plot if matplotlib is there -> what to say about them."""
    tables, halves = tables_of(rows), {}
    if args.split:                                          # every other sample, for `chosen`
        held = {sample for table in tables.values() for sample in table.samples[1::2]}
        halves = tables_of([row for row in rows if row["sample"] in held])
        tables = tables_of([row for row in rows if row["sample"] not in held])
    corrected = holm_of(tables, args.points)
    text = [f"# SLOT against the plain model: {args.task}", ""]
    text += [f"- {line}" for line in notes + findings(tables, args, corrected)]

    def section(title, lines):
        text.extend(["", f"## {title}", "", *lines])

    if halves and corrected:
        section("Chosen on one half, reported on the other (all other tables, and the plot, are of "
                "the first)", chosen(tables, halves, args.points))
    for kind, table in tables.items():
        lines = [line_of(table, args, point, corrected) for point in [None, *args.points]]
        head = ["setting", *LOSS_HEAD]
        if table.decoded:
            head = ["setting", *ACCURACY_HEAD, *LOSS_HEAD, *ANSWER_HEAD]
        section(f"{kind}: {table.count} samples", markdown(head, lines))
    if args.points and args.control:
        title = "Controls: accuracy %, and change of the answer loss"
        section(title if corrected else title.replace("accuracy %, and ", ""),
                control_table(tables, args))
    if args.points and "unigram" in args.control:
        section("Why: how much of it a plain unigram bias of the same norm reaches",
                why_table(tables, args))
    if args.points:
        section("Alignment: the cosine of the prompt's gradient and the answer's, at δ = 0",
                alignment_table(tables, args))
    section("Time", time_table(rows, args.points))
    write_whole(args.out / "summary.md", ("\n".join(text) + "\n").encode())
    return f"{args.out / 'summary.md'}{plot(args, tables)}"


def quick(args, rows):
    """The result in one line a kind and setting, for the terminal."""
    text = [f"{'':27} {'right':>9} {LOSS_HEAD[0]:>21}  {LOSS_HEAD[1]:27} {LOSS_HEAD[2]}"]
    for kind, table in tables_of(rows).items():
        for point in [None, *args.points]:
            setting, title = names_of(point)
            right = f"{table[setting, 'strict'].sum():.0f}/{table.count}" if table.decoded else "–"
            change = "" if point is None else interval(table.change("answer_loss", setting))
            loss, seen = table.mean(setting, "answer_loss"), table.mean(setting, "prompt_loss")
            text.append(f"{kind:8} {title:18} {right:>9} {loss:21.4f}  {change:27} {seen:18.4f}")
    return "\n".join(text)


def names_of(point):
    """Of SLOT at a point, or the plain model: the name in the results, and for the reader."""
    return ("plain", "plain") if point is None else (name("slot", point), label(point))


# ---- tests

def holm_of(tables, points):
    """{(table, point): (p, corrected p)}, one family over all; {} without answers."""
    tests = [(table, point) for table in tables.values() for point in points if table.decoded]
    p = [sign_test(*table.flips(name("slot", point))) for table, point in tests]
    return dict(zip(tests, zip(p, holm(p))))


def accuracy_gain(table, point, corrected):
    fixed, broken = table.flips(name("slot", point))
    return fixed > broken and corrected[table, point][1] < 0.05


def reached(table, point, args, key):
    """The letters of the controls that SLOT is not shown to beat."""
    slot, letters = name("slot", point), []
    for control in args.control if point in args.control_points else []:
        other = name(control, point)
        if key == "strict":
            better, worse = table.flips(slot, other)
            beaten = better > worse and sign_test(better, worse) < 0.05
        else:
            beaten = table.change(key, slot, other)[2] < 0
        if not beaten:
            letters.append(LETTERS[control])
    return " ".join(sorted(letters))


def findings(tables, args, corrected):
    """The result in words: counted, not chosen."""
    tests = [(table, point) for table in tables.values() for point in args.points]
    if not tests:
        return ["Only the plain model was run."]
    text, gains = [], []
    if corrected:
        moved = [test for test in tests if corrected[test][1] < 0.05]
        gains = [(*test, "strict") for test in moved if accuracy_gain(*test, corrected)]
        text = [f"Accuracy: {len(tests)} hypotheses ({len(args.points)} settings, {len(tables)} "
                f"kind{'s' * (len(tables) > 1)}). After Holm's correction it rose in {len(gains)} "
                f"and fell in {len(moved) - len(gains)}."]
    changes = [table.change("answer_loss", name("slot", point)) for table, point in tests]
    lower = [(*test, "answer_loss") for test, (_, _, high) in zip(tests, changes) if high < 0]
    higher = sum(low > 0 for _, low, _ in changes)
    text.append("Loss on the held-out answer: its 95 % interval lies below 0 in "
                f"{len(lower)} of {len(tests)} and above 0 in {higher} (not corrected: "
                f"{0.05 * len(tests):.1f} would stray from 0 by luck).")
    gains += lower
    if gains:
        text.append(f"These {len(gains)} gains stand in bold.")
    if gains and args.control:
        count = sum(reached(table, point, args, key) != "" for table, point, key in gains)
        marks = ", ".join(f"{LETTERS[control]} ({control})" for control in sorted(args.control))
        text[-1] += f" A control reaches {count} of them, marked {marks}."
    return text


# ---- tables

def line_of(table, args, point, corrected):
    """The cells of one setting."""
    setting, title = names_of(point)
    before, change, after = [], "", []
    if table.decoded:
        before, after = [accuracy(table, setting), "", "", ""], answer_cells(table, setting)
    if table.decoded and point is not None:
        before[1:] = flips(table, setting), *map(p_value, corrected[table, point])
        if accuracy_gain(table, point, corrected):
            before[0] = f"**{before[0]}** {reached(table, point, args, 'strict')}".strip()
    if point is not None:
        figures = table.change("answer_loss", setting)
        change = interval(figures)
        if figures[2] < 0:
            change = f"**{change}** {reached(table, point, args, 'answer_loss')}".strip()
    return [title, *before, f"{table.mean(setting, 'answer_loss'):.4f}", change,
            f"{table.mean(setting, 'prompt_loss'):.4f}", *after]


def answer_cells(table, setting):
    """Format, length, and what the other scorers say; – where their rule knows no such answers."""
    strict, form = table[setting, "strict"], table[setting, "format"] == 1
    paper, flexible = table[setting, "paper"], table[setting, "flexible"]
    known, cells = ~np.isnan(paper), ["–", "–", "–"]
    if known.any():
        cells = [percent(paper[known].mean()), str(int((strict != paper)[known].sum())),
                 percent(flexible[known].mean())]
    return [percent(form.mean()), f"{table.mean(setting, 'tokens'):.1f}", *cells,
            percent(strict[form].mean() if form.any() else np.nan)]


def by_point(tables, points, columns):
    """A line a kind and point. columns: pairs of a heading and a function of (table, point)."""
    rows = [[kind, label(point), *(cell(table, point) for _, cell in columns)]
            for kind, table in tables.items() for point in points]
    return markdown(["kind", "setting", *(heading for heading, _ in columns)], rows, left=2)


def change_of(key, what):
    return lambda table, point: interval(table.change(key, name(what, point)))


def control_table(tables, args):
    def cell_of(what):
        def cell(table, point):
            right = f"{percent(table.mean(name(what, point), 'strict'))}; " if table.decoded else ""
            return right + change_of("answer_loss", what)(table, point)
        return cell
    columns = [(control, cell_of(control)) for control in args.control]
    return by_point(tables, args.control_points, [("SLOT", cell_of("slot")), *columns])


def why_table(tables, args):
    def share(table, point):
        changes = [table[name(what, point), "prompt_loss"] - table["plain", "prompt_loss"]
                   for what in ("unigram", "slot")]
        return "{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * x for x in bootstrap_ratio(*changes)))
    return by_point(tables, args.control_points, [
        ("prompt loss, change by SLOT", change_of("prompt_loss", "slot")),
        ("by unigram", change_of("prompt_loss", "unigram")),
        ("share of SLOT's change", share),
        ("answer loss, change by SLOT", change_of("answer_loss", "slot")),
        ("by unigram", change_of("answer_loss", "unigram"))])


def alignment_table(tables, args):
    """Does the cosine tell which samples gain? The gain: the answer loss that SLOT takes away."""
    def change(table, point):
        return table[name("slot", point), "answer_loss"] - table["plain", "answer_loss"]

    def correlation(table, point):
        return interval(bootstrap_rank(table["plain", "alignment"], -change(table, point)))

    def mean_where(positive):
        def cell(table, point):
            side = change(table, point)[(table["plain", "alignment"] > 0) == positive]
            return f"{interval(bootstrap_mean(side))}, n = {len(side)}" if len(side) else "–"
        return cell
    return by_point(tables, args.points, [
        ("rank correlation with the gain", correlation),
        ("change of the answer loss where it is above 0", mean_where(True)),
        ("elsewhere", mean_where(False))])


def chosen(tables, halves, points):
    """--split: the point with the best accuracy on the tune half (of equals the lower answer loss),
    on the test half."""
    def merit(table, point):
        slot = name("slot", point)
        return table.mean(slot, "strict"), -table.mean(slot, "answer_loss")
    best = {kind: max(points, key=lambda point: merit(tables[kind], point)) for kind in halves}
    p = [sign_test(*table.flips(name("slot", best[kind]))) for kind, table in halves.items()]
    rows = []
    for (kind, table), corrected in zip(halves.items(), holm(p)):
        slot = name("slot", best[kind])
        rows.append([kind, label(best[kind]), str(table.count),
                     percent(table.mean("plain", "strict")), accuracy(table, slot),
                     flips(table, slot), p_value(corrected),
                     interval(table.change("answer_loss", slot))])
    return markdown(["kind", "chosen on the tune half", "n", "plain %", "SLOT % [95 % CI]",
                     "fixed / broken", "Holm p", "change of answer loss [95 % CI]"], rows, left=2)


def time_table(rows, points):
    def means(setting):
        seconds = [row["seconds"] for row in rows if row["setting"] == setting]
        return [np.mean([s[part] for s in seconds]) for part in ("prefill", "fit", "decode")]
    lines = []
    for point in [None, *points]:
        setting, title = names_of(point)
        seconds, plain = means(setting), means("plain")
        share = percent(seconds[1] / sum(plain) if sum(plain) else np.nan)
        lines.append([title, *(f"{s:.4f}" for s in (sum(seconds), *seconds[1:])), share])
    total = sum(row["seconds"]["fit"] + row["seconds"]["decode"] for row in rows)
    head = ["setting", "seconds a sample", "of which fitting δ", "decoding",
            "overhead of δ, % of the plain run"]
    return [*markdown(head, lines), "", "A share of a batch's seconds, means over all samples. All "
            f"settings and controls together: {total:,.0f} s of fitting and decoding."]
