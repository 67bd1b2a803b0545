"""`python ...` as a test types it, in 0.2 s instead of the 2 or 3 that importing torch takes: in a
fork of one process that has imported torch, and nothing of the project, so that a copy of it runs.

    run(["generate.py", "--slot-steps", 3])     -> subprocess.CompletedProcess, with texts
    Fork(["-m", "study", "--quick"])            a process as of subprocess.Popen, with pipes
    ranks(2, ["generate.py", ...])              the processes that torchrun would start

A test starts a real process for what happens before torch is imported, for what Python reads as it
starts (its options, PYTHON... in the environment), for memory, and for how an interpreter ends.
"""
import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def run(arguments, cwd=ROOT, env=None, stdin="", timeout=300):
    """To its end. arguments: a file, or -m and a module, or -c and code, and what follows."""
    process = Fork(arguments, cwd, env)
    out, err = process.communicate(stdin, timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class Fork:
    """env: additions to the environment; None takes a name out."""

    def __init__(self, arguments, cwd=ROOT, env=None):
        self.args, self.returncode = [str(each) for each in arguments], None
        environment = {**os.environ, **(env or {})}
        environment = {name: value for name, value in environment.items() if value is not None}
        request = dict(arguments=self.args, cwd=str(cwd), environment=environment)
        ours, theirs = zip(*(os.pipe()[::way] for way in (-1, 1, 1, 1)))     # stdin is read there
        self.pid = ask(request, theirs)
        for fd in theirs:
            os.close(fd)
        self.stdin = open(ours[0], "w")
        self.stdout, self.stderr, self.status = (open(fd, errors="replace") for fd in ours[1:])

    def poll(self):
        return self.wait(0, strict=False)

    def wait(self, timeout=None, strict=True):
        """-> its status, as subprocess has it; TimeoutExpired, or None where that is not strict."""
        if self.returncode is None and select.select([self.status], [], [], timeout)[0]:
            self.returncode = int(self.status.read() or -signal.SIGKILL)    # else the server is gone
        if self.returncode is None and strict:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, stdin="", timeout=None):
        """-> what it, and all that it has started, writes to stdout and stderr from now on. It is
        killed when it takes too long."""
        texts = {}
        readers = [threading.Thread(target=lambda stream=stream: texts.update({stream: stream.read()}),
                                    daemon=True) for stream in (self.stdout, self.stderr)]
        for reader in readers:
            reader.start()
        with contextlib.suppress(BrokenPipeError):                  # it may read nothing
            if not self.stdin.closed:
                with self.stdin:
                    self.stdin.write(stdin)
        try:
            self.wait(timeout)
        finally:
            self.kill()
        for reader in readers:
            reader.join(timeout)
        if len(texts) < 2:
            raise subprocess.TimeoutExpired(self.args, timeout)     # one that it started lives on
        return texts[self.stdout], texts[self.stderr]

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            if self.poll() is None:
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def ranks(count, arguments, new=Fork):
    """The processes that torchrun would start, without torchrun."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [new(arguments, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)]


def end(processes, seconds=200):
    """-> [(status, stdout, stderr)] of every process; none outlives the test."""
    try:
        found = [process.communicate(timeout=seconds) for process in processes]
        return [(process.returncode, *texts) for process, texts in zip(processes, found)]
    finally:
        for process in processes:
            process.kill()


# ---- the process behind it -----------------------------------------------------------------------

@functools.cache
def server():
    """-> a socket: a request and four descriptors in, a process id out."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())],
                               pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait(10)))
    return ours


def ask(request, fds):
    """-> the id of a new process."""
    try:
        socket.send_fds(server(), [json.dumps(request).encode() + b"\n"], fds)
        return int(server().recv(20))
    except BaseException:               # its answer may come later, and must not be the next one's
        server.cache_clear()
        raise


def serve(channel):
    import numpy  # noqa: F401  what most runs need
    import jinja2.sandbox  # noqa: F401
    import torch
    torch.optim.AdamW([torch.zeros(1)])             # imports 800 modules
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is for who started the tests
    gc.freeze()                                     # a fork that looks for garbage would copy it all
    running = {}                                    # pidfd: (process id, where to report its end)
    while True:
        for ready in select.select([channel, *running], [], [])[0]:
            if ready is not channel:
                pid, report = running.pop(ready)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(BrokenPipeError):          # nobody waits for it any more
                    os.write(report, str(status).encode())
                os.close(report), os.close(ready)
                continue
            request, fds, *_ = socket.recv_fds(channel, 1 << 20, 4)
            while request and not request.endswith(b"\n"):
                request += channel.recv(1 << 20)
            if not request:
                return
            pid = os.fork()
            if pid == 0:
                become(json.loads(request), fds)
            running[os.pidfd_open(pid)] = pid, fds.pop()
            for fd in fds:
                os.close(fd)
            channel.send(str(pid).encode())


def become(request, fds):
    """The process that was asked for; never returns."""
    for place, fd in enumerate(fds[:3]):
        os.dup2(fd, place)
    os.closerange(3, max(fds) + 100)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in os.environ
    status = 0
    try:
        os.chdir(request["cwd"])
        start(*request["arguments"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def start(first, *others):
    sys.modules.pop("__mp_main__", None)            # this file, as multiprocessing calls it
    if first == "-m":
        sys.argv, sys.path[0] = list(others), os.getcwd()
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0] = ["-c", *others[1:]], ""
        sys.modules["__main__"] = ModuleType("__main__")
        exec(others[0], sys.modules["__main__"].__dict__)
    else:
        sys.argv, sys.path[0] = [first, *others], os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
