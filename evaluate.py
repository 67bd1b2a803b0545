"""The laboratory: does SLOT help? Accuracy, and the loss on answers that δ never saw, against steps, with the plain model beside.

    python evaluate.py                                                  the whole study on the embedded model
    python evaluate.py --task gsm8k --data test.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --limit 200

For a batch of prompts the decoder runs once. Its hidden states and its cache serve every setting: the plain model, SLOT with
each number of steps and each learning rate, and for each of those the controls, which ask whether it matters what δ learned:
    random          a random δ of the same norm
    wrong-prompt    the δ that was fitted to another prompt of the same kind
    unigram         no δ, but the logarithm of how often each token occurs in the prompt, as a constant on the logits, of the
                    same norm as W δ: a plain "say what the prompt says" without any learning
Each setting answers greedily, and reads the reference answer for its loss. One line a sample and setting goes to
DIR/results.jsonl; a run that was killed goes on from there. report.py makes DIR/summary.md and the plot from those lines.

What differs from the authors' scripts: their GSM8K prompt and greedy decoding are kept, for all problems in order instead of a
random choice. AIME, MATH-500 and GPQA they run by lighteval with vLLM; its instructions are kept, but decoding is greedy here,
where theirs samples once at temperature 0.6, so a difference of theirs can be luck. Prompts: tasks.py. Scores: scoring.py.

Letters: B batch, T tokens, A tokens of the longest reference answer, d width, V vocabulary.
"""
import argparse
import copy
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

from cli import Parser, early_signals, number, run
from tasks import TASKS, read_problems, tokenized

TINY = Path(__file__).resolve().parent / "tiny"
CONTROLS = ["random", "wrong-prompt", "unigram"]


def listed(parse):
    """An argparse type: values with commas between, sorted, each once."""
    return lambda text: sorted({parse(part.strip()) for part in text.split(",")})


def control(text):
    if text not in CONTROLS:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a control; there are {', '.join(CONTROLS)}, or none for none of them")
    return text


