"""Attack a trained CARSO end to end, score every adversarial picture on fresh draws, and report the worst.

    python evaluate.py --ckpt runs/digits/carso.pt                              # AutoAttack, as in the paper's table 2
    python evaluate.py --ckpt runs/digits/carso.pt --attack rand pgd-eot        # the worst of both counts
    python evaluate.py --ckpt runs/digits/carso.pt --view naive-odds            # the reference's output: audit fails
    python evaluate.py --ckpt runs/digits/carso.pt --attack rand --eps 0.95     # the paper's sanity check, table 3
    python evaluate.py --ckpt runs/digits/classifier.pt --dataset digits        # a classifier alone
    python evaluate.py --published cifar10                                      # the authors' released defence, fetched
    torchrun --nproc_per_node=8 evaluate.py --ckpt runs/cifar10/carso.pt

An `Evaluation` is one model and its attacks. A CARSO makes two: its bare classifier under AutoAttack's standard
version, and the defence under the others. One report holds both.

A chunk of pictures is the unit of work. On each chunk the attacks run in order, each on the pictures that still stand.
`select` draws of the noise choose each picture's worst candidate, and fresh draws score it. Each finished (attack,
chunk) is a file, and a file that exists is never made again. Process r of n takes chunks r, r + n, ... A killed
evaluation goes on under the same command, with any number of processes. Whoever finishes last writes the report.

The audit looks at every picture, where the attacks begin and where they ended: do gradients exist, and do they explain
how the answers change? If not, the exit status is 3 (torchrun makes it 1) and the report says why.

Shapes: B pictures, N candidates (adversarial versions of a picture), E draws, S members, K classes, Z latent.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import platform
import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import aggregate
import data as datasets
from attacks import LOSSES, ascend, format_eps, margin, measure_slope_error, objective, parse_eps, project, random_point
from models import (
    PUBLISHED,
    WideResNet,
    check_clean_accuracy,
    hash_weights,
    load_classifier,
    load_tensors,
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


def is_reduced(settings: dict) -> bool:
    """True if an attack works less, or a score rests on fewer draws, than in the paper's budget."""
    work = NUMBERS.keys() - {"pictures", "pgd_step_size", "chunk"}
    return any(settings[key] < BUDGETS["paper"][key] for key in work)


# ---------------------------------------------------------------------------------------------- decisions and views


def naive_log_odds(logits: torch.Tensor) -> torch.Tensor:
    """log(P / (1 - P)) through float32 probabilities, the reference code's output: here to show how it masks
    gradients."""
    P = aggregate.log_probabilities(logits).exp()
    return torch.log(P / (1 - P))


# Members' logits (B, S, K) into one answer (B, K): the paper's decision, and the two that its appendix D compares.
AGGREGATIONS = {
    "robust": aggregate.robust_logits,
    "mean-logits": aggregate.mean_logits,
    "mean-probabilities": aggregate.mean_probabilities,
}
# An output that attacks see instead of the decision itself. The scores always rest on the decision.
VIEWS = {"naive-odds": naive_log_odds}


# ---------------------------------------------------------------------------------- the defence as an attack sees it


