"""
Writes tests/golden_trained.json and .npz: what the reference library computes with SmolLM2-135M-Instruct, so that
test_trained.py can hold this project against it on a trained model.

    python -m convert smollm2 /tmp/smollm2
    python3 -m venv /opt/hf && /opt/hf/bin/pip install torch==2.13.0 && /opt/hf/bin/pip install transformers==5.23.0
    /opt/hf/bin/python tests/make_golden_trained.py /tmp/smollm2           # two minutes

    json   the SHA-256 of the weights; chats: messages, text, ids; texts and their ids; versions
    npz    for every chat k and dtype: the 64 greedy tokens (new_DTYPE_k), the lead of each over the next best
           (lead_DTYPE_k); at all positions of the prompt and the float32 answer but the last, the logits of the
           tokens SLICE (slice_DTYPE_k) and the ids and logits of the eight best (best_DTYPE_k, value_DTYPE_k)
           for every run r of SLOT, float32: steps, lr, chat, delta, losses, 32 new tokens and their smallest lead

The loop of SLOT is that of make_golden.py, which shows on runs of the authors' own code that it is theirs.
"""
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from make_golden import slot_run

HERE = Path(__file__).parent
SLICE = torch.arange(11, 49152, 3001)
NEW = 64
SETTINGS = [(3, 0.01), (5, 0.1)]
CHATS = [
    [("user", "What is the capital of France, and why is it famous?")],
    [("system", "You are a careful teacher of mathematics."),
     ("user", "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
              "How many clips did Natalia sell altogether in April and May?")],
    [("user", "Hi!"), ("assistant", "Hello. What can I do for you?"),
     ("user", "Write a Python function that returns the n-th Fibonacci number.")],
]
TEXTS = [
    "", " ", "Hello world", "  two  spaces ", "tabs\tand\nlines\r\n\r\n", "x = [1, 22, 333]\n    return x[0]**2",
    "1234567890", "12.5 % of 1,000", "don't we'll I'M", "naïve café Ünïcödé", "中文字符和標點，。", "日本語のテキスト",
    "Привет, мир!", "مرحبا بالعالم", "हिन्दी", "👩‍👩‍👧 and 🇫🇷", "e\u0301 and \u00e9", "\u200b\u00a0\ufeff", "a\u0000b", "\u0001\u0002\u0003\u0004",
    "\u0005\u0006\u000b\u000c\u000e\u000f", "\u0010\u0011\u0012\u0013\u0014\u0015\u0016\u0017", "\u001b[31mred\u001b[0m\u007f",
    "<|im_start|", "<repo_name", "a" * 100, "=" * 70, "½ ² ٣ Ⅳ", "line\n\n\n\nline", "   \n  x",
]


@torch.no_grad()
def answers(model, ids, dtype, k, out):
    """Greedy tokens one by one, as everybody decodes; then all logits in one pass over prompt and answer."""
    result = model(ids, use_cache=True)
    new, lead = [], []
    for _ in range(NEW):
        top = result.logits[0, -1].float().topk(2)
        new.append(top.indices[0].item())
        lead.append((top.values[0] - top.values[1]).item())
        result = model(top.indices[:1].view(1, 1), past_key_values=result.past_key_values, use_cache=True)
    out |= {f"new_{dtype}_{k}": np.array(new), f"lead_{dtype}_{k}": np.array(lead, np.float32)}
    answer = torch.from_numpy(out[f"new_float32_{k}"])[None]
    logits = model(torch.cat((ids, answer), dim=1)[:, :-1]).logits[0].float()
    best = logits.topk(8)
    out |= {f"slice_{dtype}_{k}": logits[:, SLICE].numpy(), f"best_{dtype}_{k}": best.indices.numpy().astype(np.int32),
            f"value_{dtype}_{k}": best.values.numpy()}
    print(f"{dtype} chat {k}: {ids.shape[1]} tokens, smallest lead {min(lead):.4f}")


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats, out = [], {"slice": SLICE.numpy(), "settings": np.array(SETTINGS)}
    for turns in CHATS:
        messages = [{"role": role, "content": content} for role, content in turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        chats.append({"messages": messages, "text": text, "ids": ids})
    for dtype in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=getattr(torch, dtype)).eval()
        for k, chat in enumerate(chats):
            answers(model, torch.tensor([chat["ids"]]), dtype, k, out)
        if dtype == "float32":
            runs = [(steps, lr, k) for k in range(2) for steps, lr in SETTINGS]
            for r, (steps, lr, k) in enumerate(runs):
                run = slot_run(model, torch.tensor([chats[k]["ids"]]), steps, lr)
                out |= {f"{key}_{r}": run[key] for key in ("steps", "lr", "delta", "losses", "new", "margin")} | {f"chat_{r}": k}
                print(f"slot {steps} steps of {lr}, chat {k}: losses {run['losses']}, smallest lead {run['margin']:.4f}")
            out["runs"] = len(runs)
    with open(folder / "model.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    texts = [{"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in TEXTS]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "golden_trained.json").write_text(json.dumps(
        {"sha256": digest, "versions": versions, "chats": chats, "texts": texts}, indent=0) + "\n")
    np.savez_compressed(HERE / "golden_trained.npz", **out)
    for name in ("golden_trained.json", "golden_trained.npz"):
        print(name, (HERE / name).stat().st_size, "bytes")


if __name__ == "__main__":
    main()
