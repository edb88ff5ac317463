"""Files that are whole or not there: writing under a temporary name, work claimed by one process, a folder's
configuration, tables, downloads that go on."""

import contextlib
import csv
import glob
import hashlib
import http.client
import itertools
import json
import math
import os
import platform
import re
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # without locks, processes that write the same file at once are not told apart
    fcntl = None

# ---------------------------------------------------------------------------------------------------------- writing


def lock(file, wait: bool = False) -> bool:
    """Hold this open file for as long as it is open: is it ours? Only other users of this function mind."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (OSError, AttributeError):  # a file system, or a machine, that has no locks
        pass
    return True


@contextlib.contextmanager
def claim(path: Path):
    """Whether this process now has to itself what becomes the file at path; beside it, FILE.lock says who. The system
    frees the lock of a process that dies, and so another one takes the work over."""
    path = path.with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        if not lock(file):
            yield False
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def write_atomically(path, write) -> None:
    """write(temporary path), then rename: a file that exists is whole, and a failure leaves the previous one alone.
    What a killed process has left half-written of the same file is removed."""
    path = Path(path)
    _folder_for(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError), open(leftover, "ab") as file:
            if lock(file):  # or its writer lives
                leftover.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "ab") as held:
            lock(held)
            write(temporary)
            os.fsync(held.fileno())
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's own for a full disk
        raise OSError(
            f"{path} could not be written ({error}); is the disk full? What was there before is whole"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _folder_for(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {path.parent} is no folder, and none can be made ({error})") from None


def write_text(path, text: str) -> None:
    """In UTF-8, whatever the machine's own; what a path may hold and UTF-8 may not is spelled out."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


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


def read_json(path: Path) -> dict:
    """The object in a .json file. ValueError, with its name, for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it should hold one object in braces")
    return content


def check_config(path: Path, config: dict, option: str, write: bool = True) -> None:
    """A folder holds one configuration: compare it with the one at path; where there is none, write it if asked to.

    Raises ValueError with the fields that differ, and the option that chooses another folder. What is absent counts as
    what is off (None, False, 0): a folder of an earlier version does not know the options that came later."""
    if not path.is_file():
        if write:
            write_text(path, json.dumps(config, indent=1))
        return
    old = read_json(path)
    fields = [k for k in config | old if (old.get(k) or None) != (config.get(k) or None)]
    if fields:
        differ = "; ".join(f"{k}: {old.get(k)} there, {config.get(k)} now" for k in fields)
        raise ValueError(f"{path.parent} holds other settings ({differ}); choose another {option}")


# ----------------------------------------------------------------------------------------------------------- tables


def read_table(path: Path, numbers: dict[str, tuple[float, float]], *words: str) -> list[dict]:
    """Rows of a .tsv with a header that has these columns, numbers converted. ValueError if missing or out of range."""
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8", errors="replace").splitlines(), delimiter="\t"))
    except csv.Error as error:
        raise ValueError(f"{path} is damaged: it is no table ({error})") from None
    if not rows or not {*words, *numbers} <= rows[0].keys():
        raise ValueError(f"{path} has no rows with the columns {', '.join((*words, *numbers))}")
    for row, (name, (low, high)) in itertools.product(rows, numbers.items()):
        try:
            text, row[name] = row[name], float(row[name])
        except (TypeError, ValueError):  # TypeError: the line is too short
            text, row[name] = row[name], math.nan
        if not low <= row[name] <= high:
            raise ValueError(f"{path} has {text!r} in the column {name}, not a number from {low:g} to {high:g}")
    if empty := [name for name in words if not all(row[name] for row in rows)]:
        raise ValueError(f"{path} has nothing in the column {empty[0]} of some line")
    return rows


def read_rows(path: Path, numbers=()) -> list[dict]:
    """evaluate.py's rows.tsv: attack, how many of `draws` were right, and what else is asked for, as in read_table."""
    rows = read_table(path, {"right": (0, 1e9), "draws": (1, 1e9)} | dict(numbers), "attack")
    if any(row["right"] > row["draws"] for row in rows):
        raise ValueError(f"{path} is damaged: more draws are right than there are")
    return rows


