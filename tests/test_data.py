"""Every loader on small fixtures in the official formats, and what it refuses."""

import functools
import hashlib
import http.server
import io
import pickle
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data


def arrays(n=12, side=32, channels=3, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n, side, side, channels) if channels else (n, side, side)
    images, labels = rng.integers(0, 256, shape, dtype=np.uint8), np.arange(n)[:, None] % classes
    return {"train_images": images, "train_labels": labels, "test_images": images[:6], "test_labels": labels[:6]}


def write(path, **changes):
    content = {k: v for k, v in (arrays() | changes).items() if v is not None}
    np.savez(path, **content)
    return path


def check(dataset: data.Dataset, n, classes, shape):
    assert dataset.train_images.shape == (n, *shape) and dataset.train_images.dtype == torch.uint8
    assert dataset.train_labels.shape == (n,) and dataset.train_labels.dtype == torch.int64
    assert len(dataset.classes) == classes and len(dataset.mean) == len(dataset.std) == shape[0]
    assert dataset.test_images.shape[1:] == shape


def test_digits_are_embedded():
    digits = data.load("digits")
    check(digits, 1297, 10, (1, 32, 32))
    assert len(digits.test_labels) == 500 and digits.train_images.max() == 255
    both = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797  # no picture is in both splits
    values = data.pixels(digits.train_images)
    assert digits.mean[0] == pytest.approx(values.mean().item(), abs=1e-3)
    assert digits.std[0] == pytest.approx(values.std().item(), abs=1e-3)


def test_npz_with_medmnist_keys(tmp_path):
    path = write(tmp_path / "a.npz")
    dataset = data.load(path)
    check(dataset, 12, 3, (3, 32, 32))
    expected = arrays()["train_images"][5].transpose(2, 0, 1)
    assert np.array_equal(dataset.train_images[5].numpy(), expected) and not dataset.note


def test_npz_grey_resized_and_with_val_for_test(tmp_path):
    small = arrays(side=28, channels=0)
    small["val_images"], small["val_labels"] = small.pop("test_images"), small.pop("test_labels")
    np.savez(tmp_path / "b.npz", **small)
    dataset = data.load(tmp_path / "b.npz")
    check(dataset, 12, 3, (1, 32, 32))
    assert "28x28 to 32x32" in dataset.note


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"train_labels": None}, "lacks train_labels"),
        ({"train_images": arrays()["train_images"] / 255.0 * 4 - 2}, "outside \\[0, 1\\]"),
        ({"train_images": arrays()["train_images"].astype(np.int64)}, "uint8"),
        ({"train_images": arrays()["train_images"][..., :2]}, "shape"),
        ({"train_images": arrays()["train_images"][:, :8]}, "square"),
        ({"train_labels": np.eye(12)}, "several labels"),
        ({"train_labels": np.arange(5)}, "12 train pictures and 5 labels"),
        ({"train_labels": np.full(12, -1)}, "whole numbers"),
        ({"test_images": arrays(side=64)["test_images"]}, "different shapes"),
        ({"train_images": np.zeros((0, 32, 32, 3), np.uint8), "train_labels": np.zeros(0, int)}, "0 train pictures"),
    ],
)
def test_npz_that_makes_no_sense(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        data.load(write(tmp_path / "bad.npz", **changes))


def test_npz_that_is_no_npz_or_would_run_code(tmp_path):
    (tmp_path / "text.npz").write_text("<html>")
    np.savez(tmp_path / "objects.npz", train_images=np.array([{}], dtype=object))
    for name in ("text.npz", "objects.npz"):
        with pytest.raises(ValueError, match="not an .npz of plain arrays"):
            data.load(tmp_path / name)


@pytest.mark.parametrize("name, sentence", [("cifar11", "no data set cifar11"), ("nowhere/x.npz", "no file")])
def test_unknown_names(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        data.load(name)


def test_folder_of_pictures(tmp_path):
    for split, n in (("train", 3), ("val", 2)):
        for k, name in enumerate(("cats", "dogs")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                picture = np.full((40, 44, 3), 100 * k + i, np.uint8)
                Image.fromarray(picture).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "train" / "cats" / "notes.txt").write_text("not a picture")
    dataset = data.load(tmp_path)
    check(dataset, 6, 2, (3, 32, 32))
    assert dataset.classes == ["cats", "dogs"] and dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.train_images[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]
    (tmp_path / "val" / "dogs" / "0.png").write_text("broken")
    with pytest.raises(ValueError, match="0.png is not a picture"):
        data.load(tmp_path)


def test_folder_without_classes(tmp_path):
    with pytest.raises(ValueError, match="train/CLASS"):
        data.load(tmp_path)


def tiny_imagenet_zip(path):
    """Two classes in the official layout; the annotations are not in the order of the files."""
    with zipfile.ZipFile(path, "w") as file:
        root = "tiny-imagenet-200/"
        file.writestr(root + "wnids.txt", "n02\nn01\n")
        lines = []
        for k, wnid in enumerate(("n01", "n02")):
            for i in range(3):
                file.writestr(f"{root}train/{wnid}/images/{wnid}_{i}.JPEG", jpeg(100 * k))
            lines.append(f"val_{1 - k}.JPEG\t{wnid}\t0\t0\t62\t62\n")
            file.writestr(f"{root}val/images/val_{1 - k}.JPEG", jpeg(100 * k))
        file.writestr(root + "val/val_annotations.txt", "".join(lines))
    return path


def jpeg(value) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), value, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_tinyimagenet_zip_is_read_once_and_cached(tmp_path, monkeypatch):
    path = tiny_imagenet_zip(tmp_path / "tiny.zip")
    dataset = data.load(path, tmp_path / "cache")
    check(dataset, 6, 2, (3, 64, 64))
    assert dataset.classes == ["n01", "n02"]
    brightness = dataset.test_images.float().mean(dim=(1, 2, 3)) > 50
    assert torch.equal(brightness.long(), dataset.test_labels)  # each picture with its own annotation
    monkeypatch.setattr(data, "_decode_tinyimagenet", None)  # a second reading must come from the cache
    assert torch.equal(data.load(path, tmp_path / "cache").train_images, dataset.train_images)


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("readme", "hello")
    with pytest.raises(ValueError, match="Tiny ImageNet's layout"):
        data.load(tmp_path / "other.zip", tmp_path)


def cifar100_archive(folder, monkeypatch):
    """A CIFAR-100 in the official format with 20 + 10 pictures; torchvision's checksums are set to its own."""
    from torchvision.datasets import CIFAR100

    files = {"meta": {"fine_label_names": [f"class {k}" for k in range(100)]}}
    for split, n in (("train", 20), ("test", 10)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 3072), dtype=np.uint8)
        files[split] = {"data": pixels, "fine_labels": list(range(n))}
    with tarfile.open(folder / "cifar-100-python.tar.gz", "w:gz") as tar:
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
    archive = (folder / "cifar-100-python.tar.gz").read_bytes()
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive).hexdigest())


