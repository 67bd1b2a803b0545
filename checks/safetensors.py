"""What may be wrong with a safetensors file, or with the index of several. The format: load_weights.py."""
import math
import re
import struct
from pathlib import Path

from checks.files import foreign, show

MAX_HEADER = 100_000_000        # bytes; the limit of the reference implementation
AGAIN = "download it again"


def fail(path, what, do=AGAIN):
    raise ValueError(f"{show(Path(path), 160)}: {what}; {do}")


def check_start(path, data):
    """The mapped file: does a header of the announced length fit? Before a byte is allocated for it."""
    size = len(data)
    length = struct.unpack("<Q", data[:8])[0] if size >= 8 else 0
    if not 0 < length <= min(size - 8, MAX_HEADER):
        other = foreign(data[:64])
        if other:
            raise ValueError(f"{show(Path(path), 160)}: is not safetensors but {other}")
        fail(path, f"is no safetensors file or is cut short: it has {size} bytes and announces a header "
                   f"of {length} (the format allows 1 to {MAX_HEADER:,})")
    text = data[8:8 + length]
    if text.count(b",") > 1_000_000:                            # five a tensor: before minutes of parsing
        fail(path, "its header lists more tensors than any model has")
    if text[:1] != b"{":
        fail(path, "is no safetensors file: its header does not begin with '{'")


def is_size(n):
    return type(n) is int and 0 <= n < 1 << 63                  # `type`: True is an int to isinstance


def check_header(path, header, size, dtypes):
    """header: the parsed JSON; size: bytes of data behind it; dtypes {"BF16": torch.bfloat16, ...}."""
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        fail(path, f"__metadata__ is {show(metadata)}, not a table of strings")
    places = []
    for name, entry in header.items():
        if name != "__metadata__":
            places.append((*check_entry(path, name, entry, dtypes), name))
    end = 0
    for begin, stop, name in sorted(places):
        if begin != end:
            where = "inside" if begin < end else "beyond"
            fail(path, f"{show(name)} begins at byte {begin} of the data, {where} the tensor before it")
        end = stop
    if end != size:
        fail(path, f"its tensors need {end} bytes of data and it has {size}, so it is cut short or not clean")


def check_entry(path, name, entry, dtypes):
    """One tensor of the header -> where it begins and ends."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in dtypes:
        fail(path, f"dtype of {show(name)} is {show(dtype)}, which the reader does not know")
    if not isinstance(shape, list) or not all(map(is_size, shape)):
        fail(path, f"shape of {show(name)} is {show(shape)}, not a list of sizes")
    pair = isinstance(offsets, list) and len(offsets) == 2 and all(map(is_size, offsets))
    if not pair or offsets[0] > offsets[1]:
        fail(path, f"data_offsets of {show(name)} are {show(offsets)}, not [begin, end]")
    if len(shape) > 64 or math.prod(n or 1 for n in shape) >= 1 << 60:
        fail(path, f"shape of {show(name)} is {show(shape)}, more than memory can address")
    has, need = offsets[1] - offsets[0], math.prod(shape) * dtypes[dtype].itemsize
    if has != need:
        fail(path, f"{show(name)} has {has} bytes, its dtype and shape need {need}")
    return offsets


def check_index(path, raw):
    """model.safetensors.index.json: a plain file name for every weight, which cannot leave the folder."""
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        fail(path, "has no weight_map")
    for shard in weight_map.values():
        plain = isinstance(shard, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard, re.ASCII)
        if not plain:
            fail(path, f"weight_map names {show(shard)}, not a safetensors file of the folder")


def check_shard(path, weight_map, shard, tensors):
    """What the index says of a shard, and what is in it."""
    file, again = Path(path).with_name(shard), "download the folder again"
    for name in tensors:
        if weight_map.get(name) != shard:
            where = show(weight_map.get(name, "no shard"))
            fail(file, f"holds {show(name)}, for which the index names {where}", again)
    for name, owner in weight_map.items():
        if owner == shard and name not in tensors:
            fail(file, f"has no {show(name)}, which the index says it holds", again)
