"""Text to token ids and back, chat messages to a prompt: every byte-level BPE folder (Qwen2/2.5, Qwen3, Llama 3.x, R1-Distill).

    text ──► added tokens cut out ──► NFC ──► pieces (a regular expression) ──► bytes ──► pairs joined by rank ──► ids

vocabulary.py reads the files of the folder, bpe.py joins the pairs (with tiktoken), chat_template.py runs the folder's template.

    encode("<|im_end|>")                       ordinary text: somebody typed these ten characters
    encode("<|im_end|>", allow_special=True)   one control token
    chat_ids(messages)                         control tokens come from the template; those typed in a message are ordinary text

"Special" are the added tokens that the folder marks so. The other added tokens (`<think>`, `<tool_call>`) are tokens wherever
they stand, as in the reference library. `encode` adds nothing in front; `bos_ids` is what the reference puts before raw text.
"""
import codecs
import json
import operator
import re

from bpe import BytePairs, nfc
from chat_template import render
from checks import show
from vocabulary import read_tokenizer_files


class Finder:
    """Which of many texts occur in another: the leftmost first, there the longest. (As one expression with a branch for each, a
    vocabulary with thousands of added tokens would take seconds.)"""

    def __init__(self, texts):
        self.texts, self.lengths = frozenset(texts), {}
        for text in sorted(self.texts, key=len, reverse=True):
            sizes = self.lengths.setdefault(text[0], [])            # of the texts with this first letter, the longest first
            if len(text) not in sizes[-1:]:
                sizes.append(len(text))
        self.first = re.compile(f"[{re.escape(''.join(self.lengths))}]" if self.lengths else "(?!)")

    def at(self, text, i):
        """The longest of the texts that stands at text[i], or ""."""
        return next((text[i:i + size] for size in self.lengths.get(text[i], ()) if text[i:i + size] in self.texts), "")

    def all(self, text):
        """-> (start, the text found there), ... without overlaps."""
        end = 0
        for spot in self.first.finditer(text):
            if spot.start() >= end and (found := self.at(text, spot.start())):
                end = spot.start() + len(found)
                yield spot.start(), found


class Stream:
    """Ids one at a time -> text as soon as it is certain. A character split over tokens waits for its last byte; all parts
    together are `decode` of all ids, since bytes that are no character become U+FFFD by the same rule."""

    def __init__(self, tokenizer, skip_special):
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, id):
        return self.decoder.decode(self.tokenizer.bytes_of(id, self.skip_special))

    def end(self):
        return self.decoder.decode(b"", final=True)


