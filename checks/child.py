"""A stranger's program in a child process that can do no harm: `in_child(run)` is `run()`."""
import contextlib
import gc
import json
import os
import select
import signal
import time
import warnings
from pathlib import Path

from checks.files import show

SECONDS, MEMORY, LETTERS = 1.5, 256 << 20, 4 << 20      # what it may take: time, bytes, answer


def in_child(run):
    """The text that `run()` returns, in a fork with SECONDS to live, MEMORY more, and no files.

    Raises ValueError that says what is wrong. Without fork (Windows) it runs here, without limits.
    """
    kind, text = forked(run) if hasattr(os, "fork") else answer_of(run)
    if kind == "error":
        raise ValueError(text)
    return text


def answer_of(run):
    """("text", what run returns) or ("error", why not)."""
    try:
        text = run()
        text.encode()
    except MemoryError:
        return "error", f"it needs more than {MEMORY >> 20} MB"
    except Exception as error:
        name = "" if type(error) is ValueError else f"{type(error).__name__} "
        return "error", name + show(str(error), 240)
    if len(text) > LETTERS:
        return "error", f"its text is longer than {LETTERS} characters"
    return "text", text


def limit():
    """Limits for this process. What the system does not know, or has stricter, is passed over."""
    import resource
    gc.disable()
    memory = resource.RLIM_INFINITY
    if os.path.exists("/proc/self/statm"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + MEMORY
    for name, value in (("AS", memory), ("CPU", 2), ("CORE", 0), ("NOFILE", 0)):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def forked(run):
    """`answer_of(run)` from a child, which never outlives this call."""
    deadline, parent, pid, answer = time.monotonic() + SECONDS, os.getpid(), None, bytearray()
    read_end, write_end = os.pipe()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # of threads, in Python 3.12: it needs none
            pid = os.fork()
        if pid == 0:
            limit()
            words = json.dumps(answer_of(run), ensure_ascii=False).encode()
            while words:
                words = words[os.write(write_end, words):]
            os._exit(0)
        os.close(write_end)
        write_end, ready = None, select.poll()
        ready.register(read_end, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0 and ready.poll(left * 1000):
            if not (block := os.read(read_end, 1 << 20)):
                return tuple(json.loads(answer))
            answer += block
        return "error", f"it does not end within {SECONDS} seconds"
    except OSError as error:
        return "error", f"no process to run it in ({error.strerror})"
    except ValueError:                                  # no answer, or half of one
        return "error", "it crashed"
    finally:
        if os.getpid() != parent:                       # the child ends here, whatever happened
            os._exit(1)
        for end in (read_end, write_end):
            if end is not None:
                os.close(end)
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
