"""tokenizer/files.py: what the files of a folder mean, which belong together, and which is missing."""
import json

import pytest

import make_golden_tokenizer as golden
from small_tokenizer import LEVEL, line_of, spec, token, write
from tokenizer import load_tokenizer


def test_beginning_and_end(tmp_path):
    added = [token(300, "<s>"), token(301, "</s>")]
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [300], "tokens": ["<s>"]}}}
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}

    def load(post=None, config=None, **settings):
        data = {**spec(added=added), "post_processor": post}
        return load_tokenizer(write(tmp_path, data, tokenizer_config__json={**names, **settings}, config__json=config or {},
                                    generation_config__json={"eos_token_id": [7, 8]}))
    assert load().bos_ids == [] and load().eos_ids == {301, 7, 8} and load(config={"eos_token_id": 9}).eos_ids == {301, 7, 8, 9}
    assert load({"type": "Sequence", "processors": [LEVEL, template]}).bos_ids == [300]
    assert load(template, add_bos_token=False).bos_ids == [300] and load(add_bos_token=True).bos_ids == [300]
    assert load(template).encode("hi") == load().encode("hi") == [256]
    assert load(config={"vocab_size": 302}).vocab_size == 302
    word = load(eos_token="hi")                                     # named special, and only in the vocabulary
    assert word.eos_ids == {256, 7, 8} and word.encode("a hi", allow_special=True) == [97, 32, 256] and word.encode(" hi") == [257]
    write(tmp_path, special_tokens_map__json={"eos_token": "<s>"})
    assert load(eos_token=None).eos_ids == {300, 7, 8} and load(eos_token=None, added_tokens_decoder={}).eos_ids == {7, 8}


def test_added_tokens_of_tokenizer_config(tmp_path):
    listed = {"310": {"content": "<|new|>", "special": True}, "300": {"content": "<|a|>", "special": False, "normalized": False}}
    ours = load_tokenizer(write(tmp_path, spec(added=[token(300, "<|a|>")]), tokenizer_config__json={"added_tokens_decoder": listed}))
    assert ours.encode("<|new|><|a|>", allow_special=True) == [310, 300] and ours.vocab_size == 311
    assert ours.encode("<|a|>") == [300]                            # of two entries for a token, the later one counts


MARK = "{% for m in messages %}{{ m.content | trim }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"


@pytest.mark.parametrize("where", ["tokenizer_config", "list", "jinja"])
def test_where_a_template_may_be(tmp_path, where):
    settings = {"tokenizer_config": MARK, "list": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": MARK}], "jinja": "not this"}
    files = {"tokenizer_config__json": {"chat_template": settings[where]}, **({"chat_template__jinja": MARK} if where == "jinja" else {})}
    ours = load_tokenizer(write(tmp_path, spec(), **files))
    assert ours.chat([{"role": "user", "content": " hi "}]) == "hi!"
    assert ours.chat([{"role": "user", "content": " hi "}], add_generation_prompt=False) == "hi"


@pytest.mark.parametrize("files", [{"vocab__json": {"a": 0}, "merges__txt": "#version: 0.2\nh i\n"}, {"tokenizer__model": b"IQ== 0\n"},
                                   {"tokenizer__model": b"\x0a\x0e\x0a\x05<unk>\x15\x00"}], ids=["vocab.json", "Meta's", "SentencePiece"])
def test_older_forms_get_a_line_that_says_what_to_do(tmp_path, files):
    with pytest.raises(FileNotFoundError) as error:
        load_tokenizer(write(tmp_path, **files))
    line = line_of(error)
    assert "no tokenizer.json" in line and "AutoTokenizer.from_pretrained" in line and "save_pretrained" in line


def test_other_places(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "file").touch()
    for folder, words in ((tmp_path / "none", "tokenizer.json"), (tmp_path / "nowhere", "no such folder"), (tmp_path / "file", "no such folder")):
        with pytest.raises(FileNotFoundError) as error:
            load_tokenizer(folder)
        assert words in line_of(error)


@pytest.mark.parametrize("name", golden.CUTS)
def test_published_folders_load_as_they_are(name):
    ours = load_tokenizer(golden.FOLDERS / name)
    data = json.loads((golden.FOLDERS / name / "tokenizer.json").read_text())
    id_of = {each["content"]: each["id"] for each in data["added_tokens"]}
    first, last = golden.NAMED[name]
    assert ours.eos_ids == {id_of[last]} and ours.special_ids == {id_of[text] for text in golden.CONTROL[name][0]}
    assert ours.bos_ids == ([id_of[first]] if data["post_processor"]["type"] == "TemplateProcessing" else [])
