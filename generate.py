"""The command: prefill the prompt once, fit δ to it, decode with it, stream the text.

    python generate.py --slot-steps 3                   a held-out problem of the embedded model
    python generate.py --compare                        the plain answer and SLOT's beside it
    python generate.py --picture out.html               ... and a page of what δ saw and changed
    python generate.py --model smollm2 "Why is the sky blue?" --slot-steps 3

Text goes to stdout, figures to stderr. The method is slot.py; README.md calls it from Python.
"""
import os
import sys
import time
from functools import partial
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))        # missing under python -I and -P
from checks.command import early_signals, run
from checks.files import check_target, show
from checks.options import TINY, check_sampling, parse_arguments
from checks.prompts import check_text, heldout_problem, new_tokens, read_prompts

SHOWN = 6                       # tokens at either end of what δ changes
TOGETHER = 32                   # prompts answered in one batch


if __name__ == "__main__":      # before torch is imported, so that --help and Ctrl-C answer at once
    early_signals()
    ARGS = parse_arguments()

import torch

from checks.delta_file import check_delta, fingerprint
from checks.memory import check_memory
from checks.weights import check_device, check_finite
from load_weights import find_model, load_model, read_safetensors, write_safetensors
# generate: for those who import it from here
from slot import decode, generate, likeliest, optimize_delta, prefill, steer  # noqa: F401
from tokenizer import load_tokenizer

speed = None                    # without speed/ everything works the same, only slower
if find_spec("speed"):
    import speed.batch
    import speed.delta
    import speed.linear
    import speed.parallel
    import speed.parallel_delta
    import speed.ranks


def sampler(temperature=0.0, top_k=0, top_p=1.0, seed=0):
    """-> a function from logits (V,) float32 to an id: the likeliest, or drawn from
    softmax(logits / temperature), cut to the top_k likeliest (arXiv 1805.04833) and to those that
    together have probability top_p (arXiv 1904.09751). ValueError for impossible settings."""
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return likeliest
    draw = torch.Generator().manual_seed(seed)

    def choose(logits):
        logits = logits.cpu().double()                      # a temperature of 1e-46 is no float32
        logits = (logits - logits.max()) / temperature
        if 0 < top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
        p, order = logits.softmax(-1).sort(descending=True, stable=True)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)     # the token that crosses top_p stays
        return order[torch.multinomial(p, 1, generator=draw)].item()

    return choose


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def load(args, asked):
    """-> the model and its tokenizer; says what they are."""
    folder, began = find_model(args.model), time.perf_counter()
    tokenizer = load_tokenizer(folder)
    if args.ranks > 1:
        lm, products = speed.parallel.load_model(folder, args.device, args.dtype)
    else:
        lm = load_model(folder, args.device, args.dtype)
        products = speed.linear.use(lm) if speed else "plain"
    tiny = folder.resolve() == TINY
    name = "tiny/, the embedded model" if tiny else show(folder, 160)
    size = sum(parameter.numel() for parameter in lm.parameters()) / 1e6
    each = " a rank" if args.ranks > 1 else ""
    say(f"model     {name}: {size:,.1f} M parameters{each}, {str(lm.lm_head.weight.dtype)[6:]}, "
        f"{args.device}, {torch.get_num_threads()} threads, products: {products}, "
        f"loaded in {time.perf_counter() - began:.2f} s")
    if tiny and asked:
        say("note      it solves word problems like those of tiny/problems.py and knows nothing "
            "else; python -m convert smollm2 brings a model to chat with")
    return lm, tokenizer


def prompt_ids(args, tokenizer, prompts):
    """-> a list of ids for every prompt."""
    found = []
    for prompt, system, where in prompts:
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            if args.raw:
                found.append(tokenizer.bos_ids + tokenizer.encode(prompt))
            else:
                found.append(tokenizer.chat_ids(messages))
        except ValueError as error:                         # what a chat template does not allow
            raise ValueError(f"{where}{error}") from None
        if len(found) % 1000 == 0:
            say(f"prompt    {len(found):,} of {len(prompts):,} read")
    return found


