"""From result lines to summary.md, the plot, and the few lines of --quick. All comparisons are
paired: same samples, plain model beside.

A *gain* is an accuracy that rose (sign test, Holm-corrected p < 0.05) or an answer loss that fell
(interval below 0). It stands in bold. The letter r, w, u behind it says that this control reaches
it, too: that SLOT, at the same point, is not shown to be better (the same tests of SLOT against the
control, a sign test's p as it is, without Holm's correction).

The section "Time" stands last, because it alone differs between two runs.
"""
import numpy as np

from checks.files import whole_file
from study.plot import plot
from study.settings import label, name
from study.stats import bootstrap_mean, bootstrap_rank, bootstrap_ratio, holm, sign_test, wilson

FEW = 30                # samples
LETTERS = {"random": "r", "wrong-prompt": "w", "unigram": "u"}
ACCURACY_HEAD = ["accuracy % [95 % CI]", "fixed / broken", "p", "Holm p"]
LOSS_HEAD = ["answer loss (held out)", "its change [95 % CI]", "prompt loss (seen)"]
VERDICTS = {"strict": "right, strict", "flexible": "right, flexible", "format": "in the format"}
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

    def changes(self, key, a, b="plain"):
        """a - b of every sample."""
        return self[a, key] - self[b, key]

    def change(self, key, a, b="plain"):
        """(mean, low, high) of a - b."""
        return bootstrap_mean(self.changes(key, a, b))

    def flips(self, a, b="plain", key="strict"):
        """(fixed, broken): right in a and wrong in b, and the reverse; `key` says what is right."""
        return fixed_and_broken(self.changes(key, a, b))


def fixed_and_broken(changes):
    return int((changes > 0).sum()), int((changes < 0).sum())


def tables_of(rows):
    kinds = dict.fromkeys(row["kind"] for row in sorted(rows, key=lambda row: row["sample"]))
    return {kind: Table([row for row in rows if row["kind"] == kind]) for kind in kinds}


# ---- tests

def better(table, point, key, other="plain", p=None):
    """Whether SLOT is shown to be better than another setting. p: of the sign test, corrected."""
    slot = name("slot", point)
    if key == "answer_loss":
        return table.change(key, slot, other)[2] < 0
    fixed, broken = table.flips(slot, other)
    return fixed > broken and (sign_test(fixed, broken) if p is None else p) < 0.05


def reached(table, point, key, args):
    """The letters of the controls that SLOT is not shown to beat."""
    controls = args.control if point in args.control_points else []
    letters = [LETTERS[c] for c in controls if not better(table, point, key, name(c, point))]
    return " ".join(sorted(letters))


def holm_of(tables, points, key="strict"):
    """{(table, point): (p, corrected p)}, one family over all; {} without answers."""
    tests = [(table, point) for table in tables.values() for point in points if table.decoded]
    p = [sign_test(*table.flips(name("slot", point), key=key)) for table, point in tests]
    return dict(zip(tests, zip(p, holm(p))))


def findings(tables, args, corrected):
    """The result in words: counted, not chosen."""
    tests = [(table, point) for table in tables.values() for point in args.points]
    if not tests:
        return ["Only the plain model was run."]
    changes = [table.change("answer_loss", name("slot", point)) for table, point in tests]
    higher = sum(low > 0 for _, low, _ in changes)
    lower = [(*test, "answer_loss") for test in tests if better(*test, "answer_loss")]
    moved = [test for test in corrected if corrected[test][1] < 0.05]
    rose = [(*test, "strict") for test in moved if better(*test, "strict", p=corrected[test][1])]
    text, least = [], min(table.count for table in tables.values())
    if least < FEW:
        text.append(f"{least} sample{'s' * (least > 1)} of a kind: intervals and tests of so few "
                    "say little.")
    if corrected:
        settings, kinds = len(args.points), len(tables)
        text.append(f"Accuracy: {len(tests)} hypothes{'es' if len(tests) > 1 else 'is'} "
                    f"({settings} setting{'s' * (settings > 1)}, {kinds} kind{'s' * (kinds > 1)}). "
                    f"After Holm's correction it rose in {len(rose)} and fell in "
                    f"{len(moved) - len(rose)}.")
    text.append(f"Loss on the held-out answer: its 95 % interval lies below 0 in {len(lower)} of "
                f"{len(tests)} and above 0 in {higher} (not corrected: {0.05 * len(tests):.1f} "
                "would stray from 0 by luck).")
    gains = rose + lower
    if gains:
        text.append(f"These {len(gains)} gains stand in bold.")
    if gains and args.control:
        count = sum(reached(*gain, args) != "" for gain in gains)
        marks = ", ".join(f"{LETTERS[control]} ({control})" for control in sorted(args.control))
        text[-1] += f" A control reaches {count} of them, marked {marks}."
    return text


