"""python -m study under torchrun: replicas share the samples, ranks share a model; whatever is killed, and however many go
on, the summary is that of one process. KILLS=10 in the environment kills ten times instead of twice."""
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

import forks
from study_model import facts, make, options, study

from study import run
from study.__main__ import parse_arguments
from study.results import Results

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)
pytest.importorskip("speed.parallel", reason="there is no speed/")

KILLS = int(os.environ.get("KILLS", 2))
EMBEDDED = ["--limit", str(4 * KILLS), "--batch", "2", "--steps", "3", "--lr", "0.1", "--control", "wrong-prompt",
            "--max-new-tokens", "6"]


def torchrun(ranks, command):
    """As forks.ranks, but one process, which starts them."""
    return [forks.Fork(["-m", "torch.distributed.run", "--nproc-per-node", ranks, *command])]


def lines(out):
    return [line for file in sorted(out.glob("results*.jsonl")) for line in file.read_text(encoding="utf-8").splitlines()]


def rows(out):
    """The results of all files, without the times; a line that was cut is no result."""
    import json
    found = []
    for line in lines(out):
        try:
            found.append(json.loads(line))
        except ValueError:
            pass
    return sorted(json.dumps(row | {"seconds": None}, sort_keys=True) for row in found)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    run.main(parse_arguments([*EMBEDDED, "--out", str(out)]))
    return out


def wait_for(condition, process):
    for _ in range(1200):
        if condition() or process.poll() is not None:
            return
        time.sleep(0.05)
    raise AssertionError("nothing happened for a minute")


def workers(process):
    """The ids of torchrun's children that are ranks."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")
def test_kills_and_another_number_of_replicas(alone, tmp_path):
    """One rank is killed, and torchrun ends the others; or all are killed. Then as many as may be go on."""
    draw, killed, command = random.Random(0), [], ["-m", "study", *EMBEDDED, "--out", tmp_path]
    for kill in range(KILLS):
        before = len(lines(tmp_path))
        running = torchrun(2, command) if kill % 2 == 0 else forks.ranks(3, command)
        wait_for(lambda: len(lines(tmp_path)) >= before + draw.randint(1, 4), running[0])
        if running[0].poll() is None:
            if kill % 2 == 0:
                os.kill(draw.choice(workers(running[0])), signal.SIGKILL)
            else:
                for process in running:
                    process.kill()
            killed.append(kill)
        for status, *_ in forks.end(running, 60):       # none of them hangs
            assert (status != 0) == (kill in killed)
    assert len(killed) == KILLS, "the runs ended before they could be killed"
    ended = forks.end(forks.ranks(3, command))
    assert [status for status, *_ in ended] == [0, 0, 0], ended
    assert facts(tmp_path) == facts(alone)
    assert rows(tmp_path) == rows(alone)                # each once, though many files hold them
    assert study(*EMBEDDED, "--out", tmp_path).returncode == 0      # and one process finds nothing to do
    assert rows(tmp_path) == rows(alone) and facts(tmp_path) == facts(alone)


def test_ranks_of_one_model(tmp_path_factory):
    """Two ranks a model; losses as alone within rounding. By the loop two models; by the closed form one, under torchrun."""
    import json
    folder, few = make(tmp_path_factory.mktemp("model")), ["--limit", "2", "--max-new-tokens", "3"]
    for form in ([], ["--slot-fast"]):
        one, many = (tmp_path_factory.mktemp(name) for name in ("one", "many"))
        run.main(parse_arguments(options(folder, one, *few, *form)))
        command = ["-m", "study", *options(folder, many, *few, "--tensor-parallel", "2", *form)]
        running = torchrun(2, command) if form else forks.ranks(4, command)
        statuses, _, said = zip(*forks.end(running))
        assert not any(statuses) and "".join(said).count("report    ") == 1, said
        found = [{(row["sample"], row["setting"]): row for row in map(json.loads, lines(out))} for out in (one, many)]
        assert found[0].keys() == found[1].keys()
        assert form or (many / "results-1.jsonl").stat().st_size > 0        # the second model's share
        for key, row in found[0].items():
            for figure in ("prompt_loss", "answer_loss", "alignment"):
                if figure in row:
                    assert found[1][key][figure] == pytest.approx(row[figure], abs=1e-4), f"{key}: {figure}"


@pytest.mark.parametrize("environment, arguments, words", [
    ({}, ["--tensor-parallel", "2"], "--tensor-parallel needs torchrun"),
    ({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
     ["--tensor-parallel", "2"], "--tensor-parallel 2 does not divide torchrun's 3 ranks"),
    ({"RANK": "0"}, [], "WORLD_SIZE is not set")])
def test_numbers_that_do_not_fit(environment, arguments, words, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, SystemExit)) as caught:
        run.main(parse_arguments(arguments))
    assert words in capsys.readouterr().err + str(caught.value)


def test_files_of_replicas(tmp_path):
    """Read together; a cut line of another is left to it; two that contradict each other are named by file."""
    def open_results(replica=0):
        return Results(tmp_path, {"a": 1}, ["k"] * 3, ["plain"], decoded=False, replica=replica)

    def row(sample, loss):
        return dict(sample=sample, kind="k", setting="plain", prompt="p", gold="g", answer_loss=loss, prompt_loss=1.0,
                    alignment=0.5, seconds=dict(prefill=0.0, fit=0.0, decode=0.0))

    first, second = open_results(), open_results(1)
    first.add(row(0, 1.0))
    second.add(row(1, 2.0))
    with pytest.raises(ValueError, match="another run is writing there"):
        open_results(1)
    os.write(second.file, b'{"sample": 2, "ki')
    first.read()
    assert sorted(first.rows) == [(0, "plain"), (1, "plain")]
    first.close(), second.close()
    assert (tmp_path / "results-1.jsonl").read_bytes().endswith(b'"ki')
    open_results(1).close()
    assert (tmp_path / "results-1.jsonl").read_bytes().endswith(b"}\n")
    third = open_results(2)
    third.add(row(1, 3.0))
    third.close()
    with pytest.raises(ValueError, match="results-2.jsonl: lines 1 of results-1.jsonl and 1 .* contradict"):
        open_results()
