"""
python -m study: every figure against the same figure computed alone and at length; a run killed at
several moments against a run left in peace; what another run must not take up.
"""
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import forks
from study_model import NEW, ROOT, by_key, facts, make, options, read, study, timeless

from load_weights import load_model
from slot import decode, generate, optimize_delta
from study import measure, run
from study.__main__ import parse_arguments
from study.measure import Study, Text, unigram
from study.settings import Setting, all_settings
from study.tasks import read_problems, tokenized
from tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("without_a_child")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """One undisturbed run: 12 samples, 3 kinds, plain + 2 points + 3 controls of each."""
    out = tmp_path_factory.mktemp("whole")
    run.main(parse_arguments(options(folder, out)))
    return out


def loaded(folder, *more):
    """-> Study, as run.py makes it."""
    args = parse_arguments(options(folder, "unused", *more))
    lm, tokenizer = load_model(folder), load_tokenizer(folder)
    problems, left_out = tokenized(args, read_problems(args), tokenizer, 400)
    assert left_out == 0
    return Study(args, lm, tokenizer, problems, NEW)


# ---- the figures

def test_every_sample_meets_every_setting_once(whole):
    rows = read(whole)
    settings = all_settings(parse_arguments(["--steps", "0,1,3", "--lr", "0.1"]))
    names = [setting.name for setting in settings]
    assert len(names) == 1 + 2 * 4
    assert sorted((row["sample"], row["setting"]) for row in rows) == sorted((i, name) for i in range(12) for name in names)
    assert [{row["kind"] for row in rows if row["sample"] == i} for i in (0, 4, 11)] == [{"common"}, {"rare"}, {"unseen"}]


@torch.no_grad()
def cross_entropy(lm, prompt, ids, delta):
    """Mean loss of `ids` behind `prompt`, the long way: one pass over all tokens, h + δ."""
    tokens = torch.tensor([prompt + ids])
    logits = lm.lm_head(lm.model(tokens) + delta)[0, len(prompt) - 1:-1]
    return F.cross_entropy(logits, torch.tensor(ids)).item()


def test_figures_against_each_sample_alone(folder, whole):
    """The run shares a prefill, decodes in a batch and adds W δ to logits; here each prompt goes alone, with h + δ."""
    known = loaded(folder)
    lm, tokenizer, rows = known.lm, known.tokenizer, by_key(whole)
    partner = [1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8]                    # the next of its kind, around
    for i in (0, 3, 6, 11):
        p = known.problems[i]
        prompt, reference = p.ids, tokenizer.encode(p.reference)[:NEW]
        assert prompt == tokenizer.chat_ids([dict(role="user", content=p.question)])
        for setting, other, steps in (("plain", i, 0), ("slot 1 0.1", i, 1), ("slot 3 0.1", i, 3), ("wrong-prompt 3 0.1", partner[i], 3)):
            fitted_on = known.problems[other].ids
            delta, _ = optimize_delta(lm.model(torch.tensor([fitted_on])).detach(), fitted_on, lm.lm_head, steps, 0.1)
            row = rows[i, setting]
            assert row["prompt"] == p.question and row["gold"] == p.gold
            assert row["answer_loss"] == pytest.approx(cross_entropy(lm, prompt, reference, delta), abs=1e-4)
            assert row["prompt_loss"] == pytest.approx(cross_entropy(lm, prompt[:1], prompt[1:], delta), abs=1e-4)
            if other == i:
                alone = list(generate(lm, prompt, NEW, steps=steps, lr=0.1, eos_ids=tokenizer.eos_ids))
                assert row["answer"] == tokenizer.decode(alone, skip_special=True)
                assert row["tokens"] == len(alone) + (len(alone) < NEW)     # the end token counts
        assert rows[i, "slot 3 0.1"]["prompt_loss"] < rows[i, "slot 1 0.1"]["prompt_loss"] < rows[i, "plain"]["prompt_loss"]