# ---- cells and tables

def percent(x):
    return "–" if x != x else f"{100 * x:.1f}"


def interval(figures):
    known = all(x == x for x in figures)
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*figures) if known else "–"


def p_value(p):
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def accuracy(table, setting):
    low, high = wilson(int(table[setting, "strict"].sum()), table.count)
    return f"{percent(table.mean(setting, 'strict'))} [{percent(low)}, {percent(high)}]"


def markdown(head, rows, left=1):
    """Lines of a table whose first `left` columns are words."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * left + "---:|" * (len(head) - left)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def names_of(point):
    """Of SLOT at a point, or the plain model: the name in the results, and for the reader."""
    return ("plain", "plain") if point is None else (name("slot", point), label(point))


def main_table(table, args, corrected):
    rows = []
    for point in [None, *args.points]:
        setting, title = names_of(point)
        before, change, after = [], "", []
        if table.decoded:
            before, after = [accuracy(table, setting), "", "", ""], answer_cells(table, setting)
        if table.decoded and point is not None:
            p = corrected[table, point]
            before[1:] = ["{} / {}".format(*table.flips(setting)), *map(p_value, p)]
            if better(table, point, "strict", p=p[1]):
                before[0] = f"**{before[0]}** {reached(table, point, 'strict', args)}".strip()
        if point is not None:
            change = interval(table.change("answer_loss", setting))
            if better(table, point, "answer_loss"):
                change = f"**{change}** {reached(table, point, 'answer_loss', args)}".strip()
        losses = [f"{table.mean(setting, key):.4f}" for key in ("answer_loss", "prompt_loss")]
        rows.append([title, *before, losses[0], change, losses[1], *after])
    both = [ACCURACY_HEAD, ANSWER_HEAD] if table.decoded else [[], []]
    return markdown(["setting", *both[0], *LOSS_HEAD, *both[1]], rows)


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
    """A line a kind and point. columns: [(heading, function of (table, point)), ...]"""
    heads, cells = zip(*columns)
    rows = [[kind, label(point), *(cell(table, point) for cell in cells)]
            for kind, table in tables.items() for point in points]
    return markdown(["kind", "setting", *heads], rows, left=2)


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
        changes = [table.changes("prompt_loss", name(what, point)) for what in ("unigram", "slot")]
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
        return table.changes("answer_loss", name("slot", point))

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


def verdict_table(tables, args):
    """Is a gain one of format? SLOT against the plain model and against its controls, by what is
    asked of an answer. Holm's correction: over the points, of each verdict by itself."""
    families, rows = {key: holm_of(tables, args.points, key) for key in VERDICTS}, []
    for kind, table in tables.items():
        pairs = [(point, "plain") for point in args.points]
        pairs += [(p, name(what, p)) for p in args.control_points for what in args.control]
        for point, other in pairs:
            cells = []
            for key, family in families.items():
                fixed, broken = table.flips(name("slot", point), other, key)
                cells.append(f"{fixed} / {broken}, p {p_value(sign_test(fixed, broken))}")
                if other == "plain":
                    cells[-1] += f", Holm {p_value(family[table, point][1])}"
            rows.append([kind, label(point), other, *cells])
    return markdown(["kind", "setting", "against", *VERDICTS.values()], rows, left=3)


def only_where(tables, args):
    """SLOT where the alignment is above a threshold, else the plain answer. The threshold: the best
    for the answer loss of every other sample; the figures: of the samples between them."""
    head = ["kind", "setting", "threshold: how many get SLOT", "change of the answer loss",
            "with SLOT for all", "fixed / broken"]
    rows, decoded = [], all(table.decoded for table in tables.values())
    for kind, table in tables.items():
        if table.count < 2:                                         # nobody to choose for
            continue
        alignment = table["plain", "alignment"]
        order = 2 * np.argsort(-alignment[::2], kind="stable")      # of the samples that choose
        for point in args.points:
            change = table.changes("answer_loss", name("slot", point))
            sums = np.append(0, np.cumsum(change[order]))           # SLOT for the first 0, 1, ...
            threshold = np.append(np.inf, alignment[order])[sums.argmin()]
            on, rest = alignment[1::2] >= threshold, change[1::2]
            rows.append([kind, label(point), f"{threshold:+.3f}: {on.sum()} of {len(on)}",
                         interval(bootstrap_mean(np.where(on, rest, 0))),
                         interval(bootstrap_mean(rest))])
            if decoded:
                right = table.changes("strict", name("slot", point))[1::2]
                rows[-1].append("{} / {}".format(*fixed_and_broken(np.where(on, right, 0))))
    return markdown(head if decoded else head[:-1], rows, left=2)


