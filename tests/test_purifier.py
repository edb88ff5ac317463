"""The conditional VAE against the reference, and CARSO's promises."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import TESTS, golden, picture, reference_name, uniform
from torch import nn
from torch.testing import assert_close

from models import WideResNet, hash_weights, record, representation_layers
from purifier import CARSO, build_carso, is_carso, load_carso, save_carso, statistics_kept, vae_loss

SIZES = dict(condition_dim=16, latent_dim=4, decoder_width=16)

# ------------------------------------------------------------------------------------------ the paper's, and the VAE


def test_the_papers_largest_purifier_has_its_number_of_parameters():
    """Scenario a, without memory."""
    with torch.device("meta"):
        carso = build_carso(WideResNet(200), representation_layers(28), (3, 64, 64), condition_dim=768, latent_dim=192)
    assert sum(p.numel() for p in carso.purifier.parameters()) == 324_508_537
    assert carso.purifier.condition_head[0].in_features == 377_600


def test_tensors_have_the_reference_shapes():
    reference = json.loads((TESTS / "keys_wrn28_10_cifar.json").read_text())
    del reference["classifier"]
    expected = {f"{part}/{key}": shape for part, shapes in reference.items() for key, shape in shapes.items()}
    with torch.device("meta"):
        carso = build_carso(WideResNet(10), representation_layers(28), (3, 32, 32))
    assert {reference_name(key): list(v.shape) for key, v in carso.purifier.state_dict().items()} == expected


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


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (dict(samples=-1), "samples, the reconstructions a picture, are 0 or more, not -1"),
        (dict(layers=["a"]), "1 layers for a purifier of 8 layers"),
    ],
)
def test_arguments_that_make_no_defence_are_refused(tiny_carso, wrong, sentence):
    arguments = dict(layers=tiny_carso.layers) | wrong
    with pytest.raises(ValueError, match=sentence):
        CARSO(tiny_carso.classifier, tiny_carso.purifier, **arguments)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_pictures_are_contiguous(reference_carso, memory_format):
    """AutoAttack calls view() on them; the layers inside are channels-last."""
    x = picture("x", (2, 3, 32, 32)).to(memory_format=memory_format).requires_grad_()
    assert torch.autograd.grad(reference_carso(x).sum(), x)[0].is_contiguous()


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


KNOWN = dict(mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize(
    "layers, side, normalisation, sentence",
    [
        (["first"], 64, {}, "pass mean= and std="),
        (["first"], 64, KNOWN | dict(std=(0.5,)), "need one number for each of the pictures' 3 channel"),
        (["first"], 48, KNOWN, "32x32 or 64x64, not 48x48"),
        (["first", "last"], 64, KNOWN, r"layer 1 of the representation is \(7,\)"),
        (["tokens"], 64, KNOWN, r"layer 0 of the representation is \(8, 1024\); .* need maps \(c, h, w\)"),
        (["third"], 64, KNOWN, r"layer 0 .* is \(16, 8, 8\); .* 4 convolutions need .* tap an earlier layer"),
    ],
)
def test_what_does_not_fit_another_network_is_refused(layers, side, normalisation, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_carso(SmallCNN(), layers, (3, side, side), **SIZES, **normalisation)


def test_any_network_is_defended():
    layers = ["first", "second"]
    carso = build_carso(SmallCNN(), layers, (3, 64, 64), 3, **SIZES, **KNOWN).train()
    x = torch.rand(4, 3, 64, 64, requires_grad=True)
    reconstruction, mu, logvar = carso.purifier(x, record(carso.classifier, layers, x)[1])
    vae_loss(reconstruction, x.detach(), mu, logvar, beta=1.0)[0].backward()
    assert all(p.grad.isfinite().all() for p in carso.purifier.parameters())
    logits = carso.eval()(x)
    assert logits.shape == (4, 7) and carso.purify(x).shape == (4, 3, 3, 64, 64)
    assert torch.autograd.grad(logits.logsumexp(1).sum(), x)[0].any()


def test_building_leaves_the_statistics_of_a_network_in_training_alone():
    network = WideResNet(5, 10, 1).train()
    before = hash_weights(network)
    build_carso(network, representation_layers(10), (3, 32, 32), **SIZES)
    assert hash_weights(network) == before


# --------------------------------------------------------------------------------------------------------- the files


def test_one_file_restores_the_defence(tiny_carso, tmp_path):
    path = tmp_path / "folder" / "carso.pt"
    save_carso(path, tiny_carso, dataset="digits", epoch=3)
    restored, state = load_carso(path)
    assert state == {"dataset": "digits", "epoch": 3} and is_carso(path)
    assert (restored.samples, restored.layers) == (tiny_carso.samples, tiny_carso.layers)
    x, z = torch.rand(2, 1, 32, 32), torch.randn(2, 3, 4)
    assert torch.equal(restored(x, z), tiny_carso(x, z))
    assert hash_weights(restored) == hash_weights(tiny_carso) and not restored.training
    torch.save(tiny_carso.classifier.state_dict(), path)
    assert not is_carso(path)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda c: c.pop("purifier_weights"), "{path} is not a CARSO"),
        (lambda c: c.pop("kind"), "{path} is not a CARSO"),
        (lambda c: c.update(kind="Other"), "{path} holds an Other, which is evaluated by python -m lab.evaluate"),
        (lambda c: c["classifier_weights"].popitem(), "weights in {path} do not fit.*Missing"),
        (lambda c: c.update(classifier_weights=[1]), "weights in {path} do not fit"),
        (lambda c: c["purifier_weights"].update({"to_mu.bias": "text"}), "weights in {path} do not fit.*to_mu.bias"),
        (lambda c: c["purifier_weights"]["to_mu.bias"].fill_(torch.inf), "in {path} are not finite: to_mu.bias"),
    ],
)
def test_other_files_are_refused_by_one_sentence(tiny_carso, tmp_path, change, sentence):
    path = tmp_path / "carso.pt"
    save_carso(path, tiny_carso)
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(ValueError, match=sentence.format(path=path)) as error:
        load_carso(path)
    assert "\n" not in str(error.value)


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
