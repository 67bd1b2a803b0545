"""checks/files.py: files that are none, and JSON by the rules of JSON. Every broken folder is
refused in one line that says what is wrong, by the library and by the command; every odd but valid
one gives the logits of the plain folder to the last bit, and the same text."""
import json
import math
import os
import pickle
import zipfile

import pytest
import torch

import forks
from hostile import (CANARY, INDEX, MODEL, PROMPT, ROOT, SETTINGS, TOKENS, Payload, build,
                     check_line, check_loads, check_refused, command, config, content, files,
                     instead, logits, plain, tensors, text_of, then, write)

HTML = b"<!DOCTYPE html>\n<html><head><title>401</title></head></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 988097824\n"
GENERATION = "generation_config.json"


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Payload()))


def link(target):
    return lambda path: path.symlink_to(target)


def without(name, *more):
    """A folder without a file; more: functions of the folder that put something else there."""
    return then(lambda folder: [(folder / name).unlink(), *(change(folder) for change in more)])


def spelled(old, new, name="config.json"):
    """A JSON file in which a text was replaced."""
    return text_of(name, lambda text: text.replace(old, new, 1))


# name, folder, words of the line
FILES = [
    ("folder is a file", lambda folder: folder.write_bytes(b"x"), "folder"),
    ("folder missing", lambda folder: None, "no such folder"),
    ("folder empty", lambda folder: folder.mkdir(), ""),
    ("config missing", without("config.json"), "config.json no such file"),
    ("config empty", content("config.json", b""), "config.json empty"),
    ("config blank", content("config.json", b" \n"), "config.json empty"),
    ("config is a folder", instead("config.json", os.mkdir), "config.json a folder"),
    ("config is a pipe", instead("config.json", os.mkfifo), "config.json pipe"),
    ("config is a device", instead("config.json", link("/dev/zero")), "config.json device"),
    ("config is a kernel file", instead("config.json", link("/proc/kmsg")), "config.json empty"),
    ("config link dangles", instead("config.json", link("nowhere")), "config.json link"),
    ("config link loops", instead("config.json", link("config.json")),
     "config.json cannot be opened"),
    ("weights missing", without(MODEL), "model.safetensors"),
    ("weights are a pipe", instead(MODEL, os.mkfifo), "model.safetensors pipe"),
    ("weights are a folder", instead(MODEL, os.mkdir), "model.safetensors a folder"),
    ("weights link dangles", instead(MODEL, link("../../blobs/5d2e")), "model.safetensors link"),
    ("weights are a device", instead(MODEL, link("/dev/urandom")), "model.safetensors device"),
    ("tokenizer is a pipe", instead(TOKENS, os.mkfifo), "tokenizer.json pipe"),
    ("tokenizer missing", without(TOKENS), "tokenizer.json"),
    ("tokenizer link dangles", instead(TOKENS, link("gone")), "tokenizer.json link"),
    ("tokenizer settings are a folder", instead(SETTINGS, os.mkdir),
     "tokenizer_config.json a folder"),
    ("generation config is a pipe", instead(GENERATION, os.mkfifo), "generation_config.json pipe"),
    ("template file is a pipe", then(lambda folder: os.mkfifo(folder / "chat_template.jinja")),
     "chat_template.jinja pipe"),
    ("index is a pipe", without(MODEL, lambda folder: os.mkfifo(folder / INDEX)),
     "index.json pipe"),
    ("only a pickle", without(MODEL, lambda folder: (folder / "pytorch_model.bin").write_bytes(
        pickle.dumps(Payload()))), "pytorch_model.bin pickle safe_serialization"),
    ("only a .pth", without(MODEL, lambda folder: archive(folder / "consolidated.00.pth")),
     "consolidated.00.pth pickle"),
    ("weights are a pickle", content(MODEL, pickle.dumps(Payload())), "model.safetensors pickle"),
    ("weights are an archive", instead(MODEL, archive), "model.safetensors archive"),
    ("weights are GGUF", content(MODEL, b"GGUF\3\0\0\0" + bytes(64)), "model.safetensors GGUF"),
    ("weights are an LFS pointer", content(MODEL, LFS), "model.safetensors LFS"),
    ("weights are a web page", content(MODEL, HTML), "model.safetensors web page"),
    ("config is an LFS pointer", content("config.json", LFS), "config.json LFS"),
    ("config is a web page", content("config.json", HTML), "config.json web page"),
    ("tokenizer is an LFS pointer", content(TOKENS, LFS), "tokenizer.json LFS"),
]

