"""Reading what strangers wrote. A model folder comes from the internet, so every file in it may be missing, cut, a pipe
that never ends, or built to do harm. Three small functions that the loaders share; whatever is wrong becomes one
ValueError whose text is one short printable line: the file, what is wrong, what to do."""
import json
import math
import os
import re
import reprlib
import stat
from pathlib import Path

MAX_JSON = 64 << 20         # bytes; the largest tokenizer.json in use is near 35 MB, and parsing costs some ten times the size


def show(value, limit=60):
    """A value from a file, fit for an error message: escaped and at most `limit` characters. Of a path the end stays."""
    if isinstance(value, os.PathLike):
        text = repr(os.fspath(value))[1:-1]
        return text if len(text) <= limit else "..." + text[3 - limit:]
    short = reprlib.Repr()                                          # never builds the repr of the whole value
    short.maxstring = short.maxother = short.maxlong = limit
    text = short.repr(value[:limit + 1] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= limit else text[:limit - 3] + "..."


def regular_file(path):
    """`path` as a Path if it is a regular file or a link to one. Looks before anything opens it: opening a FIFO hangs."""
    path = Path(path)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        what = "a link to a file that does not exist" if path.is_symlink() else "no such file"
        raise FileNotFoundError(f"{show(path, 160)}: {what}; give a complete model folder") from None
    except (OSError, ValueError) as error:                          # link loop, permission, name too long, NUL in the name
        why = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{show(path, 160)}: cannot be opened ({why}); give a readable model folder") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise ValueError(f"{show(path, 160)}: is {kind}, not a regular file; download the file again")
    if status.st_size == 0:                                         # so are the files of /proc, which may never end
        raise ValueError(f"{show(path, 160)}: is empty; download it again")
    return path


def cache_folder():
    """Where programs keep what can be made again: XDG_CACHE_HOME, else ~/.cache."""
    home = os.path.expanduser("~")                                  # stays "~" for an unknown user
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache"))


def foreign(head):
    """What a file really is that begins with these bytes and is not what its name says, or None."""
    for what, begins in (("a Git LFS pointer; run `git lfs pull` or download it again", rb"version https://git-lfs"),
                         ("a web page; download it again (a login may be needed)", rb"\s*<(!doctype|html|\?xml)"),
                         ("a zip or PyTorch archive; convert it to safetensors", rb"PK\x03\x04"),
                         ("a pickle; convert it to safetensors", rb"\x80[\x02-\x05](}|c|\x95|\x8a)"),
                         ("a GGUF file; use the original safetensors folder", rb"GGUF")):
        if re.match(begins, head, re.IGNORECASE):
            return what
    return None


def token_ids(path, settings, name, vocab_size):
    """The id or list of ids that config.json or generation_config.json gives as `name` -> a list, empty without it."""
    ids = settings.get(name)
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    for id in ids:
        if type(id) is not int or not 0 <= id < vocab_size:
            raise ValueError(f"{show(path, 160)}: {name} holds {show(id)}, not an id of the vocabulary; correct it")
    return ids


def read_bytes(path, limit=MAX_JSON):
    """The content of a regular file of at most `limit` bytes that is neither empty nor a Git LFS pointer or a web page."""
    path = regular_file(path)
    try:
        size = os.stat(path).st_size
        if size > limit:
            raise ValueError(f"{show(path, 160)}: has {size} bytes, over the limit of {limit}; this is no such file of a model")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{show(path, 160)}: cannot be read ({error.strerror}); check its permissions") from None
    if not data.strip():
        raise ValueError(f"{show(path, 160)}: is empty; download it again")
    if foreign(data[:64]):
        raise ValueError(f"{show(path, 160)}: is {foreign(data[:64])}")
    return data


def read_json(path, limit=MAX_JSON):
    """The JSON object in a file of the model folder, see `parse_json`."""
    return parse_json(read_bytes(path, limit), path)


def parse_json(data, path):
    """The JSON object in some bytes of `path`, strictly: Python's own parser lets all of the following through or fails
    obscurely. Raises ValueError."""
    def fail(what):
        raise ValueError(what)

    def unique(pairs):
        table = dict(pairs)
        if len(table) < len(pairs):
            seen = set()
            fail(f"key {show(next(k for k, _ in pairs if k in seen or seen.add(k)))} occurs twice")
        return table

    def number(text):
        value = float(text)
        return value if math.isfinite(value) else fail(f"number {show(text)} is too large")

    try:
        text = data.decode("utf-8")
        if data.count(b",") > 4_000_000:                            # a vocabulary of 256,000 needs half of that
            fail("lists more entries than any file of a model")
        value = json.loads(text, object_pairs_hook=unique, parse_float=number,
                           parse_int=lambda s: int(s) if len(s) < 20 else fail(f"number {show(s)} is too large"),
                           parse_constant=lambda s: fail(f"{s} is not JSON"))
        if re.search(r"\\u[dD][89a-fA-F]", text):                   # escapes may hide half a character (a lone surrogate)
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 (byte {error.start})"
    except UnicodeEncodeError:
        what = "holds half a character (a lone surrogate escape)"
    except RecursionError:
        what = "is nested too deeply"
    except json.JSONDecodeError as error:
        what = f"is not JSON ({error.msg}, line {error.lineno}); perhaps cut short"
    except ValueError as error:
        what = str(error)
    else:
        if isinstance(value, dict):
            return value
        what = f"holds {type(value).__name__} {show(value)}, not an object {{...}}"
    raise ValueError(f"{show(Path(path), 160)}: {what}; download it again")
