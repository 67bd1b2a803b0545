"""What may be wrong with a config.json. Every field that changes the mathematics is implemented or
refused; none is guessed."""
from checks.files import refuse, show

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
DTYPES = (None, "float64", "float32", "bfloat16", "float16")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
SIZES = {               # the largest value that is taken seriously
    "num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14,
    "hidden_size": 1 << 20, "intermediate_size": 1 << 24, "vocab_size": 1 << 24,
    "head_dim": 1 << 14, "max_position_embeddings": 1 << 30,
}
KINDS = {               # what may be null or missing, but nothing else
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"),
                    ((bool,), "true or false")),
    **dict.fromkeys(("sliding_window", "max_window_layers"), ((int,), "an integer")),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), ((int, list), "an id")),  # not used here
}


def check_config(path, raw):
    """raw: the object in config.json. ValueError names the file and the field. (The ids that end an
    answer are the tokenizer's: load_tokenizer has them judged.)"""
    check_family(path, raw)
    check_sizes(path, raw)
    for name, (kinds, what) in KINDS.items():           # `type`: to isinstance, True is an int
        if raw.get(name) is not None and type(raw[name]) not in kinds:
            fail(path, raw, name, f"needs {what}, or null")
    check_windows(path, raw)
    check_rope(path, raw)
    for name in ("dtype", "torch_dtype"):
        value = raw.get(name)
        value = value.removeprefix("torch.") if isinstance(value, str) else value
        if value not in DTYPES:
            fail(path, raw, name, f"implemented are {', '.join(DTYPES[1:])}")


def fail(path, raw, name, why):
    refuse(path, f"{name} is {show(raw[name], 80)}" if name in raw else f"{name} is missing", why)


def check_family(path, raw):
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        fail(path, raw, "model_type", f"only {', '.join(FAMILIES)} are implemented")
    if raw.get("architectures") not in (None, [FAMILIES[family]]):
        fail(path, raw, "architectures", f"{family} is implemented as [{FAMILIES[family]!r}] only")
    if raw.get("hidden_act") not in ("silu", "swish"):          # two names of one function
        fail(path, raw, "hidden_act", "only silu is implemented")
    if raw.get("quantization_config") is not None:
        fail(path, raw, "quantization_config",
             "quantised weights are not implemented; use the unquantised model")
    if not is_one(raw.get("partial_rotary_factor")):
        fail(path, raw, "partial_rotary_factor", "only whole-head rotation (1.0) is implemented")


def is_one(value):
    """1, 1.0, or not given. True is 1 to Python, and a mistake here."""
    return value is None or value == 1 and value is not True


def check_sizes(path, raw):
    # Where the family's papers fix a value the file may leave it out. All others must be there.
    optional = ["head_dim"] if raw["model_type"] != "qwen3" else []
    if raw["model_type"] == "llama" or "num_key_value_heads" in raw:
        optional.append("num_key_value_heads")
    for name, most in SIZES.items():
        value = raw.get(name)
        if value is None and name in optional:
            continue
        if type(value) is not int or not 0 < value <= most:
            fail(path, raw, name, f"needs an integer from 1 to {most:,}")

    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    if heads % (raw.get("num_key_value_heads") or heads):
        fail(path, raw, "num_key_value_heads", f"must divide num_attention_heads {heads}")
    if raw.get("head_dim") is None and width % heads:
        fail(path, raw, "num_attention_heads",
             f"must divide hidden_size {width}, or config.json must give head_dim")
    head_dim = raw.get("head_dim") or width // heads
    if head_dim % 2:
        fail(path, raw, "head_dim", f"rotary embedding needs an even head size, not {head_dim}")
    eps = raw.get("rms_norm_eps")
    if type(eps) not in (int, float) or not 0 < eps < 1:
        fail(path, raw, "rms_norm_eps", "needs a number between 0 and 1")


def check_windows(path, raw):
    """A window, of 4096 tokens where no size is given, hides old ones from layers >=
    max_window_layers: harmless only if no layer is one of those."""
    layers, kinds = raw["num_hidden_layers"], raw.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * layers:
        fail(path, raw, "layer_types", "only full_attention, once for every layer, is implemented")
    in_use = raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None
    if in_use and kinds is None and (raw.get("max_window_layers") or 0) < layers:
        fail(path, raw, "use_sliding_window", "sliding-window attention is not implemented")


def check_rope(path, raw):
    """The rotary parameters in one of two spellings, or in both alike: `rope_parameters`, or
    `rope_theta` beside `rope_scaling`; see load_weights.read_rope."""
    spellings = ("rope_parameters", "rope_scaling")
    places = [name for name in spellings if raw.get(name) not in (None, {})]
    place = places[0] if places else "rope_scaling"
    rope = raw[place] if places else {}
    if not isinstance(rope, dict) or any(raw[name] != rope for name in places):
        fail(path, raw, place, "needs one object of rotary parameters")
    for name in ("rope_theta", "original_max_position_embeddings"):
        beside = raw.get(name)
        if beside is not None and rope.get(name, beside) != beside:
            fail(path, raw, name, f"{place} says {show(rope[name])}; make them agree")
        rope = {**rope, name: beside if rope.get(name) is None else rope[name]}
    kind = rope.get("type") if rope.get("rope_type") is None else rope["rope_type"]
    if kind is None and "factor" not in rope:
        kind = "default"
    check_rope_numbers(path, raw, place, {**rope, "rope_type": kind})


def check_rope_numbers(path, raw, place, rope):
    """rope: all parameters in one table. place: the field of config.json that holds most."""
    def wrong(name, why):
        value = rope.get(name)
        found = "is missing" if value is None else f"is {show(value, 80)}"
        refuse(path, f"{name if name in raw else f'{place}.{name}'} {found}", why)

    def need(name, default=None, least=0):
        value = default if rope.get(name) is None else rope[name]
        if type(value) not in (int, float) or not least < value < 1e12:
            wrong(name, f"needs a number above {least:g}")

    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        wrong("rope_type", f"implemented are {', '.join(ROPE_TYPES)}")
    for name in ("partial_rotary_factor", "mrope_section"):
        if not is_one(rope.get(name)):
            wrong(name, "not implemented")
    # Llama 2 is older than this field and means 10,000. For others that would be a guess.
    old_llama = raw["model_type"] == "llama" and kind in ("default", "linear")
    need("rope_theta", 10000 if old_llama else None, least=1)
    if kind != "default":
        need("factor")
    if kind in ("llama3", "yarn"):
        need("original_max_position_embeddings")
    if kind == "llama3":
        need("low_freq_factor")
        need("high_freq_factor", least=rope["low_freq_factor"])
    if kind == "yarn":
        need("beta_fast", 32)
        need("beta_slow", 1)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            need(name, 1)
        if type(rope.get("truncate", True)) is not bool:
            wrong("truncate", "needs true or false")
