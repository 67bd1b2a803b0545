"""A folder's chat template: a Jinja program from a stranger that turns messages into one text.

    render(template, {"messages": [{"role": "user", "content": "Hi"}], ...}) -> text

It is set up as the reference library does (`compiled`) and run where it can do no harm: in jinja2's
sandbox, in a child process with little time, little memory and no files (checks/child.py).
"""
import functools
import json
from datetime import datetime

import jinja2.debug
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from checks.child import in_child

# jinja2 imports modules when a filter needs them, and the child can open no file: this runs before.
WARM_UP = "{{ '<b>\\n' | striptags | wordwrap | urlize | pprint }}{{ lipsum(1) }}"
COMPARING = ("startswith", "endswith", "split", "rsplit", "partition", "strip", "lstrip", "rstrip",
             "find", "index", "count", "replace", "removeprefix", "removesuffix")
ended = set()                                   # templates that have ended within the limits


class Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words for training; it has no effect here."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body, lineno=line)


def raise_exception(message):
    raise ValueError(message)


def tojson(value, ensure_ascii=False, **options):
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@functools.lru_cache(8)
def compiled(template, veil=()):
    """The jinja2 template. veil ((code, mark), ...): letters to replace in what it compares with
    other texts, as x == "a", "a" in x, x.split("a"): see Tokenizer.chat_ids."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    tree = environment.parse(template)
    for node in tree.find_all((nodes.Compare, nodes.Call)):
        compared = []
        if isinstance(node, nodes.Compare):
            compared = [node.expr, *(operand.expr for operand in node.ops)]
        elif isinstance(node.node, nodes.Getattr) and node.node.attr in COMPARING:
            compared = node.args[:1]
        for text in compared:
            if isinstance(text, nodes.Const) and isinstance(text.value, str):
                text.value = text.value.translate(dict(veil))
    return environment.from_string(tree)


def render(template, variables, veil={}):
    """The text of a template, or a ValueError: one line on why there is none.

    A template that has ended once is compiled in this process, for the next children.
    """
    key = template, tuple(veil.items())
    compiled(WARM_UP).render()
    try:
        if key in ended:
            compiled(*key)
        text = in_child(lambda: compiled(*key).render(**variables))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"chat template: {error}; use another, or a prompt without") from None
    ended.add(key)
    return text
