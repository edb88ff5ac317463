"""Every source on small fixtures in its official format, what it refuses, and the functions that write files."""

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
import tarfile
import threading
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data


def check(dataset: data.Dataset, count, classes, shape):
    """What every data set promises; count training pictures of this shape."""
    train = dataset.train_images, dataset.train_labels
    test = dataset.test_images, dataset.test_labels
    for images, labels in (train, test):
        assert images.shape == (len(labels), *shape) and images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert all(0 <= label < classes for label in labels.unique())
    assert len(dataset.train_labels) == count and len(dataset.classes) == classes
    assert sorted(dataset.test_numbers.tolist()) == list(range(len(dataset.test_labels)))
    assert len(dataset.mean) == len(dataset.std) == shape[0] and min(dataset.std) > 0


# ---------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("count, batch_size", [(1297, 64), (100, 128), (10, 3)])
def test_batches_cover_every_picture_once(count, batch_size):
    epoch = data.batches(count, batch_size, seed=1, epoch=2)
    assert torch.equal(torch.cat(epoch).sort().values, torch.arange(count))
    sizes = [len(batch) for batch in epoch]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1


def test_a_shuffle_follows_from_seed_and_epoch():
    assert [batch.tolist() for batch in data.batches(6, 4, seed=3, epoch=5)] == [[4, 2, 1], [3, 0, 5]]  # for good
    first = data.batches(100, 10, seed=1, epoch=2)
    assert not torch.equal(first[0], data.batches(100, 10, seed=1, epoch=3)[0])
    assert not torch.equal(first[0], data.batches(100, 10, seed=2, epoch=2)[0])
    assert len(torch.cat(data.batches(6, 4, seed=10**14, epoch=5)).unique()) == 6  # no seed is too large


@pytest.mark.parametrize("mirrored", [True, False])
def test_augment_equals_slicing(mirrored):
    x = torch.rand(50, 3, 32, 32)
    draws = torch.rand(50, 3)
    ours = data.augment(x, draws, mirrored)
    padded = torch.nn.functional.pad(x, [4] * 4)
    for i, (a, b, mirror) in enumerate(draws.tolist()):
        top, left = int(a * 9), int(b * 9)
        crop = padded[i, :, top : top + 32, left : left + 32]
        assert torch.equal(ours[i], crop.flip(2) if mirrored and mirror >= 0.5 else crop)


def test_a_fingerprint_is_of_pictures_labels_and_names():
    images, labels, classes = torch.arange(64, dtype=torch.uint8).view(4, 1, 4, 4), torch.arange(4), ["a", "b"]
    same = data.fingerprint(images, labels, classes)
    assert same == data.fingerprint(images.clone(), labels.clone(), tuple(classes))
    assert same != data.fingerprint(images.flip(2), labels, classes)
    assert same != data.fingerprint(images, labels.flip(0), classes)
    assert same != data.fingerprint(images, labels, ["a", "c"])


# ------------------------------------------------------------------------------------------------- digits and arrays


def test_digits_are_embedded_and_never_change():
    digits = data.load("digits")
    check(digits, 1297, 10, (1, 32, 32))
    train = data.fingerprint(digits.train_images, digits.train_labels, digits.classes)
    test = data.fingerprint(digits.test_images, digits.test_labels, digits.classes)
    assert (train, test) == ("d97d7016da63ebba9dec799d9beee8a5", "953eb4dcb72eed81e181be51874a5ace")
    assert (digits.mean, digits.std, digits.notes) == ((0.3054,), (0.3758,), [])
    values = data.pixels(digits.train_images)
    assert digits.mean[0] == pytest.approx(values.mean().item(), abs=1e-4)
    assert digits.std[0] == pytest.approx(values.std().item(), abs=1e-4)


def arrays(n=12, side=32, channels=3):
    """In MedMNIST's form, three classes: n training pictures and six for the test, all of them different."""
    shape = (n + 6, side, side, channels) if channels else (n + 6, side, side)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(n)[:, None] % 3
    return {"train_images": images[:n], "train_labels": labels, "test_images": images[n:], "test_labels": labels[:6]}


