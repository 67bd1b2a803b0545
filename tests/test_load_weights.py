"""load_weights.py: safetensors by hand, both ways. What may be wrong with a file is in
tests/test_checks_safetensors.py; here are good ones, and what is written."""
import json
import math
import os
import resource
import struct
import subprocess
import sys

import pytest
import torch

import forks
import load_weights
from hostile import MODEL, ROOT, build, check_line, safetensors, shards, write
from load_weights import (SAFETENSORS_DTYPES, load_model, read_safetensors, read_weights,
                          write_safetensors)

try:
    import safetensors.torch as library
except ImportError:
    library = None


def some_tensors():
    """Every dtype of the format, and the shapes that are easily got wrong."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in SAFETENSORS_DTYPES.items():
        raw = torch.randint(0, 256, (3, 16), dtype=torch.uint8, generator=draw)
        if dtype == torch.bool:
            raw = raw % 2
        tensors[f"of {name}"] = raw.view(dtype)
    column = torch.arange(12.0).view(3, 4)
    return tensors | {
        "scalar": torch.tensor(1.5), "empty": torch.zeros(0), "empty too": torch.zeros(4, 0, 2),
        "transposed": column.T, "slice": column[:, 1:3],
        "gradient": column.clone().requires_grad_(),
        "one byte": torch.tensor([True]), "é \n\"\\": torch.ones(1, 1, 1)}


def same(a, b):
    """The same names, dtypes, shapes and bytes: NaN equals itself."""
    def raw(tensor):
        flat = tensor.detach().contiguous().view(-1)
        return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).tolist()
    return {name: raw(t) for name, t in a.items()} == {name: raw(t) for name, t in b.items()}


def test_round_trip(tmp_path):
    tensors = some_tensors()
    write_safetensors(tmp_path / "x", tensors)
    found = read_safetensors(tmp_path / "x")
    assert list(found) == list(tensors) and same(found, tensors)
    assert os.listdir(tmp_path) == ["x"]


def test_no_tensors(tmp_path):
    write_safetensors(tmp_path / "x", {})
    assert read_safetensors(tmp_path / "x") == {}


def test_bytes_that_are_written(tmp_path):
    """By hand: length, header, data without a gap, and the data begins at a multiple of 8."""
    write_safetensors(str(tmp_path / "x"), {"a": torch.tensor([1, 2, 3], dtype=torch.uint8),
                                            "b": torch.tensor([[1.0], [-2.0]])})
    data = (tmp_path / "x").read_bytes()
    length, = struct.unpack_from("<Q", data)
    assert length % 8 == 0
    assert json.loads(data[8:8 + length]) == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2, 1], "data_offsets": [3, 11]}}
    assert data[8 + length:] == bytes([1, 2, 3]) + struct.pack("<2f", 1, -2)


def test_bytes_that_are_read(tmp_path):
    """By hand: a little-endian number each, at offsets that no dtype divides."""
    header = {"h": {"dtype": "F16", "shape": [2], "data_offsets": [1, 5]},
              "q": {"dtype": "I64", "shape": [], "data_offsets": [5, 13]},
              "x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
              "b": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [13, 17]}}
    text = json.dumps(header).encode()
    data = b"\x07" + struct.pack("<2e", 0.5, -3) + struct.pack("<q", -5) + b"\x80\x3f\x00\xc0"
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + data)
    found = read_safetensors(tmp_path / "x")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "h": [0.5, -3.0], "q": -5, "x": [7], "b": [[1.0, -2.0]]}
    assert [t.dtype for t in found.values()] == [torch.float16, torch.int64, torch.uint8,
                                                 torch.bfloat16]


@pytest.mark.skipif(library is None, reason="the safetensors library is not installed")
def test_like_the_library(tmp_path):
    """What we write it reads, and what it writes we read."""
    tensors = {name: t.detach().contiguous() for name, t in some_tensors().items()}
    write_safetensors(tmp_path / "ours", tensors)
    assert same(library.load_file(tmp_path / "ours"), tensors)
    library.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert same(read_safetensors(tmp_path / "theirs"), tensors)


def test_like_the_tests_own_writer(tmp_path):
    tensors = build("qwen3")[MODEL]
    (tmp_path / "x").write_bytes(safetensors(tensors, metadata={"format": "pt"}))
    assert same(read_safetensors(tmp_path / "x"), tensors)


# ---- whole or not at all -------------------------------------------------------------------------

def test_replaces_a_file_at_once(tmp_path):
    """Who has mapped the old file keeps the old numbers."""
    path = tmp_path / "x"
    write_safetensors(path, {"a": torch.zeros(1000)})
    old = read_safetensors(path)
    write_safetensors(path, {"a": torch.ones(1000)})
    assert old["a"].sum() == 0 and read_safetensors(path)["a"].sum() == 1000


def test_a_failure_leaves_the_old_file(tmp_path):
    """A tensor that cannot be written, half way through."""
    path = tmp_path / "x"
    write_safetensors(path, {"a": torch.zeros(3)})
    before = path.read_bytes()
    with torch.device("meta"):
        nothing = torch.zeros(2)
    with pytest.raises((NotImplementedError, RuntimeError)):
        write_safetensors(path, {"a": torch.ones(3), "b": nothing})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x"]


def test_loading_imports_no_compiler():
    """In a process of its own: nothing that torch imports when it fills an embedding on the meta device."""
    code = ("import sys, torch, load_weights; before = set(sys.modules); load_weights.load_model('tiny')\n"
            "print(*(set(sys.modules) - before))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch._dynamo" not in done.stdout.split() and len(done.stdout.split()) < 100, done.stdout


def limited(code, size=1 << 16):
    """Python code in a process whose files may have 64 KB: the nearest thing to a full disk."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    return forks.run(["-c", limit + code])


