"""Lesson II. Files: weights from bytes, tokens from text, text from tokens.

See load_weights.py and tokenizer/.
"""
import json
import math
import struct
from pathlib import Path

import torch

import load_weights
import tokenizer.bpe
import tokenizer.text
from exercises.check import Exercise, Mistake
from exercises.lesson1_decoder import random
from exercises.program import TINY, answers_with, embedded, with_and_without


# ---- 5. the safetensors header

def read_tensors(data):
    """Read a safetensors file by hand.

    Weights come in a format that can be described in three lines, which is why it has replaced
    pickles: there is nothing in it that could be executed.

        8 bytes     N, the length of the header: an integer without sign, little-endian
        N bytes     JSON: {name: {"dtype": .., "shape": [..], "data_offsets": [begin, end]}, ..}
        the rest    the numbers of all tensors, one after the other; offsets count from here

    One name is not a tensor: "__metadata__", strings about the file, which may be left out. The
    order of names in the header says nothing about the order of the numbers: only the offsets do.
    Four dtypes occur here: F32, F16, BF16 and I64. A shape may be [], which is a single number.

    data     bytes: the whole file (no tensor of it is empty)
    returns  a dict: name -> tensor, with the dtype and the shape that the header says

    By hand: the header of the file below is 54 characters long, so the file begins with the bytes
    36 00 00 00 00 00 00 00 (36 is 54 in hexadecimal), the numbers begin at byte 8 + 54 = 62, and
    the tensor "a" takes bytes 62 to 70.

    >>> header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    >>> data = struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, -2.0)
    >>> read_tensors(data)
    {'a': tensor([ 1.5000, -2.0000])}

    Allowed: struct, json, int.from_bytes, torch.frombuffer (wrap the bytes: bytearray(...), since a
    tensor wants memory that it may write to), view, reshape.
    Not allowed: the safetensors package.

    To think about: a model of 15 GB is opened in milliseconds. What is read then, and what not?
    """
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
              "I64": torch.int64}
    length, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + length])
    header.pop("__metadata__", None)
    start = 8 + length                                          # offsets count from here
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        piece = bytearray(data[start + begin:start + end])
        tensors[name] = torch.frombuffer(piece, dtype=dtypes[entry["dtype"]]).view(entry["shape"])
    return tensors


