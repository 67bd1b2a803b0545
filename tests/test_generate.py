"""generate.py as a user types it: text on stdout and nothing else, figures on stderr; prompts from
everywhere; SLOT, --compare, a δ that is kept, a slot.py of one's own. And the sampler.

What the command prints is held against the library, put together here by hand. Wrong options, signals and
closed pipes are in test_checks_command.py, bad prompts in test_checks_prompts.py.
"""
import functools
import json
import re
import signal

import pytest
import torch

import checks.memory
import forks
import generate as command_file
import slot
from checks.memory import check_memory, free_memory
from generate import sampler
from hostile import ROOT, build, command, write
from load_weights import load_model, read_safetensors, write_safetensors
from slot_cases import no_speed
from tiny.problems import heldout
from tokenizer import load_tokenizer

TINY = ROOT / "tiny"
APPLES = "Noah has 3 packs of 11 apples and 31 loose apples. How many apples does he have?"
BOOKS = "Emma buys 4 books for $6 each. How much does she pay?"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder whose answers are nonsense, quickly."""
    return write(tmp_path_factory.mktemp("generate") / "model", build())


@functools.cache
def tools(folder=TINY):
    return load_model(folder), load_tokenizer(folder)


def ids_of(prompt, folder=TINY, system=None):
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return tools(folder)[1].chat_ids(messages)


def text(prompt, folder=TINY, new=256, system=None, **options):
    """The answer by the library."""
    lm, tokenizer = tools(folder)
    ids = prompt if isinstance(prompt, list) else ids_of(prompt, folder, system)
    new = min(new, lm.config.max_position_embeddings - len(ids))
    return tokenizer.decode(list(slot.generate(lm, ids, new, eos_ids=tokenizer.eos_ids, **options)), True)


def run(*arguments, **options):
    result = command()(arguments, **options)
    assert result.status == 0 and "Traceback" not in result.err, result
    return result


def losses(result):
    """What stands behind "loss on the prompt"."""
    return [float(x) for x in re.search(r"loss on the prompt  (.*)", result.err)[1].split(" → ")]


def process(*arguments):
    """A run that loads its modules itself, for what happens while they load."""
    done = forks.run([ROOT / "generate.py", *arguments])
    assert "Traceback" not in done.stderr, done.stderr
    return done


# ---- one prompt ------------------------------------------------------------------------------------------


def test_the_first_command():
    """python generate.py --slot-steps 3: a held-out problem, its answer on stdout and nothing else there."""
    done = process("--slot-steps", 3)
    problem = heldout("common", 1)[0]
    assert done.returncode == 0 and done.stdout == text(problem.question, steps=3) + "\n"
    assert done.stdout.endswith(problem.answer.splitlines()[-1] + "\n"), "and it is right"
    words = [line.split()[0] for line in done.stderr.splitlines() if line[:1].isalpha()]
    assert words == ["prompt", problem.question.split()[0], "model", "prompt", "slot", "decode"]
    assert "held-out problem 1 of the embedded model" in done.stderr and problem.question in done.stderr
    assert "the loop of slot.py" in done.stderr and "3 steps, lr 0.01" in done.stderr


def test_losses_are_those_of_the_fit():
    """One for each step and one after the last, and they are the loop's own."""
    question = heldout("common", 1)[0].question
    lm, tokens = tools()[0], ids_of(question)
    hidden, _ = slot.prefill(lm, tokens, 1)
    for steps, lr in ((3, 0.01), (5, 0.1), (1, 0.5)):
        _, exact = slot.optimize_delta(hidden, tokens, lm.lm_head, steps, lr)
        said = losses(run("--slot-steps", steps, "--slot-lr", lr, "--max-new-tokens", 2))
        assert said == [round(x, 4) for x in exact.tolist()]


def test_a_prompt_of_one_token_leaves_nothing_to_guess():
    """There is no loss, δ stays 0, and the answer is the plain one."""
    plain = run("--raw", "a", "--max-new-tokens", 3)
    result = run("--raw", "a", "--max-new-tokens", 3, "--slot-steps", 2)
    assert "prompt    1 tokens" in result.err and result.out == plain.out
    assert "loss on the prompt  none: nothing to guess\n" in result.err and "nan" not in result.err
    assert "more likely  none\n" in result.err and "less likely  none\n" in result.err