def test_the_end_token_counts(tmp_path):
    """The embedded model, whose answers end: what generate.py would say, and one token more."""
    run.main(parse_arguments(["--limit", "1", "--steps", "3", "--lr", "0.1", "--control", "none", "--out", str(tmp_path)]))
    lm, tokenizer = load_model(ROOT / "tiny"), load_tokenizer(ROOT / "tiny")
    for row in read(tmp_path):
        ids = tokenizer.chat_ids([dict(role="user", content=row["prompt"])])
        steps = 3 if row["setting"] == "slot 3 0.1" else 0
        alone = list(generate(lm, ids, 96, steps=steps, lr=0.1, eos_ids=tokenizer.eos_ids))
        assert row["answer"] == tokenizer.decode(alone, skip_special=True) and row["tokens"] == len(alone) + 1 < 96
        assert row["strict"] == row["flexible"] == (f"#### {row['gold']}" in row["answer"]) and row["format"]


def test_the_unigram_answer_is_the_likeliest_of_logits_and_bias(folder, whole):
    known, rows = loaded(folder), by_key(whole)
    for i in (0, 11):
        ids, bias, prompt = [], known.effect(i, Setting("unigram", 3, 0.1))[1], known.problems[i].ids
        while len(ids) < NEW:
            with torch.no_grad():
                hidden = known.lm.model(torch.tensor([prompt + ids]))
                id = (known.lm.lm_head(hidden)[0, -1] + bias).argmax().item()
            if id in known.tokenizer.eos_ids:
                break
            ids.append(id)
        assert rows[i, "unigram 3 0.1"]["answer"] == known.tokenizer.decode(ids, skip_special=True)


@torch.no_grad()
def test_controls_have_the_norm_of_slot(folder):
    known = loaded(folder)
    for i in (2, 3):
        delta = known.effect(i, Setting("slot", 3, 0.1))[0].flatten()
        noise = known.effect(i, Setting("random", 3, 0.1))[0].flatten()
        assert noise.norm() == pytest.approx(delta.norm().item(), rel=1e-4)
        assert abs(F.cosine_similarity(noise, delta, dim=0)) < 0.7
        again = known.effect(i, Setting("random", 1, 0.1))[0].flatten()     # one direction at every point
        assert F.cosine_similarity(noise, again, dim=0) > 0.9999
        none, counts, _ = known.effect(i, Setting("unigram", 3, 0.1))
        words = known.lm.lm_head(delta)
        words = words - words.mean()
        assert none is None and counts.norm() == pytest.approx(words.norm().item(), rel=1e-4)
        logs = torch.bincount(torch.tensor(known.problems[i].ids), minlength=768).float().log1p()
        assert F.cosine_similarity(counts, logs - logs.mean(), dim=0) > 0.99999
    a, b = (known.effect(i, Setting("random", 3, 0.1))[0].flatten() for i in (2, 3))
    assert abs(F.cosine_similarity(a, b, dim=0)) < 0.7                  # a sample's noise is its own
    assert torch.equal(known.effect(2, Setting("wrong-prompt", 3, 0.1))[0], known.effect(3, Setting("slot", 3, 0.1))[0])
    assert torch.equal(known.effect(3, Setting("wrong-prompt", 3, 0.1))[0], known.effect(0, Setting("slot", 3, 0.1))[0])


def test_a_constant_changes_no_unigram():
    like = torch.randn(10)
    assert torch.allclose(unigram([5, 7, 7], like), unigram([7, 5, 7], like + 3), atol=1e-6)
    assert unigram([5, 7, 7], like).argmax() == 7


def test_long_texts_go_through_the_head_in_pieces(folder, monkeypatch):
    """Where the logits of a text do not fit, they are made anew, some positions at a time: the same figures."""
    known = loaded(folder)
    hidden, ids = torch.randn(50, 32), torch.randint(768, (50,)).tolist()
    shift = torch.randn(768)
    kept = Text(known.lm.lm_head, hidden, ids)
    monkeypatch.setattr(measure, "KEPT", 7 * 768)
    monkeypatch.setattr(measure, "PIECE", 3 * 768)
    pieces = Text(known.lm.lm_head, hidden, ids)
    assert kept.kept is not None and pieces.kept is None and len(pieces.blocks) == 8
    assert [len(logits) for logits, *_ in pieces.logits()] == [3, 3, 1] * 7 + [1]
    for change in (lambda logits, *_: logits, lambda logits, *_: logits.add_(shift)):       # also one that works in place
        assert pieces.loss(change) == pytest.approx(kept.loss(change), abs=1e-6)
    assert kept.loss(lambda logits, *_: logits) == pytest.approx(F.cross_entropy(known.lm.lm_head(hidden), torch.tensor(ids)).item(), abs=1e-6)
    assert torch.allclose(pieces.gradient(), kept.gradient(), atol=1e-5)


