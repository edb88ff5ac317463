"""Picture files and folders of them as uint8 arrays: whatever people bring is read right, or refused by its name.

    picture = read_picture("glyph.png", notes)          # (H, W) grey or (H, W, 3) colour, uint8
    arrays, classes, notes = read_folder("pictures")    # train/CLASS/**, test/CLASS/** (or val)
    arrays = read_tinyimagenet("tiny-imagenet-200.zip") # the official layout, or the folder it was unpacked to

Every function raises ValueError with one sentence that names the file. `notes`, a Counter of sentences, collects what
the log should say: pictures that are not shown as they were found, files that were left out.
"""

import io
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

SUFFIXES = set(
    ".jpg .jpeg .jpe .jfif .jp2 .png .bmp .dib .gif .tif .tiff .webp .avif .ppm .pgm .pbm .pnm .pfm .tga".split()
)
SEVERAL = "pictures have several frames: the first is used"
TRANSPARENT = "pictures are transparent: shown on white"
TURNED = "pictures are turned upright, as their EXIF says"

# ------------------------------------------------------------------------------------------------------ one picture


def read_picture(file, notes: Counter, name=None) -> np.ndarray:
    """The picture in a file (a path, or an open one of that name) as it is meant to be seen: (H, W) uint8 where it is
    grey, else (H, W, 3). Turned upright; 16 bits and floats in [0, 1] scaled to 8 bits; transparency shown on white.

    Raises ValueError, with its name, for what cannot be read or whose values have no known range."""
    name = name or file
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as picture:  # Pillow warns of odd metadata
            notes[SEVERAL] += getattr(picture, "is_animated", False)
            picture.load()
            upright = ImageOps.exif_transpose(picture)
            notes[TURNED] += picture.getexif().get(0x0112, 1) in range(2, 9)
            return _to_uint8(picture, upright, notes)
    except Exception as error:  # Pillow raises anything, from SyntaxError to struct.error, on a broken file
        raise ValueError(f"{name} is not a picture that can be read ({error})") from None


def _to_uint8(found: Image.Image, upright: Image.Image, notes: Counter) -> np.ndarray:
    """found: as it was opened, with what the file says of its values; upright: the same, turned."""
    mode = upright.mode
    if mode == "F" or mode.startswith("I"):
        return _scaled(np.asarray(upright), found)
    if mode in ("1", "L") and "transparency" not in found.info:
        return np.asarray(upright.convert("L"))
    picture = upright
    if "transparency" in found.info or mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        picture = upright.convert("RGBA")
        notes[TRANSPARENT] += picture.getchannel("A").getextrema()[0] < 255
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = np.asarray(picture.convert("RGB"))
    grey = mode in ("1", "L", "LA", "La", "P", "PA") and (picture == picture[..., :1]).all()
    return picture[..., 0] if grey else picture


def _scaled(values: np.ndarray, found: Image.Image) -> np.ndarray:
    """One channel of more than 8 bits: the range is the file format's, never the picture's own, which would make every
    picture equally bright."""
    tags = getattr(found, "tag_v2", {})  # TIFF's: 258 bits a sample, 262 photometric interpretation (0: inverted)
    if found.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"floats from {values.min():.3g} to {values.max():.3g}; only [0, 1] can be pixels")
        largest = 1.0
    elif found.mode == "I" and found.format not in ("PNG", "PPM"):  # there it means 16 bits
        raise ValueError("32-bit or signed numbers, of no known range: save it with 8 or 16 bits")
    else:
        largest = 2.0 ** tags.get(258, (16,))[0] - 1
    values = np.rint(values.astype(np.float64) * (255 / largest)).astype(np.uint8)
    return 255 - values if tags.get(262) == 0 else values


# ------------------------------------------------------------------------------------------------------------ sizes


def side(height: int, width: int, name) -> int:
    """32 or 64, the nearer; ValueError where resizing would leave nothing of the picture."""
    if min(height, width) < 8 or max(height, width) > 2 * min(height, width):
        raise ValueError(f"{name} has pictures of {height}x{width}; they should be roughly square, 8 pixels or more")
    return 32 if max(height, width) <= 48 else 64


def _resized(picture: np.ndarray, size: int, name) -> np.ndarray:
    side(*picture.shape[:2], name)
    if picture.shape[:2] == (size, size):
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))


def _stacked(pictures: list[np.ndarray], colour: bool) -> np.ndarray:
    """(N, H, W) grey, or (N, H, W, 3) if one of them, or of the other split's, is in colour."""
    if colour:
        pictures = [p if p.ndim == 3 else np.repeat(p[..., None], 3, axis=2) for p in pictures]
    return np.stack(pictures)


# ---------------------------------------------------------------------------------------------------------- folders


def hidden(path: Path) -> bool:
    """What a file manager or a notebook leaves behind."""
    return path.name.startswith(".") or path.name in ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")


def files_below(folder: Path, above=()) -> list[Path]:
    """All files in a folder and its subfolders, links followed, in order; hidden ones are not seen."""
    above = (*above, folder.resolve())
    found = []
    for path in sorted(folder.iterdir()):
        if hidden(path):
            continue
        if path.is_dir():
            if path.resolve() in above:
                raise ValueError(f"{path} is a link to a folder that it is in")
            found += files_below(path, above)
        else:
            found.append(path)
    return found


