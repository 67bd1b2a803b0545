"""The real program on the embedded model, for rewards and for `try`: with the project's functions,
or with a student's in their place."""
import contextlib
import functools
import io
import re

import torch

import generate
from checks.options import TINY
from load_weights import load_model
from tiny.problems import heldout
from tokenizer import load_tokenizer


@functools.cache
def embedded():
    """-> the embedded model, its tokenizer, and the ids of the default prompt."""
    lm, tokenizer = load_model(TINY), load_tokenizer(TINY)
    return lm, tokenizer, tokenizer.chat_ids([{"role": "user", "content": default_question()}])


def default_question():
    return heldout("common", 1)[-1].question


def problem_ids(tokenizer, problem):
    """-> the ids of a problem's prompt, and of its right answer."""
    prompt = tokenizer.chat_ids([{"role": "user", "content": problem.question}])
    return prompt, tokenizer.encode(problem.answer)


def shades(numbers):
    """A row of weights from 0 to 1 in five shades of grey."""
    return "".join(" ░▒▓█"[min(4, int(5 * number ** 0.5))] for number in numbers)


def bar(number, of=1.0, width=30):
    return "█" * round(width * max(0.0, min(1.0, number / of)))


@contextlib.contextmanager
def in_place_of(*places):
    """For a while, replace attributes: (owner, name, new)."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, new in places:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, old in before:
            setattr(owner, name, old)


@torch.no_grad()
def prompt_states(lm, prompt):
    """-> hidden (1, T, d) of a prompt, a list of ids, and its logits (1, T, V)."""
    hidden = lm.model(torch.tensor([prompt]))
    return hidden, lm.lm_head(hidden)


def answer(*options):
    """Run generate.py with these options, without speed/ -> {what: words that joined are a text}.

    It is the command itself that runs, from the files on; what it prints is not shown but compared.
    """
    tokenizer, given, answered = embedded()[1], [], []

    def noting_prompt(lm, tokens, *rest, **options):
        given.extend(tokenizer.decode([id]) for id in tokens)
        return prefill(lm, tokens, *rest, **options)

    def noting_answer(*arguments, **options):
        for id in decode(*arguments, **options):
            answered.append(tokenizer.decode([id]))
            yield id

    prefill, decode = generate.prefill, generate.decode
    places = [(generate, "prefill", noting_prompt), (generate, "decode", noting_answer),
              (generate, "speed", None)]
    printed, said = io.StringIO(), io.StringIO()
    with in_place_of(*places):
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            generate.main(generate.parse_arguments(list(options)))
    found = {"tokens of the prompt": given, "tokens of the answer": answered}
    for line in said.getvalue().splitlines():
        what, *words = re.split(r" {2,}|(?<=\d) → ", line.strip())
        if what in ("loss on the prompt", "more likely", "less likely"):
            found[what] = [f" {word}" for word in words]
    return found


def with_and_without(program, runs, *places):
    """-> what a program gives with the project's own functions, and with others in their place;
    and what both runs are, in words."""
    own = program()
    with in_place_of(*places):
        return own, program(), runs


def answers_with(*places, options="--problem 1 --slot-steps 3 --slot-lr 0.01".split()):
    runs = f"python generate.py {' '.join(options)}"
    return with_and_without(lambda: answer(*options), runs, *places)


def alike(word, other):
    """Equal, but for the last of three or more decimals: a right function may round otherwise."""
    numbers = [re.findall(r"\d+\.\d{3,}", each) for each in (word, other)]
    words = [re.sub(r"\d+\.\d{3,}", "\0", each) for each in (word, other)]
    return words[0] == words[1] and all(
        abs(float(a) - float(b)) < 1.5 / 10 ** len(a.split(".")[1]) for a, b in zip(*numbers))


def parting(own, yours):
    """Two results of a program -> whether they are the same, and a line for each entry."""
    lines, same = [], True
    for what, words in own.items():
        others = yours[what]
        if len(words) == len(others) and all(map(alike, words, others)):
            lines.append(f"{what}: the same, all {len(words)}: {shown(words, '')}")
            continue
        same = False
        at = 0
        while at < min(len(words), len(others)) and alike(words[at], others[at]):
            at += 1
        near = slice(max(0, at - 4), at + 3)
        lines.append(f"{what}: they part at number {at + 1} of {len(words)}")
        lines.append(f"  the project's own: ... {shown(words[near], ' | ')}")
        lines.append(f"  yours:             ... {shown(others[near], ' | ')}")
    return same, lines


def shown(words, between):
    return between.join(words).strip().replace("\n", "⏎")
