"""Text to token ids and back, chat messages to the ids of a prompt: the byte-level BPE of Llama 3, Qwen2 and Qwen3, SmolLM2.

    text ──► added tokens cut out ──► NFC ──► pieces (an expression) ──► bytes ──► pairs joined ──► ids

files.py reads the folder, bpe.py cuts the pieces and joins the pairs (with tiktoken), chat.py runs the chat template.

    encode("<|im_end|>")                       ordinary text: somebody typed these ten characters
    encode("<|im_end|>", allow_special=True)   one control token
    chat_ids(messages)                         added tokens come from the template; those typed in a message are text

`encode` is as the reference library's: "special" are the added tokens that the folder marks so, and the others (`<think>`)
are tokens wherever they stand. It adds nothing in front; `bos_ids` is what the reference puts before raw text.
"""
import bisect
import codecs
import itertools
import json
import operator
import re
import unicodedata

import regex

from checks.files import show
from tokenizer.chat import render

MARKS = 500
PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


def compose(text):
    """Unicode's composed form, NFC. Sorting n marks on one letter costs n²; no language writes a hundred."""
    if text.isascii():
        return text
    if max(map(len, regex.findall(r"\p{M}+", text)), default=0) > MARKS:
        raise ValueError(f"text: has more than {MARKS} combining marks in a row; shorten them")
    return unicodedata.normalize("NFC", text)


