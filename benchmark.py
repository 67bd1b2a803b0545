"""How fast is each stage, and how fast could it be? Every figure stands beside its physical limit, measured in the same run.

    python benchmark.py                                     the embedded model and a random one of 0.5 B parameters
    python benchmark.py --peers --peer-python PATH          beside transformers and llama.cpp
    python benchmark.py --sweep                             what SLOT costs: prompt length, steps, vocabulary, width, batch

Reading the weights once a token bounds decoding; multiplying by them once a prompt token bounds prefill; SLOT with few steps is
bounded by W h, one product with the head for every position of the prompt. `reached` is that limit / the median. (A model that
fits into the processor's caches, as tiny/ does, can beat a limit of reading; there Python's own time is what is left to see.)
All is measured in rounds, A B C A B C ..., so that a slow minute of a shared machine hits A, B and C alike.

The published loop is rebuilt here from the authors' public code: what slot.py is measured against.
Letters: T tokens, n predicted tokens, d width, V vocabulary, P parameters of the layers, b bytes of a weight.
"""
import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.peer import find_peers, start_peer
from benchmarks.random_model import SHAPES, config_of, weight_shapes, write_random_model
from cli import Parser, early_signals, number, run

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slot-benchmark"
DTYPES = ["bfloat16", "float32", "float16"]
PROMPT, STEPS, LR = 200, 5, 0.01        # the SLOT figures: tokens of the prompt, steps of a call
OTHER = {"published loop": 1, "readable loop": 10, "fast form": 25}     # another number of steps: the difference is the steps'


def parse_arguments(arguments=None):
    def dtypes(text):
        if not set(text.split(",")) <= set(DTYPES):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a list of {', '.join(DTYPES)}")
        return text.split(",")

    parser = Parser(prog="benchmark.py", description="Speed and memory of every stage, beside its physical limit.")
    add = parser.add_argument
    add("--model", action="append", metavar="FOLDER", help="model folders (default: tiny/ and a random one of --shape)")
    add("--shape", choices=SHAPES, default="0.5b", help="of the random model (default 0.5b)")
    add("--layers", type=number(int, 1, 1000), metavar="N", help="fewer layers than the shape has, where memory demands it")
    add("--cache", type=Path, default=CACHE, metavar="DIR", help=f"where random models are kept (default {CACHE})")
    add("--dtype", type=dtypes, default=["bfloat16", "float32"], metavar="A,B", help="default bfloat16,float32")
    add("--rounds", type=number(int, 1, 1000), default=3, metavar="N", help="how often everything is measured (default 3)")
    add("--new", type=number(int, 2, 256), default=32, metavar="N", help="tokens to decode (default 32)")
    add("--peers", action="store_true", help="measure transformers and llama-cpp-python too, where installed")
    add("--peer-python", action="append", default=[], metavar="PATH", help="another Python in which peers are installed")
    add("--sweep", action="store_true", help="the cost of SLOT alone, on random hidden states")
    add("--plot", metavar="FILE", help="with --sweep: a picture of it (needs matplotlib)")
    add("--json", metavar="FILE", help="write the last line, which is JSON, to a file too")
    add("--child", help=argparse.SUPPRESS)                              # a measurement of memory, in a process of its own
    args = parser.parse_args(arguments)
    if args.peer_python and not args.peers:
        parser.error("--peer-python needs --peers")
    return args


if __name__ == "__main__":      # before torch is imported, see cli.py
    early_signals()
    ARGS = parse_arguments()

import torch
import torch.nn.functional as F

from benchmarks.machine import Rates, describe, memory_of, timed
from generate import decode, generate, prefill
from linear import NATIVE_GEMM, Linear
from load_weights import load_model
from slot import BETAS, EPS, WEIGHT_DECAY, optimize_delta, optimize_delta_fast