def parse_arguments(arguments=None):
    parser = Parser(prog="evaluate.py", description="Accuracy and answer loss of a model, plainly and with SLOT.")
    add = parser.add_argument
    add("--task", choices=list(TASKS), default="tiny", help="tiny (default) needs nothing; the others need --data")
    add("--data", metavar="FILE", help="the task's problems, as published")
    add("--model", default=str(TINY), metavar="FOLDER_OR_ID", help="folder or hub id (default: the embedded model)")
    add("--steps", type=listed(number(int, 0, 10_000)), metavar="0,1,2", help="SLOT steps (default 0,1,2,3,5; tiny: and 10,20)")
    add("--lr", type=listed(number(float, 0, above=True)), default=[0.01, 0.1], metavar="X,Y", help="learning rates (default 0.01,0.1)")
    add("--control", type=lambda text: [] if text == "none" else listed(control)(text), metavar="NAME,NAME",
        help=f"{', '.join(CONTROLS)} (default: all for tiny, else none)")
    add("--limit", type=number(int, 1, 10_000), metavar="N", help="problems of each kind, at most (default: all; tiny: 300)")
    add("--shots", type=number(int, 0, 100), default=0, metavar="K", help="solved problems before each question (default 0)")
    add("--split", choices=["tune,test"], metavar="tune,test", help="choose the setting on every other sample, report it on the rest")
    add("--max-new-tokens", type=number(int, 1, 1 << 30), metavar="N", help="(default: the task's, at most a quarter of the positions)")
    add("--batch", type=number(int, 1, 4096), metavar="N", help="prompts at a time (default 8; tiny: 100)")
    add("--seed", type=number(int, 0, 2 ** 31), default=0, metavar="S", help="of tiny's problems, GPQA's options, random δ")
    add("--out", metavar="DIR", help="where results go, and where a run is taken up again (default runs/TASK)")
    add("--device", default="cpu", metavar="D", help="cpu (default), cuda, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="default: as the model says")
    args = parser.parse_args(arguments)
    task = TASKS[args.task]
    if (args.task == "tiny") == (args.data is not None):
        parser.error("--data is for the other tasks; tiny makes its own problems" if args.data else
                     f"--task {args.task} needs --data FILE: {task['data']}")
    if args.steps is None:
        args.steps = [0, 1, 2, 3, 5, 10, 20] if args.task == "tiny" else [0, 1, 2, 3, 5]
    args.steps = sorted({0, *args.steps})                           # the plain model is always there
    args.control = args.control if args.control is not None else sorted(CONTROLS) if args.task == "tiny" else []
    args.limit, args.batch = args.limit or task.get("limit"), args.batch or task.get("batch", 8)
    args.out = Path(args.out or Path("runs") / args.task)
    return args


if __name__ == "__main__":      # before torch is imported, see cli.py
    early_signals()
    ARGS = parse_arguments()

import torch
import torch.nn.functional as F

import report
from generate import decode, prefill
from load_weights import find_model, load_model
from scoring import in_format, paper, strict
from slot import next_tokens, optimize_delta_fast
from tokenizer import load_tokenizer

# ---- settings: ("plain", 0, 0), ("slot", steps, lr), and (control, steps, lr) for a control of that one

def all_settings(args):
    grid = [(steps, lr) for lr in args.lr for steps in args.steps if steps]
    return [("plain", 0, 0.0)] + [(what, *point) for what in ["slot", *args.control] for point in grid]


def name_of(what, steps, lr):
    return f"{what} {steps} {lr:g}" if steps else what


# ---- one batch

class Batch:
    """Prompts after their one forward pass, and what every setting needs of it."""

    def __init__(self, args, lm, tokenizer, problems, places, partners, new):
        self.args, self.lm, self.tokenizer, self.new, self.places = args, lm, tokenizer, new, places
        self.partners = [problems[i].ids for i in partners]
        self.problems = [problems[i] for i in places]
        began = time.perf_counter()
        self.hidden, self.tokens, self.mask, self.cache = prefill(lm, [p.ids for p in self.problems], new)
        self.prefill_seconds = time.perf_counter() - began
        self.targets, _ = next_tokens(self.hidden, self.tokens, 0, 1.0, self.mask)      # (B, T-1), -100 where nothing counts
        self.answer_hidden, self.answer_targets = self.read_reference()                 # (B, A, d), (B, A)
        self.deltas = {}

    def filled_cache(self):
        """The cache at the end of the prompt. Keys and values are shared: what one use writes lies behind the prompt, where the
        next one writes before it reads. Position, mask and the choice of rows are each use's own."""
        cache = copy.copy(self.cache)
        cache.mask = cache.mask.clone() if cache.mask is not None else None
        return cache

    @torch.no_grad()
    def read_reference(self):
        """The decoder reads the reference answers behind the prompts, once for all settings: δ comes after it."""
        ids = [self.tokenizer.encode(p.reference)[:self.new] for p in self.problems]    # cut to what an answer may have
        A = max(map(len, ids))
        tokens = torch.tensor([i + [0] * (A - len(i)) for i in ids], device=self.hidden.device)
        real = torch.arange(A, device=tokens.device) < torch.tensor([[len(i)] for i in ids], device=tokens.device)
        hidden = self.hidden[:, -1:]                                                    # predicts the first token
        if A > 1:
            hidden = torch.cat((hidden, self.lm.model(tokens[:, :-1], self.filled_cache(), real[:, :-1])), dim=1)
        return hidden, tokens.masked_fill(~real, -100)

    @torch.no_grad()
    def loss(self, hidden, targets, bias):
        """Mean cross entropy of every sample, in nats a token, with the constant W δ on the logits -> list of B."""
        rows, columns = (targets != -100).nonzero(as_tuple=True)                        # (N,) each
        V, sums = self.lm.config.vocab_size, torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
        for row, column in zip(*(x.split(max(1, (1 << 28) // (8 * V))) for x in (rows, columns))):     # 256 MB of logits at a time
            logits = self.lm.lm_head(hidden[row, column]).float()                       # (n, V)
            if bias is not None:
                logits += bias[row, 0]
            sums.index_add_(0, row, F.cross_entropy(logits, targets[row, column], reduction="none").double())
        return (sums / (targets != -100).sum(1).clamp(min=1)).tolist()

    def delta(self, steps, lr, partners=False):
        """δ (B, 1, d) fitted to the prompts, or to those of their partners; kept for the controls that need it again."""
        if (steps, lr, partners) not in self.deltas:
            hidden, tokens, mask = self.hidden, self.tokens, self.mask
            if partners:
                if "prompts" not in self.deltas:
                    self.deltas["prompts"] = prefill(self.lm, self.partners, 0)[:3]
                hidden, tokens, mask = self.deltas["prompts"]
            self.deltas[steps, lr, partners], _ = optimize_delta_fast(hidden, tokens, self.lm.lm_head, steps, lr, mask)
        return self.deltas[steps, lr, partners]

    @torch.no_grad()
    def bias(self, what, steps, lr):
        """The constant that a setting adds to all logits, (B, 1, V) float32, or None for the plain model."""
        if what == "plain":
            return None
        delta = self.delta(steps, lr, partners=what == "wrong-prompt")
        if what == "random":                                        # one direction a sample, whatever the setting
            generators = [torch.Generator().manual_seed((self.args.seed << 32) + place) for place in self.places]
            noise = torch.stack([torch.randn(1, delta.shape[2], generator=g) for g in generators]).to(delta.device)
            delta = noise * (delta.norm(dim=2, keepdim=True) / noise.norm(dim=2, keepdim=True))
        bias = self.lm.lm_head(delta.to(self.hidden.dtype)).float()
        return unigram(self.tokens, self.mask, bias) if what == "unigram" else bias

    def measure(self, what, steps, lr):
        """-> one result a sample, in order."""
        began = time.perf_counter()
        bias = self.bias(what, steps, lr)
        fitted = time.perf_counter()
        answers = [[] for _ in self.problems]
        for ids in decode(self.lm, self.hidden[:, -1:], self.filled_cache(), self.new, bias, eos_ids=self.tokenizer.eos_ids):
            for answer, id in zip(answers, ids):
                if id is not None:
                    answer.append(id)
        decoded = time.perf_counter()
        prompt_loss = self.loss(self.hidden[:, :-1], self.targets, bias)
        answer_loss = self.loss(self.answer_hidden, self.answer_targets, bias)
        seconds = [round(s / len(answers), 6) for s in (self.prefill_seconds, fitted - began, decoded - fitted)]
        for row, (place, p, ids) in enumerate(zip(self.places, self.problems, answers)):
            text = self.tokenizer.decode(ids, skip_special=True)
            yield dict(sample=place, kind=p.kind, setting=name_of(what, steps, lr), prompt=p.question, answer=text, gold=p.gold,
                       strict=strict(text, p.gold), paper=paper(text, p.gold), format=in_format(text, TASKS[self.args.task]["format"]),
                       answer_loss=answer_loss[row], prompt_loss=prompt_loss[row], tokens=len(ids),
                       seconds=dict(zip(("prefill", "fit", "decode"), seconds)))


def unigram(tokens, mask, like):
    """log(1 + how often the prompt has each token), (B, 1, V), scaled to the norm of `like`. A constant on all logits changes no
    probability, so both are taken without their mean: what is compared is the part that acts."""
    seen = torch.ones_like(tokens) if mask is None else mask.long()
    counts = torch.zeros(len(tokens), like.shape[2], device=like.device).scatter_add_(1, tokens, seen.float())     # (B, V)
    log_counts = counts.log1p()
    log_counts -= log_counts.mean(1, keepdim=True)
    size = (like[:, 0] - like[:, 0].mean(1, keepdim=True)).norm(dim=1, keepdim=True)
    return (log_counts * (size / log_counts.norm(dim=1, keepdim=True).clamp(min=1e-30)))[:, None]


# ---- the results file

class Results:
    """DIR/results.jsonl, and the arguments that it belongs to. `rows`: {(sample, setting): result}. One process at a time."""

    def __init__(self, folder, arguments):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.rows = folder / "results.jsonl", {}
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self.lock(folder)
            self.check_arguments(folder / "arguments.json", arguments)
            self.read()
        except BaseException:
            self.close()
            raise

    def lock(self, folder):
        try:
            import fcntl
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)   # goes with the process, however it ends
        except ImportError:                                         # Windows
            pass
        except OSError:
            raise ValueError(f"{folder}: another run is writing there; wait for it, or give another --out") from None

    def check_arguments(self, path, arguments):
        arguments = json.loads(json.dumps(arguments))
        if self.path.stat().st_size == 0:
            path.with_suffix(".part").write_text(json.dumps(arguments, indent=1) + "\n", encoding="utf-8")
            os.replace(path.with_suffix(".part"), path)
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ValueError(f"{path} is missing or damaged, so its results cannot be taken up; give another --out") from None
        for name in [*arguments, *old]:
            if old.get(name) != arguments.get(name):
                raise ValueError(f"{path.parent} holds a run with another {name} ({str(old.get(name))[:60]}, not "
                                 f"{str(arguments.get(name))[:60]}); give another --out, or delete it")

    def read(self):
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):                                       # the machine stopped in the middle of a line
            print(f"resume    {self.path}: repaired a torn last line of {len(data) - whole} bytes", file=sys.stderr)
            os.ftruncate(self.file, whole)
        for count, line in enumerate(data[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                self.rows[row["sample"], row["setting"]] = row
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path}: line {count} is damaged; delete it, and its answer is made again") from None

    def add(self, row):
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        if os.write(self.file, line) != len(line):                  # one call: whole, or torn at the end of the file
            raise OSError(f"{self.path}: the disk is full")
        self.rows[row["sample"], row["setting"]] = row

    def close(self):
        os.close(self.file)


# ---- progress

class Progress:
    def __init__(self, rows, settings, samples):
        self.total, self.samples, self.done, self.settings = len(settings) * samples, samples, 0, settings
        self.right, self.seen, self.began, self.last = {}, {}, time.monotonic(), time.monotonic()
        for row in rows:
            self.count(row)
        self.first = self.done

    def count(self, row):
        self.done += 1
        self.seen[row["setting"]] = self.seen.get(row["setting"], 0) + 1
        self.right[row["setting"]] = self.right.get(row["setting"], 0) + row["strict"]

    def show(self):
        """On a terminal one line that is rewritten, elsewhere a line a minute."""
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if not terminal and now - self.last < 60:
            return
        self.last = now
        rate = (self.done - self.first) / (now - self.began + 1e-9)                    # answers a second
        left = (self.total - self.done) / rate if rate else 0
        accuracy = {name: f"{100 * self.right[name] / n:.0f}" for name, n in self.seen.items()}
        shown = [f"plain {accuracy.get('plain', '-')}"] + [
            f"lr {lr:g}: " + " ".join(accuracy.get(name_of("slot", steps, lr), "-") for steps in sorted({s for _, s, _ in self.settings if s}))
            for lr in sorted({lr for _, steps, lr in self.settings if steps})]
        line = (f"{self.done * self.samples // self.total}/{self.samples} samples  {rate * self.samples / self.total:.2f}/s  "
                f"{int(left) // 60}:{int(left) % 60:02} left  % right so far  " + "  ".join(shown))
        if terminal:
            print("\r\x1b[K" + line[:shutil.get_terminal_size().columns - 1], end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self):
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# ---- the run

def fingerprint(folder, problems):
    """(model, problems): what the results depend on besides the options."""
    model = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                model.update(block)
    return model.hexdigest()[:16], hashlib.sha256(json.dumps(problems).encode()).hexdigest()[:16]


def main(args):
    problems = read_problems(args)
    folder = find_model(args.model)
    tokenizer = load_tokenizer(folder)
    try:
        torch.empty(1, device=args.device)
    except Exception as error:                                      # torch's own kinds of error differ by device
        raise ValueError(f"--device {args.device!r} is not available here: {str(error).splitlines()[0]}") from None
    lm = load_model(folder, args.device, args.dtype)
    positions = lm.config.max_position_embeddings
    new = args.max_new_tokens or max(1, min(TASKS[args.task]["new"], positions // 4))
    golds = [(strict(p.reference, p.gold), paper(p.reference, p.gold)) for p in problems]
    problems, too_long = tokenized(args, problems, tokenizer, positions - new)
    groups = [[i for i, p in enumerate(problems) if p.kind == kind] for kind in dict.fromkeys(p.kind for p in problems)]
    partner = {i: group[(k + 1) % len(group)] for group in groups for k, i in enumerate(group)}
    if "wrong-prompt" in args.control and any(i == j for i, j in partner.items()):
        raise ValueError("--control wrong-prompt needs two samples of each kind; raise --limit or leave it out")

    settings = all_settings(args)
    model, data = fingerprint(folder, problems)
    options = {name: getattr(args, name) for name in ("task", "steps", "lr", "control", "limit", "shots", "split", "batch", "seed", "device")}
    results = Results(args.out, options | dict(max_new_tokens=new, dtype=str(lm.lm_head.weight.dtype)[6:], model=model, problems=data))
    progress = Progress(results.rows.values(), settings, len(problems))
    print(f"evaluate  {args.task}: {len(problems)} samples, {len(settings)} settings -> {args.out}"
          + (f"; {progress.done:,} of {progress.total:,} answers are there already" if progress.done else ""), file=sys.stderr)

    for group in groups:
        for start in range(0, len(group), args.batch):
            rows, batch = group[start:start + args.batch], None
            for setting in settings:
                missing = {i for i in rows if (i, name_of(*setting)) not in results.rows}
                if not missing:
                    continue
                # Always the whole batch, even if a killed run has done part of it: a product over other rows can differ in the
                # last bit, and a run in two pieces must be the run in one piece.
                batch = batch or Batch(args, lm, tokenizer, problems, rows, [partner[i] for i in rows], new)
                for row in batch.measure(*setting):
                    if row["sample"] in missing:
                        results.add(row)
                        progress.count(row)
                progress.show()
    progress.end()

    cut = sum(len(tokenizer.encode(p.reference)) > new for p in problems)
    name = "tiny/, the embedded model" if args.model == str(TINY) else args.model
    notes = [f"Model: {name}, {sum(p.numel() for p in lm.parameters()) / 1e6:,.2f} M parameters, {str(lm.lm_head.weight.dtype)[6:]}, "
             f"{args.device}. Greedy decoding, at most {new} new tokens; {args.shots} solved problems before each question.",
             f"Scorers on the {len(golds):,} reference answers: strict finds {sum(s for s, _ in golds):,} right, the paper's rule "
             + (f"{sum(p is True for _, p in golds):,}." if any(p is not None for _, p in golds) else "knows no such answers.")]
    if too_long:
        notes.append(f"{too_long} prompts are longer than {positions - new} tokens and left out: they and {new} new ones exceed the "
                     f"model's {positions} positions.")
    if cut:
        notes.append(f"{cut} reference answers are longer than {new} tokens; their loss is that of their first {new}.")
    report.write(args, settings, list(results.rows.values()), notes)
    results.close()


if __name__ == "__main__":
    run(main, ARGS)
