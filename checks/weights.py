"""Do the weights and config.json belong together?"""
import re
from pathlib import Path

import torch

from checks.files import show

DO = "config.json and the weights do not belong together"


def fail(folder, what, names):
    """The first three names, each with its end: that is what tells k_proj from k_norm."""
    names = sorted(names)
    ends = [name if len(name) <= 80 else "..." + name[-77:] for name in names[:3]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    listed = ", ".join(show(end, 90) for end in ends)
    raise ValueError(f"{show(Path(folder), 100)}: {what}: {listed}{more}; {DO}")


def check_layers(folder, config, tensors):
    """As many layers as announced? A number in a small file must not make the program build millions."""
    found = re.compile(r"model\.layers\.(\d+)\.")
    layers = {match[1] for match in map(found.match, tensors) if match}
    if not layers:
        names = ", ".join(show(name, 60) for name in sorted(tensors)[:3]) or "none at all"
        raise ValueError(f"{show(Path(folder), 100)}: no weight is called model.layers.N...; there are: "
                         f"{names}; give a folder as transformers saves it")
    if len(layers) != config.num_hidden_layers:
        raise ValueError(f"{show(Path(folder), 100)}: num_hidden_layers is {config.num_hidden_layers} but "
                         f"the weights have {len(layers)} layers; {DO}")


def check_weights(folder, config, tensors, expected):
    """tensors {name: tensor} of the files; expected: the state dict of the model that config.json means."""
    have = {name for name, tensor in tensors.items() if tensor is not None}
    if expected.keys() - have:
        fail(folder, "weights are missing", expected.keys() - have)
    if have - expected.keys():
        fail(folder, "weights that this architecture does not have", have - expected.keys())
    odd = [f"{name} {list(tensors[name].shape)} for {list(expected[name].shape)}" for name in expected
           if tensors[name].shape != expected[name].shape]
    if odd:
        fail(folder, "weights have another shape than config.json says", odd)
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    odd = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in kinds]
    if odd:
        fail(folder, "weights are not real floating-point numbers", odd)
    head, embedding = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    if config.tie_word_embeddings and head is not embedding:
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            fail(folder, "tie_word_embeddings is true but the file has another matrix", ["lm_head.weight"])


def check_dtype(dtype, dtypes):
    if dtype != "auto" and dtype not in dtypes and dtype not in dtypes.values():
        raise ValueError(f"dtype is {show(dtype)}; give auto, {', '.join(dtypes)}")


def check_finite(lm):
    """Called when logits were not finite: names the first weight that is not."""
    for name, parameter in lm.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"the weight {show(name, 120)} holds NaN or infinity; download the weights again")
