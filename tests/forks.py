"""`python ...` as a test types it, in 0.2 s instead of the 2 or 3 that importing torch takes: in a
fork of one process that has imported torch, and nothing of the project, so that a copy of it runs.

    run(["generate.py", "--slot-steps", 3])     -> subprocess.CompletedProcess, with texts
    Fork(["-m", "study", "--quick"])            a process as of subprocess.Popen, with pipes

For what happens before torch is imported, and for options of Python itself, a test starts a real one.
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


def run(arguments, cwd=ROOT, env=None, ignore=(), stdin="", timeout=300):
    """To its end. arguments: a file, or -m and a module, or -c and code, and what follows."""
    process = Fork(arguments, cwd, env, ignore)
    out, err = process.communicate(stdin, timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class Fork:
    """env: additions to the environment; None takes a name out. ignore: signals that whoever starts
    it has it ignore."""

    def __init__(self, arguments, cwd=ROOT, env=None, ignore=()):
        self.args, self.returncode = [str(each) for each in arguments], None
        ours, theirs = zip(*(os.pipe()[::way] for way in (-1, 1, 1, 1)))     # stdin is read there
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        environment = {name: value for name, value in environment.items() if value is not None}
        request = dict(arguments=self.args, cwd=str(cwd), ignore=list(ignore), environment=environment)
        channel = server()
        socket.send_fds(channel, [json.dumps(request).encode() + b"\n"], theirs)
        self.pid = int(channel.recv(20))
        for fd in theirs:
            os.close(fd)
        self.stdin = open(ours[0], "w")
        self.stdout, self.stderr, self.status = (open(fd, errors="replace") for fd in ours[1:])

    def poll(self):
        return self.wait(0, strict=False)

    def wait(self, timeout=None, strict=True):
        """-> its status, as subprocess has it; TimeoutExpired, or None where that is not strict."""
        if self.returncode is None and select.select([self.status], [], [], timeout)[0]:
            self.returncode = int(self.status.read())
        if self.returncode is None and strict:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, stdin="", timeout=None):
        """-> what it wrote to stdout and stderr from now on. It is killed when it takes too long."""
        texts = {}
        readers = [threading.Thread(target=lambda stream=stream: texts.update({stream: stream.read()}))
                   for stream in (self.stdout, self.stderr)]
        for reader in readers:
            reader.start()
        try:
            if not self.stdin.closed:
                with self.stdin:
                    self.stdin.write(stdin)
        except BrokenPipeError:                     # it reads nothing
            pass
        try:
            self.wait(timeout)
        finally:
            self.kill()
            for reader in readers:
                reader.join(timeout)
        return texts.get(self.stdout), texts.get(self.stderr)

    def send_signal(self, number):
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


# ---- the process behind it -----------------------------------------------------------------------

@functools.cache
def server():
    """-> a socket: a request and four descriptors in, a process id out."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                               stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait(10)))
    return ours


def serve(channel):
    import numpy  # noqa: F401  what most runs need
    import jinja2.sandbox  # noqa: F401
    import torch
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])             # imports 800 modules
    gc.freeze()                                     # a fork that looks for garbage would copy it all
    statuses = {}                                   # process id -> where its end is reported

    def report(*_):
        while statuses:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with contextlib.suppress(BrokenPipeError):      # nobody waits for it any more
                os.write(statuses[pid], str(os.waitstatus_to_exitcode(status)).encode())
            os.close(statuses.pop(pid))

    signal.signal(signal.SIGCHLD, report)
    while True:
        request, fds, *_ = socket.recv_fds(channel, 1 << 20, 4)
        while request and not request.endswith(b"\n"):
            request += channel.recv(1 << 20)
        if not request:
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])      # it may end at once
        pid = os.fork()
        if pid == 0:
            become(json.loads(request), fds)
        statuses[pid] = fds.pop()
        for fd in fds:
            os.close(fd)
        channel.send(str(pid).encode())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


def become(request, fds):
    """The process that was asked for; never returns."""
    for place, fd in enumerate(fds[:3]):
        os.dup2(fd, place)
    os.closerange(3, max(fds) + 100)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    for number in request["ignore"]:
        signal.signal(number, signal.SIG_IGN)
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
    sys.modules.pop("__mp_main__", None)            # this file, under the name that multiprocessing gives
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
