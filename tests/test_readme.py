"""The README's commands, run as a newcomer runs them: every line of a ```bash block, in a copy of the repository."""
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [line.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
LINES = [line.split("  #")[0].strip() for line in LINES if line and not line.startswith("#")]
# A newcomer has the time or the files for these; a test has not. Each is covered elsewhere, or cannot be run offline.
ELSEWHERE = ("pytest", "evaluate.py", "benchmark.py", "train.py", "make_golden", "mutations.py", "fuzz.py", "Qwen/", "random_model.py", "--compile")


def test_readme_has_the_two_commands():
    """Set-up and main job in one line; set-up and tests in one line, which .ci/run greps for."""
    setup = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    assert setup + "python generate.py --slot-steps 3" in LINES
    assert setup + "python -m pytest -q" in LINES
    assert sum(line.startswith("python3 -m venv") and "python -m pytest" in line for line in README.splitlines()) == 1


def test_every_command_names_a_file_that_is_there():
    for line in LINES:
        for word in shlex.split(line):
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), f"{line!r}: no {word}"


@pytest.mark.parametrize("line", sorted({line.split("&& ")[-1] for line in LINES if not any(w in line for w in ELSEWHERE)}))
def test_readme_command(line, tmp_path):
    """Exit status 0 and something on stdout. The copy keeps a command from leaving files in the checkout."""
    copy = tmp_path / "repo"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "tests", "runs", "__pycache__"))
    command = re.sub(r"\bpython3? ", f"{shlex.quote(sys.executable)} ", line)
    done = subprocess.run(["bash", "-c", command], cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip(), f"{line}: status {done.returncode}\n{done.stderr[-2000:]}"


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_tour_counts_the_lines():
    rows = re.findall(r"^\| \[([\w/]+\.py)\]\(\1\) \| (\d+) \|", README, re.MULTILINE)
    assert {path: int(count) for path, count in rows} == {path: len((ROOT / path).read_text().splitlines()) for path, _ in rows}
    assert {path.name for path in ROOT.glob("*.py")} <= {path for path, _ in rows}
