"""What every setting answers, and how well it predicts the prompt and the reference answer.

Each sample alone: prefill once and read the reference answer behind the prompt, plainly. For every
setting fit δ, then two losses with W δ on the logits: of the prompt, which δ saw, and of the
reference, which it did not. Then the batch: for every setting greedy answers from one prefill.

A control asks whether it matters what δ learned:
    random          a random δ of the same norm
    wrong-prompt    the δ that was fitted to another prompt of the same kind
    unigram         no δ, but the logarithm of how often each token occurs in the prompt as a bias
                    on the logits, of the same norm as W δ: "say what the prompt says", not learned

Letters: T tokens of the prompt, A of the reference answer, d width, V vocabulary.
"""
import copy
import math
import time
from importlib.util import find_spec

import torch
import torch.nn.functional as F

import slot
from study.scoring import flexible, in_format, paper, strict
from study.settings import PLAIN, all_settings
from study.tasks import TASKS

speed = None                                # without speed/ prompts are answered one by one
if find_spec("speed"):
    import speed.batch
    import speed.delta
    import speed.parallel_delta
    import speed.ranks

KEPT = 1 << 27                              # logits of one text that are kept; blocks of as many
PIECE = 1 << 20                             # logits judged at once: they stay in the cache


class Text:
    """Tokens whose loss is measured. hidden (n, d): what predicts them; ids: n of them. answer:
    whether they are an answer's, from its first on, so that slot.steer is told how many came."""

    def __init__(self, lm_head, hidden, ids, answer=False):
        self.lm_head, self.count = lm_head, len(ids)
        self.vocabulary = getattr(lm_head, "vocabulary", len(lm_head.weight))   # also of many ranks
        rows = max(1, KEPT // self.vocabulary)
        targets = torch.tensor(ids, dtype=torch.int64, device=hidden.device)
        counts = torch.arange(self.count) * answer                          # (n,)
        self.blocks = list(zip(hidden.split(rows), counts.split(rows), targets.split(rows)))
        self.kept = lm_head(hidden) if self.count <= rows else None         # W h, for all settings

    def logits(self):
        """Yields logits (some, V) float32, each time anew, hidden and counts that they belong to,
        and the tokens (some,) that they predict."""
        rows = max(1, PIECE // self.vocabulary)
        for hidden, counts, targets in self.blocks:
            block = self.lm_head(hidden) if self.kept is None else self.kept
            for logits, *others in zip(*(x.split(rows) for x in (block, hidden, counts, targets))):
                yield logits.to(torch.float32, copy=True), *others

    def loss(self, change):
        """Mean cross entropy in nats a token, where `change` takes logits, hidden and counts to
        other logits."""
        total = 0.0
        for *given, targets in self.logits():
            losses = F.cross_entropy(change(*given), targets, reduction="none")
            total += losses.cpu().double().sum().item()
        return total / max(1, self.count)

    def gradient(self):
        """Of the plain loss with respect to δ at δ = 0, times n: Wᵀ(p - y), (d,) float32.
        p: the sum of the predicted distributions; y: of what came, one-hot."""
        weight = self.lm_head.weight
        residual = torch.zeros(self.vocabulary, device=weight.device)       # p - y (V,)
        for logits, *_, targets in self.logits():
            residual += logits.softmax(-1).sum(0)
            residual -= torch.bincount(targets, minlength=self.vocabulary)
        residual = residual[getattr(self.lm_head, "mine", slice(None))]     # a rank's own rows
        parts = zip(residual.split(1 << 14), weight.split(1 << 14))         # small float32 copies
        gradient = sum(r @ w.float() for r, w in parts)
        return gradient if len(residual) == self.vocabulary else speed.ranks.total(gradient)


def steered(logits, W_delta, hidden, counts):
    """slot.steer for a text: logits (n, V), hidden (n, d), counts (n,). It is asked as by `decode`,
    with the number of the answer's tokens so far; in a prompt that is 0."""
    if not counts.any():
        return slot.steer(logits, W_delta, hidden, 0)
    rows = zip(logits.split(1), hidden.split(1), counts.tolist())
    return torch.cat([slot.steer(row, W_delta, h, count) for row, h, count in rows])


def unigram(ids, like):
    """log(1 + how often each token occurs in `ids`), (V,), scaled to the norm of `like` (V,). A
    constant on all logits changes no probability, so both are taken without their mean: what is
    compared is the part that acts."""
    log_counts = torch.bincount(torch.tensor(ids), minlength=len(like)).to(like).log1p()
    log_counts -= log_counts.mean()
    size = (like - like.mean()).norm()
    return log_counts * (size / log_counts.norm().clamp(min=1e-30))


class Study:
    """One model and its problems. new: tokens of an answer, at most."""

    def __init__(self, args, lm, tokenizer, problems, new):
        self.args, self.lm, self.tokenizer = args, lm, tokenizer
        self.problems, self.new = problems, new
        self.as_written = speed and speed.batch.stands_for_slot()   # so that speed/ may stand in
        self.optimize = slot.optimize_delta
        if args.slot_fast:
            speed.batch.closed_form_stands_for_slot()
            fast = speed.parallel_delta if args.tensor_parallel > 1 else speed.delta
            self.optimize = fast.optimize_delta_fast
        kinds = dict.fromkeys(p.kind for p in problems)
        self.groups = [[i for i, p in enumerate(problems) if p.kind == kind] for kind in kinds]
        self.partner = {}                                   # sample -> whose δ it takes as wrong
        for group in self.groups:
            self.partner |= zip(group, group[1:] + group[:1])
        self.hiddens, self.fits = {}, {}

    # one sample

    def fit(self, i, steps, lr):
        """δ (1, 1, d) of sample i, and the seconds that it took; kept for who takes it as wrong."""
        if (i, steps, lr) not in self.fits:
            ids = self.problems[i].ids
            if i not in self.hiddens:
                self.hiddens[i], _ = slot.prefill(self.lm, ids, 0)
            torch.manual_seed(self.args.seed + i)           # for an idea that draws
            hidden, began = self.hiddens[i].detach(), time.perf_counter()
            delta, _ = self.optimize(hidden, ids, self.lm.lm_head, steps, lr)
            self.fits[i, steps, lr] = delta.detach(), time.perf_counter() - began
        return self.fits[i, steps, lr]

    @torch.no_grad()
    def effect(self, i, setting):
        """What a setting does to sample i -> δ (1, 1, d) or None; a bias (V,) or None; seconds."""
        if setting == PLAIN:
            return None, None, 0.0
        source = self.partner[i] if setting.what == "wrong-prompt" else i
        delta, seconds = self.fit(source, setting.steps, setting.lr)
        if setting.what == "random":                        # one direction a sample, at every point
            draw = torch.Generator().manual_seed((self.args.seed << 32) + i)
            noise = torch.randn(1, 1, delta.shape[-1], generator=draw).to(delta)
            delta = noise * (delta.norm() / noise.norm())
        if setting.what == "unigram":
            return None, unigram(self.problems[i].ids, self.words(delta)), seconds
        return delta, None, seconds

    def words(self, delta):
        """W δ, (V,) float32."""
        head = self.lm.lm_head
        return head(delta.to(head.weight.dtype)).float().flatten()

    @torch.no_grad()
    def figures(self, i, settings):
        """-> {setting: losses, seconds of the fit, and, plainly, the alignment of sample i}."""
        ids = self.problems[i].ids
        reference = self.tokenizer.encode(self.problems[i].reference)[:self.new]
        self.hiddens[i], cache = slot.prefill(self.lm, ids, len(reference))
        before = self.hiddens[i][:, -1:]                                    # predicts the first
        if len(reference) > 1:
            tokens = torch.tensor([reference[:-1]], device=before.device)
            more = self.lm.model(tokens, copy.copy(cache))  # `cache` stays at the prompt's end
            before = torch.cat((before, more), dim=1)                               # (1, A, d)
        prompt = Text(self.lm.lm_head, self.hiddens[i][0, :-1], ids[1:])
        answer = Text(self.lm.lm_head, before[0], reference, answer=True)
        found = {}
        for setting in settings:
            delta, bias, fit = self.effect(i, setting)
            change = self.change(delta, bias)
            losses = dict(prompt_loss=prompt.loss(change), answer_loss=answer.loss(change)
                          if self.as_written else self.told(i, reference, cache, delta, bias))
            if not all(map(math.isfinite, losses.values())):
                raise ValueError(f"sample {i}, {setting.name}: a loss is not a finite number; "
                                 "lower the learning rate")
            found[setting] = losses | dict(seconds=dict(prefill=0.0, fit=fit, decode=0.0))
            if setting == PLAIN:
                cosine = F.cosine_similarity(prompt.gradient(), answer.gradient(), dim=0)
                found[setting]["alignment"] = cosine.item()
        return found

    def told(self, i, reference, cache, delta, bias):
        """The loss of the reference answer where slot.decode may have been edited: by decode
        itself, whose choices are those of the reference."""
        rest, losses = iter(reference), []

        def choose(logits):
            logits = logits if bias is None else logits + bias
            id = next(rest)
            losses.append(F.cross_entropy(logits, torch.tensor(id, device=logits.device)).item())
            return id

        hidden, cache = self.hiddens[i], copy.copy(cache)
        list(slot.decode(self.lm, hidden, cache, len(reference), delta, choose))
        return sum(losses) / max(1, len(losses))

    def change(self, delta, bias):
        """-> a function from logits (..., V), hidden, counts to what an effect makes of them."""
        if delta is None:
            return lambda logits, *_: logits if bias is None else logits + bias
        W_delta = self.words(delta)
        return lambda logits, *others: steered(logits, W_delta, *others)

    # a batch

    def measure(self, rows, missing):
        """rows: samples. missing: {setting: those that lack it} -> yields a result for each."""
        settings = all_settings(self.args)
        found = {i: self.figures(i, settings) for i in rows
                 if any(i in left for left in missing.values())}        # all, or bits could differ
        self.hiddens.clear()
        prefilled = None
        for setting in missing:
            answers = {}
            if not self.args.only:
                prefilled = prefilled or self.prefill(rows)
                answers, seconds = self.answer(prefilled, rows, setting)
            for i in missing[setting]:
                figures = found[i][setting]
                if answers:
                    figures["seconds"] |= seconds
                yield self.result(i, setting, figures, answers.get(i))

    def result(self, i, setting, figures, ids):
        """One line of results.jsonl. ids: of the answer, None where nothing was decoded."""
        p, args = self.problems[i], self.args
        row = dict(sample=i, kind=p.kind, setting=setting.name, prompt=p.question, gold=p.gold)
        if ids is not None:
            text = self.tokenizer.decode(ids, skip_special=True)
            row |= dict(answer=text, strict=strict(text, p.gold, formulas=args.task == "math500"),
                        flexible=flexible(text, p.gold), paper=paper(text, p.gold),
                        format=in_format(text, TASKS[args.task]["format"]),
                        tokens=len(ids) + (len(ids) < self.new))            # with the end token
        rounded = {part: round(s, 6) for part, s in figures["seconds"].items()}
        return row | figures | dict(seconds=rounded)

    @torch.no_grad()
    def prefill(self, rows):
        """-> hidden states and cache of every row, and the seconds that a row took."""
        began, prompts = time.perf_counter(), [self.problems[i].ids for i in rows]
        if self.as_written:
            hiddens, cache = speed.batch.prefill(self.lm, prompts, self.new)
        else:
            hiddens, cache = zip(*[slot.prefill(self.lm, ids, self.new) for ids in prompts])
        return hiddens, cache, (time.perf_counter() - began) / len(rows)

    def answer(self, prefilled, rows, setting):
        """Greedy answers -> {sample: ids without the end token}, and the seconds that one took."""
        hiddens, cache, prefill_seconds = prefilled
        deltas, biases, _ = zip(*[self.effect(i, setting) for i in rows])
        chooses = [slot.likeliest if bias is None else
                   lambda logits, bias=bias: slot.likeliest(logits + bias) for bias in biases]
        began, end = time.perf_counter(), self.tokenizer.eos_ids
        # A use of the cache writes behind the prompt, where the next one writes before it reads.
        if self.as_written:
            choose = slot.likeliest if biases[0] is None else chooses
            deltas = None if deltas[0] is None else list(deltas)
            columns = speed.batch.decode(
                self.lm, hiddens, copy.copy(cache), self.new, deltas, choose, end)
            answers = speed.batch.collected(columns, len(rows))
        else:
            answers = [list(slot.decode(self.lm, hidden, copy.copy(own), self.new, *effect, end))
                       for hidden, own, *effect in zip(hiddens, cache, deltas, chooses)]
        seconds = (time.perf_counter() - began) / len(rows)
        return dict(zip(rows, answers)), dict(prefill=prefill_seconds, decode=seconds)