def test_a_full_disk(tmp_path):
    """One line that names the file; the old file is whole, and nothing half-written is left."""
    path = tmp_path / "x"
    write_safetensors(path, {"a": torch.zeros(3)})
    before = path.read_bytes()
    code = ("import torch, load_weights\n"
            "try:\n"
            f"    load_weights.write_safetensors({str(path)!r}, {{'a': torch.ones(1 << 20)}})\n"
            "except OSError as error:\n"
            "    print(error)\n")
    run = limited(code)
    assert run.returncode == 0 and str(path) in run.stdout and "large" in run.stdout, run
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("target", ["folder", "pipe", "dangling", "a-file/below", "no/such/x", ""])
def test_places_that_are_refused(target, tmp_path, alarm):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a-file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = {path: path.lstat() for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError) as caught:
        write_safetensors(tmp_path / target, {"a": torch.zeros(1)})
    check_line(str(caught.value), target)
    after = {path: path.lstat() for path in tmp_path.rglob("*")}
    assert {p: (s.st_mode, s.st_ino) for p, s in after.items()} \
        == {p: (s.st_mode, s.st_ino) for p, s in before.items()}


# ---- reading is mapping --------------------------------------------------------------------------

def test_nothing_is_written_through_the_map(tmp_path):
    """The weights are views of the file: changing one in memory changes neither the file nor what
    others read."""
    write(tmp_path, build())
    before = (tmp_path / MODEL).read_bytes()
    tensors = read_safetensors(tmp_path / MODEL)
    tensors["lm_head.weight"].fill_(7)
    assert (tmp_path / MODEL).read_bytes() == before
    assert not (read_safetensors(tmp_path / MODEL)["lm_head.weight"] == 7).any()


