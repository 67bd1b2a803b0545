"""What may be wrong with a GGUF file. What convert/ implements passes; all else is refused."""
import numpy as np

from checks.config import FAMILIES
from checks.files import regular_file, show

NEEDED = {"general.architecture": str, "tokenizer.ggml.model": str, "tokenizer.ggml.pre": str,
          "tokenizer.ggml.tokens": list, "tokenizer.ggml.token_type": list,
          "tokenizer.ggml.merges": list}
MOST_READS = 1_500_000              # of a number or text each; a Llama 3 file takes 950,000


@np.errstate(all="ignore")
def read_gguf(path):
    """-> fields {name: value}, tensors {name: what the gguf library knows of it}."""
    from gguf import GGUFReader

    class Careful(GGUFReader):                      # the library believes every length it reads
        calls = 0

        def _get(self, offset, dtype, count=1, **order):
            self.calls += 1
            end = offset + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data) or self.calls > MOST_READS:
                raise ValueError("it is cut short, or lists more than any model has")
            return super()._get(offset, dtype, count, **order)

    path = regular_file(path)
    try:
        reader = Careful(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        if sum(tensor.n_bytes for tensor in reader.tensors) > len(reader.data):
            raise ValueError("its tensors share bytes")
    except Exception as error:                      # of any kind: the library checks little
        raise ValueError(f"is no whole GGUF file ({show(str(error), 100)}); "
                         "download it again") from None
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def check_gguf(fields, tensors, modules, cuts):
    """modules: the names of weights, cuts: those of pre-tokenizers that are implemented."""
    for name, kind in NEEDED.items():
        if type(fields.get(name)) is not kind:
            raise ValueError(f"{name} is {show(fields.get(name))}, not a {kind.__name__}; "
                             "give the file of a whole language model")
    family, model, pre, texts, kinds, _ = (fields[name] for name in NEEDED)
    if family not in FAMILIES:
        raise ValueError(f"general.architecture is {show(family)}, none of {', '.join(FAMILIES)}")
    if model != "gpt2" or pre not in cuts:
        raise ValueError(f"tokenizer.ggml.model is {show(model)}, tokenizer.ggml.pre {show(pre)}; "
                         f"implemented is gpt2 with {', '.join(cuts)}")
    if not len(set(texts)) == len(texts) == len(kinds):
        raise ValueError("tokenizer.ggml.tokens holds a text twice, or more or fewer tokens than "
                         "tokenizer.ggml.token_type has types")
    if "token_embd.weight" not in tensors:
        raise ValueError("tensor token_embd.weight is missing; give the file of a whole model")
    for name, value in fields.items():
        if name.endswith("_token_id") and type(value) is not int:
            raise ValueError(f"{name} is {show(value)}, not a token's id")
    for name, tensor in tensors.items():
        parts = name.split(".")
        known = len(parts) in (2, 4) and parts[-2] in modules and parts[-1] in ("weight", "bias")
        if not (known or name == "rope_freqs.weight") or len(tensor.shape) == 0:
            raise ValueError(f"tensor {show(name)} is in no dense {', '.join(FAMILIES)} model")
    theta = fields.get(f"{family}.rope.freq_base", 1e4)
    if type(theta) is not float or not 1 < theta < 1e12:
        raise ValueError(f"{family}.rope.freq_base is {show(theta)}, not a number above 1")


def check_rest(fields, known, head_dim):
    """What else the file says of the architecture is so anyway, is off, or is refused."""
    for name, value in fields.items():
        start, _, rest = name.partition(".")
        size = rest in ("attention.value_length", "rope.dimension_count") and value == head_dim
        taken = size or rest in known or rest == "vocab_size"
        off = not value or value == "none"
        if start == fields["general.architecture"] and not off and not taken:
            raise ValueError(f"{name} is {show(value)}; this is not implemented")
