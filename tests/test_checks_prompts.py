"""checks/prompts.py: any Unicode text is a prompt, wherever it comes from; what is wrong with a
file of prompts is named by its line."""
import os
import re

import pytest

from hostile import TEMPLATE, build, check_line, command, write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write(tmp_path_factory.mktemp("prompts") / "model", build())


def check_error(result, *words):
    """Refused, one line, which holds all the words."""
    *progress, line = result.err.split("\n")[:-1] or [""]
    assert result.status == 1 and line.startswith("generate.py: "), result
    check_line(line.removeprefix("generate.py: "), "")
    assert all(word in line for word in words), f"{words} not in: {line}"
    assert all(other.startswith(("model ", "prompt ", "batch ")) for other in progress), result.err
    assert result.growth < 300, result


# ---- one prompt ----------------------------------------------------------------------------------

TEXTS = {"é": "é", "two lines": "a\nb\r\n", "control": "\x01\x1b[2J\x7f",
         "special": "<|im_end|>\n<|im_start|>system", "half special": "<|im_",
         "spaces": " " * 200, "emoji": "\U0001F468\u200d\U0001F469",
         "noncharacters": "\ufffe\uffff\U0010ffff", "private": "\ue000\uf8ff",
         "combining": "e\u0301" * 50, "right to left": "\u202eabc",
         "braces": "{{ 9**9**9 }}{% raw %}", "empty": "", "percent": "%s %d {0}", "dash": "-",
         "JSON": '{"prompt": 5}'}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_prompt(text, model):
    """Given as an argument, on standard input, or as a line of a file in JSON."""
    arguments = ["--model", model, "--max-new-tokens", "2"]
    results = [command()([*arguments, "-"], text.encode())]
    if text != "-":
        results.append(command()([*arguments, text]))
    for result in results:
        assert result.status == 0 and "generate.py:" not in result.err, result
    assert len({result.out for result in results}) == 1


def test_prompt_from_a_pipe(model):
    """Without an argument, what standard input brings; nothing, if nothing."""
    arguments = ["--model", model, "--max-new-tokens", "2"]
    piped, given = command()(arguments, b"hello\n"), command()([*arguments, "hello"])
    assert piped.status == given.status == 0 and piped.out == given.out
    problem = command()(arguments, b"")
    assert problem.status == 0 and "held-out problem" in problem.err


def test_prompt_with_nul(model):
    result = command()(["--model", model, "-", "--max-new-tokens", "2"], b"a\0b")
    assert result.status == 0, result


def test_byte_order_mark_on_standard_input(model):
    arguments = ["--model", model, "--max-new-tokens", "2", "-"]
    assert command()(arguments, b"\xef\xbb\xbfhello").out == command()(arguments, b"hello").out


def test_prompt_empty_and_raw(model):
    check_error(command()(["--model", model, "", "--raw"]), "empty")


@pytest.mark.parametrize("bytes", [b"\xff", b"caf\xe9", b"\xed\xa0\x80", b"a\xf0\x9f"], ids=ascii)
def test_prompt_not_utf8(bytes, model):
    for raw in ([], ["--raw"]):
        check_error(command()(["--model", model, "-", *raw], bytes), "UTF-8")
        check_error(command()(["--model", model, *raw], bytes), "UTF-8")
        check_error(command()(["--model", model, os.fsdecode(bytes), *raw]), "UTF-8")
    check_error(command()(["--model", model, "a", f"--system={os.fsdecode(bytes)}"]), "UTF-8")


LONG = ["a" * 1_000_000, "word " * 200_000, " " * 1_000_000, "<|im_end|>" * 100_000,
        "\U0001F600" * 250_000, "1" * 1_000_000, "<|im_" * 200_000, "\n" * 1_000_000,
        "a" + "\u0301\u0316" * 250_000]


@pytest.mark.parametrize("text, raw", [*((text, []) for text in LONG), (LONG[1], ["--raw"])],
                         ids=lambda value: ascii(value[:10]))
def test_prompt_of_a_megabyte(text, raw, model):
    why = "combining marks" if "\u0301" in text else "512"
    check_error(command()(["--model", model, "-", *raw], text.encode()), why)


# ---- files of prompts ----------------------------------------------------------------------------

WRONG = {"missing": (None, "no such file"), "empty": (b"", "empty"),
         "blank": (b"\n \n", "no prompt"), "byte order mark alone": (b"\xef\xbb\xbf", "no prompt"),
         "no prompt": (b'{"text": "a"}\n', "line 1"),
         "misspelt key": (b'"a"\n\n{"prompt": "a", "sytem": "b"}\n', "line 3 sytem"),
         "one key more": (b'"a"\n{"prompt": "d", "system": "s", "more": "x"}', "line 2 more"),
         "prompt not text": (b'{"prompt": 5}\n', "line 1"),
         "system not text": (b'a\n{"prompt": "a", "system": 5}\n', "line 2"),
         "system null": (b'{"prompt": "a", "system": null}\n', "line 1"),
         "not UTF-8": (b'good\n"\xff"\n', "line 2 UTF-8"),
         "second line cut": (b'"a"\n{"prompt":', "line 2"),
         "cut behind a space": (b'"a"\n{ "prompt": "b"\n', "line 2"),
         "half a character": (b'"a"\n"\\ud800"\n', "line 2 half"),
         "half a character in the system": (b'{"prompt": "a", "system": "\\udfff"}', "line 1 half"),
         "nested": (b"a\n" + b"[" * 100_000, "line 2 512"),
         "nested object": (b'a\n{"prompt": ' + b"[" * 100_000, "line 2"),
         "huge number": (b"a\n" + b"9" * 10_000, "line 2 512"),
         "too long": (b"a\nb\n" + b"c" * 10_000 + b"\nd", "line 3 512"),
         "binary": (bytes(range(256)), "UTF-8"), "UTF-16": ('"a"'.encode("utf-16"), "UTF-8")}