def file_of(tensors, order, metadata=None):
    """The bytes of a safetensors file: numbers in the order of `tensors`, names in `order`."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    data, entries = b"", {}
    for name, tensor in tensors.items():
        numbers = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": [len(data), len(data) + len(numbers)]}
        data += numbers
    header = {"__metadata__": metadata} if metadata else {}
    header |= {name: entries[name] for name in order}
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def read_tensors_cases():
    pair = {"a": torch.tensor([1.5, -2.0])}
    mixed = {"matrix": random(13, 3, 3), "half": random(14, 2, 2).half(),
             "bfloat": random(15, 3, 1).bfloat16(), "ids": torch.tensor([[7, -1, 300]])}
    return {
        "the example by hand": (file_of(pair, "a"),),
        "four dtypes, the header in another order":
            (file_of(mixed, ["ids", "half", "bfloat", "matrix"]),),
        "with __metadata__": (file_of(pair, "a", metadata={"format": "pt"}),),
        "a single number": (file_of({"eps": torch.tensor(1e-3)}, ["eps"]),),
    }


def read_tensors_reward(read_tensors):
    tensors = read_tensors((TINY / "model.safetensors").read_bytes())
    total = sum(t.numel() for t in tensors.values())
    lines = [f"tiny/model.safetensors: {len(tensors)} tensors, {total:,} numbers; a layer of six:"]
    for name, t in tensors.items():
        if name.startswith("model.layers.0.") or "layers" not in name:
            lines.append(f"  {name:<47} {str(list(t.shape)):<12} {t.numel() / total:5.1%} "
                         f"{'█' * round(100 * t.numel() / total)}")
    return "\n".join(lines)


def read_tensors_trial(read_tensors):
    def read_safetensors(path):
        return read_tensors(Path(path).read_bytes())

    return answers_with((load_weights, "read_safetensors", read_safetensors))


READ_TENSORS = Exercise(
    title="The safetensors header", minutes=30, level="easy",
    solution=read_tensors, cases=read_tensors_cases,
    reward=read_tensors_reward, trial=read_tensors_trial, forbidden=("safetensors", "safe_open"),
    mistakes=[
        Mistake("offsets counted from the beginning of the file",
                "They count from the end of the header: byte 8 + N of the file.",
                {"start = 8 + length": "start = 0"}),
        Mistake("the eight bytes of the length are forgotten",
                "The numbers begin at 8 + N, not at N.",
                {"start = 8 + length": "start = length"}),
        Mistake("the length is read from the wrong end, or not used",
                "JSON was given the header and the numbers behind it. The length is "
                "little-endian: its first byte counts ones, the next 256s.",
                {"<Q": ">Q"}),
        Mistake("tensors are read in the order of the header",
                "The numbers were taken one after the other. Where a tensor lies is said by its "
                "offsets.",
                {"tensors = {}":
                 "tensors, place = {}, 0",
                 "begin, end = entry[\"data_offsets\"]":
                 "begin, end = entry['data_offsets']\n"
                 "        begin, end = place, place + end - begin; place = end"}),
        Mistake("BF16 is read as float16",
                "Both have 16 bits, but bfloat16 has 8 of them for the exponent, float16 only 5.",
                {"torch.bfloat16": "torch.float16"}),
        Mistake("__metadata__ is taken for a tensor",
                "It has strings about the file, no dtype and no offsets. Leave it out.",
                {"header.pop(\"__metadata__\", None)": ""}),
        Mistake("the shape is forgotten",
                "The numbers are right, but all tensors came back as one row.",
                {".view(entry[\"shape\"])": ""}),
        Mistake("the shape is read backwards",
                "The last size of a shape is the one that runs fastest in memory, as in torch.",
                {"view(entry[\"shape\"])": "view(entry['shape'][::-1])"}),
        Mistake("a single number became a row of one",
                "Its shape is [], which view takes as it is: view([]) has no dimension.",
                {"view(entry[\"shape\"])": "view(entry['shape'] or [1])"}),
    ],
    hints=["struct.unpack('<Q', data[:8]) or int.from_bytes(data[:8], 'little') gives N.",
           "json.loads takes bytes: data[8:8 + N]. The data begins at 8 + N.",
           "torch.frombuffer(bytearray(piece), dtype=...).view(shape), with a dict from names to "
           "dtypes."],
    answer="Only the header. The rest is memory-mapped: the operating system reads a page of the "
           "file when a number in it is used, and a tensor is a view of these pages "
           "(load_weights.py, read_safetensors).")


# ---- 6. byte-pair encoding

def merge_bytes(piece, ranks):
    """Byte-pair encoding: from bytes to tokens, one merge after the other.

    A tokenizer begins with single bytes and joins neighbours. Which ones was learned beforehand:
    the most frequent pair of the training text got rank 0, the most frequent one after it was
    joined rank 1, and so on. Encoding repeats history: of all neighbours that have a rank, join the
    pair of the *lowest* rank; look again; stop when no neighbours have one.

        while some neighbours have a rank:
            join the pair of the lowest rank (of equal ones the leftmost)

    What counts is the pair. Two neighbours that have no rank stay apart, even if another pair with
    a rank makes the same bytes. (tiktoken joins them: one of the places where two tokenizers of the
    same vocabulary differ.)

    piece    bytes, perhaps none
    ranks    a dict: (left bytes, right bytes) -> integer
    returns  a list of bytes, which joined are `piece`

    By hand: piece b"lower", ranks er: 0, wer (w + er): 1. First e and r: l o w er. Then w and er:
    l o wer. No more pairs.

    >>> merge_bytes(b"lower", {(b"e", b"r"): 0, (b"w", b"er"): 1})
    [b'l', b'o', b'wer']

    Allowed: plain Python. A loop that looks at all neighbours again after every merge is fine.
    Not allowed: tiktoken.

    To think about: your loop takes n² steps for n bytes. When does that hurt, and what would help?
    """
    parts = [piece[i:i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        pairs = zip(parts, parts[1:])
        ranked = [(ranks.get((a, b), math.inf), i) for i, (a, b) in enumerate(pairs)]
        best, i = min(ranked)
        if best == math.inf:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def merge_bytes_cases():
    many = {(b"b", b"c"): 0, (b"a", b"b"): 1, (b"ab", b"c"): 2, (b"bc", b"d"): 3, (b"x", b"y"): 4,
            (b"p", b"q"): 5, (b"q", b"r"): 6, (b"j", b"k"): 7, (b"i", b"jk"): 8, (b"i", b"j"): 9,
            (b"w", b"x"): 10, (b"v", b"w"): 11}
    return {
        "the example by hand": (b"lower", {(b"e", b"r"): 0, (b"w", b"er"): 1}),
        "no bytes": (b"", many),
        "ranks against reading order": (b"abcdxyab.pqr.ijk.vwx", many),
        "equal pairs": (b"aaaaaaa", {(b"a", b"a"): 0, (b"aa", b"aa"): 1}),
        "letters of two bytes": ("süß".encode(), {(b"s", b"\xc3"): 1, (b"\xbc", b"\xc3"): 0}),
    }


def merge_bytes_reward(merge_bytes):
    words = ["The", " shells", " market", " stickers", " altogether", " 12", " Zürich"]
    ranks, _ = embedded_pairs()
    lines = [f"the embedded model has {len(ranks)} pairs; your function cuts with them:"]
    for word in words:
        parts = merge_bytes(word.encode(), ranks)
        lines.append(f"  {word!r:<14} " + " | ".join(repr(part)[2:-1] for part in parts))
    return "\n".join(lines)


def embedded_pairs():
    """The pairs of the embedded model -> {(left bytes, right bytes): rank}; and what the letters of
    tokenizer.json stand for, {letters: bytes}."""
    model = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    words = embedded()[1]
    spelled = {letters: words.bytes_of(id) for letters, id in model["vocab"].items()}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    ranks = {(spelled[left], spelled[right]): rank for rank, (left, right) in enumerate(pairs)}
    return ranks, spelled


def merge_bytes_trial(merge_bytes):
    ranks, spelled = embedded_pairs()

    def join(letters, rank):
        """tokenizer/bpe.py's join: a letter stands for a byte."""
        parts, begin = [], 0
        for part in merge_bytes(b"".join(spelled[letter] for letter in letters), ranks):
            parts.append("".join(letters[begin:begin + len(part)]))
            begin += len(part)
        return parts

    return answers_with((tokenizer.bpe, "join", join))


