"""Can the suite fail? One mistake at a time is written into a copy of the sources, and the tests must
turn red.

    OMP_NUM_THREADS=1 python tests/mutations.py             # all, 25 minutes; prints mutations.md
    OMP_NUM_THREADS=1 python tests/mutations.py rope eps    # whose description or file holds a word
    python tests/mutations.py --planted rope                # without a look whether all is green before

The mistakes stand in mutations_*.py by room: a text to find in one file, which must be there exactly
once, and a text to put in its place. Whoever rewrites such a line gets an error here and brings the
mistake up to date. A mutant that only crashes on import proves nothing, so tests must run and fail
(pytest's exit status 1), and the first failing one is reported with its message. INVISIBLE ones change
no number that a test could see, and the table says so.
"""
import os
import re
import shutil
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest
import torch  # noqa: F401  imported once here, so that the forked children need not

import mutations_checks
import mutations_convert
import mutations_lesson
import mutations_parallel
import mutations_study
import mutations_tokenizer

ROOT = Path(__file__).resolve().parent.parent
Mutation = namedtuple("Mutation", "description file old new tests")
ROOMS = (mutations_lesson, mutations_parallel, mutations_tokenizer, mutations_checks, mutations_study,
         mutations_convert)
MUTATIONS = []
for room in ROOMS:
    for (file, tests), rows in room.TABLE.items():
        MUTATIONS += [Mutation(description, file, old, new, tests) for description, old, new in rows]
INVISIBLE = mutations_lesson.INVISIBLE


def copy_sources(to):
    """The project in `to`: its Python files as copies, everything else as links."""
    for path in ROOT.iterdir():
        if path.name.startswith((".", "__")):
            continue
        if path.is_dir():
            copy_folder(path, to / path.name)
        else:
            shutil.copy(path, to)
    if (ROOT.parent / "shared").exists():
        (to.parent / "shared").symlink_to(ROOT.parent / "shared")


def copy_folder(folder, to):
    to.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, to)
        elif path.name != "__pycache__":
            (to / path.name).symlink_to(path)


def run_tests(root, tests):
    """-> exit status of pytest, the first failing test, its message. In a forked child, so that nothing stays
    imported."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(root)
        os.dup2(write, 1), os.dup2(write, 2)
        status = 3
        try:
            ours = str(ROOT), str(ROOT / "tests")           # but not what a .venv in ROOT holds
            sys.path[:] = [str(root)] + [each for each in sys.path if each not in ours]
            sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
            words = re.split(r" -([km]) ", tests)       # what follows -k or -m is one argument
            options = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-rf"]
            for option, value in zip(words[1::2], words[2::2]):
                options += ["-" + option, value]
            status = int(pytest.main(options + words[0].split()))
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(write)
    with os.fdopen(read, errors="replace") as pipe:
        output = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    failed = re.search(r"^(?:FAILED|ERROR) \S*?::(.+?)(?: - .*)?$", output, re.M)
    message = re.search(r"^(?:E  +|\S+?:\d+: )(.*)", output, re.M)
    return status, failed[1] if failed else "", message[1] if message else output.strip()[-200:]


def plant(mutation):
    """-> what is wrong with the mutation itself, or "", then status, test and message of the tests with
    it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "main"
        root.mkdir()
        copy_sources(root)
        source = (root / mutation.file).read_text()
        count = source.count(mutation.old)
        if count != 1:
            return f"its text occurs {count} times in {mutation.file}, not once", None, "", ""
        (root / mutation.file).write_text(source.replace(mutation.old, mutation.new))
        status, test, message = run_tests(root, mutation.tests)
        message = re.sub(r"/tmp/pytest-of-\w+/pytest-\d+/", "", message)
        message = message.replace(f"{root}/", "").replace(sys.executable, "python")
        message = message.replace(f"{sys.prefix}/", "")
    if status not in (0, 1):
        return f"pytest ended with status {status}: {message}", status, test, message
    if (status == 1) == (mutation.description in INVISIBLE):
        color = "red" if status else "green"
        return f"the tests are {color} {test} {message}", status, test, message
    return "", status, test, message


def main(words):
    torch.set_num_threads(1)
    words, planted = [word for word in words if word != "--planted"], "--planted" in words
    chosen = [m for m in MUTATIONS if not words or any(word in m.description + m.file for word in words)]
    for tests in [] if planted else sorted({m.tests for m in chosen}):
        status, test, message = run_tests(ROOT, tests)
        if status:
            sys.exit(f"without any mutation {tests} is red already: {test} {message}")
    wrong = []
    print("# Planted mistakes\n\nWhat `python tests/mutations.py` prints; see README.md.\n")
    print("| mistake | file | first test to turn red | what it says |\n|---|---|---|---|", flush=True)
    for mutation in chosen:
        problem, status, test, message = plant(mutation)
        if problem:
            wrong.append(f"{mutation.description}: {problem}")
        message = re.sub(r"^(E +)?AssertionError: ", "", message).split(" assert ")[0]
        message = re.sub(r"[\x00-\x1f\x7f]+", " ", message)           # a row is one line
        message = message.replace("|", "/").replace("`", "'")[:100]
        shown = f"`{test}` | {message}" if status else "none: invisible | "
        print(f"| {mutation.description} | {mutation.file} | {shown} |", flush=True)
    red = sum(m.description not in INVISIBLE for m in chosen)
    print(f"\n{len(chosen)} mutations, {red} must turn red; {len(wrong)} went otherwise", *wrong, sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
