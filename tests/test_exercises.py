"""The course: solutions pass, stubs are not begun, every planted mistake is named as itself.

Also run in a copy that was handed out, where what needs the solutions is skipped.
"""
import doctest
import functools
import importlib.util
import inspect
import math
import sys
import textwrap
import time

import pytest
import torch

from exercises import check as checking
from exercises.check import ANSWERS, check, known_mistakes, right_results, same, variant
from exercises.handout import work_text
from exercises.lesson1_decoder import attention_loops, rms_norm_loops, rotate_loops
from exercises.lesson4_loop import prompt_loss_loops
from exercises.lessons import EXERCISES, LESSONS

NUMBERS = list(EXERCISES)
needs_solutions = pytest.mark.skipif(ANSWERS.exists(), reason="a copy without solutions")


@pytest.fixture(autouse=True, scope="module")
def each_wrong_function_runs_once():
    """What known mistakes give is always the same, and takes most of the time."""
    results = functools.cache(lambda number: list(known_mistakes(number, EXERCISES[number])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checking, "known_mistakes", lambda number, exercise: results(number))
        yield


def module_of(path):
    spec = importlib.util.spec_from_file_location("work", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def student(tmp_path, number, body):
    """The verdict on a work file in which one exercise has this body."""
    name = EXERCISES[number].solution.__name__
    signature = inspect.signature(EXERCISES[number].solution)
    path = tmp_path / "work.py"
    imports = "import json, math, re, struct\nimport torch\nimport torch.nn.functional as F\n"
    path.write_text(f"{imports}\ndef {name}{signature}:\n{textwrap.indent(textwrap.dedent(body), '    ')}\n")
    work = module_of(path)
    return check(number, EXERCISES[number], getattr(work, name), work.__file__)


# ---- the course

def test_sixteen_exercises_in_five_lessons_with_all_that_belongs_to_one():
    assert len(EXERCISES) == 16 and len(LESSONS) == 5
    assert len({exercise.solution.__name__ for exercise in EXERCISES.values()}) == 16
    for exercise in EXERCISES.values():
        text = inspect.getdoc(exercise.solution)
        for part in ("By hand:", ">>> ", "Allowed:", "Not allowed:", "To think about:"):
            assert part in text, (exercise.title, part)
        assert len(text.split("\n\n")) >= 6
        assert len(exercise.hints) == 3 and all(exercise.hints)
        assert exercise.level in ("easy", "medium", "hard") and exercise.minutes >= 20


@needs_solutions
def test_every_question_has_an_answer_and_every_exercise_four_mistakes():
    for exercise in EXERCISES.values():
        assert len(exercise.answer) > 80
        assert len(exercise.mistakes) >= 4
        assert all(len(mistake.thought) > 15 for mistake in exercise.mistakes)


@needs_solutions
@pytest.mark.parametrize("number", NUMBERS)
def test_the_solution_passes_and_its_example_by_hand_is_right(number):
    exercise = EXERCISES[number]
    assert check(number, exercise, exercise.solution).status == "passed"
    finder = doctest.DocTestFinder(recurse=False)
    names = dict(vars(sys.modules[exercise.solution.__module__]))
    examples = finder.find(exercise.solution, exercise.title, globs=names)
    assert sum(len(example.examples) for example in examples) > 0
    assert doctest.DocTestRunner().run(examples[0]).failed == 0


@needs_solutions
def test_every_planted_mistake_is_named_as_itself(capsys):
    """All results of all wrong functions against each other: no mistake hides, none is another."""
    began, counts, twice = time.perf_counter(), {}, {}
    for number, exercise in EXERCISES.items():
        right, found = right_results(number, exercise), {}
        for name, thought, results in checking.known_mistakes(number, exercise):
            if name.startswith("two at once"):
                twice[number] = twice.get(number, 0) + 1
                continue
            assert name not in found
            assert not same(results, right, exercise.tolerance), f"{number}: {name} hides"
            for other, theirs in found.items():
                assert not same(results, theirs, exercise.tolerance), f"{number}: {name} is {other}"
                assert not same(theirs, results, exercise.tolerance), f"{number}: {name} is {other}"
            found[name] = results
        assert list(found) == [mistake.name for mistake in exercise.mistakes]
        counts[number] = len(found)
    assert min(counts.values()) >= 4 and sum(counts.values()) >= 64
    with capsys.disabled():
        print(f"\n{sum(counts.values())} planted mistakes, each named as itself "
              f"({', '.join(f'{n}: {count}' for n, count in counts.items())}); and "
              f"{sum(twice.values())} pairs of them; {time.perf_counter() - began:.0f} s")


@needs_solutions
@pytest.mark.parametrize("number", NUMBERS)
def test_a_mistake_and_two_at_once_are_named_by_check(number):
    exercise = EXERCISES[number]
    verdict = check(number, exercise, variant(exercise, exercise.mistakes[-1].edits))
    assert verdict.status == "mistake" and verdict.name == exercise.mistakes[-1].name
    first = exercise.mistakes[0]
    for second in exercise.mistakes[1:]:
        both = variant(exercise, first.edits | second.edits)
        if both is not None and not first.edits.keys() & second.edits.keys():
            break
    verdict = check(number, exercise, both)
    singles = [first.name, second.name] + ["halves of characters are dropped"] * (number == 7)
    assert verdict.status == "mistake"      # (in 7, two mistakes make a third one)
    assert verdict.name in (f"two at once: {first.name}; and {second.name}", *singles)


def test_every_stub_is_not_begun(tmp_path):
    path = tmp_path / "work.py"
    path.write_text(work_text(), encoding="utf-8")
    work = module_of(path)
    for number, exercise in EXERCISES.items():
        function = getattr(work, exercise.solution.__name__)
        assert inspect.getdoc(function) == inspect.getdoc(exercise.solution)
        assert check(number, exercise, function, work.__file__).status == "not begun"


def test_the_work_file_has_no_line_of_a_solution_and_runs_by_itself(tmp_path):
    text = work_text()
    assert text.count("raise NotImplementedError") == 18            # three methods in one class
    assert "torch.rsqrt(mean_square" not in text and "backward(inputs" not in text
    assert "Mistake" not in text and "exercises.check" not in text


def test_loops_mean_the_same_as_the_right_results():
    right = {number: right_results(number, EXERCISES[number]) for number in (1, 2, 3, 9)}
    for case, (x, weight, eps) in EXERCISES[1].cases().items():
        for vector, result in zip(x.reshape(-1, len(weight)), right[1][case].reshape(-1, len(weight))):
            expected = torch.tensor(rms_norm_loops(vector.tolist(), weight.tolist(), eps))
            torch.testing.assert_close(result.float(), expected, rtol=2e-3 if x.dtype == torch.half else 1e-5,
                                       atol=1e-5)
    x, positions, theta = EXERCISES[2].cases()["two samples at their own positions"]
    for b in range(2):
        for t in range(4):
            expected = rotate_loops(x[b, 1, t].tolist(), positions[b, t].item(), theta)
            result = right[2]["two samples at their own positions"][b, 1, t]
            torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    for case, (q, k, v) in EXERCISES[3].cases().items():
        expected = torch.tensor(attention_loops(q[0].tolist(), k[0].tolist(), v[0].tolist()))
        torch.testing.assert_close(right[3][case][0], expected, rtol=1e-5, atol=1e-5)
    for case, arguments in EXERCISES[9].cases().items():
        for row, result in enumerate(right[9][case].tolist()):
            expected = prompt_loss_loops(*(argument[row].tolist() for argument in arguments))
            assert math.isclose(result, expected, rel_tol=1e-5, abs_tol=1e-6), case


# ---- other ways to be right, and ways to be wrong that nobody planted

OTHER_WAYS = {
    3: """
        B, H, T, D = q.shape
        k = k.repeat_interleave(H // k.shape[1], dim=1)
        v = v.repeat_interleave(H // v.shape[1], dim=1)
        S = k.shape[2]
        hidden = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
        scores = torch.einsum("bhtd,bhsd->bhts", q, k) * D ** -0.5 + hidden * -1e9
        return scores.softmax(-1) @ v
        """,
    7: """
        waiting = bytearray()
        for piece in pieces:
            waiting.extend(piece)
            keep = 0
            for size, first in ((2, 0xC0), (3, 0xE0), (4, 0xF0)):
                for back in range(1, size):
                    if len(waiting) >= back and waiting[-back] >= first and waiting[-back] < 0xF8:
                        keep = max(keep, back)
            text = bytes(waiting[:len(waiting) - keep]).decode("utf-8", "replace")
            del waiting[:len(waiting) - keep]
            yield text
        yield bytes(waiting).decode("utf-8", "replace")
        """,
    9: """
        losses = []
        targets = tokens[:, 1:].masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
        nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
        return nll.sum(1) / (targets != -100).sum(1).clamp(min=1)
        """,
    10: """
        h = hidden.detach()
        delta = torch.nn.Parameter(torch.zeros(1, 1, h.shape[2]))
        optimizer = torch.optim.AdamW([delta], lr=lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=1e-8)
        losses = torch.zeros(steps + 1)
        for step in range(steps):
            loss = F.cross_entropy(lm_head(h + delta)[0, :-1], torch.tensor(tokens)[1:])
            losses[step] = loss.detach()
            delta.grad, = torch.autograd.grad(loss, delta)
            optimizer.step()
        with torch.no_grad():
            losses[steps] = F.cross_entropy(lm_head(h + delta)[0, :-1], torch.tensor(tokens)[1:])
        return delta.detach(), losses
        """,
    13: """
        deltas, losses = [], []
        for h, x, real in zip(hidden, tokens, mask):
            h, x = h[real], x[real]
            delta = torch.zeros(h.shape[1], requires_grad=True)
            optimizer = torch.optim.AdamW([delta], lr=lr, eps=1e-5, weight_decay=1e-8)
            row = []
            for step in range(steps + 1):
                loss = F.cross_entropy(lm_head(h[:-1] + delta), x[1:]) if len(x) > 1 else 0 * delta.sum()
                row.append(loss.item())
                if step < steps:
                    delta.grad, = torch.autograd.grad(loss, delta)
                    optimizer.step()
            deltas.append(delta.detach())
            losses.append(row)
        return torch.stack(deltas)[:, None], torch.tensor(losses).T
        """,
}


@pytest.mark.parametrize("number", OTHER_WAYS)
def test_another_right_way_passes(number, tmp_path):
    assert student(tmp_path, number, OTHER_WAYS[number]) == checking.Verdict("passed")


NAIVE = {       # what a first try looks like, written in another way than the solution
    1: ("return weight * x / torch.sqrt((x ** 2).mean(-1, keepdim=True) + eps)",
        "statistics in the model's dtype"),
    3: ("k = k.repeat(1, q.shape[1] // k.shape[1], 1, 1); v = v.repeat(1, q.shape[1] // v.shape[1], 1, 1)\n"
        "T, S = q.shape[2], k.shape[2]\n"
        "scores = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(\n"
        "    torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -math.inf)\n"
        "return scores.softmax(-1) @ v", "heads are grouped as if dealt out"),
    9: ("return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())",
        "two at once: not shifted, over all T positions, padding too; and one mean for the whole batch"),
    11: ("y = torch.zeros(len(W)); y[targets] = 1 / len(targets)\n"
         "return W.T @ (((hidden + delta) @ W.T).softmax(-1).mean(0) - y)",
         "a token that comes twice is counted once"),
    14: ("b = W @ delta; p = (z + b).softmax(-1); r = W @ u\n"
         "Hu = W.T @ (p * (r - (p @ r)[:, None])).mean(0)\n"
         "return b[None] - b.mean() + 0 * z, Hu", "b without its plain mean"),
}


@pytest.mark.parametrize("number", NAIVE)
def test_a_first_try_in_words_of_its_own_is_named(number, tmp_path):
    body, name = NAIVE[number]
    verdict = student(tmp_path, number, body)
    assert (verdict.status, verdict.name) == ("mistake", name), verdict


LOOPS = {       # of exercise 10, each with W, h and the places of clear, result in another way
    "the decoder's graph is walked through, though not W's": dict(W="lm_head.weight.detach()", h="hidden"),
    "the graphs of the decoder and of W are walked through": dict(h="hidden"),
    "the gradient of W is collected": {},
    "two at once: the graphs of the decoder and of W are walked through; and the losses are a list":
        dict(h="hidden", losses="losses"),
    "the gradient is cleared before the step": dict(W="lm_head.weight.detach()", clear="optimizer.zero_grad()"),
    "W is frozen and stays so": dict(first="lm_head.weight.requires_grad = False"),
    "the losses keep their graph": dict(W="lm_head.weight.detach()", note="loss", losses="torch.stack(losses)"),
    "the losses are a list": dict(W="lm_head.weight.detach()", losses="losses"),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_that_makes_its_logits_anew_in_every_step_is_named(name, tmp_path):
    """The solution computes W h once; most first tries do not, and their graphs differ from its own."""
    usual = dict(W="lm_head.weight", h="hidden.detach()", clear="pass", note="loss.item()",
                 losses="torch.tensor(losses)", first="pass")
    body = """
        {first}
        delta = torch.zeros(hidden.shape[-1], requires_grad=True)
        optimizer = torch.optim.AdamW([delta], lr=lr, eps=1e-5, weight_decay=1e-8)
        losses = []
        for step in range(steps + 1):
            optimizer.zero_grad()
            loss = F.cross_entropy((({h} + delta) @ {W}.T)[0, :-1], torch.tensor(tokens)[1:])
            losses.append({note})
            if step < steps:
                loss.backward()
                {clear}
                optimizer.step()
        return delta.detach()[None, None], {losses}
        """.format(**usual | LOOPS[name])
    verdict = student(tmp_path, 10, body)
    assert (verdict.status, verdict.name) == ("mistake", name), verdict
    text = verdict.text.splitlines()
    assert text[0] == name and not any("Error" in line for line in text[:2])


def test_one_cause_of_several_wrong_parts_is_named_once(tmp_path):
    """NaN in δ and in the losses, W's gradient, and a list: the cause of both NaN comes once."""
    body = """
        pairs = mask[:, 1:] & mask[:, :-1]
        delta = torch.zeros(len(tokens), 1, hidden.shape[2], requires_grad=True)
        optimizer = torch.optim.AdamW([delta], lr=lr, eps=1e-5, weight_decay=1e-8)
        losses = []
        for step in range(steps + 1):
            log_p = lm_head(hidden[:, :-1] + delta).log_softmax(-1)
            nll = -log_p.gather(-1, tokens[:, 1:, None])[..., 0]
            loss = (nll * pairs).sum(1) / pairs.sum(1)
            losses.append(loss)
            if step < steps:
                optimizer.zero_grad()
                loss.sum().backward()
                optimizer.step()
        return delta, torch.stack(losses)
        """
    verdict = student(tmp_path, 13, body)
    assert verdict.status == "mistake"
    assert verdict.text.startswith("δ and the losses: a prompt of one token gives NaN, in δ too\nOne cause")
    assert "W's .grad: the gradient of W is collected\n" in verdict.text
    assert verdict.name == ("a prompt of one token gives NaN, in δ too; the gradient of W is collected; "
                            "δ keeps its graph; the losses keep their graph")
    once = body.replace("loss.sum().backward()", "loss.sum().backward(inputs=[delta])").replace(
        "return delta, torch.stack(losses)", "return delta.detach(), torch.stack(losses).detach()")
    verdict = student(tmp_path, 13, once)
    assert verdict == ("mistake", verdict.text, "a prompt of one token gives NaN, in δ too")


def test_a_named_cause_stands_above_what_python_says(tmp_path):
    body = """
        if len(tokens) == 2:
            raise RuntimeError("no more")
        delta = torch.zeros(1, 1, hidden.shape[-1], requires_grad=True)
        optimizer = torch.optim.AdamW([delta], lr=lr, eps=1e-5, weight_decay=1e-8)
        losses = []
        for step in range(steps + 1):
            loss = F.cross_entropy(lm_head(hidden.detach() + delta)[0, :-1], torch.tensor(tokens[1:]))
            losses.append(loss.item())
            if step < steps:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return delta.detach(), torch.tensor(losses)
        """
    verdict = student(tmp_path, 10, body)
    assert verdict.status == "error" and verdict.name == "the gradient of W is collected"
    assert verdict.text.startswith("W's .grad: the gradient of W is collected\n")
    assert verdict.text.index("W's .grad") < verdict.text.index("line ") < verdict.text.index("RuntimeError: no more")


@pytest.mark.parametrize("number, body, name", [
    (9, "nll = F.cross_entropy(logits[:, :-1], tokens[:, 1:], reduction='none')", "the logits are not transposed"),
    (9, "B, T, V = logits.shape; real = mask[:, 1:] & mask[:, :-1]\n"
        "nll = F.cross_entropy(logits[:, :-1].reshape(B, V, T - 1), tokens[:, 1:], reduction='none')\n"
        "return (nll * real).sum(1) / real.sum(1).clamp(min=1)", "the logits are reshaped, not transposed"),
    (13, "F.cross_entropy(lm_head(hidden[:, :-1]), tokens[:, 1:], reduction='none')", "the logits are not transposed")])
def test_a_transpose_that_is_missing_is_named_and_not_only_the_error(number, body, name, tmp_path):
    verdict = student(tmp_path, number, body)
    assert (verdict.status, verdict.name) == ("mistake", name), verdict
    assert verdict.text.startswith(name) and "transpose(1, 2)" in verdict.text


def test_what_is_not_the_pair_is_told_what_it_should_be(tmp_path):
    verdict = student(tmp_path, 10, "return torch.ones(1, 1, 6)")
    assert "the result is a tensor of shape (1, 1, 6), should be the pair (δ, losses)" in verdict.text
    verdict = student(tmp_path, 13, "return 1, 2, 3")
    assert "the result is a tuple of 3, should be the pair (δ, losses)" in verdict.text
    for number in (10, 13):
        body = textwrap.dedent(OTHER_WAYS[number])
        place = body.rindex(", losses" if number == 10 else ", torch.tensor(losses)")
        verdict = student(tmp_path, number, body[:place] + "\n")
        assert (verdict.status, verdict.name) == ("mistake", "δ alone is returned")
        assert "should be the pair (δ, losses)" in verdict.text


def test_nested_results_are_printed_as_they_stand():
    difference = checking.difference
    assert difference(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), 1e-5) == (
        "is [[0.0, 0.0], [0.0, 0.0]], should be [[1.0, 0.0], [0.0, 2.0]]")
    assert difference(torch.zeros(1, 1, 2), torch.ones(1, 1, 2), 1e-5) == "is [0.0, 0.0], should be [1.0, 1.0]"
    assert difference(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), 1e-5) == "is 0.0, should be 1.0"
    assert difference([[1, 2], [3]], [[1, 2], [4]], 1e-5) == "at [1][0] is 3, should be 4"


def test_many_mistakes_at_once_are_named_part_by_part(tmp_path):
    body = """
        delta = torch.zeros(1, 1, hidden.shape[-1], requires_grad=True)
        optimizer = torch.optim.AdamW([delta], lr=lr)
        losses = []
        for _ in range(steps):
            loss = F.cross_entropy(lm_head(hidden.detach() + delta)[0, :-1], torch.tensor(tokens[1:]))
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return delta, torch.tensor(losses)
        """
    verdict = student(tmp_path, 10, body)
    assert verdict.status == "mistake"
    for name in ("eps of AdamW is torch's own; and weight decay of AdamW is torch's own",
                 "the loss after the last step is missing", "δ keeps its graph",
                 "the gradient of W is collected"):
        assert name in verdict.name, verdict
    verdict = student(tmp_path, 10, body.replace("torch.tensor(losses)", "torch.tensor(losses) * 7"))
    assert verdict.status == "wrong" and "δ keeps its graph" in verdict.name
    assert "wrong in: the example by hand: the losses have shape (1,)" in verdict.text


def test_a_wrong_answer_that_nobody_planted_gets_numbers_and_places(tmp_path):
    verdict = student(tmp_path, 2, "return x * 2")
    assert verdict.status == "wrong"
    assert "the example by hand: the result is [2.0, 4.0, 6.0, 8.0], should be [-3.144" in verdict.text
    assert "differs most at [1, 1, 3, 5]: -5.25468, should be 3.37049; 0 of 144" in verdict.text
    assert "shape (3,), should have (2,)" in student(tmp_path, 1, "return torch.zeros(3)").text
    assert "dtype torch.float64" in student(tmp_path, 1, "return x.double()").text
    assert "None (is a `return` missing?)" in student(tmp_path, 1, "y = x").text


def test_right_in_some_cases_is_said(tmp_path):
    verdict = student(tmp_path, 6, "return [b'l', b'o', b'wer'] if piece == b'lower' else []")
    assert "right in: the example by hand; no bytes" in verdict.text


def test_an_exception_shows_the_students_own_line(tmp_path):
    verdict = student(tmp_path, 1, "y = x.float()\nreturn y / helper(y)")
    assert verdict.status == "error"
    assert verdict.text.splitlines()[:3] == [
        "line 7: return y / helper(y)", "NameError: name 'helper' is not defined", "right in: no case"]
    assert verdict.text.splitlines()[3].startswith("stopped in: the example by hand; two samples")
    verdict = check(1, EXERCISES[1], lambda x: x, "work.py")
    assert verdict.status == "error" and "does the signature fit" in verdict.text
    assert check(1, EXERCISES[1], None).status == "error"


def test_a_loop_without_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "SECONDS", 0.5)
    body = "while True:\n    try:\n        x = 1\n    except Exception:\n        pass"
    verdict = student(tmp_path, 6, body)
    assert verdict.status == "too slow" and "line " in verdict.text


