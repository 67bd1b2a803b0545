"""Another program on the same weights, for benchmark.py --peers: a worker that answers one JSON line with another, and below
it the other end of the line, which starts and asks it.

    PYTHON benchmarks/peer.py transformers FOLDER DTYPE THREADS
    PYTHON benchmarks/peer.py llama.cpp FILE.gguf DTYPE THREADS

    {"do": "load"}                                      -> {"seconds": ...}     to the first token, as a user waits for it
    {"do": "prefill", "tokens": [...]}                  -> {"seconds": ...}
    {"do": "answer", "tokens": [...], "new": 32}        -> {"first": ..., "rest": ..., "ids": [...]}    greedy, seconds
The worker runs in whatever Python has the peer, so it uses nothing of this project. The clock stands here, beside the work.
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
        self.torch, self.transformers, self.folder, self.dtype = torch, transformers, folder, getattr(torch, dtype)
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def load(self):
        self.model = None                                               # the one before goes first
        self.model = self.transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype).eval()
        self.model.generation_config.eos_token_id = None                # the same number of tokens for all
        self.prefill([0])

    def prefill(self, tokens):
        self.model(self.torch.tensor([tokens]), use_cache=True, logits_to_keep=1)

    def answer(self, tokens, new):
        stamps, ids = [], []

        class Stream:                                                   # generate() hands it the prompt, then every token
            def put(self, value):
                stamps.append(time.perf_counter())
                ids.extend(value.flatten().tolist())

            def end(self):
                pass

        self.model.generate(self.torch.tensor([tokens]), attention_mask=self.torch.ones(1, len(tokens), dtype=self.torch.long),
                            max_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0, streamer=Stream())
        return stamps[1:], ids[len(tokens):]


class LlamaCpp:
    def __init__(self, file, dtype, threads):
        import llama_cpp
        import numpy
        self.llama, self.numpy, self.file, self.threads, self.f32 = llama_cpp, numpy, file, threads, dtype == "float32"
        self.version = f"llama-cpp-python {llama_cpp.__version__}, {llama_cpp.llama_print_system_info().decode().strip()}"

    def load(self):
        self.model = None
        kind = self.llama.GGML_TYPE_F32 if self.f32 else self.llama.GGML_TYPE_F16      # of the cache; F16 is its default
        self.model = self.llama.Llama(self.file, n_ctx=2048, n_batch=2048, n_threads=self.threads, n_threads_batch=self.threads,
                                      type_k=kind, type_v=kind, verbose=False)
        self.prefill([0])

    def prefill(self, tokens):
        self.model.reset()
        self.model.eval(tokens)

    def answer(self, tokens, new):
        stamps, ids = [], []
        self.prefill(tokens)
        while True:
            logits = self.numpy.ctypeslib.as_array(self.model._ctx.get_logits(), shape=(self.model.n_vocab(),))
            ids.append(int(logits.argmax()))
            stamps.append(time.perf_counter())
            if len(ids) == new:
                return stamps, ids
            self.model.eval(ids[-1:])


def serve(peer):
    answers = sys.stdout
    sys.stdout = sys.stderr                                             # whatever a library prints is not an answer
    print(json.dumps({"version": peer.version}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        began = time.perf_counter()
        if order["do"] == "answer":
            stamps, ids = peer.answer(order["tokens"], order["new"])
            reply = {"first": stamps[0] - began, "rest": stamps[-1] - stamps[0], "ids": ids}
        else:
            getattr(peer, order["do"])(*([order["tokens"]] if "tokens" in order else []))
            reply = {"seconds": time.perf_counter() - began}
        print(json.dumps(reply), file=answers, flush=True)


class Peer:
    """A worker, seen from benchmark.py."""
    def __init__(self, python, kind, path, dtype, threads):
        command = [python, os.path.abspath(__file__), kind, str(path), dtype, str(threads)]
        self.kind = kind
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.version = self.read()["version"]

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"--peers: {self.kind} ended with status {self.process.wait()}; its own message is above")
        return json.loads(line)

    def ask(self, **order):
        try:
            print(json.dumps(order), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass                                                        # read() says why
        return self.read()

    def stop(self):
        self.process.kill()
        self.process.wait()


def find_peers(pythons):
    """-> {"transformers": python, "llama.cpp": python}: where each can be imported."""
    found = {}
    for python in pythons:
        code = "import importlib.util as u; print(*(n for n in ('transformers', 'llama_cpp') if u.find_spec(n)))"
        try:
            names = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError):
            raise ValueError(f"--peer-python {python!r} is no Python that runs") from None
        for name in names:
            found.setdefault(name.replace("_", "."), python)            # llama_cpp, the module; llama.cpp, the program
    if not found:
        raise ValueError("--peers: neither transformers nor llama-cpp-python can be imported here; "
                         "--peer-python PATH names a Python that has them")
    return found


def start_peer(python, kind, folder, dtype, threads, cache, emulated):
    """-> the worker, its model loaded, or None where it could not be compared; and a line about it."""
    path = folder
    if kind == "llama.cpp":
        if dtype == "float16":
            return None, "llama.cpp: no GGUF in float16 is written here"
        from benchmarks.gguf import write_gguf
        path = cache / f"{folder.name}-{dtype}.gguf"
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            try:
                write_gguf(folder, path, dtype)
            except ValueError as error:
                return None, f"llama.cpp: left out, {error}"
    peer = Peer(python, kind, path, dtype, threads)
    if emulated and kind == "llama.cpp" and "AVX512 = 1" in peer.version:
        peer.stop()
        return None, "llama.cpp: left out, this build of it uses AVX-512, which the emulation cannot take from it"
    peer.ask(do="load")
    return peer, f"{kind}: {peer.version}"


if __name__ == "__main__":
    del sys.path[0]                                                     # gguf.py beside this file is not the library of that name
    kind, folder, dtype, threads = sys.argv[1:]
    serve({"transformers": Transformers, "llama.cpp": LlamaCpp}[kind](folder, dtype, int(threads)))
