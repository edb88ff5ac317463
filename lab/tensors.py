"""Tensors by name from a file, and into a network: whole, of the right shapes, finite, and without running code.

    weights = read_tensors("weights.pt")               # or .safetensors, told apart by their first bytes
    load_state(network, weights, "weights.pt")

Every function raises ValueError with one sentence that names the file and says what is wrong with it.
"""

import pickletools
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

# Numbers of numpy, such as a best accuracy that was kept beside the weights: plain values, and not code.
NUMPY_NUMBERS = [np.dtype, *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd")]
NUMPY_NUMBERS += [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


def read_tensors(path, trust_pickle: bool = False) -> dict:
    """The contents of a .safetensors or a torch checkpoint, told apart by their first bytes, on the CPU."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with open(path, "rb") as file:
        head = file.read(512)
    if head.lstrip()[:1] == b"<" or b"<html" in head.lower():
        raise ValueError(f"{path} is a web page, not a checkpoint: the download went wrong; fetch it again")
    if zipfile.is_zipfile(path):
        check_whole(path)
    try:
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(NUMPY_NUMBERS), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except Exception as error:  # torch raises anything from KeyError to UnpicklingError on a file it does not know
        text = str(error)
        refused = "Unsupported global" in text or "Unsupported class" in text or "unsupported GLOBAL" in text
        if refused or ("Unsupported operand" in text and _is_pickle(path)):
            raise ValueError(
                f"{path} holds more than tensors, and opening it would run code from the file. If you trust its "
                "source, save its state_dict alone; train.py also opens it as it is, with --trust-pickle"
            ) from None
        raise ValueError(f"{path} is not a checkpoint that PyTorch can open; is the file whole?") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where weights by name should be")
    return content


def _is_pickle(path: Path) -> bool:
    """From end to end? It is read as a list of instructions, none of which is carried out."""
    try:
        with open(path, "rb") as file:
            return zipfile.is_zipfile(path) or bool(list(pickletools.genops(file)))
    except Exception:  # pickletools raises anything on bytes that are no pickle
        return False


def check_whole(file) -> None:
    """ValueError if a byte of a torch checkpoint, a path or an open file, is not as it was written (torch.load itself
    does not look)."""
    try:
        with zipfile.ZipFile(file) as whole:
            for part in whole.infolist():
                with whole.open(part) as content:
                    while part.CRC and content.read(1 << 20):  # 0: PyTorch was told to leave it out
                        pass
    except Exception as error:  # zipfile raises anything on a broken one
        raise ValueError(f"{file} is damaged ({error}); take another copy, or train it again") from None


def load_state(module: nn.Module, weights: dict, path) -> None:
    """`load_state_dict`, with an error that lists what is missing, unexpected, of another shape or kind, or not
    finite. Names as torch.compile writes them count as the plain ones."""
    if not isinstance(weights, dict):
        raise ValueError(f"{path} holds a {type(weights).__name__} where weights by name should be")
    weights = {str(name).replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}
    own = module.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # not used at inference; often left out
    there = [name for name in own if name in weights]
    alike = [name for name in there if _alike(weights[name], own[name])]
    problems = {
        "missing": [name for name in own if name not in weights and name not in counters],
        "unexpected": [name for name in weights if name not in own],
        "of another kind": [name for name in there if name not in alike],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
            for name in alike
            if weights[name].shape != own[name].shape
        ],
        "not finite": [name for name in alike if not weights[name].float().isfinite().all()],
    }
    if any(problems.values()):
        text = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for kind, names in problems.items()
            if names
        )
        raise ValueError(f"the weights in {path} do not fit ({text})")
    module.load_state_dict(weights, strict=not counters - set(weights))


def _alike(tensor, own: torch.Tensor) -> bool:
    strided = getattr(tensor, "layout", None) == torch.strided
    return strided and tensor.is_floating_point() == own.is_floating_point()
