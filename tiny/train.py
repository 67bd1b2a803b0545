"""
The recipe of the tiny model: one command from nothing to a Hugging Face folder, on two CPU cores.

    python -m tiny.train                train into runs/tiny; killed at any moment, the same command
                                        goes on from the last checkpoint
    python -m tiny.train --export       write the weights of the last checkpoint to
                                        model.safetensors, train no further
    python -m tiny.train --evaluate     greedy accuracy of the shipped model on held-out problems

A model that is finished is not overwritten, the shipped one least of all, unless --overwrite says
so. The model learns to write both the question and the solution (SLOT optimises the prompt's own
next tokens, so the prompt must be modelled too). Every training text is what generate.py sees at
inference: the chat template around one question, then the answer. Each problem occurs once: the
stream of problems is endless, and step s always reads the same part of it.

Letters: B examples in a batch, T tokens in its longest example, V vocabulary.
"""
import collections
import json
import math
import os
import re
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from checks.command import Parser, early_signals, number, run  # noqa: E402
from checks.files import whole_file  # noqa: E402

# Threads that wait must sleep: where another program wants the second core, spinning takes tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if __name__ == "__main__":
    early_signals()
import regex  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from load_weights import load_model, read_config, write_safetensors  # noqa: E402
from model import CausalLM  # noqa: E402
from slot import generate  # noqa: E402
from tiny.problems import heldout, problem  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

SEED = 1
STEPS, BATCH = 5000, 32
PARTS = 2                   # a step's examples, sorted by length, run in parts: little is padding
PEAK_LR, WARMUP, DECAY, CLIP = 2e-3, 300, 0.01, 1.0
SAVE_EVERY = 100            # steps between checkpoints

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 768
# Qwen2's expression: every digit is a token of its own, which arithmetic likes.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
           r"\s*[\r\n]+|\s+(?!\S)|\s+")
TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
            "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
CONFIG = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=VOCABULARY,
    hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, hidden_act="silu", max_position_embeddings=512,
    rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None, attention_bias=False,
    attention_dropout=0.0, sliding_window=None, use_sliding_window=False, max_window_layers=6,
    tie_word_embeddings=True, initializer_range=0.02, eos_token_id=VOCABULARY - 1,
    pad_token_id=VOCABULARY - 3, use_cache=True, torch_dtype="float32")


# ---- text and tokens

