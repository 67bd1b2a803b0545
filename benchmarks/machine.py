"""What this machine is, how fast it reads and multiplies, how long a call takes, how much memory.

Every limit comes from two rates, measured in the same run as what they are held against:
    read      bytes/s of the fastest way that torch has to read more than the caches hold
    multiply  FLOP/s of a large matrix product in a dtype, by the fastest way of speed/linear.py
Work is a list of phases (bytes, FLOP): a phase takes as long as the longer of the two.
"""
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

import torch

from load_weights import DTYPES
from speed.linear import WAYS


def describe():
    """-> {what: text}, the header of every report."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS", "SLOT_PRODUCTS")
    given = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    models.append(platform.machine())
    return {"machine": f"{platform.system()}, {models[0]}, {os.cpu_count()} logical cores",
            "capability": " ".join([torch.backends.cpu.get_cpu_capability(), *given]),
            "threads": str(torch.get_num_threads()),
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}"}


def timed(call, at_least=0.1):
    """Seconds of one call: as often as fits into at_least seconds, and their mean."""
    began, count, spent = time.perf_counter(), 0, 0
    while count == 0 or spent < at_least:
        call()
        count += 1
        spent = time.perf_counter() - began
    return spent / count


def working(ways, x, matrices):
    """-> those of the ways to x Wᵀ that this machine's torch has, each called once with every W."""
    found = []
    for way in ways:
        with suppress(RuntimeError, AttributeError):
            for W in matrices:
                way(x, W, None)
            found.append(way)
    return found


class Rates:
    """Both rates, anew with every round. The best round is the limit: neighbours only take away."""

    def __init__(self, dtypes):
        self.memory, self.reads = torch.ones(1 << 26), []
        self.products = {dtype: [] for dtype in dtypes}

    def measure(self):
        matrix = self.memory.view(-1, 2048)
        seconds = min(timed(self.memory.sum), timed(lambda: torch.mv(matrix, matrix[0])))
        self.reads.append(self.memory.nbytes / seconds)
        for dtype, rates in self.products.items():
            x, W = (torch.randn(rows, 2048).to(DTYPES[dtype]) for rows in (1024, 2048))
            seconds = min(timed(lambda: way(x, W, None)) for way in working(WAYS[x.dtype], x, [W]))
            rates.append(2 * 1024 * 2048 * 2048 / seconds)

    def limit(self, phases, dtype):
        """phases: (bytes, FLOP), one after the other -> seconds that they take at least."""
        read, multiply = max(self.reads), max(self.products[dtype])
        return sum(max(size / read, flops / multiply) for size, flops in phases)

    def __str__(self):
        rates = {"read, GB/s": self.reads}
        rates |= {f"{dtype}, GFLOP/s": each for dtype, each in self.products.items()}
        return "; ".join(f"{what} {min(each) / 1e9:.1f} - {max(each) / 1e9:.1f}"
                         for what, each in rates.items())


def memory_of(call):
    """-> MiB that a call adds at its peak, by Linux's /proc. In a process of its own: what was
    freed before and kept by the allocator would hide some."""
    def status(key):
        text = Path("/proc/self/status").read_text()
        return int(text.split(f"{key}:")[1].split()[0]) / 1024

    Path("/proc/self/clear_refs").write_text("5")       # the peak begins anew
    before = status("VmRSS")
    call()
    return status("VmHWM") - before
