"""One model in one dtype: its stages, how long each takes, and what each must do at least.

Letters: T tokens, n predicted tokens of a prompt, d width, V vocabulary, b bytes of a weight, P and
W the numbers of parameters in the layers and in the head.
"""
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.machine import timed
from load_weights import load_model
from slot import generate, optimize_delta, prefill
from speed import linear
from speed.batch import generate_batch
from speed.delta import optimize_delta_fast

PROMPT, STEPS, LR = 200, 5, 0.01    # of SLOT: tokens of the prompt, steps of a call
ROWS = 32                           # prompts of the batch
PATIENCE = 600                      # seconds that a call of the published loop may take


def published_loop(hidden, tokens, lm_head, steps, lr):
    """SLOT as its authors' code runs it: all logits again in every step, autograd through the head,
    δ in the model's dtype, and, the head being a parameter, a gradient of W that nobody uses."""
    W = lm_head.weight.detach().requires_grad_(True)                        # (V, d)
    targets = torch.tensor(tokens[1:])
    delta = torch.zeros(1, 1, hidden.shape[-1], dtype=hidden.dtype, requires_grad=True)
    optimizer = torch.optim.AdamW([delta], lr=lr, eps=1e-5, weight_decay=1e-8)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = F.linear(hidden + delta, W)                                # (1, T, V)
        F.cross_entropy(logits[0, :-1], targets).backward()
        optimizer.step()
    return delta.detach(), None


FORMS = {"published loop": published_loop, "readable loop": optimize_delta,
         "closed form": optimize_delta_fast}
MORE = {"published loop": 1, "readable loop": 10, "closed form": 25}    # steps of the other call


def warm_up():
    """The first optimiser of a process imports 800 modules: not a cost of the method."""
    head = torch.nn.Linear(2, 3, bias=False)
    for form in FORMS.values():
        form(torch.ones(1, 3, 2), [0, 1, 2], head, 2, LR)