def published_loop(hidden, tokens, lm_head, steps, lr):
    """SLOT as its authors' code runs it: all logits again in every step, autograd through the head, δ in the model's dtype, and,
    since the head is a parameter like any other, a gradient of W that is summed up and never used."""
    W = lm_head.weight.detach().requires_grad_(True)                        # (V, d)
    delta = torch.zeros(1, 1, hidden.shape[-1], dtype=hidden.dtype, requires_grad=True)
    optimizer = torch.optim.AdamW([delta], lr=lr, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = F.linear(hidden + delta, W)                                # (1, T, V)
        loss = F.cross_entropy(logits[:, :-1].contiguous().view(-1, len(W)), tokens[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
    return delta.detach()


FUNCTIONS = {"published loop": published_loop, "readable loop": optimize_delta, "fast form": optimize_delta_fast}


class Subject:
    """A model in one dtype, all that is measured on it, and what it measured: {row: [seconds of every round]}."""
    def __init__(self, name, folder, dtype, new):
        self.name, self.folder, self.dtype, self.new = name, folder, getattr(torch, dtype), new
        self.lm, self.title = load_model(folder, dtype=dtype), f"{name}, {dtype}"
        self.seconds, self.peers, self.notes, self.ids, self.round = {}, {}, [], {}, 0
        most = self.lm.config.max_position_embeddings
        draw = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, self.lm.config.vocab_size, (min(most, 2048),), generator=draw).tolist()
        self.lengths = [T for T in (16, 160, 1024) if T + new <= most]
        self.prompt = self.tokens[:min(PROMPT, most - new)]
        self.hidden, self.ids_tensor, _, _ = prefill(self.lm, [self.prompt], new)
        self.eight = [self.tokens[i:i + 16] for i in range(8)]
        self.forms, self.compiles = dict(FUNCTIONS), False
        if self.dtype != torch.float32 and not NATIVE_GEMM[self.dtype] and self.lm.lm_head.weight.numel() > 1e7:
            del self.forms["published loop"]                                # minutes a step

    def compile(self):
        try:
            self.answer(compiled=True)
            self.compiles = True
        except ValueError as error:
            self.notes.append(f"decode, compiled: left out, {error}")

    def measure(self):
        """One round: yields (row, seconds)."""
        yield "load, to the first token", timed(self.load)
        for T in self.lengths:
            yield f"prefill {T}", timed(lambda: prefill(self.lm, [self.tokens[:T]], self.new))
            for name, peer in self.peers.items():
                yield f"prefill {T}, {name}", peer.ask(do="prefill", tokens=self.tokens[:T])["seconds"]
        decoders = {"here": self.answer} | ({"compiled": lambda: self.answer(compiled=True)} if self.compiles else {})
        for name, peer in self.peers.items():
            decoders[name] = lambda peer=peer: peer.ask(do="answer", tokens=self.prompt, new=self.new)
        names = list(decoders)
        for name in names[self.round % len(names):] + names[:self.round % len(names)]:         # they take turns in going first
            reply, suffix = decoders[name](), "" if name == "here" else f", {name}"
            self.ids[name] = reply["ids"]
            if name != "compiled":
                yield f"first token after {len(self.prompt)}{suffix}", reply["first"]
            yield f"decode{suffix}", reply["rest"] / (self.new - 1)
        self.round += 1
        for name in self.forms:
            calls = {STEPS: [], OTHER[name]: []}
            for steps, spent in calls.items():
                while len(spent) < 3 and sum(spent) < 2:                        # a difference of two noisy times needs several
                    spent.append(timed(lambda: self.slot(name, steps)))
            call, more = calls.values()
            yield f"SLOT {STEPS} steps, {name}", median(call)
            yield f"SLOT a step, {name}", (min(more) - min(call)) / (OTHER[name] - STEPS)
        yield "8 prompts in a batch", self.decode_only(self.eight) / 8
        yield "8 prompts one by one", sum(self.decode_only([ids]) for ids in self.eight) / 8
        for name, peer in self.peers.items():
            yield f"load, to the first token, {name}", peer.ask(do="load")["seconds"]

    def load(self):
        self.lm = None                                                          # as with the peers: the one before goes first
        self.lm = load_model(self.folder, dtype=self.dtype)
        next(generate(self.lm, [0], 1))

    def answer(self, compiled=False):
        began, stamps, ids = time.perf_counter(), [], []
        for id in generate(self.lm, self.prompt, self.new, compiled=compiled):
            stamps.append(time.perf_counter())
            ids.append(id)
        return dict(first=stamps[0] - began, rest=stamps[-1] - stamps[0], ids=ids)

    def slot(self, name, steps):
        return self.forms[name](self.hidden, self.ids_tensor, self.lm.lm_head, steps, LR)

    def decode_only(self, prompts):
        """-> seconds a step."""
        new = max(2, self.new // 4)
        hidden, _, _, cache = prefill(self.lm, prompts, new)
        began = time.perf_counter()
        for _ in decode(self.lm, hidden[:, -1:], cache, new):
            pass
        return (time.perf_counter() - began) / new

    def piece_of_published(self):
        """Where it would take many minutes: one step on 8 tokens, once."""
        n, piece = len(self.prompt), (self.hidden[:, :8], self.ids_tensor[:, :8], self.lm.lm_head)
        spent = timed(lambda: published_loop(*piece, 1, LR))
        return (f"published loop: left out, this CPU multiplies no {str(self.dtype)[6:]} in hardware; one step on 8 tokens takes "
                f"{spent:.1f} s, which for {n} tokens and {STEPS} steps would be about {spent * n / 8 * STEPS:,.0f} s")

    def work(self):
        """-> {row: what it must do at least, phases (bytes, FLOP)}; rows of peers are the same work."""
        c, b, n = self.lm.config, self.dtype.itemsize, len(self.prompt)
        P, W = sum(p.numel() for p in self.lm.model.layers.parameters()), self.lm.lm_head.weight.numel()
        on_disk = sum(file.stat().st_size for file in Path(self.folder).glob("*.safetensors"))
        converted = 0 if b * sum(p.numel() for p in self.lm.parameters()) <= on_disk else 2 * b * (P + W)   # written, read
        seen = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * b                 # keys and values of one token
        forward = lambda T: (b * P, 2 * P * T + 2 * T * T * c.num_attention_heads * c.head_dim * c.num_hidden_layers)
        token = lambda rows, T: (b * (P + W) + rows * T * seen, 2 * rows * (P + W))
        step = (2 * b * W + 2 * 4 * n * c.vocab_size, 0)                                        # W twice, E (n, V) twice
        work = {f"prefill {T}": [forward(T)] for T in self.lengths}
        work["load, to the first token"] = [(on_disk + converted, 0)]
        work[f"first token after {n}"] = [forward(n), (b * W, 2 * W)]
        work["decode"] = [token(1, n + self.new // 2)]
        size, flops = token(8, 20)
        work["8 prompts in a batch"], work["8 prompts one by one"] = [(size / 8, flops / 8)], [token(1, 20)]
        for name in FUNCTIONS:
            once, each = ([], (3 * b * W, 6 * n * W)) if name == "published loop" else ([(b * W, 2 * n * W)], step)
            work[f"SLOT {STEPS} steps, {name}"], work[f"SLOT a step, {name}"] = once + STEPS * [each], [each]
        return work

    def report(self, rates):
        """Print the table -> its rows for the JSON."""
        size = sum(p.numel() for p in self.lm.parameters())
        print(f"\n== {self.title}: {size / 1e6:,.1f} M parameters, {size * self.dtype.itemsize / 1e9:.2f} GB ==")
        print(f"{'':<47}{'min':>11}{'median':>11}{'max':>11}{'limit':>11}   reached")
        rows, work = {}, self.work()
        for row in sorted(self.seconds, key=lambda row: order(row, list(self.seconds))):
            seconds = self.seconds[row]
            limit = rates.limit(work.get(row) or work[row.rsplit(", ", 1)[0]], self.dtype)
            # Rates instead of times where that is what people compare.
            tokens = row.startswith(("decode", "8 prompts"))
            values = [1 / s for s in seconds] if tokens else [1e3 * s for s in seconds]
            bound = 1 / limit if tokens else 1e3 * limit
            unit, share = "tokens/s" if tokens else "ms", limit / median(seconds)
            rows[row] = dict(unit=unit, min=min(values), median=median(values), max=max(values), limit=bound, reached=share,
                             seconds=seconds)
            print(f"{row:<38}{unit:>9}" + "".join(f"{figure(v):>11}" for v in (min(values), median(values), max(values), bound))
                  + f"{share:>9.0%}")
        return rows

    def compare(self, rates):
        """Print what the rows mean for each other -> {name: figure} for the JSON."""
        found, time_of = {}, lambda row: median(self.seconds[row])
        for note in self.notes:
            print(f"  {note}")
        for name in [*self.peers, "compiled"] if self.compiles else self.peers:
            agree = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.ids["here"], self.ids[name])))
            warning = " WARNING: in float32 they should" if self.dtype == torch.float32 and agree < self.new else ""
            print(f"  {name}: the first {agree} of {self.new} greedy tokens are the same.{warning}")
            found[f"the same tokens as {name}"] = agree
        for row in (f"SLOT {STEPS} steps", "SLOT a step"):
            for name in list(self.forms)[1:] if "published loop" in self.forms else ():
                found[f"{row}, published / {name}"] = time_of(f"{row}, published loop") / time_of(f"{row}, {name}")
        found["8 prompts: batch / one by one"] = time_of("8 prompts one by one") / time_of("8 prompts in a batch")
        if self.compiles:
            found["decode, here / compiled"] = time_of("decode") / time_of("decode, compiled")
            found |= {f"decode, {name} / compiled": time_of(f"decode, {name}") / time_of("decode, compiled") for name in self.peers}
        for name in self.peers:
            for row in ["decode", f"first token after {len(self.prompt)}", "load, to the first token"] + \
                       [f"prefill {T}" for T in self.lengths]:
                found[f"{row}, {name} / here"] = time_of(f"{row}, {name}") / time_of(row)
        for what, value in found.items():
            if " / " in what:
                print(f"  {what:<60} {value:7.2f} x")
        n, W, b = len(self.prompt), self.lm.lm_head.weight.numel(), self.dtype.itemsize
        row, answer = f"SLOT {STEPS} steps, fast form", 512 * time_of("decode")
        least = rates.limit(self.work()[row], self.dtype)
        found["SLOT share of 512 tokens"], found["its limit"] = time_of(row) / answer, least / answer
        found["SLOT / its limit"] = time_of(row) / least
        print(f"  SLOT with {STEPS} steps costs {time_of(row) / answer:.2%} of decoding 512 tokens ({time_of(row):.3f} s of "
              f"{answer:.1f} s); its limit is {least / answer:.2%}:\n    W h once: 2 n V d = {2 * n * W / 1e9:.1f} GFLOP at "
              f"{rates.multiply(self.dtype) / 1e9:.0f} GFLOP/s; {STEPS} steps: 2 b V d + 8 n V = "
              f"{(2 * b * W + 8 * n * self.lm.config.vocab_size) / 1e9:.2f} GB each at {rates.read / 1e9:.1f} GB/s; together "
              f"{least:.3f} s; it takes {time_of(row) / least:.2f} x that")
        return found


def order(row, rows):
    """Peers stand below the row that they are compared with."""
    base = next((r for r in rows if row == r or row.startswith(r + ", ") and not row.startswith("SLOT")), row)
    return rows.index(base), rows.index(row)


def figure(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.1f}"


def child(what):
    """In a process of its own: print the memory that one stage takes, as JSON."""
    torch.set_num_threads(what["threads"])
    if what["stage"] == "long SLOT":
        from benchmarks.sweep import long_prompt
        f = long_prompt(what)
    elif what["stage"] == "answer":
        next(generate(load_model(HERE / "tiny"), [0], 1))                    # what torch sets up once is not the model's
        f = lambda: list(generate(load_model(what["folder"], dtype=what["dtype"]), what["tokens"], what["new"]))
    else:
        subject = Subject("", what["folder"], what["dtype"], what["new"])
        warm_up()
        subject.lm.lm_head(subject.hidden[:, -1:])                          # the weights are mapped in, and stay
        f = lambda: subject.slot(what["stage"], STEPS)
    began = time.perf_counter()
    peak, private = memory_of(f)
    print(json.dumps({"peak_mib": peak, "private_mib": private, "seconds": time.perf_counter() - began}))


def in_child(**what):
    """-> what `child` prints in a new process."""
    command = [sys.executable, str(HERE / "benchmark.py"), "--child", json.dumps(what | {"threads": torch.get_num_threads()})]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        answer = process.communicate()[0]
    finally:
        process.kill()
    if process.returncode:
        raise ValueError(f"the measurement of memory for {what['stage']} ended with status {process.returncode}")
    return json.loads(answer)


def memory(subject):
    """Print the memory of a whole answer and of each form of SLOT -> {stage: MiB}"""
    if not os.path.exists("/proc/self/clear_refs"):
        print("  memory: not measured, it takes Linux's /proc")
        return {}
    found = {}
    n, V = len(subject.prompt), subject.lm.config.vocab_size
    for stage in ["answer", *subject.forms]:
        say(f"{subject.title}: memory of {stage}")
        found[stage] = in_child(stage=stage, folder=str(subject.folder), dtype=str(subject.dtype)[6:], new=subject.new,
                                tokens=subject.prompt)
    weights = sum(p.numel() for p in subject.lm.parameters()) * subject.dtype.itemsize / 2**20
    print(f"  peak memory, MiB: load and {subject.new} tokens {found['answer']['peak_mib']:,.0f} over an idle process (the weights "
          f"are {weights:,.0f}); private at the end {found['answer']['private_mib']:,.0f}, the process itself included")
    print("    SLOT over the model: " + ", ".join(f"{name} {found[name]['peak_mib']:,.0f}" for name in subject.forms)
          + f" (the logits of all positions in float32 are {4 * n * V / 2**20:,.0f})")
    return found


def commands(seconds):
    """How long a user waits for an answer from the command line: {row: [seconds]}."""
    for row, command in (("import torch alone", ["-c", "import torch"]), ("generate.py --help", ["generate.py", "--help"]),
                         ("generate.py, one token", ["generate.py", "--max-new-tokens", "1"])):
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        seconds.setdefault(row, []).append(time.perf_counter() - began)


def random_folder(args):
    """-> the name and the folder of the random model, which is written the first time."""
    config = config_of(args.shape, args.layers)
    family = "Llama" if args.shape == "70b" else "Qwen2.5"
    name = f"{family.lower()}-{args.shape}" + f"-{args.layers}-layers" * (args.layers is not None)
    need = 2 * sum(math.prod(shape) for shape in weight_shapes(config).values()) * (3 if "float32" in args.dtype else 1)
    if hasattr(os, "sysconf") and need > 0.7 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise ValueError(f"--shape {args.shape}: its weights take {need / 2**30:.0f} GiB in {' and '.join(args.dtype)}, too much "
                         f"for this machine; give fewer --layers than {config['num_hidden_layers']}, or --dtype bfloat16 alone")
    if not (args.cache / name).exists():
        say(f"writing {args.cache / name}, once")
        write_random_model(args.cache / name, args.shape, layers=args.layers)
    layers = f" with {args.layers} of its layers" if args.layers else ""
    return f"random weights, {family} {args.shape} shape{layers}", args.cache / name


def warm_up():
    """The first optimiser of a process imports a second's worth of modules."""
    head = Linear(2, 3)
    torch.nn.init.ones_(head.weight)
    for function in FUNCTIONS.values():
        function(torch.ones(1, 3, 2), torch.zeros(1, 3, dtype=torch.int64), head, 2, LR)


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def main(args):
    if args.child:
        return child(json.loads(args.child))
    header = describe()
    print("\n".join(f"{name:<12}{text}" for name, text in header.items()), flush=True)
    if args.sweep:
        from benchmarks.sweep import sweep
        return finish(args, {"header": header, "sweep": sweep(args, in_child, say)})
    pythons = find_peers([sys.executable, *args.peer_python]) if args.peers else {}
    models = [(folder, Path(folder)) for folder in args.model or ()]
    models = models or [("tiny/, the embedded model", HERE / "tiny"), random_folder(args)]
    threads, emulated = torch.get_num_threads(), "EMULATED" in header["capability"]
    subjects, seconds, rates = [], {}, Rates([getattr(torch, dtype) for dtype in args.dtype])
    warm_up()
    try:
        for (name, folder), dtype in itertools.product(models, args.dtype):
            say(f"preparing {name}, {dtype}")
            subject = Subject(name, folder, dtype, args.new)
            subjects.append(subject)
            subject.compile()
            if "published loop" not in subject.forms:
                subject.notes.append(subject.piece_of_published())
            for kind, python in pythons.items() if folder != HERE / "tiny" else ():
                peer, note = start_peer(python, kind, folder, dtype, threads, args.cache, emulated)
                subject.notes.append(note)
                if peer:
                    subject.peers[kind] = peer
        for i in range(args.rounds):
            rates.measure()
            commands(seconds)
            for subject in subjects:
                for row, spent in subject.measure():
                    say(f"round {i + 1}/{args.rounds}  {subject.title}: {row} {spent:.4f} s")
                    subject.seconds.setdefault(row, []).append(spent)
    finally:
        for peer in (peer for subject in subjects for peer in subject.peers.values()):
            peer.stop()
    print(f"{'rates':<12}{rates.text()}\n{'rounds':<12}{args.rounds}, interleaved; page cache warm")
    print(f"{'commands':<12}" + "; ".join(f"{row} {median(s):.3f} s ({min(s):.3f} - {max(s):.3f})" for row, s in seconds.items()))
    tables = [dict(model=subject.name, dtype=str(subject.dtype)[6:], rows=subject.report(rates), figures=subject.compare(rates),
                   memory=memory(subject), notes=subject.notes) for subject in subjects]
    finish(args, {"header": header, "rates": rates.as_dict(), "commands": seconds, "tables": tables})


def finish(args, result):
    line = json.dumps(result, default=float)
    if args.json:
        Path(args.json).write_text(line + "\n")
    print(f"\n{line}")


if __name__ == "__main__":
    run(main, ARGS)
