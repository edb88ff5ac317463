"""Data sets as uint8 tensors in memory; batches are index slices.

    data = load("digits")                     # embedded in assets/digits.npz, nothing to download
    data = load("cifar10", "data")            # also cifar100, tinyimagenet: downloaded once, checksums verified
    data = load("mine.npz")                   # MedMNIST's keys
    data = load("pictures/")                  # train/CLASS/**, test/CLASS/** (or val/CLASS/**)
    data = load("tiny-imagenet-200.zip")      # Tiny ImageNet that you already have, as a zip or unpacked
    for indices in batches(len(data.train_labels), 128, seed=0, epoch=3):
        x = pixels(data.train_images[indices])          # (B, C, H, W) in [0, 1]

Every picture is square, 32 or 64 pixels wide (the purifier's two geometries); others are resized, and `note` says so.
What makes no sense is refused with a ValueError that names the file: here, and in lab/pictures.py for picture files.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lab.files import download, lock, md5, write_npz
from lab.pictures import is_tinyimagenet, read_folder, read_tinyimagenet, side

NORMALISATION = {  # mean and standard deviation of the training pixels (paper, section 5.1)
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}
NAMES = ("digits", *NORMALISATION)

TINYIMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINYIMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


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
    note: str = ""  #             one line for the log when the pictures are not as they were found


# --------------------------------------------------------------------------------------------------------- batches


def pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, C, H, W) -> float32 in [0, 1]."""
    return images.float() / 255


def batches(count: int, batch_size: int, seed: int, epoch: int) -> tuple[torch.Tensor, ...]:
    """One epoch of index tensors: a shuffle that depends on seed and epoch alone, cut into the fewest batches of at
    most batch_size, as equal as possible (so that no tiny batch is left over for BatchNorm). Each index appears once.

    A process among many takes its share of each: `indices.tensor_split(ranks)[rank]`."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
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


def load(name_or_path, data_dir="data") -> Dataset:
    """A data set by name (see NAMES) or by path; downloads and caches go to data_dir.

    Raises ValueError with one sentence that says what is wrong with a name, a file or its contents, and OSError
    likewise when a download fails."""
    name, data_dir = str(name_or_path), Path(data_dir)
    path = Path(name)
    if name == "digits":
        return _digits()
    if name in ("cifar10", "cifar100"):
        return _cifar(name, data_dir)
    if name == "tinyimagenet":
        archive = data_dir / "tiny-imagenet-200.zip"
        download(TINYIMAGENET_URL, archive, TINYIMAGENET_MD5)
        return _tinyimagenet(archive, data_dir)
    if path.is_dir():
        return _folder(path)
    suffix = path.suffix.lower()
    if suffix == ".npz" and path.is_file():
        return _npz(path)
    if suffix == ".zip" and path.is_file():
        return _tinyimagenet(path, data_dir)
    a_path = suffix in (".npz", ".zip") or len(path.parts) > 1
    what = "no data is read from" if path.exists() else f"there is no {'file' if a_path else 'data set'}"
    raise ValueError(
        f"{what} {name}; known are {', '.join(NAMES)}, or the path of an .npz, a folder, a Tiny ImageNet zip"
    )


def _digits() -> Dataset:
    """UCI optical digits, 8x8 (see assets/README.md for source and licence), each pixel shown as a block
    of 4x4 so that the same architecture serves."""
    with np.load(Path(__file__).parent / "assets" / "digits.npz") as file:
        arrays = dict(file)
    for split in ("train", "test"):
        small = torch.from_numpy(arrays[f"{split}_images"])[:, None].float() * (255 / 16)  # values 0 .. 16
        large = F.interpolate(small, (32, 32), mode="nearest")
        arrays[f"{split}_images"] = large.round().to(torch.uint8)
    return _dataset("digits", arrays, [str(digit) for digit in range(10)])


def _cifar(name: str, data_dir: Path) -> Dataset:
    from torchvision.datasets import CIFAR10, CIFAR100

    reader, arrays = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name], {}
    for split in ("train", "test"):
        try:
            part = reader(str(data_dir), train=split == "train")  # verifies every file's md5
        except RuntimeError:  # they are not all there, or not whole
            archive = data_dir / reader.filename
            download(reader.url, archive, reader.tgz_md5)
            try:
                with open(f"{archive}.lock", "ab") as held:
                    lock(held, wait=True)  # of many processes one unpacks
                    part = reader(str(data_dir), train=split == "train", download=True)
            except RuntimeError as error:
                raise OSError(f"{archive} could not be unpacked ({error})") from None
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = part.data, part.targets
    return _dataset(name, arrays, part.classes)


def _tinyimagenet(archive: Path, data_dir: Path) -> Dataset:
    """The official zip, decoded once, then kept as arrays in data_dir."""
    cache = data_dir / f"tiny-imagenet-{md5(archive)[:12]}.npz"
    if not cache.is_file():
        write_npz(cache, **read_tinyimagenet(archive))
    arrays = _read_npz(cache, ["classes", *KEYS])
    return _dataset("tinyimagenet", arrays, arrays["classes"].tolist())


def _folder(path: Path) -> Dataset:
    for root in (path, path / "tiny-imagenet-200"):
        if is_tinyimagenet(root):
            arrays = read_tinyimagenet(root)
            return _dataset("tinyimagenet", arrays, arrays["classes"].tolist())
    name = str(path) if str(path) not in NAMES else f"./{path}"  # somebody's folder, and not what has that name here
    return _dataset(name, *read_folder(path))


KEYS = ("train_images", "train_labels", "test_images", "test_labels")


def _npz(path: Path) -> Dataset:
    """MedMNIST's keys: {train,test}_images uint8 (N, H, W) or (N, H, W, C), {train,test}_labels (N,) or (N, 1). Where
    there is no test split, val serves. Whatever else is in the file is not looked at."""
    return _dataset(str(path), _read_npz(path, KEYS))


def _read_npz(path: Path, keys) -> dict[str, np.ndarray]:
    """These arrays of an .npz, and no others, which may be of any kind. Nothing is ever unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            there = {key: key for key in file.files}
            if "test_images" not in there:
                there |= {key: key.replace("test", "val") for key in keys if key.replace("test", "val") in there}
            if missing := [key for key in keys if key not in there]:
                raise LookupError(f"it lacks {', '.join(missing)}; it holds {', '.join(file.files) or 'nothing'}")
            arrays = {key: file[there[key]] for key in keys}
            if strange := [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]:
                raise LookupError(f"{', '.join(strange)} is no array")
            return arrays
    except Exception as error:  # an .npy under this name, a broken zip, objects: numpy raises anything
        if isinstance(error, ValueError) and "pickle" in str(error):  # numpy's advice to run what is in it
            error = "it holds something else, or objects"
        raise ValueError(f"{path} is not an .npz of plain arrays with MedMNIST's keys, or not whole: {error}") from None


