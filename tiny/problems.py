"""
Grade-school word problems with worked solutions, made by rule: what the tiny model is trained and
tested on.

    problem(seed, index)  ──►  Problem(question, answer, group, kind)

A *kind* of problem is five things: how its numbers are drawn, how they are combined, the written
solution, and lists of phrasings. A phrasing belongs to one *group*, and the group says how often
training shows it:

    common    nearly all of training
    rare      RARE_SHARE of training: seldom-used phrasings of the common kinds, and three kinds
              that are always rare
    unseen    never in training; the arithmetic under them is that of the common kinds

Numbers are small: sums below 250, products and quotients inside the 12 times table, two or three
steps. Whole numbers only. Everything follows from (seed, index), so a training run that was
interrupted goes on with the very same stream.

    python -m tiny.problems        # print a few of each group
"""

import hashlib
import random
from typing import NamedTuple


class Problem(NamedTuple):
    question: str
    answer: str             # the written solution; its last line is "#### number"
    group: str              # "common", "rare" or "unseen"
    kind: str               # "shopping", "sharing", …


RARE_SHARE = 0.015

SHE = "Mia Anna Ella Lily Nora Rosa Emma Zoe Ruth Clara Hana Lucy".split()
HE = "Tom Ben Sam Leo Max Omar Jack Noah Paul Ivan Hugo Adam".split()
THINGS = ("apples pencils marbles stickers shells stamps cards beads buttons coins "
          "plums pears stones balloons ribbons crayons").split()
GOODS = "hats candles bowls cups dolls belts masks rings".split()
CAKES = "cookies muffins rolls buns tarts pies".split()
GIFTS = "book cap lamp kite scarf ball clock mug".split()
BOXES = "box/boxes bag/bags pack/packs jar/jars basket/baskets".split()
PEOPLE = "friends cousins children classmates".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


# Each kind below: `draw` picks the numbers a, b, … of the question; `solve` turns them into the
# results x, y, … of the solution. In the texts {name}/{he}/{his} is the main person and {other} a
# second one. Counted numbers are at least 2, so plurals are always right.

def quotient_of_product(n):
    """a * b cakes go into packs of c, giving at most 12 packs, each sold for d dollars.
    n(lo, hi) draws a number."""
    while True:
        a, b, c = n(2, 9), n(2, 12), n(2, 12)
        if a * b % c == 0 and 2 <= a * b // c <= 12:
            return a, b, c, n(2, 9)


def sum_that_divides(n):
    """a + b is c times something in the table."""
    c, each = n(2, 9), n(3, 12)
    a = n(2, c * each - 2)
    return a, c * each - a, c


