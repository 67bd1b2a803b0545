"""Accuracy, and the loss on answers that δ never saw, of a model, plainly and with SLOT.

    python -m study                         the whole study on the embedded model
    python -m study --quick                 a look of seconds, for a change of slot.py
    python -m study --quick --slot-file my_slot.py        ... or of a copy of it
    python -m study --task gsm8k --data test.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --limit 200
    torchrun --nproc-per-node 8 -m study --tensor-parallel 2 --device cuda ...      see README.md
"""
import argparse
import os
import sys
from pathlib import Path

if not __package__:                     # python study, without -m
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from checks.command import Parser, check_speed, early_signals, number, run
from checks.options import TINY
from checks.slot_file import slot_file, use_slot_file
from study.settings import CONTROLS
from study.tasks import TASKS

QUICK = [(3, 0.01), (5, 0.1)]               # steps and rate of the paper's text, of its code
STEPS, RATE = number(int, 0, 10_000), number(float, 0, above=True)


def listed(parse):
    """An argparse type: values with commas between, sorted, each once."""
    return lambda text: sorted({parse(part.strip()) for part in text.split(",")})


def point(text):
    steps, colon, lr = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not STEPS:RATE, such as 5:0.1")
    return STEPS(steps), RATE(lr)


def control(text):
    if text not in CONTROLS:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a control; there are "
                                         f"{', '.join(CONTROLS)}, or none for none of them")
    return text


def parser():
    parser = Parser(prog="python -m study", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--task", choices=list(TASKS), default="tiny", help="the others need --data")
    add("--data", metavar="FILE", help="the task's problems, as published")
    add("--model", default=str(TINY), metavar="FOLDER_OR_ID", help="(default: the embedded model)")
    add("--quick", action="store_true", help="40 problems a kind, 3 settings, printed, not kept")
    add("--slot-file", type=slot_file, metavar="FILE", help="your copy of slot.py for ours")
    add("--slot-fast", action="store_true", help="closed-form gradient, not the readable loop")
    add("--steps", type=listed(STEPS), metavar="1,2", help="(default 1,2,3,5; tiny: and 10,20)")
    add("--lr", type=listed(RATE), metavar="X,Y", help="learning rates (default 0.01,0.1)")
    add("--points", type=listed(point), metavar="STEPS:X,...", help="instead of --steps and --lr")
    add("--control", type=lambda text: [] if text == "none" else listed(control)(text),
        metavar="NAME,NAME", help=f"{', '.join(CONTROLS)} (default: all for tiny, else none)")
    add("--control-points", type=listed(point), metavar="STEPS:X,...", help="(default: all points)")
    add("--only", choices=["loss"], help="loss: measure losses, decode nothing")
    add("--limit", type=number(int, 1, 10_000), metavar="N", help="problems a kind (tiny: 300)")
    add("--skip", type=number(int, 0, 1 << 30), default=0, metavar="N", help="without the first N")
    add("--shots", type=number(int, 0, 100), default=0, metavar="K", help="problems solved before")
    add("--split", choices=["tune,test"], metavar="tune,test",
        help="choose the point on every other sample, report it on the rest")
    add("--max-new-tokens", type=number(int, 1, 1 << 30), metavar="N",
        help="(default: the task's, at most a quarter of the positions)")
    add("--batch", type=number(int, 1, 4096), metavar="N", help="(default 8; tiny: 100)")
    add("--seed", type=number(int, 0, 2 ** 31), default=0, metavar="S",
        help="of tiny's problems, GPQA's options, random δ")
    add("--out", metavar="DIR", help="results, also of a run to go on with (default runs/TASK)")
    add("--tensor-parallel", type=number(int, 1, 1 << 16), default=1, metavar="N",
        help="under torchrun: N ranks form a model, the other ranks its replicas (default 1)")
    add("--device", default="cpu", metavar="D", help="cpu (default), cuda, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    return parser


def parse_arguments(arguments=None):
    """-> the options; points and control_points are lists of (steps, lr), out a Path or None."""
    command = parser()
    args = command.parse_args(arguments)
    task, tiny = TASKS[args.task], args.task == "tiny"
    if tiny and (args.data or args.skip):
        command.error("--data and --skip are for the other tasks; tiny makes its own problems")
    if not tiny and not args.data:
        command.error(f"--task {args.task} needs --data FILE: {task['data']}")
    if args.points and (args.steps or args.lr):
        command.error("give --points, or --steps and --lr")
    if args.split and args.only:
        command.error("--split chooses by the answers, and --only loss has none")
    if args.tensor_parallel > 1 and "RANK" not in os.environ:
        command.error("--tensor-parallel needs torchrun, which starts the processes")
    check_speed(command, args)
    use_slot_file(command, args)
    if not args.points and args.quick and not (args.steps or args.lr):
        args.points = QUICK
    steps = args.steps or [1, 2, 3, 5] + [10, 20] * tiny
    points = args.points or [(s, lr) for s in steps for lr in args.lr or [0.01, 0.1]]
    args.points = sorted((p for p in points if p[0]), key=lambda p: p[::-1])    # plain always runs
    args.control_points = sorted(args.control_points or args.points, key=lambda p: p[::-1])
    if not set(args.control_points) <= set(args.points):
        command.error("--control-points names a point that SLOT is not run at")
    if args.control is None:
        args.control = list(CONTROLS) if tiny and not args.quick else []
    args.limit = args.limit or (40 if args.quick else task.get("limit"))
    args.batch = args.batch or task.get("batch", 8)
    args.out = Path(args.out or f"runs/{args.task}") if args.out or not args.quick else None
    args.embedded = args.model == str(TINY)
    return args


if __name__ == "__main__":
    early_signals()
    ARGS = parse_arguments()                # before torch is imported, which takes a second
    from study.run import main
    run(main, ARGS)
