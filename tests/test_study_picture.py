"""The page of `generate.py --picture`: its numbers are those of the functions that the command runs, whatever the prompt holds
comes out harmless and right, and a browser, where there is one, shows it without a word of complaint."""
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

import generate
import slot
from checks.options import parse_arguments
from hostile import ROOT, build, command, write
from load_weights import load_model
from study.measure import unigram
from study.picture import Picture
from tokenizer import load_tokenizer

TINY = ROOT / "tiny"


def page_of(path, *arguments):
    """The page that the command writes -> its text, and the data in it."""
    generate.main(parse_arguments([*map(str, arguments), "--picture", str(path)]))
    return read_page(path)


def read_page(path):
    text = Path(path).read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert len(found) == 1
    return text, json.loads(found[0])


# ---- its numbers -----------------------------------------------------------------------------------

QUESTION = "Hana has 4 boxes of 6 pens. She gives away 5. How many pens are left?"
REFERENCE = "In the boxes there are 4 * 6 = 24 pens. After that 24 - 5 = 19 pens are left.\n#### 19"
STEPS, LR = 5, 0.1


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "page.html"
    _, data = page_of(path, QUESTION, "--slot-steps", STEPS, "--slot-lr", LR, "--reference", REFERENCE)
    return data


@pytest.fixture(scope="module")
def run():
    """The same by slot.py alone: (lm, tokenizer, ids, hidden, [δ after 0 .. STEPS steps], reported losses)"""
    lm, tokenizer = load_model(TINY), load_tokenizer(TINY)
    ids = tokenizer.chat_ids([{"role": "user", "content": QUESTION}])
    hidden, _ = slot.prefill(lm, ids, 0)
    fits = [slot.optimize_delta(hidden, ids, lm.lm_head, steps, LR) for steps in range(STEPS + 1)]
    return lm, tokenizer, ids, hidden, [delta for delta, _ in fits], fits[-1][1].tolist()


@torch.no_grad()
def log_p(run, hidden, steps):
    lm, deltas = run[0], run[4]
    return slot.steer(lm.lm_head(hidden), lm.lm_head(deltas[steps]))[0].log_softmax(-1)


def near(number, expected):
    assert number == pytest.approx(expected, abs=2e-5), (number, expected)


def test_losses_of_every_token_at_every_step(page, run):
    """δ at a step is what a run of so many steps ends with; the tokens' losses sum to the loss that is reported."""
    _, _, ids, hidden, deltas, reported = run
    assert page["steps"] == list(range(STEPS + 1)) and len(page["losses"]) == STEPS + 1
    for steps, losses in enumerate(page["losses"]):
        expected = -log_p(run, hidden[:, :-1], steps)[range(len(ids) - 1), ids[1:]]
        near(losses, expected.tolist())
        near(sum(losses) / len(losses), reported[steps])
    assert page["losses"][0] != page["losses"][1]


def test_likeliest_tokens(page, run):
    _, tokenizer, ids, hidden, *_ = run
    for steps in (0, 2, STEPS):
        top = log_p(run, hidden, steps).exp().topk(3)
        for position in (0, 7, len(ids) - 2):
            words, numbers = zip(*page["tops"][steps][position])
            assert words == tuple(tokenizer.decode([id]) for id in top.indices[position].tolist())
            near(numbers, top.values[position].tolist())


@torch.no_grad()
def test_what_delta_and_the_control_promote(page, run):
    lm, tokenizer, ids, hidden, deltas, _ = run
    plain = lm.lm_head(hidden)[0]                                           # (T, V)
    learned = lm.lm_head(deltas[-1])[0, 0]
    control = unigram(ids, like=learned)
    ways = [(rows, bias) for rows in (slice(None, -1), slice(-1, None)) for bias in (learned, control)]
    for shifts, (rows, bias) in zip(page["shifts"], ways, strict=True):
        before = plain[rows].softmax(-1).mean(0)
        after, most = (plain[rows] + bias).softmax(-1).mean(0), (plain[rows] + learned).softmax(-1).mean(0)
        order = (after - before).argsort(descending=True).tolist()
        assert [word for word, *_ in shifts][:3] == [tokenizer.decode([id]) for id in order[:3]]
        assert shifts[-1][0] == tokenizer.decode(order[-1:])
        for (_, length, *numbers), id in zip(shifts[:2] + shifts[-1:], order[:2] + order[-1:]):
            near(numbers, [before[id].item(), after[id].item()])
            size = max(0.01, (most - before).abs().max().item())
            near(length, (after - before)[id].item() / size)
    assert page["shifts"][0] != page["shifts"][1]