class Seen(nn.Module):
    """A model behind one view: pictures -> logits (B, K), while counting passes and gradients that do not exist.

    model: CARSO, or any nn.Module from pictures to logits. view: members' logits (B, S, K) -> (B, K), ignored for a
    model without members. limit: at most so many reconstructions at a time, for memory; no answer depends on it."""

    def __init__(self, model: nn.Module, view=aggregate.robust_logits, samples: int = 1, limit: int = 1024):
        super().__init__()
        self.model, self.view, self.limit = model, view, limit
        self.has_members = hasattr(model, "member_logits")
        self.samples = max(1, samples) if self.has_members else 1
        self.count = dict.fromkeys(("pictures", "gradients", "nonfinite", "zero", "nonfinite_logits"), 0)

    def draw(self, x: torch.Tensor, draws: int) -> torch.Tensor | None:
        """Latent noise for so many evaluations of every picture, (B, E S, Z); None for a model without members."""
        return self.model.draw(x, draws * self.samples) if self.has_members else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer(x, 1)[:, 0]

    def answer(self, x: torch.Tensor, draws: int, z: torch.Tensor | None = None) -> torch.Tensor:
        """E evaluations of every picture, (B, E, K), with latent noise z (B, E S, Z), drawn when None. A CARSO looks at
        the picture once for all of them; for a model without members each draw is a pass of its own."""
        self.count["pictures"] += len(x) * draws
        if x.requires_grad:
            x = x.view_as(x)  # one leaf may serve several draws, whose gradients would be counted together
            x.register_hook(self._watch)
        if self.has_members:
            members = self._look(x, self.draw(x, draws) if z is None else z)  #           (B, E S, K)
            logits = self.view(members.unflatten(1, (draws, -1)).flatten(0, 1))  #        (B E, K)
            logits = logits.unflatten(0, (len(x), draws))
        else:
            logits = torch.stack([self.model(x) for _ in range(draws)], 1)
        logits = logits.to(x.dtype)
        self.count["nonfinite_logits"] += (~logits.detach().isfinite()).flatten(1).any(1).sum()
        return logits

    def _look(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The members' logits (B, E S, K), at most `limit` of them at a time. Beyond that their graph is not kept, but
        computed again in the backward pass."""
        look = self.model.member_logits
        if z.shape[:2].numel() > self.limit and x.requires_grad and torch.is_grad_enabled():
            look = partial(checkpoint, look, use_reentrant=False)
        rows = max(1, self.limit // z.shape[1])
        parts = zip(x.split(rows), z.split(rows))
        return torch.cat([torch.cat([look(a, c) for c in codes.split(self.limit, 1)], 1) for a, codes in parts])

    def _watch(self, gradient: torch.Tensor) -> None:
        flat = gradient.flatten(1)  # the counts stay on the device: reading one would wait for it
        self.count["gradients"] += len(flat)
        self.count["nonfinite"] += (~flat.isfinite()).any(1).sum()
        self.count["zero"] += (flat == 0).all(1).sum()


def climb(seen: Seen, y: torch.Tensor, loss="ce", draws: int = 1, z: torch.Tensor | None = None):
    """`attacks.objective` with all draws of EoT in one batch: for CARSO one classifier pass and one backward serve a
    step, as far as the limit allows. z: (B, E S, Z), to keep the noise fixed."""
    if not seen.has_members:
        return objective(seen, y, loss, draws)

    def losses_and_gradient(x):
        noise = seen.draw(x, draws) if z is None else z
        rows = max(1, seen.limit // noise.shape[1])
        parts = []
        for pictures, labels, codes in zip(x.split(rows), y.split(rows), noise.split(rows)):
            parts.append(objective(lambda x, codes=codes: seen.answer(x, draws, codes), labels, loss)(pictures))
        losses, gradients = zip(*parts)
        return torch.cat(losses), torch.cat(gradients)

    return losses_and_gradient


@torch.no_grad()
def score(seen: Seen, x: torch.Tensor, y: torch.Tensor, draws: int, z: torch.Tensor | None = None) -> torch.Tensor:
    """Whether each of `draws` independent answers is right, (B, E) bool; NaN is no answer. z: (B, E S, Z), drawn when
    None."""
    if len(x) == 0:
        return torch.zeros(0, draws, dtype=torch.bool, device=x.device)
    logits = seen.answer(x, draws, z)
    return (logits.argmax(2) == y[:, None]) & ~logits.isnan().any(2)


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
    """run(seen, x, y, settings) -> candidates (N, B, C, H, W) in the eps-ball and in [0, 1]. One that equals x says
    that nothing was found. Random numbers come from torch's global generator and the model's own."""

    run: Callable
    on: str = "defence"  #       of a CARSO: the whole, or the bare "classifier"
    steps: str = "steps"  #      the setting that says how long it is
    eot: bool = True  #          averages over draws of the noise


def no_attack(seen, x, y, settings):
    return x[None]


def uniform_noise(seen, x, y, settings):
    """The control: the effect of an attack that ignores the model."""
    return random_point(x, settings["eps"])[None]


def pgd_eot(seen, x, y, settings):
    """PGD with EoT (paper, table 12), from a random start."""
    eps, climbed = settings["eps"], climb(seen, y, "ce", settings["eot"])
    return ascend(climbed, x, random_point(x, eps), eps, settings["pgd_steps"], settings["pgd_step_size"])[None]


def build_apgd(kind, seen: Seen, x: torch.Tensor, settings: dict, **more):
    """AutoAttack's Auto-PGD of one kind, with the settings' steps."""
    more |= dict(eps=settings["eps"], n_iter=settings["steps"], norm="Linf", device=x.device)
    logger = logging.getLogger("auto-attack")
    logger.setLevel(logging.ERROR)
    return kind(seen, n_restarts=1, rho=0.75, verbose=False, logger=logger, **more)


def count_classes(seen: Seen, x: torch.Tensor) -> int:
    with torch.no_grad():
        return seen(x[:1]).shape[1]


def autoattack_rand(seen, x, y, settings):
    """The attacks of AutoAttack's version for random defences (Croce and Hein 2020): APGD on cross-entropy and on DLR.

    They run on all pictures here. AutoAttack's own wrapper drops each picture that a single draw mislabels, and the
    later and stronger loss never sees it. Two candidates a loss: the point of the largest loss, and the last one that
    some draw mislabelled."""
    from pyautoattack.autopgd_base import APGDAttack

    candidates = []
    for loss in LOSSES if count_classes(seen, x) > 3 else ["ce"]:  # its DLR needs four classes
        apgd = build_apgd(APGDAttack, seen, x, settings, loss=loss, eot_iter=settings["eot"])
        apgd.init_hyperparam(x)
        largest_loss, _, _, mislabelled = apgd.attack_single_run(x.contiguous(), y)
        candidates += [largest_loss.detach(), mislabelled.detach()]
    return project(torch.stack(candidates), x, settings["eps"])


def autoattack_standard(seen, x, y, settings):
    """AutoAttack's standard version for deterministic models: APGD on cross-entropy, targeted APGD and FAB, Square.
    Where nothing was flipped it returns the clean picture."""
    from pyautoattack import AutoAttack
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT

    eps, seed, classes = settings["eps"], torch.initial_seed() % 2**31, count_classes(seen, x)
    suite = AutoAttack(seen, version="standard", eps=eps, norm="Linf", seed=seed, device=x.device)
    # Built anew: changing n_iter afterwards would leave their schedules at 100 steps.
    targets = min(settings["targets"], classes - 1)
    suite.apgd = build_apgd(APGDAttack, seen, x, settings, seed=seed)
    suite.apgd_targeted = build_apgd(APGDAttack_targeted, seen, x, settings, seed=seed, n_target_classes=targets)
    fab = dict(n_restarts=1, n_iter=settings["steps"], eps=eps, norm="Linf", seed=seed, device=x.device, verbose=False)
    suite.fab = FABAttack_PT(seen, n_target_classes=targets, **fab)
    suite.square.n_queries = settings["queries"]
    suite.square.perturb = torch.no_grad()(suite.square.perturb)  # it would keep the graph of every query
    if classes <= 3:  # targeted APGD and FAB need more classes than that
        suite.attacks_to_run = ["apgd-ce", "fab", "square"]
        suite.fab.n_target_classes = classes - 1
    adversarial, _ = suite.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))
    return project(adversarial.detach(), x, eps)[None]


# In the order in which they run. The first two are controls: they count in the worst of all, but attack no model.
CONTROLS = ("clean", "noise")
ATTACKS = {
    "clean": Attack(no_attack, eot=False),
    "noise": Attack(uniform_noise, eot=False),
    "pgd-eot": Attack(pgd_eot, steps="pgd_steps"),
    "rand": Attack(autoattack_rand),
    "standard": Attack(autoattack_standard, on="classifier", eot=False),
}


# ------------------------------------------------------------------------------------ one model, and its finished work


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One model, its attacks in the order in which they run, and the folder that holds its finished work."""

    name: str  #                   "defence", "classifier" or "model"
    model: nn.Module
    images: torch.Tensor  #        (n, C, H, W) uint8
    labels: torch.Tensor  #        (n,)
    attacks: dict[str, Attack]
    settings: dict  #              all that a result depends on
    folder: Path
    device: torch.device
    limit: int = 1024

    @property
    def starts(self) -> range:
        """The number of each chunk's first picture."""
        return range(0, len(self.labels), self.settings["chunk"])

    @property
    def decide(self) -> Callable:
        return AGGREGATIONS[self.settings["aggregation"]]

    @property
    def view(self) -> Callable:
        return VIEWS.get(self.settings["view"], self.decide)

    def see(self, view: Callable, samples: int | None = None) -> Seen:
        return Seen(self.model, view, self.settings["samples"] if samples is None else samples, self.limit)

    def reseed(self, *what) -> None:
        reseed(seed_for(*what, self.settings["seed"]), self.model)

    def search_precision(self):
        """The precision of attacks: with --bf16, bfloat16 inside the networks, float32 for logits and losses."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings["bf16"])

    def find_path(self, name: str, start: int) -> Path:
        return self.folder / f"{name}-{start:06d}.npz"

    def do_once(self, work: Callable, name: str, start: int, *inputs) -> dict[str, np.ndarray]:
        """The arrays that work(self, name, start, *inputs) returns: read where their file exists, else made and
        kept."""
        path = self.find_path(name, start)
        if path.is_file():
            return datasets.load_npz(path)
        values = work(self, name, start, *inputs) | {"environment": json.dumps(describe_environment(self.device))}
        arrays = {key: v.cpu().numpy() if isinstance(v, torch.Tensor) else np.array(v) for key, v in values.items()}
        datasets.write_npz(path, **arrays)
        return arrays


def describe_environment(device: torch.device) -> dict:
    """The machine and the software under which a file was made."""
    found = {"device": platform.machine(), "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
    found |= {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "tf32": torch.backends.cudnn.allow_tf32}
    return found


# --------------------------------------------------------------------------------------------------------- the audit


def hold_noise(seen: Seen, x: torch.Tensor, seed: int) -> Callable:
    """The model as a function of pictures alone: (B, C, H, W) -> logits (B, K), under noise that the seed fixes."""
    reseed(seed, seen.model)
    z = seen.draw(x, 1)

    def answer(pictures):
        reseed(seed, seen.model)
        return seen.answer(pictures, 1, z)[:, 0]

    return answer


def find_missing_gradients(f: Callable, x: torch.Tensor, y: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """Fault -> which pictures have it, (B,) bool: no finite answer, no finite gradient, or, of a picture that f gets
    right, no gradient of any loss. And the gradient of the margin, (B, C, H, W)."""
    with torch.no_grad():
        logits = f(x)
    gradients = torch.stack([objective(f, y, loss)(x)[1].flatten(1) for loss in (*LOSSES, margin)])
    finite, zero = gradients.isfinite().all(2).all(0), (gradients == 0).all(2).all(0)
    faults = {
        "outputs that are not finite": ~logits.isfinite().all(1),
        "gradients that are not finite": ~finite,
        "gradients of exactly zero": zero & (logits.argmax(1) == y),
    }
    return faults, gradients[-1].view_as(x).nan_to_num()


def find_unexplained(e: Evaluation, start, end, y: torch.Tensor, seed: int, by_majority=False) -> torch.Tensor:
    """Of which pictures the gradients do not explain how the answer changes from start to end, (B,) bool.

    A picture whose error is above 0.2 is looked at again with more points: an honest error shrinks. Measured on digits:
    honest models stay below that, and most pictures of masked ones lie above 0.3 (RESULTS.md). by_majority: single
    pictures count only where most others agree."""
    seen = e.see(e.view, min(e.settings["samples"], 2))  # two members tell enough
    tolerated = len(y) // 2 if by_majority else 0
    errors = torch.full((len(y),), torch.inf, device=y.device)
    for points in (8, 32, 128):
        again = (errors > 0.2).nonzero().squeeze(1)
        if len(again) > tolerated:
            f = hold_noise(seen, start[again], seed)
            errors[again] = measure_slope_error(f, start[again], end[again], y[again], points)
    found = errors > 0.2
    return found if found.sum() > tolerated else torch.zeros_like(found)


def find_unexplained_in_each_precision(e: Evaluation, start, end, y: torch.Tensor, seed: int) -> torch.Tensor:
    """`find_unexplained` in float32; with --bf16 in bfloat16, too, where rounding hides single pictures."""
    found = find_unexplained(e, start, end, y, seed)
    if e.settings["bf16"]:
        with e.search_precision():
            found = found | find_unexplained(e, start, end, y, seed, by_majority=True)
    return found


UNEXPLAINED = "gradients that do not explain how the answer changes"


def audit_start(e: Evaluation, name: str, start: int, x: torch.Tensor, y: torch.Tensor) -> dict:
    """The audit where attacks begin, at a random point of the ball. Fault -> (B,) bool; and the answers to the clean
    pictures, which `audit_end` compares.

    Two ways lead from that point: to the corner of the ball that the gradient points to, and to a random one. On the
    second way changes nearly cancel, so that single pictures of an honest model go wrong."""
    e.reseed(name, start)
    seed = torch.initial_seed()
    with torch.no_grad():
        answers = hold_noise(e.see(e.decide), x, seed)(x)
    eps = max(e.settings["eps"], 1 / 255)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    point = low + (high - low) * torch.rand_like(x)
    random_corner = torch.where(torch.rand_like(x) < 0.5, low, high)

    with e.search_precision():
        faults, gradient = find_missing_gradients(hold_noise(e.see(e.view), point, seed), point, y)
    uphill = torch.where(gradient > 0, high, torch.where(gradient < 0, low, point))
    unexplained = find_unexplained_in_each_precision(e, point, uphill, y, seed)
    unexplained |= find_unexplained(e, point, random_corner, y, seed, by_majority=True)
    return faults | {UNEXPLAINED: unexplained, "answers": answers}


def audit_end(e: Evaluation, name: str, start: int, x, y, worst: torch.Tensor, answers: np.ndarray) -> dict:
    """The audit where attacks ended, and on the way there. And the clean pictures once more, under the noise of
    `answers` (B, K): a model that remembers may answer otherwise by now. Fault -> (B,) bool."""
    e.reseed("audit-start", start)
    seed = torch.initial_seed()
    with e.search_precision():
        faults, _ = find_missing_gradients(hold_noise(e.see(e.view), worst, seed), worst, y)
    with torch.no_grad():
        now = hold_noise(e.see(e.decide), x, seed)(x)
    before = torch.from_numpy(answers).to(now)
    changed = (now - before).abs().amax(1) > 0.01 * before.abs().amax(1)
    return faults | {
        UNEXPLAINED: find_unexplained_in_each_precision(e, x, worst, y, seed),
        "other answers than at the beginning of the evaluation": changed,
    }


# --------------------------------------------------------------------------------------------------------- one chunk


def evaluate_chunk(e: Evaluation, start: int) -> dict[str, dict[str, np.ndarray]]:
    """All work on the chunk that begins at picture `start`: name -> arrays. First the audit, then the attacks in order,
    the audit where they ended, and each picture's worst on fresh draws."""
    rows = slice(start, start + e.settings["chunk"])
    x, y = datasets.pixels(e.images[rows].to(e.device)), e.labels[rows].to(e.device)
    done = {"audit-start": e.do_once(audit_start, "audit-start", start, x, y)}
    standing = torch.ones(len(x), dtype=torch.bool, device=e.device)
    for name in e.attacks:
        done[name] = e.do_once(run_attack, name, start, x, y, standing)
        if e.settings["cascade"] and name != "noise":  # the control is no attack: it takes nothing
            standing = standing & torch.from_numpy(done[name]["select"] > 0).to(e.device)
    worst = find_worst([done[name] for name in sorted(e.attacks, key=lambda name: name in CONTROLS)]).to(e.device)
    answers = done["audit-start"].pop("answers")
    done["audit-end"] = e.do_once(audit_end, "audit-end", start, x, y, worst, answers)
    done["worst"] = e.do_once(score_worst, "worst", start, y, worst)
    return done


def run_attack(e: Evaluation, name: str, start: int, x: torch.Tensor, y: torch.Tensor, standing: torch.Tensor) -> dict:
    """One attack on the pictures that stand, (B,) bool: find candidates, choose each picture's worst, score it anew."""
    seen, judge, began = e.see(e.view), e.see(e.decide), time.time()
    clean, labels = x[standing], y[standing]
    candidates = clean[None]
    e.reseed("attack", name, start)
    if standing.any():
        with e.search_precision():
            candidates = e.attacks[name].run(seen, clean, labels, e.settings)
        if not is_allowed(candidates, clean, e.settings["eps"]):
            raise RuntimeError(f"attack {name} left the eps-ball or [0, 1]: this is a fault of the attack")

    e.reseed("select", start)
    z = judge.draw(x, e.settings["select"])  # the same noise for all candidates of a picture, whatever found them
    z = None if z is None else z[standing]
    shares = [score(judge, candidate, labels, e.settings["select"], z).float().mean(1) for candidate in candidates]
    share, chosen = torch.stack(shares).min(0)  # (B standing,)
    found = candidates[chosen, torch.arange(len(chosen))]

    e.reseed("score", name, start)
    fresh = score(judge, found, labels, e.settings["draws"])
    adversarial, select = x.clone(), torch.ones(len(x), device=x.device)
    right = torch.zeros(len(x), e.settings["draws"], dtype=torch.bool, device=x.device)
    adversarial[standing], select[standing], right[standing] = found, share, fresh
    seconds = time.time() - began
    say(f"{e.name:>10} {name:>15}  pictures {start} to {start + len(x) - 1}  right {right.float().mean():6.1%}  "
        f"{seconds:.0f} s")  # fmt: skip
    arrays = dict(adversarial=adversarial, select=select, right=right, attacked=standing, seconds=seconds)
    return arrays | seen.count


def is_allowed(candidates: torch.Tensor, x: torch.Tensor, eps: float) -> bool:
    """True if candidates (N, B, C, H, W) lie in the ball around x and in [0, 1]; False for NaN."""
    return bool((((candidates - x).abs() <= eps + 1e-5) & (candidates >= 0) & (candidates <= 1)).all())


def find_worst(attacks: list[dict]) -> torch.Tensor:
    """Each picture's worst over all attacks' arrays, (B, C, H, W): the least share in the selection. Among equals the
    first attack counts."""
    least = np.where([a["attacked"] for a in attacks], [a["select"] for a in attacks], np.inf).argmin(0)
    return torch.from_numpy(np.stack([attacks[k]["adversarial"][i] for i, k in enumerate(least)]))


def score_worst(e: Evaluation, name: str, start: int, y: torch.Tensor, worst: torch.Tensor) -> dict:
    """The chunk's last file: each picture's worst on fresh draws."""
    e.reseed("final", start)
    return {"adversarial": worst, "right": score(e.see(e.decide), worst, y, e.settings["draws"])}


# ------------------------------------------------------------------------------------------------- numbers of one model


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


def gather(e: Evaluation) -> dict[str, dict]:
    """name -> all chunks' arrays over the pictures, in one; counts are summed. All work is done: the files are read."""
    chunks = [evaluate_chunk(e, start) for start in e.starts]
    table = {}
    for name in chunks[0]:
        table[name] = {}
        for key in chunks[0][name].keys() - {"environment"}:
            values = [chunk[name][key] for chunk in chunks]
            table[name][key] = np.concatenate(values) if values[0].ndim else sum(map(float, values))
        table[name]["environment"] = {str(chunk[name]["environment"]) for chunk in chunks}
    attacks = [table[name] for name in e.attacks]
    table["worst"]["select"] = np.min([np.where(a["attacked"], a["select"], 1.0) for a in attacks], axis=0)
    table["worst"]["attacked"] = np.any([a["attacked"] for a in attacks], axis=0)
    return table


def find_faults(e: Evaluation, table: dict[str, dict]) -> list[str]:
    """Sentences on all that makes the audit of this model fail."""
    messages = []
    for name, where in (("audit-start", "where the attacks begin"), ("audit-end", "where the attacks ended")):
        for fault, pictures in sorted(table[name].items()):
            if fault != "environment" and pictures.any():
                messages.append(f"{e.name}: {int(pictures.sum())} of {len(pictures)} pictures have {fault}, {where}")
    for name in e.attacks:
        a = table[name]
        if a["nonfinite"] + a["nonfinite_logits"] > 0:
            messages.append(f"{e.name}, {name}: outputs or gradients were not finite, and the attack did not move")
        elif a["zero"] > 0.5 * max(a["gradients"], 1):  # some are natural, once a picture is lost
            messages.append(f"{e.name}, {name}: {a['zero'] / a['gradients']:.0%} of the gradients were zero")
    return messages


def summarise(right: np.ndarray) -> dict:
    """Of the pictures' draws, (n, E) bool: the accuracy, its interval, and the share that all draws get right."""
    mean = float(right.mean())
    return {"accuracy": mean, "interval": wilson(mean, len(right)), "worst_draw": float(right.all(1).mean())}


def summarise_attack(e: Evaluation, name: str, a: dict) -> dict:
    standing, gradients = int(a["attacked"].sum()), max(a["gradients"], 1)
    return summarise(a["right"]) | {
        "target": e.name,
        "standing": standing,
        "steps": e.settings[e.attacks[name].steps],
        "eot": e.settings["eot"] if e.attacks[name].eot else 1,
        "nonfinite_gradients": a["nonfinite"] / gradients,
        "zero_gradients": a["zero"] / gradients,
        "passes_per_picture": a["pictures"] / max(standing, 1),
        "seconds": a["seconds"],
    }


def summarise_model(e: Evaluation, table: dict[str, dict]) -> dict:
    """What report.json says of one model."""
    select, fresh = table["worst"]["select"].mean(), table["worst"]["right"].mean()
    return {
        "clean": summarise(table["clean"]["right"]),
        "noise": summarise(table["noise"]["right"]),
        "attacks": {name: summarise_attack(e, name, table[name]) for name in e.attacks if name not in CONTROLS},
        # A noisy choice of the worst flatters the fresh score; the score that chose is too low.
        "robust": summarise(table["worst"]["right"]) | {"least": float(min(select, fresh))},
    }


# --------------------------------------------------------------------------------------------- the report on all models


def write_report(evaluations: list[Evaluation], about: dict, numbers: list[int], judge=find_faults) -> dict:
    """report.json, report.md, rows.tsv and samples.png, beside the models' folders. Returns what report.json holds.

    about: "checkpoint", "dataset" and "notes". numbers: the user's number of each picture. The last model is the one
    that is reported, and the first of two is what it is compared with."""
    tables = {e.name: gather(e) for e in evaluations}
    models = {e.name: summarise_model(e, tables[e.name]) for e in evaluations}
    faults = [fault for e in evaluations for fault in judge(e, tables[e.name])]
    e, worst = evaluations[-1], tables[evaluations[-1].name]["worst"]["right"].mean(1)
    clean, labels = tables[e.name]["clean"]["right"].mean(1), e.labels.numpy()
    by_class = {k: labels == k for k in np.unique(labels).tolist()}
    result = about | {"model": e.name, "n": len(labels), "eps": e.settings["eps"], "samples": e.settings["samples"]}
    result |= models[e.name] | {
        "models": models,
        "attacks": {name: a for model in models.values() for name, a in model["attacks"].items()},
        "commonest_class": max(float(of.mean()) for of in by_class.values()),
        "class_clean": {k: float(clean[of].mean()) for k, of in by_class.items()},
        "class_robust": {k: float(worst[of].mean()) for k, of in by_class.items()},
        "audit": {"passed": not faults, "messages": faults},
        "config": e.settings,
        "environment": merge_environments(tables),
    }
    if len(evaluations) == 2 and models["classifier"]["attacks"]:
        difference = worst - tables["classifier"]["worst"]["right"].mean(1)
        interval = np.quantile(bootstrap_means(difference), [0.025, 0.975]).tolist()
        result["to_classifier"] = {"difference": float(difference.mean()), "interval": interval}
    folder = e.folder.parents[1]
    datasets.write_text(folder / "report.json", json.dumps(result, indent=1))
    datasets.write_text(folder / "report.md", format_report(result))
    datasets.write_text(folder / "rows.tsv", format_rows(evaluations, tables, numbers))
    draw_samples(e, folder / "samples.png")
    return result


def merge_environments(tables: dict) -> dict:
    """Machine and software of all finished files; "mixed" where they differ."""
    texts = set().union(*(part["environment"] for table in tables.values() for part in table.values()))
    found = [json.loads(text) for text in sorted(texts)]
    values = {key: sorted({str(one.get(key)) for one in found}) for key in found[0]}
    return {key: some[0] if len(some) == 1 else f"mixed ({', '.join(some)})" for key, some in values.items()}


def format_percent(part: dict) -> str:
    return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * value for value in (part["accuracy"], *part["interval"])))


