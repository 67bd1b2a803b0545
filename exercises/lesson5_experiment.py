"""Lesson V. The experiment: does SLOT help, how would one know, and when can it? See study/."""
import functools
import math
import random as chance
import re

import torch
import torch.nn.functional as F

import slot
from exercises.check import Exercise, Mistake
from exercises.lesson1_decoder import random
from exercises.program import bar, embedded, problem_ids, prompt_states
from study.measure import Text, unigram
from study.scoring import strict
from study.stats import sign_test
from tiny.problems import heldout


# ---- 15. score, fixed and broken, the sign test

def compare(plain, slot, golds):
    """Did SLOT help? Score the answers, count what changed, and ask whether a coin could do it.

    An answer marks its result as "#### number", perhaps more than once. The *last* mark with a
    number counts, whatever follows it: the answer is right if that number has the value of the
    known solution. Numbers may have a sign, thousands separators and decimals:
    -1,250.50 is -1250.5. A text without such a mark is wrong. (The authors' script takes the last
    run of digits instead: it reads 1,875 as 875 and -5 as 5.)

    Both methods answer the same problems, so look at pairs. Problems that both solve, or neither
    does, say nothing about the difference. What counts is how many SLOT fixed (wrong -> right) and
    how many it broke (right -> wrong). If SLOT did nothing but stir, each change would be as likely
    one way as the other: a fair coin. The exact sign test asks how likely a coin is to give so
    uneven a split or a more uneven one, to either side:

        n = fixed + broken,  k = min(fixed, broken)
        p = min(1, 2 Σ_{i=0..k} C(n, i) / 2^n)                  p = 1 if n = 0

    How large must an experiment be? With 30 problems, the size of AIME, an accuracy of 0.5 has a
    standard error of sqrt(0.5 · 0.5 / 30) = 9 points: +10 points is three problems, and luck.

    plain, slot, golds   lists of strings of the same length: two answers and the solution's number
    returns              right_plain, right_slot, fixed, broken (integers), and p

    By hand: fixed 5, broken 1. C(6, 0) + C(6, 1) = 7; p = 2 · 7 / 64 = 0.21875. Five to one, and
    still a coin does as well in one of five experiments.

    >>> plain, slot = ["#### 1"] * 5 + ["#### 2"], ["#### 2"] * 5 + ["#### 1"]
    >>> compare(plain, slot, ["2"] * 6)
    (1, 5, 5, 1, 0.21875)

    Allowed: re, math.comb. Not allowed: scipy, statsmodels.

    To think about: SLOT fixes 3 and breaks 0 of 30 problems: 50 % become 60 %. What is p? And how
    many must it fix without breaking any, for p < 0.05?
    """
    def right(text, gold):
        marks = re.findall(r"####\s*(-?[\d,]*\.?\d+)", text)
        return bool(marks) and float(marks[-1].replace(",", "")) == float(gold.replace(",", ""))

    pairs = [(right(a, gold), right(b, gold)) for a, b, gold in zip(plain, slot, golds)]
    right_plain, right_slot = sum(a for a, _ in pairs), sum(b for _, b in pairs)
    fixed = sum(b and not a for a, b in pairs)
    broken = sum(a and not b for a, b in pairs)
    n, k = fixed + broken, min(fixed, broken)
    p = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n)
    return right_plain, right_slot, fixed, broken, p


def texts(answers, gold):
    """Answers as 1 and 0 -> texts that are right and wrong for the number `gold`."""
    return [f"so it is\n#### {gold if answer else gold + 1}" for answer in answers]


def compare_cases():
    rows = [("12 + 3 = 15\n#### 15", "I say 15", "15"), ("#### 7\n#### 8", "#### 8\nor 9", "8"),
            ("#### 875", "#### 1,875", "1875"), ("#### -5", "#### 5", "5"),
            ("#### 12.50", "#### 12", "12.5"), ("#### 7", "#### 8\n#### 7", "8"),
            ("none", "#### -40", "-40"), ("#### 3", "#### 3.0", "3"),
            ("#### 100", "#### 10", "10")]
    written = {f"{b!r} for {gold}": ([a], [b], [gold]) for a, b, gold in rows}
    many = [0] * 14 + [1] * 20
    return {
        "the example by hand": (texts([0] * 5 + [1], 2), texts([1] * 5 + [0], 2), ["2"] * 6),
        "9 fixed, 2 broken": (texts(many, 6), texts([1] * 9 + [0] * 7 + [1] * 18, 6), ["6"] * 34),
        "3 fixed, 3 broken": (texts([0, 0, 0, 1, 1, 1, 1], 4), texts([1, 1, 1, 0, 0, 0, 1], 4),
                              ["4"] * 7),
        "nothing changed": (texts([1, 0, 1], 4), texts([1, 0, 1], 4), ["4"] * 3),
    } | written