MERGE_BYTES = Exercise(
    title="Byte-pair encoding: merge by rank", minutes=30, level="easy",
    solution=merge_bytes, cases=merge_bytes_cases,
    reward=merge_bytes_reward, trial=merge_bytes_trial, forbidden=("tiktoken",),
    mistakes=[
        Mistake("the first pair instead of the lowest rank",
                "The leftmost pair that has a rank was joined. All neighbours are looked at, and "
                "the lowest rank wins wherever it is.",
                {"best, i = min(ranked)": "best, i = min((r == math.inf, i) for r, i in ranked); "
                                          "best = ranked[i][0]"}),
        Mistake("the highest rank first",
                "Rank 0 was learned first and is joined first.",
                {"min(ranked)":
                 "min(ranked, key=lambda x: (-x[0] if x[0] < math.inf else math.inf, x[1]))"}),
        Mistake("of equal pairs the rightmost",
                "b'aaa' is aa + a, not a + aa: of equal ranks the leftmost is joined.",
                {"min(ranked)": "min(ranked, key=lambda x: (x[0], -x[1]))"}),
        Mistake("one merge only",
                "After a merge there are new neighbours, and they are looked at again.",
                {"parts[i:i + 2] = [parts[i] + parts[i + 1]]":
                 "parts[i:i + 2] = [parts[i] + parts[i + 1]]; break"}),
        Mistake("the rank of what two parts make together",
                "a + bc was joined because ab + c has a rank and makes the same bytes. The pair "
                "counts. (This is tiktoken's rule.)",
                {"ranks.get((a, b), math.inf)":
                 "{x + y: r for (x, y), r in ranks.items()}.get(a + b, math.inf)"}),
        Mistake("the longest known token first",
                "Read from the left, each time the longest token that fits. That is WordPiece's "
                "way; BPE repeats the merges.",
                {"while len(parts) > 1:":
                 "known, parts, rest = {x + y for x, y in ranks}, [], piece\n"
                 "    while rest:\n"
                 "        sizes = range(2, len(rest) + 1)\n"
                 "        size = max([1, *(n for n in sizes if rest[:n] in known)])\n"
                 "        parts, rest = [*parts, rest[:size]], rest[size:]\n"
                 "    while False:"}),
        Mistake("unknown pairs are joined too",
                "The loop must stop when no neighbours have a rank; here it went on to the end.",
                {"if best == math.inf:": "if False:"}),
        Mistake("letters instead of bytes",
                "The piece was cut into characters. Byte-pair encoding begins with single bytes: "
                "ü is two.",
                {"piece[i:i + 1] for i in range(len(piece))":
                 "letter.encode() for letter in piece.decode()"}),
    ],
    hints=["Begin with a list of single bytes: piece[i:i + 1] is bytes, piece[i] would be a "
           "number.",
           "zip(parts, parts[1:]) are the neighbours; ranks.get(pair) is None where there is none.",
           "min over (rank, place) takes the lowest rank and, of equal ones, the leftmost."],
    answer="A word is short, so it does not hurt; but a text without spaces (a long line of one "
           "letter, base64) is one piece of thousands of bytes. A heap of the ranked pairs and "
           "links between neighbours make it n log n: see `join` in tokenizer/bpe.py.")


