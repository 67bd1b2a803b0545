"""The page of `generate.py --picture`: its numbers are those of the functions that the command runs, whatever the prompt holds
comes out harmless and right, and a browser, where there is one, shows it without a word of complaint."""
import contextlib
import json
import math
import re
import shutil
import subprocess
import time
import unicodedata
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import forks
import generate
import slot
from checks.options import parse_arguments
from checks.prompts import COMPARE_PROBLEM
from hostile import ROOT, build, command, write
from load_weights import load_model, read_safetensors
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
    return slot.steer(lm.lm_head(hidden), lm.lm_head(deltas[steps]), hidden, 0)[0].log_softmax(-1)


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
    """Averages over the positions that the command averages over, and at the first new one; a bar's length is a share of the
    largest change in both columns."""
    lm, tokenizer, ids, hidden, deltas, _ = run
    plain = lm.lm_head(hidden)[0]                                           # (T, V)
    learned = lm.lm_head(deltas[-1])[0, 0]
    control = unigram(ids, like=learned)
    for place, rows in enumerate((slice(None, None, max(1, len(ids) // 32)), slice(-1, None))):
        before = plain[rows].softmax(-1).mean(0)
        after = [(plain[rows] + bias).softmax(-1).mean(0) for bias in (learned, control)]
        most = max(0.01, *((p - before).abs().max().item() for p in after))
        for shifts, p in zip(page["shifts"][2 * place:], after):
            order = (p - before).argsort(descending=True).tolist()
            ends = [id for id in order[:6] + order[-6:] if abs(p[id] - before[id]) >= max(1e-5, before[id] / 1000)]
            assert [word for word, *_ in shifts] == [tokenizer.decode([id]) for id in ends]
            for (_, length, *numbers), id in zip(shifts, ends):
                near(numbers, [before[id].item(), p[id].item()])
                near(length, (p - before)[id].item() / most)
                assert abs(length) <= 1
    assert len(page["shifts"]) == 4 and page["shifts"][0] != page["shifts"][1]


def test_the_terminal_and_the_page_say_the_same(tmp_path, capsys):
    """'9' 1.1% -> 4.9%: there as here."""
    _, data = page_of(tmp_path / "page.html")
    said = capsys.readouterr().err
    for what, rows in (("more", data["shifts"][0][:6]), ("less", data["shifts"][0][:-7:-1])):
        line = re.search(f"{what} likely  (.*)", said)[1].split("  ")
        assert line == [f"{word!r} {before:.1%} → {after:.1%}" for word, _, before, after in rows]


@torch.no_grad()
def test_a_long_prompt_is_averaged_as_the_command_does(roomy, tmp_path):
    """Of many positions generate.probabilities takes some; the page takes the same."""
    path = tmp_path / "delta.safetensors"
    _, data = page_of(tmp_path / "page.html", "a b c d e f g " * 30, "--model", roomy, "--max-new-tokens", 1, "--save-delta", path)
    lm, tokenizer = load_model(roomy), load_tokenizer(roomy)
    ids = tokenizer.chat_ids([{"role": "user", "content": "a b c d e f g " * 30}])
    assert len(ids) > 200
    before, after = generate.probabilities(lm, slot.prefill(lm, ids, 0)[0], read_safetensors(path)["delta"])
    order = (after - before).argsort(descending=True)[:3]
    for (_, _, *numbers), id in zip(data["shifts"][0], order):
        near(numbers, [before[id].item(), after[id].item()])


class Head:
    """A model whose logits are given: the last layer's output is the logits."""
    def __init__(self, size):
        self.lm_head = torch.nn.Identity()
        self.lm_head.weight = torch.zeros(size)
        self.config = SimpleNamespace(max_position_embeddings=99)


def shifts_of(hidden, delta, tokens=(0, 1)):
    tokenizer = SimpleNamespace(encode=lambda text: [], bytes_of=lambda id: bytes([65 + id]))
    args = SimpleNamespace(reference=None, delta=None, slot_steps=1, slot_lr=0.1, model="m")
    picture = Picture(args, Head(hidden.shape[1]), tokenizer, [], None, None)
    picture.hidden, picture.tokens, picture.seconds, picture.deltas = hidden, list(tokens), 0, [delta[None, None]]
    return picture.data()["shifts"]


def test_tokens_that_do_not_move_are_left_out():
    """One token rises by all that two others lose; the rest keep their nothing, and are not called risers."""
    hidden, delta = torch.full((2, 20), -30.0), torch.zeros(20)
    hidden[:, :3] = torch.tensor([0.0, 1.0, 1.0])
    delta[0] = 3.0
    words = [word for word, *_ in shifts_of(hidden, delta)[0]]
    assert words[0] == "A" and sorted(words[1:]) == ["B", "C"]
    assert shifts_of(hidden, torch.zeros(20))[0] == []
    hidden[:, 0] = 12.0                                     # 99.998 % and more: 100 % -> 100 % is no news
    assert "A" not in [word for word, *_ in shifts_of(hidden, delta)[0]]


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
    assert (name, count, how) == ("tiny", f"{len(ids)}-token prompt", "5 steps at rate 0.1")
    assert 0 <= float(seconds.split()[0].rstrip(";")) < 60
    assert losses == f"loss {reported[0]:.4f} → {reported[-1]:.4f}"
    norms = deltas[-1].norm().item(), hidden[0].norm(dim=-1).mean().item()
    assert sizes == "|δ| {:.2f} beside a mean |h| of {:.2f}".format(*norms)


def test_the_losses_are_those_printed(tmp_path, capsys):
    text, data = page_of(tmp_path / "page.html")
    losses = re.findall(r"\d+\.\d{4}", re.search("loss on the prompt.*", capsys.readouterr().err)[0])
    assert f"loss {losses[0]} → {losses[-1]}" in data["facts"]
    assert "default-src 'none'" in text and not re.search(r"(src|href)=.?https?:", text)
    assert len(text) < 200_000


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
    problem = heldout("common", COMPARE_PROBLEM)[-1]
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
                         ("        logits = Wh", "        delta = along * hidden[:, -1:]\n        logits = Wh")], [0, 1, 2, 3]),
    "a short delta": ([("            optimizer.zero_grad()", "            optimizer.zero_grad()\n            delta.data *= 0.5")], [0, 1, 2, 3]),
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
    ended = forks.run([ROOT / "generate.py", *settings, "--slot-file", tmp_path / "my_slot.py"])
    assert ended.returncode == 0, ended.stderr
    _, data = read_page(tmp_path / "page.html")
    assert data["steps"] == steps and "3 steps at rate 0.1" in data["facts"]
    if name != "weaker in the answer":
        said = [float(loss) for loss in re.search("my_slot.py has it  (.*)", ended.stderr)[1].split(" → ")]
        assert [sum(losses) / len(losses) for losses in data["losses"]] == pytest.approx(said, abs=1e-4)
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
    assert data["losses"][0] == [] and len(data["prompt"]) == 1 and data["shifts"] == [[]] * 4
    assert "1-token prompt" in data["facts"] and "nothing to guess" in data["facts"] and "nan" not in data["facts"]


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
    "right to left": "שלום עולם، مرحبا بالعالم",
}
RIGHT_TO_LEFT = ["שלום", " עולם،", " مر", "حبا", " بالعالم"]                   # as its tokens


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
    """A model with room for a long prompt. Its vocabulary is bytes, nearly: most characters fall into halves. But it is hostile,
    too: what HOSTILE holds are single tokens of it, which --raw lets a prompt use."""
    files = build(max_position_embeddings=12_000)
    tokens = [text for name, text in HOSTILE.items() if name not in ("long", "right to left")] + RIGHT_TO_LEFT
    for id, text in enumerate(tokens, 279):
        files["tokenizer.json"]["added_tokens"].append({"id": id, "content": text, "special": False, "normalized": False,
                                                        "single_word": False, "lstrip": False, "rstrip": False})
    return write(tmp_path_factory.mktemp("roomy") / "model", files)


@pytest.fixture(scope="module")
def hostile_page(roomy, tmp_path_factory):
    """-> a function from a name in HOSTILE to path, text and data of the page. whole: as one token, in no template"""
    folder, made = tmp_path_factory.mktemp("hostile"), {}

    def make(name, whole=False):
        if (name, whole) not in made:
            path = folder / f"{len(made)}.html"
            prompt = ["--raw", f"a{HOSTILE[name]}b"] if whole else [HOSTILE[name]]
            made[name, whole] = path, *page_of(path, *prompt, "--model", roomy, "--max-new-tokens", 8, "--slot-fast",
                                               "--slot-steps", 3, "--slot-lr", 0.1)
        return made[name, whole]
    return make


@pytest.mark.parametrize("whole", [False, True], ids=["typed", "token"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_prompt(name, whole, roomy, hostile_page):
    _, text, data = hostile_page(name, whole)
    tokenizer = load_tokenizer(roomy)
    if whole:
        ids = tokenizer.encode(f"a{HOSTILE[name]}b")
        assert len(ids) == 3 or name in ("long", "right to left")
    else:
        ids = tokenizer.chat_ids([{"role": "user", "content": HOSTILE[name]}])
    assert data["prompt"] == [shown(tokenizer, id) for id in ids]
    assert name != "long" or len(ids) > 4000
    # nothing that came from the prompt is markup, and every character of the file shows itself
    assert len(re.findall("<script", text)) == text.count("</script>") == 2
    assert text.count("<title") == text.count("<style") == 1 and "<img" not in text
    assert all(char.isprintable() or char == "\n" for char in text)
    begin, end = data["template"]
    assert whole or tokenizer.decode(ids[begin:len(ids) - end]) == unicodedata.normalize("NFC", HOSTILE[name])


def test_policy(tmp_path):
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


# ---- in a browser ----------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
browsing = [pytest.mark.browser, pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and chromedriver; on Debian: "
                                                    "apt-get install chromium chromium-driver")]
SWITCHES = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--no-first-run", "--no-default-browser-check", "--hide-scrollbars")


class Browser:
    """Chromium by way of chromedriver's protocol (https://www.w3.org/TR/webdriver2/): JSON over HTTP."""

    def __init__(self, folder):
        self.driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for line in self.driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                break
        self.address = f"http://127.0.0.1:{found[1]}"
        options = {"binary": CHROMIUM, "args": [*SWITCHES, f"--user-data-dir={folder}"]}
        asked = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.call("/session", capabilities={"alwaysMatch": asked})
        self.address += f"/session/{session['sessionId']}"

    def call(self, path, **body):
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()[:500]}") from None

    def open(self, path, width=1000, height=1200, **media):
        """media: features such as prefers_color_scheme="dark"; type="print"."""
        self.messages()
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        kind = media.pop("type", "")
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.devtools("Emulation.setEmulatedMedia", media=kind, features=features)
        self.call("/url", url=Path(path).as_uri())

    def run(self, script, *arguments):
        return self.call("/execute/sync", script=script, args=list(arguments))

    def devtools(self, command, **parameters):
        return self.call("/goog/cdp/execute", cmd=command, params=parameters)

    def messages(self):
        return self.call("/se/log", type="browser")

    def press(self, *keys):
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("/actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def point_at(self, selector):
        """Move the mouse to the middle of an element."""
        x, y = self.run("""const node = document.querySelector(arguments[0]);
            node.scrollIntoView({block: 'center'});
            const box = node.getClientRects()[0];
            return [box.x + box.width / 2, box.y + box.height / 2];""", selector)
        move = {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}
        self.call("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": [move]}])

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).innerText", selector)

    def close(self):
        try:
            request = urllib.request.Request(self.address, method="DELETE")
            urllib.request.urlopen(request, timeout=20).close()
        finally:
            self.driver.terminate()
            self.driver.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def default_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("default") / "page.html"
    return path, page_of(path)[1]


