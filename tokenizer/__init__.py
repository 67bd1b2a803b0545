"""Text <-> ids: `load_tokenizer(folder)` -> a Tokenizer. Read text.py first, then bpe.py, files.py and chat.py."""
from tokenizer.files import load_tokenizer
from tokenizer.text import Tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