def optimizer(args, lm):
    """-> a function with the arguments and results of slot.optimize_delta: the loop itself, with
    --slot-fast the closed form, with --delta one that hands out what was kept."""
    if args.delta is not None:
        kept = read_safetensors(args.delta)
        check_delta(args.delta, kept, lm)
        return lambda *_: (kept["delta"].to(args.device), torch.zeros(0))
    if args.slot_fast:
        speed.batch.closed_form_stands_for_slot()
        fast = speed.parallel_delta if args.ranks > 1 else speed.delta
        return partial(fast.optimize_delta_fast, memory=int(args.slot_memory * 2**30))
    return optimize_delta


def say_fit(args, lm, tokenizer, hidden, delta, losses, seconds):
    """What δ did to the prompt: the losses, and which tokens it made more and less likely."""
    way = "closed form" if args.slot_fast else f"the loop of {args.slot_file or 'slot.py'}"
    if args.delta is not None:
        say(f"slot      δ from {show(args.delta, 160)}")
    else:
        say(f"slot      {args.slot_steps} steps, lr {args.slot_lr:g}, {way}, {seconds:.3f} s")
        loss = f"loss as {args.slot_file} has it" if args.slot_file else "loss on the prompt"
        found = " → ".join(f"{x:.4f}" for x in losses)
        say(f"          {loss}  {found if hidden.shape[1] > 1 else 'none: nothing to guess'}")
    before, after = probabilities(lm, hidden, delta)
    order = (after - before).argsort(descending=True).tolist()
    for what, ids in (("more", order[:500]), ("less", order[::-1][:500])):
        words = [(id, tokenizer.decode([id])) for id in ids]
        words = [f"{word!r} {before[id]:.1%} → {after[id]:.1%}" for id, word in words
                 if word.isprintable() and "\ufffd" not in word and after[id] != before[id]]
        say(f"          {what} likely  {'  '.join(words[:SHOWN]) or 'none'}")


