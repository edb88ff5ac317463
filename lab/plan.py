"""What an evaluation will cost: passes, FLOP, hours and memory of each attack, without running it (evaluate.py --plan).

Every attack, and then the scoring, runs as it is, on one picture and a stand-in for the model that answers for free and
counts the calls: with or without a gradient, of the defence or the bare classifier, how many draws of the noise at
once. A call's FLOP grow linearly with its draws (the classifier's pass over the picture itself is shared by them), so
counting one call with one draw and one with two gives all others. Hours are FLOP at the rate of one call of each sort,
measured on this device in a few seconds. The stand-in is never fooled: for AutoAttack and Square, which leave pictures
alone that they have beaten, all of this is an upper bound.

Memory is bytes of tensors alive at once: the model's own, those of the attack itself, counted while it runs on a whole
chunk of pictures with the stand-in, and those of its largest call, which grow linearly with pictures and draws, too.

`e` is the Evaluation of lab/units.py.
"""

import copy
import dataclasses
import math
import tempfile
import time
import weakref
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

SECONDS = 1.0  # a call shorter than this is measured again with more pictures


class Count(TorchDispatchMode):
    """Counts FLOP by PyTorch's own formulas: two a multiply-add, convolutions and matrix products only. (Its
    FlopCounterMode also tracks modules, by hooks that forbid autograd.grad, which the attacks use.) And bytes of the
    tensors made inside: alive now, and the most at once; what lies inside an operation, as a convolution's workspace,
    is not seen."""

    def __init__(self):
        super().__init__()
        self.flop = self.alive = self.most = 0
        self.known: set[int] = set()  # addresses of storages that are counted

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if formula := flop_registry.get(operation._overloadpacket):
            self.flop += formula(*args, **(kwargs or {}), out_val=out)
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):  # a view has that of what it is a view of
            if storage._cdata not in given | self.known:
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.alive)
        return out

    def _freed(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.alive -= size


def _storages(tensors) -> list:
    return [t.untyped_storage() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)]


def counted(work) -> Count:
    """One call of work(), backward passes inside it included."""
    with Count() as counter:
        work()
    return counter


def count_flop(work) -> int:
    return counted(work).flop


