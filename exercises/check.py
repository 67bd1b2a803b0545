"""What a student's function gives, and which mistake that is.

    solution     ──┐
    mistake 1    ──┤   all are run on the same cases       the student's results equal
    mistake 2    ──┼─► {case: result}  ◄── compared ──►      the solution's:  passed
    ...            │                                         a mistake's:     its name, its thought
    two at once  ──┘                                         nobody's:        where they differ

A mistake is an edit of the solution, {old text: new text}: a wrong program, one line away from the
right one. So mistakes cannot drift from the solution, and two can be made at once. A copy that was
handed out has neither (see handout.py): what they would give lies in answers.pt there.
"""
import ast
import contextlib
import functools
import inspect
import itertools
import math
import signal
import sys
import textwrap
import traceback
from pathlib import Path
from typing import Callable, NamedTuple

import torch

ANSWERS = Path(__file__).with_name("answers.pt")        # only in a copy that was handed out
SECONDS = 20                                    # for one exercise; the solutions take less than one
OURS = {"model", "slot", "generate", "load_weights", "tokenizer", "speed", "study", "exercises"}


class Mistake(NamedTuple):
    name: str                           # what was done, in a few words
    thought: str                        # what one must have been thinking, and why it is wrong
    edits: dict                  # of the solution's text: {old: new}; every `old` stands there once


def call(function, *arguments):
    return function(*arguments)


class Exercise(NamedTuple):
    title: str
    minutes: int
    level: str                          # easy, medium, hard
    solution: Callable              # a function or class; its docstring is the exercise
    cases: Callable                     # () -> {name: arguments}, the same ones at every call
    reward: Callable                    # (function) -> a picture in letters
    trial: Callable     # (function) -> what the program gives, its own and the student's; how run
    hints: list
    answer: str = ""                    # to the question at the end of the text
    mistakes: list = []
    loops: Callable | None = None       # the same in plain Python numbers, shown to the student
    observe: Callable = call            # (function, *arguments) -> what is compared
    parts: tuple = ()                   # names of the parts of a result, when it is a tuple
    returns: str = ""                   # what is to be returned then, in words
    forbidden: tuple = ()               # names that the student's function may not use
    tolerance: float = 1e-5  # relative and absolute; in 16 bits 4 eps, as for numbers of 1


class Verdict(NamedTuple):
    status: str                    # passed, not begun, mistake, wrong, error, too slow, not allowed
    text: str = ""
    name: str = ""          # of the mistake or mistakes


# ---- the oracle: what right and wrong functions give

def run(exercise, function):
    """-> {case: result}, or an exception's text; and the first exception, or None."""
    results, first, untouched = {}, None, exercise.cases()
    called = exercise.solution if exercise.observe is call else exercise.observe
    names = list(inspect.signature(called).parameters)[-len(next(iter(untouched.values()))):]
    for name, arguments in exercise.cases().items():
        torch.default_generator.manual_seed(0)      # torch.manual_seed seeds GPUs, too: 1 ms
        try:
            results[name] = exercise.observe(function, *arguments)
        except NotImplementedError:
            raise
        except (Exception, SystemExit) as error:
            results[name] = f"{type(error).__name__}: {error}"
            first = first or error
            continue
        for argument, now, before in zip(names, arguments, untouched[name]):
            kept = isinstance(before, (torch.Tensor, list, dict))
            if kept and difference(now, before, 0):
                results[name] = changed(argument, getattr(before, "dtype", None))
                first = first or ValueError(results[name])
    return results, first


def changed(argument, dtype):
    """That an argument is not what it was, and how that comes about unnoticed."""
    how = ""
    if dtype == torch.float32:
        how = f" ({argument}.float() of a float32 tensor is {argument} itself)"
    return f"{argument} is changed in place{how}; work on a copy"


