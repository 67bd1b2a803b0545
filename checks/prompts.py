"""Where prompts come from, and what may be wrong with them."""
import codecs
import json
import os
import re
import select
import stat
import sys
from pathlib import Path

from checks.files import regular_file, show
from checks.options import NEW_TOKENS

COMPARE_PROBLEM = 57            # chosen because SLOT with 5 steps at 0.1 changes its answer


def read_prompts(args):
    """-> [(prompt, system or None, where)] from --prompts, the arguments or a pipe; [] if there is
    none. where: what a message about it begins with, "" or the line of the file."""
    if args.prompts is not None:
        return read_lines(args.prompts, args.system, args.raw)
    texts = [read_stdin() if text == "-" else text for text in args.prompt]
    if not texts and not args.problem:
        texts = piped()
    if len(texts) > 2 and not any(" " in text for text in texts):
        print(f"note      {len(texts)} prompts; quotes around a question make it one",
              file=sys.stderr, flush=True)
    return [(text, args.system, "") for text in texts]


def heldout_problem(args):
    """What is asked where nobody asks: --problem N or a good first one, as an entry of what
    read_prompts returns. Its answer becomes args.reference, unless there is one."""
    from tiny.problems import heldout
    place, why = args.problem or 1, ""
    if args.compare and not args.problem:
        place, why = COMPARE_PROBLEM, ", chosen because 5 steps at 0.1 change its answer"
    problem = heldout("common", place)[-1]
    args.reference = args.reference or problem.answer
    print(f"prompt    held-out problem {place} of the embedded model{why}:\n"
          f"{problem.question}\n", file=sys.stderr, flush=True)
    return problem.question, args.system, ""


def read_stdin():
    """All of standard input. ValueError if it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 (byte {error.start})") from None


def piped():
    """[the text that a pipe or a file brings by now], or []: a terminal is never waited for."""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
        ready = stat.S_ISFIFO(kind) or stat.S_ISREG(kind)
        ready = ready and select.select([sys.stdin], [], [], 0.2)[0]
    except (OSError, AttributeError, ValueError):               # closed, or not a real file
        ready = False
    text = read_stdin().strip("\r\n") if ready else ""
    return [text] if text else []


def read_lines(path, system, raw):
    """A file of prompts -> [(prompt, system, where)]. A line is {"prompt": ..., "system": ...}, a
    JSON string, or else a prompt as it stands. ValueError names the line."""
    file = f"--prompts {show(Path(path), 100)}"
    data = regular_file(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    found = []
    for place, line in enumerate(data.split(b"\n"), 1):
        where = f"{file}: line {place}: "
        try:
            line = line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}not UTF-8 (byte {error.start})") from None
        if line.strip():
            prompt, own = read_line(line, where)
            if raw and own is not None:
                raise ValueError(f"{where}a system text needs the chat template that --raw leaves "
                                 "out")
            found.append((prompt, system if own is None else own, where))
    if not found:
        raise ValueError(f"{file}: holds no prompt")
    return found


def read_line(line, where):
    """-> prompt, and system or None. What is meant to be an object must be one."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        if re.match(r'\s*{\s*"', line):
            raise ValueError(f"{where}begins an object and is none ({show(str(error))})") from None
        return line, None
    if isinstance(entry, str):
        return entry, None
    if not isinstance(entry, dict):                 # a number is a prompt, too
        return line, None
    texts = all(isinstance(value, str) for value in entry.values())
    if "prompt" not in entry or entry.keys() - {"prompt", "system"} or not texts:
        raise ValueError(f'{where}{show(line, 80)} has not just the texts "prompt" and, if wanted, '
                         '"system"')
    return entry["prompt"], entry.get("system")


def check_text(prompts, reference):
    """All Unicode? Python makes half characters of bytes that are not."""
    for prompt, system, where in [*prompts, (reference or "", None, "--reference: ")]:
        half = re.search("[\ud800-\udfff]", prompt + (system or ""))
        if half:
            raise ValueError(f"{where}the text holds half a character ({show(half[0])}); pass "
                             "valid UTF-8")


def new_tokens(ids, prompts, wanted, config):
    """-> how many new tokens each answer may have, a list. ids: of each prompt a list. wanted: so
    many; if None, NEW_TOKENS, or fewer where the prompt leaves fewer positions. ValueError for a
    prompt that is empty or too long."""
    most, longest = config.max_position_embeddings, max(map(len, ids))
    for tokens, (_, _, where) in zip(ids, prompts):
        count = len(tokens)
        if count == 0:
            raise ValueError(f"{where}the prompt is empty; give at least one token")
        if count >= most:
            raise ValueError(f"{where}the prompt has {count} tokens and the model knows {most} "
                             "positions (max_position_embeddings); shorten it, or take a model "
                             "that knows more")
        if wanted is not None and count + wanted > most:
            raise ValueError(f"{where}{count} prompt tokens and {wanted} new ones exceed the "
                             f"model's {most} positions (max_position_embeddings); "
                             f"--max-new-tokens {max(1, most - longest)} fits")
    return [wanted or min(NEW_TOKENS, most - len(tokens)) for tokens in ids]
