"""Our own attacks on a target, and controls: with the paper's, the union that `evaluate.py --attack all` reports.

An attack is one or more runs. Each run: (target, x, y, eps, budget) -> candidates (N, B, C, H, W) in the ball and in
[0, 1], and `during` (B,), whether the picture survived by the attack's own count. A candidate equal to x says that
nothing was found. Random numbers come from torch's global generator and the target's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from attacks import LOSSES, apgd, project
from lab.target import VIEWS, Target, climb, hits


def survives(target: Target, candidates: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One draw of each candidate (N, B, C, H, W): is the picture classified correctly under all of them? (B,)"""
    return torch.stack([hits(target, x, y)[:, 0] for x in candidates]).all(0)


def found(target: Target, y: torch.Tensor, *candidates: torch.Tensor):
    """What a run returns, of candidates (B, C, H, W)."""
    candidates = torch.stack(candidates)
    return candidates, survives(target, candidates, y)


def remember_best(apgd, x: torch.Tensor) -> list[torch.Tensor]:
    """Makes AutoAttack's APGD append to the list that is returned, for each of its runs, the points of the largest
    loss, (B, C, H, W); x where a picture was not attacked."""
    points, single_run = [], apgd.attack_single_run
    where: dict[bytes, list[int]] = {}  # it attacks some of the pictures, of which some may be alike
    for i, picture in enumerate(x.cpu().numpy()):
        where.setdefault(picture.tobytes(), []).append(i)

    def remembering(pictures, *args, **kwargs):
        result = single_run(pictures, *args, **kwargs)
        points.append(x.clone())
        for picture, point in zip(pictures.cpu().numpy(), result[0].detach()):
            points[-1][where[picture.tobytes()]] = point
        return result

    apgd.attack_single_run = remembering
    return points


# --------------------------------------------------------------------------------------------------------- the runs


def no_attack(target, x, y, eps, b):
    return found(target, y, x)


def uniform_noise(target, x, y, eps, b):
    """The control: what an attack that ignores the model achieves."""
    return found(target, y, target.random_point(x, eps))


def apgd_on(view: str | None, loss: str, target, x, y, eps, b):
    """Our APGD on one loss, through one view (None: the chosen one)."""
    seen = target.like_this(view=VIEWS.get(view, target.view))
    return found(target, y, apgd(climb(seen, y, loss, b.eot), x, eps, b.steps, target.random_point(x, eps))[0])


def apgd_towards(number: int, target, x, y, eps, b):
    """Our APGD aimed at the wrong class that is likeliest (number 0), second likeliest (1), ..."""
    with torch.no_grad():  # always by the same draw, so that no two runs aim at one class
        logits = target.draws(x, 1, torch.zeros_like(z) if (z := target.draw(x)) is not None else None)[:, 0]
    wanted = logits.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, number]
    return found(target, y, apgd(climb(target, y, wanted, b.eot), x, eps, b.steps, target.random_point(x, eps))[0])


def fixed_noise(target, x, y, eps, b):
    """The same latent draws at every step: a deterministic model, attacked by APGD without EoT."""
    z = target.draw(x)
    return found(target, y, apgd(climb(target, y, "ce", 1, z), x, eps, b.steps, target.random_point(x, eps))[0])


def transfer(loss: str, target, x, y, eps, b):
    """Adversarial pictures of the bare classifier, and of the one that labels, where that is another."""
    bare = dict.fromkeys([target.model.classifier, getattr(target.model, "labeller", target.model.classifier)])
    sources, start = [target.like_this(model=network) for network in bare], target.random_point(x, eps)
    return found(target, y, *(apgd(climb(source, y, loss, 1), x, eps, b.steps, start)[0] for source in sources))


def square(target, x, y, eps, b):
    """AutoAttack's Square, black box, on the answer averaged over EoT draws: S x EoT members a query, or, of a model
    without members, the mean of its logits."""
    from pyautoattack.square import SquareAttack

    more = target.like_this(samples=target.samples * b.eot)
    averaged = more if target.has_members else lambda x: target.draws(x, b.eot, None).mean(1)
    settings = dict(n_queries=b.queries, eps=eps, norm="Linf", device=x.device, verbose=False)
    with torch.no_grad():  # it would keep the graph of every query
        search = SquareAttack(averaged, seed=torch.initial_seed() % 2**31, **settings)
        return found(target, y, project(search.perturb(x, y), x, eps).detach())


# ------------------------------------------------------------------------------------------------------ the attacks


@dataclass(frozen=True)
class Attack:
    runs: Callable  #              (budget, classes, members?) -> the runs, cheap and strong ones first
    on: str = "defence"  #         or "classifier", the bare one
    needs: str | None = None  #    an attribute of the model without which the attack is skipped
    eot: bool = True  #            does it average over draws of the noise?


def alone(run: Callable) -> Callable:
    return lambda b, classes, members: [run]


# What our APGD climbs: the decision through several outputs, since a loss can be flat through one and steep through
# another.
OBJECTIVES = (("logsumexp", "ce"), ("logsumexp", "dlr"), ("sum-exp", "dlr"), ("mean-logit", "ce"))


def all_objectives(b, classes: int, members: bool) -> list[Callable]:
    """Every objective (those with members, or just CE and DLR), then towards the likeliest wrong classes."""
    objectives = OBJECTIVES if members else ((None, "ce"), (None, "dlr"))
    return [partial(apgd_on, *objective) for objective in objectives] + [
        partial(apgd_towards, number) for number in range(min(b.targets, classes - 1))
    ]


CONTROL_ATTACKS = {"clean": Attack(alone(no_attack)), "noise": Attack(alone(uniform_noise))}
# In the order in which they run: a picture that one of them takes is not attacked again.
OUR_ATTACKS = {
    "fixed-noise": Attack(alone(fixed_noise), needs="member_logits", eot=False),
    "transfer": Attack(lambda *_: [partial(transfer, loss) for loss in LOSSES], needs="classifier", eot=False),
    "apgd-ce": Attack(alone(partial(apgd_on, None, "ce"))),
    "apgd": Attack(all_objectives),
    "square": Attack(alone(square)),
}


# --------------------------------------------------------------------------------------------------------- controls


def without_condition(carso: nn.Module) -> nn.Module:
    """The decoder is told nothing about the picture: what is left is not the purifier's doing."""
    carso.purifier.condition_head.register_forward_hook(lambda module, inputs, condition: torch.zeros_like(condition))
    return carso


def with_fixed_z(carso: nn.Module) -> nn.Module:
    """Each member has a latent code of its own, which is always the same: a deterministic defence."""
    latent_dim = carso.purifier.config["latent_dim"]

    def draw(x, samples):
        codes = [torch.randn(latent_dim, generator=torch.Generator().manual_seed(s)) for s in range(samples)]
        return torch.stack(codes).to(x).expand(len(x), -1, -1)

    carso.draw = draw
    return carso


CONTROLS = {
    "classifier": lambda carso: carso.classifier,
    "final": lambda carso: carso.labeller,
    "zero-condition": without_condition,
    "fixed-z": with_fixed_z,
}
