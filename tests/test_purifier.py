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
from safetensors.torch import save_file
from torch.testing import assert_close

from lab.checkpoints import PUBLISHED_PARTS, load_checkpoint, load_published, save_checkpoint
from models import WideResNet, record, representation_layers
from purifier import CARSO, Purifier, build_carso, vae_loss

SIZES = dict(condition_dim=16, latent_dim=4, decoder_width=16)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def full_size(num_classes, side, condition_dim, latent_dim) -> Purifier:
    """The paper's purifier on WRN-28-10, without memory."""
    with torch.device("meta"):
        classifier = WideResNet(num_classes)
        sizes = dict(condition_dim=condition_dim, latent_dim=latent_dim)
        return build_carso(classifier, representation_layers(28), (3, side, side), **sizes).purifier


def test_parameter_counts_of_scenario_a():
    p = full_size(10, 32, 512, 128)
    assert parameters(p) == 106_381_537
    assert parameters(p.image_encoder) == 846
    assert parameters(p.layer_encoders) == 28_442_960
    assert parameters(p.condition_head) == 75_285_504
    assert parameters(p.joint_head) == 164_096
    assert parameters(p.to_mu) + parameters(p.to_logvar) == 33_024
    assert parameters(p.decoder) == 2_455_107


def test_parameter_counts_of_scenario_c():
    p = full_size(200, 64, 768, 192)
    assert parameters(p) == 324_508_537
    assert p.condition_head[0].in_features == 377_600


@pytest.mark.parametrize("file", ["wrn28_10", "wrn10_2"])
def test_tensors_have_the_reference_shapes(file):
    reference = json.loads((TESTS / f"keys_{file}_cifar.json").read_text())
    expected = {f"{part}/{key}": s for part in reference if part != "classifier" for key, s in reference[part].items()}
    depth, width = (28, 10) if file == "wrn28_10" else (10, 2)
    with torch.device("meta"):
        carso = build_carso(
            WideResNet(10, depth, width), representation_layers(depth), (3, 32, 32), condition_dim=512, latent_dim=128
        )
    assert {reference_name(k): list(v.shape) for k, v in carso.purifier.state_dict().items()} == expected


def test_training_forward_loss_and_gradients_equal_the_reference(reference_carso):
    want = golden("purifier")
    x, clean = picture("x", (8, 3, 32, 32)), picture("clean", (8, 3, 32, 32))
    noise = torch.from_numpy((2 * uniform("eps_train", (8, 128)) - 1).astype(np.float32))
    purifier = copy.deepcopy(reference_carso.purifier).train()
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


# --------------------------------------------------------------------------------------------------- CARSO's promises


def test_64_pixels():
    carso = build_carso(WideResNet(20, 10, 1), representation_layers(10), (3, 64, 64), 2, **SIZES)
    x = torch.rand(2, 3, 64, 64)
    assert carso.purify(x).shape == (2, 2, 3, 64, 64)
    assert carso(x).shape == (2, 20)
    with pytest.raises(ValueError, match="32x32 or 64x64"):
        build_carso(WideResNet(20, 10, 1), representation_layers(10), (3, 48, 48), 2, **SIZES)


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


def test_checkpoint_restores_the_defence_from_one_file(tiny_carso, tmp_path):
    tiny_carso.purifier.train()(
        torch.rand(4, 1, 32, 32), record(tiny_carso.classifier, tiny_carso.layers, torch.rand(4, 1, 32, 32))[1]
    )
    tiny_carso.eval()
    path = tmp_path / "folder" / "carso.pt"
    save_checkpoint(path, tiny_carso, dataset="digits", epoch=3)
    restored, state = load_checkpoint(path)
    assert state == {"dataset": "digits", "epoch": 3}
    assert restored.samples == tiny_carso.samples and restored.layers == tiny_carso.layers
    x, z = torch.rand(2, 1, 32, 32), torch.randn(2, 3, 4)
    assert torch.equal(restored(x, z), tiny_carso(x, z))
    assert [p.name for p in path.parent.iterdir()] == ["carso.pt"]  # no temporary left


def test_a_failed_save_keeps_the_previous_checkpoint(tiny_carso, tmp_path):
    path = tmp_path / "carso.pt"
    save_checkpoint(path, tiny_carso, epoch=1)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, tiny_carso, epoch=lambda: "not plain")
    assert load_checkpoint(path)[1] == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["carso.pt"]


def test_a_full_disk_keeps_the_previous_checkpoint(tiny_carso, tmp_path, monkeypatch):
    path = tmp_path / "carso.pt"
    save_checkpoint(path, tiny_carso, epoch=1)

    def full(content, file):
        Path(file).write_bytes(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="is the disk full"):
        save_checkpoint(path, tiny_carso, epoch=2)
    assert load_checkpoint(path)[1] == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["carso.pt"]