def test_a_weight_is_a_page_of_the_file(tmp_path):
    """In its own dtype on the CPU nothing is copied: a gigabyte opens in no time and no memory."""
    path = tmp_path / "x"
    text = json.dumps({"a": {"dtype": "F32", "shape": [1 << 28],
                             "data_offsets": [0, 1 << 30]}}).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + (1 << 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensor = read_safetensors(path)["a"]
    assert tensor.shape == (1 << 28,) and tensor[-1] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10       # KB


def test_no_file_stays_open(tmp_path):
    """A thousand files, one after the other: the map needs no descriptor."""
    write_safetensors(tmp_path / "x", {"a": torch.zeros(3)})
    before = len(os.listdir("/proc/self/fd"))
    kept = [read_safetensors(tmp_path / "x") for _ in range(1000)]
    assert len(kept) == 1000 and len(os.listdir("/proc/self/fd")) - before <= 1001


# ---- whole folders -------------------------------------------------------------------------------

def test_shards_are_one_model(tmp_path):
    files = build("qwen3")
    write(tmp_path / "whole", files)
    parts = files | shards(files.pop(MODEL), 5)
    parts.pop(MODEL, None)
    write(tmp_path / "parts", parts)
    assert same(read_weights(tmp_path / "whole"), read_weights(tmp_path / "parts"))


@pytest.mark.parametrize("dtype, expected", [
    ("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16),
    ("float16", torch.float16), (torch.float16, torch.float16)])
def test_dtype(dtype, expected, tmp_path):
    write(tmp_path, build())
    lm = load_model(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in lm.parameters()} == {expected}
    assert not any(parameter.requires_grad for parameter in lm.parameters())
    assert not lm.training


@pytest.mark.parametrize("named, held, expected", [
    ("bfloat16", torch.float32, torch.bfloat16), (None, torch.float16, torch.float16),
    (None, torch.float64, torch.float32), ("float64", torch.float64, torch.float32),
    ("torch.float16", torch.float32, torch.float16)])
def test_dtype_auto(named, held, expected, tmp_path):
    """What config.json names, else what the file holds; float64 becomes float32."""
    files = build(torch_dtype=named)
    files[MODEL] = {name: tensor.to(held) for name, tensor in files[MODEL].items()}
    write(tmp_path, files)
    assert load_model(tmp_path).lm_head.weight.dtype == expected


def test_tied_is_one_parameter(tmp_path):
    files = build(tie_word_embeddings=True)
    write(tmp_path, files)
    lm = load_model(tmp_path, dtype="bfloat16")
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    count = sum(parameter.numel() for parameter in lm.parameters())
    assert count == sum(math.prod(tensor.shape) for tensor in files[MODEL].values())


def test_names_lead_to_the_code(tmp_path):
    """The module tree carries the checkpoint's own names: no renaming table."""
    for family in ("llama", "qwen2", "qwen3"):
        files = build(family)
        write(tmp_path / family, files)
        assert load_model(tmp_path / family).state_dict().keys() == files[MODEL].keys()


def test_a_kept_model_is_found_by_its_name(tmp_path, monkeypatch):
    """Where `python -m convert` keeps it; a folder of that name comes first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = write(tmp_path / "cache" / "slot-models" / "small", build())
    monkeypatch.chdir(tmp_path)
    assert load_weights.find_model("small") == kept
    (tmp_path / "small").mkdir()
    assert load_weights.find_model("small").resolve() == tmp_path / "small"


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="needs the superuser")
@pytest.mark.parametrize("name", [MODEL, "config.json"])
def test_a_file_that_may_not_be_read(name, tmp_path):
    """One line in a ValueError, for a user who is not the superuser."""
    write(tmp_path / "model", build())
    (tmp_path / "model" / name).chmod(0)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_mode & 0o5 != 0o5 and str(path).startswith("/tmp"):
            path.chmod(path.stat().st_mode | 0o755)
    code = ("import os, load_weights\n"
            "os.setuid(12345)\n"
            "try:\n"
            f"    load_weights.load_model({str(tmp_path / 'model')!r})\n"
            "except ValueError as error:\n"
            "    print(error)\n")
    run = forks.run(["-c", code])
    assert run.returncode == 0, run
    check_line(run.stdout.strip(), f"{name} permissions")