# ---- 7. text from a stream of tokens

def stream_text(pieces):
    r"""Text from a stream of tokens that split characters.

    A model answers in tokens, a token is bytes, and the bytes of one character may be spread over
    several tokens: 🙂 is F0 9F 99 82, and a small vocabulary has a token for each. A program that
    prints as it goes must hold back the beginning of a character until its last byte is there, but
    nothing else.

    UTF-8 tells how long a character is by its first byte, and no other byte looks like one:

        0xxxxxxx    a character of one byte             110xxxxx    the first of two
        10xxxxxx    a byte that continues               1110xxxx    the first of three
                                                        11110xxx    the first of four

    So look back from the end, at most three bytes, for a first byte, and see whether all its bytes
    are there. Bytes that are no UTF-8 at all (a model can write anything) become U+FFFD, as
    bytes.decode("utf-8", "replace") makes them; also a character that is still unfinished when the
    answer ends.

    pieces   any iterable of bytes, one for each token; perhaps a generator that waits for a model
    yields   one string for each piece, perhaps empty: all that is certain now; and at the very end
             one more for what is left. Joined they are b"".join(pieces).decode("utf-8", "replace")

    By hand: é is C3 A9. The pieces 63 C3, A9 give "c" (C3 is held back), "é", and "" for the rest.

    >>> list(stream_text([b"c\xc3", b"\xa9"]))
    ['c', 'é', '']

    Allowed: bytes.decode, bit operations.
    Not allowed: codecs.getincrementaldecoder, io.TextIOWrapper: they are this exercise.

    To think about: why can U+FFFD at the end of the decoded text not serve as the sign that a
    character is unfinished? (Several well-known programs do so.)
    """
    waiting = b""
    for piece in pieces:
        waiting += piece
        keep = 0                                                # bytes of an unfinished character
        for back in range(1, min(3, len(waiting)) + 1):
            byte = waiting[-back]
            if byte >= 0b1100_0000:                           # the first byte of a longer character
                size = 2 + (byte >= 0b1110_0000) + (byte >= 0b1111_0000)
                keep = back if back < size else 0
            if byte < 0b1000_0000 or byte >= 0b1100_0000:
                break
        ready, waiting = waiting[:len(waiting) - keep], waiting[len(waiting) - keep:]
        yield ready.decode("utf-8", "replace")
    yield waiting.decode("utf-8", "replace")


