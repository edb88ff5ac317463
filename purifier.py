"""The purifier, a conditional variational autoencoder, and CARSO, the assembled defence.

                      +-------------------- the classifier's representation of x ----------------------+
                      |                                                                                |
    x --- image code -+-> joint encoder -> mu, logvar -> z ---- training ------+                       |
                                                                               +-> decoder(z, condition)
                                          z ~ N(0, 1), S draws --- inference --+        -> clean reconstructions

Training (paper, section 4.1): the encoder and the classifier see the *perturbed* picture; the target is the clean one.
Inference: S draws of z from the prior, S reconstructions, the same classifier labels each, `aggregate` makes one
answer.

    carso = build_carso(classifier, layers, image_shape=(3, 32, 32))      # around any classifier, untrained
    carso, state = load_carso("runs/cifar10/carso.pt")                    # as train.py left it
    logits = carso(x)                                                     # (B, C, H, W) in [0, 1] -> (B, K)

Shapes: B batch, C, H, W image in [0, 1], K classes, S members, Z latent, D condition; a representation is a list of
(B, c_i, h_i, w_i).
"""

from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from aggregate import robust_logits
from models import (
    PUBLISHED,
    Activation,
    WideResNet,
    fetch,
    find_batchnorms,
    is_fused,
    load_classifier,
    load_tensors,
    load_weights,
    normalise_and_activate,
    record,
    representation_layers,
    save_tensors,
)

# ---------------------------------------------------------------------------------------------------------- blocks


def leaky_relu(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, 0.2)


def leaky_relu_slope(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, 1.0, 0.2)


LEAKY_RELU = Activation(leaky_relu, leaky_relu_slope)


