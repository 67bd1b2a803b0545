"""One rank of a model in parts: answers what test_speed_parallel.py asks, and writes it to a file.

    RANK=0 WORLD_SIZE=2 ... python tests/parallel_worker.py OUT FOLDER FOLDER ...
"""
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

import slot
import speed.batch
import speed.delta
from generate import sampler
from speed import parallel, parallel_delta, ranks

STEPS, LR, NEW = 3, 0.1, 3


def prompts_of(config):
    """Three prompts of different lengths, so that a batch of them is padded."""
    draw = torch.Generator().manual_seed(config.vocab_size)
    return [torch.randint(config.vocab_size, (length,), generator=draw).tolist() for length in (11, 6, 17)]


def answers(lm, fast):
    """All that a model says, as tensors and lists of ids: one function for one process and for many."""
    prompts = prompts_of(lm.config)
    tokens, found = prompts[0], {}
    hidden, _ = slot.prefill(lm, tokens, 0)
    found["hidden"], found["logits"] = hidden, lm.lm_head(hidden)
    for name, optimize in (("loop", slot.optimize_delta), ("fast", fast), ("blocks", partial(fast, memory=5000))):
        found[f"delta {name}"], found[f"losses {name}"] = optimize(hidden, tokens, lm.lm_head, STEPS, LR)
    found["ids plain"] = list(slot.generate(lm, tokens, NEW))
    found["ids slot"] = list(slot.generate(lm, tokens, NEW, STEPS, LR))
    batch = list(speed.batch.generate_batch(lm, prompts, NEW, STEPS, LR))
    found["ids batch"] = [list(column) for column in zip(*batch)]
    found["ids drawn"] = list(slot.generate(lm, tokens, NEW, choose=sampler(temperature=2.0, seed=3)))
    return found


def main():
    out, *folders = sys.argv[1:]
    ranks.start("cpu")
    rank, found = dist.get_rank(), {}
    for folder in folders:
        torch.manual_seed(rank)                 # nothing may come from torch's own generator
        lm, words = parallel.load_model(folder, dtype="float32")
        found[folder] = answers(lm, parallel_delta.optimize_delta_fast)
        found[folder]["words"] = words
        found[folder]["rows"] = {name: len(weight) for name, weight in lm.named_parameters()}
        found[folder]["rows"]["lm_head.weight"] = len(lm.lm_head.weight)
        found[folder]["heads in cache"] = lm.config.num_key_value_heads
    found["half"] = half_precision(folders[0])
    found["beyond"] = beyond_the_range(folders[0], rank)
    torch.save(found, Path(out) / f"{rank}.pt")


def half_precision(folder):
    """In bfloat16: the two forms of SLOT."""
    lm, _ = parallel.load_model(folder, dtype="bfloat16")
    tokens = prompts_of(lm.config)[0]
    hidden, _ = slot.prefill(lm, tokens, 0)
    return [optimize(hidden, tokens, lm.lm_head, STEPS, LR)
            for optimize in (slot.optimize_delta, parallel_delta.optimize_delta_fast)]


def beyond_the_range(folder, rank):
    """W δ leaves the numbers of float16 on the last rank only, δ itself does not -> what each says."""
    lm, _ = parallel.load_model(folder, dtype="float16")
    if rank == dist.get_world_size() - 1:
        lm.lm_head.weight.mul_(1000)
    tokens = prompts_of(lm.config)[0]
    hidden, _ = slot.prefill(lm, tokens, 0)
    try:
        parallel_delta.optimize_delta_fast(hidden, tokens, lm.lm_head, 1, 100.0)
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    main()