@pytest.mark.parametrize(
    "content, sentence",
    [(b"<!DOCTYPE html><html>", "web page"), (b"nonsense", "not a checkpoint"), (None, "no file")],
)
def test_files_that_are_no_checkpoint(tmp_path, content, sentence):
    path = tmp_path / "carso.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(path)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a CARSO checkpoint"):
        load_checkpoint(tmp_path / "other.pt")


def test_a_checkpoint_with_strange_parts_is_named(tiny_carso, tmp_path):
    path = tmp_path / "carso.pt"
    save_checkpoint(path, tiny_carso)
    whole = path.read_bytes()
    for change in (
        lambda c: c.pop("state"), lambda c: c.pop("classifier"), lambda c: c.pop("purifier_weights"),
        lambda c: c.update(classifier={"depth": 11}), lambda c: c.update(purifier={"nonsense": 1}),
        lambda c: c.update(samples=-1), lambda c: c.update(layers=["a"]), lambda c: c.update(own_answer="much"),
        lambda c: c["classifier_weights"].popitem(), lambda c: c.update(classifier_weights=[1]),
        lambda c: c["purifier_weights"].update({"to_mu.bias": "text"}),
    ):  # fmt: skip
        content = torch.load(io.BytesIO(whole), weights_only=True)
        change(content)
        torch.save(content, path)
        with pytest.raises(ValueError, match="carso.pt"):
            load_checkpoint(path)
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="carso.pt is damaged"):
        load_checkpoint(path)


def test_a_compiled_classifier_is_kept_as_a_plain_one(tiny_carso, tmp_path):
    x, z = torch.rand(2, 1, 32, 32), torch.randn(2, 3, 4)
    plain = tiny_carso(x, z)
    tiny_carso.classifier.layer[0] = torch.compile(tiny_carso.classifier.layer[0])
    save_checkpoint(tmp_path / "carso.pt", tiny_carso)
    assert torch.equal(load_checkpoint(tmp_path / "carso.pt")[0](x, z), plain)


def test_another_classifier_than_a_wideresnet_is_not_kept(tiny_carso, tmp_path):
    tiny_carso.classifier = torch.nn.Flatten()
    with pytest.raises(ValueError, match="only a CARSO around a WideResNet"):
        save_checkpoint(tmp_path / "carso.pt", tiny_carso)
    assert not list(tmp_path.iterdir())


def published_folder(path, carso):
    """The authors' four files, made from ours."""
    path.mkdir()
    parts = {"classifier": {k: v.contiguous() for k, v in carso.classifier.state_dict().items()}}
    for key, tensor in carso.purifier.state_dict().items():
        part, name = reference_name(key).split("/")
        parts.setdefault(part, {})[name] = tensor.contiguous()
    save_file(parts["classifier"], path / "cifar10_a3_b10_t4_20m_w.safetensors")
    for part in PUBLISHED_PARTS:
        save_file(parts[part], path / f"wrn_28_10_cifar_10_cui_2023_{part}.safetensors")
    return path


def test_the_authors_files_make_their_defence(tmp_path, reference_carso):
    folder = published_folder(tmp_path / "small", reference_carso)
    loaded = load_published(folder, 10, (3, 32, 32))
    x, z = picture("x", (2, 3, 32, 32)), torch.randn(2, 8, 128)
    assert_close(loaded(x, z), reference_carso(x, z), rtol=0, atol=0)
    (folder / "wrn_28_10_cifar_10_cui_2023_decoder.safetensors").write_text("<html>")
    with pytest.raises(ValueError, match="web page"):
        load_published(folder, 10, (3, 32, 32))
    (folder / "wrn_28_10_cifar_10_cui_2023_decoder.safetensors").unlink()
    with pytest.raises(ValueError, match="exactly one .safetensors file of decoder, not 0"):
        load_published(folder, 10, (3, 32, 32))


def test_the_authors_files_at_full_size(tmp_path):
    sizes = dict(condition_dim=512, latent_dim=128)
    carso = build_carso(WideResNet(10), representation_layers(28), (3, 32, 32), samples=2, **sizes)
    loaded = load_published(published_folder(tmp_path / "full", carso), 10, (3, 32, 32))
    assert parameters(loaded.purifier) == 106_381_537
    x, z = torch.rand(1, 3, 32, 32), torch.randn(1, 2, 128)
    with torch.no_grad():
        assert_close(loaded(x, z), carso(x, z), rtol=0, atol=0)


def test_recomputing_counts_a_batch_once(tiny_carso):
    """The same gradients, and the same running statistics, although the layers' encoders run twice."""
    ways = []
    for recompute in (False, True):
        purifier = copy.deepcopy(tiny_carso.purifier).train()
        purifier.recompute, x = recompute, torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            representation = record(tiny_carso.classifier, tiny_carso.layers, x)[1]
        reconstruction, mu, logvar = purifier(x, representation, torch.zeros(6, 4))
        vae_loss(reconstruction, x, mu, logvar, 1.0)[0].backward()
        ways.append([*purifier.state_dict().values(), *(p.grad for p in purifier.parameters())])
    for plain, again in zip(*ways, strict=True):
        assert_close(plain, again)