# --------------------------------------------------------------------------- from arrays to a checked data set


def _dataset(name: str, arrays: dict, classes: list[str] | None = None, notes=()) -> Dataset:
    """arrays: KEYS; images as uint8 tensors (N, C, H, W), or whatever _to_uint8 takes; labels are indices into classes,
    or, where there are none, whatever _number takes."""
    parts, notes = {}, list(notes)
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], _labels(arrays[f"{split}_labels"], f"{name}: {split}_labels")
        images = images if isinstance(images, torch.Tensor) else _to_uint8(images, f"{name}: {split}_images")
        if len(images) != len(labels) or len(labels) == 0:
            raise ValueError(f"{name} has {len(images)} {split} pictures and {len(labels)} labels")
        found = tuple(images.shape[-2:])
        size = side(*found, name)
        if found != (size, size):
            notes.append(f"the {split} pictures of {name} are resized from {found[0]}x{found[1]} to {size}x{size}")
            images = torch.cat([_resize(part, size) for part in images.split(4096)])
        parts[split] = [images.contiguous(), labels]
    if parts["train"][0].shape[1:] != parts["test"][0].shape[1:]:
        raise ValueError(f"{name}: training and test pictures have different shapes")
    if classes is None:
        classes = _number(name, parts, notes)
    if len(classes) < 2:
        raise ValueError(f"{name} has training pictures of one class only; a classifier needs two or more")
    (train_images, train_labels), (test_images, test_labels) = (
        (images, torch.from_numpy(labels)) for images, labels in parts.values()
    )
    if max(train_labels.max(), test_labels.max()) >= len(classes):
        raise ValueError(f"{name}: labels must be whole numbers from 0 to {len(classes) - 1}")
    numbers = torch.arange(len(test_labels))
    if name not in NAMES and _in_order_of_classes(test_labels):  # or the first n pictures would be of one class
        notes.append("the test pictures, which come in the order of their classes, are shuffled")
        numbers = torch.randperm(len(test_labels), generator=torch.Generator().manual_seed(0))
        test_images, test_labels = test_images[numbers], test_labels[numbers]
    mean, std = NORMALISATION.get(name) or _mean_and_std(train_images)
    tensors = train_images, train_labels, test_images, test_labels, numbers
    return Dataset(name, *tensors, list(classes), mean, std, "; ".join(notes))


