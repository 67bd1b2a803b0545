"""What was measured: each row beside its limit, and what the rows mean for each other."""
from statistics import median

from benchmarks.stages import ROWS, STEPS


def base_of(row, work):
    """The row that a peer's row is compared with: "decode" for "decode, llama.cpp"."""
    return row if row in work else row.rsplit(", ", 1)[0]


def table(subject, rates):
    """Print it -> {row: its figures}, for the JSON."""
    work, rows, width = subject.work(), {}, max(map(len, subject.seconds)) + 2
    print(f"\n== {subject.title}: {subject.size / 1e6:,.1f} M parameters, "
          f"{subject.size * subject.bytes / 1e9:.2f} GB, products: {subject.products} ==")
    print(f"{'':<{width + 9}}{'min':>10}{'median':>10}{'max':>10}{'limit':>10}   reached")
    for row in sorted(subject.seconds, key=lambda row: list(work).index(base_of(row, work))):
        seconds, limit = subject.seconds[row], rates.limit(work[base_of(row, work)], subject.dtype)
        unit, values, bound = "ms", [1e3 * s for s in seconds], 1e3 * limit
        if row.startswith(("decode", f"{ROWS} prompts")):
            unit, values, bound = "tokens/s", [1 / s for s in seconds], 1 / limit
        rows[row] = dict(unit=unit, min=min(values), median=median(values), max=max(values),
                         limit=bound, reached=limit / median(seconds), seconds=seconds)
        cells = "".join(f"{rows[row][key]:>10,.4g}" for key in ("min", "median", "max", "limit"))
        print(f"{row:<{width}}{unit:>9}{cells}{rows[row]['reached']:>9.0%}")
    return rows


def comparison(subject, rates):
    """Print it -> {what: figure}, for the JSON."""
    found, work = {}, subject.work()
    seconds = {row: median(each) for row, each in subject.seconds.items()}
    for note in subject.notes:
        print(f"  {note}")
    for name in subject.peers:
        pairs = list(zip(subject.ids[""], subject.ids[name]))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        print(f"  {name}: the first {same} of {len(pairs)} greedy tokens are the same")
        found[f"the same tokens as {name}"] = same
    for row, spent in seconds.items():
        published = seconds.get(row.split(", ")[0] + ", published loop")
        if base_of(row, work) != row:
            found[f"{row} / here"] = spent / seconds[base_of(row, work)]
        elif row.startswith("SLOT") and published and "published" not in row:
            found[f"published loop / {row}"] = published / spent
    for what in (what for what in found if " / " in what):
        print(f"  {what:<66}{found[what]:6.2f} x")
    row, answer = f"SLOT {STEPS} steps, closed form", 512 * seconds["decode"]
    least = rates.limit(work[row], subject.dtype)
    print(f"  SLOT with {STEPS} steps costs {seconds[row] / answer:.2%} of decoding 512 tokens "
          f"({seconds[row]:.3f} s of {answer:.1f} s), at its limit {least / answer:.2%}")
    return found | {"SLOT share of 512 tokens": seconds[row] / answer, "its limit": least / answer}
