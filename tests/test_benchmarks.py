"""
`python -m benchmarks` at toy size, through the command line: the rows are there, the last line is JSON with every field that
later comparisons read. No figure is judged: this machine may be busy.
"""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import forks
from benchmarks import random_model
from benchmarks.machine import Rates, timed
from benchmarks.report import comparison, table
from benchmarks.stages import FORMS, Subject, published_loop
from load_weights import load_model, read_weights
from slot import optimize_delta

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/golden"
STAGES = ["prefill 16", "prefill 160", "load, to the first token", "first token after 200", "decode", "32 prompts together",
          *(f"SLOT {what}, {form}" for form in FORMS for what in ("5 steps", "a step"))]


def run(*options, status=0):
    done = forks.run(["-m", "benchmarks", *options])
    assert done.returncode == status, done.stderr[-2000:]
    return done.stdout, done.stderr


def test_table_and_json(tmp_path):
    out, err = run("--model", str(ROOT / "tiny"), "--rounds", "2", "--new", "4", "--dtype", "float32", "--cache", str(tmp_path))
    result = json.loads(out.splitlines()[-1])
    assert set(result["header"]) == {"machine", "capability", "threads", "versions"}
    assert len(result["rates"]["read"]) == len(result["rates"]["multiply"]["float32"]) == 2
    table, = result["tables"]
    assert table["title"] == "tiny, float32" and sorted(table["rows"]) == sorted(STAGES)
    for row, values in table["rows"].items():
        assert set(values) == {"unit", "min", "median", "max", "limit", "reached", "seconds"}
        assert f"\n{row}  " in out and values["limit"] > 0 and len(values["seconds"]) == 2
        assert values["min"] <= values["median"] <= values["max"]
    assert {f"published loop / SLOT {what}, {form}" for form in list(FORMS)[1:] for what in ("5 steps", "a step")} \
        | {"SLOT share of 512 tokens", "its limit"} == set(table["figures"])
    assert "round 2/2" in err and "round" not in out.split("== ")[1], "progress belongs on stderr"


def test_closer_looks(tmp_path):
    out, _ = run("--model", str(ROOT / "tiny"), "--rounds", "1", "--dtype", "float32", "--sweep")
    table, = json.loads(out.splitlines()[-1])["tables"]
    assert {row["rows"] for row in table["products"]} == {0, 1, 4, 8, 32, 160, 1024}
    assert all({"plain", row["chosen"]} <= set(row["ms"]) and 0 < row["share"] <= 1 for row in table["products"])
    *points, long = table["slot"]
    assert [point["n"] for point in points if point["steps"] == 5] == [16, 64, 200, 512, 1024, 2048, 8192]
    assert [point["steps"] for point in points if point["n"] == 200] == [5, 1, 2, 10, 20]
    assert set(long) == {"peak_mib", "seconds"} and "at the peak" in out


@pytest.mark.parametrize("options, line", [
    (["--rounds", "0"], "argument --rounds: '0' is not an integer"),
    (["--dtype", "float64"], "argument --dtype: 'float64' is not a list of"),
    (["--peer-python", "/no/such"], "need --peers"),
])
def test_wrong_options_are_one_line(options, line):
    out, err = run(*options, status=2)
    assert out == "" and err.startswith("python -m benchmarks: ") and line in err and err.count("\n") == 1


def test_wrong_places_are_one_line(tmp_path):
    _, err = run("--model", str(tmp_path / "none"), status=1)
    assert err.splitlines()[-1].startswith("python -m benchmarks: ") and "no such folder" in err.splitlines()[-1]
    _, err = run("--peers", "--peer-python", str(tmp_path / "python"), status=1)
    assert "is no Python that runs" in err.splitlines()[-1]
    _, err = run("--shape", "70b", "--cache", str(tmp_path), status=1)
    assert "give fewer --layers" in err.splitlines()[-1]


def test_the_published_loop_is_the_method():
    """What the speed-ups are measured against computes the same δ."""
    draw = torch.Generator().manual_seed(0)
    hidden, tokens = torch.randn(1, 9, 16, generator=draw), torch.randint(0, 40, (9,), generator=draw).tolist()
    head = torch.nn.Linear(16, 40, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randn(40, 16, generator=draw))
    delta, _ = optimize_delta(hidden, tokens, head, 4, 0.05)
    assert torch.allclose(published_loop(hidden, tokens, head, 4, 0.05)[0], delta, atol=1e-5)
    assert head.weight.grad is None


class Hand(Rates):
    """Ten bytes and a hundred operations a second."""
    def __init__(self):
        self.reads, self.products = [2.0, 10.0], {"float32": [100.0, 50.0]}


def test_limits_by_hand():
    rates = Hand()
    assert rates.limit([(50, 200), (10, 1000)], "float32") == 5 + 10
    assert str(rates).startswith("read, GB/s 0.0 - 0.0; float32, GFLOP/s")
    subject = Subject(GOLDEN / "llama_head_dim", "float32", 2)
    work, config, n = subject.work(), subject.lm.config, len(subject.prompt)
    P = sum(p.numel() for name, p in subject.lm.named_parameters() if ".layers." in name)
    W, seen = 96 * 48, 2 * 3 * 1 * 8 * 4                        # three layers, one head of 8 for keys and values
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (3, 1, 8)
    assert work["decode"] == [(4 * (P + W) + (n + 1) * seen, 2 * (P + W))]
    assert work["SLOT 5 steps, closed form"] == [(4 * W, 2 * n * W)] + 5 * [(8 * W + 8 * n * 96, 0)]
    assert work["SLOT a step, published loop"] == [(12 * W, 6 * n * W)]


