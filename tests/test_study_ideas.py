"""
The six ideas of study/README.md: each is applied to a copy of slot.py as it stands there and measured by the command that stands
there. The figures must change, but for watching words, which must leave them as they are. (Law 1 itself: test_laws.py.)
"""
import re

import pytest
from study_model import ROOT, study

README = (ROOT / "study/README.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^### ", README.split("## How to try an idea of your own")[1], flags=re.M)[1:]
IDEAS = {section.splitlines()[0]: re.findall(r"^```diff\n(.*?)^```", section, re.M | re.S) for section in SECTIONS}
WATCHING = "Watching chosen words"


def applied(source, patch):
    """A block of lines that begin with " ", "-" or "+", found in the source exactly once -> the source with the change."""
    lines = patch.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] != "+")
    new = "".join(line[1:] for line in lines if line[0] != "-")
    assert source.count(old) == 1, f"these lines are not in slot.py as study/README.md has them; bring it up to date:\n{old}"
    return source.replace(old, new)


def measured(tmp_path, source):
    """The losses, digit for digit, and the lines that --quick prints, with `source` as --slot-file."""
    (tmp_path / "my_slot.py").write_text(source, encoding="utf-8")
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    ended = study("--quick", "--limit", "1", "--max-new-tokens", "10", "--out", out, "--slot-file", tmp_path / "my_slot.py")
    assert ended.returncode == 0, ended.stderr
    losses = re.findall(r'"(?:prompt|answer)_loss": ([^,}]+)', (out / "results.jsonl").read_text())
    table = [line for line in ended.stdout.splitlines() if line.startswith(("common", "rare", "unseen"))]
    assert len(losses) == 2 * 9 and len(table) == 9
    return losses, table


@pytest.fixture(scope="module")
def as_it_is(tmp_path_factory):
    return measured(tmp_path_factory.mktemp("as-it-is"), (ROOT / "slot.py").read_text(encoding="utf-8"))


def test_there_are_six():
    assert len(IDEAS) == 6 and all(IDEAS.values()) and WATCHING in IDEAS


@pytest.mark.parametrize("title", IDEAS)
def test_an_idea_changes_one_place_and_the_figures(title, tmp_path, as_it_is):
    source = (ROOT / "slot.py").read_text(encoding="utf-8")
    for patch in IDEAS[title]:
        source = applied(source, patch)
    losses, table = measured(tmp_path, source)
    plain = [line for line in table if "plain" in line]
    assert plain == [line for line in as_it_is[1] if "plain" in line]
    if title == WATCHING:
        assert (losses, table) == as_it_is
    else:
        assert losses != as_it_is[0] and len(set(losses) - set(as_it_is[0])) > 6        # of 12 with SLOT


def test_an_edit_of_decode_is_in_the_losses_and_so_is_what_is_drawn(tmp_path):
    """A weaker δ in the answer, said in `decode` or in `steer`: the same losses of the answer. The fit draws where it starts:
    the same numbers by the same seed."""
    source, answers = (ROOT / "slot.py").read_text(encoding="utf-8"), []
    for old, new in (("W_delta = lm.lm_head(", "W_delta = 0.25 * lm.lm_head("), ("return logits + W_delta", "return logits + 0.25 * W_delta")):
        assert source.count(old) == source.count("delta = torch.zeros(") == 1
        losses, _ = measured(tmp_path, source.replace(old, new).replace("delta = torch.zeros(", "delta = torch.randn("))
        answers.append([float(loss) for loss in losses[1::2]])
    assert answers[0] == pytest.approx(answers[1], abs=1e-5) and len(set(answers[0])) == 9


@pytest.mark.parametrize("title", IDEAS)
def test_the_table_counts_the_changed_lines(title):
    written = sum(patch.count("\n+") + patch.startswith("+") for patch in IDEAS[title])
    line = next(line for line in README.splitlines() if line.lower().startswith(f"| {title.lower()} |"))
    assert int(line.split("|")[2]) == written
