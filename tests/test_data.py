"""Every loader on small fixtures in the official formats, and what it refuses."""

import functools
import hashlib
import http.server
import io
import itertools
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
from lab.files import check_config, lock, write_text
from lab.pictures import TRANSPARENT, TURNED, read_picture


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
        ({"train_labels": np.zeros(12, int), "test_labels": np.zeros(6, int)}, "one class only"),
        ({"test_labels": np.full(6, 7)}, "classes without training pictures: 7"),
        ({"test_labels": np.array(list("abcabc"))}, "train_labels are int64, and test_labels <U1"),
        ({"train_labels": np.zeros(12, "M8[s]")}, "datetime64"),
        ({"train_labels": np.full(12, 2**64 - 1, np.uint64)}, "whole numbers"),
        ({"train_images": np.float32(3)}, "shape"),
        ({"train_images": np.zeros((0, 32, 32, 3), np.uint8), "train_labels": np.zeros(0, int)}, "0 train pictures"),
    ],
)
def test_npz_that_makes_no_sense(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        data.load(write(tmp_path / "bad.npz", **changes))


def test_npz_that_is_no_npz_or_would_run_code(tmp_path):
    (tmp_path / "text.npz").write_text("<html>")
    np.savez(tmp_path / "objects.npz", train_images=np.array([{}], dtype=object))
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    (tmp_path / "cut.npz").write_bytes(write(tmp_path / "whole.npz").read_bytes()[:5000])
    for name in ("text.npz", "objects.npz", "one.npz", "cut.npz"):
        with pytest.raises(ValueError, match="not an .npz of plain arrays") as refused:
            data.load(tmp_path / name)
        assert "pickle" not in str(refused.value), "no advice to run it"
    np.savez(tmp_path / "other.npz", pickles=np.zeros(3))
    with pytest.raises(ValueError, match="it lacks train_images.*it holds pickles"):
        data.load(tmp_path / "other.npz")


@pytest.mark.parametrize(
    "name, sentence",
    [("cifar11", "no data set cifar11"), ("nowhere/x.npz", "no file"), ("README.md", "no data is read from")],
)
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


GLYPH = np.full((16, 16), 255, np.uint8)  # dark below the middle
GLYPH[8:] = 0
SIXTEEN = (257 * GLYPH.astype(np.uint16) // 2).astype(np.uint16)  # half as bright


def transparent(mode, colour):
    """A glyph that only the alpha channel holds."""
    picture = Image.new(mode, (16, 16), colour)
    picture.putalpha(Image.fromarray(255 - GLYPH))
    return picture


def grey_palette():
    picture = Image.fromarray(GLYPH // 255, "P")
    picture.putpalette([0, 0, 0, 255, 255, 255] + 254 * [9, 80, 7])  # entries that no pixel uses may be coloured
    return picture


def turned():
    """A camera held on its side; the glyph lies, and EXIF says how it stood."""
    picture = Image.fromarray(np.rot90(GLYPH).copy())
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    return picture, exif


PICTURES = {
    "8 bits": (lambda path: Image.fromarray(GLYPH).save(path, "PNG"), GLYPH),
    "16 bits": (lambda path: Image.fromarray(SIXTEEN).save(path, "PNG"), GLYPH // 2),
    "16 bits, TIFF": (lambda path: Image.fromarray(SIXTEEN).save(path, "TIFF"), GLYPH // 2),
    "16 bits, PGM": (lambda path: Image.fromarray(SIXTEEN).save(path, "PPM"), GLYPH // 2),
    "16 bits, TIFF, inverted": (
        lambda path: Image.fromarray(SIXTEEN).save(path, "TIFF", tiffinfo={262: 0}), 255 - GLYPH // 2
    ),
    "floats": (lambda path: Image.fromarray((GLYPH / 255).astype(np.float32)).save(path, "TIFF"), GLYPH),
    "1 bit": (lambda path: Image.fromarray(GLYPH > 0).save(path, "PNG"), GLYPH),
    "grey palette": (lambda path: grey_palette().save(path, "PNG"), GLYPH),
    "transparent grey": (lambda path: transparent("L", 0).save(path, "PNG"), GLYPH),
    "transparent colour": (lambda path: transparent("RGB", (0, 0, 0)).save(path, "PNG"), np.stack(3 * [GLYPH], 2)),
    "turned": (lambda path: turned()[0].save(path, "PNG", exif=turned()[1]), GLYPH),
}  # fmt: skip


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_is_what_it_is_meant_to_be(tmp_path, kind):
    save, seen = PICTURES[kind]
    save(tmp_path / "picture")
    notes = Counter()
    picture = read_picture(tmp_path / "picture", notes)
    assert picture.dtype == np.uint8 and np.array_equal(picture, seen)
    assert (notes[TRANSPARENT], notes[TURNED]) == (kind.startswith("transparent"), kind == "turned")


def png(side=16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


UNREADABLE = {
    "truncated": lambda path: path.write_bytes(png()[:200]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a picture"),
    "a bomb": lambda path: Image.new("1", (14000, 14000)).save(path),
    "floats of no known range": lambda path: Image.fromarray(np.full((9, 9), 7, np.float32)).save(path, "TIFF"),
    "32 bits": lambda path: Image.fromarray(np.full((9, 9), 7, np.int32)).save(path, "TIFF"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a pipe": os.mkfifo,
    "a strip": lambda path: Image.new("L", (8, 100)).save(path),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_picture_is_refused_by_its_name(tmp_path, kind):
    picture_folder(tmp_path)
    UNREADABLE[kind](tmp_path / "train" / "cats" / "bad.png")
    with pytest.raises(ValueError, match="bad.png"):
        data.load(tmp_path)


def picture_folder(path, classes=("cats", "dogs"), splits=("train", "test"), count=2):
    for split in splits:
        for k, name in enumerate(classes):
            (path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (32, 32), 100 * k + i).save(path / split / name / f"{i:02}.png")
    return path


def test_a_folder_as_people_have_it(tmp_path):
    """Left-overs of programs, subfolders, links, files that are no pictures, endings in capitals."""
    train = picture_folder(tmp_path) / "train"
    (train / ".ipynb_checkpoints").mkdir()
    (train / "cats" / ".ipynb_checkpoints").mkdir()
    Image.new("L", (32, 32)).save(train / "cats" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (train / "cats" / "._0.png").write_bytes(b"of a Mac")
    (train / "cats" / "a" / "b").mkdir(parents=True)
    Image.new("L", (32, 32), 50).save(train / "cats" / "a" / "b" / "x.PNG")
    (train / "dogs" / "more").symlink_to(train / "cats" / "a")
    (train / "dogs" / "notes.txt").write_text("")
    (tmp_path / "read me").write_text("")
    dataset = data.load(tmp_path)
    assert dataset.classes == ["cats", "dogs"] and dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.train_images[:, 0, 0, 0].tolist() == [0, 1, 50, 100, 101, 50]
    assert (
        "1 files are left out, which are no pictures (notes.txt)" in dataset.note and dataset.train_images.shape[1] == 1
    )


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (
            lambda path: [f.rename(f.with_suffix(".doc")) for f in (path / "test" / "dogs").iterdir()],
            "dogs has no pict",
        ),
        (lambda path: shutil.rmtree(path / "test" / "dogs"), "only one of train and test: dogs"),
        (lambda path: (path / "test" / "birds").mkdir(), "only one of train and test: birds"),
        (
            lambda path: (path / "train" / "cats" / "loop").symlink_to(path / "train"),
            "a link to a folder that it is in",
        ),
        (lambda path: [shutil.rmtree(path / split / "dogs") for split in ("train", "test")], "one class only"),
    ],
)
def test_a_folder_without_pictures_of_a_class(tmp_path, spoil, sentence):
    spoil(picture_folder(tmp_path))
    with pytest.raises(ValueError, match=sentence):
        data.load(tmp_path)


def test_many_grey_pictures_and_few_open_files(tmp_path):
    picture_folder(tmp_path, count=20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, hard))
    try:
        assert len(data.load(tmp_path).train_labels) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_test_split_in_the_order_of_its_classes_is_shuffled_once(tmp_path):
    dataset = data.load(picture_folder(tmp_path, count=20))
    assert sorted(dataset.test_numbers.tolist()) == list(range(40)) and 5 < dataset.test_labels[:20].sum() < 15
    assert torch.equal(dataset.test_labels, (dataset.test_numbers >= 20).long())
    assert torch.equal(
        dataset.test_images[:, 0, 0, 0].long(), 100 * (dataset.test_numbers >= 20) + dataset.test_numbers % 20
    )
    assert torch.equal(data.load(tmp_path).test_numbers, dataset.test_numbers) and "shuffled" in dataset.note
    assert torch.equal(data.load("digits").test_numbers, torch.arange(500))


def test_a_fingerprint_is_of_pictures_labels_and_names():
    images, labels, classes = torch.arange(64, dtype=torch.uint8).view(4, 1, 4, 4), torch.arange(4), list("abcd")
    same = data.fingerprint(images, labels, classes)
    assert same == data.fingerprint(images.clone(), labels.clone(), tuple(classes)) and len(same) == 32
    others = (images + 1, labels, classes), (images, labels.flip(0), classes), (images, labels, list("abce"))
    assert len({same, data.fingerprint(images.flip(2), labels, classes), *(data.fingerprint(*o) for o in others)}) == 5


LABELS = {
    "from 1 on": (lambda k: k + 1, ["1", "2", "3"]),
    "with gaps": (lambda k: 5 * k + 2, ["2", "7", "12"]),
    "uint16": (lambda k: k.astype(np.uint16), ["0", "1", "2"]),
    "uint64": (lambda k: k.astype(np.uint64), ["0", "1", "2"]),
    "names": (lambda k: np.array(["cat", "dog", "emu"])[k], ["cat", "dog", "emu"]),
    "bytes": (lambda k: np.array([b"cat", b"dog", b"emu"])[k], ["cat", "dog", "emu"]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_all_kinds_become_the_classes_that_exist(tmp_path, kind):
    change, names = LABELS[kind]
    plain = arrays()
    labels = {key: change(plain[key]) for key in ("train_labels", "test_labels")}
    dataset = data.load(write(tmp_path / "labels.npz", **labels))
    assert dataset.classes == names and dataset.train_labels.tolist() == plain["train_labels"].ravel().tolist()
    assert ("are taken as classes 0 to 2" in dataset.note) == (kind in ("from 1 on", "with gaps"))


def test_objects_beside_the_needed_arrays_do_not_matter(tmp_path):
    names = np.array(["a", {"b": 1}], dtype=object)
    assert len(data.load(write(tmp_path / "a.npz", class_names=names)).train_labels) == 12
    with pytest.raises(ValueError, match="not an .npz of plain arrays"):
        data.load(write(tmp_path / "b.npz", test_labels=names))


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
    monkeypatch.setattr(data, "read_tinyimagenet", None)  # a second reading must come from the cache
    assert torch.equal(data.load(path, tmp_path / "cache").train_images, dataset.train_images)


@pytest.mark.parametrize("inside", ["", "tiny-imagenet-200"])
def test_tinyimagenet_unpacked(tmp_path, inside):
    path = tiny_imagenet_zip(tmp_path / "tiny.zip")
    with zipfile.ZipFile(path) as file:
        file.extractall(tmp_path / "unpacked")
    (tmp_path / "unpacked" / "tiny-imagenet-200" / "test" / "images").mkdir(parents=True)  # theirs, without labels
    folder = tmp_path / "unpacked" if not inside else tmp_path / "unpacked" / inside
    ours, theirs = data.load(folder), data.load(path, tmp_path / "cache")
    assert ours.name == "tinyimagenet" and ours.classes == theirs.classes
    assert torch.equal(ours.test_images, theirs.test_images) and torch.equal(ours.train_labels, theirs.train_labels)


def test_a_damaged_cache_is_named(tmp_path):
    path = tiny_imagenet_zip(tmp_path / "tiny.zip")
    data.load(path, tmp_path)
    (cache,) = tmp_path.glob("tiny-imagenet-*.npz")
    cache.write_bytes(cache.read_bytes()[:-50])
    with pytest.raises(ValueError, match=cache.name):
        data.load(path, tmp_path)


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
    with pytest.raises(OSError, match="could not be downloaded.*put the file at .*cifar-10-python.tar.gz"):
        data.load("cifar10", tmp_path / "empty")


@pytest.mark.parametrize("name", ["digits/", "./cifar10", "tinyimagenet/."])
def test_somebodys_folder_under_the_name_of_a_known_set_is_theirs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for split, kind in itertools.product(("train", "test"), ("cat", "dog")):
        for i in range(4):
            path = tmp_path / name / split / kind / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32), 20 * i, np.uint8)).save(path)
    dataset = data.load(name)
    assert dataset.name not in data.NAMES and len(dataset.mean) == 1 and dataset.classes == ["cat", "dog"]
    assert dataset.test_labels.tolist() != sorted(dataset.test_labels.tolist())  # shuffled


CIFAR_BY_MANY = """
import sys
from torchvision.datasets import CIFAR100
import data
CIFAR100.url, CIFAR100.tgz_md5, CIFAR100.meta["md5"], train, test = sys.argv[2:]
CIFAR100.train_list, CIFAR100.test_list = [["train", train]], [["test", test]]
print(len(data.load("cifar100", sys.argv[1]).train_labels))
"""


def test_of_many_processes_one_fetches_and_unpacks_cifar(tmp_path, server, monkeypatch):
    from torchvision.datasets import CIFAR100

    url, served = server
    cifar100_archive(served, monkeypatch)
    checksums = CIFAR100.tgz_md5, CIFAR100.meta["md5"], CIFAR100.train_list[0][1], CIFAR100.test_list[0][1]
    options = ["-c", CIFAR_BY_MANY, tmp_path / "data", f"{url}/cifar-100-python.tar.gz", *checksums]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    many = [subprocess.Popen([sys.executable, *map(str, options)], **pipes) for _ in range(2)]
    said = [process.communicate(timeout=100) for process in many]
    assert [out.split()[-1:] for out, _ in said] == [["20"]] * 2, said
    assert Server.ranges == [0]


# -------------------------------------------------------------------------------------------------------- downloads


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; understands `Range: bytes=N-`, which Python's own server does not."""

    ranges, length = [], True

    def do_GET(self):
        body = Path(self.translate_path(self.path)).read_bytes()
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.ranges.append(start)
        self.send_response(416 if start >= len(body) else 206 if start else 200)
        if self.length:
            self.send_header("Content-Length", str(max(0, len(body) - start)))
        if start >= len(body):
            self.send_header("Content-Range", f"bytes */{len(body)}")
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


def test_a_complete_part_is_enough(tmp_path, server):
    url, served = server
    (served / "file.bin").write_bytes(b"whole")
    (tmp_path / "file.bin.part").write_bytes(b"whole")
    data.download(f"{url}/file.bin", tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == b"whole" and Server.ranges == [5]
    (tmp_path / "file.bin").unlink()
    (tmp_path / "file.bin.part").write_bytes(b"more than the whole")
    with pytest.raises(OSError, match="run the same command again"):
        data.download(f"{url}/file.bin", tmp_path / "file.bin")
    data.download(f"{url}/file.bin", tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == b"whole" and not list(tmp_path.glob("*.part"))


def test_a_file_of_unknown_length_is_believed_by_its_checksum_alone(tmp_path, server, monkeypatch):
    url, served = server
    (served / "file.bin").write_bytes(b"a part")
    monkeypatch.setattr(Server, "length", False)
    with pytest.raises(OSError, match="broke off"):
        data.download(f"{url}/file.bin", tmp_path / "file.bin")
    (tmp_path / "file.bin.part").unlink()
    with pytest.raises(OSError, match="broke off"):
        data.download(f"{url}/file.bin", tmp_path / "file.bin", hashlib.md5(b"the whole").hexdigest())
    (tmp_path / "file.bin.part").unlink()
    data.download(f"{url}/file.bin", tmp_path / "file.bin", hashlib.md5(b"a part").hexdigest())


def test_a_file_without_a_published_checksum_keeps_its_first(tmp_path, server):
    url, served = server
    (served / "file.bin").write_bytes(b"weights")
    for _ in range(2):
        data.download(f"{url}/file.bin", tmp_path / "file.bin")
    pinned = tmp_path / "file.bin.md5"
    assert pinned.read_text() == f"{hashlib.md5(b'weights').hexdigest()} 7\n"
    pinned.write_text(hashlib.md5(b"weights").hexdigest() + "\n")  # an earlier version's, without the size
    data.download(f"{url}/file.bin", tmp_path / "file.bin")
    assert pinned.read_text().endswith(" 7\n")
    (tmp_path / "file.bin").write_bytes(b"weighty")
    with pytest.raises(ValueError, match="file.bin.md5, if this file is the right one"):
        data.download(f"{url}/file.bin", tmp_path / "file.bin")
    (tmp_path / "file.bin").unlink()
    (served / "file.bin").write_bytes(b"another")
    with pytest.raises(ValueError, match="not the expected file"):
        data.download(f"{url}/file.bin", tmp_path / "file.bin")
    (tmp_path / "file.bin").write_bytes(b"longer weights")
    with pytest.raises(ValueError, match="another file \\(14 bytes; .* should be [0-9a-f]{32} 7"):
        data.download(f"{url}/file.bin", tmp_path / "file.bin")
    pinned.write_text("")
    with pytest.raises(ValueError, match="file.bin.md5 holds no md5 and size"):
        data.download(f"{url}/file.bin", tmp_path / "file.bin")


def test_of_many_that_download_one_does(tmp_path, server):
    """In threads; the lock is of the open file, so that it holds between processes and threads alike."""
    url, served = server
    (served / "file.bin").write_bytes(bytes(5_000_000))
    errors = []

    def fetch():
        try:
            data.download(f"{url}/file.bin", tmp_path / "file.bin")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not errors and Server.ranges == [0]
    assert (tmp_path / "file.bin").read_bytes() == bytes(5_000_000)
    assert sorted(p.name for p in tmp_path.glob("file.*")) == ["file.bin", "file.bin.md5"]


def test_a_downloaded_file_never_stands_without_its_md5(tmp_path, server, monkeypatch):
    """Else one that comes between them writes the md5 as well, and the two disturb each other."""
    url, served = server
    (served / "file.bin").write_bytes(b"weights")
    real, seen = os.replace, []

    def replace(source, target):
        seen.append((Path(target).name, (tmp_path / "file.bin.md5").is_file()))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    data.download(f"{url}/file.bin", tmp_path / "file.bin")
    assert seen == [("file.bin.md5", False), ("file.bin", True)]


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
    (tmp_path / ".a.txt.1.part").write_text("half")
    (tmp_path / ".b.txt.1.part").write_text("of another file")
    with open(tmp_path / ".a.txt.2.part", "ab") as alive:
        assert lock(alive)
        write_text(tmp_path / "a.txt", "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.txt.2.part", ".b.txt.1.part", "a.txt"]


@pytest.mark.parametrize("content", ["{", "[1]", b"\xff", "", "NaN", "[" * 100_000])
def test_a_damaged_config_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="config.json is damaged"):
        check_config(path, {"a": 1}, "--name")


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


def test_floats_become_bytes_without_a_second_copy_of_all():
    """60,000 pictures of 64x64 as float32 are 3 GB: a copy in float64 would be more than many a machine has left."""
    images = np.linspace(0, 1, 4096 * 32 * 32, dtype=np.float32).reshape(4096, 32, 32)
    tracemalloc.start()
    found = data._to_uint8(images, "mine.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < images.nbytes
    assert (found[:, 0].numpy() == np.rint(images.astype(np.float64) * 255)).all()