IMAGES = arrays()["train_images"]


def save(path, **changes):
    """These arrays, some of them changed, or left out (None)."""
    np.savez(path, **{key: value for key, value in (arrays() | changes).items() if value is not None})
    return path


def test_npz_with_medmnist_keys(tmp_path):
    dataset = data.load(save(tmp_path / "a.npz"))
    check(dataset, 12, 3, (3, 32, 32))
    assert np.array_equal(dataset.train_images.numpy(), IMAGES.transpose(0, 3, 1, 2)) and not dataset.notes
    assert dataset.name == str(tmp_path / "a.npz") and dataset.train_labels[:4].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("side, size", [(28, 32), (48, 32), (49, 64)])
def test_npz_grey_resized_and_with_val_for_test(tmp_path, side, size):
    small = arrays(side=side, channels=0)
    small["val_images"], small["val_labels"] = small.pop("test_images"), small.pop("test_labels")
    np.savez(tmp_path / "b.npz", **small)
    dataset = data.load(tmp_path / "b.npz")
    check(dataset, 12, 3, (1, size, size))
    note = f"{tmp_path}/b.npz: train_images are resized from {side}x{side} to {size}x{size}"
    assert dataset.notes == [note, note.replace("train", "test")]
    assert dataset.train_images.float().mean() == pytest.approx(small["train_images"].mean(), rel=0.01)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_floats_are_rounded_to_bytes(tmp_path, dtype):
    floats = np.maximum(IMAGES - 0.2, 0) / 255
    dataset = data.load(save(tmp_path / "a.npz", train_images=floats.astype(dtype)))
    assert np.array_equal(dataset.train_images.numpy(), IMAGES.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    "change, names",
    [
        (lambda k: k + 1, ["1", "2", "3"]),
        (lambda k: 5 * k + 2, ["2", "7", "12"]),
        (lambda k: np.array(["cat", "dog", "emu"])[k], ["cat", "dog", "emu"]),
    ],
)
def test_labels_of_all_kinds_become_the_classes_that_exist(tmp_path, change, names):
    labels = {key: change(value) for key, value in arrays().items() if "labels" in key}
    dataset = data.load(save(tmp_path / "labels.npz", **labels))
    assert dataset.classes == names and dataset.train_labels.tolist() == arrays()["train_labels"].ravel().tolist()
    assert dataset.test_labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"train_labels": None}, "is not .*train_labels"),
        ({"train_images": IMAGES / 255.0 * 4 - 2}, "train_images .*outside \\[0, 1\\]"),
        ({"test_images": np.full((6, 32, 32, 3), np.nan)}, "test_images .*outside \\[0, 1\\]"),
        ({"train_images": IMAGES.astype(np.int64)}, "not int64"),
        ({"train_images": np.float32(3)}, "shape"),
        ({"train_images": IMAGES.transpose(0, 3, 1, 2)}, "shape .*\\(12, 3, 32, 32\\)"),
        ({"train_images": IMAGES[:0], "train_labels": np.zeros(0, int)}, "\\(0, 32, 32, 3\\)"),
        ({"train_images": IMAGES[:, :8]}, "8x32 .*square"),
        ({"train_images": IMAGES[:, :7, :7]}, "7x7"),
        ({"train_labels": np.eye(12, dtype=int)}, "one class a picture"),
        ({"train_labels": np.arange(5)}, "12 train pictures but 5 labels"),
        ({"train_labels": np.full(12, -1)}, "whole numbers from 0 on"),
        ({"train_labels": np.full(12, 0.5)}, "whole numbers .*float64"),
        ({"test_images": arrays(side=64)["test_images"]}, "differ in size"),
        ({"train_labels": np.zeros(12, int), "test_labels": np.zeros(6, int)}, "one class only"),
        ({"test_labels": np.full(6, 7)}, "test_labels have classes that were not trained on, 7"),
        ({"train_labels": np.array(list("abcabcabcabc"))}, "not trained on, 0, 1, 2"),  # which of them is class 0?
        ({"train_labels": None, "train_images": None}, "no training pictures"),
        ({"test_labels": np.array([{}] * 6)}, "is not a whole .npz of plain arrays"),  # objects are never unpickled
    ],
)
def test_npz_that_makes_no_sense(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=f"bad.npz.*{sentence}"):
        data.load(save(tmp_path / "bad.npz", **changes))