def format_report(r: dict) -> str:
    """report.md: warnings, the table, the audit, the meaning of it."""
    least, robust, commonest = (100 * v for v in (r["robust"]["least"], r["robust"]["accuracy"], r["commonest_class"]))
    lines = [f"# {r['checkpoint']} on {r['dataset']}: eps {format_eps(r['eps'])}, S = {r['samples']}, n = {r['n']}", ""]
    if not r["audit"]["passed"]:
        lines += ["**The audit failed**: these numbers are upper bounds, and robustness may be far lower.", ""]
    if r["clean"]["accuracy"] <= r["commonest_class"]:
        lines += [f"**No better than always answering the commonest class ({commonest:.1f} %)**: are these the "
                  "pictures that the model expects, and its classes in this order?", ""]  # fmt: skip
    if is_reduced(r["config"]):
        lines += ["**Reduced budget**: upper bounds, not benchmark numbers.", ""]
    lines += ["| model | attack | accuracy | every draw right | steps x draws | attacked | seconds |", "|---" * 7 + "|"]
    for model, part in r["models"].items():
        rows = {"none": part["clean"], "uniform noise": part["noise"], **part["attacks"]}
        for attack, row in (rows | {"**worst of all**": part["robust"]}).items():
            cells = [model, attack, format_percent(row), f"{100 * row['worst_draw']:.1f}", "", "", ""]
            if "steps" in row:
                cells[4:] = f"{row['steps']} x {row['eot']}", str(row["standing"]), f"{row['seconds']:.0f}"
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Accuracy: in %, the expectation over fresh draws of the noise, with a 95 % interval over pictures."]
    if robust - least >= 0.05:
        lines.append(f"The worst is chosen on noisy draws: the true value lies between {least:.1f} and {robust:.1f}.")
    if len(r["class_clean"]) < r["config"]["classes"] or commonest > 150 / len(r["class_clean"]):
        means = (100 * np.mean([*r[key].values()]) for key in ("class_clean", "class_robust"))
        lines.append("Classes: {} of {} are among the pictures, the commonest with {:.1f} %; mean over classes: clean "
                     "{:.1f}, worst of all {:.1f}.".format(len(r["class_clean"]), r["config"]["classes"], commonest,
                                                          *means))  # fmt: skip
    lines += ["", "Audit: passed on every picture." if r["audit"]["passed"] else "Audit: **failed**.", ""]
    lines += [f"- {message}" for message in r["audit"]["messages"]]
    lines += [f"- note: {note}" for note in r["notes"]]
    machine = ", ".join(f"{name} {value}" for name, value in r["environment"].items())
    asked = f"Decision: {r['config']['aggregation']}; attacks see: {r['config']['view'] or 'the decision'}"
    asked += f"{', in bfloat16' if r['config']['bf16'] else ''}; seed {r['config']['seed']}"
    return "\n".join([*lines, "", explain(r), "", f"{asked}; {machine}.", ""])


