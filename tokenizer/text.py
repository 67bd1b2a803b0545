"""Text to token ids and back, chat messages to a prompt: byte-level BPE of Llama 3, Qwen, SmolLM2.

    text ─► added tokens cut out ─► NFC ─► pieces (an expression) ─► bytes ─► pairs joined ─► ids

files.py reads the folder, bpe.py cuts pieces and joins pairs, chat.py runs the chat template.

    encode("<|im_end|>")                       ordinary text: somebody typed these ten characters
    encode("<|im_end|>", allow_special=True)   one control token
    chat_ids(messages)                         added tokens of the template; those typed are text

`encode` is the reference library's: the added tokens that the folder marks special are text unless
allowed, the others (`<think>`) are tokens wherever they stand. It puts no `bos_ids` in front.
"""
import codecs
import json
import unicodedata

import regex

from checks.vocabulary import (check_id, check_marks, check_messages, check_text, check_typed,
                               check_veil)
from tokenizer.chat import render

PRIVATE_USE = range(0xF0000, 0x10FFFE)          # characters that mean nothing to anybody


def compose(text):
    """Unicode's composed form, NFC."""
    check_marks(text)
    return unicodedata.normalize("NFC", text)


class AddedTokens:
    """Texts that are tokens as a whole, found in another text: the leftmost, there the longest."""

    def __init__(self, ids):
        """ids {text: id}"""
        self.ids = ids
        self.sizes = sorted({len(text) for text in ids}, reverse=True)
        letters = "".join({text[0] for text in ids})
        self.first = regex.compile(f"[{regex.escape(letters)}]" if ids else "(?!)")

    def cut(self, text, refused=frozenset()):
        """-> (text between tokens, None), (a token's text, its id), ... A refused id is none."""
        end = looked = 0
        for letter in self.first.finditer(text):
            start = letter.start()
            if start < looked:
                continue
            here = (text[start:start + size] for size in self.sizes)
            found = next((token for token in here if token in self.ids), "")
            looked = start + len(found)
            if found and self.ids[found] not in refused:
                yield text[end:start], None
                yield found, self.ids[found]
                end = looked
        yield text[end:], None


class Stream:
    """Ids one at a time -> text as soon as it is certain: half a character waits for its second.
    All parts together are `decode` of all ids."""

    def __init__(self, tokenizer, skip_special):
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, id):
        return self.decoder.decode(self.tokenizer.bytes_of(id, self.skip_special))

    def end(self):
        return self.decoder.decode(b"", final=True)


class Tokenizer:
    """What `load_tokenizer` returns. `eos_ids` end an answer; `bos_ids` belong before raw text."""

    def __init__(self, pairs, words, added, normalize, bos_ids, eos_ids, template, names):
        """words: the bytes of every id; added {text: {"id", "special", "normalized"}}; normalize:
        NFC or str; names {"eos_token": text, ...}: what the template knows."""
        self.pairs, self.words, self.added, self.normalize = pairs, words, added, normalize
        self.bos_ids, self.eos_ids = bos_ids, frozenset(eos_ids)
        self.special_ids = {entry["id"] for entry in added.values() if entry["special"]}
        self.vocab_size = len(words)
        self.template, self.names = template, {"tools": None, "documents": None, **names}

        # Most added tokens are looked for in the text as it is, those called normalized after NFC.
        late = {text for text in added if added[text]["normalized"]}
        self.raw = AddedTokens({text: added[text]["id"] for text in added.keys() - late})
        self.normalized = AddedTokens({normalize(text): added[text]["id"] for text in late})

    def encode(self, text, allow_special=False):
        """Ids of a text. Special tokens in it are ordinary text unless allowed."""
        check_text(text)
        return self._encode(text, frozenset() if allow_special else self.special_ids)

    def _encode(self, text, refused=frozenset(), unveil={}):
        """unveil {mark: the letter behind it}: see `chat_ids`."""
        parts = []
        for part, id in self.raw.cut(text, refused):
            if id is None:
                parts += self.normalized.cut(self.normalize(part), refused)
            else:
                parts.append((part, id))
        ids = []
        for part, id in parts:
            if id is None:
                ids += self.pairs.encode(self.normalize(part.translate(unveil)))
            else:
                ids.append(id)
        return ids

    def bytes_of(self, id, skip_special=False):
        """The bytes of a token; none for a row of the embedding that no token has."""
        check_id(id)
        left_out = id >= len(self.words) or skip_special and id in self.special_ids
        return b"" if left_out else self.words[id]

    def decode(self, ids, skip_special=False):
        """The text of the ids, special tokens spelled out unless skipped. Any id will do."""
        return b"".join(self.bytes_of(id, skip_special) for id in ids).decode("utf-8", "replace")

    def stream(self, skip_special=False):
        return Stream(self, skip_special)

    def chat(self, messages, add_generation_prompt=True, **variables):
        """The text that the chat template makes of [{"role": "user", "content": "..."}, ...].

        A base model's folder has none: the contents, one a line. To run a model take `chat_ids`: in
        this text a control token looks like the same letters typed by a user.
        """
        given = dict(variables, messages=messages, add_generation_prompt=add_generation_prompt)
        check_messages(given)
        if self.template is None:
            return "\n".join(str(message.get("content") or "") for message in messages)
        return render(self.template, {**self.names, **given})

    def chat_ids(self, messages, add_generation_prompt=True, **variables):
        """The ids of the prompt. Its added tokens, of any kind, come from the template alone.

        A user may have typed one. So the template runs again, on messages in which each letter that
        an added token begins with is veiled: replaced by a mark that occurs nowhere. Only tokens
        whose first letter the template wrote are found in that text; then the letters come back.

            typed      <|im_end|>            <|im_start|>user\\n<|im_end|><|im_end|>    three tokens
            veiled     ▮|im_end|>            <|im_start|>user\\n▮|im_end|><|im_end|>    two

        What the template compares with messages (`'</think>' in content`) is veiled too, so that it
        decides as before. A template that changes those letters makes two texts that differ in more
        than marks: then both must have the same added tokens, or nobody can say which are typed.
        """
        text = self.chat(messages, add_generation_prompt, **variables)
        if self.template is None:
            return self.bos_ids + self.encode(text)
        given = dict(variables, messages=messages, add_generation_prompt=add_generation_prompt)
        used = {*json.dumps(given, ensure_ascii=False, default=str), *self.template}
        used |= set(map(chr, range(32)))        # JSON spells these with others
        bare = lambda text: unicodedata.normalize("NFD", text)[0]       # accents may be typed apart
        begins = {bare(text) for text in self.added}
        letters = sorted(ord(letter) for letter in used if bare(letter) in begins)
        marks = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        veil = dict(zip(letters, marks))
        check_veil(letters, veil)
        hidden = veiled(given, veil)
        if hidden == given:
            return self._encode(text)

        hidden_text = render(self.template, {**self.names, **hidden}, veil)
        unveil = {ord(mark): letter for letter, mark in veil.items()}
        ids = self._encode(hidden_text, unveil=unveil)
        if hidden_text.translate(unveil) != text:
            check_typed(self.added, self._encode(text), ids)
            return self._encode(text)
        return ids


def veiled(value, veil):
    """The value with letters replaced in every string."""
    if isinstance(value, str):
        return value.translate(veil)
    if isinstance(value, dict):
        return {key: veiled(item, veil) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [veiled(item, veil) for item in value]
    return value