def test_arguments_must_not_be_changed(tmp_path):
    body = ("s = x.float()\ny = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + eps)\n"
            "y = weight * y.to(x.dtype)\nx.zero_()\nreturn y")
    assert "x is changed in place (x.float() of a float32 tensor is x itself)" in student(tmp_path, 1, body).text
    body = ("s = x.float()\ns *= torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + eps)\n"
            "return weight * s.to(x.dtype)")
    assert student(tmp_path, 1, body).name == "x is changed in place"
    verdict = student(tmp_path, 9, "tokens += 1\nreturn logits.sum((1, 2))")
    assert "tokens is changed in place; work on a copy" in verdict.text
    verdict = student(tmp_path, 10, "lm_head(hidden.zero_())")
    assert "hidden is changed in place (hidden.float() of" in verdict.text
    verdict = student(tmp_path, 10, "tokens.pop(0)\nreturn hidden[:, :1], torch.zeros(steps + 1)")
    assert "tokens is changed in place; work on a copy" in verdict.text
    verdict = student(tmp_path, 6, "return [ranks.popitem()]")
    assert "ranks is changed in place; work on a copy" in verdict.text


def test_a_name_of_ones_own_is_no_forbidden_one(tmp_path):
    """A variable or a helper called grad or cat: what counts is what torch is asked for."""
    body = ("p = ((hidden + delta) @ W.T).softmax(-1).mean(0)\n"
            "y = torch.zeros(len(W)).index_add(0, targets, torch.full((len(targets),), 1 / len(targets)))\n"
            "grad = W.T @ (p - y)\nreturn grad")
    assert student(tmp_path, 11, body).status == "passed"
    autograd = ("delta = delta.clone().requires_grad_()\n"
                "grad, = torch.autograd.grad(F.cross_entropy((hidden + delta) @ W.T, targets), delta)\nreturn grad")
    assert student(tmp_path, 11, autograd).status == "not allowed"
    brought = ("from torch.func import grad\nown = lambda grad: grad\n"
               "return grad(lambda d: F.cross_entropy((hidden + d) @ W.T, targets))(delta)")
    assert student(tmp_path, 11, brought).status == "not allowed"


