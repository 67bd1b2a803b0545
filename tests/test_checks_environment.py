"""The commands where they have little around them: python -I, -P and -W error, a working folder
that is gone, no HOME, a user whom the system does not know. No traceback; the suite collects."""
import os
import subprocess
import sys

import pytest

import forks
from hostile import ROOT, check_line

NAMES = ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME")
# A user without a name who may read what the superuser may: this process goes on as he.
UNKNOWN = """
import ctypes, os, pwd, runpy, sys
KEEP_CAPABILITIES = 1 << 2
assert ctypes.CDLL(None).prctl(28, KEEP_CAPABILITIES, 0, 0, 0) == 0
os.setresgid(54321, 54321, 54321)
os.setresuid(54321, 54321, 54321)
try:
    pwd.getpwuid(os.getuid())
    sys.exit("this user is known")
except KeyError:
    pass
sys.argv = sys.argv[1:]
sys.path[0] = os.getcwd()
if sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
GENERATE = ["generate.py", "hello", "--max-new-tokens", "2", "--slot-steps", "1"]


def run(*arguments, cwd=ROOT, drop=(), **options):
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True,
                          text=True, timeout=200, stdin=subprocess.DEVNULL, env=environment,
                          **options)


def check_done(done):
    assert done.returncode == 0 and "Traceback" not in done.stderr, done


@pytest.mark.parametrize("options, more", [
    (["-I", "-W", "error"], []), (["-P", "-W", "error"], ["--slot-fast"])])
def test_python_options(options, more):
    """The answer is that of a plain start: the loop's for one prompt, the closed form's for two."""
    if "-P" in options and sys.version_info < (3, 11):
        pytest.skip("Python 3.11 brought -P")
    command = [GENERATE[0], "hello", "there"][:3 if more else 2] + GENERATE[2:] + more
    plain, done = forks.run(command), run(*options, *command)
    check_done(done)
    assert done.stdout == plain.stdout


@pytest.mark.parametrize("module", ["study", "convert", "benchmarks"])
def test_modules_without_warnings(module):
    check_done(run("-W", "error", "-m", module, "--help"))


@pytest.mark.parametrize("arguments", [["generate.py", "hello"], ["generate.py", "--help"]],
                         ids=" ".join)
def test_working_folder_gone(arguments, tmp_path):
    """One line with the right reason: torch's products would end the process without one."""
    arguments = [str(ROOT / arguments[0]), *arguments[1:]]
    (tmp_path / "gone").mkdir()
    done = run(*arguments, cwd=tmp_path / "gone", preexec_fn=lambda: os.rmdir(os.getcwd()))
    assert done.returncode == 1, done
    check_line(done.stderr.removesuffix("\n"), "generate.py: working folder is gone")


@pytest.mark.parametrize("room", ["study", "exercises"])
def test_without_m(room, tmp_path):
    """`python study` for `python -m study`, from anywhere: a folder of that name is what runs."""
    for name, place in ((room, ROOT), (ROOT / room, tmp_path)):
        done = forks.run([name, "--help"], place)
        assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m {room}"), done.stderr


def test_without_a_home():
    check_done(forks.run(GENERATE, env=dict.fromkeys(NAMES)))
    done = forks.run(["generate.py", "--model", "no-one/nothing", "hello"], env=dict.fromkeys(NAMES))
    assert done.returncode == 1
    check_line(done.stderr.removesuffix("\n"), "generate.py: no-one/nothing fetch")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs the superuser")
def test_unknown_user():
    check_done(run("-c", UNKNOWN, *GENERATE, drop=NAMES))
    done = forks.run(["-c", UNKNOWN, "generate.py", "--model", "no-one/nothing", "hello"],
                     env=dict.fromkeys(NAMES))
    assert done.returncode == 1
    check_line(done.stderr.removesuffix("\n"), "generate.py: no-one/nothing fetch")


COLLECT = ["-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests"]


def test_suite_collects():
    """Also for a user whom the system does not know, where we may become one."""
    unknown = ["-c", UNKNOWN] if hasattr(os, "getuid") and os.getuid() == 0 else []
    done = run("-I", "-W", "error", *unknown, *COLLECT, drop=NAMES)
    assert done.returncode == 0, done.stdout[-1000:]