def read_folder(path: Path) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """train/CLASS/** and test/CLASS/** (or val/CLASS/**), any format in SUFFIXES -> train_images (N, H, W[, 3]) uint8,
    train_labels (N,), test_images, test_labels; the classes; sentences for the log.

    Sizes may differ: every picture is resized as the first training picture asks for; one colour picture makes the
    whole set colour. Both splits must hold pictures of every class."""
    classes = {}
    for split in ("train", "test", "val"):
        folders = (path / split).iterdir() if (path / split).is_dir() else []
        classes[split] = sorted(f.name for f in folders if f.is_dir() and not hidden(f))
    second = "test" if set(classes["test"]) & set(classes["train"]) or not classes["val"] else "val"
    if not classes["train"] or not classes[second]:
        raise ValueError(f"{path} should hold train/CLASS/* and test/CLASS/* (or val/CLASS/*) with pictures")
    if alone := set(classes["train"]) ^ set(classes[second]):
        raise ValueError(f"{path} has classes in only one of train and {second}: {_some(sorted(alone))}")

    notes, arrays, size, left_out = Counter(), {}, None, []
    for split, folder in (("train", path / "train"), ("test", path / second)):
        files, labels = [], []
        for k, name in enumerate(classes["train"]):
            found = files_below(folder / name)
            mine = [file for file in found if file.suffix.lower() in SUFFIXES]
            left_out += [file for file in found if file.suffix.lower() not in SUFFIXES]
            if not mine:
                there = f"; it holds {_some([file.name for file in found])}" if found else ""
                raise ValueError(f"{folder / name} has no pictures{there}: add some, or remove the class everywhere")
            files, labels = files + mine, labels + [k] * len(mine)
        pictures = []
        for file in tqdm(files, f"reading {split}", disable=None):
            if file.exists() and not file.is_file():  # a pipe, say, which would never end
                raise ValueError(f"{file} is not a file")
            picture = read_picture(file, notes)
            size = size or side(*picture.shape[:2], file)
            pictures.append(_resized(picture, size, file))
        arrays |= {f"{split}_images": pictures, f"{split}_labels": np.array(labels)}
    colour = any(picture.ndim == 3 for split in ("train", "test") for picture in arrays[f"{split}_images"])
    arrays |= {key: _stacked(arrays[key], colour) for key in ("train_images", "test_images")}
    notes[f"files are left out, which are no pictures ({_some([file.name for file in left_out])})"] = len(left_out)
    said = [f"{count} {sentence}" for sentence, count in notes.items() if count]
    return arrays, classes["train"], [f"every picture of {path} is used at {size}x{size}", *said]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---------------------------------------------------------------------------------------------------- Tiny ImageNet


def is_tinyimagenet(folder: Path) -> bool:
    return all((folder / mark).is_file() for mark in ("wnids.txt", "val/val_annotations.txt"))


def read_tinyimagenet(path: Path) -> dict[str, np.ndarray]:
    """The official layout, as a zip or as a folder: train/WNID/images/*.JPEG, and val/images/* whose classes stand in
    val/val_annotations.txt. Its val split serves as test (the test split has no labels).

    Returns classes (K,), train_images (N, 64, 64, 3) uint8, train_labels (N,), test_images, test_labels."""
    try:
        if path.is_dir():
            names = [file.relative_to(path).as_posix() for file in path.glob("train/*/images/*")]
            return _decode_tinyimagenet(names, lambda name: (path / name).read_bytes())
        with zipfile.ZipFile(path) as file:
            root = "tiny-imagenet-200/"
            names = [name.removeprefix(root) for name in file.namelist() if name.startswith(root)]
            return _decode_tinyimagenet(names, lambda name: file.read(root + name))
    except Exception as error:  # zipfile raises anything on a broken or encrypted one
        raise ValueError(f"{path} is not in Tiny ImageNet's layout, or not whole ({error})") from None


def _decode_tinyimagenet(names: list[str], read) -> dict[str, np.ndarray]:
    """names: of all training pictures; read(name): a file's bytes."""
    classes = sorted(read("wnids.txt").decode().split())  # the order of the published classifiers
    label = {wnid: k for k, wnid in enumerate(classes)}
    annotations = [line.split("\t") for line in read("val/val_annotations.txt").decode().splitlines()]
    listed = {
        "train": [
            (name, label[name.split("/")[1]])
            for name in sorted(names)
            if name.startswith("train/") and Path(name).suffix.lower() == ".jpeg" and not hidden(Path(name))
        ],
        "test": [(f"val/images/{fields[0]}", label[fields[1]]) for fields in annotations if len(fields) > 1],
    }
    arrays = {"classes": np.array(classes)}
    for split, pictures in listed.items():
        images = [
            _resized(read_picture(io.BytesIO(read(name)), Counter(), name), 64, name)
            for name, _ in tqdm(pictures, f"decoding {split}", disable=None)
        ]
        if not images:
            raise ValueError(f"no pictures of the {split} split")
        arrays[f"{split}_images"] = _stacked(images, colour=True)
        arrays[f"{split}_labels"] = np.array([k for _, k in pictures])
    return arrays
