"""checks/files.py: JSON is read strictly, only regular files are opened, and values are shown in one short line."""
import os
from pathlib import Path

import pytest

from checks.files import MAX_JSON, read_json, show
from small_tokenizer import line_of

JSON = {
    b"": "empty", b" \n": "empty", b'{"a":1': "cut short", b"[1]": "not an object", b"5": "not an object", b'{"a":1,"a":2}': "'a' occurs twice",
    b'{"x":{"b":1,"b":1}}': "'b' occurs twice", b'{"a":NaN}': "NaN", b'{"a":-Infinity}': "-Infinity", b'{"a":1e999}': "1e999", b'{"a":' + b"9" * 5000 + b"}": "too large",
    b'{"a":' * 100_000: "nested", b"[" * 100_000: "nested", b'{"\\ud800":1}': "surrogate", b'{"a":"\\udfff"}': "surrogate", b'\xff\xfe{"a"': "UTF-8",
    b"<!DOCTYPE html><html>": "web page", b"\n<HTML>": "web page", b"version https://git-lfs.github.com/spec/v1\noid": "LFS", b"\xef\xbb\xbf{}": "BOM",
    b'{"a":"\n"}': "control character", b"\x93NUMPY": "UTF-8", b'{"a":1}{': "Extra data",
}


@pytest.mark.parametrize("content", JSON, ids=lambda x: ascii(x)[:30])
def test_read_json_is_strict(tmp_path, content):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_json(tmp_path / "f.json")
    assert "f.json: " in line_of(error) and JSON[content] in line_of(error)


def test_read_json_reads(tmp_path):
    (tmp_path / "f.json").write_bytes(b' {"a": [1, 2.5e3, "\\ud83d\\ude00", null, {"b": -7}], "a ": true}\n')
    (tmp_path / "link.json").symlink_to("f.json")
    assert read_json(tmp_path / "link.json") == {"a": [1, 2500.0, "😀", None, {"b": -7}], "a ": True}


def test_the_large_number_that_transformers_writes(tmp_path):
    """"model_max_length" of most tokenizer_config.json: int(1e30)."""
    (tmp_path / "f.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert read_json(tmp_path / "f.json") == {"model_max_length": int(1e30)}


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    big = tmp_path / "big"
    with open(big, "wb") as file:
        file.truncate(MAX_JSON + 1)
    for name, words in ((tmp_path / "fifo", "pipe"), (tmp_path, "a folder"), ("/dev/zero", "device"), (tmp_path / "dangling", "link to a file"),
                        (tmp_path / "nothing", "no such file"), (tmp_path / "loop", "cannot be opened"), ("a\0b", "cannot be opened"),
                        (tmp_path / ("x" * 3000), "cannot be opened"), (tmp_path / "\n\u202e", "no such file"), (big, "over the limit")):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            read_json(name)
        assert words in line_of(error)
        assert isinstance(error.value, FileNotFoundError) == (words in ("link to a file", "no such file"))


def test_show_is_short_and_printable():
    for value in ("a" * 10**6, "\n\u202e\x1b[31m" * 50, b"\xff" * 500, [["x" * 500] * 500] * 500, {"k" * 99: "v" * 99}, 10**50, None, Path("x" * 500 + "\n")):
        text = show(value)
        assert len(text) <= 60 and text.isprintable()
    assert show("begin" + 99 * "x" + "end").startswith("'begin") and show("begin" + 99 * "x" + "end").endswith("xend'"), "the end is shown"
    assert show("it's") == '"it\'s"' and show(Path("a/b.json")) == "a/b.json"
