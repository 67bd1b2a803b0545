"""The problems of tiny/: right arithmetic, plain English, and a held-out set that training cannot
have seen."""
import collections
import hashlib
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import problems
from tiny.problems import GIFTS, KINDS, RARE_SHARE, Problem, held_out, heldout, problem

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [problem(1, i) for i in range(20000)]       # the first of what the model was trained on
HELD_OUT = {group: heldout(group, 400) for group in ("common", "rare", "unseen")}
ALL = TRAIN + sum(HELD_OUT.values(), [])


def shape(text):
    """A text without what is drawn: names, numbers, nouns. Two problems of one phrasing have one
    shape."""
    words = [r"\d+", "bike", "boat", "scooter", "she", "he", "She", "He", "her", "his", "him"]
    for pool in ("SHE", "HE", "THINGS", "GOODS", "CAKES", "GIFTS", "PEOPLE", "DAYS"):
        words += getattr(problems, pool)
    for pair in problems.BOXES:
        words += pair.split("/")
    return re.sub(r"\b(" + "|".join(sorted(words, key=len, reverse=True)) + r")\b", "_", text)


def test_every_calculation_is_right_and_the_last_one_is_the_answer():
    for p in ALL:
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", p.answer)
        assert len(steps) == p.answer.count("=") >= 2, p
        for a, op, b, c in steps:
            a, b, c = int(a), int(b), int(c)
            assert c == {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[op], p
            assert 2 <= c < 250, p
        assert re.fullmatch(r"[^\n]+\n#### \d+", p.answer), p
        assert p.answer.rsplit(" ", 1)[1] == steps[-1][-1], p


def test_solutions_use_the_numbers_of_the_question():
    """Each number of a solution is in the question or was calculated before."""
    for p in ALL:
        known = set(re.findall(r"\d+", p.question))
        for a, _, b, c in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", p.answer):
            assert {a, b} <= known, p
            known.add(c)


def test_the_same_arguments_give_the_same_problem():
    assert TRAIN[:500] == [problem(1, i) for i in range(500)]
    assert TRAIN[:500] != [problem(2, i) for i in range(500)]
    # Not only within one process: Python's own hash() differs from run to run, and plays no part.
    code = "from tiny.problems import problem; print(problem(1, 7))"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                           check=True)
    assert other.stdout.strip() == repr(TRAIN[7])


def test_they_are_the_problems_that_the_model_learnt():
    """To the letter: the weights, and every figure of the study, belong to these texts."""
    digest = hashlib.sha256()
    for p in ALL:
        digest.update(repr(tuple(p)).encode())
    assert digest.hexdigest() == (
        "eefd08fe2595c88e96bc9adb8aac6024f221443a6a2c303fd0f9de45320c034a")


def test_training_and_held_out_share_no_problem():
    questions = {p.question for p in TRAIN}
    for group, problems in HELD_OUT.items():
        assert len({p.question for p in problems}) == len(problems) == 400
        assert all(p.group == group for p in problems)
        assert not questions & {p.question for p in problems}
    # Stronger: no combination of numbers of one kind, in whatever words, is on both sides.
    def numbers(p):
        return p.kind, tuple(re.findall(r"\d+", p.answer))
    held_out = {numbers(p) for problems in HELD_OUT.values() for p in problems}
    assert not {numbers(p) for p in TRAIN} & held_out


def test_the_rule_sets_aside_about_one_in_sixteen():
    triples = list(itertools.product(range(20), repeat=3))
    share = sum(held_out("shopping", triple) for triple in triples) / len(triples)
    assert 0.05 < share < 0.075


def test_unseen_phrasings_are_never_in_training():
    train = {shape(p.question) for p in TRAIN}
    unseen = {shape(p.question) for p in HELD_OUT["unseen"]}
    assert len(unseen) >= sum(len(parts.get("unseen", [])) for parts in KINDS.values())
    assert not train & unseen
    with pytest.raises(ValueError):
        problem(0, 0, "train", "unseen")


def test_rare_is_rare():
    assert 0.01 <= RARE_SHARE <= 0.02
    assert 0.01 <= sum(p.group == "rare" for p in TRAIN) / len(TRAIN) <= 0.02
    assert {p.group for p in TRAIN} == {"common", "rare"}
    rare = {shape(p.question) for p in TRAIN if p.group == "rare"}
    assert not rare & {shape(p.question) for p in TRAIN if p.group == "common"}
    assert not rare & {shape(p.question) for p in HELD_OUT["unseen"]}


def test_all_kinds_and_phrasings_occur():
    for group, problems in [("common", TRAIN), *HELD_OUT.items()]:
        kinds = collections.Counter(p.kind for p in problems if p.group == group)
        assert set(kinds) == {kind for kind, parts in KINDS.items() if group in parts}
        assert min(kinds.values()) > 0.3 * max(kinds.values())


def test_plain_english():
    for p in ALL:
        for text in (p.question, p.answer):
            assert "  " not in text and "{" not in text and "}" not in text, p
            assert text == text.strip() and (text[0].isupper() or text[0].isdigit()), p
            assert text.isascii(), p                            # so one character is one byte
            assert not re.search(r"\b[01] [a-z]+s\b", text), p   # "1 apples"
            assert not re.search(r"\ba [aeiou]", text), p        # "a apple"
            for sentence in re.findall(r"[.?!] (\S)", text):
                assert sentence.isupper() or sentence.isdigit() or sentence == "#", p
        assert p.question.endswith("?") and p.question.count("?") == 1, p
    assert all(gift[0] not in "aeiou" for gift in GIFTS)


def test_nothing_but_the_standard_library():
    code = ("import sys; before = set(sys.modules); import tiny.problems\n"
            "print(*(set(sys.modules) - before))")
    out = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True,
                         text=True, check=True).stdout
    rooms = {name.split(".")[0] for name in out.split()}
    assert rooms <= set(sys.stdlib_module_names) | {"tiny"}


def test_bad_arguments_are_refused():
    for arguments in ((0, 0, "test"), (0, 0, "heldout", "easy")):
        with pytest.raises(ValueError):
            problem(*arguments)
    assert isinstance(problem(0, 0), Problem)
