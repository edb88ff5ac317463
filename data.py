"""Data sets as uint8 tensors in memory; batches are index slices.

    data = load("digits")                     # embedded in assets/digits.npz, nothing to download
    data = load("cifar10", "data")            # also cifar100, tinyimagenet: downloaded once, checksums verified
    data = load("mine.npz")                   # MedMNIST's keys
    data = load("pictures/")                  # train/CLASS/**, test/CLASS/** (or val/CLASS/**)
    data = load("tiny-imagenet-200.zip")      # Tiny ImageNet that you already have, as a zip or unpacked
    data = load("test.npz", classes=names)    # test pictures alone, for a checkpoint that knows these classes
    data = load("mine.npz", keep_size=True)   # for a model of your own, which takes pictures of another size
    for indices in batches(len(data.train_labels), 128, seed=0, epoch=3):
        x = pixels(data.train_images[indices])          # (B, C, H, W) in [0, 1]

Every picture is square, 32 or 64 pixels wide (the purifier's two geometries); others are resized, unless keep_size is
given. Each source gives numpy arrays under MedMNIST's keys, and all pass through make_dataset, which refuses what makes
no sense with a ValueError that names the file. Whatever was changed, left out or may surprise stands in `notes`.
At the end stand the functions that write files.
"""

import hashlib
import http.client
import json
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

from models import write_atomically

NORMALISATION = {  # mean and standard deviation of the training pixels (paper, section 5.1)
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}
NAMES = ("digits", *NORMALISATION)

TINYIMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINYIMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # pictures in a folder


@dataclass
class Dataset:
    name: str
    train_images: torch.Tensor  # (N, C, H, W) uint8
    train_labels: torch.Tensor  # (N,) int64
    test_images: torch.Tensor
    test_labels: torch.Tensor
    test_numbers: torch.Tensor  # (N,) int64: which picture of the source's test split each is
    classes: list[str]
    mean: tuple[float, ...]  #    of the training pixels in [0, 1], a number a channel
    std: tuple[float, ...]
    notes: list[str] = field(default_factory=list)  # a sentence for whatever was changed, left out, or may surprise


# --------------------------------------------------------------------------------------------------------- batches


def pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, C, H, W) -> float32 in [0, 1]."""
    return images.float() / 255


def batches(count: int, batch_size: int, seed: int, epoch: int) -> tuple[torch.Tensor, ...]:
    """One epoch of index tensors: a shuffle that depends on seed and epoch alone, cut into the fewest batches of at
    most batch_size, as equal as possible (so that no tiny batch is left over for BatchNorm). Each index appears once.

    A process among many takes its share of each: `indices.tensor_split(ranks)[rank]`."""
    generator = torch.Generator().manual_seed((1_000_003 * seed + epoch) % 2**63)
    return torch.randperm(count, generator=generator).tensor_split(math.ceil(count / batch_size))


def augment(x: torch.Tensor, draws: torch.Tensor, mirror: bool = True, padding: int = 4) -> torch.Tensor:
    """The usual augmentation: a random crop of the zero-padded picture, and, if asked, a mirror half of the time.

    x (B, C, H, W); draws (B, 3) uniform in [0, 1): vertical shift, horizontal shift, mirror."""
    size = x.shape[-1]
    shift = (draws[:, :2] * (2 * padding + 1)).long()
    steps = torch.arange(size, device=x.device)
    columns = torch.where(draws[:, 2:] < (0.5 if mirror else 1.0), steps, steps.flip(0))  # (B, W)
    rows = (shift[:, 0, None] + steps)[:, None, :, None]
    columns = (shift[:, 1, None] + columns)[:, None, None, :]
    picture = torch.arange(len(x), device=x.device)[:, None, None, None]
    channel = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return F.pad(x, [padding] * 4)[picture, channel, rows, columns]


def fingerprint(images: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> str:
    """A hash of pictures, their labels and the names of the classes: the same exactly where all of these are.

    images (N, C, H, W) uint8, labels (N,) int64 -> blake2b of 16 bytes, in hexadecimal."""
    sizes = json.dumps([list(images.shape), list(labels.shape), list(classes)])
    found = hashlib.blake2b(sizes.encode(), digest_size=16)
    for tensor in (images, labels):
        found.update(tensor.cpu().contiguous().numpy().data)
    return found.hexdigest()


# --------------------------------------------------------------------------------------------------------- loading


def load(name_or_path, data_dir="data", classes: list[str] | None = None, keep_size: bool = False) -> Dataset:
    """A data set by name (see NAMES) or by path; downloads and caches go to data_dir. In both, `~` is the home folder.

    classes: the classes that a checkpoint was trained on. An .npz of test pictures alone needs them; train_images are
    then empty, (0, C, H, W), and mean and std those of the test pictures. Other sources bring their own classes.
    keep_size: pictures of any size are taken as they are, if all are alike.

    Raises ValueError with one sentence that says what is wrong with a name, a file or its contents, and OSError
    likewise when a file cannot be downloaded or written."""
    name, notes = str(name_or_path), []
    path, data_dir = (Path(os.path.abspath(os.path.expanduser(given))) for given in (name, data_dir))
    if name in NAMES and path.exists():
        notes.append(f"{name} is the known data set, not {path}: for that one, give ./{name}")
    if name == "digits":
        return make_dataset(name, read_digits(), [str(digit) for digit in range(10)], notes)
    if name in ("cifar10", "cifar100"):
        return make_dataset(name, *read_cifar(name, data_dir), notes)
    if name == "tinyimagenet":
        return make_dataset(name, read_tinyimagenet(fetch_tinyimagenet(data_dir), data_dir), None, notes)
    if path.is_dir():
        arrays = read_folder(path, notes, keep_size)
        return make_dataset("tinyimagenet" if list_annotated(path) else name, arrays, None, notes, keep_size)
    if path.is_file() and path.suffix.lower() == ".npz":
        arrays = read_npz(path, notes)
        return make_dataset(name, arrays, None if "train_images" in arrays else classes, notes, keep_size)
    if path.is_file() and path.suffix.lower() == ".zip":
        return make_dataset("tinyimagenet", read_tinyimagenet(path, data_dir), None, notes)
    raise ValueError(f"{name} is none of {', '.join(NAMES)}, nor the path of an .npz, a folder or a Tiny ImageNet zip")


def read_npz(path: Path, notes: list[str]) -> dict[str, np.ndarray]:
    """{train,test}_images and {train,test}_labels. Where there is no test split, val serves; there may be no training
    split. Whatever else is in the file is only named in `notes`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            second = "test" if "test_images" in file.files else "val"
            there = {"test_images": f"{second}_images", "test_labels": f"{second}_labels"}
            if "train_images" in file.files or "train_labels" in file.files:
                there |= {"train_images": "train_images", "train_labels": "train_labels"}
            notes += [f"{key} of {path} is not used" for key in file.files if key not in there.values()]
            return {key: file[there[key]] for key in there}
    except Exception as error:  # numpy raises anything, on a web page under this name, a broken zip, objects
        raise ValueError(f"{path} is not a whole .npz of plain arrays with MedMNIST's keys ({error})") from None


def read_digits() -> dict[str, np.ndarray]:
    """UCI optical digits, 8x8 (see assets/README.md for source and licence), each pixel shown as a block
    of 4x4 so that the same architecture serves."""
    arrays = read_npz(Path(__file__).parent / "assets" / "digits.npz", [])
    for key in ("train_images", "test_images"):
        small = np.rint(arrays[key] * (255 / 16)).astype(np.uint8)  # values 0 .. 16
        arrays[key] = small.repeat(4, axis=1).repeat(4, axis=2)
    return arrays


def download(url: str, archive: Path, fetch) -> None:
    """fetch(private folder) leaves whole files there, which then move to the folder of `archive` one by one: a file
    that exists is whole, whoever was killed, and several processes at once only replace each file by its equal."""
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=archive.parent) as private:
            fetch(Path(private))
            for file in sorted(Path(private).rglob("*")):
                target = archive.parent / file.relative_to(private)
                if file.is_dir():
                    target.mkdir(exist_ok=True)
                else:
                    os.replace(file, target)
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: torchvision's for a wrong md5
        raise OSError(f"{url} could not be downloaded ({error}); put the file at {archive} by hand") from None


