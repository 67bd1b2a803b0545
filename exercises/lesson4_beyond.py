"""Lesson IV, second half. The closed form, a batch, and what δ does to the vocabulary.

See speed/delta.py, speed/batch.py, and `probabilities` in generate.py.
"""
import time

import torch
import torch.nn.functional as F

import generate
import slot
from exercises.check import Exercise, Mistake
from exercises.lesson1_decoder import random
from exercises.lesson4_loop import AUTOGRAD, FIT_PARTS, STEERED, fit_and_traces, head, ids
from exercises.program import answers_with, embedded, prompt_states


# ---- 12. the closed form

def closed_form(hidden, targets, W, steps, lr):
    """The closed form: four products a step.

    The loop of exercise 10 makes n × V exponentials in every step. But δ adds the same vector
    b = W δ to all positions, and exp(z + b) = exp(z) exp(b). So all exponentials of z can be made
    once, before the loop, and a step needs four matrix-vector products and V exponentials. Largest
    entries are taken out first, since exp overflows above 88.

        once:    z = h Wᵀ (n, V)    top_t = max_v z_tv    E = exp(z - top) (n, V)    y: exercise 11

        a step:  b = W δ                    (V,)
                 c = exp(b - max b)         (V,)
                 s = E c                    (n,)     softmax(z + b)[t, v] is E[t, v] c[v] / s[t]
                 p = c ⊙ Eᵀ(1/s) / n        (V,)     the mean prediction
                 g = Wᵀ(p - y)              (d,)
                 L = mean(log s + top - z[target]) + max b - <b, y>

    Then AdamW by hand, without its weight decay of 1e-8. Step i = 1, 2, ... from m = v = 0 (d,):

                 m = 0.9 m + 0.1 g          v = 0.999 v + 0.001 g²
                 δ = δ - lr * (m / (1 - 0.9^i)) / (sqrt(v / (1 - 0.999^i)) + 1e-5)

    hidden   (n, d);  targets (n,) int64;  W (V, d);  steps  0 or more;  lr  above 0
    returns  the pair (δ, losses): δ (d,), losses (steps + 1,): before every step, and at the end

    By hand: the example of exercise 10: W has the rows (1) and (-1), h is 0 at the one position,
    target 0, lr = 0.1. z = (0, 0), E = (1, 1), y = (1, 0). Step 1: b = (0, 0), c = (1, 1), s = 2,
    p = (1, 1) / 2, g = 1·(-1/2) + (-1)·1/2 = -1, m = -0.1, v = 0.001; both corrections divide: -1
    and 1; δ = 0.1. L = ln 2 before, and after it b = (0.1, -0.1), c = (1, e^-0.2), s = 1.8187: L =
    ln 1.8187 + 0.1 - 0.1 = 0.5981.

    >>> closed_form(torch.zeros(1, 1), torch.tensor([0]), torch.tensor([[1.0], [-1.0]]), 1, 0.1)
    (tensor([0.1000]), tensor([0.6931, 0.5981]))

    Allowed: everything on tensors. Not allowed: autograd, torch.optim; exponentials of n × V
    numbers inside the loop (softmax, logsumexp and cross_entropy make them, too).

    To think about: E c fails when b spreads wide, say from -60 to 60. What happens to s in a row of
    E whose large entries all meet small entries of c?
    """
    n, (V, d) = len(targets), W.shape
    z = hidden @ W.T                                            # (n, V)
    top = z.amax(1, keepdim=True)                               # (n, 1)
    E = (z - top).exp()                                         # (n, V), once
    above = (top[:, 0] - z[torch.arange(n), targets]).mean()
    y = torch.bincount(targets, minlength=V) / n                # (V,)
    (delta, m, v), losses = torch.zeros(3, d), []
    for i in range(1, steps + 2):
        b = W @ delta                                           # (V,)
        c = (b - b.max()).exp()                                 # (V,)
        s = E @ c                                               # (n,)
        losses.append(s.log().mean() + above + b.max() - b @ y)
        if i > steps:
            break
        p = c * (E.T @ (1 / s)) / n                             # (V,)
        g = W.T @ (p - y)                                       # (d,)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        delta = delta - lr * (m / (1 - 0.9 ** i)) / ((v / (1 - 0.999 ** i)).sqrt() + 1e-5)
    return delta, torch.stack(losses)


