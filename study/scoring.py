r"""Is an answer right? Three rules, side by side.

    strict(text, gold)      what the text marks as its answer must be the value of `gold`
    flexible(text, gold)    the last number in the text must be, wherever it stands: the rule
                            "flexible-extract" of lm-evaluation-harness, for values
    paper(text, gold)       the rule of the SLOT authors' GSM8K script: the last run of digits

    text                                 gold   strict   flexible  paper
    "... 18 eggs a day. #### 1,875"      1875   right    right     wrong: the last run is 875
    "<answer>-5</answer>"                5      wrong    wrong     right: it sees no sign
    "#### 18, as on day 1"               18     wrong    wrong     wrong: the last number is 1
    "I guess 18"                         18     wrong    right     right: strict wants a mark
    "#### 18 dollars"                    18     right    right     right

A text marks its answer by "#### ...", \boxed{...}, <answer>...</answer>, or for multiple choice
"Answer: C"; the mark that begins last counts. Numbers are compared exactly, words without case.
Formulas (MATH-500) are compared by math-verify, the authors' own scorer.
Every rule takes a time in proportion to the length of the text: models babble.
"""
import re
from fractions import Fraction


def strict(text, gold, formulas=False):
    answer = marked_answer(text)
    return answer is not None and (same(answer, gold) or formulas and same_formula(answer, gold))


def flexible(text, gold):
    """True, False, or None where the rule says nothing, because `gold` is not a plain number."""
    return last_is(r"-?\$?(?:[0-9]+(?:,[0-9]{3})*(?![0-9])(?:\.[0-9]+)?|\.[0-9]+)", text, gold)


def paper(text, gold):
    """True, False or None. Their script asks math-verify, which compares 6 decimals, whether the
    last match equals the number after ####; signs and thousands separators are lost."""
    return last_is(r"\d+\.\d+|\d+/\d+|\d+", text, gold)


def last_is(pattern, text, gold):
    right, found = number(clean(gold)), re.findall(pattern, text)
    if right is None:
        return None
    value = number(re.sub("[$,]", "", found[-1])) if found else None
    return value is not None and abs(value - right) < Fraction(1, 2 * 10 ** 6)


def in_format(text, name):
    """Whether the text has the form that its task asks for."""
    if name == "tags":                                          # of the authors' GSM8K prompt
        text = text.removesuffix("\n")
        inside = text[len("<think>"):-len("</answer>")]
        return (text.startswith("<think>") and text.endswith("</answer>")
                and "</think><answer>" in inside)
    if name == "boxed":
        return "}" in text.partition(r"\boxed{")[2]
    if name == "hashes":                                        # the last line is "#### number"
        last = text.rstrip().rpartition("\n")[2]
        return re.fullmatch(r"#### *[-+]?\$?(?:[\d,]*(?<=\d)|[\d,]*\.\d+)", last) is not None
    before, _, letter = text.rpartition("Answer:")              # the last line is "Answer: C"
    return (re.search(r"\w", before.rpartition("\n")[2]) is None and "Answer:" in text
            and re.fullmatch(r"\W*[A-D]\W*", letter) is not None)


def marked_answer(text):
    r"""The text of the last mark, or None. "#### 18\nDone" -> "18"; r"\boxed{(1, 2)}" -> "(1, 2)".
    """
    marks = []                                                  # (where it begins, start, end)
    for pattern in (r"####[ \t]*\n?([^\n]*)", r"(?s:<answer>((?:(?!<answer>).)*?)</answer>)",
                    r"(?i:answer):[\s*$(]*([A-D])(?:\)|[.*$ ]*(?=\n|$))"):
        marks += [(m.start(), *m.span(1)) for m in re.finditer(pattern, text)]
    # Boxes: braces in one pass. \{ and \} are no brackets; a box that is cut off marks nothing.
    boxes = {m.end() - 1: m.start() for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)}
    opened = []
    for m in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if m[0] == "{":
            opened.append(m.start())
        elif m[0] == "}" and opened:
            start = opened.pop()
            if start in boxes:
                marks.append((boxes[start], start + 1, m.start()))
    if not marks:
        return None
    _, start, end = max(marks)
    return text[start:end].strip()


