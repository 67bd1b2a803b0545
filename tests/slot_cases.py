"""What the tests of SLOT share: the recorded runs of the authors' loop, random cases, the method in
float64."""
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from load_weights import load_model
from slot import optimize_delta

try:
    from speed.delta import optimize_delta_fast
except ImportError:
    optimize_delta_fast = None

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = Path(__file__).resolve().parents[2] / "shared/data/slot_reference"
MODELS = sorted(path.stem.removeprefix("slot_") for path in GOLDEN.glob("slot_*.npz"))
FAMILIES = ["llama31", "qwen2", "qwen3_tied_yarn"]

no_speed = pytest.mark.skipif(optimize_delta_fast is None, reason="there is no speed/")
both_forms = pytest.mark.parametrize("optimize", [
    pytest.param(optimize_delta, id="loop"),
    pytest.param(optimize_delta_fast, id="closed_form", marks=no_speed)])


@functools.cache
def load(folder):
    return load_model(folder, dtype="float32")


@functools.cache
def golden_prompt(name):
    """-> (2, T) ids."""
    return torch.from_numpy(np.load(GOLDEN / name / "golden.npz")["prompt"])


@functools.cache
def golden_runs(name):
    """-> ten runs of the authors' loop: steps, lr, row of the prompt, delta, losses, new tokens."""
    values = np.load(GOLDEN / f"slot_{name}.npz")
    keys = "steps", "lr", "row", "delta", "losses", "new"
    return [{key: values[f"{key}{k}"] for key in keys} for k in range(values["runs"])]


@torch.no_grad()
def hidden_of(lm, tokens):
    return lm.model(torch.tensor([tokens]))


@torch.no_grad()
def greedy(lm, tokens, delta, new_tokens):
    """The answer with h + δ, without a cache: written out here so that slot.decode is not its own judge."""
    ids = list(tokens)
    for _ in range(new_tokens):
        hidden = hidden_of(lm, ids)[:, -1:]
        ids.append(lm.lm_head(hidden + delta).argmax().item())
    return ids[len(tokens):]


class Head(nn.Linear):
    """A random output head of width d over V tokens, frozen."""

    def __init__(self, d, V, scale=1.0, seed=0):
        super().__init__(d, V, bias=False)
        draw = torch.Generator().manual_seed(seed)
        self.weight.data = torch.randn(V, d, generator=draw) * scale / d ** 0.5
        self.requires_grad_(False)


def random_case(n, V, d, scale=1.0, seed=0):
    """-> hidden (1, n, d), a list of n ids, a head."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, n, d, generator=draw)
    return hidden, torch.randint(0, V, (n,), generator=draw).tolist(), Head(d, V, scale, seed + 1)


def float64_loss(hidden, tokens, head, delta):
    """Equation (2) in float64, as it stands. delta (d,)."""
    logits = (hidden[0, :-1].double() + delta) @ head.weight.double().T
    return F.cross_entropy(logits, torch.tensor(tokens[1:]))


def float64_delta(hidden, tokens, head, steps, lr):
    """The method in float64 by autograd: what both forms approximate. -> δ (d,), losses (steps + 1,)."""
    delta = torch.zeros(hidden.shape[-1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([delta], lr=lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=1e-8)
    losses = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = float64_loss(hidden, tokens, head, delta)
        losses.append(loss.detach())
        if len(losses) <= steps:
            loss.backward()
            optimizer.step()
    return delta.detach(), torch.stack(losses)


def largest(difference):
    return difference.abs().max().item()