KINDS = {
    "shopping": dict(
        draw=lambda n: (n(2, 12), n(2, 12), n(5, 60)),
        solve=lambda a, b, c: (a * b, a * b + c),
        solution="The {things} cost {a} * {b} = {x} dollars. With the {gift}, {name} spends {x} + "
                 "{c} = {y} dollars.",
        common=[
            "{name} buys {a} {things} for ${b} each and a {gift} for ${c}. How much does {he} "
            "spend?",
            "At the market {name} buys a {gift} for ${c} and {a} {things} that cost ${b} each. How "
            "much does {he} pay in total?",
            "A {gift} costs ${c}. {name} buys one and also {a} {things} at ${b} each. How many "
            "dollars does {he} spend?",
            "{name} goes shopping on {day}. {He} takes {a} {things} at ${b} each and a {gift} that "
            "costs ${c}. What is the total cost?"],
        rare=["A {gift} is priced at ${c} and {things} are sold at ${b} apiece. What is the bill "
              "when {name} takes the {gift} and {a} {things}?"],
        unseen=[
            "How many dollars are needed by {name}, who wants to buy {a} {things} that cost ${b} "
            "each, and also a {gift} for ${c}?",
            "{name} pays for {a} {things} and a {gift}. Each of the {things} costs ${b}. The "
            "{gift} costs ${c}. How much money is that?"]),
    "change": dict(
        draw=lambda n: (a := n(2, 9), b := n(2, 12), a * b + n(2, 60)),
        solve=lambda a, b, c: (a * b, c - a * b),
        solution="The {things} cost {a} * {b} = {x} dollars. {name} has {c} - {x} = {y} dollars "
                 "left.",
        common=[
            "{name} has ${c}. {He} buys {a} {things} for ${b} each. How much money does {he} have "
            "left?",
            "{name} goes to the shop with ${c} and buys {a} {things} at ${b} each. How many "
            "dollars are left?",
            "On {day} {name} has ${c} in {his} pocket. {He} pays for {a} {things} that cost ${b} "
            "each. How much money is left?",
            "{name} buys {a} {things}. Each one costs ${b}. If {he} had ${c} at first, how much "
            "does {he} have now?"],
        rare=["The price of {things} is ${b} apiece. {name} hands over ${c} and takes {a} of them. "
              "What change does {he} get?"],
        unseen=[
            "How much is left of the ${c} that {name} had, if {he} buys {a} {things} and each one "
            "costs ${b}?",
            "{a} {things} at ${b} each are paid by {name} from {his} ${c}. How many dollars does "
            "{he} have now?"]),
    "collecting": dict(
        draw=lambda n: (a := n(10, 90), b := n(5, 60), n(3, a + b - 2)),
        solve=lambda a, b, c: (a + b, a + b - c),
        solution="First {name} has {a} + {b} = {x} {things}. Then {he} has {x} - {c} = {y} "
                 "{things}.",
        common=[
            "{name} has {a} {things}. {He} finds {b} more and gives {c} to {other}. How many "
            "{things} does {he} have now?",
            "{name} collects {things}. {He} has {a} of them, gets {b} more on {day} and then loses "
            "{c}. How many {things} are left?",
            "There are {a} {things} in {name}'s collection. {He} adds {b} and later sells {c}. How "
            "many {things} remain?",
            "{name} had {a} {things}. After {other} gave {him} {b} more, {he} lost {c}. How many "
            "{things} does {he} have left?"],
        rare=["Of {things}, {name} owned {a} and then won {b} in a game, but {c} of them broke. "
              "How many are whole?"],
        unseen=[
            "{other} gets {c} {things} from {name}, who had {a} and then found {b} more. How many "
            "{things} does {name} have left?",
            "How many {things} are in {name}'s collection now, if {he} had {a}, got {b} more, and "
            "gave {c} away?"]),
    "packing": dict(
        draw=lambda n: (n(2, 12), n(2, 12), n(2, 60)),
        solve=lambda a, b, c: (a * b, a * b + c),
        solution="In the {boxes} there are {a} * {b} = {x} {things}. Altogether there are {x} + "
                 "{c} = {y} {things}.",
        common=[
            "{name} has {a} {boxes} of {b} {things} and {c} loose {things}. How many {things} does "
            "{he} have?",
            "{name} fills {a} {boxes} with {b} {things} each and has {c} {things} left over. How "
            "many {things} were there?",
            "There are {b} {things} in each {box}. {name} buys {a} {boxes} and already has {c} "
            "{things}. How many {things} does {he} have now?",
            "{other} brings {a} {boxes} with {b} {things} in each. {name} has {c} {things}. How "
            "many {things} do they have together?"],
        rare=["Every {box} holds {b} {things}. Count {a} full {boxes} and {c} {things} on the "
              "table: what is the total?"],
        unseen=[
            "Besides {c} loose {things}, {name} has {a} {boxes}, and in each {box} there are {b} "
            "{things}. How many {things} is that in total?",
            "How many {things} were there before {name} filled {a} {boxes} with {b} each, if {c} "
            "are left over?"]),
    "sharing": dict(
        draw=sum_that_divides,
        solve=lambda a, b, c: (a + b, (a + b) // c),
        solution="Together there are {a} + {b} = {x} {things}. Each one gets {x} / {c} = {y} "
                 "{things}.",
        common=[
            "{name} has {a} {things} and {other} has {b}. They share them equally among {c} "
            "{people}. How many {things} does each one get?",
            "{name} gets {a} {things} in the morning and {b} in the afternoon. {He} gives them to "
            "{c} {people} in equal parts. How many {things} does each get?",
            "{c} {people} share {a} {things} from {name} and {b} {things} from {other} equally. "
            "How many {things} does each one get?",
            "{name} puts {a} {things} and {b} more {things} into {c} {boxes}, the same number in "
            "each {box}. How many {things} are in each {box}?"],
        rare=["A heap of {a} {things} and a heap of {b} are divided fairly between {c} {people}. "
              "What is the share of each?"],
        unseen=[
            "How many {things} does each of {c} {people} get, if {name} gives them {a} {things} "
            "and {other} gives them {b}, and all get the same number?",
            "There are {a} {things} in a {box} and {b} more on {name}'s table. {He} gives all of "
            "them to {c} {people}, the same number to each. How many {things} does each one get?"]),
    "making": dict(
        draw=lambda n: (a := n(2, 12), b := n(2, 12), n(2, a * b - 2)),
        solve=lambda a, b, c: (a * b, a * b - c),
        solution="{name} makes {a} * {b} = {x} {goods}. Then {x} - {c} = {y} {goods} are left.",
        common=[
            "{name} makes {a} {goods} an hour. {He} works for {b} hours and then sells {c} "
            "{goods}. How many {goods} are left?",
            "{name} makes {a} {goods} every day for {b} days. {He} gives {c} of them to {other}. "
            "How many {goods} does {he} have left?",
            "In {b} days {name} makes {a} {goods} each day and sells {c} of them at the market. "
            "How many {goods} does {he} keep?",
            "{name} works {b} hours on {day} and makes {a} {goods} each hour. {other} buys {c} of "
            "them. How many {goods} remain?"],
        rare=["Working at a speed of {a} {goods} an hour, {name} is busy for {b} hours; {c} turn "
              "out badly. How many good {goods} are there?"],
        unseen=[
            "How many {goods} does {name} keep, if {he} makes {a} of them each hour, works for {b} "
            "hours, and gives {c} of them to {other}?",
            "{name} sells {c} of the {goods} that {he} makes in {b} days. Each day {he} makes {a}. "
            "How many are left?"]),
    "distance": dict(
        draw=lambda n: (n(3, 12), n(2, 9), n(2, 12), n(2, 9)),
        solve=lambda a, b, c, d: (a * b, c * d, a * b + c * d),
        solution="By {bike} {name} goes {a} * {b} = {x} miles. On foot {he} goes {c} * {d} = {y} "
                 "miles. In total {he} goes {x} + {y} = {z} miles.",
        common=[
            "{name} goes by {bike} at {a} miles an hour for {b} hours and then walks {c} miles a "
            "day for {d} days. How far does {he} go?",
            "{name} walks {c} miles every day for {d} days. Then {he} goes by {bike} for {b} hours "
            "at {a} miles an hour. How many miles does {he} go in total?",
            "For {b} days {name} goes {a} miles a day by {bike}, and for {d} days {he} walks {c} "
            "miles a day. How many miles is that?"],
        rare=["The first part of {name}'s trip takes {b} hours by {bike}, {a} miles each hour; the "
              "second takes {d} days on foot, {c} miles each day. How long is the trip?"],
        unseen=[
            "How many miles does {name} go in total, if {he} walks {c} miles a day for {d} days "
            "and goes {a} miles an hour by {bike} for {b} hours?",
            "On a trip, {name} walks for {d} days and goes by {bike} for {b} days. {He} goes {a} "
            "miles a day by {bike} and {c} miles a day on foot. How far is that?"]),
    "saving": dict(
        draw=lambda n: (c := n(5, 60), b := n(2, 12), c + b * n(2, 12)),
        solve=lambda a, b, c: (c - a, (c - a) // b),
        solution="{name} still needs {c} - {a} = {x} dollars. That takes {x} / {b} = {y} weeks.",
        common=[
            "{name} wants a {gift} that costs ${c}. {He} has ${a} and saves ${b} every week. How "
            "many weeks does it take?",
            "{name} has ${a}. {He} saves ${b} a week to buy a {gift} for ${c}. How many weeks must "
            "{he} save?",
            "A {gift} costs ${c}. {name} already has ${a} and gets ${b} each week. After how many "
            "weeks can {he} buy it?",
            "{name} saves ${b} each week for a {gift}. The price is ${c} and {he} has ${a} so far. "
            "How many weeks does {he} need?"],
        rare=["With ${a} in the bank and ${b} put aside weekly, how long until {name} can afford "
              "the {gift} at ${c}?"],
        unseen=[
            "How many weeks does {name}, who has ${a}, need for a {gift} that costs ${c}, if {he} "
            "gets ${b} a week?",
            "Every week {name} saves ${b}. {He} can buy a {gift} when {he} has ${c}. Now {he} has "
            "${a}. How many weeks is that?"]),
    "reading": dict(
        draw=lambda n: (a := n(3, 12), b := n(2, 12), a * b + n(5, 90)),
        solve=lambda a, b, c: (a * b, c - a * b),
        solution="{name} reads {a} * {b} = {x} pages. There are {c} - {x} = {y} pages left.",
        common=[
            "{name} reads a book of {c} pages. {He} reads {a} pages a day for {b} days. How many "
            "pages are left?",
            "A book has {c} pages. {name} reads {a} pages every day. How many pages are left after "
            "{b} days?",
            "{name} starts a book with {c} pages on {day}. In {b} days {he} reads {a} pages each "
            "day. How many pages must {he} still read?"],
        rare=["Each evening, {b} evenings in a row, {name} finishes {a} pages of a story that is "
              "{c} pages long. How many pages has {he} not read yet?"],
        unseen=[
            "How many pages are left for {name}, if {he} reads {a} pages a day of a book, does so "
            "for {b} days, and the book has {c} pages?",
            "After {b} days with {a} pages each, how many of the {c} pages in {his} book must "
            "{name} still read?"]),
    "comparing": dict(
        draw=lambda n: (n(5, 80), n(3, 60)),
        solve=lambda a, b: (a + b, a + a + b),
        solution="{other} has {a} + {b} = {x} {things}. Together they have {a} + {x} = {y} "
                 "{things}.",
        common=[
            "{name} has {a} {things}. {other} has {b} more than {name}. How many {things} do they "
            "have together?",
            "{other} has {b} more {things} than {name}. {name} has {a} {things}. How many do they "
            "have in total?",
            "{name} collects {a} {things} and {other} collects {b} more {things} than {name}. How "
            "many {things} do they have in all?"],
        rare=["{other} is ahead of {name} by {b} {things}; {name} owns {a}. What do both own, "
              "added up?"],
        unseen=[
            "How many {things} do {name} and {other} have together, if {name} has {a} and {other} "
            "has {b} more?",
            "{name} and {other} have {things}. {name} has {a}. {other} has {b} more than that. How "
            "many is that in total?"]),
    "times": dict(
        draw=lambda n: (a := n(2, 12), b := n(2, 9), n(2, a + a * b - 2)),
        solve=lambda a, b, c: (a * b, a + a * b, a + a * b - c),
        solution="{other} has {a} * {b} = {x} {things}. Together they have {a} + {x} = {y} "
                 "{things}. After that {y} - {c} = {z} {things} are left.",
        common=[
            "{name} has {a} {things} and {other} has {b} times as many. They give away {c}. How "
            "many {things} are left?",
            "{other} has {b} times as many {things} as {name}, who has {a}. Together they lose {c} "
            "{things}. How many remain?",
            "{name} finds {a} {things}. {other} finds {b} times as many. They sell {c} of all "
            "their {things}. How many do they keep?"],
        rare=["Suppose {other}'s {things} are {b} times the number of {name}'s, which is {a}. They "
              "pool them and drop {c}. What is left over?"],
        unseen=[
            "How many {things} do {name} and {other} keep, if {name} has {a}, {other} has {b} "
            "times as many, and they sell {c}?",
            "With {a} {things} from {name} and {b} times as many from {other}, the two have enough "
            "to give {c} away. How many are left?"]),
    "baking": dict(
        draw=quotient_of_product,
        solve=lambda a, b, c, d: (a * b, a * b // c, a * b // c * d),
        solution="{name} bakes {a} * {b} = {x} {cakes}. They fill {x} / {c} = {y} {boxes}. {He} "
                 "gets {y} * {d} = {z} dollars.",
        common=[
            "{name} bakes {a} trays of {b} {cakes}. {He} puts {c} {cakes} in each {box} and sells "
            "each {box} for ${d}. How much money does {he} get?",
            "{name} bakes {a} trays with {b} {cakes} on each. {He} sells them in {boxes} of {c} "
            "for ${d} a {box}. How many dollars does {he} get?",
            "On {day} {name} sells {boxes} of {c} {cakes} for ${d} each. {He} bakes {a} trays of "
            "{b} {cakes} and sells all of them. How much money does {he} get?"],
        rare=["From the oven come {a} trays, {b} {cakes} on every one. {name} wraps them {c} at a "
              "time into {boxes} worth ${d} each. What do they bring in?"],
        unseen=[
            "How much money does {name} get for {a} trays of {b} {cakes}, if {he} sells {c} "
            "{cakes} in each {box} and each {box} costs ${d}?",
            "Each {box} of {c} {cakes} costs ${d}. {name} bakes {b} {cakes} on each of {a} trays "
            "and sells them all. How many dollars is that in total?"]),
    # three kinds that training shows only rarely; their sums are those of "collecting"
    "ages": dict(
        draw=lambda n: (n(5, 60), n(2, 20), n(2, 20)),
        solve=lambda a, b, c: (a + b, a + b + c),
        solution="{other} is {a} + {b} = {x} years old. Then {other} will be {x} + {c} = {y} years "
                 "old.",
        rare=["{name} is {a} years old. {other} is {b} years older. How old will {other} be in {c} "
              "years?",
              "{other} was born {b} years before {name}, who is {a} years old now. What will be "
              "{other}'s age {c} years from now?"]),
    "bus": dict(
        draw=lambda n: (a := n(12, 80), n(3, a - 5), n(3, 40)),
        solve=lambda a, b, c: (a - b, a - b + c),
        solution="After the first stop there are {a} - {b} = {x} people. Then there are {x} + {c} "
                 "= {y} people on the bus.",
        rare=["A bus has {a} people on it. At a stop {b} get off and {c} get on. How many people "
              "are on the bus now?",
              "{name} drives a bus with {a} people. First {b} of them leave, then {c} new ones "
              "come in. How many people does {he} drive now?"]),
    "weather": dict(
        draw=lambda n: (a := n(20, 60), b := n(3, 30), n(3, min(40, a + b - 2))),
        solve=lambda a, b, c: (a + b, a + b - c),
        solution="At noon it is {a} + {b} = {x} degrees. In the evening it is {x} - {c} = {y} "
                 "degrees.",
        rare=["In the morning it is {a} degrees. By noon it is {b} degrees warmer, and then it "
              "falls by {c} degrees until the evening. How many degrees is it in the evening?",
              "On {day} the temperature starts at {a} degrees, rises by {b} and drops by {c}. What "
              "is the temperature then?"]),
}


def held_out(kind, numbers):
    """
    Whether these numbers, in this kind of problem, are set aside for testing. A fixed hash decides,
    one in sixteen, so the training set and the held-out set are disjoint by construction: not only
    no question is shared, but no combination of numbers within a kind, whatever the names and words
    around it.
    """
    digest = hashlib.blake2b(f"{kind} {numbers}".encode(), digest_size=2).digest()
    return digest[0] % 16 == 0


def problem(seed: int, index: int, split: str = "train", group: str | None = None) -> Problem:
    """
    The problem number `index` of an endless stream; the same arguments always give the same
    problem. Without a group, common and rare ones come in the mix that training uses. ValueError
    for a split or group that there is not.
    """
    if split not in ("train", "heldout") or group not in (None, "common", "rare", "unseen"):
        raise ValueError(f"problem: no split {split!r} or group {group!r}")
    if split == "train" and group == "unseen":
        raise ValueError("problem: unseen phrasings are never in the training split")
    rng = random.Random(f"{seed} {index} {split} {group}")
    group = group or ("rare" if rng.random() < RARE_SHARE else "common")

    kind = rng.choice([kind for kind, parts in KINDS.items() if group in parts])
    parts = KINDS[kind]
    while True:
        numbers = tuple(parts["draw"](rng.randint))
        if held_out(kind, numbers) == (split == "heldout"):
            break
    results = parts["solve"](*numbers)
    values = dict(zip("abcd", numbers)) | dict(zip("xyz", results))

    she = rng.random() < 0.5
    name = rng.choice(SHE if she else HE)
    other = rng.choice([n for n in SHE + HE if n != name])
    box, boxes = rng.choice(BOXES).split("/")
    words = dict(name=name, other=other, box=box, boxes=boxes)
    if she:
        words |= dict(he="she", He="She", his="her", him="her")
    else:
        words |= dict(he="he", He="He", his="his", him="him")
    words |= dict(                                      # drawn in this order
        things=rng.choice(THINGS), goods=rng.choice(GOODS), cakes=rng.choice(CAKES),
        gift=rng.choice(GIFTS), people=rng.choice(PEOPLE), day=rng.choice(DAYS),
        bike=rng.choice(["bike", "boat", "scooter"]))
    question = rng.choice(parts[group]).format(**values, **words)
    answer = parts["solution"].format(**values, **words) + f"\n#### {results[-1]}"
    return Problem(question, answer, group, kind)


def heldout(group: str, count: int, seed: int = 0) -> list[Problem]:
    """`count` held-out problems of one group, with distinct questions."""
    found, index = {}, 0
    while len(found) < count:
        p = problem(seed, index, "heldout", group)
        found.setdefault(p.question, p)
        index += 1
    return list(found.values())


if __name__ == "__main__":
    for group in ("common", "rare", "unseen"):
        print(f"---- {group}\n")
        for p in heldout(group, 4):
            print(f"[{p.kind}] {p.question}\n{p.answer}\n")
