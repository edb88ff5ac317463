"""Attack a trained CARSO end to end, score every adversarial picture on fresh draws, and report the worst.

    python evaluate.py --ckpt runs/digits/carso.pt                              # AutoAttack, as in the paper
    python evaluate.py --ckpt runs/digits/carso.pt --attack all                 # everything we know
    python evaluate.py --ckpt runs/digits/carso.pt --view naive-odds            # the reference's output: audit fails
    python evaluate.py --ckpt runs/digits/carso.pt --sweep eps                  # also steps, eot, samples
    python evaluate.py --published DIR --dataset cifar10 --attack paper         # the authors' released weights
    python evaluate.py --model mine.py:build --dataset cifar10 --attack all     # any function that returns an nn.Module
    torchrun --nproc_per_node=8 evaluate.py --ckpt runs/cifar10/carso.pt --attack all

First the audit: do gradients exist, and are they the derivative? If not, the exit status is 3 and the report says why.
Work is cut into chunks of pictures; each finished (attack, chunk) is a file. Kill it anywhere and run the same command
again, with any number of processes: it goes on, and the result is the same, since all random numbers follow from the
attack and the chunk. Processes share a folder and never talk to each other.

Shapes: B pictures, N candidates (adversarial versions of a picture), E draws, S members, K classes.
"""

import argparse
import copy
import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data as datasets
import plan
import report
from aggregate import log_probabilities, majority_vote, mean_logits, mean_probabilities, robust_logits
from attacks import LOSSES, apgd, ascend, parse_number, project
from models import keep_freed_memory, load_published_classifier, read_tensors
from purifier import check_config, load_checkpoint, load_published, write_atomically

# ---------------------------------------------------------------------------------------------------------- budgets


@dataclass(frozen=True)
class Budget:
    """How much work an evaluation is. The defaults are the paper's protocol (section 5.1, table 12)."""

    n: int = 10_000  #            test pictures, the first ones
    steps: int = 100  #           APGD's, in AutoAttack and in ours
    eot: int = 20  #              draws averaged (or, by AutoAttack, summed) a gradient
    pgd_steps: int = 200  #       PGD+EoT
    pgd_step_size: float = 0.007  # in pixels
    queries: int = 5000  #        Square
    targets: int = 9  #           classes that targeted attacks aim at
    select: int = 20  #           draws that choose the worst candidate of a picture
    draws: int = 20  #            fresh draws that score it
    chunk: int = 128  #           pictures in a unit of work


BUDGETS = {
    "paper": Budget(),
    # Ours: two minutes on two CPU cores. Enough to see a defence break, too little to prove that one holds.
    "reduced": Budget(
        n=100, steps=10, eot=4, pgd_steps=20, pgd_step_size=0.02, queries=200, targets=3, select=5, draws=10, chunk=50
    ),
}

# ----------------------------------------------------------------------------------- decisions, and what attacks see


def naive_log_odds(logits: torch.Tensor) -> torch.Tensor:
    """log(P / (1 - P)) through float32 probabilities, the reference code's output: here to show how it masks
    gradients."""
    P = log_probabilities(logits).exp()
    return torch.log(P / (1 - P))


def sum_of_exponentials(logits: torch.Tensor) -> torch.Tensor:
    """sum_s exp(l), up to a factor for each picture (DLR does not see it) that keeps it finite."""
    return (logits - logits.detach().amax(dim=(1, 2), keepdim=True)).exp().sum(dim=1)


# Views: what an attack sees, members' logits (B, S, K) to (B, K). All but the last two decide alike, whatever they
# return.
VIEWS = {
    "logsumexp": robust_logits,
    "sum-exp": sum_of_exponentials,
    "naive-odds": naive_log_odds,
    "mean-logit": mean_logits,
    "mean-probability": mean_probabilities,
}
# Decisions (appendix D compares them), each with a view of its own that has gradients.
AGGREGATIONS = {
    "robust": (robust_logits, "logsumexp"),
    "mean-logits": (mean_logits, "mean-logit"),
    "mean-probabilities": (mean_probabilities, "mean-probability"),
    "majority": (majority_vote, "mean-probability"),
}