def test_what_else_is_in_a_file_is_named_and_not_opened(tmp_path):
    objects = np.array(["a", {"b": 1}], dtype=object)
    dataset = data.load(save(tmp_path / "a.npz", val_images=np.zeros((3, 32, 32)), class_names=objects))
    assert dataset.notes == [f"{key} of {tmp_path}/a.npz is not used" for key in ("val_images", "class_names")]
    check(dataset, 12, 3, (3, 32, 32))


ANIMALS = ["cat", "dog", "emu"]


@pytest.mark.parametrize(
    "labels, classes",
    [
        (np.array([[2], [1], [2], [0], [1], [1]], np.uint8), ANIMALS),
        (np.array(["emu", "dog", "emu", "cat", "dog", "dog"]), ANIMALS),
        (np.array([3, 2, 3, 1, 2, 2]), ["1", "2", "3"]),  # names, though they are numbers
    ],
)
def test_test_pictures_alone_for_a_checkpoint_with_these_classes(tmp_path, labels, classes):
    path = save(tmp_path / "c.npz", train_images=None, train_labels=None, test_labels=labels)
    dataset = data.load(path, classes=classes)
    check(dataset, 0, 3, (3, 32, 32))
    assert dataset.test_labels.tolist() == [2, 1, 2, 0, 1, 1] and dataset.classes == classes
    assert np.array_equal(dataset.test_images.numpy(), arrays()["test_images"].transpose(0, 3, 1, 2))


def test_classes_of_a_checkpoint_that_are_not_those_of_the_pictures(tmp_path):
    assert data.load(save(tmp_path / "a.npz"), classes=ANIMALS).classes == ["0", "1", "2"]
    alone = save(tmp_path / "c.npz", train_images=None, train_labels=None)
    with pytest.raises(ValueError, match="not trained on, 0: remove them"):
        data.load(alone, classes=["1", "2", "3"])


def test_a_constant_channel_is_not_scaled(tmp_path):
    images = IMAGES.copy()
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


@pytest.mark.parametrize("kind, high, noted", [("uint8", 127, True), ("uint8", 128, False), ("float32", 16, True)])
def test_a_range_that_is_none_of_eight_bits_is_named(tmp_path, kind, high, noted):
    """Digits of sklearn, masks: an attack's radius would be a hundred times too large for them."""
    images = np.random.default_rng(0).integers(0, high + 1, (18, 32, 32), dtype=np.uint8)
    images[:, 0, 0] = high
    if kind == "float32":
        images = images.astype(np.float32) / 255
    dataset = data.load(save(tmp_path / "a.npz", train_images=images[:12], test_images=images[12:]))
    notes = [note for note in dataset.notes if f"_images: no pixel is above {high} of 255;" in note]
    assert len(notes) == 2 * noted


def test_test_pictures_that_were_trained_on_are_counted(tmp_path):
    test_images = np.concatenate([IMAGES[:4], arrays()["test_images"][4:]])
    test_images[0, 5, 5, 2] ^= 1  # one pixel of one colour, by 1: another picture
    dataset = data.load(save(tmp_path / "a.npz", test_images=test_images))
    assert dataset.notes == ["test pictures that are exactly among the training pictures: 3 of 6"]


def test_classes_in_the_order_of_text_are_printed(tmp_path):
    def find_notes(names):
        labels = np.array(names)
        dataset = data.load(save(tmp_path / "a.npz", train_labels=labels, test_labels=labels[::2]))
        return [note for note in dataset.notes if "order of text" in note]

    order = "c0, c1, c10, c11, c2, c3, c4, c5, c6, c7, c8, c9"
    numbered = [f"c{k}" for k in range(12)]
    assert find_notes(numbered) == [f"the classes are in the order of text, not of numbers: {order}"]
    assert not find_notes(range(1, 13)) and not find_notes(list("abcdefghijkl"))


