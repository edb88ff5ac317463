"""What an attack sees of a model, and our own attacks on it: the union that `evaluate.py --attack all` reports.

Shapes: B pictures, N candidates (adversarial versions of a picture), E evaluations (draws), S members, K classes.
"""

import copy
import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from aggregate import log_probabilities, majority_vote, mean_logits, mean_probabilities, robust_logits
from attacks import LOSSES, apgd, objective, project, random_point

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
        return self._sharing_counters(self.model, view, self.samples)

    def of(self, model: nn.Module) -> "Target":
        """Another model, such as the bare classifier, with the same counters."""
        return self._sharing_counters(model, self.view, None)

    def averaged(self, draws: int) -> "Target":
        """The same model with so many times the members a call, with the same counters."""
        return self._sharing_counters(self.model, self.view, draws * self.samples)

    def in_float64(self) -> "Target":
        """A copy of the model, with counters of its own."""
        return Target(copy.deepcopy(self.model).double(), self.view, self.samples, self.limit)

    def _sharing_counters(self, model, view, samples) -> "Target":
        other = Target(model, view, samples, self.limit)
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
        self.count["pictures"] += len(x) * draws
        if x.requires_grad:
            x.register_hook(self._watch)
        if self.has_members:
            members = self.model.member_logits(x, z)  #                            (B, E S, K)
            logits = self.view(members.unflatten(1, (draws, -1)).flatten(0, 1))  # (B E, K)
        else:
            logits = self.model(x.repeat_interleave(draws, dim=0)).to(x.dtype)
        if x.requires_grad and not logits.requires_grad:
            self._watch(torch.zeros_like(x))  # no gradient will flow back
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


def climb(target: Target, y: torch.Tensor, loss, draws: int, z: torch.Tensor | None = None):
    """`attacks.objective` with EoT in one batch: for CARSO one classifier pass and one backward serve all draws of a
    step, as far as the target's limit allows. loss: a name in LOSSES, or (B,) the classes that a targeted attack
    wants. z: (B, E S, Z), to keep the noise fixed."""

    def losses_and_gradient(x):
        noise = target.draw(x, draws) if z is None else z
        losses, gradient = torch.zeros(len(x), device=x.device, dtype=x.dtype), torch.zeros_like(x)
        for rows, n, columns in target.parts(len(x), draws):
            part = None if noise is None else noise[rows, columns]
            aim = loss if isinstance(loss, str) else margin_to(loss[rows])
            values, slope = objective(lambda x, n=n, part=part: target.draws(x, n, part), y[rows], aim)(x[rows])
            losses[rows] += values * (n / draws)
            gradient[rows] += slope * (n / draws)
        return losses, gradient

    return losses_and_gradient


