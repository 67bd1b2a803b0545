"""What the ranks of one model say to each other. torchrun starts them: N processes, each with
RANK, WORLD_SIZE and LOCAL_RANK in its environment; torch.distributed carries the numbers, by NCCL
between GPUs, by gloo between CPUs. How they share one model: parallel.py.
"""
import os
import sys
import traceback
from datetime import timedelta

import torch.distributed as dist

from checks.ranks import check_ranks

TIMEOUT = timedelta(minutes=10)     # a rank that is silent for so long is taken for dead


def start(device, ranks=None):
    """Join the ranks of one model -> this rank's device, how many ranks, and which model: 0, 1, ...

    ranks: so many form a model (default: all); the next as many form another, which knows nothing
    of the first. Only the first rank of each prints. ValueError if the numbers do not fit.
    """
    check_ranks(os.environ, device, ranks)
    place, world, local = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    ranks = ranks or world
    model, own = divmod(place, ranks)
    store, _, _ = together(next, dist.rendezvous("env://", timeout=TIMEOUT))
    together(dist.init_process_group, store=dist.PrefixStore(f"model {model}", store), rank=own,
             world_size=ranks, timeout=TIMEOUT)
    if own > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")         # errors know sys.__stderr__
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
    return f"cuda:{local}" if device == "cuda" else device, ranks, model


def size():
    """How many ranks form the model: 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Which of them this one is."""
    return dist.get_rank() if size() > 1 else 0


def together(operation, *arguments, **more):
    """Whatever needs the other ranks. ConnectionError, one line, if one of them is gone."""
    try:
        return operation(*arguments, **more)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split("] ", 1)[-1][:60]
        raise ConnectionError(f"another rank has ended or does not answer ({reason}); see what it "
                              "says, then start all of them again") from None


def total(x, **operation):
    """x becomes its sum over all ranks -> x, with the same bits on each. op=...: or the maximum."""
    together(dist.all_reduce, x, **operation)
    return x


def first(make):
    """What make() returns on rank 0, on every rank: standard input has one reader."""
    box = [make() if rank() == 0 else None]
    if size() > 1:
        together(dist.broadcast_object_list, box)
    return box[0]
