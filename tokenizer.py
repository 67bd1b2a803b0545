"""Text to token ids and back, chat messages to a prompt: every byte-level BPE folder (Qwen2/2.5, Qwen3, Llama 3.x, R1-Distill).

    text ──► added tokens cut out ──► NFC ──► pieces (a regular expression) ──► bytes ──► pairs joined by rank ──► ids

Three spellings of the same thing are read: `tokenizer.json`; `vocab.json` + `merges.txt`; Meta's `tokenizer.model`. tiktoken, a
compiled library, joins the pairs; `join` is the same rule in Python, and the arbiter where tiktoken and the reference part.

    encode("<|im_end|>")                       ordinary text: somebody typed these ten characters
    encode("<|im_end|>", allow_special=True)   one control token
    chat_ids(messages)                         control tokens come from the template; those typed in a message are ordinary text

"Special" are the added tokens that the folder marks so. The other added tokens (`<think>`, `<tool_call>`) are tokens wherever
they stand, as in the reference library. `encode` adds nothing in front; `bos_ids` is what the reference puts before raw text.
"""
import base64
import codecs
import contextlib
import functools
import heapq
import json
import operator
import os
import re
import unicodedata
from pathlib import Path

import regex
import tiktoken

from checks import read_bytes, read_json, show

# How the models read here cut text into pieces: a word with the character before it, digits, a run of punctuation, white space.
# No token reaches across two pieces. Each of the three expressions matches every character of any text.
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERN_SECONDS = 2             # what another expression may take for one piece of text; some never end

# Vocabulary files spell bytes as characters: printable ones as themselves, the other 68 as U+0100, U+0101, ... (space: "Ġ").
OTHERS = [byte for byte in range(256) if not (33 <= byte < 127 or 161 <= byte < 173 or byte > 173)]
BYTE_OF = {256 + i: byte for i, byte in enumerate(OTHERS)} | dict.fromkeys(OTHERS, 0xFFFF)      # 0xFFFF: not in this alphabet


