"""What evaluate.py asks: five tasks, each as its publishers ship it, in one form.

    file ──► records ──► Problem(question, reference answer, gold) ──► messages ──► ids of the prompt
"""
import csv
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

TASKS = {   # data: the file's name and where its publishers keep it; format: see scoring.py; new: tokens of an answer, at most
    "tiny": dict(data=None, format="hashes", new=96, limit=300, batch=100),
    "gsm8k": dict(data="test.jsonl, at github.com/openai/grade-school-math in grade_school_math/data", format="tags", new=512),
    "aime24": dict(data="data/train-00000-of-00001.parquet, or the same as jsonl, at huggingface.co/datasets/HuggingFaceH4/aime_2024",
                   format="boxed", new=32768),
    "math500": dict(data="test.jsonl, at huggingface.co/datasets/HuggingFaceH4/MATH-500", format="boxed", new=32768),
    "gpqa": dict(data="gpqa_diamond.csv, at huggingface.co/datasets/Idavidrein/gpqa (after you agree to its terms)",
                 format="letter", new=32768),
}


class Problem(NamedTuple):
    kind: str                               # common, rare, unseen; of a file: the task's name
    question: str                           # what the user says
    reference: str                          # a right answer in the required format, whose loss is measured
    gold: str                               # its value
    system: str | None = None
    ids: list = []                          # the tokens of the prompt


# The instructions of the authors' runs: their own script's for GSM8K, lighteval's for the others. Prompts are data: not a letter is
# changed, though some spaces are missing.
GSM8K_SYSTEM = (
    "You are a helpful assistant. A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The Assistant first thinks about the reasoning process in the mind and then provides the user with the answer."
    "The reasoning process and answer are enclosed within <think> </think> and<answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think><answer> answer here </answer>.")
MATH_INSTRUCTION = (
    "Solve the following math problem efficiently and clearly.  The last line of your response should be of the following format: "
    "'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without quotes) where ANSWER is just the final "
    "number or expression that solves the problem. Think step by step before answering.\n\n")
GPQA_INSTRUCTION = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n")


def read_problems(args):
    """-> all problems of the task, in order."""
    if args.task == "tiny":
        from tiny.problems import heldout
        return [Problem(group, p.question, p.answer, p.answer.split("#### ")[-1])
                for group in ("common", "rare", "unseen") for p in heldout(group, args.limit, args.seed)]
    found = []
    for place, row in enumerate(read_rows(args.task, Path(args.data))):
        try:
            found.append(problem_from_row(args, place, row))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            why = f"has no {error}" if isinstance(error, KeyError) else "is of another form"
            raise ValueError(f"{args.data}: record {place + 1} {why}; {args.task} is {TASKS[args.task]['data']}") from None
    if not found:
        raise ValueError(f"{args.data}: no records; {args.task} is {TASKS[args.task]['data']}")
    return found


def read_rows(task, path):
    """The records of a jsonl, csv or parquet file, as dicts."""
    if not path.is_file():
        raise ValueError(f"--data {str(path)!r} is not there: {task} is {TASKS[task]['data']}")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{path}: parquet needs pyarrow (pip install pyarrow); or convert the file to jsonl") from None
        return pyarrow.parquet.read_table(path).to_pylist()
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not {'csv' if path.suffix == '.csv' else 'one JSON object a line'} ({error})") from None


def problem_from_row(args, place, row):
    task = args.task
    if task == "gsm8k":
        solution, gold = row["answer"].rsplit("####", 1)
        solution, gold = re.sub(r"<<.*?>>", "", solution).strip(), gold.strip()     # without the marks for a calculator
        return Problem(task, row["question"], f"<think>{solution}</think><answer>{gold}</answer>", gold, GSM8K_SYSTEM)
    if task in ("aime24", "math500"):
        return Problem(task, MATH_INSTRUCTION + row["problem"], row.get("solution") or f"$\\boxed{{{row['answer']}}}$", str(row["answer"]))
    right = row["Correct Answer"].strip()
    options = [right] + [row[f"Incorrect Answer {i}"].strip() for i in (1, 2, 3)]
    random.Random(f"{args.seed} {place}").shuffle(options)
    letter = "ABCD"[options.index(right)]
    listing = "\n".join(f"{name}) {option}" for name, option in zip("ABCD", options))
    return Problem(task, f"{GPQA_INSTRUCTION}{row['Question'].strip()}\n\n{listing}",
                   f"{(row.get('Explanation') or '').strip()}\nAnswer: {letter}".strip(), letter)


def tokenized(args, problems, tokenizer, most):
    """-> the problems to ask, with the ids of their prompts, and how many are left out because theirs are more than `most`."""
    if args.task == "tiny":
        from tiny.problems import problem
        shots = [(p.question, p.answer) for p in (problem(0, i) for i in range(args.shots))]       # of the training problems
    else:       # the file's last problems are solved in every prompt, and so are not asked
        asked = len(problems) - args.shots
        problems, shots = problems[:max(0, asked)][:args.limit], [(p.question, p.reference) for p in problems[max(0, asked):]]
    examples = [dict(role=role, content=text) for shot in shots for role, text in zip(("user", "assistant"), shot)]
    asked = []
    for p in problems:
        system = [dict(role="system", content=p.system)] if p.system else []
        asked.append(p._replace(ids=tokenizer.chat_ids(system + examples + [dict(role="user", content=p.question)])))
    fit = [p for p in asked if len(p.ids) <= most]
    if not fit:
        raise ValueError(f"no prompt of {args.task} fits in {most} tokens; use another model, or a lower --max-new-tokens or --shots")
    return fit, len(asked) - len(fit)