def compare_reward(compare):
    lines = ["SLOT that does nothing: 1,000 experiments of 30 problems, each answered twice at",
             "even odds. The difference in points:"]
    coin, found, small = chance.Random(0), {}, 0
    for _ in range(1000):
        plain, slot = (texts([coin.random() < 0.5 for _ in range(30)], 6) for _ in range(2))
        right_plain, right_slot, _, _, p = compare(plain, slot, ["6"] * 30)
        points = round((right_slot - right_plain) / 3)          # in tens of points
        found[points] = found.get(points, 0) + 1
        small += p < 0.05
    for points in sorted(found):
        lines.append(f"  {10 * points:+4}  {bar(found[points], 400)} {found[points]}")
    gains = sum(n for points, n in found.items() if points >= 1)
    lines.append(f"{gains / 10:.0f} % of them gain some ten points or more; p < 0.05 is found in "
                 f"{small / 10:.1f} %")
    return "\n".join(lines)


@functools.cache
def real_answers(steps=10, lr=0.1):
    """The embedded model's answers, plainly and with SLOT, and the right numbers. Ten problems in
    unseen phrasings, chosen because SLOT fixes and breaks some."""
    lm, tokenizer, _ = embedded()
    problems, answers = heldout("unseen", 50)[40:], ([], [])
    for problem in problems:
        prompt, _ = problem_ids(tokenizer, problem)
        for texts, number in zip(answers, (0, steps)):
            new = slot.generate(lm, prompt, 60, number, lr, eos_ids=tokenizer.eos_ids)
            texts.append(tokenizer.decode(list(new)))
    return *answers, [problem.answer.split("#### ")[-1] for problem in problems]


def compare_trial(compare):
    """Real answers, judged by the study's rules and by the student's."""
    plain, steered, golds = real_answers()
    pairs = [(strict(a, gold), strict(b, gold)) for a, b, gold in zip(plain, steered, golds)]
    fixed, broken = pairs.count((False, True)), pairs.count((True, False))
    right = [sum(column) for column in zip(*pairs)]
    what = f"right plainly, right with SLOT, fixed, broken, p of {len(golds)} problems"
    own = [*right, fixed, broken, sign_test(fixed, broken)]
    yours = compare(plain, steered, golds)
    runs = "answers to ten held-out problems in unseen phrasings, plain and with 10 steps at lr 0.1"
    return {what: [f" {x}" for x in own]}, {what: [f" {x}" for x in yours]}, runs


