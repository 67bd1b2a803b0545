"""The mistakes that mutations.py plants in checks/ and what calls it: {(file, tests):
[(description, old text, new text), ...]}."""
FILES = "tests/test_checks_files.py"
CONFIG = "tests/test_checks_config.py"
SAFETENSORS = "tests/test_checks_safetensors.py"
WEIGHTS = "tests/test_checks_weights.py"
HUB = "tests/test_checks_hub.py"
COMMAND = "tests/test_checks_command.py"
PROMPTS = "tests/test_checks_prompts.py"
LOAD = "tests/test_load_weights.py"
TRAIN = "tests/test_tiny_train.py"
LAW = "tests/test_law_checks.py"

TABLE = {
    ("checks/files.py", f"{FILES} -k pipe"): [
        ("a pipe is opened", "if not stat.S_ISREG(status.st_mode):", "if stat.S_ISDIR(status.st_mode):"),
    ],
    ("checks/files.py", f"{FILES} -k twice"): [
        ("a key twice: the last one counts", "        if key in table:\n", "        if False:\n"),
    ],
    ("checks/files.py", f"{FILES} -k NaN"): [
        ("NaN is a number", 'if text.lstrip("-").isalpha():', "if False:"),
    ],
    ("checks/files.py", f"{FILES} -k 1e999"): [
        ("1e999 is infinity", "or not math.isfinite(float(text)):", "or False:"),
    ],
    ("checks/files.py", f"{FILES} -k half"): [
        ("half a character passes", 'json.dumps(value, ensure_ascii=False).encode("utf-8")', "pass"),
    ],
    ("checks/files.py", f"{FILES} -k list"): [
        ("a list is an object", "if not isinstance(value, dict):", "if False:"),
    ],
    ("checks/files.py", f"{FILES} -k 80"): [
        ("no limit of size", "if len(data) > limit:", "if False:"),
    ],
    ("checks/files.py", f"{WEIGHTS} -k long or apart"): [
        ("names of weights cut at their end",
         "text = repr(name[-limit:])\n"
         "    return text if len(name) <= limit and len(text) <= limit else \"'...\" + text[4 - limit:]",
         "return show(name, limit)"),
    ],
    ("checks/files.py", f"{LOAD} -k refused"): [
        ("a device may be written over", "if os.path.lexists(path) and not os.path.isfile(path):",
         "if os.path.isdir(path):"),
    ],
    ("checks/config.py", f"{CONFIG} -k true"): [
        ("true is a size", "if type(value) is not int or not 0 < value <= most:",
         "if not isinstance(value, int) or not 0 < value <= most:"),
    ],
    ("checks/config.py", f"{CONFIG} -k rotation"): [
        ("rotation true is 1", "value == 1 and value is not True", "value == 1"),
    ],
    ("checks/config.py", f"{CONFIG} -k sliding"): [
        ("a window without a size is none", 'raw.get("sliding_window", 4096)', 'raw.get("sliding_window")'),
        ("a window in use passes",
         'if in_use and kinds is None and (raw.get("max_window_layers") or 0) < layers:', "if False:"),
    ],
    ("checks/config.py", f"{CONFIG} -k window"): [
        ("a window above the last layer is refused", '(raw.get("max_window_layers") or 0) < layers',
         '(raw.get("max_window_layers") or 0) <= layers'),
    ],
    ("checks/config.py", f"{CONFIG} -k spellings"): [
        ("two spellings of rope that differ pass", "or any(raw[name] != rope for name in places):",
         "or False:"),
    ],
    ("checks/config.py", f"{CONFIG} -k rope_theta"): [
        ("a missing rope_theta is guessed", "10000 if old_llama else None, least=1", "10000, least=1"),
    ],
    ("tokenizer/files.py", f"{CONFIG} -k eos"): [
        ("end ids unjudged", '        check_ids(folder / name, table, "eos_token_id", size)\n', ""),
    ],
    ("checks/safetensors.py", f"{SAFETENSORS} -k hole"): [
        ("a gap between tensors", "if begin != end:", "if begin < end:"),
    ],
    ("checks/safetensors.py", f"{SAFETENSORS} -k overlap"): [
        ("an overlap of tensors", "if begin != end:", "if begin > end:"),
    ],
    ("checks/safetensors.py", f"{SAFETENSORS} -k byte"): [
        ("data past the last tensor", "if end != size:", "if end > size:"),
    ],
    ("checks/safetensors.py", f"{SAFETENSORS} -k disagree"): [
        ("shape and bytes need not agree", "if has != need:", "if False:"),
    ],
    ("checks/safetensors.py", f"{SAFETENSORS} -k shard and named"): [
        ("a shard may lie elsewhere", 'plain = r"[\\w-][\\w.-]*\\.safetensors"',
         'plain = r"[\\w./-]*\\.safetensors"'),
    ],
    ("checks/safetensors.py", f"{SAFETENSORS} -k two"): [
        ("a tensor in two shards", "        if weight_map.get(name) != shard:",
         "        if name not in weight_map:"),
    ],
    ("load_weights.py", f"{LOAD} -k read"): [
        ("unaligned data read from the start", "piece = piece.clone()",
         "piece = data[:end - begin].clone()"),
    ],
    ("load_weights.py", f"{LOAD} -k written"): [
        ("written tensors not aligned", 'text += b" " * (-len(text) % 8)', 'text += b""'),
    ],
    ("checks/files.py", f"{LOAD} -k failure or disk or once"): [
        ("weights written under their own name at once",
         'part = Path(path).with_name(f".{os.getpid()}.part")', "part = Path(path)"),
    ],
    ("checks/files.py", f"{LOAD} -k disk"): [
        ("a full disk without the file's name",
         "raise OSError(error.errno, error.strerror, str(path)) from None", "raise"),
    ],
    ("checks/weights.py", f"{WEIGHTS} -k missing"): [
        ("weights that are missing", "    if missing:\n", "    if False:\n"),
    ],
    ("checks/weights.py", f"{WEIGHTS} -k unexpected or adapter"): [
        ("weights too many", "    if more:\n", "    if False:\n"),
    ],
    ("checks/weights.py", f"{WEIGHTS} -k tied"): [
        ("a tied head that differs",
         "if head.dtype != embedding.dtype or not torch.equal(head, embedding):", "if False:"),
    ],
    ("checks/weights.py", f"{CONFIG} -k layers"): [
        ("layers not counted", "if len(layers) != config.num_hidden_layers:", "if False:"),
    ],
    ("checks/hub.py", f"{HUB} -k refs or places"): [
        ("an empty refs/main leads to snapshots/", 'if re.fullmatch("[0-9a-f]{6,64}", commit) and', "if"),
    ],
    ("checks/hub.py", f"{HUB} -k fetched"): [
        ("a tokenizer's files are taken for a model", "commit) and whole(snapshot):", 'commit) and os.path.exists(snapshot / "config.json"):'),
    ],
    ("checks/command.py", f"{COMMAND} -k ignored"): [
        ("ignored signals are answered", "if signal.getsignal(number) != signal.SIG_IGN:", "if True:"),
    ],
    ("checks/command.py", f"{COMMAND} -k becomes"): [
        ("a signal that Python swallows is lost",
         "            if arrived:                                 # whatever",
         "            if False:                                 # whatever"),
        ("a signal in a finaliser is lost",
         "        if arrived:                                     # came",
         "        if False:                                     # came"),
    ],
    ("checks/command.py", f"{COMMAND} -k reasons"): [
        ("no figure for a lack of memory", "        if wanted:\n", "        if False:\n"),
    ],
    ("checks/command.py", "tests/test_generate.py -k slot_file"): [
        ("a slip in one's own slot.py becomes a line without a place", " or not on_purpose(error):", ":"),
        ("what a slot.py refuses on purpose shows as a traceback", "(ours or last.filename == slot)", "ours"),
    ],
    ("checks/command.py", f"{COMMAND} -k wrong_options"): [
        ("options may be cut short", "allow_abbrev=False", "allow_abbrev=True"),
    ],
    ("checks/command.py", f"{COMMAND} -k wrong_options or number"): [
        ("numbers may reach their open end", "or (above and value == low):", "or False:"),
    ],
    ("generate.py", f"{COMMAND} -k extreme"): [
        ("a temperature of 1e-46 in float32", "logits = logits.cpu().double()", "logits = logits.cpu()"),
    ],
    ("generate.py", f"{COMMAND} -k saved"): [
        ("a device to be written is not looked for before the work", "            check_target(target)",
         "            pass  #"),
    ],
    ("checks/options.py", "tests/test_generate.py -k impossible"): [
        ("a negative temperature", "if not (temperature >= 0 and", "if not ("),
    ],
    ("checks/prompts.py", f"{PROMPTS} -k misspelt"): [
        ("misspelt keys pass", 'or entry.keys() - {"prompt", "system"} or', "or"),
        ("lines counted without the empty ones", 'where = f"{file}: line {place}: "',
         'where = f"{file}: line {len(found) + 1}: "'),
    ],
    ("checks/prompts.py", f"{PROMPTS} -k odd or mark"): [
        ("a byte-order mark is part of the prompt", ".removeprefix(codecs.BOM_UTF8)", ""),
    ],
    ("checks/prompts.py", f"{PROMPTS} -k cut"): [
        ("a cut object is a prompt", "if re.match(r'\\s*{\\s*\"', line):", "if False:"),
    ],
    ("tiny/train.py", f"{TRAIN} -k overwrite"): [
        ("training writes over a finished model", "    if finished and not overwrite:", "    if False:"),
    ],
    ("tiny/train.py", f"{TRAIN} -k goes_on"): [
        ("training goes on from the first problem again", 'step, seen = state["step"], state["tokens"]',
         'seen = state["tokens"]'),
    ],
    ("checks/config.py", LAW): [
        ("the reader of config.json takes the activation for granted",
         'if raw.get("hidden_act") not in ("silu", "swish"):', "if False:"),
    ],
}
