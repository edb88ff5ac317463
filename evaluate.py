"""Attack a trained CARSO end to end, score every adversarial picture on fresh draws, and report the worst.

    python evaluate.py --ckpt runs/digits/carso.pt
    python evaluate.py --ckpt runs/cifar10/carso.pt --attack rand pgd-eot --n 512 --eps 8/255 --steps 100 --eot 20
    torchrun --nproc_per_node=8 evaluate.py --ckpt runs/cifar10/carso.pt --attack all

Work is cut into chunks of pictures; each finished (attack, chunk) is a file. Kill it anywhere and run the same command
again, with any number of processes: it goes on, and the result is the same, since all random numbers follow from the
attack and the chunk. Processes share a folder and never talk to each other.

Shapes: B pictures, N candidates (adversarial versions of a picture), E draws, S members, K classes.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import data as datasets
from aggregate import log_probabilities, majority_vote, mean_logits, mean_probabilities, robust_logits
from attacks import LOSSES, parse_number, project
from models import keep_freed_memory
from purifier import check_config, load_checkpoint, write_atomically

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

# --------------------------------------------------------------------------------------- decisions, and what attacks
# see


def naive_log_odds(logits: torch.Tensor) -> torch.Tensor:
    """log(P / (1 - P)) through float32 probabilities, the reference code's output: here to show how it masks
    gradients."""
    P = log_probabilities(logits).exp()
    return torch.log(P / (1 - P))


def sum_of_exponentials(logits: torch.Tensor) -> torch.Tensor:
    """sum_s exp(l), up to a factor for each picture (DLR does not see it) that keeps it finite."""
    return (logits - logits.detach().amax(dim=(1, 2), keepdim=True)).exp().sum(dim=1)


# name -> members' logits (B, S, K) to the answer (B, K)
AGGREGATIONS = {
    "robust": robust_logits,
    "mean-logits": mean_logits,
    "mean-probabilities": mean_probabilities,
    "majority": majority_vote,
}


class Target(nn.Module):
    """The model as an attack sees it: pictures -> logits (B, K), while counting what the attack costs and which of the
    gradients that flow back to the pictures are not finite or exactly zero.

    model: CARSO, or any nn.Module from pictures to logits.
    view: members' logits (B, S, K) -> (B, K), for a model that has members; ignored for others.
    """

    def __init__(self, model: nn.Module, view=robust_logits, samples: int | None = None):
        super().__init__()
        self.model, self.view = model, view
        self.samples = samples or getattr(model, "samples", 1)
        self.has_members = hasattr(model, "member_logits")
        self.count = dict.fromkeys(("pictures", "gradients", "nonfinite", "zero", "nonfinite_logits"), 0)

    def draw(self, x: torch.Tensor, draws: int = 1):
        """Latent noise for this many evaluations of every picture; None for a model without members."""
        return self.model.draw(x, draws * self.samples) if self.has_members else None

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        return self.draws(x, 1, z)[:, 0]

    def draws(self, x: torch.Tensor, draws: int, z: torch.Tensor | None = None) -> torch.Tensor:
        """E evaluations of every picture, (B, E, K). A model with members runs its classifier on the picture once for
        all of them; any other is fed the picture E times."""
        if x.requires_grad:
            x.register_hook(self._watch)
        self.count["pictures"] += len(x) * draws
        if self.has_members:
            members = self.model.member_logits(x, self.draw(x, draws) if z is None else z)  # (B, E S, K)
            logits = self.view(members.unflatten(1, (draws, -1)).flatten(0, 1))  #             (B E, K)
        else:
            logits = self.model(x.repeat_interleave(draws, dim=0))
        self.count["nonfinite_logits"] += (~logits.isfinite()).any(1).sum().item()
        return logits.unflatten(0, (len(x), draws))

    def _watch(self, gradient: torch.Tensor) -> None:
        flat = gradient.flatten(1)
        self.count["gradients"] += len(flat)
        self.count["nonfinite"] += (~flat.isfinite()).any(1).sum().item()
        self.count["zero"] += (flat == 0).all(1).sum().item()


def climb(target: Target, y: torch.Tensor, loss: str, draws: int, z: torch.Tensor | None = None):
    """An attack's objective (see attacks.py) with EoT in one batch: the mean loss over `draws` evaluations, one
    backward."""

    def losses_and_gradient(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = target.draws(x, draws, z)  # (B, E, K)
            losses = (
                LOSSES[loss](logits.flatten(0, 1), y.repeat_interleave(draws)).unflatten(0, (len(x), draws)).mean(1)
            )
            (gradient,) = torch.autograd.grad(losses.sum(), x)
        return losses.detach(), gradient

    return losses_and_gradient


# ---------------------------------------------------------------------------------------------------- the attacks

# Each: (target, x, y, eps, budget) -> candidates (N, B, C, H, W) in the ball and in [0, 1], and `during` (B,), whether
# the picture survived by the attack's own count. Random numbers come from torch's global generator and the target's
# own.


def no_attack(target, x, y, eps, b: Budget):
    return x[None], survives(target, x[None], y)


def uniform_noise(target, x, y, eps, b: Budget):
    """The control: what an attack that ignores the model achieves."""
    candidates = project(x + eps * torch.empty_like(x).uniform_(-1, 1), x, eps)[None]
    return candidates, survives(target, candidates, y)


@torch.no_grad()
def survives(target, candidates, y) -> torch.Tensor:
    """One draw of each candidate: is the picture still classified correctly under all of them? (B,)"""
    return torch.stack([target(x).argmax(1) == y for x in candidates]).all(0)


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


# name -> (what it attacks, the attack, does it count towards the defence's robustness)
ATTACKS = {
    "clean": ("carso", no_attack),
    "noise": ("carso", uniform_noise),
    "standard": ("classifier", autoattack("standard")),
    "rand": ("carso", autoattack("rand")),
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
    """One checkpoint under one configuration, and the folder that holds its units of work."""

    def __init__(self, carso, images, labels, config: dict, budget: Budget, folder: Path, device):
        self.carso, self.images, self.labels = carso, images, labels
        self.config, self.budget, self.folder, self.device = config, budget, folder, device
        self.eps, self.samples = config["eps"], config["samples"]
        self.decide = AGGREGATIONS[config["aggregation"]]
        self.starts = range(0, len(labels), budget.chunk)

    def pictures(self, start: int):
        rows = slice(start, start + self.budget.chunk)
        return datasets.pixels(self.images[rows].to(self.device)), self.labels[rows].to(self.device)

    def file(self, kind: str, start: int) -> Path:
        return self.folder / "work" / f"{kind}-{start:06d}.npz"

    def model(self, name: str) -> nn.Module:
        return self.carso if ATTACKS[name][0] == "carso" else self.carso.classifier

    def attack(self, name: str, start: int) -> None:
        """Search: adversarial candidates of one chunk by one attack."""
        x, y = self.pictures(start)
        reseed(seed_for("attack", name, start, self.config["seed"]), self.carso)
        target = Target(self.model(name), samples=self.samples)
        began = time.monotonic()
        candidates, during = ATTACKS[name][1](target, x, y, self.eps, self.budget)
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
        if not (candidates.isfinite().all() and (candidates - x).abs().max() <= self.eps + 1e-5 or name == "clean"):
            raise ValueError(f"attack {name} left the eps-ball; this is a bug in the attack")
        reseed(seed_for("score", name, start, self.config["seed"]), self.carso)
        target = Target(self.model(name), self.decide, self.samples)
        stochastic = target.has_members
        select = self.budget.select if stochastic and len(candidates) > 1 else 1
        chosen = (
            torch.stack([correct(target, c, y, select) for c in candidates]).argmin(0) if len(candidates) > 1 else 0
        )
        worst = candidates[chosen, torch.arange(len(y))]
        hits = hit_table(target, worst, y, self.budget.draws if stochastic else 1)  # (B, E)
        select_hits = hit_table(target, worst, y, self.budget.select if stochastic else 1).float().mean(1)
        write_npz(
            self.file(f"score-{name}", start),
            worst=worst.cpu().numpy(),
            hits=hits.cpu().numpy(),
            select=select_hits.cpu().numpy(),
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
                self.attack(name, start)
            self.score(name, start)
            if rank == 0 and not sys.stderr.isatty():
                each = (time.monotonic() - began) / (done + 1)
                left = each * (len(mine) - done - 1)
                pictures = min(self.budget.chunk, len(self.labels) - start)
                print(f"{name:>12}  pictures {start}-{start + pictures - 1}  {left:5.0f} s left", flush=True)


def hit_table(target: Target, x: torch.Tensor, y: torch.Tensor, draws: int) -> torch.Tensor:
    """Is each of `draws` independent answers correct? (B, E)"""
    parts = [target.draws(x, min(5, draws - done)) for done in range(0, draws, 5)]
    return torch.cat(parts, dim=1).argmax(2) == y[:, None]


def correct(target: Target, x: torch.Tensor, y: torch.Tensor, draws: int) -> torch.Tensor:
    return hit_table(target, x, y, draws).float().mean(1)


def write_npz(path: Path, **arrays) -> None:
    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)

    write_atomically(path, write)


# ------------------------------------------------------------------------------------------------------ the report


def wilson(mean: float, n: int, z: float = 1.96) -> list[float]:
    """95 % interval of a mean of n numbers in [0, 1] (Wilson; for expectations between 0 and 1 it is on the wide
    side)."""
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def summary(values: np.ndarray) -> dict:
    mean = float(np.mean(values))
    return {"accuracy": mean, "interval": wilson(mean, len(values))}


def gather(e: Evaluation, names: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """All units of work put together: attack -> arrays over the pictures, and sums of counts."""
    table = {}
    for name in names:
        files = [dict(np.load(e.file(name, start))) for start in e.starts]
        scores = [dict(np.load(e.file(f"score-{name}", start))) for start in e.starts]
        table[name] = {k: np.concatenate([s[k] for s in scores]) for k in ("worst", "hits", "select")}
        table[name]["during"] = np.concatenate([f["during"] for f in files])
        for count in ("pictures", "gradients", "nonfinite", "zero", "nonfinite_logits", "seconds"):
            table[name][count] = float(sum(f[count] for f in files))
    return table


def report(e: Evaluation, names: list[str]) -> dict:
    """report.json, report.md, rows.tsv and samples.png from the units of work. Returns what report.json holds."""
    table, n = gather(e, names), len(e.labels)
    of_carso = [name for name in names if ATTACKS[name][0] == "carso"]
    # The worst attack of each picture is chosen by the selection draws and reported on the fresh ones.
    chosen = np.stack([table[name]["select"] for name in of_carso]).argmin(0)
    fresh = np.stack([table[name]["hits"].mean(1) for name in of_carso])
    result = {
        "checkpoint": e.config["checkpoint"],
        "dataset": e.config["dataset"],
        "n": n,
        "eps": e.eps,
        "samples": e.samples,
        "clean": summary(table["clean"]["hits"].mean(1)),
        "noise": summary(table["noise"]["hits"].mean(1)),
        "classifier": {"clean": summary(classifier_hits(e))},
        "attacks": {},
        "robust": summary(fresh[chosen, np.arange(n)]),
        "audit": audit(table),
        "config": e.config,
        "environment": environment(e.device),
    }
    for name in names:
        if name in ("clean", "noise"):
            continue
        t = table[name]
        result["attacks"][name] = {
            "target": ATTACKS[name][0],
            **summary(t["hits"].mean(1)),
            "worst_draw": float(t["hits"].all(1).mean()),
            "during": float(t["during"].mean()),
            "steps": e.budget.steps,
            "eot": e.budget.eot if ATTACKS[name][0] == "carso" else 1,
            "nonfinite_gradients": t["nonfinite"] / max(t["gradients"], 1),
            "zero_gradients": t["zero"] / max(t["gradients"], 1),
            "passes_per_picture": t["pictures"] / n,
            "seconds": t["seconds"],
        }
    write_text(e.folder / "report.json", json.dumps(result, indent=1))
    write_text(e.folder / "report.md", markdown(result, e))
    write_text(e.folder / "rows.tsv", rows(table, e))
    draw_samples(e, table, of_carso, chosen)
    return result


def audit(table) -> dict:
    messages = []
    for name, t in table.items():
        if t["nonfinite_logits"]:
            messages.append(f"{name}: {t['nonfinite_logits']:.0f} logits vectors were not finite")
        share = t["nonfinite"] / max(t["gradients"], 1)
        if share:
            messages.append(f"{name}: {share:.1%} of the gradients were not finite; the attack could not see the model")
        share = t["zero"] / max(t["gradients"], 1)
        if share > 0.5:
            messages.append(
                f"{name}: {share:.1%} of the gradients were exactly zero; the attack could not see the model"
            )
    return {"passed": not messages, "messages": messages}


@torch.no_grad()
def classifier_hits(e: Evaluation) -> np.ndarray:
    parts = [(e.carso.classifier(x).argmax(1) == y).cpu() for x, y in map(e.pictures, e.starts)]
    return torch.cat(parts).double().numpy()


def environment(device) -> dict:
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def percent(part: dict) -> str:
    low, high = part["interval"]
    return f"{100 * part['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def eps_text(eps: float) -> str:
    """8/255 where it is one, else a decimal."""
    return f"{round(255 * eps)}/255" if abs(255 * eps - round(255 * eps)) < 1e-6 else f"{eps:g}"


def markdown(r: dict, e: Evaluation) -> str:
    full = e.budget.steps >= 100 and e.budget.eot >= 20
    c = e.config
    lines = [
        f"# {r['dataset']}: CARSO at eps {eps_text(r['eps'])}, S = {r['samples']}, {r['n']} test pictures",
        "",
        "The paper's budget."
        if full
        else "**Reduced budget**: an upper bound on the robust accuracy, not a benchmark number.",
        f"Accuracies in %, with 95 % intervals, each the expectation over {e.budget.draws} fresh draws of the noise.",
        "",
        "| model | attack | accuracy | every draw right | during the attack | non-finite / zero gradients | seconds |",
        "|---|---|---|---|---|---|---|",
        f"| classifier | none | {percent(r['classifier']['clean'])} | | | | |",
        f"| CARSO | none | {percent(r['clean'])} | | | | |",
        f"| CARSO | uniform noise | {percent(r['noise'])} | | | | |",
    ]
    for name, a in r["attacks"].items():
        lines.append(
            f"| {'CARSO' if a['target'] == 'carso' else 'classifier'} | AutoAttack {name}, {a['steps']} steps, "
            f"EoT {a['eot']} | {percent(a)} | {100 * a['worst_draw']:.1f} | {100 * a['during']:.1f} | "
            f"{100 * a['nonfinite_gradients']:.1f} / {100 * a['zero_gradients']:.1f} % | {a['seconds']:.0f} |"
        )
    lines += [
        f"| **CARSO** | **worst of all, picture by picture** | **{percent(r['robust'])}** | | | | |",
        "",
        "Audit passed." if r["audit"]["passed"] else "**Audit failed.** " + "; ".join(r["audit"]["messages"]) + ".",
        "",
        f"Checkpoint {c['checkpoint']} (sha256 {c['sha256'][:16]}), seed {c['seed']}, aggregation {c['aggregation']}; "
        + ", ".join(f"{k} {v}" for k, v in r["environment"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def rows(table, e: Evaluation) -> str:
    lines = ["picture\tlabel\tattack\tduring\tright\tdraws\tselect"]
    for name, t in table.items():
        for i, hits in enumerate(t["hits"]):
            lines.append(
                f"{i}\t{e.labels[i]}\t{name}\t{int(t['during'][i])}\t{hits.sum()}\t{len(hits)}\t{t['select'][i]:.3f}"
            )
    return "\n".join(lines) + "\n"


@torch.no_grad()
def draw_samples(e: Evaluation, table, names, chosen, count: int = 8) -> None:
    """samples.png, a row a picture: clean | adversarial (the worst) | their difference, magnified | six
    reconstructions."""
    x, _ = e.pictures(0)
    x = x[:count]
    worst = np.stack([table[names[chosen[i]]]["worst"][i] for i in range(len(x))])
    adversarial = torch.from_numpy(worst).to(x)
    difference = 0.5 + (adversarial - x) / (2 * e.eps) if e.eps else torch.full_like(x, 0.5)
    reseed(0, e.carso)
    tiles = [x, adversarial, difference, *e.carso.purify(adversarial, e.carso.draw(x, 6)).unbind(1)]
    grid = make_grid(torch.stack(tiles, 1).flatten(0, 1).cpu(), nrow=len(tiles), padding=2, pad_value=1.0)
    grid = F.interpolate(grid[None], scale_factor=2, mode="nearest")[0]
    write_atomically(e.folder / "samples.png", lambda temporary: save_image(grid, temporary, format="png"))


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text))


# ------------------------------------------------------------------------------------------------------ command line


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="a carso.pt that train.py wrote")
    parser.add_argument("--attack", nargs="+", default=["standard", "rand"], choices=[*ATTACKS, "all"])
    parser.add_argument("--eps", type=parse_number, help="radius in pixels, such as 8/255 (default: the training's)")
    parser.add_argument("--samples", type=int, help="S, reconstructions a picture (default: the checkpoint's)")
    parser.add_argument("--aggregation", choices=AGGREGATIONS, default="robust")
    parser.add_argument("--budget", choices=BUDGETS, help="default: reduced for digits, paper for the rest")
    parser.add_argument("--dataset", help="default: the one it was trained on")
    parser.add_argument("--data-dir", help="default: as in training")
    parser.add_argument("--out", type=Path, help="folder (default: beside the checkpoint, named after the settings)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group = parser.add_argument_group("budget", "any number of the budget can be overridden")
    for field in dataclasses.fields(Budget):
        kind = parse_number if field.type is float else int
        names = ["--" + field.name.replace("_", "-")]
        if field.name == "n":
            names.insert(0, "--pictures")  # torchrun takes --n for an abbreviation of its own options
        group.add_argument(*names, dest=field.name, type=kind, metavar=field.type.__name__)
    return parser.parse_args(argv)


def prepare(args) -> tuple[Evaluation, list[str]]:
    """Everything that can be refused is refused here, with ValueError or OSError."""
    carso, state = load_checkpoint(args.ckpt, args.device)
    name = args.dataset or state["dataset"]
    data = datasets.load(name, args.data_dir or state.get("data_dir", "data"))
    trained_on = tuple(carso.purifier.config["image_shape"]), carso.classifier.config["num_classes"]
    given = tuple(data.test_images.shape[1:]), len(data.classes)
    if given != trained_on:
        raise ValueError(
            f"{args.ckpt} takes pictures {trained_on[0]} of {trained_on[1]} classes; "
            f"{name} has {given[0]} of {given[1]}"
        )
    budget = BUDGETS[args.budget or ("reduced" if name == "digits" else "paper")]
    overrides = {f.name: getattr(args, f.name) for f in dataclasses.fields(Budget)}
    budget = dataclasses.replace(budget, **{k: v for k, v in overrides.items() if v is not None})
    budget = dataclasses.replace(budget, n=min(budget.n, len(data.test_labels)))
    if min(v for v in dataclasses.asdict(budget).values()) <= 0:
        raise ValueError("every number of the budget must be positive")
    eps = state["config"]["eps"] if args.eps is None else args.eps
    if not 0 <= eps <= 1:
        raise ValueError(f"--eps {eps:g} is not a distance between pixels in [0, 1]; write 8/255, say")
    samples = args.samples or carso.samples
    if samples < 1:
        raise ValueError("--samples must be 1 or more")
    names = list(ATTACKS) if "all" in args.attack else [n for n in ATTACKS if n in (*args.attack, "clean", "noise")]
    with open(args.ckpt, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    config = dict(
        checkpoint=str(args.ckpt), sha256=checksum, dataset=name, eps=eps, samples=samples,
        aggregation=args.aggregation, seed=args.seed, **dataclasses.asdict(budget),
    )  # fmt: skip
    folder = args.out or Path(args.ckpt).parent / (
        f"eval-eps{eps_text(eps).replace('/', '_')}-S{samples}-n{budget.n}-steps{budget.steps}-eot{budget.eot}-"
        + hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=3).hexdigest()
    )
    check_config(folder / "config.json", config, "--out")
    return Evaluation(
        carso, data.test_images[: budget.n], data.test_labels[: budget.n], config, budget, folder, args.device
    ), names


def main() -> int:
    args = parse_arguments()
    keep_freed_memory()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        e, names = prepare(args)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    try:
        e.run(names, rank, ranks)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last finished chunk", file=sys.stderr)
        return 130
    if rank > 0:
        return 0
    missing = [1]
    while missing:  # the other processes' last chunks
        missing = [1 for name in names for start in e.starts if not e.file(f"score-{name}", start).is_file()]
        if missing:
            time.sleep(1)
    result = report(e, names)
    print((e.folder / "report.md").read_text())
    print(f"written to {e.folder}")
    for message in result["audit"]["messages"]:
        print(f"audit: {message}", file=sys.stderr)
    return 0 if result["audit"]["passed"] else 3


if __name__ == "__main__":
    sys.exit(main())
