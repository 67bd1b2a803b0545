"""DIR/results.jsonl, a line a sample and setting, and what the lines depend on: DIR/arguments.json.
Replicas (torchrun) write results-1.jsonl, ... beside it; all of them together are the results.

A run that was killed goes on from its lines, so they must be its own: same options, same model,
same problems, and the same source of the rooms that make the numbers. Whatever is damaged or
foreign is named in one line, by file and line, and nothing is computed.
"""
import hashlib
import json
import math
import os
import re
import sys
from pathlib import Path

from checks.files import whole_file

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ("slot.py", "generate.py", "model.py", "load_weights.py", "tokenizer/*.py",
          "speed/batch.py", "speed/linear.py", "study/measure.py", "study/run.py", "study/tasks.*",
          "study/scoring.py")


def source_digests(fast, slot_file, parallel=False):
    """{file: digest} of the code that makes the numbers."""
    patterns = [*SOURCE] + ["speed/delta.py"] * fast
    patterns += ["speed/parallel*.py", "speed/ranks.py"] * parallel
    paths = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    found = {path.relative_to(ROOT).as_posix(): digest(path) for path in paths}
    return found | (slot_file_digests(slot_file) if slot_file else {})


def slot_file_digests(slot_file):
    """{file: digest} of a reader's slot.py, and of what it has imported from beside it."""
    folders = Path(slot_file).resolve().parent, Path.cwd()
    files = {Path(getattr(m, "__file__", None) or "/").resolve()
             for m in list(sys.modules.values())}
    beside = {file.name: digest(file) for file in sorted(files - {Path(slot_file).resolve()})
              if file.parent in folders and file.is_file()}
    return beside | {"--slot-file": digest(slot_file)}


def model_digests(folder):
    """{file: digest} of all that a model folder says: weights, config, end ids, template, ..."""
    paths = [path for path in sorted(Path(folder).iterdir())
             if path.suffix in (".json", ".jinja", ".safetensors") and path.is_file()]
    return {path.name: digest(path) for path in paths}


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def result_files(folder):
    """Of all replicas, also those of a run with more of them."""
    names = re.compile(r"results(-\d+)?\.jsonl")
    return sorted(file for file in folder.glob("*") if names.fullmatch(file.name))


class Results:
    """`rows`: {(sample, setting): result}. One process a file; without a folder, in memory only.

    kinds: of every sample, in order. settings: their names. decoded: whether answers are written,
    or only losses. replica: who writes. ValueError where the folder holds anything else.
    """

    def __init__(self, folder, arguments, kinds, settings, decoded=True, replica=0):
        self.rows, self.file = {}, None
        self.kinds, self.settings, self.decoded = kinds, settings, decoded
        if folder is None:
            return
        self.path = folder / (f"results-{replica}.jsonl" if replica else "results.jsonl")
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path}: is not a regular file; give another --out")
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self.lock()
            self.check_arguments(folder / "arguments.json", json.loads(json.dumps(arguments)))
            self.read()
        except BaseException:
            self.close()
            raise

    def lock(self):
        try:
            import fcntl
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)   # goes with the process
        except ImportError:                                         # Windows
            pass
        except OSError:
            raise ValueError(f"{self.path.parent}: another run is writing there; wait for it, or "
                             "give another --out") from None

    def check_arguments(self, path, arguments):
        if not any(file.stat().st_size for file in result_files(path.parent)):
            with whole_file(path) as file:
                file.write((json.dumps(arguments, indent=1) + "\n").encode())
        try:
            old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except (OSError, ValueError, RecursionError):
            old = None
        if not isinstance(old, dict):
            raise ValueError(f"{path} is missing or damaged, so its results cannot be taken up; "
                             "give another --out")
        for name in [*arguments, *old]:
            if old.get(name) != arguments.get(name):
                raise ValueError(difference(path.parent, name, old.get(name), arguments.get(name)))

    def read(self):
        places = {}
        for file in result_files(self.path.parent):
            data = file.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data) and file == self.path:             # stopped within a line
                print(f"resume    {file}: repaired a torn last line of {len(data) - whole} "
                      "bytes", file=sys.stderr)
                os.ftruncate(self.file, whole)
            for count, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
                self.read_line(file, count, line, places)

    def read_line(self, file, count, line, places):
        """places: where the rows stand that were read before."""
        try:
            row = json.loads(line)
            wrong = what_is_wrong(row, self.kinds, self.settings, self.decoded)
        except (ValueError, RecursionError):
            wrong = "not JSON"
        if wrong:
            raise ValueError(f"{file}: line {count} is damaged ({wrong}); delete it, and its "
                             "answer is made again")
        key = row["sample"], row["setting"]
        if key in places and self.rows[key] | dict(seconds=None) != row | dict(seconds=None):
            where, line = places[key]
            other = f"{line}" if where == file else f"{line} of {where.name}"
            raise ValueError(f"{file}: lines {other} and {count} are of one sample and setting and "
                             "contradict each other; delete both")
        places[key], self.rows[key] = (file, count), row

    def add(self, row):
        self.rows[row["sample"], row["setting"]] = row
        if self.file is None:
            return
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        size = os.fstat(self.file).st_size
        try:
            written = os.write(self.file, line)                     # one call: whole, or torn
        except OSError as error:
            raise OSError(f"{self.path}: cannot be written ({error.strerror})") from None
        if written != len(line):
            os.ftruncate(self.file, size)
            raise OSError(f"{self.path}: the disk is full; make room, and the same command goes on")

    def close(self):
        if self.file is not None:
            os.close(self.file)


def difference(folder, name, old, new):
    """One line: why the results in a folder are not those of this run."""
    what, elsewhere = f"a run with another {name}", f"give another --out, such as --out {folder}-2"
    if isinstance(old, dict) and isinstance(new, dict):
        old = ", ".join(key for key in {**old, **new} if old.get(key) != new.get(key))
        if name == "source":
            what = "results of other code"
        return f"{folder} holds {what} ({old} differs); for this one {elsewhere}"
    return (f"{folder} holds {what} ({str(old)[:60]}, not {str(new)[:60]}); {elsewhere}, or delete "
            "it")


MEASURED = dict(prompt=[str], gold=[str], answer_loss=[float], prompt_loss=[float], seconds=[dict])
DECODED = dict(answer=[str], tokens=[int], strict=[bool], format=[bool],
               flexible=[bool, type(None)], paper=[bool, type(None)])


def what_is_wrong(row, kinds, settings, decoded):
    """A few words, or None for a line that a run with these samples and settings writes."""
    if not isinstance(row, dict):
        return "not an object"
    sample, setting = row.get("sample"), row.get("setting")
    if type(sample) is not int or not 0 <= sample < len(kinds):
        return "its sample is none of this run"
    if setting not in settings:
        return "its setting is none of this run"
    if row.get("kind") != kinds[sample]:
        return "its kind is another"
    fields = MEASURED | (DECODED if decoded else {})
    if setting == "plain":
        fields["alignment"] = [float]
    for name in sorted({*row, *fields} - {"sample", "setting", "kind"}):
        if not fits(row.get(name, ...), fields.get(name, [])):
            return f"its {name[:40]!r} is missing, unknown or wrong"
    if not all(fits(row["seconds"].get(part), [float]) for part in ("prefill", "fit", "decode")):
        return "its seconds are missing or wrong"
    return None


def fits(value, types):
    if type(value) is float and not math.isfinite(value) or type(value) is int and value < 0:
        return False
    return type(value) in types
