"""Can the answer's gradient, which nobody knows at test time, be replaced by one that is known?

    python -m study.proxy DIR --model qwen-coder

DIR holds the results of a decoded run, with plain answers. For every sample: the cosine of the
prompt's gradient at δ = 0 and of the gradient on the model's own plain answer, up to the end of its
first sentence. Does it tell, as the cosine with the reference answer does, which samples gain?
For runs without --shots.
"""
import re
import sys
from pathlib import Path

from checks.command import Parser, early_signals, run
from checks.files import parse_json, regular_file, show

SENTENCE = re.compile(r"\n|[.!?](?=\s)")
MOST = 40                                   # tokens of it
NEEDED = {"sample", "setting", "kind", "prompt", "answer", "answer_loss"}


def parse_arguments(arguments=None):
    parser = Parser(prog="python -m study.proxy", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="of a run that decoded answers")
    parser.add_argument("--model", required=True, metavar="FOLDER_OR_ID", help="that answered")
    parser.add_argument("--dtype", default="auto",
                        choices=["auto", "float32", "bfloat16", "float16"])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    early_signals()
    ARGS = parse_arguments()

import torch
import torch.nn.functional as F

import slot
from load_weights import find_model, load_model
from study.measure import Text
from study.report import interval, markdown
from study.results import result_files
from study.stats import bootstrap_rank
from study.tasks import TASKS, messages
from tokenizer import load_tokenizer


def first_sentence(text):
    text = text.strip()
    end = SENTENCE.search(text)
    return text[:end.end()] if end else text


@torch.no_grad()
def cosine(lm, ids, answer):
    """ids of the prompt, and of what is taken for its answer -> the cosine of the gradients of
    their losses with respect to δ, at δ = 0."""
    hidden, _ = slot.prefill(lm, ids + answer[:-1], 0)                      # (1, T + A - 1, d)
    split = len(ids) - 1                    # the last position of the prompt predicts the answer
    seen = Text(lm.lm_head, hidden[0, :split], ids[1:])
    unseen = Text(lm.lm_head, hidden[0, split:], answer)
    return F.cosine_similarity(seen.gradient(), unseen.gradient(), dim=0).item()


def main(args):
    found = {}
    for path in result_files(args.folder) or [args.folder / "results.jsonl"]:
        for line in regular_file(path).read_bytes().splitlines():
            row = parse_json(line, path)
            if missing := ", ".join(sorted(NEEDED - row.keys())):
                raise ValueError(f"{show(path, 160)}: has a line without {missing}; take the "
                                 "folder of a run that decoded")
            found.setdefault(row["setting"], {})[row["sample"]] = row
    plain = found.get("plain")
    if not plain:
        raise ValueError(f"{show(args.folder, 160)}: holds no plain answers; let the run end")
    folder = find_model(args.model)
    lm, tokenizer = load_model(folder, dtype=args.dtype), load_tokenizer(folder)
    task = TASKS.get(next(iter(plain.values()))["kind"], {})            # tiny has no system text

    # the cosine with what the model itself would say first
    own = {}
    for sample, row in sorted(plain.items()):
        ids = tokenizer.chat_ids(messages(task.get("system"), [], row["prompt"]))
        answer = tokenizer.encode(first_sentence(row["answer"]))[:MOST]
        if answer:
            own[sample] = cosine(lm, ids, answer)
        if sys.stderr.isatty():
            print(f"\r{len(own)} of {len(plain)} samples", end="", file=sys.stderr, flush=True)

    # both cosines against what SLOT takes from the answer's loss
    lines = []
    for setting, rows in found.items():
        if setting.startswith("slot "):
            shared = [sample for sample in own if sample in rows]
            gain = [plain[i]["answer_loss"] - rows[i]["answer_loss"] for i in shared]
            true, mine = [plain[i]["alignment"] for i in shared], [own[i] for i in shared]
            lines.append([setting, str(len(shared)), interval(bootstrap_rank(true, gain)),
                          interval(bootstrap_rank(mine, gain))])
    print("\n".join(markdown(["setting", "n", "rank correlation with the gain: the answer's "
                              "gradient", "the own first sentence's"], lines)))


if __name__ == "__main__":
    run(main, ARGS)
