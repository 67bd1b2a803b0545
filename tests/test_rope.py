"""
Rotary frequencies of published parameter sets, and of corners, against values that transformers computed (golden/rope.json).

The golden models are small; a mistake that needs head_dim 128, a base of a million or 131,072 positions shows only here.
"""
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import Config, rope_frequencies

ROPES = json.loads((Path(__file__).parent / "golden" / "rope.json").read_text())


def config_with(folder, **fields):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 512,
              "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
              "vocab_size": 96, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 10000.0, **fields}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return Config.from_folder(folder)


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling with rope_type", "rope_scaling with type"])
@pytest.mark.parametrize("name", ROPES)
def test_published_frequencies(name, spelling, tmp_path):
    """A wrong band edge, a dropped factor or a ramp in the wrong direction; each in the three spellings that folders use."""
    golden = ROPES[name]
    fields, rope = {k: v for k, v in golden.items() if k in ("head_dim", "max_position_embeddings")}, dict(golden["rope"])
    if spelling == "rope_parameters":
        fields |= {"rope_parameters": rope, "rope_theta": None}
    else:
        fields["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
        fields["rope_scaling"] = None if kind == "default" else {spelling.split()[-1]: kind, **rope}
    inv_freq, scaling = rope_frequencies(config_with(tmp_path, **fields))
    expected = torch.tensor(golden["inv_freq"])
    off = ((inv_freq - expected).abs() / expected).max().item()
    assert inv_freq.shape == expected.shape and off < 2e-6, f"{name}: inverse frequencies differ by {off:.1e} of their size"
    assert abs(scaling - golden["attention_scaling"]) < 1e-7, f"{name}: factor {scaling} for {golden['attention_scaling']}"


@pytest.mark.parametrize("rope", [
    {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, {"type": "su"},
    {"rope_type": "linear"}, {"rope_type": "linear", "factor": "2"}, {"rope_type": "yarn", "original_max_position_embeddings": 32768},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, {"factor": 2.0}, ["linear", 2.0]])
def test_what_is_not_implemented_is_refused(rope, tmp_path):
    """A rope type that is silently taken for the default one answers well until the prompt gets long."""
    with pytest.raises(ValueError) as error:
        config_with(tmp_path, rope_scaling=rope)
    message = str(error.value)
    assert "rope" in message and "\n" not in message, message
