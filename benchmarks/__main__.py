"""How fast is each stage, and how fast could it be? Every figure beside its physical limit.

    python -m benchmarks                                a random model of the 0.5 B shape
    python -m benchmarks --model smollm2                a real one
    python -m benchmarks --peers --peer-python PATH     beside transformers and llama.cpp
    python -m benchmarks --sweep                        SLOT by length and steps; memory; products

All is measured in rounds, A B C A B C ..., so that a slow minute hits A, B and C alike. Reading the
weights bounds decoding, multiplying by them prefill, W h SLOT. `reached` is the limit / the median.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.peer import Peer, find_peers
from benchmarks.random_model import SHAPES, write_random_model
from checks.command import Parser, early_signals, number, run
from checks.files import cache_folder

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("bfloat16", "float32", "float16")


def parse_arguments(arguments=None):
    def dtypes(text):
        if not set(text.split(",")) <= set(KINDS):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a list of {', '.join(KINDS)}")
        return text.split(",")

    parser = Parser(prog="python -m benchmarks", description="Speed and memory of every stage.")
    add = parser.add_argument
    add("--model", action="append", metavar="FOLDER", help="default: a random one of --shape")
    add("--shape", choices=SHAPES, default="0.5b", help="of the random model (default 0.5b)")
    add("--layers", type=number(int, 1, 1000), metavar="N", help="fewer than the shape has")
    add("--cache", type=Path, default=cache_folder() / "slot-benchmarks", metavar="DIR",
        help="for random models and GGUF files (default %(default)s)")
    add("--dtype", type=dtypes, default=KINDS[:2], metavar="A,B", help="default bfloat16,float32")
    add("--rounds", type=number(int, 1, 1000), default=3, metavar="N", help="default 3")
    add("--new", type=number(int, 2, 256), default=32, metavar="N", help="tokens, default 32")
    add("--peers", action="store_true", help="transformers and llama-cpp-python, if installed")
    add("--peer-python", action="append", default=[], metavar="PATH", help="a Python with peers")
    add("--gguf", type=Path, metavar="FILE", help="a file that llama.cpp runs for information")
    add("--sweep", action="store_true", help="SLOT by length and steps, and the products")
    add("--child", help=argparse.SUPPRESS)          # a measurement of memory, in its own process
    args = parser.parse_args(arguments)
    if (args.peer_python or args.gguf) and not args.peers:
        parser.error("--peer-python and --gguf need --peers")
    return args


if __name__ == "__main__":                          # before torch is imported
    early_signals()
    ARGS = parse_arguments()

import torch

from benchmarks.machine import Rates, describe, memory_of
from benchmarks.report import comparison, table
from benchmarks.stages import STEPS, Subject, warm_up
from benchmarks.sweep import LONG, call_of, products, sweep
from load_weights import find_model


def say(text):
    print(text, file=sys.stderr, flush=True)


def random_folder(args):
    """The folder of the random model, which is written the first time."""
    folder = args.cache / f"random-{args.shape}-{args.layers or 'all'}-layers"
    return folder if folder.exists() else write_random_model(folder, args.shape, args.layers)


def add_peers(args, subject, pythons):
    """Start the peers of a subject; what cannot be compared becomes a note."""
    files = {"transformers": ("transformers", subject.folder)}
    path = args.cache / f"{subject.folder.name}-{subject.dtype}.gguf"
    try:
        if "llama.cpp" in pythons and not path.exists():
            from benchmarks.gguf import write_gguf
            args.cache.mkdir(parents=True, exist_ok=True)
            write_gguf(subject.folder, path, subject.dtype)
        files["llama.cpp"] = "llama.cpp", path
    except (ValueError, ImportError) as error:
        subject.notes.append(f"llama.cpp: left out, {error}")
    if args.gguf:
        files[f"llama.cpp on {args.gguf.name}"] = "llama.cpp", args.gguf
    for name, (kind, place) in files.items():
        if kind in pythons:
            peer = Peer(pythons[kind], kind, place, subject.dtype, torch.get_num_threads())
            subject.peers[name] = peer
            subject.notes.append(f"{name}: {peer.version}")


def child(what):
    """In a process of its own: print the time and memory of SLOT on a long prompt, as JSON."""
    torch.set_num_threads(what["threads"])
    warm_up()
    call = call_of(Subject(what["folder"], what["dtype"], 2).lm, LONG, STEPS)
    began = time.perf_counter()
    peak = memory_of(call)
    print(json.dumps({"peak_mib": peak, "seconds": time.perf_counter() - began}))


def in_child(subject):
    """-> what `child` prints in a new process."""
    say(f"{subject.title}: {LONG} tokens")
    what = dict(folder=str(subject.folder), dtype=subject.dtype, threads=subject.threads)
    command = [sys.executable, "-m", "benchmarks", "--child", json.dumps(what)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"SLOT on {LONG} tokens ended with status {done.returncode}")
    return json.loads(done.stdout)


def measure(args, subjects, rates):
    """-> the tables, printed: of all rounds, or with --sweep of the closer looks."""
    for count in range(1, args.rounds + 1):
        rates.measure()
        for subject in [] if args.sweep else subjects:
            for row, spent in subject.measure():
                say(f"round {count}/{args.rounds}  {subject.title}: {row} {spent:.4f} s")
                subject.seconds.setdefault(row, []).append(spent)
    print(f"{'rates':<12}{rates} (least - most of {args.rounds} rounds)")
    if args.sweep:
        return [dict(title=each.title, products=products(each, args.rounds, say),
                     slot=sweep(each, rates, args.rounds, in_child, say)) for each in subjects]
    return [dict(title=each.title, rows=table(each, rates), notes=each.notes,
                 figures=comparison(each, rates)) for each in subjects]


def main(args):
    if args.child:
        return child(json.loads(args.child))
    header, subjects, rates, threads = describe(), [], Rates(args.dtype), torch.get_num_threads()
    print("\n".join(f"{name:<12}{text}" for name, text in header.items()), flush=True)
    pythons = find_peers([sys.executable, *args.peer_python]) if args.peers else {}
    folders = [find_model(name) for name in args.model or ()] or [random_folder(args)]
    warm_up()
    try:
        for folder in folders:
            for dtype in args.dtype:
                say(f"preparing {folder}, {dtype}")
                torch.set_num_threads(threads)              # a small model takes but one
                subjects.append(Subject(folder, dtype, args.new))
                add_peers(args, subjects[-1], pythons)
        result = measure(args, subjects, rates)
    finally:
        for subject in subjects:
            for peer in subject.peers.values():
                peer.process.kill()
    rates = {"read": rates.reads, "multiply": rates.products}
    print(f'\n{json.dumps({"header": header, "rates": rates, "tables": result})}')


if __name__ == "__main__":
    run(main, ARGS)
