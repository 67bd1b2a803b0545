"""A minute of fuzz.py with a fixed seed; see there."""
import pytest

import fuzz


def test_fuzz(capsys):
    result = fuzz.fuzz(seed=0, hundreds=100)
    with capsys.disabled():
        print("\nfuzz: " + fuzz.summary(0, *result))
    assert not result[1], "\n".join(result[1])
    counts = result[0]
    assert sum(n for (kind, _), n in counts.items() if kind == "header") >= 10_000
    assert sum(n for (kind, _), n in counts.items() if kind != "header") >= 2_000
    for kind in fuzz.CASES:                                         # a fuzzer whose files are all refused alike tests nothing
        assert min(counts[kind, "loaded"], counts[kind, "refused"]) > 0.05 * sum(counts[kind, how] for how in ("loaded", "refused")), kind


@pytest.mark.parametrize("bad", [b"", b"\0" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{}x", b'\x10\0\0\0\0\0\0\0{"a":1,"a":1}   '])
def test_the_independent_reading_refuses(bad):
    assert fuzz.reading(bad) is None


def test_the_independent_reading_reads():
    import torch
    from hostile import safetensors
    assert fuzz.reading(safetensors({"a": torch.tensor([1, 2], dtype=torch.uint8), "b": torch.zeros(0)}, metadata={})) == {
        "a": ("U8", (2,), b"\x01\x02"), "b": ("F32", (0,), b"")}