TAB, RIGHT, LEFT, HOME, END = "\ue004", "\ue014", "\ue012", "\ue011", "\ue010"
COLOURS = "return [...document.querySelectorAll('#prompt > *')].map(node => getComputedStyle(node).backgroundColor)"


class TestBrowser:
    pytestmark = browsing

    def test_nothing_to_complain_about(self, browser, default_page):
        path, data = default_page
        browser.open(path)
        assert browser.messages() == []
        assert browser.run("return document.querySelectorAll('#prompt > *').length") == len(data["prompt"])
        assert data["facts"] == browser.text("#facts")
        tags = browser.run("return [...document.querySelectorAll('#prompt > *')].map(node => node.localName)")
        begin, end = data["template"]
        assert tags == ["i"] * begin + ["span"] * (len(tags) - begin - end) + ["i"] * end
        here = browser.text("#here").replace("\u2068", "").replace("\u2069", "")
        ratios = [math.exp(before - after) for before, after in zip(data["losses"][0], data["losses"][-1])]
        more, less = sum(ratio >= 1.1 for ratio in ratios), sum(ratio <= 0.9 for ratio in ratios)
        assert all(f"{mark}: {what}" in browser.text("body") for mark, what in (("↵", "line break"), ("␣", "space"), ("⟨U+0009⟩", "tab")))
        assert here.startswith(f"With δ, {more} of the {len(ratios)} tokens here are likelier by a tenth or more, {less} less")
        assert re.search(r"The answers part at answer token 2: plain “bike Lucy [^”]*…” \((.*) %\), with δ “scooter Lucy [^”]*…” \((.*) %\)",
                         here).groups() == tuple(f"{100 * answer[1][1]:.1f}" for answer in data["answers"])
        assert len(browser.run("return performance.getEntriesByType('resource')")) == 0        # nothing was loaded

    def test_the_curves_are_on_one_scale(self, browser, default_page):
        """What both have in height is the share of the first loss: the prompt's falls by two fifths, the answer's hardly."""
        path, data = default_page
        browser.open(path)
        lines = browser.run("return [...document.querySelectorAll('#curves svg path:first-of-type')].map(node => node.getAttribute('d'))")
        assert len(lines) == 2
        captions = browser.text("#curves")
        means = [[sum(step) / len(step) for step in data[which]] for which in ("losses", "unseen")]
        shares = [[loss / losses[0] for loss in losses] for losses in means]
        low, high = min(map(min, shares)), max(map(max, shares))
        for line, losses, share in zip(lines, means, shares, strict=True):
            heights = [float(point.split(",")[1]) for point in line[1:].split("L")]
            assert heights == pytest.approx([100 * (high - x) / (high - low) for x in share], abs=1e-3)
            change = f"{100 * share[-1] - 100:+.1f}".replace("-", "−")
            assert (f"{losses[0]:.4f} → {losses[-1]:.4f} ({change} %), lowest after step {data['steps'][losses.index(min(losses))]}"
                    in captions)
        assert "The prompt, which δ sees" in captions and "The reference answer, which δ never sees" in captions

    def test_bars_do_not_clip(self, browser, default_page):
        """The longest of δ's and the control's is whole, all others in proportion."""
        path, data = default_page
        browser.open(path)
        bars = browser.run("return [...document.querySelectorAll('#shifts .bar')].map(node => parseFloat(node.style.getPropertyValue('--much')))")
        assert bars == pytest.approx([100 * abs(length) for rows in data["shifts"] for _, length, *_ in rows], abs=1e-3)
        averaged = bars[:len(data["shifts"][0]) + len(data["shifts"][1])]
        assert max(averaged) == 100 and averaged.count(100) == 1
        titles = browser.text("#shifts")
        for name in ("δ", "Control: word counts, nothing learned"):
            assert f"{name}\naveraged over the prompt" in titles and f"{name}\nfirst token of the answer" in titles

    def test_a_prompt_of_one_token(self, browser, tmp_path):
        """It is said in words that there is nothing to guess, not in NaN and 0 of 0."""
        page_of(tmp_path / "page.html", "--raw", "a", "--max-new-tokens", 3)
        browser.open(tmp_path / "page.html")
        shown = browser.text("body")
        assert "One token teaches δ nothing. The answers agree" in shown and shown.count("no token moves") == 4
        assert "nan" not in shown.lower() and "of the 0" not in shown and browser.messages() == []
        page_of(tmp_path / "page.html", "--raw", "a", "--max-new-tokens", 3, "--reference", "19")
        browser.open(tmp_path / "page.html")
        assert browser.text("#curves").count("→") == 1 and "NaN" not in browser.text("body") and browser.messages() == []

    def test_the_policy_holds(self, browser, default_page):
        """What a stranger's text could try if it ever got into the page: the policy lets none of it run or load."""
        browser.open(default_page[0])
        browser.run("""document.body.insertAdjacentHTML('beforeend',
            '<img src="http://127.0.0.1:9/x.png" onerror="window.taken = 1"><a id=link onclick="window.taken = 2">x</a>');
            document.body.appendChild(document.createElement('script')).textContent = 'window.taken = 3';
            document.getElementById('link').click();""")
        time.sleep(0.2)
        assert browser.run("return window.taken ?? null") is None
        said = " ".join(message["message"] for message in browser.messages())
        assert said.count("Content Security Policy") >= 3, said

    def test_slider(self, browser, default_page):
        path, data = default_page
        browser.open(path)
        last = browser.run(COLOURS)
        assert len(set(last)) > 4
        browser.run("document.getElementById('step').focus()")
        assert f"5: loss {sum(data['losses'][5]) / len(data['losses'][5]):.4f}" == browser.text("#loss")
        browser.press(LEFT)
        assert f"4: loss {sum(data['losses'][4]) / len(data['losses'][4]):.4f}" == browser.text("#loss")
        assert browser.run(COLOURS) != last
        browser.press(HOME)
        assert browser.text("#loss").startswith("0: loss") and len(set(browser.run(COLOURS)[1:])) == 1      # nothing has changed yet
        browser.press(END)
        assert browser.run(COLOURS) == last

    def test_colour_says_how_much_and_which_way(self, browser, default_page):
        """The strongest blue is where the loss fell most. (No orange here but in the legend.)"""
        path, data = default_page
        browser.open(path)
        gains = [before - after for before, after in zip(data["losses"][0], data["losses"][-1])]
        much = browser.run("return [...document.querySelectorAll('#prompt > *')].slice(1).map(node => parseFloat("
                           "node.style.getPropertyValue('--much')))")
        falls = browser.run("return [...document.querySelectorAll('#prompt > *')].slice(1).map(node => node.classList.contains('falls'))")
        assert much[gains.index(max(gains))] == 100
        scale = sorted(map(abs, gains), reverse=True)[len(gains) // 20]
        for gain, share, fell in zip(gains, much, falls, strict=True):
            assert share == pytest.approx(100 * min(1, abs(gain) / scale), abs=1.1)
            assert fell == (gain / scale < -0.01) or abs(gain / scale + 0.01) < 1e-3
        legend = browser.run("return [...document.querySelectorAll('#legend > *')].map(node => node.innerText.trim())")
        assert [label[0] for label in legend] == ["÷", "÷", "×", "×", "×"] and legend[0][1:] == legend[-1][1:]

    def test_hover_and_focus_tell_of_a_token(self, browser, default_page):
        path, data = default_page
        browser.open(path)
        browser.point_at("#prompt > :nth-child(4)")
        card = browser.text("#card")
        for k in (0, -1):
            shown = re.search(rf"^{data['prompt'][3]} after step {data['steps'][k]}: ([\d.]+) %", card, re.M)[1]
            assert float(shown) / 100 == pytest.approx(math.exp(-data["losses"][k][2]), rel=0.005)
            for word, p in data["tops"][k][2]:
                assert word.replace(" ", "␣").replace("\n", "↵") in card
        assert data["prompt"][3] in card and card.count("%") == 2 + 6
        browser.run("document.getElementById('step').focus()")
        browser.press(TAB)                                          # to the first token
        assert browser.text("#card") == "First token: nothing before it to guess from."
        browser.press(RIGHT, RIGHT, LEFT)                           # on to the second
        assert browser.run("return [...document.querySelector('#prompt').children].indexOf(document.activeElement)") == 1
        assert data["prompt"][1] in browser.text("#card")
        browser.press(TAB)                                          # the answers, each one stop
        assert browser.run("return document.activeElement.innerText") == data["answers"][0][0][0]
        assert browser.text("#card").count("By") >= 2

    def test_where_the_answers_part(self, browser, default_page):
        path, data = default_page
        browser.open(path)
        marked = browser.run("return [...document.querySelectorAll('.fork')].map(node => node.textContent)")
        assert marked == [" bike", " scooter"]
        shown = browser.text("#answers")
        for answer in data["answers"]:
            assert all(word.replace(" ", "␣") in shown for word, _ in answer[1][2])

    def test_answers_that_agree(self, browser, tmp_path):
        _, data = page_of(tmp_path / "page.html", "--problem", 12)
        steered = data["answers"][1]
        assert [word for word, *_ in data["answers"][0]] == [word for word, *_ in steered]
        gaps = [top[0][1] - top[1][1] for *_, top in steered]
        place = gaps.index(min(gaps))
        browser.open(tmp_path / "page.html")
        assert f"agree, least surely at answer token {place + 1}: plain" in browser.text("#here")
        marked = browser.run("return [...document.querySelectorAll('.fork')].map(node => node.textContent)")
        assert marked == [steered[place][0].replace("\n", "↵\n")] * 2 and browser.messages() == []

    @pytest.mark.parametrize("whole", [False, True], ids=["typed", "token"])
    @pytest.mark.parametrize("name", HOSTILE)
    def test_hostile_prompt(self, name, whole, browser, hostile_page):
        """Every token is there, in order, as text; the page around it is the page."""
        path, _, data = hostile_page(name, whole)
        browser.open(path)
        assert browser.messages() == []
        assert browser.run("return document.title") == "What SLOT did to a prompt"
        shown = browser.run("return [...document.querySelectorAll('#prompt > *')].map(node => node.textContent)")
        assert shown == [word.replace("\n", "↵\n") for word in data["prompt"]]
        tags = set(browser.run("return [...document.querySelectorAll('#prompt *, #answers *, #shifts *')].map(node => node.localName)"))
        assert tags <= {"span", "i", "div", "bdi"}
        assert browser.run("return document.querySelectorAll('script, style, title').length") == 4
        sizes = browser.run("return [...document.querySelectorAll('#prompt > *')].map(node => node.getBoundingClientRect().width)")
        assert all(width > 0 for width, word in zip(sizes, data["prompt"]) if word != "\n")
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")

    def test_direction(self, browser, roomy, hostile_page, tmp_path):
        """Marks that turn a line around turn nothing; letters of scripts that run to the left run to the left."""
        places = ("return [...document.querySelectorAll('#prompt > *')].slice(arguments[0], -arguments[1])"
                  ".map(node => node.getBoundingClientRect()).map(box => [Math.round(box.top), box.left])")
        path, _, data = hostile_page("bidi")
        browser.open(path, width=1600)
        boxes = browser.run(places, *data["template"])
        line = [left for top, left in boxes if top == boxes[0][0]]
        assert line == sorted(line) and len(set(line)) > 6

        path, _, data = hostile_page("right to left", whole=True)
        browser.open(path, width=1600)
        line = [left for _, left in browser.run(places, 1, 1)][:5]
        assert line == sorted(line, reverse=True) and len(set(line)) == 5, data["prompt"]
        assert browser.run("return document.querySelectorAll('#shifts bdi').length") == sum(map(len, data["shifts"]))

        # a paragraph that begins in Hebrew begins at the right
        page_of(tmp_path / "page.html", "--raw", HOSTILE["right to left"], "--model", roomy, "--max-new-tokens", 8, "--slot-fast")
        browser.open(tmp_path / "page.html")
        assert browser.run("const box = document.querySelector('#prompt'); return Math.abs("
                           "box.getBoundingClientRect().right - box.firstChild.getBoundingClientRect().right)") < 2

    @pytest.mark.parametrize("width", [1000, 360])
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_schemes_and_widths(self, width, scheme, browser, default_page):
        """No sideways scrolling, and every coloured word can be read: contrast of at least 4.5 (WCAG 2 AA)."""
        browser.open(default_page[0], width=width, prefers_color_scheme=scheme)
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        browser.run("document.querySelectorAll('.tint').forEach(node => node.style.setProperty('--much', '100%'))")
        pairs = browser.run("""const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
            const light = colour => {
              canvas.fillStyle = colour;
              canvas.fillRect(0, 0, 1, 1);
              const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(x => x / 255).map(
                x => x > 0.04045 ? ((x + 0.055) / 1.055) ** 2.4 : x / 12.92);
              return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            return [...document.querySelectorAll('.tint')].map(node => getComputedStyle(node)).map(
              style => [light(style.color), light(style.backgroundColor)]);""")
        contrasts = [(max(pair) + 0.05) / (min(pair) + 0.05) for pair in pairs]
        assert len(contrasts) > 100 and min(contrasts) >= 4.5
        dark = pairs[-1][1] < 0.2
        assert dark == (scheme == "dark")

    def test_told_apart_by_the_colour_blind(self, browser, default_page):
        """Likelier and less likely, as seen without one of the three cones (Machado et al. 2009, severity 1)."""
        for scheme in ("light", "dark"):
            browser.open(default_page[0], prefers_color_scheme=scheme)
            colours = browser.run("""const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
                return [...document.querySelectorAll('#legend > *')].map(node => {
                  canvas.fillStyle = getComputedStyle(node).backgroundColor;
                  canvas.fillRect(0, 0, 1, 1);
                  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
                });""")
            down, _, same, _, up = (torch.tensor(colour) / 255 for colour in colours)
            for cones in ([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
                          [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
                          [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]):
                linear = [torch.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92) for c in (down, same, up)]
                d, s, u = (torch.tensor(cones) @ c for c in linear)
                assert (d - u).norm() > 0.25 and (d - s).norm() > 0.1 and (u - s).norm() > 0.1, (scheme, d, s, u)

    def test_print(self, browser, default_page):
        """On paper: light, with its colours, without the card; in a dark scheme, too."""
        browser.open(default_page[0], type="print", prefers_color_scheme="light")
        assert browser.run("return getComputedStyle(document.getElementById('card')).display") == "none"
        assert browser.run("return getComputedStyle(document.body).printColorAdjust") == "exact"
        boxes = "return [...document.querySelectorAll('#curves > *, #answers > *')].map(node => getComputedStyle(node).breakInside)"
        assert browser.run(boxes) == ["avoid"] * 6                          # a title stays with what is below it
        assert browser.run("return getComputedStyle(document.querySelector('h2')).breakAfter") == "avoid"
        browser.open(default_page[0], width=686, type="print")              # what A4 leaves within its margins
        assert browser.run("return getComputedStyle(document.querySelector('#shifts')).gridTemplateColumns").count("px") == 2
        browser.open(default_page[0], prefers_color_scheme="dark")
        printed = browser.devtools("Page.printToPDF", printBackground=True)["data"]
        assert len(printed) > 20_000

    def test_text_can_be_selected(self, browser, default_page):
        path, data = default_page
        browser.open(path)
        for selector, words in (("#prompt", data["prompt"]), ("#answers .text", [word for word, *_ in data["answers"][0]])):
            got = browser.run("getSelection().selectAllChildren(document.querySelector(arguments[0]));"
                              "return getSelection().toString()", selector)
            assert got.split() == "".join(words).replace("\n", "↵\n").split()
