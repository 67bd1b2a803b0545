"""`python -m exercises` as a student and as a lecturer types it, in a copy that was exported into a fresh folder."""
import ast
import inspect
import json
import re
from pathlib import Path

import pytest

import forks
from exercises import handout
from exercises.__main__ import main, parse_arguments, try_out
from exercises.check import ANSWERS, variant
from exercises.handout import HEADER, work_text
from exercises.lessons import EXERCISES

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(ANSWERS.exists(), reason="a copy without solutions")
NUMBERS = list(EXERCISES)


def command(folder, *arguments):
    environment = {"PYTHONDONTWRITEBYTECODE": "1", "HTTPS_PROXY": "http://0.0.0.0:1"}
    return forks.run(["-m", *arguments], folder, environment)


def source_with(edits_of):
    """A work file with all solutions, edited: {number: edits}."""
    parts = [HEADER]
    for number, exercise in EXERCISES.items():
        text = inspect.getsource(exercise.solution)
        for old, new in edits_of.get(number, {}).items():
            place = text.rindex(old)                            # the body comes after the docstring
            text = text[:place] + new + text[place + len(old):]
        parts.append(text)
    return "\n\n".join(parts)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handed") / "out"
    done = command(ROOT, "exercises", "export", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_a_loop_without_end_outside_a_function_ends(tmp_path, monkeypatch):
    """At the top of the file, and where `try` runs the program."""
    import exercises.__main__ as program
    monkeypatch.setattr(program, "SECONDS", 0.3)
    (tmp_path / "work.py").write_text("while True:\n    pass\n")
    with pytest.raises(ValueError, match="^work.py is not done after 0.3 seconds: line [12]: "):
        program.read_work(tmp_path / "work.py")
    (tmp_path / "work.py").write_text(source_with({7: {"keep = back if back < size else 0": "while True: pass"}}))
    monkeypatch.setattr(program, "SECONDS", 1)
    with pytest.raises(ValueError, match="^the program with your function is not done after 1 seconds: line "):
        program.try_out(program.read_work(tmp_path / "work.py"), 7)


# ---- the copy

def test_the_copy_has_no_solution_no_mistake_and_no_answer(copy):
    for path in (copy / "exercises").glob("lesson[1-5]*.py"):
        text, ours = path.read_text(encoding="utf-8"), (ROOT / "exercises" / path.name).read_text(encoding="utf-8")
        assert "mistakes=[]," in text and "answer=\"\"" in text and len(text) < len(ours)
        ast.parse(text)
    everything = "".join(path.read_text(encoding="utf-8") for path in (copy / "exercises").glob("*.py"))
    assert "Mistake(\n" not in everything and 'Mistake("' not in everything
    for exercise in EXERCISES.values():
        body = inspect.getsource(exercise.solution).split('"""')[-1]
        lines = [line for line in body.splitlines() if len(line.strip()) > 30]
        assert exercise.answer[:60] not in everything
        told = ("AdamW(",)                                      # its settings stand in the text
        found = [line for line in lines if line in everything and not any(word in line for word in told)]
        assert not found, exercise.title
    assert "For the lecturer" not in (copy / "exercises" / "README.md").read_text(encoding="utf-8")
    assert not (copy / ".git").exists() and not (copy / "exercises" / "work.py").exists()


def test_the_tests_run_in_the_copy(copy):
    names = [f"tests/{path.name}" for path in (copy / "tests").glob("test_exercises*.py")]
    assert len(names) == 2              # without the one that has solutions in other words
    done = command(copy, "pytest", "-q", "-p", "no:cacheprovider", *names)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and " skipped" in done.stdout


def test_the_copy_cannot_be_exported_again(copy, tmp_path):
    done = command(copy, "exercises", "export", str(tmp_path / "again"))
    assert done.returncode == 1 and "handed out" in done.stderr


@pytest.mark.parametrize("folder, why", [("exercises/copy", "inside the project"), (".", "inside the project")])
def test_export_refuses_a_folder_in_the_way(folder, why, tmp_path):
    with pytest.raises(ValueError, match=why):
        handout.export(ROOT / folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        handout.export(tmp_path)
    with pytest.raises(ValueError, match="not empty"):
        handout.export(tmp_path / "file")


# ---- a student in the copy

def test_start_writes_the_stubs_once(copy):
    work = copy / "exercises" / "work.py"
    listed = command(copy, "exercises")
    assert listed.returncode == 0 and "0 of 16 done" in listed.stdout and "exercises start" in listed.stdout
    done = command(copy, "exercises", "check")
    assert done.returncode == 1 and "begin with: python -m exercises start" in done.stderr
    assert command(copy, "exercises", "start").returncode == 0
    assert work.read_text(encoding="utf-8") == work_text()
    work.write_text("mine", encoding="utf-8")
    done = command(copy, "exercises", "start")
    assert done.returncode == 1 and "there already" in done.stderr and len(done.stderr.splitlines()) == 1
    assert work.read_text(encoding="utf-8") == "mine"
    work.unlink()


def test_start_writes_the_file_that_it_is_given(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = tmp_path / "mine here.py"
    main(parse_arguments(["--work", str(work)]))
    assert capsys.readouterr().out.endswith(f". Begin with: python -m exercises --work '{work}' start\n")
    with pytest.raises(ValueError, match="mine here.py is not there; begin with: .* --work '.*' start"):
        main(parse_arguments(["check", "--work", str(work), "1"]))
    before = handout.WORK.exists() and handout.WORK.read_bytes()
    main(parse_arguments(["--work", str(work), "start"]))
    assert work.read_text(encoding="utf-8") == work_text()
    assert capsys.readouterr().out.splitlines() == [
        "written: mine here.py",
        f"Read exercise 1 there, write its body, then: python -m exercises --work '{work}' check 1"]
    assert (handout.WORK.exists() and handout.WORK.read_bytes()) == before
    work.write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="mine here.py is there already"):
        main(parse_arguments(["--work", str(work), "start"]))
    assert work.read_text(encoding="utf-8") == "mine"


def test_work_is_ignored_by_git():
    assert "work.py" in (ROOT / "exercises" / ".gitignore").read_text().split()


def test_all_solutions_pass_in_the_copy_and_mistakes_are_named_from_results_alone(copy, tmp_path):
    work = tmp_path / "solved.py"
    work.write_text(source_with({}), encoding="utf-8")
    done = command(copy, "exercises", "--work", str(work), "check", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout)
    assert [result["exercise"] for result in results] == NUMBERS
    assert {result["status"] for result in results} == {"passed"}

    edits = {number: exercise.mistakes[-2].edits for number, exercise in EXERCISES.items()}
    work.write_text(source_with(edits), encoding="utf-8")
    done = command(copy, "exercises", "--work", str(work), "check", "--json")
    assert done.returncode == 1
    for result in json.loads(done.stdout):
        assert result["status"] == "mistake", result
        assert result["name"] == EXERCISES[result["exercise"]].mistakes[-2].name


def test_check_says_which_mistake_and_shows_the_reward_of_a_pass(copy, tmp_path):
    work = tmp_path / "work.py"
    work.write_text(source_with({9: {"tokens[:, 1:]": "tokens[:, :-1]"}}), encoding="utf-8")
    done = command(copy, "exercises", "--work", str(work), "check", "9")
    assert done.returncode == 1
    assert done.stdout.startswith(" 9  The prompt loss: mistake\n    not shifted\n    Position t was asked")
    done = command(copy, "exercises", "--work", str(work), "check", "1")
    assert done.returncode == 0
    assert done.stdout.startswith(" 1  RMSNorm: passed\n    root mean square of the last prompt token")
    listed = command(copy, "exercises", "--work", str(work))
    assert "15 of 16 done; about 0.5 hours left" in listed.stdout
    done = command(copy, "exercises", "--work", str(work), "check", "9", "--json")
    assert json.loads(done.stdout)[0]["name"] == "not shifted"


def test_hints_come_one_at_a_time(copy):
    hints = EXERCISES[8].hints
    first = command(copy, "exercises", "hint", "8").stdout
    assert hints[0][:40] in first and hints[1][:40] not in first and "hint 8 2" in first
    assert hints[2][:40] in command(copy, "exercises", "hint", "8", "3").stdout


@pytest.mark.parametrize("text, line", [
    ("def f(:\n", "work.py, line 1: "), ("x = 1\ny = nothing\n", "line 2: y = nothing NameError"),
    ("import sys\nsys.exit(3)\n", "sys.exit")])
def test_a_work_file_that_does_not_run_gives_one_line(copy, tmp_path, text, line):
    work = tmp_path / "work.py"
    work.write_text(text)
    done = command(copy, "exercises", "--work", str(work), "check", "1")
    assert done.returncode == 1 and line in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["check", "17"], ["check", "x"], ["hint"], ["hint", "1", "4"], ["export"], ["eat"]])
