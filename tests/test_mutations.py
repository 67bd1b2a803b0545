"""
A suite that cannot fail proves nothing: six planted mistakes, one for each way of being wrong, must turn it red.

`python tests/mutations.py` plants all of them and takes minutes; its table is in README.md. Here every mutation is at least
checked to still name a line of the code, so that the table does not go stale.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutations import MUTATIONS, ROOT

A_FEW = ["rope pairs neighbours", "v bias dropped", "is_causal also behind", "epsilon outside", "wide b not guarded", "missing at the last prompt"]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m[0])
def test_mutation_names_a_line(mutation):
    """If this fails, a line that a mutation changes was rewritten: bring mutations.py up to date with it."""
    description, file, old, new, tests, _ = mutation
    count = (ROOT / file).read_text().count(old)
    assert count == 1, f"{description}: its text occurs {count} times in {file}, not once: {old!r}"
    assert old != new and all((ROOT / word).exists() for word in tests.split() if word.startswith("tests/"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutations.py forks, which this system cannot")
def test_a_few_mistakes_turn_the_suite_red():
    done = subprocess.run([sys.executable, ROOT / "tests/mutations.py", *A_FEW], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and f"{len(A_FEW)} mutations, {len(A_FEW)} must turn red; 0 went otherwise" in done.stdout, done.stdout + done.stderr
