"""What a student gets: stubs, made from the solutions by a program, so that none can drift.

    solution ──► docstring, signature ──► stub           bodies become `raise NotImplementedError`
    lesson file ──► the same, without mistakes and answers ──► the lesson file of a copy to hand out
    what right and wrong functions give ──► answers.pt         in their place: results, no code
"""
import ast
import inspect
import os
import shutil
import sys
from pathlib import Path

import torch

from exercises.lessons import EXERCISES, LESSONS
from exercises.check import ANSWERS, known_mistakes, right_results, source_of

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "exercises" / "work.py"
LEFT_OUT = {".git", ".venv", "venv", "runs", "__pycache__", ".pytest_cache", "work.py",
            "test_exercises.py"}                # which has solutions in other words

HEADER = '''"""Your work. Each exercise is a function without a body: read its text, write the body.

    python -m exercises check 1     runs exercise 1 and says what is wrong with it
    python -m exercises hint 1      a hint, if you want one; there are three
    python -m exercises try 1       puts your function into the real program
    python -m exercises             what is done

A function NAME_loops above an exercise is its meaning in plain numbers: call it, compare with it.
Letters: B batch, T new tokens, S all tokens so far, d width, H query heads, K key/value heads,
D size of a head, V vocabulary, n predicted tokens. Lessons and reading: exercises/README.md.
"""
import json
import math
import re
import struct

import torch
import torch.nn.functional as F
'''


def start(path):
    """Write the file of stubs, unless it is there."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(work_text())
    except FileExistsError:
        raise ValueError(f"{path} is there already, with your work; "
                         "move it away to begin anew") from None


def work_text():
    """The file of stubs that students begin with."""
    parts, number = [HEADER], 0
    for lesson, exercises in LESSONS.items():
        parts.append(f"\n\n# ==== Lesson {lesson}\n")
        for exercise in exercises:
            number += 1
            time = f"{exercise.level}, {exercise.minutes} minutes"
            parts.append(f"\n\n# ---- {number}. {exercise.title} ({time})\n")
            if exercise.loops:
                parts.append("\n" + inspect.getsource(exercise.loops) + "\n")
            parts.append("\n" + stub(number, exercise))
    return "".join(parts)


def stub(number, exercise):
    """The solution without its bodies: signatures and docstrings are left."""
    _, lines = source_of(exercise.solution)
    return without_bodies("".join(lines), {exercise.solution.__name__: number})


def without_bodies(text, numbers):
    """The bodies of functions, or of the methods of classes, are replaced; each has a docstring.
    numbers {name: number of the exercise} says which."""
    lines = text.splitlines(keepends=True)
    found = [node for node in ast.parse(text).body if getattr(node, "name", None) in numbers]
    for node in reversed(found):
        functions = [node] if isinstance(node, ast.FunctionDef) else node.body[1:]
        for function in reversed(functions):
            begin, end = function.body[0].end_lineno, function.end_lineno
            indent = " " * function.body[0].col_offset
            message = f'raise NotImplementedError("exercise {numbers[node.name]}")'
            lines[begin:end] = [f"{indent}{message}\n"]
    return "".join(lines)


def without_solutions(text, numbers):
    """The text of a lesson file without solutions, mistakes and answers."""
    stripped = text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Exercise":
            for keyword in node.keywords:
                if keyword.arg in ("mistakes", "answer"):
                    nothing = "[]" if keyword.arg == "mistakes" else '""'
                    value = ast.get_source_segment(text, keyword.value)
                    stripped = stripped.replace(value, nothing)
    return without_bodies(stripped, numbers)


def export(folder):
    """Write a copy of the project to hand out. ValueError if the folder is in the way."""
    folder = Path(folder).resolve()
    if ANSWERS.exists():
        raise ValueError("this is a copy that was handed out; export from the project itself")
    if ROOT == folder or ROOT in folder.parents:
        raise ValueError(f"{folder} lies inside the project; give a folder elsewhere")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; give a new folder")

    def left_out(place, names):
        return [name for name in names
                if name in LEFT_OUT or os.path.exists(os.path.join(place, name, "pyvenv.cfg"))]

    shutil.copytree(ROOT, folder, ignore=left_out, dirs_exist_ok=True)
    modules = {sys.modules[exercise.solution.__module__] for exercise in EXERCISES.values()}
    numbers = {exercise.solution.__name__: number for number, exercise in EXERCISES.items()}
    for module in modules:
        path = folder / "exercises" / Path(module.__file__).name
        text = path.read_text(encoding="utf-8")
        path.write_text(without_solutions(text, numbers), encoding="utf-8")
    readme = folder / "exercises" / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text.split("\n## For the lecturer", 1)[0] + "\n", encoding="utf-8")
    answers = {number: {"right": right_results(number, exercise),
                        "wrong": list(known_mistakes(number, exercise))}
               for number, exercise in EXERCISES.items()}
    torch.save(answers, folder / "exercises" / ANSWERS.name)
    return folder
