"""What is compared. Names are exact: learning rates that differ at all are two settings.

    plain               the model as it is
    slot 5 0.1          SLOT at the *point* (5, 0.1): 5 steps at learning rate 0.1
    random 5 0.1, ...   a control for that point; see measure.py
"""
from typing import NamedTuple

CONTROLS = ("random", "unigram", "wrong-prompt")


class Setting(NamedTuple):
    what: str                               # plain, slot, or a control
    steps: int = 0
    lr: float = 0.0

    @property
    def name(self):
        return f"{self.what} {self.steps} {self.lr!r}" if self.steps else self.what


PLAIN = Setting("plain")


def all_settings(args):
    """The plain model, SLOT at every point, each control at some."""
    slot = [Setting("slot", *point) for point in args.points]
    controls = [Setting(what, *point) for what in args.control for point in args.control_points]
    return [PLAIN, *slot, *controls]


def name(what, point):
    return Setting(what, *point).name


def label(point):
    return f"lr {point[1]!r}, {point[0]} step{'s' * (point[0] > 1)}"
