"""A model over many ranks is the model: 2 and 4 processes over gloo against one, in float32, every family.

One start of N processes answers all questions about all folders (parallel_worker.py); the tests compare what they
wrote. Measured: logits within 4.1e-6, δ within 2.2e-6, losses within 1.4e-6.
"""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import forks
import slot

parallel = pytest.importorskip("speed.parallel", reason="there is no speed/")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from checks.ranks import check_parts, check_ranks
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
        found[name] = answers(lm, optimize_delta_fast)
        prompts = prompts_of(lm.config)
        found[name]["ids one by one"] = [list(slot.generate(lm, ids, NEW, STEPS, LR)) for ids in prompts]
    return found


@pytest.fixture(scope="module", params=[2, 4], ids=["two", "four"])
def together(request, folders, tmp_path_factory):
    """-> {folder's name: what each rank says, a list}"""
    out = tmp_path_factory.mktemp(f"ranks{request.param}")
    ended = forks.end(forks.ranks(request.param, ["tests/parallel_worker.py", out, *folders.values()]))
    for rank, (status, said, complaints) in enumerate(ended):
        assert status == 0, f"rank {rank} ended with status {status}: {said} {complaints}"
    ranks = [torch.load(out / f"{rank}.pt") for rank in range(request.param)]
    places = {name: str(folder) for name, folder in folders.items()} | {"half": "half", "beyond": "beyond"}
    return {name: [found[place] for found in ranks] for name, place in places.items()}


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
    """So that each draws the same ids with the same seed."""
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


def test_in_sixteen_bits(folders, together):
    """Summands are rounded before they are summed, so bits differ from those of one process; not between ranks."""
    lm = load_model(next(iter(folders.values())), dtype="bfloat16")
    tokens = prompts_of(lm.config)[0]
    hidden, _ = slot.prefill(lm, tokens, 0)
    delta, losses = slot.optimize_delta(hidden, tokens, lm.lm_head, STEPS, LR)
    for form, fits in zip(("loop", "fast"), zip(*together["half"])):
        assert largest(fits[0][1] - losses) < 0.02, f"{form}: losses {fits[0][1]} for {losses}"
        assert fits[0][1][-1] < fits[0][1][0]
        for fit in fits:
            assert torch.equal(fit[0], fits[0][0]) and torch.equal(fit[1], fits[0][1]), f"{form}: other bits"


def test_an_error_of_one_rank_is_an_error_of_all(together):
    """W δ leaves float16 in the last rank's part of the vocabulary. Who does not notice would wait for the others."""
    for rank, said in enumerate(together["beyond"]):
        assert said is not None and "leaves torch.float16's range" in said, f"rank {rank} says {said}"


# ---- numbers that do not fit

@pytest.mark.parametrize("change, words", [
    ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"), ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"), ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
    ({"RANK": "2"}, "RANK 2 is none of WORLD_SIZE 2")])
def test_variables_that_are_missing_or_wrong(change, words):
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    environment = {name: value for name, value in (environment | change).items() if value is not None}
    with pytest.raises(ValueError, match=words) as caught:
        check_ranks(environment, "cpu")
    assert "torchrun" in str(caught.value) and "\n" not in str(caught.value)