COMPARE = Exercise(
    title="Score, fixed and broken, the exact sign test", minutes=45, level="medium",
    solution=compare, cases=compare_cases,
    parts=("right_plain", "right_slot", "fixed", "broken", "p"), tolerance=1e-9,
    returns="the five (right_plain, right_slot, fixed, broken, p)",
    reward=compare_reward, trial=compare_trial, forbidden=("scipy", "statsmodels"),
    mistakes=[
        Mistake("the last run of digits",
                "The paper's rule: it sees no mark, no sign, and only the end of 1,875.",
                {"r\"####\\s*(-?[\\d,]*\\.?\\d+)\"": "r'\\d+\\.\\d+|\\d+'"}),
        Mistake("the first mark",
                "A text may correct itself: the last mark counts.",
                {"marks[-1]": "marks[0]"}),
        Mistake("the sign is lost",
                "-5 is not 5: the minus sign belongs to the number.",
                {"(-?[\\d,]*": "-?([\\d,]*"}),
        Mistake("thousands separators end the number",
                "1,875 was read as 1.",
                {"(-?[\\d,]*\\.?\\d+)": "(-?\\d*\\.?\\d+)"}),
        Mistake("decimals are cut off",
                "12.50 was read as 12.",
                {"[\\d,]*\\.?\\d+)": "[\\d,]+)"}),
        Mistake("texts are compared instead of values",
                "3.0 is 3, and 12.50 is 12.5.",
                {"float(marks[-1].replace(\",\", \"\")) == float(gold.replace(\",\", \"\"))":
                 "marks[-1].replace(',', '') == gold"}),
        Mistake("fixed and broken are exchanged",
                "Fixed: plain is wrong and SLOT right.",
                {"fixed = sum(b and not a": "fixed = sum(a and not b",
                 "broken = sum(a and not b": "broken = sum(b and not a"}),
        Mistake("not paired",
                "The difference of the two totals is fixed - broken. Both numbers are needed: 20 "
                "fixed and 17 broken is not 3 fixed.",
                {"fixed = sum(b and not a for a, b in pairs)":
                 "fixed = max(0, right_slot - right_plain)",
                 "broken = sum(a and not b for a, b in pairs)":
                 "broken = max(0, right_plain - right_slot)"}),
        Mistake("one side only",
                "Nobody promised that SLOT helps: a split as uneven the other way counts, too.",
                {"min(1.0, 2 * sum": "min(1.0, sum"}),
        Mistake("only this very split",
                "p is the probability of a split as uneven *or more so*: all i up to k.",
                {"sum(math.comb(n, i) for i in range(k + 1))": "math.comb(n, k)"}),
        Mistake("the split itself is left out",
                "i runs from 0 to k, k included.",
                {"range(k + 1)": "range(k)"}),
        Mistake("unchanged problems are counted",
                "n is fixed + broken: problems without a change say nothing about the coin.",
                {"n, k = fixed + broken,": "n, k = len(pairs),"}),
        Mistake("p above 1",
                "When both sides are equal, doubling counts the middle twice: at most 1.",
                {"min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n)":
                 "2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n"}),
        Mistake("the normal approximation",
                "(fixed - broken)² / n against a chi-square is for large n. The sum is exact and "
                "as short.",
                {"min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n)":
                 "math.erfc(abs(fixed - broken) / math.sqrt(2 * n)) if n else 1.0"}),
    ],
    hints=["re.findall(r'####\\s*(-?[\\d,]*\\.?\\d+)', text)[-1] without its commas, as a float.",
           "Make a list of pairs (plain right?, slot right?) first; fixed and broken are sums "
           "over it.",
           "sum(math.comb(n, i) for i in range(k + 1)) is a whole number: divide it once, by "
           "2**n."],
    answer="n = 3, k = 0: p = 2/8 = 0.25. Six: 2/2^6 = 0.031 (five give 0.0625). So +20 points "
           "without a single loss are the least that 30 problems can show, for one setting that "
           "was fixed before. Who tries 11 settings and reports the best must ask for more "
           "(Holm's correction, study/stats.py).")


# ---- 16. when can the answer gain?

def can_gain(h_prompt, x_prompt, h_answer, x_answer, W, b):
    """When can the answer gain? The sign of a product, and a control that knows only counts.

    SLOT steps against the gradient of the prompt's loss and hopes that the answer's loss falls,
    too. For a small step δ = -η g_prompt the answer's loss changes by

        <g_answer, δ> = -η <g_prompt, g_answer>

    so it falls, to first order, exactly if the two gradients point the same way. (AdamW bends the
    step: each entry has the sign of -g, but about the same size.) Both gradients are
    Wᵀ(p - y) at δ = 0 (exercise 11): of the prompt's positions, and of the right answer's. Their
    cosine is the agreement: 1 at best, below 0 where a small step must hurt.

    But what does it learn? Exercise 11 says: word counts. So compare it with a control that only
    counts. Its bias on the logits is log(1 + how often the prompt has the word). To be fair it gets
    the same strength as SLOT's b = W δ. A constant changes no probability (exercise 14), so what is
    compared is what is left without the mean:

        c = log(1 + counts)             counts of x_prompt, (V,)
        control = (c - mean c) · |b - mean b| / |c - mean c|

    If the control does as well, the prompt's words were all there was to learn. In this project's
    study, at the paper's setting (3 steps, lr 0.01), it lowers the loss of answers to unseen
    phrasings some twenty times as much as SLOT does. (Much stronger, it does harm.)

    h_prompt (n, d), x_prompt (n,)   hidden states and the tokens that came next: the prompt's
    h_answer (m, d), x_answer (m,)   the right answer's
    W (V, d),  b (V,)                the head; SLOT's bias W δ
    returns                          the cosine, a tensor of shape (), and the control (V,)

    By hand: W and the prompt of exercise 11's example: V = 3, d = 2, h = 0, x_prompt (0, 0, 1),
    g_prompt = (-1/3, 0). x_answer (0): p - y = (-2/3, 1/3, 1/3), g_answer = (-2/3, 1/3). Product
    2/9, lengths 1/3 and 0.7454: cosine 0.8944. Counts (2, 1, 0): c = (1.0986, 0.6931, 0), without
    its mean (0.5014, 0.0959, -0.5973), length 0.7857. b = (1, 0, -1) has length 1.4142: times 1.8
    it is (0.9025, 0.1726, -1.0751).

    >>> W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> cosine, control = can_gain(torch.zeros(3, 2), torch.tensor([0, 0, 1]), torch.zeros(1, 2),
    ...                            torch.tensor([0]), W, torch.tensor([1.0, 0.0, -1.0]))
    >>> cosine, control
    (tensor(0.8944), tensor([ 0.9025,  0.1726, -1.0751]))

    Allowed: everything on tensors. Not allowed: autograd.

    To think about: at test time the right answer is not known, so nobody can compute g_answer. What
    could still be learnt from the cosine before an experiment of a thousand problems is run?
    """
    def gradient(h, x):
        p = (h @ W.T).softmax(-1).mean(0)                       # (V,)
        y = torch.bincount(x, minlength=len(W)) / len(x)
        return W.T @ (p - y)                                    # (d,)

    g_prompt, g_answer = gradient(h_prompt, x_prompt), gradient(h_answer, x_answer)
    agreement = F.cosine_similarity(g_prompt, g_answer, dim=0)
    c = torch.bincount(x_prompt, minlength=len(W)).float().log1p()
    c = c - c.mean()
    control = c * (b - b.mean()).norm() / c.norm()
    return agreement, control


