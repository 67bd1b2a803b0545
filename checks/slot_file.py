"""A reader's own copy of slot.py, given on the command line."""
import argparse
import importlib.util
import os
import sys

NEEDED = ("prefill", "optimize_delta", "likeliest", "steer", "decode", "generate")


def slot_file(path):
    """An argparse type."""
    if not os.path.exists(path):
        raise argparse.ArgumentTypeError(f"{path[:160]!r}: no such file; copy slot.py there")
    if not os.path.isfile(path) or not path.endswith(".py"):
        raise argparse.ArgumentTypeError(f"{path[:160]!r} is no Python file; copy slot.py")
    return path


def use_slot_file(parser, args):
    """Puts --slot-file, if it is given, in the place of slot.py, for all that imports it from now
    on. An error in the file shows as Python shows it: it is the reader's own program."""
    if not args.slot_file:
        return
    if args.slot_fast:
        parser.error("--slot-file runs the loop of that file; leave --slot-fast out")
    sys.path += [os.path.dirname(os.path.abspath(args.slot_file)), os.getcwd()]
    spec = importlib.util.spec_from_file_location("slot", args.slot_file)
    module = sys.modules["slot"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in NEEDED:
        if not hasattr(module, name):
            parser.error(f"--slot-file {args.slot_file[:160]!r} has no {name}; copy the whole of "
                         "slot.py")
