r"""A picture of one prompt: what δ saw in it, what it changed, where the answer turned. `Picture`
looks on while generate.py fits δ and decodes; picture.html, beside this file, draws it. README's:

    python generate.py --model smollm2 --picture out.html \
        "Rewrite politely: Send me the report now." \
        --reference "Could you please send me the report now?"
"""
import json
import os
import time
from pathlib import Path

import torch

import slot
from checks.files import whole_file
from study.measure import Text, steered, unigram


def common(a, b):
    """How many tokens two lists begin with in common."""
    count = 0
    for x, y in zip(a, b):
        if x != y:
            break
        count += 1
    return count


class Picture:
    def __init__(self, args, lm, tokenizer, template_ids, fit, draw):
        """fit, draw: what generate.py would call. template_ids: of an empty prompt."""
        self.args, self.lm, self.tokenizer, self.template_ids = args, lm, tokenizer, template_ids
        self.given_fit, self.given_draw, self.deltas, self.answers = fit, draw, [], []

    def fit(self, hidden, tokens, *others):
        """The fit that was given; what it multiplies by W, if it is like δ, is δ by step."""
        began, seen = time.perf_counter(), []
        with self.lm.lm_head.register_forward_pre_hook(
                lambda head, given: seen.append(given[0].detach().float().clone())):
            delta, losses = self.given_fit(hidden, tokens, *others)
        self.hidden, self.tokens, self.seconds = hidden[0], tokens, time.perf_counter() - began
        seen = [each.view_as(delta) for each in seen if each.numel() == delta.numel()]
        seen = seen[len(tokens) == 2:]                      # of two tokens h is like δ, and first
        self.deltas = [each for each in seen if each.any()][:-1] + [delta]      # without δ = 0
        return delta, losses

    def draw(self):
        """The choice of tokens that was given; keeps what there was to choose from."""
        given, seen = self.given_draw(), []
        self.answers.append(seen)

        def choose(logits):
            id, p = given(logits), logits.softmax(-1)
            seen.append([self.word(id), p[id].item(), self.likeliest(*p.topk(5))])
            return id
        return choose

    def word(self, id):
        """A token, harmless: ⟨U+202E⟩ for a character that has no shape, ⟨E2⟩ for a lone byte."""
        text = self.tokenizer.bytes_of(id).decode("utf-8", "surrogateescape") or f"⟨{id}⟩"
        return "".join(c if c.isprintable() or c == "\n" else
                       f"⟨U+{ord(c):04X}⟩".replace("U+DC", "") for c in text)

    def likeliest(self, p, ids):
        return [[self.word(id), each] for each, id in zip(p.tolist(), ids.tolist())]

    def read(self, hidden, came, biases, answer=False):
        """hidden (n, d) before tokens (n,), biases (K, V) -> losses, three likeliest: [K][n]."""
        losses, tops = [[] for _ in biases], [[] for _ in biases]
        for Wh, h, counts, x in Text(self.lm.lm_head, hidden, came, answer).logits():
            for k, bias in enumerate(biases):
                log_p = steered(Wh, bias, h, counts).log_softmax(-1)
                losses[k] += (-log_p.gather(1, x[:, None])[:, 0]).tolist()
                tops[k] += map(self.likeliest, *log_p.exp_().topk(3))   # log_p has become p
        return losses, tops

    @torch.no_grad()
    def data(self):
        args, lm, tokens, count = self.args, self.lm, self.tokens, len(self.deltas)
        steps = sorted({0, *range(count, 0, -(-(-count // 20)))})           # at most 20, and none
        deltas = torch.cat([(step > 0) * self.deltas[step - 1] for step in steps])
        biases = lm.lm_head(deltas.to(lm.lm_head.weight.dtype))[:, 0].float()       # (K, V)
        losses, tops = self.read(self.hidden[:-1], tokens[1:], biases)
        room, unseen, shifts = lm.config.max_position_embeddings - len(tokens), [], []
        if answer := self.tokenizer.encode(args.reference or "")[:room]:
            hidden, _ = slot.prefill(lm, tokens + answer, 0)
            unseen, _ = self.read(hidden[0, len(tokens) - 1:-1], answer, biases, True)
        learned = biases[-1], unigram(tokens, like=biases[-1])
        some = self.hidden[::max(1, len(tokens) // 32)]             # as in generate.probabilities
        for h in some, self.hidden[-1:]:
            Wh = lm.lm_head(h).float()
            with_bias = [slot.steer(Wh, bias, h, 0) for bias in learned]
            p = torch.stack([Wh, *with_bias]).softmax(-1).mean(1)
            most = (p - p[0]).abs().max().clamp(min=0.01)
            for change in p[1:] - p[0]:
                order = change.argsort(descending=True)[[*range(6), *range(-6, 0)]]
                order = order[(change.abs() > (p[0] / 1000).clamp(min=1e-5))[order]]    # it shows
                rows = torch.stack([change / most, p[0], p[0] + change])[:, order].T.tolist()
                shifts.append([[self.word(id), *row] for id, row in zip(order.tolist(), rows)])
        template = [common(tokens[::way], self.template_ids[::way]) for way in (1, -1)]
        how = "a kept δ" if args.delta else f"{args.slot_steps} steps at rate {args.slot_lr:g}"
        size = self.hidden.float().norm(dim=1).mean()
        loss = "loss {:.4f} → {:.4f}".format(*torch.tensor(losses)[[0, -1]].mean(1))
        return dict(
            facts=f"{repr(Path(args.model).name)[1:-1]}: {len(tokens)}-token prompt; {how}, "
                  f"{self.seconds:.2f} s; {loss if losses[0] else 'nothing to guess'}; |δ| "
                  f"{deltas[-1].norm():.2f} beside a mean |h| of {size:.2f}",
            prompt=[self.word(id) for id in tokens], template=template,
            steps=[step * (args.slot_steps or 1) // count for step in steps], losses=losses,
            unseen=unseen, tops=tops, shifts=shifts, answers=self.answers)

    def write(self):
        data = json.loads(json.dumps(self.data()), parse_float=lambda x: round(float(x), 5))
        data = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
        page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        page = page.replace("{n}", os.urandom(16).hex()).replace("{data}", data)
        with whole_file(self.args.picture) as file:
            file.write(page.encode(errors="replace"))