def explain(r: dict) -> str:
    """The meaning of the table, in a sentence."""
    if not r["audit"]["passed"]:
        return "Through such gradients an accuracy says little: what was found is found, what was not may be there."
    if not r["attacks"]:
        return "Nothing attacked the model: add --attack rand, say."
    if len(r["models"]) == 1:
        return (
            f"The {r['model']} keeps {100 * r['robust']['accuracy']:.1f} % of {r['n']} pictures under its worst attack."
        )
    if "to_classifier" not in r:
        return "No attack on the bare classifier to compare with: add --attack standard."
    low, high = (100 * value for value in r["to_classifier"]["interval"])
    difference = 100 * r["to_classifier"]["difference"]
    flattered = 100 * (r["robust"]["accuracy"] - r["robust"]["least"])  # at most, by a noisy choice of the worst
    verdict = f"the difference of {difference:+.1f} points ({low:+.1f} to {high:+.1f}) is within chance"
    if low > flattered:
        verdict = f"CARSO is more robust, by {difference:.1f} points ({low:.1f} to {high:.1f})"
    if high < 0:
        verdict = f"CARSO is less robust, by {-difference:.1f} points ({-high:.1f} to {-low:.1f})"
    return (
        f"CARSO keeps {100 * r['robust']['accuracy']:.1f} % of these {r['n']} pictures under its worst attack, its own "
        f"classifier {100 * r['models']['classifier']['robust']['accuracy']:.1f} %: {verdict}."
    )


