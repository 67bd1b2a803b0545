"""Lesson IV, first half: the loss on the prompt, the loop, its gradient by hand. See slot.py."""
import math

import torch
import torch.nn.functional as F

import generate
import slot
from exercises.check import Exercise, Mistake
from exercises.lesson1_decoder import random
from exercises.program import answers_with, bar, embedded, prompt_states


STEERED = "--problem 57 --slot-steps 5 --slot-lr 0.1".split()  # a problem whose answer SLOT changes
AUTOGRAD = "requires_grad", "requires_grad_", "backward", "autograd", "grad", "func"


def ids(seed, V, *shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def head(seed, V, d):
    """An output head with weights that could be trained, as in a fresh model."""
    lm_head = torch.nn.Linear(d, V, bias=False)
    lm_head.weight.data = random(seed, V, d)
    return lm_head


# ---- 9. the prompt loss

def prompt_loss_loops(logits, tokens, mask):
    """The same for one sample: logits[t][v], tokens[t], mask[t] are lists."""
    losses = []
    for t in range(len(tokens) - 1):
        if mask[t] and mask[t + 1]:
            total = sum(math.exp(z) for z in logits[t])
            losses.append(-math.log(math.exp(logits[t][tokens[t + 1]]) / total))
    return sum(losses) / len(losses) if losses else 0.0


def prompt_loss(logits, tokens, mask):
    """How badly a model predicts its own prompt: what SLOT makes smaller.

    A language model that has read tokens 0 .. t says, by softmax of its logits at position t, what
    it expects at position t + 1. The prompt itself says what really comes there. The loss is the
    mean, over all positions that have a successor, of -log of the probability of that successor.

        L = -1/n Σ_t log softmax(logits_t)[tokens_{t+1}]

    The last position predicts the answer, whose first token nobody knows yet: it has no part in
    the loss. Prompts of different length make a batch only with padding. `mask` says which tokens
    are real. A pair (t, t + 1) counts only if both are: a padded position has nothing to predict
    from, and a padded token is nothing to predict. Padding may stand on either side. n is the
    number of pairs that count, for each sample its own. A prompt of one token has none: loss 0.

    logits   (B, T, V) float32
    tokens   (B, T) int64; some token stands where there is padding, too
    mask     (B, T) bool, True = a real token
    returns  (B,) float32, one loss for each sample

    By hand: V = 3, T = 5, tokens (0, 1, 1, 2, 0). The probabilities at positions 0 .. 4 are the
    rows below. Position 0 must predict token 1: 0.5. Position 1 must predict token 1: 0.8. Position
    2 must predict token 2: 0.4. Position 3 must predict token 0: 0.5. Position 4 has no successor.
    -(ln 0.5 + ln 0.8 + ln 0.4 + ln 0.5) / 4 = (0.6931 + 0.2231 + 0.9163 + 0.6931) / 4 = 0.6314. If
    the first token were padding, three pairs would be left: (0.2231 + 0.9163 + 0.6931) / 3 =
    0.6109.

    >>> rows = [[0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]
    >>> logits, tokens = torch.tensor([rows]).log(), torch.tensor([[0, 1, 1, 2, 0]])
    >>> prompt_loss(logits, tokens, torch.tensor([[True, True, True, True, True]]))
    tensor([0.6314])
    >>> prompt_loss(logits, tokens, torch.tensor([[False, True, True, True, True]]))
    tensor([0.6109])

    Allowed: everything on tensors, F.cross_entropy too (it is -log softmax and a gather in one; it
    wants the logits as (B, V, T-1): transpose, do not reshape).
    Not allowed: nothing. Loops are not needed.

    To think about: a model that knows nothing gives every token the same probability. What is its
    loss, with V = 768? The embedded model has about 0.55 on prompts like those of its training and
    6.0 on phrasings that it has never seen. Between how many equally likely tokens would a model
    hesitate that has such a loss?
    """
    log_p = logits[:, :-1].log_softmax(-1)                # (B, T-1, V): every position but the last
    targets = tokens[:, 1:]                                     # (B, T-1): its successor
    nll = -log_p.gather(-1, targets[:, :, None])[:, :, 0]       # (B, T-1)
    real = mask[:, :-1] & mask[:, 1:]
    return (nll * real).sum(1) / real.sum(1).clamp(min=1)


def prompt_loss_cases():
    by_hand = torch.tensor([[[0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.5, 0.3, 0.2],
                             [0.1, 0.1, 0.8]]]).log()
    on = torch.ones(2, 6, dtype=torch.bool)
    left, right = on.clone(), on.clone()
    left[0, :2], right[1, 3:] = False, False
    short = torch.tensor([[False, False, False, False, False, True], [True] * 6])
    return {
        "the example by hand": (by_hand, torch.tensor([[0, 1, 1, 2, 0]]), on[:1, :5]),
        "no padding": (2 * random(20, 2, 6, 7), ids(21, 7, 2, 6), on),
        "padding on the left": (2 * random(22, 2, 6, 7), ids(23, 7, 2, 6), left),
        "padding on the right": (2 * random(24, 2, 6, 7), ids(25, 7, 2, 6), right),
        "a prompt of one token": (2 * random(26, 2, 6, 7), ids(27, 7, 2, 6), short),
    }


def prompt_loss_reward(prompt_loss):
    lm, tokenizer, prompt = embedded()
    logits = lm.lm_head(lm.model(torch.tensor([prompt])))
    lines = ["how much each token of the default prompt surprises the model, in nats:"]
    for t in range(len(prompt) - 1):                           # a prompt of two tokens has one pair
        two = torch.tensor([prompt[t:t + 2]])
        loss = prompt_loss(logits[:, t:t + 2], two, torch.ones(1, 2, dtype=torch.bool)).item()
        lines.append(f"{tokenizer.decode([prompt[t + 1]])!r:>14} {loss:6.2f} {bar(loss, 8)}")
    tokens = torch.tensor([prompt])
    whole = prompt_loss(logits, tokens, torch.ones_like(tokens, dtype=torch.bool))
    return "\n".join([*lines, f"mean: {whole.item():.4f}, the first loss that generate.py prints"])


def prompt_loss_trial(prompt_loss):
    def loss(logits, targets):                               # as slot.py calls it: (T-1, V), (T-1,)
        logits = torch.cat((logits, logits[-1:]))[None]     # a last position, which must not matter
        tokens = torch.cat((targets[:1], targets))[None]
        return prompt_loss(logits, tokens, torch.ones_like(tokens, dtype=torch.bool))[0]

    def optimize_delta(hidden, tokens, lm_head, steps, lr):
        return slot.optimize_delta(hidden, tokens, lm_head, steps, lr, loss)

    return answers_with((generate, "optimize_delta", optimize_delta), options=STEERED)


PROMPT_LOSS = Exercise(
    title="The prompt loss", minutes=30, level="medium",
    solution=prompt_loss, loops=prompt_loss_loops, cases=prompt_loss_cases,
    reward=prompt_loss_reward, trial=prompt_loss_trial,
    mistakes=[
        Mistake("not shifted",
                "Position t was asked for token t, which it has just read. It must predict token "
                "t + 1.",
                {"tokens[:, 1:]": "tokens[:, :-1]"}),
        Mistake("not shifted, over all T positions",
                "Position t was asked for token t, which it has just read, and the last position "
                "took part. It must predict token t + 1, and the last has no successor.",
                {"logits[:, :-1]": "logits", "tokens[:, 1:]": "tokens",
                 "real = mask[:, :-1] & mask[:, 1:]": "real = mask"}),
        Mistake("not shifted, over all T positions, padding too",
                "Position t was asked for token t, which it has just read. It must predict token "
                "t + 1; and the mask says which positions and tokens are real.",
                {"logits[:, :-1]": "logits", "tokens[:, 1:]": "tokens",
                 "real = mask[:, :-1] & mask[:, 1:]": "real = torch.ones_like(mask)"}),
        Mistake("shifted the wrong way",
                "Position t was asked for token t - 1, the past. logits without the last position "
                "belong to tokens without the first.",
                {"logits[:, :-1]": "logits[:, 1:]", "tokens[:, 1:]": "tokens[:, :-1]"}),
        Mistake("padding is counted",
                "The mask was not used: whatever stands in the padding was to be predicted too.",
                {"real = mask[:, :-1] & mask[:, 1:]": "real = torch.ones_like(mask[:, 1:])"}),
        Mistake("the first pair of a left-padded row is counted",
                "The mask of the successor alone was asked. The first real token would be "
                "predicted from padding: nothing real has been read there.",
                {"real = mask[:, :-1] & mask[:, 1:]": "real = mask[:, 1:]"}),
        Mistake("the padding behind the last token is to be predicted",
                "The mask of position t alone was asked. Its successor must be real, too.",
                {"real = mask[:, :-1] & mask[:, 1:]": "real = mask[:, :-1]"}),
        Mistake("divided by T - 1",
                "Padding is not summed, but it is counted. n is the number of pairs that count in "
                "this sample.",
                {"real.sum(1).clamp(min=1)": "real.shape[1]"}),
        Mistake("divided by the number of tokens",
                "n tokens make n - 1 pairs.",
                {"real.sum(1).clamp(min=1)": "mask.sum(1)"}),
        Mistake("shifted by two",
                "Position t was asked for token t + 2: the slices were cut once too often.",
                {"logits[:, :-1]": "logits[:, :-2]", "tokens[:, 1:]": "tokens[:, 2:]",
                 "mask[:, :-1] & mask[:, 1:]": "mask[:, :-2] & mask[:, 2:]"}),
        Mistake("softmax twice",
                "F.cross_entropy and log_softmax take logits. Of probabilities they make nearly "
                "equal ones.",
                {"logits[:, :-1].log_softmax(-1)": "logits[:, :-1].softmax(-1).log_softmax(-1)"}),
        Mistake("sum instead of mean",
                "A long prompt would count more than a short one, and lr would mean something "
                "else.",
                {" / real.sum(1).clamp(min=1)": ""}),
        Mistake("one mean for the whole batch",
                "This is what F.cross_entropy gives by itself. Each sample has a loss of its own: "
                "a sample's δ must not depend on who shares the batch.",
                {"(nll * real).sum(1) / real.sum(1).clamp(min=1)":
                 "(nll * real).sum() / real.sum()"}),
        Mistake("the logits are not transposed",
                "F.cross_entropy takes the second dimension for the vocabulary. It wants (B, V, "
                "T-1) beside (B, T-1): transpose(1, 2).",
                {".log_softmax(-1)": "", "-log_p.gather(-1, targets[:, :, None])[:, :, 0]":
                 "F.cross_entropy(log_p, targets, reduction='none')"}),
        Mistake("the logits are reshaped, not transposed",
                "reshape and view read the numbers in the order in which they lie, so that "
                "positions and words are mixed up. (B, V, T-1) is made by transpose(1, 2).",
                {".log_softmax(-1)": "", "-log_p.gather(-1, targets[:, :, None])[:, :, 0]":
                 "F.cross_entropy(log_p.reshape(len(log_p), log_p.shape[2], -1), targets, "
                 "reduction='none')"}),
        Mistake("no minus sign",
                "That is the log-likelihood, which is to grow. The loss is its negative.",
                {"nll = -log_p": "nll = log_p"}),
        Mistake("probabilities instead of their logarithms",
                "1 - p or -p is no log loss: the log of a product over all tokens is a sum of "
                "logs.",
                {".log_softmax(-1)": ".softmax(-1)"}),
        Mistake("a prompt of one token gives NaN",
                "It has no pair, so 0/0. Its loss is to be 0.",
                {".clamp(min=1)": ""}),
    ],
    hints=["Two slices that belong together: logits[:, :-1] and tokens[:, 1:], both T - 1 long.",
           "F.cross_entropy(..., reduction='none') or log_softmax and gather give (B, T-1) "
           "numbers. F.cross_entropy wants (B, V, T-1): transpose, do not reshape.",
           "A pair counts where mask[:, :-1] & mask[:, 1:]. Sum over dimension 1, divide by its "
           "sum, at least 1."],
    answer="ln 768 = 6.64. exp(0.55) = 1.7: on average it hesitates between two tokens, mostly "
           "where a name or a number comes that nobody can guess. exp(6.0) = 403: on unseen "
           "phrasings it is nearly as lost as one that knows nothing, and on single words worse: "
           "it is sure of the wrong ones.")


# ---- 10. the loop

def optimize_delta(hidden, tokens, lm_head, steps, lr):
    """The loop: fit δ to one prompt. This is SLOT.

    The decoder has run once, and its hidden states h are constants now. One vector δ is added to
    all of them, before the output head W makes logits, and a few steps of AdamW move δ so that the
    prompt is predicted better. Nothing else is trained.

        logits = W(h + δ)        L(δ) = mean cross entropy of logits_t against tokens_{t+1}
        δ = 0, then `steps` times:   δ <- AdamW(δ, dL/dδ)

    W is linear: W(h + δ) = W h + W δ. So W h, the large product, is computed once, before the loop.
    AdamW as the authors set it: betas (0.9, 0.999), eps 1e-5, weight_decay 1e-8. Return, as a
    second result, the loss before every step and, last, the one after the final step: steps + 1
    numbers. What the loop must leave alone: the weights of lm_head could be trained here, yet they
    must not collect a gradient (their .grad stays None, and requires_grad stays as it was); and
    hidden may come with the graph of the decoder behind it, which must not be walked through.

    hidden   (1, T, d) float32, the decoder's output for these tokens
    tokens   a list of T ids, T at least 2
    lm_head  nn.Linear(d, V) without bias: lm_head(x) is W x
    steps    0 or more;  lr  above 0
    returns  the pair (δ, losses): δ (1, 1, d), losses (steps + 1,), both float32 tensors without a
             graph (not a list)

    By hand: d = 1, V = 2, T = 2, tokens (0, 0), one step, lr = 0.1. W has the rows (1) and (-1); h
    is 0 at both positions. So the logits are (δ, -δ), and the loss of the one pair is -ln of token
    0's probability, ln(1 + exp(-2δ)): at δ = 0 ln 2 = 0.6931. Its gradient is -2 / (1 + exp(2δ)),
    at δ = 0 it is -1. AdamW's first step has length lr against the gradient's sign: δ = 0.1. Now
    the loss is ln(1 + exp(-0.2)) = 0.5981.

    >>> lm_head = torch.nn.Linear(1, 2, bias=False)
    >>> lm_head.weight.data = torch.tensor([[1.0], [-1.0]])
    >>> optimize_delta(torch.zeros(1, 2, 1), [0, 0], lm_head, 1, 0.1)
    (tensor([[[0.1000]]]), tensor([0.6931, 0.5981]))

    Allowed: torch.optim.AdamW, F.cross_entropy, autograd. Not allowed: nothing; keep it short.

    To think about: after the first step every entry of δ is close to +lr or -lr, whatever the
    gradient. Why? How long, then, can δ be after 5 steps, and what would change if the loss were
    multiplied by 100?
    """
    targets = torch.tensor(tokens[1:])
    with torch.no_grad():
        Wh = lm_head(hidden[:, :-1])                            # (1, T-1, V), never changes
    delta = torch.zeros(1, 1, hidden.shape[-1], requires_grad=True)
    optimizer = torch.optim.AdamW([delta], lr=lr, eps=1e-5, weight_decay=1e-8)
    losses = []
    for step in range(steps + 1):
        logits = Wh + lm_head(delta)                            # = W(h + δ)
        loss = F.cross_entropy(logits[0], targets)
        losses.append(loss.item())
        if step < steps:
            loss.backward(inputs=[delta])                       # of δ alone: W collects nothing
            optimizer.step()
            optimizer.zero_grad()
    return delta.detach(), torch.tensor(losses)


FIT_PARTS = "δ", "the losses", "δ's graph", "the losses' graph", "W's .grad", "W's requires_grad"


def fit_and_traces(result, lm_head):
    """The pair (δ, losses) with what a fit has left behind: graphs, and changes of lm_head."""
    if not isinstance(result, tuple) or len(result) != 2:
        return result
    W = lm_head.weight
    return (*result, *map(graph_of, result), "none" if W.grad is None else "a gradient",
            W.requires_grad)


def graph_of(tensors):
    for tensor in tensors if isinstance(tensors, list) else [tensors]:
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            return "kept"
    return "none"


def optimize_delta_observe(optimize_delta, hidden, tokens, lm_head, steps, lr):
    if hidden.requires_grad:
        hidden.retain_grad()                                    # if a gradient comes this way
    result = optimize_delta(hidden, tokens, lm_head, steps, lr)
    found = fit_and_traces(result, lm_head)
    walked = "none" if hidden.grad is None else "a gradient"
    return found if found is result else (*found, walked)       # result is no pair


def optimize_delta_cases():
    by_hand = torch.nn.Linear(1, 2, bias=False)
    by_hand.weight.data = torch.tensor([[1.0], [-1.0]])
    decoder = torch.nn.Linear(6, 6)                           # stands for all that is behind hidden
    decoder.weight.data, decoder.bias.data = random(30, 6, 6), random(31, 6)
    prompt = ids(32, 9, 8).tolist()
    return {
        "the example by hand": (torch.zeros(1, 2, 1), [0, 0], by_hand, 1, 0.1),
        "four steps": (random(33, 1, 8, 6), prompt, head(34, 9, 6), 4, 0.1),
        "no step": (random(33, 1, 8, 6), prompt, head(34, 9, 6), 0, 0.1),
        "hidden with a graph behind it": (torch.tanh(decoder(random(35, 1, 8, 6))), prompt,
                                          head(36, 9, 6), 3, 0.3),
    }


def optimize_delta_reward(optimize_delta):
    lm, tokenizer, prompt = embedded()
    hidden, _ = prompt_states(lm, prompt)
    lines = ["the loss on the default prompt, step by step:"]
    for lr in (0.01, 0.1):
        delta, losses = optimize_delta(hidden, prompt, lm.lm_head, 8, lr)
        for step, loss in enumerate(losses.tolist()):
            lines.append(f"lr {lr:<5} step {step}  {loss:.4f} {bar(loss, 0.8)}")
    logits = lm.lm_head(hidden[0, -1])
    before = logits.log_softmax(-1)
    after = (logits + lm.lm_head(delta[0, 0])).log_softmax(-1)
    gained = (after - before).topk(6).indices.tolist()
    return "\n".join([*lines, f"{delta.numel()} numbers were trained. They favour "
                      + ", ".join(repr(tokenizer.decode([id])) for id in gained)])


def optimize_delta_trial(optimize_delta):
    def by_student(hidden, tokens, lm_head, steps, lr, loss=None):
        return optimize_delta(hidden, tokens, lm_head, steps, lr)

    return answers_with((generate, "optimize_delta", by_student), options=STEERED)


ADAMW = "torch.optim.AdamW([delta], lr=lr, eps=1e-5, weight_decay=1e-8)"
LOOP = Exercise(
    title="The loop", minutes=45, level="medium",
    solution=optimize_delta, cases=optimize_delta_cases, observe=optimize_delta_observe,
    parts=(*FIT_PARTS, "hidden's .grad"), returns="the pair (δ, losses)",
    reward=optimize_delta_reward, trial=optimize_delta_trial,
    mistakes=[
        Mistake("the gradient of W is collected",
                "loss.backward() fills the .grad of all that could be trained, so also of W: V x "
                "d numbers for nothing, at every step. Ask for δ's alone.",
                {"backward(inputs=[delta])": "backward()"}),
        Mistake("the decoder's graph is walked through",
                "hidden still carries the graph of the decoder. The first backward() went all the "
                "way down and freed it, the second finds nothing. h is a constant: cut it off.",
                {"with torch.no_grad():": "if True:", "backward(inputs=[delta])": "backward()"}),
        Mistake("the decoder's graph is walked through, though not W's",
                "W is cut off, hidden is not: it still carries the graph of the decoder. The first "
                "backward() freed that graph, the second finds nothing. h is a constant, too.",
                {"with torch.no_grad():": "if True:", "backward(inputs=[delta])": "backward()",
                 "lm_head(hidden[:, :-1])": "F.linear(hidden[:, :-1], lm_head.weight.detach())",
                 "lm_head(delta)": "F.linear(delta, lm_head.weight.detach())"}),
        Mistake("the decoder's graph is walked through in every step, since it is kept",
                "retain_graph=True silences the error and hides its cause: hidden still carries "
                "the graph of the decoder, and every backward() goes all the way down. h is a "
                "constant: cut it off.",
                {"with torch.no_grad():": "if True:",
                 "backward(inputs=[delta])": "backward(retain_graph=True)",
                 "lm_head(hidden[:, :-1])": "F.linear(hidden[:, :-1], lm_head.weight.detach())",
                 "lm_head(delta)": "F.linear(delta, lm_head.weight.detach())"}),
        Mistake("the graphs of the decoder and of W are walked through",
                "hidden still carries the graph of the decoder: the first backward() freed it, the "
                "second finds nothing. And W collects a gradient on the way. h is a constant: cut "
                "it off; and ask for δ's gradient alone.",
                {"with torch.no_grad():": "if True:", "backward(inputs=[delta])": "backward()",
                 "logits = Wh + lm_head(delta)": "logits = lm_head(hidden[:, :-1] + delta)"}),
        Mistake("W is frozen and stays so",
                "requires_grad_(False) keeps W from collecting a gradient, but whoever trains the "
                "model later finds a head that learns nothing. Ask backward for δ's gradient "
                "alone, or set requires_grad back.",
                {"targets = torch": "lm_head.requires_grad_(False); targets = torch"}),
        Mistake("the gradient is cleared before the step",
                "zero_grad() stands between backward() and step(): there is nothing left to step "
                "along, and δ stays 0. Clear it after the step, or before backward().",
                {"optimizer.step()": "optimizer.zero_grad(); optimizer.step()"}),
        Mistake("gradients add up",
                "backward() adds to .grad. Set it back after every step.",
                {"optimizer.zero_grad()": "pass"}),
        Mistake("uphill",
                "The loss grew: the sign of the loss or of the step is wrong.",
                {ADAMW: ADAMW[:-1] + ", maximize=True)"}),
        Mistake("δ is reset in every step",
                "Each step began at 0 again, so that many steps are no more than one.",
                {"logits = Wh + lm_head(delta)":
                 "delta.data *= step == steps; logits = Wh + lm_head(delta)"}),
        Mistake("a new optimizer in every step",
                "AdamW remembers the gradients of earlier steps. Made anew in the loop, it "
                "forgets.",
                {"optimizer.step()": ADAMW + ".step()"}),
        Mistake("plain gradient descent",
                "SGD moves by lr times the gradient, AdamW by about lr in every dimension.",
                {ADAMW: "torch.optim.SGD([delta], lr=lr)"}),
        Mistake("eps of AdamW is torch's own",
                "torch's default is 1e-8; the authors set 1e-5, which small gradients feel.",
                {"eps=1e-5": "eps=1e-8"}),
        Mistake("weight decay of AdamW is torch's own",
                "torch's default is 0.01; the authors set 1e-8, which is none.",
                {"weight_decay=1e-8": "weight_decay=0.01"}),
        Mistake("not shifted",
                "Position t was asked for token t. Its target is token t + 1.",
                {"tokens[1:]": "tokens[:-1]"}),
        Mistake("not shifted, over all T positions",
                "Position t was asked for token t, which it has just read. Its target is token t "
                "+ 1, and the last position has none.",
                {"hidden[:, :-1]": "hidden", "tokens[1:]": "tokens"}),
        Mistake("shifted the wrong way",
                "Position t was asked for token t - 1. hidden without its last position belongs "
                "to tokens without the first.",
                {"tokens[1:]": "tokens[:-1]", "hidden[:, :-1]": "hidden[:, 1:]"}),
        Mistake("sum instead of mean",
                "The losses are n times too large. AdamW hides in δ what a factor does, but not "
                "in the losses.",
                {"F.cross_entropy(logits[0], targets)":
                 "F.cross_entropy(logits[0], targets, reduction='sum')"}),
        Mistake("δ is added at the last position only",
                "One δ for all positions: each of them takes part in the loss.",
                {"logits = Wh + lm_head(delta)":
                 "logits = torch.cat((Wh[:, :-1], Wh[:, -1:] + lm_head(delta)), 1)"}),
        Mistake("a δ for each position",
                "Every position got a vector of its own. SLOT learns one, so that it can be used "
                "for tokens that come later.",
                {"torch.zeros(1, 1,": "torch.zeros(1, hidden.shape[1] - 1,"}),
        Mistake("the loss after the last step is missing",
                "steps losses instead of steps + 1: what the fit has reached is the last one.",
                {"losses.append": "if step < steps: losses.append"}),
        Mistake("the loss before the first step is missing",
                "The first of the steps + 1 losses is the plain model's.",
                {"losses.append": "if step: losses.append"}),
        Mistake("one step too many",
                "The loss after the last step is only looked at: δ moves `steps` times.",
                {"if step < steps:": "if True:"}),
        Mistake("δ keeps its graph",
                "What is returned still has requires_grad: whoever uses it builds a graph. "
                "detach() it.",
                {"return delta.detach()": "return delta"}),
        Mistake("the losses keep their graph",
                "Each loss still hangs on all that it was computed from. Note loss.item() or "
                "loss.detach().",
                {"loss.item()": "loss", "torch.tensor(losses)": "torch.stack(losses)"}),
        Mistake("the losses are a list",
                "They should be a float32 tensor (steps + 1,): torch.tensor(losses), or "
                "torch.stack.",
                {"torch.tensor(losses)": "losses"}),
        Mistake("δ alone is returned",
                "The result is δ, should be the pair (δ, losses).",
                {", torch.tensor(losses)": ""}),
    ],
    hints=["Before the loop: targets, W h without gradient, δ = zeros with requires_grad, the "
           "optimizer.",
           "In the loop: logits = Wh + lm_head(delta); cross entropy; note the loss; backward; "
           "step; zero_grad. The loss after the last step needs one more look, without a step.",
           "loss.backward(inputs=[delta]), or delta.grad, = torch.autograd.grad(loss, delta), "
           "leaves W alone. torch.no_grad() around W h leaves the decoder alone."],
    answer="AdamW divides the mean gradient by the root of the mean square gradient. After one "
           "step both come from the same g: g / |g| = ±1. So each entry moves about lr a step: "
           "after 5 steps |δ| is at most about 5 lr sqrt(d). A factor 100 in the loss cancels, "
           "but for eps: entries whose gradient is around 1e-5 move less, and with the factor "
           "they would not.")


# ---- 11. the gradient by hand

def prompt_gradient(hidden, targets, W, delta):
    """The gradient of the prompt loss, by hand.

    autograd is convenient, but it hides how simple SLOT is. The loss of one position is the log of
    a sum of exponentials minus one logit, and its derivative by the logits is what the model
    expects minus what came: softmax(z) - onehot(target). δ is added at every position, and goes
    through W. So the gradient is

        z_t = W (h_t + δ)
        p = 1/n Σ_t softmax(z_t)        the mean prediction               (V,)
        y = 1/n Σ_t onehot(target_t)    how often each token really came  (V,)
        g = Wᵀ (p - y)                                                    (d,)

    Read it aloud: δ moves until the model predicts, on average, each word as often as the prompt
    has it. Of what came, y keeps the counts alone: the same words in another order have the same y.
    Context enters only through p, the predictions: a word that was foreseen pulls less.

    hidden   (n, d)   the positions that have a successor
    targets  (n,)     int64, the successors; a token may come several times
    W        (V, d)
    delta    (d,)
    returns  (d,)

    By hand: V = 3, d = 2, W = ((1, 0), (0, 1), (0, 0)), h = 0, δ = 0, targets (0, 0, 1).
    p = (1/3, 1/3, 1/3), y = (2/3, 1/3, 0), p - y = (-1/3, 0, 1/3), g = (-1/3, 0).

    >>> W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> prompt_gradient(torch.zeros(3, 2), torch.tensor([0, 0, 1]), W, torch.zeros(2))
    tensor([-0.3333,  0.0000])

    Allowed: softmax, matrix products, torch.bincount, index_add_, F.one_hot.
    Not allowed: autograd in any form (requires_grad, backward, torch.autograd, torch.func).

    To think about: let all h_t be equal. How small can the loss become, and at which δ does the
    gradient vanish?
    """
    n, V = len(targets), len(W)
    z = hidden @ W.T + W @ delta                                # (n, V)
    p = z.softmax(-1).mean(0)                                   # (V,)
    y = torch.bincount(targets, minlength=V) / n                # (V,)
    return W.T @ (p - y)


def prompt_gradient_cases():
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    x = torch.tensor([4, 4, 1, 7, 4, 0])
    return {
        "the example by hand": (torch.zeros(3, 2), torch.tensor([0, 0, 1]), W, torch.zeros(2)),
        "δ = 0": (random(40, 6, 5), x, random(41, 9, 5), torch.zeros(5)),
        "δ not 0": (random(40, 6, 5), x, random(41, 9, 5), random(42, 5)),
    }


def prompt_gradient_reward(prompt_gradient):
    lm, tokenizer, prompt = embedded()
    hidden, W = prompt_states(lm, prompt)[0][0, :-1], lm.lm_head.weight
    targets, delta = torch.tensor(prompt[1:]), 0.1 * random(43, W.shape[1])
    g = prompt_gradient(hidden, targets, W, delta)

    def loss(delta):
        return F.cross_entropy((hidden + delta) @ W.T, targets)

    by_autograd = torch.autograd.grad(loss(delta.requires_grad_()), delta)[0]
    lines = ["dimension   yours       autograd    (L(δ + 0.01) - L(δ - 0.01)) / 0.02"]
    for i in range(0, len(g), 24):
        shift = 0.01 * F.one_hot(torch.tensor(i), len(g))
        finite = (loss(delta + shift) - loss(delta - shift)) / 0.02
        lines.append(f"{i:9}   {g[i]:+.6f}   {by_autograd[i]:+.6f}   {finite:+.6f}")
    lines.append("the words whose logits a step against g raises and lowers most:")
    for sign in (1, -1):
        top = (sign * -(W @ g)).topk(5)
        lines.append("  " + "  ".join(f"{tokenizer.decode([id])!r} {sign * v:+.3f}"
                                      for v, id in zip(top.values.tolist(), top.indices.tolist())))
    return "\n".join(lines)


def prompt_gradient_trial(prompt_gradient):
    def by_hand(hidden, tokens, lm_head, steps, lr, loss=None):
        """slot.py's loop, with the student's gradient instead of backward()."""
        h, x, W = hidden[0, :-1], torch.tensor(tokens[1:]), lm_head.weight
        delta, losses = torch.zeros(W.shape[1]), []
        optimizer = torch.optim.AdamW([delta], lr=lr, eps=1e-5, weight_decay=1e-8)
        for step in range(steps + 1):
            losses.append(F.cross_entropy((h + delta) @ W.T, x))
            if step < steps:
                delta.grad = prompt_gradient(h, x, W, delta)
                optimizer.step()
        return delta[None, None], torch.stack(losses)

    return answers_with((generate, "optimize_delta", by_hand), options=STEERED)


GRADIENT = Exercise(
    title="The gradient by hand", minutes=40, level="medium",
    solution=prompt_gradient, cases=prompt_gradient_cases,
    reward=prompt_gradient_reward, trial=prompt_gradient_trial,
    forbidden=AUTOGRAD,
    mistakes=[
        Mistake("the sign",
                "y - p is the direction in which to step; the gradient points the other way.",
                {"(p - y)": "(y - p)"}),
        Mistake("what came is forgotten",
                "Wᵀp pulls down what is expected, and nothing pulls up what came.",
                {"(p - y)": "p"}),
        Mistake("a token that comes twice is counted once",
                "y[targets] = 1/n writes the same place again. bincount and index_add_ add.",
                {"torch.bincount(targets, minlength=V) / n":
                 "torch.zeros(V).index_fill(0, targets, 1 / n)"}),
        Mistake("sum instead of mean",
                "The loss is a mean over the n positions, and so is its gradient.",
                {"softmax(-1).mean(0)":
                 "softmax(-1).sum(0)",
                 "minlength=V) / n":
                 "minlength=V) * 1.0"}),
        Mistake("softmax of the mean",
                "The logits were averaged first. The mean of the predictions is not the "
                "prediction of the mean.",
                {"z.softmax(-1).mean(0)": "z.mean(0).softmax(-1)"}),
        Mistake("softmax over the positions",
                "Each position has a distribution over the vocabulary: the last dimension.",
                {"softmax(-1)": "softmax(0)"}),
        Mistake("δ is left out",
                "The gradient at δ = 0. It changes as δ moves: the logits are W(h + δ).",
                {" + W @ delta": ""}),
        Mistake("δ is added twice",
                "W(h + δ) was made first, and W δ added to it once more.",
                {"+ W @ delta": "+ 2 * (W @ delta)"}),
        Mistake("softmax is differentiated by itself",
                "p (1 - p) is the derivative of a probability by its own logit. The log in the "
                "loss cancels it: what is left is p - y.",
                {"return W.T @ (p - y)": "return W.T @ ((p - y) * p * (1 - p))"}),
    ],
    hints=["Three lines: the logits of all positions (n, V); their softmax, averaged over "
           "positions; counts.",
           "W δ is one vector (V,) that is added to every row of h Wᵀ.",
           "torch.bincount(targets, minlength=V) / n is y. Wᵀ(p - y) is W.T @ (p - y)."],
    answer="With equal h_t the model makes the same prediction everywhere, so the best it can do "
           "is to predict the prompt's word frequencies: p = y, and the loss is their entropy. If "
           "W has as many independent directions as words, δ comes as near as one likes, but at "
           "no finite δ does the gradient vanish while a word of the vocabulary is missing from "
           "the prompt: its p is never 0. With fewer directions, d < V - 1, it vanishes where "
           "Wᵀp = Wᵀy, if anywhere.")


EXERCISES = [PROMPT_LOSS, LOOP, GRADIENT]