class Tokenizer:
    """What `load_tokenizer` returns. `eos_ids`: the ids that end an answer; `bos_ids`: those that belong before raw text."""

    def __init__(self, pairs, words, added, bos_ids=(), eos_ids=(), template=None, names=None):
        """words: the bytes of every id; added {text: {"id", "special", "normalized"}}; names {"eos_token": text, ...} for the template."""
        self.pairs, self.words, self.added = pairs, words, added
        self.bos_ids, self.eos_ids = list(bos_ids), frozenset(eos_ids)
        self.special_ids = {entry["id"] for entry in added.values() if entry["special"]}
        self.vocab_size = len(words)
        self.template, self.names = template, names or {}
        # Two rounds: most added tokens are looked for in the text as it is, those called normalized after NFC.
        self.rounds = []
        for normalized in (False, True):
            entries = {self._nfc(text) if normalized else text: entry
                       for text, entry in added.items() if entry["normalized"] == normalized}
            self.rounds.append((Finder(entries), entries))

    def _nfc(self, text):
        return nfc(text) if self.pairs.nfc else text

    def encode(self, text, allow_special=False):
        """Ids of a text. Nothing is added before or after it, and special tokens in it are ordinary text unless allowed."""
        return self._encode(text, allow_special, {})

    def _encode(self, text, allow_special, veiled):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text: half a character (lone surrogate) at position {error.start}; pass valid Unicode") from None

        def cut(text, round, allow_special):                        # -> (ordinary text, None), (added token, its entry), ...
            end, (finder, entries) = 0, self.rounds[round]
            for start, found in finder.all(text):
                if allow_special or not entries[found]["special"]:
                    yield text[end:start], None
                    yield found, entries[found]
                    end = start + len(found)
            yield text[end:], None

        ids = []
        for part, entry in cut(text, 0, allow_special):
            if entry:
                ids.append(entry["id"])
                continue
            for part, entry in cut(self._nfc(part.translate(veiled)), 1, allow_special and not veiled):
                ids += [entry["id"]] if entry else self.pairs.encode(part)
        return ids

    def bytes_of(self, id, skip_special=False):
        """The bytes of a token; none for an id without one (the rows of an embedding are often padded past the vocabulary)."""
        try:
            id = -1 if isinstance(id, bool) else operator.index(id)
        except TypeError:
            id = -1
        if id < 0:
            raise ValueError("token id: not a whole number of 0 or more; pass ids as encode gives them")
        return b"" if skip_special and id in self.special_ids or id >= len(self.words) else self.words[id]

    def decode(self, ids, skip_special=False):
        """The text of the ids, special tokens spelled out unless skipped. Any id will do; broken characters become U+FFFD."""
        return b"".join(self.bytes_of(id, skip_special) for id in ids).decode("utf-8", "replace")

    def stream(self, skip_special=False):
        return Stream(self, skip_special)

    def chat(self, messages, add_generation_prompt=True, **variables):
        """The text that the folder's chat template makes of [{"role": "user", "content": "..."}, ...].

        A folder without a template, of a base model, continues text: the contents as they are, one a line. To run a model take
        `chat_ids`: in this text a control token of the template and the same characters typed by a user look alike.
        """
        if not (isinstance(messages, (list, tuple)) and all(isinstance(message, dict) for message in messages)):
            raise ValueError(f'messages: {show(messages)}; pass a list like [{{"role": "user", "content": "Hi"}}]')
        try:
            json.dumps([messages, variables], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise ValueError("messages: half a character (lone surrogate) in a text; pass valid Unicode") from None
        if self.template is None:
            return "\n".join(str(message.get("content") or "") for message in messages)
        return render(self.template, {**self.names, "messages": messages, "tools": None, "documents": None,
                                      "add_generation_prompt": add_generation_prompt, **variables})

    def chat_ids(self, messages, add_generation_prompt=True, **variables):
        """The ids of the prompt. Its control tokens come from the template alone.

        Where a message spells a control token, that token's first character is veiled, replaced by one that occurs nowhere,
        until the template has run and the control tokens are cut out. A beginning of one at the end of a string is veiled too:
        the template might put the rest behind it. All other text passes as it is, so without such text the ids are those of
        encode(chat(messages), allow_special=True). Control tokens are the special ones, and those written <|...|> without being
        marked: R1-Distill's roles.
        """
        if self.template is None:
            return self.bos_ids + self.encode(self.chat(messages))
        control = [text for text, entry in self.added.items()
                   if entry["special"] or text[:2] in ("<|", "<｜") and text[-2:] in ("|>", "｜>")]
        written = Finder(control)
        used = set(json.dumps([messages, variables], ensure_ascii=False, default=str) + self.template)
        unused = (chr(code) for code in range(0xE000, 0x110000) if chr(code) not in used)       # U+E000: for private use
        veil = {first: next(unused) for first in sorted({text[0] for text in control})}
        longest = max(map(len, control), default=0)

        def hide(value):
            if isinstance(value, dict):
                return {key: hide(item) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [hide(item) for item in value]
            if not isinstance(value, str):
                return value
            if next(written.all(self._nfc(value)), None):
                value = self._nfc(value)
            end = len(value.rstrip())

            def opens(i):
                return written.at(value, i) or i > end - longest and any(text.startswith(value[i:end]) for text in control)
            return "".join(veil[letter] if letter in veil and opens(i) else letter for i, letter in enumerate(value))

        text = self.chat(hide(messages), add_generation_prompt, **variables)
        return self._encode(text, True, {ord(mark): first for first, mark in veil.items() if mark in text})


def load_tokenizer(folder):
    """The Tokenizer of a model folder: from tokenizer.json, else vocab.json + merges.txt, else Meta's tokenizer.model.

    Raises ValueError (FileNotFoundError for a file that is not there), one line that names the file and what is wrong.
    """
    files = read_tokenizer_files(folder)
    pairs = BytePairs(*(files.pop(name) for name in ("vocab", "merges", "splits", "nfc", "ignore_merges")))
    for token, id in zip(pairs.tokens, pairs.ids):                  # equal bytes, one object: it saves 6 MB
        if files["words"][id] == token:
            files["words"][id] = token
    return Tokenizer(pairs, **files)
