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
evaluation goes on under the same command, with any number of processes. Who finds all files writes the report.

The way of a picture: main, run, run_chunks, evaluate_chunk, do_once, run_attack, score, score_worst; then from the
files: gather, summarise_model, write_report.

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
from attacks import (
    LOSSES,
    ascend,
    find_missing_gradients,
    find_unexplained,
    format_eps,
    objective,
    parse_number,
    project,
    random_point,
)
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
    "eot": (20, 4, "draws averaged for a gradient"),
    "pgd_steps": (200, 20, "of PGD+EoT"),
    "pgd_step_size": (0.007, 0.02, "of PGD+EoT, in pixels"),
    "queries": (5000, 200, "of Square"),
    "targets": (9, 3, "classes that targeted attacks aim at"),
    "select": (60, 20, "draws that choose the worst candidate of a picture"),
    "draws": (20, 10, "fresh draws that score it"),
    "chunk": (128, 50, "pictures in a unit of work"),
}
BUDGETS = {
    "paper": {name: paper for name, (paper, _, _) in NUMBERS.items()},
    "reduced": {name: reduced for name, (_, reduced, _) in NUMBERS.items()},
}

# Of a deterministic model one draw tells all.
ONE_DRAW = {"deterministic": True, "eot": 1, "select": 1, "draws": 1}