def test_cifar100_through_torchvision_and_no_network(tmp_path, monkeypatch):
    cifar100_archive(tmp_path, monkeypatch)
    dataset = data.load("cifar100", tmp_path)
    check(dataset, 20, 100, (3, 32, 32))
    assert dataset.mean == (0.5071, 0.4865, 0.4409) and dataset.train_labels.tolist() == list(range(20))
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(OSError, match="could not be downloaded.*put cifar-10-python.tar.gz"):
        data.load("cifar10", tmp_path / "empty")


# -------------------------------------------------------------------------------------------------------- downloads


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; understands `Range: bytes=N-`, which Python's own server does not."""

    ranges = []

    def do_GET(self):
        body = open(self.translate_path(self.path), "rb").read()
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.ranges.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    handler = functools.partial(Server, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        Server.ranges.clear()
        yield f"http://127.0.0.1:{httpd.server_port}", tmp_path / "served"
        httpd.shutdown()


def test_download_goes_on_and_verifies(tmp_path, server):
    url, served = server
    content = bytes(range(256)) * 40
    (served / "file.bin").write_bytes(content)
    md5 = hashlib.md5(content).hexdigest()
    target = tmp_path / "got" / "file.bin"
    target.parent.mkdir()
    (target.parent / "file.bin.part").write_bytes(content[:1000])  # an earlier try broke off here
    data.download(f"{url}/file.bin", target, md5)
    assert target.read_bytes() == content and Server.ranges == [1000]
    data.download(f"{url}/file.bin", target, md5)
    assert Server.ranges == [1000]  # there already
    target.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged"):
        data.download(f"{url}/file.bin", target, md5)


def test_download_of_the_wrong_file_keeps_nothing(tmp_path, server):
    url, served = server
    (served / "file.bin").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="not the expected file"):
        data.download(f"{url}/file.bin", tmp_path / "file.bin", "0" * 32)
    assert not list(tmp_path.glob("file*"))


def test_download_without_network(tmp_path):
    with pytest.raises(OSError, match="could not be downloaded .* by hand"):
        data.download("http://127.0.0.1:9/file.bin", tmp_path / "file.bin")


# ---------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("count, batch_size", [(1297, 64), (100, 128), (50_000, 5120), (10, 3)])
def test_batches_cover_every_picture_once(count, batch_size):
    epoch = data.batches(count, batch_size, seed=1, epoch=2)
    assert torch.equal(torch.cat(epoch).sort().values, torch.arange(count))
    sizes = [len(b) for b in epoch]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1


def test_shuffle_follows_from_seed_and_epoch():
    first = data.batches(100, 10, seed=1, epoch=2)
    assert all(torch.equal(a, b) for a, b in zip(first, data.batches(100, 10, seed=1, epoch=2)))
    assert not torch.equal(first[0], data.batches(100, 10, seed=1, epoch=3)[0])
    assert not torch.equal(first[0], data.batches(100, 10, seed=2, epoch=2)[0])


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
