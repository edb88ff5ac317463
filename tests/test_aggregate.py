"""The aggregation against its plain formulas in float64, and at the extremes."""

import pytest
import torch
from conftest import golden
from torch.testing import assert_close

import aggregate
from aggregate import (
    floored_ratios,
    log_probabilities,
    majority_vote,
    mean_logits,
    mean_probabilities,
    mean_sigmoids,
    robust_logits,
)

ALL = [robust_logits, log_probabilities, mean_logits, mean_probabilities, mean_sigmoids, majority_vote]


def logits(scale, shape=(50, 8, 10), dtype=torch.float64):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_plain_formulas(scale):
    l = logits(scale)
    P = l.exp().sum(1).softmax(1)  # prod_s exp(exp(l)), normalised
    assert_close(log_probabilities(l), P.log(), rtol=1e-9, atol=1e-9, equal_nan=False) if (P > 0).all() else None
    assert_close(log_probabilities(l).exp(), P, rtol=1e-9, atol=1e-12)
    assert_close(robust_logits(l).exp(), l.exp().sum(1))
    assert_close(mean_logits(l), l.sum(1) / 8)
    assert_close(mean_probabilities(l).exp(), l.softmax(2).mean(1))
    votes = torch.stack([(l.argmax(2) == k).double().mean(1) for k in range(10)], 1)
    assert_close(majority_vote(l), votes)
    mean = l.sigmoid().mean(1)
    assert_close(mean_sigmoids(l), (mean / (1 - mean)).log())
    assert_close(floored_ratios(l), sum((m / m.max(1, keepdim=True).values).floor() for m in l.unbind(1)))


def test_the_authors_count_is_no_vote():
    """Two members for class 0 and one for class 1; then logits below zero, where the least likely class wins."""
    votes = torch.tensor([[[3.0, 1.0, 2.0], [2.0, 1.0, 1.5], [1.0, 3.0, 2.0]]])
    assert floored_ratios(votes).tolist() == [[2.0, 1.0, 0.0]]
    assert_close(majority_vote(votes), torch.tensor([[2 / 3, 1 / 3, 0.0]]))
    below = torch.tensor([[[-1.0, -9.0, -5.0], [-2.0, -8.0, -4.0]]])  # both members: class 0, and least of all class 1
    assert floored_ratios(below).tolist() == [[2.0, 13.0, 7.0]] and majority_vote(below).argmax() == 0


def test_equals_the_reference():
    want = golden("purifier")
    l = torch.from_numpy(want["member_logits"])
    assert_close(mean_logits(l), torch.from_numpy(want["agg_logit"]), rtol=1e-4, atol=1e-5)
    log_p = log_probabilities(l.double())
    log_odds = log_p - torch.log(-torch.expm1(log_p))
    assert_close(log_odds.float(), torch.from_numpy(want["agg_peel"]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", ALL)
def test_finite_and_normalised_from_minus_1e4_to_1e4(function, dtype):
    l = logits(1.0, dtype=dtype).clamp(-1, 1) * 1e4
    l[0] = 1e4
    l[1] = -1e4
    l[2, :, :5], l[2, :, 5:] = 1e4, -1e4
    out = function(l)
    assert out.isfinite().all()
    if function is not majority_vote:
        lead = l.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(lead).clamp(min=-1e30).sum(), lead)
        assert gradient.isfinite().all()
    if function in (log_probabilities, mean_probabilities):
        assert_close(out.exp().sum(1), torch.ones(50, dtype=dtype), rtol=1e-4, atol=0)
    if function is log_probabilities:
        assert_close(out[0].exp(), torch.full((10,), 0.1, dtype=dtype))  # a tie of all
        assert_close(out[1].exp(), torch.full((10,), 0.1, dtype=dtype))
        assert_close(out[2].exp(), torch.tensor([0.2] * 5 + [0.0] * 5, dtype=dtype))


def test_the_decision_is_the_papers():
    l = logits(2.0)
    decision = l.exp().sum(1).argmax(1)
    assert torch.equal(robust_logits(l).argmax(1), decision)
    assert torch.equal(log_probabilities(l).argmax(1), decision)


@pytest.mark.parametrize("function", ALL)
def test_order_of_members_does_not_matter(function):
    l = logits(2.0)
    assert_close(function(l.flip(1)), function(l))


def test_robust_logits_keep_a_gradient_where_probabilities_saturate():
    l = logits(1.0, dtype=torch.float32) + 20
    for function, alive in ((aggregate.log_probabilities, False), (aggregate.robust_logits, True)):
        lead = l.clone().requires_grad_()
        y = robust_logits(l).argmax(1)
        loss = torch.nn.functional.cross_entropy(function(lead), y)
        assert bool(torch.autograd.grad(loss, lead)[0].abs().sum() > 0) is alive