def variant(exercise, edits):
    """The solution with its text edited -> a function, or None if the edits do not go together."""
    node, lines = source_of(exercise.solution)
    body_begins = node.body[0].end_lineno
    head, body = "".join(lines[:body_begins]), "".join(lines[body_begins:])
    for old, new in edits.items():
        if body.count(old) != 1:
            return None
        body = body.replace(old, new)
    names = dict(vars(sys.modules[exercise.solution.__module__]))
    try:
        exec(compile(head + body, "<mistake>", "exec"), names)
    except SyntaxError:
        return None
    return names[exercise.solution.__name__]


@functools.cache
def source_of(function):
    """-> the syntax tree of a function or class, and its lines."""
    text = textwrap.dedent(inspect.getsource(function))
    return ast.parse(text).body[0], text.splitlines(keepends=True)


@functools.cache
def answers():
    """answers.pt: {number: {"right": results, "wrong": [(name, thought, results)]}}."""
    return torch.load(ANSWERS, weights_only=True)


def right_results(number, exercise):
    if ANSWERS.exists():
        return answers()[number]["right"]
    return run(exercise, exercise.solution)[0]


def known_mistakes(number, exercise):
    """Yields (name, thought, results) of wrong functions: first each mistake, then two at once."""
    if ANSWERS.exists():
        yield from answers()[number]["wrong"]
        return
    for mistake in exercise.mistakes:
        function = variant(exercise, mistake.edits)
        if function is None:
            raise ValueError(f"exercise {number}: the edit of {mistake.name!r} does not fit")
        yield mistake.name, mistake.thought, run(exercise, function)[0]
    for a, b in itertools.combinations(exercise.mistakes, 2):
        function = None
        if not a.edits.keys() & b.edits.keys():
            function = variant(exercise, a.edits | b.edits)
        if function is not None:                            # their edits do not touch the same text
            name = f"two at once: {a.name}; and {b.name}"
            yield name, f"{a.thought}\n{b.thought}", run(exercise, function)[0]


# ---- comparing

def difference(got, right, tolerance):
    """What keeps two results apart, in words, or "" if nothing does."""
    if isinstance(right, torch.Tensor):
        return tensor_difference(got, right, tolerance)
    if isinstance(got, torch.Tensor) and got.ndim == 0 and not isinstance(right, str):
        got = got.item()
    if isinstance(right, float) and isinstance(got, (int, float)):
        both_nan = got != got and right != right
        if both_nan or math.isclose(got, right, rel_tol=tolerance, abs_tol=tolerance):
            return ""
        return f"is {got:.6g}, should be {right:.6g}"
    if type(got) is not type(right):
        return f"is {kind(got)}, should be {kind(right)}"
    if isinstance(right, (list, tuple)):
        if len(got) != len(right):
            return f"has {len(got)} entries, should have {len(right)}"
        found = ((i, difference(a, b, tolerance)) for i, (a, b) in enumerate(zip(got, right)))
        words = next((f"at [{i}] {words}" for i, words in found if words), "")
        return words.replace("] at [", "][")                    # at [2][0], not at [2] at [0]
    if isinstance(right, dict):
        if got.keys() != right.keys():
            return f"has the names {sorted(got, key=str)}, should have {sorted(right, key=str)}"
        found = ((name, difference(got[name], right[name], tolerance)) for name in right)
        return next((f"{name}: {words}" for name, words in found if words), "")
    return "" if got == right else f"is {got!r}, should be {right!r}"


def kind(value):
    if value is None:
        return "None (is a `return` missing?)"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"{value!r}" if isinstance(value, str) else f"of type {type(value).__name__}"