class ConvBlock(nn.Sequential):
    """A convolution or a transposed one, BatchNorm2d, LeakyReLU."""

    def __init__(self, convolution: nn.Module):
        super().__init__(convolution, nn.BatchNorm2d(convolution.out_channels), nn.LeakyReLU(0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        convolution, batchnorm, activate = self
        x = convolution(x)
        if is_fused(batchnorm, x):
            return normalise_and_activate(batchnorm, x, LEAKY_RELU)
        return activate(batchnorm(x))


def conv_block(in_channels: int, out_channels: int, stride: int = 1, padding: int = 0) -> nn.Sequential:
    return ConvBlock(nn.Conv2d(in_channels, out_channels, 3, stride, padding, bias=False))


def deconv_block(in_channels: int, out_channels: int, output_padding: int) -> nn.Sequential:
    return ConvBlock(nn.ConvTranspose2d(in_channels, out_channels, 3, 2, 1, output_padding, bias=False))


def fc_block(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_features, out_features, bias=False), nn.BatchNorm1d(out_features), nn.LeakyReLU(0.2)
    )


def layer_encoder(channels: int, convolutions: int) -> nn.Sequential:
    """One tapped layer's CNN (tables 6 and 7): c -> c/2 -> c/4 -> c/8 (-> c/16), rounded up, 3x3, no padding."""
    widths = [-(-channels // 2**i) for i in range(convolutions + 1)]
    return nn.Sequential(*(conv_block(a, b) for a, b in zip(widths, widths[1:])))


@contextmanager
def statistics_kept(network: nn.Module):
    """Inside, BatchNorm in training mode does not count the pictures in its running statistics: it saw them before."""
    layers = find_batchnorms(network)
    before = [(layer, layer.momentum, layer.num_batches_tracked.clone()) for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum, counter in before:
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(counter)


# The two geometries of the paper, by image size:
# (convolutions a tapped layer, side of the decoder's first map, output padding of its deconvolutions, last kernel)
GEOMETRY = {
    32: (3, 3, 0, 2),  # 3 -> 5 -> 9 -> 17 -> 33 -> 32 pixels (tables 6 and 10)
    64: (4, 4, 1, 3),  # 4 -> 8 -> 16 -> 32 -> 64 -> 64 pixels (tables 7 and 11)
}


# -------------------------------------------------------------------------------------------- the conditional VAE


class Purifier(nn.Module):
    """Conditional VAE that reconstructs a clean picture from the classifier's representation of a perturbed one.

    Args:
        representation_shapes: [(c_i, h_i, w_i)] of the tapped layers.
        image_shape: (C, H, W), H = W = 32 or 64.
        condition_dim, latent_dim: D and Z (paper: 512 and 128; 768 and 192 for 64 px).
        mean, std: of the training data; the image encoder standardises its input (paper, appendix E.1).
        decoder_width: channels of the decoder's first map; they halve three times (tables 10 and 11).
    """

    def __init__(
        self, representation_shapes, image_shape, condition_dim: int, latent_dim: int, mean, std, decoder_width=256
    ):
        super().__init__()
        representation_shapes = [tuple(int(n) for n in shape) for shape in representation_shapes]
        channels, height, width = image_shape
        if height != width or height not in GEOMETRY:
            raise ValueError(f"the purifier's pictures are 32x32 or 64x64, not {height}x{width}")
        convolutions, side, output_padding, last_kernel = GEOMETRY[height]
        for number, shape in enumerate(representation_shapes):
            if len(shape) != 3 or min(shape[1:]) <= 2 * convolutions:
                raise ValueError(
                    f"layer {number} of the representation is {shape}; the purifier's {convolutions} convolutions need "
                    f"maps (c, h, w) of more than {2 * convolutions} pixels: tap an earlier layer"
                )
        mean, std = (tuple(np.ravel(m).astype(float).tolist()) for m in (mean, std))
        if not len(mean) == len(std) == channels:
            raise ValueError(
                f"mean {mean} and std {std} need one number for each of the pictures' {channels} channel(s)"
            )
        self.config = dict(representation_shapes=representation_shapes, image_shape=tuple(image_shape))
        self.config |= dict(condition_dim=condition_dim, latent_dim=latent_dim, mean=mean, std=std)
        self.config |= dict(decoder_width=decoder_width)
        self.recompute = False  # True trades time for memory in training: see _code
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

        # Condition: a CNN for each tapped layer, then one FC block over all of them (tables 6 to 8).
        self.layer_encoders = nn.ModuleList(layer_encoder(c, convolutions) for c, _, _ in representation_shapes)
        # A 3x3 convolution without padding takes 2 pixels from each side length.
        code_size = sum(
            -(-c // 2**convolutions) * (h - 2 * convolutions) * (w - 2 * convolutions)
            for c, h, w in representation_shapes
        )
        self.condition_head = fc_block(code_size, condition_dim)

        # Encoder: image code, joined with the condition (tables 4 and 9).
        self.image_encoder = nn.Sequential(
            conv_block(channels, 6, stride=2, padding=1), conv_block(6, 12, stride=2, padding=1)
        )
        self.joint_head = fc_block(12 * (height // 4) * (width // 4) + condition_dim, latent_dim)
        self.to_mu = nn.Linear(latent_dim, latent_dim)
        self.to_logvar = nn.Linear(latent_dim, latent_dim)

        # Decoder (tables 10 and 11).
        w = decoder_width
        self.decoder = nn.Sequential(
            nn.Sequential(
                nn.Linear(latent_dim + condition_dim, w * side * side),
                nn.LeakyReLU(0.2),
                nn.Unflatten(1, (w, side, side)),
            ),
            deconv_block(w, w, output_padding),
            deconv_block(w, w // 2, output_padding),
            deconv_block(w // 2, w // 4, output_padding),
            deconv_block(w // 4, w // 8, output_padding),
            nn.ConvTranspose2d(w // 8, channels, last_kernel, stride=1, padding=1),
            nn.Sigmoid(),
        )
        self.to(memory_format=torch.channels_last)  # the layout that fast convolutions want

    def condition(self, representation: list[torch.Tensor]) -> torch.Tensor:
        """List of (B, c_i, h_i, w_i) -> (B, D)."""
        codes = [self._code(encoder, layer) for encoder, layer in zip(self.layer_encoders, representation, strict=True)]
        return self.condition_head(torch.cat(codes, dim=1))

    def _code(self, encoder: nn.Module, layer: torch.Tensor) -> torch.Tensor:
        if self.recompute and self.training:  # inner activations are not kept but computed again in the backward pass
            twice = lambda: (nullcontext(), statistics_kept(encoder))  # noqa: E731
            return checkpoint(encoder, layer, use_reentrant=False, context_fn=twice).flatten(1)
        return encoder(layer).flatten(1)

    def encode(self, x: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, H, W) in [0, 1], (B, D) -> mu, logvar of z given both, each (B, Z)."""
        image_code = self.image_encoder((x - self.mean) / self.std).flatten(1)
        joint = self.joint_head(torch.cat([image_code, condition], dim=1))
        return self.to_mu(joint), self.to_logvar(joint)

    def decode(self, z: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """(B, Z), (B, D) -> reconstruction (B, C, H, W) in (0, 1)."""
        logits = self.decoder[:-1](torch.cat([z, condition], dim=1))
        return self.decoder[-1](logits.to(z.dtype))  # the sigmoid in full, also under autocast: bfloat16 has no 0.999

    def forward(self, x: torch.Tensor, representation: list[torch.Tensor], noise: torch.Tensor | None = None):
        """The training pass: perturbed pictures and the classifier's representation of them -> reconstruction, mu,
        logvar.

        noise: the standard normal draw of the reparameterisation, (B, Z); torch's global generator draws it when
        None."""
        condition = self.condition(representation)
        mu, logvar = self.encode(x, condition)
        noise = torch.randn_like(mu) if noise is None else noise
        z = mu + noise * torch.exp(0.5 * logvar)
        return self.decode(z, condition), mu, logvar


def vae_loss(reconstruction, clean, mu, logvar, beta: float):
    """bce + beta * kld, each summed over pixels, channels and the batch (paper, section 5.1).

    bce: binary cross-entropy of the reconstruction against the clean picture, both (B, C, H, W) in [0, 1].
    kld: KL divergence of N(mu, exp(logvar)) from the standard normal, mu and logvar (B, Z).
    Returns three scalars (loss, bce, kld): NaN where a reconstruction is, which makes PyTorch's own raise."""
    whole = reconstruction.isfinite().all()
    bce = F.binary_cross_entropy(reconstruction.nan_to_num(0.5), clean, reduction="sum").where(whole, torch.nan)
    kld = 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum()
    return bce + beta * kld, bce, kld


# --------------------------------------------------------------------------------------------- the whole defence


class CARSO(nn.Module):
    """A frozen classifier, its purifier, and the aggregation: pictures (B, C, H, W) in [0, 1] -> logits (B, K).

    Differentiable in x from end to end. The classifier is held, not copied; its parameters are frozen (requires_grad
    False) and it stays in eval mode whatever `train()` says. The latent draws come from a generator of CARSO's own, so
    that seeding the global one, as AutoAttack does, never makes the defence repeat itself; see `manual_seed`.

    Args:
        layers: names of the tapped layers, one for each of the purifier's representation_shapes.
        samples: S, reconstructions a picture (paper: 8). 0: one, of z = 0 (the authors' ensemble_size = 0).
        final: another classifier, to label the reconstructions; None: the one that looks at the picture (the paper's).
    """

    def __init__(
        self, classifier: nn.Module, purifier: Purifier, layers: list[str], samples: int = 8, seed: int = 0,
        final: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        if len(layers) != len(purifier.config["representation_shapes"]):
            raise ValueError(
                f"{len(layers)} layers for a purifier of {len(purifier.config['representation_shapes'])} layers"
            )
        if samples < 0:
            raise ValueError(f"samples, the reconstructions a picture, are 0 or more, not {samples}")
        self.classifier = classifier.requires_grad_(False)
        self.final = None if final is None else final.requires_grad_(False)
        self.purifier = purifier
        self.layers, self.samples = list(layers), samples
        self.manual_seed(seed)
        self.eval()

    def train(self, mode: bool = True):
        super().train(mode)
        self.classifier.eval()
        self.labeller.eval()
        return self

    @property
    def labeller(self) -> nn.Module:
        """The classifier that labels the reconstructions."""
        return self.classifier if self.final is None else self.final

    def manual_seed(self, seed: int) -> None:
        """Restart the latent draws: equal seeds give equal draws, on different ranks different ones."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self._seed, self._generator = seed + 1_000_003 * rank, None

    def draw(self, x: torch.Tensor, samples: int) -> torch.Tensor:
        """z ~ N(0, I), (B, samples, Z), on x's device. Where this CARSO's own S is 0: z = 0, (B, 1 or samples, Z)."""
        shape = (len(x), max(samples, 1), self.purifier.config["latent_dim"])
        if self.samples == 0:
            return torch.zeros(shape, device=x.device, dtype=x.dtype)
        if self._generator is None or self._generator.device != x.device:
            self._generator = torch.Generator(x.device).manual_seed(self._seed)
        return torch.randn(shape, generator=self._generator, device=x.device, dtype=x.dtype)

    def answers(self, x: torch.Tensor, z: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, C, H, W), z (B, S, Z) or None to draw it -> reconstructions (B, S, C, H, W) and the members' logits
        (B, S, K).

        The classifier and the condition encoder run once for each picture, however many members z asks for."""
        reconstructions = self.purify(x, z)
        members = reconstructions.shape[:2]
        return reconstructions, self.labeller(reconstructions.flatten(0, 1)).unflatten(0, members)

    def purify(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, C, H, W), z (B, S, Z) or None to draw it -> reconstructions (B, S, C, H, W)."""
        z = self.draw(x, self.samples) if z is None else z
        _, representation = record(self.classifier, self.layers, x)
        return self.decode(z, self.purifier.condition(representation))

    def decode(self, z: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """z (B, S, Z), condition (B, D) -> reconstructions (B, S, C, H, W)."""
        condition = condition.repeat_interleave(z.shape[1], dim=0)  #              (B S, D)
        return self.purifier.decode(z.flatten(0, 1), condition).unflatten(0, z.shape[:2])

    def member_logits(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """The members' logits, (B, S, K)."""
        return self.answers(x, z)[1]

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """Aggregated logits (B, K): logsumexp over the members, the paper's decision (see aggregate.py)."""
        return robust_logits(self.member_logits(x, z))


def build_carso(
    classifier: nn.Module, layers: list[str], image_shape, samples: int = 8, condition_dim: int = 512,
    latent_dim: int = 128, decoder_width: int = 256, mean=None, std=None,
) -> CARSO:  # fmt: skip
    """CARSO with a fresh purifier that fits this classifier, which may be any nn.Module from pixels to logits.

    Args:
        layers: names of modules that put out maps (B, c, h, w); image_shape: (C, H, W).
        condition_dim, latent_dim, decoder_width: of the Purifier; default: the paper's for 32x32 pictures.
        mean, std: of the training data, a number a channel; default: those that a WideResNet holds.
    Raises ValueError: a layer is missing, puts out no maps, or too small ones; mean and std are not known, or not of
        image_shape's channels.
    """
    known = getattr(classifier, "config", {})
    mean, std = (known.get(name) if given is None else given for name, given in (("mean", mean), ("std", std)))
    if mean is None or std is None:
        raise ValueError("this classifier does not say how its data are normalised: pass mean= and std=")
    picture = torch.zeros(1, *image_shape, device=next(classifier.parameters()).device)
    with torch.no_grad():
        _, representation = record(classifier.eval(), layers, picture)
    shapes = [layer.shape[1:] for layer in representation]
    purifier = Purifier(shapes, image_shape, condition_dim, latent_dim, mean, std, decoder_width)
    return CARSO(classifier, purifier, layers, samples)


# --------------------------------------------------------------------------------------------------------- the files


def save_carso(path, carso: CARSO, **state) -> None:
    """One file that needs nothing else: constructors' arguments, weights, and `state`, which may hold plain types and
    tensors only. Raises ValueError for a classifier that is no WideResNet, or a second one, OSError where the file
    cannot be written."""
    if not isinstance(carso.classifier, WideResNet) or carso.final is not None:
        raise ValueError(f"{path}: only a CARSO around one WideResNet can be built again: keep the parts' state_dict()")
    content = {"kind": type(carso).__name__, "layers": carso.layers, "samples": carso.samples, "state": state}
    for name, network in (("classifier", carso.classifier), ("purifier", carso.purifier)):
        content |= {name: network.config, f"{name}_weights": network.state_dict()}
    save_tensors(path, content)


def is_carso(path) -> bool:
    """True if this file is one of save_carso's, False for any other file of tensors."""
    return "purifier_weights" in load_tensors(path)


def load_carso(path, device="cpu", kind: type[CARSO] = CARSO) -> tuple[CARSO, dict]:
    """The defence that `save_carso` wrote, in eval mode on `device`, and its `state`. No code of the file is run.

    kind: CARSO, or a class derived from it, which takes files of both.
    Raises ValueError if the file is missing, cannot be opened, or holds no CARSO of this kind."""
    content = load_tensors(path)
    if "purifier_weights" not in content or "kind" not in content:
        raise ValueError(f"{path} is not a CARSO (train.py writes one as runs/NAME/carso.pt)")
    if content["kind"] not in (CARSO.__name__, kind.__name__):
        raise ValueError(f"{path} holds an {content['kind']}, which is evaluated by python -m lab.evaluate")
    classifier = WideResNet(**content["classifier"])
    load_weights(classifier, content["classifier_weights"], path)
    purifier = Purifier(**content["purifier"])
    load_weights(purifier, content["purifier_weights"], path)
    carso = kind(classifier, purifier, content["layers"], content["samples"])
    return carso.to(device), content["state"]


PUBLISHED_PARTS = ("repr_compressors", "repr_fcn_compressor", "decoder")
PUBLISHED_PREFIX = {  # of the authors' files, which lie beside the paper's classifier
    "cifar10": "wrn_28_10_cifar_10_cui_2023_",
    "cifar100": "wrn_28_10_cifar_100_cui_2023_",
    "tinyimagenet": "wrn_28_10_tinyimagenet_200_wang_2023_",
}


def fetch_published(dataset: str, data_dir) -> Path:
    """The folder with the authors' released defence for a data set, downloaded into data_dir. Raises OSError."""
    classifier, _ = next(iter(PUBLISHED[dataset].values()))
    folder, place = Path(data_dir) / "published" / f"carso-{dataset}", classifier.rpartition("/")[0]
    for part in PUBLISHED_PARTS:
        fetch(f"{place}/{PUBLISHED_PREFIX[dataset]}{part}.safetensors", folder)
    return fetch(classifier, folder).parent


def load_published(folder, num_classes: int, image_shape, mean, std, samples: int = 8) -> CARSO:
    """The authors' released defence, from the folder that holds their four safetensors files: the classifier's, and
    those whose names end with PUBLISHED_PARTS. D, Z and the widths are read off the tensors.

    They published the parts that inference needs, without the encoder: such a purifier cannot be trained further.
    Raises ValueError, with the file's name, for anything else."""
    files = sorted(Path(folder).glob("*.safetensors"))
    paths = {part: [file for file in files if file.stem.endswith(part)] for part in PUBLISHED_PARTS}
    paths["classifier"] = [file for file in files if not file.stem.endswith(PUBLISHED_PARTS)]
    for part, found in paths.items():
        if len(found) != 1:
            raise ValueError(f"{folder} should hold one .safetensors file of the {part}, not {len(found)}")
    classifier = load_classifier(paths["classifier"][0], num_classes, mean, std)
    weights = {part: load_tensors(paths[part][0]) for part in PUBLISHED_PARTS}
    try:
        condition_dim = weights["repr_fcn_compressor"]["1.0.weight"].shape[0]
        latent_dim = weights["decoder"]["0.1.weight"].shape[1] - condition_dim
        decoder_width = weights["decoder"]["1.0.weight"].shape[0]
    except KeyError as missing:
        raise ValueError(f"{folder} is not the authors' purifier: there is no tensor {missing}") from None
    layers = representation_layers(classifier.config["depth"])
    carso = build_carso(classifier, layers, image_shape, samples, condition_dim, latent_dim, decoder_width, mean, std)
    modules = carso.purifier.layer_encoders, carso.purifier.condition_head, carso.purifier.decoder
    # Their FC block follows a flattening layer (0), their decoder's Linear a concatenation (0.0).
    for part, module, (theirs, ours) in zip(PUBLISHED_PARTS, modules, (("", ""), ("1.", ""), ("0.1.", "0.0."))):
        renamed = {
            ours + name.removeprefix(theirs) if name.startswith(theirs) else name: tensor
            for name, tensor in weights[part].items()
        }
        load_weights(module, renamed, paths[part][0])
    return carso.eval()