def chat(question):
    """What TEMPLATE makes of one user message and an open answer."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def example(seed, index):
    p = problem(seed, index)
    return chat(p.question) + p.answer + "<|im_end|>"


def train_bpe(text, size):
    """Byte pair encoding: start from bytes, glue the most frequent neighbours, again and again ->
    list of pairs."""
    words = collections.Counter()
    for word in regex.findall(PATTERN, text):
        words[tuple(bytes([b]) for b in word.encode())] += 1
    merges = []
    while len(merges) < size:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))     # ties must not depend on order
        merges.append(best)
        glued = collections.Counter()
        for word, count in words.items():
            new = []
            for part in word:
                if new and (new[-1], part) == best:
                    new[-1] += part
                else:
                    new.append(part)
            glued[tuple(new)] += count
        words = glued
    return merges


def write_tokenizer(folder):
    """Train the tokenizer on training problems and write it as Hugging Face's tokenizer.json and
    tokenizer_config.json."""
    # GPT-2's printable alphabet for bytes: printable Latin-1 characters stand for themselves, the
    # others move to 256 and up.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable}
    for place, b in enumerate(order[len(printable):]):
        letter[b] = chr(256 + place)

    def spell(token):
        return "".join(letter[b] for b in token)

    text = "".join(example(SEED, i) for i in range(4000))
    for special in SPECIAL:
        text = text.replace(special, "\n\n")
    merges = train_bpe(text, VOCABULARY - 256 - len(SPECIAL))
    tokens = [bytes([b]) for b in order] + [a + b for a, b in merges]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = {}
    for place, content in enumerate(SPECIAL):
        added[len(tokens) + place] = dict(content=content) | flags
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    split = dict(type="Split", pattern=dict(Regex=PATTERN), behavior="Isolated", invert=False)
    write_json(folder / "tokenizer.json", dict(
        version="1.0", truncation=None, padding=None,
        added_tokens=[dict(id=i, **token) for i, token in added.items()],
        normalizer=dict(type="NFC"),
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, byte_level]),
        post_processor=byte_level, decoder=byte_level,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="",
                   end_of_word_suffix="", fuse_unk=False, byte_fallback=False,
                   vocab={spell(token): i for i, token in enumerate(tokens)},
                   merges=[f"{spell(a)} {spell(b)}" for a, b in merges])))
    write_json(folder / "tokenizer_config.json", dict(
        tokenizer_class="Qwen2Tokenizer", add_bos_token=False, add_prefix_space=False,
        added_tokens_decoder={str(i): token for i, token in added.items()}, bos_token=None,
        eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None, errors="replace",
        model_max_length=512, clean_up_tokenization_spaces=False, split_special_tokens=False,
        chat_template=TEMPLATE))


# ---- files: a name holds the old content or the new one, never half of it

def replace_file(path, write):
    """write(file) goes to a temporary file, which takes the name only when it is whole and on the
    disk."""
    with whole_file(path) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def write_json(path, value):
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


def export(folder, lm):
    """The weights under their checkpoint names, without the head, which is the embedding (tied)."""
    weights = lm.state_dict()
    del weights["lm_head.weight"]
    write_safetensors(folder / "model.safetensors", weights)


def export_checkpoint(folder):
    lm = CausalLM(read_config(folder))
    lm.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["model"])
    export(folder, lm)


# ---- training

def batch(step, tokenizer):
    """What step number `step` learns from, in PARTS of similar length so that little is padding: a
    list of tokens (B, T), padded to the right, and weights (B, T-1), 0 on padding.

    Attention is causal and padding comes last, so no real token sees it; positions start at 0 as at
    inference."""
    texts = [example(SEED, i) for i in range(step * BATCH, (step + 1) * BATCH)]
    rows = sorted((tokenizer.encode(text, allow_special=True) for text in texts), key=len)
    found = []
    for i in range(0, BATCH, BATCH // PARTS):
        part = [torch.tensor(row) for row in rows[i:i + BATCH // PARTS]]
        tokens = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)        # (B, T)
        lengths = torch.tensor([len(row) for row in part])
        real = torch.arange(1, tokens.shape[1]) < lengths[:, None]              # (B, T-1)
        found.append((tokens, real.float()))
    return found


def learning_rate(step, steps):
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return PEAK_LR * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def new_model(folder):
    """Normal(0, 0.02) matrices, norms at 1. What each layer adds to the stream is scaled so that
    the sum stays near 1."""
    lm = CausalLM(read_config(folder))
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in lm.named_parameters():
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * lm.config.num_hidden_layers) if residual else 0.02
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, 0.0, std, generator=generator)
    return lm


def check_unfinished(folder, overwrite):
    """A model without a checkpoint beside it is finished: it stays, unless told otherwise."""
    finished = (folder / "model.safetensors").exists() and not (folder / "checkpoint.pt").exists()
    if finished and not overwrite:
        raise ValueError(f"{folder}: holds a finished model; give another --folder, or --overwrite")


def prepare(folder):
    """Everything but the weights -> the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", dict(
        do_sample=False, eos_token_id=[VOCABULARY - 1, VOCABULARY - 3],
        pad_token_id=VOCABULARY - 3, max_new_tokens=160))
    write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat([dict(role="user", content="?")]) == chat("?")
    return tokenizer


