"""A model folder's chat template: a Jinja program from a stranger that turns messages into the text of a prompt.

    render(template, {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": True, ...}) -> text

It is set up as the reference library does (`compiled`), and run where it can do no harm: in jinja2's sandbox, inside a
child process with little time, little memory and no files (checks/child.py).
"""
import contextlib
import functools
import json
from datetime import datetime

import jinja2
import jinja2.debug
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from checks.child import in_child
from checks.files import show

# jinja2 imports modules when a filter needs them, and the child can open no file; so these have run once before.
WARM_UP = "{{ '<b>\\n' | striptags | wordwrap | urlize | pprint }}{{ lipsum(1) }}"
ended = set()                                               # templates that have ended within the child's limits
COMPARING = {"startswith", "endswith", "split", "rsplit", "partition", "rpartition", "strip", "lstrip", "rstrip",
             "find", "rfind", "index", "rindex", "count", "replace", "removeprefix", "removesuffix"}


class Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words, for training; no effect here."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body, lineno=line)


def raise_exception(message):
    raise jinja2.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(8)
def compiled(template, veil=()):
    """The jinja2 template as the reference library sets it up. veil ((code, mark), ...): see `veil_compared`."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    if not veil:
        return environment.from_string(template)
    tree = environment.parse(template)
    veil_compared(tree, dict(veil))
    return environment.from_string(tree)


compiled(WARM_UP).render()


def veil_compared(tree, veil):
    """Replace letters in the texts that a template compares with others: x == "a", "a" in x, x.split("a")."""
    for node in tree.find_all((nodes.Compare, nodes.Call)):
        compared = []
        if isinstance(node, nodes.Compare):
            compared = [node.expr] + [operand.expr for operand in node.ops]
        elif isinstance(node.node, nodes.Getattr) and node.node.attr in COMPARING:
            compared = node.args[:1]
        for text in compared:
            if isinstance(text, nodes.Const) and isinstance(text.value, str):
                text.value = text.value.translate(veil)


def render(template, variables, veil={}):
    """The text of a template, or a ValueError: one line on why there is none.

    The sandbox keeps a template from files and from Python's insides, but not from endless loops or 10**12 letters. A forked
    child with limits on time, memory and files excludes all of that by one rule; it takes milliseconds, since nothing is
    started or copied. A template that has ended once is compiled here, for the next children.
    """
    key = template, tuple(veil.items())

    def run():
        try:
            return compiled(*key).render(**variables)
        except jinja2.TemplateError as error:               # the template's own message, or a mistake in the template
            raise ValueError(show(error.message or type(error).__name__, 240)) from None

    try:
        if key in ended:
            with contextlib.suppress(Exception):            # it did compile in a child; if not here, then there again
                compiled(*key)
        text = in_child(run)
    except ValueError as error:
        raise ValueError(f"chat template: {error}; use another template, or the prompt without one") from None
    ended.add(key)
    return text
