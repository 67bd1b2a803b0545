"""The options of generate.py, and which values they take. Judged before torch is imported."""
import os
from pathlib import Path

from checks.command import Parser, check_speed, number
from checks.slot_file import slot_file, use_slot_file

TINY = Path(__file__).resolve().parent.parent / "tiny"
NEW_TOKENS = 256


def parse_arguments(arguments=None):
    parser = Parser(prog="generate.py", description="Answer a prompt, plainly or with SLOT.")
    add = parser.add_argument
    add("prompt", nargs="*", help="the prompt, - for standard input; several are answered together "
        "(default: what a pipe brings, else a held-out problem of the embedded model)")
    add("--model", default=str(TINY), metavar="NAME", help="a folder, a name kept by python -m "
        "convert, or a hub id like Qwen/Qwen2.5-0.5B-Instruct (default: the embedded model)")
    add("--prompts", metavar="FILE", help='one a line, or {"prompt": ..., "system": ...}')
    add("--system", metavar="TEXT", help="a system message before every prompt")
    add("--raw", action="store_true", help="continue the prompt as it is, without chat template")
    add("--problem", type=number(int, 1, 300), metavar="N", help="held-out problem N of tiny/")
    add("--slot-steps", type=number(int, 0, 10_000), metavar="N", help="steps (default 0: plain; "
        "5 with --compare; 3 with --slot-lr, --slot-fast or --slot-file)")
    add("--slot-lr", type=number(float, 0, 1e6, above=True), metavar="X",
        help="learning rate (default 0.01; 0.1 with --compare)")
    add("--slot-fast", action="store_true", help="the same δ by speed/delta.py, in bounded memory")
    add("--slot-memory", type=number(float, 0, 1 << 20, above=True), default=1.0, metavar="GIB",
        help="that bound (default 1)")
    add("--slot-file", type=slot_file, metavar="FILE", help="your copy of slot.py for ours")
    add("--save-delta", metavar="FILE", help="keep δ as a safetensors file")
    add("--delta", metavar="FILE", help="answer with a δ that was kept, instead of fitting one")
    add("--compare", action="store_true", help="the plain answer, then SLOT's")
    add("--picture", metavar="FILE", help="as --compare, and a web page of what δ saw and changed")
    add("--reference", metavar="TEXT", help="a right answer: the page shows how its loss changes")
    add("--max-new-tokens", type=number(int, 1, 1 << 30), metavar="N",
        help=f"(default {NEW_TOKENS})")
    add("--temperature", type=number(float, 0), default=0.0, metavar="T", help="(0: greedy)")
    add("--top-k", type=number(int, 0), default=0, metavar="K", help="sample among the K likeliest")
    add("--top-p", type=number(float, 0, 1, above=True), default=1.0, metavar="P",
        help="sample among the likeliest that make up P")
    add("--seed", type=number(int, 0, 2**62), default=0, metavar="S", help="of the sampling")
    add("--device", default="cpu", metavar="D", help="cpu (default), cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    args = parser.parse_args(arguments)
    args.compare = args.compare or args.picture is not None
    compares = args.compare and args.delta is None
    if args.slot_steps is None:
        fits = args.slot_lr or args.delta is None and (args.slot_fast or args.slot_file)
        args.slot_steps = 5 if compares else 3 if fits else 0
    args.slot_lr = args.slot_lr or (0.1 if compares else 0.01)
    check_options(parser, args)
    check_speed(parser, args)
    use_slot_file(parser, args)
    return args


def check_options(parser, args):
    """Options of generate.py that do not go together."""
    several = args.prompts is not None or len(args.prompt) > 1
    for wrong, why in (
            (args.prompt and args.prompts is not None, "give prompts or --prompts, not both"),
            (args.problem and (args.prompt or several), "give prompts or --problem, not both"),
            (args.raw and args.system, "--system needs the chat template that --raw leaves out"),
            (several and args.compare, "--compare and --picture take one prompt"),
            (several and args.save_delta is not None, "--save-delta takes one prompt"),
            (args.delta is not None and args.slot_steps,
             "--delta brings a δ; leave --slot-steps and --slot-lr out"),
            (args.save_delta is not None and not args.slot_steps,
             "--save-delta needs --slot-steps"),
            (args.compare and not args.slot_steps and args.delta is None,
             "--compare and --picture show what δ does; let --slot-steps be at least 1"),
            ((args.top_k or args.top_p < 1) and not args.temperature,
             "--top-k and --top-p cut what is drawn from; give --temperature, too, such as 1"),
            (args.prompt.count("-") > 1, "standard input is one prompt; give - once"),
            (args.reference is not None and args.picture is None, "--reference needs --picture"),
            ("RANK" in os.environ and any(
                path is not None for path in (args.delta, args.save_delta, args.picture)),
             "--delta, --save-delta and --picture are for one process, without torchrun")):
        if wrong:
            parser.error(why)


def check_sampling(temperature, top_k, top_p):
    """For those who call `sampler` from Python; the command line has checked."""
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: they need "
                         "at least 0, at least 0, and above 0 up to 1")