def chosen(tables, halves, points):
    """--split: the point with the best accuracy on the tune half (of equals the lower answer loss),
    on the test half."""
    best = {}
    for kind, table in tables.items():
        merits = {point: (table.mean(name("slot", point), "strict"),
                          -table.mean(name("slot", point), "answer_loss")) for point in points}
        best[kind] = max(points, key=merits.get)
    p = [sign_test(*table.flips(name("slot", best[kind]))) for kind, table in halves.items()]
    rows = []
    for (kind, table), corrected in zip(halves.items(), holm(p)):
        slot, title = names_of(best[kind])
        rows.append([kind, title, str(table.count), percent(table.mean("plain", "strict")),
                     accuracy(table, slot), "{} / {}".format(*table.flips(slot)),
                     p_value(corrected), interval(table.change("answer_loss", slot))])
    return markdown(["kind", "chosen on the tune half", "n", "plain %", "SLOT % [95 % CI]",
                     "fixed / broken", "Holm p", "change of answer loss [95 % CI]"], rows, left=2)


def time_table(rows, points):
    def means(setting):
        seconds = [row["seconds"] for row in rows if row["setting"] == setting]
        return [np.mean([s[part] for s in seconds]) for part in ("prefill", "fit", "decode")]
    lines, plain = [], sum(means("plain"))
    for point in [None, *points]:
        setting, title = names_of(point)
        prefill, fit, decode = means(setting)
        lines.append([title, *(f"{s:.4f}" for s in (prefill + fit + decode, fit, decode)),
                      percent(fit / plain if plain else np.nan)])
    total = sum(row["seconds"]["decode"] for row in rows)
    fitted = [name("slot", point) for point in points]          # controls take the fits of slot
    total += sum(row["seconds"]["fit"] for row in rows if row["setting"] in fitted)
    return markdown(["setting", "seconds a sample", "of which fitting δ", "decoding",
                     "overhead of δ, % of the plain run"], lines) + [
        "", "A share of a batch's seconds, means over all samples. All settings and controls "
        f"together: {total:,.0f} s of fitting and decoding."]


# ---- the whole

def write(args, rows, notes):
    """DIR/summary.md and DIR/plot.svg -> what to say about them."""
    tables, sections = tables_of(rows), {}
    if args.split:                                          # every other sample, for `chosen`
        held = {sample for table in tables.values() for sample in table.samples[1::2]}
        halves = tables_of([row for row in rows if row["sample"] in held])
        tables = tables_of([row for row in rows if row["sample"] not in held])
    corrected = holm_of(tables, args.points)
    if args.split and corrected:
        sections["Chosen on one half, reported on the other (all other tables, and the plot, are "
                 "of the first)"] = chosen(tables, halves, args.points)
    for kind, table in tables.items():
        sections[f"{kind}: {table.count} samples"] = main_table(table, args, corrected)
    if args.points and args.control:
        title = "Controls: accuracy %, and change of the answer loss"
        title = title if corrected else "Controls: change of the answer loss"
        sections[title] = control_table(tables, args)
    if args.points and "unigram" in args.control:
        sections["Why: how much of it a plain unigram bias of the same norm reaches"] = why_table(
            tables, args)
    if args.points:
        sections["Alignment: the cosine of the prompt's gradient and the answer's, at δ = 0"] = (
            alignment_table(tables, args))
    if args.points and args.task != "tiny":
        if corrected:
            sections["Answer or format? fixed / broken, by what is asked of an answer"] = (
                verdict_table(tables, args))
        sections["SLOT only where the cosine is above a threshold (chosen on every other sample, "
                 "shown on the rest; at test time nobody knows the answer's gradient)"] = (
            only_where(tables, args))
    sections["Time"] = time_table(rows, args.points)
    text = [f"# SLOT against the plain model: {args.task}", ""]
    text += [f"- {line}" for line in notes + findings(tables, args, corrected)]
    for title, lines in sections.items():
        text += ["", f"## {title}", "", *lines]
    with whole_file(args.out / "summary.md") as file:
        file.write(("\n".join(text) + "\n").encode())
    return f"{args.out / 'summary.md'}{plot(args, tables)}"


def quick(args, rows):
    """The result in one line a kind and setting, for the terminal."""
    text = [f"{'':30} {'right':>9} {LOSS_HEAD[0]:>22}  {LOSS_HEAD[1]:27} {LOSS_HEAD[2]}"]
    for kind, table in tables_of(rows).items():
        for point in [None, *args.points]:
            setting, title = names_of(point)
            right = f"{table[setting, 'strict'].sum():.0f}/{table.count}" if table.decoded else "–"
            change = "" if point is None else interval(table.change("answer_loss", setting))
            loss, seen = table.mean(setting, "answer_loss"), table.mean(setting, "prompt_loss")
            text.append(f"{kind:12}{title:18} {right:>9} {loss:22.4f}  {change:27} {seen:18.4f}")
    return "\n".join(text)
