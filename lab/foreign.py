"""The models of others, for evaluate.py --model FILE.py:FUNCTION: run, wrapped, and tried before anything else.

model = load_function("mine.py:build")              # in eval mode; ValueError with one sentence
check_answers(model, "mine.py", pictures, 10)       # one trial forward
"""

import contextlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path

import torch
from torch import nn

import data as datasets

DEFENCE = ("purifier", "classifier", "member_logits", "purify", "draw", "samples", "own_answer", "manual_seed")


class Foreign(nn.Module):
    """Somebody else's model with none of its attributes to be seen: a VGG's .classifier is not CARSO's."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def manual_seed(self, seed: int) -> None:
        if hasattr(self.model, "manual_seed"):  # a stochastic model's own generator
            self.model.manual_seed(seed)


def load_function(text: str) -> nn.Module:
    """What the function of that name in that file returns, in eval mode; a CARSO as it is, anything else as Foreign.
    Modules beside the file come before ours of the same name. Raises ValueError, with the line where it fails."""
    file, _, function = text.rpartition(":")
    path = Path(file)
    if not file or not function or path.suffix != ".py" or not path.is_file():
        there = f", and there is no file {file}" if path.suffix == ".py" else ""
        raise ValueError(f"--model wants FILE.py:FUNCTION, not {text}{there}")
    name = f"model of {path.stem}"  # never the name of a module of ours
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look it up for their fields' types
    try:
        with _first_beside(path):
            spec.loader.exec_module(module)
            build = getattr(module, function, None)
            model = build() if callable(build) else None
    except (Exception, SystemExit) as error:  # whatever their code does
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == path.name]
        raise ValueError(f"{file}{f', line {lines[-1]}' if lines else ''}: {type(error).__name__}: {error}") from None
    if not callable(build):
        raise ValueError(f"{file} has no function {function}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"{file}: {function}() should return an nn.Module, not a {type(model).__name__}")
    return (model if all(hasattr(model, name) for name in DEFENCE) else Foreign(model)).eval()


@contextlib.contextmanager
def _first_beside(path: Path):
    """Inside, an import finds what lies beside this file first, even where a module of ours has the same name, and
    PyTorch's random weights are the same each time. What the file changes for the whole process is put back."""
    folder, before = path.resolve().parent, (os.getcwd(), torch.is_grad_enabled(), torch.get_default_dtype())
    torch.manual_seed(0)
    ours = {}
    for name in sys.modules.keys() - sys.stdlib_module_names:
        top = folder / name.partition(".")[0]
        if top.with_suffix(".py").is_file() or (top / "__init__.py").is_file():
            file = Path(getattr(sys.modules[name], "__file__", None) or "nowhere").resolve()
            if file != top.with_suffix(".py") and top not in file.parents:
                ours[name] = sys.modules.pop(name)
    sys.path.insert(0, str(folder))  # and stays: a forward may import, too
    try:
        yield
    finally:
        sys.modules.update(ours)
        for put_back, what in zip((os.chdir, torch.set_grad_enabled, torch.set_default_dtype), before):
            put_back(what)


@torch.no_grad()
def check_answers(model: nn.Module, name, images: torch.Tensor, num_classes: int, device="cpu") -> None:
    """One trial forward on two pictures and on one, images (n, C, H, W) uint8. ValueError, with the name, unless it
    returns finite floating-point logits (B, K), K the number of classes."""
    for count in (2, 1):
        x = datasets.pixels(images[torch.arange(count) % len(images)].to(device))
        try:
            logits = model(x)
        except Exception as error:  # whatever a model says to pictures that it was not made for
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{name} does not take pictures {tuple(x.shape)}: {text}") from None
        if not isinstance(logits, torch.Tensor):
            raise ValueError(f"{name} returns a {type(logits).__name__}, not a tensor of logits (B, K)")
        if tuple(logits.shape) != (count, num_classes) or not logits.is_floating_point():
            raise ValueError(
                f"{name} returns {str(logits.dtype).removeprefix('torch.')} {tuple(logits.shape)} for pictures "
                f"{tuple(x.shape)} of {num_classes} classes; logits ({count}, {num_classes}) are wanted"
            )
        if not logits.isfinite().all():
            raise ValueError(f"{name} returns logits that are not finite for the first test pictures")
