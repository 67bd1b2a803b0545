"""The three laws of the house, each in a copy of the project.

    1  What you read is what runs: change a sign in slot.py, and the next command changes.
    2  Take speed/ away, and every token stays the same (float32).
    3  Take checks/ away, and every good folder still loads.

And a fourth thing that a reader may rely on: an edit that changes nothing turns no proof red.
"""
import functools
import re
import shutil
import textwrap
from pathlib import Path

import pytest

import forks
from hostile import Command, command

ROOT = Path(__file__).resolve().parent.parent
SIGN = "nll = loss(logits[0], targets)", "nll = -loss(logits[0], targets)"
IGNORED = shutil.ignore_patterns(".git", ".venv", "tests", "runs", "__pycache__", "*.png", "*.jsonl")


def copy_of(place, without=()):
    tree = place / "tree"
    shutil.copytree(ROOT, tree, ignore=IGNORED)
    for room in without:
        shutil.rmtree(tree / room)
    return tree


def edit(tree, *changes):
    source = (tree / "slot.py").read_text()
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (tree / "slot.py").write_text(source)


def python(tree, *arguments, code=None):
    """A run in the tree -> what it wrote. code: instead of a file, a program that finds GOLDEN and TESTS."""
    places = {"GOLDEN": str(ROOT / "tests/golden"), "TESTS": str(ROOT / "tests")}
    done = forks.run(["-c", textwrap.dedent(code)] if code else arguments, tree, env=places)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done


class House:
    """generate.py in a tree: run(arguments) -> Result. See hostile.py for the forks behind it."""

    def __init__(self, tree):
        self.tree = tree
        (tree / "tests").mkdir()
        shutil.copy(ROOT / "tests/hostile.py", tree / "tests")
        self.command = Command(tree / "tests/hostile.py")

    def generate(self, *arguments):
        return checked(self.command(arguments, cwd=self.tree))


def generate(*arguments):
    """The command as it is."""
    return checked(command()(arguments))


def checked(result):
    assert result.status == 0 and "Traceback" not in result.err, result
    return result


def losses(result):
    return [float(x) for x in re.search(r"loss on the prompt  (.*)", result.err)[1].split(" → ")]


# ---- 1 ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backwards(tmp_path_factory):
    """The project with the sign of the loss reversed in slot.py."""
    tree = copy_of(tmp_path_factory.mktemp("law1"))
    edit(tree, SIGN)
    house = House(tree)
    yield house
    house.command.close()


def test_a_sign_in_slot_changes_the_command(backwards):
    """Other losses at once; with enough steps other words. The closed form is another file, and stays."""
    here, there = (run("--slot-steps", 3, "--max-new-tokens", 2) for run in (generate, backwards.generate))
    assert losses(here)[0] == -losses(there)[0] and losses(here)[-1] < losses(here)[0]
    assert losses(there)[-1] < losses(there)[0], "it goes uphill on the prompt"
    arguments = "--slot-steps", 10, "--slot-lr", 0.5, "--max-new-tokens", 24
    here, there = (run(*arguments) for run in (generate, backwards.generate))
    assert here.out != there.out and losses(here) != losses(there)
    fast = backwards.generate(*arguments, "--slot-fast")
    assert fast.out == here.out and losses(fast) == pytest.approx(losses(here), abs=2e-4)
    edited = "note      slot.py's prompt_loss or optimize_delta has been edited: --slot-fast does not run it\n"
    assert edited in fast.err and edited not in here.err + generate(*arguments, "--slot-fast").err


def test_a_sign_in_slot_changes_several_prompts(backwards):
    """In a batch as well: it is the same loop."""
    arguments = "--slot-steps", 10, "--slot-lr", 0.5, "--max-new-tokens", 12, "What is 2+2?", "Why?"
    assert generate(*arguments).out != backwards.generate(*arguments).out


