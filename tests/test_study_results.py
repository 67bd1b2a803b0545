"""
study/results.py: the file of results and what it depends on. Whatever is damaged, foreign or in the
way is named in one line, and nothing hangs.
"""
import json
import os
import resource
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

import forks
from study_model import ROOT

from checks.files import whole_file
from study.results import Results, source_digests, what_is_wrong

KINDS, SETTINGS = ["common", "rare"], ["plain", "slot 3 0.1"]


def row(sample=0, setting="plain", **changes):
    found = dict(sample=sample, kind=KINDS[sample], setting=setting, prompt="?", gold="5", answer="5", strict=True, flexible=True, paper=None, format=False,
                 tokens=3, answer_loss=0.5, prompt_loss=0.25, seconds=dict(prefill=0.1, fit=0.0, decode=0.2))
    if setting == "plain":
        found["alignment"] = -0.5
    return found | changes


def opened(folder, arguments=None):
    return Results(folder, arguments or dict(a=1), KINDS, SETTINGS)


def refused(folder, arguments=None):
    with pytest.raises(ValueError) as error:
        opened(folder, arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def test_rows_come_back(tmp_path):
    first = opened(tmp_path)
    assert "another run is writing there" in refused(tmp_path)
    first.add(row(answer="é\n\ud800"))
    first.add(row(1, "slot 3 0.1"))
    first.close()
    again = opened(tmp_path)
    assert again.rows == {(0, "plain"): row(answer="é\n?"), (1, "slot 3 0.1"): row(1, "slot 3 0.1")}
    again.close()


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = Results(None, dict(a=1), KINDS, SETTINGS)
    results.add(row())
    results.close()
    assert results.rows == {(0, "plain"): row()} and not list(tmp_path.iterdir())


WRONG = [
    (b"garbage", "not JSON"), (b"", "not JSON"), (b"[1, 2]", "not an object"), (b'"text"', "not an object"), (b"null", "not an object"),
    (b"[" * 100_000, "not JSON"), (b'{"sample": ' + b"9" * 5000 + b"}", "not JSON"), (b"\xff\xfe", "not JSON"), (b"{}", "its sample is none"),
    (dict(sample="0"), "its sample is none"), (dict(sample=True), "its sample is none"), (dict(sample=-1), "its sample is none"), (dict(sample=2), "its sample is none"),
    (dict(sample=0.0), "its sample is none"), (dict(sample=None), "its sample is none"), (dict(sample=[0]), "its sample is none"),
    (dict(setting="slot 4 0.1"), "its setting is none"), (dict(setting=["plain"]), "its setting is none"), (dict(setting=None), "its setting is none"),
    (dict(kind="rare"), "its kind is another"), (dict(kind=None), "its kind is another"), (dict(answer=None), "'answer'"), (dict(strict=None), "'strict'"),
    (dict(strict=1), "'strict'"), (dict(paper="yes"), "'paper'"), (dict(tokens=-1), "'tokens'"), (dict(tokens=1.5), "'tokens'"), (dict(answer_loss=float("nan")), "'answer_loss'"),
    (dict(prompt_loss=float("inf")), "'prompt_loss'"), (dict(answer_loss="0.5"), "'answer_loss'"), (dict(answer_loss=None), "'answer_loss'"), (dict(alignment=None), "'alignment'"),
    (dict(seconds=3), "'seconds'"), (dict(seconds={}), "its seconds"), (dict(seconds=dict(prefill=0.1, fit=None, decode=0.1)), "its seconds"), (dict(more=1), "'more'"),
    (dict(setting="slot 3 0.1"), "'alignment'"),
]


@pytest.mark.parametrize("damage, why", WRONG, ids=lambda x: str(x)[:40])
def test_a_damaged_line_is_named(tmp_path, damage, why):
    results = opened(tmp_path)
    results.add(row())
    results.close()
    line = damage if isinstance(damage, bytes) else json.dumps(row() | damage).encode()
    with open(tmp_path / "results.jsonl", "ab") as file:
        file.write(line + b"\n")
    message = refused(tmp_path)
    assert f"{tmp_path / 'results.jsonl'}: line 2 is damaged" in message and why in message and "delete it" in message


@pytest.mark.parametrize("name", sorted(row()))
def test_a_missing_field_is_named(name):
    changed = row()
    del changed[name]
    assert what_is_wrong(changed, KINDS, SETTINGS, True) and not what_is_wrong(row(), KINDS, SETTINGS, True)


def test_losses_alone_have_other_fields():
    losses = {k: v for k, v in row().items() if k not in ("answer", "tokens", "strict", "format", "flexible", "paper")}
    assert what_is_wrong(losses, KINDS, SETTINGS, False) is None and "missing" in what_is_wrong(losses, KINDS, SETTINGS, True)
    assert "unknown" in what_is_wrong(row(), KINDS, SETTINGS, False)


def test_two_lines_of_one_sample_and_setting(tmp_path):
    """The same figures twice do no harm; other ones are two experiments."""
    results = opened(tmp_path)
    results.add(row())
    results.add(row(seconds=dict(prefill=9.0, fit=9.0, decode=9.0)))
    results.close()
    opened(tmp_path).close()
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write(json.dumps(row(answer_loss=0.6)) + "\n")
    assert "lines 2 and 3 are of one sample and setting and contradict each other" in refused(tmp_path)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b'"a"', b"{", b"[" * 100_000, b"\xff", b"1" * 5000, None])
def test_damaged_arguments(tmp_path, text):
    results = opened(tmp_path)
    results.add(row())
    results.close()
    path = tmp_path / "arguments.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text)
    assert "arguments.json is missing or damaged" in refused(tmp_path)


