"""What this machine is, how fast it reads memory and multiplies matrices, how long a call takes and how much memory it needs.

Every limit that benchmark.py prints comes from two rates, measured in the same run as what they are held against:
    read      bytes/s of the fastest way that torch has to read much more memory than the caches hold
    multiply  FLOP/s of a large matrix product in a dtype, by linear.py, in the fastest of torch's ways that we found
Work is a list of phases (bytes, FLOP). A phase takes as long as the longer of the two; phases come one after another.
"""
import os
import platform
import time

import torch

from linear import NATIVE_GEMM, product

EMULATION = ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"]


def describe():
    """-> the header, {what: text}"""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    emulated = [f"{name}={os.environ[name]}" for name in EMULATION if name in os.environ]
    return {
        "machine": f"{platform.system()} {platform.machine()}, {model}, {os.cpu_count()} logical cores",
        "capability": f"{torch.backends.cpu.get_cpu_capability()}; matrix products in hardware: "
                      + ", ".join(f"{str(dtype)[6:]} {'yes' if native else 'no'}" for dtype, native in NATIVE_GEMM.items())
                      + (f"; EMULATED with {' '.join(emulated)}" if emulated else ""),
        "threads": f"{torch.get_num_threads()}" + (" (OMP_NUM_THREADS)" if "OMP_NUM_THREADS" in os.environ else ""),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }


def timed(f, at_least=0.1):
    """Seconds of one call of f: as often as fits into at_least seconds, and their mean."""
    began, count = time.perf_counter(), 0
    while True:
        f()
        count += 1
        spent = time.perf_counter() - began
        if spent >= at_least:
            return spent / count


class Rates:
    """The two rates, measured anew with every round. The best of all rounds is the limit: neighbours only take away."""
    def __init__(self, dtypes, size=1 << 28):
        self.memory = torch.ones(size // 4)
        self.factors = {dtype: (torch.randn(1024, 2048).to(dtype), torch.randn(2048, 2048).to(dtype))
                        for dtype in {torch.float32, *(d for d in dtypes if NATIVE_GEMM.get(d))}}
        self.reads, self.products = [], {dtype: [] for dtype in self.factors}

    def measure(self):
        row, matrix = self.memory[:2048], self.memory.view(-1, 2048)
        seconds = min(timed(self.memory.sum), timed(lambda: torch.mv(matrix, row)))
        self.reads.append(4 * len(self.memory) / seconds)
        for dtype, (a, b) in self.factors.items():
            self.products[dtype].append(2 * 1024 * 2048 * 2048 / timed(lambda: product(a, b)))

    @property
    def read(self):
        return max(self.reads)

    def multiply(self, dtype):
        """16-bit weights on a CPU without such products can still be multiplied as float32."""
        return max(max(self.products[d]) for d in {dtype, torch.float32} & self.products.keys())

    def limit(self, phases, dtype):
        """-> seconds that the work takes at least."""
        return sum(max(size / self.read, flops / self.multiply(dtype)) for size, flops in phases)

    def as_dict(self):
        return {"read": self.reads, "multiply": {str(dtype)[6:]: rates for dtype, rates in self.products.items()}}

    def text(self):
        products = ", ".join(f"{str(d)[6:]} {spread(rates, 1e9, 'GFLOP/s')}" for d, rates in self.products.items())
        return f"read {spread(self.reads, 1e9, 'GB/s')}; multiply {products} (least - most of the rounds)"


def spread(values, scale, unit):
    return f"{min(values) / scale:.1f} - {max(values) / scale:.1f} {unit}"


def memory_of(f):
    """-> (MiB that f adds at its peak to what is resident before it, MiB of private memory afterwards), from Linux's /proc.
    Call it in a process of its own: memory that was freed before and kept by the allocator would hide what f takes."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                                                 # the peak begins anew
    before = status("VmRSS")
    f()
    return status("VmHWM") - before, status("RssAnon")


def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) / 1024
