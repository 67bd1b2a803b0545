"""Byte-pair encoding: a piece of text becomes tokens by joining neighbours, the pair with the lowest rank first.

    lower ──► l o w e r ──► l o w er ──► l o wer          with the ranked pairs  (e, r), (w, er)

`join` is that rule. tiktoken, a compiled library, does the work; `BytePairs` decides where the two are provably the same.
"""
import functools
import heapq
import re
import time
import unicodedata
from array import array

import regex
import tiktoken

from checks import show

# How the models read here cut text into pieces: a word with the character before it, digits, a run of punctuation, white space.
# No token reaches across two pieces. Each of the three expressions matches every character of any text.
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERN_SECONDS = 2             # what another expression may take, and a little for every letter; some never end


def join(piece, rank, joins=None):
    """Byte-pair encoding: of all neighbours join the pair of lowest rank, leftmost first, until no pair has a rank.

    `rank(left, right)` is a number or None. With er before wer in rank: join(b"lower", rank) -> [b"l", b"o", b"wer"], and `joins`
    has collected (b"e", b"r"), (b"w", b"er"). A heap and links to the neighbours make n bytes cost n log n; looking at all pairs
    again after every join would make it n².
    """
    parts = [piece[i:i + 1] for i in range(len(piece))]             # None: swallowed by the part to its left
    left, right = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
    queue = []

    def offer(i):
        if i >= 0 and right[i] < len(parts):
            a, b = parts[i], parts[right[i]]
            if (r := rank(a, b)) is not None:
                heapq.heappush(queue, (r, i, a, b))

    for i in range(len(parts)):
        offer(i)
    while queue:
        _, i, a, b = heapq.heappop(queue)
        j = right[i]
        if parts[i] != a or j == len(parts) or parts[j] != b:
            continue                                                # one of the two has been joined to something else meanwhile
        parts[i], parts[j], right[i] = a + b, None, right[j]
        if right[j] < len(parts):
            left[right[j]] = i
        if joins is not None:
            joins.append((a, b))
        offer(left[i])
        offer(i)
    return [part for part in parts if part is not None]


def nfc(text):
    """Unicode's composed form. A letter with n marks costs n², in a call that nothing can interrupt; no language writes 100."""
    if regex.search(r"\p{M}{1000}", text):
        raise ValueError("text: has 1,000 combining marks in a row; shorten them")
    return unicodedata.normalize("NFC", text)


class BytePairs:
    """Text without added tokens -> ids: by tiktoken, where that is provably what the reference library does.

    They differ. The reference joins the pairs of a list, the earliest in the list first. tiktoken joins any two neighbours whose
    concatenation is a token, the lowest rank first, and takes a piece that is a token as it stands. So tiktoken gets the place
    in the list as rank (`ids` leads from there to the id, which may be any number), and each token that it returns is replayed
    once on its own bytes: if all joins are pairs of the list, it is trusted; a text with any other token goes through `join`.

    Why that is enough: a token grows only inside its own bytes, so alone it grows by the same joins as in any text. If those
    are all in the list, tiktoken's choice at each step, the lowest among more candidates, is the reference's lowest too. Several
    pairs may make one token; they must then be neighbours in the list (`agrees`), so that one rank can speak for all.

    A vocabulary has 150,000 tokens, so each is kept once. Nearly all are made by one pair: its place, and the length of its
    left half, are two numbers beside the token (`places`, `halves`); only further pairs of the same token are kept as pairs.
    """

    def __init__(self, vocab, merges, splits, nfc=False, ignore_merges=False):
        """vocab {bytes: id}; merges [(bytes, bytes)], or None: any pair, ranked by id; splits [(expression, keep the gaps)]."""
        self.nfc, self.ignore_merges = nfc, ignore_merges
        self.splits = [(regex.compile(expression), keep) for expression, keep in splits]
        self.known = len(splits) == 1 and splits[0][0] in (QWEN2, LLAMA3, GPT2)
        first = sorted(vocab, key=vocab.get) if merges is None else [token for token in vocab if len(token) == 1]
        self.ranks = {token: rank for rank, token in enumerate(first)}
        self.halves, self.places = array("i", [0] * len(first)), array("i", [-1] * len(first))     # 0, -1: no pair makes it
        self.more, self.agrees, last = {}, True, None
        for place, (a, b) in enumerate(merges or ()):
            token = a + b
            rank = self.ranks.get(token)
            if rank is None:
                self.ranks[token] = len(self.ranks)
                self.halves.append(len(a))
                self.places.append(place)
            else:
                self.agrees &= token == last
                if self.halves[rank] == len(a):                     # the same pair again: its last place counts
                    self.places[rank] = place
                else:
                    self.more[a, b] = place
            last = token
        for token in vocab if ignore_merges else ():                # tokens that no pair makes; a whole piece may be one
            if token not in self.ranks:
                self.ranks[token] = len(self.ranks)
                self.halves.append(0)
                self.places.append(-1)
        self.tokens = list(self.ranks)
        self.ids = array("i", (vocab[token] for token in self.tokens))
        self.trusted = set(range(len(self.ids))) if merges is None else set()
        self.tiktoken = tiktoken.Encoding("model", pat_str=splits[0][0] if self.known else QWEN2,
                                          mergeable_ranks=self.ranks, special_tokens={})
        self.piece_ids = functools.lru_cache(1 << 16)(self._piece_ids)

    def place(self, a, b):
        """Where the pair stands in the list of merges, or None if it is not there."""
        rank = self.ranks.get(a + b)
        if rank is not None and self.halves[rank] == len(a):
            return self.places[rank]
        return self.more.get((a, b))

    def encode(self, text):
        # A run of a million spaces overflows the stack of tiktoken's expressions; cutting it here does not.
        if self.known and (len(text) < 100_000 or max(map(len, re.findall(r"\s+", text)), default=0) < 100_000):
            ranks = self.tiktoken.encode_ordinary(text)
            if self._trust(ranks):
                return [self.ids[rank] for rank in ranks]
        return [id for piece in self.pieces(text) for id in self.piece_ids(piece.encode())]

    def _trust(self, ranks):
        for rank in set(ranks) - self.trusted if self.agrees else ():
            joins = []
            parts = join(self.tokens[rank], lambda a, b: self.ranks.get(a + b), joins)
            if len(parts) > 1 or any(self.place(*pair) is None for pair in joins):
                return False
            self.trusted.add(rank)
        return self.agrees

    def _piece_ids(self, piece):
        if self.ignore_merges and piece in self.ranks:
            return [self.ids[self.ranks[piece]]]
        ranks = self.tiktoken._encode_single_piece(piece)
        if self._trust(ranks):
            return [self.ids[rank] for rank in ranks]
        return [self.ids[self.ranks[part]] for part in join(piece, self.place)]

    def pieces(self, text):
        """The expressions one after the other, each on the pieces of the one before; the gaps between matches are pieces too."""
        pieces, deadline = [text] if text else [], time.monotonic() + PATTERN_SECONDS + len(text) / 200_000
        for expression, keep in self.splits:
            cut = []
            for piece in pieces:
                try:
                    spans = [match.span() for match in expression.finditer(piece, timeout=max(deadline - time.monotonic(), 1e-3))]
                except TimeoutError:
                    raise ValueError(f"pre_tokenizer pattern {show(expression.pattern)}: takes too long on this text; "
                                     "use another folder") from None
                end = 0
                for start, stop in [*spans, (len(piece), len(piece))]:
                    cut += [piece[end:start]] if keep and end < start else []
                    cut += [piece[start:stop]] if start < stop else []
                    end = stop
            pieces = cut
        return pieces