class AddedTokens:
    """Texts that are tokens as a whole, found in another text: the leftmost first, there the longest."""

    def __init__(self, ids):
        """ids {text: id}"""
        self.ids, self.texts = ids, sorted(ids)
        self.longest = max(map(len, ids), default=0)
        self.first = re.compile(f"[{re.escape(''.join({text[0] for text in ids}))}]" if ids else "(?!)")

        # The longest of the other texts that each one begins with. In the sorted list it stands before, with only such
        # texts between as begin with it too.
        self.shorter, open_ones = {"": ""}, [""]
        for text in self.texts:
            while not text.startswith(open_ones[-1]):
                open_ones.pop()
            self.shorter[text] = open_ones[-1]
            open_ones.append(text)

    def at(self, text, start):
        """The longest of the texts that stands at text[start], or ""."""
        place = bisect.bisect(self.texts, text[start:start + self.longest])
        found = self.texts[place - 1]
        while not text.startswith(found, start):
            found = self.shorter[found]
        return found

    def cut(self, text, refused=frozenset()):
        """-> (ordinary text, None) and (token's text, its id) in turn. Tokens with a refused id are ordinary text."""
        end = looked = 0
        for spot in self.first.finditer(text):
            start = spot.start()
            found = self.at(text, start) if start >= looked else ""
            if not found:
                continue
            looked = start + len(found)
            if self.ids[found] not in refused:
                yield text[end:start], None
                yield found, self.ids[found]
                end = looked
        yield text[end:], None


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

    def __init__(self, pairs, words, added, nfc=False, bos_ids=(), eos_ids=(), template=None, names=None):
        """words: the bytes of every id; added {text: {"id", "special", "normalized"}}; nfc: compose text first;
        names {"eos_token": text, ...} for the template."""
        self.pairs, self.words, self.added, self.nfc = pairs, words, added, nfc
        self.bos_ids, self.eos_ids = list(bos_ids), frozenset(eos_ids)
        self.special_ids = {entry["id"] for entry in added.values() if entry["special"]}
        self.vocab_size = len(words)
        self.template, self.names = template, names or {}

        # Two rounds: most added tokens are looked for in the text as it is, those called normalized after NFC.
        raw, composed = {}, {}
        for text, entry in added.items():
            if entry["normalized"]:
                composed[self.compose(text)] = entry["id"]
            else:
                raw[text] = entry["id"]
        self.raw, self.composed = AddedTokens(raw), AddedTokens(composed)

    def compose(self, text):
        return compose(text) if self.nfc else text

    def encode(self, text, allow_special=False):
        """Ids of a text. Nothing is added before or after it, and special tokens in it are ordinary text unless allowed."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text: half a character (lone surrogate) at position {error.start}; pass valid Unicode") from None
        return self._encode(text, frozenset() if allow_special else self.special_ids)

    def _encode(self, text, refused=frozenset(), unveil={}):
        """unveil {code of a mark: the letter behind it}: see `chat_ids`."""
        ids = []
        for part, id in self.raw.cut(text, refused):
            if id is not None:
                ids.append(id)
                continue
            for part, id in self.composed.cut(self.compose(part), refused):
                if id is not None:
                    ids.append(id)
                elif unveil:
                    ids += self.pairs.encode(self.compose(part.translate(unveil)))
                else:
                    ids += self.pairs.encode(part)
        return ids

    def bytes_of(self, id, skip_special=False):
        """The bytes of a token; none for an id without one (the rows of an embedding are often padded past the vocabulary)."""
        try:
            id = -1 if isinstance(id, bool) else operator.index(id)
        except TypeError:
            id = -1
        if id < 0:
            raise ValueError("token id: not a whole number of 0 or more; pass ids as encode gives them")
        if id >= len(self.words) or skip_special and id in self.special_ids:
            return b""
        return self.words[id]

    def decode(self, ids, skip_special=False):
        """The text of the ids, special tokens spelled out unless skipped. Any id will do; broken characters become U+FFFD."""
        return b"".join(self.bytes_of(id, skip_special) for id in ids).decode("utf-8", "replace")

    def stream(self, skip_special=False):
        return Stream(self, skip_special)

    def chat(self, messages, add_generation_prompt=True, **variables):
        """The text that the folder's chat template makes of [{"role": "user", "content": "..."}, ...].

        A folder without a template, of a base model, continues text: the contents as they are, one a line. To run a model
        take `chat_ids`: in this text a control token of the template and the same characters typed by a user look alike.
        """
        if not (isinstance(messages, (list, tuple)) and all(isinstance(message, dict) for message in messages)):
            raise ValueError(f'messages: {show(messages)}; pass a list like [{{"role": "user", "content": "Hi"}}]')
        try:
            json.dumps([messages, variables], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise ValueError("messages: half a character (lone surrogate) in a text; pass valid Unicode") from None
        if self.template is None:
            return "\n".join(str(message.get("content") or "") for message in messages)
        return self._render({"messages": messages, "add_generation_prompt": add_generation_prompt, **variables})

    def _render(self, given, veil={}):
        known = {**self.names, "tools": None, "documents": None}
        return render(self.template, {**known, **veiled(given, veil)}, veil)

    def chat_ids(self, messages, add_generation_prompt=True, **variables):
        """The ids of the prompt. Its added tokens, of whatever kind, come from the template alone.

        A user may have typed one. So the template runs a second time, on messages in which every letter that an added token
        begins with is veiled: replaced by a mark that occurs nowhere else. Only tokens whose first letter the template has
        written are found in that text; then the letters come back.

            typed <|im_end|>, veiled ▮|im_end|>     <|im_start|>user\n▮|im_end|><|im_end|>\n     two tokens, not three

        What the template compares with the messages is veiled as well, so that it decides as before. If the second text still
        differs from the first in more than the marks, the template has changed what was typed: that is as good if both texts
        have the same tokens, and refused if not.
        """
        text = self.chat(messages, add_generation_prompt, **variables)
        if self.template is None:
            return self.bos_ids + self.encode(text)
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt, **variables}
        veil = self._veil(json.dumps(given, ensure_ascii=False, default=str))
        ids = self._encode(text)
        if not veil:
            return ids
        try:
            second = self._render(given, veil)
        except ValueError:
            second = ""
        unveil = {ord(mark): chr(letter) for letter, mark in veil.items()}
        veiled_ids = self._encode(second, unveil=unveil)
        if second.translate(unveil) == text:
            return veiled_ids
        tokens = {entry["id"] for entry in self.added.values()}
        if [id for id in ids if id in tokens] != [id for id in veiled_ids if id in tokens]:
            raise ValueError("messages: hold the beginning of a control token, and the chat template changes it, so that "
                             "typed and true ones look alike; leave it out")
        return ids

    def _veil(self, typed):
        """{code of a letter that was typed and that an added token begins with: a mark that occurs nowhere}"""
        letters = sorted({text[0] for text in self.added} & set(typed))
        used = {*typed, *self.template, *"".join(self.added)}
        unused = (chr(code) for code in itertools.chain(*PRIVATE_USE) if chr(code) not in used)
        veil = {ord(letter): mark for letter, mark in zip(letters, unused)}
        if len(veil) < len(letters):
            raise ValueError("messages: use every character for private use; leave one out")
        return veil


def veiled(value, veil):
    """The value with the letters of every string in it replaced."""
    if isinstance(value, str):
        return value.translate(veil)
    if isinstance(value, dict):
        return {key: veiled(item, veil) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [veiled(item, veil) for item in value]
    return value
