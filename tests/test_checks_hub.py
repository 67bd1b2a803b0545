"""checks/hub.py: a hub id is found where Hugging Face's tools keep it."""
import os
import sys
import types
from pathlib import Path

import pytest

from checks.hub import find_in_hub
from hostile import PROMPT, check_line, command, hub, write
from load_weights import find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "some-one/Model-0.5B"
SETTINGS = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME")
PLACES = list(zip(SETTINGS, (".", ".", "hub", "huggingface/hub", ".cache/huggingface/hub")))
BROKEN_REFS = ["../../../../etc", COMMIT[:-1], "", "\0", "x" * 100_000, "\udcff", f"{COMMIT}/.."]


def repository(cache):
    """A good one: snapshots of links to blobs, refs/main names the snapshot."""
    repo = cache / f"models--{NAME.replace('/', '--')}"
    hub()(repo / "snapshots" / COMMIT)
    write(repo / "refs", {"main": COMMIT})
    return repo


@pytest.fixture
def cache(tmp_path, monkeypatch, alarm):
    for setting in SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("setting, below", PLACES)
def test_places(setting, below, tmp_path):
    repo = repository(tmp_path / below)
    environment = dict.fromkeys(SETTINGS[:-1], "") | {setting: str(tmp_path)}
    arguments = ["--model", NAME, PROMPT, "--max-new-tokens", "1"]
    result = command()(arguments, **environment)
    assert result.status == 0, result
    for ref in BROKEN_REFS:                         # a broken ref is as good as none
        write(repo / "refs", {"main": ref})
        result = command()(arguments, **environment)
        assert result.status == 1, result
        assert result.err.startswith(f"generate.py: --model '{NAME}'"), result
        assert result.err.count("\n") == 1


def test_a_misspelt_name_is_told_what_there_is(tmp_path):
    for name in ("smollm2", "qwen-coder"):
        (tmp_path / "slot-models" / name).mkdir(parents=True)
    result = command()(["--model", "smolm2", PROMPT], XDG_CACHE_HOME=str(tmp_path))
    assert result.status == 1 and "(there: qwen-coder, smollm2)" in result.err and result.err.count("\n") == 1


def test_a_line_break_after_the_commit(cache):
    repo = repository(cache)
    write(repo / "refs", {"main": COMMIT + "\n"})
    assert find_model(NAME) == repo / "snapshots" / COMMIT


NO_REFS = {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda p: p.symlink_to("/dev/zero"),
           "loop": lambda p: p.symlink_to("main"), "empty": lambda p: p.touch(), "missing": None,
           "dot": lambda p: p.write_text("."), "blank": lambda p: p.write_text(" \n"),
           "up": lambda p: p.write_text("../snapshots")}


@pytest.mark.parametrize("make", NO_REFS.values(), ids=NO_REFS)
@pytest.mark.parametrize("installed", [False, True])
def test_refs_that_are_none(make, installed, cache, monkeypatch):
    """Nothing is waited for, and no other folder is taken for the snapshot, whether or not
    huggingface_hub is there to be asked next."""
    repo = repository(cache)
    (repo / "snapshots" / "config.json").write_text("{}")   # where an empty name would lead
    ref = repo / "refs" / "main"
    ref.unlink()
    if make:
        make(ref)
    asked = []

    def snapshot_download(name, allow_patterns, cache_dir):
        asked.append(name)
        raise RuntimeError("no network here\nat all")
    library = types.ModuleType("huggingface_hub")
    library.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", library if installed else None)
    with pytest.raises(FileNotFoundError) as caught:
        find_model(NAME)
    check_line(str(caught.value), f"{NAME} {'no network here at all' if installed else 'fetch'}")
    assert asked == [NAME] * installed


def test_what_the_library_fetches(cache, monkeypatch):
    """Only weights, JSON and templates: no pickle, no code; into the cache where it is looked for."""
    asked = {}
    library = types.ModuleType("huggingface_hub")
    library.snapshot_download = lambda name, **more: asked.update(more) or str(cache)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    assert find_in_hub(NAME) == cache
    assert asked == {"allow_patterns": ["*.safetensors", "*.json", "*.jinja"], "cache_dir": cache}


def test_a_snapshot_of_pickles_is_refused_for_them(cache):
    snapshot = repository(cache) / "snapshots" / COMMIT
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    assert find_in_hub(NAME) == snapshot
    result = command()(["--model", NAME, PROMPT], HF_HUB_CACHE=str(cache))
    assert result.status == 1 and "a pickle" in result.err


@pytest.mark.parametrize("gone", ["model.safetensors", "config.json"])
def test_a_snapshot_without_weights_is_fetched_again(gone, cache, monkeypatch):
    """A program that wanted the tokenizer alone left it so."""
    repo = repository(cache)
    (repo / "snapshots" / COMMIT / gone).unlink()
    library = types.ModuleType("huggingface_hub")
    library.snapshot_download = lambda name, **more: str(cache)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    assert find_in_hub(NAME) == cache


NO_IDS = ["a", "a/b/c", "../b", "a/..", ".a/b", "a/.b", "-", "a b/c", "a/b\n", "é/b", "a/b\0",
          "\udcff/b", "http://a/b", "a" * 300 + "/b"]


@pytest.mark.parametrize("name", NO_IDS, ids=ascii)
def test_no_hub_id(name, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        find_model(name)
    check_line(str(caught.value), "--model")


def test_without_a_home(cache, monkeypatch):
    """An unknown user has no home. The cache is not looked for, or made, in a folder that is called ~, which
    whoever tidies up would remove by `rm -r ~`, nor where others could have put it."""
    for setting in ("HF_HUB_CACHE", "HOME"):
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(FileNotFoundError) as caught:
        find_model(NAME)
    check_line(str(caught.value), str(Path(os.devnull, ".cache/huggingface/hub")))
