"""The classifier, the hooks that record its internal representation, and the public weights.

The network is the WideResNet of the public adversarially-trained weights (Gowal et al. 2020; Wang et al. 2023; Cui et
al. 2023): SiLU activations, pre-activation blocks, its own input normalisation, global average pooling. Everything
outside it speaks pixels in [0, 1].

    classifier = WideResNet(num_classes=10, depth=28, width=10)
    classifier = load_classifier("cifar10_linf_wrn28-10.pt", num_classes=10)
    logits, representation = record(classifier, representation_layers(28), x)

Shapes: B batch, C, H, W image in [0, 1], K classes. A representation is a list of tensors (B, c_i, h_i, w_i).
"""

import ctypes
import errno
import functools
import hashlib
import os
import re
import secrets
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)

# ------------------------------------------------------------------------------------- BatchNorm and its activation


class Activation(NamedTuple):
    """A function of each number in a tensor, and its derivative."""

    value: Callable[[torch.Tensor], torch.Tensor]
    slope: Callable[[torch.Tensor], torch.Tensor]


def silu_slope(x: torch.Tensor) -> torch.Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


SILU = Activation(F.silu, silu_slope)


def normalise_and_activate(batchnorm: nn.BatchNorm2d, x: torch.Tensor, activation: Activation = SILU) -> torch.Tensor:
    """activation(BatchNorm(x)), (B, C, H, W) -> (B, C, H, W).

    In eval mode BatchNorm amounts to x * scale + shift. PyTorch's own keeps x for the backward pass and goes through it
    again; this form keeps C numbers. Training mode, and autocast to bfloat16 on a CPU, go through PyTorch's own."""
    if batchnorm.training:
        return activation.value(batchnorm(x))
    if is_fused(batchnorm, x):
        return NormaliseAndActivate.apply(x, batchnorm, activation)
    scale = batchnorm.weight / (batchnorm.running_var + batchnorm.eps).sqrt()  # (C,)
    shift = batchnorm.bias - batchnorm.running_mean * scale
    if x.dtype != scale.dtype:
        return activation.value(batchnorm(x))
    return activation.value(torch.addcmul(shift.view(-1, 1, 1), x, scale.view(-1, 1, 1)))


