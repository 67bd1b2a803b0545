"""What may be wrong with a safetensors file, or with the index of several. The format is described
in load_weights.py."""
import math
import os
import re
import struct
from pathlib import Path

from checks.files import foreign, refuse, show, show_name

MAX_HEADER = 100_000_000        # bytes; the limit of the reference implementation


def check_folder(folder):
    """Are there weights? A pickle is not opened: it could run code."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if os.path.lexists(Path(folder, name)):
            return
    for name in sorted(os.listdir(folder)):
        if name.endswith((".bin", ".pth", ".pt")):
            refuse(folder, f"has {show(name)}, a pickle, which could run code and is never opened",
                   "convert it with transformers: save_pretrained(folder, safe_serialization=True)")
    refuse(folder, "has no model.safetensors and no model.safetensors.index.json",
           "give a complete model folder", FileNotFoundError)


def check_start(path, data):
    """data: the mapped file. Has it a header of the length that it announces? Before a byte is
    allocated for it."""
    size = len(data)
    length = struct.unpack("<Q", data[:8])[0] if size >= 8 else 0
    if not 0 < length <= min(size - 8, MAX_HEADER):
        other = foreign(data[:64])
        if other:
            raise ValueError(f"{show(Path(path), 160)}: is not safetensors but {other}")
        refuse(path, f"is no safetensors file or is cut short: it has {size} bytes and announces "
                     f"a header of {length} (the format allows 1 to {MAX_HEADER:,})")
    text = data[8:8 + length]
    if text.count(b",") > 1_000_000:            # five a tensor: before minutes of parsing
        refuse(path, "its header lists more tensors than any model has")
    if text[:1] != b"{":
        refuse(path, "is no safetensors file: its header does not begin with '{'")


def check_header(path, header, size, dtypes):
    """header: the parsed JSON; size: bytes of data behind it; dtypes {"BF16": torch.bfloat16, ...}.
    Every tensor has its bytes, and together they leave no gap."""
    metadata = header.get("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not texts:
        refuse(path, f"__metadata__ is {show(metadata)}, not a table of strings")
    places = []
    for name, entry in header.items():
        if name != "__metadata__":
            check_entry(path, name, entry, dtypes)
            places.append((*entry["data_offsets"], name))
    end = 0
    for begin, stop, name in sorted(places):
        if begin != end:
            where = "inside" if begin < end else "beyond"
            refuse(path, f"{show_name(name)} begins at byte {begin} of the data, {where} the "
                         "tensor before it")
        end = stop
    if end != size:
        refuse(path, f"its tensors need {end} bytes of data and it has {size}, so it is cut short "
                     "or not clean")


def check_entry(path, name, entry, dtypes):
    """One tensor of the header: {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}"""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    of = show_name(name)
    if not isinstance(dtype, str) or dtype not in dtypes:
        refuse(path, f"dtype of {of} is {show(dtype)}, which the reader does not know")
    if not are_sizes(shape):
        refuse(path, f"shape of {of} is {show(shape)}, not a list of sizes")
    if not are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(path, f"data_offsets of {of} are {show(offsets)}, not [begin, end]")
    if len(shape) > 64 or math.prod(n or 1 for n in shape) >= 1 << 60:
        refuse(path, f"shape of {of} is {show(shape)}, more than memory can address")
    has, need = offsets[1] - offsets[0], math.prod(shape) * dtypes[dtype].itemsize
    if has != need:
        refuse(path, f"{of} has {has} bytes, its dtype and shape need {need}")


def are_sizes(values):
    """A list of numbers of bytes or rows? `type`, since True is an int to isinstance."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


def check_index(path, raw):
    """model.safetensors.index.json: for every weight a plain file name, which cannot leave the
    folder."""
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(path, "has no weight_map")
    for shard in weight_map.values():
        plain = r"[\w-][\w.-]*\.safetensors"
        if not isinstance(shard, str) or not re.fullmatch(plain, shard, re.ASCII):
            refuse(path, f"weight_map names {show(shard)}, not a safetensors file of the folder")


def check_shard(path, weight_map, shard, tensors):
    """A shard holds what the index says, and nothing else."""
    file, do = Path(path).with_name(shard), "download the folder again"
    for name in tensors:
        if weight_map.get(name) != shard:
            other = show(weight_map.get(name, "no shard"))
            refuse(file, f"holds {show_name(name)}, for which the index names {other}", do)
    for name, owner in weight_map.items():
        if owner == shard and name not in tensors:
            refuse(file, f"has no {show_name(name)}, which the index says it holds", do)