def test_wrong_options_give_one_line_and_status_2(copy, arguments):
    done = command(copy, "exercises", *arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


# ---- the README

README = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")


def test_the_syllabus_has_every_exercise_with_its_time_and_level():
    for number, exercise in EXERCISES.items():
        assert re.search(rf"\b{number} [^·|]*\({exercise.minutes}( min)?, {exercise.level}\)", README), number
    assert abs(sum(exercise.minutes for exercise in EXERCISES.values()) - 11 * 60) < 30


def test_what_the_readme_says_to_read_is_there():
    for names, file in (("RMSNorm RotaryEmbedding rotate Attention positions_and_mask KVCache", "model.py"),
                        ("decode prompt_loss optimize_delta", "slot.py"), ("sampler probabilities", "generate.py"),
                        ("read_safetensors", "load_weights.py"), ("join", "tokenizer/bpe.py"),
                        ("Stream", "tokenizer/text.py"), ("optimize_delta_fast", "speed/delta.py"),
                        ("gradient unigram", "study/measure.py"), ("sign_test", "study/stats.py"),
                        ("strict", "study/scoring.py"), ("", "speed/batch.py"), ("", "study/README.md")):
        assert file in README
        for name in names.split():
            assert re.search(rf"(def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8")), (file, name)


def coarse(text):
    """Numbers without their last digit, in which machines may differ."""
    return re.sub(r"(\.\d+)\d\b", r"\1", text)