def format_rows(evaluations: list[Evaluation], tables: dict, numbers: list[int]) -> str:
    """A line for each model, attack and picture, and one for its worst: right of so many fresh draws, the share that
    was right in the selection."""
    lines = ["picture\tlabel\tmodel\tattack\tattacked\tright\tdraws\tselect"]
    for e in evaluations:
        for name in (*e.attacks, "worst"):
            a = tables[e.name][name]
            for i, right in enumerate(a["right"]):
                cells = numbers[i], int(e.labels[i]), e.name, name, int(a["attacked"][i]), right.sum(), len(right)
                lines.append("\t".join(map(str, cells)) + f"\t{a['select'][i]:.3f}")
    return "\n".join(lines) + "\n"


@torch.no_grad()
def draw_samples(e: Evaluation, path: Path) -> None:
    """samples.png, a row a picture: clean | the worst | their difference, magnified | six reconstructions."""
    x = datasets.pixels(e.images[: e.settings["chunk"]][:8].to(e.device))
    adversarial = torch.from_numpy(datasets.load_npz(e.find_path("worst", 0))["adversarial"][: len(x)]).to(x)
    difference = 0.5 + (adversarial - x) / (2 * max(e.settings["eps"], 1e-9))
    tiles, headings = [x, adversarial, difference.clamp(0, 1)], ["clean", "attacked", "difference"]
    if hasattr(e.model, "purify"):
        e.model.manual_seed(0)
        tiles += e.model.purify(adversarial, e.model.draw(x, 6)).unbind(1)
        headings += ["reconstruction"] * (len(tiles) - 3)
    datasets.save_pictures(path, torch.stack(tiles, 1), headings)