def solved(tmp_path, number, *edits, before=""):
    """The verdict on the solution with edits, and with lines before it in the file."""
    name, text = EXERCISES[number].solution.__name__, inspect.getsource(EXERCISES[number].solution)
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / "work.py"
    path.write_text(f"import codecs\nimport json, math, re, struct\nimport torch\nimport torch.nn.functional as F\n{before}\n{text}")
    return check(number, EXERCISES[number], getattr(module_of(path), name), path)


@needs_solutions
@pytest.mark.parametrize("number, before, old, new", [
    (11, "def mine(f, d):\n    return torch.autograd.functional.jacobian(f, d)\n", "return W.T @ (p - y)",
     "return mine(lambda d: F.cross_entropy(hidden @ W.T + W @ d, targets), delta)"),
    (11, "from torch.autograd.functional import jacobian\n", "return W.T @ (p - y)",
     "return jacobian(lambda d: F.cross_entropy(hidden @ W.T + W @ d, targets), delta)"),
    (11, "from torch.func import grad as slope\n", "return W.T @ (p - y)",
     "return slope(lambda d: F.cross_entropy(hidden @ W.T + W @ d, targets))(delta)"),
    (7, "from codecs import getincrementaldecoder as inc\n", "waiting = b", "inc; waiting = b")],
    ids=["in a helper", "by its folder", "under another name", "a decoder under another name"])
