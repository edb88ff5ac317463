"""The conditional VAE against the reference, and CARSO's promises."""

import copy
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TESTS, golden, picture, reference_name, uniform
from torch import nn
from torch.testing import assert_close

from attacks import objective
from models import WideResNet, hash_weights, record, representation_layers
from purifier import CARSO, build_carso, is_carso, load_carso, save_carso, statistics_kept, vae_loss

SIZES = dict(condition_dim=16, latent_dim=4, decoder_width=16)

# ------------------------------------------------------------------------------------------ the paper's, and the VAE


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_paper():
    """Scenarios a and c, without memory."""
    with torch.device("meta"):
        sizes = dict(condition_dim=768, latent_dim=192)
        p = build_carso(WideResNet(200), representation_layers(28), (3, 64, 64), **sizes).purifier
        assert parameters(p) == 324_508_537
        assert p.condition_head[0].in_features == 377_600
        p = build_carso(WideResNet(10), representation_layers(28), (3, 32, 32)).purifier
    assert parameters(p) == 106_381_537
    assert parameters(p.image_encoder) == 846
    assert parameters(p.layer_encoders) == 28_442_960
    assert parameters(p.condition_head) == 75_285_504
    assert parameters(p.joint_head) == 164_096
    assert parameters(p.to_mu) + parameters(p.to_logvar) == 33_024
    assert parameters(p.decoder) == 2_455_107


@pytest.mark.parametrize("file", ["wrn28_10", "wrn10_2"])
def test_tensors_have_the_reference_shapes(file):
    reference = json.loads((TESTS / f"keys_{file}_cifar.json").read_text())
    expected = {f"{part}/{key}": s for part in reference if part != "classifier" for key, s in reference[part].items()}
    depth, width = (28, 10) if file == "wrn28_10" else (10, 2)
    with torch.device("meta"):
        carso = build_carso(WideResNet(10, depth, width), representation_layers(depth), (3, 32, 32))
    assert {reference_name(k): list(v.shape) for k, v in carso.purifier.state_dict().items()} == expected


def test_training_forward_loss_and_gradients_equal_the_reference(reference_carso):
    want = golden("purifier")
    x, clean = picture("x", (8, 3, 32, 32)), picture("clean", (8, 3, 32, 32))
    noise = torch.from_numpy((2 * uniform("eps_train", (8, 128)) - 1).astype(np.float32))
    purifier = reference_carso.purifier.train()
    with torch.no_grad():
        _, representation = record(reference_carso.classifier, reference_carso.layers, x)
    reconstruction, mu, logvar = purifier(x, representation, noise)
    for ours, name in ((reconstruction, "train_xrec"), (mu, "train_mu"), (logvar, "train_logvar")):
        assert_close(ours.detach(), torch.from_numpy(want[name]), rtol=1e-4, atol=1e-5)
    loss, bce, kld = vae_loss(reconstruction, clean, mu, logvar, float(want["beta"]))
    weighted_kld = float(want["beta"]) * kld.item()  # the golden file's "kld" is the weighted term: loss - bce
    ours = [loss.item(), bce.item(), weighted_kld]
    assert_close(ours, [float(want[k]) for k in ("loss", "bce", "kld")], rtol=1e-4, atol=0)
    loss.backward()
    ours = {reference_name(name): p.grad.norm().item() for name, p in purifier.named_parameters()}
    expected = dict(zip(want["grad_norm_names"].tolist(), want["grad_norms"], strict=True))
    assert ours.keys() == expected.keys()
    np.testing.assert_allclose([ours[k] for k in expected], list(expected.values()), rtol=1e-3, atol=1e-3)


def test_inference_equals_the_reference(reference_carso):
    want = golden("purifier")
    x = picture("x", (8, 3, 32, 32))
    z = np.sqrt(3) * (2 * uniform("z_eval", (8, 128, 8)) - 1)
    z = torch.from_numpy(z.astype(np.float32).transpose(0, 2, 1).copy())
    with torch.inference_mode():
        _, representation = record(reference_carso.classifier, reference_carso.layers, x)
        condition = reference_carso.purifier.condition(representation)
        mu, logvar = reference_carso.purifier.encode(x, condition)
        results = {
            "condition": condition,
            "eval_mu": mu,
            "eval_logvar": logvar,
            "reconstructions": reference_carso.purify(x, z)[:, :2],
            "member_logits": reference_carso.member_logits(x, z),
        }
    for name, ours in results.items():
        assert_close(ours, torch.from_numpy(want[name]), rtol=1e-4, atol=2e-5)


