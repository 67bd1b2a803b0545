"""study/tasks.py: problems as their publishers ship them, and what is wrong with a file."""
import csv
import json

import pytest
from study_model import ROOT

from study.__main__ import parse_arguments
from study.tasks import TASKS, read_problems, tokenized
from tokenizer import load_tokenizer

GSM8K = [dict(question=f"How many are {k} and 1,000?", answer=f"{k} + 1000 = <<{k}+1000={k + 1000}>>{k + 1000}\n#### 1,00{k}") for k in range(6)]
GPQA = {"Question": "Which?", "Correct Answer": " the right one\n", "Incorrect Answer 1": "a", "Incorrect Answer 2": "b", "Incorrect Answer 3": "c", "Explanation": "Because."}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "tiny")


def problems(tmp_path, task, records, *more, name="test.jsonl"):
    path = tmp_path / name
    if name.endswith("csv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    args = parse_arguments(["--task", task, "--data", str(path), *more])
    return args, read_problems(args)


def test_gsm8k_file(tmp_path, tokenizer):
    args, found = problems(tmp_path, "gsm8k", GSM8K, "--shots", "2", "--limit", "3")
    assert found[3].reference == "<think>3 + 1000 = 1003</think><answer>1,003</answer>" and found[3].gold == "1,003"
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


def test_the_first_problems_can_be_left_out(tmp_path, tokenizer):
    args, found = problems(tmp_path, "gsm8k", GSM8K, "--skip", "2", "--shots", "1")
    asked, _ = tokenized(args, found, tokenizer, 10_000)
    assert [p.question for p in asked] == [p["question"] for p in GSM8K[2:5]]
    args, found = problems(tmp_path, "gsm8k", GSM8K, "--skip", "6")
    with pytest.raises(ValueError, match="no problem of gsm8k is left.*--skip"):
        tokenized(args, found, tokenizer, 10_000)


def test_gsm8k_with_a_box_has_no_system_text(tmp_path, tokenizer):
    args, found = problems(tmp_path, "gsm8k-boxed", GSM8K)
    assert found[3].reference == "3 + 1000 = 1003\nThe final answer is $\\boxed{1,003}$." and found[3].gold == "1,003"
    asked, _ = tokenized(args, found, tokenizer, 10_000)
    text = tokenizer.decode(asked[0].ids)
    assert text.startswith("<|im_start|>user\nHow many are 0 and 1,000?\n\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>")
    assert "system" not in text and "think" not in text


def test_prompts_are_the_published_ones():
    """Not a letter is changed, though some spaces are missing in the authors' own."""
    assert TASKS["gsm8k"]["system"].endswith("with the answer.The reasoning process and answer are enclosed within <think> </think> and<answer> </answer> tags, "
                                             "respectively, i.e., <think> reasoning process here </think><answer> answer here </answer>.")
    assert TASKS["math500"]["before"] == TASKS["aime24"]["before"] and TASKS["math500"]["before"].endswith("before answering.\n\n")
    assert {task: entry["format"] for task, entry in TASKS.items()} == dict(tiny="hashes", gsm8k="tags", aime24="boxed", math500="boxed", gpqa="letter") | {"gsm8k-boxed": "boxed"}


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


@pytest.mark.parametrize("task, content, message", [
    ("gsm8k", b'{"question": "?"}\n', "record 1 has no 'answer'; gsm8k is test.jsonl"), ("gsm8k", b'{"question": "?", "answer": "no mark"}\n', "record 1 is of another form"),
    ("gsm8k", b'[1]\n', "record 1 is of another form"), ("gsm8k", b'{"question": null, "answer": "#### 1"}\n', "record 1 is of another form"),
    ("gsm8k", b'{"question": "a \\ud800", "answer": "#### 1"}\n', "record 1 is of another form"),
    ("gsm8k", b'{"question": "?", "answer": "#### 1"}\n{"question', "not one JSON object a line after record 1"), ("gsm8k", b"\xff\xfe", "not one JSON object a line"),
    ("gsm8k", b"[" * 100_000, "not one JSON object a line"), ("gsm8k", b"1" * 5000, "not one JSON object a line"), ("gsm8k", b"", "no records"), ("gsm8k", b"\n \n", "no records"),
    ("gpqa", b"Question,Correct Answer\nWhich?,this\n", "record 1 has no 'Incorrect Answer 1'"), ("gpqa", b"Question\n" + b"x" * 200_000, "not csv"),
    ("math500", b'{"problem": 5, "answer": "1"}', "record 1 is of another form"),
])
def test_bad_files_get_one_line(tmp_path, task, content, message):
    path = tmp_path / ("a.csv" if task == "gpqa" else "a.jsonl")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_problems(parse_arguments(["--task", task, "--data", str(path)]))
    assert "\n" not in str(error.value)


def test_missing_files_say_where_they_are_published(tmp_path):
    for task in ("gsm8k", "gsm8k-boxed", "aime24", "math500", "gpqa"):
        with pytest.raises(ValueError, match="is not there: .*, at (github.com|huggingface.co)/"):
            read_problems(parse_arguments(["--task", task, "--data", str(tmp_path / "missing")]))


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    try:
        import pyarrow.parquet
    except ImportError:
        message = "parquet needs pyarrow"
    else:
        message = "not parquet"
        rows = [dict(problem="How many?", solution=None, answer="073")]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "good.parquet")
        found = read_problems(parse_arguments(["--task", "aime24", "--data", str(tmp_path / "good.parquet")]))
        assert [(p.gold, p.reference) for p in found] == [("073", r"$\boxed{073}$")]
    with pytest.raises(ValueError, match=message):
        read_problems(parse_arguments(["--task", "aime24", "--data", str(path)]))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\nWhich?,this,a,b,c\n", encoding="utf-8-sig")
    assert "Which?" in read_problems(parse_arguments(["--task", "gpqa", "--data", str(path)]))[0].question
