"""The README is true: its commands run as a newcomer runs them, its outputs and its code are those of the project."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import forks

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
LINES = [line.split("  #")[0].strip() for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
# A newcomer has the time or the network for these; a test has not. Each is covered elsewhere.
ELSEWHERE = ("pytest", "smollm2")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project without its tests, so that a command leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("readme") / "repo"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "tests", "runs", "__pycache__"))
    return copy


def run(copy, command):
    done = subprocess.run(["bash", "-c", command], cwd=copy, capture_output=True, text=True, timeout=120,
                          stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONUTF8": "1"})
    assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stderr[-2000:]}"
    return done


def test_readme_has_the_two_commands():
    """Set-up and main job in one line; set-up and tests in one line, which .ci/run greps for."""
    setup = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    assert setup + "python generate.py --slot-steps 3" in LINES
    assert setup + "python -m pytest -q" in LINES
    assert sum(line.startswith("python3 -m venv") and "python -m pytest" in line for line in README.splitlines()) == 1


@pytest.mark.parametrize("line", sorted({line.split("&& ")[-1] for line in LINES if not any(w in line for w in ELSEWHERE)}))
def test_command(copy, line):
    done = run(copy, re.sub(r"\bpython3? ", f"{shlex.quote(sys.executable)} ", line))
    assert done.stdout.strip(), f"{line} prints nothing"


def test_transcript(copy):
    """The text of the answers to the letter; of the figures what does not depend on the machine."""
    transcript = next(block for kind, block in BLOCKS if "generate.py --compare" in block and kind == "text")
    done = forks.run(["generate.py", "--compare"], copy)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert line in transcript, f"the README lacks: {line}"
    losses = re.search(r"loss on the prompt.*", done.stderr)[0]
    assert losses in transcript and re.search(r"they part.*", done.stderr)[0] in transcript


def test_snippet_answers_rightly(copy):
    code = next(block for kind, block in BLOCKS if kind == "python" and "load_model" in block)
    (copy / "snippet.py").write_text(code, encoding="utf-8")
    done = forks.run(["snippet.py"], copy)
    answer = done.stdout
    assert done.returncode == 0 and answer.rstrip().endswith("#### 64") and "<|" not in answer, answer


def test_the_quoted_loop_is_the_loop():
    code = next(block for kind, block in BLOCKS if kind == "python" and "nll.backward" in block)
    assert code in (ROOT / "slot.py").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