@no_speed
def test_slot_fast_gives_the_same():
    for lr in (0.01, 0.1):
        slow, fast = (run("--slot-steps", 5, "--slot-lr", lr, *more) for more in ([], ["--slot-fast"]))
        assert fast.out == slow.out and "closed form" in fast.err and "closed form" not in slow.err
        assert losses(fast) == pytest.approx(losses(slow), abs=2e-4)
    tight = run("--slot-steps", 5, "--slot-lr", 0.1, "--slot-fast", "--slot-memory", 1e-6)
    assert tight.out == fast.out and losses(tight) == pytest.approx(losses(fast), abs=2e-4)


def test_a_rate_alone_means_three_steps():
    short = functools.partial(run, "--max-new-tokens", 2)
    result = short("--slot-lr", 0.1)
    assert len(losses(result)) == 4 and "3 steps, lr 0.1" in result.err
    assert losses(result) == losses(short("--slot-lr", 0.1, "--slot-steps", 3))
    assert "slot " not in short("--slot-lr", 0.1, "--slot-steps", 0).err
    assert "slot " not in short().err


def test_compare_has_settings_of_its_own():
    """5 steps at 0.1, of which either may be another."""
    short = functools.partial(run, "--compare", "--max-new-tokens", 2)
    for options, said in (((), "5 steps, lr 0.1,"), (("--slot-steps", 2), "2 steps, lr 0.1,"), (("--slot-lr", 0.01), "5 steps, lr 0.01,"),
                          (("--slot-steps", 3, "--slot-lr", 0.2), "3 steps, lr 0.2,")):
        assert said in short(*options).err


def test_problem_picks_and_seed_only_seeds():
    problems = heldout("common", 40)
    result = run("--problem", 40, "--max-new-tokens", 3)
    assert problems[39].question in result.err and "held-out problem 40" in result.err
    for seed in (1, 39):
        assert problems[0].question in run("--seed", seed, "--max-new-tokens", 3).err


def test_a_prompt_of_ones_own():
    result = run(APPLES)
    assert result.out == text(APPLES) + "\n" and result.out.endswith("#### 64\n")
    assert "held-out" not in result.err
    piped = run("--max-new-tokens", 1, stdin=APPLES.encode())
    named = command()(["--model", "tiny", APPLES, "--max-new-tokens", 1])
    for each in (result, piped, named):
        assert "it solves word problems" in each.err, "the embedded model says what it is for"


def test_where_a_prompt_may_come_from(model):
    """An argument, standard input for -, a pipe or a file on standard input: the same."""
    expected = text("hello", model, new=9) + "\n"
    arguments = "--model", model, "--max-new-tokens", 9
    assert run(*arguments, "hello").out == expected
    assert run(*arguments, "-", stdin=b"hello").out == expected
    assert run(*arguments, stdin=b"hello").out == expected
    for end in (b"\n", b"\r\n"):
        assert run(*arguments, stdin=b"hello" + end).out == expected, "echo adds a line break"
    assert forks.run([ROOT / "generate.py", *arguments], stdin="hello\n").stdout == expected
    # an argument counts more than a pipe; nothing is read from it
    assert run(*arguments, "hello", stdin=b"other").out == expected
    assert run(*arguments, "-", stdin="é\u2028".encode()).out == text("é\u2028", model, new=9) + "\n"
    assert "held-out" in run("--max-new-tokens", 1, stdin=b"").err


def test_system_and_raw(model):
    arguments = "--model", model, "--max-new-tokens", 9, "hello"
    answers = [run(*arguments, *more).out for more in ([], ["--system", "Be brief."], ["--raw"])]
    assert answers[1] == text("hello", model, new=9, system="Be brief.") + "\n"
    tokenizer = tools(model)[1]
    assert answers[2] == text(tokenizer.bos_ids + tokenizer.encode("hello"), model, new=9) + "\n"
    assert len(set(answers)) == 3


def test_a_cut_answer_says_so():
    whole = run()
    count = int(re.search(r"then (\d+) tokens", whole.err)[1])
    assert "cut at" not in whole.err
    assert "cut at" not in run("--max-new-tokens", count + 1).err, "the end came by itself"
    cut = run("--max-new-tokens", count - 1)
    assert f"note      cut at {count - 1} new tokens; --max-new-tokens allows more" in cut.err
    assert whole.out.startswith(cut.out[:-1]) and len(cut.out) < len(whole.out)
    assert run("--max-new-tokens", 1).out == whole.out.split()[0] + "\n"