def can_gain_cases():
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    prompt, answer = torch.tensor([3, 3, 1, 8, 3, 0, 5]), torch.tensor([3, 7, 7, 1])
    return {
        "the example by hand": (torch.zeros(3, 2), torch.tensor([0, 0, 1]), torch.zeros(1, 2),
                                torch.tensor([0]), W, torch.tensor([1.0, 0.0, -1.0])),
        "random": (random(80, 7, 4), prompt, random(81, 4, 4), answer, random(82, 10, 4),
                   random(83, 10) + 2.0),
        "more random": (random(84, 7, 4), prompt, random(85, 4, 4), answer.flip(0),
                        random(86, 10, 4), 3 * random(87, 10)),
    }


def can_gain_reward(can_gain):
    lm, tokenizer, _ = embedded()
    W = lm.lm_head.weight
    lines = ["ten problems in phrasings that the embedded model never saw: the gradients' cosine,",
             "and the change of the answer's loss by SLOT and by the control of the same strength",
             "           3 steps at lr 0.01                  5 steps at lr 0.1"]
    row, sums = "SLOT {:+.4f}  counts {:+.4f}      SLOT {:+.4f}  counts {:+.4f}", torch.zeros(4)
    for problem in heldout("unseen", 10):
        prompt, answer = problem_ids(tokenizer, problem)
        hidden, _ = prompt_states(lm, prompt + answer)
        n, x_answer = len(prompt) - 1, torch.tensor(answer)
        z = hidden[0, n:-1] @ W.T
        changes = []
        for steps, lr in ((3, 0.01), (5, 0.1)):
            b = W @ slot.optimize_delta(hidden[:, :n + 1], prompt, lm.lm_head, steps, lr)[0][0, 0]
            cosine, control = can_gain(hidden[0, :n], torch.tensor(prompt[1:]), hidden[0, n:-1],
                                       x_answer, W, b)
            changes += [(F.cross_entropy(z + bias, x_answer) - F.cross_entropy(z, x_answer)).item()
                        for bias in (b, control)]
        sums += torch.tensor(changes)
        lines.append(f"  {cosine:+.2f}    " + row.format(*changes))
    return "\n".join([*lines, "  mean     " + row.format(*(sums / 10).tolist())])


def can_gain_trial(can_gain):
    """The study's gradients and control on three problems, beside the student's."""
    lm, tokenizer, _ = embedded()
    W, own, yours = lm.lm_head.weight, [], []
    for problem in heldout("unseen", 3):
        prompt, answer = problem_ids(tokenizer, problem)
        hidden, _ = prompt_states(lm, prompt + answer)
        n, b = len(prompt) - 1, W @ random(88, W.shape[1])
        gradients = [Text(lm.lm_head, hidden[0, :n], prompt[1:]).gradient(),
                     Text(lm.lm_head, hidden[0, n:-1], answer).gradient()]
        own += [F.cosine_similarity(*gradients, dim=0), *unigram(prompt[1:], b)[:3]]
        cosine, control = can_gain(hidden[0, :n], torch.tensor(prompt[1:]), hidden[0, n:-1],
                                   torch.tensor(answer), W, b)
        yours += [cosine, *control[:3]]
    what = "cosine and the control's first three numbers, three problems"
    runs = "the first three held-out problems in unseen phrasings, at δ = 0"
    return {what: [f" {x:.3f}" for x in own]}, {what: [f" {x:.3f}" for x in yours]}, runs


