"""Do the weights and config.json belong together?"""
import re
from pathlib import Path

import torch

from checks.files import show, show_name

DO = "config.json and the weights do not belong together"


def fail(folder, what, names):
    """names: [(a weight's name, what more there is to say of it), ...]; the first two are shown."""
    words = [show_name(name) + more for name, more in sorted(names)[:2]]
    rest = f" and {len(names) - 2} more" if len(names) > 2 else ""
    raise ValueError(f"{show(Path(folder), 100)}: {what}: {', '.join(words)}{rest}; {DO}")


def check_layers(folder, config, tensors):
    """As many layers as announced? A number in a small file must not make the program build
    millions."""
    matches = [re.match(r"model\.layers\.(\d+)\.", name) for name in tensors]
    layers = {match[1] for match in matches if match}
    if not layers:
        names = ", ".join(show_name(name) for name in sorted(tensors)[:2]) or "none at all"
        raise ValueError(f"{show(Path(folder), 100)}: no weight is called model.layers.N...; there "
                         f"are: {names}; give a folder as transformers saves it")
    if len(layers) != config.num_hidden_layers:
        raise ValueError(f"{show(Path(folder), 100)}: num_hidden_layers is "
                         f"{config.num_hidden_layers}, but there are {len(layers)} layers; {DO}")


def check_weights(folder, config, tensors, expected):
    """tensors: {name: tensor} of the files. expected: the state dict of the model that config.json
    means. Names, shapes, dtypes, and a tied head that is a copy of the embedding."""
    have = {name for name, tensor in tensors.items() if tensor is not None}
    missing, more = expected.keys() - have, have - expected.keys()
    if missing:
        fail(folder, "weights are missing", [(name, "") for name in missing])
    if more:
        fail(folder, "weights that this architecture does not have", [(name, "") for name in more])
    odd = []
    for name, weight in expected.items():
        has, needs = list(tensors[name].shape), list(weight.shape)
        if has != needs:
            odd.append((name, f" {show(has, 30)} for {show(needs, 30)}"))
    if odd:
        fail(folder, "weights have another shape than config.json says", odd)
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    odd = [(name, f" ({t.dtype})") for name, t in tensors.items() if t.dtype not in kinds]
    if odd:
        fail(folder, "weights are not real floating-point numbers", odd)
    head, embedding = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    if config.tie_word_embeddings and head is not embedding:
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            what = "tie_word_embeddings is true but the file has another matrix"
            fail(folder, what, [("lm_head.weight", "")])


def check_dtype(dtype, dtypes):
    """dtype: the option of load_model. dtypes: {"float32": torch.float32, ...}"""
    if dtype != "auto" and dtype not in dtypes and dtype not in dtypes.values():
        raise ValueError(f"dtype is {show(dtype)}; give auto, {', '.join(dtypes)}")


def check_finite(lm):
    """Names the first weight with a number that is none: a reason for logits that are none."""
    for name, weight in lm.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"the weight {show_name(name)} holds NaN or infinity; download the "
                             "weights again")


def check_device(device):
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:                  # torch's own kinds of error differ by device
        raise ValueError(f"--device {show(device)} is not available here: "
                         f"{show(str(error), 160)}") from None