def test_the_loss_is_its_formula_and_nan_where_a_reconstruction_is():
    p, x = torch.rand(2, 2, 3, 4, 4, dtype=torch.double).clamp(0.01, 0.99)
    mu, logvar = torch.randn(2, 2, 5, dtype=torch.double)
    bce = -(x * p.log() + (1 - x) * (1 - p).log()).sum()
    kld = 0.5 * (mu**2 + logvar.exp() - logvar - 1).sum()
    assert_close(vae_loss(p, x, mu, logvar, 0.3), (bce + 0.3 * kld, bce, kld))
    p[1, 0, 2, 2] = torch.nan
    assert [value.isnan().item() for value in vae_loss(p, x, mu, logvar, 0.3)] == [True, True, False]


def test_recomputing_counts_a_batch_once(tiny_carso):
    """The same gradients, and the same running statistics, although the layers' encoders run twice."""
    x, ways = torch.rand(6, 1, 32, 32), []
    with torch.no_grad():
        representation = record(tiny_carso.classifier, tiny_carso.layers, x)[1]
    for recompute in (False, True):
        purifier = copy.deepcopy(tiny_carso.purifier).train()
        purifier.recompute, runs = recompute, []
        purifier.layer_encoders[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        reconstruction, mu, logvar = purifier(x, representation, torch.zeros(6, 4))
        vae_loss(reconstruction, x, mu, logvar, 1.0)[0].backward()
        assert len(runs) == 1 + recompute
        ways.append([*purifier.state_dict().values(), *(p.grad for p in purifier.parameters())])
    for plain, again in zip(*ways, strict=True):
        assert_close(plain, again)


def test_statistics_are_kept_whatever_happens():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None))
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RuntimeError), statistics_kept(network):
        network(5 * torch.rand(4, 3, 2, 2))
        network(torch.rand(4, 2, 2, 2))
    assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert [layer.momentum for layer in network] == [0.1, None]


# --------------------------------------------------------------------------------------------------- CARSO's promises


def test_members_are_folded_not_mixed(tiny_carso):
    """Member s of picture b is what that z alone gives that picture alone."""
    x, z = torch.rand(3, 1, 32, 32), torch.randn(3, 4, 4)
    with torch.no_grad():
        together = tiny_carso.member_logits(x, z)
        for b in range(3):
            for s in range(4):
                alone = tiny_carso.member_logits(x[b : b + 1], z[b : b + 1, s : s + 1])[0, 0]
                assert_close(together[b, s], alone, rtol=1e-4, atol=1e-5)
        assert_close(tiny_carso(x, z), together.logsumexp(1))


def test_classifier_is_shared_frozen_and_in_eval_mode(tiny_carso):
    classifier = tiny_carso.classifier
    assert CARSO(classifier, tiny_carso.purifier, tiny_carso.layers).classifier is classifier
    tiny_carso.train()
    assert tiny_carso.purifier.training and not any(m.training for m in classifier.modules())
    assert not any(p.requires_grad for p in classifier.parameters())
    x = torch.rand(2, 1, 32, 32, requires_grad=True)
    tiny_carso(x).sum().backward()
    assert all(p.grad is None for p in classifier.parameters())
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_latent_draws_are_reproducible_and_immune_to_the_global_seed(tiny_carso):
    x = torch.rand(2, 1, 32, 32)
    tiny_carso.manual_seed(5)
    first, second = tiny_carso(x), tiny_carso(x)
    assert not torch.equal(first, second)
    tiny_carso.manual_seed(5)
    assert torch.equal(tiny_carso(x), first)
    torch.manual_seed(0)
    a = tiny_carso(x)
    torch.manual_seed(0)
    assert not torch.equal(tiny_carso(x), a)


@pytest.mark.parametrize("wrong", [dict(samples=-1), dict(layers=["a"])])
def test_arguments_that_make_no_defence_are_refused(tiny_carso, wrong):
    with pytest.raises(ValueError):
        CARSO(**dict(classifier=tiny_carso.classifier, purifier=tiny_carso.purifier, layers=tiny_carso.layers) | wrong)