def test_the_transcript_solves_nothing():
    """Neither a line of exercise 9's solution nor what makes one: no shift, no mask, no transpose."""
    transcript = README.split("### A transcript")[1]
    body = inspect.getsource(EXERCISES[9].solution).split('"""')[-1]
    assert not [line for line in body.splitlines() if line.strip() and line.split("#")[0].strip() in transcript]
    assert not re.search(r"transpose|gather|mask\[|\[:, |reduction", transcript)


def test_the_readme_counts_the_mistakes_that_are_planted():
    mistakes = sum(len(exercise.mistakes) for exercise in EXERCISES.values())
    assert f"those of {mistakes} wrong ones" in README


def test_the_transcript_is_what_the_commands_say(tmp_path, capsys):
    transcript = README.split("### A transcript")[1]
    first, = re.findall(r"    \(.*a first try\)\n((?:    .*\n)+)", transcript)
    first = "def prompt_loss(logits, tokens, mask):\n" + first
    second = inspect.getsource(EXERCISES[9].solution)           # which the transcript does not show
    for text, commands in ((first, [["check", "9"]]), (second, [["check", "9"], ["try", "9"]])):
        work = tmp_path / "work.py"
        work.write_text(HEADER + text, encoding="utf-8")
        for command in commands:
            try:
                main(parse_arguments(["--work", str(work), *command]))
            except SystemExit as end:
                assert end.code == 1
            said = capsys.readouterr().out
            assert len(said) > 100 and coarse(said) in coarse(transcript)


# ---- try

PARTS = {1: "the mean is subtracted", 2: "neighbours are paired", 3: "scores are not scaled", 4: "pos never moves",
         5: "offsets counted from the beginning of the file", 6: "one merge only", 7: "every token is decoded alone",
         8: "temperature multiplies", 9: "not shifted", 10: "uphill", 11: "the sign", 12: "δ does not enter",
         13: "padding is counted", 14: "b itself is taken for the change", 15: "fixed and broken are exchanged",
         16: "the product instead of the cosine"}

RUNS = {1: "python generate.py --problem 1 --slot-steps 3 --slot-lr 0.01\n",
        9: "python generate.py --problem 57 --slot-steps 5 --slot-lr 0.1\n",
        13: "three held-out problems (common, rare, unseen) in one padded batch, 5 steps at lr 0.1\n"}


class Work:
    """A work file with one function."""
    __file__ = "work.py"

    def __init__(self, function):
        setattr(self, function.__name__, function)


@pytest.mark.parametrize("number", NUMBERS)
def test_in_the_real_program_the_solution_gives_the_same_and_a_mistake_parts(number, capsys):
    exercise = EXERCISES[number]
    assert try_out(Work(exercise.solution), number)
    said = capsys.readouterr().out
    assert "in the program gives the same" in said and re.search(r": the same, all \d+:", said)
    assert f"    both runs: {RUNS.get(number, '')}" in said
    edits = next(mistake.edits for mistake in exercise.mistakes if mistake.name == PARTS[number])
    assert not try_out(Work(variant(exercise, edits)), number)
    assert "they part at number" in capsys.readouterr().out


def test_try_leaves_the_program_as_it_was():
    import generate
    import model
    import slot
    before = model.RMSNorm.forward, generate.optimize_delta, slot.KVCache, generate.speed
    EXERCISES[1].trial(EXERCISES[1].solution)
    with pytest.raises(ZeroDivisionError):
        EXERCISES[10].trial(lambda *_: 1 / 0)
    assert before == (model.RMSNorm.forward, generate.optimize_delta, slot.KVCache, generate.speed)


def test_try_of_a_stub_and_of_an_error_give_one_line():
    def rms_norm(x, weight, eps):
        raise NotImplementedError

    with pytest.raises(ValueError, match="exercise 1 is not begun"):
        try_out(Work(rms_norm), 1)

    def optimize_delta(*_):
        return 1 / 0

    with pytest.raises(ValueError, match="the program stopped; run check 10 first: ZeroDivisionError"):
        try_out(Work(optimize_delta), 10)

    def prompt_loss(logits, tokens, mask):                      # one number for the whole batch
        return logits.mean()

    with pytest.raises(ValueError, match="the program stopped; run check 9 first: IndexError"):
        try_out(Work(prompt_loss), 9)
    with pytest.raises(ValueError, match="work.py has no rms_norm"):
        try_out(Work(optimize_delta), 1)