def margin_to(wanted: torch.Tensor):
    """A targeted loss: how far the logit of class `wanted` (B,) is above that of the true class, for B or B E
    logits."""

    def loss(logits, y):
        aim = wanted.repeat_interleave(len(y) // len(wanted))
        return (logits.gather(1, aim[:, None]) - logits.gather(1, y[:, None])).squeeze(1)

    return loss


@torch.no_grad()
def hits(target: Target, x: torch.Tensor, y: torch.Tensor, draws: int = 1) -> torch.Tensor:
    """Is each of `draws` independent answers correct? (B, E)"""
    z = target.draw(x, draws)
    right = torch.zeros(len(x), draws, dtype=torch.bool, device=x.device)
    for rows, n, columns in target.parts(len(x), draws):
        first = columns.start // target.samples
        answers = target.draws(x[rows], n, None if z is None else z[rows, columns]).argmax(2)
        right[rows, first : first + n] = answers == y[rows, None]
    return right


def survives(target: Target, candidates: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One draw of each candidate (N, B, C, H, W): is the picture classified correctly under all of them? (B,)"""
    return torch.stack([hits(target, x, y)[:, 0] for x in candidates]).all(0)


# ---------------------------------------------------------------------------------------------------- the attacks

# Each: (target, x, y, eps, budget) -> candidates (N, B, C, H, W) in the ball and in [0, 1], and `during` (B,), whether
# the picture survived by the attack's own count. Random numbers come from torch's global generator and the target's
# own.


@dataclass(frozen=True)
class Attack:
    run: callable
    on: str = "defence"  #         or "classifier", the bare one
    needs: str | None = None  #    an attribute of the model without which the attack is skipped


def no_attack(target, x, y, eps, b):
    return x[None], survives(target, x[None], y)


def uniform_noise(target, x, y, eps, b):
    """The control: what an attack that ignores the model achieves."""
    candidates = random_point(x, eps)[None]
    return candidates, survives(target, candidates, y)


# What our APGD climbs: the decision through several outputs, since a loss can be flat through one and steep through
# another.
OBJECTIVES = (("logsumexp", "ce"), ("logsumexp", "dlr"), ("sum-exp", "dlr"), ("mean-logit", "ce"))


def apgd_ce(target, x, y, eps, b):
    """One run of our APGD on cross-entropy through the chosen view: what the sweeps repeat."""
    best, _ = apgd(climb(target, y, "ce", b.eot), x, eps, b.steps, random_point(x, eps))
    return best[None], survives(target, best[None], y)


def apgd_all(target, x, y, eps, b):
    """Our APGD on every objective (those with members, or just CE and DLR), then aimed at the likeliest wrong
    classes."""
    objectives = OBJECTIVES if target.has_members else (("", "ce"), ("", "dlr"))
    candidates = []
    for view, loss in objectives:
        seen = target.seen_through(VIEWS.get(view, target.view))
        candidates.append(apgd(climb(seen, y, loss, b.eot), x, eps, b.steps, random_point(x, eps))[0])
    with torch.no_grad():
        likeliest = target(x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    for wanted in likeliest.T[: min(b.targets, likeliest.shape[1] - 1)]:
        candidates.append(apgd(climb(target, y, wanted, b.eot), x, eps, b.steps, random_point(x, eps))[0])
    candidates = torch.stack(candidates)
    return candidates, survives(target, candidates, y)


def fixed_noise(target, x, y, eps, b):
    """The same latent draws at every step: a deterministic model, attacked by APGD without EoT."""
    z = target.draw(x)
    best, _ = apgd(climb(target, y, "ce", 1, z), x, eps, b.steps, random_point(x, eps))
    return best[None], survives(target, best[None], y)


def transfer(target, x, y, eps, b):
    """Adversarial pictures of the bare classifier."""
    source = target.of(target.model.classifier)
    candidates = [apgd(climb(source, y, loss, 1), x, eps, b.steps, random_point(x, eps))[0] for loss in LOSSES]
    candidates = torch.stack(candidates)
    return candidates, survives(target, candidates, y)


def square(target, x, y, eps, b):
    """AutoAttack's Square, black box, on the answer averaged over the draws: S x EoT members a query."""
    from pyautoattack.square import SquareAttack

    settings = dict(n_queries=b.queries, eps=eps, norm="Linf", device=x.device, verbose=False)
    search = SquareAttack(target.averaged(b.eot), seed=torch.initial_seed() % 2**31, **settings)
    candidates = project(search.perturb(x, y), x, eps)[None].detach()
    return candidates, survives(target, candidates, y)


CONTROL_ATTACKS = {"clean": Attack(no_attack), "noise": Attack(uniform_noise)}
OUR_ATTACKS = {
    "apgd": Attack(apgd_all),
    "apgd-ce": Attack(apgd_ce),
    "fixed-noise": Attack(fixed_noise, needs="member_logits"),
    "transfer": Attack(transfer, needs="classifier"),
    "square": Attack(square),
}


# ----------------------------------------------------------------------------------------------- controls, and seeds


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


def seed_for(*what) -> int:
    """Random numbers follow from what is done, never from the order or the place in which it is done."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=4).digest(), "little")


def reseed(seed: int, model: nn.Module) -> None:
    torch.manual_seed(seed)
    if hasattr(model, "manual_seed"):
        model.manual_seed(seed)
