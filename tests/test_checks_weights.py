"""checks/weights.py: do the weights and config.json belong together?"""
import math

import pytest
import torch

from hostile import (MODEL, build, check_command_refuses, check_line, check_loads,
                     check_refused, config, files, tensors, tied, write)
from load_weights import load_model

NORM, HEAD = "model.norm.weight", "lm_head.weight"


def more(name, *shape, value=0.0, family="qwen2"):
    """One tensor more in the file."""
    return tensors(lambda t: t.update({name: torch.full(shape, value)}), family)


def less(part, family="qwen2"):
    """The file without the tensors whose name holds `part`."""
    return tensors(lambda t: [t.pop(name) for name in list(t) if part in name], family)


def renamed(old, new):
    return tensors(lambda t: [t.update({name.replace(old, new): t.pop(name)})
                              for name in list(t) if old in name])


def cast(*dtypes):
    """Each tensor in one of these dtypes, in turn."""
    def change(t):
        for i, name in enumerate(t):
            t[name] = t[name].to(dtypes[i % len(dtypes)])
    return tensors(change)


def norm_of(dtype):
    return tensors(lambda t: t.update({NORM: t[NORM].to(dtype)}))


NO_NUMBERS = (torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64)
ADAPTER = "base_model.model." * 6 + "self_attn.{}.weight"       # the end of the name tells

# name, folder, words of the line
BAD = [
    ("weight missing", less(NORM), f"missing {NORM}"),
    ("head missing", less(HEAD), f"missing {HEAD}"),
    ("layer missing", less(".1."), "num_hidden_layers 1 layers"),
    ("layers with a gap", renamed(".1.", ".2."), "model.layers.1"),
    ("no layers", less("model.layers."), f"no weight model.layers.N {HEAD}"),
    ("no tensor", less(""), "no weight model.layers.N none at all"),
    ("names of another program", renamed("model.layers", "transformer.h"),
     "no weight model.layers.N"),
    ("weight unexpected", more("model.extra.weight", 2), "model.extra.weight"),
    ("bias not announced", more("model.layers.0.self_attn.o_proj.bias", 16), "o_proj.bias"),
    ("bias announced, missing", tensors(lambda t: None, "llama", mlp_bias=True), "bias"),
    ("q norm not announced", more("model.layers.0.self_attn.q_norm.weight", 4), "q_norm"),
    ("adapter", more("model.layers.0.self_attn.q_proj.lora_A.weight", 2, 16), "lora_A"),
    ("long name of a projection", more(ADAPTER.format("k_proj"), 2), "self_attn.k_proj.weight"),
    ("long name of a norm", more(ADAPTER.format("k_norm"), 2), "self_attn.k_norm.weight"),
    ("name of control characters", more("\x1b[2J" * 30 + ".k_norm.weight", 2), ".k_norm.weight'"),
    ("weight transposed", tensors(lambda t: t.update({HEAD: t[HEAD].T.contiguous()})),
     f"{HEAD} shape [16, [300,"),
    ("vocabulary of another size", config(vocab_size=301), "embed_tokens shape 301"),
    ("width of another size", config(hidden_size=32), "shape"),
    ("tied but different", config(tie_word_embeddings=True), f"tie_word_embeddings {HEAD}"),
    *((f"weight of {dtype}", norm_of(dtype), f"{NORM} {dtype}") for dtype in NO_NUMBERS),
]
# The lesson's decode says that logits are not finite; the command finds the weight.
NOT_FINITE = [
    ("weights NaN", "model.layers.1.mlp.down_proj.weight", ..., math.nan),
    ("weights infinite", NORM, ..., math.inf),
    ("one row of the head NaN", HEAD, 299, math.nan),
    ("one number of the head -inf", HEAD, (299, 3), -math.inf),
    ("one number of the head +inf", HEAD, (299, 3), math.inf),
]


@pytest.mark.parametrize("make, words", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_weights(make, words, folder):
    check_refused(make, words, folder)


@pytest.mark.parametrize("name, place, value", [case[1:] for case in NOT_FINITE],
                         ids=[case[0] for case in NOT_FINITE])
def test_not_finite(name, place, value, folder):
    def change(t):
        t[name][place] = value
    check_refused(tensors(change), ("not finite", f"{name} NaN infinity"), folder)


def test_numbers_that_overflow(folder):
    """All weights are finite and the logits are not: no weight is blamed, and float32 is not
    advised to who has it."""
    make = tensors(lambda t: t[HEAD].fill_(3e38))
    check_refused(make, "not finite overflow float32", folder)


def test_float16_that_overflows(folder):
    """Fine in float32, not in the float16 that config.json names."""
    def change(contents):
        contents["config.json"]["torch_dtype"] = "float16"
        contents[MODEL][HEAD].fill_(6e4)
    check_refused(files(change), "not finite float16", folder)


def test_every_pair_of_names_can_be_told_apart(folder):
    """However long what stands before them, k_proj and k_norm never look alike."""
    lines = set()
    for part in ("q_proj", "k_proj", "q_norm", "k_norm"):
        name = "model.layers.0." + "x" * 300 + f".{part}.weight"
        write(folder, build())
        more(name, 2)(folder)
        with pytest.raises(ValueError) as caught:
            load_model(folder)
        check_line(str(caught.value), f"{part}.weight")
        lines.add(str(caught.value))
    assert len(lines) == 4


def inverse_frequencies(t):
    t["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    t["model.rotary_emb.inv_freq"] = torch.zeros(0)


def tied_without_a_head(contents):
    tied(contents)
    del contents[MODEL][HEAD]


FLOATS = torch.float64, torch.bfloat16, torch.float32, torch.float16
ODD = [
    ("float16", cast(torch.float16)),
    ("bfloat16", cast(torch.bfloat16)),
    ("float64", cast(torch.float64)),
    ("all four dtypes mixed", cast(*FLOATS)),
    ("leftover inv_freq", tensors(inverse_frequencies)),
    ("tied", files(tied), "tied"),
    ("tied without a head in the file", files(tied_without_a_head), "tied"),
]


@pytest.mark.parametrize("make, family", [(*case, "qwen2")[1:3] for case in ODD],
                         ids=[case[0] for case in ODD])
def test_odd_weights(make, family, folder):
    check_loads(make, family, folder)


@pytest.mark.parametrize("dtype", ["float8", "", "torch.float32 ", torch.int64, 5, None])
def test_dtype_unknown(dtype, folder):
    write(folder, build())
    with pytest.raises(ValueError) as caught:
        load_model(folder, dtype=dtype)
    check_line(str(caught.value), "dtype float32")


def test_the_command_names_the_weight_for_several_prompts(folder):
    tensors(lambda t: t[NORM].fill_(math.nan))(folder)
    check_command_refuses(folder, f"{NORM} NaN")