def test_pictures_keep_their_size_if_asked(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (18, 7, 100, 3), dtype=np.uint8)
    path = save(tmp_path / "a.npz", train_images=images[:12], test_images=images[12:])
    dataset = data.load(path, keep_size=True)
    assert np.array_equal(dataset.train_images.numpy(), images[:12].transpose(0, 3, 1, 2)) and not dataset.notes
    path = save(tmp_path / "a.npz", train_images=images[:12], test_images=images[12:, 1:])
    with pytest.raises(ValueError, match="a.npz: training and test pictures differ in size"):
        data.load(path, keep_size=True)


def test_paths_are_relative_and_may_begin_at_home(tmp_path, cifar100, monkeypatch):
    (tmp_path / "sub").mkdir()
    save(tmp_path / "a.npz")
    monkeypatch.chdir(tmp_path / "sub")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("../a.npz", Path("~/a.npz")):
        check(data.load(path), 12, 3, (3, 32, 32))
    data.load("cifar100", "~/data")
    assert (tmp_path / "data").is_dir()


@pytest.mark.parametrize("name", ["cifar11", "README.md"])
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
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
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


def test_a_download_that_was_stopped_goes_on_with_whole_files(tmp_path, cifar100, monkeypatch):
    move, moved = os.replace, []

    def stop_at_the_second(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        move(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop_at_the_second)
        data.load("cifar100", tmp_path / "data")
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == moved
    check_cifar100(tmp_path / "data")


@pytest.mark.parametrize("there", ["nothing", "another file"])
def test_cifar_that_cannot_be_fetched(tmp_path, cifar100, there):
    cifar100.write_text("<html>")
    if there == "nothing":
        cifar100.unlink()
    archive = tmp_path / "data" / cifar100.name
    with pytest.raises(OSError, match=f"^http.* could not be downloaded .*; put the file at {archive} by hand$"):
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


@pytest.fixture
def unpacked(tiny):
    with zipfile.ZipFile(tiny) as file:
        file.extractall(tiny.parent)
    return tiny.parent / "tiny-imagenet-200"


def check_tiny(dataset, name="tinyimagenet"):
    check(dataset, 6, 2, (3, 64, 64))
    assert dataset.name == name and dataset.classes == ["n01", "n02"]
    assert (dataset.mean == (0.4802, 0.4481, 0.3975)) == (name == "tinyimagenet")
    train = dataset.train_images, dataset.train_labels
    test = dataset.test_images, dataset.test_labels
    for images, labels in (train, test):
        assert torch.equal((images.float().mean(dim=(1, 2, 3)) > 50).long(), labels)  # each with its own label


def test_tinyimagenet_zip_is_read_once_and_cached(tmp_path, tiny, capsys):
    check_tiny(data.load(tiny, tmp_path / "cache"))
    assert "this takes a minute or two, once" in capsys.readouterr().out
    check_tiny(data.load(tiny, tmp_path / "cache"))
    assert not capsys.readouterr().out
    (cache,) = (tmp_path / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:-50])
    with pytest.raises(ValueError, match=cache.name):
        data.load(tiny, tmp_path / "cache")


def test_tinyimagenet_by_name(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(data, "TINYIMAGENET_URL", tiny.as_uri())
    with pytest.raises(ValueError, match="cache/tiny-imagenet-200.zip is not the official file.*delete it"):
        data.load("tinyimagenet", tmp_path / "cache")
    monkeypatch.setattr(data, "TINYIMAGENET_MD5", hashlib.md5(tiny.read_bytes()).hexdigest())
    tiny.unlink()  # it is downloaded once
    check_tiny(data.load("tinyimagenet", tmp_path / "cache"))


def test_a_connection_that_breaks_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "urlopen", Mock(side_effect=http.client.IncompleteRead(b"")))
    with pytest.raises(OSError, match="^http.* could not be downloaded .*tiny-imagenet-200.zip by hand$"):
        data.load("tinyimagenet", tmp_path)
    assert not list(tmp_path.iterdir())


