"""A small random model in the embedded model's folder format, for the tests of study/. Its answers
are nonsense, which these tests do not mind."""
import json
import shutil
from pathlib import Path

import torch

import forks
from load_weights import read_config, write_safetensors
from model import CausalLM

ROOT = Path(__file__).resolve().parent.parent
NEW = 8


def make(folder):
    """tiny/ with one small layer of random weights."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "tiny" / name, folder)
    config = json.loads((ROOT / "tiny/config.json").read_text()) | dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, max_window_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    weights = {name: 0.4 * torch.randn_like(w)
               for name, w in CausalLM(read_config(folder)).state_dict().items()
               if name != "lm_head.weight"}
    write_safetensors(folder / "model.safetensors", weights)
    return folder


def options(folder, out, *more):
    return ["--model", str(folder), "--out", str(out), "--limit", "4", "--batch", "3",
            "--steps", "0,1,3", "--lr", "0.1", "--max-new-tokens", str(NEW), *more]


def study(*arguments, root=ROOT):
    """`python -m study` as a process, to its end."""
    return forks.run(["-m", "study", *arguments], root)


def read(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def by_key(out):
    return {(row["sample"], row["setting"]): row for row in read(out)}


def timeless(rows):
    return sorted(json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in rows)


def facts(out):
    """The summary up to the section that two runs need not share."""
    text = (out / "summary.md").read_text(encoding="utf-8")
    assert "\n## Time\n" in text
    return text.split("\n## Time\n")[0]
