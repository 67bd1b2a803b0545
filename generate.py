"""The command: prefill the prompt once, fit δ to it, decode with it, stream the text.

    python generate.py --slot-steps 3                       the embedded model answers one of its held-out problems
    python generate.py --compare --prompt "..."             the plain answer and SLOT's, from one prefill

Text goes to stdout, figures to stderr. To use it from Python:

    lm, tokenizer = load_model(folder), load_tokenizer(folder)
    for id in generate(lm, tokenizer.chat_ids([{"role": "user", "content": "..."}]), 100, slot_steps=3): ...

Letters: B batch, T tokens, d width, V vocabulary.
"""
import argparse
import json
import re
import sys
import time
from pathlib import Path

from checks import regular_file, show
from cli import Parser, early_signals, number, run

TINY = Path(__file__).resolve().parent / "tiny"
DEFAULT_NEW_TOKENS = 256


def parse_arguments(arguments=None):
    parser = Parser(prog="generate.py", description="Answer a prompt with a Llama or Qwen model, plainly or with SLOT.")
    add = parser.add_argument
    add("--model", default=str(TINY), metavar="FOLDER_OR_ID", help="folder, or hub id such as Qwen/Qwen2.5-0.5B-Instruct "
        "(default: the embedded model)")
    add("--prompt", action="append", metavar="TEXT", help="the prompt, - for standard input; several make a batch "
        "(default: a held-out problem of the embedded model)")
    add("--prompts", metavar="FILE", help='several prompts, one JSON string or {"prompt": ..., "system": ...} a line')
    add("--system", metavar="TEXT", help="a system message before every prompt")
    add("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    add("--slot-steps", type=number(int, 0, 10_000), default=0, metavar="N", help="SLOT optimisation steps (default 0: plain)")
    add("--slot-lr", type=number(float, 0, above=True), default=0.01, metavar="X", help="SLOT learning rate (default 0.01)")
    add("--slot-fast", action=argparse.BooleanOptionalAction, default=True,
        help="closed-form gradient (default), or the readable loop")
    add("--slot-memory", type=number(float, 0, above=True), default=1.0, metavar="GIB", help="extra memory for SLOT (default 1)")
    add("--compile", action="store_true", help="decode by a compiled program: faster, after up to a minute of compiling the first "
        "time (needs a C++ compiler)")
    add("--compare", action="store_true", help="print the plain answer and SLOT's (3 steps unless --slot-steps says otherwise)")
    add("--max-new-tokens", type=number(int, 1, 1 << 30), metavar="N", help=f"at most N new tokens (default {DEFAULT_NEW_TOKENS})")
    add("--temperature", type=number(float, 0), default=0.0, metavar="T", help="0 takes the likeliest token (default)")
    add("--top-k", type=number(int, 0), default=0, metavar="K", help="sample among the K likeliest (default 0: all)")
    add("--top-p", type=number(float, 0, 1, above=True), default=1.0, metavar="P", help="... among the likeliest that make up P")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, metavar="S", help="of the sampling, and of the default problem")
    add("--device", default="cpu", metavar="D", help="cpu (default), cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="default: as the model says")
    args = parser.parse_args(arguments)
    if args.compare and args.slot_steps == 0:
        args.slot_steps = 3
    if args.prompt and args.prompts:
        parser.error("give --prompt or --prompts, not both")
    if args.raw and args.system:
        parser.error("--system needs the chat template, which --raw leaves out")
    for option in ("compare", "compile"):
        if getattr(args, option) and (args.prompts or len(args.prompt or []) > 1):
            parser.error(f"--{option} takes one prompt")
    return args


if __name__ == "__main__":      # before torch is imported, see cli.py
    early_signals()
    ARGS = parse_arguments()

import torch

from compiled import compile_step
from load_weights import find_model, load_model
from model import KVCache
from sampling import choose
from slot import optimize_delta, optimize_delta_fast
from tokenizer import load_tokenizer


def generate(lm, tokens, max_new_tokens, **options):
    """Answer one prompt: tokens, a list of ids or a tensor (T,) or (1, T) -> yields the new ids as they come.

    options are those of `generate_batch` and `decode`: slot_steps, slot_lr, temperature, seed, eos_ids, ... The last id may be
    one of eos_ids. The prompt goes through the decoder once: its hidden states serve δ and its keys and values serve decoding.
    """
    tokens = tokens.flatten().tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
    for ids in generate_batch(lm, [tokens], max_new_tokens, **options):
        yield ids[0]


def generate_batch(lm, prompts, max_new_tokens, slot_steps=0, slot_lr=0.01, slot_fast=True, slot_memory=1 << 30, compiled=False,
                   **sampling):
    """Answer several prompts, lists of ids: yields, token after token, a list with the new id of every prompt, or None once that
    prompt's answer has ended. One δ each: every prompt gets what it gets alone. slot_memory: bytes. compiled: decode by
    compiled.py, a single prompt only (ValueError)."""
    hidden, tokens, mask, cache = prefill(lm, prompts, max_new_tokens)
    bias, _ = slot_bias(lm, hidden, tokens, mask, slot_steps, slot_lr, slot_fast, slot_memory)
    step = compile_step(lm, cache) if compiled else None
    yield from decode(lm, hidden[:, -1:], cache, max_new_tokens, bias, step, **sampling)


@torch.no_grad()
def prefill(lm, prompts, max_new_tokens):
    """One forward pass over the prompts (lists of ids) -> hidden (B, T, d), tokens (B, T), mask (B, T) or None, and the filled
    cache with room for max_new_tokens. Shorter prompts are padded on the left: then the last column is every prompt's last
    token, and decoding goes on in one and the same column for all."""
    T, most, V = max(map(len, prompts)), lm.config.max_position_embeddings, lm.config.vocab_size
    if min(map(len, prompts)) == 0:
        raise ValueError("the prompt is empty; give at least one token")
    if T + max_new_tokens > most:
        raise ValueError(f"{T} prompt tokens and {max_new_tokens} new ones exceed the model's {most} positions "
                         "(max_position_embeddings); shorten the prompt or lower --max-new-tokens")
    if any(not 0 <= id < V for ids in prompts for id in ids):
        raise ValueError(f"the prompt has a token id outside the model's vocabulary of {V}")
    device, dtype = lm.lm_head.weight.device, lm.lm_head.weight.dtype
    tokens = torch.tensor([[0] * (T - len(ids)) + list(ids) for ids in prompts], device=device)
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    mask = torch.arange(T, device=device) >= T - lengths[:, None] if min(map(len, prompts)) < T else None   # (B, T)
    cache = KVCache(lm.config, len(prompts), T + max_new_tokens, device, dtype)
    return lm.model(tokens, cache, mask), tokens, mask, cache


def slot_bias(lm, hidden, tokens, mask, steps, lr, fast=True, memory=1 << 30):
    """Fit δ -> W δ (B, 1, V) float32, and the losses (steps, B). W(h + δ) = W h + W δ, so all that decoding needs of δ is one
    constant added to the logits; in bfloat16 it is also the better way, since h would swallow a small δ. None without steps."""
    if steps == 0:
        return None, None
    more = {"memory": memory} if fast else {}
    delta, losses = (optimize_delta_fast if fast else optimize_delta)(hidden, tokens, lm.lm_head, steps, lr, mask, **more)
    with torch.no_grad():
        return lm.lm_head(delta.to(hidden.dtype)).float(), losses


@torch.no_grad()
def decode(lm, hidden, cache, max_new_tokens, bias=None, step=None, *, eos_ids=(), temperature=0.0, top_k=0, top_p=1.0, seed=0):
    """From the hidden state of the last prompt token, (B, 1, d), to new tokens, one forward pass each. Yields lists as
    `generate_batch` does. Every row draws from a generator of its own, so its text does not depend on who shares the batch.
    `step`: a function tokens (B, 1) -> logits (B, V) that takes the model's place, see compiled.py."""
    step = step or (lambda tokens: lm(tokens, cache)[:, -1])
    logits = lm.lm_head(hidden)[:, -1]                              # (B, V)
    B = len(hidden)
    draws = [torch.Generator(hidden.device).manual_seed(seed) for _ in range(B)]
    rows = list(range(B))                                           # the prompts that are still being answered
    for count in range(max_new_tokens):
        logits = logits.float()                                     # (rows, V)
        if bias is not None:
            logits = logits + bias[:, 0]
        ids = [None] * B
        for row, id in zip(rows, choose(lm, logits, temperature, top_k, top_p, [draws[row] for row in rows])):
            ids[row] = id
        yield ids
        alive = [i for i, row in enumerate(rows) if ids[row] not in eos_ids]
        if not alive or count == max_new_tokens - 1:
            return
        if len(alive) < len(rows):                                  # finished rows leave the batch and cost nothing more
            rows = [rows[i] for i in alive]
            cache.keep_rows(alive)
            bias = bias[alive] if bias is not None else None
        logits = step(torch.tensor([[ids[row]] for row in rows], device=hidden.device))


def read_prompts(args):
    """-> a list of (prompt, system), from the options, standard input, a file, or the embedded model's held-out problems."""
    if args.prompts:
        try:
            lines = [line for line in regular_file(args.prompts).read_text(encoding="utf-8").split("\n") if line.strip()]
            entries = [json.loads(line) for line in lines]
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"--prompts {args.prompts!r}: not one JSON string or object a line ({error})") from None
        entries = [{"prompt": e} if isinstance(e, str) else e for e in entries]
        if not entries or not all(isinstance(e, dict) and isinstance(e.get("prompt"), str)
                                  and isinstance(e.get("system", ""), str) for e in entries):
            raise ValueError(f'--prompts {args.prompts!r}: every line must be a JSON string or {{"prompt": ..., "system": ...}}')
        return [(e["prompt"], e.get("system", args.system)) for e in entries]
    if args.prompt:
        try:
            return [(sys.stdin.buffer.read().decode("utf-8") if p == "-" else p, args.system) for p in args.prompt]
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt -: standard input is not UTF-8 (byte {error.start})") from None
    from tiny.problems import heldout
    problem = heldout("common", args.seed % 100 + 1)[-1]
    print(f"prompt    a held-out problem of the embedded model (--prompt gives your own):\n{problem.question}\n", file=sys.stderr)
    return [(problem.question, args.system)]


