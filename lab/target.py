"""What an attack sees of a model: decisions and views of it, draws in one batch, a limit of memory, counters.

Shapes: B pictures, E evaluations (draws), S members, K classes, Z latent.
"""

import contextlib
import copy
import hashlib
import random

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from aggregate import (
    floored_ratios,
    log_probabilities,
    majority_vote,
    mean_logits,
    mean_probabilities,
    mean_sigmoids,
    robust_logits,
)
from attacks import objective, random_point
from lab.start import out_of_memory

# ---------------------------------------------------------------------------------------------- decisions and views


def naive_log_odds(logits: torch.Tensor) -> torch.Tensor:
    """log(P / (1 - P)) through float32 probabilities, the reference code's output: here to show how it masks
    gradients."""
    P = log_probabilities(logits).exp()
    return torch.log(P / (1 - P))


def sum_of_exponentials(logits: torch.Tensor) -> torch.Tensor:
    """sum_s exp(l), up to a factor for each picture (DLR does not see it) that keeps it finite."""
    return (logits - logits.amax(dim=(1, 2), keepdim=True)).exp().sum(dim=1)


# Views: what an attack sees, members' logits (B, S, K) to (B, K). The first three decide alike, whatever they return.
VIEWS = {
    "logsumexp": robust_logits,
    "sum-exp": sum_of_exponentials,
    "naive-odds": naive_log_odds,
    "mean-logit": mean_logits,
    "mean-probability": mean_probabilities,
    "mean-sigmoid": mean_sigmoids,
}
# Decisions (appendix D and the authors' code compare them), each with a view of its own that has gradients.
AGGREGATIONS = {
    "robust": (robust_logits, "logsumexp"),
    "mean-logits": (mean_logits, "mean-logit"),
    "mean-probabilities": (mean_probabilities, "mean-probability"),
    "majority": (majority_vote, "mean-probability"),
    "mean-sigmoids": (mean_sigmoids, "mean-sigmoid"),
    "floored-ratios": (floored_ratios, "mean-logit"),
}


# ----------------------------------------------------------------------------------------------------- the target