CAN_GAIN = Exercise(
    title="When can the answer gain?", minutes=50, level="hard",
    solution=can_gain, cases=can_gain_cases, parts=("the agreement", "the control"),
    returns="the pair (cosine, control)",
    reward=can_gain_reward, trial=can_gain_trial,
    forbidden=("requires_grad", "requires_grad_", "backward", "autograd", "grad", "func"),
    mistakes=[
        Mistake("the product instead of the cosine",
                "Divide by both lengths: products of long and short prompts cannot be compared.",
                {"F.cosine_similarity(g_prompt, g_answer, dim=0)": "g_prompt @ g_answer"}),
        Mistake("the gradients are compared before W",
                "p - y lives in the vocabulary; δ moves in the d dimensions of Wᵀ(p - y), and "
                "only there can two gradients agree.",
                {"return W.T @ (p - y)": "return p - y"}),
        Mistake("the sign of one gradient",
                "The step goes against g_prompt, the loss falls along -g_answer: the two signs "
                "cancel.",
                {"F.cosine_similarity(": "-F.cosine_similarity("}),
        Mistake("what came is left out of the gradients",
                "Without y both gradients are nearly the same, and everything seems to agree.",
                {"(p - y)": "p"}),
        Mistake("a token that comes twice is counted once in the gradient",
                "y[x] = 1/n writes the same place again.",
                {"torch.bincount(x, minlength=len(W)) / len(x)":
                 "torch.zeros(len(W)).index_fill(0, x, 1 / len(x))"}),
        Mistake("the answer's gradient at the prompt's positions",
                "p must be the model's predictions along the answer.",
                {"gradient(h_answer, x_answer)": "gradient(h_prompt, x_answer)"}),
        Mistake("counts instead of their logarithm",
                "A bias adds to logits, which are logarithms: log(1 + count).",
                {".float().log1p()": ".float()"}),
        Mistake("presence instead of counts",
                "A word that comes three times weighs log 4, not log 2.",
                {".float().log1p()": ".clamp(max=1).float().log1p()"}),
        Mistake("log of the count alone",
                "Words that the prompt does not have get minus infinity: log(1 + 0) is 0.",
                {".log1p()": ".log()"}),
        Mistake("the control peeks at the answer",
                "It counted the answer's words. At test time nobody has them.",
                {"torch.bincount(x_prompt, minlength=len(W)).float()":
                 "torch.bincount(x_answer, minlength=len(W)).float()"}),
        Mistake("the control peeks at the answer as well",
                "It counted the words of prompt and answer. At test time nobody has the answer's.",
                {"torch.bincount(x_prompt, minlength=len(W)).float()":
                 "torch.bincount(torch.cat((x_prompt, x_answer)), minlength=len(W)).float()"}),
        Mistake("the control keeps its mean",
                "A constant changes nothing but takes part in the length: the part that acts gets "
                "weaker.",
                {"c = c - c.mean()": "pass"}),
        Mistake("the control has the length of raw b",
                "b's mean changes no probability: it is left out before the length is taken.",
                {"(b - b.mean()).norm()": "b.norm()"}),
        Mistake("the control is not scaled",
                "A stronger bias changes more. The control gets the length of b - mean b.",
                {" * (b - b.mean()).norm() / c.norm()": ""}),
    ],
    hints=["The gradient is exercise 11 at δ = 0; write it once, as a function of h and x.",
           "torch.bincount(x_prompt, minlength=V).float().log1p() is c. Take off its mean.",
           "Scale c so that its norm is that of b - b.mean()."],
    answer="On problems with known answers, cheap: one forward pass each, no decoding, no lucky "
           "tokens. If the cosines scatter around 0, a small step cannot help on average; if they "
           "are positive, by how much it can is their mean times the gradients' lengths. It says "
           "nothing about long walks, where the second order counts, and little about AdamW, whose "
           "first step forgets how large each entry of the gradient is.")


EXERCISES = [COMPARE, CAN_GAIN]
