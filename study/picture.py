"""A picture of one prompt: what δ saw in it, what δ changed, where the answer turned.

    python generate.py --picture out.html

`Picture` looks on while the command fits δ and decodes, so the page shows what the command did.
The numbers go into the page as JSON; picture.html, beside this file, draws them.

Letters: n positions, d width, V vocabulary, K ways to change the logits (the first: not at all).
"""
import base64
import hashlib
import json
import re
import shlex
import sys
import time
import unicodedata
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import slot
from study.measure import unigram
from study.results import write_whole

STEPS = 20              # of a longer fit so many are shown
LIKELIEST = 5           # tokens kept at a position of an answer; at one of the prompt, 3
SHIFTED = 6             # tokens at either end of what δ changes
PIECE = 1 << 24         # logits at a time


class Picture:
    """Stands between generate.py and what it calls: `fit`, and `choose` for the plain answer before
    the fit and for the answer with δ after it."""

    def __init__(self, args, lm, tokenizer, template_ids, fit, choose):
        """template_ids: what the chat template makes of no prompt."""
        self.args, self.lm, self.tokenizer, self.template_ids = args, lm, tokenizer, template_ids
        self.given_fit, self.given_choose = fit, choose
        self.deltas, self.answers, self.words = [], [[]], {}

    def fit(self, hidden, tokens, lm_head, steps, lr):
        """The fit that was given. What its optimizer leaves after each step is δ after that step."""
        def keep(optimizer, *_):
            self.deltas.append(optimizer.param_groups[0]["params"][0].detach().clone())

        began, hook = time.perf_counter(), register_optimizer_step_post_hook(keep)
        try:
            delta, losses = self.given_fit(hidden, tokens, lm_head, steps, lr)
        finally:
            hook.remove()
        if not (self.deltas and torch.equal(self.deltas[-1], delta)):
            self.deltas = [delta]           # read from a file, or fitted in another way
        self.seconds, self.losses = time.perf_counter() - began, losses.tolist()
        self.hidden, self.tokens = hidden[0], list(tokens)
        self.answers.append([])
        return delta, losses

    def choose(self, logits):
        id = self.given_choose(logits)
        p = logits.softmax(-1)
        top = p.topk(LIKELIEST)
        self.answers[-1].append((id, p[id].item(), top.indices.tolist(), top.values.tolist()))
        return id

    @torch.no_grad()
    def data(self):
        """-> all that the page shows, ready for JSON."""
        head, tokens, args = self.lm.lm_head, self.tokens, self.args
        every = len(self.deltas)
        shown = min(STEPS, every)
        steps = sorted({round(place * every / shown) for place in range(shown + 1)})
        W_deltas = [head(self.deltas[step - 1].to(head.weight.dtype)).float().flatten()
                    for step in steps[1:]]
        control = unigram(tokens, like=W_deltas[-1])
        biases = torch.stack([torch.zeros_like(control), *W_deltas, control])           # (K, V)

        losses, means, ids, p = read(head, self.hidden[:-1], tokens[1:], biases)
        _, at_next, _, _ = read(head, self.hidden[-1:], tokens[:1], biases)
        unseen, count = None, 0
        if args.reference:
            room = self.lm.config.max_position_embeddings - len(tokens)
            reference = self.tokenizer.encode(args.reference)[:room]
            count, whole = len(reference), tokens + reference
            hidden = slot.prefill(self.lm, whole, 0)[0][0, len(tokens) - 1:-1]
            unseen = read(head, hidden, reference, biases)[0].mean(1).tolist()
        begin, end = own_part(tokens, self.template_ids)
        return dict(
            model=spell(str(args.model).encode("utf-8", "replace")),
            command=spell(shlex.join(sys.argv).encode("utf-8", "replace")),
            settings=f"δ from {args.delta}" if args.delta else
            f"{every} steps at rate {args.slot_lr:g}",
            seconds=self.seconds, reported=self.losses, steps=steps,
            delta=self.deltas[-1].norm().item(),
            hidden=self.hidden.float().norm(dim=-1).mean().item(),
            tokens=self.known(tokens), begin=begin, end=end,
            losses=losses[:-1].tolist(), ids=[self.known(each.tolist()) for each in ids[:-1]],
            p=p[:-1].tolist(), unseen=unseen, count=count, control=losses[-1].mean().item(),
            shifts=[[self.shift(table[0], table[k]) for k in (-2, -1)] for table in (means, at_next)],
            answers=[[[self.known(id), chosen, self.known(ids), ps]
                      for id, chosen, ids, ps in answer] for answer in self.answers])
