"""The mistakes that mutations.py plants in study/: {(file, tests):
[(description, old text, new text), ...]}."""
RUN = "tests/test_study_run.py"
RESULTS = "tests/test_study_results.py"
SCORING = "tests/test_study_scoring.py"
STATS = "tests/test_study_stats.py"
REPORT = "tests/test_study_report.py"
TASKS = "tests/test_study_tasks.py"

TABLE = {
    ("study/measure.py", RUN): [
        ("study: the answer's loss of an edited decode by steer", "if self.as_written else self.told(i", "if True else self.told(i"),
        ("study: δ of the sample's own prompt as wrong-prompt",
         'source = self.partner[i] if setting.what == "wrong-prompt" else i', "source = i"),
        ("study: a random δ of any norm", "delta = noise * (delta.norm() / noise.norm())", "delta = noise"),
        ("study: unigram bias with its mean", "    log_counts -= log_counts.mean()\n", ""),
        ("study: the reference answer read without the prompt", "self.lm.model(tokens, copy.copy(cache))",
         "self.lm.model(tokens)"),
        ("study: the prompt's loss of one token too few",
         "prompt = Text(self.lm.lm_head, self.hiddens[i][0, :-1], ids[1:])",
         "prompt = Text(self.lm.lm_head, self.hiddens[i][0, :-2], ids[1:-1])"),
        ("study: losses without δ", "return lambda logits, *others: steered(logits, W_delta, *others)",
         "return lambda logits, *_: logits"),
        ("study: unigram answers without the bias",
         "lambda logits, bias=bias: slot.likeliest(logits + bias)",
         "lambda logits, bias=bias: slot.likeliest(logits)"),
        ("study: the end token not counted", "tokens=len(ids) + (len(ids) < self.new))",
         "tokens=len(ids))"),
        ("study: alignment of the predictions alone",
         "residual -= torch.bincount(targets, minlength=self.vocabulary)", "pass"),
        ("study: slot.steer is not told how long the answer is", "torch.arange(self.count) * answer", "torch.arange(self.count) * 0"),
        ("study: kept logits handed out to be changed", "logits.to(torch.float32, copy=True)",
         "logits.to(torch.float32)"),
    ],
    ("study/results.py", f"{RESULTS} {RUN}"): [
        ("study: slot.py not in the fingerprint", 'SOURCE = ("slot.py", "generate.py"',
         'SOURCE = ("generate.py"'),
    ],
    ("study/results.py", RESULTS): [
        ("study: the --slot-file not in the fingerprint",
         "return found | (slot_file_digests(slot_file) if slot_file else {})", "return found"),
        ("study: what a --slot-file imports not in the fingerprint", "return beside | {", "return {"),
        ("study: results that contradict each other, the last one counts",
         "if key in places and self.rows[key] | dict(seconds=None) != row | dict(seconds=None):",
         "if False:"),
        ("study: a loss that is no number taken up",
         "if type(value) is float and not math.isfinite(value) or type(value) is int and value < 0:",
         "if False:"),
    ],
    ("study/results.py", RUN): [
        ("study: end ids not in the fingerprint", 'if path.suffix in (".json", ".jinja", ".safetensors")',
         'if path.suffix in (".safetensors",)'),
        ("study: a torn last line kept", "os.ftruncate(self.file, whole)", "pass"),
    ],
    ("study/settings.py", RUN): [
        ("study: settings named by six digits", "{self.lr!r}", "{self.lr:g}"),
    ],
    ("study/scoring.py", SCORING): [
        ("scoring: the first mark counts", "_, start, end = max(marks)", "_, start, end = min(marks)"),
        ("scoring: flexible loses the sign", 'return last_is(r"-?', 'return last_is(r"'),
    ],
    ("study/scoring.py", f"{SCORING} -k babble"): [
        ("scoring: the last line's number in a time that is squared", "(?:[\\d,]*(?<=\\d)|[\\d,]*\\.\\d+)",
         "[\\d,]*\\.?\\d+"),
    ],
    ("study/stats.py", STATS): [
        ("stats: Holm's p-values may fall",
         "largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))",
         "largest = min(1.0, (len(p_values) - rank) * p_values[i])"),
        ("stats: a sign test with one side", "2 * tail / 2 ** n", "tail / 2 ** n"),
        ("stats: equal values ranked as they come", "return_index=True, return_inverse=True)",
         "return_index=True, return_inverse=True) if False else (0, np.arange(len(values)), "
         "np.arange(len(values)))"),
    ],
    ("study/report.py", REPORT): [
        ("report: gains without Holm's correction", 'if better(table, point, "strict", p=p[1]):',
         'if better(table, point, "strict"):'),
        ("report: the plot's half chosen on the half that is reported",
         'halves = tables_of([row for row in rows if row["sample"] in held])',
         'halves = tables_of([row for row in rows if row["sample"] not in held])'),
    ],
    ("study/tasks.py", TASKS): [
        ("tasks: GSM8K's worked example among those asked",
         "problems = problems[args.skip:end][:args.limit]", "problems = problems[args.skip:][:args.limit]"),
        ("tasks: the right option always first",
         '    random.Random(f"{args.seed} {place}").shuffle(options)\n', ""),
    ],
}