# ------------------------------------------------------------------------------------------------------ command line


def build_parser(description: str, groups=()) -> argparse.ArgumentParser:
    """groups: names that stand for several attacks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, names = parser.add_argument, [*ATTACKS, *groups]
    add("--ckpt", help="a carso.pt; or, with --dataset, a file of a classifier's weights")
    add("--published", choices=PUBLISHED, help="the CARSO authors' released defence, fetched")
    add("--attack", nargs="+", choices=names, metavar="NAME", help=f"any of {', '.join(names)} "
        "(default: standard rand; of a classifier standard)")  # fmt: skip
    add("--no-cascade", action="store_true", help="every attack on every picture (default: a picture that an attack "
        "takes on every draw is not attacked again)")  # fmt: skip
    add("--eps", type=parse_eps, help="radius in pixels, such as 8/255 (default: the training's, else 8/255)")
    add("--samples", type=int, help="S, reconstructions a picture; 0: one, of z = 0 (default: the checkpoint's)")
    add("--aggregation", choices=AGGREGATIONS, default="robust", help="the decision (default: robust)")
    add("--view", choices=VIEWS, help="an output that attacks see instead of the decision")
    add("--bf16", action="store_true", help="attacks search in bfloat16; scores do not")
    add("--budget", choices=BUDGETS, help="default: reduced for digits, paper for the rest")
    add("--dataset", help="default: the one it was trained on")
    add("--data-dir", help="default: as in training")
    add("--out", help="folder (default: beside the checkpoint, named after the settings)")
    add("--seed", type=int, default=0, help="default: 0")
    add("--limit", type=int, default=1024, help="reconstructions at a time: lower it when memory runs out, and "
        "go on in the same folder (default: 1024)")  # fmt: skip
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    group = parser.add_argument_group("budget", "every number of it can be overridden")
    for name, (paper, reduced, meaning) in NUMBERS.items():
        options = ["--" + name.replace("_", "-")] + ["--n"] * (name == "pictures")
        kind, text = parse_eps if isinstance(paper, float) else int, f"{meaning} (paper {paper}, reduced {reduced})"
        group.add_argument(*options, dest=name, type=kind, metavar="NUMBER", help=text)
    return parser


def load_model(args, device: torch.device, load=load_carso) -> tuple[nn.Module, datasets.Dataset, dict, Path]:
    """The model that --ckpt or --published names, its data, what the checkpoint says of its training, and its file.
    load: reads a carso.pt. Raises ValueError, OSError."""
    if bool(args.ckpt) == bool(args.published):
        raise ValueError("either --ckpt or --published says what to attack")
    if args.published and args.dataset:
        raise ValueError(f"--published {args.published} is attacked on its own pictures: leave out --dataset")
    if args.published:
        return load_authors_defence(args.published, args.data_dir or "data", device)
    path = Path(args.ckpt).expanduser()
    if is_carso(path):
        model, state = load(path, device)
        name = args.dataset or state.get("dataset")
    else:
        model, state, name = None, {"fingerprint": load_tensors(path).get("fingerprint")}, args.dataset
    if name is None:
        raise ValueError(f"{path} does not say what it was trained on: add --dataset")
    if not args.dataset and name not in datasets.NAMES and not Path(name).exists():
        raise ValueError(f"{path} says that it was trained on {name}, which is not here: add --dataset")
    classes = state.get("classes")
    data = datasets.load(name, args.data_dir or state.get("data_dir", "data"), classes)
    if model is None:
        model = load_classifier(path, len(data.classes), data.mean, data.std).to(device)
    else:
        datasets.check_fit(data, model.purifier.config["image_shape"], classes or data.classes, path)
    return model.requires_grad_(False), data, state, path


def load_authors_defence(name: str, data_dir: str, device: torch.device) -> tuple:
    """The same four of the authors' released defence for a data set."""
    data = datasets.load(name, data_dir)
    folder = fetch_published(name, data_dir)
    model = load_published(folder, len(data.classes), data.test_images.shape[1:], data.mean, data.std).to(device)
    _, accuracy = next(iter(PUBLISHED[name].values()))
    check_clean_accuracy(model.classifier, data, accuracy, folder)
    return model.requires_grad_(False), data, {}, Path("runs") / f"published-{name}" / "authors"