def _labels(labels, what: str) -> np.ndarray:
    """(N,), or (N, 1) as MedMNIST has it, whole numbers or strings -> (N,)."""
    labels = np.asarray(labels)
    if labels.ndim > 1 and math.prod(labels.shape[1:]) > 1:
        raise ValueError(f"{what} has several labels a picture, {labels.shape}; CARSO needs exactly one class each")
    if labels.dtype.kind == "b":
        labels = labels.astype(np.int64)
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "replace")
    if labels.dtype.kind in "iu" and 0 <= labels.min(initial=0) and labels.max(initial=0) < 2**63:
        labels = labels.astype(np.int64)
    elif labels.dtype.kind != "U":
        raise ValueError(f"{what} must be whole numbers from 0 on, or names, one a picture (they are {labels.dtype})")
    return labels.ravel()


def _number(name: str, parts: dict, notes: list[str]) -> list[str]:
    """Classes are the labels that the training pictures have, in order: their names. In `parts` each label becomes its
    class's index."""
    (_, labels), (_, tested) = parts["train"], parts["test"]
    if labels.dtype.kind != tested.dtype.kind:
        raise ValueError(f"{name}: train_labels are {labels.dtype}, and test_labels {tested.dtype}")
    values, tested = np.unique(labels), np.unique(tested)
    if len(unknown := np.setdiff1d(tested, values)):
        raise ValueError(f"{name} has test pictures of classes without training pictures: {_some(unknown)}")
    if len(untested := np.setdiff1d(values, tested)):
        notes.append(f"there are no test pictures of {_some(untested)}")
    if labels.dtype.kind == "i" and values[-1] != len(values) - 1:
        notes.append(f"the labels of {name}, {_some(values)}, are taken as classes 0 to {len(values) - 1}")
    for part in parts.values():
        part[1] = np.searchsorted(values, part[1])
    return [str(value) for value in values.tolist()]


def _some(values: np.ndarray) -> str:
    return ", ".join(map(str, values[:5].tolist())) + (", ..." if len(values) > 5 else "")


def _in_order_of_classes(labels: torch.Tensor) -> bool:
    """Do the pictures of each class follow each other?"""
    return int((labels[1:] != labels[:-1]).sum()) == len(labels.unique()) - 1 and len(labels) > 1


def _to_uint8(images, what: str) -> torch.Tensor:
    """(N, H, W) or (N, H, W, C) -> (N, C, H, W) uint8. Floats in [0, 1] are taken as pixels."""
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"{what} should have shape (N, H, W), (N, H, W, 1) or (N, H, W, 3), not {images.shape}")
    if images.dtype.kind == "f" and images.size:
        if not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"{what} are floats outside [0, 1] ({images.min():.3g} to {images.max():.3g}); give raw pixels, "
                "not normalised ones"
            )
        parts = np.array_split(images, len(images) // 1024 + 1)  # or the whole set would stand there in float64
        images = np.concatenate([np.rint(part.astype(np.float64) * 255).astype(np.uint8) for part in parts])
    if images.dtype != np.uint8:
        raise ValueError(f"{what} should be uint8 pixels, not {images.dtype}")
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _resize(images: torch.Tensor, side: int) -> torch.Tensor:
    larger = F.interpolate(images.float(), (side, side), mode="bilinear", align_corners=False, antialias=True)
    return larger.round().clamp(0, 255).to(torch.uint8)


def _mean_and_std(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Over all pixels, from the histogram of the 256 values of each channel."""
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = [torch.bincount(images[:, c].flatten(), minlength=256).double() for c in range(images.shape[1])]
    means = [float((n * values).sum() / n.sum()) for n in shares]
    stds = [float((n * (values - m).square()).sum() / n.sum()) ** 0.5 for n, m in zip(shares, means)]
    return tuple(round(m, 4) for m in means), tuple(max(round(s, 4), 1e-3) for s in stds)
