"""FGSM, PGD and the balanced batch: against the reference, against plain loops, and their promises."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden, picture
from torch import nn
from torch.testing import assert_close

from attacks import KINDS, adversarially_balanced_batch, balanced_kinds, dlr, fgsm, objective, pgd

EPS = 8 / 255


class Linear(nn.Module):
    """Three classes, linear in the pixels: the worst perturbation of every pixel is known."""

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


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "pgd without start", "balanced"])
@pytest.mark.parametrize("eps", [0.0, EPS, 0.5, 1.0])
def test_stays_in_the_ball_and_in_the_picture(wrn_10_2, attack, eps):
    x, y = picture("x", (8, 3, 32, 32)), torch.arange(8)
    x[0], x[1] = 0.0, 1.0
    before = x.clone()
    adversarial = {
        "fgsm": lambda: fgsm(wrn_10_2, x, y, eps),
        "pgd": lambda: pgd(wrn_10_2, x, y, eps, 3, 0.1),
        "pgd without start": lambda: pgd(wrn_10_2, x, y, eps, 3, 0.1, random_start=False),
        "balanced": lambda: adversarially_balanced_batch(wrn_10_2, x, y, eps, 1.0, 3, 0.1),
    }[attack]()
    assert torch.equal(x, before) and not adversarial.requires_grad
    assert (adversarial - x).abs().max() <= eps + 1e-6
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    if eps == 0:
        assert_close(adversarial, x, rtol=0, atol=1e-7)
    else:
        assert (losses(wrn_10_2, adversarial, y).mean() > losses(wrn_10_2, x, y).mean()) or eps > EPS


def test_pgd_reaches_the_exact_optimum_of_a_linear_model():
    """With two classes left in play the loss is monotone in every pixel: the optimum is a corner of the box."""
    model = Linear()
    model.weight.data[2] = 0
    x, y = torch.full((2, 3, 8, 8), 0.5), torch.tensor([0, 1])
    direction = torch.stack([model.weight[1] - model.weight[0], model.weight[0] - model.weight[1]]).sign()
    model.forward = lambda x: (x.flatten(1) @ model.weight.T)[:, :2]
    best = x + EPS * direction.view_as(x)
    for adversarial in (fgsm(model, x, y, EPS), pgd(model, x, y, EPS, 20, EPS / 4)):
        assert_close(adversarial, best.detach(), rtol=0, atol=1e-6)


def test_parameters_never_receive_gradients_and_modes_stay():
    model = Linear().train()
    x, y = pictures()
    fgsm(model, x, y, EPS), pgd(model, x, y, EPS, 2, 0.01), adversarially_balanced_batch(model, x, y, EPS, 0.5)
    assert model.weight.grad is None and model.weight.requires_grad and model.training


def test_eot_averages_gradients_over_draws():
    class Noisy(Linear):
        """Adds draw number i's fixed noise to the weights, so that the mean gradient is known."""

        calls = 0

        def forward(self, x):
            self.calls += 1
            return x.flatten(1) @ (self.weight * self.calls).T

    x, y = pictures()
    plain = []
    for scale in (1, 2, 3, 4):
        lead = x.clone().requires_grad_()
        loss = F.cross_entropy(lead.flatten(1) @ (Linear().weight * scale).T, y, reduction="sum")
        plain.append(torch.autograd.grad(loss, lead)[0])
    assert_close(objective(Noisy(), y, eot=4)(x)[1], torch.stack(plain).mean(0))


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


@pytest.mark.parametrize(
    "wrong",
    [
        dict(eps=-0.1),
        dict(eps=8),
        dict(x=torch.full((6, 3, 8, 8), 1.5)),
        dict(x=torch.full((6, 3, 8, 8), float("nan"))),
    ],
)
def test_nonsense_is_refused(wrong):
    x, y = pictures()
    arguments = dict(x=x, y=y, eps=EPS) | wrong
    with pytest.raises(ValueError, match="pixels"):
        fgsm(Linear(), **arguments)
    with pytest.raises(ValueError, match="pixels"):
        adversarially_balanced_batch(Linear(), **arguments, fraction=0.5)


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


def test_every_batch_is_a_mixture():
    kinds = balanced_kinds(12_800, 128, 0.5)
    assert [(kinds == k).sum().item() for k in range(-1, 4)] == [64, 16, 16, 16, 16]


def test_balanced_batch_equals_the_four_attacks_one_by_one(wrn_10_2):
    x, y = picture("x", (8, 3, 32, 32)), torch.arange(8)
    noise = 2 * picture("noise", (8, 3, 32, 32)) - 1
    ours = adversarially_balanced_batch(wrn_10_2, x, y, EPS, 0.5, steps=10, step_size=0.01, first=3, noise=noise)
    kinds = balanced_kinds(3, 8, 0.5)
    assert sorted(set(kinds.tolist())) == [-1, 0, 1, 2, 3]
    for i, kind in enumerate(kinds.tolist()):
        one, label, start = x[i : i + 1], y[i : i + 1], noise[i : i + 1]
        if kind == -1:
            expected = one
        elif kind < 2:
            expected = pgd(wrn_10_2, one, label, (EPS / 2, EPS)[kind], 10, 0.01, noise=start)
        else:
            expected = fgsm(wrn_10_2, one, label, (EPS / 2, EPS)[kind - 2])
        assert ((ours[i : i + 1] - expected).abs() <= 1e-6).float().mean() >= 0.999, f"picture {i}, kind {kind}"


def test_fraction_zero_perturbs_nothing():
    x, y = pictures()
    assert torch.equal(adversarially_balanced_batch(Linear(), x, y, EPS, 0.0), x)
