"""What the authors have beside the paper's main line: their released defence, two classifiers, z = 0, and two more
aggregations."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TESTS, formula_tensor, picture
from safetensors.torch import save_file
from torch.testing import assert_close

from aggregate import robust_logits
from models import CIFAR10_MEAN, CIFAR10_STD, PUBLISHED, WideResNet, hash_weights
from purifier import CARSO, PUBLISHED_PARTS, PUBLISHED_PREFIX, fetch_published, load_carso, load_published, save_carso

# --------------------------------------------------------------------------------------------- the released defence


def authors_files(folder, file: str, tensor) -> Path:
    """The authors' four files, under their names and with their shapes; tensor(name, shape) is each one's content."""
    folder.mkdir()
    for part, shapes in json.loads((TESTS / f"keys_{file}_cifar.json").read_text()).items():
        if part in ("classifier", *PUBLISHED_PARTS):
            name = "cifar10_a3_b10_t4_20m_w" if part == "classifier" else PUBLISHED_PREFIX["cifar10"] + part
            content = {key: tensor(f"{part}/{key}", shape) for key, shape in shapes.items()}
            save_file(content, folder / f"{name}.safetensors")
    return folder


def load(folder) -> CARSO:
    return load_published(folder, 10, (3, 32, 32), CIFAR10_MEAN, CIFAR10_STD)


def test_the_authors_files_make_their_defence(tmp_path, reference_carso):
    loaded = load(authors_files(tmp_path / "small", "wrn10_2", formula_tensor))
    x, z = picture("x", (2, 3, 32, 32)), torch.randn(2, 8, 128)
    assert_close(loaded(x, z), reference_carso(x, z), rtol=0, atol=0)
    assert loaded.samples == 8 and loaded.layers == reference_carso.layers and not loaded.training


def test_other_files_than_the_authors_are_named(tmp_path):
    folder = authors_files(tmp_path / "small", "wrn10_2", formula_tensor)
    decoder = folder / "wrn_28_10_cifar_10_cui_2023_decoder.safetensors"

    def check(sentence):
        with pytest.raises(ValueError, match=sentence):
            load(folder)

    shutil.copy(decoder, folder / "another_decoder.safetensors")
    check(f"{folder} should hold one .safetensors file of the decoder, not 2")
    (folder / "another_decoder.safetensors").unlink()
    save_file({"0.1.weight": torch.zeros(2, 640)}, decoder)
    check(f"{folder} is not the authors' purifier: there is no tensor '1.0.weight'")
    save_file({"0.1.weight": torch.zeros(2, 640), "1.0.weight": torch.zeros(256)}, decoder)
    check(f"the weights in {decoder} do not fit")


def test_the_authors_files_are_fetched_from_their_places(tmp_path, monkeypatch, reference_carso):
    assert PUBLISHED_PREFIX.keys() == PUBLISHED.keys()
    host = authors_files(tmp_path / "host", "wrn10_2", formula_tensor)
    for known in PUBLISHED.values():
        (authors, accuracy), *_ = known.values()
        assert authors.startswith("https://bucket.ballarin.cc/aimldl/carso2024cnn/")
        monkeypatch.setitem(known, next(iter(known)), ((host / authors.rpartition("/")[2]).as_uri(), accuracy))
    folder = fetch_published("cifar10", tmp_path / "data")
    assert folder == tmp_path / "data" / "published" / "carso-cifar10"
    assert hash_weights(load(folder).purifier.decoder) == hash_weights(reference_carso.purifier.decoder)
    shutil.rmtree(host)
    assert fetch_published("cifar10", tmp_path / "data") == folder  # they are there


# ------------------------------------------------------------------------------------- two classifiers, and z = 0


def test_one_classifier_is_looked_into_and_another_labels(tiny_carso):
    final = WideResNet(5, 10, 2, in_channels=1)  # of another size, so that one cannot stand for the other
    both = CARSO(tiny_carso.classifier, tiny_carso.purifier, tiny_carso.layers, 3, final=final)
    x, z = torch.rand(2, 1, 32, 32), torch.randn(2, 3, 4)
    assert_close(both.purify(x, z), tiny_carso.purify(x, z))
    members = final(both.purify(x, z).flatten(0, 1)).unflatten(0, (2, 3))
    assert_close(both.member_logits(x, z), members)
    assert_close(both(x, z), robust_logits(members))
    assert both.labeller is final and tiny_carso.labeller is tiny_carso.classifier
    assert not any(p.requires_grad for p in final.parameters())
    assert not any(m.training for network in (both.train().final, both.classifier) for m in network.modules())


def test_no_draw_is_the_reconstruction_of_z_zero(tiny_carso, tmp_path):
    still = CARSO(tiny_carso.classifier, tiny_carso.purifier, tiny_carso.layers, samples=0)
    x, z = torch.rand(3, 1, 32, 32), torch.zeros(3, 1, 4)
    assert_close(still(x), tiny_carso(x, z), rtol=0, atol=0)
    assert_close(still.purify(x), tiny_carso.purify(x, z), rtol=0, atol=0)
    assert torch.equal(still(x), still(x))
    save_carso(tmp_path / "still.pt", still)
    assert torch.equal(load_carso(tmp_path / "still.pt")[0](x), still(x))