class Target(nn.Module):
    """The model as an attack sees it: pictures -> logits (B, K), while counting what the attack costs and which of the
    gradients that flow back to the pictures are not finite or exactly zero.

    model: CARSO, or any nn.Module from pictures to logits.
    view: members' logits (B, S, K) -> (B, K), for a model that has members; ignored for others.
    limit: at most this many pictures or reconstructions at a time; memory, not results, depends on it.
    """

    def __init__(self, model: nn.Module, view=robust_logits, samples: int | None = None, limit: int = 1024):
        super().__init__()
        self.model, self.view, self.limit = model, view, limit
        self.has_members = hasattr(model, "member_logits")
        self.samples = (samples or model.samples) if self.has_members else 1
        self.count = dict.fromkeys(("pictures", "gradients", "nonfinite", "zero", "nonfinite_logits"), 0)

    def seen_through(self, view) -> "Target":
        """The same model through another view, with the same counters."""
        other = Target(self.model, view, self.samples, self.limit)
        other.count = self.count
        return other

    def draw(self, x: torch.Tensor, draws: int = 1):
        """Latent noise for this many evaluations of every picture; None for a model without members."""
        return self.model.draw(x, draws * self.samples) if self.has_members else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.draws(x, 1, self.draw(x))[:, 0]

    def draws(self, x: torch.Tensor, draws: int, z: torch.Tensor | None) -> torch.Tensor:
        """E evaluations of every picture, (B, E, K). A model with members runs its classifier on the picture once for
        all of them; any other is fed the picture E times."""
        if x.requires_grad:
            x.register_hook(self._watch)
        self.count["pictures"] += len(x) * draws
        if self.has_members:
            members = self.model.member_logits(x, z)  #                            (B, E S, K)
            logits = self.view(members.unflatten(1, (draws, -1)).flatten(0, 1))  # (B E, K)
        else:
            logits = self.model(x.repeat_interleave(draws, dim=0)).to(x.dtype)
        self.count["nonfinite_logits"] += (~logits.isfinite()).any(1).sum().item()
        return logits.unflatten(0, (len(x), draws))

    def parts(self, pictures: int, draws: int):
        """(rows, draws, z columns) that together are all draws of all pictures, each within the limit."""
        step = max(1, min(draws, self.limit // self.samples))
        rows = max(1, self.limit // (step * self.samples))
        for first in range(0, pictures, rows):
            for done in range(0, draws, step):
                stop = min(done + step, draws)
                yield slice(first, first + rows), stop - done, slice(done * self.samples, stop * self.samples)

    def _watch(self, gradient: torch.Tensor) -> None:
        flat = gradient.flatten(1)
        self.count["gradients"] += len(flat)
        self.count["nonfinite"] += (~flat.isfinite()).any(1).sum().item()
        self.count["zero"] += (flat == 0).all(1).sum().item()


def margin_to(wanted: torch.Tensor):
    """A targeted loss: how far the logit of class `wanted` (B,) is above that of the true class, for B or B E
    logits."""

    def loss(logits, y):
        aim = wanted.repeat_interleave(len(y) // len(wanted))
        return (logits.gather(1, aim[:, None]) - logits.gather(1, y[:, None])).squeeze(1)

    return loss


def climb(target: Target, y: torch.Tensor, loss, draws: int, z: torch.Tensor | None = None):
    """An attack's objective (see attacks.py) with EoT in one batch: the mean loss over `draws` evaluations, for CARSO
    with one classifier pass and one backward for all of them. loss: a name in LOSSES, or (B,) the
    classes that a targeted attack wants."""

    def losses_and_gradient(x):
        noise = target.draw(x, draws) if z is None else z
        losses, gradient = torch.zeros(len(x), device=x.device, dtype=x.dtype), torch.zeros_like(x)
        for rows, n, columns in target.parts(len(x), draws):
            with torch.enable_grad():
                part = x[rows].detach().requires_grad_()
                logits = target.draws(part, n, None if noise is None else noise[rows, columns])  # (b, n, K)
                function = loss_of(loss, rows)
                values = (
                    function(logits.flatten(0, 1), y[rows].repeat_interleave(n)).unflatten(0, (-1, n)).sum(1) / draws
                )
                if values.requires_grad:  # else nothing flows back, and the gradient is zero
                    gradient[rows] += torch.autograd.grad(values.sum(), part)[0]
                else:
                    target._watch(torch.zeros_like(part))
            losses[rows] += values.detach()
        return losses, gradient

    def loss_of(loss, rows):
        return LOSSES[loss] if isinstance(loss, str) else margin_to(loss[rows])

    return losses_and_gradient


# ---------------------------------------------------------------------------------------------------- controls


def without_condition(carso: nn.Module) -> nn.Module:
    """The decoder is told nothing about the picture: what is left is not the purifier's doing."""
    carso.purifier.condition_head.register_forward_hook(lambda module, inputs, condition: torch.zeros_like(condition))
    return carso


def with_fixed_z(carso: nn.Module) -> nn.Module:
    """S latent codes drawn once and for all: a deterministic defence."""
    shape = (carso.samples, carso.purifier.config["latent_dim"])
    codes = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def draw(x, samples):
        return codes.to(x).repeat(-(-samples // len(codes)), 1)[:samples].expand(len(x), -1, -1)

    carso.draw = draw
    return carso


CONTROLS = {
    "classifier": lambda carso: carso.classifier,
    "zero-condition": without_condition,
    "fixed-z": with_fixed_z,
}

# ---------------------------------------------------------------------------------------------------- the attacks

# Each: (target, x, y, eps, budget) -> candidates (N, B, C, H, W) in the ball and in [0, 1], and `during` (B,), whether
# the picture survived by the attack's own count. Random numbers come from torch's global generator and the target's
# own.


@torch.no_grad()
def survives(target, candidates, y) -> torch.Tensor:
    """One draw of each candidate: is the picture still classified correctly under all of them? (B,)"""
    return torch.stack([target(x).argmax(1) == y for x in candidates]).all(0)


def random_start(x, eps):
    return project(x + eps * torch.empty_like(x).uniform_(-1, 1), x, eps)


def no_attack(target, x, y, eps, b):
    return x[None], survives(target, x[None], y)


def uniform_noise(target, x, y, eps, b):
    """The control: what an attack that ignores the model achieves."""
    candidates = random_start(x, eps)[None]
    return candidates, survives(target, candidates, y)


def pgd_eot(target, x, y, eps, b):
    """PGD with EoT (paper, table 12), from a random start."""
    objective = climb(target, y, "ce", b.eot)
    candidates = ascend(objective, x, random_start(x, eps), eps, b.pgd_steps, b.pgd_step_size)[None]
    return candidates, survives(target, candidates, y)


# What our APGD climbs: the decision through several outputs, since a loss can be flat through one and steep through
# another.
OBJECTIVES = (("logsumexp", "ce"), ("logsumexp", "dlr"), ("sum-exp", "dlr"), ("mean-logit", "ce"))


def apgd_ce(target, x, y, eps, b):
    """One run of our APGD on cross-entropy through the chosen view: what the sweeps repeat."""
    best, _ = apgd(climb(target, y, "ce", b.eot), x, eps, b.steps, random_start(x, eps))
    return best[None], survives(target, best[None], y)


def apgd_all(target, x, y, eps, b):
    """Our APGD on every objective (those with members, or just CE and DLR), then aimed at the likeliest wrong
    classes."""
    objectives = OBJECTIVES if target.has_members else (("", "ce"), ("", "dlr"))
    candidates = []
    for view, loss in objectives:
        seen = target.seen_through(VIEWS.get(view, target.view))
        candidates.append(apgd(climb(seen, y, loss, b.eot), x, eps, b.steps, random_start(x, eps))[0])
    with torch.no_grad():
        likeliest = target(x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    for wanted in likeliest.T[: min(b.targets, likeliest.shape[1] - 1)]:
        candidates.append(apgd(climb(target, y, wanted, b.eot), x, eps, b.steps, random_start(x, eps))[0])
    candidates = torch.stack(candidates)
    return candidates, survives(target, candidates, y)


def fixed_noise(target, x, y, eps, b):
    """The same latent draws at every step: a deterministic model, attacked by APGD without EoT."""
    z = target.draw(x)
    best, _ = apgd(climb(target, y, "ce", 1, z), x, eps, b.steps, random_start(x, eps))
    return best[None], survives(target, best[None], y)


def transfer(target, x, y, eps, b):
    """Adversarial pictures of the bare classifier."""
    source = Target(target.model.classifier, limit=target.limit)
    source.count = target.count
    candidates = [apgd(climb(source, y, loss, 1), x, eps, b.steps, random_start(x, eps))[0] for loss in LOSSES]
    candidates = torch.stack(candidates)
    return candidates, survives(target, candidates, y)


def square(target, x, y, eps, b):
    """AutoAttack's Square, black box, on the answer averaged over the draws: S x EoT members a query."""
    from pyautoattack.square import SquareAttack

    averaged = Target(target.model, target.view, target.samples * b.eot, target.limit)
    averaged.count = target.count
    seed = torch.initial_seed() % 2**31
    search = SquareAttack(
        averaged, n_queries=b.queries, eps=eps, norm="Linf", seed=seed, device=x.device, verbose=False
    )
    candidates = project(search.perturb(x, y), x, eps)[None].detach()
    return candidates, survives(target, candidates, y)


def autoattack(version: str):
    """AutoAttack (Croce and Hein 2020), `standard` or `rand`, with this budget's steps, draws, queries and targets."""

    def attack(target, x, y, eps, b: Budget):
        from pyautoattack import AutoAttack
        from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
        from pyautoattack.fab_pt import FABAttack_PT

        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        seed, classes = torch.initial_seed() % 2**31, target(x[:1]).shape[1]
        settings = dict(eps=eps, norm="Linf", seed=seed, device=x.device)
        suite = AutoAttack(target, version=version, **settings)
        draws = b.eot if version == "rand" else 1
        # Built anew: changing n_iter afterwards would leave their schedules at 100 steps.
        targets = min(b.targets, classes - 1)
        quiet = dict(verbose=False, logger=suite.logger)
        suite.apgd = APGDAttack(target, n_restarts=1, n_iter=b.steps, eot_iter=draws, rho=0.75, **quiet, **settings)
        suite.apgd_targeted = APGDAttack_targeted(
            target, n_restarts=1, n_iter=b.steps, n_target_classes=targets, eot_iter=1, rho=0.75, **quiet, **settings
        )
        suite.fab = FABAttack_PT(
            target, n_restarts=1, n_iter=b.steps, n_target_classes=targets, verbose=False, **settings
        )
        suite.square.n_queries = b.queries
        if classes <= 3:  # APGD-T, FAB-T and DLR need more classes than that
            suite.attacks_to_run = ["apgd-ce"] if version == "rand" else ["apgd-ce", "fab", "square"]
            suite.fab.n_target_classes = classes - 1
        adversarial, answer = suite.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))
        return project(adversarial, x, eps)[None].detach(), answer == y

    return attack


@dataclass(frozen=True)
class Attack:
    run: callable
    on: str = "defence"  #         or "classifier", the bare one
    eps: float | None = None  #    instead of the evaluation's: a sanity check, not counted in the headline
    needs: str | None = None  #    an attribute of the model without which the attack is skipped


ATTACKS = {
    "clean": Attack(no_attack),
    "noise": Attack(uniform_noise),
    "standard": Attack(autoattack("standard"), on="classifier"),
    "rand": Attack(autoattack("rand")),
    "pgd-eot": Attack(pgd_eot),
    "apgd": Attack(apgd_all),
    "apgd-ce": Attack(apgd_ce),
    "fixed-noise": Attack(fixed_noise, needs="member_logits"),
    "transfer": Attack(transfer, needs="classifier"),
    "square": Attack(square),
    "rand-0.95": Attack(autoattack("rand"), eps=0.95),
    "noise-0.95": Attack(uniform_noise, eps=0.95),
}
GROUPS = {
    "paper": ["standard", "rand", "pgd-eot", "rand-0.95", "noise-0.95"],
    "all": ["standard", "rand", "pgd-eot", "apgd", "fixed-noise", "transfer", "square"],
}


# ------------------------------------------------------------------------------------------------- units of work


def seed_for(*what) -> int:
    """Random numbers follow from what is done, never from the order or the place in which it is done."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=4).digest(), "little")


def reseed(seed: int, model: nn.Module) -> None:
    torch.manual_seed(seed)
    if hasattr(model, "manual_seed"):
        model.manual_seed(seed)


class Evaluation:
    """One model under one configuration, and the folder that holds its units of work."""

    def __init__(
        self, model: nn.Module, images, labels, config: dict, budget: Budget, folder: Path, device, limit: int
    ):
        self.defence, self.images, self.labels = model, images, labels
        self.config, self.budget, self.folder, self.device, self.limit = config, budget, folder, device, limit
        self.eps, self.samples, self.view = config["eps"], config["samples"], VIEWS[config["view"]]
        self.judge = None  # a second classifier, which looks at the reconstructions; see report.py
        self.attacks, self.decide = ATTACKS, AGGREGATIONS[config["aggregation"]][0]
        self.starts = range(0, len(labels), budget.chunk)

    def pictures(self, start: int):
        rows = slice(start, start + self.budget.chunk)
        return datasets.pixels(self.images[rows].to(self.device)), self.labels[rows].to(self.device)

    def file(self, kind: str, start: int) -> Path:
        return self.folder / "work" / f"{kind}-{start:06d}.npz"

    def target(self, name: str, view) -> Target:
        bare = ATTACKS[name].on == "classifier"
        model = getattr(self.defence, "classifier", self.defence) if bare else self.defence
        return Target(model, view, self.samples, self.limit)

    def radius(self, name: str) -> float:
        return self.eps if ATTACKS[name].eps is None else ATTACKS[name].eps

    def search_precision(self):
        """What attacks run in: bfloat16 inside the networks, float32 for logits and losses; scores are never in it."""
        reduced = self.config.get("search_precision") == "bf16"
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=reduced)

    def patiently(self, work):
        """work(), again with half as many pictures at a time whenever the device's memory is full. The random numbers,
        and so the results, do not depend on it."""
        while True:
            try:
                return work()
            except torch.cuda.OutOfMemoryError:
                if self.limit <= 16:
                    print("evaluate.py: out of memory even so; choose a smaller --chunk", file=sys.stderr)
                    sys.exit(2)
            torch.cuda.empty_cache()
            self.limit //= 2
            print(f"out of memory: going on with {self.limit} pictures at a time", flush=True)

    def one_call(self, x, y, gradient: bool, classifier: bool, draws: int) -> torch.Tensor:
        """What an attack does again and again; for the plan. Returns the gradient, or the logits (B, E, K)."""
        model = self.defence.classifier if classifier else self.defence
        target = Target(model, self.view, self.samples, self.limit)
        if gradient:
            with self.search_precision():
                return climb(target, y, "ce", draws)(x)[1]
        with torch.no_grad():
            return target.draws(x, draws, target.draw(x, draws))

    def attack(self, name: str, start: int) -> None:
        """Search: adversarial candidates of one chunk by one attack."""
        x, y = self.pictures(start)
        reseed(seed_for("attack", name, start, self.config["seed"]), self.defence)
        target, began = self.target(name, self.view), time.monotonic()
        with self.search_precision():
            candidates, during = ATTACKS[name].run(target, x, y, self.radius(name), self.budget)
        write_npz(
            self.file(name, start),
            candidates=candidates.cpu().numpy(),
            during=during.cpu().numpy(),
            seconds=time.monotonic() - began,
            **target.count,
        )

    @torch.no_grad()
    def score(self, name: str, start: int) -> None:
        """Choose each picture's worst candidate on one set of draws, then score it on new ones."""
        x, y = self.pictures(start)
        with np.load(self.file(name, start)) as file:
            candidates = torch.from_numpy(file["candidates"]).to(self.device)
        inside = (candidates - x).abs().max() <= self.radius(name) + 1e-5 or name == "clean"
        if not (inside and candidates.min() >= 0 and candidates.max() <= 1):
            raise RuntimeError(f"attack {name} left the eps-ball or [0, 1]; this is a bug in the attack")
        reseed(seed_for("score", name, start, self.config["seed"]), self.defence)
        target = self.target(name, self.decide)
        select = torch.stack([hits(target, c, y, self.budget.select).float().mean(1) for c in candidates])  # (N, B)
        chosen = select.argmin(0)
        worst = candidates[chosen, torch.arange(len(y), device=chosen.device)]
        write_npz(
            self.file(f"score-{name}", start),
            worst=worst.cpu().numpy(),
            hits=hits(target, worst, y, self.budget.draws).cpu().numpy(),
            select=select.min(0).values.cpu().numpy(),
        )

    def run(self, names: list[str], rank: int, ranks: int) -> None:
        """Every unit that has no file yet and is this process's turn."""
        units = [(start, name) for start in self.starts for name in names]
        mine = [u for i, u in enumerate(units) if i % ranks == rank and not self.file(f"score-{u[1]}", u[0]).is_file()]
        bar = tqdm(mine, "evaluating", disable=None if rank == 0 else True)
        began = time.monotonic()
        for done, (start, name) in enumerate(bar):
            bar.set_postfix_str(f"{name}, pictures from {start}")
            if not self.file(name, start).is_file():
                self.patiently(lambda name=name, start=start: self.attack(name, start))
            self.patiently(lambda name=name, start=start: self.score(name, start))
            if rank == 0:
                with np.load(self.file(f"score-{name}", start)) as file:
                    right, pictures = file["hits"].mean(), len(file["hits"])
                seconds = time.monotonic() - began
                left = seconds / (done + 1) * (len(mine) - done - 1)
                tqdm.write(
                    f"{name:>12}  pictures {start}-{start + pictures - 1}  right {right:6.1%}  {left:6.0f} s left"
                )


def hits(target: Target, x: torch.Tensor, y: torch.Tensor, draws: int) -> torch.Tensor:
    """Is each of `draws` independent answers correct? (B, E)"""
    z = target.draw(x, draws)
    right = torch.zeros(len(x), draws, dtype=torch.bool, device=x.device)
    for rows, n, columns in target.parts(len(x), draws):
        first = columns.start // target.samples
        answers = target.draws(x[rows], n, None if z is None else z[rows, columns]).argmax(2)
        right[rows, first : first + n] = answers == y[rows, None]
    return right


def write_npz(path: Path, **arrays) -> None:
    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)

    write_atomically(path, write)


# --------------------------------------------------------------------------------------------------------- the audit


def audit(e: Evaluation, count: int = 8, draws: int = 10) -> dict:
    """Before any attack: do the gradients that an attack would follow exist, and are they the derivative?

    On the first pictures, through the view that the attacks see (and, for a defence with members, our APGD's others):
    finite logits; for each single draw a gradient that is finite and not exactly zero (of pictures that this draw
    classifies correctly: DLR is rightly flat elsewhere); in float64 the same decisions, gradients that point the same
    way, and a directional derivative that agrees with finite differences, which a detached part or a made-up gradient
    fails.
    """
    x, y = e.pictures(0)
    x, y = x[:count], y[:count]
    members = hasattr(e.defence, "member_logits")
    views = {(e.config["view"], loss) for loss in LOSSES} | (set(OBJECTIVES) if members else set())
    rows, messages = [], []
    for view, loss in sorted(views):
        if view == "sum-exp" and loss == "ce":
            continue  # a saturated softmax: no attack of ours uses it
        reseed(seed_for("audit", view, loss, e.config["seed"]), e.defence)
        target = Target(e.defence, VIEWS[view], e.samples, e.limit)
        row = {"view": view if members else "output", "loss": loss} | gradient_shares(target, x, y, loss, draws)
        row |= against_float64(target, x, y, loss)
        name = f"{loss.upper()} through {row['view']}"
        if row["nonfinite_logits"] > 0:
            messages.append(f"{name}: {row['nonfinite_logits']:.1%} of the outputs are not finite")
        if row["nonfinite"] > 0:
            messages.append(
                f"{name}: {row['nonfinite']:.1%} of the gradients are not finite, so an attack does not move"
            )
        if row["zero"] > 0:
            messages.append(f"{name}: {row['zero']:.1%} of the gradients are exactly zero, so an attack does not move")
        if row["same_decision"] is not None and row["same_decision"] < 1:
            messages.append(f"{name}: only {row['same_decision']:.1%} of the decisions are the same in float64")
        if row["cosine"] is not None and not row["cosine"] > 0.99:
            messages.append(f"{name}: gradients in float32 and float64 differ (cosine {row['cosine']:.3f})")
        if row["derivative"] is not None and not abs(row["derivative"] - 1) < 0.02:
            messages.append(
                f"{name}: the gradient is not the derivative of the loss (finite differences give "
                f"{row['derivative']:.3g} of what it claims); something in the path is detached or made up"
            )
        rows.append(row)
    return {"passed": not messages, "messages": messages, "rows": rows}


def gradient_shares(target: Target, x, y, loss: str, draws: int) -> dict:
    """Shares over pictures and single draws: not finite logits, not finite gradients, gradients of exactly zero."""
    counts = dict.fromkeys(("nonfinite_logits", "nonfinite", "zero"), 0.0)
    considered = 0
    for _ in range(draws):
        lead = x.clone().requires_grad_()
        logits = target(lead)
        values = LOSSES[loss](logits, y)
        gradient = torch.autograd.grad(values.sum(), lead)[0] if values.requires_grad else torch.zeros_like(x)
        right = logits.argmax(1) == y
        flat = gradient.flatten(1)
        counts["nonfinite_logits"] += (~logits.isfinite()).any(1).sum().item() / (len(x) * draws)
        counts["nonfinite"] += (~flat.isfinite()).any(1).sum().item() / (len(x) * draws)
        counts["zero"] += ((flat == 0).all(1) & right).sum().item()
        considered += right.sum().item()
    counts["zero"] /= max(considered, 1)
    return counts


def against_float64(target: Target, x, y, loss: str) -> dict:
    """The same draw in float64: share of equal decisions, smallest cosine of the gradients over the pictures, and the
    median over the pictures of (finite difference along the gradient) / (what the gradient claims). None where a model
    draws noise of its own, which cannot be held fixed across the two, or where there is no gradient."""
    double = Target(copy.deepcopy(target.model).double(), target.view, target.samples, target.limit)
    z = target.draw(x)
    seed = torch.initial_seed()

    def losses(which, pictures, noise):
        torch.manual_seed(seed)  # for a model that draws from the global generator
        logits = which.draws(pictures, 1, noise)[:, 0]
        return logits, LOSSES[loss](logits, y)

    def gradient(which, pictures, noise):
        lead = pictures.clone().requires_grad_()
        logits, values = losses(which, lead, noise)
        g = torch.autograd.grad(values.sum(), lead)[0] if values.requires_grad else torch.zeros_like(lead)
        return logits.detach().double(), g.double().flatten(1)

    z64 = None if z is None else z.double()
    logits32, g32 = gradient(target, x, z)
    logits64, g64 = gradient(double, x.double(), z64)
    norm = g64.norm(dim=1)
    usable = norm.isfinite() & (norm > 0) & g32.isfinite().all(1)
    result = {"same_decision": None, "cosine": None, "derivative": None}
    stochastic = z is None and not torch.equal(target(x), target(x))
    if not stochastic:
        result["same_decision"] = (logits32.argmax(1) == logits64.argmax(1)).double().mean().item()
    if usable.any():
        if not stochastic:
            result["cosine"] = F.cosine_similarity(g32, g64).masked_select(usable).median().item()
        h = 1e-5  # along a direction of length 1
        direction = (g64 / norm.clamp(min=1e-300)[:, None]).nan_to_num().view_as(x)
        with torch.no_grad():
            up, down = (losses(double, x.double() + sign * h * direction, z64)[1] for sign in (1, -1))
        result["derivative"] = ((up - down) / (2 * h) / norm)[usable].median().item()
    return result


# ------------------------------------------------------------------------------------------------------ command line


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--ckpt", help="a carso.pt that train.py wrote; or, with --dataset, a file of a classifier's weights"
    )
    what.add_argument("--published", metavar="DIR", help="a folder with the CARSO authors' four safetensors files")
    what.add_argument(
        "--model", metavar="FILE.py:FUNCTION", help="a function without arguments that returns an nn.Module"
    )
    names = f"any of {', '.join(ATTACKS)}; paper: its whole protocol; all: the union (default: standard rand)"
    parser.add_argument(
        "--attack", nargs="+", default=["standard", "rand"], choices=[*ATTACKS, *GROUPS], metavar="NAME", help=names
    )
    parser.add_argument("--eps", type=parse_number, help="radius in pixels, such as 8/255 (default: the training's)")
    parser.add_argument("--samples", type=int, help="S, reconstructions a picture (default: the checkpoint's)")
    parser.add_argument("--own-answer", type=parse_number, metavar="SHARE", help="of the classifier's answer to "
                        "the picture in a member (default: the checkpoint's; 0: only reconstructions)")  # fmt: skip
    parser.add_argument(
        "--control", choices=CONTROLS, help="with --ckpt: a part of the defence, or one with a part cut"
    )
    parser.add_argument("--judge", metavar="FILE", help="a second classifier's weights: does it recognise the members?")
    parser.add_argument("--aggregation", choices=AGGREGATIONS, default="robust", help="the decision (default: robust)")
    parser.add_argument("--view", choices=VIEWS, help="what attacks see (default: the decision's own)")
    parser.add_argument("--search-precision", choices=["fp32", "bf16"], default="fp32", help="of attacks (bf16: for "
                        "GPUs, and CPUs with its instructions); audit and scores are float32 always")  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="only print passes, FLOP and hours of the chosen attacks")
    parser.add_argument("--sweep", choices=SWEEPS, help="repeat one attack over a range of this, with a plot")
    parser.add_argument("--budget", choices=BUDGETS, help="default: reduced for digits, paper for the rest")
    parser.add_argument("--dataset", help="default: the one it was trained on")
    parser.add_argument("--data-dir", help="default: as in training")
    parser.add_argument("--out", type=Path, help="folder (default: beside the checkpoint, named after the settings)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=1024, help="pictures at a time, for memory (default: 1024)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group = parser.add_argument_group("budget", "any number of the budget can be overridden")
    for field in dataclasses.fields(Budget):
        kind = parse_number if field.type is float else int
        names = ["--" + field.name.replace("_", "-")]
        if field.name == "n":
            names.insert(0, "--pictures")  # torchrun takes --n for an abbreviation of its own options
        group.add_argument(*names, dest=field.name, type=kind, metavar=field.type.__name__)
    return parser.parse_args(argv)


def load_defence(args) -> tuple[nn.Module, dict]:
    """--ckpt: CARSO, one of its controls, or a file that holds just a classifier."""
    content = read_tensors(args.ckpt)
    if args.dataset is not None and isinstance(content, dict) and "format" not in content and args.control is None:
        classes = len(datasets.load(args.dataset, args.data_dir or "data").classes)
        return load_published_classifier(args.ckpt, classes).to(args.device), {}
    model, state = load_checkpoint(args.ckpt, args.device)
    return CONTROLS[args.control](model) if args.control else model, state


def load_model(args) -> tuple[nn.Module, dict, Path]:
    """The defence, what its checkpoint says of its training, and the file it came from."""
    if args.ckpt:
        return *load_defence(args), Path(args.ckpt)
    if args.published:
        if args.dataset is None:
            raise ValueError("--published needs --dataset: cifar10, cifar100 or tinyimagenet")
        data = datasets.load(args.dataset, args.data_dir or "data")
        model = load_published(args.published, len(data.classes), tuple(data.test_images.shape[1:]))
        return model.to(args.device), {}, next(Path(args.published).glob("*decoder.safetensors"))
    file, _, function = args.model.partition(":")
    if not Path(file).is_file() or not function:
        raise ValueError(f"--model wants FILE.py:FUNCTION, and there is no file {file}" if function else
                         f"--model wants FILE.py:FUNCTION, not {args.model}")  # fmt: skip
    if args.dataset is None:
        raise ValueError("--model needs --dataset: its own does not stand in a checkpoint")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(file).resolve().parent))
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ValueError(f"{file} has no function {function}")
    return getattr(module, function)().eval().to(args.device), {}, Path(file)


def prepare(args) -> tuple[Evaluation, list[str], list[str]]:
    """Everything that can be refused is refused here, with ValueError or OSError."""
    if args.control and not args.ckpt:
        raise ValueError("--control needs --ckpt")
    model, state, source = load_model(args)
    name = args.dataset or state["dataset"]
    data = datasets.load(name, args.data_dir or state.get("data_dir", "data"))
    if hasattr(model, "purifier"):
        model.check_fits(source, name, data.test_images.shape[1:], len(data.classes))
    judge = None
    if args.judge:
        if not hasattr(model, "purify"):
            raise ValueError("--judge looks at reconstructions, and this model makes none")
        judge = load_published_classifier(args.judge, len(data.classes)).to(args.device)
    budget = BUDGETS[args.budget or ("reduced" if name == "digits" else "paper")]
    overrides = {f.name: getattr(args, f.name) for f in dataclasses.fields(Budget)}
    budget = dataclasses.replace(budget, **{k: v for k, v in overrides.items() if v is not None})
    budget = dataclasses.replace(budget, n=min(budget.n, len(data.test_labels)))
    if min(dataclasses.asdict(budget).values()) <= 0 or args.limit < 1:
        raise ValueError("every number of the budget, and --limit, must be positive")
    eps = args.eps if args.eps is not None else state.get("config", {}).get("eps", 8 / 255)
    if not 0 <= eps <= 1:
        raise ValueError(f"--eps {eps:g} is not a distance between pixels in [0, 1]; write 8/255, say")
    if args.own_answer is not None:
        if not hasattr(model, "own_answer") or not 0 <= args.own_answer < 1:
            raise ValueError("--own-answer is for a CARSO, a share of at least 0 and less than 1")
        model.own_answer = args.own_answer
    samples = getattr(model, "samples", 1) if args.samples is None else args.samples
    if samples < 1:
        raise ValueError("--samples must be 1 or more")
    asked = [n for a in args.attack for n in GROUPS.get(a, [a])]
    names = [n for n in ATTACKS if n in ("clean", "noise", *asked)]
    skipped = [n for n in names if ATTACKS[n].needs and not hasattr(model, ATTACKS[n].needs)]
    names = [n for n in names if n not in skipped]
    skipped = [f"{n} (the model has no {ATTACKS[n].needs})" for n in skipped]
    config = {
        "checkpoint": str(args.ckpt or args.published or args.model),
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "dataset": name,
        "eps": eps,
        "samples": samples,
        "aggregation": args.aggregation,
        "view": args.view or AGGREGATIONS[args.aggregation][1],
        "control": args.control,
        "own_answer": getattr(model, "own_answer", None),
        "judge": args.judge,
        "seed": args.seed,
        "search_precision": args.search_precision,
        **dataclasses.asdict(budget),
    }
    folder = args.out or source.parent / (
        f"eval-eps{report.eps_text(eps).replace('/', '_')}-S{samples}-n{budget.n}-steps{budget.steps}-eot{budget.eot}-"
        + hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=3).hexdigest()
    )
    if not args.plan:
        check_config(folder / "config.json", config, "--out")
    images, labels = data.test_images[: budget.n], data.test_labels[: budget.n]
    e = Evaluation(model, images, labels, config, budget, folder, args.device, args.limit)
    e.judge = judge
    return e, names, skipped


