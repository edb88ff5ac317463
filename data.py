"""Data sets as uint8 tensors in memory; batches are index slices.

    data = load("digits")                     # embedded in assets/digits.npz, nothing to download
    data = load("cifar10", "data")            # also cifar100, tinyimagenet: downloaded once, checksums verified
    data = load("mine.npz")                   # MedMNIST's keys
    data = load("pictures/")                  # train/CLASS/*, test/CLASS/* (or val/CLASS/*)
    data = load("tiny-imagenet-200.zip")      # a zip in Tiny ImageNet's layout that you already have
    for indices in batches(len(data.train_labels), 128, seed=0, epoch=3):
        x = pixels(data.train_images[indices])          # (B, C, H, W) in [0, 1]

Every picture is square, 32 or 64 pixels wide (the purifier's two geometries); others are resized, and `note` says so.
"""

import hashlib
import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from lab.files import download, md5, write_npz

NORMALISATION = {  # mean and standard deviation of the training pixels (paper, section 5.1)
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}
NAMES = ("digits", *NORMALISATION)

TINYIMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINYIMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


@dataclass
class Dataset:
    name: str
    train_images: torch.Tensor  # (N, C, H, W) uint8
    train_labels: torch.Tensor  # (N,) int64
    test_images: torch.Tensor
    test_labels: torch.Tensor
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
    """Of pictures (N, C, H, W), their labels (N,) and the classes' names, as hexadecimal digits."""
    digest = hashlib.blake2b(repr((tuple(images.shape), list(classes))).encode(), digest_size=16)
    for tensor in (images, labels):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


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
    if path.suffix == ".npz" and path.is_file():
        return _npz(path)
    if path.suffix == ".zip" and path.is_file():
        return _tinyimagenet(path, data_dir)
    what = "there is no file" if path.suffix in (".npz", ".zip") or len(path.parts) > 1 else "there is no data set"
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
            part = reader(str(data_dir), train=split == "train", download=True)  # verifies every file's md5
        except (OSError, RuntimeError) as error:
            archive = reader.url.rsplit("/", 1)[-1]
            raise OSError(
                f"{name} could not be downloaded ({error}); put {archive} from {reader.url} into {data_dir}"
            ) from None
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = part.data, part.targets
    return _dataset(name, arrays, part.classes)


def _tinyimagenet(archive: Path, data_dir: Path) -> Dataset:
    """The official zip: train/WNID/images/*.JPEG, and val/images/* whose classes stand in val_annotations.txt. Its val
    split serves as test (the test split has no labels). Decoded once, then kept as arrays in data_dir."""
    cache = data_dir / f"tiny-imagenet-{md5(archive)[:12]}.npz"
    if not cache.is_file():
        try:
            with zipfile.ZipFile(archive) as file:
                arrays = _decode_tinyimagenet(file)
        except (zipfile.BadZipFile, KeyError, UnidentifiedImageError) as error:
            raise ValueError(f"{archive} is not a zip in Tiny ImageNet's layout ({error})") from None
        write_npz(cache, **arrays)
    with np.load(cache) as file:
        arrays = dict(file)
    return _dataset("tinyimagenet", arrays, arrays["classes"].tolist())


def _decode_tinyimagenet(file: zipfile.ZipFile) -> dict[str, np.ndarray]:
    root = "tiny-imagenet-200"
    classes = sorted(file.read(f"{root}/wnids.txt").decode().split())  # the order of the published classifiers
    label = {wnid: k for k, wnid in enumerate(classes)}
    annotations = [line.split("\t") for line in file.read(f"{root}/val/val_annotations.txt").decode().splitlines()]
    listed = {
        "train": [
            (name, label[name.split("/")[2]])
            for name in sorted(file.namelist())
            if name.startswith(f"{root}/train/") and name.lower().endswith(".jpeg")
        ],
        "test": [(f"{root}/val/images/{fields[0]}", label[fields[1]]) for fields in annotations if len(fields) > 1],
    }
    arrays = {"classes": np.array(classes)}
    for split, pictures in listed.items():
        progress = tqdm(pictures, f"decoding {split}", disable=None)
        images = [np.asarray(Image.open(io.BytesIO(file.read(name))).convert("RGB")) for name, _ in progress]
        arrays[f"{split}_images"] = np.stack(images)
        arrays[f"{split}_labels"] = np.array([k for _, k in pictures])
    return arrays


