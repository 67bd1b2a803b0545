r"""Is an answer right? Two rules, side by side.

    strict(text, gold)    what the text marks as its answer must be the value of `gold`
    paper(text, gold)     the rule of the SLOT authors' GSM8K script: the last run of digits in the text is the answer

    text                                           gold     strict   paper
    "... 18 eggs a day. #### 1,875"                1875     right    wrong: the last run of digits is 875
    "<answer>-5</answer>"                          5        wrong    right: it sees no sign
    "#### 18, as on day 1"                         18       wrong    wrong: not one number; the last one is 1
    "I guess 18"                                   18       wrong    right: strict wants the answer marked
    "so it is $\boxed{\tfrac12}$."                 0.5      right    wrong

A text marks its answer by "#### ...", \boxed{...}, <answer>...</answer>, or for multiple choice "Answer: C"; the mark that begins
last counts. Values are compared exactly where they are numbers, and as formulas otherwise: two formulas are equal
if they have the same value for three random choices of their letters.
"""
import cmath
import math
import random
import re
from fractions import Fraction


def strict(text, gold):
    answer = marked_answer(text)
    return answer is not None and same(answer, gold)


def paper(text, gold):
    """True, False, or None where the rule says nothing, because `gold` is not a plain number.

    Their script takes the last match of digits, with a decimal point or a slash inside, and asks math-verify whether it equals
    the number after #### (where that library does read the thousands separators). Signs and separators are lost.
    """
    right = number(clean(gold))
    found = re.findall(r"\d+\.\d+|\d+/\d+|\d+", text)
    if right is None:
        return None
    value = number(found[-1]) if found else None
    return value is not None and abs(value - right) < Fraction(1, 2 * 10 ** 6)          # math-verify compares 6 decimals


FORMATS = {"hashes": r".*(?:^|\n)#### *[-+]?\$?[\d,]*\.?\d+\s*",        # the last line is "#### number"
           "tags": r"<think>.*</think><answer>.*</answer>\n?",           # as the authors' GSM8K prompt demands
           "boxed": r".*\\boxed\{.*\}.*",
           "letter": r".*(?:^|\n)\W*Answer:\W*[A-D]\W*"}                 # the last line is "Answer: C"


def in_format(text, name):
    return re.fullmatch(FORMATS[name], text, re.DOTALL) is not None


def marked_answer(text):
    r"""The text of the last mark, or None. "#### 18\nDone" -> "18"; r"\boxed{\frac{1}{2}}" -> r"\frac{1}{2}"."""
    marks = [(m.start(), m[1]) for m in re.finditer(r"####[ \t]*\n?([^\n]*)", text)]
    marks += [(m.start(), m[1]) for m in re.finditer(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)]
    marks += [(m.start(), m[1]) for m in re.finditer(r"(?i:answer):[\s*$(]*([A-D])(?:\)|[.*$ ]*(?=\n|$))", text)]
    opened, boxes = [], {m.end() - 1: m.start() for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)}
    for m in re.finditer(r"\\.|[{}]", text, re.DOTALL):              # braces in one pass; \{ and \} are no brackets
        if m[0] == "{":
            opened.append(m.start())
        elif m[0] == "}" and opened and (start := opened.pop()) in boxes:
            marks.append((boxes[start], text[start + 1:m.start()]))     # a box that is cut off marks nothing
    return max(marks)[1].strip() if marks else None


def same(answer, gold):
    r"""Whether two answers have the same value. same("$1,875.00", "1875"), same(r"\dfrac{1}{2}", "0.5"), not same("(1,2)", "(2,1)")."""
    if re.fullmatch(r"\s*(\\text\s*\{[^{}]*\}|[A-Z])\s*", gold):       # a word, or the letter of a choice
        return words(answer) == words(gold)
    answer, gold = clean(answer), clean(gold)
    if answer == gold or len(answer) > 1000:                        # no right answer is so long; babble can be
        return answer == gold != ""
    x, y = number(answer), number(gold)
    if y is not None and x is None:
        x = only_number(answer)
    if x is not None and y is not None:
        return x == y
    try:
        return equal(structure(formula(answer)), structure(formula(gold)))
    except (ValueError, OverflowError, ZeroDivisionError, RecursionError):
        return False


def words(text):
    return "".join(re.findall(r"[^\W_]", re.sub(r"\\(text|textbf|mbox|mathrm)\b", "", text))).casefold()


