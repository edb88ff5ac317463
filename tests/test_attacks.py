"""FGSM, PGD and the balanced batch: against the reference, against plain loops, and their promises."""

from argparse import ArgumentTypeError
from math import nan

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden, picture
from torch import nn
from torch.testing import assert_close

import attacks
from attacks import KINDS, adversarially_balanced_batch, balanced_kinds, dlr, fgsm, margin, objective, pgd

EPS = 8 / 255


class Linear(nn.Module):
    """Three classes, linear in the pixels."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def pictures(n=6, side=8):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(n, 3, side, side, generator=generator), torch.arange(n) % 3


def losses(model, x, y):
    with torch.no_grad():
        return F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("name, eps", [("fgsm_8", EPS), ("pgd_8", EPS), ("pgd_4", EPS / 2)])
def test_pictures_equal_the_reference(wrn_10_2, name, eps):
    want = golden("classifier")
    x, y = picture("x", (8, 3, 32, 32)), torch.from_numpy(want["y"])
    if name == "fgsm_8":
        adversarial = fgsm(wrn_10_2, x, y, eps)
    else:
        adversarial = pgd(wrn_10_2, x, y, eps, steps=40, step_size=0.01, random_start=False)
    equal = np.abs(adversarial.numpy() - want[name]) <= 1e-6
    assert equal.mean() >= 0.999
    np.testing.assert_allclose(losses(wrn_10_2, adversarial, y), want[f"ce_{name}"], rtol=1e-4)


@pytest.mark.parametrize("loss", ["ce", margin])
def test_equal_plain_loops(loss):
    """In float64, where no sign of a gradient is a rounding."""
    weight, (x, y) = torch.randn(5, 3 * 8 * 8, dtype=torch.double), pictures()
    x, noise = x.double(), 2 * torch.rand(6, 3, 8, 8, dtype=torch.double) - 1
    model = lambda x: 3 * (x.flatten(1) @ weight.T).sin()  # noqa: E731 (far from linear)

    def plain(start, steps, step_size):
        now = start.clamp(0, 1)
        for _ in range(steps):
            now.requires_grad_()
            value = F.cross_entropy(model(now), y, reduction="sum") if loss == "ce" else margin(model(now), y).sum()
            now = now.detach() + step_size * torch.autograd.grad(value, now)[0].sign()
            now = now.clamp(x - EPS, x + EPS).clamp(0, 1)
        return now

    assert_close(pgd(model, x, y, EPS, 7, 0.01, loss=loss, noise=noise), plain(x + EPS * noise, 7, 0.01))
    assert_close(pgd(model, x, y, EPS, 7, 0.01, random_start=False, loss=loss), plain(x, 7, 0.01))
    if loss == "ce":
        assert_close(fgsm(model, x, y, EPS), plain(x, 1, EPS))


def test_random_starts_fill_the_ball():
    x, y = torch.full((6, 3, 8, 8), 0.5), pictures()[1]
    start = (pgd(Linear(), x, y, EPS, 0, 0.01) - x) / EPS
    assert start.min() < -0.97 and start.max() > 0.97 and start.mean().abs() < 0.05
    assert not torch.equal(pgd(Linear(), x, y, EPS, 0, 0.01), pgd(Linear(), x, y, EPS, 0, 0.01))


ATTACKS = {
    "fgsm": fgsm,
    "pgd": lambda model, x, y, eps: pgd(model, x, y, eps, steps=3, step_size=0.1),
    "pgd without start": lambda model, x, y, eps: pgd(model, x, y, eps, steps=3, step_size=0.1, random_start=False),
    "balanced": lambda model, x, y, eps: adversarially_balanced_batch(model, x, y, eps, 1.0, steps=3, step_size=0.1),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("eps", [0.0, EPS, 0.5])
def test_stays_in_the_ball_and_in_the_picture(wrn_10_2, attack, eps):
    x, y = picture("x", (8, 3, 32, 32)), torch.arange(8)
    x[0], x[1] = 0.0, 1.0
    before = x.clone()
    adversarial = ATTACKS[attack](wrn_10_2, x, y, eps)
    assert torch.equal(x, before) and not adversarial.requires_grad
    assert (adversarial - x).abs().max() <= eps + 1e-6
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    if eps == EPS:
        assert losses(wrn_10_2, adversarial, y).mean() > losses(wrn_10_2, x, y).mean()


def test_parameters_never_receive_gradients_and_modes_stay():
    model = Linear().train()
    x, y = pictures()
    with torch.no_grad():  # attacks compute gradients all the same
        for attack in ATTACKS.values():
            assert (attack(model, x, y, EPS) != x).any()
    assert model.weight.grad is None and model.weight.requires_grad and model.training


class Noisy(Linear):
    """Multiplies the weights by the number of the evaluation, 1, 2, ..., so that the mean gradient is known."""

    def __init__(self, at_once=1):
        super().__init__()
        self.calls, self.at_once = 0, at_once

    def forward(self, x):
        numbers = self.at_once * self.calls + torch.arange(self.at_once) + 1
        self.calls += 1
        logits = super().forward(x)[:, None] * numbers[:, None]
        return logits if self.at_once > 1 else logits[:, 0]


@pytest.mark.parametrize("eot, at_once", [(4, 1), (2, 2), (1, 4)])
def test_eot_averages_over_evaluations_one_by_one_or_at_once(eot, at_once):
    x, y = pictures()
    plain, values = [], []
    for scale in (1, 2, 3, 4):
        lead = x.clone().requires_grad_()
        value = F.cross_entropy(lead.flatten(1) @ (Linear().weight * scale).T, y, reduction="none")
        values.append(value.detach())
        plain.append(torch.autograd.grad(value.sum(), lead)[0])
    value, gradient = objective(Noisy(at_once), y, eot=eot)(x)
    assert_close(value, torch.stack(values).mean(0))
    assert_close(gradient, torch.stack(plain).mean(0))


def test_a_model_that_does_not_look_has_the_gradient_zero():
    x, y = pictures()
    value, gradient = objective(lambda x: torch.eye(3)[y], y)(x)
    assert_close(value, F.cross_entropy(torch.eye(3)[y], y, reduction="none"))
    assert torch.equal(gradient, torch.zeros_like(x))


def test_dlr_is_the_published_formula():
    logits = torch.randn(64, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(64) % 10
    for i, row in enumerate(logits.tolist()):
        ordered = sorted(row)
        others = max(v for k, v in enumerate(row) if k != y[i])
        expected = -(row[y[i]] - others) / (ordered[-1] - ordered[-3])
        assert dlr(logits, y)[i].item() == pytest.approx(expected)
    assert_close(dlr(5 * logits + 3, y), dlr(logits, y))
    two = torch.tensor([[1.0, 3.0]], requires_grad=True)
    assert torch.autograd.grad(dlr(two, torch.tensor([1])).sum(), two)[0].tolist() == [[1.0, -1.0]]
    assert_close(dlr(torch.tensor([[1.0, 3.0, 7.0]]), torch.tensor([0])), torch.tensor([6.0]))  # K = 3, true class last


@pytest.mark.parametrize("pixel, eps", [(0.5, -0.1), (0.5, 8), (0.5, nan), (1.5, EPS), (-0.5, EPS), (nan, EPS)])
def test_nonsense_is_refused(pixel, eps):
    x, y = pictures()
    for attack in ATTACKS.values():
        with pytest.raises(ValueError, match="pixels"):
            attack(Linear(), torch.full_like(x, pixel), y, eps)


def test_eps_is_typed_and_printed_as_people_do():
    assert [attacks.parse_number(text) for text in ("8/255", "0.03", "1e-3")] == [8 / 255, 0.03, 0.001]
    texts = {8 / 255: "8/255", 0.03: "0.03", 0.2: "51/255", 0: "0/255", 1e-9: "1e-09"}
    assert [attacks.format_eps(eps) for eps in texts] == list(texts.values())
    for text in ("", "8/", "1/0", "1e400", "nan", "inf", "eight"):
        with pytest.raises(ArgumentTypeError, match="not a number, such as 8/255"):
            attacks.parse_number(text)


# ------------------------------------------------------------------------------------- the adversarially-balanced batch


@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_the_stated_fraction_and_even_split_hold_over_time(fraction, batch_size):
    total = 100 * batch_size * 4
    kinds = torch.cat([balanced_kinds(first, batch_size, fraction) for first in range(0, total, batch_size)])
    counts = [(kinds == k).sum().item() for k in range(-1, len(KINDS))]
    assert total - counts[0] == round(total * fraction)
    assert max(counts[1:]) - min(counts[1:]) <= 1
    assert torch.equal(kinds, balanced_kinds(0, total, fraction))  # however it is cut into batches


def test_balanced_batch_equals_the_four_attacks_one_by_one(wrn_10_2):
    x, y = picture("x", (8, 3, 32, 32)), torch.arange(8)
    noise = 2 * picture("noise", (8, 3, 32, 32)) - 1
    ours = adversarially_balanced_batch(wrn_10_2, x, y, EPS, 0.5, steps=10, step_size=0.01, first=3, noise=noise)
    kinds = balanced_kinds(3, 8, 0.5)
    assert sorted(set(kinds.tolist())) == [-1, 0, 1, 2, 3]
    for i, kind in enumerate(kinds.tolist()):
        one, label, start = x[i : i + 1], y[i : i + 1], noise[i : i + 1]
        expected = [
            one,
            pgd(wrn_10_2, one, label, EPS / 2, 10, 0.01, noise=start),
            pgd(wrn_10_2, one, label, EPS, 10, 0.01, noise=start),
            fgsm(wrn_10_2, one, label, EPS / 2),
            fgsm(wrn_10_2, one, label, EPS),
        ][kind + 1]
        assert ((ours[i : i + 1] - expected).abs() <= 1e-6).float().mean() >= 0.999, f"picture {i}, kind {kind}"


def test_fraction_zero_perturbs_nothing_and_others_than_fractions_are_refused():
    x, y = pictures()
    assert torch.equal(adversarially_balanced_batch(Linear(), x, y, EPS, 0.0), x)
    for fraction in (-0.1, 1.1):
        with pytest.raises(ValueError, match="fraction"):
            adversarially_balanced_batch(Linear(), x, y, EPS, fraction)


# ------------------------------------------------------------------------------------ is a gradient the derivative?


@pytest.mark.parametrize("pictures, by_majority, accused", [(1, False, 1), (1, True, 0), (9, True, 0), (9, False, 1)])
def test_of_few_pictures_no_majority_tells_anything(pictures, by_majority, accused):
    """The last chunk of an evaluation may have one picture. Here the gradient of the darkest one is lost."""
    x = torch.arange(1, pictures + 1).view(-1, 1, 1, 1) / 20 * torch.ones(1, 1, 1, 1)

    def f(pictures):
        seen = torch.where(pictures.detach() < 0.08, pictures.detach(), pictures)
        return torch.cat([seen.flatten(1), torch.zeros(len(seen), 1)], 1)

    y = torch.zeros(pictures, dtype=torch.long)
    found = attacks.find_unexplained(lambda _: f, x, x + 0.02, y, by_majority)
    assert found.sum() == accused and not found[1:].any()


def test_jumps_as_large_as_the_answers_are_no_rounding():
    """Like those of rounding they cancel from point to point: the answers are votes of the noise in a picture."""

    def f(x):
        vote = torch.sin(1e5 * x).sign().detach() + 1e-6 * x
        return torch.cat([vote.flatten(1), torch.zeros(len(x), 1)], 1)

    x = torch.linspace(0.1, 0.9, 64).view(-1, 1, 1, 1)
    errors = attacks.measure_slope_error(f, x, x + 0.1, torch.zeros(64, dtype=torch.long), points=128)
    assert (errors > 0.5).float().mean() > 0.25
