"""Attack a trained CARSO end to end, score every adversarial picture on fresh draws, and report the worst.

    python evaluate.py --ckpt runs/digits/carso.pt                              # AutoAttack, as in the paper
    python evaluate.py --ckpt runs/digits/carso.pt --attack rand pgd-eot        # the worst of both counts
    python evaluate.py --ckpt runs/digits/carso.pt --view naive-odds            # the reference's output: audit fails
    python evaluate.py --ckpt runs/digits/carso.pt --attack rand --eps 0.95     # the paper's sanity check, table 3
    python evaluate.py --published cifar10                                      # the authors' released defence, fetched
    torchrun --nproc_per_node=8 evaluate.py --ckpt runs/cifar10/carso.pt

A chunk of pictures is the unit of work. On each chunk the attacks run in order, each on the pictures that still stand.
`select` draws of the noise choose each picture's worst candidate, and fresh draws score it. Each finished (attack,
chunk) is a file, and a file that exists is never made again. Process r of n takes chunks r, r + n, ... A killed
evaluation goes on under the same command, with any number of processes. Whoever finishes last writes the report.

The audit looks at every picture, where the attacks begin and where they ended: do the gradients exist, and are they the
derivative? If not, the exit status is 3 (torchrun makes it 1) and the report says why.

Shapes: B pictures, N candidates (adversarial versions of a picture), E draws, S members, K classes, Z latent.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import logging
import math
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import aggregate
import data as datasets
from attacks import LOSSES, ascend, format_eps, objective, parse_eps, project, random_point
from models import (
    PUBLISHED,
    WideResNet,
    check_clean_accuracy,
    hash_weights,
    load_classifier,
    read_ranks,
    run_script,
    start_device,
)
from purifier import fetch_published, is_carso, load_carso, load_published

# ---------------------------------------------------------------------------------------------------------- budgets


# How much work an evaluation is: "paper", its protocol (section 5.1, table 12), and "reduced", ours, two minutes on two
# CPU cores: enough to see a defence break, too little to prove that one holds.
NUMBERS = {  # name: paper, reduced, meaning
    "pictures": (10_000, 100, "of the test set, the first ones"),
    "steps": (100, 10, "of APGD"),
    "eot": (20, 4, "draws averaged (by AutoAttack: summed) for a gradient"),
    "pgd_steps": (200, 20, "of PGD+EoT"),
    "pgd_step_size": (0.007, 0.02, "of PGD+EoT, in pixels"),
    "queries": (5000, 200, "of Square"),
    "targets": (9, 3, "classes that targeted attacks aim at"),
    "select": (60, 20, "draws that choose the worst candidate of a picture"),
    "draws": (20, 10, "fresh draws that score it"),
    "chunk": (128, 50, "pictures in a unit of work"),
}
BUDGETS = {name: {key: row[i] for key, row in NUMBERS.items()} for i, name in enumerate(("paper", "reduced"))}


def is_reduced(budget: dict) -> bool:
    """True if an attack works less, or a score rests on fewer draws, than in the paper's budget."""
    work = NUMBERS.keys() - {"pictures", "pgd_step_size", "chunk"}
    return any(budget[key] < BUDGETS["paper"][key] for key in work)


# ---------------------------------------------------------------------------------------------- decisions and views


def naive_log_odds(logits: torch.Tensor) -> torch.Tensor:
    """log(P / (1 - P)) through float32 probabilities, the reference code's output: here to show how it masks
    gradients."""
    P = aggregate.log_probabilities(logits).exp()
    return torch.log(P / (1 - P))


def sum_of_exponentials(logits: torch.Tensor) -> torch.Tensor:
    """sum_s exp(l), up to a factor for each picture (DLR does not see it) that keeps it finite."""
    return (logits - logits.amax(dim=(1, 2), keepdim=True)).exp().sum(dim=1)


# Views: the output that an attack sees, members' logits (B, S, K) to (B, K). The first three decide alike.
VIEWS = {
    "logsumexp": aggregate.robust_logits,
    "sum-exp": sum_of_exponentials,
    "naive-odds": naive_log_odds,
    "mean-logit": aggregate.mean_logits,
    "mean-probability": aggregate.mean_probabilities,
    "mean-sigmoid": aggregate.mean_sigmoids,
}
# Decisions (appendix D and the authors' code compare them), each with a view of its own that has gradients.
AGGREGATIONS = {
    "robust": (aggregate.robust_logits, "logsumexp"),
    "mean-logits": (aggregate.mean_logits, "mean-logit"),
    "mean-probabilities": (aggregate.mean_probabilities, "mean-probability"),
    "majority": (aggregate.majority_vote, "mean-probability"),
    "mean-sigmoids": (aggregate.mean_sigmoids, "mean-sigmoid"),
    "floored-ratios": (aggregate.floored_ratios, "mean-logit"),
}


# ---------------------------------------------------------------------------------- the defence as an attack sees it