def clean(text):
    """Without what carries no value: $...$, LaTeX spacing, currency, percent and degree signs, bold, the final full stop."""
    text = text.strip().translate({ord("−"): "-", ord("–"): "-", ord("×"): "*", ord("π"): r"\pi ", ord("∞"): r"\infty ",
                                   ord("°"): "", ord("\N{NO-BREAK SPACE}"): " ", ord("\N{NARROW NO-BREAK SPACE}"): " "})
    text = re.sub(r"(?<!\\)\\[!,;: ]|\\quad|\\displaystyle|\\(?:left|right)(?![a-z])|\\\(|\\\)|\*\*|`", "", text)
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|\\?[$%£€]", "", text.replace("{,}", ","))
    return " ".join(text.split()).strip().rstrip(".").strip()


# ---- plain numbers, exactly

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(rf"(?:[-+]\s*)?(?:{DIGITS})(?:\s*/\s*(?:{DIGITS}))?")
MIXED = re.compile(r"([-+]?)\s?(\d+) (\d+)\s*/\s*(\d+)")


def number(text):
    """The Fraction that the whole text is, or None. "1,875" -> 1875, "-3/4", "2 1/2" -> 5/2, ".5"; but not "1,87" or "5 apples"."""
    try:
        if m := MIXED.fullmatch(text):
            return (int(m[2]) + Fraction(int(m[3]), int(m[4]))) * (-1 if m[1] == "-" else 1)
        if NUMBER.fullmatch(text):
            above, _, below = re.sub(r"[,\s]", "", text).partition("/")
            return Fraction(above) / Fraction(below or "1")
    except (ZeroDivisionError, ValueError):                         # x/0, or more digits than Python converts
        pass
    return None


def only_number(text):
    """The number in a text of one number and words or a unit: "18 dollars", "She has 18.", "x = 5", r"5\text{ cm}^2" -> its value.
    None for "5 or 6" and for what is a formula: "5x", "2^5"."""
    text = re.sub(r"\\(?:text|mbox|mathrm)\s*\{([^{}]*)\}(\^\{?[23]\}?)?", r" \1 ", text)
    found = list(MIXED.finditer(text)) or list(NUMBER.finditer(text))
    if len(found) != 1:
        return None
    before, after = text[:found[0].start()], text[found[0].end():]
    if re.fullmatch(r"(?:[A-Za-z'’,: ]*[ :=])?", before) and re.fullmatch(r"(?:(?!\s*pi\b)(?:\s|[A-Za-z]{2})[A-Za-z'’,.()/ -]*)?", after):
        return number(found[0].group().strip())
    return None


# ---- formulas