# ------------------------------------------------------------------------------------------------------------ sweeps

SWEEPS = {
    "eps": [v / 255 for v in (0, 2, 4, 8, 16, 32, 64, 128)],
    "steps": [1, 5, 10, 20, 50, 100, 200],
    "eot": [1, 5, 20, 100],
    "samples": [1, 2, 4, 8, 16, 32],
}


def at(e: Evaluation, what: str, value) -> Evaluation:
    """The same evaluation with one number changed, in a folder of its own inside."""
    text = report.eps_text(value).replace("/", "_") if what == "eps" else str(value)
    budget = dataclasses.replace(e.budget, **{what: value}) if what in ("steps", "eot") else e.budget
    folder = e.folder / f"sweep-{what}" / text
    return Evaluation(e.defence, e.images, e.labels, e.config | {what: value}, budget, folder, e.device, e.limit)


def sweep(e: Evaluation, what: str, rank: int, ranks: int) -> None:
    """sweep-WHAT.tsv: accuracy under our APGD on cross-entropy (and under noise) at every value of the sweep."""
    names, rows = ["clean", "noise", "apgd-ce"], []
    for value in SWEEPS[what]:
        point = at(e, what, value)
        point.run(names, rank, ranks)
        if rank == 0:
            wait(point, names)
            table = report.gather(point, names)
            rows.append([value, *(float(table[name]["hits"].mean()) for name in names)])
            print(
                f"{what} {value:g}: clean {rows[-1][1]:.1%}, noise {rows[-1][2]:.1%}, attacked {rows[-1][3]:.1%}",
                flush=True,
            )
    if rank == 0:
        lines = ["\t".join([what, *names, "n"])]
        lines += ["\t".join([f"{row[0]:.6g}", *(f"{v:.4f}" for v in row[1:]), str(len(e.labels))]) for row in rows]
        report.write_text(e.folder / f"sweep-{what}.tsv", "\n".join(lines) + "\n")
        values, _, noise, attacked = zip(*rows)
        signs = report.signs_in_sweep(what, values, attacked, noise)
        report.write_text(e.folder / f"sweep-{what}.txt", "\n".join(signs or ["no sign of masked gradients"]) + "\n")
        print("\n".join(signs or ["no sign of masked gradients"]))
        subprocess.run([sys.executable, Path(__file__).parent / "plot.py", e.folder], check=False)


def wait(e: Evaluation, names: list[str]) -> None:
    """Until the other processes have finished their last chunks."""
    while not all(e.file(f"score-{name}", start).is_file() for name in names for start in e.starts):
        time.sleep(0.5)


def main() -> int:
    args = parse_arguments()
    keep_freed_memory()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        e, names, skipped = prepare(args)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    if args.plan:
        print(plan.text(e.patiently(lambda: plan.plan(e, names, e.one_call)), e))
        return 0
    try:
        audited = e.patiently(lambda: audit(e)) if rank == 0 else None
        for message in audited["messages"] if audited else ():
            print(f"audit: {message}", file=sys.stderr, flush=True)
        if args.sweep:
            sweep(e, args.sweep, rank, ranks)
            return 0 if rank or audited["passed"] else 3
        e.run(names, rank, ranks)
        if rank > 0:
            return 0
        wait(e, names)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last finished chunk", file=sys.stderr)
        return 130
    result = report.write(e, names, audited, skipped)
    print((e.folder / "report.md").read_text())
    print(f"written to {e.folder}")
    return 0 if result["audit"]["passed"] else 3


if __name__ == "__main__":
    sys.exit(main())
