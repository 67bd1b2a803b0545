"""How much memory is free, and what would not fit into it."""
import math
import os
import re
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")         # what a container may use stands here


def free_memory(device):
    """-> bytes; infinite where nothing tells."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    free = math.inf
    if os.path.exists("/proc/meminfo"):
        text = Path("/proc/meminfo").read_text()
        free = int(re.search(r"MemAvailable: *(\d+)", text)[1]) << 10
    limit = CGROUP / "memory.max"
    limit = limit.read_text().strip() if limit.exists() else "max"
    if limit != "max":
        cached = re.search(r"inactive_file (\d+)", (CGROUP / "memory.stat").read_text())[1]
        used = int((CGROUP / "memory.current").read_text()) - int(cached)
        free = min(free, int(limit) - used)
    return free


def check_memory(length, vocabulary, device, slot_file=None):
    """Does the readable loop of SLOT fit, slot.py's or that of a reader's slot_file? It holds some
    four tensors of length × vocabulary in float32."""
    need, free = 4 * 4 * length * vocabulary, free_memory(device)
    if need > free:
        way_out = ("shorten the prompt" if slot_file else
                   "--slot-fast gives the same numbers within --slot-memory")
        raise ValueError(f"SLOT's readable loop needs {need / 2**30:.1f} GiB for {length} tokens "
                         f"and {free / 2**30:.1f} are free; {way_out}")
