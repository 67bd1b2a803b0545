"""The command of the course.

    python -m exercises                 what there is, and what is done
    python -m exercises start           writes exercises/work.py, once
    python -m exercises check 8         one exercise: passed, not begun, or which mistake it is
    python -m exercises check           all;  --json for a program that grades
    python -m exercises hint 8          a hint; `hint 8 2` and `hint 8 3` say more
    python -m exercises try 8           your function in the real program
    python -m exercises export DIR      a copy of the project without solutions, to hand out

All but export with --work FILE, before or behind, if your functions are to stand elsewhere.
"""
import argparse
import importlib.util
import json
import shlex
import sys
import textwrap
from functools import partial
from pathlib import Path

if not __package__:                     # python exercises, without -m
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from checks.command import Parser, early_signals, number, run


def parse_arguments(arguments=None):
    work = argparse.ArgumentParser(add_help=False)          # before a command or behind it
    work.add_argument("--work", metavar="FILE", default=argparse.SUPPRESS,
                      help="the file with your functions (default: exercises/work.py)")
    parser = Parser(prog="python -m exercises", description="The course, from RMSNorm to SLOT.",
                    parents=[work])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add, exercise = partial(commands.add_parser, parents=[work]), number(int, 1, 16)
    add("start", help="write the file of stubs, once")
    check = add("check", help="run one exercise, or all")
    check.add_argument("number", nargs="?", type=exercise)
    check.add_argument("--json", action="store_true", help="a list of results, for grading")
    hint = add("hint", help="a hint to an exercise")
    hint.add_argument("number", type=exercise)
    hint.add_argument("which", nargs="?", type=number(int, 1, 3), default=1)
    trial = add("try", help="put a function of yours into the real program")
    trial.add_argument("number", type=exercise)
    export = commands.add_parser("export", help="a copy of the project without solutions")
    export.add_argument("folder")
    args = parser.parse_args(arguments)
    args.work = getattr(args, "work", None)
    return args


if __name__ == "__main__":
    early_signals()
    ARGS = parse_arguments()

import torch

from exercises.lessons import EXERCISES, LESSONS
from exercises.check import SECONDS, TooLong, check, time_limit, where
from exercises.handout import WORK, export, start
from exercises.program import parting


def command(path):
    """What to type, if the student's functions stand in this file."""
    return "python -m exercises" + ("" if path == WORK else f" --work {shlex.quote(str(path))}")


def read_work(path):
    """The student's file as a module. ValueError if it is not there or cannot be run."""
    path = Path(path or WORK)
    if not path.is_file():
        raise ValueError(f"{path} is not there; begin with: {command(path)} start")
    spec = importlib.util.spec_from_file_location("work", path)
    work = importlib.util.module_from_spec(spec)
    try:
        with time_limit(SECONDS):
            spec.loader.exec_module(work)
    except TooLong as late:
        raise ValueError(too_long(path.name, late, path)) from None
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise ValueError(f"{path.name}, line {error.lineno}: {error.msg}: {line}") from None
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path.name} cannot be run: {where(error, path)}") from None
    return work


def too_long(what, late, path):
    return f"{what} is not done after {SECONDS} seconds: {where(late, path).splitlines()[0]}"


def verdict_of(work, number):
    exercise = EXERCISES[number]
    function = getattr(work, exercise.solution.__name__, None)
    return check(number, exercise, function, work.__file__), function


def indented(text):
    """Text four places to the right, its long lines broken."""
    lines = []
    for line in text.splitlines():
        indent = line[:len(line) - len(line.lstrip())]
        lines += textwrap.wrap(line, 96, subsequent_indent=indent) or [""]
    return textwrap.indent("\n".join(lines), "    ")


def show_verdict(number, verdict):
    print(f"{number:2}  {EXERCISES[number].title}: {verdict.status}", flush=True)
    if verdict.text:
        print(indented(verdict.text), flush=True)


def reward(work, number, function):
    """A picture in letters of what a function that has passed does on the embedded model."""
    try:
        with time_limit(SECONDS):
            return EXERCISES[number].reward(function)
    except (Exception, TooLong) as error:
        return f"(no picture: on the embedded model it stops at {where(error, work.__file__)})"


def overview(path):
    """All exercises, lesson by lesson, with what is done."""
    path = Path(path or WORK)
    work, number, done, left = read_work(path) if path.is_file() else None, 0, 0, 0
    for lesson, exercises in LESSONS.items():
        print(f"Lesson {lesson}")
        for exercise in exercises:
            number += 1
            status = verdict_of(work, number)[0].status if work else "not begun"
            done += status == "passed"
            left += exercise.minutes if status != "passed" else 0
            time = f"{exercise.level:<8}{exercise.minutes:3} min"
            print(f"{number:4}  {exercise.title:<52}{time}   {status}")
    print(f"{done} of {number} done; about {left / 60:.1f} hours left"
          + ("" if work else f". Begin with: {command(path)} start"))


def result(number, verdict):
    return dict(exercise=number, title=EXERCISES[number].title, **verdict._asdict())


def as_json(results):
    return json.dumps(results, indent=1, ensure_ascii=False)


def check_all(work, json_wanted):
    results = []
    for number in EXERCISES:
        verdict, _ = verdict_of(work, number)
        results.append(result(number, verdict))
        if not json_wanted:
            show_verdict(number, verdict)
    if json_wanted:
        print(as_json(results))
    return all(each["status"] == "passed" for each in results)


def try_out(work, number):
    """A student's function in the real program, beside the project's own."""
    exercise = EXERCISES[number]
    function = getattr(work, exercise.solution.__name__, None)
    if function is None:
        raise ValueError(f"{Path(work.__file__).name} has no {exercise.solution.__name__}")
    try:
        with time_limit(SECONDS):
            own, yours, runs = exercise.trial(function)
    except TooLong as late:
        raise ValueError(too_long("the program with your function", late, work.__file__)) from None
    except NotImplementedError:
        raise ValueError(f"exercise {number} is not begun") from None
    except (Exception, SystemExit) as error:
        raise ValueError(f"with your function in it the program stopped; run check {number} "
                         f"first: {where(error, work.__file__)}") from None
    same, lines = parting(own, yours)
    print(f"{number:2}  {exercise.title}: your {exercise.solution.__name__} in the program gives "
          + ("the same" if same else "something else"))
    print(indented("\n".join([f"both runs: {runs}", *lines])))
    return same


def main(args):
    torch.set_num_threads(1)
    good = True
    if args.command is None:
        overview(args.work)
    elif args.command == "start":
        path = Path(args.work or WORK)
        start(path)
        here = Path.cwd()
        print(f"written: {path.relative_to(here) if path.is_relative_to(here) else path}")
        print(f"Read exercise 1 there, write its body, then: {command(path)} check 1")
    elif args.command == "hint":
        print(textwrap.fill(EXERCISES[args.number].hints[args.which - 1], 100))
        if args.which < 3:
            print(f"(more: python -m exercises hint {args.number} {args.which + 1})")
    elif args.command == "export":
        print(f"written: {export(args.folder)}")
    elif args.command == "try":
        good = try_out(read_work(args.work), args.number)
    elif args.number is None:
        good = check_all(read_work(args.work), args.json)
    else:
        work = read_work(args.work)
        verdict, function = verdict_of(work, args.number)
        good = verdict.status == "passed"
        if args.json:
            print(as_json([result(args.number, verdict)]))
        else:
            show_verdict(args.number, verdict)
            if good:
                print(indented(reward(work, args.number, function)))
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main, ARGS)
