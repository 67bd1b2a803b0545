"""What the study asks: problems as their publishers ship them, in one form.

    file ──► records ──► Problem(question, reference answer, gold) ──► messages ──► prompt's ids

tasks.json has the prompts, which are data: the authors' own for GSM8K, though some spaces are
missing in it, lighteval's for the others, and Qwen's for gsm8k-boxed. And of every task: `data`,
its file and where it is published; `format`, that of an answer; `new`, its tokens at most.
"""
import csv
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

TASKS = json.loads(Path(__file__).with_name("tasks.json").read_text(encoding="utf-8"))


class Problem(NamedTuple):
    kind: str                               # common, rare, unseen; of a file: the task's name
    question: str                           # what the user says
    reference: str                          # a right answer in the asked format: held out from δ
    gold: str                               # its value
    system: str | None = None
    ids: list = []                          # the tokens of the prompt


def read_problems(args):
    """-> all problems of the task, in order."""
    if args.task == "tiny":
        from tiny.problems import heldout
        return [Problem(kind, p.question, p.answer, p.answer.split("#### ")[-1])
                for kind in ("common", "rare", "unseen")
                for p in heldout(kind, args.limit, args.seed)]
    found, origin = [], f"{args.task} is {TASKS[args.task]['data']}"
    for place, row in enumerate(read_rows(args.task, Path(args.data))):
        try:
            question, reference, gold = read_row(args, place, row)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            why = f"has no {error}" if isinstance(error, KeyError) else "is of another form"
            raise ValueError(f"{args.data}: record {place + 1} {why}; {origin}") from None
        task = TASKS[args.task]
        question = task.get("before", "") + question + task.get("behind", "")
        found.append(Problem(args.task, question, reference, gold, task.get("system")))
    if not found:
        raise ValueError(f"{args.data}: no records; {origin}")
    return found


def read_rows(task, path):
    """The records of a jsonl, csv or parquet file, as dicts."""
    if not path.is_file():
        raise ValueError(f"--data {str(path)!r} is not there: {task} is {TASKS[task]['data']}")
    rows = []
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet
            return pyarrow.parquet.read_table(path).to_pylist()
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                return list(csv.DictReader(file))
            for line in file:
                if line.strip():
                    rows.append(json.loads(line))
    except ImportError:
        raise ValueError(f"{path}: parquet needs pyarrow (pip install pyarrow); or convert the "
                         "file to jsonl") from None
    except (ValueError, OSError, csv.Error, RecursionError) as error:
        kind = path.suffix[1:] if path.suffix in (".csv", ".parquet") else "one JSON object a line"
        raise ValueError(f"{path}: not {kind} after record {len(rows)} ({error})") from None
    return rows


def read_row(args, place, row):
    """-> question, reference answer, gold."""
    if args.task.startswith("gsm8k"):
        solution, gold = text(row, "answer").rsplit("####", 1)
        solution = re.sub(r"<<.*?>>", "", solution).strip()     # without the marks for a calculator
        question, gold = text(row, "question"), gold.strip()
        if args.task == "gsm8k-boxed":
            return question, f"{solution}\nThe final answer is $\\boxed{{{gold}}}$.", gold
        return question, f"<think>{solution}</think><answer>{gold}</answer>", gold
    if args.task in ("aime24", "math500"):
        gold = str(row["answer"])
        solution = text(row, "solution") if row.get("solution") else f"$\\boxed{{{gold}}}$"
        return text(row, "problem"), solution, gold
    right = text(row, "Correct Answer").strip()
    options = [right] + [text(row, f"Incorrect Answer {i}").strip() for i in (1, 2, 3)]
    random.Random(f"{args.seed} {place}").shuffle(options)
    gold = "ABCD"[options.index(right)]
    listing = "\n".join(f"{letter}) {option}" for letter, option in zip("ABCD", options))
    why = text(row, "Explanation") if row.get("Explanation") else ""
    question = f"{text(row, 'Question').strip()}\n\n{listing}"
    return question, f"{why.strip()}\nAnswer: {gold}".strip(), gold


def text(row, name):
    """A field that must be text, of whole characters."""
    row[name].encode("utf-8")
    return row[name]


def messages(system, shots, question):
    """What the chat template gets. system: a text or None; shots: pairs of question and answer."""
    turns = [("system", system)] if system else []
    for asked, answer in shots:
        turns += [("user", asked), ("assistant", answer)]
    turns.append(("user", question))
    return [dict(role=role, content=content) for role, content in turns]


def tokenized(args, problems, tokenizer, most):
    """-> the problems to ask, with the ids of their prompts, and how many are left out because
    theirs are more than `most`."""
    if args.task == "tiny":
        from tiny.problems import problem
        training = [problem(0, i) for i in range(args.shots)]
        shots = [(p.question, p.answer) for p in training]
    else:       # the file's last problems are solved in every prompt, and so are not asked
        end = max(0, len(problems) - args.shots)
        shots = [(p.question, p.reference) for p in problems[end:]]
        problems = problems[args.skip:end][:args.limit]
    if not problems:
        raise ValueError(f"no problem of {args.task} is left; use a lower --skip or --shots")
    asked = []
    for p in problems:
        asked.append(p._replace(ids=tokenizer.chat_ids(messages(p.system, shots, p.question))))
    fit = [p for p in asked if len(p.ids) <= most]
    if not fit:
        raise ValueError(f"no prompt of {args.task} fits in {most} tokens; use another model, or a "
                         "lower --max-new-tokens or --shots")
    return fit, len(asked) - len(fit)