class Seen(nn.Module):
    """A model behind one view: pictures -> logits (B, K), while counting passes and gradients that do not exist.

    model: CARSO, or any nn.Module from pictures to logits. view: members' logits (B, S, K) -> (B, K), ignored for a
    model without members. limit: at most so many pictures or reconstructions at a time, for memory."""

    def __init__(self, model: nn.Module, view=aggregate.robust_logits, samples: int = 1, limit: int = 1024):
        super().__init__()
        self.model, self.view, self.limit = model, view, limit
        self.has_members = hasattr(model, "member_logits")
        self.samples = max(1, samples) if self.has_members else 1
        self.count = dict.fromkeys(("pictures", "gradients", "nonfinite", "zero", "nonfinite_logits"), 0)

    def through(self, view=None, model: nn.Module | None = None, samples: int | None = None) -> "Seen":
        """The same, with another view, model or S, and the same counters."""
        other = Seen(model or self.model, view or self.view, samples or self.samples, self.limit)
        other.count = self.count
        return other

    def draw(self, x: torch.Tensor, draws: int) -> torch.Tensor | None:
        """Latent noise for so many evaluations of every picture, (B, E S, Z); None for a model without members."""
        return self.model.draw(x, draws * self.samples) if self.has_members else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer(x, 1, self.draw(x, 1))[:, 0]

    def answer(self, x: torch.Tensor, draws: int, z: torch.Tensor | None) -> torch.Tensor:
        """E evaluations of every picture, (B, E, K). A CARSO looks at the picture once for all of them; for a model
        without members each draw is a pass of its own."""
        self.count["pictures"] += len(x) * draws
        if x.requires_grad:
            x.register_hook(self._watch)
        if self.has_members:
            members = self.model.member_logits(x, z)  #                                   (B, E S, K)
            logits = self.view(members.unflatten(1, (draws, -1)).flatten(0, 1))  #        (B E, K)
            logits = logits.unflatten(0, (len(x), draws))
        else:
            passes = [torch.cat([self.model(part) for part in x.split(self.limit)]) for _ in range(draws)]
            logits = torch.stack(passes, 1)
            if x.dtype == torch.float64 and logits.dtype != torch.float64:
                raise TypeError(f"the model answers float64 in {logits.dtype}")
            logits = logits.to(x.dtype)
        self.count["nonfinite_logits"] += (~logits.detach().isfinite()).flatten(1).any(1).sum()
        return logits

    def parts(self, pictures: int, draws: int):
        """(rows, number of draws, their columns of z) that together are all draws of all pictures, each within the
        limit."""
        step = max(1, min(draws, self.limit // self.samples))
        rows = max(1, self.limit // (step * self.samples))
        for first in range(0, pictures, rows):
            for done in range(0, draws, step):
                stop = min(done + step, draws)
                yield slice(first, first + rows), stop - done, slice(done * self.samples, stop * self.samples)

    def _watch(self, gradient: torch.Tensor) -> None:
        flat = gradient.flatten(1)  # the counts stay on the device: reading one would wait for it
        self.count["gradients"] += len(flat)
        self.count["nonfinite"] += (~flat.isfinite()).any(1).sum()
        self.count["zero"] += (flat == 0).all(1).sum()


def climb(seen: Seen, y: torch.Tensor, loss="ce", draws: int = 1, z: torch.Tensor | None = None):
    """`attacks.objective` with all draws of EoT in one batch: for CARSO one classifier pass and one backward serve a
    step, as far as the limit allows. z: (B, E S, Z), to keep the noise fixed."""

    def losses_and_gradient(x):
        noise = seen.draw(x, draws) if z is None else z
        losses, gradient = torch.zeros(len(x), device=x.device, dtype=x.dtype), torch.zeros_like(x)
        for rows, some, columns in seen.parts(len(x), draws):
            part = None if noise is None else noise[rows, columns]
            values, slope = objective(lambda x, n=some, z=part: seen.answer(x, n, z), y[rows], loss)(x[rows])
            losses[rows] += values * (some / draws)
            gradient[rows] += slope * (some / draws)
        return losses, gradient

    return losses_and_gradient


@torch.no_grad()
def score(seen: Seen, x: torch.Tensor, y: torch.Tensor, draws: int, z: torch.Tensor | None = None) -> torch.Tensor:
    """Whether each of `draws` independent answers is right, (B, E) bool. z: (B, E S, Z), drawn when None."""
    z = seen.draw(x, draws) if z is None else z
    right = torch.zeros(len(x), draws, dtype=torch.bool, device=x.device)
    for rows, some, columns in seen.parts(len(x), draws):
        first = columns.start // seen.samples
        answers = seen.answer(x[rows], some, None if z is None else z[rows, columns]).argmax(2)
        right[rows, first : first + some] = answers == y[rows, None]
    return right


def seed_for(*what) -> int:
    """Random numbers follow from what is done, never from the order or the place in which it is done."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=4).digest(), "little")


def reseed(seed: int, model: nn.Module) -> None:
    torch.manual_seed(seed)
    if hasattr(model, "manual_seed"):
        model.manual_seed(seed)


# ------------------------------------------------------------------------------------- the paper's attacks, section 5.1


@dataclasses.dataclass(frozen=True)
class Attack:
    """run(seen, x, y, eps, budget) -> candidates (N, B, C, H, W) in the ball and in [0, 1]. One that equals x says that
    nothing was found. Random numbers come from torch's global generator and the model's own."""

    run: Callable
    on: str = "defence"  #         or "classifier", the bare one
    white_box: bool = True  #      follows gradients through the model that it is scored on
    eot: bool = True  #            averages over draws of the noise
    needs: str = "forward"  #      an attribute of the model without which the attack is skipped


def no_attack(seen, x, y, eps, budget):
    return x[None]


def uniform_noise(seen, x, y, eps, budget):
    """The control: the effect of an attack that ignores the model."""
    return random_point(x, eps)[None]


def pgd_eot(seen, x, y, eps, budget):
    """PGD with EoT (paper, table 12), from a random start."""
    steps, step_size = budget["pgd_steps"], budget["pgd_step_size"]
    return ascend(climb(seen, y, "ce", budget["eot"]), x, random_point(x, eps), eps, steps, step_size)[None]


def autoattack(version: str):
    """AutoAttack (Croce and Hein 2020), `standard` or `rand`, with this budget's steps, draws, queries and targets.

    Where nothing was flipped it returns the clean picture; of rand, which stops at one lucky draw, the points of the
    largest loss are candidates too."""

    def run(seen, x, y, eps, budget):
        from pyautoattack import AutoAttack
        from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
        from pyautoattack.fab_pt import FABAttack_PT

        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        with torch.no_grad():
            classes = seen(x[:1]).shape[1]
        settings = dict(eps=eps, norm="Linf", seed=torch.initial_seed() % 2**31, device=x.device)
        suite = AutoAttack(seen, version=version, **settings)
        draws, targets = budget["eot"] if version == "rand" else 1, min(budget["targets"], classes - 1)
        # Built anew: changing n_iter afterwards would leave their schedules at 100 steps.
        settings |= dict(n_restarts=1, n_iter=budget["steps"], verbose=False)
        pgd = settings | dict(rho=0.75, logger=suite.logger)
        suite.apgd = APGDAttack(seen, eot_iter=draws, **pgd)
        suite.apgd_targeted = APGDAttack_targeted(seen, n_target_classes=targets, eot_iter=1, **pgd)
        suite.fab = FABAttack_PT(seen, n_target_classes=targets, **settings)
        suite.square.n_queries = budget["queries"]
        suite.square.perturb = torch.no_grad()(suite.square.perturb)  # it would keep the graph of every query
        if classes <= 3:  # APGD-T, FAB-T and DLR need more classes than that
            suite.attacks_to_run = ["apgd-ce"] if version == "rand" else ["apgd-ce", "fab", "square"]
            suite.fab.n_target_classes = classes - 1
        points = remember_best(suite.apgd, x) if version == "rand" else []
        adversarial, _ = suite.run_standard_evaluation(x.contiguous(), y, batch_size=max(1, seen.limit // seen.samples))
        return project(torch.stack([adversarial.detach(), *points]), x, eps)

    return run


def remember_best(apgd, x: torch.Tensor) -> list[torch.Tensor]:
    """Makes AutoAttack's APGD append to the list that is returned, for each of its runs, the points of the largest
    loss, (B, C, H, W); x where a picture was not attacked."""
    points, single_run = [], apgd.attack_single_run

    def remembering(pictures, *args, **kwargs):
        result = single_run(pictures, *args, **kwargs)
        points.append(x.clone())
        for picture, point in zip(pictures, result[0].detach()):  # it attacks some of x, of which some may be alike
            points[-1][(x == picture).flatten(1).all(1)] = point
        return result

    apgd.attack_single_run = remembering
    return points


# In the order in which they run. The first two are controls: they count in the worst of all, but attack no model.
CONTROLS = ("clean", "noise")
ATTACKS = {
    "clean": Attack(no_attack, white_box=False, eot=False),
    "noise": Attack(uniform_noise, white_box=False, eot=False),
    "pgd-eot": Attack(pgd_eot),
    "rand": Attack(autoattack("rand")),
    "standard": Attack(autoattack("standard"), on="classifier", eot=False),
}


# -------------------------------------------------------------------------------------------------------- the audit


def audit(seen: Seen, double: Seen | None, x: torch.Tensor, y: torch.Tensor, notes: set, stride: float = 0.0) -> dict:
    """Whether the gradients that an attack follows exist at x (B, C, H, W), and whether they are the derivative.

    Returns fault -> which pictures have it, (B,) bool:
    - outputs or gradients that are not finite;
    - of a picture that this draw gets right, no loss with a gradient other than exactly zero, or with one large enough
      to be checked;
    - in float64 (`double`, a copy of the model), under the same noise, finite differences along the gradient or along
      three random directions that disagree with it;
    - in the attack's own precision, batch and grad mode, steps of length `stride` and less that do not change the mean
      loss by what the gradients predict, within a factor of two (stride 0 skips this).

    At the pictures themselves ReLUs stand on their kinks and maxima are tied: pass points beside them. `notes` takes
    sentences on what is unusual and no fault."""
    seed, z = torch.initial_seed(), seen.draw(x, 1)
    logits, _, gradients = evaluate_losses(seen, x, y, z, seed)
    right, answered = logits.argmax(1) == y, logits.isfinite().all(1)
    finite = torch.stack([gradient.flatten(1).isfinite().all(1) for gradient in gradients.values()]).all(0)
    usable = {loss: finite & (gradient != 0).flatten(1).any(1) for loss, gradient in gradients.items()}
    for loss in gradients:
        if (right & finite & ~usable[loss]).any():
            notes.add(f"{loss.upper()} is flat for some pictures, as a saturated loss is")

    sound, zero = finite & answered, ~torch.stack([*usable.values()]).any(0)
    wrong = smooth = small = torch.zeros_like(sound)
    verdicts = [True]
    if sound.any():
        wrong, smooth, small = check_derivative_in_float64(seen, double, x, y, z, seed, notes)
    if sound.any() and stride:
        verdicts = [check_steps(seen, x, y, z, seed, loss, usable[loss] & sound, stride) for loss in gradients]
    small = small | all(verdict is None for verdict in verdicts)
    return {
        "outputs that are not finite": ~answered,
        "gradients that are not finite": ~finite,
        "gradients of exactly zero": right & finite & zero,
        "gradients too small to be checked, as behind a saturated output": right & sound & ~zero & small,
        "gradients that are not the derivative: something is detached or made up": wrong & smooth & sound,
        "gradients where the function has steps, finer than its precision or straight through": wrong & ~smooth & sound,
        "losses that do not follow the gradient in the attack's own precision and batch": sound & (False in verdicts),
    }


def check_derivative_in_float64(seen: Seen, double: Seen | None, x, y, z, seed: int, notes: set):
    """`check_derivative` of the copy in float64; where there is none or it does not run, of the model itself: there the
    median picture speaks for all, and nothing is called smooth."""
    try:
        if double is None:
            raise TypeError("no copy in float64")
        wide = None if z is None else z[:, : double.samples].double()
        return check_derivative(double, x.double(), y, wide, seed, steps=(1e-5, 1e-6))
    except Exception as error:  # a float32 constant inside, say; a fault of ours would come again below
        notes.add(f"float64 could not be tried ({str(error).splitlines()[0]:.60}): float32 was, on the median picture")
    wrong, _, small = check_derivative(seen, x, y, z, seed, steps=(1e-2, 3e-3))
    of_median = lambda found: (found.float().mean() > 0.5).expand(len(x))  # noqa: E731
    return of_median(wrong), torch.zeros_like(wrong), of_median(small)


def evaluate_losses(seen: Seen, x: torch.Tensor, y: torch.Tensor, z, seed: int, backward: bool = True):
    """One evaluation of every picture under the noise that z or the seed fixes, with a graph: logits (B, K), and by the
    name of the loss its values (B,) and its gradients (B, C, H, W), zero where none exists."""
    reseed(seed, seen.model)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = seen.answer(x, 1, z)[:, 0]
        values = {name: loss(logits, y) for name, loss in LOSSES.items()}
        gradients = {name: torch.zeros_like(x) for name in values}
        if backward and logits.requires_grad:
            gradients = {name: torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for name, v in values.items()}
    return logits.detach(), {name: v.detach() for name, v in values.items()}, gradients


def measure_scales(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far each loss moves when the logits (B, K) move by their own size, (B,): the measure of rounding errors."""
    size, ordered = logits.abs().amax(1).clamp(min=1), logits.sort(1).values
    return {"ce": size, "dlr": size / (ordered[:, -1] - ordered[:, -3] + 1e-12) if logits.shape[1] > 3 else size}


def check_steps(seen: Seen, x: torch.Tensor, y: torch.Tensor, z, seed: int, loss: str, rows, stride: float):
    """Whether a step along the gradient's sign changes the mean loss of some pictures, `rows` (B,) bool, by what the
    gradients predict, within a factor of two: a step of length `stride`, or, of a loss of much curvature, a tenth or a
    hundredth of that. None where float32 cannot tell."""
    logits, values, gradients = evaluate_losses(seen, x, y, z, seed)
    gradient, scale, verdicts = gradients[loss].nan_to_num(), measure_scales(logits)[loss][rows].mean(), []
    for size in (stride, stride / 10, stride / 100):
        step = size * gradient.sign()
        predicted = (gradient * step).flatten(1).sum(1)[rows].mean()
        change = evaluate_losses(seen, x + step, y, z, seed, backward=False)[1][loss] - values[loss]
        if predicted > 1e-5 * scale:
            verdicts.append(bool(predicted / 2 < change[rows].mean() < 2 * predicted))
    return any(verdicts) if verdicts else None


@torch.no_grad()
def check_derivative(seen: Seen, x: torch.Tensor, y: torch.Tensor, z, seed: int, steps):
    """Whether a central difference contradicts a loss's gradient g: along g by more than half of |g|, or along a random
    direction by more than half of |g| / sqrt(pixels), and by more than the loss's digits can tell, at each of the step
    sizes (measured: nothing honest passes 0.14 of these units, nothing masked stays under 1). Whether differences that
    do so are steady, so that the function is smooth there. And whether every g is lost in the digits. All (B,) bool."""
    logits, _, gradients = evaluate_losses(seen, x, y, z, seed)
    digits = {name: 50 * torch.finfo(x.dtype).eps * scale for name, scale in measure_scales(logits).items()}
    norms = {name: gradient.flatten(1).norm(dim=1) for name, gradient in gradients.items()}
    small = torch.stack([norms[name] <= 2 * digits[name] / min(steps) for name in norms]).all(0)
    wrong, smooth = torch.zeros_like(small), torch.zeros_like(small)
    generator = torch.Generator().manual_seed(seed)
    randoms = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for _ in range(3)]
    directions = [(random, LOSSES, x[0].numel() ** 0.5) for random in randoms]
    directions += [(gradient, [name], 1.0) for name, gradient in gradients.items()]
    for direction, losses, divisor in directions:
        direction = F.normalize(direction.flatten(1), dim=1).view_as(x)
        ends = {}
        for h in steps:
            for sign in (1, -1):
                reseed(seed, seen.model)
                ends[sign * h] = seen.answer(x + sign * h * direction, 1, z)[:, 0]
        for name in losses:
            claimed = (gradients[name] * direction).flatten(1).sum(1)
            allowed = norms[name] / (2 * divisor)
            found = [(LOSSES[name](ends[h], y) - LOSSES[name](ends[-h], y)) / (2 * h) for h in steps]
            contradicted = [~((d - claimed).abs() <= allowed + digits[name] / h) for d, h in zip(found, steps)]
            contradicted = torch.stack(contradicted).all(0)
            # A smooth function's differences do not depend on the step; a step function's do.
            steady = (found[0] - found[-1]).abs() <= 0.1 * found[0].abs() + digits[name] / steps[-1]
            wrong |= contradicted
            smooth |= contradicted & steady & (found[0].abs() > digits[name] / steps[0])
    return wrong, smooth, small


# --------------------------------------------------------------------------------------------------------- one chunk


@dataclasses.dataclass
class Evaluation:
    """One model under one configuration, and the folder that holds its finished work."""

    model: nn.Module
    images: torch.Tensor  #        (n, C, H, W) uint8
    labels: torch.Tensor  #        (n,)
    numbers: list[int]  #          (n,) the user's number of each picture
    config: dict  #                all that the result depends on, the budget's numbers among it
    attacks: dict[str, Attack]  #  in the order in which they run
    about: dict  #                 what the report says beside: "checkpoint", "dataset"
    folder: Path
    device: torch.device
    deterministic: bool = False  # one draw tells everything about the model
    faults: tuple[str, ...] = ()  # of the model, seen before any attack

    def __post_init__(self):
        self.decide, self.view = AGGREGATIONS[self.config["aggregation"]][0], VIEWS[self.config["view"]]
        self.eps, self.starts = self.config["eps"], range(0, len(self.labels), self.config["chunk"])
        try:
            self.double = copy.deepcopy(self.model).double()
        except Exception:  # somebody's model may refuse anything; the audit then does without
            self.double = None

    def path(self, name: str, start: int) -> Path:
        return self.folder / "work" / f"{name}-{start:06d}.npz"

    def read(self, name: str, start: int) -> dict[str, np.ndarray]:
        return datasets.load_npz(self.path(name, start))

    def write(self, name: str, start: int, **values) -> None:
        arrays = {k: v.cpu().numpy() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        datasets.write_npz(self.path(name, start), **arrays)

    def is_finished(self, start: int) -> bool:
        names = [*self.attacks, "audit-start", "audit-end", "worst"]
        return all(self.path(name, start).is_file() for name in names)

    def reseed(self, *what) -> None:
        reseed(seed_for(*what, self.config["seed"]), self.model)

    def is_bare(self, name: str) -> bool:
        """True for an attack on the bare classifier, where that is not the whole model."""
        return self.attacks[name].on == "classifier" and hasattr(self.model, "purifier")

    def budget_for(self, name: str) -> dict:
        return self.config | (dict(eot=1, select=1, draws=1) if self.deterministic or self.is_bare(name) else {})

    def see(self, name: str, view) -> Seen:
        model = self.model.classifier if self.is_bare(name) else self.model
        return Seen(model, view, self.config["samples"], self.config["limit"])

    def search_precision(self):
        """The precision of attacks: with --bf16, bfloat16 inside the networks, float32 for logits and losses."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config["bf16"])

    def run_chunk(self, start: int, say) -> None:
        """Everything on one chunk that has no file yet: audit, attacks in order, audit, the worst on fresh draws."""
        rows = slice(start, start + self.config["chunk"])
        x, y = datasets.pixels(self.images[rows].to(self.device)), self.labels[rows].to(self.device)
        seen = self.see("clean", self.decide)
        with torch.no_grad():
            if self.deterministic and not torch.allclose(seen(x), seen(x), equal_nan=True):
                raise ValueError("the model does not answer the same twice: it is not deterministic")
        distance = max(self.eps, 1 / 255)
        self.run_audit("audit-start", start, x, y, distance, stride=distance / 100)
        everything = torch.ones(len(x), dtype=torch.bool, device=self.device)
        standing = {False: everything, True: everything.clone()}  # on the whole model, on the bare classifier
        for name in self.attacks:
            if not self.path(name, start).is_file():
                self.run_attack(name, start, x, y, standing[self.is_bare(name)])
                found = self.read(name, start)
                say(f"{name:>15}  pictures {start} to {start + len(x) - 1}  right {found['right'].mean():6.1%}  "
                    f"{found['seconds']:.0f} s")  # fmt: skip
            if self.config["cascade"] and name != "noise":  # the control is no attack: it takes nothing
                select = torch.from_numpy(self.read(name, start)["select"]).to(self.device)
                standing[self.is_bare(name)] &= select > 0
        worst = self.find_worst(start)
        self.run_audit("audit-end", start, worst, y, distance / 100)
        if not self.path("worst", start).is_file():
            self.score_worst(start, x, y, worst)

    def run_audit(self, name: str, start: int, x, y, distance: float, stride: float = 0.0) -> None:
        """The audit at random points at most that far beside x, where no two pixels are tied, and inside [0, 1] by more
        than the differences need."""
        if self.path(name, start).is_file():
            return
        self.reseed(name, start)
        margin, notes = max(self.eps, 1 / 255) / 200, set()
        low, high = (x - distance).clamp(min=margin), (x + distance).clamp(max=1 - margin)
        double = self.double and Seen(self.double, self.view, min(self.config["samples"], 2))  # float64 is slow
        with self.search_precision():
            seen, points = self.see("clean", self.view), low + (high - low) * torch.rand_like(x)
            coarse = 10 if self.config["bf16"] else 1  # bfloat16 does not see a divisor step
            faults = audit(seen, double, points, y, notes, coarse * stride)
        self.write(name, start, notes=np.array(sorted(notes), dtype=str), **faults)

    def run_attack(self, name: str, start: int, x: torch.Tensor, y: torch.Tensor, standing: torch.Tensor) -> None:
        """One attack on the pictures that stand: find candidates, choose each picture's worst, score it anew."""
        seen, judge, budget = self.see(name, self.view), self.see(name, self.decide), self.budget_for(name)
        clean, labels, began = x[standing], y[standing], time.time()
        candidates = clean[None]
        self.reseed("attack", name, start)
        if standing.any():
            with self.search_precision():
                candidates = self.attacks[name].run(seen, clean, labels, self.eps, budget)
            if (candidates - clean).abs().max() > self.eps + 1e-5 or candidates.min() < 0 or candidates.max() > 1:
                raise RuntimeError(f"attack {name} left the eps-ball or [0, 1]: this is a fault of the attack")
        self.reseed("select", start)
        z = judge.draw(x, budget["select"])  # the same noise for all candidates of a picture, whatever found them
        z = None if z is None else z[standing]
        shares = [score(judge, candidate, labels, budget["select"], z).float().mean(1) for candidate in candidates]
        share, chosen = torch.stack(shares).min(0)  # (B standing,)
        adversarial = candidates[chosen, torch.arange(len(chosen))]
        self.reseed("score", name, start)
        fresh = score(judge, adversarial, labels, budget["draws"])
        worst, select = x.clone(), torch.ones(len(x), device=x.device)
        right = torch.zeros(len(x), budget["draws"], dtype=torch.bool, device=x.device)
        worst[standing], select[standing], right[standing] = adversarial, share, fresh
        arrays = dict(worst=worst, select=select, right=right, attacked=standing) | seen.count
        self.write(name, start, seconds=time.time() - began, **arrays)

    def find_worst(self, start: int) -> torch.Tensor:
        """Each picture's worst over all attacks on the whole model, (B, C, H, W): the least share in the selection.
        Among equals the first attack counts, and a real one before the controls."""
        names = sorted((name for name in self.attacks if not self.is_bare(name)), key=lambda name: name in CONTROLS)
        files = [self.read(name, start) for name in names]
        least = np.where([f["attacked"] for f in files], [f["select"] for f in files], np.inf).argmin(0)
        return torch.from_numpy(np.stack([files[k]["worst"][i] for i, k in enumerate(least)])).to(self.device)

    def score_worst(self, start: int, x: torch.Tensor, y: torch.Tensor, worst: torch.Tensor) -> None:
        """The chunk's last file: the worst on fresh draws; of a CARSO also the bare classifier on the clean picture."""
        judge, more = self.see("clean", self.decide), {}
        self.reseed("final", start)
        right = score(judge, worst, y, self.budget_for("clean")["draws"])
        if hasattr(self.model, "purifier"):
            more["classifier"] = score(judge.through(model=self.model.classifier), x, y, 1)
        self.write("worst", start, worst=worst, right=right, **more)


# ------------------------------------------------------------------------------------------------------- the report


def wilson(mean: float, n: int, z: float = 1.96) -> list[float]:
    """95 % interval of a mean of n numbers in [0, 1] (Wilson; for expectations between 0 and 1 it is on the wide
    side)."""
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def bootstrap_means(difference: np.ndarray, samples: int = 10_000) -> np.ndarray:
    """Means of a difference (n,) over pictures that are resampled, (samples,): their quantiles are an interval."""
    rng, n = np.random.default_rng(0), len(difference)
    return np.array([difference[rng.integers(0, n, n)].mean() for _ in range(samples)])


def summarise(right: np.ndarray) -> dict:
    """Of the pictures' draws, (n, E) bool: the accuracy, its interval, and the share that all draws get right."""
    mean = float(right.mean())
    return {"accuracy": mean, "interval": wilson(mean, len(right)), "worst_draw": float(right.all(1).mean())}


def gather(e: Evaluation, name: str) -> dict:
    """All chunks of one attack: arrays over the pictures, and sums of counts. The pictures are left on the disk."""
    files, table = [e.read(name, start) for start in e.starts], {}
    for key in files[0].keys() - {"worst"}:
        values = [file[key] for file in files]
        table[key] = np.concatenate(values) if values[0].ndim else float(sum(values))
    return table


def find_faults(e: Evaluation, table: dict[str, dict]) -> tuple[list[str], list[str]]:
    """Sentences on what makes the audit fail, and notes on what is unusual."""
    messages, notes = list(e.faults), set()
    for name, where in (("audit-start", "where the attacks begin"), ("audit-end", "where the attacks ended")):
        found = gather(e, name)
        notes |= set(found.pop("notes").tolist())
        for fault, pictures in sorted(found.items()):
            if pictures.any():
                messages.append(f"{int(pictures.sum())} of {len(pictures)} pictures have {fault}, {where}")
    for name, t in table.items():
        if t["nonfinite"] + t["nonfinite_logits"] > 0:
            messages.append(f"{name}: outputs or gradients were not finite during the attack, so it did not move")
        elif t["zero"] > 0.5 * max(t["gradients"], 1):  # some are natural, once a picture is lost
            messages.append(f"{name}: {t['zero'] / t['gradients']:.0%} of the gradients were zero during the attack")
    return messages + find_masking(e, table), sorted(notes)


def find_masking(e: Evaluation, table: dict[str, dict]) -> list[str]:
    """Sentences on attacks that should be weaker than those that follow gradients (Athalye et al. 2018, Carlini et al.
    2019), and are significantly stronger: by more than a point, paired by picture, 95 %. A picture that one side took
    before the other had its turn speaks for neither."""
    mixed = ("clean", "standard")  # AutoAttack's standard, where it attacks the whole model, has both kinds in it
    names = [name for name in table if not e.is_bare(name) and name not in mixed]
    white = [table[name] for name in names if e.attacks[name].white_box]
    if not white:
        return []
    attacked = np.stack([t["attacked"] for t in white])
    best = np.where(attacked, [t["select"] for t in white], np.inf).argmin(0)
    white_right = np.stack([t["right"].mean(1) for t in white])[best, np.arange(len(best))]
    found = []
    for name in (name for name in names if not e.attacks[name].white_box):
        both = table[name]["attacked"] & attacked.any(0)
        stronger = np.where(both, white_right - table[name]["right"].mean(1), 0.0)
        if np.quantile(bootstrap_means(stronger), 0.025) > 0.01:
            found.append(f"{name} takes {100 * stronger.mean():.1f} points more than attacks that follow gradients do")
    return found


def write_report(e: Evaluation) -> dict:
    """report.json, report.md, rows.tsv and samples.png from the finished files. Returns what report.json holds."""
    table, worst = {name: gather(e, name) for name in e.attacks}, gather(e, "worst")
    fresh, clean, labels = worst["right"].mean(1), table["clean"]["right"].mean(1), e.labels.numpy()
    counted = [t for name, t in table.items() if not e.is_bare(name)]
    worst["select"] = np.min([np.where(t["attacked"], t["select"], 1.0) for t in counted], axis=0)
    faults, notes = find_faults(e, table)
    by_class = {k: labels == k for k in np.unique(labels).tolist()}
    machine = {"device": platform.machine(), "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
    machine |= {"torch": torch.__version__, "python": platform.python_version()}
    if e.device.type == "cuda":
        machine |= {"device": torch.cuda.get_device_name(e.device), "tf32": torch.backends.cudnn.allow_tf32}
    result = e.about | {
        "n": len(labels),
        "eps": e.eps,
        "samples": e.config["samples"],
        "clean": summarise(table["clean"]["right"]),
        "noise": summarise(table["noise"]["right"]),
        "attacks": {},
        "robust": summarise(worst["right"]) | {"least": min(float(worst["select"].mean()), float(fresh.mean()))},
        "commonest_class": max(float(of.mean()) for of in by_class.values()),
        "class_clean": {k: float(clean[of].mean()) for k, of in by_class.items()},
        "class_robust": {k: float(fresh[of].mean()) for k, of in by_class.items()},
        "deterministic": e.deterministic,
        "audit": {"passed": not faults, "messages": faults, "notes": notes},
        "config": e.config,
        "environment": machine,
    }
    for name in (name for name in table if name not in CONTROLS):
        t, budget, standing = table[name], e.budget_for(name), int(table[name]["attacked"].sum())
        result["attacks"][name] = summarise(t["right"]) | {
            "target": "classifier" if e.is_bare(name) else "defence",
            "standing": standing,
            "steps": budget[{"pgd-eot": "pgd_steps", "square": "queries"}.get(name, "steps")],
            "eot": budget["eot"] if e.attacks[name].eot else 1,
            "nonfinite_gradients": t["nonfinite"] / max(t["gradients"], 1),
            "zero_gradients": t["zero"] / max(t["gradients"], 1),
            "passes_per_picture": t["pictures"] / max(standing, 1),
            "seconds": t["seconds"],
        }
    if "classifier" in worst:
        result["classifier"] = {"clean": summarise(worst["classifier"])}
    if "standard" in table and e.is_bare("standard"):
        difference = fresh - table["standard"]["right"].mean(1)
        interval = np.quantile(bootstrap_means(difference), [0.025, 0.975]).tolist()
        result["to_classifier"] = {"difference": float(difference.mean()), "interval": interval}
    datasets.write_text(e.folder / "report.json", json.dumps(result, indent=1))
    datasets.write_text(e.folder / "report.md", format_report(result))
    datasets.write_text(e.folder / "rows.tsv", format_rows(e, table | {"worst": worst}))
    draw_samples(e)
    return result


def format_report(r: dict) -> str:
    """report.md: warnings, the table, a line for each column, the audit, the meaning of it."""
    least, robust, commonest = (100 * v for v in (r["robust"]["least"], r["robust"]["accuracy"], r["commonest_class"]))
    lines = [f"# {r['checkpoint']} on {r['dataset']}: eps {format_eps(r['eps'])}, S = {r['samples']}, n = {r['n']}", ""]
    if not r["audit"]["passed"]:
        lines += ["**The audit failed**: these numbers are upper bounds, and robustness may be far lower.", ""]
    if r["clean"]["accuracy"] <= r["commonest_class"]:
        lines += [f"**No better than always answering the commonest class ({commonest:.1f} %)**: does the model get "
                  "the pictures that it expects?", ""]  # fmt: skip
    if is_reduced(r["config"]):
        lines += ["**Reduced budget**: upper bounds, not benchmark numbers.", ""]
    lines += ["| model | attack | accuracy | every draw right | steps x draws | attacked | seconds |", "|---" * 7 + "|"]
    rows = [("classifier", "none", r["classifier"]["clean"])] if "classifier" in r else []
    rows += [("defence", "none", r["clean"]), ("defence", "uniform noise", r["noise"])]
    rows += [(attack["target"], name, attack) for name, attack in r["attacks"].items()]
    for model, attack, part in [*rows, ("**defence**", "**worst of all**", r["robust"])]:
        percent = "{:.1f} ({:.1f} to {:.1f})".format(*(100 * v for v in (part["accuracy"], *part["interval"])))
        cells = [model, attack, percent, f"{100 * part['worst_draw']:.1f}", "", "", ""]
        if "steps" in part:
            cells[4:] = f"{part['steps']} x {part['eot']}", str(part["standing"]), f"{part['seconds']:.0f}"
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "- accuracy: in %, the expectation over fresh draws of the noise, with a 95 % interval over pictures.",
        "- every draw right: pictures that all fresh draws got right; an attacker needs one draw that is wrong.",
        "- steps x draws: of the search, and draws averaged for a gradient.",
        "- attacked: pictures that no earlier attack had taken on every draw.",
        f"- worst of all: in expectation between {least:.1f}, the score in the selection, and {robust:.1f}.",
    ]
    if len(r["class_clean"]) < r["config"]["classes"] or commonest > 150 / len(r["class_clean"]):
        means = "clean {:.1f}, worst of all {:.1f}".format(
            *(100 * np.mean([*r[key].values()]) for key in ("class_clean", "class_robust"))
        )
        lines.append(f"- classes: {len(r['class_clean'])} of {r['config']['classes']} are among the pictures, the "
                     f"commonest with {commonest:.1f} %; mean over classes: {means}.")  # fmt: skip
    lines += ["", "Audit: passed on every picture." if r["audit"]["passed"] else "Audit: **failed**.", ""]
    lines += [f"- {message}" for message in r["audit"]["messages"] + r["audit"]["notes"]]
    machine = ", ".join(f"{name} {value}" for name, value in r["environment"].items())
    asked = f"Decision: {r['config']['aggregation']}; attacks see: {r['config']['view']}"
    asked += f"{', in bfloat16' if r['config']['bf16'] else ''}; seed {r['config']['seed']}"
    return "\n".join([*lines, "", explain(r), "", f"{asked}; {machine}.", ""])


def explain(r: dict) -> str:
    """The meaning of the table, in a sentence."""
    if not r["audit"]["passed"]:
        return "Through such gradients an accuracy says little: what was found is found, what was not may be there."
    if not r["attacks"]:
        return "Nothing attacked the model: add --attack rand, say."
    if "classifier" not in r:
        return f"The model keeps {100 * r['robust']['accuracy']:.1f} % of {r['n']} pictures under its worst attack."
    if "to_classifier" not in r:
        return "No attack on the bare classifier to compare with: add --attack standard."
    low, high = (100 * value for value in r["to_classifier"]["interval"])
    flattered = 100 * (r["robust"]["accuracy"] - r["robust"]["least"])  # at most, by a noisy choice of the worst
    what = "more" if low > flattered else "less" if high < 0 else "neither more nor less"
    return (
        f"CARSO keeps {100 * r['robust']['accuracy']:.1f} % of these {r['n']} pictures under its worst attack, its own "
        f"classifier {100 * r['attacks']['standard']['accuracy']:.1f} %: it is {what} robust than that, by "
        f"{100 * r['to_classifier']['difference']:+.1f} points ({low:+.1f} to {high:+.1f})."
    )


def format_rows(e: Evaluation, table: dict[str, dict]) -> str:
    """A line for each picture and attack, and one for its worst: right of so many fresh draws, the share that was right
    in the selection."""
    lines = ["picture\tlabel\tattack\tattacked\tright\tdraws\tselect"]
    for name, t in table.items():
        attacked = t.get("attacked", np.ones(len(e.labels)))
        for i, right in enumerate(t["right"]):
            cells = e.numbers[i], int(e.labels[i]), name, int(attacked[i]), right.sum(), len(right)
            lines.append("\t".join(map(str, cells)) + f"\t{t['select'][i]:.3f}")
    return "\n".join(lines) + "\n"


@torch.no_grad()
def draw_samples(e: Evaluation) -> None:
    """samples.png, a row a picture: clean | the worst | their difference, magnified | six reconstructions."""
    x = datasets.pixels(e.images[: e.config["chunk"]][:8].to(e.device))
    adversarial = torch.from_numpy(e.read("worst", 0)["worst"][: len(x)]).to(x)
    difference = 0.5 + (adversarial - x) / (2 * max(e.eps, 1e-9))
    tiles, headings = [x, adversarial, difference.clamp(0, 1)], ["clean", "attacked", "difference"]
    if hasattr(e.model, "purify"):
        e.model.manual_seed(0)
        tiles += e.model.purify(adversarial, e.model.draw(x, 6)).unbind(1)
        headings += ["drawn anew"] * (len(tiles) - 3)
    datasets.save_pictures(e.folder / "samples.png", torch.stack(tiles, 1), headings)


# ------------------------------------------------------------------------------------------------------ command line


def build_parser(attacks: dict[str, Attack], groups: dict[str, list[str]], description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, names = parser.add_argument, [*attacks, *groups]
    add("--ckpt", help="a carso.pt; or, with --dataset, a file of a classifier's weights")
    add("--published", choices=PUBLISHED, help="the CARSO authors' released defence, fetched")
    add("--attack", nargs="+", choices=names, metavar="NAME", default=["standard", "rand"],
        help=f"any of {', '.join(names)} (default: standard rand)")  # fmt: skip
    add("--no-cascade", action="store_true", help="every attack on every picture (default: a picture that an attack "
        "takes on every draw is not attacked again)")  # fmt: skip
    add("--eps", type=parse_eps, help="radius in pixels, such as 8/255 (default: the training's, else 8/255)")
    add("--samples", type=int, help="S, reconstructions a picture; 0: one, of z = 0 (default: the checkpoint's)")
    add("--aggregation", choices=AGGREGATIONS, default="robust", help="the decision (default: robust)")
    add("--view", choices=VIEWS, help="what attacks see (default: the decision's own)")
    add("--bf16", action="store_true", help="attacks search in bfloat16; scores do not")
    add("--budget", choices=BUDGETS, help="default: reduced for digits, paper for the rest")
    add("--dataset", help="default: the one it was trained on")
    add("--data-dir", help="default: as in training")
    add("--out", help="folder (default: beside the checkpoint, named after the settings)")
    add("--seed", type=int, default=0)
    add("--limit", type=int, default=1024, help="pictures or reconstructions at a time, for memory (default: 1024)")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    group = parser.add_argument_group("budget", "every number of it can be overridden")
    for name, (paper, reduced, meaning) in NUMBERS.items():
        options = ["--" + name.replace("_", "-")] + ["--n"] * (name == "pictures")
        kind, text = parse_eps if isinstance(paper, float) else int, f"{meaning} (paper {paper}, reduced {reduced})"
        group.add_argument(*options, dest=name, type=kind, metavar="NUMBER", help=text)
    return parser


def load_model(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, datasets.Dataset, dict, Path]:
    """The model that --ckpt or --published names, its data, what the checkpoint says of its training, and its file.
    Raises ValueError, OSError."""
    if bool(args.ckpt) == bool(args.published):
        raise ValueError("either --ckpt or --published says what to attack")
    if args.published and args.dataset:
        raise ValueError(f"--published {args.published} is attacked on its own pictures: leave out --dataset")
    if args.published:
        data = datasets.load(args.published, args.data_dir or "data")
        folder = fetch_published(args.published, args.data_dir or "data")
        model = load_published(folder, len(data.classes), data.test_images.shape[1:], data.mean, data.std).to(device)
        _, accuracy = next(iter(PUBLISHED[args.published].values()))
        check_clean_accuracy(model.classifier, data, accuracy, folder)
        return model, data, {}, Path("runs") / f"published-{args.published}" / "authors"
    if args.dataset and not is_carso(args.ckpt):
        data = datasets.load(args.dataset, args.data_dir or "data")
        return load_classifier(args.ckpt, len(data.classes), data.mean, data.std).to(device), data, {}, Path(args.ckpt)
    model, state = load_carso(args.ckpt, device)
    name, classes = args.dataset or state.get("dataset"), state.get("classes")
    if name is None:
        raise ValueError(f"{args.ckpt} does not say what it was trained on: add --dataset")
    if not args.dataset and name not in datasets.NAMES and not Path(name).exists():
        raise ValueError(f"{args.ckpt} says that it was trained on {name}, which is not here: add --dataset")
    data = datasets.load(name, args.data_dir or state.get("data_dir", "data"), classes)
    datasets.check_fit(data, model.purifier.config["image_shape"], classes or data.classes, args.ckpt)
    return model, data, state, Path(args.ckpt)


def choose_numbers(args: argparse.Namespace, model: nn.Module, state: dict, dataset: str, pictures: int) -> dict:
    """The budget, eps and S that the command line asks for. Raises ValueError for a number that makes no sense."""
    given = {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    numbers = BUDGETS[args.budget or ("reduced" if dataset == "digits" else "paper")] | given | {"limit": args.limit}
    for name, value in numbers.items():
        if value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not positive")
    numbers["eps"] = state.get("config", {}).get("eps", 8 / 255) if args.eps is None else args.eps
    numbers["samples"] = getattr(model, "samples", 1) if args.samples is None else args.samples
    if not 0 <= numbers["eps"] <= 1:
        raise ValueError(f"--eps {numbers['eps']:g} is no distance between pixels in [0, 1]: write 8/255, say")
    if numbers["samples"] < 0:
        raise ValueError(f"--samples {numbers['samples']} is not 0 or more")
    return numbers | {"pictures": min(numbers["pictures"], pictures)}


def prepare(args, model: nn.Module, data, state: dict, source: Path, attacks=ATTACKS, groups=(), **more) -> Evaluation:
    """The evaluation that the command line asks for. more: what else its result depends on. Raises ValueError."""
    numbers, groups = choose_numbers(args, model, state, data.name, len(data.test_labels)), dict(groups)
    model.requires_grad_(False)
    if hasattr(model, "purifier"):
        model.samples = numbers["samples"]
    asked = {"clean", "noise", *(name for chosen in args.attack for name in groups.get(chosen, [chosen]))}
    for name in args.attack:  # a group takes of its attacks those that apply
        if name in attacks and not hasattr(model, attacks[name].needs):
            raise ValueError(f"--attack {name} is for a CARSO, and this model is none: leave it out")
    chosen = {name: attack for name, attack in attacks.items() if name in asked and hasattr(model, attack.needs)}
    count = numbers["pictures"]
    images, labels, rows = data.test_images[:count], data.test_labels[:count], data.test_numbers[:count]
    # The normalisation of a bare classifier may not be among its weights.
    normalisation = [list(model.config[key]) for key in ("mean", "std")] if isinstance(model, WideResNet) else None
    config = {
        "weights": more.pop("weights", None) or hash_weights(model),
        "normalisation": normalisation,
        "own_answer": getattr(model, "own_answer", None),
        "data": datasets.fingerprint(images, labels, data.classes),
        "classes": len(data.classes),
        "attacks": list(chosen),
        "cascade": not args.no_cascade,
        "aggregation": args.aggregation,
        "view": args.view or AGGREGATIONS[args.aggregation][1],
        "bf16": args.bf16,
        "seed": args.seed,
    }
    config |= numbers | more
    name = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=3).hexdigest()
    name = f"eval-eps{format_eps(numbers['eps']).replace('/', '_')}-S{numbers['samples']}-n{len(labels)}-{name}"
    folder = Path(args.out) if args.out else source.parent / name
    datasets.check_config(folder / "config.json", config, "--out")
    about = {"checkpoint": str(source), "dataset": data.name}
    # Every other model may be random.
    known = isinstance(model, WideResNet) or (hasattr(model, "purifier") and numbers["samples"] == 0)
    device = start_device(args.device)
    return Evaluation(model, images, labels, rows.tolist(), config, chosen, about, folder, device, known)


def run_chunks(e: Evaluation, say) -> bool:
    """Every r-th chunk, for process r of n; say(text) tells of it. True if all chunks are finished."""
    rank, count = read_ranks()
    mine = [start for start in e.starts[rank::count] if not e.is_finished(start)]
    began = time.monotonic()
    for done, start in enumerate(mine, 1):
        e.run_chunk(start, say)
        say(f"{'':>15}  about {(time.monotonic() - began) / done * (len(mine) - done):.0f} s left")
    return all(e.is_finished(start) for start in e.starts)


def run(e: Evaluation) -> int:
    """The chunks, then the report, if all are there. The exit status: 0, or 3 if the audit failed."""
    say = partial(print, flush=True) if read_ranks()[0] == 0 else lambda *_: None
    say(f"{len(e.labels)} pictures at eps {format_eps(e.eps)} in chunks of {e.config['chunk']}; on each the audit, "
        f"then {', '.join(e.attacks)}; finished work is kept in {e.folder}")  # fmt: skip
    if not run_chunks(e, say):
        say("other processes are at work, and the last one writes the report; if none is, give the command again")
        return 0
    result = write_report(e)
    print((e.folder / "report.md").read_text(encoding="utf-8"))
    print(f"written to {e.folder}")
    return 0 if result["audit"]["passed"] else 3


def main(argv=None) -> int:
    args = build_parser(ATTACKS, {}, __doc__).parse_args(argv)
    return run(prepare(args, *load_model(args, start_device(args.device))))


if __name__ == "__main__":
    run_script("evaluate.py", main)
