"""The training set attacked once: what `once` gives is what the balanced batch gives, for any number of processes."""

import dataclasses
import functools
import os
import signal

import pytest
import torch
from conftest import fresh_carso
from torch.testing import assert_close

import data as datasets
from attacks import KINDS, adversarially_balanced_batch, balanced_kinds
from lab import perturb
from lab.presets import PRESETS
from lab.ranks import Ranks
from lab.run import Run, Stopped

P = dataclasses.replace(PRESETS["digits"], attack_steps=2, attack_step_size=0.1, attack_versions=4)


@pytest.fixture(scope="module")
def data():
    whole = datasets.load("digits")
    return dataclasses.replace(whole, train_images=whole.train_images[:30], train_labels=whole.train_labels[:30])


@pytest.fixture(scope="module")
def classifier():
    return fresh_carso(10, samples=2, condition_dim=8, latent_dim=4, decoder_width=8).classifier


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(perturb, "CHUNK", 8)


def one(folder, rank=0, count=1) -> Run:
    return Run(folder, {"seed": 0}, Ranks(rank, count, torch.device("cpu")), 60)


def test_a_version_is_the_attack_of_its_kind(tmp_path, data, classifier):
    """Version v, picture i: the kind (i + v) mod 4; FGSM, which has no random start, is the attack itself."""
    p = dataclasses.replace(P, attack_versions=5)
    differences = perturb.attack_training_set(one(tmp_path), data, classifier, p, None)
    assert differences.shape == (5, 30, 1, 32, 32) and differences.dtype == torch.float16
    again = (differences[0] == differences[4]).flatten(1).all(1)  # the same kinds, and other random starts
    assert torch.equal(again, balanced_kinds(0, 30, 1.0) >= 2)
    x, y = datasets.pixels(data.train_images), data.train_labels
    for version, change in enumerate(differences):
        kinds = balanced_kinds(version, 30, 1.0)
        fgsm = kinds >= 2
        want = adversarially_balanced_batch(classifier, x, y, P.eps, 1.0, first=version, steps=1)
        assert_close(x[fgsm] + change[fgsm].float(), want[fgsm], atol=2e-4, rtol=0)
        radius = torch.tensor([P.eps / 2, P.eps] * 2)[kinds]
        assert (change.flatten(1).abs().amax(1) <= radius + 2e-4).all()
        assert (change.flatten(1).abs().amax(1) > 0.5 * radius).all()


@pytest.mark.parametrize("versions", [1, 2, 4, 8])
@pytest.mark.parametrize("fraction", [0.5, 0.15])
def test_the_batch_is_balanced_as_it_was(tmp_path, data, classifier, versions, fraction, monkeypatch):
    """The same places are perturbed; with four versions by the same kinds; the rest is clean, all in ball and range."""
    names = torch.arange(versions)[:, None].expand(versions, 30) + torch.arange(30) + 1  # 1 + kind, in 1/1000
    fake = ((names - 1) % len(KINDS) + 1).half()[..., None, None, None].expand(versions, 30, 1, 32, 32) / 1000
    monkeypatch.setattr(perturb, "attack_training_set", lambda *_: fake)
    p = dataclasses.replace(P, fraction=fraction, attack_versions=versions)
    run = one(tmp_path)
    perturbed, first, seen = perturb.perturbing(run, data, classifier, p, None), 0, []
    dark = dataclasses.replace(data, train_images=data.train_images // 2)
    for epoch in range(4):
        for indices in datasets.batches(30, 7, 0, epoch):
            clean, y = run.pictures(dark, indices)
            change = perturbed(clean, y, indices, epoch, first, None) - clean
            kinds = (1000 * change.flatten(1).amax(1)).round().long() - 1
            want = balanced_kinds(first, len(indices), fraction)
            assert torch.equal(kinds >= 0, want >= 0)
            if versions % 4 == 0:
                assert torch.equal(kinds, want)
            seen += kinds[kinds >= 0].tolist()
            first += len(indices)
    assert len(seen) == int(first * fraction) and set(seen) == {0, 1, 2, 3}


def test_what_is_read_is_projected(tmp_path, data, classifier, monkeypatch):
    monkeypatch.setattr(perturb, "attack_training_set", lambda *_: torch.full((1, 30, 1, 32, 32), 9.0).half())
    p = dataclasses.replace(P, fraction=1.0, attack_versions=1)
    run, indices = one(tmp_path), torch.arange(8)
    x, y = run.pictures(data, indices)
    out = perturb.perturbing(run, data, classifier, p, None)(x, y, indices, 0, 0, None)
    radius = torch.tensor([P.eps / 2, P.eps] * 4)[:, None, None, None]
    assert_close(out, (x + radius).clamp(max=1))


@pytest.mark.parametrize("limit", [None, 3])
def test_any_number_of_processes_makes_the_same_and_goes_on(tmp_path, data, classifier, limit, monkeypatch):
    """Each of three makes its share, which their sum joins. What is on disk is not made again."""
    attack = functools.partial(perturb.attack_training_set, data=data, classifier=classifier, p=P, limit=limit)
    whole = attack(one(tmp_path / "one"))
    monkeypatch.setattr(Ranks, "sum", lambda self, values: values)
    shares = [attack(one(tmp_path / f"{rank}", rank, 3)) for rank in range(3)]
    assert torch.equal(sum(shares), whole) and all((share != 0).any() for share in shares)

    files = sorted((tmp_path / "one" / "attacked").iterdir())
    assert len(files) == 4 * 4
    files[5].unlink()
    files[9].unlink()
    real, once = perturb.attacked, iter([True])
    terminate = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(perturb, "attacked", lambda *a: (next(once, False) and terminate()) or real(*a))
    with pytest.raises(Stopped, match="attack, version 1, picture 15"):
        attack(one(tmp_path / "one"))
    made = []
    monkeypatch.setattr(perturb, "attacked", lambda *a: made.append(len(a[1])) or real(*a))
    assert torch.equal(attack(one(tmp_path / "one")), whole) and sum(made) == 8  # the other was made before the stop