def tensor_difference(got, right, tolerance):
    if not isinstance(got, torch.Tensor):
        return f"is {kind(got)}, should be {kind(right)}"
    if got.shape != right.shape:
        return f"has shape {tuple(got.shape)}, should have {tuple(right.shape)}"
    if got.dtype != right.dtype:
        return f"has dtype {got.dtype}, should have {right.dtype}"
    if right.dtype in (torch.float16, torch.bfloat16):
        tolerance = max(tolerance, 4 * torch.finfo(right.dtype).eps)
    got, right = got.detach().double(), right.detach().double()
    close = torch.isclose(got, right, rtol=tolerance, atol=tolerance, equal_nan=True)
    if close.all():
        return ""
    if close.numel() <= 8:
        return f"is {rounded(got)}, should be {rounded(right)}"
    apart = (got - right).abs().nan_to_num(nan=math.inf).masked_fill(close, 0)
    place = tuple(int(i) for i in torch.unravel_index(apart.argmax(), apart.shape))
    return (f"differs most at {list(place)}: {got[place]:.6g}, should be {right[place]:.6g}; "
            f"{int(close.sum())} of {close.numel()} numbers are right")


def rounded(tensor):
    """Its numbers with four digits, in rows as they stand; dimensions of size 1 are left out."""
    tensor = tensor.squeeze()
    if tensor.ndim == 0:
        return float(f"{tensor.item():.4g}")
    return [rounded(row) for row in tensor]


def same(results, others, tolerance):
    return not difference(results, others, tolerance)


# ---- the verdict

def check(number, exercise, function, file=None):
    """Run a student's function, from `file`, on all cases -> Verdict."""
    if function is None:
        return Verdict("error", f"{exercise.solution.__name__} is not there; did you rename it?")
    try:
        with time_limit(SECONDS), contextlib.redirect_stdout(sys.stderr):
            results, error = run(exercise, function)
    except NotImplementedError:
        return Verdict("not begun")
    except TooLong as late:
        return Verdict("too slow", f"not done after {SECONDS} seconds; is a loop without end?\n"
                                   f"{where(late, file).splitlines()[0]}")
    right = right_results(number, exercise)
    if same(results, right, exercise.tolerance):
        used = not_allowed(exercise, file)
        return Verdict("not allowed", used) if used else Verdict("passed")
    shown, known = [where(error, file)] if error else [], []
    for name, thought, theirs in known_mistakes(number, exercise):
        known.append((name, thought, theirs))
        if same(results, theirs, exercise.tolerance):
            return Verdict("mistake", "\n".join([name, thought, *shown]), name)

    named, nameless = mistakes_by_part(exercise, results, right, known)
    names = "; ".join(name for _, name, _ in named)
    lines = [f"{' and '.join(parts)}: {name}\n{thought}" for parts, name, thought in named]
    if named and not nameless and not error:
        return Verdict("mistake", "\n".join(lines), names)
    done = {part for parts, _, _ in named for part in parts}
    text = "\n".join([*lines, *shown, described(exercise, results, right, done)])
    return Verdict("error" if error else "wrong", text, names)


def mistakes_by_part(exercise, results, right, known):
    """Many mistakes at once, each in parts of its own -> [(parts, name, thought)] for wrong parts
    that equal those of a mistake's results, and the names of the others.

    One cause for several parts goes before one for each, one mistake before two at once.
    """
    def equal(those, place):
        """Whether a part is, in all cases, that of other results."""
        if not all(has_parts(exercise, those[case]) for case in cases):
            return False
        got, theirs = [[each[case][place] for case in cases] for each in (results, those)]
        return same(got, theirs, exercise.tolerance)

    cases = [case for case in right if has_parts(exercise, results[case])]
    places = range(len(exercise.parts)) if cases else ()
    wrong = [place for place in places if not equal(right, place)]
    causes = []
    for name, thought, theirs in known:
        explained = [place for place in wrong if equal(theirs, place)]
        if explained:
            causes.append((name, thought, explained))
    causes.sort(key=lambda cause: (cause[0].startswith("two at once"), -len(cause[2])))

    named = []
    for name, thought, explained in causes:
        parts = [exercise.parts[place] for place in explained if place in wrong]
        if parts:
            named.append((parts, name, thought))
            wrong = [place for place in wrong if place not in explained]
    return named, [exercise.parts[place] for place in wrong]


def has_parts(exercise, result):
    return isinstance(result, tuple) and len(result) == len(exercise.parts)


