"""One thread for every test and every process that a test starts: the models are tiny, and threads
that wait for each other on a busy machine cost more than they bring."""
import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTEST_ADDOPTS", None)          # meant for this run, not for those that tests start
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# A suite in the background ignores these two, and so would all that its tests start.
for number in (getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


class Hang(BaseException):
    """Not an Exception: nothing may catch it on its way."""


def hang(*_):
    raise Hang


@pytest.fixture
def alarm():
    """A test that asks for it has two minutes. What strangers write must never make us wait."""
    previous = signal.signal(signal.SIGALRM, hang)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def folder(tmp_path, alarm):
    """Where a test puts its model folder; see hostile.py. Nothing in it may ever run."""
    from hostile import CANARY
    yield tmp_path / "model"
    assert not CANARY.exists(), "something in the folder was executed"


@pytest.fixture
def without_a_child(monkeypatch):
    """For thousands of prompts of our own templates: a fork for each takes most of the time."""
    monkeypatch.delattr("os.fork", raising=False)