def test_as_many_tokens_as_the_model_has_positions(tmp_path):
    short = write(tmp_path / "short", build(max_position_embeddings=40))
    length = len(ids_of("hello", short))
    result = run("--model", short, "hello")
    assert f"cut at {40 - length} new tokens; the model has no more positions" in result.err
    assert result.out == text("hello", short, new=40 - length) + "\n"
    refused = command()(["--model", short, "hello", "--max-new-tokens", 40])
    assert refused.status == 1 and f"--max-new-tokens {40 - length} fits" in refused.err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fast", [[], pytest.param(["--slot-fast"], marks=no_speed)], ids=["loop", "fast"])
def test_dtypes(dtype, fast, model):
    result = run("--model", model, "hello", "--dtype", dtype, "--slot-steps", 3, "--max-new-tokens", 4, *fast)
    assert f", {dtype}, cpu," in result.err and len(losses(result)) == 4


def test_text_comes_as_it_is_made(tmp_path):
    """The first word is there while the answer goes on, and half a character is never printed."""
    endless = build(max_position_embeddings=100_000, eos_token_id=None)
    endless["generation_config.json"] = {}
    del endless["tokenizer_config.json"]["eos_token"]
    folder = write(tmp_path / "endless", endless)
    running = forks.Fork([ROOT / "generate.py", "--model", folder, "a", "--max-new-tokens", "90000"])
    some = running.stdout.buffer.read(50)
    assert running.poll() is None, "it has not ended yet"
    running.send_signal(signal.SIGTERM)
    (some + running.stdout.buffer.read()).decode()


def test_the_loop_that_needs_too_much_memory_is_refused():
    """Before the work, in one line, with the way out."""
    with pytest.raises(ValueError, match=r"needs 14[0-9]{3}\.\d GiB for 1000000 tokens .* --slot-fast"):
        check_memory(1_000_000, 1_000_000, "cpu")
    with pytest.raises(ValueError, match="are free; shorten the prompt$"):
        check_memory(1_000_000, 1_000_000, "cpu", "my_slot.py")             # for which --slot-fast is refused
    check_memory(10, 1000, "cpu")


def test_a_container_may_have_less_memory_than_its_machine(tmp_path, monkeypatch):
    """What it uses for files that could be read again counts as free."""
    monkeypatch.setattr(checks.memory, "CGROUP", tmp_path)
    machine = free_memory("cpu")
    assert machine > 5000
    for name, text in (("memory.current", "4000"), ("memory.stat", "anon 1000\ninactive_file 3000\n"), ("memory.max", "max")):
        (tmp_path / name).write_text(text + "\n")
    assert free_memory("cpu") > 5000
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory("cpu") == 4000


# ---- what δ changes --------------------------------------------------------------------------------------


SHARES = re.compile(r"('(?:[^'\\]|\\.)*'|\"[^\"]*\") ([\d.]+)% → ([\d.]+)%")


def test_probabilities_before_and_after():
    """Mean probabilities over the prompt's positions, largest change first; they are true."""
    question = heldout("common", 1)[0].question
    result = run("--slot-steps", 5, "--slot-lr", 0.1, "--max-new-tokens", 2)
    lm, tokenizer = tools()
    tokens = ids_of(question)
    with torch.no_grad():
        hidden, _ = slot.prefill(lm, tokens, 1)
        delta, _ = slot.optimize_delta(hidden, tokens, lm.lm_head, 5, 0.1)
        plain = lm.lm_head(hidden)[0].softmax(-1).mean(0)
        steered = lm.lm_head(hidden + delta)[0].softmax(-1).mean(0)
    for what, sign in (("more", 1), ("less", -1)):
        line = re.search(f"{what} likely (.*)", result.err)[1]
        said = [(word, float(a) / 100, float(b) / 100) for word, a, b in SHARES.findall(line)]
        assert len(said) == 6 and all(sign * (b - a) >= 0 for _, a, b in said)
        moved = [sign * (b - a) for _, a, b in said]
        assert all(x >= y - 0.0021 for x, y in zip(moved, moved[1:]))
        for word, a, b in said:
            id, = tokenizer.encode(eval(word))
            assert abs(plain[id] - a) < 0.006 and abs(steered[id] - b) < 0.006, (word, a, plain[id], b)