def stream_text_observe(stream_text, pieces, valid):
    """-> what was yielded, and how many pieces had been asked for by then. Only the text where the
    bytes are no UTF-8: when such a byte is certain is a matter of taste."""
    asked = []

    def tokens():
        for piece in pieces:
            asked.append(piece)
            yield piece

    found = [(words, len(asked)) for words in stream_text(tokens())]
    return found if valid else "".join(words for words, _ in found)


def split(words, *sizes):
    data, pieces = words.encode(), []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


def stream_text_cases():
    return {
        "the example by hand": ([b"c\xc3", b"\xa9"], True),
        "characters of one, two, three and four bytes": (split("aé€🙂!", 2, 2, 1, 1, 1, 2), True),
        "one byte at a time": (split("5 € 🙂", *[1] * 9), True),
        "U+FFFD as the model's own word":
            (["a\ufffd".encode(), b"b", "\ufffd".encode(), b"c"], True),
        "bytes that are no UTF-8": ([b"a\xff", b"bcd", b"\xc3(", b"ef"], False),
        "the end in the middle of a character": ([b"ab", b"\xe2\x82"], True),
    }


def stream_text_reward(stream_text):
    _, tokenizer, _ = embedded()
    ids = tokenizer.encode("Zoë pays 5 € 🙂")
    pieces = [tokenizer.bytes_of(id) for id in ids]
    printed = list(stream_text(pieces))
    lines = ["token by token: its bytes, what decoding it alone would print, what yours prints"]
    for piece, words in zip(pieces, printed):
        lines.append(f"  {piece.hex(' '):<15} {piece.decode('utf-8', 'replace')!r:<8} {words!r}")
    return "\n".join(lines)


def stream_text_trial(stream_text):
    class ByStudent:
        """The two methods of the tokenizer's stream, on top of the student's generator."""
        def __init__(self, tokenizer, skip_special):
            self.tokenizer, self.waiting = tokenizer, []
            self.texts = stream_text(self.pieces())

        def pieces(self):
            while self.waiting:
                yield self.waiting.pop()

        def add(self, id):
            self.waiting.append(self.tokenizer.bytes_of(id))
            return next(self.texts, "")

        def end(self):
            return next(self.texts, "")

    def printed():
        """What generate.py would print of an answer with letters that take several tokens."""
        tokenizer = embedded()[1]
        stream = tokenizer.stream(skip_special=True)
        parts = [stream.add(id) for id in tokenizer.encode("Zoë pays 5 € and smiles 🙂.")]
        return {"what is printed, token by token": [*parts, stream.end()]}

    runs = "the stream of the embedded model's tokenizer, fed one sentence token by token"
    return with_and_without(printed, runs, (tokenizer.text, "Stream", ByStudent))