def test_gradients_of_pictures_are_contiguous(tiny_carso):
    x = torch.rand(3, 1, 32, 32)
    for model in (tiny_carso, tiny_carso.classifier):
        for pictures in (x, x.to(memory_format=torch.channels_last), x.double()):
            gradient = objective(model.to(pictures.dtype), torch.tensor([0, 1, 2]))(pictures)[1]
            assert gradient.is_contiguous() and gradient.shape == x.shape and gradient.dtype == pictures.dtype
        model.float()


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def test_pixels_and_logits_keep_float32_under_autocast(tiny_carso):
    x = torch.rand(3, 1, 32, 32)
    z = tiny_carso.draw(x, 4)
    exact = [*tiny_carso.answers(x, z), tiny_carso(x, z), tiny_carso.classifier(x)]
    with bf16():
        reduced = [*tiny_carso.answers(x, z), tiny_carso(x, z), tiny_carso.classifier(x)]
    for a, b in zip(exact, reduced):
        assert b.dtype == torch.float32 and 0 < (a - b).abs().mean() < 0.05 * a.abs().mean()


def test_white_stays_below_one_in_bf16(tiny_carso):
    """bfloat16 has nothing between 0.996 and 1, and the BCE of a pixel that is exactly 1 is off by a factor."""
    x, decoder = torch.rand(3, 1, 32, 32), tiny_carso.purifier.decoder
    nn.init.zeros_(decoder[-2].weight)
    nn.init.constant_(decoder[-2].bias, 7.0)
    with bf16():
        white = tiny_carso.purify(x, tiny_carso.draw(x, 2))
    assert_close(white, torch.full(white.shape, 0.999089), atol=2e-6, rtol=0)  # a float32, too


# ----------------------------------------------------------------------------------------- around any other network


