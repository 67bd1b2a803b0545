"""Lesson III. Sampling: from logits to the next token. See `sampler` in generate.py."""

import torch

import generate
from exercises.check import Exercise, Mistake
from exercises.lesson1_decoder import random
from exercises.program import answers_with, bar, embedded


# ---- 8. temperature, top-k, top-p

def probabilities(logits, temperature, top_k, top_p):
    """The distribution from which the next token is drawn.

    softmax makes probabilities of logits. Three numbers change them, always in this order.
    Temperature divides the logits: below 1 the likely tokens gain, above 1 the others do. top_k
    keeps the k likeliest tokens. top_p (the nucleus) keeps the likeliest tokens that together have
    probability p: as few of them as suffice, so the token that crosses p is still in. What is cut
    gets probability 0, and the rest is scaled to sum to 1 again, after top_k and after top_p.

        p = softmax(logits / temperature);  cut to k, p / Σp;  cut to the nucleus, p / Σp

    Temperature 0 means: no chance at all, the likeliest token has probability 1. (Divided by 0, the
    logits would be infinite.) top_k 0 means no cut, as does top_p 1. In this exercise no two logits
    are equal.

    logits       (V,) float32
    temperature  0 or more;   top_k  0 or more, perhaps more than V;   top_p  above 0, at most 1
    returns      (V,) float32, in the order of the vocabulary, sum 1

    By hand: logits (ln 1, ln 5, ln 4), temperature 1, top_p = 0.6. Probabilities (0.1, 0.5, 0.4).
    Token 1 has 0.5, not yet 0.6; token 2 crosses it. Both stay: (0, 0.5, 0.4) / 0.9.

    >>> probabilities(torch.tensor([1.0, 5.0, 4.0]).log(), 1.0, 0, 0.6)
    tensor([0.0000, 0.5556, 0.4444])

    Allowed: everything on tensors. Not allowed: nothing. Loops are not needed.

    To think about: is drawing with top_k = 1 the same as temperature 0? And with top_p = 0.0001?
    """
    if temperature == 0:
        return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1)
    p, order = (logits / temperature).softmax(-1).sort(descending=True)
    if top_k:
        p[top_k:] = 0
        p = p / p.sum()
    before = p.cumsum(-1) - p                                 # what the likelier ones have together
    if top_p < 1:
        p[before >= top_p] = 0
        p = p / p.sum()
    return torch.zeros_like(p).scatter(-1, order, p)


def probabilities_cases():
    logits = 2 * random(16, 11)
    return {
        "the example by hand": (torch.tensor([1.0, 5.0, 4.0]).log(), 1.0, 0, 0.6),
        "plain": (logits, 1.0, 0, 1.0),
        "temperature": (logits, 1.7, 0, 1.0),
        "temperature 0": (logits, 0.0, 0, 1.0),
        "top_k": (logits, 1.0, 3, 1.0),
        "top_k above V": (logits, 1.0, 50, 1.0),
        "top_p": (logits, 1.0, 0, 0.8),
        "top_p that one token reaches": (logits, 0.3, 0, 0.05),
        "all three": (logits, 1.5, 6, 0.75),
    }


def probabilities_reward(probabilities):
    lm, tokenizer, prompt = embedded()
    answer = prompt + tokenizer.encode("The")
    logits = lm.lm_head(lm.model(torch.tensor([answer])))[0, -1]
    lines = ["the embedded model's word after 'The', drawn with ..."]
    for settings in ((1.0, 0, 1.0), (4.0, 0, 1.0), (4.0, 5, 1.0), (4.0, 0, 0.5)):
        p = probabilities(logits, *settings)
        lines.append("temperature {}, top_k {}, top_p {}: {} tokens can come".format(
            *settings, int((p > 1e-6).sum())))
        for value, id in zip(*(x.tolist() for x in p.topk(4))):
            lines.append(f"  {tokenizer.decode([id])!r:<12} {value:6.1%} {bar(value)}")
    return "\n".join(lines)


