"""Byte-pair encoding: a piece of text becomes tokens by joining neighbours, the first pair of the list first.

    lower ──► l o w e r ──► l o w er ──► l o wer          with the list of pairs  (e, r), (w, er)

`join` is that rule. tiktoken, a compiled library, does the work; `BytePairs` decides where the two are
provably the same.
"""
import functools
import heapq
import re
from array import array

import regex
import tiktoken

# How published models cut text into pieces before any pair is joined: a word with the character before it, digits, a
# run of punctuation, white space. No token reaches across two pieces. Each of these matches every character of any text.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
DIGIT = r"\p{N}"

# What tokenizer.json lists, step after step, and one expression that cuts alike. Nothing else is run. For SmolLM2 the
# digits are cut out first; so they end a run of white space as the end of the text does, and need no branch of their own.
PUBLISHED = {
    (GPT2,): GPT2,
    (LLAMA3,): LLAMA3,                                      # Llama 3.x, R1-Distill-Llama
    (QWEN2,): QWEN2,                                        # Qwen2, Qwen2.5, Qwen3, R1-Distill-Qwen
    (DIGIT, GPT2): GPT2.replace(r" ?\p{N}+", DIGIT).replace(r"\s+(?!\S)", r"\s+(?![^\s\p{N}])"),
}

# Vocabularies spell bytes as letters: printable ones as themselves, the other 68 as U+0100, U+0101, ... (space: "Ġ").
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
LETTER_OF = {byte: 256 + place for place, byte in enumerate(OTHERS)}
BYTE_OF = {letter: byte for byte, letter in LETTER_OF.items()} | dict.fromkeys(OTHERS, 0xFFFF)     # 0xFFFF: no letter


def bytes_of_letters(token):
    """The bytes that an entry of the vocabulary stands for, b"" if one of its characters is no letter for a byte."""
    try:
        return token.translate(BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:
        return b""


def letters_of_bytes(data):
    return data.decode("latin-1").translate(LETTER_OF)


def join(piece, rank, joins=None):
    """Of all neighbours join the pair of lowest rank, leftmost first, until no pair has a rank.

    `rank(left, right)` is a number or None. With the two pairs above join("lower", rank) -> ["l", "o", "wer"], and `joins`
    has collected ("e", "r"), ("w", "er"). A heap and links to the neighbours make n letters cost n log n; looking at all
    pairs again after every join would make it n².
    """
    parts = list(piece)                                     # None: swallowed by the part to its left
    left = list(range(-1, len(parts) - 1))
    right = list(range(1, len(parts) + 1))
    queue = []

    def offer(i):
        if i >= 0 and right[i] < len(parts):
            a, b = parts[i], parts[right[i]]
            place = rank(a, b)
            if place is not None:
                heapq.heappush(queue, (place, i, a, b))

    for i in range(len(parts)):
        offer(i)
    while queue:
        _, i, a, b = heapq.heappop(queue)
        j = right[i]
        if parts[i] != a or j == len(parts) or parts[j] != b:
            continue                                        # one of the two has been joined to something else meanwhile
        parts[i], parts[j], right[i] = a + b, None, right[j]
        if right[j] < len(parts):
            left[right[j]] = i
        if joins is not None:
            joins.append((a, b))
        offer(left[i])
        offer(i)
    return [part for part in parts if part is not None]


class BytePairs:
    """Text without added tokens -> ids: by tiktoken, where that is provably what the reference library does.

    They differ. The reference joins the pairs of a list, the earliest in the list first. tiktoken joins any two neighbours
    whose concatenation is a token, the lowest rank first, and takes a piece that is a token as it stands. So tiktoken gets
    as rank the order in which the list makes the tokens, and each token that it returns is replayed once on its own letters:
    if all joins are pairs of the list, it is trusted; a text with any other token goes through `join`.

    Why that is enough: a token grows only inside its own letters, so alone it grows by the same joins as in any text. If
    those are all in the list, tiktoken's choice at each step, the lowest among more candidates, is the reference's lowest
    too. Several pairs may make one token; they must be neighbours in the list (`agrees`), so that one rank speaks for all.

    Some vocabularies lack bytes: SmolLM2 has no token for eight control characters. Such a byte of a text has no id. The
    reference library drops it before pairs are joined, so that its neighbours may join, and so does this class.
    """

    def __init__(self, vocab, merges, words, expression, ignore_merges=False):
        """vocab {letters: id}; merges ["left right", ...] in letters; words: the bytes of each id; expression: cuts pieces.

        ignore_merges: a piece that is a token as it stands becomes that token, whatever the pairs (Llama 3).
        """
        self.vocab, self.ignore_merges = vocab, ignore_merges
        self.expression = regex.compile(expression)
        self.places = {pair: place for place, pair in enumerate(merges)}

        # The order of tokens: single bytes, then what the pairs make, then (a whole piece may be one) all the others.
        self.ranks = {}
        for token in vocab:
            if len(token) == 1 and words[vocab[token]]:
                self.ranks[token] = len(self.ranks)
        self.missing = bytes(byte for byte in range(256) if letters_of_bytes(bytes([byte])) not in self.ranks)
        self.agrees, last = True, None
        for pair in merges:
            token = pair.replace(" ", "")
            if token not in self.ranks:
                self.ranks[token] = len(self.ranks)
            elif token != last:
                self.agrees = False
            last = token
        if ignore_merges:
            for token in vocab:
                if token not in self.ranks and bytes_of_letters(token):
                    self.ranks[token] = len(self.ranks)

        self.tokens = list(self.ranks)
        self.ids = array("i", [vocab[token] for token in self.tokens])
        self.trusted = set()
        ranks = {words[id]: rank for rank, id in enumerate(self.ids)}
        self.tiktoken = tiktoken.Encoding("model", pat_str=expression, mergeable_ranks=ranks, special_tokens={})
        self.piece_ids = functools.lru_cache(1 << 16)(self._piece_ids)

    def encode(self, text):
        if not self.fails(text):
            ranks = self.tiktoken.encode_ordinary(text)
            if self.trusts(ranks):
                return [self.ids[rank] for rank in ranks]
        return [id for piece in self.expression.findall(text) for id in self.piece_ids(piece)]

    def fails(self, text):
        """Whether tiktoken would fail: at a byte without a token, and in its stack at a run of a million spaces."""
        data = text.encode()
        if self.missing and len(data.translate(None, self.missing)) < len(data):
            return True
        return len(text) >= 100_000 and max(map(len, re.findall(r"\s+", text)), default=0) >= 100_000

    def trusts(self, ranks):
        """Whether all these tokens of tiktoken are made by pairs of the list alone."""
        if not self.agrees:
            return False
        for rank in set(ranks) - self.trusted:
            joins = []
            parts = join(self.tokens[rank], lambda a, b: self.ranks.get(a + b), joins)
            if len(parts) > 1 or any(f"{a} {b}" not in self.places for a, b in joins):
                return False
            self.trusted.add(rank)
        return True

    def _piece_ids(self, piece):
        data = piece.encode()
        if self.ignore_merges and letters_of_bytes(data) in self.vocab:
            return [self.vocab[letters_of_bytes(data)]]
        data = data.translate(None, self.missing)
        ranks = self.tiktoken._encode_single_piece(data) if data else []
        if self.trusts(ranks):
            return [self.ids[rank] for rank in ranks]
        parts = join(letters_of_bytes(data), lambda a, b: self.places.get(f"{a} {b}"))
        return [self.vocab[part] for part in parts]
