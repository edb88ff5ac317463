"""What an evaluation will cost: passes, FLOP and hours of each attack, without running it (evaluate.py --plan).

Every attack, and then the scoring, runs as it is, on one picture and a stand-in for the model that answers for free and
counts the calls: with or without a gradient, of the defence or the bare classifier, how many draws of the noise at
once. A call's FLOP grow linearly with its draws (the classifier's pass over the picture itself is shared by them), so
counting one call with one draw and one with two gives all others. Hours are FLOP at the rate of one call of each sort,
measured on this device in a few seconds. The stand-in is never fooled: for AutoAttack and Square, which leave pictures
alone that they have beaten, all of this is an upper bound.

`e` is the Evaluation of lab/units.py.
"""

import copy
import dataclasses
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

SECONDS = 1.0  # a call shorter than this is measured again with more pictures


class CountFlop(TorchDispatchMode):
    """Counts by PyTorch's own formulas: two FLOP a multiply-add, convolutions and matrix products only. (Its
    FlopCounterMode also tracks modules, by hooks that forbid autograd.grad, which the attacks use.)"""

    total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if formula := flop_registry.get(operation._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def count_flop(work) -> int:
    """FLOP of one call of work(), backward passes inside it included."""
    with CountFlop() as counter:
        work()
    return counter.total


class StandIn(nn.Module):
    """Looks to Target and the attacks like `model`: always sure of the right answer, with a gradient, and at no cost.

    answer: its logits (K,). calls: (gradient?, bare classifier?, draws at once) -> how many for each picture."""

    def __init__(self, model: nn.Module, samples: int, answer: torch.Tensor, calls: Counter, bare: bool = False):
        super().__init__()
        self.samples, self.answer, self.calls, self.bare = samples, answer, calls, bare
        if hasattr(model, "purifier"):
            self.purifier = None
            self.classifier = StandIn(model.classifier, 1, answer, calls, bare=True)
        if hasattr(model, "member_logits"):
            self.member_logits, self.draw = self.members, lambda x, members: torch.zeros(len(x), members, 1)

    def evaluate(self, x: torch.Tensor, draws: int) -> torch.Tensor:
        self.calls[x.requires_grad and torch.is_grad_enabled(), self.bare, draws] += len(x)
        slope = torch.linspace(0, 1e-3, len(self.answer))  # so that gradients are not zero, and no two logits are equal
        return self.answer + slope * x.flatten(1).mean(1, keepdim=True)  # (B, K)

    def members(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.evaluate(x, z.shape[1] // self.samples)[:, None].expand(-1, z.shape[1], -1)  # (B, E S, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.evaluate(x, 1)


def rehearse(e, name: str, classes: int, budget) -> Counter:
    """The calls that attack `name` and its scoring make for one picture; see StandIn."""
    calls, answer = Counter(), torch.zeros(classes).index_fill(0, e.labels[:1].cpu(), 10.0)
    small = copy.copy(e)
    small.images, small.labels, small.budget, small.device = e.images[:1], e.labels[:1], budget, "cpu"
    small.defence = StandIn(e.defence, e.samples, answer, calls)
    e.is_deterministic(e.bare(name))  # of the model, not of the stand-in, which shares what is known
    with tempfile.TemporaryDirectory() as folder:
        small.folder = Path(folder)
        small.attack(name, 0)
    return calls


def count_calls(e, name: str, classes: int) -> Counter:
    """The same at e's whole budget. How long a search is enters linearly: two short ones tell of any other."""
    lengths = {key: getattr(e.budget, key) for key in ("steps", "pgd_steps", "queries")}
    short = {key: min(2, length) for key, length in lengths.items()}
    base = rehearse(e, name, classes, dataclasses.replace(e.budget, **short))
    calls = Counter(base)
    for key, length in lengths.items():
        if length > short[key]:
            longer = rehearse(e, name, classes, dataclasses.replace(e.budget, **short | {key: short[key] + 1}))
            for call in longer:
                calls[call] += (length - short[key]) * (longer[call] - base[call])
    return calls


def measure(call, x: torch.Tensor, y: torch.Tensor, gradient: bool, classifier: bool) -> tuple[float, float, float]:
    """Of such calls, for one picture: FLOP but for the draws, FLOP of each draw, and this device's FLOP a second, from
    the largest batch that takes about a second or two."""
    one, two = (count_flop(lambda n=n: call(x[:1], y[:1], gradient, classifier, n)) for n in (1, 2))
    shared, each = (2 * one - two, two - one) if one else (0, 1)  # nothing to count: a draw is the unit
    pictures, seconds = 1, 0.0
    while True:
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            call(x[:pictures], y[:pictures], gradient, classifier, 1)
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        if seconds > SECONDS or pictures >= len(x):
            return shared, each, min(pictures, len(x)) * (shared + each) / seconds
        pictures *= 2 if seconds > SECONDS / 4 else 4


def plan(e, names: list[str], call) -> list[dict]:
    """A row for each attack: gradients and passes without one a picture, total FLOP, and hours on this device.

    call(pictures, labels, gradient, classifier, draws) does what an attack does again and again: e.one_call."""
    x, y = e.pictures(0)
    classes, costs, rows = call(x[:1], y[:1], False, False, 1).shape[-1], {}, []
    for name in names:
        row = {"attack": name, "gradients": 0, "passes": 0, "flop": 0.0, "hours": 0.0}
        for (gradient, classifier, draws), count in count_calls(e, name, classes).items():
            if (gradient, classifier) not in costs:
                costs[gradient, classifier] = measure(call, x, y, gradient, classifier)
            shared, each, rate = costs[gradient, classifier]
            flop = len(e.labels) * count * (shared + draws * each)
            row["gradients" if gradient else "passes"] += count * draws
            row["flop"] += flop
            row["hours"] += flop / rate / 3600
        rows.append(row)
    return rows


def text(rows: list[dict], e) -> str:
    """The table that evaluate.py --plan prints."""
    disk = len(rows) * e.images.numel() * 4 / 1e9  # each attack keeps the worst candidate of a picture
    total = {"attack": "all"} | {k: sum(row[k] for row in rows) for k in ("gradients", "passes", "flop", "hours")}
    lines = [f"{len(e.labels)} pictures, S = {e.samples}, {e.device}, attacks in {e.config['search_precision']}; "
             "a picture's passes, FLOP of all pictures, hours at the rate just measured here",
             f"{'attack':<14}{'gradients':>12}{'other passes':>14}{'TFLOP':>14}{'hours':>12}"]  # fmt: skip
    for row in [*rows, total]:
        lines.append(f"{row['attack']:<14}{row['gradients']:>12,}{row['passes']:>14,}{row['flop'] / 1e12:>14,.2f}"
                     f"{row['hours']:>12,.3f}")  # fmt: skip
    lines.append("Divide the hours by the number of processes with a device each. These are upper bounds: AutoAttack, "
                 "Square and a cascade leave pictures alone that they have beaten.")  # fmt: skip
    return "\n".join([*lines, f"On disk: {disk:.2g} GB."])
