"""Byte-pair encoding: a piece of text becomes tokens by joining neighbours, early pairs first.

    lower ──► l o w e r ──► l o w er ──► l o wer       with the list of pairs  (e, r), (w, er)

`join` is that rule. The list decides, not the ids: tiktoken, which joins any neighbours that make a
token, the lowest id first, gives other ids where that pair is not in the list.
"""
import functools
import heapq

import regex

# Expressions cut the text into pieces first: words, digits, punctuation, white space. No token goes
# across two pieces. Those of published models are known here; no other is ever run.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
DIGIT = r"\p{N}"
PUBLISHED = {
    (GPT2,): "GPT-2",
    (LLAMA3,): "Llama 3, R1-Distill-Llama",
    (QWEN2,): "Qwen2, Qwen2.5, Qwen3, R1-Distill-Qwen",
    (DIGIT, GPT2): "SmolLM2",
    ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", DIGIT):
        "DeepSeek-Coder",
}

# Vocabularies spell bytes as letters: printable ones as themselves, the others U+0100, U+0101, ...
OTHERS = [*range(33), *range(127, 161), 173]
LETTER_OF = {byte: 256 + place for place, byte in enumerate(OTHERS)}        # space: "Ġ"
BYTE_OF = {letter: byte for byte, letter in LETTER_OF.items()}
BYTE_OF |= dict.fromkeys(OTHERS, 0xFFFF)                                    # no byte: fails below


def from_letters(token):
    """The bytes that an entry of the vocabulary stands for; its own if it has other characters."""
    try:
        return token.translate(BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def join(letters, rank):
    """Join the neighbours of lowest rank, leftmost first, until none has a rank.

    `rank(left, right)` is a number or None. As above: join("lower", rank) -> ["l", "o", "wer"]. A
    heap and links to the neighbours make n letters cost n log n, where looking at all pairs again
    after every join would make it n².
    """
    parts = list(letters)                   # None: swallowed by the part to its left
    left = list(range(-1, len(parts) - 1))
    right = list(range(1, len(parts) + 1))
    queue = []

    def offer(i):
        if i >= 0 and right[i] < len(parts):
            a, b = parts[i], parts[right[i]]
            if (place := rank(a, b)) is not None:
                heapq.heappush(queue, (place, i, a, b))

    for i in range(len(parts)):
        offer(i)
    while queue:
        _, i, a, b = heapq.heappop(queue)
        j = right[i]
        if parts[i] != a or j == len(parts) or parts[j] != b:
            continue                        # one of the two has been joined to something else
        parts[i], parts[j], right[i] = a + b, None, right[j]
        if right[j] < len(parts):
            left[right[j]] = i
        offer(left[i])
        offer(i)
    return [part for part in parts if part is not None]


class BytePairs:
    """Text without added tokens -> ids.

    SmolLM2's vocabulary lacks some bytes, as \\x04. They get no id: the reference library drops
    them before it joins pairs, so that their neighbours may be joined, and so does this class.
    """

    def __init__(self, vocab, merges, expressions, ignore_merges=False):
        """vocab {letters: id}; merges ["left right", ...]; expressions: one of PUBLISHED;
        ignore_merges: a piece that is a token as it stands becomes that token (Llama 3)."""
        self.vocab, self.ignore_merges = vocab, ignore_merges
        self.places = {pair: place for place, pair in enumerate(merges)}
        self.cuts = [regex.compile(f"({expression})") for expression in expressions]
        self.ids_of = functools.lru_cache(1 << 16)(self.ids_of)         # most pieces come again

    def encode(self, text):
        return [id for piece in self.pieces(text) for id in self.ids_of(piece)]

    def pieces(self, text):
        """Each expression cuts the pieces of the one before, into matches and what is between."""
        pieces = [text]
        for cut in self.cuts:
            pieces = [part for piece in pieces for part in cut.split(piece) if part]
        return pieces

    def ids_of(self, piece):
        letters = piece.encode().decode("latin-1").translate(LETTER_OF)
        if self.ignore_merges and letters in self.vocab:
            return [self.vocab[letters]]
        known = [letter for letter in letters if letter in self.vocab]
        parts = join(known, lambda left, right: self.places.get(f"{left} {right}"))
        return [self.vocab[part] for part in parts]