def test_no_half_characters_among_the_words(model):
    """Most tokens of this vocabulary are single bytes, half of them no character by themselves."""
    err = run("--model", model, "\U0001F600é" * 5, "--slot-steps", 3, "--max-new-tokens", 2).err
    lines = [line for line in err.splitlines() if " likely  " in line]
    assert len(lines) == 2 and all(SHARES.search(line) for line in lines)
    assert "\ufffd" not in err and "\\x" not in err


# ---- --compare -------------------------------------------------------------------------------------------


def test_compare():
    """Both answers are what each command gives by itself; the default problem is one that SLOT changes."""
    result = run("--compare")
    _, plain, steered = re.split(r"--- (?:plain|with δ) ---\n", result.out)
    problem = int(re.search(r"held-out problem (\d+)", result.err)[1])
    assert problem != 1 and "chosen because 5 steps at 0.1 change its answer" in result.err
    assert plain == run("--problem", problem).out != steered
    assert steered == run("--problem", problem, "--slot-steps", 5, "--slot-lr", 0.1).out
    assert len(losses(result)) == 6 and result.err.count("prefill") == 3

    at, old, new = re.search(r"they part at new token (\d+): plain (.+), with δ (.+)", result.err).groups()
    tokenizer = tools()[1]
    at = int(at) - 1
    ids = [tokenizer.encode(answer) for answer in (plain, steered)]
    assert ids[0][:at] == ids[1][:at]
    assert [tokenizer.decode([each[at]]) for each in ids] == [eval(old), eval(new)]


def test_compare_where_nothing_changes():
    result = run("--compare", "--slot-lr", 1e-9)
    _, plain, steered = re.split(r"--- (?:plain|with δ) ---\n", result.out)
    assert plain == steered and re.search(r"compare   the same \d+ tokens\n", result.err)


def test_compare_draws_alike():
    """With a temperature both answers have the same luck: what differs is SLOT's doing."""
    result = run("--compare", "--slot-lr", 1e-9, "--temperature", 2, "--seed", 5, "--max-new-tokens", 30)
    _, plain, steered = re.split(r"--- (?:plain|with δ) ---\n", result.out)
    assert plain == steered != run("--problem", 57, "--max-new-tokens", 30).out


def test_compare_says_where_one_ends(capsys):
    tokenizer = tools()[1]
    five = tokenizer.encode("By bike Lucy goes 9")
    for plain, steered, words in ((five, five[:3], "they part at new token 4: plain .*, with δ the end"),
                                  (five[:2], five, "they part at new token 3: plain the end, with δ "),
                                  (five, five, f"the same {len(five)} tokens")):
        command_file.say_where_they_part(tokenizer, plain, steered)
        assert re.search(words, capsys.readouterr().err)


# ---- several prompts -------------------------------------------------------------------------------------


def headings(result):
    return re.findall(r"^--- (.*) ---$", result.out, re.M)


def answers(result):
    text = result.stdout if hasattr(result, "stdout") else result.out
    return re.split(r"^--- .* ---\n", text, flags=re.M)[1:]


SLOT = ["--slot-steps", 5, "--slot-lr", 0.1]


@pytest.mark.parametrize("options", [
    [], SLOT, pytest.param([*SLOT, "--slot-fast"], marks=no_speed)], ids=["plain", "loop", "fast"])
def test_several_prompts(options):
    """Each gets what it gets alone, under a heading that says which it is."""
    given = [APPLES, BOOKS, heldout("common", 3)[2].question]
    result = run(*given, *options)
    assert headings(result) == [f"{place} of 3: {command_file.show(prompt)}"
                                for place, prompt in enumerate(given, 1)]
    assert answers(result) == [run(prompt, *options).out for prompt in given]


def test_a_long_prompt_cuts_no_other_answer(tmp_path):
    """Without --max-new-tokens each answer is as long as its own prompt leaves room for."""
    short = write(tmp_path / "short", build(max_position_embeddings=40))
    given = ["hello", "hello there, you", "hi"]
    alone = [run("--model", short, prompt).out for prompt in given]
    assert len({len(ids_of(prompt, short)) for prompt in given}) == 3
    assert answers(run("--model", short, *given)) == alone


def test_tokens_a_second_are_those_of_the_answer(monkeypatch, capsys):
    """The pass that finds the end is none of them: a pass a second makes one token a second."""
    now = [0.0]
    monkeypatch.setattr(command_file.time, "perf_counter", lambda: now[0])

    def decoded():
        for id in (70, 71, 72):
            now[0] += 1
            yield id
        now[0] += 1

    command_file.answer(tools()[1], decoded(), 9, 9, 0)
    assert "then 3 tokens, 1.0 tokens/s" in capsys.readouterr().err


