"""plot.svg, written as text: accuracy, and the change of the answer loss, against SLOT steps."""
import math
from html import escape

from checks.files import whole_file
from study.settings import name
from study.stats import wilson

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]      # Okabe and Ito: told apart by all eyes
DASHES = ["none", "8 4", "2 4", "8 4 2 4"]
MARKERS = ["M-4-4h8v8h-8z", "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z", "M-5 4h10l-5-9z",
           "M-6 0l6-6 6 6-6 6z"]                            # square, circle, triangle, diamond
PANEL, LEFT, TOP, WIDTH, HEIGHT = 650, 76, 64, 560, 380     # a panel, and the plot's place in it


def plot(args, tables):
    """Write DIR/plot.svg -> what to say about it."""
    if not args.points:
        return ""
    panels = {} if args.only else {"strict": "right answers, %"}
    panels["answer_loss"] = "held-out answer: change of loss, nats/token"

    # a colour for a kind; a line and a marker for a rate, full and filled for the highest
    looks, rates = {}, sorted({lr for _, lr in args.points})
    for kind, colour in zip(tables, COLOURS * len(tables)):
        for place, lr in enumerate(rates):
            place = len(rates) - 1 - place
            looks[kind, lr] = MARKERS[place % 4], (
                f'stroke="{colour}" fill="{"white" if place else colour}" stroke-width="2" '
                f'stroke-dasharray="{DASHES[place % 4]}"')

    body = []
    for i, (key, title) in enumerate(panels.items()):
        body += [f'<g transform="translate({PANEL * i + LEFT} {TOP})">',
                 *panel(args, tables, looks, key, title), "</g>"]
    across = 3 * len(panels)                                # entries of the legend in a row
    for i, ((kind, lr), (marker, look)) in enumerate(looks.items()):
        x, y = LEFT + i % across * 208, TOP + HEIGHT + 76 + 28 * (i // across)
        body += [f'<g transform="translate({x} {y})" {look}><path d="M-22 0h44" />',
                 f'<path d="{marker}" stroke-dasharray="none" /></g>',
                 text(x + 32, y + 5, f"{kind}, lr {lr!r}")]
    width, height = PANEL * len(panels), y + 24
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" font-family="sans-serif" font-size="16" fill="#222">')
    paper = f'<rect width="{width}" height="{height}" fill="white" />'      # also on a dark page
    with whole_file(args.out / "plot.svg") as file:
        file.write("\n".join([head, paper, *body, "</svg>\n"]).encode())
    return ", plot.svg"


def text(x, y, words, more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(words)}</text>'


def values(args, table, key, lr):
    """{steps: (middle, low, high)} of one curve; 0 steps are the plain model."""
    found = {}
    for steps in [0, *sorted(steps for steps, rate in args.points if rate == lr)]:
        setting = name("slot", (steps, lr)) if steps else "plain"
        found[steps] = table.change(key, setting)
        if key == "strict":
            right = int(table[setting, key].sum())
            found[steps] = [100 * x for x in (right / table.count, *wilson(right, table.count))]
    return found


def panel(args, tables, looks, key, title):
    """The elements of one panel, in pixels from the upper left corner of its plot; y grows down."""
    points = {(kind, lr): values(args, tables[kind], key, lr) for kind, lr in looks}
    ends = [x for curve in points.values() for three in curve.values() for x in three]
    size = 1.1 * (max(0, *ends) - min(0, *ends)) or 1       # of what the plot's height shows
    high = max(0, *ends) + 0.05 * size
    steps = [0, *sorted({steps for steps, _ in args.points})]

    def x_of(place):
        return WIDTH * (place + 0.5) / len(steps)

    def y_of(value):
        return HEIGHT * (high - value) / size

    drawn = [text(0, -36, title, 'font-size="19"')]
    if key == "answer_loss":
        losses = [f"{kind} {table.mean('plain', key):.3f}" for kind, table in tables.items()]
        drawn.append(text(0, -12, "loss of the plain model: " + ", ".join(losses), 'fill="#666"'))

    # a line and a number at every tick, 1, 2 or 5 times a power of ten apart; the line at 0 is dark
    power = 10 ** math.floor(math.log10(size / 5))
    apart = max(power * times for times in (1, 2, 5) if times == 1 or power * times <= size / 5)
    for tick in range(math.ceil((high - size) / apart), math.floor(high / apart) + 1):
        y, number = y_of(tick * apart), f"{tick * apart:.{max(0, -math.floor(math.log10(apart)))}f}"
        drawn += [f'<path d="M0 {y:.1f}h{WIDTH}" stroke="{"#ddd" if tick else "#666"}" />',
                  text(-8, y + 5, number.replace("-", "−"), 'text-anchor="end"')]
    for place, count in enumerate(steps):
        drawn.append(text(x_of(place), HEIGHT + 20, str(count), 'text-anchor="middle"'))
    drawn.append(text(WIDTH / 2, HEIGHT + 44, "SLOT steps (0 is the plain model)",
                      'text-anchor="middle"'))

    # the curves, a little beside each other: the line, then at each point interval and marker
    for number, (curve, (marker, look)) in enumerate(looks.items()):
        aside = 0.6 * ((number + 0.5) / len(looks) - 0.5)
        line, marks = [], []
        for count, three in points[curve].items():
            x, (y, low, top) = x_of(steps.index(count) + aside), map(y_of, three)
            line.append(f"{x:.1f} {y:.1f}")
            marks += [f'<path d="M{x:.1f} {low:.1f}V{top:.1f}m-3 0h6M{x - 3:.1f} {low:.1f}h6" '
                      'stroke-width="1.2" />',
                      f'<path d="{marker}" transform="translate({x:.1f} {y:.1f})" />']
        drawn += [f'<g {look}><path d="M{"L".join(line)}" fill="none" />',
                  '<g stroke-dasharray="none">', *marks, "</g></g>"]
    return drawn
