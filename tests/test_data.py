"""Every source on small fixtures in its official format, what it refuses, and the functions that write files."""

import ast
import errno
import functools
import hashlib
import http.client
import http.server
import io
import os
import pickle
import random
import shutil
import sys
import tarfile
import threading
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data

ROOT = Path(data.__file__).parent


def splits(dataset: data.Dataset):
    return (dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)


def check(dataset: data.Dataset, n, classes, shape):
    """What every data set promises; n training pictures of this shape."""
    for images, labels in splits(dataset):
        assert images.shape == (len(labels), *shape) and images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert all(0 <= label < classes for label in labels.unique())
    assert len(dataset.train_labels) == n and len(dataset.classes) == classes and len(dataset.test_labels) > 0
    assert sorted(dataset.test_numbers.tolist()) == list(range(len(dataset.test_labels)))
    assert len(dataset.mean) == len(dataset.std) == shape[0] and min(dataset.std) > 0


def test_it_needs_no_other_package():
    nodes = list(ast.walk(ast.parse((ROOT / "data.py").read_text())))
    names = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert names - set(sys.stdlib_module_names) == {"numpy", "torch", "torchvision", "PIL", "models"}


# ---------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("count, batch_size", [(1297, 64), (100, 128), (50_000, 5120), (10, 3)])
def test_batches_cover_every_picture_once(count, batch_size):
    epoch = data.batches(count, batch_size, seed=1, epoch=2)
    assert torch.equal(torch.cat(epoch).sort().values, torch.arange(count))
    sizes = [len(batch) for batch in epoch]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1


def test_a_shuffle_follows_from_seed_and_epoch():
    first = data.batches(100, 10, seed=1, epoch=2)
    assert all(torch.equal(a, b) for a, b in zip(first, data.batches(100, 10, seed=1, epoch=2)))
    assert not torch.equal(first[0], data.batches(100, 10, seed=1, epoch=3)[0])
    assert not torch.equal(first[0], data.batches(100, 10, seed=2, epoch=2)[0])
    assert len(torch.cat(data.batches(6, 4, seed=10**14, epoch=5)).unique()) == 6  # no seed is too large
    assert [batch.tolist() for batch in data.batches(6, 4, seed=3, epoch=5)] == [[4, 2, 1], [3, 0, 5]]  # for good


@pytest.mark.parametrize("mirrored", [True, False])
def test_augment_equals_slicing(mirrored):
    x = torch.rand(50, 3, 32, 32)
    draws = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    ours = data.augment(x, draws, mirrored)
    padded = torch.nn.functional.pad(x, [4] * 4)
    for i, (a, b, mirror) in enumerate(draws.tolist()):
        top, left = int(a * 9), int(b * 9)
        crop = padded[i, :, top : top + 32, left : left + 32]
        assert torch.equal(ours[i], crop.flip(2) if mirrored and mirror >= 0.5 else crop)


def test_a_fingerprint_is_of_pictures_labels_and_names():
    images, labels, classes = torch.arange(64, dtype=torch.uint8).view(4, 1, 4, 4), torch.arange(4), list("abcd")
    same = data.fingerprint(images, labels, classes)
    assert same == data.fingerprint(images.clone(), labels.clone(), tuple(classes)) and len(same) == 32
    others = (images + 1, labels, classes), (images, labels.flip(0), classes), (images, labels, list("abce"))
    assert len({same, data.fingerprint(images.flip(2), labels, classes), *(data.fingerprint(*o) for o in others)}) == 5


# ------------------------------------------------------------------------------------------------- digits and arrays


def test_digits_are_embedded_and_never_change():
    digits = data.load("digits")
    check(digits, 1297, 10, (1, 32, 32))
    assert data.fingerprint(digits.train_images, digits.train_labels, digits.classes) == DIGITS[0]
    assert data.fingerprint(digits.test_images, digits.test_labels, digits.classes) == DIGITS[1]
    assert (digits.mean, digits.std, digits.notes) == ((0.3054,), (0.3758,), [])
    assert torch.equal(digits.test_numbers, torch.arange(500))
    both = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797  # no picture is in both splits
    values = data.pixels(digits.train_images)
    assert digits.mean[0] == pytest.approx(values.mean().item(), abs=1e-4)
    assert digits.std[0] == pytest.approx(values.std().item(), abs=1e-4)


DIGITS = "d97d7016da63ebba9dec799d9beee8a5", "953eb4dcb72eed81e181be51874a5ace"


def arrays(n=12, side=32, channels=3, classes=3):
    """In MedMNIST's form: n training pictures and six for the test, all of them different."""
    shape = (n + 6, side, side, channels) if channels else (n + 6, side, side)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(n)[:, None] % classes
    return {"train_images": images[:n], "train_labels": labels, "test_images": images[n:], "test_labels": labels[:6]}


def save(path, **changes):
    """These arrays, some of them changed, or left out (None)."""
    np.savez(path, **{key: value for key, value in (arrays() | changes).items() if value is not None})
    return path


def test_npz_with_medmnist_keys(tmp_path):
    dataset = data.load(save(tmp_path / "a.npz"))
    check(dataset, 12, 3, (3, 32, 32))
    expected = arrays()["train_images"].transpose(0, 3, 1, 2)
    assert np.array_equal(dataset.train_images.numpy(), expected) and not dataset.notes
    assert dataset.name == str(tmp_path / "a.npz") and dataset.train_labels[:4].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("side, size", [(28, 32), (48, 32), (49, 64), (96, 64)])
