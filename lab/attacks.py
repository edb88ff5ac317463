"""More rows for evaluate.py's tables: our Auto-PGD through several outputs, transfer, fixed noise, a black box; more
decisions, with the outputs through which they are attacked.

With the paper's attacks they are the union that `python -m lab.evaluate --attack all` runs: the worst of each picture
counts. Each run: (seen, x, y, settings) -> candidates (N, B, C, H, W) in the ball and in [0, 1]; see evaluate.Attack.

Shapes: B pictures, N candidates, S members, K classes.
"""

from functools import partial

import torch
from torch import nn

import aggregate
from attacks import LOSSES, project, random_point
from evaluate import AGGREGATIONS, ATTACKS, VIEWS, Attack, Seen, batched_objective

# ---------------------------------------------------------------------------------------------- decisions and views


def sum_of_exponentials(logits: torch.Tensor) -> torch.Tensor:
    """sum_s exp(l), up to a factor for each picture (DLR does not see it) that keeps it finite."""
    return (logits - logits.amax(dim=(1, 2), keepdim=True)).exp().sum(dim=1)


VIEWS |= {
    "logsumexp": aggregate.robust_logits,
    "sum-exp": sum_of_exponentials,
    "mean-logit": aggregate.mean_logits,
    "mean-probability": aggregate.mean_probabilities,
}
AGGREGATIONS |= {
    "majority": aggregate.majority_vote,
    "mean-sigmoids": aggregate.mean_sigmoids,
    "floored-ratios": aggregate.floored_ratios,
}
# Decisions without gradients are attacked through an output that has some.
VIEW_OF_DECISION = {"majority": "mean-probability", "floored-ratios": "mean-logit"}


def look_through(seen: Seen, view=None, model: nn.Module | None = None, samples: int | None = None) -> Seen:
    """The same model behind another view, or another model or S; with the same counters."""
    other = Seen(model or seen.model, view or seen.view, samples or seen.samples, seen.limit)
    other.count = seen.count
    return other


# ------------------------------------------------------------------------------------------------------------ APGD


def apgd(objective, x: torch.Tensor, eps: float, steps: int, start: torch.Tensor):
    """Auto-PGD (Croce and Hein 2020): momentum, and a step size that starts at 2 eps and is halved for each picture
    whose loss has stopped growing, which then restarts from its best point. There is nothing to tune.

    Unlike AutoAttack's own, it follows whatever average the objective makes over the draws of a stochastic model,
    instead of the last draw's loss; it never stops at a lucky draw; and where a gradient is not finite it stays where
    it is.

    Args: objective: pictures -> losses (B,), gradient (B, C, H, W). start: a point of the eps-ball around x.
    Returns: for each picture the point of the largest loss seen, and that loss.
    """
    window, shortest, shorter = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    column = (-1, 1, 1, 1)
    current = previous = best = start.detach()
    loss, gradient = objective(current)
    best_loss, best_gradient = loss.nan_to_num(nan=-torch.inf), gradient.clone()
    step_size = torch.full_like(loss, 2 * eps)
    rises, since = torch.zeros_like(loss), 0  # steps that raised the loss since the last check, steps since then
    halved, loss_at_check = torch.ones_like(loss, dtype=torch.bool), loss.clone()
    for i in range(steps):
        stride = project(current + step_size.view(column) * gradient.nan_to_num().sign(), x, eps)
        momentum = 0.75 if i > 0 else 1.0
        moved = project(current + momentum * (stride - current) + (1 - momentum) * (current - previous), x, eps)
        previous, current = current, moved
        last_loss = loss
        loss, gradient = objective(current)
        rises += (loss > last_loss).float()
        better = loss > best_loss
        best = torch.where(better.view(column), current, best)
        best_gradient = torch.where(better.view(column), gradient, best_gradient)
        best_loss = torch.where(better, loss, best_loss)
        since += 1
        if since == window:
            stuck = (rises <= 0.75 * window) | (~halved & (best_loss <= loss_at_check))
            step_size = torch.where(stuck, step_size / 2, step_size)
            current = torch.where(stuck.view(column), best, current)
            gradient = torch.where(stuck.view(column), best_gradient, gradient)
            loss = torch.where(stuck, best_loss, loss)
            halved, loss_at_check, rises, since = stuck, best_loss.clone(), torch.zeros_like(loss), 0
            window = max(window - shorter, shortest)
    return best, best_loss


# --------------------------------------------------------------------------------------------------------- the runs


def attack_by_apgd(losses_and_gradient, x: torch.Tensor, settings: dict) -> torch.Tensor:
    """Our APGD from a random start, (B, C, H, W). losses_and_gradient: pictures -> losses (B,), gradient."""
    return apgd(losses_and_gradient, x, settings["eps"], settings["steps"], random_point(x, settings["eps"]))[0]