class Subject:
    """The model, the tokens that it gets, and {row: [seconds of every round]}."""

    def __init__(self, folder, dtype, new):
        self.folder, self.dtype, self.new = Path(folder).resolve(), dtype, new
        self.title = f"{self.folder.name}, {dtype}"
        self.load()
        self.threads = torch.get_num_threads()
        self.bytes = self.lm.lm_head.weight.itemsize
        self.size = sum(parameter.numel() for parameter in self.lm.parameters())
        self.seconds, self.peers, self.notes, self.ids, self.round = {}, {}, [], {}, 0
        config, draw = self.lm.config, torch.Generator().manual_seed(0)
        most = min(config.max_position_embeddings, 2048)
        self.tokens = torch.randint(0, config.vocab_size, (most,), generator=draw).tolist()
        self.lengths = [T for T in (16, 160, 1024) if T + new <= most]
        self.prompt = self.tokens[:min(PROMPT, most - new)]
        self.batch = [self.tokens[i:i + 16 + i % 17] for i in range(ROWS)]
        self.hidden, _ = prefill(self.lm, self.prompt, 1)

        # 16 bits that the processor has to emulate make the published loop take minutes.
        self.forms, piece = dict(FORMS), (self.hidden[:, :8], self.prompt[:8], self.lm.lm_head)
        spent = timed(lambda: published_loop(*piece, 1, LR)) * len(self.prompt) / 8 * STEPS
        if spent > PATIENCE:
            del self.forms["published loop"]
            self.notes.append(f"published loop: left out, it may take {spent:,.0f} s")

    def measure(self):
        """One round: yields (row, seconds)."""
        torch.set_num_threads(self.threads)
        call = lambda: (self.load(), next(generate(self.lm, [0], 1)))
        yield "load, to the first token", timed(call)
        for T in self.lengths:
            yield f"prefill {T}", timed(lambda: prefill(self.lm, self.tokens[:T], self.new))
            for name, peer in self.peers.items():
                reply = peer.ask(do="prefill", tokens=self.tokens[:T])
                yield f"prefill {T}, {name}", reply["seconds"]
        yield from self.decoding()
        yield from self.fitting()
        call = lambda: list(generate_batch(self.lm, self.batch, self.new))
        yield f"{ROWS} prompts together", timed(call) / ROWS / self.new
        for name, peer in self.peers.items():
            if name == "transformers":
                reply = peer.ask(do="batch", prompts=self.batch, new=self.new)
                yield f"{ROWS} prompts together, {name}", reply["seconds"] / ROWS / self.new
            yield f"load, to the first token, {name}", peer.ask(do="load")["seconds"]
        self.round += 1

    def load(self):
        self.lm = None                              # as with the peers: the one before goes first
        self.lm = load_model(self.folder, dtype=self.dtype)
        self.products = linear.use(self.lm)

    def decoding(self):
        decoders = {"": self.answer}
        for name, peer in self.peers.items():
            decoders[f", {name}"] = partial(peer.ask, do="answer", tokens=self.prompt, new=self.new)
        for suffix in sorted(decoders, reverse=self.round % 2):         # in turns
            reply = decoders[suffix]()
            self.ids[suffix.removeprefix(", ")] = reply["ids"]
            yield f"first token after {len(self.prompt)}{suffix}", reply["first"]
            yield f"decode{suffix}", reply["rest"] / (self.new - 1)

    def answer(self):
        began, stamps, ids = time.perf_counter(), [], []
        for id in generate(self.lm, self.prompt, self.new):
            stamps.append(time.perf_counter())
            ids.append(id)
        return {"first": stamps[0] - began, "rest": stamps[-1] - stamps[0], "ids": ids}

    def fitting(self):
        for name, form in self.forms.items():
            given = self.hidden, self.prompt, self.lm.lm_head
            calls = {STEPS: [], MORE[name]: []}
            for steps, spent in calls.items():
                while len(spent) < 3 and sum(spent) < 2:        # their difference is noisy
                    spent.append(timed(lambda: form(*given, steps, LR)))
            call, more = calls.values()
            yield f"SLOT {STEPS} steps, {name}", median(call)
            yield f"SLOT a step, {name}", (min(more) - min(call)) / (MORE[name] - STEPS)

    def work(self):
        """-> {row: phases (bytes, FLOP)} that it must do at least; peers have the same work."""
        c, b, n = self.lm.config, self.bytes, len(self.prompt)
        P = sum(p.numel() for p in self.lm.model.layers.parameters())
        W = self.lm.lm_head.weight.numel()
        on_disk = sum(file.stat().st_size for file in Path(self.folder).glob("*.safetensors"))
        changed = 0 if b * self.size <= on_disk else 2 * b * (P + W)        # written, read
        seen = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * b     # by one token
        heads = c.num_attention_heads * c.head_dim * c.num_hidden_layers

        def token(rows, T):
            return b * (P + W) + rows * T * seen, 2 * rows * (P + W)

        work = {f"prefill {T}": [(b * P, 2 * P * T + 2 * T * T * heads)] for T in self.lengths}
        work["load, to the first token"] = [(on_disk + changed, 0)]
        work[f"first token after {n}"] = [(b * P, 2 * P * n + 2 * n * n * heads), (b * W, 2 * W)]
        work["decode"] = [token(1, n + self.new // 2)]
        length = sum(map(len, self.batch)) // ROWS
        size, flops = token(ROWS, length + self.new // 2)
        prompt = 0, 2 * P * length / self.new       # its prefill, shared by its new tokens
        work[f"{ROWS} prompts together"] = [prompt, (size / ROWS, flops / ROWS)]
        step = (2 * b * W + 8 * n * c.vocab_size, 0)            # W twice, E (n, V) twice
        for name in FORMS:
            first, each = [(b * W, 2 * n * W)], step
            if name == "published loop":
                first, each = [], (3 * b * W, 6 * n * W)
            work[f"SLOT {STEPS} steps, {name}"] = first + STEPS * [each]
            work[f"SLOT a step, {name}"] = [each]
        return work