# -------------------------------------------------------------------------------------------------------- downloads


def md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _pin(path: Path, pinned: Path) -> None:
    write_text(pinned, f"{md5(path)} {path.stat().st_size}\n")


def _is(path: Path, known: str) -> bool:
    """known: an md5, and a size if there is one (earlier versions kept none)."""
    checksum, *size = known.split()
    return size in ([], [str(path.stat().st_size)]) and md5(path) == checksum


def download(url: str, path: Path, checksum: str | None = None) -> None:
    """Fetch url to path unless it is there; go on where an earlier try stopped; verify the md5 before renaming. Of many
    processes one fetches, and the others wait for it.

    Without a checksum, the file's own md5 and size are kept beside it at first use (FILE.md5), and hold from then on.
    Raises OSError when the host cannot be reached, ValueError when the file is not the one expected."""
    path, pinned = Path(path), Path(f"{path}.md5")
    known = checksum or (pinned.read_text(errors="replace").strip() if pinned.is_file() else None)
    if known is not None and not re.fullmatch(r"[0-9a-f]{32}( \d+)?", known):
        raise ValueError(f"{pinned} holds no md5 and size; delete it, if {path} is the right file, and run again")
    if path.is_file():
        if known and not _is(path, known):
            raise ValueError(
                f"{path} is damaged or another file ({path.stat().st_size:,} bytes; its md5 and size should be "
                f"{known}); delete it{'' if checksum else f' (and {pinned}, if this file is the right one)'} "
                "and run again"
            )
    else:
        _folder_for(path)
        with _alone(path.with_name(path.name + ".part"), path) as partial:
            if not path.is_file():  # else another process has been here
                _fetch(url, path, partial, known)
                if not checksum:
                    _pin(partial, pinned)
                os.replace(partial, path)  # last: the others take a file that is there for one that has its md5
    if not checksum and not (pinned.is_file() and " " in pinned.read_text()):  # an earlier version kept no size
        _pin(path, pinned)


@contextlib.contextmanager
def _alone(partial: Path, path: Path):
    """The half-downloaded file, for this process alone."""
    while True:
        with open(partial, "ab") as file:
            if not lock(file):
                print(f"another process is downloading {path}: waiting for it", flush=True)
                lock(file, wait=True)
            there = partial.is_file() and os.path.samestat(os.fstat(file.fileno()), partial.stat())
            if there or path.is_file():  # else the other one has renamed or removed what we hold
                try:
                    yield partial
                finally:
                    if partial.is_file() and (path.is_file() or partial.stat().st_size == 0):
                        partial.unlink()
                return


def _fetch(url: str, path: Path, partial: Path, checksum: str | None) -> None:
    """Make the partial file whole, or raise; path is for the sentences."""
    by_hand, too_long = f"put the file at {path} by hand", False
    try:
        whole = _go_on(url, partial)
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) != 416:
            raise OSError(f"{url} could not be downloaded ({error}); {by_hand}") from None
        size = partial.stat().st_size  # 416: the file does not go on from here, as we have all of it, or more
        whole = error.headers.get("Content-Range") == f"bytes */{size}"
        too_long = not whole
    if _is(partial, checksum) if checksum else whole:
        return
    if whole or too_long:
        partial.unlink()
    if whole:
        raise ValueError(
            f"what {url} sent is not the expected file (its md5 differs from {checksum}); nothing was kept"
        )
    raise OSError(f"the download of {url} broke off; run the same command again to go on, or {by_hand}")


def _go_on(url: str, partial: Path) -> bool:
    """Append what is missing to the partial file. Is it known to be whole?"""
    done = partial.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        if response.headers.get_content_type() == "text/html":
            raise OSError("the host sent a web page")
        done = done if response.status == 206 else 0  # 200: the host sends the whole file again
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        name = partial.name.removesuffix(".part")
        progress = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=name, disable=None)
        with open(partial, "ab" if done else "wb") as file, progress:
            while block := response.read(1 << 20):
                file.write(block)
                progress.update(len(block))
        # Without a length, only chunks tell a file's end from a broken connection (they raise).
        return partial.stat().st_size == total if length else bool(response.chunked)
