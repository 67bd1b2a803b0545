"""The run: problems in batches, every missing result measured and kept as it comes, the report."""
import hashlib
import json
import os
import sys
import time
from importlib import metadata, util

import torch

from checks.weights import check_device
from load_weights import find_model, load_model
from study import report
from study.measure import Study
from study.progress import Progress
from study.results import Results, model_digests, source_digests
from study.scoring import paper, strict
from study.settings import all_settings
from study.tasks import TASKS, read_problems, tokenized
from tokenizer import load_tokenizer

speed = None                                # without speed/ the numbers are the same
if util.find_spec("speed"):
    import speed.linear
    import speed.parallel
    import speed.ranks


def main(args):
    began, loop = time.perf_counter(), f"the loop of {args.slot_file or 'slot.py'}"
    if args.slot_fast:
        loop = "closed form"
    device, ranks, replica, replicas = place_of(args)
    every = read_problems(args)
    check_device(device)
    if args.task == "math500" and not util.find_spec("math_verify"):
        raise ValueError("--task math500 needs the authors' own scorer of formulas: pip install "
                         "'math-verify[antlr4_13_2]'")
    folder = find_model(args.model)
    tokenizer = load_tokenizer(folder)
    lm = load(folder, device, args.dtype, ranks)
    positions = lm.config.max_position_embeddings
    new = args.max_new_tokens or max(1, min(TASKS[args.task]["new"], positions // 4))
    problems, too_long = tokenized(args, every, tokenizer, positions - new)
    study, settings = Study(args, lm, tokenizer, problems, new), all_settings(args)
    if "wrong-prompt" in args.control and min(map(len, study.groups)) < 2:
        raise ValueError("--control wrong-prompt needs two samples of each kind; raise --limit or "
                         "leave it out")

    names, kinds = [setting.name for setting in settings], [p.kind for p in problems]
    writes = ranks == 1 or speed.ranks.rank() == 0
    results = Results(args.out if writes else None, what_decides(study, folder), kinds, names,
                      not args.only, replica)
    if ranks > 1:
        results.rows = speed.ranks.first(lambda: results.rows)
    batches = batches_of(study)[replica::replicas]
    own = {sample for batch in batches for sample in batch}
    there = sum(row["sample"] in own for row in results.rows.values())
    if args.points:
        torch.optim.AdamW([torch.zeros(1)])     # the first imports 800 modules: not SLOT's time
    progress = Progress(there, len(names), len(own), quiet=replica > 0)
    line = f"study     {args.task}: {len(kinds)} samples, {len(names)} settings, {loop}"
    if replicas > 1:
        line += f", {replicas} replicas, {len(own)} samples for the first"
    if args.out:
        line += f" -> {args.out}"
    if progress.done:
        line += f"; {progress.done:,} of {progress.total:,} answers are there already"
    if replica == 0:
        print(line, file=sys.stderr)
    work(study, batches, settings, results, progress)

    if replicas > 1 and writes:
        results.read()                                      # what the others have by now
        missing = len(names) * len(kinds) - len(results.rows)
        if missing and replica == 0:
            print(f"study     the first replica has done its share; {missing:,} answers are still "
                  "missing, and who brings the last writes the report", file=sys.stderr)
        writes = not missing
    if not writes:
        return results.close()
    rows = list(results.rows.values())
    if args.quick:
        print(report.quick(args, rows), f"{loop}, {time.perf_counter() - began:.0f} s", sep="\n")
    if args.out:
        notes = notes_of(study, every, positions, too_long)
        print(f"report    {report.write(args, rows, notes)}", file=sys.stderr)
    results.close()


def place_of(args):
    """-> the device of this process, the ranks of its model, which replica it is, of how many."""
    if "RANK" not in os.environ:
        return args.device, 1, 0, 1
    device, ranks, replica = speed.ranks.start(args.device, args.tensor_parallel)
    replicas = int(os.environ["WORLD_SIZE"]) // ranks
    if replicas > 1 and not args.out:
        raise ValueError("replicas share their results in a folder: give --out")
    return device, ranks, replica, replicas


def load(folder, device, dtype, ranks):
    if ranks > 1:
        return speed.parallel.load_model(folder, device, dtype)[0]
    lm = load_model(folder, device, dtype)
    if speed:
        speed.linear.use(lm)
    return lm


def batches_of(study):
    """-> lists of samples of one kind. The same for any number of replicas: the bits of an answer
    can depend on who stands beside it."""
    size = 1 if study.args.only else study.args.batch
    return [group[start:start + size]
            for group in study.groups for start in range(0, len(group), size)]


def work(study, batches, settings, results, progress):
    """Measure what is missing. Always the whole batch, even if a killed run has done part of it: a
    product over other rows can differ in the last bit, and a run in two pieces must be the run in
    one piece."""
    for rows in batches:
        missing = {}
        for setting in settings:
            left = [i for i in rows if (i, setting.name) not in results.rows]
            if left:
                missing[setting] = left
        for row in study.measure(rows, missing):
            results.add(row)
            progress.done += 1
            progress.show()
    progress.end()


def what_decides(study, folder):
    """All that the results depend on; where it differs, it is another run."""
    args, options = study.args, ("task", "points", "control", "control_points", "only", "limit",
                                 "skip", "shots", "split", "batch", "seed", "device", "slot_fast")
    ranks = {"tensor_parallel": args.tensor_parallel} if args.tensor_parallel > 1 else {}
    libraries = ["torch"] + ["math-verify"] * (args.task == "math500")
    asked = hashlib.sha256(json.dumps(study.problems).encode()).hexdigest()[:16]
    return {name: getattr(args, name) for name in options} | dict(
        max_new_tokens=study.new, dtype=dtype_of(study.lm), problems=asked,
        model=model_digests(folder), products=os.environ.get("SLOT_PRODUCTS"),
        source=source_digests(args.slot_fast, args.slot_file, parallel=bool(ranks)),
        libraries={name: metadata.version(name) for name in libraries}) | ranks


def dtype_of(lm):
    return str(lm.lm_head.weight.dtype).removeprefix("torch.")


def notes_of(study, every, positions, too_long):
    """What the report says first. every: the problems, before some were left out."""
    args, new, encode = study.args, study.new, study.tokenizer.encode
    name = "tiny/, the embedded model" if args.embedded else args.model
    size = sum(p.numel() for p in study.lm.parameters()) / 1e6
    right = sum(strict(p.reference, p.gold, args.task == "math500") for p in every)
    theirs = [paper(p.reference, p.gold) for p in every]
    known = any(verdict is not None for verdict in theirs)
    if args.tensor_parallel > 1:
        name += f", in parts: of each of {args.tensor_parallel} ranks"
    notes = [f"Model: {name}, {size:,.2f} M parameters, {dtype_of(study.lm)}, {args.device}. "
             + ("Nothing is decoded" if args.only else f"Greedy decoding, at most {new} new tokens")
             + f"; {args.shots} solved problems before each question.",
             f"Scorers on the {len(every):,} reference answers: strict finds {right:,} right, the "
             f"paper's rule {f'{theirs.count(True):,}.' if known else 'knows no such answers.'}"]
    if too_long:
        notes.append(f"{too_long} prompts are longer than {positions - new} tokens and left out: "
                     f"they and {new} new ones exceed the model's {positions} positions.")
    cut = sum(len(encode(p.reference)) > new for p in study.problems)
    if cut:
        notes.append(f"{cut} reference answers are longer than {new} tokens; their loss is that of "
                     f"their first {new}.")
    return notes