def find_batchnorms(network: nn.Module) -> list[nn.Module]:
    return [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


# --------------------------------------------------------------------------------------------------- the WideResNet


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution without bias. With stride 2 it pads on the right and at the bottom only, as the public weights
    expect (they were made for TensorFlow's "same" padding)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__(in_channels, out_channels, 3, stride, padding=1 if stride == 1 else 0, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if self.stride == (1, 1) else F.pad(x, (0, 1, 0, 1)))


class Block(nn.Module):
    """BN, SiLU, 3x3 convolution, twice, around a skip connection. Where the number of channels changes, the skip is a
    1x1 convolution of the *activated* input; elsewhere it is the input itself."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_channels, momentum=0.01)
        self.conv_0 = Conv3x3(in_channels, out_channels, stride)
        self.batchnorm_1 = nn.BatchNorm2d(out_channels, momentum=0.01)
        self.conv_1 = Conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = normalise_and_activate(self.batchnorm_0, x)
        out = self.conv_0(activated)
        out = self.conv_1(normalise_and_activate(self.batchnorm_1, out))
        return out + (self.shortcut(activated) if hasattr(self, "shortcut") else x)


class Group(nn.Module):
    """n blocks of equal width, the first of which may halve the resolution."""

    def __init__(self, blocks: int, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        first = Block(in_channels, out_channels, stride)
        self.block = nn.Sequential(first, *(Block(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


class WideResNet(nn.Module):
    """WideResNet-depth-width (Zagoruyko and Komodakis 2016), with the parameter names of the public weights.

    Args:
        num_classes: K.
        depth: 6n + 4 (28 in the paper); n blocks in each of the three groups.
        width: channels are 16, 32 and 64 times this.
        in_channels: C, 1 or 3.
        mean, std: per-channel normalisation of the pixels, applied inside. They are not part of the state dict, since
            the public weights do not hold them; `config` remembers them.

    Raises ValueError if the depth is not 6n + 4, or mean and std do not fit in_channels.
    """

    def __init__(self, num_classes: int, depth: int = 28, width: int = 10, in_channels: int = 3, mean=None, std=None):
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28, ...), not {depth}")
        if mean is None and std is None:
            mean, std = (CIFAR10_MEAN, CIFAR10_STD) if in_channels == 3 else ((0.5,), (0.5,))
        mean, std = (tuple(np.ravel(m).astype(float).tolist()) for m in (mean, std))
        if not len(mean) == len(std) == in_channels:
            raise ValueError(f"mean {mean} and std {std} need one number for each of the {in_channels} channels")
        self.config = dict(
            num_classes=num_classes, depth=depth, width=width, in_channels=in_channels, mean=mean, std=std
        )

        blocks = (depth - 4) // 6
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.init_conv = Conv3x3(in_channels, widths[0])
        self.layer = nn.Sequential(
            Group(blocks, widths[0], widths[1], stride=1),
            Group(blocks, widths[1], widths[2], stride=2),
            Group(blocks, widths[2], widths[3], stride=2),
        )
        self.batchnorm = nn.BatchNorm2d(widths[3], momentum=0.01)
        self.logits = nn.Linear(widths[3], num_classes)
        # Channels-last is the layout that fast convolutions want, and where two layouts meet, a layer costs several
        # times as much: hence everything is in it, and forward() minds the gradient's layout at both ends.
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], (B, C, H, W) -> logits (B, K)."""
        if x.ndim != 4 or x.shape[1] != self.config["in_channels"]:
            raise ValueError(f"expected pictures (B, {self.config['in_channels']}, H, W), got {tuple(x.shape)}")
        x = x.flatten(1).unflatten(1, x.shape[1:])  # makes x.grad contiguous: AutoAttack and others call view() on it
        features = self.init_conv((x - self.mean) / self.std)  #                     (B, 16, H, W)
        features = self.layer(features)  #                                           (B, 64 width, H/4, W/4)
        features = normalise_and_activate(self.batchnorm, features)
        # The mean, but with a channels-last gradient.
        features = F.avg_pool2d(features, features.shape[-2:]).flatten(1)  #         (B, 64 width)
        if features.dtype == self.logits.weight.dtype:
            return self.logits(features)  #                                          (B, K)
        # Under autocast the last layer alone keeps its full precision: losses are differences of its outputs.
        with torch.autocast(x.device.type, enabled=False):
            return self.logits(features.to(self.logits.weight.dtype))


# ------------------------------------------------------------------------------------------------ the representation


def representation_layers(depth: int) -> list[str]:
    """The tapped layers (paper, table 5): both 3x3 convolutions of every block, and the shortcuts that open the second
    and the third group, in the order of execution. 26 names at depth 28."""
    names = []
    for group in range(3):
        for block in range((depth - 4) // 6):
            names += [f"layer.{group}.block.{block}.conv_0", f"layer.{group}.block.{block}.conv_1"]
            if group > 0 and block == 0:
                names.append(f"layer.{group}.block.0.shortcut")
    return names


def record(classifier: nn.Module, layers: list[str], x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run the classifier once and keep the outputs of the named layers.

    Nothing is detached: the representation is differentiable in x whenever gradients are enabled. The hooks are removed
    whatever happens, exceptions included.

    Returns:
        logits (B, K) and the representation, a list of (B, c_i, h_i, w_i) in the order of `layers`.
    Raises:
        ValueError: layers is no list of names, the classifier has no such layer, did not run it, ran it more than once,
            or the layer does not put out a tensor.
    """
    if isinstance(layers, str) or not layers:
        raise ValueError(f"layers must be a list with at least one layer's name, not {layers!r}")
    modules = dict(classifier.named_modules())
    if missing := [name for name in layers if name not in modules]:
        raise ValueError(f"the classifier has no layer named {', '.join(missing)}")
    recorded: dict[str, torch.Tensor] = {}
    changes_nothing = isinstance(classifier, WideResNet)  # another network may hold a ReLU(inplace=True), or x += y

    def keep(name):
        def hook(module, inputs, output):
            if not isinstance(output, torch.Tensor):  # attention's is a tuple
                raise ValueError(f"layer {name} puts out a {type(output).__name__}: tap one that puts out a tensor")
            if name in recorded:
                raise ValueError(f"the classifier runs {name} more than once: tap a layer that it runs once")
            recorded[name] = output if changes_nothing else output.clone()

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in dict.fromkeys(layers)]
    try:
        logits = classifier(x)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in layers if name not in recorded]:
        raise ValueError(f"the classifier's forward did not run {', '.join(missing)}")
    return logits, [recorded[name] for name in layers]


# ------------------------------------------------------------------------------------------------- files of weights


def write_atomically(path, write) -> None:
    """write(temporary path), then rename: a file that exists is whole, and a failure leaves the previous one alone.

    Raises OSError with one sentence that names the file."""
    path = Path(path)
    # A random name: processes on two machines that share the folder may have equal numbers.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        synchronise(temporary)
        os.replace(temporary, path)  # only now that it is closed: Windows renames no open file
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's own for a full disk
        full = isinstance(error, RuntimeError) or error.errno == errno.ENOSPC
        raise OSError(f"{path} could not be written ({error}){'; is the disk full?' if full else ''}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def synchronise(path: Path) -> None:
    """Put the file on the disk, or after a power cut its name could stand for an empty one. Some shared file systems
    know no such thing."""
    with open(path, "rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise


def save_tensors(path, content: dict) -> None:
    """Write tensors and plain values as a file that `load_tensors` reads. Raises OSError."""
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def check_zip(path) -> None:
    """Raises BadZipFile where a byte is wrong; torch.load does not look at the checksums."""
    with zipfile.ZipFile(path) as archive:
        folders = [entry for entry in archive.infolist() if entry.external_attr & 0x10]
        if archive.testzip() or folders:  # of an entry that is marked as a folder, torch.load reads nothing
            raise zipfile.BadZipFile(path)


def load_tensors(path) -> dict:
    """The content of a PyTorch or safetensors file, told apart by their first bytes, on the CPU. No code of the file is
    run. Raises ValueError, with the file's name, for anything else, and for a PyTorch file of which a byte is wrong.
    (Files of PyTorch before 1.6 and safetensors files have no checksums: only their outline and length are checked.)"""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with open(path, "rb") as file:
        head = file.read(512)
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path} is a web page, not a checkpoint: delete it and fetch it again")
    try:
        if head[8:9] == b"{":
            from safetensors.torch import load_file

            return load_file(path)
        if head.startswith(b"PK"):
            check_zip(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises anything from KeyError to UnpicklingError on a file it does not know
        reason = "is it whole? Fetch or make it again"
        if "GLOBAL" in str(error).upper():
            kind = re.search(r"GLOBAL (\S+)", str(error))
            named = f" ({kind[1]})" if kind else ""
            reason = f"it holds objects{named}, whose code is never run: keep a model by its state_dict"
        raise ValueError(f"{path} is no file of tensors: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where weights by name should be")
    return content


def load_weights(module: nn.Module, weights: dict, path) -> None:
    """`load_state_dict`; raises ValueError, with the file's name, for weights that do not fit or are not finite."""
    try:  # torch.compile prefixes the names of what it compiled
        module.load_state_dict({name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()})
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"the weights in {path} do not fit: {' '.join(str(error).split())[:400]}") from None
    if broken := [name for name, tensor in module.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(f"the weights in {path} are not finite: {', '.join(broken[:3])}")


def hash_weights(network: nn.Module) -> str:
    """32 hexadecimal digits that follow from every tensor in the network's state dict and its name."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_classifier(path, num_classes: int, mean=None, std=None) -> WideResNet:
    """A WideResNet from a file of weights, recognised by its content, in eval mode.

    Understands Wang et al. 2023 (`model_state_dict`: the averaged weights), Cui et al. 2023, Rebuffi et al. 2021, Gowal
    et al. 2020, RobustBench's copies, the CARSO authors' safetensors and train.py's classifier.pt. Depth, width and
    channels are read off the tensors.

    Args:
        mean, std: of the training pixels, a number a channel; what the file itself holds comes first.
    Raises:
        ValueError: the file is no checkpoint, no WideResNet, or of other classes; or the normalisation is not known.
    """
    content = load_tensors(path)
    if "purifier" in content:
        raise ValueError(f"{path} is a whole CARSO: its classifier alone is in the classifier.pt beside it")
    weights, of_data = strip_wrapping(content), mean
    mean, std = weights.pop("mean", weights.pop("mu", mean)), weights.pop("std", weights.pop("sigma", std))
    if mean is None or std is None:
        raise ValueError(f"{path} does not hold the mean and std of its training pixels: pass mean= and std=")
    stem, first = weights.get("init_conv.weight"), weights.get("layer.0.block.0.conv_0.weight")
    if stem is None or first is None or not stem.ndim == first.ndim == 4:
        raise ValueError(
            f"{path} is not one of the public WideResNets: its first keys are {list(weights or content)[:3]}"
        )
    channels = len(np.ravel(mean if of_data is None else of_data))  # of the caller's pictures, whatever the file says
    if channels != stem.shape[1]:
        raise ValueError(f"{path} is for pictures of {stem.shape[1]} channel(s), not of {channels}")
    blocks = sum(name.startswith("layer.0.") and name.endswith(".conv_0.weight") for name in weights)
    classifier = WideResNet(num_classes, 6 * blocks + 4, first.shape[0] // 16, stem.shape[1], mean, std)
    load_weights(classifier, weights, path)
    return classifier.eval()


def strip_wrapping(content: dict) -> dict[str, torch.Tensor]:
    """{public name: tensor} of a checkpoint, without nested dicts, wrappers' prefixes and other codes' left-overs."""
    outer = "model_state_dict", "state_dict", "model", "net"
    while inner := [content[key] for key in outer if isinstance(content.get(key), dict)]:
        content = inner[0]
    weights = {}
    for name, tensor in content.items():
        name = str(name).replace("_orig_mod.", "")  # torch.compile's
        while name.startswith(("module.", "model.", "0.")):
            name = name.split(".", 1)[1]
        if isinstance(tensor, torch.Tensor) and "sub_block" not in name and name != "n_averaged":
            weights[name] = tensor
    return weights


# ------------------------------------------------------------------------------------------------- published weights

CARSO_AUTHORS = "https://bucket.ballarin.cc/aimldl/carso2024cnn/"
WANG = "https://huggingface.co/wzekai99/DM-Improves-AT/resolve/main/checkpoint/"  # Wang et al. 2023
DEEPMIND = "https://storage.googleapis.com/dm-adversarial-robustness/"  # Gowal et al. 2020, Rebuffi et al. 2021

# Data set -> RobustBench's name -> address, published clean accuracy. The paper's own comes first (table 2).
PUBLISHED = {
    "cifar10": {
        "Cui2023Decoupled_WRN-28-10": (
            CARSO_AUTHORS + "cifar_10_cuiwrn2810/models/cifar10_a3_b10_t4_20m_w.safetensors", 0.9216,
        ),
        "Wang2023Better_WRN-28-10": (WANG + "cifar10_linf_wrn28-10.pt", 0.9244),
        "Rebuffi2021Fixing_28_10_cutmix_ddpm": (DEEPMIND + "cifar10_linf_wrn28-10_cutmix_ddpm_v2.pt", 0.8733),
        "Gowal2020Uncovering_28_10_extra": (DEEPMIND + "cifar10_linf_wrn28-10_with.pt", 0.8948),
    },
    "cifar100": {
        "Cui2023Decoupled_WRN-28-10": (
            CARSO_AUTHORS + "cifar_100_cuiwrn2810/models/cifar100_a5_b12_t4_50m_w.safetensors", 0.7385,
        ),
        "Wang2023Better_WRN-28-10": (WANG + "cifar100_linf_wrn28-10.pt", 0.7258),
        "Rebuffi2021Fixing_28_10_cutmix_ddpm": (DEEPMIND + "cifar100_linf_wrn28-10_cutmix_ddpm.pt", 0.6241),
    },
    "tinyimagenet": {
        "Wang2023Better_WRN-28-10": (
            CARSO_AUTHORS + "tinyimagenet_wangwrn2810/models/tiny_linf_wrn28_10_w.safetensors", 0.6519,
        ),
    },
}  # fmt: skip


def fetch(url: str, folder) -> Path:
    """The file at url, downloaded into the folder unless it is there. Raises OSError where the host is not reached."""
    path = Path(folder) / url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))  # half a file, should the connection break, is not loaded
        except OSError as error:
            raise OSError(f"{url} could not be downloaded ({error}): put the file at {path} by hand") from None
    return path


def fetch_classifier(data, name: str, data_dir, device="cpu") -> WideResNet:
    """A published classifier for a data set (data.Dataset), downloaded into data_dir, its clean accuracy checked.

    name: RobustBench's, as in PUBLISHED, or 'published', the paper's. Raises ValueError for an unknown name or another
    file than the published one, OSError where the host is not reached."""
    known = PUBLISHED.get(data.name, {})
    name = next(iter(known), name) if name == "published" else name
    if name not in known:
        raise ValueError(f"there is no file {name}; published for {data.name} are: {', '.join(known) or 'none'}")
    url, expected = known[name]
    path = fetch(url, Path(data_dir) / "published" / data.name)
    classifier = load_classifier(path, len(data.classes), data.mean, data.std).to(device)
    check_clean_accuracy(classifier, data, expected, path)
    return classifier


def check_clean_accuracy(classifier: nn.Module, data, expected: float, path) -> None:
    """Raises ValueError if the classifier is more than 3 points below `expected` on 1,000 test pictures of `data`."""
    clean = measure_accuracy(classifier, data.test_images[:1000], data.test_labels[:1000])
    if clean < expected - 0.03:
        raise ValueError(
            f"{path} labels {clean:.1%} of clean pictures, not {expected:.1%}: another file, or other data"
        )


@torch.no_grad()
def measure_accuracy(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, attack=None, batch_size=250
) -> float:
    """Share of the pictures (n, C, H, W) uint8 that the model labels as `labels` (n,) says; attack(model, x, y), if one
    is given, perturbs each batch first."""
    device, correct = next(model.parameters()).device, 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        x, y = x.to(device).float() / 255, y.to(device)
        x = attack(model, x, y) if attack else x
        correct += (model(x).argmax(1) == y).sum().item()
    return correct / len(labels)


# ------------------------------------------------------------------------------------- how scripts begin and end


def is_under_torchrun() -> bool:
    """RANK and WORLD_SIZE alone say nothing: clusters and earlier commands leave them in the environment."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def read_ranks() -> tuple[int, int]:
    """This process's rank and the number of processes that torchrun started; (0, 1) without torchrun. Raises ValueError
    for one of several processes that another launcher started: each would do the whole work."""
    if is_under_torchrun():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for launcher, variable in (("srun", "SLURM_STEP_NUM_TASKS"), ("mpirun", "OMPI_COMM_WORLD_SIZE")):
        if int(os.environ.get(variable, 1)) > 1:
            raise ValueError(f"{launcher} started {os.environ[variable]} processes, which do not know of each other: "
                             f"have it start one a node, of torchrun --nproc_per_node=GPUS")  # fmt: skip
    return 0, 1


def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of returning them to the kernel after every layer: 1.4 times as fast on
    a CPU (RESULTS.md). Without glibc nothing happens."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)


@functools.cache  # once, though a script may ask for its device twice
def hint_at_waiting() -> None:
    """On a busy machine, say how OpenMP's threads wait without taking the processor from those they wait for."""
    rank, _ = read_ranks()
    if rank > 0 or "OMP_WAIT_POLICY" in os.environ or torch.get_num_threads() == 1:
        return
    with suppress(OSError, AttributeError):  # not every system tells its load, or which cores are ours
        load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
        if load > cores / 2:
            print(f"This machine is busy (load {load:.1f}, {cores} cores). While other programs run, this one is up to "
                  f"five times as fast after `export OMP_WAIT_POLICY=PASSIVE`.", file=sys.stderr)  # fmt: skip


def start_device(name: str | None = None) -> torch.device:
    """The device that a script works on, told to repeat itself. name: 'cpu' or 'cuda'; None: cuda where there is one.
    Under torchrun each process has a GPU of its own. Raises ValueError where there is no such device."""
    torch.backends.cudnn.deterministic = True  # what was stopped then ends as if it had not been
    keep_freed_memory()
    if name == "cpu" or (name is None and not torch.cuda.is_available()):
        hint_at_waiting()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: PyTorch finds no GPU here; leave it out")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if is_under_torchrun() else 0)
    torch.cuda.set_device(device)
    return device


def run_script(name: str, main) -> NoReturn:
    """End the process with main()'s exit status; what the user can mend ends in one sentence and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file's name may have letters that a terminal has not
    try:
        status = main()
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what was saved", file=sys.stderr)
        status = 130
    if torch.distributed.is_initialized():  # DistributedDataParallel's threads aborted a complete training once
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


# ----------------------------------------------------------------- appendix: BatchNorm and its activation on a GPU
# There the way through memory takes most of such a layer's time: the two are one kernel forward and one backward.

FUSED_ON = ("cuda",)  # kinds of device; () does without


class ForwardKernel(nn.Module):
    """activation(BatchNorm(x)) of rows x (N, C), with BatchNorm's weight, bias, mean and variance (C,)."""

    def __init__(self, activation: Activation, eps: float):
        super().__init__()
        self.activation, self.eps = activation, eps

    def forward(self, x, weight, bias, mean, variance):
        scale = weight * torch.rsqrt(variance + self.eps)
        return self.activation.value(torch.addcmul(bias - mean * scale, x, scale)).to(x.dtype)


class BackwardKernel(ForwardKernel):
    """The gradient in x, (N, C), from the gradient in ForwardKernel's result."""

    def forward(self, gradient, x, weight, bias, mean, variance):
        scale = weight * torch.rsqrt(variance + self.eps)
        slope = self.activation.slope(torch.addcmul(bias - mean * scale, x, scale))
        return (gradient * slope * scale).to(x.dtype)


@functools.cache
def compile_kernel(kind, activation: Activation, eps: float, channels: int, dtypes: tuple, device: torch.device):
    """kind(activation, eps), compiled for tensors of these dtypes, of which the last four are BatchNorm's own (C,), and
    for any number of rows in the others, (N, C). The arguments here are all that it depends on: torch.compile would
    look at every call whether its kernel still fits, which takes the host longer than a layer."""
    any_number = torch.export.Dim("rows", max=(2**31 - 1) // channels)  # counted in 32 bits
    # An example, from which PyTorch chooses the kernel's blocks; a prime, so that nothing holds for it by accident.
    rows = [torch.ones(10_007, channels, dtype=dtype, device=device) for dtype in dtypes[:-4]]
    own = [torch.ones(channels, dtype=dtype, device=device) for dtype in dtypes[-4:]]
    sizes = tuple([{0: any_number}] * len(rows) + [None] * len(own))
    # The kernel must not depend on who asks for it first.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        program = torch.export.export(kind(activation, eps), (*rows, *own), dynamic_shapes=sizes, strict=False)
        graph = program.graph_module
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        return torch._inductor.standalone_compile(graph, inputs, dynamic_shapes="from_graph")


def run_kernel(kind, settings: tuple, *tensors: torch.Tensor) -> torch.Tensor:
    """kind(*settings)(*tensors)."""
    dtypes = tuple([tensor.dtype for tensor in tensors])
    kernel = compile_kernel(kind, *settings, tensors[-1].shape[0], dtypes, tensors[0].device)
    return kernel(*tensors)[0]


class NormaliseAndActivate(torch.autograd.Function):
    """activation(BatchNorm(x)), (B, C, H, W) -> (B, C, H, W), differentiable once, in x alone. Nothing but x is kept
    for the backward pass, which computes the rest again."""

    @staticmethod
    def forward(ctx, x, batchnorm, activation):
        own = batchnorm.weight, batchnorm.bias, batchnorm.running_mean, batchnorm.running_var
        rows = as_rows(x)
        ctx.save_for_backward(rows, *own)
        ctx.settings = activation, batchnorm.eps
        return as_maps(run_kernel(ForwardKernel, ctx.settings, rows, *own), x.shape)

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():
            raise RuntimeError("the fused BatchNorm has no second derivative: set models.FUSED_ON = ()")
        rows = run_kernel(BackwardKernel, ctx.settings, as_rows(gradient), *ctx.saved_tensors)
        return as_maps(rows, gradient.shape), None, None


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B H W, C), which is how channels-last memory lies."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def as_maps(rows: torch.Tensor, shape) -> torch.Tensor:
    batch, channels, height, width = shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


@functools.cache
def has_compiler(device: torch.device) -> bool:
    """Whether PyTorch can make kernels for this device; a line of log where it cannot."""
    try:
        NormaliseAndActivate.apply(torch.ones(2, 8, 1, 1, device=device), nn.BatchNorm2d(8, device=device), SILU)
        return True
    except Exception as error:  # PyTorch and Triton raise anything where a compiler is missing
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"BatchNorm is not fused with its activation: {reason:.80}", file=sys.stderr)
        return False


def is_fused(batchnorm: nn.BatchNorm2d, x: torch.Tensor) -> bool:
    """Whether BatchNorm of x (B, C, H, W) and its activation are one kernel: on a GPU, with frozen weights."""
    learns = torch.is_grad_enabled() and (batchnorm.weight.requires_grad or batchnorm.bias.requires_grad)
    return (
        x.device.type in FUSED_ON
        and not (batchnorm.training or learns)
        and x.dtype != torch.float64
        and 0 < x.numel() < 2**31
        and type(x) is torch.Tensor  # and no stand-in for one, which has no memory
        and not torch.compiler.is_compiling()  # who compiles the whole network gets it in one piece
        and has_compiler(x.device)
    )
