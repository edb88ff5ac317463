"""Training end to end against the same recipe in plain formulas."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import fresh_carso
from torch import nn
from torch.testing import assert_close

import data as datasets
from lab import robust_training
from lab.presets import PRESETS
from lab.ranks import Ranks
from lab.run import Run


@pytest.fixture
def carso(monkeypatch):
    """In float64, like everything here: Adam's first steps are of full length, also where a gradient is a rounding."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(datasets, "pixels", lambda images: images / 255)
    yield fresh_carso(10, samples=2, condition_dim=8, latent_dim=4, decoder_width=8)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_own_answer_is_a_share_of_the_exponentials(carso, share):
    """Values, and gradients in the picture: through the reconstruction and through the classifier's own answer."""
    carso.own_answer = share
    x = torch.rand(3, *carso.purifier.config["image_shape"], requires_grad=True)
    z = torch.randn(3, 2, 4)
    painted = carso.classifier(carso.purify(x, z).flatten(0, 1)).exp().unflatten(0, (3, 2))
    plain = ((1 - share) * painted + share * carso.classifier(x).exp()[:, None]).log()
    ours = carso.member_logits(x, z)
    assert_close(ours, plain)
    gradients = [torch.autograd.grad(logits.sin().sum(), x)[0] for logits in (ours, plain)]
    assert_close(*gradients)
    assert_close(carso(x, z), plain.exp().sum(1).log())


def test_the_average_reaches_back_an_epoch():
    layer = nn.Linear(2, 2)
    average, plain = robust_training.averaged(layer, 5), None
    for step in range(12):
        nn.init.constant_(layer.weight, float(step))
        average.update_parameters(layer)
        plain = float(step) if plain is None else 0.8 * plain + 0.2 * step
    assert_close(average.module.weight, torch.full((2, 2), plain))


@pytest.mark.parametrize("mirror", [True, False])
def test_both_trainings_mirror_where_they_may(monkeypatch, carso, mirror):
    p = dataclasses.replace(PRESETS["digits"], augment=True, mirror=mirror)
    data, asked = datasets.load("digits", "data"), []
    run = Run(None, {"seed": 0}, Ranks(0, 1, torch.device("cpu")), 60)
    monkeypatch.setattr(run, "train", lambda *a: a[6](0, 0, torch.arange(4), 0))
    monkeypatch.setattr(datasets, "augment", lambda x, draws, mirror: asked.append(mirror) or x)
    robust_training.train_classifier(run, data, p, carso.classifier)
    robust_training.train_end_to_end(run, data, carso, p)
    assert asked == [mirror, mirror]


@pytest.mark.parametrize("own_answer, augment", [(0, False), (0.5, False), (0.7, True)])
def test_end_to_end_is_its_recipe(monkeypatch, carso, own_answer, augment):
    """Three steps of two pictures, of two members each, and their average."""
    p = dataclasses.replace(
        PRESETS["digits"], own_answer=own_answer, end_batch_size=2, end_epochs=2, end_attack_steps=3,
        end_samples=2, end_reconstruction=3.0, end_learning_rate=0.01, eps=0.1,
        augment=augment, mirror=True,
    )  # fmt: skip
    data = datasets.load("digits", "data")
    data = dataclasses.replace(data, train_images=data.train_images[:6], train_labels=data.train_labels[:6])
    run = Run(None, {"seed": 0}, Ranks(0, 1, torch.device("cpu")), 60)
    pairs = torch.arange(6).view(3, 2)
    plain = copy.deepcopy(carso)
    monkeypatch.setattr(run, "train", lambda *a: [a[6](1, n, pairs[n], 0) for n in range(3)])
    robust_training.train_end_to_end(run, data, carso, p)

    def logits(x, z):
        members = plain.classifier(plain.purify(x, z).flatten(0, 1)).unflatten(0, z.shape[:2]).exp()
        members = (1 - own_answer) * members + own_answer * plain.classifier(x).exp()[:, None]
        return members.sum(1).log()

    used = ("layer_encoders", "condition_head", "decoder")
    adam = torch.optim.Adam([w for name, w in plain.purifier.named_parameters() if name.startswith(used)], 0.01)
    average = None
    for n in range(3):
        adam.param_groups[0]["lr"] = 0.01 * (1 - (3 + n) / 6)  # the second of two epochs
        x, y = data.train_images[pairs[n]] / 255, data.train_labels[pairs[n]]
        random = run.generator("end-to-end", 1, n)
        start = 2 * torch.rand(x.shape, generator=random) - 1
        if augment:  # test_data.py compares it with slicing
            x = datasets.augment(x, torch.rand(len(x), 3, generator=random))
        z = torch.randn(4, 2, 2, 4, generator=random)
        plain.eval()
        attacked = (x + 0.1 * start).clamp(0, 1)
        for k in range(3):
            attacked.requires_grad_()
            gradient = torch.autograd.grad(F.cross_entropy(logits(attacked, z[k]), y), attacked)[0]
            attacked = attacked.detach() + 2.5 * 0.1 / 3 * gradient.sign()
            attacked = torch.clamp(attacked.clamp(x - 0.1, x + 0.1), 0, 1)
        plain.train()
        painted = plain.purify(attacked, z[3])
        bce = F.binary_cross_entropy(painted, x[:, None].expand_as(painted))
        adam.zero_grad()
        (F.cross_entropy(logits(attacked, z[3]), y) + 3 * bce).backward()
        adam.step()
        now = {k: v.clone() for k, v in plain.purifier.state_dict().items() if v.is_floating_point()}
        average = {k: v if average is None else torch.lerp(average[k], v, 1 / 3) for k, v in now.items()}
    result = carso.purifier.state_dict()
    for name, tensor in average.items():
        assert_close(result[name], tensor, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
