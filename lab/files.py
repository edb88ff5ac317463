"""Files that are whole or not there: writing under a temporary name, downloads that go on, a folder's configuration."""

import hashlib
import json
import os
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------- writing


def write_atomically(path, write) -> None:
    """write(temporary path), then rename: a file that exists is whole, and a failure leaves the previous one alone."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch's own for a full disk
        raise OSError(
            f"{path} could not be written ({error}); is the disk full? What was there before is whole"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text))


def write_npz(path, **arrays) -> None:
    def write(temporary):
        with open(temporary, "wb") as file:  # given a name, savez would add a suffix to it
            np.savez(file, **arrays)

    write_atomically(path, write)


def save_grid(path, tiles: torch.Tensor) -> None:
    """Pictures (rows, columns, C, H, W) in [0, 1] as one PNG of twice the size, white lines between them. (By hand:
    torchvision would double the time that every script takes to start.)"""
    lined = F.pad(tiles.cpu(), (2, 0, 2, 0), value=1.0)
    grid = lined.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # (C, rows height, columns width)
    grid = F.pad(grid, (0, 2, 0, 2), value=1.0).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    pixels = (255 * grid).round().byte().permute(1, 2, 0).squeeze(2).numpy()
    write_atomically(path, lambda temporary: Image.fromarray(pixels).save(temporary, format="png"))


# --------------------------------------------------------------------------------------------------- configurations


def check_config(path: Path, config: dict, option: str, write: bool = True) -> None:
    """A folder holds one configuration: compare it with the one at path; where there is none, write it if asked to.

    Raises ValueError with the fields that differ, and the option that chooses another folder. What is absent counts as
    what is off (None, False, 0): a folder of an earlier version does not know the options that came later."""
    if not path.is_file():
        if write:
            write_text(path, json.dumps(config, indent=1))
        return
    old = json.loads(path.read_text())
    fields = [k for k in config | old if (old.get(k) or None) != (config.get(k) or None)]
    if fields:
        differ = "; ".join(f"{k}: {old.get(k)} there, {config.get(k)} now" for k in fields)
        raise ValueError(f"{path.parent} holds other settings ({differ}); choose another {option}")


# -------------------------------------------------------------------------------------------------------- downloads


def md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def download(url: str, path: Path, checksum: str | None = None) -> None:
    """Fetch url to path unless it is there; go on where an earlier try stopped; verify the md5 before renaming.

    Raises OSError when the host cannot be reached, ValueError when the file is not the one expected."""
    path = Path(path)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        done = partial.stat().st_size if partial.is_file() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                done = done if response.status == 206 else 0  # 200: the host sends the whole file again
                total = done + int(response.headers.get("Content-Length", 0))
                progress = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=path.name, disable=None)
                with open(partial, "ab" if done else "wb") as file, progress:
                    while block := response.read(1 << 20):
                        file.write(block)
                        progress.update(len(block))
        except OSError as error:
            raise OSError(f"{url} could not be downloaded ({error}); put the file at {path} by hand") from None
        if partial.stat().st_size < total:
            raise OSError(f"the download of {url} broke off; run the same command again to go on")
        if checksum and md5(partial) != checksum:
            partial.unlink()
            raise ValueError(
                f"what {url} sent is not the expected file (its md5 differs from {checksum}); nothing was kept"
            )
        os.replace(partial, path)
    elif checksum and md5(path) != checksum:
        raise ValueError(
            f"{path} is damaged or another file (its md5 differs from {checksum}); delete it and run again"
        )