def test_what_is_forbidden_is_found_where_it_hides(number, before, old, new, tmp_path):
    assert solved(tmp_path, number, (old, new), before=before).status == "not allowed"


@needs_solutions
def test_a_variable_is_no_helper_of_that_name(tmp_path):
    """A helper for exercise 10 may use autograd; a variable of exercise 11 that has its name does not call it."""
    helper = "def step(loss):\n    loss.backward()\n"
    edit = "p = z.softmax(-1).mean(0) ", "step = z.softmax(-1); p = step.mean(0) "
    assert solved(tmp_path, 11, edit, before=helper).status == "passed"
    assert solved(tmp_path, 11, (edit[0], "step; " + edit[0]), before=helper).status == "not allowed"


@needs_solutions
def test_exponentials_count_where_they_are_made(tmp_path):
    """Two or three before the loop are no matter; one in every step is, in whatever words."""
    once = "E = (z - top).exp()"
    assert solved(tmp_path, 12, (once, f"z.logsumexp(1); z.softmax(1); {once}")).status == "passed"
    for way in ("(z - top).exp() @ c", "math.e ** (z - top) @ c", "torch.pow(math.e, z - top) @ c"):
        verdict = solved(tmp_path, 12, ("s = E @ c", f"s = {way}"))
        assert verdict.status == "mistake" and "every step" in verdict.text, way


