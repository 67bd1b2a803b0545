"""Text <-> ids: `load_tokenizer(folder)` -> a Tokenizer. text.py first, then bpe, files, chat."""
from tokenizer.files import load_tokenizer
from tokenizer.text import Tokenizer