def test_time_and_memory():
    calls = []
    assert timed(lambda: calls.append(1), 0.01) < 0.01 and len(calls) > 1
    if sys.platform == "linux":                 # in a process of its own, as `memory_of` says
        code = ("import torch; from benchmarks.machine import memory_of; kept = []; "
                "print(memory_of(lambda: kept.append(torch.ones(1 << 24))))")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert 60 < float(done.stdout) < 200                        # 64 MiB


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setitem(random_model.SHAPES, "toy", (32, 48, 2, 4, 2, 8, 70, True))
    return random_model.write_random_model(tmp_path / "toy", "toy")


def test_random_model(toy, tmp_path):
    lm = load_model(toy)
    assert lm.lm_head.weight.dtype == torch.bfloat16 and lm.config.tie_word_embeddings
    assert lm.config.qkv_bias and lm.model.layers[0].self_attn.q_proj.bias.std() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama2_published", "llama_head_dim", "qwen2", "qwen2_tied", "qwen3"])
def test_gguf_is_what_convert_reads(name, dtype, tmp_path):
    """Written for llama.cpp, read by convert/: every weight as it was, but for the rounding of the matrices."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    from benchmarks.gguf import write_gguf
    from checks.gguf import read_gguf
    from convert.folder import config_of, weight_of
    from load_weights import DTYPES, read_config
    config = read_config(GOLDEN / name)
    fields, tensors = read_gguf(write_gguf(GOLDEN / name, tmp_path / "x.gguf", dtype))
    found = config_of(fields, tensors, dtype)
    assert found["rope_theta"] == config.rope["rope_theta"] and found["head_dim"] == config.head_dim
    assert found["tie_word_embeddings"] == config.tie_word_embeddings and found["rms_norm_eps"] == config.rms_norm_eps
    weights = {key: t for key, t in read_weights(GOLDEN / name).items() if "inv_freq" not in key}
    family = fields["general.architecture"]
    back = dict(weight_of(tensor, family, config, torch.float32) for tensor in tensors.values())
    assert back.keys() == weights.keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    for key, values in back.items():
        kind = torch.float32 if values.ndim == 1 else DTYPES[dtype]
        assert torch.equal(values, weights[key].to(kind).float()), key


def test_gguf_refuses_what_it_cannot_say(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    from benchmarks.gguf import write_gguf
    with pytest.raises(ValueError, match="yarn"):
        write_gguf(GOLDEN / "qwen2_yarn", tmp_path / "x.gguf", "float32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
def test_transformers_is_asked(toy, tmp_path):
    out, _ = run("--model", str(toy), "--rounds", "1", "--new", "3", "--dtype", "float32", "--peers", "--cache", str(tmp_path))
    table, = json.loads(out.splitlines()[-1])["tables"]
    assert table["figures"]["the same tokens as transformers"] == 3
    assert {"decode, transformers", "32 prompts together, transformers", "prefill 160, transformers"} <= set(table["rows"])


PEER = '''import json, sys, time
sys.path.insert(0, {root!r})
from benchmarks import peer

class Echo:
    version = "echo 1"
    def load(self): pass
    def prefill(self, tokens): pass
    def generate(self, prompts, new): pass
    def answer(self, tokens, new): return [time.perf_counter() + i for i in range(new)], [7] * new

{end}
'''


@pytest.mark.parametrize("end, fine", [("peer.serve(Echo())", True), ("sys.exit('no such model')", False)])
def test_a_peer_is_a_line_in_and_a_line_out(tmp_path, monkeypatch, end, fine):
    """The protocol, with a peer that answers at once, and with one that ends before it has said anything."""
    from benchmarks import peer
    (tmp_path / "echo.py").write_text(PEER.format(root=str(ROOT), end=end))
    monkeypatch.setattr(peer, "__file__", str(tmp_path / "echo.py"))
    if not fine:
        with pytest.raises(ValueError, match="--peers: echo ended with status 1"):
            peer.Peer(sys.executable, "echo", "folder", "float32", 1)
        return
    subject = Subject(GOLDEN / "llama2_published", "float32", 2)
    subject.peers["transformers"] = echo = peer.Peer(sys.executable, "echo", "folder", "float32", 1)
    assert echo.version == "echo 1"
    rows = list(subject.measure())
    echo.process.kill()
    subject.seconds = {row: [spent] for row, spent in rows}
    assert {"decode", "decode, transformers", "32 prompts together, transformers"} <= set(subject.seconds)
    assert len(subject.seconds) == len(rows) and subject.ids["transformers"] == [7, 7]

    # The report puts it beside our own row, under the same limit.
    figures, found = table(subject, Hand()), comparison(subject, Hand())
    assert figures["prefill 16, transformers"]["limit"] == figures["prefill 16"]["limit"] > 0
    load = "load, to the first token"
    assert found[f"{load}, transformers / here"] == subject.seconds[f"{load}, transformers"][0] / subject.seconds[load][0]
    assert found["the same tokens as transformers"] == 0
