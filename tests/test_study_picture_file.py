"""The page of one prompt as a file: its facts are the command's, it may load nothing, and no text of a stranger ends it."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def page(tmp_path, *options):
    out = tmp_path / "out.html"
    done = subprocess.run([sys.executable, ROOT / "generate.py", "--picture", out, *options], capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stderr
    return out.read_text(encoding="utf-8"), done.stderr


def data(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_facts_are_the_commands(tmp_path):
    text, said = page(tmp_path, "--compare")
    losses = re.findall(r"\d+\.\d{4}", re.search("loss on the prompt.*", said)[0])
    assert f"loss {losses[0]} → {losses[-1]}" in data(text)["facts"]
    assert "default-src 'none'" in text and not re.search(r"(src|href)=.?https?:", text)
    assert len(text) < 200_000


@pytest.mark.parametrize("prompt", ["</script><b>x", "<!-- <script>", "a\u202eb", "\x01\x1b[31m", "]]>&amp;\"'"])
def test_hostile_prompts_stay_text(tmp_path, prompt):
    text, _ = page(tmp_path, "--slot-steps", "1", "--max-new-tokens", "4", prompt)
    shown = "".join(data(text)["prompt"])
    assert "user" in shown and text.count("</script>") == 2 and "<b>x" not in text