def probabilities_trial(probabilities):
    def sampler(temperature, top_k, top_p, seed):
        draw = torch.Generator().manual_seed(seed)

        def choose(logits):
            p = probabilities(logits, temperature, top_k, top_p).double()
            p, order = p.sort(descending=True, stable=True)     # generate.py draws from sorted ones
            return order[torch.multinomial(p, 1, generator=draw)].item()

        return choose

    options = ("--problem 1 --slot-steps 0 --temperature 3 --top-k 40 --top-p 0.9 "
               "--max-new-tokens 40").split()
    return answers_with((generate, "sampler", sampler), options=options)


PROBABILITIES = Exercise(
    title="Temperature, top-k, top-p", minutes=40, level="medium",
    solution=probabilities, cases=probabilities_cases,
    reward=probabilities_reward, trial=probabilities_trial,
    mistakes=[
        Mistake("the token that crosses top_p is dropped",
                "The tokens that are kept must *reach* p. The one that crosses it stays; "
                "otherwise nothing would be left when the first token alone has more than p.",
                {"p[before >= top_p] = 0": "p[before + p > top_p] = 0"}),
        Mistake("temperature multiplies",
                "Logits are divided by it: a low temperature makes differences larger.",
                {"logits / temperature": "logits * temperature"}),
        Mistake("temperature after softmax",
                "p / T, scaled to sum 1 again, is p: nothing has happened. The logits are divided.",
                {"(logits / temperature).softmax(-1)": "logits.softmax(-1)"}),
        Mistake("top_k keeps one too many",
                "The k likeliest stand at places 0 to k - 1.",
                {"p[top_k:] = 0": "p[top_k + 1:] = 0"}),
        Mistake("top_k keeps the unlikeliest",
                "Sorted the other way round: the likeliest come first with descending=True.",
                {"p[top_k:] = 0": "p[:-top_k] = 0"}),
        Mistake("not scaled after the cut",
                "What is left after top_p must sum to 1 again.",
                {"p[before >= top_p] = 0\n        p = p / p.sum()": "p[before >= top_p] = 0"}),
        Mistake("not scaled between the cuts",
                "top_p is a share of what top_k has left, which must sum to 1 before it is cut "
                "again.",
                {"p[top_k:] = 0\n        p = p / p.sum()": "p[top_k:] = 0",
                 "    return torch.zeros_like(p).scatter(-1, order, p)":
                 "    p = p / p.sum()\n    return torch.zeros_like(p).scatter(-1, order, p)"}),
        Mistake("never scaled after top_k",
                "What top_k has left must sum to 1 again, also where there is no top_p.",
                {"p[top_k:] = 0\n        p = p / p.sum()": "p[top_k:] = 0"}),
        Mistake("never put back into the order of the vocabulary",
                "The probabilities are right but sorted: place 0 is no longer token 0.",
                {"return torch.zeros_like(p).scatter(-1, order, p)": "return p"}),
        Mistake("put back by the wrong permutation",
                "p[order] sorts once more. To undo a sort, write p to the places `order`: scatter.",
                {"torch.zeros_like(p).scatter(-1, order, p)": "p[order]"}),
        Mistake("temperature 0 is not treated apart",
                "Logits divided by 0 are infinite, and softmax gives NaN.",
                {"if temperature == 0:": "if False:"}),
        Mistake("temperature 0 is taken for 1",
                "0 means the likeliest token, with certainty.",
                {"if temperature == 0:": "temperature = temperature or 1\n    if False:"}),
        Mistake("the nucleus is filled from below",
                "The unlikeliest tokens that make up p were kept.",
                {"before = p.cumsum(-1) - p": "before = p.flip(0).cumsum(-1).flip(0) - p"}),
    ],
    hints=["Sort once, descending: top_k is then a slice, and top_p a comparison with a running "
           "sum.",
           "cumsum(p) - p is what the likelier tokens have together: keep a token while that is "
           "below p.",
           "p, order = ....sort(descending=True); zeros.scatter(-1, order, p) puts everything "
           "back."],
    answer="top_k = 1 leaves one token with probability 1: the same tokens as temperature 0, "
           "unless two logits are equal. A tiny top_p does the same, since the token that crosses "
           "it stays.")


EXERCISES = [PROBABILITIES]
