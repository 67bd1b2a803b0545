"""A model folder's chat template: a Jinja program from a stranger that turns messages into the text of a prompt.

    render(template, {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": True, ...}) -> text

It is set up as the reference library does (`compiled`), and run where it can do no harm: in jinja2's sandbox, inside a child
process with little time, little memory and no files (`render`, `in_child`).
"""
import contextlib
import functools
import json
import os
from pathlib import Path

from checks import show

SECONDS, MEMORY, OUTPUT = 1.5, 256 << 20, 10 << 20                  # what rendering one may take: time, bytes, characters
rendered = set()                                                    # templates that have ended within that


@functools.lru_cache(8)
def compiled(template):
    """The jinja2 template as the reference library sets it up."""
    import jinja2.debug                                             # jinja2 imports it late, when a child can open no file
    import jinja2.ext
    import jinja2.sandbox
    from datetime import datetime

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}                                       # marks the assistant's words, for training; no effect here

        def parse(self, parser):
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    return environment.from_string(template)


def render(template, variables):
    """The text of a template, or one line on why there is none.

    The sandbox keeps a template from files and from Python's insides, but not from endless loops or 10**12 letters. A forked
    child with limits on time, memory and files excludes all of that by one rule; it takes milliseconds, since nothing is started
    or copied. A template that has ended once is compiled here, for the next children. Without fork (Windows): the sandbox only.
    """
    import jinja2
    compiled("{{ 'a' }}")                                           # so that everything is imported before the fork

    def run():
        try:
            text = compiled(template).render(**variables)
            text.encode()
            return ("text", text) if len(text) <= OUTPUT else ("error", f"its text is longer than {OUTPUT} characters")
        except jinja2.TemplateError as error:                       # the template's own message, or a mistake in the template
            return "error", show(error.message or type(error).__name__, 240)
        except MemoryError:
            return "error", f"it needs more than {MEMORY >> 20} MB"
        except Exception as error:
            return "error", f"{type(error).__name__} {show(str(error), 240)}"

    if template in rendered:
        with contextlib.suppress(Exception):                        # it did compile in a child; if not here, then there again
            compiled(template)
    kind, text = in_child(run) if hasattr(os, "fork") else run()
    if kind == "error":
        raise ValueError(f"chat template: {text}; use another template, or the prompt without one")
    rendered.add(template)
    return text


def in_child(run):
    """The pair of texts that `run()` returns in a child with SECONDS to live, MEMORY more than now and no files."""
    import resource
    import select
    import signal
    import time
    import warnings

    def child():
        import gc
        gc.disable()
        memory = resource.RLIM_INFINITY
        if os.path.exists("/proc/self/statm"):
            memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        for limit, value in (("AS", memory), ("CPU", 2), ("CORE", 0), ("NOFILE", 0)):
            try:
                resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (value, value))
            except (OSError, ValueError):
                pass                                                # stricter already, or not known to this system
        answer = json.dumps(run(), ensure_ascii=False).encode()
        while answer:
            answer = answer[os.write(write_end, answer):]

    deadline, parent, pid, answer = time.monotonic() + SECONDS, os.getpid(), None, bytearray()
    read_end, write_end = os.pipe()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                         # Python 3.12 warns of threads; the child needs none
            pid = os.fork()
        if pid == 0:
            child()
            os._exit(0)
        os.close(write_end)
        write_end, ready = None, select.poll()
        ready.register(read_end, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0 and ready.poll(left * 1000):
            if not (block := os.read(read_end, 1 << 20)):
                return tuple(json.loads(answer))
            answer += block
        return "error", f"it does not end within {SECONDS} seconds"
    except OSError as error:
        return "error", f"no process to run it in ({error.strerror})"
    except ValueError:                                              # no answer, or half of one
        return "error", "it crashed"
    finally:
        if os.getpid() != parent:                                   # the child ends here, whatever happened
            os._exit(1)
        for end in (read_end, write_end):
            if end is not None:
                os.close(end)
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