def test_ranks_and_devices_that_do_not_fit():
    environment = {"RANK": "0", "WORLD_SIZE": "6", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    check_ranks(environment, "cuda", 3)
    with pytest.raises(ValueError, match="--tensor-parallel 4 does not divide torchrun's 6 ranks"):
        check_ranks(environment, "cpu", 4)
    for device in ("mps", "cuda:1"):
        with pytest.raises(ValueError, match=f"--device '{device}': under torchrun give cpu, or cuda"):
            check_ranks(environment, device)
    config = read_config(GOLDEN / "qwen2")
    check_parts(config, 64)
    with pytest.raises(ValueError, match="65 ranks cannot share .* intermediate_size 64 and vocab_size 96; start at most 64"):
        check_parts(config, 65)


# ---- the command

def test_the_command_says_what_it_says_alone():
    """A prompt from a pipe, which has one reader; sampling; then two prompts in a batch, closed form."""
    runs = [(["--temperature", "1", "--slot-steps", "3", "--max-new-tokens", "20"], "Tom has 3 pens."),
            (["--slot-steps", "2", "--slot-fast", "--max-new-tokens", "8", "Tom has 3 pens.", "Ann has 12."], None)]
    for options, piped in runs:
        one, many = forks.Fork(["generate.py", *options]), forks.ranks(2, ["generate.py", *options])
        for process in (one, many[0]):
            process.stdin.write(piped or "")
            process.stdin.close()
        (status, expected, _), = forks.end([one])
        ended = forks.end(many)
        assert status == 0 and [status for status, *_ in ended] == [0, 0], ended
        assert ended[0][1] == expected and "heads, MLP and head divided over 2 ranks" in ended[0][2]
        assert ended[1][1:] == ("", ""), "only the first rank prints"


LONG = ["generate.py", "--problem", "1", "--slot-steps", "10000", "--slot-lr", "1e-6"]


def wait_for(process, word):
    """Read what a rank says until the word comes."""
    for line in process.stderr:
        if word in line:
            return
    raise AssertionError(f"it ended without {word!r}")


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_dies_ends_the_others(dead):
    """Killed in the middle of the fit: the other says so in one line, and does not wait."""
    processes = forks.ranks(2, LONG)
    wait_for(processes[0], "prefill")
    processes[dead].send_signal(signal.SIGKILL)
    status, _, complaint = forks.end(processes, 30)[1 - dead]
    lines = [line for line in complaint.splitlines() if line.startswith("generate.py:")]
    assert status == 1 and len(lines) == 1 and "another rank has ended or does not answer" in lines[0], complaint
    assert "Traceback" not in complaint


def test_a_rank_that_hangs_ends_the_others():
    """Stopped, not ended: nothing tells the others but the clock, here set to two seconds."""
    code = ("import sys; from datetime import timedelta; from speed import ranks; "
            "ranks.TIMEOUT = timedelta(seconds=2); import generate; from checks.command import run; "
            f"run(generate.main, generate.parse_arguments({LONG[1:]!r}))")
    processes = forks.ranks(2, ["-c", code])
    wait_for(processes[0], "prefill")
    processes[1].send_signal(signal.SIGSTOP)
    try:
        (status, _, complaint), = forks.end(processes[:1], 30)
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert status == 1 and complaint.count("another rank has ended or does not answer") == 1, complaint


def test_torchrun_where_all_fail_alike():
    """One line of the command, whatever torchrun itself adds."""
    done = forks.run(["-m", "torch.distributed.run", "--nproc-per-node", "2", "generate.py", "--model", "nowhere", "hello"])
    lines = [line for line in done.stderr.splitlines() if line.startswith("generate.py:")]
    assert done.returncode == 1 and len(lines) == 1 and "nowhere" in lines[0], done.stderr


# ---- memory

def fresh(command, env):
    """Not a fork, which shares memory with others."""
    return subprocess.Popen([sys.executable, *map(str, command)], env=os.environ | env | {"OMP_NUM_THREADS": "1"}, cwd=ROOT,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_a_rank_reads_its_part_only(tmp_path):
    """At its highest, pages of mapped files included: 1.1 times its part, and one tensor."""
    raw = LLAMA | {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8, "head_dim": 64, "vocab_size": 4000}
    folder = write_model(tmp_path / "model", raw, scale=0.02)
    found = [json.loads(said) for status, said, complaints in forks.end(forks.ranks(2, ["tests/parallel_memory.py", folder], new=fresh))]
    biggest = 4 * 4096 * 512
    for rank in found:
        whole, part, most = sum(f.stat().st_size for f in folder.iterdir()), rank["part"], rank["peak_load"]
        assert part < 0.55 * whole
        assert most < 1.1 * part + biggest, f"{most / 1e6:.0f} MB at most for a part of {part / 1e6:.0f} MB"
