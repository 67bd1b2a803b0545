"""A model over many ranks is the model: 2 and 4 processes over gloo against one, in float32, every family.

One start of N processes answers all questions about all folders (parallel_worker.py); the tests compare what they
wrote. Measured: logits within 3e-6, δ within 3e-7.
"""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slot

parallel = pytest.importorskip("speed.parallel", reason="there is no speed/")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from load_weights import load_model, read_config, write_safetensors
from model import CausalLM
from parallel_worker import LR, NEW, STEPS, answers, prompts_of
from speed.delta import optimize_delta_fast

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden"
NAMES = {           # of the goldens those that differ where a model is divided; all have 96 tokens
    "llama2_published": "4 heads, 4 of key/value", "llama32_tied": "4 and 1, tied", "llama_biases": "4 and 2, biases",
    "qwen2": "4 and 2, q/k/v biases", "qwen2_yarn": "2 and 1: 4 ranks cannot divide them",
    "qwen3_tied_yarn": "4 and 1, q/k norm, tied, head_dim 24", "llama_bf16": "a file in 16 bits"}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 48,
         "intermediate_size": 67, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
         "vocab_size": 101, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "head_dim": 8,
         "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "torch_dtype": "float32"}
OWN = {             # what the goldens do not have: sizes that do not divide
    "uneven": LLAMA,
    "indivisible": LLAMA | {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "num_attention_heads": 4, "num_key_value_heads": 1},
    "indivisible_biases": LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 1, "attention_bias": True},
}


def write_model(folder, raw, scale=0.2):
    """A random model in shards: norms are not ones, biases not zeros."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    draw, weight_map = torch.Generator().manual_seed(1), {}
    with torch.device("meta"):
        weights = CausalLM(read_config(folder)).state_dict()
    if raw["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    for place, (name, weight) in enumerate(weights.items()):
        shard = f"model-{place // 5}.safetensors"
        weight_map[name] = shard
    for shard in sorted(set(weight_map.values())):
        mine = {name: torch.randn(weights[name].shape, generator=draw) * scale + ("norm" in name)
                for name in weights if weight_map[name] == shard}
        write_safetensors(folder / shard, mine)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def start(ranks, *command, **more):
    """The processes of `ranks` ranks, as torchrun would start them, but without torchrun."""
    port, processes = free_port(), []
    for rank in range(ranks):
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen([sys.executable, *map(str, command)], env=environment, cwd=ROOT, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more))
    return processes


def end(processes, seconds=100):
    """-> [(status, stdout, stderr)] of every rank; none outlives the test."""
    try:
        found = [process.communicate(timeout=seconds) for process in processes]
        return [(process.returncode, *texts) for process, texts in zip(processes, found)]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    own = {name: write_model(root / name, raw) for name, raw in OWN.items()}
    return {name: GOLDEN / name for name in NAMES} | own


@pytest.fixture(scope="module")
def alone(folders):
    """What one process says."""
    found = {}
    for name, folder in folders.items():
        lm = load_model(folder, dtype="float32")
        found[name] = answers(lm, optimize_delta_fast, lambda choose: choose)
        prompts = prompts_of(lm.config)
        found[name]["ids one by one"] = [list(slot.generate(lm, ids, NEW, STEPS, LR)) for ids in prompts]
    return found


@pytest.fixture(scope="module", params=[2, 4], ids=lambda ranks: f"{ranks} ranks")
def together(request, folders, tmp_path_factory):
    """-> {folder's name: what each rank says, a list}"""
    out = tmp_path_factory.mktemp(f"ranks{request.param}")
    ended = end(start(request.param, "tests/parallel_worker.py", out, *folders.values()))
    for rank, (status, said, complaints) in enumerate(ended):
        assert status == 0, f"rank {rank} ended with status {status}: {said} {complaints}"
    ranks = [torch.load(out / f"{rank}.pt") for rank in range(request.param)]
    return {name: [found[str(folder)] for found in ranks] for name, folder in folders.items()}


def largest(difference):
    return difference.abs().max().item()


every_folder = pytest.mark.parametrize("name", [*NAMES, *OWN])


@every_folder
def test_many_ranks_say_what_one_says(name, alone, together):
    """Logits, δ and losses of the loop and of the closed form (whole and in blocks), ids: plain, with SLOT, in a
    padded batch. A slice of the wrong rows, a sum left out or made twice, a bias added by every rank: all show here."""
    expected, found = alone[name], together[name][0]
    for key, bound in (("hidden", 1e-4), ("logits", 1e-4)):
        off = largest(found[key] - expected[key])
        assert off < bound, f"{name}: {key} differ by {off:.1e}"
    for form in ("loop", "fast", "blocks"):
        for what in ("losses", "delta"):
            off = largest(found[f"{what} {form}"] - expected[f"{what} loop"])
            assert off < 1e-5, f"{name}: {what} of {form} differ by {off:.1e}"
    for key in ("ids plain", "ids slot", "ids batch", "ids drawn"):
        assert found[key] == expected[key], f"{name}: {key}"
    assert found["ids batch"] == expected["ids one by one"], f"{name}: a batch is not its prompts alone"


@every_folder
def test_all_ranks_are_equal_to_the_last_bit(name, together):
    """Also where each draws with another seed: rank 0 draws for all."""
    one, *others = together[name]
    for rank, other in enumerate(others, 1):
        for key in one:
            if key.startswith("ids"):
                assert one[key] == other[key], f"{name}: rank {rank} has other {key}"
            elif torch.is_tensor(one[key]):
                assert torch.equal(one[key], other[key]), f"{name}: rank {rank} has other bits in {key}"


@every_folder
def test_a_rank_keeps_its_part(name, folders, alone, together):
    """Every row of a divided matrix is at one rank, but for key/value heads where there are more ranks than those."""
    config, ranks = read_config(folders[name]), len(together[name])
    rows = [found["rows"] for found in together[name]]
    first = "model.layers.0."
    assert sum(each["lm_head.weight"] for each in rows) == config.vocab_size
    assert sum(each[f"{first}mlp.gate_proj.weight"] for each in rows) == config.intermediate_size
    assert max(each["lm_head.weight"] for each in rows) - min(each["lm_head.weight"] for each in rows) <= 1
    H, K = config.num_attention_heads, config.num_key_value_heads
    divided = H % ranks == 0 and (K % ranks == 0 or ranks % K == 0)
    for found, each in zip(together[name], rows):
        assert each[f"{first}self_attn.q_proj.weight"] == H * config.head_dim // (ranks if divided else 1)
        heads = max(1, K // ranks) if divided else K
        assert found["heads in cache"] == heads == each[f"{first}self_attn.k_proj.weight"] // config.head_dim
        assert ("attention whole" in found["words"]) == (not divided)