def test_tinyimagenet_unpacked(unpacked):
    check_tiny(data.load(unpacked))


def test_tinyimagenet_sorted_by_somebody_is_an_ordinary_folder(unpacked):
    for wnid, name in (("n01", "val_1.JPEG"), ("n02", "val_0.JPEG")):
        (unpacked / "val" / wnid).mkdir()
        (unpacked / "val" / "images" / name).rename(unpacked / "val" / wnid / name)
    check_tiny(data.load(unpacked), name=str(unpacked))


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


def save_grey(path, value, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


def make_folder(path, splits=("train", "test")):
    """Two grey pictures a class, whose value says which they are."""
    for split in splits:
        for k, name in enumerate(("cats", "dogs")):
            for i in range(2):
                save_grey(path / split / name / f"{i:02}.png", 100 * k + i)
    return path


def test_a_folder_as_people_have_it(tmp_path):
    """Left-overs of programs, subfolders, links, files that are no pictures, endings in capitals, sizes that differ."""
    train = make_folder(tmp_path, splits=("train", "val")) / "train"
    save_grey(train / "cats/a/b/x.PNG", 50, size=(40, 44))
    (train / "dogs/link.png").symlink_to(train / "cats/a/b/x.PNG")
    hidden = [".git/0.png", "cats/._0.png", "cats/.ipynb_checkpoints/0.png", "cats/@eaDir/0.png"]
    for name in [*hidden, "0.png"]:
        save_grey(train / name, 200)
    for name in ("Thumbs.db", "dogs/notes.txt", "eels/0.HEIC"):
        data.write_text(train / name, "")
    (train / "emus").mkdir()
    dataset = data.load(tmp_path)
    check(dataset, 6, 2, (1, 32, 32))
    assert dataset.classes == ["cats", "dogs"] and dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.train_images[:, 0, 0, 0].tolist() == [0, 1, 50, 100, 101, 50]
    assert dataset.notes[:5] == [
        "not used, hidden: 4 (" + ", ".join(f"train/{name}" for name in hidden) + ")",
        "not used, in no class folder: 1 (train/0.png)",
        "not used, no picture: 3 (train/Thumbs.db, train/dogs/notes.txt, train/eels/0.HEIC)",
        "not used, a class without pictures: 2 (train/eels, train/emus)",
        "every picture is used at 32x32",
    ]


def test_one_coloured_picture_makes_all_coloured(tmp_path):
    make_folder(tmp_path)
    Image.new("RGB", (64, 64), (10, 20, 30)).save(tmp_path / "test" / "cats" / "00.png")
    dataset = data.load(tmp_path)
    check(dataset, 4, 2, (3, 32, 32))
    assert dataset.train_images[2].unique().tolist() == [100]
    assert dataset.test_images[dataset.test_numbers == 0][0, :, 5, 5].tolist() == [10, 20, 30]


def test_linked_folders_are_followed_and_circles_are_not(tmp_path):
    folder, elsewhere = make_folder(tmp_path / "a"), make_folder(tmp_path / "elsewhere")
    cats = folder / "train/cats"
    shutil.rmtree(folder / "train/dogs")
    (folder / "train/dogs").symlink_to(elsewhere / "train/dogs")  # a class
    (cats / "more").symlink_to(elsewhere / "train/cats")  # a part of one
    (elsewhere / "train/cats/back").symlink_to(cats)
    (cats / "up").symlink_to("../..")  # would make cats of all test pictures
    (cats / "top").symlink_to(tmp_path)
    (cats / "nowhere").symlink_to("nothing")
    dataset = data.load(folder)
    check(dataset, 6, 2, (1, 32, 32))
    assert dataset.train_labels.tolist() == [0, 0, 0, 0, 1, 1]
    links = ", ".join(f"train/cats/{name}" for name in ("more/back", "nowhere", "top", "up"))
    assert f"not used, no picture: 4 ({links})" in dataset.notes


def test_a_split_that_is_not_used_is_named(tmp_path):
    folder = make_folder(tmp_path, splits=("train", "test", "val"))
    names = ", ".join(f"val/{name}" for name in ("cats/00.png", "cats/01.png", "dogs/00.png", "dogs/01.png"))
    assert f"not used, the test pictures are others: 4 ({names})" in data.load(folder).notes
    shutil.rmtree(folder / "test" / "cats")
    shutil.move(folder / "test" / "dogs", folder / "test" / "Dogs")  # no class at all
    notes = data.load(folder).notes
    assert "not used, the test pictures are others: 2 (test/Dogs/00.png, test/Dogs/01.png)" in notes


def test_a_folder_keeps_its_pictures_size_if_all_are_alike(tmp_path):
    for k, name in enumerate(("train/cats", "train/dogs", "test/cats", "test/dogs")):
        save_grey(tmp_path / name / "0.png", 50 * k, size=(128, 100))
    dataset = data.load(tmp_path, keep_size=True)
    check(dataset, 2, 2, (1, 100, 128))
    assert "every picture is used at 128x100" in dataset.notes
    odd = tmp_path / "test/dogs/0.png"
    save_grey(odd, 0, size=(100, 128))
    with pytest.raises(ValueError, match=f"^{odd} has another size than {tmp_path}/train/cats/0.png: make all"):
        data.load(tmp_path, keep_size=True)
    check(data.load(tmp_path), 2, 2, (1, 64, 64))


def test_a_known_name_means_the_known_set_and_a_path_somebodys_own(tmp_path, monkeypatch):
    make_folder(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    known = data.load("digits")
    assert known.notes == [f"digits is the known data set, not {tmp_path}/digits: for that one, give ./digits"]
    check(known, 1297, 10, (1, 32, 32))
    for name in ("./digits", "digits/"):
        assert data.load(name).classes == ["cats", "dogs"]


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda path: [file.unlink() for file in path.glob("test/dogs/*")], "of dogs in only one"),
        (lambda path: shutil.copytree(path / "test/dogs", path / "test/birds"), "of birds in only one"),
        (lambda path: [shutil.rmtree(dogs) for dogs in path.glob("*/dogs")], "one class only"),
        (lambda path: shutil.rmtree(path / "test"), "should hold train/CLASS"),
    ],
)
def test_a_folder_without_pictures_of_a_class(tmp_path, spoil, sentence):
    spoil(make_folder(tmp_path))
    with pytest.raises(ValueError, match=f"^{tmp_path} .*{sentence}"):
        data.load(tmp_path)