@no_speed
def test_several_cut_answers_say_so():
    cut, fitted = (run(APPLES, BOOKS, "--max-new-tokens", 7, *more).err for more in ([], ["--slot-lr", 0.1]))
    assert "; 2 answers cut at 7 new tokens" in cut and "steps" not in cut
    assert "batch     2 prompts, 3 steps at lr 0.1 each, 14 tokens in " in fitted
    assert "; 0 answers cut at" in run(APPLES, BOOKS).err


def test_a_file_of_prompts(model, tmp_path):
    """A line is a JSON string, an object with its own system text, or a prompt as it stands."""
    lines = ["plain words", json.dumps("a\nb"), json.dumps({"prompt": "hello", "system": "Be brief."}), "",
             json.dumps({"prompt": "hello"}), "17"]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    result = run("--model", model, "--prompts", path, "--system", "S", "--max-new-tokens", 6)
    expected = [("plain words", "S"), ("a\nb", "S"), ("hello", "Be brief."), ("hello", "S"), ("17", "S")]
    assert answers(result) == [text(prompt, model, 6, system) + "\n" for prompt, system in expected]
    assert headings(result)[0] == "1 of 5: 'plain words'" and headings(result)[4].startswith("5 of 5")


def test_many_prompts_go_in_parts(model, tmp_path):
    """More than are answered together: in order, each with its own answer."""
    count = 2 * command_file.TOGETHER + 3
    (tmp_path / "prompts").write_text("\n".join(f"word {n} " + "x" * (n % 7) for n in range(count)))
    arguments = "--model", model, "--max-new-tokens", 3, "--slot-steps", 2, "--slot-lr", 0.1
    result = run(*arguments, "--prompts", tmp_path / "prompts")
    places = [heading.split(":")[0] for heading in headings(result)]
    assert places == [f"{n + 1} of {count}" for n in range(count)]
    for n in (0, 31, 32, 63, 64, count - 1):
        prompt = f"word {n} " + "x" * (n % 7)
        assert answers(result)[n] == text(prompt, model, 3, steps=2, lr=0.1) + "\n", n


def test_rows_draw_differently(model):
    """The same prompt three times is three samples; row n is what seed + n draws alone."""
    arguments = "--model", model, "--temperature", 1.5, "--max-new-tokens", 12
    result = run(*arguments, "hello", "hello", "hello", "--seed", 7)
    alone = [run(*arguments, "hello", "--seed", seed).out for seed in (7, 8, 9)]
    assert answers(result) == alone and len(set(alone)) == 3
    assert run(*arguments, "hello", "hello", "hello", "--seed", 7).out == result.out


# ---- a δ that is kept ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(model, tmp_path_factory):
    """-> a file of --save-delta, and the answer that came with it."""
    path = tmp_path_factory.mktemp("delta") / "delta.safetensors"
    arguments = "--model", model, "--slot-steps", 5, "--slot-lr", 0.5, "--max-new-tokens", 9
    return path, run(*arguments, "hello", "--save-delta", path).out


def test_delta_is_saved_as_it_was_fitted(kept, model):
    path, answer = kept
    lm, tokens = tools(model)[0], ids_of("hello", model)
    hidden, _ = slot.prefill(lm, tokens, 1)
    delta, _ = slot.optimize_delta(hidden, tokens, lm.lm_head, 5, 0.5)
    assert torch.equal(read_safetensors(path)["delta"], delta)
    assert answer == text("hello", model, 9, steps=5, lr=0.5) + "\n" != text("hello", model, 9) + "\n"


def test_delta_answers_again(kept, model):
    """The same answer to the same prompt without a fit; with other prompts it is decoded with, too."""
    path, answer = kept
    arguments = "--model", model, "--max-new-tokens", 9, "--delta", path
    result = run(*arguments, "hello")
    assert result.out == answer and "loss on the prompt" not in result.err and "δ from" in result.err
    others = ["hello", "another prompt", "x"]
    several = run(*arguments, *others)
    assert answers(several) == [run(*arguments, prompt).out for prompt in others]
    assert answers(several)[1] != run("--model", model, "--max-new-tokens", 9, others[1]).out
    compared = run(*arguments, "hello", "--compare")
    assert re.split(r"--- with δ ---\n", compared.out)[1] == answer


