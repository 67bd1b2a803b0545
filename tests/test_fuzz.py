"""A minute of fuzz.py with a fixed seed; see there."""
import pytest
import torch

import fuzz
from hostile import safetensors


@pytest.mark.fuzz
def test_fuzz(capsys):
    result = fuzz.fuzz(seed=0, hundreds=100)
    with capsys.disabled():
        print("\nfuzz: " + fuzz.summary(0, *result))
    assert not result[1], "\n".join(result[1])
    counts = result[0]
    total = sum(counts.values())
    headers = counts["header", "loaded"] + counts["header", "refused"]
    assert total >= 15_000 and headers >= 10_000 and total - headers >= 3_000
    for kind in fuzz.CASES:             # a fuzzer whose files are all refused alike tests nothing
        loaded, refused = counts[kind, "loaded"], counts[kind, "refused"]
        assert min(loaded, refused) > 0.05 * (loaded + refused), kind


BAD = [b"", b"\0" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{}x",
       b'\x10\0\0\0\0\0\0\0{"a":1,"a":1}   ']


@pytest.mark.parametrize("bad", BAD)
def test_the_independent_reading_refuses(bad):
    assert fuzz.reading(bad) is None


def test_the_independent_reading_reads():
    tensors = {"a": torch.tensor([1, 2], dtype=torch.uint8), "b": torch.zeros(0)}
    assert fuzz.reading(safetensors(tensors, metadata={})) == {
        "a": ("U8", (2,), b"\x01\x02"), "b": ("F32", (0,), b"")}