GLYPH = np.full((32, 32), 255, np.uint8)  # dark below the middle
GLYPH[16:] = 0
HALF = (257 * GLYPH.astype(np.uint16) // 2).astype(np.uint16)  # 16 bits, half as bright
COLOURED = np.stack(3 * [GLYPH], 2)


def transparent(mode):
    """A glyph that only the alpha channel holds."""
    picture = Image.new(mode, (32, 32))
    picture.putalpha(Image.fromarray(255 - GLYPH))
    return picture


ON_ITS_SIDE = Image.Exif()
ON_ITS_SIDE[0x0112] = 6  # as the camera was held: to be turned clockwise

PICTURES = {  # picture, format, options of save, and how it is seen
    "1 bit": (Image.fromarray(GLYPH > 0), "PNG", {}, GLYPH),
    "16 bits": (Image.fromarray(HALF), "PNG", {}, GLYPH // 2),
    "palette": (Image.fromarray(COLOURED).convert("P"), "PNG", {}, COLOURED),
    "transparent grey": (transparent("L"), "PNG", {}, GLYPH),
    "transparent colour": (transparent("RGB"), "PNG", {}, COLOURED),
    "transparent value": (Image.fromarray(GLYPH), "PNG", {"transparency": 0}, np.full_like(GLYPH, 255)),
    "turned": (Image.fromarray(np.rot90(GLYPH).copy()), "PNG", {"exif": ON_ITS_SIDE}, GLYPH),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_is_what_it_is_meant_to_be(tmp_path, kind):
    picture, file_format, options, seen = PICTURES[kind]
    picture.save(tmp_path / "picture", file_format, **options)
    assert np.array_equal(np.asarray(data.read_picture(tmp_path / "picture")), seen)


UNREADABLE = {
    "truncated": lambda path: path.write_bytes(jpeg(0)[:-99]),
    "floats": lambda path: Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(path, "TIFF"),
    "16 bits, of which perhaps 12 are used": lambda path: Image.fromarray(HALF).save(path, "TIFF"),
    "16 bits, transparent": lambda path: Image.fromarray(HALF).save(path, "PNG", transparency=0),
    "a strip": lambda path: Image.new("L", (8, 100)).save(path),
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
    with pytest.raises(OSError, match="c.txt/d.txt could not be written"):
        data.write_text(path / "d.txt", "")


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
    write = Mock(side_effect=lambda temporary: temporary.write_text("whole"))
    data.write_atomically(tmp_path / "a", write)
    data.write_atomically(tmp_path / "a", write)
    assert write.call_args_list[0] != write.call_args_list[1] and os.listdir(tmp_path) == ["a"]


def test_a_file_system_that_cannot_synchronise_is_no_error_and_a_broken_one_is(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EINVAL, "fsync")))
    data.write_text(tmp_path / "a.txt", "whole")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EIO, "fsync")))
    with pytest.raises(OSError, match=r"a.txt could not be written \(.*fsync\)$"):
        data.write_text(tmp_path / "a.txt", "half")
    assert (tmp_path / "a.txt").read_text() == "whole"


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


