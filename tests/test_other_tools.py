"""CARSO is an ordinary nn.Module: the field's tools take it as it is. Optional: pip install torchattacks foolbox."""

import pytest
import torch

X = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def answers(model):
    """Some attacks leave alone what is misclassified already."""
    with torch.no_grad():
        return model(X).argmax(1)


def check(adversarial, eps):
    assert adversarial.shape == X.shape and (adversarial - X).abs().max() <= eps + 1e-6
    assert adversarial.min() >= 0 and adversarial.max() <= 1


@pytest.mark.parametrize("name", ["PGD", "EOTPGD", "APGD"])
def test_torchattacks(tiny_carso, name):
    torchattacks = pytest.importorskip("torchattacks")
    attack = getattr(torchattacks, name)(
        tiny_carso, eps=0.1, **({"steps": 3} if name != "EOTPGD" else {"steps": 3, "eot_iter": 2})
    )
    check(attack(X, answers(tiny_carso)).detach(), 0.1)


def test_foolbox(tiny_carso):
    foolbox = pytest.importorskip("foolbox")
    model = foolbox.PyTorchModel(tiny_carso, bounds=(0, 1), device="cpu")
    _, clipped, _ = foolbox.attacks.LinfPGD(steps=3)(model, X, answers(tiny_carso), epsilons=0.1)
    check(clipped, 0.1)


def test_autoattack(tiny_carso):
    from pyautoattack import AutoAttack
    from pyautoattack.autopgd_base import APGDAttack

    suite = AutoAttack(tiny_carso, version="rand", eps=0.1, device="cpu", seed=0)
    suite.apgd = APGDAttack(
        tiny_carso, n_iter=3, eot_iter=2, eps=0.1, norm="Linf", seed=0, device="cpu", logger=suite.logger
    )
    adversarial, _ = suite.run_standard_evaluation(X, answers(tiny_carso), batch_size=3)
    assert (adversarial - X).abs().max() <= 0.1 + 1e-6
