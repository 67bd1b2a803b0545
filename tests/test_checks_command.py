"""checks/command.py and checks/options.py: wrong options, signals and closed pipes at every moment,
files that cannot be read or written.

Whatever goes wrong, the last line on stderr says so, begins with "generate.py: ", and no traceback
comes before it. Status 0: done; 1: bad input; 2: bad options; 128 + n: ended by signal n.
"""
import argparse
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from checks.command import number, reason_of
from hostile import ROOT, build, check_line, command, write

GENERATE = [sys.executable, str(ROOT / "generate.py")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write(tmp_path_factory.mktemp("command") / "model", build())


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that never ends its answer and has room for 100,000 tokens."""
    files = build(max_position_embeddings=100_000, eos_token_id=None)
    files["generation_config.json"] = {}
    del files["tokenizer_config.json"]["eos_token"]
    return write(tmp_path_factory.mktemp("command") / "endless", files)


PROGRESS = ("model ", "prompt ", "slot ", "    ", "note ", "decode ")


def check_error(result, status, *words):
    *progress, line = result.err.split("\n")[:-1] or [""]
    assert result.status == status and line.startswith("generate.py: "), result
    check_line(line.removeprefix("generate.py: "), "")
    assert all(word in line for word in words), f"{words} not in: {line}"
    assert all(other.startswith(PROGRESS) for other in progress), result.err
    assert result.growth < 300, result


# ---- options -------------------------------------------------------------------------------------

NUMBERS = {"--slot-steps": ["-1", "1.5", "10001"], "--slot-lr": ["0", "-1", "1e38"],
           "--slot-memory": ["0", "-1", "1e20", "1e300"], "--max-new-tokens": ["0", "-1", "2.5"],
           "--temperature": ["-0.1"], "--top-k": ["-1", "0.5"], "--top-p": ["0", "1.1", "-1"],
           "--seed": ["-1", "1.5", str(2 ** 63)], "--problem": ["0", "301"]}
NO_NUMBERS = ["", "x", "nan", "inf", "-inf", "1e999", "0x10", "9" * 400, "9" * 5000, "1,5",
              "\x1b[2J", "é", "\udcff", "None"]
WRONG = [([option, value], option) for option, values in NUMBERS.items()
         for value in values + NO_NUMBERS] + [
    (["--dtype", "float8"], "--dtype"), (["--dtype", ""], "--dtype"),
    (["--nonsense"], "--nonsense"), (["--slot-steps"], "--slot-steps"), (["--top", "1"], "--top"),
    (["--prompt", "a"], "--prompt"), (["--prompts", "b", "a"], "--prompts"),
    (["--top-k", "5", "a"], "--temperature"), (["--top-p", "0.5", "a"], "--temperature"),
    (["--raw", "--system", "x", "a"], "--system"), (["--compare", "a", "b"], "--compare"),
    (["--compare", "--prompts", "a"], "--compare"),
    (["--save-delta", "x", "--slot-steps", "1", "a", "b"], "--save-delta"),
    (["--save-delta", "x", "a"], "--slot-steps"),
    (["--delta", "x", "--slot-steps", "1", "a"], "--slot-steps"),
    (["--delta", "x", "--slot-lr", "0.1", "a"], "--slot-lr"),
    (["-", "-"], "give - once"),
    (["--problem", "5", "a"], "--problem"), (["--problem", "5", "--prompts", "a"], "--problem"),
    (["--slot-file", "no-such-file.py"], "no such file"), (["--slot-file", "README.md"], "no Python file"), (["--slot-file", "."], "--slot-file"),
    (["--\ud800\n\x1b]0;x\x07" * 300], "unrecognized")]


@pytest.mark.parametrize("arguments, words", WRONG,
                         ids=[ascii(" ".join(arguments))[1:40] for arguments, _ in WRONG])
def test_wrong_options(arguments, words):
    check_error(command()(arguments), 2, words)


@pytest.mark.parametrize("kind, low, high, above, good, bad", [
    (int, 0, 5, False, ["0", "5", " 3", "+2", "1_0" * 0 or "4"], ["6", "-1", "2.0", "1e0"]),
    (float, 0, 1, True, ["1", "1e-300", ".5"], ["0", "0.0", "-0.0", "1e-400", "1.0000001"]),
    (float, 0, math.inf, False, ["0", "1e308", "-0.0"], ["-1e-300", "nan", "inf", "1e309"])])
def test_number(kind, low, high, above, good, bad):
    parse = number(kind, low, high, above)
    for text in good:
        assert parse(text) == kind(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


EXTREMES = [["--temperature", "1e-46"], ["--temperature", "1e-300"], ["--temperature", "1e300"],
            ["--temperature", "1", "--top-p", "1e-46"],
            ["--temperature", "1e-46", "--top-p", "1e-46", "--top-k", "1"],
            ["--temperature", "1e-46", "--top-k", "9" * 30],
            ["--slot-steps", "2", "--slot-fast", "--slot-memory", "1e-300"],
            ["--slot-steps", "2", "--slot-fast", "--slot-memory", str(1 << 20)],
            ["--slot-steps", "2", "--slot-lr", "1e-300"],
            ["--temperature", "1", "--seed", str(2 ** 62)]]


@pytest.mark.parametrize("arguments", EXTREMES, ids=" ".join)
@pytest.mark.parametrize("prompts", [["hello"], ["hello", "hello there"]], ids=["one", "two"])
def test_extreme_options_work(arguments, prompts, model):
    """What is accepted works. A temperature of nearly nothing, or a top-p, takes the likeliest."""
    arguments = ["--model", model, *prompts, "--max-new-tokens", "4", *arguments]
    result = command()(arguments)
    assert result.status == 0 and "generate.py:" not in result.err, result
    if "1e-46" in arguments or "1e-300" in arguments:
        greedy = command()(["--model", model, *prompts, "--max-new-tokens", "4"])
        assert result.out == greedy.out


@pytest.mark.parametrize("fast", [[], ["--slot-fast"]], ids=["loop", "fast"])
@pytest.mark.parametrize("rate", ["1e6", "1e5"])
def test_a_rate_too_high(rate, fast, model):
    """Done, or one line: never numbers that are none."""
    result = command()(["--model", model, "hello", "--slot-steps", "3", "--slot-lr", rate, *fast,
                        "--dtype", "float16", "--max-new-tokens", "2"])
    if result.status:
        check_error(result, 1, "--slot-lr" if "--slot-lr" in result.err else "lr")
    assert "nan" not in result.err.lower() and "inf" not in result.err.lower(), result


DEVICES = ["cuda", "cuda:7", "mps", "xpu", "meta", "nonsense", "", "cpu:x", "cuda:-1",
           "cuda:" + "9" * 30, "\n", "\udcff", "vulkan"]


@pytest.mark.parametrize("device", DEVICES, ids=ascii)
def test_device_not_available(device, model):
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device in there and there[device]():
        pytest.skip("it is available here")
    arguments = ["--model", model, "a", "--device", device, "--max-new-tokens", "2"]
    check_error(command()(arguments), 1, "--device")


NO_MODELS = ["", ".", "/", "/dev/null", "no/such/folder", "a" * 5000, "a/" * 3000, "\udcff", "\n",
             "../../etc/passwd", "/proc/self/mem", "not-in/the-cache", "-",
             "http://example.org/model", "a b/c"]


@pytest.mark.parametrize("name", NO_MODELS, ids=lambda name: ascii(name)[1:30])
def test_wrong_model(name, tmp_path):
    result = command()([f"--model={name}", "a"], cwd=tmp_path, HF_HOME=str(tmp_path / "hf"))
    check_error(result, 1)


def test_help():
    result = command()(["--help"])
    assert result.status == 0 and "--slot-steps" in result.out and not result.err


# ---- reasons -------------------------------------------------------------------------------------

def test_reasons():
    """What torch says of memory becomes a figure; a full disk names the file; any other
    RuntimeError is ours and shows as it is."""
    lack = ("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 343597383680 bytes. Error code 12 (Cannot allocate)")
    assert reason_of(RuntimeError(lack)) == "out of memory: 320.00 GiB more were needed at once"
    assert reason_of(MemoryError()) == "out of memory: no more to be had"
    assert reason_of(RuntimeError("shapes differ")) is None
    assert reason_of(OSError(28, "No space left on device", "x/y")) \
        == "x/y: No space left on device"
    assert reason_of(OSError(28, "No space left on device")) \
        == "standard output or a file: No space left on device"
    assert "x/y" in reason_of(PermissionError(13, "Permission denied", "x/y"))
    assert reason_of(ValueError("the prompt is empty")) == "the prompt is empty"
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 48)
    assert reason_of(caught.value) == "out of memory: 1,048,576.00 GiB more were needed at once"


@pytest.mark.parametrize("target", ["pipe", "loop", "no/such/folder/x", ".", "", "a-file/below"])
def test_delta_cannot_be_saved(target, model, tmp_path):
    """The line names the file and comes before the work. What is there stays: a rename would take
    the place of a pipe or, for the superuser, of /dev/null."""
    (tmp_path / "a-file").write_bytes(b"mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    before = {path: path.lstat() for path in tmp_path.rglob("*")}
    arguments = ["--model", model, "a", "--slot-steps", "1", "--save-delta", target]
    result = command()(arguments, cwd=tmp_path)
    check_error(result, 1, target)
    assert result.err.count("\n") == 1
    assert {path: path.lstat() for path in tmp_path.rglob("*")} == before


# ---- signals and closed pipes: in a process of their own -----------------------------------------

def start(*arguments, **options):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen([*GENERATE, *map(str, arguments)], env=ENVIRONMENT,
                            **streams | options)


def bits(process, field):
    """A set of signals in /proc/PID/status."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1], 16)


def listens(process, number=signal.SIGTERM):
    """Waits until the process has its answer to a signal. Earlier it is Python starting, and there
    is nothing of ours to test."""
    for _ in range(4000):
        if bits(process, "SigCgt") >> number - 1 & 1:
            return
        time.sleep(0.005)
    raise AssertionError("never listened")


def check_end(process, number):
    out, err = process.communicate(timeout=60)
    assert process.returncode in (128 + number, -number), (process.returncode, err)
    quiet(err.decode())
    out.decode()                                        # nothing half-written


def quiet(err):
    assert all(line.startswith(PROGRESS) for line in err.splitlines()), err


@pytest.mark.parametrize("number, delay", [(signal.SIGINT, 0), (signal.SIGTERM, 0.4)])
def test_signal_while_importing(number, delay, model):
    process = start("--model", model, "a")
    listens(process)
    time.sleep(delay)
    process.send_signal(number)
    check_end(process, number)


def test_signal_while_decoding(endless):
    """Ctrl-C, and an impatient second one while the first is being dealt with."""
    process = start("--model", endless, "a", "--max-new-tokens", "90000")
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    check_end(process, signal.SIGINT)


@pytest.mark.parametrize("ignored, other", [
    ([signal.SIGHUP, signal.SIGINT], signal.SIGTERM), ([signal.SIGTERM], signal.SIGHUP)])
def test_ignored_signals_stay_ignored(ignored, other, model):
    """nohup, and `command &` in a script: sent while it imports, while it decodes, and it goes on
    to the end."""
    before = [signal.signal(number, signal.SIG_IGN) for number in ignored]
    try:
        process = start("--model", model, "a", "--max-new-tokens", "400")
    finally:
        for number, answer in zip(ignored, before):
            signal.signal(number, answer)
    listens(process, other)
    for number in ignored:
        process.send_signal(number)
    process.stdout.read(1)
    for number in ignored:
        process.send_signal(number)
        assert bits(process, "SigIgn") >> number - 1 & 1
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (process.returncode, err)
    quiet(err.decode())


def test_reader_goes_away(endless):
    """The end of the reader is the end of the command, without a complaint."""
    line = (f"{' '.join(GENERATE)} --model {endless} --max-new-tokens 90000 a | head -c 1; "
            "echo ${PIPESTATUS[0]} >&2")
    run = subprocess.run(line, shell=True, executable="/bin/bash", capture_output=True, text=True,
                         timeout=60, env=ENVIRONMENT, errors="replace")
    *figures, status = run.stderr.splitlines()
    assert status in ("0", "141") and len(run.stdout) == 1, run
    quiet("\n".join(figures))


def test_disk_full(model):
    with open("/dev/full", "wb") as full:
        run = subprocess.run([*GENERATE, "--model", model, "a", "--max-new-tokens", "5"],
                             stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
                             env=ENVIRONMENT, stdin=subprocess.DEVNULL)
    *figures, line = run.stderr.splitlines()
    assert run.returncode == 1
    assert line == "generate.py: standard output or a file: No space left on device"
    quiet("\n".join(figures))


# ---- and in forks --------------------------------------------------------------------------------

def test_signals_at_random_moments(endless):
    """Starting, loading, forking for the template, prefill, SLOT, decoding: signals in the first
    half second of a run (from 5 ms on: before, this test's own fork may still be clearing them).

    One that came while Python forked was lost, with a traceback from `logging`; one that came while
    the handlers were set as well."""
    draw = random.Random(0)
    ways = [["--max-new-tokens", "90000"], ["--slot-steps", "10000"],
            ["--slot-steps", "10000", "--slot-fast"]]
    for i in range(60):
        number = draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        delay = 0.005 + draw.choice([0.02, 0.1, 0.1, 0.4]) * draw.random()
        extra = draw.choice(ways)
        result = command()(["--model", endless, "a", *extra], interrupt=(number, delay))
        assert result.status in (128 + number, -number), (i, delay, extra, result)
        quiet(result.err)


@pytest.mark.parametrize("way", ["raise ValueError('lost on the way')", "pass"])
def test_a_signal_counts_whatever_it_becomes(way):
    """Code that catches everything, or a finaliser, where Python can raise nothing."""
    code = f"""
        import os, signal, sys, time
        from checks.command import run
        class Finaliser:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
        def main(args):
            if {way!r} == "pass":
                Finaliser()
                time.sleep(1)
                print("not reached")
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            except BaseException:
                {way}
        run(main, None)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, timeout=60,
                          capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM and not done.stdout + done.stderr, done


STANDARD = [({1: "/dev/full"}, 1, "space"), ({2: "/dev/full"}, 1, None),
            ({1: "/dev/full", 2: "/dev/full"}, 1, None), ({1: "|"}, 0, ""), ({2: "|"}, 0, None),
            ({1: "|", 2: "|"}, 0, None), ({1: None}, 0, ""), ({2: None}, 0, None),
            ({1: None, 2: None}, 0, None), ({0: None}, 0, "")]


@pytest.mark.parametrize("standard, status, words", STANDARD, ids=str)
def test_standard_files_unusable(standard, status, words, model):
    """A full disk, a reader that went away, a closed descriptor: no traceback, a line if something
    could not be written, figures never in the text."""
    prompt = "-" if 0 in standard else "a"
    result = command()(["--model", model, prompt, "--max-new-tokens", "5"], standard=standard)
    assert result.status == status and "Traceback" not in result.err, result
    lines = result.out.splitlines()
    assert not any(line.startswith(("model ", "prompt ")) for line in lines), "figures in the text"
    if words:
        check_error(result, status, words)
    elif words is not None:
        quiet(result.err)
