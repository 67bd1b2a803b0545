"""
generate.py as a command: wrong options and odd prompts, signals and closed pipes at every moment, files that cannot be read.

Whatever goes wrong, the last line on stderr says so, begins with "generate.py: ", and no traceback comes before it. Status 0: done; 1: bad
input; 2: bad options; 128 + n: ended by signal n.
"""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hostile import ROOT, build, command, write

GENERATE = [sys.executable, str(ROOT / "generate.py")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cli") / "model", build())


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that never ends its answer and has room for 100,000 tokens."""
    files = build(max_position_embeddings=100_000, eos_token_id=None)
    files["generation_config.json"] = {}
    del files["tokenizer_config.json"]["eos_token"]
    return write(tmp_path_factory.mktemp("cli") / "endless", files)


def check_error(result, status, *words):
    *progress, line = result.err.split("\n")[:-1] or [""]
    assert result.status == status and line.startswith("generate.py: "), result
    line = line.removeprefix("generate.py: ")
    assert 0 < len(line) <= 400 and line.isprintable(), repr(line)
    assert all(word in line for word in words), f"{words} not in: {line}"
    assert all(other.startswith(("model ", "prompt ", "slot ", "    ", "note ")) for other in progress), result.err
    assert result.seconds < 10 and result.growth < 300, result


# ---- options -------------------------------------------------------------------------------------------------------------------

NUMBERS = {"--slot-steps": ["-1", "1.5", "10001"], "--slot-lr": ["0", "-1"], "--slot-memory": ["0", "-1"], "--max-new-tokens": ["0", "-1", "2.5"],
           "--temperature": ["-0.1"], "--top-k": ["-1", "0.5"], "--top-p": ["0", "1.1", "-1"], "--seed": ["-1", "1.5", str(2 ** 63)]}
NO_NUMBERS = ["", "x", "nan", "inf", "-inf", "1e999", "0x10", "9" * 400, "9" * 5000, "1,5", "\x1b[2J", "é", "\udcff", "None"]
WRONG = [([option, value], [option]) for option, values in NUMBERS.items() for value in values + NO_NUMBERS] + [
    (["--dtype", "float8"], ["--dtype"]), (["--dtype", ""], ["--dtype"]), (["--nonsense"], ["--nonsense"]), (["stray"], ["stray"]),
    (["--slot-steps"], ["--slot-steps"]), (["--top", "1"], ["--top"]), (["--prompt", "a", "--prompts", "b"], ["--prompt", "--prompts"]),
    (["--raw", "--system", "x", "--prompt", "a"], ["--system"]), (["--compare", "--prompt", "a", "--prompt", "b"], ["--compare"]),
    (["\ud800\n\x1b]0;x\x07" * 300], ["unrecognized"])]


@pytest.mark.parametrize("arguments, words", WRONG, ids=[ascii(" ".join(arguments))[1:40] for arguments, _ in WRONG])
def test_wrong_options(arguments, words):
    check_error(command()(arguments), 2, *words)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "xpu", "meta", "nonsense", "", "cpu:x", "cuda:-1", "cuda:" + "9" * 30, "\n", "\udcff", "vulkan"])
def test_device_not_available(device, folder):
    import torch
    if device == "cuda" and torch.cuda.is_available() or device == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is available here")
    check_error(command()(["--model", folder, "--prompt", "a", "--device", device, "--max-new-tokens", "2"]), 1, "--device")


@pytest.mark.parametrize("model", ["", ".", "/", "/dev/null", "no/such/folder", "a" * 5000, "a/" * 3000, "\udcff", "\n", "../../etc/passwd", "/proc/self/mem",
                                   "not-in/the-cache", "-", "http://example.org/model", "a b/c"])
def test_wrong_model(model, tmp_path):
    check_error(command()([f"--model={model}", "--prompt", "a"], cwd=tmp_path, HF_HOME=str(tmp_path / "hf")), 1)


def test_out_of_positions_and_memory(folder, tmp_path):
    check_error(command()(["--model", folder, "--prompt", "a", "--max-new-tokens", "100000"]), 1, "512", "--max-new-tokens")
    huge = write(tmp_path / "huge", build(max_position_embeddings=1 << 30))
    check_error(command()(["--model", huge, "--prompt", "a", "--max-new-tokens", str((1 << 30) - 100)]), 1, "memory")


def test_help():
    result = command()(["--help"])
    assert result.status == 0 and "--slot-steps" in result.out and not result.err


# ---- prompts -------------------------------------------------------------------------------------------------------------------

TEXTS = {"é": "é", "two lines": "a\nb\r\n", "control": "\x01\x1b[2J\x7f", "special": "<|im_end|>\n<|im_start|>system", "half special": "<|im_", "spaces": " " * 200,
         "emoji": "\U0001F468\u200d\U0001F469", "noncharacters": "\ufffe\uffff\U0010ffff", "private": "\ue000\uf8ff", "combining": "e\u0301" * 50,
         "right to left": "\u202eabc", "braces": "{{ 9**9**9 }}{% raw %}", "empty": "", "percent": "%s %d {0}", "dash": "-"}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_prompt(text, folder):
    """Any Unicode text is a prompt, given as an option, on standard input, or in a file."""
    arguments = ["--model", folder, "--max-new-tokens", "2"]
    results = [command()([*arguments, "--prompt", "-"], text.encode())] + [command()([*arguments, f"--prompt={text}"])] * (text != "-")
    for result in results:
        assert result.status == 0 and "generate.py:" not in result.err, result
    assert len({result.out for result in results}) == 1


def test_prompt_with_nul(folder):
    result = command()(["--model", folder, "--prompt", "-", "--max-new-tokens", "2"], b"a\0b")
    assert result.status == 0, result


def test_prompt_empty_and_raw(folder):
    check_error(command()(["--model", folder, "--prompt", "", "--raw"]), 1, "empty")


@pytest.mark.parametrize("bytes", [b"\xff", b"caf\xe9", b"\xed\xa0\x80", b"a\xf0\x9f"], ids=ascii)
def test_prompt_not_utf8(bytes, folder):
    for raw in ([], ["--raw"]):
        check_error(command()(["--model", folder, "--prompt", "-", *raw], bytes), 1, "UTF-8")
        check_error(command()(["--model", folder, f"--prompt={os.fsdecode(bytes)}", *raw]), 1)
    check_error(command()(["--model", folder, "--prompt", "a", f"--system={os.fsdecode(bytes)}"]), 1)


@pytest.mark.parametrize("text", ["a" * 1_000_000, "word " * 200_000, " " * 1_000_000, "<|im_end|>" * 100_000, "\U0001F600" * 250_000, "1" * 1_000_000,
                                  "<|im_" * 200_000, "\n" * 1_000_000, "a" + "\u0301\u0316" * 250_000], ids=lambda text: ascii(text[:10]))
def test_prompt_of_a_megabyte(text, folder):
    for raw in ([], ["--raw"]):
        check_error(command()(["--model", folder, "--prompt", "-", *raw], text.encode()), 1)


PROMPTS = {"missing": None, "empty": b"", "blank": b"\n \n", "not JSON": b"hello\n", "a number": b"5\n", "a list": b'["a"]\n', "no prompt": b'{"text": "a"}\n',
           "prompt not text": b'{"prompt": 5}\n', "system not text": b'{"prompt": "a", "system": 5}\n', "not UTF-8": b'"\xff"\n', "second line cut": b'"a"\n{"prompt":',
           "half a character": b'"\\ud800"\n', "nested": b"[" * 100_000, "huge number": b"9" * 10_000, "binary": bytes(range(256)), "UTF-16": '"a"'.encode("utf-16")}


@pytest.mark.parametrize("content", PROMPTS.values(), ids=PROMPTS)
def test_wrong_prompts_file(content, folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    check_error(command()(["--model", folder, "--prompts", path, "--max-new-tokens", "2"]), 1)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda p: os.symlink("/dev/zero", p), lambda p: os.symlink(p, p)], ids=["folder", "pipe", "device", "loop"])
def test_prompts_file_is_no_file(make, folder, tmp_path):
    make(tmp_path / "prompts")
    check_error(command()(["--model", folder, "--prompts", tmp_path / "prompts"]), 1, "prompts")


def test_odd_prompts_file(folder, tmp_path):
    """JSON allows U+2028 and U+0085 in a string, raw; lines end in \\n or \\r\\n, the last one perhaps in nothing."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('"a\u2028b\u0085c"\r\n\n{"prompt": "d", "system": "s", "more": [1]}\n"e"'.encode())
    result = command()(["--model", folder, "--prompts", path, "--max-new-tokens", "2"])
    assert result.status == 0 and "--- 3 ---" in result.out, result


# ---- signals and closed pipes: in a process of their own ---------------------------------------------------------------------------

def start(*arguments, **options):
    return subprocess.Popen([*GENERATE, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                            env=ENVIRONMENT, **options)


def listens(process):
    """Waits until the process has its answer to SIGTERM. Earlier it is Python starting, and there is nothing of ours to test."""
    for _ in range(4000):
        caught = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) >> signal.SIGTERM - 1 & 1:
            return
        time.sleep(0.005)
    raise AssertionError("never listened")


def check_end(process, number):
    out, err = process.communicate(timeout=60)
    assert process.returncode in (128 + number, -number), (process.returncode, err)
    quiet(err.decode())
    out.decode()                                                    # nothing half-written


def quiet(err):
    assert all(line.startswith(("model ", "prompt ", "slot ", "  ", "decode ")) for line in err.splitlines()), err


@pytest.mark.parametrize("number, delay", [(signal.SIGINT, 0), (signal.SIGTERM, 0.4)])
def test_signal_while_importing(number, delay, folder):
    process = start("--model", folder, "--prompt", "a")
    listens(process)
    time.sleep(delay)
    process.send_signal(number)
    check_end(process, number)


def test_signal_while_decoding(endless):
    """Ctrl-C, and an impatient second one while the first is being dealt with."""
    process = start("--model", endless, "--prompt", "a", "--max-new-tokens", "90000")
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    check_end(process, signal.SIGINT)


def test_reader_goes_away(endless):
    """The end of the reader is the end of the command, without a complaint."""
    run = subprocess.run(f"{' '.join(GENERATE)} --model {endless} --prompt a --max-new-tokens 90000 | head -c 1; echo ${{PIPESTATUS[0]}} >&2", shell=True,
                         executable="/bin/bash", capture_output=True, text=True, timeout=60, env=ENVIRONMENT, errors="replace")
    *figures, status = run.stderr.splitlines()
    assert status in ("0", "141") and len(run.stdout) == 1, run
    quiet("\n".join(figures))


def test_disk_full(folder):
    run = subprocess.run([*GENERATE, "--model", folder, "--prompt", "a", "--max-new-tokens", "5"], stdout=open("/dev/full", "wb"), stderr=subprocess.PIPE,
                         text=True, timeout=60, env=ENVIRONMENT)
    *figures, line = run.stderr.splitlines()
    assert run.returncode == 1 and line.startswith("generate.py: ") and "space" in line, run
    quiet("\n".join(figures))


@pytest.mark.parametrize("out", ["a-file", "a-file/below", "/proc/nothing"])
def test_results_cannot_be_written(out, folder, tmp_path):
    """evaluate.py --out: refused before anything is computed, and what lay there is left as it was."""
    (tmp_path / "a-file").write_bytes(b"mine")
    run = subprocess.run([sys.executable, ROOT / "evaluate.py", "--model", folder, "--limit", "2", "--steps", "0", "--out", out], cwd=tmp_path, timeout=60,
                         capture_output=True, text=True, env=ENVIRONMENT)
    *figures, line = run.stderr.splitlines()
    assert run.returncode == 1 and line.startswith("evaluate.py: ") and out in line and "Traceback" not in run.stderr, run
    assert (tmp_path / "a-file").read_bytes() == b"mine"


# ---- and in forks ----------------------------------------------------------------------------------------------------------------

def test_signals_at_random_moments(endless):
    """Starting, loading, forking for the template, prefill, SLOT, decoding: signals in the first half second of a run
    (from 5 ms on: before that this test's own fork may still be clearing them).

    One that came while Python forked was lost, with a traceback from `logging`; one that came while the handlers were set as well."""
    draw = random.Random(0)
    for i in range(100):
        number, delay = draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]), 0.005 + draw.choice([0.02, 0.1, 0.1, 0.4]) * draw.random()
        extra = draw.choice([["--max-new-tokens", "90000"], ["--slot-steps", "10000"], ["--slot-steps", "10000", "--no-slot-fast"]])
        result = command()(["--model", endless, "--prompt", "a", *extra], interrupt=(number, delay))
        assert result.status in (128 + number, -number), (i, delay, extra, result)
        quiet(result.err)


@pytest.mark.parametrize("standard, status, words", [
    ({1: "/dev/full"}, 1, "space"), ({2: "/dev/full"}, 1, None), ({1: "/dev/full", 2: "/dev/full"}, 1, None), ({1: "|"}, 0, ""), ({2: "|"}, 0, None),
    ({1: "|", 2: "|"}, 0, None), ({1: None}, 0, ""), ({2: None}, 0, None), ({1: None, 2: None}, 0, None), ({0: None}, 0, "")],
    ids=str)
def test_standard_files_unusable(standard, status, words, folder):
    """A full disk, a reader that went away, a closed descriptor: no traceback, a line if something could not be written, figures never in
    the text."""
    result = command()(["--model", folder, "--prompt", "-" if 0 in standard else "a", "--max-new-tokens", "5"], standard=standard)
    assert result.status == status and "Traceback" not in result.err, result
    assert not any(line.startswith(("model ", "prompt ")) for line in result.out.splitlines()), "figures in the text"
    if words:
        check_error(result, status, words)
    elif words is not None:
        quiet(result.err)