class Exponentials(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the calls of torch that make at least `size` exponentials."""
    def __init__(self, size):
        super().__init__()
        self.size, self.large = size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.strip("_")
        power = args[1] if name == "pow" else args[0]           # math.e ** z is an exponential, too
        if name in ("pow", "exp", "exp2", "expm1", "softmax", "log_softmax", "logsumexp"):
            self.large += isinstance(power, torch.Tensor) and power.numel() >= self.size
        return function(*args, **(kwargs or {}))


def closed_form_observe(closed_form, hidden, targets, W, steps, lr):
    with Exponentials(len(targets) * len(W)) as counted:
        result = closed_form(hidden, targets, W, steps, lr)
    if not isinstance(result, tuple) or len(result) != 2:
        return result
    large = counted.large > 4 and len(targets) > 1              # five steps would make five
    return (*result, not large)


def closed_form_cases():
    W, x = random(50, 11, 5), ids(51, 11, 7)
    return {
        "the example by hand": (torch.zeros(1, 1), torch.tensor([0]), torch.tensor([[1.0], [-1.0]]),
                                1, 0.1),
        "five steps": (random(52, 7, 5), x, W, 5, 0.1),
        "no step": (random(52, 7, 5), x, W, 0, 0.1),
        "logits up to 200": (40 * random(52, 7, 5), x, W, 3, 0.3),
    }


def closed_form_reward(closed_form):
    lm, _, prompt = embedded()
    hidden, W = prompt_states(lm, prompt)[0], lm.lm_head.weight
    h, x = hidden[0, :-1], torch.tensor(prompt[1:])
    lines = [f"20 steps on a prompt, n = {len(x)}, V = {len(W)}, d = {W.shape[1]}; best of five:"]
    ways = {"the loop, slot.py": lambda: slot.optimize_delta(hidden, prompt, lm.lm_head, 20, 0.01),
            "your closed form": lambda: closed_form(h, x, W, 20, 0.01)}
    seconds = {}
    for name, call in ways.items():
        times = []
        for _ in range(5):
            began = time.perf_counter()
            result = call()
            times.append(time.perf_counter() - began)
        seconds[name] = min(times)
        lines.append(f"  {name:<20} {1000 * min(times):7.2f} ms   loss {result[1][-1].item():.5f}")
    ratio = seconds["the loop, slot.py"] / seconds["your closed form"]
    return "\n".join([*lines, f"  {ratio:.1f} times as fast"])


def closed_form_trial(closed_form):
    def by_student(hidden, tokens, lm_head, steps, lr, loss=None):
        h, x = hidden[0, :-1], torch.tensor(tokens[1:])
        delta, losses = closed_form(h, x, lm_head.weight, steps, lr)
        return delta[None, None], losses

    return answers_with((generate, "optimize_delta", by_student), options=STEERED)


CLOSED_FORM = Exercise(
    title="The closed form", minutes=60, level="hard",
    solution=closed_form, cases=closed_form_cases, observe=closed_form_observe,
    parts=("δ", "the losses", "no n × V exponentials in the loop"), tolerance=5e-5,
    returns="the pair (δ, losses)",
    reward=closed_form_reward, trial=closed_form_trial,
    forbidden=(*AUTOGRAD, "optim", "cross_entropy"),
    mistakes=[
        Mistake("the largest logit stays in E",
                "exp(z) overflows above 88, and infinity / infinity is NaN. Take max z out of "
                "each row and put it back into the loss.",
                {"E = (z - top).exp()": "E = z.exp()", "(top[:, 0] - z[": "(0 - z["}),
        Mistake("max z is missing in the loss",
                "log s is short by what was taken out of E.",
                {"top[:, 0] - z[": "0 - z["}),
        Mistake("max b is missing in the loss",
                "c is exp(b - max b), so log s is short by max b, too.",
                {" + b.max() - b @ y": " - b @ y"}),
        Mistake("<b, y> is missing in the loss",
                "The target's logit is z + b: both are subtracted.",
                {" + b.max() - b @ y": " + b.max()"}),
        Mistake("1/s is missing",
                "Each row of E c must be divided by its sum before rows are added.",
                {"E.T @ (1 / s)": "E.T @ torch.ones(n)"}),
        Mistake("c is missing in p",
                "That is the prediction at δ = 0, divided by the sums of another δ.",
                {"p = c * (": "p = ("}),
        Mistake("p is a sum over positions",
                "The loss is a mean: p sums to 1, not to n.",
                {"(E.T @ (1 / s)) / n": "(E.T @ (1 / s))"}),
        Mistake("a token that comes twice is counted once",
                "y[targets] = 1/n writes the same place again.",
                {"torch.bincount(targets, minlength=V) / n":
                 "torch.zeros(V).index_fill(0, targets, 1 / n)"}),
        Mistake("exponentials are made in every step",
                "Right, but this is what was to be saved: E does not depend on δ.",
                {"s = E @ c": "E = (z - top).exp(); s = E @ c"}),
        Mistake("δ does not enter",
                "b was made once, at δ = 0. It changes with every step.",
                {"b = W @ delta": "b = torch.zeros(V)"}),
        Mistake("no correction of the first steps",
                "m and v start at 0 and are too small at first. AdamW divides them by 1 - 0.9^i "
                "and 1 - 0.999^i.",
                {"(m / (1 - 0.9 ** i)) / ((v / (1 - 0.999 ** i)).sqrt()": "m / (v.sqrt()"}),
        Mistake("steps are counted from 0 in the correction",
                "0.9^0 = 1, and 1 - 1 = 0 is divided by: the first step has number 1.",
                {"(1 - 0.9 ** i)":
                 "(1 - 0.9 ** (i - 1))",
                 "(1 - 0.999 ** i)":
                 "(1 - 0.999 ** (i - 1))"}),
        Mistake("eps inside the root",
                "sqrt(v) + eps, not sqrt(v + eps).",
                {".sqrt() + 1e-5)":
                 " + 1e-5).sqrt()",
                 "((v / (1 - 0.999 ** i))":
                 "(v / (1 - 0.999 ** i)"}),
        Mistake("the two betas are exchanged",
                "0.9 belongs to the gradient's mean, 0.999 to that of its square.",
                {"0.9 * m + 0.1 * g":
                 "0.999 * m + 0.001 * g",
                 "0.999 * v + 0.001 * g * g":
                 "0.9 * v + 0.1 * g * g",
                 "(1 - 0.9 ** i)":
                 "(1 - 0.999 ** i)",
                 "(1 - 0.999 ** i)).sqrt":
                 "(1 - 0.9 ** i)).sqrt"}),
        Mistake("the step goes uphill",
                "δ moves against the gradient.",
                {"delta - lr": "delta + lr"}),
        Mistake("the loss after the last step is missing",
                "steps losses instead of steps + 1.",
                {"losses.append(s": "if i > steps and losses: break\n        losses.append(s"}),
    ],
    hints=["Write the part before the loop and the loss first: with steps = 0 it is the plain "
           "model's, which exercise 9 gives you to compare.",
           "E.T @ (1 / s) sums each word's E / s over the positions: (V, n) times (n,).",
           "Loop over i = 1 .. steps + 1, note the loss, and stop before moving in the last "
           "round."],
    answer="c = exp(b - max b) ranges down to e^-120, which is 0 in float32. If all words that "
           "are likely at position t have such a c, s[t] is tiny or 0, and 1/s is infinite. "
           "speed/delta.py looks at the spread of b; if it is wide, it takes the softmax of z + b "
           "itself.")


# ---- 13. one δ for each prompt of a batch

def optimize_deltas(hidden, tokens, mask, lm_head, steps, lr):
    """One δ for each prompt of a padded batch.

    Each prompt gets the δ that it would get alone. Two things can go wrong. Prompts of different
    length are padded, and padding must neither be predicted nor be predicted from. And prompts can
    leak into each other: through one δ for all, through one mean. (The authors' code does both.)

        L_b = -1/n_b Σ_t log softmax(W(h_bt + δ_b))[tokens_b,t+1]       over the pairs that are real

    With one δ for each row, no row's loss depends on another row's δ. So the gradient of the *sum*
    of the losses is, row by row, each row's own gradient; the gradient of their mean would be B
    times too small. AdamW works on each number by itself, so one optimizer serves all rows.

    hidden   (B, T, d) float32; any finite numbers at padded positions
    tokens   (B, T) int64
    mask     (B, T) bool, True = real; padding on either side. A pair counts if both tokens are
             real; n_b is their number. Without a pair (one token) loss and δ are 0
    lm_head  nn.Linear(d, V) without bias; its weight's .grad stays None, requires_grad as it was
    steps, lr, AdamW's settings: as in exercise 10
    returns  the pair (δ, losses): δ (B, 1, d), losses (steps + 1, B), before every step and at the
             end; both float32 tensors without a graph (not a list)

    By hand: W has the rows (1) and (-1); h is 0 at both positions of both prompts. Tokens (0, 0)
    and (1, 1), one step, lr = 0.1. The first prompt is the example of exercise 10, with gradient
    -1: δ = 0.1. The second is its mirror image, with gradient 1: δ = -0.1. A shared δ would stay 0:
    the two gradients cancel.

    >>> lm_head = torch.nn.Linear(1, 2, bias=False)
    >>> lm_head.weight.data = torch.tensor([[1.0], [-1.0]])
    >>> tokens, mask = torch.tensor([[0, 0], [1, 1]]), torch.ones(2, 2, dtype=torch.bool)
    >>> delta, losses = optimize_deltas(torch.zeros(2, 2, 1), tokens, mask, lm_head, 1, 0.1)
    >>> delta.flatten(), losses
    (tensor([ 0.1000, -0.1000]), tensor([[0.6931, 0.6931],
            [0.5981, 0.5981]]))

    Allowed: torch.optim.AdamW, F.cross_entropy (it wants the logits as (B, V, T-1): transpose, do
    not reshape), autograd. Not allowed: nothing. (A loop over rows passes, too: speed/batch.py.)

    To think about: AdamW divides by the root of the squares, so a factor 1/B in the gradient should
    cancel. Why does the mean over the batch still give another δ than the sum?
    """
    B, T, d = hidden.shape
    pairs = mask[:, :-1] & mask[:, 1:]                          # (B, T-1)
    n = pairs.sum(1).clamp(min=1)                               # (B,)
    targets = tokens[:, 1:].masked_fill(~pairs, -100)           # which cross_entropy leaves out
    with torch.no_grad():
        Wh = lm_head(hidden[:, :-1])                            # (B, T-1, V)
    delta = torch.zeros(B, 1, d, requires_grad=True)
    optimizer = torch.optim.AdamW([delta], lr=lr, eps=1e-5, weight_decay=1e-8)
    losses = []
    for step in range(steps + 1):
        logits = Wh + lm_head(delta)                            # (B, T-1, V) + (B, 1, V)
        nll = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")    # (B, T-1)
        loss = nll.sum(1) / n                                   # (B,)
        losses.append(loss.detach())
        if step < steps:
            loss.sum().backward(inputs=[delta])
            optimizer.step()
            optimizer.zero_grad()
    return delta.detach(), torch.stack(losses)


def optimize_deltas_observe(optimize_deltas, hidden, tokens, mask, lm_head, steps, lr):
    return fit_and_traces(optimize_deltas(hidden, tokens, mask, lm_head, steps, lr), lm_head)


def optimize_deltas_cases():
    by_hand = torch.nn.Linear(1, 2, bias=False)
    by_hand.weight.data = torch.tensor([[1.0], [-1.0]])
    on = torch.ones(3, 7, dtype=torch.bool)
    left, right, short = on.clone(), on.clone(), on.clone()
    left[0, :3], left[2, :1] = False, False
    right[1, 4:], right[2, 6:] = False, False
    short[1, :6] = False
    arguments = random(60, 3, 7, 5), ids(61, 8, 3, 7)
    return {
        "the example by hand": (torch.zeros(2, 2, 1), torch.tensor([[0, 0], [1, 1]]), on[:2, :2],
                                by_hand, 1, 0.1),
        "no padding": (*arguments, on, head(62, 8, 5), 3, 0.1),
        "padding on the left": (*arguments, left, head(62, 8, 5), 3, 0.1),
        "padding on the right": (*arguments, right, head(62, 8, 5), 3, 0.1),
        "a prompt of one token": (*arguments, short, head(62, 8, 5), 2, 0.1),
    }


def padded_batch():
    """Three prompts, padded on the left -> hidden, tokens, mask, and the ids of each."""
    from tiny.problems import heldout
    lm, tokenizer, _ = embedded()
    prompts = [tokenizer.chat_ids([{"role": "user", "content": heldout(group, 1)[0].question}])
               for group in ("common", "rare", "unseen")]
    T = max(map(len, prompts))
    tokens = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[False] * (T - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    hidden = torch.zeros(3, T, lm.config.hidden_size)
    for row, prompt in enumerate(prompts):
        hidden[row, T - len(prompt):] = prompt_states(lm, prompt)[0][0]
    return hidden, tokens, mask, prompts


def optimize_deltas_reward(optimize_deltas):
    lm = embedded()[0]
    hidden, tokens, mask, prompts = padded_batch()
    delta, losses = optimize_deltas(hidden, tokens, mask, lm.lm_head, 5, 0.1)
    lines = ["three prompts in one padded batch, 5 steps at lr 0.1:"]
    for row, (group, prompt) in enumerate(zip(("common", "rare", "unseen"), prompts)):
        alone, _ = slot.optimize_delta(prompt_states(lm, prompt)[0], prompt, lm.lm_head, 5, 0.1)
        apart = (delta[row] - alone[0]).abs().max().item()
        lines.append(f"  {group:<7} {len(prompt):3} tokens, loss {losses[0, row]:.3f} -> "
                     f"{losses[-1, row]:.3f}, δ as alone up to rounding, {apart:.0e}")
    cosines = F.cosine_similarity(delta, delta.transpose(0, 1), dim=-1)
    lines.append(f"  the three δ point in different directions: cosines {cosines[0, 1]:+.2f}, "
                 f"{cosines[0, 2]:+.2f}, {cosines[1, 2]:+.2f}")
    return "\n".join(lines)


def optimize_deltas_trial(optimize_deltas):
    lm, tokenizer, _ = embedded()

    def answers(fit):
        """Three prompts, answered one by one, each with its row of the δ."""
        hidden, tokens, mask, prompts = padded_batch()
        deltas, losses = fit(hidden, tokens, mask, lm.lm_head, 5, 0.1)
        last = [f" {loss:.3f}" for loss in losses[-1].tolist()]
        found = {"loss of each prompt after the fit": last}
        for row, prompt in enumerate(prompts):
            h, cache = slot.prefill(lm, prompt, 60)
            new = slot.decode(lm, h, cache, 60, deltas[row:row + 1], eos_ids=tokenizer.eos_ids)
            found[f"answer {row + 1}"] = [tokenizer.decode([id]) for id in new]
        return found

    def each_alone(hidden, tokens, mask, lm_head, steps, lr):
        fits = [slot.optimize_delta(h[None, real], x[real].tolist(), lm_head, steps, lr)
                for h, x, real in zip(hidden, tokens, mask)]
        deltas, losses = zip(*fits)
        return torch.cat(deltas), torch.stack(losses, dim=1)

    runs = "three held-out problems (common, rare, unseen) in one padded batch, 5 steps at lr 0.1"
    return answers(each_alone), answers(optimize_deltas), runs


ONE_DELTA_EACH = Exercise(
    title="One δ for each prompt of a padded batch", minutes=45, level="hard",
    solution=optimize_deltas, cases=optimize_deltas_cases, observe=optimize_deltas_observe,
    parts=FIT_PARTS, returns="the pair (δ, losses)",
    reward=optimize_deltas_reward, trial=optimize_deltas_trial,
    mistakes=[
        Mistake("δ is shared by the batch",
                "One vector for all prompts: what one needs, another gets. There must be B of "
                "them, (B, 1, d).",
                {"torch.zeros(B, 1, d,": "torch.zeros(1, 1, d,"}),
        Mistake("δ is shared by the batch, and fitted to the mean of all tokens",
                "One vector, one loss for all prompts: long prompts decide. This is what the "
                "authors' public code does.",
                {"torch.zeros(B, 1, d,": "torch.zeros(1, 1, d,",
                 "loss = nll.sum(1) / n": "loss = nll.sum() / (targets != -100).sum()"}),
        Mistake("a δ for each position",
                "Every position has a vector of its own; SLOT has one for the whole prompt.",
                {"torch.zeros(B, 1, d,": "torch.zeros(B, T - 1, d,"}),
        Mistake("padding is counted",
                "The mask was not used.",
                {"pairs = mask[:, :-1] & mask[:, 1:]": "pairs = torch.ones_like(mask[:, 1:])"}),
        Mistake("the first pair of a left-padded row is counted",
                "The mask of the successor alone was asked. The first real token would be "
                "predicted from padding.",
                {"pairs = mask[:, :-1] & mask[:, 1:]": "pairs = mask[:, 1:]"}),
        Mistake("the padding behind the last token is to be predicted",
                "The mask of position t alone was asked. Its successor must be real, too.",
                {"pairs = mask[:, :-1] & mask[:, 1:]": "pairs = mask[:, :-1]"}),
        Mistake("every row is divided by T - 1",
                "n_b is the number of pairs that count in that row.",
                {"n = pairs.sum(1).clamp(min=1)": "n = T - 1"}),
        Mistake("every row is divided by all pairs of the batch",
                "n_b is the number of pairs that count in that row alone.",
                {"n = pairs.sum(1).clamp(min=1)": "n = pairs.sum()"}),
        Mistake("one mean for the whole batch",
                "This is what F.cross_entropy gives by itself. Every row needs its own sum and "
                "its own n.",
                {"loss = nll.sum(1) / n": "loss = nll.sum() / (targets != -100).sum()"}),
        Mistake("the mean of the losses instead of their sum",
                "Its gradient is B times too small for every row. AdamW hides most of that, but "
                "not the part where eps counts: a prompt's δ depends on how many share the batch.",
                {"loss.sum()": "loss.mean()"}),
        Mistake("the gradient of W is collected",
                "backward() fills the .grad of all that could be trained. Ask for δ's alone.",
                {"backward(inputs=[delta])": "backward()"}),
        Mistake("W is frozen and stays so",
                "requires_grad_(False) keeps W from collecting a gradient, but whoever trains the "
                "model later finds a head that learns nothing. Ask backward for δ's gradient "
                "alone, or set requires_grad back.",
                {"n = pairs.sum": "lm_head.requires_grad_(False); n = pairs.sum"}),
        Mistake("the logits are not transposed",
                "F.cross_entropy takes the second dimension for the vocabulary. It wants (B, V, "
                "T-1) beside (B, T-1): transpose(1, 2).",
                {"logits.transpose(1, 2)": "logits"}),
        Mistake("the logits are reshaped, not transposed",
                "reshape and view read the numbers in the order in which they lie, so that "
                "positions and words are mixed up. (B, V, T-1) is made by transpose(1, 2).",
                {"logits.transpose(1, 2)": "logits.reshape(B, logits.shape[2], -1)"}),
        Mistake("the gradient is cleared before the step",
                "zero_grad() stands between backward() and step(): there is nothing left to step "
                "along, and δ stays 0. Clear it after the step, or before backward().",
                {"optimizer.step()": "optimizer.zero_grad(); optimizer.step()"}),
        Mistake("gradients add up",
                "Set .grad back after every step.",
                {"optimizer.zero_grad()": "pass"}),
        Mistake("not shifted",
                "Position t predicts token t + 1.",
                {"tokens[:, 1:].masked": "tokens[:, :-1].masked"}),
        Mistake("not shifted, over all T positions",
                "Position t was asked for token t, which it has just read. It predicts token t + "
                "1, and the last position has no successor.",
                {"pairs = mask[:, :-1] & mask[:, 1:]": "pairs = mask",
                 "tokens[:, 1:].masked": "tokens.masked", "hidden[:, :-1]": "hidden"}),
        Mistake("a prompt of one token gives NaN",
                "It has no pair: 0/0. Divide by at least 1.",
                {".clamp(min=1)": ""}),
        Mistake("a prompt of one token gives NaN, in δ too",
                "One cause for both: it has no pair, so its loss is 0/0, and the gradient of that "
                "is NaN, too. Divide by at least 1.",
                {".clamp(min=1)": "", ".masked_fill(~pairs, -100)": "",
                 "nll.sum(1) / n": "(nll * pairs).sum(1) / n"}),
        Mistake("the loss after the last step is missing",
                "steps losses instead of steps + 1: what the fit has reached is the last one.",
                {"losses.append": "if step < steps: losses.append"}),
        Mistake("δ keeps its graph",
                "What is returned still has requires_grad: whoever uses it builds a graph. "
                "detach() it.",
                {"return delta.detach()": "return delta"}),
        Mistake("the losses keep their graph",
                "Each loss still hangs on all that it was computed from. Note loss.detach().",
                {"loss.detach()": "loss"}),
        Mistake("the losses are a list",
                "They should be a float32 tensor (steps + 1, B): torch.stack(losses).",
                {"torch.stack(losses)": "losses"}),
        Mistake("δ alone is returned",
                "The result is δ, should be the pair (δ, losses).",
                {", torch.stack(losses)": ""}),
    ],
    hints=["Exercise 10 with a batch dimension: δ is (B, 1, d), and lm_head(δ) is (B, 1, V), "
           "which adds to (B, T-1, V).",
           "F.cross_entropy wants (B, V, T-1) and (B, T-1): transpose. reduction='none' keeps "
           "every pair, and the target -100 makes a pair 0.",
           "loss = nll.sum(1) / n is (B,). Step on loss.sum(), note loss."],
    answer="It would cancel if eps were 0. The step is lr m / (sqrt(v) + eps): with a gradient of "
           "g / B the quotient is g / (|g| + B eps). Where |g| is near eps = 1e-5, the mean gives "
           "a shorter step. So a prompt's δ would depend on its company: by little, but it should "
           "not at all.")


# ---- 14. δ is a bias on the vocabulary

def vocabulary_bias(z, W, delta, u):
    """δ is a bias on the vocabulary: what it promotes, and why the loss has one valley.

    W(h + δ) = z + b with b = W δ: all that δ does is to add one number to each word's logit, the
    same at every position. It is tempting to read b as "what δ promotes". But softmax ignores a
    constant: add 5 to all logits, and no probability changes. What acts is how far the log of each
    probability moves, and that depends on the position:

        change_tv = log softmax(z_t + b)_v - log softmax(z_t)_v
                  = b_v - log Σ_w softmax(z_t)_w e^(b_w)

    The second question is how the loss of exercise 11 is curved. Its gradient is Wᵀ(p - y); walking
    a little way along a direction u changes the logits by r = W u, and each p_t by p_t ⊙ (r - <p_t,
    r>). So the Hessian matrix H, times u, is

        H u = Wᵀ ( 1/n Σ_t p_t ⊙ (r - <p_t, r>) )        p_t = softmax(z_t + b),  r = W u

    and <u, H u> = 1/n Σ_t Σ_v p_tv (r_v - <p_t, r>)²: a mean of variances, never negative. So the
    loss is convex in δ: there is one valley, and no step of SLOT can get stuck.

    z        (n, V)   logits without δ
    W        (V, d)
    delta    (d,)
    u        (d,)     a direction
    returns  change (n, V), and H u (d,)

    By hand: one position, z = (0, 0), W = (1, 0), δ = ln 3, u = 1. b = (ln 3, 0), p goes from (1/2,
    1/2) to (3/4, 1/4): change (ln 1.5, ln 0.5) = (0.4055, -0.6931). r = (1, 0), its mean 3/4, so r
    - 3/4 = (1/4, -3/4), times p: (3/16, -3/16); Wᵀ: 3/16 = 0.1875, the variance of a coin that
    shows heads with 3/4.

    >>> W = torch.tensor([[1.0], [0.0]])
    >>> vocabulary_bias(torch.zeros(1, 2), W, torch.tensor([3.0]).log(), torch.tensor([1.0]))
    (tensor([[ 0.4055, -0.6931]]), tensor([0.1875]))

    Allowed: softmax, log_softmax, matrix products. Not allowed: autograd. The d × d matrix H is not
    needed, and of a real model it has millions of entries.

    To think about: for which u ≠ 0 is <u, H u> = 0? What does such a u do to the answers?
    """
    before, after = z.log_softmax(-1), (z + W @ delta).log_softmax(-1)      # (n, V)
    change = after - before
    p = after.exp()                                             # (n, V)
    r = W @ u                                                   # (V,)
    centred = r - (p @ r)[:, None]                         # (n, V): without its mean under each p_t
    return change, W.T @ (p * centred).mean(0)


def vocabulary_bias_cases():
    return {
        "the example by hand": (torch.zeros(1, 2), torch.tensor([[1.0], [0.0]]),
                                torch.tensor([3.0]).log(), torch.tensor([1.0])),
        "a small δ": (2 * random(70, 4, 7), random(71, 7, 3), 0.1 * random(72, 3), random(73, 3)),
        "a large δ": (2 * random(74, 4, 7), random(71, 7, 3), 1.5 * random(75, 3), random(76, 3)),
    }


def vocabulary_bias_reward(vocabulary_bias):
    lm, tokenizer, prompt = embedded()
    hidden, W = prompt_states(lm, prompt)[0], lm.lm_head.weight
    delta = slot.optimize_delta(hidden, prompt, lm.lm_head, 5, 0.1)[0][0, 0]
    z, b = hidden[0] @ W.T, W @ delta
    change, _ = vocabulary_bias(z, W, delta, delta)
    before = z.softmax(-1)
    moved = before * change.exp() - before                      # (T, V)
    t = moved.abs().sum(-1).argmax().item()
    lines = [f"b = W δ after 5 steps at lr 0.1 has the mean {b.mean():+.3f}, so raw b misleads.",
             f"where δ acts most, after {tokenizer.decode(prompt[:t + 1])[-30:]!r}:"]
    for id in moved[t].abs().topk(6).indices.tolist():
        after = before[t, id] + moved[t, id]
        lines.append(f"  {tokenizer.decode([id])!r:<10} b {b[id]:+.3f}  change {change[t, id]:+.3f}"
                     f"  probability {before[t, id]:.3f} -> {after:.3f}")
    lines.append("curvature of the loss along six random directions, never below 0:")
    along = [u @ vocabulary_bias(z[:-1], W, delta, u)[1] for u in random(77, 6, W.shape[1])]
    return "\n".join([*lines, "  " + "  ".join(f"{value:.2f}" for value in along)])


def vocabulary_bias_trial(vocabulary_bias):
    def probabilities(lm, hidden, delta):
        """generate.py's mean probabilities before and after δ, from the student's change."""
        z, W = lm.lm_head(hidden[0, ::max(1, hidden.shape[1] // 32)]), lm.lm_head.weight
        change, _ = vocabulary_bias(z, W, delta[0, 0], delta[0, 0])
        p = z.softmax(-1)
        return p.mean(0), (p * change.exp()).mean(0)

    return answers_with((generate, "probabilities", probabilities), options=STEERED)


BIAS = Exercise(
    title="δ is a bias on the vocabulary", minutes=45, level="medium",
    solution=vocabulary_bias, cases=vocabulary_bias_cases, parts=("change", "H u"),
    returns="the pair (change, H u)",
    reward=vocabulary_bias_reward, trial=vocabulary_bias_trial,
    forbidden=AUTOGRAD,
    mistakes=[
        Mistake("b itself is taken for the change",
                "softmax ignores what is common to all of b. Compare probabilities before and "
                "after.",
                {"change = after - before": "change = (W @ delta).expand_as(z)"}),
        Mistake("b without its plain mean",
                "Words that never come would weigh as much as likely ones. The constant that "
                "softmax ignores is weighted by probability.",
                {"change = after - before": "b = W @ delta; change = (b - b.mean()).expand_as(z)"}),
        Mistake("only the first order",
                "b - <p, b> is the change for a very small δ; the exact one has the log of a mean "
                "of exponentials.",
                {"change = after - before":
                 "b = W @ delta; change = b - (before.exp() @ b)[:, None]"}),
        Mistake("probabilities instead of their logarithms",
                "The change of log p was asked for.",
                {"change = after - before": "change = after.exp() - before.exp()"}),
        Mistake("before minus after",
                "Promoted words have a positive change.",
                {"after - before": "before - after"}),
        Mistake("one position speaks for all",
                "Every position has its own softmax, so its own constant.",
                {"change = after - before": "change = (after - before)[-1:].expand_as(z)"}),
        Mistake("the curvature at δ = 0",
                "p_t is the softmax of z_t + b, the prediction at the δ that is given.",
                {"p = after.exp()": "p = before.exp()"}),
        Mistake("r is not centred",
                "p ⊙ r alone is the diagonal of the Hessian; softmax also has the part - p pᵀ, "
                "which takes away r's mean.",
                {"centred = r - (p @ r)[:, None]": "centred = r"}),
        Mistake("r is centred by its plain mean",
                "Its mean under p_t, <p_t, r>, is taken away.",
                {"(p @ r)[:, None]": "r.mean()"}),
        Mistake("one mean of r for all positions",
                "Each position has its own p_t, and with it its own mean of r.",
                {"(p @ r)[:, None]": "(p.mean(0) @ r)"}),
        Mistake("sum instead of mean",
                "The loss is a mean over the n positions, and so is its Hessian.",
                {"(p * centred).mean(0)": "(p * centred).sum(0)"}),
        Mistake("the number instead of the vector",
                "<u, H u> is one number; H u was asked for, (d,).",
                {"W.T @ (p * centred).mean(0)": "u @ W.T @ (p * centred).mean(0)"}),
    ],
    hints=["Two log_softmax and a difference are the change.",
           "p @ r is (n,): the mean of r at each position. With [:, None] it can be taken from r.",
           "(p * centred).mean(0) is (V,); W.T brings it to (d,)."],
    answer="When r = W u has variance 0 under every p_t. Softmax gives every word some "
           "probability, so all r_v must be equal: W u is a constant, which softmax ignores. Such "
           "a u changes no answer at all. The embedded model's W has none (it keeps its rank of "
           "128 when its mean row is taken off), so its valley has no flat floor.")


EXERCISES = [CLOSED_FORM, ONE_DELTA_EACH, BIAS]
