"""checks/child.py: a stranger's program, here a chat template, ends, and does no harm."""
import time
from pathlib import Path

import jinja2.filters
import pytest

from checks.child import in_child
from small_tokenizer import line_of
from tokenizer.chat import render

BAD_TEMPLATES = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end"),
    "range": ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
    "power": ("{{ 9**(9**9) }}", "does not end"),
    "center": ("{{ 'a'|center(10**11) }}", "more than 256 MB"),
    "format": ("{{ '%0999999999d' % 1 }}", "more than 256 MB"),
    "doubling": ("{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}", "more than 256 MB"),
    "output": ("{{ 'a' * (11 * 10**6) }}", "longer than"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "depth": ("{{ " + "(" * 9000 + ")" * 9000 + " }}", "recursion"),
    "compile": ("{{ x }}" * 900_000, "does not end"),
    "own words": ("{{ raise_exception('Roles must alternate\nuser') }}", "Roles must alternate"),
    "missing": ("{{ messages[7].content.x }}", "no element 7"),
    "syntax": ("{% if %}", "Expected an expression"),
    "file": ("{% include '/etc/passwd' %}", "no loader"),
    "class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "change": ("{{ messages.append(1) }}", "unsafe"),
    "surrogate": ("{{ '\\ud800' }}", "surrogate"),
    "no text": ("{{ 'x'.split('') }}", "empty separator"),
    "line breaks": ("{{ '{:\n}'.format(1) }}", "Unknown format code"),
}


def children():
    return {child for path in Path("/proc/self/task").glob("*/children") for child in path.read_text().split()}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_a_template_is_bounded(name):
    template, words = BAD_TEMPLATES[name]
    before = children()
    with pytest.raises(ValueError) as error:
        render(template, {"messages": [{"role": "user", "content": "hi"}]})
    line = line_of(error)
    assert line.startswith("chat template: ") and (words in line or name == "doubling" and "does not end" in line)
    assert children() <= before                                     # none is left; other tests may have some


def test_a_template_cannot_open_a_file_even_outside_the_sandbox(tmp_path):
    (tmp_path / "x").write_text("secret")
    with pytest.raises(ValueError, match="Too many open files"):
        render("{{ f() }}", {"f": lambda: open(tmp_path / "x").read()})


@pytest.mark.parametrize("name", sorted(jinja2.filters.FILTERS))
def test_every_filter_works_where_no_file_can_be_opened(name):
    """jinja2 imports modules when a filter needs them: striptags, wordwrap and others were refused for too many open files."""
    template = f"{{{{ value | {name} }}}}"
    for value in ("a <b>c</b> https://x.org " * 9, ["b", "a"], {"a": 1}, 2.5):
        try:
            render(template, {"value": value})
        except ValueError as error:                                 # it wants other arguments, or another value
            assert "open files" not in str(error) and "Import" not in str(error) and "No such file" not in str(error), error


@pytest.mark.parametrize("text", ["{{ 'é\\n\\x41\\u00e9' }}", "{{ lipsum(n=1) }}", "{{ cycler(1, 2).next() }}", "{{ joiner(',')() }}",
                                  "{% for k, v in {'a': 1} | dictsort %}{{ k }}{% endfor %}", "{{ [1, 2] | random }}", "{{ strftime_now('%A %d %B %Y %p %Z %c') }}",
                                  "{{ 'x' | wordwrap(3) | indent | title | center }}", "{{ {'a': [1, 2.5, none]} | tojson(indent=2) }}"])
def test_so_does_the_rest_of_jinja(text):
    try:
        render(text, {})
    except ValueError as error:
        assert "open files" not in str(error) and "Import" not in str(error), error


def test_what_the_child_returns_and_raises():
    assert in_child(lambda: "é\n\x00😀" * 1000) == "é\n\x00😀" * 1000
    for run, words in ((lambda: 1 / 0, "ZeroDivisionError 'division by zero'"), (lambda: "\ud800", "surrogates"), (lambda: bytearray(1 << 40).hex(), "256 MB"),
                       (lambda: time.sleep(9) or "", "1.5 seconds"), (lambda: __import__("os")._exit(3), "crashed"), (lambda: "a" * (5 << 20), "longer")):
        with pytest.raises(ValueError) as error:
            in_child(run)
        assert words in line_of(error)
