"""What is done for speed changes no result (layouts, BatchNorm, mixed precision). Tools that measure and predict."""

import json

import pytest
import torch
from conftest import DEVICE, fresh_carso
from test_train import here
from torch import nn
from torch.testing import assert_close

import evaluate
import lab.perturb
import train
from attacks import adversarially_balanced_batch, objective
from evaluate import ATTACKS
from lab.audit import audit
from lab.checkpoints import save_checkpoint
from lab.presets import PRESETS, Budget
from lab.ranks import Ranks
from lab.target import Target
from lab.units import Evaluation
from models import Norm

X = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2])
BUDGET = Budget(n=3, steps=2, eot=2, pgd_steps=3, queries=4, targets=2, select=2, draws=3, chunk=3)


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def evaluation(model, folder=None, precision="fp32") -> Evaluation:
    config = dict(eps=0.1, samples=getattr(model, "samples", 1), view="logsumexp", aggregation="robust", seed=0)
    config["classes"] = 5
    images = (255 * X).to(torch.uint8)
    return Evaluation(model, images, Y, config | {"search_precision": precision}, BUDGET, folder, "cpu", 64, ATTACKS)


# ------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("training", [False, True])
def test_norm_is_batchnorm(training):
    torch.manual_seed(0)
    theirs, ours = nn.BatchNorm2d(5).double(), Norm(5).double()
    for tensor in theirs.state_dict().values():
        tensor.copy_(torch.rand_like(tensor, dtype=torch.double) + 0.5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 5, 3, 3, dtype=torch.double, requires_grad=True)
    results = []
    for module in (theirs.train(training), ours.train(training)):
        out = module(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, module.weight, module.bias])])
    for a, b in zip(*results):
        assert_close(a, b)
    assert_close(theirs.state_dict(), ours.state_dict())


def test_gradients_of_pictures_are_contiguous(tiny_carso):
    for model in (tiny_carso, tiny_carso.classifier):
        for x in (X, X.to(memory_format=torch.channels_last), X.double()):
            gradient = objective(model.to(x.dtype), Y)(x)[1]
            assert gradient.is_contiguous() and gradient.shape == X.shape and gradient.dtype == x.dtype
        model.float()


def test_pixels_and_logits_keep_float32_under_autocast(tiny_carso):
    z = tiny_carso.draw(X, 4)
    exact = [*tiny_carso.answers(X, z), tiny_carso(X, z), tiny_carso.classifier(X)]
    with bf16():
        reduced = [*tiny_carso.answers(X, z), tiny_carso(X, z), tiny_carso.classifier(X)]
    for a, b in zip(exact, reduced):
        assert b.dtype == torch.float32 and 0 < (a - b).abs().mean() < 0.05 * a.abs().mean()


def test_white_stays_below_one_in_bf16(tiny_carso):
    """bfloat16 has nothing between 0.996 and 1, and the BCE of a pixel that is exactly 1 is off by a factor."""
    decoder, z = tiny_carso.purifier.decoder, tiny_carso.draw(X, 2)
    torch.nn.init.zeros_(decoder[-2].weight)
    torch.nn.init.constant_(decoder[-2].bias, 7.0)
    with bf16():
        white = tiny_carso.purify(X, z)
    assert_close(white, torch.full(white.shape, 0.999089), atol=2e-6, rtol=0)  # a float32, too


def test_the_balanced_batch_in_bf16(tiny_carso):
    x, y, noise = torch.rand(8, 1, 32, 32), torch.arange(8) % 5, torch.zeros(8, 1, 32, 32)
    with bf16():
        attacked = adversarially_balanced_batch(tiny_carso.classifier, x, y, 0.1, 1.0, steps=3, noise=noise)
    assert attacked.dtype == torch.float32 and (attacked - x).abs().max() <= 0.1 + 1e-6
    losses = [objective(tiny_carso.classifier, y)(pictures)[0].sum() for pictures in (x, attacked)]
    assert losses[1] > losses[0]


def test_training_in_bf16(monkeypatch):
    """The option reaches the attack, the classifier and the purifier, but not the loss."""
    seen, module = [], lab.perturb
    monkeypatch.setattr(module, "adversarially_balanced_batch", lambda classifier, x, *_, **__: seen.append(on()) or x)
    monkeypatch.setattr(train, "recorded", lambda *a: seen.append(on()) or real(*a))
    monkeypatch.setattr(train, "vae_loss", lambda *a: seen.append((on(), {t.dtype for t in a[:4]})) or [a[0].sum()] * 3)
    on, real = lambda: torch.is_autocast_enabled("cpu"), lab.perturb.recorded
    for asked in (True, False):
        carso = fresh_carso(10, samples=2, condition_dim=8, latent_dim=4, decoder_width=8)
        p = train.dataclasses.replace(PRESETS["digits"], latent_dim=4, bf16=asked, attack_versions=0)
        seen.clear()
        monkeypatch.setattr(train.Run, "train", lambda self, *a: a[6](0, 0, torch.arange(4), 0))
        data = train.datasets.load("digits", "data")
        run_ = train.Run(None, {"seed": 0}, Ranks(0, 1, torch.device("cpu")), 60)
        monkeypatch.setattr(train, "refresh_batchnorm", lambda *_: None)
        train.train_purifier(run_, data, carso, p)
        assert seen == [asked, asked, (False, {torch.float32})]
        assert all(q.grad.dtype == torch.float32 and q.grad.isfinite().all() for q in carso.purifier.parameters())


# ---------------------------------------------------------------------------------------- searching in mixed precision


def test_search_is_bf16_and_scores_are_not(tiny_carso, tmp_path, monkeypatch):
    seen, real = [], Target.draws

    def draws(self, *args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return real(self, *args)

    monkeypatch.setattr(Target, "draws", draws)
    for precision in ("bf16", "fp32"):
        e = evaluation(tiny_carso, tmp_path / precision, precision)
        seen.clear()
        e.attack("apgd-ce", 0)  # the search, and then the race and the score
        assert (True in seen) == (precision == "bf16") and not seen[-1]
        seen.clear()
        audit(e, count=2, draws=2)
        assert set(seen) == {False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    carso = fresh_carso(10, samples=2, condition_dim=8, latent_dim=4, decoder_width=8)
    save_checkpoint(folder / "carso.pt", carso, dataset="digits", data_dir="data", config={"eps": 0.2})
    return folder


SMALL = (
    f"--pictures 4 --steps 1 --eot 2 --queries 2 --targets 2 --select 1 --draws 2 --chunk 4 --device {DEVICE}".split()
)


def test_the_report_names_the_precision_and_work_cannot_mix(folder, monkeypatch, capsys):
    options = ["--ckpt", "carso.pt", *SMALL, "--attack", "rand", "--search-precision", "bf16", "--out", "reduced"]
    assert "Attacks searched in bfloat16" in here(evaluate, folder, options, monkeypatch, capsys)
    assert json.loads((folder / "reduced" / "report.json").read_text())["config"]["search_precision"] == "bf16"
    options[options.index("bf16")] = "fp32"
    with pytest.raises(ValueError, match="search_precision: bf16 there, fp32 now"):
        evaluate.prepare(evaluate.parse_arguments(options))