def spelled(token):
    """The bytes that a vocabulary entry stands for; b"" where its characters are not of the byte alphabet."""
    try:
        return token.translate(BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:
        return b""


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
    """

    def __init__(self, vocab, merges, splits, nfc=False, ignore_merges=False):
        """vocab {bytes: id}; merges [(bytes, bytes)], or None: any pair, ranked by id; splits [(expression, keep the gaps)]."""
        self.vocab, self.nfc, self.ignore_merges = vocab, nfc, ignore_merges
        self.splits = [(regex.compile(expression), keep) for expression, keep in splits]
        self.known = len(splits) == 1 and splits[0][0] in (QWEN2, LLAMA3, GPT2)
        self.pairs, self.agrees, last = {}, True, None
        if merges is None:
            self.ranks = {token: rank for rank, token in enumerate(sorted(vocab, key=vocab.get))}
        else:
            self.ranks = {token: rank for rank, token in enumerate(token for token in vocab if len(token) == 1)}
            for place, pair in enumerate(merges):
                self.pairs[pair] = place
                token = pair[0] + pair[1]
                if token in self.ranks:
                    self.agrees &= token == last
                else:
                    self.ranks[token] = len(self.ranks)
                last = token
            if ignore_merges:                                       # tokens that no pair makes; a whole piece may be one
                for token in vocab:
                    self.ranks.setdefault(token, len(self.ranks))
        self.tokens = list(self.ranks)
        self.ids = [vocab[token] for token in self.tokens]
        self.trusted = set(range(len(self.ids))) if merges is None else set()
        self.tiktoken = tiktoken.Encoding("model", pat_str=splits[0][0] if self.known else QWEN2,
                                          mergeable_ranks=self.ranks, special_tokens={})
        self.piece_ids = functools.lru_cache(1 << 16)(self._piece_ids)

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
            if len(parts) > 1 or any(pair not in self.pairs for pair in joins):
                return False
            self.trusted.add(rank)
        return self.agrees

    def _piece_ids(self, piece):
        if self.ignore_merges and piece in self.vocab:
            return [self.vocab[piece]]
        ranks = self.tiktoken._encode_single_piece(piece)
        if self._trust(ranks):
            return [self.ids[rank] for rank in ranks]
        return [self.vocab[part] for part in join(piece, lambda a, b: self.pairs.get((a, b)))]

    def pieces(self, text):
        """The expressions one after the other, each on the pieces of the one before; the gaps between matches are pieces too."""
        pieces = [text] if text else []
        for expression, keep in self.splits:
            cut = []
            for piece in pieces:
                try:
                    spans = [match.span() for match in expression.finditer(piece, timeout=PATTERN_SECONDS)]
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
        """words {id: bytes}; added {text: {"id", "special", "normalized"}}; names {"eos_token": text, ...} for the template."""
        self.pairs, self.words, self.added = pairs, words, added
        self.bos_ids, self.eos_ids = list(bos_ids), frozenset(eos_ids)
        self.special_ids = {entry["id"] for entry in added.values() if entry["special"]}
        self.vocab_size = max(words) + 1
        self.template, self.names = template, names or {}
        # Two rounds: most added tokens are looked for in the text as it is, those called normalized after NFC.
        self.rounds = []
        for normalized in (False, True):
            entries = {self._nfc(text) if normalized else text: entry
                       for text, entry in added.items() if entry["normalized"] == normalized}
            longest_first = "|".join(re.escape(text) for text in sorted(entries, key=len, reverse=True))
            self.rounds.append((re.compile(longest_first or "(?!)"), entries))

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
            end = 0
            for match in self.rounds[round][0].finditer(text):
                entry = self.rounds[round][1][match.group()]
                if allow_special or not entry["special"]:
                    yield text[end:match.start()], None
                    yield match.group(), entry
                    end = match.end()
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
        return b"" if skip_special and id in self.special_ids else self.words.get(id, b"")

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
        written = re.compile("|".join(map(re.escape, control)) or "(?!)")
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
            if written.search(self._nfc(value)):
                value = self._nfc(value)
            end = len(value.rstrip())

            def opens(i):
                return written.match(value, i) or i > end - longest and any(text.startswith(value[i:end]) for text in control)
            return "".join(veil[letter] if letter in veil and opens(i) else letter for i, letter in enumerate(value))

        text = self.chat(hide(messages), add_generation_prompt, **variables)
        return self._encode(text, True, {ord(mark): first for first, mark in veil.items() if mark in text})


# ---- the chat template: a program from a stranger -----------------------------------------------------------------------------

SECONDS, MEMORY, OUTPUT = 1.5, 256 << 20, 10 << 20                  # what rendering one may take: time, bytes, characters
rendered = set()                                                    # templates that have ended within that


@functools.lru_cache(8)
def compiled(template):
    """The jinja2 template as the reference library sets it up."""
    import jinja2.debug                                             # jinja2 imports it late, when a child can open no file
    import jinja2.ext
    import jinja2.sandbox
    from datetime import datetime

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}                                       # marks the assistant's words, for training; no effect here

        def parse(self, parser):
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    return environment.from_string(template)


def render(template, variables):
    """The text of a template, or one line on why there is none.

    The sandbox keeps a template from files and from Python's insides, but not from endless loops or 10**12 letters. A forked
    child with limits on time, memory and files excludes all of that by one rule; it takes milliseconds, since nothing is started
    or copied. A template that has ended once is compiled here, for the next children. Without fork (Windows): the sandbox only.
    """
    import jinja2
    compiled("{{ 'a' }}")                                           # so that everything is imported before the fork

    def run():
        try:
            text = compiled(template).render(**variables)
            text.encode()
            return ("text", text) if len(text) <= OUTPUT else ("error", f"its text is longer than {OUTPUT} characters")
        except jinja2.TemplateError as error:                       # the template's own message, or a mistake in the template
            return "error", show(error.message or type(error).__name__, 240)
        except MemoryError:
            return "error", f"it needs more than {MEMORY >> 20} MB"
        except Exception as error:
            return "error", f"{type(error).__name__} {show(str(error), 240)}"

    if template in rendered:
        with contextlib.suppress(Exception):                        # it did compile in a child; if not here, then there again
            compiled(template)
    kind, text = in_child(run) if hasattr(os, "fork") else run()
    if kind == "error":
        raise ValueError(f"chat template: {text}; use another template, or the prompt without one")
    rendered.add(template)
    return text


def in_child(run):
    """The pair of texts that `run()` returns in a child with SECONDS to live, MEMORY more than now and no files."""
    import resource
    import select
    import signal
    import time
    import warnings

    def child():
        import gc
        gc.disable()
        memory = resource.RLIM_INFINITY
        if os.path.exists("/proc/self/statm"):
            memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        for limit, value in (("AS", memory), ("CPU", 2), ("CORE", 0), ("NOFILE", 0)):
            try:
                resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (value, value))
            except (OSError, ValueError):
                pass                                                # stricter already, or not known to this system
        answer = json.dumps(run(), ensure_ascii=False).encode()
        while answer:
            answer = answer[os.write(write_end, answer):]

    deadline, parent, pid, answer = time.monotonic() + SECONDS, os.getpid(), None, bytearray()
    read_end, write_end = os.pipe()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                         # Python 3.12 warns of threads; the child needs none
            pid = os.fork()
        if pid == 0:
            child()
            os._exit(0)
        os.close(write_end)
        write_end, ready = None, select.poll()
        ready.register(read_end, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0 and ready.poll(left * 1000):
            if not (block := os.read(read_end, 1 << 20)):
                return tuple(json.loads(answer))
            answer += block
        return "error", f"it does not end within {SECONDS} seconds"
    except OSError as error:
        return "error", f"no process to run it in ({error.strerror})"
    except ValueError:                                              # no answer, or half of one
        return "error", "it crashed"
    finally:
        if os.getpid() != parent:                                   # the child ends here, whatever happened
            os._exit(1)
        for end in (read_end, write_end):
            if end is not None:
                os.close(end)
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


# ---- the files ----------------------------------------------------------------------------------------------------------------

USE = "use a Llama 3, Qwen2 or Qwen3 folder"
SENTENCEPIECE = "is a SentencePiece vocabulary (Llama 2, Mistral, Gemma), not byte-level BPE"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
META_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
                "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
                "<|eot_id|>", "<|python_tag|>", "<|image|>"] + [f"<|reserved_special_token_{i}|>" for i in range(2, 246)]

# What may stand in an expression: only what all engines read alike.
CLASS = r"\\[pP]\{[A-Z][a-z]?\} | \\[srntSdD] | \\\W"
SAFE = re.compile(rf"""(?: {CLASS} | \[\^?(?: {CLASS} | [^\[\]\\&|~] | (?<![&|~])[&|~](?![&|~]) )+\]
    | \((?: (?!\?) | \?: | \?! | \?= ) | [)|] | \(\?i: (?: (?!ss|st|ff|fi|fl) ['a-z|] )* \)
    | [*+?]\+? | \{{\d+(?:,\d*)?\}} (?![+?*]) | [^\\\[\](){{}}*+?|^$.] )*""", re.VERBOSE)


def refuse(path, what, do="download it again"):
    raise ValueError(f"{show(path, 140)}: {what}; {do}")


def load_tokenizer(folder):
    """The Tokenizer of a model folder: from tokenizer.json, else vocab.json + merges.txt, else Meta's tokenizer.model."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{show(folder, 140)}: no such folder; give the folder of a model")

    def there(name):
        return os.path.lexists(folder / name)                       # a dangling link is there, and will be reported

    def read(name):
        return read_json(folder / name) if there(name) else {}

    config, settings = read("config.json"), read("tokenizer_config.json")
    if "added_tokens_decoder" not in settings:                      # older folders name special tokens in a file of their own
        settings = {**settings, **read("special_tokens_map.json")}
    names = special_names(folder / "tokenizer_config.json", settings)

    path = next((folder / name for name in ("tokenizer.json", "vocab.json", "tokenizer.model") if there(name)), None)
    if path is None:
        raise FileNotFoundError(f"{show(folder, 140)}: holds no tokenizer.json, vocab.json + merges.txt or tokenizer.model; "
                                "download these files too")
    if path.name == "tokenizer.json":
        parts = from_tokenizer_json(path)
    elif path.name == "vocab.json":
        parts = from_vocab_and_merges(path, settings, config)
    else:
        parts = from_meta(path)
    vocab, texts = parts["vocab"], parts["texts"]
    missing = [byte for byte in range(256) if bytes([byte]) not in vocab and byte not in (0xC0, 0xC1, *range(0xF5, 256))]
    if missing:                                                     # but for those that UTF-8 never uses
        refuse(path, f"has no token for {len(missing)} of the 256 bytes (0x{missing[0]:02X}), so some texts have no ids", USE)
    words = {id: text.encode() for text, id in texts.items()} | {id: token for token, id in vocab.items()}

    entries = parts["added"] + listed_tokens(folder / "tokenizer_config.json", settings)
    if path.name == "vocab.json" and "added_tokens_decoder" not in settings:
        more = settings.get("additional_special_tokens")
        special = [*names.values(), *(more if isinstance(more, list) else [])]
        entries += [{"content": text, "id": id, "special": text in special} for text, id in read("added_tokens.json").items()]
    known = [entry.get("content") for entry in entries if isinstance(entry, dict)]
    entries += [{"content": text, "id": texts[text], "special": True}           # named special, and only in the vocabulary
                for text in dict.fromkeys(names.values()) if text in texts and text not in known]
    added = checked_added(path, entries, texts, words, parts["nfc"])
    words |= {entry["id"]: text.encode() for text, entry in added.items()}

    size, last = config.get("vocab_size"), max(words)
    if type(size) is int and last >= size:
        refuse(path, f"token {show(words[last])} has the id {last}, but config.json has a vocab_size of {size}",
               "the two files must be of one model")
    named = {name: [added[text]["id"]] for name, text in names.items() if text in added}
    bos_ids, eos_ids = parts["bos_ids"], parts["eos_ids"] + named.get("eos_token", [])
    if settings.get("add_bos_token") not in (None, True, False):
        refuse(folder / "tokenizer_config.json", f"add_bos_token is {show(settings['add_bos_token'])}, not true or false", "correct it")
    if settings.get("add_bos_token") is True and not bos_ids:       # tokenizer.json has the first word on it
        bos_ids = named.get("bos_token", [])
    for name in ("config.json", "generation_config.json"):
        value = read(name).get("eos_token_id")
        eos_ids += value if isinstance(value, list) else [] if value is None else [value]
        for id in eos_ids:
            if type(id) is not int or not 0 <= id < (size if type(size) is int else 1 << 31):
                refuse(folder / name, f"eos_token_id holds {show(id)}, not an id of the vocabulary", "correct it")

    template = settings.get("chat_template")
    if isinstance(template, list):                                  # several, each with a name
        defaults = [each.get("template") for each in template if isinstance(each, dict) and each.get("name") == "default"]
        template = defaults[0] if defaults else False
    if template is not None and not isinstance(template, str):
        refuse(folder / "tokenizer_config.json", "chat_template is no text, and no list with one named default", "correct it")
    if there("chat_template.jinja"):
        template = read_text(folder / "chat_template.jinja")
    pairs = BytePairs(vocab, parts["merges"], parts["splits"], parts["nfc"], parts["ignore_merges"])
    return Tokenizer(pairs, words, added, bos_ids, eos_ids, template or None, names)


def special_names(path, settings):
    """{"eos_token": its text, ...} from tokenizer_config.json, where a token is a text or an object with a text."""
    names = {}
    for name in NAMES:
        text = settings.get(name)
        text = text.get("content") if isinstance(text, dict) else text
        if isinstance(text, str):
            names[name] = text
        elif text is not None:
            refuse(path, f"{name} is {show(text)}, not a text", "correct it")
    return names


def listed_tokens(path, settings):
    """The added tokens that tokenizer_config.json lists by id, in the form of tokenizer.json."""
    listed = settings.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        refuse(path, f"added_tokens_decoder is {show(listed)}, not an object", "correct it")
    for id, entry in listed.items():
        if not (re.fullmatch("[0-9]{1,10}", id) and isinstance(entry, dict)):
            refuse(path, f"added_tokens_decoder[{show(id)}] is {show(entry)}; it leads from ids to objects", "correct it")
    return [{**entry, "id": int(id)} for id, entry in listed.items()]


def read_text(path):
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        refuse(path, f"is not UTF-8 (byte {error.start})")


def nodes_of(path, data, field, inner):
    """The steps of a field of tokenizer.json: none, one, or those of a Sequence."""
    node = data.get(field)
    if node is None:
        return []
    if not isinstance(node, dict):
        refuse(path, f"{field} is {show(node)}, not an object")
    if node.get("type") != "Sequence":
        return [node]
    if not isinstance(node.get(inner), list):
        refuse(path, f"{field}.{inner} is {show(node.get(inner))}, not a list")
    return [step for child in node[inner] for step in nodes_of(path, {field: child}, field, inner)]


def from_tokenizer_json(path):
    """The file of the `tokenizers` library. Every field that changes ids is implemented, or refused by its name."""
    data = read_json(path)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        refuse(path, f"model.type is {show(model.get('type') if isinstance(model, dict) else model)}, not 'BPE'", USE)
    steps = nodes_of(path, data, "pre_tokenizer", "pretokenizers")
    normalizers = nodes_of(path, data, "normalizer", "normalizers")
    if model.get("byte_fallback") or any(step.get("type") in ("Metaspace", "Prepend") for step in steps + normalizers):
        refuse(path, SENTENCEPIECE, USE)
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field) not in (None, ""):
            refuse(path, f"model.{field} is {show(model[field])}; it is not implemented", USE)
    if not isinstance(model.get("ignore_merges", False), bool):
        refuse(path, f"model.ignore_merges is {show(model['ignore_merges'])}, not true or false", "correct it")

    def unknown(field, step):
        rest = {key: value for key, value in step.items() if key != "type"}
        refuse(path, f"{field} {show(step.get('type'))} with {show(rest, 120)} is not implemented", USE)

    splits = []
    for step in steps:
        kind, pattern = step.get("type"), step.get("pattern")
        keep = {"Isolated": True, "Removed": False if step.get("invert") else None}.get(str(step.get("behavior")))
        if any(not isinstance(step.get(flag, False), bool) for flag in ("invert", "use_regex", "individual_digits")):
            unknown("pre_tokenizer", step)
        elif kind == "ByteLevel" and step is steps[-1] and step.get("add_prefix_space") is False:
            splits += [(GPT2, True)] if step.get("use_regex", True) else []
        elif kind == "Digits":
            splits.append((r"\p{N}" if step.get("individual_digits") else r"\p{N}+", True))
        elif kind == "Split" and keep is not None and isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
            splits.append((pattern["Regex"], keep))
        elif kind == "Split" and keep is not None and isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
            splits.append((regex.escape(pattern["String"]), keep))
        else:
            unknown("pre_tokenizer", step)
    if not steps or steps[-1].get("type") != "ByteLevel":
        refuse(path, "pre_tokenizer does not end in ByteLevel; only byte-level BPE is read", USE)
    for text, _ in splits:
        if len(text) > 2000 or re.search(r"\{[\d,]*\d{3}", text):       # compiling a count of millions takes all memory
            refuse(path, f"pre_tokenizer pattern {show(text)} is longer, or counts further, than any in use", USE)
        try:
            matches_nothing = regex.compile(text).fullmatch("")
        except (regex.error, RecursionError, OverflowError) as error:
            refuse(path, f"pre_tokenizer pattern {show(text)} is no regular expression ({show(str(error))})", "correct it")
        if matches_nothing or not SAFE.fullmatch(text):
            refuse(path, f"pre_tokenizer pattern {show(text, 120)} has parts that different engines read differently", USE)
    for step in normalizers:
        if step.get("type") != "NFC":
            unknown("normalizer", step)
    for step in nodes_of(path, data, "decoder", "decoders") or [{}]:
        if step.get("type") != "ByteLevel":
            unknown("decoder", step)

    bos_ids = []
    for step in nodes_of(path, data, "post_processor", "processors"):
        if step.get("type") == "TemplateProcessing":                # what stands before Sequence A
            try:
                for item in step["single"]:
                    if "Sequence" in item:
                        break
                    bos_ids += [operator.index(id) for id in step["special_tokens"][item["SpecialToken"]["id"]]["ids"]]
            except (KeyError, TypeError):
                refuse(path, f"post_processor {show(step, 120)} lacks a part")
        elif step.get("type") != "ByteLevel":
            unknown("post_processor", step)
    added = data.get("added_tokens") or []
    if not isinstance(added, list):
        refuse(path, f"added_tokens is {show(added)}, not a list")
    vocab, pairs = checked_vocab(path, model.get("vocab"), model.get("merges"))
    return {"vocab": vocab, "texts": model["vocab"], "merges": pairs, "splits": splits, "nfc": bool(normalizers),
            "ignore_merges": model.get("ignore_merges", False), "added": added, "bos_ids": bos_ids, "eos_ids": []}


def from_vocab_and_merges(path, settings, config):
    """The two files of GPT-2's release. They do not say how text is cut into pieces; the name of the tokenizer's class does."""
    by_model = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "gpt2": "GPT2Tokenizer"}
    name = settings.get("tokenizer_class") or by_model.get(str(config.get("model_type")))
    expression = {"Qwen2Tokenizer": QWEN2, "GPT2Tokenizer": GPT2}.get(str(name).removesuffix("Fast"))
    space = settings.get("add_prefix_space")
    if expression is None or space:
        refuse(path.with_name("tokenizer_config.json"), f"tokenizer_class {show(name)} with add_prefix_space {show(space)}: "
               "vocab.json is read only for Qwen2Tokenizer and GPT2Tokenizer without it", USE)
    lines = [line.rstrip("\r") for line in read_text(path.with_name("merges.txt")).split("\n")]
    texts = read_json(path)
    vocab, pairs = checked_vocab(path, texts, [line for line in lines if line])
    return {"vocab": vocab, "texts": texts, "merges": pairs, "splits": [(expression, True)], "nfc": expression == QWEN2,
            "ignore_merges": False, "added": [], "bos_ids": [], "eos_ids": []}


def from_meta(path):
    """Meta's file: on each line a token in base64 and its rank. Any two neighbours may join; 256 control tokens follow."""
    vocab = {}
    for line in read_bytes(path).split(b"\n"):
        if line.strip():
            try:
                token, rank = line.split()
                token = base64.b64decode(token, validate=True)
                fits = token and token not in vocab and int(rank) == len(vocab)
            except ValueError:
                fits = False
            if not fits and not vocab:
                refuse(path, SENTENCEPIECE, USE)
            if not fits:
                refuse(path, f"token {len(vocab)} is {show(line)}, not base64 and the rank {len(vocab)}")
            vocab[token] = len(vocab)
    ids = {text: len(vocab) + place for place, text in enumerate(META_SPECIAL)}
    return {"vocab": vocab, "texts": {}, "merges": None, "splits": [(LLAMA3, True)], "nfc": False, "ignore_merges": True,
            "added": [{"content": text, "id": id, "special": True} for text, id in ids.items()],
            "bos_ids": [ids["<|begin_of_text|>"]], "eos_ids": [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]]}


def checked_vocab(path, vocab, merges):
    """{spelled token: id} and merges, "a b" or ["a", "b"] -> {bytes: id} and [(bytes, bytes)]."""
    if not isinstance(vocab, dict) or not vocab:
        refuse(path, f"model.vocab is {show(vocab)}, not an object of tokens and ids")
    if not isinstance(merges, list):
        refuse(path, f"model.merges is {show(merges)}, not a list")
    seen = set()
    for text, id in vocab.items():
        if type(id) is not int or id < 0:
            refuse(path, f"vocab: the id of {show(text)} is {show(id)}, not a whole number of 0 or more")
        if id in seen:
            refuse(path, f"vocab: the id {id} of {show(text)} is taken by another token")
        seen.add(id)
    spelling = {text: spelled(text) for text in vocab}
    pairs = []
    for place, merge in enumerate(merges):
        if isinstance(merge, str):
            if merge.startswith("#version"):
                continue
            merge = merge.split(" ")
        try:
            a, b = merge
            pair = spelling[a], spelling[b]
            fits = all(pair) and spelling[a + b] and isinstance(merge, list)
        except (TypeError, ValueError, KeyError):
            fits = False
        if not fits:
            refuse(path, f"merge {place} is {show(merges[place], 120)}, not two tokens of the vocabulary that make a third")
        pairs.append(pair)
    return {token: vocab[text] for text, token in spelling.items() if token}, pairs


def checked_added(path, entries, texts, words, composed):
    """Added tokens {text: {"id", "special", "normalized"}}. A later entry for the same text and id replaces an earlier one."""
    added, owner, canonical = {}, {}, {}
    for entry in entries:
        text, id = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(text, str) or not text or type(id) is not int or id < 0:
            refuse(path, f"added token {show(entry, 120)} lacks a text, or an id of 0 or more")
        flags = {flag: entry.get(flag, False) for flag in ("special", "lstrip", "rstrip", "single_word")}
        flags["normalized"] = entry.get("normalized", not flags["special"])
        for flag, value in flags.items():
            if not isinstance(value, bool):
                refuse(path, f"added token {show(text)}: {flag} is {show(value)}, not true or false", "correct it")
            if value and flag not in ("special", "normalized"):
                refuse(path, f"added token {show(text)}: {flag} is not implemented", USE)
        same = canonical.setdefault(nfc(text) if composed and flags["normalized"] else text, text)
        if same != text or added.get(text, entry)["id"] != id or texts.get(text, id) != id:
            refuse(path, f"added token {show(text)} with the id {id} clashes: the same text has another id")
        if owner.setdefault(id, text) != text or id in words and texts.get(text) != id:
            other = owner[id] if owner[id] != text else words[id]
            refuse(path, f"added token {show(text)} clashes: its id {id} is that of {show(other)}")
        added[text] = {"id": id, "special": flags["special"], "normalized": flags["normalized"]}
    return added
