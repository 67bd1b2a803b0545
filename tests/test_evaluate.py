"""
evaluate.py: every figure against the same figure computed alone and at length, a run killed at several moments against a run left
in peace, the problem files, and the report on results whose statistics are known.

The model is small and random, in the embedded model's folder format; its answers are nonsense, which these tests do not mind.
"""
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import evaluate
import report
from evaluate import Batch, Results, all_settings, name_of, parse_arguments, unigram
from generate import generate
from load_weights import load_model
from model import CausalLM, Config
from slot import optimize_delta
from stats import sign_test, wilson
from tasks import read_problems, tokenized
from tokenizer import load_tokenizer

NEW = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tiny/ with one small layer of random weights."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "tiny" / name, folder)
    config = json.loads((ROOT / "tiny/config.json").read_text()) | dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, max_window_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    weights = {k: 0.4 * torch.randn_like(v) for k, v in CausalLM(Config.from_folder(folder)).state_dict().items() if k != "lm_head.weight"}
    header, data = {}, b""
    for name, w in weights.items():
        raw = w.numpy().tobytes()
        header[name] = dict(dtype="F32", shape=list(w.shape), data_offsets=[len(data), len(data) + len(raw)])
        data += raw
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def options(folder, out, *more):
    return ["--model", str(folder), "--out", str(out), "--limit", "4", "--batch", "3", "--steps", "0,1,3", "--lr", "0.1", "--max-new-tokens", str(NEW), *more]


