"""The mistakes that mutations.py plants in tokenizer/: {(file, tests):
[(description, old text, new text), ...]}."""
BPE = "tests/test_tokenizer_bpe.py"
TEXT = "tests/test_tokenizer_text.py"
CHAT = "tests/test_tokenizer_chat.py"
FILES = "tests/test_tokenizer_files.py"
RULES = "tests/test_checks_vocabulary.py"
CHILD = "tests/test_checks_child.py"

TABLE = {
    ("tokenizer/bpe.py", BPE): [
        ("merges ranked backwards", "enumerate(merges)}", "enumerate(reversed(merges))}"),
        ("pairs ranked by the id of what they make, as tiktoken has it",
         'self.places.get(f"{left} {right}")', "self.vocab.get(left + right)"),
        ("ignore_merges ignored", "if self.ignore_merges and letters in self.vocab:", "if False:"),
        ("a piece that is a token is always taken whole",
         "if self.ignore_merges and letters in self.vocab:", "if letters in self.vocab:"),
        ("a byte without a token dropped after the joining",
         "        known = [letter for letter in letters if letter in self.vocab]\n"
         '        parts = join(known, lambda left, right: self.places.get(f"{left} {right}"))\n'
         "        return [self.vocab[part] for part in parts]",
         '        parts = join(letters, lambda left, right: self.places.get(f"{left} {right}"))\n'
         "        return [self.vocab[part] for part in parts if part in self.vocab]"),
        ("what stands between two matches is lost", "cut.split(piece) if part",
         "cut.findall(piece) if part"),
        ("three digits are one piece in Qwen2 too", '\\p{L}+|\\p{N}"\n', '\\p{L}+|\\p{N}{1,3}"\n'),
    ],
    ("tokenizer/text.py", f"{BPE} {TEXT}"): [
        ("NFC left out", 'return unicodedata.normalize("NFC", text)', "return text"),
        ("normalized tokens looked for before NFC",
         'late = {text for text in added if added[text]["normalized"]}', "late = set()"),
        ("special tokens typed are tokens", "frozenset() if allow_special else self.special_ids",
         "frozenset()"),
    ],
    ("tokenizer/text.py", TEXT): [
        ("an added token found before a longer one", "for text in ids}, reverse=True)",
         "for text in ids})"),
        ("a refused token is looked into",
         "            looked = start + len(found)\n"
         "            if found and self.ids[found] not in refused:\n",
         "            if found and self.ids[found] not in refused:\n"
         "                looked = start + len(found)\n"),
    ],
    ("tokenizer/text.py", f"{TEXT} -k stream"): [
        ("streaming: the held-back bytes are dropped at the end",
         'return self.decoder.decode(b"", final=True)', 'return ""'),
        ("streaming: every token decoded by itself",
         "return self.decoder.decode(self.tokenizer.bytes_of(id, self.skip_special))",
         'return self.tokenizer.bytes_of(id, self.skip_special).decode("utf-8", "replace")'),
    ],
    ("tokenizer/text.py", CHAT): [
        ("chat: what users type is not veiled", "hidden = veiled(given, veil)", "hidden = given"),
        ("chat: only the contents of messages, not other variables", "hidden = veiled(given, veil)",
         'hidden = {**given, "messages": veiled(messages, veil)}'),
        ("chat: the letters come back before normalized tokens are looked for",
         "self.normalized.cut(self.normalize(part), refused)",
         "self.normalized.cut(self.normalize(part.translate(unveil)), refused)"),
        ("chat: letters of composed tokens not veiled",
         'bare = lambda text: unicodedata.normalize("NFD", text)[0]', "bare = lambda text: text[0]"),
        ("chat: marks that a message has already", "for code in PRIVATE_USE if chr(code) not in used)",
         "for code in PRIVATE_USE)"),
        ("chat: a template that changes letters is believed",
         "check_typed(self.added, self._encode(text), ids)", "pass"),
    ],
    ("tokenizer/chat.py", CHAT): [
        ("chat: what a template compares is not veiled", "text.value = text.value.translate(dict(veil))",
         "pass"),
        ("chat: line breaks after blocks kept", "trim_blocks=True, ", ""),
        ("chat: JSON in ASCII", "ensure_ascii=False", "ensure_ascii=True"),
    ],
    ("tokenizer/chat.py", CHILD): [
        ("chat: modules of filters not imported before the fork", "    compiled(WARM_UP).render()\n", ""),
    ],
    ("tokenizer/files.py", BPE): [
        ("digits not cut out first (SmolLM2)", "expressions.append(DIGIT)", "pass"),
    ],
    ("tokenizer/files.py", FILES): [
        ("bos_token: add_bos_token ignored", 'if settings.get("add_bos_token") and not bos_ids:',
         "if False:"),
        ("end ids of generation_config.json ignored",
         'for name in ("config.json", "generation_config.json"):', 'for name in ("config.json",):'),
        ("added tokens of tokenizer_config.json ignored",
         'settings.get("added_tokens_decoder", {}).items()', "()"),
        ("chat_template.jinja ignored",
         "    if os.path.lexists(path):\n"
         "        template = read_bytes(path)", "    if False:\n        template = read_bytes(path)"),
    ],
    ("checks/vocabulary.py", RULES): [
        ("an expression of a stranger is run", "must(cuts in published, path, what, USE)", "pass"),
    ],
    ("checks/child.py", CHILD): [
        ("the child keeps its files", ', ("NOFILE", 0)', ""),
    ],
}