def test_alignment_is_the_cosine_of_two_gradients(folder, whole):
    """The closed form against autograd through h + δ."""
    known, rows = loaded(folder), by_key(whole)
    for i in (0, 5, 11):
        p, gradients = known.problems[i], []
        reference = known.tokenizer.encode(p.reference)[:NEW]
        for before, ids in ((p.ids[:1], p.ids[1:]), (p.ids, reference)):
            delta = torch.zeros(32, requires_grad=True)
            with torch.no_grad():
                hidden = known.lm.model(torch.tensor([before + ids]))[0, len(before) - 1:-1]
            F.cross_entropy(known.lm.lm_head(hidden + delta), torch.tensor(ids)).backward()
            gradients.append(delta.grad)
        assert rows[i, "plain"]["alignment"] == pytest.approx(F.cosine_similarity(*gradients, dim=0).item(), abs=1e-4)
        assert "alignment" not in rows[i, "slot 1 0.1"]


def test_results_do_not_depend_on_the_batch(folder, whole, tmp_path):
    run.main(parse_arguments([*options(folder, tmp_path), "--batch", "2"]))
    a, b = by_key(whole), by_key(tmp_path)
    for key in a:
        assert a[key]["answer"] == b[key]["answer"]
        assert a[key]["answer_loss"] == b[key]["answer_loss"]           # never came near another row


def test_without_speed_the_same(folder, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "speed", None)
    monkeypatch.setattr(run, "speed", None)
    run.main(parse_arguments(options(folder, tmp_path)))
    a, b = by_key(whole), by_key(tmp_path)
    assert a.keys() == b.keys()
    for key, row in a.items():              # decode itself is asked for the answer's loss, token by token
        loss = pytest.approx(row["answer_loss"], abs=1e-5)
        assert b[key] | dict(seconds=None) == row | dict(seconds=None, answer_loss=loss)


def test_the_closed_form_gives_the_same(folder, whole, tmp_path):
    run.main(parse_arguments(options(folder, tmp_path, "--slot-fast")))
    a, b = by_key(whole), by_key(tmp_path)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key]["answer"] == b[key]["answer"]
        assert a[key]["answer_loss"] == pytest.approx(b[key]["answer_loss"], abs=1e-4)


def test_losses_alone_are_those_of_the_whole_run(folder, whole, tmp_path):
    run.main(parse_arguments(options(folder, tmp_path, "--only", "loss")))
    full = by_key(whole)
    for key, row in by_key(tmp_path).items():
        assert "answer" not in row and "strict" not in row and "tokens" not in row
        assert {name: row[name] for name in row if name != "seconds"}.items() <= full.pop(key).items()
    assert not full
    text = facts(tmp_path)
    assert "accuracy" not in text.lower() and "## Alignment" in text and "| lr 0.1, 3 steps |" in text
    assert text.split("## Alignment")[1] == facts(whole).split("## Alignment")[1]


def test_a_task_from_a_file_runs_through(folder, tmp_path):
    (tmp_path / "gpqa.csv").write_text("Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\n" + "Which?,this,a,b,c\n" * 5)
    args = parse_arguments(["--task", "gpqa", "--data", str(tmp_path / "gpqa.csv"), "--model", str(folder), "--out", str(tmp_path / "out"), "--steps", "2",
                            "--lr", "0.1", "--control", "wrong-prompt", "--split", "tune,test", "--max-new-tokens", "4", "--batch", "2", "--shots", "1"])
    run.main(args)
    rows, text = read(tmp_path / "out"), facts(tmp_path / "out")
    assert len(rows) == 4 * 3 and {row["paper"] for row in rows} == {row["flexible"] for row in rows} == {None}   # the fifth is the example
    assert "strict finds 5 right, the paper's rule knows no such" in text and "## gpqa: 2 samples" in text and "| gpqa | lr 0.1, 2 steps | 2 |" in text
    assert all("| – | – | – |" in line for line in text.splitlines() if line.startswith(("| plain", "| lr")))


