"""What the commands share: options checked as they are parsed, one line for every error, a clean end on every signal.

A command's file calls `early_signals()` and parses its options before it imports torch, which takes a second: so --help, wrong
options and Ctrl-C answer at once. The rest runs under `run(main, args)`.
"""
import argparse
import math
import os
import signal
import sys
import warnings
from pathlib import Path


# To get memory from Linux in pages of 4 KB takes longer than to fill it, and SLOT's (n, V) tensors come and go. torch asks for
# pages of 2 MB if this is set before it allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (see --help)", status=2)               # one line instead of the whole usage


def fail(message, status=1):
    """One printable line on stderr, whatever the message holds, and the end. Status 1: bad input; 2: bad options."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(message).split()))
    line = f"{Path(sys.argv[0]).name}: {line}"
    sys.stderr.write((line if len(line) <= 400 else line[:397] + "...") + "\n")
    raise SystemExit(status)


def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or float in [low, high], or in (low, high] if `above`. NaN and infinity are no numbers here."""
    def parse(text):
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):                     # also 400 digits, which no float can hold
            value, finite = math.nan, False
        if not finite or not low <= value <= high or (above and value == low):
            what = "an integer" if kind is int else "a number"
            limit = f" and at most {high:,}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {what} {'above' if above else 'of at least'} {low:,}{limit}")
        return value
    return parse


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def early_signals():
    for number in SIGNALS:                                      # Python's own answer while modules load is a traceback
        signal.signal(number, lambda number, frame: os._exit(128 + number))


def run(main, args):
    """main(args), and the end of the process: status 0, 1 after a line that says why, 128 + n after signal n."""
    arrived = []

    def stop(number, frame):
        arrived.append(number)
        raise KeyboardInterrupt(number)

    def swallowed(what, usual=sys.unraisablehook):
        if arrived:                                             # came where nothing can be raised, as inside os.fork
            os._exit(128 + arrived[0])
        usual(what)

    sys.stdin, sys.stdout, sys.stderr = (                       # None if whoever started us has closed it
        stream or open(os.devnull, mode) for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w")))
    sys.stdout.reconfigure(errors="replace")                    # a terminal that knows no emoji shows "?"
    sys.unraisablehook = swallowed
    warnings.showwarning = lambda message, *_: print(f"note      {message}", file=sys.stderr)
    status = 0
    try:
        try:
            for number in SIGNALS:
                signal.signal(number, stop)
            main(args)
            sys.stdout.flush()
        except BaseException:
            if arrived:                                         # whatever the signal has become on its way up
                raise KeyboardInterrupt from None
            raise
    except KeyboardInterrupt:
        early_signals()
        status = 128 + (arrived[0] if arrived else 2)
    except BrokenPipeError:                                     # `| head` has read enough
        pass
    except SystemExit as end:
        status = end.code or 0
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        # torch reports a lack of memory as a RuntimeError among others; any other of those is a defect of ours: show it all
        if isinstance(error, RuntimeError) and not any(s in str(error).lower() for s in ("memory", "alloc")):
            raise
        try:
            fail(error if not isinstance(error, (MemoryError, RuntimeError)) else f"out of memory: {error or 'no more to be had'}")
        except (SystemExit, BrokenPipeError):
            status = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        pass
    os._exit(status)                                            # no second complaint about a closed pipe at shutdown