def described(exercise, results, right, named=()):
    """Where results are right, and how they are wrong elsewhere. Named parts are left out."""
    good, stopped, bad = [], [], []
    for case, should in right.items():
        if not difference(results[case], should, exercise.tolerance):
            good.append(case)
        elif isinstance(results[case], str) and not isinstance(should, str):
            stopped.append(case)
        else:
            bad.append(case)
    lines = [f"right in: {'; '.join(good) or 'no case'}"]
    if stopped:
        lines.append(f"stopped in: {'; '.join(stopped)}")
    for case in bad[:2]:
        parts = [("the result", results[case], right[case])]
        if has_parts(exercise, results[case]):
            parts = zip(exercise.parts, results[case], right[case])
        for part, got, should in parts:
            words = difference(got, should, exercise.tolerance)
            if exercise.parts and part == "the result":
                words = f"is {kind(got)}, should be {exercise.returns}"
            if words and part not in named:
                lines.append(f"wrong in: {case}: {sentence(part, words)}")
    if bad[2:]:
        lines.append(f"wrong in: {'; '.join(bad[2:])}")
    return "\n".join(lines)


def sentence(part, words):
    """"δ" and "is 1" -> "δ is 1"; "the losses" and "is 1" -> "the losses are 1"."""
    verb, rest = words.split(" ", 1)
    if part.endswith("losses"):
        verb = {"is": "are", "has": "have", "differs": "differ"}.get(verb, verb)
    return f"{part} {verb} {rest}"


def where(error, file):
    """An exception in two lines: the student's own line, and what Python says of it."""
    if error.__traceback__ is None:
        return str(error)
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if file and Path(frame.filename) == Path(file)]
    if not frames:
        return f"{message}\n(not raised in a line of yours: does the signature fit the calls?)"
    return f"line {frames[-1].lineno}: {frames[-1].line}\n{message}"


def not_allowed(exercise, file):
    """What a student's function, or what it calls in the file, uses though it is to do without, in
    words, or ""."""
    module = ast.parse(Path(file).read_text(encoding="utf-8")) if file else ast.Module([], [])
    own, brought = set(), {}    # names that the file makes; that imports bring: {name: its origin}
    for node in ast.walk(module):
        if isinstance(node, (ast.FunctionDef, ast.arg)):
            own.add(getattr(node, "name", None) or getattr(node, "arg", None))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            above = f"{node.module}." if getattr(node, "module", None) else ""
            brought |= {alias.asname or alias.name: (above + alias.name).split(".")
                        for alias in node.names}

    functions = {node.name: node for node in module.body if hasattr(node, "name")}
    asked, named, ahead = set(), set(), {exercise.solution.__name__} & functions.keys()
    while ahead:
        parts = list(ast.walk(functions.pop(ahead.pop())))
        asked |= {getattr(part, "attr", None) for part in parts}                    # torch.cat
        names = {getattr(part, "id", None) for part in parts}                       # cat
        local = {part.id for part in parts if isinstance(getattr(part, "ctx", None), ast.Store)
                 and isinstance(part, ast.Name)}
        named |= names
        ahead = (ahead | names - local) & functions.keys()
    asked.update(*(brought[name] for name in named & brought.keys()))
    used = (asked | named - (own - brought.keys())) & set(exercise.forbidden)
    if used:
        names = ", ".join(sorted(used))
        return f"the results are right, but the exercise is to do without {names}"
    imported = {origin[0] for origin in brought.values()}
    if imported & OURS:
        names = ", ".join(sorted(imported & OURS))
        return f"the results are right, but {Path(file).name} imports {names}"
    return ""


class TooLong(BaseException):
    """Not an Exception, so that a student's `except Exception` does not swallow it."""


@contextlib.contextmanager
def time_limit(seconds):
    """Raises TooLong in whatever runs after so many seconds. Windows has no such alarm clock."""
    def ring(number, frame):
        raise TooLong

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