JSON = [
    ("config cut", text_of("config.json", lambda text: text[:200]), "config.json not JSON"),
    ("config is a list", content("config.json", b"[]"), "config.json not an object"),
    ("config twice a key", spelled("{", '{"hidden_size": 16, '), "hidden_size twice"),
    ("config NaN", config(rms_norm_eps=math.nan), "config.json NaN not JSON"),
    ("config Infinity", config(rope_theta=math.inf), "config.json Infinity not JSON"),
    ("config -Infinity", config(rope_theta=-math.inf), "config.json -Infinity not JSON"),
    ("config 1e999", spelled("1e-05", "1e999"), "config.json 1e999"),
    ("config -1e999", spelled("1e-05", "-1e999"), "config.json -1e999"),
    ("config 10,000 digits", spelled("300", "3" * 10_000), "config.json too large"),
    ("config 40 digits", spelled("300", "-" + "3" * 40), "config.json too large"),
    ("config half a character", spelled("silu", "\\ud800"), "config.json half a character"),
    ("config nested", content("config.json", b'{"a": ' + b"[" * 100_000), "config.json nested"),
    ("config not UTF-8", text_of("config.json", lambda t: t.encode().replace(b"silu", b"sil\xfc")),
     "config.json UTF-8"),
    ("config UTF-16", text_of("config.json", lambda t: t.encode("utf-16")), "config.json UTF-8"),
    ("config with a byte order mark", text_of("config.json", lambda text: "\ufeff" + text),
     "config.json not JSON"),
    ("config 80 MB", instead("config.json", lambda p: (p.touch(), os.truncate(p, 80 << 20))),
     "config.json limit"),
    ("config terminal escapes", config(model_type="\x1b[2J\n\rllama" * 50), "model_type \\x1b[2J"),
    ("config of many lists", content("config.json", b'{"a": [' + b"[]," * 200_000 + b"[]]}"),
     "config.json"),
    ("generation config cut", text_of(GENERATION, lambda text: text[:20]),
     "generation_config.json not JSON"),
    ("generation config twice a key",
     content(GENERATION, b'{"eos_token_id": 1, "eos_token_id": 1}'), "eos_token_id twice"),
    ("tokenizer cut", text_of(TOKENS, lambda text: text[:3000]), "tokenizer.json not JSON"),
    ("tokenizer with a byte order mark", text_of(TOKENS, lambda text: "\ufeff" + text),
     "tokenizer.json not JSON"),
    ("tokenizer not UTF-8",
     text_of(TOKENS, lambda text: text.encode("latin-1").replace(b"BPE", b"BP\xc9")),
     "tokenizer.json UTF-8"),
    ("tokenizer settings are a list", content(SETTINGS, b"[1]"),
     "tokenizer_config.json not an object"),
]


@pytest.mark.parametrize("make, words", [case[1:] for case in FILES + JSON],
                         ids=[case[0] for case in FILES + JSON])
def test_bad_file(make, words, folder):
    check_refused(make, words, folder)


def relayout(**options):
    def change(contents):
        for name in [name for name in contents if name.endswith(".json")]:
            text = json.dumps(contents[name], **options).replace("\n", "\r\n")
            contents[name] = text.encode() + b"\r\n\r\n"
    return files(change)


def more_files(folder):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    (folder / "README.md").write_bytes(b"\xff")
    (folder / ".gitattributes").touch()
    (folder / "original").mkdir()
    os.mkfifo(folder / "pipe")


def remote_code(contents):
    """Named in config.json and lying beside it: nothing of it is run."""
    contents["config.json"]["auto_map"] = {"AutoModelForCausalLM": "modeling_x.Evil"}
    for name in ("modeling_x.py", "torch.py", "model.py"):
        contents[name] = f"open('{CANARY}', 'w')"


def read_only(folder):
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)


ODD = [
    ("JSON indented, CRLF", relayout(indent=4)),
    ("JSON compact, no escapes", relayout(separators=(",", ":"), ensure_ascii=False)),
    ("JSON keys sorted", relayout(sort_keys=True)),
    ("other files beside", then(more_files)),
    ("remote code that is not run", files(remote_code)),
    ("many readers: hard links", then(lambda f: os.link(f / MODEL, f / "second-name"))),
    ("read-only", then(read_only)),
]


@pytest.mark.parametrize("make", [case[1] for case in ODD], ids=[case[0] for case in ODD])
def test_odd_file(make, folder):
    check_loads(make, "qwen2", folder)


PLACES = ["a folder with spaces", "Ordner-äöü-模型-\U0001F600", "two\nlines", "tab\tand\\backslash",
          "'quotes\" $HOME `x`", "*?[a]", "-dash", "~", "x" * 200, "%s{0}"]


@pytest.mark.parametrize("place", PLACES)
def test_odd_place(place, tmp_path):
    """A folder may have any name that the system allows, absolute, relative, or behind a link."""
    write(tmp_path / place, build())
    assert torch.equal(logits(tmp_path / place), plain("qwen2")[0])
    names = ((tmp_path / place, None), (f"{tmp_path / place}/", None), (f"./{place}", tmp_path))
    for name, cwd in names:
        result = command()([f"--model={name}", PROMPT, "--max-new-tokens", "1"], cwd=cwd)
        assert result.status == 0, result
        lines = result.err.splitlines()
        assert len(lines) <= 4 and all(line.isprintable() for line in lines), result.err
    (tmp_path / "link").symlink_to(place)
    result = command()(["--model", tmp_path / "link", PROMPT, "--max-new-tokens", "1"])
    assert result.status == 0


REAL = {name: (make, words) for name, make, words in FILES + JSON
        if name in ("config is a pipe", "weights are a pickle", "config not UTF-8")}
REAL["weights NaN"] = tensors(lambda t: t["model.norm.weight"].fill_(math.nan)), "NaN"


@pytest.mark.parametrize("name", REAL)
def test_bad_folder_for_real(name, folder):
    """Some of the table through the file itself, not its functions."""
    make, words = REAL[name]
    make(folder)
    run = forks.run([ROOT / "generate.py", "--model", folder, "hello"])
    *progress, line = run.stderr.splitlines()
    assert run.returncode == 1 and line.startswith("generate.py: "), run
    assert "Traceback" not in run.stderr
    check_line(line.removeprefix("generate.py: "), words)