class StandIn(nn.Module):
    """Looks to Target and the attacks like `model`: always sure of the right answer, with a gradient, and at no cost.

    answer: its logits (K,). calls: (gradient?, bare classifier?, draws at once) -> how many for each picture; most:
    likewise -> how many pictures at once."""

    def __init__(self, model: nn.Module, samples: int, answer, calls: Counter, most: Counter, bare: bool = False):
        super().__init__()
        self.samples, self.answer, self.calls, self.most, self.bare = samples, answer, calls, most, bare
        if hasattr(model, "purifier"):
            self.purifier = None
            self.classifier = self.labeller = StandIn(model.classifier, 1, answer, calls, most, bare=True)
            if getattr(model, "final", None) is not None:
                self.labeller = StandIn(model.final, 1, answer, calls, most, bare=True)
        if hasattr(model, "member_logits"):
            latent = model.purifier.config["latent_dim"]
            self.member_logits, self.draw = self.members, lambda x, members: torch.zeros(len(x), members, latent)

    def evaluate(self, x: torch.Tensor, draws: float) -> torch.Tensor:
        call = x.requires_grad and torch.is_grad_enabled(), self.bare, draws
        self.calls[call] += len(x)
        self.most[call] = max(self.most[call], len(x))
        slope = torch.linspace(0, 1e-3, len(self.answer))  # so that gradients are not zero, and no two logits are equal
        return self.answer + slope * x.flatten(1).mean(1, keepdim=True)  # (B, K)

    def members(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.evaluate(x, z.shape[1] / self.samples)[:, None].expand(-1, z.shape[1], -1)  # (B, E S, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.evaluate(x, 1)


def rehearse(e, name: str, classes: int, budget, pictures: int = 1, most: Counter | None = None) -> Counter:
    """The calls that attack `name` and its scoring make for so many pictures; see StandIn."""
    calls, answer = Counter(), torch.zeros(classes).index_fill(0, e.labels[:1].cpu(), 10.0)
    small = copy.copy(e)
    small.images, small.budget, small.device = e.images[:pictures].cpu(), budget, "cpu"
    small.labels = e.labels[:1].cpu().expand(len(small.images))
    small.defence = StandIn(e.defence, e.samples, answer, calls, Counter() if most is None else most)
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


def largest(e, name: str, classes: int) -> tuple[Counter, int]:
    """Pictures at once in each sort of call, at e's limit; and bytes of the attack's own tensors."""
    e.is_deterministic(e.bare(name))  # asked of the model, and so not within what is counted
    most, short = Counter(), dataclasses.replace(e.budget, steps=1, pgd_steps=1, queries=1)
    own = counted(lambda: rehearse(e, name, classes, short, e.budget.chunk, most))
    return most, own.most


def measure(call, x: torch.Tensor, y: torch.Tensor, gradient: bool, classifier: bool) -> tuple[float, ...]:
    """Of such calls, for one picture: FLOP but for the draws, FLOP of each draw; bytes likewise; and this device's FLOP
    a second, from the largest batch that takes about a second or two."""
    one, two = (counted(lambda n=n: call(x[:1], y[:1], gradient, classifier, n)) for n in (1, 2))
    shared, each = (2 * one.flop - two.flop, two.flop - one.flop) if one.flop else (0, 1)  # none: a draw is the unit
    kept = 2 * one.most - two.most, two.most - one.most
    pictures, seconds = 1, 0.0
    while True:
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            call(x[:pictures], y[:pictures], gradient, classifier, 1)
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        if seconds > SECONDS or pictures >= len(x):
            return shared, each, *kept, min(pictures, len(x)) * (shared + each) / seconds
        pictures *= 2 if seconds > SECONDS / 4 else 4


def plan(e, names: list[str], call) -> list[dict]:
    """A row for each attack: gradients and passes without one a picture, total FLOP, hours on this device, and bytes:
    all at once at e's limit (`memory`), and those that come with one more of the limit (`slope`).

    call(pictures, labels, gradient, classifier, draws) does what an attack does again and again: e.one_call."""
    x, y = e.pictures(0)
    classes, costs, rows = call(x[:1], y[:1], False, False, 1).shape[-1], {}, []
    weights = sum(t.nbytes for t in (*e.defence.parameters(), *e.defence.buffers()))
    for name in names:
        row = {"attack": name, "gradients": 0, "passes": 0, "flop": 0.0, "hours": 0.0, "memory": 0.0, "slope": 0.0}
        most, own = largest(e, name, classes)
        for (gradient, classifier, draws), count in count_calls(e, name, classes).items():
            if (gradient, classifier) not in costs:
                costs[gradient, classifier] = measure(call, x, y, gradient, classifier)
            shared, each, _, _, rate = costs[gradient, classifier]
            flop = len(e.labels) * count * (shared + draws * each)
            row["gradients" if gradient else "passes"] += round(count * draws)
            row["flop"] += flop
            row["hours"] += flop / rate / 3600
        for (gradient, classifier, draws), pictures in most.items():
            shared, each = costs[gradient, classifier][2:4]
            kept, members = pictures * (shared + draws * each), 1 if classifier else e.samples
            row["memory"] = max(row["memory"], weights + own + kept)
            row["slope"] = max(row["slope"], kept / (pictures * draws * members))
        rows.append(row)
    return rows


def text(rows: list[dict], e) -> str:
    """The table that evaluate.py --plan prints."""
    disk = len(rows) * e.images.numel() * 4 / 1e9  # each attack keeps the worst candidate of a picture
    total = {"attack": "all"} | {k: sum(row[k] for row in rows) for k in ("gradients", "passes", "flop", "hours")}
    total["memory"], slope = (max(row[k] for row in rows) for k in ("memory", "slope"))
    room = torch.cuda.get_device_properties(e.device).total_memory if "cuda" in str(e.device) else 80e9
    fits = (room - total["memory"]) / max(slope, 1) + e.limit
    lines = [f"{len(e.labels)} pictures, S = {e.samples}, {e.device}, attacks in {e.config['search_precision']}; "
             "a picture's passes, FLOP of all pictures, hours at the rate just measured here, memory",
             f"{'attack':<14}{'gradients':>12}{'other passes':>14}{'TFLOP':>14}{'hours':>12}{'GB':>9}"]  # fmt: skip
    for row in [*rows, total]:
        lines.append(f"{row['attack']:<14}{row['gradients']:>12,}{row['passes']:>14,}{row['flop'] / 1e12:>14,.2f}"
                     f"{row['hours']:>12,.3f}{row['memory'] / 1e9:>9,.2f}")  # fmt: skip
    lines.append("Divide the hours by the number of processes with a device each. These are upper bounds: AutoAttack, "
                 "Square and a cascade leave pictures alone that they have beaten.")  # fmt: skip
    lines.append(f"Memory is at --limit {e.limit}, weights included, convolutions' workspaces not; "
                 + (f"{room / 1e9:.0f} GB hold --limit {2 ** int(math.log2(fits))}." if fits >= 1 else
                    f"{room / 1e9:.0f} GB are too little: choose a smaller --chunk."))  # fmt: skip
    return "\n".join([*lines, f"On disk: {disk:.2g} GB."])
