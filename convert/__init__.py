"""A GGUF file, llama.cpp's format, becomes a model folder: folder.py knows both formats."""
from checks.files import cache_folder


def kept(name):
    """Where `python -m convert NAME` puts a model and load_weights.find_model looks for it."""
    return cache_folder() / "slot-models" / name
