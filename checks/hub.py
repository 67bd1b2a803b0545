"""Which folder a name means that is no folder: one that `python -m convert` keeps, or a hub id,
looked up where Hugging Face's tools keep what they fetched."""
import os
import re
from pathlib import Path

from checks.files import cache_folder, read_bytes, show

WANTED = ["*.safetensors", "*.json", "*.jinja"]


def kept(name):
    """Where `python -m convert NAME` puts a model: in ~/.cache/slot-models."""
    return cache_folder() / "slot-models" / str(name)


def find_kept(name):
    """-> the folder of a converted model, else of a hub id. Errors as in find_in_hub."""
    return kept(name) if os.path.isdir(kept(name)) else find_in_hub(name)


def whole(snapshot):
    """Not just a tokenizer's files? Pickles count as weights: who reads them says what is wrong."""
    kinds = "model*.safetensors*", "pytorch_model*"
    return os.path.exists(snapshot / "config.json") and any(
        any(snapshot.glob(kind)) for kind in kinds)


def find_in_hub(name):
    """A hub id such as Qwen/Qwen2.5-0.5B-Instruct -> its folder in the cache: HF_HUB_CACHE,
    HF_HOME/hub or ~/.cache/huggingface/hub, where models--OWNER--NAME/refs/main names the snapshot.
    What is not there is fetched by huggingface_hub, if that is installed. FileNotFoundError or
    ValueError with what to do."""
    if os.path.lexists(name):
        raise ValueError(f"--model {show(Path(name), 160)}: is not a folder; "
                         "give the folder that holds config.json")
    name = str(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII):
        there = sorted(path.name for path in kept("").glob("[!.]*"))    # .convert-... are scratch
        names = f" (there: {show(', '.join(there))[1:-1]})" if there else ""
        raise FileNotFoundError(f"--model {show(Path(name), 160)}: no such folder, no name kept by "
                                f"python -m convert{names}, and no hub id like Qwen/Qwen2.5-0.5B")
    home = os.environ.get("HF_HOME") or cache_folder() / "huggingface"
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    cache = Path(os.path.expanduser(hub or Path(home, "hub")))
    repo = cache / f"models--{name.replace('/', '--')}"
    try:
        commit = read_bytes(repo / "refs" / "main", limit=100).decode().strip()
    except (OSError, ValueError):                       # missing, empty, a pipe, anything else
        commit = "none"
    snapshot = repo / "snapshots" / commit
    if re.fullmatch("[0-9a-f]{6,64}", commit) and whole(snapshot):
        return snapshot
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, allow_patterns=WANTED, cache_dir=cache))
    except ImportError:
        patterns = " ".join(f"--include '{pattern}'" for pattern in WANTED)
        why = (f"not in {show(cache, 80)}; fetch it with: pip install huggingface_hub && "
               f"hf download {show(name, 100)[1:-1]} {patterns}")
    except Exception as error:                          # its many kinds of error share no class
        why = f"could not be fetched ({show(' '.join(str(error).split()), 160)})"
    raise FileNotFoundError(f"--model {show(name)}: {why}")