def test_points_and_controls_at_some(folder, tmp_path):
    """What is no grid: 1 and 3 steps at 0.1, 3 at 0.01, the controls at one of them."""
    run.main(parse_arguments(["--model", str(folder), "--out", str(tmp_path), "--limit", "2", "--max-new-tokens", "3", "--points", "3:0.1,1:0.1,3:.01",
                              "--control", "unigram", "--control-points", "1:0.1"]))
    assert {row["setting"] for row in read(tmp_path)} == {"plain", "slot 3 0.01", "slot 1 0.1", "slot 3 0.1", "unigram 1 0.1"}
    controls = facts(tmp_path).split("## Controls")[1].split("## Why")[0]
    assert controls.count("lr 0.1, 1 step |") == 3 and "3 steps" not in controls


def deaf_decode(lm, hidden, cache, new, delta=None, choose=None, eos_ids=()):
    return decode(lm, hidden, cache, new, None, choose, eos_ids)


def test_an_edited_decode_answers(folder, whole, tmp_path, monkeypatch, capsys):
    """One that knows no δ: in every setting the plain answers and the plain loss of the reference."""
    monkeypatch.setattr(measure.slot, "decode", deaf_decode)
    run.main(parse_arguments(options(folder, tmp_path)))
    a, b = by_key(whole), by_key(tmp_path)
    assert any(a[key]["answer"] != b[key]["answer"] for key in a)
    for (sample, setting), row in b.items():
        like = setting if setting.startswith("unigram") else "plain"
        assert row["answer_loss"] == pytest.approx(a[sample, like]["answer_loss"], abs=1e-5)
        assert row["answer"] == a[sample, like]["answer"] and row["prompt_loss"] == a[sample, setting]["prompt_loss"]


def test_steer_is_told_where_it_stands(folder, monkeypatch):
    """h, and how many tokens of the answer came before: one at a time, and 0 for all of the prompt."""
    known, seen = loaded(folder), []
    monkeypatch.setattr(measure, "PIECE", 5 * 768)
    hidden, ids = torch.randn(12, 32), torch.randint(768, (12,)).tolist()
    monkeypatch.setattr(measure.slot, "steer", lambda logits, W_delta, *others: seen.append(others) or logits)
    for answer in (False, True):
        Text(known.lm.lm_head, hidden, ids, answer).loss(known.change(torch.zeros(1, 1, 32), None))
        assert torch.equal(torch.cat([h for h, _ in seen]), hidden)
        assert [count for _, count in seen] == ([*range(12)] if answer else [0] * 3)        # numbers, as in decode
        seen.clear()


def test_a_loss_that_is_no_number_stops_the_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(measure.slot, "steer", lambda logits, *_: logits / 0)
    with pytest.raises(ValueError, match="^sample 0, slot 1 0.1: a loss is not a finite number; lower the learning rate$"):
        run.main(parse_arguments(options(folder, tmp_path)))


def test_wrong_prompt_needs_two(folder, tmp_path):
    with pytest.raises(ValueError, match="needs two samples of each kind"):
        run.main(parse_arguments(["--model", str(folder), "--out", str(tmp_path), "--limit", "1"]))


# ---- quick

def test_quick_prints_a_line_for_each_setting_and_keeps_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run.main(parse_arguments(["--quick", "--model", str(folder), "--limit", "3", "--max-new-tokens", "4"]))
    out = capsys.readouterr().out.splitlines()
    assert "right" in out[0] and "change [95 % CI]" in out[0] and "the loop of slot.py" in out[-1]
    names = ["plain", "lr 0.01, 3 steps", "lr 0.1, 5 steps"]
    assert len(out) == 1 + 9 + 1 and all(kind in line and name in line for line, (kind, name) in zip(
        out[1:], [(kind, name) for kind in ("common", "rare", "unseen") for name in names]))
    assert list(tmp_path.iterdir()) == []


def test_quick_is_the_study_on_fewer(folder, whole, capsys):
    """The same problems and points: the same figures."""
    run.main(parse_arguments([*options(folder, "x")[:2], *options(folder, "x")[4:], "--quick"]))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("rare        lr 0.1, 3 steps"))
    rows = [row for row in read(whole) if row["kind"] == "rare" and row["setting"] == "slot 3 0.1"]
    assert f"{sum(row['answer_loss'] for row in rows) / 4:.4f}" in line and f"{sum(row['prompt_loss'] for row in rows) / 4:.4f}" in line
    assert f"{sum(row['strict'] for row in rows)}/4" in line