@functools.cache
def quick_study(tree):
    """-> the rows of the table that `python -m study --quick` prints."""
    lines = python(tree, "-m", "study", "--quick", "--limit", 2, "--max-new-tokens", 20)
    return [line for line in lines.stdout.splitlines() if line.startswith(("common", "rare", "unseen"))]


def test_a_sign_in_slot_changes_the_study(backwards):
    """The plain model's rows stay to the letter; every row of SLOT changes."""
    here, there = quick_study(ROOT), quick_study(backwards.tree)
    assert len(here) == len(there) == 9
    for ours, theirs in zip(here, there):
        assert (ours == theirs) == ("plain" in ours), f"{ours} | {theirs}"


# ---- 2 ---------------------------------------------------------------------------------------------------

# A word a line: folder, row, setting, ids. With speed/, products are swapped and prompts answered together.
ANSWERS = """
    import os
    from pathlib import Path
    import numpy as np
    from load_weights import load_model
    from slot import generate, optimize_delta
    try:
        import speed.batch, speed.linear
        from speed.delta import optimize_delta_fast
        speed.linear.SMALL = 1
    except ImportError:
        speed = None
    print("with speed/" if speed else "without")
    for folder in sorted(Path(os.environ["GOLDEN"]).iterdir()):
        if not folder.is_dir():
            continue
        lm = load_model(folder, dtype="float32")
        first, second = np.load(folder / "golden.npz")["prompt"].tolist()
        prompts = [first, second, first[:7], second[5:6]]
        if speed:
            speed.linear.use(lm)
        for steps, lr in ((0, 0.1), (5, 0.1)):
            if speed:
                answers = [[] for _ in prompts]
                batch = speed.batch.generate_batch(lm, prompts, 8, steps, lr, optimize=optimize_delta_fast)
                for ids in batch:
                    for answer, id in zip(answers, ids):
                        answer.append(id)
            else:
                answers = [list(generate(lm, tokens, 8, steps, lr)) for tokens in prompts]
            for row, ids in enumerate(answers):
                print(folder.name, row, steps, *ids)
"""


@pytest.fixture(scope="module")
def plain_house(tmp_path_factory):
    """The project without speed/."""
    house = House(copy_of(tmp_path_factory.mktemp("law2"), without=["speed"]))
    yield house
    house.command.close()


def test_without_speed_every_golden_token_is_the_same(plain_house):
    """15 folders, 4 prompts, plain and with SLOT. With speed/ all of it is used: swapped products, batches,
    closed form."""
    with_speed = python(ROOT, code=ANSWERS).stdout.splitlines()
    without = python(plain_house.tree, code=ANSWERS).stdout.splitlines()
    assert with_speed.pop(0) == "with speed/" and without.pop(0) == "without"
    assert len(without) == 15 * 4 * 2
    for here, there in zip(with_speed, without, strict=True):
        assert here == there


@pytest.mark.parametrize("arguments", [
    ["--slot-steps", "3"], ["--compare"], ["--temperature", "1", "--seed", "3"],
    ["--slot-steps", "5", "--slot-lr", "0.1", "--temperature", "0.7", "--top-p", "0.9",
     "Emma buys 4 books for $6 each. How much does she pay?", "What is 2+2?", "Why?", "Why?"]], ids=" ".join)
def test_without_speed_the_command_prints_the_same(arguments, plain_house):
    here, there = generate(*arguments), plain_house.generate(*arguments)
    assert here.out == there.out and len(here.out) > 20


def test_without_speed_slot_fast_is_refused(plain_house):
    result = plain_house.command(["--slot-fast", "--slot-steps", "3"], cwd=plain_house.tree)
    assert result.status == 2 and re.match("generate.py: --slot-fast .*speed/", result.err), result
    study = forks.run(["-m", "study", "--quick", "--slot-fast"], plain_house.tree)
    assert study.returncode == 2 and re.match("python -m study: --slot-fast .*speed/", study.stderr), study


def test_without_speed_the_study_runs(plain_house):
    """--quick, every figure but the times."""
    here, there = quick_study(ROOT), quick_study(plain_house.tree)
    assert here == there and len(here) == 9


