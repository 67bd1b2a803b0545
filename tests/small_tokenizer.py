"""A small valid tokenizer.json to change, and what every error line must be; for the tests of tokenizer/ and its checks."""
import contextlib
import json
import time

import make_golden_tokenizer as golden

LEVEL = golden.level(use_regex=False)
V, M, A, P, S = ("model", "vocab"), ("model", "merges"), ("added_tokens",), ("pre_tokenizer",), ("pre_tokenizer", "pretokenizers", 0)


def letters(data):
    return "".join(golden.LETTER[byte] for byte in data)


def token(id, content, **flags):
    return {"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True, **flags}


def spec(merges=("h i", "Ġ hi"), extra=(), added=(), **model):
    """A small valid tokenizer.json: bytes are ids 0..255, the merges' results follow, then `extra`."""
    vocab = {letters([byte]): byte for byte in range(256)}
    for text in [*(merge.replace(" ", "") for merge in merges), *extra]:
        vocab.setdefault(text, len(vocab))
    data = golden.bare(golden.sequence(golden.split(golden.QWEN), LEVEL))
    data["added_tokens"], data["normalizer"] = list(added), {"type": "NFC"}
    data["model"] |= {"vocab": vocab, "merges": list(merges), "ignore_merges": False, **model}
    return data


def changed(data, path, value):
    """`data` with the value at a path of keys replaced; a function is applied to what is there."""
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value(data[path[-1]]) if callable(value) else value


def write(folder, data=None, **files):
    """A model folder; file names with __ for the dot. Texts and bytes as they are, everything else as JSON."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in ({"tokenizer__json": data} | files if data is not None else files).items():
        content = content if isinstance(content, (str, bytes)) else json.dumps(content)
        (folder / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def line_of(error):
    """The error's text, after the checks that hold for every error a user may see."""
    text = str(error.value)
    assert text.isprintable() and len(text) <= 400, text
    return text


@contextlib.contextmanager
def ends(seconds=60):
    """Around what takes many times as long where a time grows with the square of the text: so long a processor time means that it
    does. What is right takes a hundredth of it, on a slow machine a twentieth: no measure of speed."""
    began = time.process_time()
    yield
    assert time.process_time() - began < seconds, "a time that grows with the square of the text"