def apgd_through(view: str | None, loss: str, seen: Seen, x, y, settings):
    """Our APGD on one loss, through one view (None: the chosen one), averaged over draws."""
    seen = look_through(seen, VIEWS.get(view))
    return attack_by_apgd(batched_objective(seen, y, loss, settings["eot"]), x, settings)[None]


def apgd_targeted(seen: Seen, x, y, settings):
    """Our APGD towards the likeliest wrong classes, one after the other."""
    with torch.no_grad():
        logits = seen(x)
    classes = logits.shape[1]

    def margin(logits, both):
        """How far the logit of the wanted class is above that of the true one; `both` holds the two numbers in one."""
        true, wanted = both % classes, both // classes
        return (logits.gather(1, wanted[:, None]) - logits.gather(1, true[:, None])).squeeze(1)

    likeliest = logits.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    found = []
    for number in range(min(settings["targets"], classes - 1)):
        losses_and_gradient = batched_objective(seen, y + classes * likeliest[:, number], margin, settings["eot"])
        found.append(attack_by_apgd(losses_and_gradient, x, settings))
    return torch.stack(found)


def fixed_noise(seen: Seen, x, y, settings):
    """The same latent draws at every step: a deterministic model, attacked by APGD without EoT."""
    return attack_by_apgd(batched_objective(seen, y, "ce", 1, seen.draw(x, 1)), x, settings)[None]


def transfer(seen: Seen, x, y, settings):
    """Adversarial pictures of the bare classifier, and of the one that labels, where that is another."""
    sources = dict.fromkeys([seen.model.classifier, getattr(seen.model, "labeller", seen.model.classifier)])
    found = []
    for source in sources:
        for loss in LOSSES:
            losses_and_gradient = batched_objective(look_through(seen, model=source), y, loss)
            found.append(attack_by_apgd(losses_and_gradient, x, settings))
    return torch.stack(found)


def square(seen: Seen, x, y, settings):
    """AutoAttack's Square, black box, on the answer averaged over EoT draws: S x EoT members a query, or, of a model
    without members, the mean of its logits."""
    from pyautoattack.square import SquareAttack

    more = look_through(seen, samples=seen.samples * settings["eot"])
    averaged = more if seen.has_members else lambda x: seen.answer(x, settings["eot"]).mean(1)
    how = dict(n_queries=settings["queries"], eps=settings["eps"], norm="Linf", device=x.device, verbose=False)
    with torch.no_grad():  # it would keep the graph of every query
        found = SquareAttack(averaged, seed=torch.initial_seed() % 2**31, **how).perturb(x, y)
    return project(found, x, settings["eps"])[None]


# In the order in which they run: those that follow gradients come first, so that it shows what the others take beyond
# them. A loss can be flat through one output and steep through another.
ROWS = {
    "apgd-ce": Attack(partial(apgd_through, None, "ce")),
    "apgd-dlr": Attack(partial(apgd_through, None, "dlr")),
    "apgd-sum-exp": Attack(partial(apgd_through, "sum-exp", "dlr")),
    "apgd-mean-logit": Attack(partial(apgd_through, "mean-logit", "ce")),
    "apgd-t": Attack(apgd_targeted),
    "fixed-noise": Attack(fixed_noise, eot=False),
    "transfer": Attack(transfer, eot=False),
    "square": Attack(square, steps="queries"),
}
GROUPS = {
    "apgd": [name for name in ROWS if name.startswith("apgd")],
    "paper": ["pgd-eot", "rand", "standard"],
    "all": ["pgd-eot", "rand", *ROWS, "standard"],
}
FOR_CARSO = ("apgd-sum-exp", "apgd-mean-logit", "fixed-noise", "transfer")  # they need members, or a bare classifier
# They should be weaker than attacks that follow gradients through the model itself. Standard is both, and counts as
# neither; it comes last, since it leaves nothing to the black box.
WEAKER = ("noise", "fixed-noise", "transfer", "square")
ATTACKS |= ROWS
ATTACKS["standard"] = ATTACKS.pop("standard")


# --------------------------------------------------------------------------------------------------------- controls


def cut_condition(carso: nn.Module) -> nn.Module:
    """The decoder is told nothing about the picture: what is left is not the purifier's doing."""
    carso.purifier.condition_head.register_forward_hook(lambda module, inputs, condition: torch.zeros_like(condition))
    return carso


def fix_codes(carso: nn.Module) -> nn.Module:
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
    "zero-condition": cut_condition,
    "fixed-z": fix_codes,
}
