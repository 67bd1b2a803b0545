"""study/proxy.py: the cosine with the gradient on the model's own first sentence."""
import json

import pytest

import study_model
from load_weights import load_model
from study import proxy
from study.stats import bootstrap_rank
from tiny.problems import heldout
from tokenizer import load_tokenizer


def test_first_sentence():
    assert proxy.first_sentence("  It costs 3.50 a day. So 7.") == "It costs 3.50 a day."
    assert proxy.first_sentence("<think>\nYes") == "<think>\n"
    assert proxy.first_sentence("no end") == "no end"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return study_model.make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    done = study_model.study(*study_model.options(folder, out))
    assert done.returncode == 0, done.stderr
    return out


def rows_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_with_the_reference_as_answer_it_is_the_alignment(folder, out):
    lm, tokenizer = load_model(folder), load_tokenizer(folder)
    plain = [row for row in rows_of(out) if row["setting"] == "plain" and row["kind"] == "common"]
    assert len(plain) == 4
    for row, problem in zip(plain, heldout("common", 4)):
        ids = tokenizer.chat_ids([{"role": "user", "content": row["prompt"]}])
        answer = tokenizer.encode(problem.answer)[:study_model.NEW]
        assert proxy.cosine(lm, ids, answer) == pytest.approx(row["alignment"], abs=1e-4)


def test_the_table(folder, out, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))         # a name does as well as a folder
    (tmp_path / "slot-models").mkdir()
    (tmp_path / "slot-models/toy").symlink_to(folder)
    proxy.main(proxy.parse_arguments([str(out), "--model", "toy"]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["slot 1 0.1", "slot 3 0.1"]
    rows = {(row["sample"], row["setting"]): row for row in rows_of(out)}
    samples = sorted(sample for sample, setting in rows if setting == "plain")
    plain, fitted = ([rows[i, setting] for i in samples] for setting in ("plain", "slot 3 0.1"))
    true = bootstrap_rank([row["alignment"] for row in plain],
                          [a["answer_loss"] - b["answer_loss"] for a, b in zip(plain, fitted)])
    assert f"| {len(samples)} | {true[0]:+.4f}" in lines[3]


def test_a_run_without_answers_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"sample": 0, "setting": "plain", "kind": "common"}\n')
    with pytest.raises(ValueError, match="the folder of a run that decoded"):
        proxy.main(proxy.parse_arguments([str(tmp_path), "--model", "x"]))


def test_files_of_replicas_are_one_run(folder, out, capsys, tmp_path):
    """And a run whose plain answers are still missing is refused."""
    lines = (out / "results.jsonl").read_text().splitlines(True)
    proxy.main(proxy.parse_arguments([str(out), "--model", str(folder)]))
    whole = capsys.readouterr().out
    for name, part in (("results.jsonl", lines[::2]), ("results-1.jsonl", lines[1::2])):
        (tmp_path / name).write_text("".join(part))
    proxy.main(proxy.parse_arguments([str(tmp_path), "--model", str(folder)]))
    assert capsys.readouterr().out == whole
    for name in ("results.jsonl", "results-1.jsonl"):
        (tmp_path / name).write_text("".join(line for line in lines if '"plain"' not in line))
    with pytest.raises(ValueError, match="no plain answers"):
        proxy.main(proxy.parse_arguments([str(tmp_path), "--model", str(folder)]))
