"""A suite that cannot fail proves nothing: planted mistakes must turn it red.

`python tests/mutations.py` plants all of them and takes minutes; its table is in README.md. Here a few
are planted, and every mutation is checked to still name a line of the code, so that the table does not
go stale.
"""
import os

import pytest

import forks
import slot
from mutations import MUTATIONS, ROOT

pytestmark = pytest.mark.mutation
A_FEW = ["rope pairs neighbours", "sign of the loss", "keys without values"]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.description)
def test_mutation_names_a_line(mutation):
    """If this fails, a line that a mutation changes was rewritten: bring its mutations_*.py up to date
    with it."""
    count = (ROOT / mutation.file).read_text().count(mutation.old)
    assert count == 1, (f"{mutation.description}: its text occurs {count} times in {mutation.file}, not "
                        f"once: {mutation.old!r}; bring its mutations_*.py up to date")
    assert mutation.old != mutation.new
    assert all((ROOT / word).exists() for word in mutation.tests.split() if word.startswith("tests/"))


def test_the_batch_has_this_decode():
    """If this fails, slot.prefill, likeliest or decode was edited, and several prompts are answered one by one. Bring those of
    speed/batch.py up to date, if the meaning has changed, and TWIN."""
    batch = pytest.importorskip("speed.batch", reason="there is no speed/")
    now = batch.digest(slot.prefill, slot.likeliest, slot.decode)
    assert now == batch.TWIN, f"slot.py has other ones than speed/batch.py knows, {now}: see this test's text"


def test_the_closed_form_has_this_loop():
    """If this fails, slot.prompt_loss or optimize_delta was edited, and --slot-fast says so. Bring speed/delta.py up to date, if
    the meaning has changed, and CLOSED_FORM in speed/batch.py."""
    batch = pytest.importorskip("speed.batch", reason="there is no speed/")
    now = batch.digest(slot.prompt_loss, slot.optimize_delta)
    assert now == batch.CLOSED_FORM, f"slot.py has another loop than speed/batch.py knows, {now}: see this test's text"


def test_descriptions_are_different():
    assert len({mutation.description for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutations.py forks, which this system cannot")
def test_a_few_mistakes_turn_the_suite_red():
    done = forks.run([ROOT / "tests/mutations.py", "--planted", *A_FEW])
    said = ("hidden states differ by", "delta differs by", "3 mutations, 3 must turn red; 0 went otherwise")
    assert done.returncode == 0 and all(words in done.stdout for words in said), done.stdout + done.stderr
