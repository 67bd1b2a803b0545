"""A model folder becomes a model: safetensors read by hand, memory-mapped, checked against config.json.

The format (https://huggingface.co/docs/safetensors) fits in three lines:
    8 bytes     N, the length of the header, a little-endian integer
    N bytes     the header, JSON: {"name": {"dtype": "BF16", "shape": [151936, 896], "data_offsets": [begin, end]}, ...}
    the rest    the numbers of all tensors without a gap; offsets count from here
So a tensor is a slice of the file, and nothing is read until it is used: opening 15 GB takes milliseconds, a weight that
keeps its dtype on the CPU *is* the file's page in memory, and several processes share it.

Usage:
    lm = load_model(find_model("Qwen/Qwen2.5-0.5B-Instruct"))
    hidden = lm.model(tokens)
"""
import math
import mmap
import os
import re
import struct
from pathlib import Path

import torch

from checks import foreign, parse_json, read_json, regular_file, show
from config import DTYPES, Config
from model import CausalLM

# The names that the format defines and torch can hold. Weights must be of the first line; the rest is read, not used.
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
MAX_HEADER = 100_000_000        # bytes; the limit of the reference implementation


def read_safetensors(path):
    """All tensors of one file: dict of name -> tensor, each a copy-on-write view of the memory-mapped file.

    Raises ValueError (FileNotFoundError if there is no such file) when the file breaks a rule of the format.
    """
    path = regular_file(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = read_header(path, file, size)
            begin = file.tell()
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)     # changed weights stay in memory, never on disk
    except OSError as error:
        raise ValueError(f"{show(path, 160)}: cannot be read ({error.strerror})") from None
    data = torch.frombuffer(data, dtype=torch.uint8)                        # keeps the map alive as long as a tensor lives
    tensors = {}
    for name, (dtype, shape, (start, end)) in header.items():
        piece = data[begin + start:begin + end]
        if piece.storage_offset() % dtype.itemsize:                         # legal, rare, and nothing that a view can do
            piece = piece.clone()
        tensors[name] = piece.view(dtype).view(shape)
    return tensors


def read_header(path, file, size):
    """Parse and check the header -> dict of name -> (torch dtype, shape, (begin, end)); leaves `file` at the data."""
    def fail(what):
        raise ValueError(f"{show(path, 160)}: {what}; download it again")

    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 0 < length <= min(size - 8, MAX_HEADER):                         # before a byte is allocated for it
        other = foreign(start + file.read(56))
        if other:
            raise ValueError(f"{show(path, 160)}: is not safetensors but {other}")
        fail(f"is no safetensors file or is cut short: it has {size} bytes and announces "
             f"a header of {length} (the format allows 1 to {MAX_HEADER:,})")
    text = file.read(length)
    if text.count(b",") > 1_000_000:                                        # five a tensor: before minutes of parsing
        fail("its header lists more tensors than any model has")
    if text[:1] != b"{":
        fail("is no safetensors file: its header does not begin with '{'")
    header = parse_json(text, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        fail(f"__metadata__ is {show(metadata)}, not a table of strings")

    found, is_size = {}, lambda n: type(n) is int and 0 <= n < 1 << 63      # `type`: True is an int to isinstance
    for name, entry in header.items():
        entry = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
            fail(f"dtype of {show(name)} is {show(dtype)}, which the reader does not know")
        if not isinstance(shape, list) or not all(map(is_size, shape)):
            fail(f"shape of {show(name)} is {show(shape)}, not a list of sizes")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)) or offsets[0] > offsets[1]:
            fail(f"data_offsets of {show(name)} are {show(offsets)}, not [begin, end]")
        if len(shape) > 64 or math.prod(n or 1 for n in shape) >= 1 << 60:
            fail(f"shape of {show(name)} is {show(shape)}, more than memory can address")
        need = math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize
        if offsets[1] - offsets[0] != need:
            fail(f"{show(name)} has {offsets[1] - offsets[0]} bytes, its dtype and shape need {need}")
        found[name] = SAFETENSORS_DTYPES[dtype], shape, tuple(offsets)

    end = 0
    for name, (_, _, (begin, stop)) in sorted(found.items(), key=lambda item: item[1][2]):
        if begin != end:
            fail(f"{show(name)} begins at byte {begin} of the data, {'inside' if begin < end else 'beyond'} the tensor before it")
        end = stop
    if end != size - 8 - length:
        fail(f"its tensors need {end} bytes of data and it has {size - 8 - length}, so it is cut short or not clean")
    return found