def is_reduced(settings: dict) -> bool:
    """True if an attack works less, or a score rests on fewer draws, than in the paper's budget."""
    work = NUMBERS.keys() - {"pictures", "pgd_step_size", "chunk"}
    if settings.get("deterministic"):
        work = work - ONE_DRAW.keys()
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
    """A model behind one view: pictures -> logits (B, K), while counting gradients, and those that do not exist.

    model: CARSO, or any nn.Module from pictures to logits. view: members' logits (B, S, K) -> (B, K), ignored for a
    model without members. limit: at most so many reconstructions at a time, for memory; answers depend on it by
    rounding alone."""

    def __init__(self, model: nn.Module, view=aggregate.robust_logits, samples: int = 1, limit: int = 1024):
        super().__init__()
        self.model, self.view, self.limit = model, view, limit
        self.has_members = hasattr(model, "member_logits")
        self.samples = max(1, samples) if self.has_members else 1
        self.count = {"gradients": 0, "nonfinite": 0, "zero": 0, "nonfinite_logits": 0}

    def draw(self, x: torch.Tensor, draws: int) -> torch.Tensor | None:
        """Latent noise for so many evaluations of every picture, (B, E S, Z); None for a model without members."""
        return self.model.draw(x, draws * self.samples) if self.has_members else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer(x, 1)[:, 0]

    def answer(self, x: torch.Tensor, draws: int, z: torch.Tensor | None = None) -> torch.Tensor:
        """E evaluations of every picture, (B, E, K), with latent noise z (B, E S, Z), drawn when None. A CARSO looks at
        the picture once for all of them; for a model without members each draw is a pass of its own."""
        if x.requires_grad:
            x = x.view_as(x)  # AutoAttack has one leaf for several draws, on which all their hooks would stay
            x.register_hook(self._count_gradients)
        if self.has_members:
            z = self.draw(x, draws) if z is None else z
            members = self._compute_members(x, z)  #                                (B, E S, K)
            logits = self.view(members.unflatten(1, (draws, -1)).flatten(0, 1))  #  (B E, K)
            logits = logits.unflatten(0, (len(x), draws))
        else:
            logits = torch.stack([self.model(x) for _ in range(draws)], 1)
        logits = logits.to(x.dtype)
        self.count["nonfinite_logits"] += (~logits.detach().isfinite()).flatten(1).any(1).sum()
        return logits

    def _compute_members(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The members' logits (B, E S, K), at most `limit` of them at a time. Beyond that their graph is not kept, but
        computed again in the backward pass."""
        compute = self.model.member_logits
        if z.shape[:2].numel() > self.limit and x.requires_grad and torch.is_grad_enabled():
            compute = partial(checkpoint, compute, use_reentrant=False)
        rows = max(1, self.limit // z.shape[1])
        parts = []
        for pictures, codes in zip(x.split(rows), z.split(rows)):
            parts.append(torch.cat([compute(pictures, some) for some in codes.split(self.limit, 1)], 1))
        return torch.cat(parts)

    def _count_gradients(self, gradient: torch.Tensor) -> None:
        flat = gradient.flatten(1)  # the counts stay on the device: reading one would wait for it
        self.count["gradients"] += len(flat)
        self.count["nonfinite"] += (~flat.isfinite()).any(1).sum()
        self.count["zero"] += (flat == 0).all(1).sum()


def batched_objective(seen: Seen, y: torch.Tensor, loss="ce", draws: int = 1, z: torch.Tensor | None = None):
    """`attacks.objective` with all draws of EoT in one batch: for CARSO one classifier pass and one backward serve a
    step, as far as the limit allows. z: (B, E S, Z), to keep the noise fixed."""
    if not seen.has_members:
        return objective(seen, y, loss, draws)

    def losses_and_gradient(x):
        noise = seen.draw(x, draws) if z is None else z
        rows = max(1, seen.limit // noise.shape[1])  # with all their draws, so that nothing is computed twice
        parts = []
        for pictures, labels, codes in zip(x.split(rows), y.split(rows), noise.split(rows)):
            answer = partial(seen.answer, draws=draws, z=codes)
            parts.append(objective(answer, labels, loss)(pictures))
        losses, gradients = zip(*parts)
        return torch.cat(losses), torch.cat(gradients)

    return losses_and_gradient


@torch.no_grad()
def score(seen: Seen, x: torch.Tensor, y: torch.Tensor, draws: int, z: torch.Tensor | None = None) -> torch.Tensor:
    """Whether each of `draws` independent answers is right, (B, E) bool; NaN is no answer. z: (B, E S, Z), drawn when
    None."""
    logits = seen.answer(x, draws, z)
    return (logits.argmax(2) == y[:, None]) & ~logits.isnan().any(2)


def reseed(seed: int, model: nn.Module) -> None:
    """Set torch's generator, and the model's own, where it has one."""
    torch.manual_seed(seed)
    if hasattr(model, "manual_seed"):
        model.manual_seed(seed)


# ------------------------------------------------------------------------------------- the paper's attacks, section 5.1


@dataclasses.dataclass(frozen=True)
class Attack:
    """run(seen, x, y, settings) -> candidates (N, B, C, H, W) in the eps-ball and in [0, 1]. Random numbers come from
    torch's global generator and the model's own."""

    run: Callable
    on: tuple = ("defence",)  # of a CARSO: the whole, or the bare "classifier", or both
    steps: str = "steps"  #     the setting that says how long it is
    eot: bool = True  #         averages over draws of the noise


def no_attack(seen, x, y, settings):
    return x[None]


def uniform_noise(seen, x, y, settings):
    """The effect of an attack that ignores the model."""
    return random_point(x, settings["eps"])[None]


def pgd_eot(seen, x, y, settings):
    """PGD with EoT (paper, table 12), from a random start."""
    eps, steps, step_size = settings["eps"], settings["pgd_steps"], settings["pgd_step_size"]
    losses_and_gradient = batched_objective(seen, y, "ce", settings["eot"])
    return ascend(losses_and_gradient, x, random_point(x, eps), eps, steps, step_size)[None]


def build_apgd(kind, seen: Seen, x: torch.Tensor, settings: dict, **more):
    """AutoAttack's Auto-PGD of one kind, with the settings' steps."""
    logger = logging.getLogger("auto-attack")
    logger.setLevel(logging.ERROR)
    return kind(seen, n_iter=settings["steps"], eps=settings["eps"], device=x.device, logger=logger, **more)


def count_classes(seen: Seen, x: torch.Tensor) -> int:
    with torch.no_grad():
        return seen(x[:1]).shape[1]


def autoattack_rand(seen, x, y, settings):
    """The attacks of AutoAttack's version for random defences (Croce and Hein 2020): APGD on cross-entropy and on DLR.

    They run on all pictures here. AutoAttack's own wrapper drops each picture that a single draw mislabels, and the
    later and stronger loss never sees it. Two candidates a loss: the point of the largest loss, and the last one that
    was mislabelled, by a single draw, or else the start."""
    from pyautoattack.autopgd_base import APGDAttack

    candidates = []
    losses = LOSSES if count_classes(seen, x) > 3 else ["ce"]  # AutoAttack's DLR needs four classes
    for loss in losses:
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

    eps = settings["eps"]
    classes = count_classes(seen, x)
    suite = AutoAttack(seen, version="standard", eps=eps, seed=torch.initial_seed() % 2**31, device=x.device)
    # Both APGDs are built anew: changing n_iter afterwards would leave their schedules at 100 steps.
    targets = min(settings["targets"], classes - 1)
    suite.apgd = build_apgd(APGDAttack, seen, x, settings)
    suite.apgd_targeted = build_apgd(APGDAttack_targeted, seen, x, settings, n_target_classes=targets)
    suite.fab.n_target_classes = targets
    suite.fab.n_iter = settings["steps"]
    suite.square.n_queries = settings["queries"]
    if classes <= 3:  # targeted APGD and FAB need more classes than that
        suite.attacks_to_run = ["apgd-ce", "fab", "square"]
    adversarial, _ = suite.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))
    return project(adversarial.detach(), x, eps)[None]


# They count in the worst of all, but attack no model.
BASELINES = ("clean", "noise")
# In the order in which they run.
ATTACKS = {
    "clean": Attack(no_attack, on=("classifier", "defence")),
    "noise": Attack(uniform_noise, on=("classifier", "defence")),
    "pgd-eot": Attack(pgd_eot, steps="pgd_steps"),
    "rand": Attack(autoattack_rand),
    "standard": Attack(autoattack_standard, on=("classifier",), eot=False),
}


# ------------------------------------------------------------------------------------ one model, and its finished work


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One model, its attacks in the order in which they run, and the folder of the report and of all finished work."""

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
    def work_names(self) -> list[str]:
        """The names of a chunk's finished works, in the order in which they are done."""
        return ["audit-start", *self.attacks, "worst", "audit-end"]

    def see_decision(self) -> Seen:
        return Seen(self.model, AGGREGATIONS[self.settings["aggregation"]], self.settings["samples"], self.limit)

    def see_view(self, members: int | None = None) -> Seen:
        """The model as attacks see it; members: at most so many of them, which tell enough where nothing is scored."""
        seen = self.see_decision()
        seen.view = VIEWS.get(self.settings["view"], seen.view)
        seen.samples = min(seen.samples, members or seen.samples)
        return seen

    def reseed_for(self, *what) -> int:
        """Random numbers follow from what is done, never from the order or the place in which it is done."""
        text = repr((*what, self.settings["seed"]))
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
        reseed(seed, self.model)
        return seed

    def search_precision(self):
        """The precision of attacks: with --bf16, bfloat16 inside the networks, float32 for logits and losses."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings["bf16"])

    def find_path(self, name: str, start: int) -> Path:
        return self.folder / "work" / self.name / f"{name}-{start:06d}.npz"

    def do_once(self, name: str, start: int, work: Callable) -> dict[str, np.ndarray]:
        """The arrays that work() returns: read where their file exists, else made and kept."""
        path = self.find_path(name, start)
        if path.is_file():
            return datasets.load_npz(path)
        arrays = {"environment": np.array([describe_environment(self.device)])}
        for key, value in work().items():
            arrays[key] = value.cpu().numpy() if isinstance(value, torch.Tensor) else np.array(value)
        datasets.write_npz(path, **arrays)
        return arrays


def describe_environment(device: torch.device) -> str:
    """The machine, the software and the day."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, TF32 {torch.backends.cudnn.allow_tf32}"
    return f"{machine}, torch {torch.__version__}, python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"


# --------------------------------------------------------------------------------------------------------- the audit


def hold_noise(seen: Seen, x: torch.Tensor, seed: int) -> Callable:
    """The model as a function of pictures alone: (B, C, H, W) -> logits (B, K), under noise that the seed fixes."""
    reseed(seed, seen.model)
    z = seen.draw(x, 1)

    def answer(pictures):
        reseed(seed, seen.model)
        return seen.answer(pictures, 1, z)[:, 0]

    return answer


def find_unexplained_in_each_precision(e: Evaluation, fix: Callable, start, end, y: torch.Tensor) -> torch.Tensor:
    """`find_unexplained` in float32; with --bf16 in bfloat16, too, where rounding hides single pictures."""
    found = find_unexplained(fix, start, end, y)
    if e.settings["bf16"]:
        with e.search_precision():
            found = found | find_unexplained(fix, start, end, y, by_majority=True)
    return found


UNEXPLAINED = "gradients that do not explain how the answer changes"


def audit_start(e: Evaluation, start: int, x: torch.Tensor, y: torch.Tensor) -> dict:
    """The audit where attacks begin, at a random point of the ball. Fault -> (B,) bool; and the answers to the clean
    pictures, which `audit_end` compares.

    Two ways lead from that point: to the corner of the ball that the gradient points to, and to a random one. On the
    second way changes nearly cancel, so that single pictures of an honest model go wrong."""
    seed = e.reseed_for("audit-start", start)
    with torch.no_grad():
        answers = hold_noise(e.see_decision(), x, seed)(x)
    eps = max(e.settings["eps"], 1 / 255)  # at radius 0 there is no way to go
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    point = low + (high - low) * torch.rand_like(x)
    random_corner = torch.where(torch.rand_like(x) < 0.5, low, high)

    with e.search_precision():
        faults, gradient = find_missing_gradients(hold_noise(e.see_view(), point, seed), point, y)
    uphill = torch.where(gradient > 0, high, torch.where(gradient < 0, low, point))
    fix = partial(hold_noise, e.see_view(members=2), seed=seed)
    unexplained = find_unexplained_in_each_precision(e, fix, point, uphill, y)
    unexplained |= find_unexplained(fix, point, random_corner, y, by_majority=True)
    return faults | {UNEXPLAINED: unexplained, "answers": answers}


def audit_end(e: Evaluation, start: int, x, y, worst: torch.Tensor, answers: np.ndarray) -> dict:
    """The audit where attacks ended, and on the way there. And the clean pictures once more, under the noise of
    `answers` (B, K): a model that remembers may answer otherwise by now. Fault -> (B,) bool."""
    seed = e.reseed_for("audit-start", start)  # of the beginning, so that clean pictures meet the same noise again
    with e.search_precision():
        faults, _ = find_missing_gradients(hold_noise(e.see_view(), worst, seed), worst, y)
    fix = partial(hold_noise, e.see_view(members=2), seed=seed)
    faults[UNEXPLAINED] = find_unexplained_in_each_precision(e, fix, x, worst, y)
    with torch.no_grad():
        now = hold_noise(e.see_decision(), x, seed)(x)  # last, after everything that is counted
    before = torch.from_numpy(answers).to(now)
    changed = (now - before).abs().amax(1) > 0.01 * before.abs().amax(1)
    return faults | {"other answers than at the beginning of the evaluation": changed}


# ------------------------------------------------------------------------------------------------------- the chunks


def say(text: str) -> None:
    """One process speaks for all."""
    if read_ranks()[0] == 0:
        print(text, flush=True)


def is_allowed(candidates: torch.Tensor, x: torch.Tensor, eps: float) -> bool:
    """True if candidates (N, B, C, H, W) lie in the ball around x and in [0, 1]; False for NaN."""
    return bool((((candidates - x).abs() <= eps + 1e-5) & (candidates >= 0) & (candidates <= 1)).all())


def run_attack(e: Evaluation, name: str, start: int, x: torch.Tensor, y: torch.Tensor, standing: torch.Tensor) -> dict:
    """One attack on the pictures that stand, (B,) bool: find candidates, choose each picture's worst, score it anew."""
    began = time.time()
    view, decision = e.see_view(), e.see_decision()
    adversarial = x.clone()
    select = torch.ones(len(x), device=x.device)  # the share of the selection's draws that was right
    right = torch.zeros(len(x), e.settings["draws"], dtype=torch.bool, device=x.device)

    if standing.any():
        clean, labels = x[standing], y[standing]
        e.reseed_for("attack", name, start)
        with e.search_precision():
            candidates = e.attacks[name].run(view, clean, labels, e.settings)
        if not is_allowed(candidates, clean, e.settings["eps"]):
            raise RuntimeError(f"attack {name} left the eps-ball or [0, 1]: this is a fault of the attack")

        shares = []
        for candidate in candidates:
            e.reseed_for("select", start)  # the same noise for all candidates, and of a CARSO for all attacks
            z = decision.draw(x, e.settings["select"])  # for all pictures, so that none depends on which others stand
            z = None if z is None else z[standing]
            shares.append(score(decision, candidate, labels, e.settings["select"], z).float().mean(1))
        select[standing], chosen = torch.stack(shares).min(0)
        adversarial[standing] = candidates[chosen, torch.arange(len(chosen))]

        e.reseed_for("score", name, start)
        right[standing] = score(decision, adversarial[standing], labels, e.settings["draws"])

    seconds = time.time() - began
    say(f"{e.name:>10} {name:>15}  pictures {start} to {start + len(x) - 1}  right {right.float().mean():6.1%}  "
        f"{seconds:.0f} s")  # fmt: skip
    found = {"adversarial": adversarial, "select": select, "right": right, "attacked": standing, "seconds": seconds}
    return found | view.count


def score_worst(e: Evaluation, start: int, y: torch.Tensor, results: dict[str, dict]) -> dict:
    """Each picture's worst over all attacks, the least share in the selection, on fresh draws. Among equals the first
    attack counts, and baselines come last."""
    attacks = [results[name] for name in sorted(results, key=lambda name: name in BASELINES)]
    select = np.where([a["attacked"] for a in attacks], [a["select"] for a in attacks], np.inf)  # (attacks, B)
    adversarial = np.stack([a["adversarial"] for a in attacks])[select.argmin(0), np.arange(len(y))]
    e.reseed_for("final", start)
    right = score(e.see_decision(), torch.from_numpy(adversarial).to(e.device), y, e.settings["draws"])
    return {"adversarial": adversarial, "select": select.min(0), "right": right, "attacked": np.ones(len(y), bool)}


def evaluate_chunk(e: Evaluation, start: int) -> None:
    """All work on the chunk that begins at picture `start`: the audit where attacks begin, the attacks in order, each
    picture's worst on fresh draws, the audit where the attacks ended."""
    rows = slice(start, start + e.settings["chunk"])
    x, y = datasets.pixels(e.images[rows].to(e.device)), e.labels[rows].to(e.device)

    audit = e.do_once("audit-start", start, partial(audit_start, e, start, x, y))

    results = {}
    standing = torch.ones(len(x), dtype=torch.bool, device=e.device)
    for name in e.attacks:
        results[name] = e.do_once(name, start, partial(run_attack, e, name, start, x, y, standing))
        if e.settings["cascade"] and name != "noise":  # which is no attack, and takes nothing
            standing = standing & torch.from_numpy(results[name]["select"] > 0).to(e.device)

    worst = e.do_once("worst", start, partial(score_worst, e, start, y, results))
    ends = torch.from_numpy(worst["adversarial"]).to(e.device)
    e.do_once("audit-end", start, partial(audit_end, e, start, x, y, ends, audit["answers"]))


def run_chunks(evaluations: list[Evaluation]) -> bool:
    """Every n-th chunk, for process r of n. True if all chunks of all processes are finished."""
    rank, count = read_ranks()
    mine = evaluations[0].starts[rank::count]
    began = time.monotonic()
    for done, start in enumerate(mine, 1):
        for e in evaluations:
            evaluate_chunk(e, start)
        say(f"about {(time.monotonic() - began) / done * (len(mine) - done):.0f} s left")
    paths = [e.find_path(name, start) for e in evaluations for name in e.work_names for start in e.starts]
    return all(path.is_file() for path in paths)


# ------------------------------------------------------------------------------------------------- numbers of one model


def gather(e: Evaluation) -> dict[str, dict]:
    """All files in one: name of the work -> its arrays over the pictures of all chunks; counts are summed. Adversarial
    pictures are left in their files."""
    table = {}
    for name in e.work_names:
        chunks = [datasets.load_npz(e.find_path(name, start)) for start in e.starts]
        table[name] = {}
        for key in chunks[0].keys() - {"adversarial"}:
            values = [chunk[key] for chunk in chunks]
            table[name][key] = np.concatenate(values) if values[0].ndim else sum(map(float, values))
    return table


def wilson(mean: float, n: int) -> list[float]:
    """95 % interval of a mean of n numbers in [0, 1] (Wilson; for expectations between 0 and 1 it is on the wide
    side)."""
    z = 1.96
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def bootstrap_means(difference: np.ndarray, times: int = 10_000) -> np.ndarray:
    """Means of a difference (n,) over pictures that are resampled, (times,): their quantiles are an interval."""
    n = len(difference)
    rng = np.random.default_rng(0)
    return np.array([difference[rng.integers(0, n, n)].mean() for _ in range(times)])


def summarise(right: np.ndarray) -> dict:
    """Of the pictures' draws, (n, E) bool: the accuracy, its interval, and the share that all draws get right."""
    mean = float(right.mean())
    return {"accuracy": mean, "interval": wilson(mean, len(right)), "worst_draw": float(right.all(1).mean())}


def summarise_model(e: Evaluation, table: dict[str, dict]) -> dict:
    """One model's part of report.json."""
    attacks = {}
    for name, attack in e.attacks.items():
        if name in BASELINES:
            continue
        a = table[name]
        attacks[name] = summarise(a["right"]) | {
            "target": e.name,
            "standing": int(a["attacked"].sum()),
            "steps": e.settings[attack.steps],
            "eot": e.settings["eot"] if attack.eot else 1,
            "nonfinite_gradients": a["nonfinite"] / max(a["gradients"], 1),
            "zero_gradients": a["zero"] / max(a["gradients"], 1),
            "seconds": a["seconds"],
        }
    worst = table["worst"]
    return {
        "clean": summarise(table["clean"]["right"]),
        "noise": summarise(table["noise"]["right"]),
        "attacks": attacks,
        # A noisy choice of the worst flatters the fresh score; the score that chose is too low.
        "robust": summarise(worst["right"]) | {"least": float(min(worst["select"].mean(), worst["right"].mean()))},
    }


def find_faults(e: Evaluation, table: dict[str, dict]) -> list[str]:
    """Sentences on all that makes the audit of this model fail."""
    messages = []
    for name, where in (("audit-start", "where the attacks begin"), ("audit-end", "where the attacks ended")):
        faults = {key: values for key, values in table[name].items() if values.dtype == bool}  # not what is kept beside
        for fault, pictures in sorted(faults.items()):
            if pictures.any():
                messages.append(f"{e.name}: {int(pictures.sum())} of {len(pictures)} pictures have {fault}, {where}")
    for name in e.attacks:
        if table[name]["nonfinite"] + table[name]["nonfinite_logits"] > 0:
            messages.append(f"{e.name}, {name}: outputs or gradients were not finite, and the attack did not move")
    followers = [table[name] for name in e.attacks if table[name]["gradients"] > 0]
    if followers and all(a["zero"] > 0.9 * a["gradients"] for a in followers):  # one loss may be flat
        messages.append(f"{e.name}: most gradients of every attack were zero")
    return messages


# --------------------------------------------------------------------------------------------- the report on all models


def format_table(models: dict[str, dict]) -> list[str]:
    lines = ["| model | attack | accuracy | every draw right | steps x draws | attacked | seconds |", "|---" * 7 + "|"]
    for model, part in models.items():
        rows = {"none": part["clean"], "uniform noise": part["noise"]} | part["attacks"]
        if part["attacks"]:
            rows["**worst of all**"] = part["robust"]
        for attack, row in rows.items():
            low, high = (100 * bound for bound in row["interval"])
            cells = [model, attack, f"{100 * row['accuracy']:.1f} ({low:.1f} to {high:.1f})"]
            cells.append(f"{100 * row['worst_draw']:.1f}")
            if "steps" in row:
                cells += [f"{row['steps']} x {row['eot']}", str(row["standing"]), f"{row['seconds']:.0f}"]
            else:
                cells += ["", "", ""]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def format_report(r: dict) -> str:
    """report.md: warnings, the table, the audit, the meaning of it."""
    passed = r["audit"]["passed"]
    config = r["config"]
    lines = [f"# {r['checkpoint']} on {r['dataset']}: eps {format_eps(r['eps'])}, S = {r['samples']}, n = {r['n']}", ""]
    if not passed:
        lines += ["**The audit failed**: these numbers are upper bounds, and robustness may be far lower.", ""]
    if r["clean"]["accuracy"] <= r["commonest_class"]:
        lines += [f"**No better than always answering the commonest class ({100 * r['commonest_class']:.1f} %)**: are "
                  "these the pictures that the model expects, and its classes in this order?", ""]  # fmt: skip
    if is_reduced(config):
        lines += ["**Reduced budget**: upper bounds, not benchmark numbers.", ""]
    lines += format_table(r["models"])
    lines += ["", "Accuracy: in %, the expectation over fresh draws of the noise, with a 95 % interval over pictures."]
    if config["cascade"]:
        lines.append("A picture that an attack took on every draw of the selection is not attacked again, and counts "
                     "as wrong from there on; the worst of all scores it anew.")  # fmt: skip
    least, robust = 100 * r["robust"]["least"], 100 * r["robust"]["accuracy"]
    if robust - least >= 0.05:
        lines.append(f"The worst is chosen on noisy draws: the true value lies between {least:.1f} and {robust:.1f}.")
    lines += ["", "Audit: passed on every picture." if passed else "Audit: **failed**."]
    lines += [f"- {message}" for message in r["audit"]["messages"]]
    lines += [f"- note: {note}" for note in r["notes"]]
    if passed:
        lines += ["", explain(r)]
    precision = ", in bfloat16" if config["bf16"] else ""
    lines += ["", f"Decision: {config['aggregation']}; attacks see: {config['view'] or 'the decision'}{precision}; "
              f"seed {config['seed']}; {'; '.join(r['environment'])}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def explain(r: dict) -> str:
    """The meaning of the table, in a sentence or two."""
    if not r["models"][r["model"]]["attacks"]:
        return f"Nothing attacked the {r['model']}: add --attack rand, say."
    text = f"The {r['model']} keeps {100 * r['robust']['accuracy']:.1f} % of {r['n']} pictures under its worst attack."
    if "to_classifier" in r:
        low, high = (100 * bound for bound in r["to_classifier"]["interval"])
        text += f" Its bare classifier keeps {100 * r['models']['classifier']['robust']['accuracy']:.1f} %: the "
        text += f"difference is {100 * r['to_classifier']['difference']:+.1f} points ({low:+.1f} to {high:+.1f})."
    return text


def format_rows(evaluations: list[Evaluation], tables: dict, picture_numbers: list[int]) -> str:
    """A line for each model, attack and picture, and one for its worst: right of so many fresh draws, the share that
    was right in the selection. Of a picture that was not attacked: 0, and the share 1."""
    lines = ["picture\tlabel\tmodel\tattack\tattacked\tright\tdraws\tselect"]
    for e in evaluations:
        for name in (*e.attacks, "worst"):
            a = tables[e.name][name]
            for i, right in enumerate(a["right"]):
                cells = [picture_numbers[i], int(e.labels[i]), e.name, name, int(a["attacked"][i])]
                cells += [right.sum(), len(right), f"{a['select'][i]:.3f}"]
                lines.append("\t".join(map(str, cells)))
    return "\n".join(lines) + "\n"


@torch.no_grad()
def draw_samples(e: Evaluation, path: Path) -> None:
    """samples.png, a row a picture: clean | the worst | their difference, magnified | six reconstructions. Below them
    the true class, the model's answer to the worst, and the labels of the reconstructions."""
    adversarial = torch.from_numpy(datasets.load_npz(e.find_path("worst", 0))["adversarial"][:8]).to(e.device)
    x = datasets.pixels(e.images[: len(adversarial)].to(e.device))
    difference = 0.5 + (adversarial - x) / (2 * max(e.settings["eps"], 1e-9))
    tiles = [x, adversarial, difference.clamp(0, 1)]
    headings = ["clean", "attacked", "difference"]
    reseed(0, e.model)
    answers = e.see_decision()(adversarial).argmax(1)
    captions = [[f"is {label}", f"answer {answer}", ""] for label, answer in zip(e.labels.tolist(), answers.tolist())]
    if hasattr(e.model, "purifier"):
        reconstructions, members = e.model.answers(adversarial, e.model.draw(x, 6))
        tiles += reconstructions.unbind(1)
        headings += ["reconstruction"] * 6
        for line, labels in zip(captions, members.argmax(2).tolist()):
            line += [f"label {label}" for label in labels]
    datasets.save_pictures(path, torch.stack(tiles, 1), headings, captions)


def write_report(evaluations: list[Evaluation], about: dict, picture_numbers: list[int], judge=find_faults) -> dict:
    """report.json, report.md, rows.tsv and samples.png. Returns what report.json holds.

    about: "checkpoint", "dataset" and "notes". picture_numbers: as the user counts them. judge: finds a model's faults.
    The last model is the one that is reported, and the first of two is what it is compared with: clean, noise and
    robust are the last model's, attacks are all models' (target says whose)."""
    tables = {e.name: gather(e) for e in evaluations}
    models = {e.name: summarise_model(e, tables[e.name]) for e in evaluations}
    messages = [message for e in evaluations for message in judge(e, tables[e.name])]
    environments = [work["environment"] for table in tables.values() for work in table.values()]
    e = evaluations[-1]
    n = len(e.labels)
    report = about | {"model": e.name, "n": n, "eps": e.settings["eps"], "samples": e.settings["samples"]}
    report |= models[e.name] | {
        "models": models,
        "attacks": {name: a for model in models.values() for name, a in model["attacks"].items()},
        "commonest_class": int(e.labels.bincount().max()) / n,
        "audit": {"passed": not messages, "messages": messages},
        "config": e.settings,
        "environment": np.unique(np.concatenate(environments)).tolist(),
    }
    if len(evaluations) == 2 and all(model["attacks"] for model in models.values()):
        defence, classifier = (tables[name]["worst"]["right"].mean(1) for name in ("defence", "classifier"))
        interval = np.quantile(bootstrap_means(defence - classifier), [0.025, 0.975]).tolist()
        report["to_classifier"] = {"difference": float((defence - classifier).mean()), "interval": interval}
    datasets.write_text(e.folder / "report.json", json.dumps(report, indent=1))
    datasets.write_text(e.folder / "report.md", format_report(report))
    datasets.write_text(e.folder / "rows.tsv", format_rows(evaluations, tables, picture_numbers))
    draw_samples(e, e.folder / "samples.png")
    return report


# ------------------------------------------------------------------------------------------------------ command line


def build_parser(description: str, groups=()) -> argparse.ArgumentParser:
    """groups: names that stand for several attacks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = [*ATTACKS, *groups]
    add("--ckpt", help="a carso.pt; or, with --dataset, a file of a classifier's weights")
    add("--published", choices=PUBLISHED, help="the CARSO authors' released defence, fetched")
    add("--attack", nargs="+", choices=names, metavar="NAME", help=f"any of {', '.join(names)} "
        "(default: standard rand; of a classifier standard)")  # fmt: skip
    add("--no-cascade", action="store_true", help="every attack on every picture (default: a picture that an attack "
        "takes on every draw is not attacked again)")  # fmt: skip
    add("--eps", type=parse_number, help="radius in pixels, such as 8/255 (default: the training's, else 8/255)")
    add("--samples", type=int, help="S, reconstructions a picture; 0: one, of z = 0 (default: the checkpoint's)")
    add("--aggregation", choices=AGGREGATIONS, default="robust", help="the decision (default: robust)")
    add("--view", choices=VIEWS, help="an output that attacks see instead of the decision")
    add("--bf16", action="store_true", help="attacks search in bfloat16 (slow on a CPU without it); scores do not")
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
        kind = parse_number if isinstance(paper, float) else int
        text = f"{meaning} (paper {paper}, reduced {reduced})"
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="NUMBER", help=text)
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
    else:
        model = None  # its size follows from the data
        state = {"fingerprint": load_tensors(path).get("fingerprint")}
    name = args.dataset or state.get("dataset")
    if name is None:
        raise ValueError(f"{path} does not say what it was trained on: add --dataset")
    if not args.dataset and name not in datasets.NAMES and not Path(name).expanduser().exists():
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
    source = Path("runs") / f"published-{name}" / "authors"  # no such file: the evaluation's folder lies beside it
    return model.requires_grad_(False), data, {}, source


def find_notes(data: datasets.Dataset, state: dict, source: Path) -> list[str]:
    """What the loader says of the pictures, and whether the checkpoint was trained on other ones than those at hand."""
    notes = list(data.notes)
    trained_on = state.get("fingerprint")
    if trained_on and len(data.train_labels):
        if trained_on != datasets.fingerprint(data.train_images, data.train_labels, data.classes):
            notes.append(f"{source} was trained on other pictures than the training split of {data.name}: were these "
                         "test pictures among them?")  # fmt: skip
    return notes


def choose_settings(args, model: nn.Module, state: dict, data: datasets.Dataset, weights: str | None = None) -> dict:
    """All that the evaluation's results depend on. weights: what identifies the model (default: a hash of its
    weights). Raises ValueError for a number that makes no sense."""
    given = {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    settings = BUDGETS[args.budget or ("reduced" if data.name == "digits" else "paper")] | given
    for name, value in (settings | {"limit": args.limit}).items():
        if value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not positive")
    settings["pictures"] = min(settings["pictures"], len(data.test_labels))

    eps = state.get("config", {}).get("eps", 8 / 255) if args.eps is None else args.eps
    if not 0 <= eps <= 1:
        raise ValueError(f"--eps {eps:g} is no distance between pixels in [0, 1]: write 8/255, say")
    samples = getattr(model, "samples", 1) if args.samples is None else args.samples
    if samples < 0:
        raise ValueError(f"--samples {samples} is not 0 or more")

    has_members = hasattr(model, "member_logits")
    if not has_members and (args.samples is not None or args.view or args.aggregation != "robust"):
        raise ValueError("--samples, --view and --aggregation are for a CARSO, and this model is none: leave them out")
    wide = [part for part in model.modules() if isinstance(part, WideResNet)]
    normalisation = [[list(part.config["mean"]), list(part.config["std"])] for part in wide]  # not among the weights
    asked = args.attack or (["standard", "rand"] if hasattr(model, "purifier") else ["standard"])
    pictures = slice(settings["pictures"])
    return settings | {
        "eps": eps,
        "samples": samples,
        "weights": weights or hash_weights(model),
        "normalisation": normalisation,
        "data": datasets.fingerprint(data.test_images[pictures], data.test_labels[pictures], data.classes),
        "attacks": [name for name in ATTACKS if name in (*BASELINES, *asked)],
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


def build_evaluations(model: nn.Module, data, settings: dict, folder: Path, device, limit: int) -> list[Evaluation]:
    """Two of a CARSO, its bare classifier first; one of any other model."""
    n = settings["pictures"]
    one_draw = settings | ONE_DRAW
    attacks = {name: ATTACKS[name] for name in settings["attacks"]}

    def build(name, model, attacks, settings):
        images, labels = data.test_images[:n], data.test_labels[:n]
        return Evaluation(name, model, images, labels, attacks, settings, folder, device, limit)

    if isinstance(model, WideResNet):
        return [build("classifier", model, attacks, one_draw)]
    if not hasattr(model, "purifier"):
        return [build("model", model, attacks, settings)]
    model.samples = settings["samples"]  # where it is 0, the model draws zeros
    on_classifier = {name: attack for name, attack in attacks.items() if "classifier" in attack.on}
    on_defence = {name: attack for name, attack in attacks.items() if "defence" in attack.on}
    return [
        build("classifier", model.classifier, on_classifier, one_draw),
        build("defence", model, on_defence, settings if model.samples else one_draw),
    ]


def run(evaluations: list[Evaluation], about: dict, picture_numbers: list[int], judge=find_faults) -> int:
    """The chunks, then the report, if all are there. The exit status: 0, or 3 if the audit failed. See
    `write_report`."""
    settings = evaluations[-1].settings
    folder = evaluations[-1].folder
    for note in about["notes"]:
        say(f"note: {note}")
    say(f"{settings['pictures']} pictures at eps {format_eps(settings['eps'])} in chunks of {settings['chunk']}; on "
        f"each the audit, then {', '.join(settings['attacks'])}; finished work is kept in {folder}")  # fmt: skip
    if not run_chunks(evaluations):
        say("other processes are at work, and the last one writes the report; if none is, give the command again")
        return 0
    report = write_report(evaluations, about, picture_numbers, judge)
    print((folder / "report.md").read_text(encoding="utf-8"))
    print(f"written to {shlex.quote(str(folder))}")
    return 0 if report["audit"]["passed"] else 3


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