def _npz(path: Path) -> Dataset:
    """MedMNIST's keys: {train,test}_images uint8 (N, H, W) or (N, H, W, C), {train,test}_labels (N,) or (N, 1). Where
    there is no test split, val serves."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an .npz of plain arrays ({error})") from None
    if "test_images" not in arrays:
        arrays |= {f"test_{kind}": arrays[f"val_{kind}"] for kind in ("images", "labels") if f"val_{kind}" in arrays}
    if missing := [k for s in ("train", "test") for k in (f"{s}_images", f"{s}_labels") if k not in arrays]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}")
    classes = max(int(np.max(arrays[f"{split}_labels"], initial=0)) for split in ("train", "test")) + 1
    return _dataset(str(path), arrays, [str(k) for k in range(classes)])


def _folder(path: Path) -> Dataset:
    """train/CLASS/* and test/CLASS/* (or val/CLASS/*), any format that Pillow reads. Sizes may differ: every picture is
    resized as the first training picture asks for; one colour picture makes the whole set colour."""
    splits = {"train": path / "train", "test": path / "test" if (path / "test").is_dir() else path / "val"}
    classes = sorted(f.name for f in splits["train"].iterdir() if f.is_dir()) if splits["train"].is_dir() else []
    if not classes or not splits["test"].is_dir():
        raise ValueError(f"{path} should hold train/CLASS/* and test/CLASS/* (or val/CLASS/*) with pictures")
    files = {
        split: [
            (file, k)
            for k, name in enumerate(classes)
            for file in sorted((folder / name).glob("*"))
            if file.suffix.lower() in PICTURE_SUFFIXES
        ]
        for split, folder in splits.items()
    }
    pictures, size = {}, None
    for split in splits:
        pictures[split] = []
        for file, _ in tqdm(files[split], f"reading {split}", disable=None):
            try:
                picture = Image.open(file)
                size = size or _side(picture.height, picture.width, path)
                picture = picture if picture.mode in ("1", "L") else picture.convert("RGB")
                if picture.size != (size, size):
                    picture = picture.convert("L" if picture.mode == "1" else picture.mode)
                    picture = picture.resize((size, size), Image.Resampling.BILINEAR)
            except (UnidentifiedImageError, OSError) as error:
                raise ValueError(f"{file} is not a picture that can be read ({error})") from None
            pictures[split].append(picture)
        if not pictures[split]:
            raise ValueError(f"{splits[split]} has no pictures in the folders {', '.join(classes[:5])}")
    mode = "RGB" if any(p.mode == "RGB" for part in pictures.values() for p in part) else "L"
    arrays = {
        f"{split}_images": np.stack([np.asarray(p.convert(mode)) for p in part]) for split, part in pictures.items()
    }
    arrays |= {f"{split}_labels": np.array([k for _, k in part]) for split, part in files.items()}
    dataset = _dataset(str(path), arrays, classes)
    dataset.note = f"every picture of {path} is used at {size}x{size}"
    return dataset


# --------------------------------------------------------------------------- from arrays to a checked data set


def _dataset(name: str, arrays: dict, classes: list[str]) -> Dataset:
    parts, note = {}, ""
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], torch.as_tensor(np.asarray(arrays[f"{split}_labels"]))
        if labels.ndim > 1:
            if labels[0].numel() != 1:
                raise ValueError(f"{name} has several labels a picture; CARSO needs exactly one class each")
            labels = labels.flatten()
        images = images if isinstance(images, torch.Tensor) else _to_uint8(images, f"{name}: {split}_images")
        if len(images) != len(labels) or len(labels) == 0:
            raise ValueError(f"{name} has {len(images)} {split} pictures and {len(labels)} labels")
        if labels.is_floating_point() or labels.min() < 0 or labels.max() >= len(classes):
            raise ValueError(f"{name}: {split} labels must be whole numbers from 0 to {len(classes) - 1}")
        height, width = images.shape[-2:]
        side = _side(height, width, name)
        if (height, width) != (side, side):
            note = f"the pictures of {name} are resized from {height}x{width} to {side}x{side}"
            images = torch.cat([_resize(part, side) for part in images.split(4096)])
        parts[split] = images.contiguous(), labels.long()
    (train_images, train_labels), (test_images, test_labels) = parts["train"], parts["test"]
    if train_images.shape[1:] != test_images.shape[1:]:
        raise ValueError(f"{name}: training and test pictures have different shapes")
    mean, std = NORMALISATION.get(name) or _mean_and_std(train_images)
    return Dataset(name, train_images, train_labels, test_images, test_labels, list(classes), mean, std, note)


def _to_uint8(images: np.ndarray, what: str) -> torch.Tensor:
    """(N, H, W) or (N, H, W, C) -> (N, C, H, W) uint8. Floats in [0, 1] are taken as pixels."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"{what} should have shape (N, H, W), (N, H, W, 1) or (N, H, W, 3), not {images.shape}")
    if images.dtype.kind == "f":
        if not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"{what} are floats outside [0, 1] ({images.min():.3g} to {images.max():.3g}); give raw pixels, "
                "not normalised ones"
            )
        images = np.rint(images * 255).astype(np.uint8)
    if images.dtype != np.uint8:
        raise ValueError(f"{what} should be uint8 pixels, not {images.dtype}")
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _side(height: int, width: int, name) -> int:
    """32 or 64, the nearer; refused where resizing would leave nothing of the picture."""
    if min(height, width) < 8 or max(height, width) > 2 * min(height, width):
        raise ValueError(f"{name} has pictures of {height}x{width}; they should be roughly square, 8 pixels or more")
    return 32 if max(height, width) <= 48 else 64


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
