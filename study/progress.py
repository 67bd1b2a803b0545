"""How far a run is: on a terminal one line that is rewritten, elsewhere a line a minute."""
import shutil
import sys
import time


class Progress:
    """done: results that are there already. settings, samples: how many. quiet: show nothing."""

    def __init__(self, done, settings, samples, quiet=False):
        self.first = self.done = done
        self.samples, self.total, self.quiet = samples, settings * samples, quiet
        self.began = self.last = time.monotonic()

    def show(self):
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if self.quiet or not terminal and now - self.last < 60:
            return
        self.last = now
        rate = (self.done - self.first) / (now - self.began + 1e-9)         # results a second
        line = f"{self.done * self.samples // self.total}/{self.samples} samples"
        if self.done - self.first > self.total // 100:              # the first ones have no rate
            left = int((self.total - self.done) / rate)
            line += (f"  {rate * self.samples / self.total:.2f}/s  "
                     f"{left // 60}:{left % 60:02} left")
        if terminal:
            line = "\r\x1b[K" + line[:shutil.get_terminal_size().columns - 1]
        print(line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    def end(self):
        if sys.stderr.isatty() and not self.quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