@torch.no_grad()
def probabilities(lm, hidden, delta):
    """Mean probability of every token over the prompt's positions (of a long one 32 to 63), before
    δ and with it: (V,) each. Probabilities, for softmax ignores what W δ adds to all alike."""
    some = hidden[0, ::max(1, hidden.shape[1] // 32)]                   # (n, d)
    logits = lm.lm_head(some).float()                                   # (n, V)
    W_delta = lm.lm_head(delta.reshape(1, -1).to(hidden.dtype)).float()     # (1, V)
    steered = steer(logits, W_delta, some, 0)
    return logits.softmax(-1).mean(0).cpu(), steered.softmax(-1).mean(0).cpu()


def answer(tokenizer, ids, new, room, spent):
    """Print an answer as it comes -> its ids. new: how many it may have, of room for so many.
    spent: seconds before its first token was chosen."""
    began, first, got = time.perf_counter(), None, []
    stream = tokenizer.stream(skip_special=True)
    try:
        for id in ids:
            now = time.perf_counter()
            first = first or now
            got.append(id)
            print(stream.add(id), end="", flush=True)
    finally:                                                            # also after Ctrl-C
        print(stream.end(), flush=True)
    if len(got) == new:
        more = "--max-new-tokens allows more" if new < room else "the model has no more positions"
        say(f"note      cut at {new} new tokens; {more}")
    if len(got) > 1:
        say(f"decode    first token after {spent + first - began:.3f} s (prefill included), then "
            f"{len(got)} tokens, {(len(got) - 1) / (now - first):,.1f} tokens/s")
    return got


def answer_one(args, lm, tokenizer, tokens, new, fit, draw):
    """Prefill, fit, decode; with --compare the plain answer first, from the same prefill."""
    began = time.perf_counter()
    hidden, cache = prefill(lm, tokens, new)
    spent, end = time.perf_counter() - began, cache.pos
    room = lm.config.max_position_embeddings - end
    say(f"prompt    {len(tokens)} tokens, prefill {spent:.3f} s")
    decoded = partial(decode, lm, hidden, cache, new, eos_ids=tokenizer.eos_ids)
    if args.compare:
        print("--- plain ---", flush=True)
        plain = answer(tokenizer, decoded(choose=draw()), new, room, spent)
        cache.pos = end                         # back to the end of the prompt
    delta = None
    if args.slot_steps or args.delta is not None:
        began = time.perf_counter()
        delta, losses = fit(hidden, tokens, lm.lm_head, args.slot_steps, args.slot_lr)
        seconds = time.perf_counter() - began
        spent += seconds
        say_fit(args, lm, tokenizer, hidden, delta, losses, seconds)
    if args.save_delta:
        write_safetensors(args.save_delta, {"delta": delta.float().cpu(), "head": fingerprint(lm)})
    if args.compare:
        print("--- with δ ---", flush=True)
    steered = answer(tokenizer, decoded(delta, draw()), new, room, spent)
    if args.compare:
        say_where_they_part(tokenizer, plain, steered)


def say_where_they_part(tokenizer, plain, steered):
    if plain == steered:
        return say(f"compare   the same {len(plain)} tokens")
    at = next(i for i, (a, b) in enumerate(zip_longest(plain, steered)) if a != b)
    words = [repr(tokenizer.decode(ids[at:at + 1])) if ids[at:] else "the end"
             for ids in (plain, steered)]
    say(f"compare   they part at new token {at + 1}: plain {words[0]}, with δ {words[1]}")


def answer_together(args, lm, tokenizer, ids, limits, fit, draws):
    """Yields the answers, texts, in order; TOGETHER prompts, lists of ids, go in one batch."""
    steps = args.slot_steps or int(args.delta is not None)      # with a kept δ: any but 0
    for place in range(0, len(ids), TOGETHER):
        began, part = time.perf_counter(), slice(place, place + TOGETHER)
        choose = likeliest if args.temperature == 0 else [draw() for draw in draws[part]]
        columns = speed.batch.generate_batch(lm, ids[part], limits[part], steps, args.slot_lr,
                                             choose, tokenizer.eos_ids, fit)
        answers = speed.batch.collected(columns, len(ids[part]))
        count, seconds = sum(map(len, answers)), time.perf_counter() - began
        cut = sum(len(got) == limit for got, limit in zip(answers, limits[part]))
        most = " to ".join(map(str, sorted({min(limits[part]), max(limits[part])})))
        fitted = f", {args.slot_steps} steps at lr {args.slot_lr:g} each" if args.slot_steps else ""
        say(f"batch     {len(answers)} prompts{fitted}, {count} tokens in {seconds:.2f} s; "
            f"{cut} answers cut at {most} new tokens")
        yield from (tokenizer.decode(got, skip_special=True) for got in answers)


def main(args):
    args.ranks = 1
    if "RANK" in os.environ:                    # torchrun: many processes form one model
        args.device, args.ranks, _ = speed.ranks.start(args.device)
    for target in (args.save_delta, args.picture):
        if target is not None:
            check_target(target)                # before the work
    read = partial(read_prompts, args)
    asked = speed.ranks.first(read) if args.ranks > 1 else read()
    prompts = asked or [heldout_problem(args)]
    check_text(prompts, args.reference)
    check_device(args.device)
    lm, tokenizer = load(args, asked)
    ids = prompt_ids(args, tokenizer, prompts)
    limits = new_tokens(ids, prompts, args.max_new_tokens, lm.config)       # of each answer
    if args.slot_steps:
        torch.optim.AdamW([torch.zeros(1)])     # the first imports 800 modules: not SLOT's time
        if not args.slot_fast:
            check_memory(max(map(len, ids)), lm.config.vocab_size, args.device, args.slot_file)
    fit = optimizer(args, lm)
    torch.manual_seed(args.seed)                # for a --slot-file that draws
    draw = partial(sampler, args.temperature, args.top_k, args.top_p)
    draws = [partial(draw, args.seed + place) for place in range(len(ids))]
    if args.picture is not None:                # it looks on at fit and draw
        from study.picture import Picture
        empty, = prompt_ids(args, tokenizer, [("\0", *prompts[0][1:])])
        picture = Picture(args, lm, tokenizer, empty, fit, draws[0])
        fit, draws = picture.fit, [picture.draw]
    answers = None
    if speed and len(ids) > 1 and speed.batch.stands_for_slot():
        answers = answer_together(args, lm, tokenizer, ids, limits, fit, draws)
    try:
        for place, (prompt, *_) in enumerate(prompts):
            text = next(answers) if answers else None   # the first of a batch computes it
            if len(ids) > 1:
                print(f"--- {place + 1} of {len(ids)}: {show(prompt)} ---", flush=True)
            if answers:
                print(text, flush=True)
            else:
                answer_one(args, lm, tokenizer, ids[place], limits[place], fit,
                           draws[place])
        if args.picture is not None:
            picture.write()
            say(f"picture   {show(Path(args.picture))}")
    except ValueError:
        check_finite(lm)                        # the better reason, where a weight is the cause
        raise


if __name__ == "__main__":
    run(main, ARGS)