class SmallCNN(nn.Module):
    """Neither a WideResNet, nor does it say how its data are normalised."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 8), (8, 16), (16, 16)))
        self.tokens, self.last = nn.Flatten(2), nn.Linear(16, 7)

    def forward(self, x):
        first = self.first(x).relu()
        self.tokens(first)
        return self.last(self.third(self.second(first).relu()).relu().mean((2, 3)))


def test_any_network_is_defended():
    network, layers, half = SmallCNN().train(), ["first", "second"], dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    for given, normalisation, sentence in (
        (layers, {}, "pass mean= and std="),
        (layers, dict(mean=(0.5,) * 3, std=(0.5,)), "need one number for each of the pictures' 3 channel"),
        ("first", half, "layers must be a list .* not 'first'"),
        (["first", "last"], half, r"layer 1 of the representation is \(7,\)"),
        (["first", "tokens"], half, r"layer 1 of the representation is \(8, 1024\); .* need maps \(c, h, w\)"),
        (["first", "third"], half, r"layer 1 .* is \(16, 8, 8\); .* 4 convolutions need .* tap an earlier layer"),
        (["first", "fourth"], half, "no layer named fourth"),
    ):
        with pytest.raises(ValueError, match=sentence):
            build_carso(network, given, (3, 64, 64), 3, **SIZES, **normalisation)
    with pytest.raises(ValueError, match="32x32 or 64x64"):
        build_carso(network, ["first"], (3, 48, 48), 3, **SIZES, **half)
    grey = nn.Sequential(nn.Conv2d(1, 3, 1), network)
    with pytest.raises(ValueError, match="need one number for each of the pictures' 1 channel"):
        build_carso(grey, ["1.first"], (1, 64, 64), 3, **SIZES, **half)
    carso = build_carso(network, layers, (3, 64, 64), 3, **SIZES, **half)
    assert carso.purifier.config["representation_shapes"] == [(8, 32, 32), (16, 16, 16)]
    x = torch.rand(4, 3, 64, 64, requires_grad=True)
    reconstruction, mu, logvar = carso.train().purifier(x, record(carso.classifier, layers, x)[1])
    vae_loss(reconstruction, x.detach(), mu, logvar, beta=1.0)[0].backward()
    assert all(p.grad.isfinite().all() for p in carso.purifier.parameters())
    logits = carso.eval()(x)
    assert logits.shape == (4, 7) and carso.purify(x).shape == (4, 3, 3, 64, 64)
    assert torch.autograd.grad(logits.logsumexp(1).sum(), x)[0].abs().sum() > 0


# --------------------------------------------------------------------------------------------------------- the files


def test_one_file_restores_the_defence(tiny_carso, tmp_path):
    path = tmp_path / "folder" / "carso.pt"
    save_carso(path, tiny_carso, dataset="digits", epoch=3)
    restored, state = load_carso(path)
    assert state == {"dataset": "digits", "epoch": 3} and is_carso(path)
    for name in ("samples", "layers"):
        assert getattr(restored, name) == getattr(tiny_carso, name)
    x, z = torch.rand(2, 1, 32, 32), torch.randn(2, 3, 4)
    assert torch.equal(restored(x, z), tiny_carso(x, z))
    assert hash_weights(restored) == hash_weights(tiny_carso) and not restored.training
    assert [p.name for p in path.parent.iterdir()] == ["carso.pt"]  # no temporary left


def test_a_write_that_fails_leaves_the_old_file_whole(tiny_carso, tmp_path, monkeypatch):
    def full(content, file):
        Path(file).write_bytes(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")

    path = tmp_path / "carso.pt"
    save_carso(path, tiny_carso, epoch=1)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_carso(path, tiny_carso, epoch=lambda: "not plain")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=f"{path} could not be written .*is the disk full"):
        save_carso(path, tiny_carso, epoch=2)
    assert load_carso(path)[1] == {"epoch": 1}


def test_other_files_are_refused_by_one_sentence(tiny_carso, tmp_path):
    def changed(change) -> bytes:
        content, buffer = torch.load(io.BytesIO(whole), weights_only=True), io.BytesIO()
        change(content)
        torch.save(content, buffer)
        return buffer.getvalue()

    path = tmp_path / "carso.pt"
    save_carso(path, tiny_carso)
    whole, unfit = path.read_bytes(), f"the weights in {path} "
    for content, sentence in (
        (b"<!DOCTYPE html><html>", f"{path} is a web page"),
        (b"nonsense", f"{path} .*is it whole"),
        (whole[:-100], f"{path} .*is it whole"),
        (changed(lambda c: c.pop("purifier_weights")), f"{path} is not a CARSO"),
        (changed(lambda c: c.pop("kind")), f"{path} is not a CARSO"),
        (changed(lambda c: c["classifier_weights"].popitem()), unfit + "do not fit.*Missing"),
        (changed(lambda c: c.update(classifier_weights=[1])), unfit + "do not fit"),
        (changed(lambda c: c["purifier_weights"].update({"to_mu.bias": "text"})), unfit + "do not fit.*to_mu.bias"),
        (changed(lambda c: c["purifier_weights"]["to_mu.bias"].fill_(torch.inf)), unfit + "are not finite: to_mu.bias"),
        (
            changed(lambda c: c.update(kind="Other")),
            f"{path} holds an Other, which is evaluated by python -m lab.evalu",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=sentence) as error:
            load_carso(path)
        assert "\n" not in str(error.value)
    torch.save(tiny_carso.classifier.state_dict(), path)
    assert not is_carso(path)
    with pytest.raises(ValueError, match=f"there is no file {path}x"):
        load_carso(f"{path}x")


def test_a_compiled_classifier_is_kept_as_a_plain_one(tiny_carso, tmp_path):
    x, z = torch.rand(2, 1, 32, 32), torch.randn(2, 3, 4)
    plain = tiny_carso(x, z)
    tiny_carso.classifier.layer[0] = nn.ModuleDict({"_orig_mod": tiny_carso.classifier.layer[0]})  # torch.compile's way
    save_carso(tmp_path / "carso.pt", tiny_carso)
    assert torch.equal(load_carso(tmp_path / "carso.pt")[0](x, z), plain)


@pytest.mark.parametrize("place", ["classifier", "final"])
def test_another_classifier_than_one_wideresnet_is_not_kept(tiny_carso, tmp_path, place):
    other = nn.Flatten()
    other.config = {"depth": 10}
    setattr(tiny_carso, place, other)
    with pytest.raises(ValueError, match=f"{tmp_path / 'carso.pt'}: only a CARSO around one WideResNet"):
        save_carso(tmp_path / "carso.pt", tiny_carso)
    assert not list(tmp_path.iterdir())