# ---- killed and taken up again

def start(folder, out):
    return forks.Fork(["-m", "study", *options(folder, out)])


def test_kill_9_loses_nothing_and_repeats_nothing(folder, whole, tmp_path):
    out = tmp_path / "run"
    for lines in (1, 40, 80):                                       # killed as soon as it has written so many
        process = start(folder, out)
        while process.poll() is None and (not (out / "results.jsonl").exists() or (out / "results.jsonl").read_bytes().count(b"\n") < lines):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with open(out / "results.jsonl", "ab") as file:
        file.write(b'{"sample": 11, "kind": "uns')                      # as a machine that loses its power leaves it
    _, errors = start(folder, out).communicate(timeout=300)
    assert "repaired a torn last line of 27 bytes" in errors and "Traceback" not in errors
    rows = read(out)
    assert len({(row["sample"], row["setting"]) for row in rows}) == len(rows) == 12 * 9
    assert timeless(rows) == timeless(read(whole))                      # bit for bit
    assert facts(out) == facts(whole)


def test_a_finished_run_only_reports_again(folder, whole, capsys):
    before = (whole / "results.jsonl").read_bytes()
    run.main(parse_arguments(options(folder, whole)))
    assert "108 of 108 answers are there already" in capsys.readouterr().err
    assert (whole / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("form", [[], ["--slot-fast"]], ids=["loop", "closed_form"])
def test_a_run_of_losses_is_taken_up_in_mid_batch(form, folder, whole, tmp_path):
    """Samples that were measured stay; a sample that lacks a setting gets just that one, with the same bits,
    also where the losses of all settings are one product."""
    arguments = options(folder, tmp_path, "--only", "loss", *form)
    run.main(parse_arguments(arguments))
    lines = (tmp_path / "results.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_bytes(b"".join(lines[:31]))
    run.main(parse_arguments(arguments))
    again = (tmp_path / "results.jsonl").read_bytes().splitlines(keepends=True)
    assert again[:31] == lines[:31] and timeless(map(json.loads, again)) == timeless(map(json.loads, lines))


# ---- what another run must not take up

@pytest.mark.parametrize("more, field", [
    (["--steps", "0,1"], "points"), (["--lr", "0.2"], "points"), (["--lr", "0.1000001"], "points"), (["--limit", "5"], "limit"), (["--seed", "1"], "seed"),
    (["--control", "none"], "control"), (["--control-points", "1:0.1"], "control_points"), (["--max-new-tokens", "9"], "max_new_tokens"),
    (["--shots", "1"], "shots"), (["--batch", "2"], "batch"), (["--only", "loss"], "only"), (["--dtype", "bfloat16"], "dtype"), (["--slot-fast"], "slot_fast")])
def test_other_arguments_are_refused(folder, whole, more, field):
    with pytest.raises(ValueError, match=f"holds a run with another {field}") as error:
        run.main(parse_arguments(options(folder, whole, *more)))
    assert "\n" not in str(error.value) and "--out" in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "config.json"])
def test_another_model_is_refused(folder, whole, tmp_path, name):
    """One bit of the last weight, other end ids, another vocabulary, another template."""
    shutil.copytree(folder, tmp_path / "other")
    data = bytearray((tmp_path / "other" / name).read_bytes())
    if name == "model.safetensors":
        data[-1] ^= 1
    else:
        data += b"\n"
    (tmp_path / "other" / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"another model \\({name} differs\\)") as error:
        run.main(parse_arguments([*options(folder, whole), "--model", str(tmp_path / "other")]))
    assert "--out" in str(error.value)


