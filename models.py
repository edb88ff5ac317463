"""The classifier, and the hooks that record its internal representation.

The network is the WideResNet of the public adversarially-trained weights (Gowal et al. 2020; Wang et al. 2023; Cui et
al. 2023): SiLU activations, pre-activation blocks, its own input normalisation, global average pooling. Everything
outside it speaks pixels in [0, 1].

Shapes: B batch, C, H, W image, K classes. A representation is a list of tensors (B, c_i, h_i, w_i).

    classifier = WideResNet(num_classes=10, depth=28, width=10)
    logits, representation = record(classifier, representation_layers(28), x)
"""

from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


# --------------------------------------------------------------------------------------------------- the WideResNet


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution without bias. With stride 2 it pads on the right and at the bottom only, as the public weights
    expect (they were made for TensorFlow's "same" padding)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__(in_channels, out_channels, 3, stride, padding=1 if stride == 1 else 0, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if self.stride == (1, 1) else F.pad(x, (0, 1, 0, 1)))


class Norm(nn.BatchNorm2d):
    """BatchNorm2d that in eval mode is what it then amounts to: x * scale + shift, (B, C, H, W) -> (B, C, H, W).

    PyTorch's own keeps x for the backward pass and goes through it again; this one keeps C numbers. In training mode,
    and where autocast made x bfloat16 (scale and shift would lose digits), it is PyTorch's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training or x.dtype != self.weight.dtype:
            return super().forward(x)
        scale = self.weight / (self.running_var + self.eps).sqrt()  # (C,)
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift.view(-1, 1, 1), x, scale.view(-1, 1, 1))


@contextmanager
def statistics_kept(network: nn.Module):
    """Inside, BatchNorm in training mode does not count the pictures in its running statistics: it saw them before."""
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(layer, layer.momentum, layer.num_batches_tracked.clone()) for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum, counter in before:
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(counter)


class Block(nn.Module):
    """BN, SiLU, 3x3 convolution, twice, around a skip connection. Where the number of channels changes, the skip is a
    1x1 convolution of the *activated* input; elsewhere it is the input itself."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.batchnorm_0 = Norm(in_channels, momentum=0.01)
        self.conv_0 = Conv3x3(in_channels, out_channels, stride)
        self.batchnorm_1 = Norm(out_channels, momentum=0.01)
        self.conv_1 = Conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = F.silu(self.batchnorm_0(x))
        out = self.conv_1(F.silu(self.batchnorm_1(self.conv_0(activated))))
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
        self.batchnorm = Norm(widths[3], momentum=0.01)
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
        features = F.silu(self.batchnorm(features))
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


_innermost_recording: ContextVar[dict | None] = ContextVar("innermost_recording", default=None)


def record(classifier: nn.Module, layers: list[str], x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run the classifier once and keep the outputs of the named layers.

    Nothing is detached: the representation is differentiable in x whenever gradients are enabled. The hooks are removed
    whatever happens, exceptions included. A recording inside another one (or in another thread) does not disturb it: a
    hook only writes while its own recording is the innermost.

    Returns:
        logits (B, K) and the representation, a list of (B, c_i, h_i, w_i) in the order of `layers`.
    Raises:
        ValueError: the classifier has no such layer, or did not run it.
    """
    modules = dict(classifier.named_modules())
    if missing := [name for name in layers if name not in modules]:
        raise ValueError(f"the classifier has no layer named {', '.join(missing)}")
    recorded: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, inputs, output):
            if _innermost_recording.get() is recorded:
                recorded[name] = output

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
    token = _innermost_recording.set(recorded)
    try:
        logits = classifier(x)
    finally:
        _innermost_recording.reset(token)
        for handle in handles:
            handle.remove()
    if missing := [name for name in layers if name not in recorded]:
        raise ValueError(f"the classifier's forward did not run {', '.join(missing)}")
    return logits, [recorded[name] for name in layers]