def test_other_arguments_name_what_differs(tmp_path):
    results = opened(tmp_path, dict(a=1, model=dict(x="1", y="2"), source=dict(x="1")))
    results.add(row())
    results.close()
    same = dict(a=1, model=dict(x="1", y="2"), source=dict(x="1"))
    opened(tmp_path, same).close()
    assert "another a (1, not 2); " in refused(tmp_path, same | dict(a=2))
    assert "another b (None, not 2)" in refused(tmp_path, same | dict(b=2))
    assert "another model (y differs)" in refused(tmp_path, same | dict(model=dict(x="1", y="3")))
    assert "another model (y, z differs)" in refused(tmp_path, same | dict(model=dict(x="1", z="2")))
    assert f"results of other code (x differs); for this one give another --out, such as --out {tmp_path}-2" in refused(tmp_path, same | dict(source=dict(x="2")))


def test_pipes_and_folders_in_their_place(tmp_path, alarm):
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a/results.jsonl")
    assert "results.jsonl: is not a regular file" in refused(tmp_path / "a")
    (tmp_path / "b/results.jsonl").mkdir(parents=True)
    assert "results.jsonl: is not a regular file" in refused(tmp_path / "b")
    results = opened(tmp_path / "c")
    results.add(row())
    results.close()
    (tmp_path / "c/arguments.json").unlink()
    os.mkfifo(tmp_path / "c/arguments.json")
    assert "arguments.json is missing or damaged" in refused(tmp_path / "c")


def limited(size, work):
    """In a fork whose files may not grow beyond `size` bytes -> what `work` raised there."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            work()
            os.write(write, b"nothing")
        except BaseException as error:
            os.write(write, f"{type(error).__name__} {error}".encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


def test_a_full_disk_names_the_file_and_leaves_nothing_half_written(tmp_path):
    """Here the disk is a limit on the size of a file: the last write fits in part, the next not at all."""
    whole = json.dumps(row(), ensure_ascii=False) + "\n"

    def fill():
        results = opened(tmp_path)
        results.add(row())
        results.add(row(1, "slot 3 0.1"))

    assert limited(len(whole) + 10, fill).startswith(f"OSError {tmp_path / 'results.jsonl'}: ")
    assert (tmp_path / "results.jsonl").read_text() == whole
    (tmp_path / "summary.md").write_text("old")

    def summary(text):
        with whole_file(tmp_path / "summary.md") as file:
            file.write(text)

    said = limited(10, lambda: summary(b"new" * 10))
    assert said.startswith("OSError ") and said.endswith(f": '{tmp_path / 'summary.md'}'")
    assert (tmp_path / "summary.md").read_text() == "old" and not list(tmp_path.glob("*.part"))
    summary(b"new")
    assert (tmp_path / "summary.md").read_bytes() == b"new" and not list(tmp_path.glob("*.part"))


def test_all_rooms_that_make_the_numbers_are_in_the_fingerprint(tmp_path):
    names = set(source_digests(False, None))
    assert {"slot.py", "generate.py", "model.py", "load_weights.py", "tokenizer/text.py", "study/measure.py", "study/run.py", "study/tasks.py",
            "study/tasks.json", "study/scoring.py"} <= names
    assert {"speed/batch.py", "speed/linear.py"} <= names or not (ROOT / "speed").exists()
    assert source_digests(True, None).keys() - names <= {"speed/delta.py"} and all((ROOT / name).is_file() for name in names)
    (tmp_path / "mine.py").write_text("1")
    mine = source_digests(False, tmp_path / "mine.py")
    assert mine.keys() - names == {"--slot-file"}
    (tmp_path / "mine.py").write_text("2")
    assert source_digests(False, tmp_path / "mine.py") != mine


def test_what_a_slot_file_imports_is_in_the_fingerprint(tmp_path, monkeypatch):
    """From beside it or from the working folder; what else the process has imported is not."""
    (tmp_path / "mine").mkdir()
    for name in ("mine/mine.py", "mine/helper_beside.py", "helper_here.py", "mine/unused.py"):
        (tmp_path / name).write_text("1")
    monkeypatch.chdir(tmp_path)
    for name in ("mine/mine.py", "mine/helper_beside.py", "helper_here.py"):
        module = ModuleType(Path(name).stem)
        module.__file__ = str(tmp_path / name)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    mine = source_digests(False, "mine/mine.py")
    assert mine.keys() - source_digests(False, None).keys() == {"--slot-file", "helper_beside.py", "helper_here.py"}
    (tmp_path / "mine/helper_beside.py").write_text("2")
    assert [name for name, value in source_digests(False, "mine/mine.py").items() if mine[name] != value] == ["helper_beside.py"]


def test_what_measures_imports_only_what_is_in_the_fingerprint():
    """A room of ours that study/measure.py comes to import must be in SOURCE, or in this list of those that make no number."""
    code = "import sys, study.measure, study.run; print(*(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)), sep='\\n')"
    done = forks.run(["-c", code])
    assert done.returncode == 0, done.stderr
    files = done.stdout.split("\n")
    ours = {os.path.relpath(file, ROOT) for file in files if file.startswith(str(ROOT) + os.sep)}
    ours = {name for name in ours if not name.startswith((".", "venv"))}
    assert "study/measure.py" in ours
    numberless = {"study/__init__.py", "study/settings.py", "study/results.py", "study/progress.py", "study/report.py", "study/plot.py", "study/stats.py",
                  "speed/__init__.py", "speed/delta.py", "speed/parallel.py", "speed/parallel_delta.py", "speed/ranks.py"}
    assert {name for name in ours if not name.startswith("checks/")} <= set(source_digests(False, None)) | numberless