def valid(prompts):
    """The prompts, if all is Unicode: Python turns bytes of the command line that are not into half characters."""
    for text in (text for pair in prompts for text in pair if text):
        if half := re.search("[\ud800-\udfff]", text):
            raise ValueError(f"the prompt or system text holds half a character ({show(half[0])} at {half.start()}); pass valid UTF-8")
    return prompts


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def main(args):
    prompts = valid(read_prompts(args))
    folder = find_model(args.model)
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:                                      # torch's own kinds of error differ by device
        raise ValueError(f"--device {show(args.device)} is not available here: {show(str(error), 160)}") from None
    began = time.perf_counter()
    tokenizer = load_tokenizer(folder)
    lm = load_model(folder, args.device, args.dtype)
    say(f"model     {'tiny/, the embedded model' if args.model == str(TINY) else show(Path(args.model), 160)}: "
        f"{sum(p.numel() for p in lm.parameters()) / 1e6:,.1f} M parameters, {str(lm.lm_head.weight.dtype)[6:]}, {args.device}, "
        f"{torch.get_num_threads()} threads, loaded in {time.perf_counter() - began:.2f} s")
    if args.raw:
        ids = [tokenizer.bos_ids + tokenizer.encode(prompt) for prompt, _ in prompts]
    else:
        ids = [tokenizer.chat_ids([{"role": "system", "content": system}] * (system is not None)
                                  + [{"role": "user", "content": prompt}]) for prompt, system in prompts]
    room = lm.config.max_position_embeddings - max(map(len, ids))
    new = args.max_new_tokens or max(1, min(DEFAULT_NEW_TOKENS, room))

    began = time.perf_counter()
    hidden, tokens, mask, cache = prefill(lm, ids, new)
    prefilled = time.perf_counter() - began
    say(f"prompt    {' + '.join(str(len(i)) for i in ids)} tokens, prefill {prefilled:.3f} s")
    bias, fitted = None, 0.0
    if args.slot_steps:
        began = time.perf_counter()
        bias, losses = slot_bias(lm, hidden, tokens, mask, args.slot_steps, args.slot_lr, args.slot_fast,
                                 int(args.slot_memory * 2**30))
        fitted = time.perf_counter() - began
        say(f"slot      {args.slot_steps} steps, lr {args.slot_lr:g}, {'closed form' if args.slot_fast else 'readable loop'}, "
            f"{fitted:.3f} s")
        for row in range(len(ids)):
            say_slot(tokenizer, losses[:, row].tolist(), bias[row, 0, :tokenizer.vocab_size])

    step = None
    if args.compile:
        say("compile   up to a minute the first time for a model, then seconds ...")
        began, step = time.perf_counter(), compile_step(lm, cache)
        say(f"compile   {time.perf_counter() - began:.1f} s")
    options = dict(step=step, eos_ids=tokenizer.eos_ids, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                   seed=args.seed)
    if not args.compare:
        answer(tokenizer, decode(lm, hidden[:, -1:], cache, new, bias, **options), len(ids), prefilled + fitted)
        return
    both = []
    for heading, constant, spent in (("plain", None, prefilled),
                                     (f"SLOT, {args.slot_steps} steps, lr {args.slot_lr:g}", bias, prefilled + fitted)):
        print(f"--- {heading} ---", flush=True)
        cache.pos = tokens.shape[1]                                 # back to the end of the prompt: one prefill serves both
        both += answer(tokenizer, decode(lm, hidden[:, -1:], cache, new, constant, **options), 1, spent)
    plain, slot = both
    if plain == slot:
        say(f"compare   the same {len(plain)} tokens")
    else:
        at = next((i for i, (a, b) in enumerate(zip(plain, slot)) if a != b), min(len(plain), len(slot)))
        word = lambda ids: repr(tokenizer.decode(ids[at:at + 1])) if at < len(ids) else "the end"
        say(f"compare   first difference at new token {at + 1}: plain {word(plain)}, SLOT {word(slot)}")


