"""Another program on the same weights: a worker that answers one JSON line with another, and below
it the other end of the line. PYTHON benchmarks/peer.py KIND FOLDER_OR_FILE DTYPE THREADS

    {"do": "load"}                                      -> seconds to the first token
    {"do": "prefill", "tokens": [...]}                  -> seconds
    {"do": "batch", "prompts": [[...], ...], "new": 32} -> seconds; transformers only, padded left
    {"do": "answer", "tokens": [...], "new": 32}        -> first, rest (seconds), ids; greedy

The worker runs in whatever Python has the peer and uses nothing of this project; the clock is its.
"""
import json
import os
import subprocess
import sys
import time


class Transformers:
    def __init__(self, folder, dtype, threads):
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.transformers, self.folder = torch, transformers, folder
        self.dtype = getattr(torch, dtype)
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def load(self):
        self.model = None                           # the one before goes first
        load = self.transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(self.folder, dtype=self.dtype).eval()
        self.model.generation_config.eos_token_id = None        # as many tokens for all
        self.prefill([0])

    def prefill(self, tokens):
        self.model(self.torch.tensor([tokens]), use_cache=True, logits_to_keep=1)

    def generate(self, prompts, new, streamer=None):
        longest = max(map(len, prompts))
        ids = self.torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
        mask = self.torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        self.model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False,
                            use_cache=True, pad_token_id=0, streamer=streamer)

    def answer(self, tokens, new):
        stamps, ids = [], []

        class Stream:                               # generate() hands it the prompt, then tokens
            def put(self, value):
                stamps.append(time.perf_counter())
                ids.extend(value.flatten().tolist())

            def end(self):
                pass

        self.generate([tokens], new, Stream())
        return stamps[1:], ids[len(tokens):]


class LlamaCpp:
    def __init__(self, file, dtype, threads):
        import llama_cpp
        import numpy
        self.llama, self.numpy, self.file, self.threads = llama_cpp, numpy, file, threads
        self.kind = 0 if dtype == "float32" else 1      # of the cache: GGML_TYPE_F32, or F16
        self.version = f"llama-cpp-python {llama_cpp.__version__}"

    def load(self):
        self.model = None
        self.model = self.llama.Llama(
            self.file, n_ctx=2048, n_batch=2048, n_threads=self.threads, verbose=False,
            n_threads_batch=self.threads, type_k=self.kind, type_v=self.kind)
        self.prefill([0])

    def prefill(self, tokens):
        self.model.reset()
        self.model.eval(tokens)

    def answer(self, tokens, new):
        stamps, ids = [], []
        self.prefill(tokens)
        while True:
            logits = self.model._ctx.get_logits()
            logits = self.numpy.ctypeslib.as_array(logits, shape=(self.model.n_vocab(),))
            ids.append(int(logits.argmax()))
            stamps.append(time.perf_counter())
            if len(ids) == new:
                return stamps, ids
            self.model.eval(ids[-1:])


def serve(peer):
    answers, sys.stdout = sys.stdout, sys.stderr    # whatever a library prints is not an answer
    print(json.dumps({"version": peer.version}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        do, began = order.pop("do"), time.perf_counter()
        if do == "answer":
            stamps, ids = peer.answer(**order)
            reply = {"first": stamps[0] - began, "rest": stamps[-1] - stamps[0], "ids": ids}
        else:
            getattr(peer, "generate" if do == "batch" else do)(**order)
            reply = {"seconds": time.perf_counter() - began}
        print(json.dumps(reply), file=answers, flush=True)


class Peer:
    """A worker, seen from the benchmark."""

    def __init__(self, python, kind, path, dtype, threads):
        command = [python, os.path.abspath(__file__), kind, str(path), dtype, str(threads)]
        self.kind, pipe = kind, subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.version = self.read()["version"]
        self.ask(do="load")

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"--peers: {self.kind} ended with status {self.process.wait()}; "
                             "its own message is above")
        return json.loads(line)

    def ask(self, **order):
        try:
            print(json.dumps(order), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass                                    # read() says why
        return self.read()


def find_peers(pythons):
    """-> {"transformers": python, "llama.cpp": python}: where each can be imported."""
    found, modules = {}, {"transformers": "transformers", "llama_cpp": "llama.cpp"}
    code = f"import importlib.util as u; print(*filter(u.find_spec, {list(modules)}))"
    for python in pythons:
        try:
            done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            raise ValueError(f"--peer-python {python!r} is no Python that runs") from None
        for module in done.stdout.split():
            found.setdefault(modules[module], python)
    if not found:
        raise ValueError("--peers: neither transformers nor llama-cpp-python can be imported here; "
                         "--peer-python PATH names a Python that has them")
    return found


if __name__ == "__main__":
    del sys.path[0]                                 # gguf.py beside this file is not the library
    kind, place, dtype, threads = sys.argv[1:]
    serve({"transformers": Transformers, "llama.cpp": LlamaCpp}[kind](place, dtype, int(threads)))