def same(answer, gold):
    """Whether two answers have the same value. same("$1,875.00", "1875"), same("18 dollars", "18"),
    same("(C)", "C"), not same("5 or 6", "5")."""
    if re.fullmatch(r"\s*(\\text\s*\{[^{}]*\}|[A-Z])\s*", gold):  # a word, or a choice's letter
        return words(answer) == words(gold)
    answer, gold = clean(answer), clean(gold)
    if answer == gold or len(answer) > 1000:                    # no right answer is so long
        return answer == gold != ""
    right = number(gold)
    return right is not None and right in (number(answer), only_number(answer))


def same_formula(answer, gold):
    from math_verify import parse, verify
    return len(answer) <= 1000 and bool(verify(parse(f"${gold}$"), parse(f"${answer}$")))


def words(text):
    text = re.sub(r"\\(text|textbf|mbox|mathrm)\b", "", text)
    return "".join(re.findall(r"[^\W_]", text)).casefold()


SPELLINGS = {ord("−"): "-", ord("–"): "-", ord("°"): "",
             ord("\N{NO-BREAK SPACE}"): " ", ord("\N{NARROW NO-BREAK SPACE}"): " "}


def clean(text):
    """Without what carries no value: $...$, LaTeX spacing, currency, percent and degree signs,
    bold, the final full stop."""
    text = text.strip().translate(SPELLINGS)
    text = re.sub(r"(?<!\\)\\[!,;: ]|\\quad|\\displaystyle|\\(?:left|right)(?![a-z])|\\[()]|\*\*|`",
                  "", text)
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|\\?[$%£€]", "", text)
    return " ".join(text.replace("{,}", ",").split()).strip().rstrip(".").strip()


# ---- plain numbers, exactly

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(rf"(?:[-+]\s*)?(?:{DIGITS})(?:\s*/\s*(?:{DIGITS}))?")
MIXED = re.compile(r"([-+]?)\s?(\d+) (\d+)\s*/\s*(\d+)")


def number(text):
    """The Fraction that the whole text is, or None. "1,875" -> 1875, "-3/4", "2 1/2" -> 5/2, ".5";
    but not "1,87" or "5 apples"."""
    try:
        if m := MIXED.fullmatch(text):
            value = int(m[2]) + Fraction(int(m[3]), int(m[4]))
            return -value if m[1] == "-" else value
        if NUMBER.fullmatch(text):
            above, _, below = re.sub(r"[,\s]", "", text).partition("/")
            return Fraction(above) / Fraction(below or "1")
    except (ZeroDivisionError, ValueError):                     # x/0; more digits than Python reads
        pass
    return None


def only_number(text):
    r"""The number in a text of one number and words or a unit: "18 dollars", "x = 5",
    r"5\text{ cm}^2" -> its value. None for "5 or 6" and for what is a formula: "5x", "2^5"."""
    text = re.sub(r"\\(?:text|mbox|mathrm)\s*\{([^{}]*)\}(\^\{?[23]\}?)?", r" \1 ", text)
    found = list(MIXED.finditer(text)) or list(NUMBER.finditer(text))
    if len(found) != 1:
        return None
    before, after = text[:found[0].start()], text[found[0].end():]
    words_before = re.fullmatch(r"(?:[A-Za-z'’,: ]*[ :=] ?)?", before)
    unit_behind = re.fullmatch(r"(?:(?!\s*pi\b)(?:\s|[A-Za-z]{2})[A-Za-z'’,.()/ -]*)?", after)
    return number(found[0].group().strip()) if words_before and unit_behind else None