STREAM_TEXT = Exercise(
    title="Text from a stream of tokens", minutes=40, level="medium",
    solution=stream_text, cases=stream_text_cases, observe=stream_text_observe,
    reward=stream_text_reward, trial=stream_text_trial,
    forbidden=("getincrementaldecoder", "IncrementalDecoder", "TextIOWrapper", "iterdecode"),
    mistakes=[
        Mistake("every token is decoded alone",
                "Half a character becomes U+FFFD, and so does its other half. Hold the half back.",
                {"keep = back if back < size else 0": "pass"}),
        Mistake("halves of characters are dropped",
                "With errors='ignore', or by filtering out U+FFFD, the character is lost: é never "
                "appears.",
                {"keep = back if back < size else 0":
                 "pass",
                 "yield ready.decode(\"utf-8\", \"replace\")":
                 "yield ready.decode('utf-8', 'ignore')",
                 "yield waiting.decode(\"utf-8\", \"replace\")":
                 "yield waiting.decode('utf-8', 'ignore')"}),
        Mistake("bytes that are no UTF-8 vanish",
                "They become U+FFFD each, so that the reader sees that something was there.",
                {"yield ready.decode(\"utf-8\", \"replace\")":
                 "yield ready.decode('utf-8', 'ignore')",
                 "yield waiting.decode(\"utf-8\", \"replace\")":
                 "yield waiting.decode('utf-8', 'ignore')"}),
        Mistake("the rest is never given out",
                "When the pieces end, what is held back is not going to be finished: it is U+FFFD.",
                {"yield waiting.decode(\"utf-8\", \"replace\")": "yield ''"}),
        Mistake("only the last byte is looked at, or every longer character has two",
                "F0 9F ends in a byte that continues, and is unfinished all the same: F0 begins a "
                "character of four. Look back up to three bytes.",
                {"min(3, len(waiting))": "min(1, len(waiting))"}),
        Mistake("no character has four bytes",
                "F0 9F 99 was taken for complete: a first byte from F0 on begins one of four.",
                {"2 + (byte >= 0b1110_0000) + (byte >= 0b1111_0000)": "2 + (byte >= 0b1110_0000)"}),
        Mistake("U+FFFD is taken for an unfinished character",
                "A model may write U+FFFD itself: it is certain and is given out at once. Look at "
                "the bytes.",
                {"ready, waiting = waiting[:len(waiting) - keep], waiting[len(waiting) - keep:]":
                 "held = waiting.decode('utf-8', 'replace').endswith(chr(0xFFFD))\n"
                 "        ready, waiting = (b'', waiting) if held else (waiting, b'')"}),
        Mistake("the whole token is held back",
                "Only the unfinished character waits: of 63 C3 the letter c is certain.",
                {"keep = back if back < size else 0": "keep = len(waiting) if back < size else 0"}),
        Mistake("a finished character waits for the next token",
                "All its bytes are there: it is certain now.",
                {"back < size": "back <= size"}),
        Mistake("all text so far, again and again",
                "Each string is only what is new.",
                {"yield ready.decode(\"utf-8\", \"replace\")":
                 "sent = (sent if 'sent' in locals() else b'') + ready\n"
                 "        yield sent.decode('utf-8', 'replace')"}),
        Mistake("all pieces are read before the first text",
                "The pieces come from a model that takes its time. Give out what is certain "
                "before asking for the next one.",
                {"for piece in pieces:": "for piece in list(pieces):"}),
    ],
    hints=["Keep one variable: the bytes that have come and not been given out.",
           "After adding a piece, find the last first byte (not 10xxxxxx) among the last three "
           "bytes.",
           "If its character needs more bytes than there are from it to the end, these bytes wait: "
           "decode all before them, keep the rest. Mind waiting[:-0], which is empty."],
    answer="U+FFFD is also a character of its own, EF BF BD, and what a broken byte becomes. A "
           "program that waits while the text ends in it holds back all that follows a broken "
           "byte, or gives up after a fixed number of tokens and then prints half characters.")


EXERCISES = [READ_TENSORS, MERGE_BYTES, STREAM_TEXT]