def test_npz_grey_resized_and_with_val_for_test(tmp_path, side, size):
    small = arrays(side=side, channels=0)
    small["val_images"], small["val_labels"] = small.pop("test_images"), small.pop("test_labels")
    np.savez(tmp_path / "b.npz", **small)
    dataset = data.load(tmp_path / "b.npz")
    check(dataset, 12, 3, (1, size, size))
    note = f"{tmp_path}/b.npz: train_images are resized from {side}x{side} to {size}x{size}"
    assert dataset.notes == [note, note.replace("train", "test")]
    assert dataset.train_images.float().mean() == pytest.approx(small["train_images"].mean(), rel=0.01)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_become_the_same_bytes(tmp_path, dtype):
    floats = {key: (value / 255).astype(dtype) for key, value in arrays().items() if "images" in key}
    dataset, same = data.load(save(tmp_path / "f.npz", **floats)), data.load(save(tmp_path / "u.npz"))
    assert torch.equal(dataset.train_images, same.train_images)


LABELS = {
    "from 1 on": (lambda k: k + 1, ["1", "2", "3"]),
    "with gaps": (lambda k: 5 * k + 2, ["2", "7", "12"]),
    "uint64": (lambda k: k.astype(np.uint64), ["0", "1", "2"]),
    "names": (lambda k: np.array(["cat", "dog", "emu"])[k], ["cat", "dog", "emu"]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_all_kinds_become_the_classes_that_exist(tmp_path, kind):
    change, names = LABELS[kind]
    labels = {key: change(value) for key, value in arrays().items() if "labels" in key}
    dataset = data.load(save(tmp_path / "labels.npz", **labels))
    assert dataset.classes == names and dataset.train_labels.tolist() == arrays()["train_labels"].ravel().tolist()
    assert dataset.test_labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"train_labels": None}, "bad.npz is not .*train_labels"),
        ({"test_images": None, "test_labels": None}, "bad.npz is not .*val_images"),
        ({"train_images": arrays()["train_images"] / 255.0 * 4 - 2}, "train_images .*outside \\[0, 1\\]"),
        ({"test_images": np.full((6, 32, 32, 3), np.nan)}, "test_images .*outside \\[0, 1\\]"),
        ({"train_images": arrays()["train_images"].astype(np.int64)}, "not int64"),
        ({"train_images": arrays()["train_images"] > 9}, "not bool"),
        ({"train_images": arrays()["train_images"].astype(complex)}, "not complex128"),
        ({"train_images": np.float32(3)}, "shape"),
        ({"train_images": arrays()["train_images"][..., :2]}, "shape"),
        ({"train_images": arrays()["train_images"].transpose(0, 3, 1, 2)}, "shape .*\\(12, 3, 32, 32\\)"),
        ({"train_images": arrays()["train_images"][:, :8]}, "8x32 .*square"),
        ({"train_images": arrays(side=7)["train_images"]}, "7x7"),
        ({"train_images": np.zeros((0, 32, 32, 3), np.uint8), "train_labels": np.zeros(0, int)}, "\\(0, 32, 32, 3\\)"),
        ({"train_labels": np.eye(12, dtype=int)}, "one class a picture"),
        ({"train_labels": np.arange(5)}, "12 train pictures but 5 labels"),
        ({"train_labels": np.full(12, -1)}, "whole numbers from 0 on"),
        ({"train_labels": np.full(12, 0.5)}, "whole numbers .*float64"),
        ({"train_labels": np.zeros(12, "M8[s]")}, "whole numbers .*datetime64"),
        ({"test_images": arrays(side=64)["test_images"]}, "differ in size"),
        ({"test_images": arrays(channels=0)["test_images"]}, "number of channels"),
        ({"train_labels": np.zeros(12, int), "test_labels": np.zeros(6, int)}, "one class only"),
        ({"test_labels": np.full(6, 7)}, "test_labels have classes that were not trained on, 7"),
        ({"test_labels": np.array(list("abcabc"))}, "not trained on, a, b, c"),
        ({"train_labels": np.array(list("abcabcabcabc"))}, "not trained on, 0, 1, 2"),  # which of them is class 0?
        ({"train_labels": None, "train_images": None}, "no training pictures"),
        ({"test_labels": np.array([{}] * 6)}, "bad.npz is not a whole .npz of plain arrays"),
    ],
)
def test_npz_that_makes_no_sense(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        data.load(save(tmp_path / "bad.npz", **changes))
    assert "bad.npz" in str(refused.value)


def test_npz_that_is_none(tmp_path):
    (tmp_path / "text.npz").write_text("<html>")
    with open(tmp_path / "one.npz", "wb") as file:
        np.save(file, np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(save(tmp_path / "whole.npz").read_bytes()[:5000])
    for name in ("text.npz", "one.npz", "cut.npz"):
        with pytest.raises(ValueError, match=f"{name} is not a whole .npz of plain arrays"):
            data.load(tmp_path / name)
    objects = np.array(["a", {"b": 1}], dtype=object)
    assert len(data.load(save(tmp_path / "more.npz", class_names=objects)).train_labels) == 12  # beside what is needed


ANIMALS = ["cat", "dog", "emu"]


@pytest.mark.parametrize(
    "labels, classes, expected",
    [
        (np.array([[2], [1], [2], [0], [1], [1]], np.uint8), ANIMALS, [2, 1, 2, 0, 1, 1]),
        (np.array(["emu", "dog", "emu", "cat", "dog", "dog"]), ANIMALS, [2, 1, 2, 0, 1, 1]),
        (np.array([3, 2, 3, 1, 2, 2]), ["1", "2", "3"], [2, 1, 2, 0, 1, 1]),  # names, though they are numbers
        (np.array([1, 0, 1, 0, 1, 0]), ["1", "2", "3"], "not trained on, 0"),
        (np.array([1, 0, 3, 0, 1, 0]), ANIMALS, "not trained on, 3"),
        (np.array(["cat", "cow", "cat", "cat", "cat", "cat"]), ANIMALS, "not trained on, cow"),
    ],
)
def test_test_pictures_alone_for_a_checkpoint_with_these_classes(tmp_path, labels, classes, expected):
    path = save(tmp_path / "c.npz", train_images=None, train_labels=None, test_labels=labels)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            data.load(path, classes=classes)
        return
    dataset = data.load(path, classes=classes)
    check(dataset, 0, 3, (3, 32, 32))
    assert dataset.test_labels.tolist() == expected and dataset.classes == classes
    assert np.array_equal(dataset.test_images.numpy(), arrays()["test_images"].transpose(0, 3, 1, 2))


def test_training_pictures_bring_their_own_classes(tmp_path):
    assert data.load(save(tmp_path / "a.npz"), classes=ANIMALS).classes == ["0", "1", "2"]


def test_a_constant_channel_is_not_scaled(tmp_path):
    images = arrays()["train_images"]
    images[..., 1] = 51
    images[..., 2] = images[..., 2] % 2 + 254
    dataset = data.load(save(tmp_path / "a.npz", train_images=images))
    assert dataset.mean[1:] == (0.2, pytest.approx(0.998, abs=1e-3)) and dataset.std[1:] == (1.0, 1.0)
    assert dataset.std[0] == pytest.approx(0.2887, abs=0.01)
    assert dataset.notes == ["(nearly) constant, and so not scaled: channel 1, 2"]


def test_a_test_split_in_the_order_of_its_classes_is_shuffled_once(tmp_path):
    images, labels = arrays(n=40, channels=0)["train_images"], np.arange(40) // 20
    path = save(tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    dataset = data.load(path)
    check(dataset, 40, 2, (1, 32, 32))
    assert 5 < dataset.test_labels[:20].sum() < 15
    assert dataset.notes[1:] == ["the test pictures, which come in the order of their classes, are shuffled"]
    assert np.array_equal(dataset.test_labels.numpy(), labels[dataset.test_numbers])
    assert np.array_equal(dataset.test_images[:, 0].numpy(), images[dataset.test_numbers])
    assert torch.equal(data.load(path).test_numbers, dataset.test_numbers)
    assert torch.equal(dataset.train_labels, torch.from_numpy(labels))


@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("high, noted", [(1, True), (16, True), (127, True), (128, False), (255, False)])
def test_a_range_that_is_none_of_eight_bits_is_named(tmp_path, kind, high, noted):
    """Digits of sklearn, masks: an attack's radius would be a hundred times too large for them."""
    images = np.random.default_rng(0).integers(0, high + 1, (18, 32, 32), dtype=np.uint8)
    images[:, 0, 0] = high
    if kind == "float32":
        images = images.astype(np.float32) / 255
    dataset = data.load(save(tmp_path / "a.npz", train_images=images[:12], test_images=images[12:]))
    notes = [note for note in dataset.notes if "no pixel" in note]
    assert len(notes) == 2 * noted and all(f"_images: no pixel is above {high} of 255;" in note for note in notes)


def test_test_pictures_that_were_trained_on_are_counted(tmp_path):
    images = arrays(side=28, n=20)["train_images"]
    path = save(tmp_path / "a.npz", train_images=images[:12], test_images=np.stack([*images[3:5], *images[14:18]]))
    assert "test pictures that are exactly among the training pictures: 2 of 6" in data.load(path).notes
    images[3:5, 5, 5, 2] ^= 1  # one pixel of one colour, by 1
    path = save(tmp_path / "b.npz", train_images=images[:12], test_images=arrays(side=28, n=20)["train_images"][3:9])
    assert "test pictures that are exactly among the training pictures: 4 of 6" in data.load(path, keep_size=True).notes


def test_what_else_is_in_a_file_is_named(tmp_path):
    dataset = data.load(save(tmp_path / "a.npz", val_images=np.zeros((3, 32, 32)), val_labels=np.zeros(3)))
    assert dataset.notes == [f"{key} of {tmp_path}/a.npz is not used" for key in ("val_images", "val_labels")]
    check(dataset, 12, 3, (3, 32, 32))


WORDS = ["aardvark", "bee", "chimpanzee", "dog", "emu", "fox", "goat", "horse", "ibis", "jaguar", "kiwi", "lynx"]


@pytest.mark.parametrize(
    "names, order",
    [
        ([str(k) for k in range(1, 13)], "1, 10, 11, 12, 2, 3, 4, 5, 6, 7, 8, 9"),
        ([f"c{k}" for k in range(12)], "c0, c1, c10, c11, c2, c3, c4, c5, c6, c7, c8, c9"),
        (list(range(1, 13)), ""),
        ([f"{k:02}" for k in range(12)], ""),
        (WORDS, ""),
    ],
)
def test_classes_in_the_order_of_text_are_printed(tmp_path, names, order):
    labels = np.array(names)
    dataset = data.load(save(tmp_path / "a.npz", train_labels=labels, test_labels=labels[::2]))
    notes = [note for note in dataset.notes if "order of text" in note]
    if order:
        assert notes == [f"the classes are in the order of text, not of numbers: {order}"]
        assert dataset.classes == order.split(", ")
    else:
        assert not notes and dataset.classes == list(map(str, names))


@pytest.mark.parametrize("height, width", [(28, 28), (128, 128), (7, 100)])
def test_pictures_keep_their_size_if_asked(tmp_path, height, width):
    images = np.random.default_rng(0).integers(0, 256, (18, height, width, 3), dtype=np.uint8)
    path = save(tmp_path / "a.npz", train_images=images[:12], test_images=images[12:])
    dataset = data.load(path, keep_size=True)
    assert np.array_equal(dataset.train_images.numpy(), images[:12].transpose(0, 3, 1, 2)) and not dataset.notes
    assert np.array_equal(dataset.test_images.numpy(), images[12:].transpose(0, 3, 1, 2))
    path = save(tmp_path / "a.npz", train_images=images[:12], test_images=images[12:, 1:])
    with pytest.raises(ValueError, match="a.npz: training and test pictures differ in size"):
        data.load(path, keep_size=True)
    assert data.load("digits", keep_size=True).test_images.shape == (500, 1, 32, 32)


def test_a_file_is_the_same_by_every_path(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    save(tmp_path / "a.npz")
    monkeypatch.chdir(tmp_path / "sub")
    monkeypatch.setenv("HOME", str(tmp_path))
    same = [data.load(path) for path in (tmp_path / "a.npz", "../a.npz", "~/a.npz", Path("~/a.npz"))]
    assert len({data.fingerprint(d.train_images, d.train_labels, d.classes) for d in same}) == 1


def test_the_home_folder_may_hold_the_data(tmp_path, cifar100, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(data.load("cifar100", "~/data").train_labels) == 20 and (tmp_path / "data").is_dir()


@pytest.mark.parametrize("name", ["cifar11", "nowhere/x.npz", "README.md"])
def test_unknown_names(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=f"{name} is none of digits, cifar10, cifar100, tinyimagenet, nor"):
        data.load(name)


# ------------------------------------------------------------------------------------------------------------ CIFAR


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """A served CIFAR-100 in the official format with 20 + 10 pictures, with its own checksums -> its path."""
    from torchvision.datasets import CIFAR100

    files = {"meta": {"fine_label_names": [f"class {k}" for k in range(100)]}}
    for split, n in (("train", 20), ("test", 10)):
        rows = np.random.default_rng(n).integers(0, 256, (n, 3072), dtype=np.uint8)
        files[split] = {"data": rows, "fine_labels": [99 - k if k % 2 else k for k in range(n)]}
    (tmp_path / "served").mkdir()
    archive = tmp_path / "served" / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            raw = pickle.dumps(content)
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
            md5 = hashlib.md5(raw).hexdigest()
            if name == "meta":
                monkeypatch.setitem(CIFAR100.meta, "md5", md5)
            else:
                monkeypatch.setattr(CIFAR100, f"{name}_list", [[name, md5]])
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        yield archive
        server.shutdown()


def check_cifar100(folder):
    dataset = data.load("cifar100", folder)
    check(dataset, 20, 100, (3, 32, 32))
    assert dataset.mean == (0.5071, 0.4865, 0.4409) and dataset.train_labels[:4].tolist() == [0, 98, 2, 96]
    rows = np.random.default_rng(20).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    assert np.array_equal(dataset.train_images.numpy(), rows) and dataset.classes[3] == "class 3"
    assert dataset.notes[0] == "there are no test pictures of class 1, class 3, class 5, class 7, class 9 and 85 more"
    assert sorted(path.name for path in folder.iterdir()) == ["cifar-100-python", "cifar-100-python.tar.gz"]


def test_cifar_is_downloaded_once_and_mended_from_its_archive(tmp_path, cifar100):
    check_cifar100(tmp_path / "data")
    cifar100.unlink()
    check_cifar100(tmp_path / "data")
    batch = tmp_path / "data" / "cifar-100-python" / "train"
    batch.write_bytes(batch.read_bytes()[:1000])
    check_cifar100(tmp_path / "data")


def test_several_at_once_fetch_cifar(tmp_path, cifar100):
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(lambda _: data.load("cifar100", tmp_path / "data"), range(4)))
    assert [len(dataset.train_labels) for dataset in several] == [20] * 4
    check_cifar100(tmp_path / "data")


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_cifar_stopped_in_the_middle(tmp_path, cifar100, monkeypatch, moves):
    whole, moved = os.replace, []

    def replace(source, target):
        if len(moved) == moves:
            raise KeyboardInterrupt
        moved.append(whole(source, target))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        data.load("cifar100", tmp_path / "data")
    assert len([path for path in (tmp_path / "data").rglob("*") if path.is_file()]) == moves
    check_cifar100(tmp_path / "data")


ARCHIVES = [("cifar10", "cifar-10-python.tar.gz"), ("tinyimagenet", "tiny-imagenet-200.zip")]


@pytest.mark.parametrize("error", [ConnectionRefusedError("nobody there"), http.client.IncompleteRead(b"")])
@pytest.mark.parametrize("name, file", ARCHIVES)
def test_no_network(tmp_path, monkeypatch, error, name, file):
    def happens(*_, **__):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", happens)
    monkeypatch.setattr(torch.hub, "urlopen", happens)
    sentence = f"^http.*{file} could not be downloaded .*; put the file at {tmp_path}/data/{file} by hand$"
    with pytest.raises(OSError, match=sentence):
        data.load(name, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_cifar_that_is_another_file(tmp_path, cifar100):
    cifar100.write_text("<html>")
    with pytest.raises(OSError, match="could not be downloaded .*by hand"):
        data.load("cifar100", tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


# ---------------------------------------------------------------------------------------------------- Tiny ImageNet


def jpeg(value) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), value, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def tiny(tmp_path):
    """A zip of two classes in the official layout; the annotations are not in the order of the files."""
    with zipfile.ZipFile(tmp_path / "tiny.zip", "w") as file:
        root, lines = "tiny-imagenet-200/", []
        file.writestr(root + "wnids.txt", "n02\nn01\n")
        file.writestr(root + "test/images/test_0.JPEG", jpeg(0))
        for k, wnid in enumerate(("n01", "n02")):
            file.writestr(f"{root}train/{wnid}/{wnid}_boxes.txt", "")
            for i in range(3):
                file.writestr(f"{root}train/{wnid}/images/{wnid}_{i}.JPEG", jpeg(100 * k))
            lines.append(f"val_{1 - k}.JPEG\t{wnid}\t0\t0\t62\t62\n")
            file.writestr(f"{root}val/images/val_{1 - k}.JPEG", jpeg(100 * k))
        file.writestr(root + "val/val_annotations.txt", "".join(lines))
    return tmp_path / "tiny.zip"


def check_tiny(dataset, name="tinyimagenet"):
    check(dataset, 6, 2, (3, 64, 64))
    assert dataset.name == name and dataset.classes == ["n01", "n02"]
    assert (dataset.mean == (0.4802, 0.4481, 0.3975)) == (name == "tinyimagenet")
    for images, labels in splits(dataset):
        assert torch.equal((images.float().mean(dim=(1, 2, 3)) > 50).long(), labels)  # each with its own label


def test_tinyimagenet_zip_is_read_once_and_cached(tmp_path, tiny, monkeypatch):
    check_tiny(data.load(tiny, tmp_path / "cache"))
    monkeypatch.setattr(data, "read_folder", None)  # a second reading must come from the cache
    check_tiny(data.load(tiny, tmp_path / "cache"))
    (cache,) = (tmp_path / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:-50])
    with pytest.raises(ValueError, match=cache.name):
        data.load(tiny, tmp_path / "cache")


def test_tinyimagenet_by_name(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(data, "TINYIMAGENET_URL", tiny.as_uri())
    with pytest.raises(ValueError, match="cache/tiny-imagenet-200.zip is not the official file.*delete it"):
        data.load("tinyimagenet", tmp_path / "cache")
    monkeypatch.setattr(data, "TINYIMAGENET_MD5", hashlib.md5(tiny.read_bytes()).hexdigest())
    for _ in range(2):
        check_tiny(data.load("tinyimagenet", tmp_path / "cache"))
        tiny.unlink(missing_ok=True)  # it is downloaded once


def test_tinyimagenet_unpacked(tmp_path, tiny):
    with zipfile.ZipFile(tiny) as file:
        file.extractall(tmp_path)
    check_tiny(data.load(tmp_path / "tiny-imagenet-200"))


@pytest.mark.parametrize("emptied", ["left there", "removed"])
def test_tinyimagenet_sorted_by_somebody_is_an_ordinary_folder(tmp_path, tiny, emptied):
    with zipfile.ZipFile(tiny) as file:
        file.extractall(tmp_path)
    val = tmp_path / "tiny-imagenet-200" / "val"
    for wnid, name in (("n01", "val_1.JPEG"), ("n02", "val_0.JPEG")):
        (val / wnid / "images").mkdir(parents=True)
        (val / "images" / name).rename(val / wnid / "images" / name)
    if emptied == "removed":
        (val / "images").rmdir()
    check_tiny(data.load(val.parent), name=str(val.parent))


def test_damaged_zips_are_read_right_or_named(tmp_path, tiny):
    rng, whole, refused = random.Random(0), tiny.read_bytes(), 0
    for _ in range(40):
        a, b = sorted(rng.randrange(len(whole)) for _ in range(2))
        tiny.write_bytes(rng.choice([whole[:a], whole[:a] + bytes(b - a) + whole[b:], whole[:a] + whole[b:]]))
        try:
            check_tiny(data.load(tiny, tmp_path / "cache"))
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{tiny} is not a zip of Tiny ImageNet, or not whole")
    assert refused > 10 and all(path.suffix == ".npz" for path in (tmp_path / "cache").iterdir())


# --------------------------------------------------------------------------------------------- folders of pictures


def make_folder(path, classes=("cats", "dogs"), splits=("train", "test"), count=2):
    """Grey pictures whose value says which they are."""
    for split in splits:
        for k, name in enumerate(classes):
            (path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (32, 32), 100 * k + i).save(path / split / name / f"{i:02}.png")
    return path


def test_a_folder_as_people_have_it(tmp_path):
    """Left-overs of programs, subfolders, links, files that are no pictures, endings in capitals, sizes that differ."""
    train = make_folder(tmp_path, splits=("train", "val")) / "train"
    for folder in (train / ".git", train / "cats" / ".ipynb_checkpoints", train / "cats" / "@eaDir"):
        folder.mkdir()
        Image.new("L", (32, 32)).save(folder / "0.png")
    (train / "cats" / "._0.png").write_bytes(b"of a Mac")
    (train / "cats" / "a" / "b").mkdir(parents=True)
    Image.new("L", (40, 44), 50).save(train / "cats" / "a" / "b" / "x.PNG")
    (train / "dogs" / "link.png").symlink_to(train / "cats" / "a" / "b" / "x.PNG")
    (train / "dogs" / "notes.txt").write_text("")
    (train / "emus").mkdir()
    (train / "eels").mkdir()
    (train / "eels" / "0.HEIC").write_text("of an iPhone")
    (train / "Thumbs.db").write_text("")
    Image.new("L", (32, 32)).save(train / "0.png")
    (tmp_path / "read me").write_text("")
    dataset = data.load(tmp_path)
    check(dataset, 6, 2, (1, 32, 32))
    assert dataset.classes == ["cats", "dogs"] and dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.train_images[:, 0, 0, 0].tolist() == [0, 1, 50, 100, 101, 50]
    hidden = ".git/0.png", "cats/._0.png", "cats/.ipynb_checkpoints/0.png", "cats/@eaDir/0.png"
    assert dataset.notes[:5] == [
        "not used, hidden: 4 (" + ", ".join(f"train/{name}" for name in hidden) + ")",
        "not used, in no class folder: 1 (train/0.png)",
        "not used, no picture: 3 (train/Thumbs.db, train/dogs/notes.txt, train/eels/0.HEIC)",
        "not used, a class without pictures: 2 (train/eels, train/emus)",
        "every picture is used at 32x32",
    ]
    Image.new("RGB", (64, 64), (10, 20, 30)).save(tmp_path / "val" / "cats" / "00.png")
    coloured = data.load(tmp_path)
    check(coloured, 6, 2, (3, 32, 32))
    assert coloured.train_images[3].unique().tolist() == [100]
    assert coloured.test_images[coloured.test_numbers == 0][0, :, 5, 5].tolist() == [10, 20, 30]


def test_linked_folders_are_followed_and_circles_are_not(tmp_path):
    make_folder(tmp_path / "elsewhere", splits=("more",))
    folder = make_folder(tmp_path / "a")
    cats = folder / "train" / "cats"
    shutil.move(folder / "train" / "dogs", tmp_path / "dogs")
    (folder / "train" / "dogs").symlink_to(tmp_path / "dogs")  # a class
    (cats / "more").symlink_to(tmp_path / "elsewhere" / "more" / "cats")  # a part of one
    (tmp_path / "elsewhere" / "more" / "cats" / "back").symlink_to(cats)
    (cats / "self").symlink_to(cats)
    (cats / "up").symlink_to("../..")  # would make cats of all test pictures
    (cats / "top").symlink_to(tmp_path)
    (cats / "nowhere").symlink_to("nothing")
    dataset = data.load(folder)
    check(dataset, 6, 2, (1, 32, 32))
    assert dataset.train_labels.tolist() == [0, 0, 0, 0, 1, 1]
    links = ", ".join(f"train/cats/{name}" for name in ("more/back", "nowhere", "self", "top", "up"))
    assert f"not used, no picture: 5 ({links})" in dataset.notes
    shutil.move(folder / "train", tmp_path / "train")
    (folder / "train").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "dogs" / "up").symlink_to(folder)
    again = data.load(folder)
    assert torch.equal(again.train_images, dataset.train_images)
    shutil.rmtree(folder / "test")
    (folder / "test").symlink_to("train")  # all of it
    assert "test pictures that are exactly among the training pictures: 6 of 6" in data.load(folder).notes


def test_a_split_that_is_not_used_is_named(tmp_path, tiny):
    folder = make_folder(tmp_path / "a", splits=("train", "test", "val"))
    names = ", ".join(f"val/{name}" for name in ("cats/00.png", "cats/01.png", "dogs/00.png", "dogs/01.png"))
    assert f"not used, the test pictures are others: 4 ({names})" in data.load(folder).notes
    shutil.rmtree(folder / "test" / "cats")
    shutil.move(folder / "test" / "dogs", folder / "test" / "Dogs")  # no class at all
    notes = data.load(folder).notes
    assert "not used, the test pictures are others: 2 (test/Dogs/00.png, test/Dogs/01.png)" in notes
    with zipfile.ZipFile(tiny) as file:
        file.extractall(tmp_path)
    Image.new("RGB", (64, 64)).save(tmp_path / "tiny-imagenet-200" / "val" / "images" / "val_2.JPEG")
    notes = data.load(tmp_path / "tiny-imagenet-200").notes
    unused = "test/images/test_0.JPEG, val/images/val_2.JPEG"
    assert f"not used, the test pictures are others: 2 ({unused})" in notes


def test_a_folder_keeps_its_pictures_size_if_all_are_alike(tmp_path):
    for split in ("train", "test"):
        for k, name in enumerate(("cats", "dogs")):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (128, 100), 50 * k).save(tmp_path / split / name / "0.png")
    dataset = data.load(tmp_path, keep_size=True)
    check(dataset, 2, 2, (1, 100, 128))
    assert "every picture is used at 128x100" in dataset.notes
    odd = tmp_path / "test" / "dogs" / "0.png"
    Image.new("L", (100, 128)).save(odd)
    with pytest.raises(ValueError, match=f"^{odd} has another size than {tmp_path}/train/cats/0.png: make all"):
        data.load(tmp_path, keep_size=True)
    check(data.load(tmp_path), 2, 2, (1, 64, 64))


def test_a_folder_of_pictures_with_twelve_bits_of_sixteen_is_told(tmp_path):
    for path in make_folder(tmp_path).glob("*/*/*"):
        Image.fromarray(np.full((32, 32), 4095, np.uint16)).save(path)
    assert sum("no pixel is above 16 of 255" in note for note in data.load(tmp_path).notes) == 2


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_a_name_beside_a_folder_or_file_of_that_name(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "digits")
    dataset = data.load("digits")
    assert dataset.notes == [f"digits is the known data set, not {tmp_path}/digits: for that one, give ./digits"]
    check(dataset, 1297, 10, (1, 32, 32))


@pytest.mark.parametrize("name", ["digits/", "./cifar10", "tinyimagenet/."])
def test_somebodys_folder_under_the_name_of_a_known_set_is_theirs(tmp_path, monkeypatch, name):
    make_folder(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    dataset = data.load(name)
    assert dataset.name == name and dataset.classes == ["cats", "dogs"] and len(dataset.mean) == 1


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda path: [f.rename(f.with_suffix(".doc")) for f in path.glob("test/dogs/*")], "of dogs in only one"),
        (lambda path: shutil.copytree(path / "test" / "dogs", path / "test" / "birds"), "of birds in only one"),
        (lambda path: [shutil.rmtree(path / split / "dogs") for split in ("train", "test")], "one class only"),
        (lambda path: shutil.rmtree(path / "test"), "should hold train/CLASS"),
        (lambda path: shutil.rmtree(path / "train"), "should hold train/CLASS"),
    ],
)
def test_a_folder_without_pictures_of_a_class(tmp_path, spoil, sentence):
    spoil(make_folder(tmp_path))
    with pytest.raises(ValueError, match=f"^{tmp_path} .*{sentence}"):
        data.load(tmp_path)


GLYPH = np.full((32, 32), 255, np.uint8)  # dark below the middle
GLYPH[16:] = 0
HALF = (257 * GLYPH.astype(np.uint16) // 2).astype(np.uint16)  # 16 bits, half as bright


def transparent(mode):
    """A glyph that only the alpha channel holds."""
    picture = Image.new(mode, (32, 32))
    picture.putalpha(Image.fromarray(255 - GLYPH))
    return picture


def palette():
    picture = Image.fromarray(GLYPH // 255, "P")
    picture.putpalette([0, 0, 0, 255, 255, 255])
    return picture


COLOURED = np.stack(3 * [GLYPH], 2)
PICTURES = {  # picture, format, options of save, and how it is seen
    "8 bits": (Image.fromarray(GLYPH), "PNG", {}, GLYPH),
    "1 bit": (Image.fromarray(GLYPH > 0), "PNG", {}, GLYPH),
    "16 bits": (Image.fromarray(HALF), "PNG", {}, GLYPH // 2),
    "colour": (Image.fromarray(COLOURED), "BMP", {}, COLOURED),
    "palette": (palette(), "PNG", {}, COLOURED),
    "CMYK": (Image.fromarray(COLOURED).convert("CMYK"), "TIFF", {}, COLOURED),
    "transparent grey": (transparent("L"), "PNG", {}, GLYPH),
    "transparent colour": (transparent("RGB"), "PNG", {}, COLOURED),
    "transparent value": (Image.fromarray(GLYPH), "PNG", {"transparency": 0}, np.full_like(GLYPH, 255)),
    "several frames": (Image.fromarray(GLYPH), "TIFF", {"save_all": True, "append_images": [palette()]}, GLYPH),
    "turned": (Image.fromarray(np.rot90(GLYPH).copy()), "PNG", {"exif": Image.Exif()}, GLYPH),
}  # fmt: skip
PICTURES["turned"][2]["exif"][0x0112] = 6  # a camera held on its side: to be turned clockwise


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_is_what_it_is_meant_to_be(tmp_path, kind):
    picture, file_format, options, seen = PICTURES[kind]
    picture.save(tmp_path / "picture", file_format, **options)
    assert np.array_equal(np.asarray(data.read_picture(tmp_path / "picture")), seen)


UNREADABLE = {
    "truncated": lambda path: path.write_bytes(jpeg(0)[:-99]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a picture"),
    "a bomb": lambda path: Image.new("1", (14000, 14000)).save(path),
    "floats": lambda path: Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(path, "TIFF"),
    "32 bits": lambda path: Image.fromarray(np.full((9, 9), 7, np.int32)).save(path, "TIFF"),
    "16 bits, of which perhaps 12 are used": lambda path: Image.fromarray(HALF).save(path, "TIFF"),
    "16 bits, transparent": lambda path: Image.fromarray(HALF).save(path, "PNG", transparency=0),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a strip": lambda path: Image.new("L", (8, 100)).save(path),
    "a dot": lambda path: Image.new("L", (4, 4)).save(path),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_picture_is_refused_by_its_name(tmp_path, kind):
    bad = make_folder(tmp_path) / "train" / "cats" / "bad.png"
    UNREADABLE[kind](bad)
    with pytest.raises(ValueError, match=f"^{bad}"):
        data.load(tmp_path)


# ---------------------------------------------------------------------------------------------------------- writing


def test_files_are_written_with_the_folders_they_need(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    data.write_text(path, "é\n\udcff")
    assert path.read_bytes() == b"\xc3\xa9\n\\udcff"
    data.write_npz(path, x=np.arange(3))
    assert np.array_equal(np.load(path)["x"], np.arange(3)) and os.listdir(path.parent) == ["c.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_leaves_what_was_there(tmp_path, error):
    def write(temporary):
        assert temporary.parent == tmp_path
        temporary.write_text("half")
        raise error

    data.write_text(tmp_path / "a.txt", "whole")
    with pytest.raises(OSError, match=f"a.txt could not be written .*{error.args[-1]}.*disk full"):
        data.write_atomically(tmp_path / "a.txt", write)
    assert (tmp_path / "a.txt").read_text() == "whole" and os.listdir(tmp_path) == ["a.txt"]


def test_two_writers_of_one_file_are_not_in_each_others_way(tmp_path):
    """In two containers, which share a folder, processes have equal numbers."""
    names = []
    data.write_atomically(tmp_path / "a", lambda one: names.append(one.name) or one.write_text("one"))
    data.write_atomically(tmp_path / "a", lambda two: names.append(two.name) or two.write_text("two"))
    assert len(set(names)) == 2 and os.listdir(tmp_path) == ["a"]


def test_a_file_system_that_cannot_synchronise_is_no_error_and_a_broken_one_is(tmp_path, monkeypatch):
    def fail(number):
        raise OSError(number, "fsync")

    monkeypatch.setattr(os, "fsync", lambda _: fail(errno.EINVAL))
    data.write_text(tmp_path / "a.txt", "whole")
    monkeypatch.setattr(os, "fsync", lambda _: fail(errno.EIO))
    with pytest.raises(OSError, match=r"a.txt could not be written \(.*fsync\)$"):
        data.write_text(tmp_path / "a.txt", "half")
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/a.txt could not be written"):
        data.write_text(tmp_path / "file" / "a.txt", "")


def test_a_file_is_closed_before_it_is_renamed(tmp_path, monkeypatch):
    """As Windows asks for."""
    whole = os.replace

    def replace(source, target):
        handles = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        if str(source) in [os.readlink(handle) for handle in handles if os.path.exists(handle)]:
            raise PermissionError("the file is used by another process")
        whole(source, target)

    monkeypatch.setattr(os, "replace", replace)
    data.write_npz(tmp_path / "a.npz", x=np.arange(3))
    data.write_atomically(tmp_path / "a.pt", lambda temporary: torch.save({"x": 3}, temporary))
    data.save_pictures(tmp_path / "a.png", torch.zeros(1, 1, 1, 8, 8))
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "a.png", "a.pt"]
    opened = []
    with pytest.raises(OSError, match="used by another"):
        data.write_atomically(tmp_path / "b", lambda temporary: opened.append(open(temporary, "w")))
    opened[0].close()


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_lie_in_a_grid_with_white_lines(tmp_path, channels):
    tiles = (torch.arange(6).view(2, 3, 1, 1, 1) / 10).expand(2, 3, channels, 8, 8)
    data.save_pictures(tmp_path / "a.png", tiles)
    grid = np.asarray(Image.open(tmp_path / "a.png")).reshape(44, 64, channels)
    assert (grid[:4] == 255).all() and (grid[:, :4] == 255).all() and (grid[-4:] == 255).all()
    for row in range(2):
        for column in range(3):
            top, left = 20 * row + 4, 20 * column + 4
            assert (grid[top : top + 16, left : left + 16] == round(25.5 * (3 * row + column))).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_headings_stand_above_their_columns(tmp_path, channels):
    tiles = torch.zeros(2, 3, channels, 32, 32)
    data.save_pictures(tmp_path / "plain.png", tiles)
    data.save_pictures(tmp_path / "a.png", tiles, ["difference", "", "drawn anew"])
    plain = np.asarray(Image.open(tmp_path / "plain.png").convert("L"))
    grid = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    above, column = grid.shape[0] - plain.shape[0], 2 * 32 + 4
    assert above == 14 and np.array_equal(grid[above:], plain)
    dark = grid[:above] < 128
    assert dark[:, :column].any() and not dark[:, column : 2 * column].any() and dark[:, 2 * column :].any()


def find_text(grid: np.ndarray) -> tuple[int, int]:
    """The first and the last column of pixels in which something is written."""
    dark = np.flatnonzero((grid < 128).any(0))
    return dark[0], dark[-1]


@pytest.mark.parametrize("headings", [(), ["clean", "reconstruction", "reconstruction"]])
@pytest.mark.parametrize("channels", [1, 3])
def test_captions_stand_below_their_pictures(tmp_path, channels, headings):
    captions = [["7", "", "answer 2"], ["label 7", "automobile as airplane, which is too long", "7"]]
    tiles = torch.ones(2, 3, channels, 32, 32)
    data.save_pictures(tmp_path / "a.png", tiles, headings, captions)
    grid = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    above, height, width = 14 * bool(headings), 2 * 32 + 4 + 12, 2 * 32 + 4
    assert grid.shape == (above + 2 * height + 4, 3 * width + 4)
    for row, texts in enumerate(captions):
        strip = grid[above + height * (row + 1) - 12 : above + height * (row + 1) + 4]
        picture = grid[above + height * row + 4 : above + height * (row + 1) - 12]
        assert (picture == 255).all()  # nothing is written over it
        for column, text in enumerate(texts):
            below = strip[:, column * width : (column + 1) * width + 4]
            assert (below < 128).any() == bool(text)
            if text:
                first, last = find_text(below)
                assert 4 <= first <= 8 and last < width
    if headings:
        assert [find_text(grid[:14, k * width : (k + 1) * width + 4])[1] < width for k in range(3)] == [True] * 3
        data.save_pictures(tmp_path / "cut.png", tiles, [heading[:-1] for heading in headings], captions)
        cut = np.asarray(Image.open(tmp_path / "cut.png").convert("L"))
        assert not np.array_equal(cut[:14, 2 * width :], grid[:14, 2 * width :])  # the last letter, too, is written


def test_a_folder_holds_one_configuration(tmp_path):
    path = tmp_path / "run" / "config.json"
    data.check_config(path, {"eps": 0.1, "tap": ("a", "b"), "more": None}, "--name")
    data.check_config(path, {"eps": 0.1, "tap": ["a", "b"], "more": None}, "--name")
    before = path.read_bytes()
    for other in ({"eps": 0.2, "tap": ["a", "b"]}, {"eps": 0.1, "tap": ["a", "b"], "more": None, "new": 1}):
        found = "eps: 0.1 there, 0.2 now" if other["eps"] == 0.2 else "new: None there, 1 now"
        with pytest.raises(ValueError, match=f"run holds other settings .{found}"):
            data.check_config(path, other, "--name")
    assert path.read_bytes() == before
    for damaged in ("{half", "null", "[]"):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="config.json is damaged: choose another --out"):
            data.check_config(path, {}, "--out")