def train(folder, steps):
    tokenizer = prepare(folder)
    checkpoint = folder / "checkpoint.pt"
    lm = new_model(folder)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=PEAK_LR, betas=(0.9, 0.98),
                                  weight_decay=DECAY)
    step, seen = 0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        step, seen = state["step"], state["tokens"]
        lm.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"going on from step {step} of {steps}", file=sys.stderr)
    size = sum(p.numel() for p in lm.parameters())
    print(f"{size:,} parameters, {torch.get_num_threads()} threads, {steps} steps",
          file=sys.stderr)

    begin, first, before = time.time(), step, seen
    while step < steps:
        count, loss = learn(lm, optimizer, batch(step, tokenizer), learning_rate(step, steps))
        step, seen = step + 1, seen + count
        if step % 20 == 0 or step == steps:
            seconds = time.time() - begin
            left = seconds / (step - first) * (steps - step) / 60
            print(f"step {step:5}/{steps}  loss {loss:.4f}  {(seen - before) / seconds:6.0f} "
                  f"tokens/s  {left:5.1f} minutes left", file=sys.stderr, flush=True)
        if step % SAVE_EVERY == 0:
            state = dict(step=step, tokens=seen, model=lm.state_dict(),
                         optimizer=optimizer.state_dict())
            replace_file(checkpoint, lambda file: torch.save(state, file))
            if not (folder / "model.safetensors").exists():     # a first one for the impatient
                export(folder, lm)
    export(folder, lm)
    checkpoint.unlink(missing_ok=True)
    print(f"{folder / 'model.safetensors'}: trained on {seen:,} tokens", file=sys.stderr)


def learn(lm, optimizer, parts, lr):
    """One step -> how many tokens it predicted, and their mean loss, in prompt and answer."""
    count, total = sum(weight.sum() for _, weight in parts), 0.0
    for tokens, weight in parts:
        logits = lm.lm_head(lm.model(tokens[:, :-1]))                           # (B, T-1, V)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = (loss * weight.flatten()).sum() / count
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(lm.parameters(), CLIP)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return int(count), total


# ---- testing

def last_number(text):
    return (re.findall(r"#### (\d+)", text) or ["none"])[-1]


def evaluate(folder, count):
    """Of every group, how many held-out problems end in the right number, greedily decoded, and the
    kinds of the wrong ones."""
    lm, tokenizer = load_model(folder), load_tokenizer(folder)
    for group in ("common", "rare", "unseen"):
        wrong = []
        for p in heldout(group, count):
            prompt = tokenizer.encode(chat(p.question), allow_special=True)
            answer = list(generate(lm, prompt, 128, eos_ids=tokenizer.eos_ids))
            if last_number(tokenizer.decode(answer)) != last_number(p.answer):
                wrong.append(p.kind)
        kinds = ", ".join(f"{kind} {n}" for kind, n in collections.Counter(wrong).most_common())
        right = count - len(wrong)
        print(f"{group:7} {right:4} of {count} right ({100 * right / count:.1f} %)  wrong: {kinds}")


def parse_arguments(arguments=None):
    parser = Parser(prog="python -m tiny.train", description="Train the tiny model, or go on.")
    add = parser.add_argument
    add("--folder", type=Path, help="of the model (default: runs/tiny; to --evaluate, tiny)")
    add("--steps", type=number(int, 1, 1_000_000), default=STEPS, metavar="N",
        help="length of the whole training (default: %(default)s)")
    add("--overwrite", action="store_true", help="also a finished model")
    add("--export", action="store_true", help="write the last checkpoint's weights and stop")
    add("--evaluate", type=number(int, 1, 10_000), nargs="?", const=400, metavar="COUNT",
        help="test on COUNT problems a group (default: 400)")
    return parser.parse_args(arguments)


def main(args):
    folder = args.folder or FOLDER.parent / "runs" / "tiny"
    if args.evaluate:
        evaluate(args.folder or FOLDER, args.evaluate)
    elif args.export:
        export_checkpoint(folder)
    else:
        check_unfinished(folder, args.overwrite)
        train(folder, args.steps)


if __name__ == "__main__":
    run(main, parse_arguments())