def test_headings_stand_above_columns_and_captions_below_pictures(tmp_path):
    headings = ["clean", "", "reconstruction"]
    captions = [["7", "", "answer 2"], ["label 7", "automobile as airplane, which is too long", ""]]
    data.save_pictures(tmp_path / "a.png", torch.ones(2, 3, 3, 32, 32), headings, captions)
    dark = np.asarray(Image.open(tmp_path / "a.png").convert("L")) < 128
    above, height, width, below = 14, 2 * 32 + 4, 2 * 32 + 4, 12
    assert dark.shape == (above + 2 * (height + below) + 4, 3 * width + 4)
    heading, *rows = np.split(dark, [above, above + height + below])
    strips = [heading, *(row[height:] for row in rows)]
    for strip, texts in zip(strips, [headings, *captions]):
        for column, text in enumerate(texts):
            assert strip[:, width * column : width * (column + 1) + 4].any() == bool(text)
    assert not any(row[4:height].any() for row in rows)  # nothing is written over a picture
    data.save_pictures(tmp_path / "cut.png", torch.ones(2, 3, 3, 32, 32), ["clean", "", "reconstructio"], captions)
    assert (tmp_path / "cut.png").read_bytes() != (tmp_path / "a.png").read_bytes()  # the last letter fits, too


def test_a_folder_holds_one_configuration(tmp_path):
    path = tmp_path / "run" / "config.json"
    data.check_config(path, {"eps": 0.1, "tap": ("a", "b")}, "--name")
    before = path.read_bytes()
    data.check_config(path, {"eps": 0.1, "tap": ["a", "b"], "more": None}, "--name")
    with pytest.raises(ValueError, match="run holds other settings .eps: 0.1 there, 0.2 now.: choose another --name"):
        data.check_config(path, {"eps": 0.2, "tap": ["a", "b"]}, "--name")
    with pytest.raises(ValueError, match="new: None there, 1 now"):
        data.check_config(path, {"eps": 0.1, "tap": ["a", "b"], "new": 1}, "--name")
    assert path.read_bytes() == before
    for damaged in ("{half", "[]"):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="config.json is damaged: choose another --out"):
            data.check_config(path, {}, "--out")