def read_cifar(name: str, data_dir: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """torchvision's download and reader, which unpickles no file before its md5 is verified -> arrays, classes."""
    from torchvision.datasets import CIFAR10, CIFAR100  # not at the top: it would double the time of every start

    reader = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    archive = data_dir / reader.filename

    def fetch(folder):
        if archive.is_file():  # put there by hand
            shutil.copy(archive, folder)
        reader(folder, download=True)

    try:
        train = reader(data_dir, train=True)
    except RuntimeError:  # the files are not all there, or not whole
        download(reader.url, archive, fetch)
        train = reader(data_dir, train=True)
    test = reader(data_dir, train=False)
    arrays = {"train_images": train.data, "train_labels": train.targets}
    return arrays | {"test_images": test.data, "test_labels": test.targets}, train.classes


# --------------------------------------------------------------------------------------------------- Tiny ImageNet


def compute_md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def fetch_tinyimagenet(data_dir: Path) -> Path:
    """Path of the official zip in data_dir, verified."""
    archive = data_dir / "tiny-imagenet-200.zip"
    if not archive.is_file():
        fetch = torch.hub.download_url_to_file
        download(TINYIMAGENET_URL, archive, lambda folder: fetch(TINYIMAGENET_URL, str(folder / archive.name)))
    if compute_md5(archive) != TINYIMAGENET_MD5:  # or it broke off: torch.hub does not notice
        raise ValueError(f"{archive} is not the official file, or not whole (its md5 differs): delete it and run again")
    return archive


def read_tinyimagenet(archive: Path, data_dir: Path) -> dict[str, np.ndarray]:
    """The zip's pictures, decoded once, then kept as arrays in data_dir. Labels are the WNIDs; their alphabetical order
    is that of the published classifiers' classes."""
    cache = data_dir / f"tiny-imagenet-200-{compute_md5(archive)[:12]}.npz"
    if not cache.is_file():
        print(f"decoding the pictures of {archive}; this takes a minute or two, once", flush=True)
        data_dir.mkdir(parents=True, exist_ok=True)
        try:
            with zipfile.ZipFile(archive) as file, tempfile.TemporaryDirectory(prefix=".tmp-", dir=data_dir) as folder:
                file.extractall(folder)
                arrays = read_folder(Path(folder) / "tiny-imagenet-200", [])
        except Exception as error:  # zipfile raises anything on a broken or encrypted file
            raise ValueError(f"{archive} is not a zip of Tiny ImageNet, or not whole ({error})") from None
        write_npz(cache, **arrays)
    return read_npz(cache, [])


def list_annotated(folder: Path) -> list[tuple[Path, str]]:
    """The validation pictures of Tiny ImageNet's official layout, each with its WNID; none where the folder is another
    one, or where somebody has sorted val/images into val/CLASS."""
    images, annotations = folder / "val" / "images", folder / "val" / "val_annotations.txt"
    if not annotations.is_file() or not any(images.glob("*")):
        return []
    lines = annotations.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [line.split("\t") for line in lines if "\t" in line]
    return [(images / row[0], row[1]) for row in rows]


# --------------------------------------------------------------------------------------------- folders of pictures


def convert_to_8_bits(picture: Image.Image, file_format: str) -> Image.Image:
    """Mode L or RGB; transparency is shown on white. A range is the file format's, never the picture's own, which would
    make all pictures equally bright."""
    if picture.mode == "I;16" and file_format == "PNG" and not picture.has_transparency_data:
        return Image.fromarray(np.rint(np.asarray(picture) * (255 / 65535)).astype(np.uint8))
    if picture.mode[0] in "IF":  # a TIFF of 16 bits, too: perhaps only 12 of them are used
        raise ValueError(f"{file_format} with numbers of no known range; save it with 8 bits, or as a PNG with 16")
    mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert(mode)


def read_picture(file: Path) -> Image.Image:
    """The picture as it is meant to be seen, in mode L or RGB: upright, the first of several frames.

    Raises ValueError, with the file's name, for what cannot be read or whose values have no known range."""
    try:
        with Image.open(file) as found:
            return convert_to_8_bits(ImageOps.exif_transpose(found), found.format)
    except Exception as error:  # Pillow raises anything, from SyntaxError to struct.error, on a broken file
        raise ValueError(f"{file} cannot be read as a picture ({error}): mend or remove it") from None


def list_files(folder: Path, around: list[Path]) -> list[Path]:
    """Every file in folder and its subfolders, in order. Links are followed, but not back to a folder around them: such
    a link is listed itself."""
    place = folder.resolve()
    if any(outer.is_relative_to(place) for outer in around):
        return [folder]
    files = []
    for entry in sorted(folder.iterdir()):
        files += list_files(entry, [*around, place]) if entry.is_dir() else [entry]
    return files


def list_pictures(split: Path, unused: dict[str, list[Path]]) -> list[tuple[Path, str]]:
    """Every picture in CLASS/ and its subfolders, with CLASS, in order. All else goes to `unused`, under the reason."""
    pictures = []
    for file in list_files(split, [split.parent.resolve()]) if split.is_dir() else []:
        parts = file.relative_to(split).parts
        if any(part.startswith((".", "@")) for part in parts):  # .ipynb_checkpoints, ._1.png, @eaDir
            unused["hidden"].append(file)
        elif file.suffix.lower() not in SUFFIXES:
            unused["no picture"].append(file)
        elif len(parts) == 1:
            unused["in no class folder"].append(file)
        else:
            pictures.append((file, parts[0]))
    return pictures


def read_pictures(files: list[Path], notes: list[str], keep_size: bool) -> np.ndarray:
    """(N, H, W), or (N, H, W, 3) if one of them is in colour; all are resized as the first one asks for. Raises
    ValueError where sizes are to be kept, but differ."""
    pictures = []
    for file in files:
        picture = read_picture(file)
        chosen = choose_size(picture.size, file, keep_size)
        size = pictures[0].size if pictures else chosen
        if keep_size and picture.size != size:
            raise ValueError(f"{file} has another size than {files[0]}: make all pictures alike")
        pictures.append(picture.resize(size, Image.Resampling.BILINEAR))
    notes.append(f"every picture is used at {size[0]}x{size[1]}")
    mode = "RGB" if any(picture.mode == "RGB" for picture in pictures) else "L"
    return np.stack([np.asarray(picture.convert(mode)) for picture in pictures])


def read_folder(folder: Path, notes: list[str], keep_size: bool = False) -> dict[str, np.ndarray]:
    """train/CLASS/** and test/CLASS/** (or val/CLASS/**), with pictures of every class in both -> arrays. Whatever else
    is in these folders is counted in `notes`, with the reason."""
    unused = defaultdict(list)
    train, test, val = (list_pictures(folder / split, unused) for split in ("train", "test", "val"))
    others = {file for file, _ in test + val}
    classes = {label for _, label in train}
    if not classes & {label for _, label in test}:  # none, or Tiny ImageNet's, which have no labels
        test = list_annotated(folder) or val or test
    if not train or not test:
        raise ValueError(f"{folder} should hold train/CLASS/* and test/CLASS/* (or val), *{', *'.join(SUFFIXES)}")
    if alone := classes ^ {label for _, label in test}:
        raise ValueError(f"{folder} has pictures of {list_some(sorted(alone))} in only one of the two splits: add some")

    unused["the test pictures are others"] += sorted(others - {file for file, _ in test})
    folders = [path for path in sorted((folder / "train").glob("[!.@]*")) if path.is_dir()]
    unused["a class without pictures"] += [path for path in folders if path.name not in classes]
    for reason, files in unused.items():
        if files:
            names = list_some([file.relative_to(folder) for file in files])
            notes.append(f"not used, {reason}: {len(files)} ({names})")

    images = read_pictures([file for file, _ in train + test], notes, keep_size)
    labels, n = np.array([label for _, label in train + test]), len(train)
    arrays = {"train_images": images[:n], "train_labels": labels[:n]}
    return arrays | {"test_images": images[n:], "test_labels": labels[n:]}


# ------------------------------------------------------------------------------------- arrays of any source, checked


def list_some(names: list) -> str:
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def choose_size(size: tuple[int, int], what, keep_size: bool) -> tuple[int, int]:
    """32x32 or 64x64, whichever is nearer, or the size itself. Raises ValueError where resizing would leave nothing."""
    if keep_size:
        return size
    if min(size) < 8 or max(size) > 2 * min(size):
        raise ValueError(f"{what}: {size[0]}x{size[1]} pixels; pictures should be roughly square and 8 pixels or more")
    return (32, 32) if max(size) <= 48 else (64, 64)


def convert_images(images, what: str, notes: list[str], keep_size: bool) -> torch.Tensor:
    """(N, H, W) or (N, H, W, C), uint8 or floats in [0, 1] -> (N, C, H, W) uint8 in the size that is used."""
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.size == 0:
        raise ValueError(f"{what} should have shape (N, H, W), (N, H, W, 1) or (N, H, W, 3), not {images.shape}")
    if images.dtype.kind == "f":
        low, high = images.min(), images.max()
        if not (low >= 0 and high <= 1):  # nor is NaN
            raise ValueError(f"{what} are floats outside [0, 1], {low:.3g} to {high:.3g}: give raw pixels")
        images = np.rint(images * 255.0).astype(np.uint8)
    if images.dtype != np.uint8:
        raise ValueError(f"{what} should be uint8 pixels, or floats in [0, 1], not {images.dtype}")
    if images.max() < 128:  # the radius of an attack is meant for pictures between 0 and 255
        notes.append(f"{what}: no pixel is above {images.max()} of 255; if that is meant as white, scale the pictures")
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    height, width = images.shape[2:]
    size = choose_size((height, width), what, keep_size)
    if (height, width) == size:
        return images
    notes.append(f"{what} are resized from {height}x{width} to {size[0]}x{size[1]}")
    resize = partial(F.interpolate, size=size, mode="bilinear", antialias=True)
    return torch.cat([resize(part.float()).round().clamp(0, 255).to(torch.uint8) for part in images.split(4096)])


def convert_labels(labels, what: str) -> np.ndarray:
    """(N,) or (N, 1), whole numbers from 0 on, or names -> (N,)."""
    labels = np.asarray(labels)
    if labels.shape[1:] == (1,):
        labels = labels[:, 0]
    whole = labels.dtype.kind in "iu" and labels.min(initial=0) >= 0
    if labels.ndim != 1 or not (whole or labels.dtype.kind == "U"):
        found = f"{labels.dtype} {labels.shape}"
        raise ValueError(f"{what} should be one class a picture, whole numbers from 0 on or names, not {found}")
    return labels


def number_labels(labels: np.ndarray, classes: list[str], what: str) -> torch.Tensor:
    """Each label's index in classes, (N,) int64. A label is a class's name; a whole number is its index, unless the
    names are numbers themselves (of classes 1, 2, 3 the label 1 is the first)."""
    if labels.dtype.kind == "U" or all(name.isdecimal() for name in classes):
        labels, numbers = labels.astype(str), {name: k for k, name in enumerate(classes)}
    else:
        numbers = {k: k for k in range(len(classes))}
    values, places = np.unique(labels, return_inverse=True)
    if unknown := [value for value in values.tolist() if value not in numbers]:
        raise ValueError(f"{what} have classes that were not trained on, {list_some(unknown)}: remove them")
    return torch.tensor([numbers[value] for value in values.tolist()], dtype=torch.int64)[places]


def measure_channels(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of all pixels in [0, 1], a number a channel, from histograms of the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = [torch.bincount(images[:, c].flatten(), minlength=256).double() for c in range(images.shape[1])]
    means = [float((n * values).sum() / n.sum()) for n in shares]
    stds = [float((n * (values - m).square()).sum() / n.sum()) ** 0.5 for n, m in zip(shares, means)]
    return tuple(round(m, 4) for m in means), tuple(round(s, 4) for s in stds)


def make_dataset(name: str, arrays: dict, classes: list[str] | None, notes: list[str], keep_size=False) -> Dataset:
    """Check what a source holds, and bring it into one form.

    arrays: {train,test}_images and {train,test}_labels, as convert_images and convert_labels take them. If classes are
    given, the training split may be missing; if not, the training labels are the classes' names."""
    images, labels = {}, {}
    for split in ("train", "test"):
        if f"{split}_images" in arrays:
            images[split] = convert_images(arrays[f"{split}_images"], f"{name}: {split}_images", notes, keep_size)
            labels[split] = convert_labels(arrays[f"{split}_labels"], f"{name}: {split}_labels")
            if len(images[split]) != len(labels[split]):
                raise ValueError(f"{name} has {len(images[split])} {split} pictures but {len(labels[split])} labels")
    if classes is None:
        if "train" not in labels:
            raise ValueError(f"{name} has no training pictures: it serves only to evaluate a trained checkpoint")
        classes = np.unique(labels["train"]).astype(str).tolist()
        labels = {split: found.astype(str) for split, found in labels.items()}
    if len(classes) < 2:
        raise ValueError(f"{name} has training pictures of one class only; a classifier needs two or more")
    labels = {split: number_labels(found, classes, f"{name}: {split}_labels") for split, found in labels.items()}
    test_images, test_labels = images["test"], labels["test"]
    train_images, train_labels = images.get("train", test_images[:0]), labels.get("train", test_labels[:0])
    if train_images.shape[1:] != test_images.shape[1:]:
        raise ValueError(f"{name}: training and test pictures differ in size or number of channels; make them alike")

    known = {hash(picture.tobytes()) for picture in train_images.numpy()}
    if shared := sum(hash(picture.tobytes()) in known for picture in test_images.numpy()):
        notes.append(f"test pictures that are exactly among the training pictures: {shared} of {len(test_images)}")
    by_number = sorted(classes, key=lambda name: re.sub("[0-9]+", lambda digits: digits[0].zfill(20), name))
    if sorted(classes) == list(classes) != by_number:
        notes.append(f"the classes are in the order of text, not of numbers: {', '.join(classes)}")
    if untested := sorted(set(range(len(classes))) - set(test_labels.tolist())):
        notes.append(f"there are no test pictures of {list_some([classes[k] for k in untested])}")
    numbers = torch.arange(len(test_labels))
    if int((test_labels[1:] != test_labels[:-1]).sum()) == len(test_labels.unique()) - 1:
        notes.append("the test pictures, which come in the order of their classes, are shuffled")
        numbers = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    mean, std = NORMALISATION.get(name) or measure_channels(train_images if len(train_images) else test_images)
    if flat := [channel for channel, deviation in enumerate(std) if deviation < 0.01]:
        notes.append(f"(nearly) constant, and so not scaled: channel {list_some(flat)}")
        std = tuple(1.0 if channel in flat else deviation for channel, deviation in enumerate(std))
    tensors = train_images, train_labels, test_images[numbers], test_labels[numbers], numbers
    return Dataset(name, *tensors, list(classes), mean, std, notes)


def check_fit(data: Dataset, shape, classes: list[str], checkpoint) -> None:
    """Raise ValueError unless the data are what the checkpoint takes: pictures (C, H, W) of this shape and classes."""
    expected, given = tuple(shape), tuple(data.test_images.shape[1:])
    if expected != given or data.classes != classes:
        raise ValueError(f"{checkpoint} takes pictures {expected} of the classes {list_some(classes)}; {data.name} has "
                         f"pictures {given} of {list_some(data.classes)}")  # fmt: skip


# --------------------------------------------------------------------------------------------------------- writing


def write_text(path, text: str) -> None:
    """In UTF-8, whatever the machine's own; what a path may hold and UTF-8 may not is spelled out."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode("utf-8", "backslashreplace")))


def write_npz(path, **arrays) -> None:
    def write(temporary):
        with open(temporary, "wb") as file:  # given a name, savez would add a suffix to it
            np.savez(file, **arrays)

    write_atomically(path, write)


def load_npz(path) -> dict[str, np.ndarray]:
    """The arrays that write_npz left. Raises ValueError, with the file's name, where they are not whole."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # numpy raises anything
        raise ValueError(f"{path} is damaged ({error}): delete it, and give the command again") from None


def check_config(path, config: dict, option: str) -> None:
    """A folder holds one configuration, plain values: compare it with the one at path, or write it where there is none.

    Raises ValueError with the fields that differ, and the option that chooses another folder."""
    path, config = Path(path), json.loads(json.dumps(config))
    if not path.is_file():
        write_text(path, json.dumps(config, indent=1))
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        there = None
    if not isinstance(there, dict):
        raise ValueError(f"{path} is damaged: choose another {option}")
    if different := [key for key in there | config if there.get(key) != config.get(key)]:
        text = "; ".join(f"{key}: {there.get(key)} there, {config.get(key)} now" for key in different)
        raise ValueError(f"{path.parent} holds other settings ({text}): choose another {option}")


def save_pictures(path, tiles: torch.Tensor, headings=(), captions=()) -> None:
    """Pictures (rows, columns, C, H, W) in [0, 1] as one PNG of twice the size, white lines between them. If there are
    any, a heading stands above each column and a caption (rows, columns) below each picture. (By hand, because
    torchvision would double the time of every start.)"""
    lined = F.pad(tiles.cpu(), (2, 0, 2, 6 if captions else 0), value=1.0)
    grid = lined.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # (C, rows height, columns width)
    grid = F.pad(grid, (0, 2, 0, 2), value=1.0).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    picture = Image.fromarray((255 * grid).round().byte().permute(1, 2, 0).squeeze(2).numpy())
    above = 14 if headings else 0
    picture = ImageOps.expand(picture, (0, above, 0, 0), "white")

    draw = ImageDraw.Draw(picture)
    height, width = 2 * lined.shape[-2], 2 * lined.shape[-1]
    texts = [(heading, column, 1) for column, heading in enumerate(headings)]
    for row, line in enumerate(captions):
        texts += [(caption, column, above + height * (row + 1) - 12) for column, caption in enumerate(line)]
    for text, column, top in texts:
        size = 10 if draw.textlength(text) <= width - 4 else 8
        while draw.textlength(text, font_size=size) > width - 4:
            text = text[:-1]
        draw.text((width * column + 4, top), text, "black", font_size=size)
    write_atomically(path, lambda temporary: picture.save(temporary, format="png"))