@needs_solutions
def test_what_a_graph_that_is_kept_hides(tmp_path):
    verdict = solved(tmp_path, 10, ("with torch.no_grad():", "if True:"), ("backward(inputs=[delta])", "backward(retain_graph=True)"),
                     ("lm_head(hidden[:, :-1])", "F.linear(hidden[:, :-1], lm_head.weight.detach())"),
                     ("lm_head(delta)", "F.linear(delta, lm_head.weight.detach())"))
    assert verdict.status == "mistake" and "retain_graph" in verdict.text


@needs_solutions
def test_values_are_views_like_keys(tmp_path):
    verdict = solved(tmp_path, 4, ("self.v[layer, :, :, :end]", "self.v[layer, :, :, :end].clone()"))
    assert verdict.status != "passed"


def test_what_the_exercise_forbids_does_not_pass(tmp_path):
    body = "return F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype) * weight"
    verdict = student(tmp_path, 1, body)
    assert verdict.status == "not allowed" and "rms_norm" in verdict.text
    copied = (
        "class Cache:\n"
        "    def __init__(self, layers, B, K, max_len, D):\n"
        "        self.k, self.v = torch.zeros(2, layers, B, K, max_len, D)\n"
        "        self.pos = 0\n"
        "    def update(self, layer, k, v):\n"
        "        end = self.pos + k.shape[2]\n"
        "        if end > self.k.shape[3]:\n"
        "            raise ValueError\n"
        "        self.k[layer, :, :, self.pos:end], self.v[layer, :, :, self.pos:end] = torch.cat([k]), v\n"
        "        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]\n"
        "    def advance(self, T):\n"
        "        self.pos += T\n")
    path = tmp_path / "cache.py"
    path.write_text("import torch\n" + copied)
    verdict = check(4, EXERCISES[4], module_of(path).Cache, path)
    assert verdict.status == "not allowed" and "cat" in verdict.text
    path.write_text("import torch\n" + copied.replace("torch.cat([k])", "k"))
    assert check(4, EXERCISES[4], module_of(path).Cache, path).status == "passed"
    body = "import slot\n" + textwrap.dedent(OTHER_WAYS[9]).strip()
    assert "imports slot" in student(tmp_path, 9, body).text


def test_what_a_student_prints_goes_to_stderr(tmp_path, capsys):
    student(tmp_path, 6, "print('here')\nreturn []")
    assert capsys.readouterr().out == ""


def test_a_mistake_whose_edit_does_not_fit_is_an_error():
    exercise = EXERCISES[1]
    assert variant(exercise, {"no such text": ""}) is None
    if not ANSWERS.exists():
        broken = exercise._replace(mistakes=[checking.Mistake("m", "t", {"no such text": ""})])
        with pytest.raises(ValueError, match="exercise 1: the edit of 'm' does not fit"):
            list(known_mistakes(1, broken))


# ---- rewards

@needs_solutions
@pytest.mark.parametrize("number", NUMBERS)
def test_a_pass_shows_what_the_function_does_on_the_embedded_model(number):
    picture = EXERCISES[number].reward(EXERCISES[number].solution)
    assert 3 <= len(picture.splitlines()) <= 60
    assert max(map(len, picture.splitlines())) <= 100
