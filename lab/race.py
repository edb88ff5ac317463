"""Which of a picture's adversarial candidates is the worst, when every answer is a draw of a stochastic defence?

Taking the worst of N candidates by a few draws each often takes the wrong one, which flatters the defence; a
deterministic one is never flattered. So candidates race: a few draws for all of them, more for those still in the
running, all draws for the finalists. Every candidate of a picture sees the same noise. What is chosen is then scored on
fresh draws, and so the truth lies, in expectation, between the finalists' least score (the least of several noisy
numbers is too low) and the fresh one (the chosen candidate need not be the worst): both are reported.

Shapes: B pictures, P candidates of any of them, `of` (P,) each one's picture; z (B, E S, Z), or None for a model
without members.
"""

import math

import torch

from lab.target import Target, hits


def some_draws(target: Target, x, of, y, z, first: int, last: int) -> torch.Tensor:
    """How many of the draws first .. last - 1 are right about each candidate, (P,)."""
    noise = None if z is None else z[of, first * target.samples : last * target.samples]
    return hits(target, x, y[of], last - first, noise).sum(1)


def race(target: Target, x, of, y, z, draws: int, right: torch.Tensor | None = None, start: int = 0):
    """Candidates x (P, C, H, W) of pictures with labels y (B,).

    right (P,): how many of `start` earlier draws were right, to go on from them; draws: how many more a finalist gets.
    Returns how many were right for each candidate, (P,), and whether it is a finalist, (P,): only their counts are over
    all start + draws draws."""
    right = torch.zeros(len(x), device=x.device) if right is None else right.float()
    running, done = torch.ones(len(x), dtype=torch.bool, device=x.device), 0
    for last in sorted({-(-draws // 4), -(-draws // 2), draws}):
        rows = running.nonzero().squeeze(1)
        right[rows] += some_draws(target, x[rows], of[rows], y, z, done, last)
        done = last
        best = torch.full((len(y),), math.inf, device=x.device).scatter_reduce(0, of[rows], right[rows], "amin")
        # The difference of two counts of n draws has a standard deviation of at most sqrt(n / 2).
        running &= right <= best[of] + math.sqrt(start + done)
    return right, running


def least(right: torch.Tensor, running: torch.Tensor, of: torch.Tensor, pictures: int):
    """Each picture's finalist with the fewest right answers, the first among equals: its number, (B,), -1 where a
    picture has no candidate."""
    order = torch.arange(len(right), device=right.device)
    score = torch.where(running, right.double() * len(right) + order, math.inf)  # float32 would round large numbers
    best = torch.full((pictures,), math.inf, device=right.device, dtype=torch.double)
    best = best.scatter_reduce(0, of, score, "amin")
    return torch.where(best.isfinite(), best % max(len(right), 1), -1).long()


def lost(target: Target, x, of, y, z, draws: int) -> torch.Tensor:
    """Is each candidate (P, C, H, W) misclassified on every draw? (P,)"""
    left, done = torch.ones(len(x), dtype=torch.bool, device=x.device), 0
    for last in sorted({1, -(-draws // 4), draws}):
        rows = left.nonzero().squeeze(1)
        if len(rows):
            left[rows] = some_draws(target, x[rows], of[rows], y, z, done, last) == 0
        done = last
    return left