def test_results_of_other_code_are_refused(folder, tmp_path):
    """An edit of the loop, even of a comment, and of what the reader gives as --slot-file; not one of the report."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "tests", "benchmarks", "exercises", "runs"))
    mine = tmp_path / "mine.py"
    shutil.copy(ROOT / "slot.py", mine)
    small = ["--model", folder, "--limit", "1", "--steps", "1", "--lr", "0.1", "--control", "none", "--max-new-tokens", "2"]
    for out, paths, more in (("a", ["slot.py", "study/tasks.json", "tokenizer/bpe.py"], []), ("b", [mine], ["--slot-file", mine])):
        arguments = [*small, "--out", tmp_path / out, *more]
        assert study(*arguments, root=tree).returncode == 0
        before = (tmp_path / out / "results.jsonl").read_bytes()
        for path in paths:
            text = (tree / path).read_text()
            (tree / path).write_text(text + "\n")
            ended = study(*arguments, root=tree)
            (tree / path).write_text(text)
            line, name = ended.stderr.splitlines()[-1], "--slot-file" if path == mine else path
            assert ended.returncode == 1 and "Traceback" not in ended.stderr and len(ended.stderr.splitlines()) == 1
            assert f"holds results of other code ({name} differs)" in line and f"--out {tmp_path / out}-2" in line
            assert (tmp_path / out / "results.jsonl").read_bytes() == before
        assert study(*arguments, root=tree).returncode == 0                 # undone, it goes on
    report = tree / "study/report.py"
    report.write_text(report.read_text() + "\n")
    assert study(*small, "--out", tmp_path / "a", root=tree).returncode == 0


# ---- the options

@pytest.mark.parametrize("arguments, message", [
    (["--steps", "1,x"], "'x' is not an integer"), (["--steps", "-1"], "at least 0"), (["--lr", "0"], "not a number above 0"), (["--lr", "0.1,nan"], "'nan'"),
    (["--control", "rand"], "'rand' is not a control"), (["--task", "gsm8k"], "needs --data FILE: test.jsonl, at github.com"),
    (["--data", "x"], "--data and --skip are for the other tasks"), (["--skip", "3"], "--data and --skip are for the other tasks"),
    (["--split", "half"], "invalid choice"), (["--limit", "0"], "at least 1"), (["--task", "x"], "invalid choice"), (["--points", "3"], "'3' is not STEPS:RATE"),
    (["--split", "tune,test", "--only", "loss"], "--only loss has none"),
    (["--points", "3:0.1", "--lr", "0.1"], "give --points, or --steps and --lr"), (["--control-points", "4:0.1"], "that SLOT is not run at"),
    (["--only", "speed"], "invalid choice"), (["--slot-file", "nothing.py"], "no such file"),
])
def test_wrong_options_get_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(arguments)
    text = capsys.readouterr().err
    assert end.value.code == 2 and message in text and text.count("\n") == 1


def test_defaults_are_the_study():
    args = parse_arguments([])
    assert (args.task, args.limit, args.batch, args.slot_fast, args.only) == ("tiny", 300, 100, False, None)
    assert args.points == [(s, lr) for lr in (0.01, 0.1) for s in (1, 2, 3, 5, 10, 20)] == args.control_points
    assert args.control == ["random", "unigram", "wrong-prompt"] and args.out == Path("runs/tiny")
    assert parse_arguments(["--steps", "5,1,5", "--lr", "1"]).points == [(1, 1.0), (5, 1.0)] and parse_arguments(["--control", "none"]).control == []
    quick = parse_arguments(["--quick"])
    assert (quick.points, quick.limit, quick.control, quick.out) == ([(3, 0.01), (5, 0.1)], 40, [], None)


def test_learning_rates_that_print_alike_are_two(folder):
    settings = all_settings(parse_arguments(["--lr", "0.1,0.1000001,0.10", "--steps", "3", "--control", "none"]))
    assert [setting.name for setting in settings] == ["plain", "slot 3 0.1", "slot 3 0.1000001"]


@pytest.mark.parametrize("out", ["a-file", "a-file/below", "/proc/nothing"])
def test_results_cannot_be_written(out, folder, tmp_path):
    """Refused before anything is computed, and what lay there is left as it was."""
    (tmp_path / "a-file").write_bytes(b"mine")
    path = out if out.startswith("/") else tmp_path / out
    ended = study("--model", folder, "--limit", "2", "--steps", "1", "--out", path)
    *_, line = ended.stderr.splitlines()
    assert ended.returncode == 1 and out in line and "Traceback" not in ended.stderr and "study     " not in ended.stderr, ended
    assert (tmp_path / "a-file").read_bytes() == b"mine"
