"""S members' logits (B, S, K) into one answer (B, K).

The paper (section 4.5) gives class c the probability

    P_c = 1/Z * prod_s exp(exp(l[s, c])),     that is     log P_c = sum_s exp(l[s, c]) - log Z.

The logarithm of the sum is monotone, so the decision is that of a logsumexp over the members:

    argmax_c P_c  =  argmax_c sum_s exp(l[s, c])  =  argmax_c logsumexp_s l[s, c].

The double exponential changes the probabilities, never the decision; but it saturates float32 as soon as one logit
passes about 3, and a saturated output has no gradient for an attack to follow. We therefore *return* logsumexp_s l: the
paper's decision, with gradients that exist. `log_probabilities` is for those who want the paper's P itself.

Every function: logits (B, S, K) -> (B, K), any floating dtype, differentiable unless it says otherwise.
"""

import math

import torch
import torch.nn.functional as F


def robust_logits(logits: torch.Tensor) -> torch.Tensor:
    """logsumexp over the members: the paper's decision as logits. Finite wherever the input is."""
    return logits.logsumexp(dim=1)


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """The paper's log P_c = log_softmax_c(sum_s exp(l[s, c])), computed without ever forming exp of a large number.

    With a = logsumexp_s l and m = max_c a, the exponents differ from the largest one by

        exp(a_c) - exp(m)  =  -exp(m + log(1 - exp(a_c - m))),

    which is clamped to the smallest finite number of the dtype, where P is long zero. Finite for every finite input,
    also where P rounds to 0 or 1; gradients vanish there: attack `robust_logits` instead.
    """
    a = robust_logits(logits)
    m = a.max(dim=1, keepdim=True).values
    smaller = a < m
    gap = torch.where(smaller, a - m, -1.0)  # the winners' zeros are put back below; log(0) would poison the gradient
    exponent = m + torch.log(-torch.expm1(gap))
    largest = math.log(torch.finfo(a.dtype).max) - 1.0
    difference = torch.where(smaller, -torch.exp(exponent.clamp(max=largest)), 0.0)
    return F.log_softmax(difference, dim=1)


# ------------------------------------------------------------------ what the paper's appendix D compares with


def mean_logits(logits: torch.Tensor) -> torch.Tensor:
    """Logit averaging."""
    return logits.mean(dim=1)


def mean_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Probability averaging, as logarithms: log of the mean of the members' softmax."""
    return F.log_softmax(logits, dim=2).logsumexp(dim=1) - math.log(logits.shape[1])


def mean_sigmoids(logits: torch.Tensor) -> torch.Tensor:
    """Log-odds of the mean of the members' sigmoids, each class for itself: what the authors' code calls `prob`."""
    return F.logsigmoid(logits).logsumexp(dim=1) - F.logsigmoid(-logits).logsumexp(dim=1)


def floored_ratios(logits: torch.Tensor) -> torch.Tensor:
    """Sum over the members of floor(l / max_c l): what the authors' code calls `count`. A vote only where each member's
    largest logit is positive and no other comes near its negative: the largest class counts 1, the others 0, and
    those below zero -1, -2, ...; where all logits are negative, the *least* likely class counts most. A member whose
    largest logit is 0 gives NaN. Not differentiable."""
    return (logits / logits.amax(dim=2, keepdim=True)).floor().sum(dim=1)


def majority_vote(logits: torch.Tensor) -> torch.Tensor:
    """The share of members that vote for each class. Not differentiable; argmax gives a tie to the lowest class."""
    return F.one_hot(logits.argmax(dim=2), logits.shape[2]).to(logits.dtype).mean(dim=1)
