"""The third law again: take checks/ away, and every good folder still loads, but nothing is judged
any more. tests/test_laws.py has the golden folders; here are the models beside the project, and bad
folders that load without a word, so that the law's proof can fail."""
import json
import textwrap

import pytest

import forks
from hostile import GONE, ROOT, config, put
from test_laws import JUDGES, READERS, copy_of

SHARED = ROOT.parent / "shared" / "data"
GOOD = {"reference": SHARED / "slot_reference/model", "tiny": ROOT / "tiny",
        "qwen2": SHARED / "tokenizers/qwen2"}
BAD = {"hidden_act": config(hidden_act="gelu"),
       "use_sliding_window": config(use_sliding_window=True),
       "eos_token_id": put("generation_config.json", "eos_token_id", 10 ** 6),
       "quantization_config": config(quantization_config={"bits": 4}),
       "partial_rotary_factor": config(partial_rotary_factor=0.5),
       "model_type": config("llama", architectures=GONE, model_type="mamba")}
CODE = """
    import json, sys, torch
    from pathlib import Path
    from load_weights import load_model
    from tokenizer import load_tokenizer
    torch.set_grad_enabled(False)
    for name, folder in json.loads(sys.argv[1]).items():
        found = []
        try:
            if Path(folder, "model.safetensors").exists():
                logits = load_model(folder, dtype="float32")(torch.arange(7, 150, 11)[None])
                found += [logits.double().sum().item(), logits.argmax(-1).tolist()]
            if Path(folder, "tokenizer.json").exists():
                tokenizer = load_tokenizer(folder)
                text = "Four books for 6 dollars, <|im_end|>é"
                found += [tokenizer.chat_ids([{"role": "user", "content": text}])]
                found += [tokenizer.vocab_size, sorted(tokenizer.eos_ids)]
        except Exception as error:
            found = [type(error).__name__, str(error)]
        print(json.dumps([name, found]))
"""


def results(tree, folders):
    """{name: what the code above found}, in a process of its own."""
    folders = json.dumps({name: str(folder) for name, folder in folders.items()})
    done = forks.run(["-c", textwrap.dedent(CODE), folders], tree)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the project finds, and what a copy finds whose readers just read and whose judges say
    nothing."""
    place = tmp_path_factory.mktemp("folders")
    folders = {name: folder for name, folder in GOOD.items() if folder.exists()}
    for name, make in {**BAD, "shape": config(hidden_size=32)}.items():
        make(place / name)
        folders[name] = place / name
    tree = copy_of(tmp_path_factory.mktemp("unchecked"))
    for path in (tree / "checks").glob("*.py"):
        path.write_text(JUDGES)
    (tree / "checks" / "__init__.py").write_text("")
    (tree / "checks" / "files.py").write_text(READERS + JUDGES)
    (tree / "checks" / "child.py").write_text("def in_child(run):\n    return run()\n")
    return results(ROOT, folders), results(tree, folders)


@pytest.mark.parametrize("name", GOOD)
def test_good_folders_load_without_checks(name, found):
    here, there = found
    if name not in here:
        pytest.skip(f"{GOOD[name]} is not there")
    assert here[name] == there[name] and len(here[name]) >= 2
    assert here[name][0] not in ("ValueError", "FileNotFoundError"), here[name]


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_load_without_checks(name, found):
    """Each is refused by name here, and there it is answered as if nothing were wrong."""
    here, there = found
    assert here[name][0] == "ValueError" and f"{name} " in here[name][1]
    assert len(there[name]) == 5, there[name]


def test_a_wrong_shape_is_torchs_own_complaint(found):
    """Where torch itself cannot go on it says so, in its words and not in one line of ours."""
    here, there = found
    assert here["shape"][0] == "ValueError" and "another shape" in here["shape"][1]
    assert there["shape"][0] == "RuntimeError" and "\n" in there["shape"][1]