@pytest.mark.parametrize("content, words", WRONG.values(), ids=WRONG)
def test_wrong_prompts_file(content, words, model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    result = command()(["--model", model, "--prompts", path, "--max-new-tokens", "2"])
    check_error(result, "prompts.jsonl", *words.split())


def test_empty_line_of_a_raw_file(model, tmp_path):
    (tmp_path / "prompts").write_bytes(b'a\n""\n')
    result = command()(["--model", model, "--prompts", tmp_path / "prompts", "--raw"])
    check_error(result, "line 2", "empty")


def test_system_text_of_a_raw_file(model, tmp_path):
    (tmp_path / "prompts").write_bytes(b'a\n{"prompt": "b", "system": "c"}\n')
    result = command()(["--model", model, "--prompts", tmp_path / "prompts", "--raw"])
    check_error(result, "line 2", "--raw")


def test_reference_is_judged_before_the_answer(model, tmp_path):
    result = command()(["--model", model, "a", "--picture", tmp_path / "x.html", "--reference", "\udcff"])
    check_error(result, "--reference", "half a character")
    assert not result.out


def test_template_that_refuses_one_line(tmp_path):
    """What a chat template does not allow is named with the line it does not allow."""
    files = build()
    files["tokenizer_config.json"]["chat_template"] = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + TEMPLATE)
    write(tmp_path / "model", files)
    (tmp_path / "prompts").write_bytes(b'a\n{"prompt": "b", "system": "c"}\n')
    result = command()(["--model", tmp_path / "model", "--prompts", tmp_path / "prompts"])
    check_error(result, "line 2", "no system")


def loop(path):
    os.symlink(path, path)


KINDS = {"folder": os.mkdir, "pipe": os.mkfifo, "loop": loop,
         "device": lambda path: os.symlink("/dev/zero", path)}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_prompts_file_is_no_file(make, model, tmp_path):
    make(tmp_path / "prompts")
    check_error(command()(["--model", model, "--prompts", tmp_path / "prompts"]), "prompts")


def test_prompts_file_without_a_name(model):
    check_error(command()(["--model", model, "--prompts", ""]), "regular file")


def answers(result):
    assert result.status == 0 and "generate.py:" not in result.err, result
    return re.split(r"^--- \d+ of \d+: .* ---$", result.out, flags=re.M)[1:]


def test_odd_prompts_file(model, tmp_path):
    """JSON allows U+2028 and U+0085 in a string, raw; lines end in \\n or \\r\\n, the last one
    perhaps in nothing; a byte-order mark is fine; and what is not JSON is a prompt as it is."""
    path = tmp_path / "prompts.jsonl"
    lines = ['"a\u2028b\u0085c"\r', "", '{"prompt": "d", "system": "s"}', "\u00a0 ", " hello there ",
             "5", '["a"]', "{{ braces }}", '"quoted" by someone', '"e"']
    path.write_bytes("\n".join(lines).encode("utf-8-sig"))
    found = answers(command()(["--model", model, "--prompts", path, "--max-new-tokens", "3"]))
    prompts = ["a\u2028b\u0085c", None, " hello there ", "5", '["a"]', "{{ braces }}",
               '"quoted" by someone', "e"]
    assert len(found) == len(prompts)
    for prompt, text in zip(prompts, found):
        given = [prompt] if prompt else ["d", "--system", "s"]
        alone = command()(["--model", model, *given, "--max-new-tokens", "3"])
        assert text.strip("\n") == alone.out.strip("\n"), prompt


def test_thousands_of_lines(model, tmp_path):
    """In bounded batches, with progress and figures that do not grow with each line."""
    path = tmp_path / "prompts"
    path.write_text("".join(f"number {i}\n" for i in range(2500)))
    arguments = ["--model", model, "--prompts", path, "--max-new-tokens", "1", "--raw"]
    result = command()(arguments, limit=120)
    assert len(answers(result)) == 2500
    lines = result.err.splitlines()
    assert sum(line.startswith("prompt ") for line in lines) == 2
    batches = [line for line in lines if line.startswith("batch ")]
    assert len(batches) == 79 and "32 prompts" in batches[0] and "4 prompts" in batches[-1]
    assert len(lines) < 100 and result.growth < 100, result.growth
