"""
benchmark.py at toy size, through the command line: the rows are there, the last line is JSON with every field that the README
and later comparisons read. No figure is judged: this machine may be busy.
"""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmark import FUNCTIONS, published_loop
from linear import Linear
from slot import optimize_delta

FORMS = list(FUNCTIONS)


def run(*options, status=0):
    done = subprocess.run([sys.executable, str(ROOT / "benchmark.py"), *options], capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stderr[-2000:]
    return done.stdout, done.stderr


def test_table_and_json(tmp_path):
    out, err = run("--model", str(ROOT / "tiny"), "--rounds", "1", "--new", "4", "--dtype", "float32",
                   "--json", str(tmp_path / "x.json"))
    result = json.loads(out.splitlines()[-1])
    assert json.loads((tmp_path / "x.json").read_text()) == result
    assert set(result["header"]) == {"machine", "capability", "threads", "versions"}
    assert set(result["commands"]) == {"import torch alone", "generate.py --help", "generate.py, one token"}
    assert len(result["rates"]["read"]) == 1 and len(result["rates"]["multiply"]["float32"]) == 1
    table, = result["tables"]
    expected = ["load, to the first token", "prefill 16", "prefill 160", "first token after 200", "decode", *["decode, compiled"] * bool(shutil.which(os.environ.get("CXX", "g++"))),
                *(f"SLOT {what}, {form}" for form in FORMS for what in ("5 steps", "a step")),
                "8 prompts in a batch", "8 prompts one by one"]
    assert list(table["rows"]) == expected
    for row, values in table["rows"].items():
        assert set(values) == {"unit", "min", "median", "max", "limit", "reached", "seconds"}
        assert f"\n{row}  " in out and values["limit"] > 0
    figures = table["figures"]
    assert {f"SLOT {what}, published / {form}" for form in FORMS[1:] for what in ("5 steps", "a step")} <= set(figures)
    assert {"SLOT share of 512 tokens", "its limit", "SLOT / its limit"} <= set(figures)
    assert "round 1/1" in err and "round" not in out.split("== ")[1], "progress belongs on stderr"
    if sys.platform == "linux":
        assert set(table["memory"]) == {"answer", *FORMS}


@pytest.mark.parametrize("options, line", [
    (["--rounds", "0"], "argument --rounds: '0' is not an integer"),
    (["--dtype", "float64"], "argument --dtype: 'float64' is not a list of"),
    (["--peer-python", "/no/such"], "--peer-python needs --peers"),
])
def test_wrong_options_are_one_line(options, line):
    out, err = run(*options, status=2)
    assert out == "" and err.startswith("benchmark.py: ") and line in err and err.count("\n") == 1


def test_wrong_places_are_one_line(tmp_path):
    _, err = run("--model", str(tmp_path / "none"), status=1)
    assert err.splitlines()[-1].startswith("benchmark.py: ") and "no such folder" in err.splitlines()[-1]
    _, err = run("--peers", "--peer-python", str(tmp_path / "python"), status=1)
    assert "is no Python that runs" in err.splitlines()[-1]


def test_the_published_loop_is_the_method():
    """What the speed-ups are measured against computes the same δ."""
    draw = torch.Generator().manual_seed(0)
    hidden, tokens = torch.randn(1, 9, 16, generator=draw), torch.randint(0, 40, (1, 9), generator=draw)
    head = Linear(16, 40).requires_grad_(False)
    head.weight.copy_(torch.randn(40, 16, generator=draw))
    delta, _ = optimize_delta(hidden, tokens, head, 4, 0.05)
    assert torch.allclose(published_loop(hidden, tokens, head, 4, 0.05), delta, atol=1e-5)
    assert head.weight.grad is None


def test_sweep_terms_and_paper(capsys):
    """The model of the cost, at numbers that can be done by hand."""
    from benchmarks.machine import Rates
    from benchmarks.sweep import MEMORY, line, on_paper, terms
    from slot import KEPT

    class Hand(Rates):
        def __init__(self):
            self.reads, self.products = [10.0], {torch.float32: [100.0]}

    parts = terms(n=2, steps=3, V=50, d=4, B=1, dtype=torch.float32, rates=Hand())
    assert parts == {"W h": 80.0, "head": 3 * 2 * 4 * 50 * 4 / 10, "E": 3 * 2 * 4 * 2 * 50 / 10, "W h again": 0.0}
    n = MEMORY // 50                                                        # MEMORY holds a quarter of these rows in float32
    again = terms(n=n, steps=3, V=50, d=4, B=1, dtype=torch.float32, rates=Hand())
    assert again["W h again"] / again["W h"] == pytest.approx(2 * (1 - KEPT / 4), rel=1e-4)
    assert again["E"] == pytest.approx(3 * KEPT * MEMORY / 10, rel=1e-4)          # z of what is kept, read once a step
    assert line([(1, 5.0), (2, 7.0), (4, 11.0)]) == pytest.approx((2, 3))
    rows = on_paper(Hand(), torch.float32)
    assert [row["shape"] for row in rows] == ["0.5b", "1.5b", "7b", "70b"]
    assert rows[3]["product_flop"] == 2 * 200 * 128256 * 8192 and "70b" in capsys.readouterr().out


def test_gguf_is_what_the_format_says(tmp_path):
    """Read back by hand: the names that llama.cpp knows, and the numbers of the folder."""
    import struct
    from benchmarks import random_model
    from benchmarks.gguf import gguf_name, write_gguf
    from load_weights import read_weights
    shapes = dict(random_model.SHAPES)
    random_model.SHAPES["toy"] = (32, 48, 2, 4, 2, 8, 70, True)
    try:
        folder = random_model.write_random_model(tmp_path / "toy", "toy")
    finally:
        random_model.SHAPES.clear()
        random_model.SHAPES.update(shapes)
    data = write_gguf(folder, tmp_path / "toy.gguf", "float32").read_bytes()
    weights = read_weights(folder)
    assert data[:4] == b"GGUF" and struct.unpack_from("<IQ", data, 4) == (3, len(weights))
    name = "model.layers.1.mlp.down_proj.weight"
    assert gguf_name(name) == "blk.1.ffn_down.weight" and b"blk.1.ffn_down.weight" in data
    assert weights[name].float().contiguous().numpy().tobytes() in data
    if importlib.util.find_spec("gguf"):                                    # llama.cpp's own reader, where it is installed
        from gguf import GGUFReader
        tensors = {t.name: t.data for t in GGUFReader(tmp_path / "toy.gguf").tensors}
        assert (torch.tensor(tensors[gguf_name(name)]) == weights[name].float()).all()
