"""What torch.hub finds here: torch.hub.load(REPO, "carso", "carso.pt") and torch.hub.load(REPO, "wide_resnet", ...).

Our modules have everyday names (models, data, train), as the caller's own may have. So they are imported inside the
functions only, past the caller's, and forgotten afterwards. Keep a model by its state_dict(): pickle could not find its
class again.
"""

import contextlib
import sys
from pathlib import Path as _Path  # what has no underscore is an entry point

dependencies = ["torch", "numpy", "PIL", "safetensors", "tqdm"]


@contextlib.contextmanager
def _our_modules():
    """Inside, an import finds this folder's files first; afterwards sys.modules and sys.path are as they were."""
    folder, path = _Path(__file__).resolve().parent, list(sys.path)
    names = {"lab"} | {file.stem for file in folder.glob("*.py")}
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}
    for name, module in before.items():
        if folder not in _Path(getattr(module, "__file__", None) or "").resolve().parents:
            del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in [name for name in sys.modules if name.partition(".")[0] in names]:
            del sys.modules[name]
        sys.modules.update(before)


def carso(path, device="cpu"):
    """The defence that train.py wrote as runs/NAME/carso.pt: pixels in [0, 1], (B, C, H, W) -> logits (B, K), in eval
    mode. Raises ValueError, with one sentence, if the file is missing, broken, or of another format."""
    with _our_modules():
        from lab.checkpoints import load_checkpoint

        return load_checkpoint(path, device)[0]


def wide_resnet(path=None, num_classes=10, mean=None, std=None, **sizes):
    """A classifier from a file of published weights, recognised by its content (lab/checkpoints.py has the layouts), in
    eval mode; without a path an untrained one, of depth, width and in_channels in `sizes`. Raises ValueError."""
    with _our_modules():
        from lab.checkpoints import load_published_classifier
        from models import WideResNet

        if path is None:
            return WideResNet(num_classes, mean=mean, std=std, **sizes)
        if sizes:
            raise ValueError(f"{path} itself says how large it is: leave out {', '.join(sizes)}")
        return load_published_classifier(path, num_classes, mean, std)
