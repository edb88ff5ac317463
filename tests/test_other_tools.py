"""CARSO is an ordinary nn.Module: the field's tools attack it as it is. requirements-tools.txt says how they are
installed; what is not there is skipped, unless the environment says TOOLS=all."""

import functools
import importlib
import os
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fresh_carso
from torchvision.transforms.functional import to_pil_image

from models import hash_weights
from purifier import CARSO

EPS = 0.1


def tool(name: str) -> types.ModuleType:
    return importlib.import_module(name) if os.environ.get("TOOLS") == "all" else pytest.importorskip(name)


def answers(carso: CARSO, x: torch.Tensor) -> torch.Tensor:
    """Logits (20, B, K) for 20 draws of z, the same ones whatever x."""
    z = torch.randn(20, carso.samples, 4, generator=torch.Generator().manual_seed(1)).flatten(0, 1)
    with torch.no_grad():
        members = carso.member_logits(x, z.expand(len(x), -1, -1))  # (B, 20 S, K)
    return members.unflatten(1, (20, -1)).logsumexp(2).transpose(0, 1)


@functools.cache
def defence(num_classes: int, channels: int) -> tuple[CARSO, torch.Tensor, torch.Tensor]:
    """A CARSO whose classes lie close together, and of 16 pictures the four that it is surest of, with its answers: x
    (4, C, 32, 32), y (4,). Of another one nothing could be seen: most attacks return what they were given where they
    flip nothing, or where it was misclassified already."""
    carso = fresh_carso(num_classes, 3, channels, condition_dim=16, latent_dim=4, decoder_width=16)
    x = torch.randint(256, (16, channels, 32, 32), generator=torch.Generator().manual_seed(0)) / 255
    with torch.no_grad():
        carso.classifier.logits.bias -= answers(carso, x).mean((0, 1))
    logits = answers(carso, x)
    y = logits.mean(0).argmax(1)
    surest = (logits.argmax(2) == y).float().mean(0).topk(4).indices
    return carso, x[surest], y[surest]


@pytest.fixture
def grey():
    return defence(5, 1)


def check(defence, attack) -> None:
    """attack(x, y) -> adversarial pictures: finite, in the ball, in [0, 1], and of a clearly larger expected loss, over
    draws that the attack has not seen. The defence is what it was."""
    carso, x, y = defence
    torch.manual_seed(0)
    np.random.seed(0)  # ART's
    carso.manual_seed(0)
    before = hash_weights(carso)
    adversarial = torch.as_tensor(attack(x.clone(), y.clone())).detach()
    assert adversarial.shape == x.shape and adversarial.dtype == x.dtype and adversarial.isfinite().all()
    assert (adversarial - x).abs().max() <= EPS + 1e-6 and adversarial.min() >= 0 and adversarial.max() <= 1
    losses = [F.cross_entropy(answers(carso, p).flatten(0, 1), y.repeat(20)).item() for p in (x, adversarial)]
    assert losses[1] > losses[0] + 0.5
    assert hash_weights(carso) == before and not any(module.training for module in carso.modules())
    assert not any(parameter.requires_grad for parameter in carso.classifier.parameters())


@pytest.mark.parametrize(
    "name, settings",
    [
        ("EOTPGD", dict(eps=EPS, alpha=EPS / 4, steps=5, eot_iter=2)),
        ("APGDT", dict(eps=EPS, steps=5, n_classes=5)),
        ("Square", dict(eps=EPS, n_queries=100, n_restarts=5)),
    ],
)
def test_torchattacks(grey, name, settings):
    check(grey, getattr(tool("torchattacks"), name)(grey[0], **settings))


