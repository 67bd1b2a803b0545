"""Where prompts come from, and what may be wrong with them."""
import json
import os
import re
import select
import stat
import sys

from checks.files import regular_file, show


def read_prompts(args):
    """-> [(prompt, system or None)] from --prompts, the arguments or a pipe; [] if there is none."""
    if args.prompts:
        return read_lines(args.prompts, args.system)
    texts = [read_stdin() if text == "-" else text for text in args.prompt]
    if not texts and not args.problem:
        text = piped()
        texts = [text] if text else []
    return [(text, args.system) for text in texts]


def read_stdin():
    """All of standard input. ValueError if it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 (byte {error.start})") from None


def piped():
    """The text that a pipe or a file brings by now, or None: a terminal is never waited for."""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
        ready = stat.S_ISFIFO(kind) or stat.S_ISREG(kind)
        if ready and select.select([sys.stdin], [], [], 0.2)[0]:
            return read_stdin().strip("\n") or None
    except (OSError, AttributeError, ValueError) as error:      # closed, or not a real file
        if "UTF-8" in str(error):
            raise
    return None


def read_lines(path, system):
    """A file of prompts -> [(prompt, system)]. A line is {"prompt": ..., "system": ...}, a JSON string,
    or else a prompt as it stands. ValueError names the line."""
    try:
        lines = regular_file(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {show(str(path), 100)}: not UTF-8 (byte {error.start})") from None
    found = []
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = line.strip()
        if not isinstance(entry, (str, dict)):
            entry = line.strip()                                # a number is a prompt, too
        if isinstance(entry, str):
            entry = {"prompt": entry}
        texts = all(isinstance(value, str) for value in entry.values())
        if "prompt" not in entry or entry.keys() - {"prompt", "system"} or not texts:
            raise ValueError(f"--prompts {show(str(path), 100)}: line {place} is {show(line, 80)}; an object "
                             'has the texts "prompt" and, if wanted, "system", and no other key')
        found.append((entry["prompt"], entry.get("system", system)))
    if not found:
        raise ValueError(f"--prompts {show(str(path), 100)}: holds no prompt")
    return found


def check_text(prompts):
    """[(prompt, system or None)]: all Unicode? Python makes half characters of bytes that are not."""
    for text in (text for pair in prompts for text in pair if text):
        half = re.search("[\ud800-\udfff]", text)
        if half:
            raise ValueError("the prompt or system text holds half a character "
                             f"({show(half[0])} at {half.start()}); pass valid UTF-8")


def check_length(ids, new, config):
    """The lists of ids, and how many new ones are asked for (None: as many as fit)."""
    longest, most = max(map(len, ids)), config.max_position_embeddings
    if min(map(len, ids)) == 0:
        raise ValueError("the prompt is empty; give at least one token")
    if longest >= most:
        raise ValueError(f"the prompt has {longest} tokens and the model knows {most} positions "
                         "(max_position_embeddings); shorten it, or take a model that knows more")
    if new is not None and longest + new > most:
        raise ValueError(f"{longest} prompt tokens and {new} new ones exceed the model's {most} positions "
                         f"(max_position_embeddings); --max-new-tokens {most - longest} fits")
    if any(not 0 <= id < config.vocab_size for each in ids for id in each):
        raise ValueError(f"the prompt has a token id outside the model's vocabulary of {config.vocab_size}")


def check_memory(length, vocabulary, device):
    """Does the readable loop of SLOT fit? It holds some four tensors of length × vocabulary in float32."""
    need = 4 * 4 * length * vocabulary
    if device.startswith("cuda"):
        import torch
        free = torch.cuda.mem_get_info(device)[0]
    elif os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) << 10
    else:
        return
    if need > free:
        raise ValueError(f"SLOT's readable loop needs {need / 2**30:.1f} GiB for {length} tokens and {free / 2**30:.1f} "
                         "are free; --slot-fast gives the same numbers within --slot-memory")
