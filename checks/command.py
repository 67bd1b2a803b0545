"""What the commands share: options checked as they are parsed, one line for every error, a clean
end on every signal.

A command's file calls `early_signals()` before it imports torch, which takes a second; the rest
runs under `run(main, args)`.
"""
import argparse
import errno
import math
import os
import re
import signal
import sys
import time
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]

# torch asks Linux for memory in pages of 2 MB if this is set before it allocates: to get pages of
# 4 KB takes longer than to fill them, and SLOT's (T, V) tensors come and go.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
ROOT = Path(__file__).resolve().parent.parent


class Parser(argparse.ArgumentParser):
    def __init__(self, **more):
        super().__init__(allow_abbrev=False, **more)    # --prompt would be --prompts, a file
        try:
            os.getcwd()                                 # torch's MKL ends the process without it
        except OSError:
            fail("the working folder is gone; change to one that is there")

    def error(self, message):
        fail(f"{message} (see --help)", status=2)       # one line instead of the whole usage


def fail(message, status=1):
    """One printable line on stderr, whatever the message holds, and the end.
    Status 1: bad input; 2: bad options."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(message).split()))
    file = Path(sys.argv[0])
    command = file.name
    file = file / "__main__.py" if file.is_dir() else file      # python study
    if (file.parent / "__init__.py").exists():                  # a part of a package, or all of it
        command = f"python -m {file.parent.name}.{file.stem}".removesuffix(".__main__")
    out, rank = sys.stderr, os.environ.get("RANK", "0")
    if rank != "0":                     # of many processes, which say nothing but this
        early_signals()                 # where all fail alike, the first ends the others meanwhile
        time.sleep(2)
        out, line = sys.__stderr__ or out, f"rank {rank}: {line}"
    line = f"{command}: {line}"
    out.write((line if len(line) <= 400 else line[:397] + "...") + "\n")
    raise SystemExit(status)


def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or float in [low, high], or in (low, high] if `above`.
    NaN and infinity are no numbers here."""
    def parse(text):
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):             # also 400 digits, which no float can hold
            value, finite = math.nan, False
        if not finite or not low <= value <= high or (above and value == low):
            what = "an integer" if kind is int else "a number"
            least = "above" if above else "of at least"
            most = f" and at most {high:,.15g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} is not {what} {least} {low:,.15g}{most}")
        return value
    return parse


def check_speed(parser, args):
    """What speed/ alone can do, asked for where it has been taken away."""
    if (args.slot_fast or "RANK" in os.environ) and not find_spec("speed"):
        parser.error("--slot-fast and torchrun need speed/, and there is none; without them the "
                     "numbers are the same")


def early_signals():
    """While modules load: Python's own answer is a traceback."""
    answer_signals(lambda number, frame: os._exit(128 + number))


def answer_signals(answer):
    """What whoever started us has told us to ignore stays ignored: nohup."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, answer)


def run(main, args):
    """main(args), and the end of the process: status 0, 1 after a line that says why, 128 + n
    after signal n."""
    arrived = []

    def stop(number, frame):
        arrived.append(number)
        raise KeyboardInterrupt(number)

    def swallowed(what, usual=sys.unraisablehook):
        if arrived:                                     # came where nothing can be raised: os.fork
            os._exit(128 + arrived[0])
        usual(what)

    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:                  # whoever started us has closed it
            setattr(sys, name, open(os.devnull, mode))
    sys.stdout.reconfigure(errors="replace")            # a terminal that knows no emoji shows "?"
    sys.unraisablehook = swallowed
    warnings.showwarning = lambda message, *_: print(f"note      {message}", file=sys.stderr)
    status = 0
    try:
        try:
            answer_signals(stop)
            main(args)
            sys.stdout.flush()
        except BaseException:
            if arrived:                                 # whatever it has become on its way up
                raise KeyboardInterrupt from None
            raise
    except KeyboardInterrupt:
        early_signals()
        status = 128 + (arrived[0] if arrived else signal.SIGINT)
    except BrokenPipeError:                             # `| head` has read enough
        pass
    except SystemExit as end:
        status = end.code or 0
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        reason = reason_of(error)
        if reason is None or not on_purpose(error):
            raise
        try:
            fail(reason)
        except (SystemExit, BrokenPipeError):
            status = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        pass
    os._exit(status)                                    # no more complaints about a closed pipe


def on_purpose(error):
    """Whether a ValueError was raised by a line of this project, or of the reader's --slot-file,
    that says so: any other is a defect, most often in a loop that somebody tries."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = ROOT in Path(last.filename).resolve().parents and "site-packages" not in last.filename
    slot = getattr(sys.modules.get("slot"), "__file__", None)
    said = (ours or last.filename == slot) and (last.line or "raise").startswith("raise")
    return said or not isinstance(error, ValueError)


def reason_of(error):
    """Why a command cannot go on, in words; None for a defect of ours, which shows as it is."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or 'standard output or a file'}: {error.strerror}"
    # torch reports a lack of memory as a RuntimeError, among others.
    lack = re.search("out of memory|not enough memory|alloc", text, re.IGNORECASE)
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and lack:
        wanted = re.search(r"allocate (\d+) bytes", text)
        if wanted:
            text = f"{int(wanted[1]) / 2**30:,.2f} GiB more were needed at once"
        return f"out of memory: {text or 'no more to be had'}"
    return None if isinstance(error, RuntimeError) else text