def test_foolbox(grey):
    foolbox = tool("foolbox")
    model = foolbox.PyTorchModel(grey[0], bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(steps=5)
    check(grey, lambda x, y: attack(model, x, y, epsilons=EPS)[1])


def test_art(grey):
    attacks, estimators = tool("art.attacks.evasion"), tool("art.estimators.classification")
    model = estimators.PyTorchClassifier(
        grey[0], torch.nn.CrossEntropyLoss(), (1, 32, 32), nb_classes=5, clip_values=(0, 1), device_type="cpu"
    )
    attack = attacks.ProjectedGradientDescent(model, eps=EPS, eps_step=EPS / 4, max_iter=5, verbose=False)
    check(grey, lambda x, y: attack.generate(x.numpy(), y.numpy()))


@pytest.fixture
def no_visdom(monkeypatch):
    """adv-lib imports visdom, which draws curves in a browser and cannot be built with a new setuptools."""
    stub = types.ModuleType("visdom")
    stub.__spec__ = importlib.machinery.ModuleSpec("visdom", None)  # secml-torch asks for it
    monkeypatch.setitem(sys.modules, "visdom", stub)


def test_adv_lib(grey, no_visdom):
    apgd = tool("adv_lib.attacks").apgd
    check(grey, lambda x, y: apgd(grey[0], x, y, eps=EPS, norm=float("inf"), n_iter=5, eot_iter=2))


def test_secml_torch(grey, no_visdom):
    pgd, models = tool("secmlt.adv.evasion.pgd"), tool("secmlt.models.pytorch.base_pytorch_nn")
    attack = pgd.PGD("linf", EPS, num_steps=5, step_size=EPS / 4, backend="native")

    def run(x, y):
        batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
        return torch.cat([pictures for pictures, _ in attack(models.BasePyTorchClassifier(grey[0]), batches)])

    check(grey, run)


def short_apgd(suite, **settings):
    """AutoAttack's first attack with five steps."""
    from pyautoattack.autopgd_base import APGDAttack

    settings |= dict(n_iter=5, eps=EPS, norm="Linf", seed=0, device="cpu", logger=suite.logger)
    return APGDAttack(suite.model, **settings)


def test_autoattack(grey):
    from pyautoattack import AutoAttack

    suite = AutoAttack(grey[0], version="rand", eps=EPS, device="cpu", seed=0)
    suite.apgd = short_apgd(suite, eot_iter=2)
    check(grey, lambda x, y: suite.run_standard_evaluation(x, y, batch_size=3)[0])


def test_robustbench(monkeypatch, tmp_path):
    """Its `benchmark` from end to end, but for CIFAR-10, which it would download, and AutoAttack's budget."""
    import pyautoattack

    class Short(pyautoattack.AutoAttack):
        """PyPI's AutoAttack as RobustBench calls it, which is as GitHub's."""

        def __init__(self, model, log_path, **settings):
            super().__init__(model, seed=0, **settings)

        def run_standard_evaluation(self, x, y, bs, state_path):
            self.attacks_to_run, self.square.n_queries, self.apgd = ["apgd-ce", "square"], 20, short_apgd(self)
            adversarial.append(super().run_standard_evaluation(x, y, batch_size=bs, state_path=state_path)[0])
            return adversarial[0]

    adversarial = []
    theirs = types.ModuleType("autoattack")
    theirs.AutoAttack, theirs.state = Short, importlib.import_module("pyautoattack.state")
    monkeypatch.setitem(sys.modules, "autoattack", theirs)
    monkeypatch.setitem(sys.modules, "autoattack.state", theirs.state)
    evaluation = tool("robustbench.eval")
    monkeypatch.setattr(evaluation, "AutoAttack", Short)
    carso, x, y = defence(10, 3)

    class CIFAR10(list):
        def __init__(self, root, train, transform, download):
            assert root == str(tmp_path) and not train
            super().__init__((transform(to_pil_image(picture)), int(label)) for picture, label in zip(x, y))

    monkeypatch.setattr("torchvision.datasets.CIFAR10", CIFAR10)

    def run(x, y):
        clean, robust = evaluation.benchmark(carso, n_examples=4, data_dir=str(tmp_path), batch_size=2, eps=EPS)
        assert clean > 0.5 and robust < clean
        return adversarial[0]

    check((carso, x, y), run)