# ---- 3 ---------------------------------------------------------------------------------------------------

JUDGES = """
def __getattr__(name):
    if name.startswith(("check_", "find_")):
        return lambda *given, **options: None
    raise AttributeError(name)
"""
READERS = """
import json
from pathlib import Path
show = show_name = lambda value, limit=0: repr(value)
cache_folder = Path.home
whole_file = None
regular_file = Path
def read_bytes(path, limit=0): return Path(path).read_bytes()
def parse_json(data, path): return json.loads(data)
def read_json(path, limit=0): return json.loads(Path(path).read_text())
"""
FOLDERS = """
    import os, sys, tempfile
    from pathlib import Path
    import numpy as np, torch
    from load_weights import load_model
    from tokenizer import load_tokenizer
    sys.path.insert(1, os.environ["TESTS"])
    torch.set_grad_enabled(False)
    for folder in sorted(Path(os.environ["GOLDEN"]).iterdir()):
        if folder.is_dir():
            golden = np.load(folder / "golden.npz")
            logits = load_model(folder, dtype="float32")(torch.from_numpy(golden["prompt"]))
            print(folder.name, (logits - torch.from_numpy(golden["logits"])).abs().max().item() < 2e-4)
    import hostile
    with tempfile.TemporaryDirectory() as place:
        names = "llama", "qwen2", "qwen3"
        made = [hostile.write(Path(place) / name, hostile.build(name)) for name in names]
        for folder in [Path("tiny"), *made]:
            tokenizer = load_tokenizer(folder)
            ids = tokenizer.chat_ids([{"role": "user", "content": "4 books, <|im_end|> for $6 é"}])
            logits = load_model(folder)(torch.tensor([ids]))
            print(folder.name, ids, tokenizer.decode(ids), sorted(tokenizer.eos_ids), logits.sum().item())
"""


def test_without_checks_every_good_folder_loads(tmp_path):
    """Readers in one line each, every judge says nothing: what loads is the same."""
    tree = copy_of(tmp_path)
    for room in (tree / "checks").glob("*.py"):
        if room.name != "__init__.py":
            room.write_text(JUDGES)
    (tree / "checks/files.py").write_text(READERS + JUDGES)
    (tree / "checks/child.py").write_text("def in_child(run):\n    return run()\n")
    here, there = (python(each, code=FOLDERS).stdout for each in (ROOT, tree))
    assert here == there and here.count(" True\n") == 15 and here.count("[276, 278]") == 3


# ---- a harmless edit -------------------------------------------------------------------------------------


@pytest.mark.mutation
def test_a_harmless_edit_turns_no_proof_red(tmp_path):
    """Another name for a variable, a print: the proofs against the authors' runs, alone and in a batch, stay green. The mutations table, whose text
    names the old lines, does not, and says what to do. (So do the README files that quote the loop.)"""
    tree = copy_of(tmp_path)
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    if (ROOT.parent / "shared").exists():
        (tree.parent / "shared").symlink_to(ROOT.parent / "shared")
    source = (tree / "slot.py").read_text()
    source = re.sub(r"\bnll\b", "surprise", source)
    source = source.replace("        losses.append(surprise.detach())\n",
                            "        losses.append(surprise.detach())\n"
                            "        import sys\n"
                            "        print(step, surprise.item(), file=sys.stderr)\n")
    assert source.count("surprise") > 3 and "print(step" in source
    (tree / "slot.py").write_text(source)

    def pytest_says(*arguments):
        done = forks.run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments], tree)
        return done.returncode, done.stdout

    status, said = pytest_says("tests/test_slot.py", "tests/test_speed_batch.py", "-k", "authors and not closed_form")
    assert status == 0, said[-2000:]
    status, said = pytest_says("tests/test_mutations.py", "-k", "names_a_line", "-m", "")
    assert status == 1 and "bring its mutations_*.py up to date" in said, said[-2000:]