def say_slot(tokenizer, losses, bias):
    """What δ did to one prompt: the loss of every step, and the words at the two ends of W δ, (V,)."""
    say("          loss on the prompt before each step  " + "  ".join(f"{loss:.4f}" for loss in losses))
    for what, sign in (("promotes", 1), ("demotes", -1)):
        top = (sign * bias).topk(min(6, len(bias)))
        words = (f"{tokenizer.decode([id])!r} {sign * value:+.3f}" for value, id in zip(top.values.tolist(), top.indices.tolist()))
        say(f"          {what:<10}" + "  ".join(words))


def answer(tokenizer, steps, B, spent):
    """Print what `decode` yields: one answer as it comes, several each under a heading at the end -> the ids of each.
    `spent`: the seconds of prefill and SLOT, which the time to the first token includes."""
    began = time.perf_counter()
    ids, streams, first = [[] for _ in range(B)], [tokenizer.stream(skip_special=True) for _ in range(B)], None
    try:
        for new in steps:
            first = first or time.perf_counter()
            for row, id in enumerate(new):
                if id is not None and id not in tokenizer.eos_ids:
                    ids[row].append(id)
                    piece = streams[row].add(id)
                    if B == 1:
                        print(piece, end="", flush=True)
    finally:                                                        # also after Ctrl-C: what there is so far
        if B == 1:
            print(streams[0].end(), flush=True)
        else:
            for row in range(B):
                print(f"--- {row + 1} ---\n{tokenizer.decode(ids[row], skip_special=True)}", flush=True)
        count, now = sum(map(len, ids)), time.perf_counter()
        if first is not None and count > 1:
            say(f"decode    first token after {spent + first - began:.3f} s (prefill included), then {count} tokens, "
                f"{(count - B) / (now - first):,.1f} tokens/s")
    return ids


if __name__ == "__main__":
    run(main, ARGS)