class Target(nn.Module):
    """The model as an attack sees it: pictures -> logits (B, K), while counting what the attack costs and which of the
    gradients that flow back to the pictures are not finite or exactly zero.

    model: CARSO, or any nn.Module from pictures to logits.
    view: members' logits (B, S, K) -> (B, K), for a model that has members; ignored for others.
    limit: at most this many pictures or reconstructions at a time; memory, not results, depends on it.
    rows, whole: which of a chunk's `whole` pictures these are. Random numbers are drawn for the whole chunk, so that
    an attack on some of its pictures does to them what an attack on all would.
    """

    def __init__(self, model: nn.Module, view=robust_logits, samples: int | None = None, limit: int = 1024):
        super().__init__()
        self.model, self.view, self.limit, self.rows, self.whole = model, view, limit, None, 0
        self.has_members = hasattr(model, "member_logits")
        self.samples = max(1, samples or model.samples) if self.has_members else 1
        self.count = dict.fromkeys(("pictures", "gradients", "nonfinite", "zero", "nonfinite_logits"), 0)

    def like_this(self, **changes) -> "Target":
        """The same target with some attributes changed (another view or model, more samples, some rows of the chunk),
        and the same counters."""
        other = Target(changes.get("model", self.model), self.view, self.samples, self.limit)
        other.rows, other.whole, other.count = self.rows, self.whole, self.count
        for name in changes.keys() - {"model"}:
            setattr(other, name, changes[name])
        return other

    def in_float64(self) -> "Target":
        """A copy of the model, with counters of its own."""
        return Target(copy.deepcopy(self.model).double(), self.view, self.samples, self.limit)

    def draw(self, x: torch.Tensor, draws: int = 1):
        """Latent noise for this many evaluations of every picture, (B, E S, Z); None for a model without members."""
        if not self.has_members:
            return None
        if self.rows is None or len(x) != len(self.rows):
            return self.model.draw(x, draws * self.samples)
        return self.model.draw(x[:1].expand(self.whole, *x.shape[1:]), draws * self.samples)[self.rows]

    def random_point(self, x: torch.Tensor, eps: float) -> torch.Tensor:
        """Where an attack on these pictures (B, C, H, W) starts: a uniformly random point of the ball."""
        noise = x.new_empty((len(x) if self.rows is None else self.whole, *x.shape[1:])).uniform_(-1, 1)
        return random_point(x, eps, noise if self.rows is None else noise[self.rows])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.draws(x, 1, self.draw(x))[:, 0]

    def draws(self, x: torch.Tensor, draws: int, z: torch.Tensor | None) -> torch.Tensor:
        """E evaluations of every picture, (B, E, K). A model with members runs its classifier on the picture once for
        all of them; any other is fed the picture E times."""
        self.count["pictures"] += len(x) * draws
        if x.requires_grad:
            x.register_hook(self._watch)
        if self.has_members:
            members = self._in_pieces(self.model.member_logits, x, z)  #           (B, E S, K)
            logits = self.view(members.unflatten(1, (draws, -1)).flatten(0, 1))  # (B E, K)
        else:
            logits = self._in_pieces(self.model, x.repeat_interleave(draws, dim=0)).to(x.dtype)
        logits = logits.clone() if logits.is_inference() else logits  # attacks change tensors in place
        if x.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
            logits = logits + 0 * x.sum()  # a gradient of zero, which is counted, where none would flow back
        self.count["nonfinite_logits"] += (~logits.detach().isfinite()).any(1).sum()
        return logits.unflatten(0, (len(x), draws))

    def _in_pieces(self, answer, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """answer(x) or answer(x, z), never more than the limit at a time. Where a gradient is wanted, the pieces'
        activations are computed again in the backward pass, one piece after another."""
        members = 1 if z is None else z.shape[1]
        if len(x) * members <= self.limit:
            return answer(x) if z is None else answer(x, z)
        pieces = []

        def again(x, *z):  # a copy, as the model may change its input, and is given it twice
            return answer(x.clone(), *z)

        for rows, _, columns in self.parts(len(x), members, 1):
            part = (x[rows],) if z is None else (x[rows], z[rows, columns])
            with_graph = x.requires_grad and torch.is_grad_enabled()
            piece = checkpoint(again, *part, use_reentrant=False) if with_graph else answer(*part)
            if columns.start:
                pieces[-1] = torch.cat([pieces[-1], piece], dim=1)
            else:
                pieces.append(piece)
        return torch.cat(pieces)

    def parts(self, pictures: int, draws: int, samples: int | None = None):
        """(rows, draws, z columns) that together are all draws of all pictures, each within the limit."""
        samples = samples or self.samples
        step = max(1, min(draws, self.limit // samples))
        rows = max(1, self.limit // (step * samples))
        for first in range(0, pictures, rows):
            for done in range(0, draws, step):
                stop = min(done + step, draws)
                yield slice(first, first + rows), stop - done, slice(done * samples, stop * samples)

    def _watch(self, gradient: torch.Tensor) -> None:
        flat = gradient.flatten(1)  # the counts stay on the device: reading one would wait for it
        self.count["gradients"] += len(flat)
        self.count["nonfinite"] += (~flat.isfinite()).any(1).sum()
        self.count["zero"] += (flat == 0).all(1).sum()


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
def hits(target: Target, x: torch.Tensor, y: torch.Tensor, draws: int = 1, z: torch.Tensor | None = None):
    """Is each of `draws` independent answers correct? (B, E). z: (B, E S, Z), drawn when None."""
    z = target.draw(x, draws) if z is None else z
    right = torch.zeros(len(x), draws, dtype=torch.bool, device=x.device)
    for rows, n, columns in target.parts(len(x), draws):
        first = columns.start // target.samples
        answers = target.draws(x[rows], n, None if z is None else z[rows, columns]).argmax(2)
        right[rows, first : first + n] = answers == y[rows, None]
    return right


@torch.no_grad()
def deterministic(target: Target, x: torch.Tensor) -> bool:
    """Does the target answer the same twice? Then one draw says everything."""
    return torch.equal(target(x), target(x))


class OutsideAutograd(nn.Module):
    """A model that PyTorch cannot differentiate (numpy inside, say): the same answers with a gradient of zero, so that
    the audit can say so, and attacks that need none can run."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = self.model(x.detach())
        return logits + 0 * x.flatten(1).sum(1, keepdim=True)


def differentiable(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """The model, or what stands in for it where a gradient in x (B, C, H, W) cannot be had: where either pass fails."""
    lead = x.clone().requires_grad_()
    try:
        logits = model(lead.clone())
        if logits.requires_grad:
            torch.autograd.grad(logits.sum(), lead)
        return model
    except Exception as error:  # whatever a model says to pictures that want a gradient
        if out_of_memory(error):
            raise
        return OutsideAutograd(model)


@contextlib.contextmanager
def full_precision():
    """float32 as it is: without TensorFloat-32, which some GPUs otherwise use for convolutions."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


# ----------------------------------------------------------------------------------------------------------- seeds


def seed_for(*what) -> int:
    """Random numbers follow from what is done, never from the order or the place in which it is done."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=4).digest(), "little")


def reseed(seed: int, model: nn.Module) -> None:
    """Every generator that a model may draw from: a foreign one also from numpy's, or Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    if hasattr(model, "manual_seed"):
        model.manual_seed(seed)
