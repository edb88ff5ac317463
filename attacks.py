"""FGSM, PGD with EoT, and the adversarially-balanced batch, written out by hand.

Every attack takes a model from pixels (B, C, H, W) in [0, 1] to logits (B, K), and returns pictures that are detached,
at most eps away from x in every pixel (l-infinity), and in [0, 1]. Gradients are taken with respect to the input only:
the model's parameters never receive any, and its mode (train or eval) is left as it is.
"""

from argparse import ArgumentTypeError
from fractions import Fraction
from math import isclose, isfinite, nan

import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------------- numbers, as people type them


def parse_number(text: str) -> float:
    """'8/255', '0.03', '1e-3' -> a number. Raises for anything else what argparse puts beside the option's name."""
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / (float(denominator) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        value = nan
    if not isfinite(value):
        raise ArgumentTypeError(f"{text} is not a number, such as 8/255 or 0.03")
    return value


def format_eps(eps: float) -> str:
    """8/255 where it is one, else a decimal."""
    return f"{round(255 * eps)}/255" if isclose(255 * eps, round(255 * eps), rel_tol=1e-6) else f"{eps:g}"


# ------------------------------------------------------------------------------------------ losses, one per picture


def cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(B, K), (B,) -> (B,)"""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How far the largest other logit lies above the true one: positive where the picture is misclassified.
    (B, K), (B,) -> (B,)"""
    own = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - own


def dlr(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Difference of logits ratio (Croce and Hein 2020): the margin, invariant to the scale and shift of the logits.
    (B, K), (B,) -> (B,). With K = 2 there is no third logit to scale by, with K = 3 the ratio is the constant 1
    wherever the true class comes last: there it is the plain margin."""
    if logits.shape[1] <= 3:
        return margin(logits, y)
    ordered = logits.sort(dim=1).values
    return margin(logits, y) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


LOSSES = {"ce": cross_entropy, "dlr": dlr}


# --------------------------------------------------------------------------------------------------- FGSM and PGD


def objective(model, y: torch.Tensor, loss="ce", eot: int = 1):
    """What an attack climbs: a function from pictures (B, C, H, W) to each picture's loss (B,) and the gradient of it
    (B, C, H, W), averaged over `eot` evaluations of a stochastic model (EoT, Athalye et al. 2018).

    model: pictures -> logits (B, K), or (B, E, K) from one that answers E evaluations in one pass, whose losses are
    averaged as well. loss: a name in LOSSES, or a function (N, K), (N,) -> (N,)."""
    loss = LOSSES.get(loss, loss)

    def losses_and_gradient(x):
        losses, gradient = 0.0, 0.0
        for _ in range(eot):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                logits = model(x)
                evaluations = logits.shape[1] if logits.ndim == 3 else 1
                values = loss(logits.reshape(-1, logits.shape[-1]), y.repeat_interleave(evaluations))
                values = values.view(-1, evaluations).sum(1) / evaluations  # (B,)
                if values.requires_grad:  # else nothing flows back to the picture, and the gradient is zero
                    gradient = gradient + torch.autograd.grad(values.sum(), x)[0] / eot
            losses = losses + values.detach() / eot
        return losses, gradient + torch.zeros_like(x)

    return losses_and_gradient


def ascend(objective, x, start, eps, steps, step_size) -> torch.Tensor:
    """`steps` signed gradient steps from `start`, each projected on the eps-ball around x and on [0, 1].

    eps and step_size are numbers, or tensors that broadcast to x, so that each picture can have its own."""
    adversarial = start.detach()
    for _ in range(steps):
        _, gradient = objective(adversarial)
        adversarial = project(adversarial + step_size * gradient.sign(), x, eps)
    return adversarial


def project(adversarial: torch.Tensor, x: torch.Tensor, eps) -> torch.Tensor:
    """The nearest picture that is at most eps away from x and has its pixels in [0, 1]."""
    return torch.minimum(torch.maximum(adversarial, x - eps), x + eps).clamp(0.0, 1.0)


def random_point(x: torch.Tensor, eps, noise: torch.Tensor | None = None) -> torch.Tensor:
    """A uniformly random point of the ball; noise: uniform in [-1, 1], drawn from torch's generator when None."""
    noise = torch.empty_like(x).uniform_(-1, 1) if noise is None else noise
    return project(x + eps * noise, x, eps)


def fgsm(model, x: torch.Tensor, y: torch.Tensor, eps: float) -> torch.Tensor:
    """One step of length eps along the sign of the gradient (Goodfellow et al. 2015), no random start.

    Args: x (B, C, H, W) in [0, 1], y (B,), eps in pixels (8/255). Raises ValueError for pixels outside [0, 1]."""
    check_pictures(x, eps)
    return ascend(objective(model, y), x, x, eps, steps=1, step_size=eps)


def pgd(model, x, y, eps, steps, step_size, random_start=True, eot=1, loss="ce", noise=None) -> torch.Tensor:
    """Projected gradient descent (Madry et al. 2018; paper, appendix A and table 12).

    Args:
        x, y: pictures (B, C, H, W) in [0, 1] and their labels (B,).
        eps, step_size: in pixels; the paper has eps 8/255, step size 0.01 and 40 steps in training.
        random_start: begin at a uniformly random point of the ball.
        eot: gradients of a stochastic model averaged at each step.
        loss: "ce" or "dlr", maximised.
        noise: the random start, uniform in [-1, 1] and of x's shape; torch's global generator draws it when None.
    Raises ValueError for pixels outside [0, 1] or a negative radius.
    """
    check_pictures(x, eps)
    start = random_point(x, eps, noise) if random_start else x
    return ascend(objective(model, y, loss, eot), x, start, eps, steps, step_size)


def check_pictures(x: torch.Tensor, eps: float) -> None:
    """Raises ValueError for pixels outside [0, 1] or a radius that is none."""
    if not 0 <= eps <= 1:
        raise ValueError(f"eps is a distance in pixels, between 0 and 1 (8/255, say), not {eps}")
    if x.numel() and not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(
            f"pictures must have their pixels in [0, 1]; these lie in [{x.min():.3g}, {x.max():.3g}]. Normalisation "
            "belongs inside the model"
        )


# ------------------------------------------------------------------------------------ is a gradient the derivative?


def measure_slope_error(f, start: torch.Tensor, end: torch.Tensor, y: torch.Tensor, points: int = 8) -> torch.Tensor:
    """How much of a model's change from picture to picture its gradients do not explain, (B,).

    Where the margin m has no slope but its gradient g, the fundamental theorem of calculus holds on every way:

        m(end) - m(start)  =  integral of g(x) . dx  ~  sum_k g(x_k) . dx,    x_k: midpoints of `points` steps dx.

    A gradient that is detached, flipped, or made up misses that sum. So does one that is right almost everywhere,
    where the slope hides in jumps (rounded pixels, votes, a forward pass that optimises in signed steps). Networks of
    kinks do not: a ReLU's slope is all there.

    Rounding inside a network (bfloat16, say) is no slope, either. But from point to point its errors cancel, while
    those of a slope that is missed add up.

    Args:
        f: pictures -> logits (B, K), its noise held fixed: the same picture always gets the same answer.
        start, end: pictures (B, C, H, W) at the ends of a straight line each. y: their labels (B,).
    Returns: |change - sum| relative to the length of the way, max(sum of |g . dx|, |change|), or to what rounding can
        be, where that is larger; 0 where nothing changes; NaN where an output or a gradient is not finite.
    """
    step = (end - start) / points
    with torch.no_grad():
        first = margin(f(start), y)
    before, slope_before = first, 0.0
    length, missed = 0.0, []
    for k in range(points):
        now, gradient = objective(f, y, margin)(start + (k + 0.5) * step)
        slope = (gradient * step).flatten(1).sum(1)
        missed.append(now - before - (slope_before + slope) / 2)
        length = length + slope.abs()
        before, slope_before = now, slope
    with torch.no_grad():
        logits = f(end)
    last = margin(logits, y)
    missed = torch.stack([*missed, last - before - slope_before / 2])  # (points + 1, B); they add up to change - sum

    size = logits.abs().amax(1)
    rounding = (0.4 * missed.abs().sum(0)).minimum(0.1 * size) + 1e-5 * size + 1e-30
    return missed.sum(0).abs() / torch.maximum(length, (last - first).abs()).maximum(rounding)


def find_unexplained(fix, start: torch.Tensor, end: torch.Tensor, y: torch.Tensor, by_majority=False) -> torch.Tensor:
    """Of which pictures the gradients do not explain how the answer changes from start to end, (B,) bool.

    A picture whose error is above 0.2 is looked at again with more points: an honest error shrinks. Where most are
    above it with 32 points, the slope changes within an attack's step and is of no use to it, derivative or not.
    Measured on digits: honest models stay below, and most pictures of masked ones lie above 0.3 (RESULTS.md).

    fix: pictures (B, C, H, W) -> f for them, see `measure_slope_error`; the others as there.
    by_majority: single pictures count only where most others agree."""
    most = max(len(y) // 2, 4)  # of fewer pictures no majority tells anything
    tolerated = most if by_majority else 0
    errors = torch.full((len(y),), torch.inf, device=y.device)  # at first all are looked at
    for points in (8, 32, 128):
        again = (errors > 0.2).nonzero().squeeze(1)
        if len(again) <= tolerated or (points == 128 and len(again) > most):
            break
        errors[again] = measure_slope_error(fix(start[again]), start[again], end[again], y[again], points)
    found = errors > 0.2
    return found if found.sum() > tolerated else torch.zeros_like(found)


def find_missing_gradients(f, x: torch.Tensor, y: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Fault -> which pictures have it, (B,) bool: no finite answer, no finite gradient, or, of a picture that f gets
    right, no gradient of any loss. And the gradient of the margin, (B, C, H, W)."""
    with torch.no_grad():
        logits = f(x)
    gradients = torch.stack([objective(f, y, loss)(x)[1].flatten(1) for loss in (*LOSSES, margin)])
    faults = {
        "outputs that are not finite": ~logits.isfinite().all(1),
        "gradients that are not finite": ~gradients.isfinite().all(2).all(0),
        "gradients of exactly zero": (gradients == 0).all(2).all(0) & (logits.argmax(1) == y),
    }
    return faults, gradients[-1].view_as(x).nan_to_num()


# ------------------------------------------------------------------------------- the adversarially-balanced batch

KINDS = ("PGD eps/2", "PGD eps", "FGSM eps/2", "FGSM eps")


def balanced_kinds(first: int, count: int, fraction: float) -> torch.Tensor:
    """Which attack pictures number first .. first + count - 1 of the training run get: -1 for none, else index of
    KINDS.

    Picture i is perturbed when floor((i + 1) * fraction) passes the next whole number, and the kinds take turns over
    the perturbed pictures. So the fraction and the even split hold exactly over time, for any batch size (1 % of
    batches of 128, say) and however a batch is divided over processes: only a picture's number counts.
    """
    share = Fraction(str(fraction))  # exact: 100 * 0.29 must be 29, not 28.999...
    turns = [(i * share.numerator) // share.denominator for i in range(first, first + count + 1)]
    return torch.tensor([turn % len(KINDS) if after > turn else -1 for turn, after in zip(turns, turns[1:])])


def adversarially_balanced_batch(
    classifier,
    x: torch.Tensor,
    y: torch.Tensor,
    eps: float,
    fraction: float,
    steps: int = 40,
    step_size: float = 0.01,
    first: int = 0,
    noise: torch.Tensor | None = None,
    kinds: torch.Tensor | None = None,
) -> torch.Tensor:
    """A copy of x (B, C, H, W) with a part perturbed against the classifier (paper, section 4.4): an even split of PGD
    eps/2, PGD eps, FGSM eps/2 and FGSM eps, all untargeted on cross-entropy; the other pictures stay as they are.

    One loop serves all four: each row has a radius of its own, FGSM rows take a single step of that length.

    Args:
        eps: largest radius, in pixels. fraction: share of perturbed pictures, in [0, 1].
        steps, step_size: of PGD.
        first: this batch's first picture's number since the start of training; see `balanced_kinds`.
        noise: PGD's random start, uniform in [-1, 1], of x's shape; drawn from torch's global generator when None.
        kinds: of each picture, (B,) on the CPU, where they are not those of consecutive pictures from `first` on.
    """
    check_pictures(x, eps)
    if not 0 <= fraction <= 1:
        raise ValueError(f"the perturbed fraction is between 0 and 1, not {fraction}")
    if kinds is None:
        kinds = balanced_kinds(first, len(x), fraction)  # on the CPU: there nothing is waited for
    rows = (kinds >= 0).nonzero().squeeze(1)
    if len(rows) == 0:
        return x.clone()
    noise = torch.empty_like(x).uniform_(-1, 1) if noise is None else noise

    kinds, clean, y, noise = kinds[rows], x[rows], y[rows], noise[rows]
    radius = eps * torch.where(kinds % 2 == 0, 0.5, 1.0).to(x)[:, None, None, None]
    is_pgd = (kinds < 2).to(x.device)[:, None, None, None]
    start = torch.where(is_pgd, random_point(clean, radius, noise), clean)
    stride = torch.where(is_pgd, step_size, radius)

    adversarial = ascend(objective(classifier, y), clean, start, radius, 1, stride)
    i = (kinds < 2).nonzero().squeeze(1)
    if len(i) and steps > 1:  # FGSM is done after its first step
        climb = objective(classifier, y[i])
        adversarial[i] = ascend(climb, clean[i], adversarial[i], radius[i], steps - 1, step_size)
    return x.index_copy(0, rows.to(x.device), adversarial)