def formula(text):
    r"""Ready to be parsed: units gone, "x =" gone, one spelling of fractions. r"x = 1\dfrac{4}{5}\text{ cm}" -> r"(1+\frac{4}{5})"."""
    text = re.sub(r"\\(?:text|mbox|mathrm)\s*\{\s*(?:and|or)\s*\}", ",", text)
    text = re.sub(r"\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(\^\{?[23]\}?)?", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"^\s*[A-Za-z](?:\([A-Za-z]\))?\s*(?:=|\\in(?![a-z]))", "", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(\d+)\s*(\\frac\s*\{\d+\}\s*\{\d+\})", r"(\1+\2)", text)        # a mixed number, not a product
    return re.sub(r"(?<![\d,(\[])(\d{1,3}(?:,\d{3})+)(?![\d,])", lambda m: m[1].replace(",", ""), text).strip()


def structure(text):
    r"""Formulas stay strings; "(1, 2]" -> ("(]", [...]), a set or a bare list -> ("set", [...]), unions and matrices likewise."""
    text = text.strip()
    if m := re.fullmatch(r"\\begin\{([pbv]?matrix)\}(.*)\\end\{\1\}", text, re.DOTALL):
        return "matrix", [("row", [structure(cell) for cell in row.split("&")]) for row in re.split(r"\\\\", m[2]) if row.strip()]
    for separator, name in ((r"\cup", "union"), (",", "set")):
        pieces = split(text, separator)
        if len(pieces) > 1:
            return name, elements(pieces)
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "set", elements(split(text[2:-2], ","))
    if text and text[0] in "([" and text[-1] in ")]":
        pieces = split(text[1:-1], ",")
        if len(pieces) > 1:
            return text[0] + text[-1], [structure(piece) for piece in pieces]
    return ("set", elements([text])) if r"\pm" in text else text


def elements(pieces):
    r"""Of a set: 1 \pm 2 stands for two."""
    return [structure(piece.replace(r"\pm", sign)) for piece in pieces for sign in ("+-" if r"\pm" in piece else "+")]


def split(text, separator):
    """At the separators outside of all brackets. Half-open intervals make ( and [ close each other."""
    pieces, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0 and i >= start and text.startswith(separator, i):
            pieces.append(text[start:i])
            start = i + len(separator)
    return [*pieces, text[start:]]


def equal(a, b):
    if isinstance(a, str) != isinstance(b, str):
        return False
    if isinstance(a, str):
        return "".join(a.split()) == "".join(b.split()) or all(close(value(a, seed), value(b, seed)) for seed in range(3))
    (kind, a), (other, b) = a, b
    if kind != other or len(a) != len(b):
        return False
    if kind not in ("set", "union"):
        return all(map(equal, a, b))
    b = list(b)
    for x in a:                                                     # in any order: each takes its partner away
        partner = next((i for i, y in enumerate(b) if equal_or_false(x, y)), None)
        if partner is None:
            return False
        del b[partner]
    return True


def close(x, y):
    return abs(x - y) <= 1e-9 * max(abs(x), abs(y), 1e-6)


def equal_or_false(a, b):
    try:
        return equal(a, b)
    except (ValueError, OverflowError, ZeroDivisionError):          # {x, "none"}: one element without a value
        return False


TOKEN = re.compile(r"\s*(\d+\.?\d*|\.\d+|\\[A-Za-z]+|\\.|.)", re.DOTALL)
FUNCTIONS = {r"\sin": cmath.sin, r"\cos": cmath.cos, r"\tan": cmath.tan, r"\ln": cmath.log, r"\log": cmath.log10, r"\exp": cmath.exp,
             r"\sqrt": cmath.sqrt}
CONSTANTS = {r"\pi": math.pi, "i": 1j, r"\infty": 1e300}


def value(text, seed):
    """The complex value of a formula, its letters standing for random numbers that `seed` determines. Sums, products (also
    unwritten: 2x), powers, \\frac, \\sqrt[n], common functions. ValueError for anything else."""
    tokens = TOKEN.findall(re.sub(r"(?<![\\A-Za-z])(sqrt|pi)(?![A-Za-z])", r"\\\1", text.strip()))[::-1]      # the next one is the last
    peek = lambda: tokens[-1] if tokens else ""

    def take(wanted=None):
        if not tokens or wanted is not None and tokens[-1] != wanted:
            raise ValueError(f"cannot read {text!r}")
        return tokens.pop()

    def sum_():
        total = product()
        while peek() in ("+", "-"):
            total += product() if take() == "+" else -product()
        return total

    def product():
        if peek() in ("+", "-"):
            return product() if take() == "+" else -product()
        total = power()
        while peek() and peek() not in ("+", "-", ")", "}", "]", ",", "=", "<", ">"):
            if peek() in ("*", r"\cdot", r"\times"):
                take()
                total *= power()
            elif peek() in ("/", r"\div"):
                take()
                total /= power()
            else:
                total *= power()
        return total

    def power():
        if peek() in ("+", "-"):                                    # 2 * -3
            return power() if take() == "+" else -power()
        base = atom()
        return base ** argument() if peek() == "^" and take() else base

    def argument():
        """What ^, \\frac and \\sqrt take: a group, or one character (\\frac12)."""
        if peek() == "{":
            return group("{", "}")
        if peek()[:1].isdigit() and len(peek()) > 1:
            token = take()
            tokens.append(token[1:])
            return complex(token[0])
        return -argument() if peek() == "-" and take() else atom()

    def group(left, right):
        take(left)
        inside = sum_()
        take(right)
        return inside

    def atom():
        token = peek()
        if token in ("(", "{", "["):
            return group(token, {"(": ")", "{": "}", "[": "]"}[token])
        take()
        if token[:1].isdigit() or token[:1] == ".":
            return complex(float(token))
        if token in CONSTANTS:
            return complex(CONSTANTS[token])
        if token == r"\frac":
            return argument() / argument()
        if token == r"\sqrt" and peek() == "[":
            degree = group("[", "]")
            return argument() ** (1 / degree)
        if token in FUNCTIONS:
            raised = argument() if peek() == "^" and take() else 1
            return FUNCTIONS[token](argument() if peek() == "{" or token == r"\sqrt" else power()) ** raised
        if re.fullmatch(r"[A-Za-z]|\\(alpha|beta|gamma|theta|lambda|mu|phi|omega|rho|sigma|tau)", token):
            return complex(random.Random(f"{token} {seed}").uniform(0.6, 1.9))
        raise ValueError(f"cannot read {text!r}")

    total = sum_()
    if tokens or not cmath.isfinite(total):
        raise ValueError(f"cannot read {text!r}")
    return total