def read(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def without_seconds(rows):
    return sorted((json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in rows))


def facts(out):
    """The summary up to the section that two runs need not share."""
    text = (out / "summary.md").read_text(encoding="utf-8")
    assert "\n## Time\n" in text
    return text.split("\n## Time\n")[0]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """One undisturbed run: 12 samples, 3 kinds, plain + 2 settings + 3 controls of each."""
    out = tmp_path_factory.mktemp("whole")
    evaluate.main(parse_arguments(options(folder, out)))
    return out


# ---- the figures

def test_every_sample_meets_every_setting_once(whole):
    rows = read(whole)
    names = [name_of(*setting) for setting in all_settings(parse_arguments(["--steps", "0,1,3", "--lr", "0.1"]))]
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
    """The batch shares one forward pass, pads, and adds W δ to logits; here each prompt goes alone, with h + δ."""
    args = parse_arguments(options(folder, "unused"))
    lm, tokenizer = load_model(folder), load_tokenizer(folder)
    problems, left_out = tokenized(args, read_problems(args), tokenizer, 400)
    assert left_out == 0
    rows = {(row["sample"], row["setting"]): row for row in read(whole)}
    partner = [1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8]                    # the next of its kind, around
    for i in (0, 3, 6, 11):
        p = problems[i]
        prompt, reference = p.ids, tokenizer.encode(p.reference)[:NEW]
        assert prompt == tokenizer.chat_ids([dict(role="user", content=p.question)])
        for setting, other, steps in (("plain", i, 0), ("slot 1 0.1", i, 1), ("slot 3 0.1", i, 3), ("wrong-prompt 3 0.1", partner[i], 3)):
            fitted_on = torch.tensor([problems[other].ids])
            delta, _ = optimize_delta(lm.model(fitted_on).detach(), fitted_on, lm.lm_head, steps, 0.1)
            row = rows[i, setting]
            assert row["prompt"] == p.question and row["gold"] == p.gold
            assert row["answer_loss"] == pytest.approx(cross_entropy(lm, prompt, reference, delta), abs=1e-4)
            assert row["prompt_loss"] == pytest.approx(cross_entropy(lm, prompt[:1], prompt[1:], delta), abs=1e-4)
            if other == i:
                alone = list(generate(lm, prompt, NEW, slot_steps=steps, slot_lr=0.1, eos_ids=tokenizer.eos_ids))
                assert row["answer"] == tokenizer.decode(alone, skip_special=True) and row["tokens"] == len(alone)
        assert rows[i, "slot 3 0.1"]["prompt_loss"] < rows[i, "slot 1 0.1"]["prompt_loss"] < rows[i, "plain"]["prompt_loss"]


@torch.no_grad()
def test_controls_have_the_norm_of_slot(folder):
    args = parse_arguments(options(folder, "unused"))
    lm, tokenizer = load_model(folder), load_tokenizer(folder)
    problems, _ = tokenized(args, read_problems(args), tokenizer, 400)
    batch = Batch(args, lm, tokenizer, problems, [2, 3], [3, 0], NEW)
    W, delta = lm.lm_head.weight, batch.delta(3, 0.1)
    solve = lambda bias: torch.linalg.lstsq(W, bias[:, 0].T).solution.T                     # back from W δ to δ
    assert torch.allclose(solve(batch.bias("slot", 3, 0.1)), delta[:, 0], atol=1e-4)
    noise = solve(batch.bias("random", 3, 0.1))
    assert torch.allclose(noise.norm(dim=1), delta[:, 0].norm(dim=1), rtol=1e-3) and F.cosine_similarity(noise, delta[:, 0]).abs().max() < 0.7
    other = Batch(args, lm, tokenizer, problems, [3], [0], NEW)                             # a sample's noise is its own
    assert torch.allclose(solve(other.bias("random", 3, 0.1))[0], noise[1], rtol=1e-3, atol=1e-5)
    centred = lambda bias: bias[:, 0] - bias[:, 0].mean(1, keepdim=True)
    counts, words = centred(batch.bias("unigram", 3, 0.1)), centred(batch.bias("slot", 3, 0.1))
    assert torch.allclose(counts.norm(dim=1), words.norm(dim=1), rtol=1e-4)
    for row, place in enumerate((2, 3)):
        logs = torch.bincount(torch.tensor(problems[place].ids), minlength=768).float().log1p()
        assert F.cosine_similarity(counts[row], logs - logs.mean(), dim=0) > 0.99999


def test_unigram_ignores_padding():
    tokens, like = torch.tensor([[0, 0, 5, 7, 7]]), torch.randn(1, 1, 10)
    mask = torch.tensor([[False, False, True, True, True]])
    assert torch.allclose(unigram(tokens, mask, like), unigram(tokens[:, 2:], None, like), atol=1e-6)


def test_results_do_not_depend_on_the_batch(folder, whole, tmp_path):
    evaluate.main(parse_arguments([*options(folder, tmp_path), "--batch", "2"]))
    a, b = ({(row["sample"], row["setting"]): row for row in read(out)} for out in (whole, tmp_path))
    for key in a:
        assert a[key]["answer"] == b[key]["answer"]
        assert a[key]["answer_loss"] == pytest.approx(b[key]["answer_loss"], abs=1e-4)


def test_a_task_from_a_file_runs_through(folder, tmp_path):
    (tmp_path / "gpqa.csv").write_text("Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\n" + "Which?,this,a,b,c\n" * 5)
    args = parse_arguments(["--task", "gpqa", "--data", str(tmp_path / "gpqa.csv"), "--model", str(folder), "--out", str(tmp_path / "out"), "--steps", "2",
                            "--lr", "0.1", "--control", "wrong-prompt", "--split", "tune,test", "--max-new-tokens", "4", "--batch", "2", "--shots", "1"])
    evaluate.main(args)
    rows, text = read(tmp_path / "out"), facts(tmp_path / "out")
    assert len(rows) == 4 * 3 and {row["paper"] for row in rows} == {None}              # four are asked, the fifth is the example
    assert "strict finds 5 right, the paper's rule knows no such" in text and "## gpqa: 2 samples" in text and "| gpqa | lr 0.1, 2 steps | 2 |" in text
    assert all(line.endswith("| – | – |") for line in text.splitlines() if line.startswith(("| plain", "| lr")))


# ---- killed and taken up again

def start(folder, out):
    command = [sys.executable, str(ROOT / "evaluate.py"), *options(folder, out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})


def test_kill_9_loses_nothing_and_repeats_nothing(folder, whole, tmp_path):
    out = tmp_path / "run"
    for lines in (1, 17, 40, 80):                                       # killed as soon as it has written so many
        process = start(folder, out)
        while process.poll() is None and (not (out / "results.jsonl").exists() or (out / "results.jsonl").read_bytes().count(b"\n") < lines):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with open(out / "results.jsonl", "ab") as file:
        file.write(b'{"sample": 11, "kind": "uns')                      # as a machine that loses its power leaves it
    _, errors = start(folder, out).communicate(timeout=300)
    assert b"repaired a torn last line of 27 bytes" in errors and b"Traceback" not in errors
    rows = read(out)
    assert len({(row["sample"], row["setting"]) for row in rows}) == len(rows) == 12 * 9
    assert without_seconds(rows) == without_seconds(read(whole))        # bit for bit
    assert facts(out) == facts(whole)


def test_a_finished_run_only_reports_again(folder, whole, capsys):
    before = (whole / "results.jsonl").read_bytes()
    evaluate.main(parse_arguments(options(folder, whole)))
    assert "108 of 108 answers are there already" in capsys.readouterr().err
    assert (whole / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("more, field", [(["--steps", "0,1"], "steps"), (["--lr", "0.2"], "lr"), (["--limit", "5"], "limit"), (["--seed", "1"], "seed"),
                                         (["--control", "none"], "control"), (["--max-new-tokens", "9"], "max_new_tokens"), (["--shots", "1"], "shots")])
def test_other_arguments_are_refused(folder, whole, more, field):
    with pytest.raises(ValueError, match=f"holds a run with another {field}") as error:
        evaluate.main(parse_arguments(options(folder, whole, *more)))
    assert "\n" not in str(error.value) and "--out" in str(error.value)


def test_another_model_is_refused(folder, whole, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    data = bytearray((tmp_path / "other/model.safetensors").read_bytes())
    data[-1] ^= 1                                                       # one bit of the last weight
    (tmp_path / "other/model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="another model"):
        evaluate.main(parse_arguments([*options(folder, whole), "--model", str(tmp_path / "other")]))


def test_results_file(tmp_path):
    first = Results(tmp_path, dict(a=1))
    with pytest.raises(ValueError, match="another run is writing there"):
        Results(tmp_path, dict(a=1))
    first.add(dict(sample=0, setting="plain", answer="é\n\ud800"))
    first.close()
    with open(tmp_path / "results.jsonl", "ab") as file:
        file.write(b"garbage\n")
    with pytest.raises(ValueError, match="line 2 is damaged"):
        Results(tmp_path, dict(a=1))
    lines = (tmp_path / "results.jsonl").read_bytes().splitlines(keepends=True)
    assert json.loads(lines[0])["answer"] == "é\n?"
    (tmp_path / "arguments.json").unlink()
    with pytest.raises(ValueError, match="arguments.json is missing or damaged"):
        Results(tmp_path, dict(a=1))


# ---- the options

@pytest.mark.parametrize("arguments, message", [
    (["--steps", "1,x"], "'x' is not an integer"), (["--steps", "-1"], "at least 0"), (["--lr", "0"], "not a number above 0"), (["--lr", "0.1,nan"], "'nan'"),
    (["--control", "rand"], "'rand' is not a control"), (["--task", "gsm8k"], "needs --data FILE: test.jsonl, at github.com"),
    (["--data", "x"], "--data is for the other tasks"), (["--split", "half"], "invalid choice"), (["--limit", "0"], "at least 1"), (["--task", "x"], "invalid choice"),
])
def test_wrong_options_get_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(arguments)
    text = capsys.readouterr().err
    assert end.value.code == 2 and message in text and text.count("\n") == 1


def test_defaults_are_the_study():
    args = parse_arguments([])
    assert (args.task, args.steps, args.lr, args.limit) == ("tiny", [0, 1, 2, 3, 5, 10, 20], [0.01, 0.1], 300)
    assert args.control == ["random", "unigram", "wrong-prompt"] and args.out == Path("runs/tiny")
    assert parse_arguments(["--steps", "5,1,5"]).steps == [0, 1, 5] and parse_arguments(["--control", "none"]).control == []


# ---- the problem files

GSM8K = [dict(question=f"How many are {k} and 1,000?", answer=f"{k} + 1000 = <<{k}+1000={k + 1000}>>{k + 1000}\n#### 1,00{k}") for k in range(6)]
GPQA = {"Question": "Which?", "Correct Answer": " the right one\n", "Incorrect Answer 1": "a", "Incorrect Answer 2": "b", "Incorrect Answer 3": "c", "Explanation": "Because."}


def problems(tmp_path, task, records, *more, name="test.jsonl"):
    path = tmp_path / name
    if name.endswith("csv"):
        import csv
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    args = parse_arguments(["--task", task, "--data", str(path), *more])
    return args, read_problems(args)


def test_gsm8k_file(tmp_path, folder):
    args, found = problems(tmp_path, "gsm8k", GSM8K, "--shots", "2", "--limit", "3")
    assert found[3].reference == "<think>3 + 1000 = 1003</think><answer>1,003</answer>" and found[3].gold == "1,003"
    tokenizer = load_tokenizer(folder)
    asked, left_out = tokenized(args, found, tokenizer, 10_000)
    assert [p.question for p in asked] == [p["question"] for p in GSM8K[:3]] and left_out == 0
    text = tokenizer.decode(asked[0].ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.") and text.endswith("0 and 1,000?<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>assistant\n<think>") == 2 and "5 + 1000 = 1005" in text      # the file's last two, solved
    args.shots = 0
    fit, left_out = tokenized(args, [found[0]._replace(question="long " * 200), found[1]], tokenizer, 300)
    assert [p.question for p in fit] == [found[1].question] and left_out == 1
    with pytest.raises(ValueError, match="no prompt of gsm8k fits in 5 tokens"):
        tokenized(args, found, tokenizer, 5)


def test_math_files(tmp_path):
    _, found = problems(tmp_path, "math500", [dict(problem="1/4 + 1/4?", solution=r"It is $\boxed{\frac12}$.", answer=r"\frac{1}{2}", subject="Algebra", level=1)])
    assert found[0].question.endswith("before answering.\n\n1/4 + 1/4?") and found[0].gold == r"\frac{1}{2}" and "boxed{ANSWER}" in found[0].question
    _, found = problems(tmp_path, "aime24", [dict(id=60, problem="How many?", solution=None, answer="073", url="", year="2024")])
    assert found[0].reference == r"$\boxed{073}$" and found[0].gold == "073"


def test_gpqa_options_are_shuffled_by_seed(tmp_path):
    _, found = problems(tmp_path, "gpqa", [GPQA] * 40, name="gpqa_diamond.csv")
    _, again = problems(tmp_path, "gpqa", [GPQA] * 40, name="gpqa_diamond.csv")
    _, other = problems(tmp_path, "gpqa", [GPQA] * 40, "--seed", "1", name="gpqa_diamond.csv")
    assert found == again != other and {p.gold for p in found} == set("ABCD")
    for p in found:
        assert f"\n{p.gold}) the right one" in p.question and p.reference == f"Because.\nAnswer: {p.gold}"


def test_bad_files_get_one_line(tmp_path):
    def fails(task, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            read_problems(parse_arguments(["--task", task, "--data", str(tmp_path / name)]))
        assert "\n" not in str(error.value)

    for task in ("gsm8k", "aime24", "math500", "gpqa"):
        with pytest.raises(ValueError, match="is not there: .*, at (github.com|huggingface.co)/"):
            read_problems(parse_arguments(["--task", task, "--data", str(tmp_path / "missing")]))
    fails("gsm8k", "a.jsonl", b'{"question": "?"}\n', "record 1 has no 'answer'; gsm8k is test.jsonl")
    fails("gsm8k", "a.jsonl", b'{"question": "?", "answer": "no mark"}\n', "record 1 is of another form")
    fails("gsm8k", "a.jsonl", b'[1]\n', "record 1 is of another form")
    fails("gsm8k", "a.jsonl", b'{"question', "not one JSON object a line")
    fails("gsm8k", "a.jsonl", b"\xff\xfe", "not one JSON object a line")
    fails("gsm8k", "a.jsonl", b"", "no records")
    fails("gpqa", "a.csv", b"Question,Correct Answer\nWhich?,this\n", "record 1 has no 'Incorrect Answer 1'")
    try:
        import pyarrow
    except ImportError:
        fails("aime24", "a.parquet", b"PAR1", "parquet needs pyarrow")


# ---- the report

def made_up(right, loss, kind="k", n=40, settings=("plain", "slot 5 0.1", "random 5 0.1", "unigram 5 0.1", "wrong-prompt 5 0.1")):
    """Rows whose settings answer right where `right[setting]` says so, with the losses loss[setting](i)."""
    return [dict(sample=i, kind=kind, setting=s, strict=right[s](i), paper=right[s](i) != (i < 3), format=i % 4 > 0, answer_loss=loss[s](i), prompt_loss=2 + loss[s](i),
                 tokens=10, seconds=dict(prefill=0.1, fit=0.2 * (s != "plain"), decode=0.3)) for i in range(n) for s in settings]


def rows_for_report():
    right = {"plain": lambda i: i < 10, "slot 5 0.1": lambda i: 1 <= i < 31, "random 5 0.1": lambda i: i < 10, "unigram 5 0.1": lambda i: 1 <= i < 29,
             "wrong-prompt 5 0.1": lambda i: i < 9}
    wave = lambda i: 0.01 * ((7 * i) % 5 - 2)
    loss = {"plain": lambda i: 1 + i / 40, "slot 5 0.1": lambda i: 0.8 + i / 40 + wave(i), "random 5 0.1": lambda i: 1.1 + i / 40, "unigram 5 0.1": lambda i: 0.9 + i / 40,
            "wrong-prompt 5 0.1": lambda i: 0.8 + i / 40 - wave(i)}
    return made_up(right, loss)


def test_summary_of_known_results(tmp_path):
    args = parse_arguments(["--steps", "5", "--lr", "0.1", "--out", str(tmp_path)])
    report.write(args, all_settings(args), rows_for_report(), ["A note."])
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("| lr 0.1, 5 steps | **75.0"))
    low, high = wilson(30, 40)
    assert f"| **75.0 [{100 * low:.1f}, {100 * high:.1f}]** u |" in line       # 30 of 40; the unigram bias got 28, no difference
    assert "| 21 / 1 |" in line and f"{sign_test(21, 1):.0e}" in line
    assert "| **-0.2000 [-0.20" in line and "]** w |" in line               # the loss of the wrong prompt is as low
    assert "| 3 |\n" in text                                                # the scorers differ on three
    assert "1 hypotheses (1 settings, 1 kind). After Holm's correction it rose in 1 and fell in 0." in text
    assert "These 2 gains stand in bold. A control reaches 2 of them" in text and "A note." in text
    assert "| lr 0.1, 5 steps | 0.6000 | 0.2000 | 0.3000 | 50.0 |" in text  # 0.2 s of δ beside 0.1 + 0.3 s
    report.write(args, all_settings(args), rows_for_report()[::-1], ["A note."])
    assert (tmp_path / "summary.md").read_text(encoding="utf-8") == text    # the order of the lines does not matter


def test_holm_is_over_all_kinds_and_settings():
    rows = rows_for_report() + [row | dict(kind="other", sample=100 + row["sample"]) for row in rows_for_report()]
    tables = {kind: report.Table([row for row in rows if row["kind"] == kind]) for kind in ("k", "other")}
    p = sign_test(21, 1)
    assert report.holm_of(tables, tables, [(5, 0.1)]) == {kind: {(5, 0.1): [p, pytest.approx(2 * p)]} for kind in tables}


def test_split_chooses_on_one_half_and_reports_the_other(tmp_path):
    """Setting 1 is right on even samples only, where it is chosen; on the odd ones it is never right."""
    names = ["plain", "slot 1 0.1", "slot 2 0.1"]
    right = {"plain": lambda i: i % 2 == 1, "slot 1 0.1": lambda i: i % 2 == 0, "slot 2 0.1": lambda i: i % 2 == 1}
    args = parse_arguments(["--steps", "1,2", "--lr", "0.1", "--control", "none", "--split", "tune,test", "--out", str(tmp_path)])
    report.write(args, all_settings(args), made_up(right, {n: lambda i: 1.0 for n in names}, settings=names), [])
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "| k | lr 0.1, 1 step | 20 | 100.0 | 0.0 [0.0, 16.1] | 0 / 20 |" in text
    assert "| lr 0.1, 1 step | **100.0 [83.9, 100.0]** |" in text               # the tune half


def test_without_matplotlib_the_summary_still_comes(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    args = parse_arguments(["--steps", "5", "--lr", "0.1", "--out", str(tmp_path)])
    report.write(args, all_settings(args), rows_for_report(), [])
    assert "no plot: matplotlib is not installed" in capsys.readouterr().err
    assert (tmp_path / "summary.md").exists() and not (tmp_path / "plot.svg").exists()


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    args = parse_arguments(["--steps", "5", "--lr", "0.1", "--out", str(tmp_path)])
    for _ in range(2):
        report.write(args, all_settings(args), rows_for_report(), [])
        svg = (tmp_path / "plot.svg").read_bytes()
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and b"<svg" in svg
    report.write(args, all_settings(args), rows_for_report(), [])
    assert (tmp_path / "plot.svg").read_bytes() == svg                      # the same results, the same file
