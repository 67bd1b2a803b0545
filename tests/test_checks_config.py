"""checks/config.py: every field of config.json that changes the mathematics is implemented or
refused by name; what changes nothing loads, with the logits of the plain folder to the last bit."""
import pytest

from hostile import (GONE, VOCAB, build, check_line, check_loads, check_refused, command, config,
                     content, files, put, then, write)
from load_weights import load_model

GENERATION = "generation_config.json"


def rope(family="llama", **fields):
    fields = {name: value for name, value in fields.items() if value is not GONE}
    return config(family, rope_scaling=fields)


LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

# name, folder, words of the line
FIELDS = [
    ("no model_type", config(model_type=GONE), "model_type"),
    ("model_type unknown", config(model_type="mamba"), "model_type mamba"),
    ("model_type a list", config(model_type=["llama"]), "model_type"),
    ("architecture of another kind", config(architectures=["Qwen2ForSequenceClassification"]),
     "architectures"),
    ("architecture of another family", config(architectures=["LlamaForCausalLM"]),
     "architectures"),
    ("activation unknown", config(hidden_act="gelu"), "hidden_act gelu"),
    ("activation missing", config(hidden_act=GONE), "hidden_act"),
    ("eps missing", config(rms_norm_eps=GONE), "rms_norm_eps"),
    ("eps zero", config(rms_norm_eps=0), "rms_norm_eps"),
    ("eps text", config(rms_norm_eps="1e-5"), "rms_norm_eps"),
    ("eps negative", config(rms_norm_eps=-1e-5), "rms_norm_eps"),
    ("tie text", config(tie_word_embeddings="false"), "tie_word_embeddings 'false'"),
    ("tie number", config(tie_word_embeddings=1), "tie_word_embeddings"),
    ("bias text", config("llama", attention_bias="true"), "attention_bias"),
    ("MLP bias text", config("llama", mlp_bias="true"), "mlp_bias"),
    ("quantised", config(quantization_config={"quant_method": "gptq", "bits": 4}),
     "quantization_config"),
    ("dtype unknown", config(torch_dtype="float8_e4m3fn"), "torch_dtype"),
    ("dtype a number", config(torch_dtype=32), "torch_dtype"),
    ("dtype a list", config(torch_dtype=["float32"]), "torch_dtype"),
    ("rotation in part", config(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ("rotation true", config(partial_rotary_factor=True), "partial_rotary_factor"),
    ("sliding window in use", config(use_sliding_window=True), "use_sliding_window"),
    ("sliding window in use, its size left out", config(use_sliding_window=True, sliding_window=GONE),
     "use_sliding_window"),
    ("sliding window in use, text", config(use_sliding_window="false"), "use_sliding_window"),
    ("sliding window in a layer", config(layer_types=["full_attention", "sliding_attention"]),
     "layer_types"),
    ("layer types too few", config(layer_types=["full_attention"]), "layer_types"),
]
SIZES = [
    ("vocab_size missing", config(vocab_size=GONE), "vocab_size"),
    ("vocab_size null", config(vocab_size=None), "vocab_size"),
    ("vocab_size true", config(vocab_size=True), "vocab_size True"),
    ("vocab_size text", config(vocab_size="300"), "vocab_size '300'"),
    ("vocab_size not whole", config(vocab_size=300.0), "vocab_size 300.0"),
    ("hidden_size 0", config(hidden_size=0), "hidden_size 0"),
    ("hidden_size negative", config(hidden_size=-16), "hidden_size -16"),
    ("hidden_size absurd", config(hidden_size=10 ** 12), "hidden_size 1000000000000"),
    ("sizes too large together",
     config(hidden_size=1 << 20, intermediate_size=1 << 20, num_attention_heads=1 << 10), "shape"),
    ("sizes past 2**63 together",
     config(hidden_size=1 << 24, num_attention_heads=1 << 24, head_dim=1 << 24),
     "num_attention_heads"),
    ("head_dim absurd", config(head_dim=1 << 24), "head_dim"),
    ("layers 0", config(num_hidden_layers=0), "num_hidden_layers"),
    ("layers absurd", config(num_hidden_layers=10 ** 9), "num_hidden_layers"),
    ("layers more than in the file", config(num_hidden_layers=4000), "num_hidden_layers 4000"),
    ("layers fewer than in the file", config(num_hidden_layers=1), "num_hidden_layers"),
    ("heads do not divide", config(num_attention_heads=5), "num_key_value_heads 5"),
    ("heads do not divide the width", config(num_attention_heads=6), "num_attention_heads 16"),
    ("key heads zero", config(num_key_value_heads=0), "num_key_value_heads"),
    ("key heads missing", config("qwen3", num_key_value_heads=GONE), "num_key_value_heads"),
    ("head_dim odd", config(head_dim=7), "head_dim"),
    ("head_dim missing", config("qwen3", head_dim=GONE), "head_dim"),
    ("positions missing", config(max_position_embeddings=GONE), "max_position_embeddings"),
    ("positions negative", config(max_position_embeddings=-1), "max_position_embeddings"),
    ("MLP width missing", config(intermediate_size=GONE), "intermediate_size"),
]
ROPE = [
    ("rope_theta missing", config(rope_theta=GONE), "rope_theta"),
    ("rope_theta zero", config(rope_theta=0), "rope_theta"),
    ("rope_theta negative", config(rope_theta=-10000.0), "rope_theta"),
    ("rope_theta text", config(rope_theta="10000"), "rope_theta"),
    ("rope_theta true", config(rope_theta=True), "rope_theta"),
    ("rope type unknown", rope(rope_type="dynamic", factor=2.0), "rope_type dynamic"),
    ("rope type by its old name unknown", rope(type="dynamic", factor=2.0), "rope_type dynamic"),
    ("rope type null", rope(rope_type=None, factor=2.0), "rope_type"),
    ("rope type empty", rope(rope_type=""), "rope_type"),
    ("rope type a list", rope(rope_type=["default"]), "rope_type"),
    ("rope scaling a list", config("llama", rope_scaling=[1]), "rope_scaling"),
    ("rope scaling an empty list", config("llama", rope_scaling=[]), "rope_scaling"),
    ("rope scaling 0", config("llama", rope_scaling=0), "rope_scaling"),
    ("rope factor missing", rope(rope_type="linear"), "factor"),
    ("rope factor zero", rope(**LINEAR | {"factor": 0}), "factor"),
    ("rope factor negative", rope(**LINEAR | {"factor": -2.0}), "factor"),
    ("rope low above high", rope(**LLAMA3 | {"low_freq_factor": 8.0}), "high_freq_factor"),
    ("rope without an original length", rope(**YARN | {"original_max_position_embeddings": GONE}),
     "original_max_position_embeddings"),
    ("rope truncate text", rope(**YARN, truncate="no"), "truncate"),
    ("rope mscale text", rope(**YARN, mscale="1"), "mscale"),
    ("rope attention factor negative", rope(**YARN, attention_factor=-1), "attention_factor"),
    ("rope sections", rope(rope_type="default", mrope_section=[16, 24, 24]), "mrope_section"),
    ("rope in two spellings that differ",
     config(rope_scaling=LINEAR, rope_parameters=YARN | {"rope_theta": 1e4}), "rope_parameters"),
    ("rope_theta in two places that differ",
     config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "rope_theta"),
]
IDS = [
    ("eos a text", config(eos_token_id="<|im_end|>"), "eos_token_id"),
    ("eos true", config(eos_token_id=True), "eos_token_id"),
    ("eos negative", config(eos_token_id=-1), "eos_token_id"),
    ("eos past the vocabulary", config(eos_token_id=VOCAB), "eos_token_id"),
    ("eos list with a float", put(GENERATION, "eos_token_id", [278, 1.0]),
     "generation_config.json eos_token_id"),
    ("eos of generation past the vocabulary", put(GENERATION, "eos_token_id", [278, 10 ** 6]),
     "eos_token_id"),
    ("eos lists a list", config(eos_token_id=[[278]]), "config.json eos_token_id"),
    ("eos lists true", config(eos_token_id=[278, True]), "config.json eos_token_id"),
    ("bos a text", config(bos_token_id="<s>"), "bos_token_id"),
    ("pad a float", config(pad_token_id=276.0), "pad_token_id"),
    ("sliding window a text", config(sliding_window="32"), "sliding_window"),
    ("window layers true", config(max_window_layers=True), "max_window_layers"),
]
BAD = FIELDS + SIZES + ROPE + IDS


@pytest.mark.parametrize("make, words", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_field(make, words, folder):
    check_refused(make, words, folder)


ALONE = [case for case in BAD if case[0].startswith(("sliding", "layer", "bos", "pad", "window"))]


@pytest.mark.parametrize("make, words", [case[1:] for case in ALONE],
                         ids=[case[0] for case in ALONE])
def test_load_model_alone_reads_all_of_it(make, words, folder):
    """Without the tokenizer, which has what it reads judged by itself: the end ids."""
    make(folder)
    with pytest.raises(ValueError) as caught:
        load_model(folder)
    check_line(str(caught.value), words)


ALL_AT_ONCE = dict(_name_or_path="../x", transformers_version="9.9", pretraining_tp=1,
                   id2label={"0": "é"}, x=[[{}]], max_length=20)
NULLS = dict.fromkeys(("attention_bias", "mlp_bias", "head_dim", "rope_parameters",
                       "quantization_config", "partial_rotary_factor", "layer_types",
                       "pad_token_id", "sliding_window", "torch_dtype"))
NEW_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# name, folder, and, unless it is qwen2, the family whose plain folder it equals
ODD = [
    ("plain", files(lambda contents: None)),
    ("plain llama", files(lambda contents: None, "llama"), "llama"),
    ("plain qwen3", files(lambda contents: None, "qwen3"), "qwen3"),
    ("new spelling", config(rope_theta=GONE, rope_scaling=GONE, torch_dtype=GONE, dtype="float32",
                            rope_parameters=NEW_ROPE)),
    ("both spellings", config(dtype="float32", rope_parameters=NEW_ROPE)),
    ("Llama 2 without rope_theta",
     config("llama", rope_theta=GONE, rope_scaling=GONE, attention_bias=GONE, mlp_bias=GONE),
     "llama"),
    ("nulls", config("llama", **NULLS), "llama"),
    ("rope_theta whole", config(rope_theta=10000)),
    ("rope_scaling empty", config(rope_scaling={})),
    ("rope default by name", config(rope_scaling={"type": "default"})),
    ("rope default by both names",
     config(rope_scaling={"type": "default", "rope_type": "default"})),
    ("rope factor 1", config(rope_scaling={"type": "linear", "factor": 1})),
    ("partial_rotary_factor 1.0", config(partial_rotary_factor=1.0)),
    ("head_dim given", config(head_dim=4)),
    ("unknown keys", config(**ALL_AT_ONCE)),
    ("window off, its size left",
     config(sliding_window=4096, use_sliding_window=False, max_window_layers=0)),
    ("window on from a layer that is not there",
     config(use_sliding_window=True, max_window_layers=2)),
    ("window on without a size", config(use_sliding_window=True, sliding_window=None)),
    ("layer types all full", config(layer_types=["full_attention"] * 2)),
    ("no architectures", config(architectures=GONE)),
    ("activation by its other name", config(hidden_act="swish")),
    ("no dtype", config(torch_dtype=GONE)),
    ("dtype float64", config(torch_dtype="float64")),
    ("dtype of the config not that of the file", config(torch_dtype="bfloat16")),
    ("eos only in generation_config", config(eos_token_id=GONE)),
    ("eos a list", config(eos_token_id=[278, 276])),
    ("pad a list", config(pad_token_id=[278, 276])),
    ("no generation_config", then(lambda folder: (folder / GENERATION).unlink())),
    ("generation_config empty", content(GENERATION, b"{}")),
    ("generation_config of many things",
     content(GENERATION, b'{"eos_token_id": 278, "temperature": 1e-1, "x": {"y": null}}')),
]


@pytest.mark.parametrize("make, family", [(*case, "qwen2")[1:3] for case in ODD],
                         ids=[case[0] for case in ODD])
def test_odd_field(make, family, folder):
    check_loads(make, family, folder)


def test_out_of_positions_and_memory(folder, tmp_path):
    """The reason is right, and an answer of 2**30 tokens says how much it would need."""
    write(folder, build())
    result = command()(["--model", folder, "a", "--max-new-tokens", "100000"])
    assert result.status == 1, result
    check_line(result.err.splitlines()[-1], "512 --max-new-tokens")
    write(tmp_path / "huge", build(max_position_embeddings=1 << 30))
    result = command()(["--model", tmp_path / "huge", "a",
                        "--max-new-tokens", str((1 << 30) - 100)])
    assert result.status == 1, result
    check_line(result.err.splitlines()[-1], "memory 64.00 GiB needed")
