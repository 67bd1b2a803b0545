"""tiny/train.py: the recipe makes what is shipped, goes on where it was stopped, and never
overwrites a finished model unless told to."""
import signal
from pathlib import Path

import pytest
import torch

import forks
from load_weights import load_model, read_safetensors
from tiny import train

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def quick(monkeypatch):
    """A step learns from two problems, and is kept; the tokenizer is the shipped one."""
    def copy(folder):
        for name in FILES[2:]:
            (folder / name).write_bytes((TINY / name).read_bytes())
    monkeypatch.setattr(train, "write_tokenizer", copy)
    monkeypatch.setattr(train, "BATCH", 2)
    monkeypatch.setattr(train, "SAVE_EVERY", 1)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def parse(*arguments):
    return train.parse_arguments([str(argument) for argument in arguments])


def test_the_recipe_writes_the_files_that_are_shipped(tmp_path):
    train.prepare(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name


@pytest.mark.parametrize("arguments", [["--folder", TINY], ["--folder", TINY, "--steps", "1"],
                                       ["--folder", TINY / ".." / "tiny"], ["--folder", "tiny"]])
def test_the_shipped_model_stays(arguments, monkeypatch):
    """Refused before anything is written: the weights and all else in the folder are as before."""
    monkeypatch.chdir(ROOT)
    before = content(TINY)
    with pytest.raises(ValueError, match="finished model; give another --folder, or --overwrite"):
        train.main(parse(*arguments))
    assert content(TINY) == before


def test_the_default_folder_is_another(monkeypatch):
    asked = []
    for name in ("train", "check_unfinished", "evaluate"):
        monkeypatch.setattr(train, name, lambda *given: asked.append(given))
    train.main(parse())
    train.main(parse("--evaluate"))
    runs = ROOT / "runs" / "tiny"
    assert asked == [(runs, False), (runs, 5000), (TINY, 400)]


def test_overwrite(quick, tmp_path):
    """A finished model stays, until told otherwise; an unfinished one is the training's own."""
    train.main(parse("--folder", tmp_path, "--steps", 2))
    first = content(tmp_path)
    assert "checkpoint.pt" not in first
    with pytest.raises(ValueError):
        train.main(parse("--folder", tmp_path, "--steps", 3))
    assert content(tmp_path) == first
    train.main(parse("--folder", tmp_path, "--steps", 3, "--overwrite"))
    assert content(tmp_path)["model.safetensors"] != first["model.safetensors"]


def test_goes_on_where_it_was_stopped(quick, tmp_path, monkeypatch):
    """Stopped in the third step and started again: the same weights, bit for bit."""
    train.main(parse("--folder", tmp_path / "whole", "--steps", 4))
    with monkeypatch.context() as patch:
        learn, calls = train.learn, []

        def stopped(*given):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return learn(*given)
        patch.setattr(train, "learn", stopped)
        with pytest.raises(KeyboardInterrupt):
            train.main(parse("--folder", tmp_path / "stopped", "--steps", 4))
    assert (tmp_path / "stopped" / "checkpoint.pt").exists()
    train.main(parse("--folder", tmp_path / "stopped", "--steps", 4))
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_export(quick, tmp_path):
    """The weights of the last checkpoint, as a folder that loads."""
    train.main(parse("--folder", tmp_path, "--steps", 1))
    torch.save({"model": load_model(tmp_path).state_dict()}, tmp_path / "checkpoint.pt")
    expected = read_safetensors(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    train.main(parse("--folder", tmp_path, "--export"))
    found = read_safetensors(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_as_a_command(tmp_path):
    """From the root, as the docstring says; Ctrl-C is one line at most, and no traceback."""
    refused = forks.run(["-m", "tiny.train", "--folder", "tiny"])
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1, refused
    process = forks.Fork(["-m", "tiny.train", "--folder", tmp_path / "new"])
    assert "parameters" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in said, said
    assert not (tmp_path / "new" / "model.safetensors").exists()


@pytest.mark.trained
def test_evaluate(capsys):
    """What tiny/README.md reports of the shipped weights, on the first 8 of each group."""
    train.main(parse("--evaluate", 8))
    lines = capsys.readouterr().out.splitlines()
    right = {line.split()[0]: int(line.split()[1]) for line in lines}
    assert right["common"] >= 7 and right["rare"] >= 6 and right["unseen"] <= 3, lines
