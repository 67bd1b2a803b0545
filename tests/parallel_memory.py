"""What one rank needs of memory while it loads its part of a model and answers with SLOT: one line of JSON, in bytes.

    torchrun --nproc-per-node 2 tests/parallel_memory.py FOLDER [tokens of the prompt]

VmHWM is the most that was ever resident, pages of mapped files included; RssAnon leaves those out (Linux may drop
them whenever it likes).
"""
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import slot
from speed import parallel, parallel_delta, ranks


def memory(*keys):
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
    return [int(found[key]) << 10 for key in keys]


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def main():
    folder, length = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 24
    ranks.start("cpu")
    torch.optim.AdamW([torch.zeros(1)])                     # imports 800 modules
    reset_peak()
    before, = memory("VmRSS")
    began = time.perf_counter()
    lm, words = parallel.load_model(folder)
    found = {"rank": int(os.environ["RANK"]), "load_s": time.perf_counter() - began, "words": words}
    found["part"] = sum(weight.nbytes for weight in lm.parameters())
    if lm.config.tie_word_embeddings:
        found["part"] -= lm.lm_head.weight.nbytes           # rows of the embedding
    found["peak_load"], found["after"] = (bytes - before for bytes in memory("VmHWM", "VmRSS"))
    found["anon"] = memory("RssAnon")[0]
    reset_peak()
    tokens = torch.arange(length).tolist()
    for name, optimize in (("loop", slot.optimize_delta), ("fast", parallel_delta.optimize_delta_fast)):
        began = time.perf_counter()
        hidden, cache = slot.prefill(lm, tokens, 4)
        delta, losses = optimize(hidden, tokens, lm.lm_head, 3, 0.01)
        ids = list(slot.decode(lm, hidden, cache, 4, delta))
        found |= {f"{name}_s": time.perf_counter() - began, f"{name}_losses": losses.tolist(), f"{name}_ids": ids}
        found[f"{name}_peak"] = memory("VmHWM")[0] - before
    ranks.together(torch.distributed.barrier)
    print(json.dumps(found), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