def choose_numbers(args: argparse.Namespace, model: nn.Module, state: dict, data: datasets.Dataset) -> dict:
    """The budget, eps and S that the command line asks for. Raises ValueError for a number that makes no sense."""
    given = {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    numbers = BUDGETS[args.budget or ("reduced" if data.name == "digits" else "paper")] | given
    for name, value in (numbers | {"limit": args.limit}).items():
        if value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not positive")
    numbers["eps"] = state.get("config", {}).get("eps", 8 / 255) if args.eps is None else args.eps
    numbers["samples"] = getattr(model, "samples", 1) if args.samples is None else args.samples
    if not 0 <= numbers["eps"] <= 1:
        raise ValueError(f"--eps {numbers['eps']:g} is no distance between pixels in [0, 1]: write 8/255, say")
    if numbers["samples"] < 0:
        raise ValueError(f"--samples {numbers['samples']} is not 0 or more")
    return numbers | {"pictures": min(numbers["pictures"], len(data.test_labels))}


def choose_settings(args, model: nn.Module, state: dict, data: datasets.Dataset, weights: str | None = None) -> dict:
    """All that the evaluation's results depend on. weights: what identifies the model (default: a hash of its
    weights). Raises ValueError."""
    numbers = choose_numbers(args, model, state, data)
    usual = ["standard", "rand"] if hasattr(model, "purifier") else ["standard"]
    pictures = slice(numbers["pictures"])
    return numbers | {
        "weights": weights or hash_weights(model),
        # The normalisation of a bare classifier may not be among its weights.
        "normalisation": [list(model.config[key]) for key in ("mean", "std")]
        if isinstance(model, WideResNet)
        else None,
        "data": datasets.fingerprint(data.test_images[pictures], data.test_labels[pictures], data.classes),
        "classes": len(data.classes),
        "attacks": [name for name in ATTACKS if name in (*CONTROLS, *(args.attack or usual))],
        "cascade": not args.no_cascade,
        "aggregation": args.aggregation,
        "view": args.view,
        "bf16": args.bf16,
        "seed": args.seed,
    }


def claim_folder(args: argparse.Namespace, settings: dict, source: Path) -> Path:
    """The folder of these settings, which no others may share: --out, or beside the checkpoint. Raises ValueError."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=3).hexdigest()
    eps = format_eps(settings["eps"]).replace("/", "_")
    name = f"eval-eps{eps}-S{settings['samples']}-n{settings['pictures']}-{digest}"
    folder = Path(args.out).expanduser() if args.out else source.parent / name
    datasets.check_config(folder / "config.json", settings, "--out")
    return folder.resolve()


ONE_DRAW = {"eot": 1, "select": 1, "draws": 1}  # tells all about a deterministic model


def build_evaluations(model: nn.Module, data, settings: dict, folder: Path, device, limit: int) -> list[Evaluation]:
    """Two of a CARSO, its bare classifier first; one of any other model."""
    chosen = {name: ATTACKS[name] for name in settings["attacks"]}
    pictures, place, once = slice(settings["pictures"]), folder / "work", settings | ONE_DRAW
    build = partial(Evaluation, images=data.test_images[pictures], labels=data.test_labels[pictures], device=device,
                    limit=limit)  # fmt: skip
    if not hasattr(model, "purifier"):
        is_known = isinstance(model, WideResNet)
        name, used = ("classifier", once) if is_known else ("model", settings)
        return [build(name, model, attacks=chosen, settings=used, folder=place / name)]
    model.samples = settings["samples"]
    of_classifier = {k: a for k, a in chosen.items() if k in CONTROLS or a.on == "classifier"}
    of_defence = {k: a for k, a in chosen.items() if k in CONTROLS or a.on == "defence"}
    used = settings if model.samples else once
    return [
        build("classifier", model.classifier, attacks=of_classifier, settings=once, folder=place / "classifier"),
        build("defence", model, attacks=of_defence, settings=used, folder=place / "defence"),
    ]


def say(text: str) -> None:
    """One process speaks for all."""
    if read_ranks()[0] == 0:
        print(text, flush=True)


def run_chunks(evaluations: list[Evaluation]) -> bool:
    """Every n-th chunk, for process r of n. True if all chunks of all processes are finished."""
    rank, count = read_ranks()
    mine, began = evaluations[0].starts[rank::count], time.monotonic()
    for done, start in enumerate(mine, 1):
        for e in evaluations:
            evaluate_chunk(e, start)
        say(f"about {(time.monotonic() - began) / done * (len(mine) - done):.0f} s left")
    return all(e.find_path("worst", start).is_file() for e in evaluations for start in e.starts)


def find_notes(data: datasets.Dataset, state: dict, source: Path) -> list[str]:
    """What the loader says of the pictures, and whether the checkpoint was trained on other ones than those at hand."""
    notes, trained_on = list(data.notes), state.get("fingerprint")
    if trained_on and len(data.train_labels):
        if trained_on != datasets.fingerprint(data.train_images, data.train_labels, data.classes):
            notes.append(f"{source} was trained on other pictures than the training split of {data.name}: were these "
                         "test pictures among them?")  # fmt: skip
    return notes


def run(evaluations: list[Evaluation], about: dict, numbers: list[int], judge=find_faults) -> int:
    """The chunks, then the report, if all are there. The exit status: 0, or 3 if the audit failed. See
    `write_report`."""
    settings, folder = evaluations[-1].settings, evaluations[-1].folder.parents[1]
    for note in about["notes"]:
        say(f"note: {note}")
    say(f"{settings['pictures']} pictures at eps {format_eps(settings['eps'])} in chunks of {settings['chunk']}; on "
        f"each the audit, then {', '.join(settings['attacks'])}; finished work is kept in {folder}")  # fmt: skip
    if not run_chunks(evaluations):
        say("other processes are at work, and the last one writes the report; if none is, give the command again")
        return 0
    result = write_report(evaluations, about, numbers, judge)
    print((folder / "report.md").read_text(encoding="utf-8"))
    print(f"written to {shlex.quote(str(folder))}")
    return 0 if result["audit"]["passed"] else 3


def main(argv=None) -> int:
    args = build_parser(__doc__).parse_args(argv)
    device = start_device(args.device)
    model, data, state, source = load_model(args, device)
    settings = choose_settings(args, model, state, data)
    folder = claim_folder(args, settings, source)
    evaluations = build_evaluations(model, data, settings, folder, device, args.limit)
    about = {"checkpoint": str(source), "dataset": data.name, "notes": find_notes(data, state, source)}
    return run(evaluations, about, data.test_numbers.tolist())


if __name__ == "__main__":
    run_script("evaluate.py", main)