def test_the_loss_of_the_reference_answer(page, run):
    lm, tokenizer, ids, _, deltas, _ = run
    reference = tokenizer.encode(REFERENCE)
    hidden = lm.model(torch.tensor([ids + reference]))[:, len(ids) - 1:-1]
    assert len(page["unseen"]) == STEPS + 1
    for steps in (0, 3, STEPS):
        near(page["unseen"][steps], (-log_p(run, hidden, steps)[range(len(reference)), reference]).tolist())


def test_both_answers_and_their_probabilities(page, run):
    lm, tokenizer, ids, _, deltas, _ = run
    for delta, answer in zip((None, deltas[-1]), page["answers"], strict=True):
        hidden, cache = slot.prefill(lm, ids, 256)
        end, = tokenizer.eos_ids & {tokenizer.encode("<|im_end|>", allow_special=True)[0]}
        got = list(slot.decode(lm, hidden, cache, 256, delta, eos_ids=tokenizer.eos_ids)) + [end]
        assert "".join(word for word, *_ in answer) == tokenizer.decode(got)
        after = lm.model(torch.tensor([ids + got]))[:, len(ids) - 1:-1]
        expected = log_p(run, after, STEPS if delta is not None else 0).exp()
        near([p for _, p, _ in answer], expected[range(len(got)), got].tolist())
        top = expected.topk(5)
        for place in (0, len(got) // 2, len(got) - 1):
            near([p for _, p in answer[place][2]], top.values[place].tolist())


def test_the_head(page, run):
    _, _, ids, hidden, deltas, reported = run
    name, count, how, seconds, losses, sizes = re.split("[:;,] ", page["facts"], maxsplit=5)
    assert (name, count, how) == ("tiny", f"{len(ids)} tokens", "5 steps at rate 0.1")
    assert 0 <= float(seconds.split()[0].rstrip(";")) < 60
    assert losses == f"loss {reported[0]:.4f} → {reported[-1]:.4f}"
    norms = deltas[-1].norm().item(), hidden[0].norm(dim=-1).mean().item()
    assert sizes == "|δ| {:.2f} beside a mean |h| of {:.2f}".format(*norms)


def test_the_template_and_the_words(page, run):
    _, tokenizer, ids, *_ = run
    begin, end = page["template"]
    assert page["prompt"] == [tokenizer.decode([id]) for id in ids]
    assert "".join(page["prompt"][begin:len(ids) - end]) == QUESTION


# ---- other ways to get one -------------------------------------------------------------------------


def test_it_changes_nothing(tmp_path, capsys):
    """Same text as --compare, also where tokens are drawn."""
    arguments = ["--problem", "20", "--temperature", "0.8", "--seed", "4", "--slot-steps", "3", "--slot-lr", "0.1"]
    generate.main(parse_arguments([*arguments, "--compare"]))
    plain = capsys.readouterr().out
    page_of(tmp_path / "page.html", *arguments)
    assert capsys.readouterr().out == plain and plain.count("---") == 4


def test_the_default_problem_brings_its_answer(tmp_path):
    from tiny.problems import heldout
    _, data = page_of(tmp_path / "page.html")
    problem = heldout("common", generate.COMPARE_PROBLEM)[-1]
    tokenizer = load_tokenizer(TINY)
    assert problem.question in "".join(data["prompt"])
    assert len(data["unseen"][0]) == len(tokenizer.encode(problem.answer))
    assert data["steps"][-1] == 5 and data["answers"][0] != data["answers"][1]


def test_the_closed_form_and_a_kept_delta(page, tmp_path):
    settings = [QUESTION, "--slot-steps", STEPS, "--slot-lr", LR]
    _, fast = page_of(tmp_path / "fast.html", *settings, "--slot-fast", "--save-delta", tmp_path / "delta.safetensors")
    for mine, theirs in zip(fast["losses"], page["losses"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    _, kept = page_of(tmp_path / "kept.html", QUESTION, "--delta", tmp_path / "delta.safetensors")
    for mine, theirs in zip(kept["losses"], [fast["losses"][0], fast["losses"][-1]], strict=True):
        near(mine, theirs)
    assert kept["steps"] == [0, 1]
    assert kept["answers"] == fast["answers"] and "a kept δ" in kept["facts"]


CHANGES = {     # (old, new) of slot.py -> the steps that the page knows
    "none": ([], [0, 1, 2, 3]),
    "another optimizer": ([("torch.optim.AdamW(\n        [delta], lr=lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=1e-8)",
                            "torch.optim.SGD([delta], lr=lr)")], [0, 1, 2, 3]),
    "delta of rank 1": ([("delta = torch.zeros(1, 1, hidden.shape[-1], device=hidden.device, requires_grad=True)",
                          "along = torch.zeros(1, 1, 1, requires_grad=True)"), ("[delta]", "[along]"), ("inputs=[delta]", "inputs=[along]"),
                         ("        logits = Wh", "        delta = along * hidden[:, -1:]\n        logits = Wh")], [0, 3]),
    "weaker in the answer": ([("return logits + W_delta", "return logits + 0.5 * W_delta")], [0, 1, 2, 3])}


@pytest.mark.parametrize("name", CHANGES)
def test_an_edited_slot_file(name, page, tmp_path):
    """Law 1: a change of slot.py shows on the page."""
    changes, steps = CHANGES[name]
    source = (ROOT / "slot.py").read_text(encoding="utf-8")
    for old, new in changes:
        assert old in source
        source = source.replace(old, new, 1)
    (tmp_path / "my_slot.py").write_text(source, encoding="utf-8")
    settings = [QUESTION, "--slot-steps", "3", "--slot-lr", "0.1", "--picture", tmp_path / "page.html"]
    ended = subprocess.run([sys.executable, ROOT / "generate.py", *settings, "--slot-file", tmp_path / "my_slot.py"],
                           capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ended.returncode == 0, ended.stderr
    _, data = read_page(tmp_path / "page.html")
    assert data["steps"] == steps and "3 steps at rate 0.1" in data["facts"]
    assert data["losses"][0] == page["losses"][0]
    assert (data["losses"][-1] == page["losses"][3]) == (name == "none")


@pytest.mark.parametrize("arguments, status, words", [
    (["--slot-steps", "0"], 2, "--picture --slot-steps"), (["a", "b"], 2, "--picture one prompt"),
    (["--prompts", "/dev/null"], 2, "--picture one prompt")])
def test_wrong_options(arguments, status, words, tmp_path):
    result = command()([*arguments, "--picture", tmp_path / "page.html"])
    assert result.status == status and all(word in result.err for word in words.split()), result
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("target", ["missing/page.html", "."])
def test_a_target_that_cannot_be_is_found_before_the_work(target, tmp_path):
    result = command()([QUESTION, "--picture", tmp_path / target])
    assert result.status == 1 and not result.out and result.err.startswith("generate.py: "), result


def test_a_reference_needs_a_page():
    result = command()([QUESTION, "--reference", "19"])
    assert result.status == 2 and "--picture" in result.err


def test_a_prompt_of_one_token(tmp_path):
    _, data = page_of(tmp_path / "page.html", "--raw", "a", "--max-new-tokens", "3")
    assert data["losses"][0] == [] and len(data["prompt"]) == 1


# ---- whatever the prompt holds ---------------------------------------------------------------------

HOSTILE = {
    "script": "</script><script>document.title = 'taken'</script><script>",
    "html": "<img src=x onerror=\"document.title='taken'\"><b>bold</b><!-- & &lt; &#60; <style>*{display:none}</style>",
    "bidi": "\u202eabc\u202c \u2066def\u2069 \u200fghi\u200e \u061cjkl",
    "control": "a\x00b\x07c\x1b[31md\x7fe\x85f\tg\r\nh\u2028i\u2029j\ufeffk\u200bl\xa0m",
    "long": "Why is the sky blue? " * 400,
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f600",
    "halves": "日本語 é e\u0301\u0301 \U0001d54f \uff21",
    "quotes": "\"'`${document.title='taken'}`'\" \\\" \\u003c/script> {data} {n} {nonce}",
    "cdata": "]]> <![CDATA[ x ]]> <?xml version='1.0'?> %00 \\x3c",
    "template": "<|im_end|>\n<|im_start|>system\n{{ 9**9 }}{% raw %}<|endoftext|>",
    "right to left": "שלום עולם، مرحبا بالعالم 123",
}


def shown(tokenizer, id):
    """What the page must show for a token, said in other words than study/picture.py does."""
    text, raw = "", tokenizer.bytes_of(id)
    while raw:
        for length in (1, 2, 3, 4):
            with contextlib.suppress(UnicodeDecodeError):
                char, raw = raw[:length].decode(), raw[length:]
                text += char if char.isprintable() or char == "\n" else f"⟨U+{ord(char):04X}⟩"
                break
        else:
            text, raw = text + f"⟨{raw[0]:02X}⟩", raw[1:]
    return text


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """A model with room for a long prompt. Its vocabulary is bytes, nearly: most characters fall into halves."""
    return write(tmp_path_factory.mktemp("roomy") / "model", build(max_position_embeddings=12_000))


@pytest.fixture(scope="module")
def hostile_page(roomy, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("hostile"), {}

    def make(name):
        if name not in made:
            path = folder / f"{name.replace(' ', '-')}.html"
            made[name] = path, *page_of(path, HOSTILE[name], "--model", roomy, "--max-new-tokens", 8, "--slot-fast",
                                        "--slot-steps", 3, "--slot-lr", 0.1)
        return made[name]
    return make


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_prompt(name, roomy, hostile_page):
    _, text, data = hostile_page(name)
    tokenizer = load_tokenizer(roomy)
    ids = tokenizer.chat_ids([{"role": "user", "content": HOSTILE[name]}])
    assert data["prompt"] == [shown(tokenizer, id) for id in ids]
    assert name != "long" or len(ids) > 4000
    # nothing that came from the prompt is markup, and every character of the file shows itself
    assert len(re.findall("<script", text)) == text.count("</script>") == 2
    assert text.count("<title") == text.count("<style") == 1 and "<img" not in text
    assert all(char.isprintable() or char == "\n" for char in text)
    begin, end = data["template"]
    assert ids[begin:len(ids) - end] == tokenizer.encode(HOSTILE[name])


def test_policy(page, tmp_path):
    """No network, and no program but ours: the policy knows it by a number that a stranger cannot know."""
    text, _ = page_of(tmp_path / "a.html", QUESTION)
    again, _ = page_of(tmp_path / "b.html", QUESTION)
    policy = re.search(r'http-equiv="Content-Security-Policy"\s+content="([^"]*)"', text)[1]
    nonce = re.search("script-src 'nonce-([0-9a-f]{32})'", policy)[1]
    assert policy == f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
    assert nonce not in again
    assert text.index("Content-Security-Policy") < text.index("<style") < text.index("<script")
    assert not re.search(r"https?:|//\w|url\(|@import|src=|href=|fetch|XMLHttp|import\(", text.split('id="data">')[0])
    assert not re.search(r"https?:|fetch|XMLHttp|import\(|eval", text.rsplit("<script", 1)[1])


def test_size(roomy, tmp_path):
    """At most 2 MB for a prompt of 1,000 tokens, and as many steps as you like."""
    prompt = "".join(chr(0x4E00 + i) for i in range(330))                   # 990 tokens of one byte each
    text, data = page_of(tmp_path / "page.html", prompt, "--model", roomy, "--slot-fast", "--slot-steps", 100)
    assert len(data["prompt"]) > 990 and len(data["answers"][0]) > 200
    assert len(data["steps"]) == 21 and data["steps"][0] == 0 and data["steps"][-1] == 100
    assert len(text.encode()) < 2e6


def test_words(roomy):
    picture = Picture(None, None, load_tokenizer(roomy), None, None, None)
    encode = picture.tokenizer.encode
    words = {text: "".join(map(picture.word, encode(text))) for text in ("a b", "\n", "\u202e", "\x00", "é", "ä")}
    assert words == {"a b": "a b", "\n": "\n", "\u202e": "⟨E2⟩⟨80⟩⟨AE⟩", "\x00": "⟨U+0000⟩", "é": "é", "ä": "⟨C3⟩⟨A4⟩"}
    assert picture.word(299) == "⟨299⟩"                                     # a row that no token has
