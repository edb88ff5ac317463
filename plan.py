"""What an evaluation will cost: passes, FLOP and hours of each attack, without running it (evaluate.py --plan).

The cost model: an attack makes `calls`, each of which evaluates every picture `draws` times, with or without a
gradient. A call's FLOP grow linearly with its draws (the classifier's pass over the picture itself is shared by them),
so counting one call with one draw and one with two gives all others. Hours are FLOP at the rate of one call of each
sort, measured on this device in a few seconds; they are an upper bound for AutoAttack and Square, which leave pictures
alone that they have beaten.

`e` is evaluate.py's Evaluation.
"""

import time
from dataclasses import dataclass

import torch
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
    with CountFlop() as counter:
        work()
    return counter.total


@dataclass(frozen=True)
class Calls:
    """`calls` evaluations of each picture, `draws` at a time."""

    gradient: bool
    calls: int
    draws: int = 1
    classifier: bool = False  # of the bare classifier instead of the defence


def search(name: str, b, classes: int, members: bool) -> list[Calls]:
    """What attack `name` does to each picture under budget b; `members`: whether the model has several."""
    targets, standard = min(b.targets, classes - 1), name == "standard"
    final = Calls(False, 1)  # does the picture survive?
    if name.startswith("rand"):  # AutoAttack draws one by one: APGD on cross-entropy and on DLR
        return [Calls(True, 2 * (b.steps + 1) * b.eot), Calls(False, 6)]
    if standard:  # APGD, targeted APGD, FAB (a gradient and a check a step), Square
        gradients = b.steps + 1 + targets * (2 * b.steps + 1)
        return [Calls(True, gradients, 1, True), Calls(False, targets * (b.steps + 2) + b.queries + 8, 1, True)]
    if name == "pgd-eot":
        return [Calls(True, b.pgd_steps, b.eot), final]
    if name == "apgd-ce":
        return [Calls(True, b.steps + 1, b.eot), final]
    if name == "apgd":
        runs = (4 if members else 2) + targets
        return [Calls(True, runs * (b.steps + 1), b.eot), Calls(False, 1 + runs)]
    if name == "fixed-noise":
        return [Calls(True, b.steps + 1), final]
    if name == "transfer":
        return [Calls(True, 2 * (b.steps + 1), 1, True), Calls(False, 2)]
    if name == "square":
        return [Calls(False, b.queries, b.eot), final]
    return [final]  # clean, noise


def candidates(name: str, b, classes: int, members: bool) -> int:
    """Adversarial versions of each picture that are scored."""
    return {"apgd": (4 if members else 2) + min(b.targets, classes - 1), "transfer": 2}.get(name, 1)


def scoring(name: str, b, classes: int, members: bool, bare: bool) -> list[Calls]:
    """Choosing each picture's worst candidate, and fresh draws of it."""
    number = candidates(name, b, classes, members)
    return [Calls(False, number, b.select, bare), Calls(False, 1, b.draws, bare)]


class Meter:
    """FLOP of a call, and the rate at which this device does it."""

    def __init__(self, e, call):
        """call(pictures, labels, gradient, classifier, draws): one call of an attack."""
        self.e, self.call, self.flop, self.rates = e, call, {}, {}
        self.x, self.y = e.pictures(0)

    def flop_of(self, c: Calls) -> float:
        """Of one call, for one picture."""
        sort = c.gradient, c.classifier
        if sort not in self.flop:
            one, two = (count_flop(lambda n=n: self.call(self.x[:1], self.y[:1], *sort, n)) for n in (1, 2))
            self.flop[sort] = (2 * one - two, two - one) if one else (0, 1)  # nothing to count: a draw is the unit
        shared, each = self.flop[sort]
        return shared + c.draws * each

    def rate(self, c: Calls) -> float:
        """FLOP a second of this sort of call, from the largest batch that takes about a second or two."""
        sort = c.gradient, c.classifier
        count = 1
        while sort not in self.rates:
            pictures, labels = self.x[:count], self.y[:count]
            self.call(pictures, labels, *sort, 1)
            began = time.perf_counter()
            self.call(pictures, labels, *sort, 1)
            if self.x.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            if seconds > SECONDS or count >= len(self.x):
                self.rates[sort] = len(pictures) * self.flop_of(Calls(c.gradient, 1, 1, c.classifier)) / seconds
            count *= 2 if seconds > SECONDS / 4 else 4
        return self.rates[sort]


def plan(e, names: list[str], call) -> list[dict]:
    """A row for each attack: gradients and passes without one a picture, total FLOP, and hours on this device."""
    meter, n, rows = Meter(e, call), len(e.labels), []
    with torch.no_grad():
        classes = call(meter.x[:1], meter.y[:1], False, False, 1).shape[-1]
    members = hasattr(e.defence, "member_logits")
    for name in names:
        bare = e.attacks[name].on == "classifier" and hasattr(e.defence, "classifier")
        work = search(name, e.budget, classes, members) + scoring(name, e.budget, classes, members, bare)
        if not hasattr(e.defence, "classifier"):
            work = [Calls(c.gradient, c.calls, c.draws) for c in work]  # it is the classifier
        rows.append(
            {
                "attack": name,
                "gradients": sum(c.calls * c.draws for c in work if c.gradient),
                "passes": sum(c.calls * c.draws for c in work if not c.gradient),
                "flop": n * sum(c.calls * meter.flop_of(c) for c in work),
                "hours": n * sum(c.calls * meter.flop_of(c) / meter.rate(c) for c in work) / 3600,
            }
        )
    return rows


def text(rows: list[dict], e) -> str:
    total = {"attack": "all"} | {k: sum(row[k] for row in rows) for k in ("gradients", "passes", "flop", "hours")}
    lines = [f"{len(e.labels)} pictures, S = {e.samples}, {e.device}, attacks in {e.config['search_precision']}; "
             "a picture's passes, FLOP of all pictures, hours at the rate just measured here",
             f"{'attack':<14}{'gradients':>12}{'other passes':>14}{'TFLOP':>14}{'hours':>12}"]  # fmt: skip
    for row in [*rows, total]:
        lines.append(f"{row['attack']:<14}{row['gradients']:>12,}{row['passes']:>14,}{row['flop'] / 1e12:>14,.2f}"
                     f"{row['hours']:>12,.3f}")  # fmt: skip
    return "\n".join([*lines, "Divide the hours by the number of devices. AutoAttack and Square are upper bounds."])
