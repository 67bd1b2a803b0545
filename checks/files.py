"""Reading what strangers wrote. A model folder comes from the internet, so every file in it may be
missing, cut, a pipe that never ends, or built to do harm. Whatever is wrong becomes a ValueError
whose text is one short printable line: the file, what is wrong, what to do."""
import json
import math
import os
import re
import reprlib
import stat
from contextlib import contextmanager, suppress
from pathlib import Path

MAX_JSON = 64 << 20     # bytes; the largest tokenizer.json has 35 MB, and parsing takes tenfold
FOREIGN = {             # how a file begins that is not what its name says
    rb"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` or download it again",
    rb"\s*<(!doctype|html|\?xml)": "a web page; download it again (a login may be needed)",
    rb"PK\x03\x04": "a zip or PyTorch archive; convert it to safetensors",
    rb"\x80[\x02-\x05](}|c|\x95|\x8a)": "a pickle; convert it to safetensors",
    rb"GGUF": "a GGUF file; make a folder of it with python -m convert",
}


def show(value, limit=60):
    """A value from a file, fit for an error message: escaped, at most `limit` characters. Of a path
    the end stays."""
    if isinstance(value, os.PathLike):
        text = repr(os.fspath(value))[1:-1]
        return text if len(text) <= limit else "..." + text[3 - limit:]
    short = reprlib.Repr()                              # never builds the repr of the whole value
    short.maxstring = short.maxother = short.maxlong = limit
    text = short.repr(value[:limit + 1] if isinstance(value, bytes) else value)
    return text if len(text) <= limit else text[:limit - 3] + "..."


def show_name(name, limit=72):
    """The name of a weight; of a long one the end, which tells k_proj from k_norm."""
    text = repr(name[-limit:])
    return text if len(name) <= limit and len(text) <= limit else "'..." + text[4 - limit:]


def refuse(path, what, do="download it again", kind=ValueError):
    raise kind(f"{show(Path(path), 160)}: {what}; {do}") from None


def cache_folder():
    """Where programs keep what can be made again: XDG_CACHE_HOME, else ~/.cache. For an unknown
    user without HOME, who has no such place, a folder that nobody can make."""
    home = os.path.expanduser("~")
    if home == "~":
        home = os.devnull
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache"))


def regular_file(path):
    """`path` as a Path, if it is a regular file or a link to one, else ValueError or
    FileNotFoundError. Looks before anything opens it: opening a pipe hangs."""
    path = Path(path)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        what = "a link to a file that does not exist" if path.is_symlink() else "no such file"
        refuse(path, what, "correct the name, or put the file there", FileNotFoundError)
    except (OSError, ValueError) as error:      # a loop of links, no permission, NUL in the name
        why = getattr(error, "strerror", None) or error
        refuse(path, f"cannot be opened ({why})", "put a readable file there")
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        refuse(path, f"is {kind}, not a regular file", "put a file there")
    if status.st_size == 0:                     # so are the files of /proc, which may never end
        refuse(path, "is empty")
    if not os.access(path, os.R_OK):
        refuse(path, "may not be read by you", "change its permissions")
    return path


def check_target(path):
    """May a file be written at `path`? Asked before the work that makes it. What is no regular file
    stays: the finished file is renamed into its place, and would take that of /dev/null."""
    path = Path(path)
    if os.path.lexists(path) and not os.path.isfile(path):
        refuse(path, "is there and no regular file", "give another name")
    if not os.path.isdir(path.parent) or not os.access(path.parent, os.W_OK):
        refuse(path, "cannot be written, for lack of a folder or permission", "give another name")


@contextmanager
def whole_file(path):
    """A file for bytes, which takes the place of `path` once it is whole: else what was there
    stays. OSError names `path`."""
    part = Path(path).with_name(f".{os.getpid()}.part")     # replicas of a run may write at once
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            part.unlink()


def foreign(head):
    """What a file really is that begins with these bytes and is not what its name says, or None."""
    for begins, what in FOREIGN.items():
        if re.match(begins, head, re.IGNORECASE):
            return what
    return None


def read_bytes(path, limit=MAX_JSON):
    """The content of a regular file of at most `limit` bytes that is neither empty nor, say, a web
    page."""
    path = regular_file(path)
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        refuse(path, f"cannot be read ({error.strerror})", "check its permissions")
    if len(data) > limit:
        refuse(path, f"is over the limit of {limit:,} bytes", "no such file of a model is so large")
    if not data.strip():
        refuse(path, "is empty")
    if foreign(data[:64]):
        raise ValueError(f"{show(path, 160)}: is {foreign(data[:64])}")
    return data


def read_json(path, limit=MAX_JSON):
    """The JSON object in a file, see `parse_json`."""
    return parse_json(read_bytes(path, limit), path)


def parse_json(data, path):
    """The JSON object in the bytes of `path`, strictly: Python's own parser lets all of this
    through, or fails obscurely."""
    try:
        text = data.decode("utf-8")
        if data.count(b",") > 4_000_000:                # a vocabulary of 256,000 needs half of that
            raise ValueError("lists more entries than any file of a model")
        value = json.loads(text, object_pairs_hook=unique, parse_float=number, parse_int=number,
                           parse_constant=number)
        if re.search(r"\\u[dD][89a-fA-F]", text):       # half a character may hide in escapes
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        if not isinstance(value, dict):
            raise ValueError(f"holds {type(value).__name__} {show(value)}, not an object {{...}}")
        return value
    except UnicodeDecodeError as error:
        refuse(path, f"is not UTF-8 (byte {error.start})")
    except UnicodeEncodeError:
        refuse(path, "holds half a character (a lone surrogate escape)")
    except RecursionError:
        refuse(path, "is nested too deeply")
    except json.JSONDecodeError as error:
        refuse(path, f"is not JSON ({error.msg}, line {error.lineno}); perhaps cut short")
    except ValueError as error:
        refuse(path, error)


def unique(pairs):
    """The table of a JSON object in which no key occurs twice."""
    table = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"key {show(key)} occurs twice")
        table[key] = value
    return table


def number(text):
    """An int or float of JSON. NaN and Infinity are not JSON, whatever Python thinks."""
    if text.lstrip("-").isdigit() and len(text) < 40:
        return int(text)
    if text.lstrip("-").isalpha():
        raise ValueError(f"{text} is not JSON")
    if text.lstrip("-").isdigit() or not math.isfinite(float(text)):
        raise ValueError(f"number {show(text)} is too large")
    return float(text)