def read_weights(folder):
    """The tensors of a model folder, from model.safetensors or from the shards that model.safetensors.index.json lists."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.lexists(single):
        return read_safetensors(single)
    if not os.path.lexists(index):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".pt"))
        if pickles:
            raise ValueError(f"{show(folder, 160)}: has {show(pickles[0])}, a pickle, which could run code and is never opened; "
                             "convert it with transformers: save_pretrained(folder, safe_serialization=True)")
        raise FileNotFoundError(f"{show(folder, 160)}: has no model.safetensors and no model.safetensors.index.json; "
                                "give a complete model folder")
    weight_map = read_json(index, limit=16 << 20).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{show(index, 160)}: has no weight_map; download it again")
    for shard in weight_map.values():               # a plain file name cannot lead out of the folder
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard, re.ASCII) or shard.startswith("."):
            raise ValueError(f"{show(index, 160)}: weight_map names {show(shard)}, not a safetensors file of the folder")
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        for name, tensor in read_safetensors(folder / shard).items():
            if weight_map.get(name) != shard:
                raise ValueError(f"{show(folder / shard, 160)}: holds {show(name)}, for which the index names "
                                 f"{show(weight_map.get(name, 'no shard'))}; download the folder again")
            tensors[name] = tensor
    if len(tensors) < len(weight_map):
        name = next(name for name in weight_map if name not in tensors)
        raise ValueError(f"{show(folder / weight_map[name], 160)}: has no {show(name)}, which the index says it holds; "
                         "download the folder again")
    return tensors


def load_model(folder, device="cpu", dtype="auto"):
    """A folder with config.json and safetensors -> CausalLM, frozen (no gradients), in evaluation mode.

    dtype: "float32", "bfloat16", "float16", the torch dtype, or "auto": what config.json names, else what the file holds.
    The model is built without memory on the `meta` device and its parameters are replaced by the tensors of the file, so the
    peak is one copy of the weights, or none at all if dtype and device stay those of the file.
    Raises ValueError or FileNotFoundError, one line each. Strict: every weight must be there, no other, in its shape.
    """
    folder = find_model(folder)
    config = Config.from_folder(folder)
    tensors = read_weights(folder)

    def fail(what, names):
        names = sorted(names)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"{show(folder, 100)}: {what}: {', '.join(show(n, 60) for n in names[:3])}{more}; "
                         "config.json and the weights do not belong together")

    # Leftovers: tables that old exporters stored and every program computes itself; a copy of the tied matrix.
    tensors = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    embedding, head = tensors.get("model.embed_tokens.weight"), tensors.get("lm_head.weight")
    if config.tie_word_embeddings and embedding is not None:
        if head is not None and not (head.dtype == embedding.dtype and torch.equal(head, embedding)):
            fail("tie_word_embeddings is true but the file has another matrix", ["lm_head.weight"])
        tensors["lm_head.weight"] = embedding
    layers = {name.split(".")[2] for name in tensors if re.match(r"model\.layers\.\d+\.", name)}
    if len(layers) != config.num_hidden_layers:             # before anything of the announced size is built
        fail(f"num_hidden_layers is {config.num_hidden_layers} but the file has {len(layers)} layers", tensors)
    with torch.device("meta"):
        lm = CausalLM(config)
    expected = {name: tuple(p.shape) for name, p in lm.state_dict().items()}
    if expected.keys() - tensors.keys():
        fail("weights are missing", expected.keys() - tensors.keys())
    if tensors.keys() - expected.keys():
        fail("weights that this architecture does not have", tensors.keys() - expected.keys())
    if any(tensors[n].shape != shape for n, shape in expected.items()):
        fail("weights have another shape than config.json says",
             (f"{n} {list(tensors[n].shape)} for {list(shape)}" for n, shape in expected.items() if tensors[n].shape != shape))
    odd = [f"{n} ({t.dtype})" for n, t in tensors.items() if t.dtype not in (torch.float64, *DTYPES.values())]
    if odd:
        fail("weights are not real floating-point numbers", odd)

    if dtype == "auto":
        dtype = DTYPES.get(config.dtype) or (embedding.dtype if embedding.dtype != torch.float64 else torch.float32)
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype is {show(dtype)}; give auto, {', '.join(DTYPES)}")
    for name in expected:                                   # one at a time, so that a copy on its way is the only extra
        tied = config.tie_word_embeddings and name == "lm_head.weight"
        tensors[name] = tensors["model.embed_tokens.weight"] if tied else tensors[name].to(device=device, dtype=dtype)
    lm.load_state_dict(tensors, strict=True, assign=True)
    lm.tie_weights()                                        # assignment has made two parameters of the one
    lm.model.rotary_emb.to(device)
    return lm.eval().requires_grad_(False)


def find_model(name):
    """`name` is a folder, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct -> the folder.

    A hub id is looked up where Hugging Face's tools keep what they fetched: HF_HUB_CACHE, HF_HOME/hub, ~/.cache/huggingface/hub;
    models--OWNER--NAME/refs/main names the snapshot. If it is not there, huggingface_hub fetches it when that is installed.
    """
    folder = Path(name)
    if os.path.isdir(folder):
        return folder
    if os.path.lexists(folder):
        raise ValueError(f"--model {show(folder, 160)}: is not a folder; give the folder that holds config.json")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name), re.ASCII):
        raise FileNotFoundError(f"--model {show(folder, 160)}: no such folder, and no hub id like Qwen/Qwen2.5-0.5B-Instruct")
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub").expanduser()
    repo = cache / f"models--{str(name).replace('/', '--')}"
    try:
        commit = (repo / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        commit = ""
    if re.fullmatch(r"[0-9a-f]{6,64}", commit) and (repo / "snapshots" / commit / "config.json").exists():
        return repo / "snapshots" / commit
    wanted = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        files = " ".join(f"--include '{pattern}'" for pattern in wanted)
        raise FileNotFoundError(f"--model {show(str(name), 100)}: not in {show(cache, 80)}; fetch it with: pip install huggingface_hub "
                                f"&& hf download {show(str(name), 100)[1:-1]} {files}") from None
    try:
        return Path(snapshot_download(str(name), allow_patterns=wanted))
    except Exception as error:                              # its many kinds of error share no class of their own
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"--model {show(str(name), 100)}: could not be fetched ({show(reason, 160)})") from None