def test_delta_fits_a_model_in_any_dtype(kept, model):
    """It belongs to the weights, not to how they were loaded."""
    for dtype in ("float32", "bfloat16", "float16"):
        run("--model", model, "hello", "--dtype", dtype, "--delta", kept[0], "--max-new-tokens", 2)


def test_delta_of_another_model(kept, model, tmp_path):
    """Another width, other weights in the same shapes, no δ at all: one line."""
    def refused(*arguments):
        result = command()([*arguments, "--max-new-tokens", 2])
        line = result.err.splitlines()[-1]
        assert result.status == 1 and line.startswith("generate.py: ") and "Traceback" not in result.err
        return line

    assert "--delta" in refused("hello", "--delta", kept[0])
    other = write(tmp_path / "other", build())
    tensors = read_safetensors(other / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["lm_head.weight"] += 0.25
    write_safetensors(other / "model.safetensors", tensors)
    assert "was fitted to another model" in refused("--model", other, "hello", "--delta", kept[0])
    assert "is no file of --save-delta" in refused("hello", "--delta", other / "model.safetensors")
    broken = read_safetensors(kept[0])
    broken = {"delta": broken["delta"] * torch.inf, "head": broken["head"].clone()}
    write_safetensors(tmp_path / "broken", broken)
    assert "holds what is no number" in refused("--model", model, "hello", "--delta", tmp_path / "broken")
    for several in (["hello"], ["hello", "you"]):
        assert "is a folder" in refused(*several, "--delta", "")
    for name, content in (("missing", None), ("empty", b""), ("text", b"hello" * 9)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert name in refused("hello", "--delta", tmp_path / name)


# ---- a slot.py of one's own ------------------------------------------------------------------------------


def edited(tmp_path, *changes):
    source = (ROOT / "slot.py").read_text()
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (tmp_path / "my_slot.py").write_text(source)
    return tmp_path / "my_slot.py"


def test_slot_file_unchanged(tmp_path):
    done = process("--slot-steps", 3, "--slot-file", edited(tmp_path))
    assert done.returncode == 0 and done.stdout == text(heldout("common", 1)[0].question, steps=3) + "\n"


@no_speed
def test_slot_file_may_use_what_is_in_speed(tmp_path):
    """No room of speed/ brings the others, which need a whole slot.py."""
    mine = edited(tmp_path, ("from model import KVCache", "from model import KVCache\nfrom speed.delta import transposed"))
    done = process("--slot-steps", 3, "--slot-file", mine)
    assert done.returncode == 0 and done.stdout == text(heldout("common", 1)[0].question, steps=3) + "\n"


@pytest.mark.parametrize("several", [False, True])
def test_slot_file_takes_the_place_of_slot(several, tmp_path):
    """Another loss in optimize_delta; another way in which δ enters decoding, for one prompt and for
    several."""
    prompts = [BOOKS, APPLES] if several else [BOOKS]
    arguments = "--slot-steps", 10, "--slot-lr", 0.5, "--max-new-tokens", 12, *prompts
    usual = run(*arguments).out
    backwards = process(*arguments, "--slot-file", edited(tmp_path, (
        "nll = loss(logits[0], targets)", "nll = -loss(logits[0], targets)")))
    assert backwards.returncode == 0 and backwards.stdout != usual
    if not several:
        assert re.search(r"loss as .*my_slot.py has it  (-\d+\.\d{4} → ){10}-", backwards.stderr)
    steered = process(*arguments, "--slot-file", edited(tmp_path, (
        "return logits + W_delta", "return W_delta")))
    assert steered.returncode == 0 and steered.stdout not in (usual, backwards.stdout)


def test_an_edited_prefill_is_gone_back_to(tmp_path):
    """--compare decodes twice from one prefill, whatever the reader's `prefill` has put into the cache: here the prompt, twice."""
    twice = edited(tmp_path, ("    T = len(tokens)\n", "    tokens = [*tokens, *tokens]\n    T = len(tokens)\n"),
                   ("    return hidden, cache\n\n", "    return hidden[:, T // 2:], cache\n\n"))
    usual = "--slot-steps", 5, "--slot-lr", 0.1, "--max-new-tokens", 30, "--slot-file", twice, BOOKS
    assert process(*usual, "--compare").stdout.split("--- with δ ---\n")[1] == process(*usual).stdout


def test_a_slot_file_imports_from_beside_it_and_the_rest_from_the_project(tmp_path):
    """Also from another folder, in which other files have the names of ours."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/helper.py").write_text("SCALE = 0.0\n")
    (tmp_path / "model.py").write_text("raise SystemExit('the wrong model.py')\n")
    mine = edited(tmp_path / "mine", ("from model import", "from helper import SCALE\nfrom model import"),
                  ("return logits + W_delta", "return logits + SCALE * W_delta"))
    done = forks.run([ROOT / "generate.py", "--slot-file", mine, "--slot-steps", "10", "--slot-lr", "0.5", BOOKS], tmp_path)
    assert done.returncode == 0 and done.stdout == text(BOOKS) + "\n", done


def test_an_edited_decode_answers_several_prompts_too(tmp_path):
    """One by one, by itself: speed/batch.py does not know it. An edited `steer`, which depends on h and on the answer's
    length: together."""
    usual = "--slot-steps", 10, "--slot-lr", 0.5, "--max-new-tokens", 12
    fading = edited(tmp_path, ("steer(logits, W_delta, hidden[:, -1:], count)", "steer(logits, W_delta * 0.5 ** count, hidden, count)"))
    alone = [process(*usual, "--slot-file", fading, prompt).stdout for prompt in (BOOKS, APPLES)]
    both = process(*usual, "--slot-file", fading, BOOKS, APPLES)
    assert answers(both) == alone and both.stdout != run(*usual, BOOKS, APPLES).out
    assert ("prefill or decode has been edited" in both.stderr) == (command_file.speed is not None)
    gated = edited(tmp_path, ("return logits + W_delta",
                              "return logits + W_delta * 0.5 ** count * hidden[..., 6:7]"))
    alone = [process(*usual, "--slot-file", gated, prompt).stdout for prompt in (BOOKS, APPLES)]
    both = process(*usual, "--slot-file", gated, BOOKS, APPLES)
    assert answers(both) == alone and "has been edited" not in both.stderr
    second = edited(tmp_path, ("return logits.argmax().item()", "return logits.topk(2).indices[1].item()"))
    alone = [process(*usual, "--slot-file", second, prompt).stdout for prompt in (BOOKS, APPLES)]
    assert answers(process(*usual, "--slot-file", second, BOOKS, APPLES)) == alone


@pytest.mark.parametrize("old, new, words", [
    ("nll = loss(logits[0], targets)", "nll = los(logits[0], targets)", ["NameError", "my_slot.py"]),
    ("nll = loss(logits[0], targets)", "nll = loss(logits[0, :3], targets)", ["ValueError: Expected input", "my_slot.py"]),
    ("return delta.detach(), torch.stack(losses)", "return delta.detach()", ["ValueError: not enough values", "generate.py"]),
    ("import torch\nimport", "import torch, nosuch\nimport", ["ModuleNotFoundError", "my_slot.py"]),
    ("def prefill(lm, tokens, max_new_tokens):", "def prefill(lm, tokens:", ["SyntaxError", "my_slot.py"]),
    ("nll = loss(logits[0], targets)", "__import__('json').loads('')", ["JSONDecodeError", "my_slot.py"]),
    ("nll = loss(logits[0], targets)", "b = torch.zeros(1).expand(4); b += 1", ["RuntimeError", "my_slot.py"])],
    ids=["name", "torch", "results", "import", "syntax", "json", "memory"])
def test_an_error_in_a_slot_file_shows_as_python_shows_it(old, new, words, tmp_path):
    """It is the reader's own program: they need the line. Also where torch says ValueError, which in our own code is
    a judgement on input."""
    done = forks.run([ROOT / "generate.py", "--slot-steps", "1", "--slot-file", edited(tmp_path, (old, new))])
    assert done.returncode == 1 and "Traceback" in done.stderr and all(word in done.stderr for word in words), done.stderr


def test_what_a_slot_file_refuses_on_purpose_is_a_line(tmp_path):
    path = edited(tmp_path, ("def prompt_loss(logits, targets):", "def prompt_loss(logits, targets):\n    raise ValueError('no loss today')"))
    done = process("--slot-steps", "1", "--slot-file", path)
    assert done.returncode == 1 and done.stderr.endswith("\ngenerate.py: no loss today\n")


def test_a_slot_file_must_be_whole_and_is_named(tmp_path):
    done = process("--slot-file", edited(tmp_path, ("def steer(", "def steered(")))
    assert done.returncode == 2 and "has no steer; copy the whole of slot.py" in done.stderr and done.stderr.count("\n") == 1
    path = edited(tmp_path)
    assert f"slot      3 steps, lr 0.01, the loop of {path}," in process("--slot-file", path).stderr
    assert "slot  " not in process("--slot-steps", "0", "--slot-file", path).stderr
    assert "leave --slot-fast out" in process("--slot-fast", "--slot-file", path).stderr


def test_a_question_without_quotes_gets_a_hint():
    """Six prompts are answered, for they may be meant; three of two words each are."""
    said = "note      3 prompts; quotes around a question make it one\n"
    assert said in run("What", "is", "2+2?", "--max-new-tokens", 1).err
    assert said not in run("a b", "c d", "e f", "--max-new-tokens", 1).err


def test_compare_needs_a_delta():
    result = command()(["--compare", "--slot-steps", 0])
    assert result.status == 2 and "let --slot-steps be at least 1" in result.err


# ---- the library -----------------------------------------------------------------------------------------


def test_generate_is_importable_from_here():
    assert command_file.generate is slot.generate and command_file.prefill is slot.prefill


def draws(count, logits, **settings):
    choose = sampler(**settings)
    ids = [choose(logits) for _ in range(count)]
    return torch.bincount(torch.tensor(ids), minlength=len(logits)) / count


PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize("settings, expected", [
    (dict(temperature=1.0), [0.1, 0.4, 0.05, 0.3, 0.15]),
    (dict(temperature=0.5), [0.01, 0.16, 0.0025, 0.09, 0.0225]),
    (dict(temperature=2.0), [0.316, 0.632, 0.224, 0.548, 0.387]),
    (dict(temperature=1.0, top_k=2), [0, 0.4, 0, 0.3, 0]),
    (dict(temperature=1.0, top_k=5), [0.1, 0.4, 0.05, 0.3, 0.15]),
    (dict(temperature=1.0, top_k=99), [0.1, 0.4, 0.05, 0.3, 0.15]),
    (dict(temperature=1.0, top_p=0.39), [0, 1, 0, 0, 0]),
    (dict(temperature=1.0, top_p=0.41), [0, 0.4, 0, 0.3, 0]),           # the token that crosses top_p stays
    (dict(temperature=1.0, top_p=0.86), [0.1, 0.4, 0, 0.3, 0.15]),
    (dict(temperature=1.0, top_k=3, top_p=0.5), [0, 0.4, 0, 0.3, 0]),   # 0.4 of the 0.85 that top_k left
    (dict(temperature=1.0, top_k=3, top_p=0.45), [0, 1, 0, 0, 0]),
    (dict(temperature=1e-46), [0, 1, 0, 0, 0]),
    (dict(temperature=1.0, top_p=1e-46), [0, 1, 0, 0, 0])])
def test_sampler_draws_from_what_it_says(settings, expected):
    expected = torch.tensor(expected)
    expected = expected / expected.sum()
    found = draws(2000, PROBABILITIES.log() + 3, **settings)
    assert (found[expected == 0] == 0).all()
    assert (found - expected).abs().max() < 0.03, found


def test_sampler_of_temperature_0_is_greedy():
    assert sampler() is slot.likeliest and sampler(temperature=0, top_k=5, top_p=0.3) is slot.likeliest


def test_a_seed_is_a_seed():
    """One sequence for a seed, another for another; torch's own random numbers go on undisturbed."""
    logits = PROBABILITIES.log()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    sequences = []
    for seed in (0, 0, 1, 2):
        choose = sampler(1.0, seed=seed)
        sequences.append([choose(logits) for _ in range(30)])
    assert torch.equal(torch.rand(1), expected)
    assert sequences[0] == sequences[1] and len({tuple(each) for each in sequences}) == 3


def test_ties_go_to_the_first_by_top_p():
    """Equal logits: top_p keeps as many as it needs, no more."""
    found = draws(500, torch.zeros(8), temperature=1.0, top_p=0.25)
    assert (found > 0).sum() == 2


@pytest.mark.parametrize("settings", [
    dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_p=0.0), dict(top_p=1.5), dict(top_k=-1),
    dict(top_p=float("nan"))])
def test_impossible_sampling(settings):
    with pytest.raises(ValueError) as error:
        sampler(**settings)
    assert "temperature" in str(error.value) and "\n" not in str(error.value)
