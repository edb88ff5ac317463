"""Weights in and out: CARSO's own checkpoint, and every published weight file, recognised by its content or refused.

    save_checkpoint("carso.pt", carso, dataset="digits")
    carso, state = load_checkpoint("carso.pt")
    classifier = load_published_classifier("cifar10_linf_wrn28-10.pt", num_classes=10)
    carso = load_published("folder of the authors' four files", num_classes=10, image_shape=(3, 32, 32))

Every function raises ValueError with one sentence that names the file and says what is wrong with it.
"""

import hashlib
from itertools import zip_longest
from pathlib import Path

import torch
from torch import nn

from data import NORMALISATION, Dataset
from lab.files import write_atomically
from lab.foreign import check_answers
from lab.tensors import load_state, read_tensors
from models import WideResNet, representation_layers
from purifier import CARSO, Purifier, build_carso

# ------------------------------------------------------------------------------------------- CARSO's own checkpoint


def built(path, kind: type, arguments, *more, **others):
    """kind(**arguments), both read from path. ValueError if these are not its arguments, or make no sense."""
    try:
        return kind(*more, **arguments, **others)
    except Exception as error:  # whatever a network's constructor says to strange numbers
        raise ValueError(f"{path} describes no {kind.__name__} that can be built ({error})") from None


def save_checkpoint(path, carso: CARSO, **state) -> None:
    """One file that needs nothing else: constructors' arguments, weights of classifier and purifier, and `state`, which
    may hold only plain types and tensors (strings, numbers, lists, dicts). ValueError for another classifier than a
    WideResNet, which could not be built again from its weights."""
    if not all(isinstance(getattr(network, "config", None), dict) for network in (carso.classifier, carso.labeller)):
        raise ValueError(f"{path}: only a CARSO around a WideResNet can be kept in one file; keep its state_dict()")
    content = {
        "format": "carso-1",
        "classifier": carso.classifier.config,
        "classifier_weights": carso.classifier.state_dict(),
        "purifier": carso.purifier.config,
        "purifier_weights": carso.purifier.state_dict(),
        "layers": carso.layers,
        "samples": carso.samples,
        "own_answer": carso.own_answer,
        "final": carso.final and carso.final.config,
        "final_weights": carso.final and carso.final.state_dict(),
        "state": state,
    }
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path, device="cpu") -> tuple[CARSO, dict]:
    """The defence that `save_checkpoint` wrote, in eval mode on `device`, and its `state`.

    Opened with weights_only=True. Raises ValueError if the file is missing, broken, or of another format."""
    content = read_tensors(path)
    if content.get("format") != "carso-1":
        raise ValueError(f"{path} is not a CARSO checkpoint (train.py writes one as runs/NAME/carso.pt); weights of a "
                         "classifier go with --dataset")  # fmt: skip
    kinds = dict(classifier=dict, purifier=dict, layers=list, samples=int, state=dict)
    if wrong := [part for part, kind in kinds.items() if not isinstance(content.get(part), kind)]:
        raise ValueError(f"{path} is a CARSO checkpoint without {', '.join(wrong)}")
    state, said = content["state"], dict(dataset=str, data_dir=str, config=dict, classes=list)
    if wrong := [n for n, kind in said.items() if not isinstance(state.get(n), (kind, type(None)))]:
        raise ValueError(f"{path} says something strange of its training: {wrong[0]} {state[wrong[0]]!r:.50}")
    classifier = built(path, WideResNet, content["classifier"])
    load_state(classifier, content.get("classifier_weights"), path)
    content["purifier"].pop("image_widths", None)  # early checkpoints say what is always so
    purifier = built(path, Purifier, content["purifier"])
    load_state(purifier, content.get("purifier_weights"), path)
    share = content.get("own_answer") or 0.0
    share = 0.5 if share is True else share  # early checkpoints said yes or no
    final = None if content.get("final") is None else built(path, WideResNet, content["final"])
    if final is not None:
        load_state(final, content.get("final_weights"), path)
    rest = dict(layers=content["layers"], samples=content["samples"], own_answer=share, final=final)
    return built(path, CARSO, rest, classifier, purifier).to(device), state


def is_checkpoint(path) -> bool:
    """Is this a file of save_checkpoint's, and not one of a classifier's weights?"""
    return "format" in read_tensors(path)


def check_fits(carso: CARSO, path, name: str, image_shape, num_classes: int, trained_on=None, classes=None) -> None:
    """ValueError if this defence, read from path, is not made for the pictures and classes of data `name`, or if the
    names of the classes that it was trained on are others."""
    made_for = tuple(carso.purifier.config["image_shape"]), carso.labeller.config["num_classes"]
    given = tuple(image_shape), num_classes
    if given != made_for:
        raise ValueError(
            f"{path} takes pictures {made_for[0]} of {made_for[1]} classes; {name} has {given[0]} of {given[1]}"
        )
    if trained_on and classes and list(trained_on) != list(classes):
        k, (a, b) = next((k, pair) for k, pair in enumerate(zip_longest(trained_on, classes)) if pair[0] != pair[1])
        raise ValueError(f"{path} was trained on other classes: its class {k} is {a}, that of {name} is {b}")


def fingerprint_of(model: nn.Module) -> str:
    """Of every tensor in its state dict, and of what else is in that, as hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)

    def add(name, value):
        if isinstance(value, (tuple, list, dict)):  # a quantised network's, say
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                add(f"{name} {key}", part)
        elif isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            value = value.dequantize() if value.is_quantized else value.to_dense()
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name} {value}".encode())

    for name, value in sorted(model.state_dict().items()):
        add(name, value)
    return digest.hexdigest()


def load_start(path, data: Dataset, device) -> CARSO:
    """A trained CARSO to go on from. ValueError if there is none, or it is of other data."""
    if not Path(path).is_file():
        raise ValueError(f"there is no {path} to start from: train with --objective paper first, or say --from scratch")
    carso, state = load_checkpoint(path, device)
    shape = data.train_images.shape[1:]
    check_fits(carso, path, data.name, shape, len(data.classes), state.get("classes"), data.classes)
    check_answers(carso, path, data.test_images, len(data.classes), device)
    return carso


# ------------------------------------------------------------------------------------------------- published weights

# Data sets whose classifiers are published, by number of classes: their statistics are what was trained with.
PUBLISHED_DATA = {10: "cifar10", 100: "cifar100", 200: "tinyimagenet"}


def load_published_classifier(path, num_classes: int, mean=None, std=None, trust_pickle: bool = False) -> WideResNet:
    """A classifier from a file of published weights, recognised by its content, whatever its name.

    Understands Wang et al. 2023 (`model_state_dict`: the averaged weights), Cui et al. 2023, RobustBench's copies and
    the CARSO authors' safetensors; depth, width and channels are read off the tensors. The result is in eval mode.

    Args:
        mean, std: the normalisation of the data it was trained on, where the file does not hold its own. Default: that
            of the paper's data set with this number of classes.
        trust_pickle: open an old checkpoint that holds more than plain tensors. This runs code from the file.
    Raises:
        ValueError: with one sentence on what is wrong: a web page, no checkpoint, a state dict that does not fit.
    """
    content = read_tensors(path, trust_pickle)
    if "classifier_weights" in content:
        raise ValueError(
            f"{path} is a whole CARSO; its classifier alone is in the classifier.pt that was made before it"
        )
    weights = _strip_wrapping(content)
    buffers = {name: weights.pop(name) for name in ("mean", "std", "mu", "sigma") if name in weights}
    if mean is None:
        mean, std = NORMALISATION.get(PUBLISHED_DATA.get(num_classes), (None, None))
    mean, std = buffers.get("mean", buffers.get("mu", mean)), buffers.get("std", buffers.get("sigma", std))
    if mean is None or std is None:
        raise ValueError(f"{path} holds no mean and std, and {num_classes} classes name none: pass mean= and std=")

    stem, blocks = weights.get("init_conv.weight"), 0
    first = weights.get("layer.0.block.0.conv_0.weight")
    while f"layer.0.block.{blocks}.conv_0.weight" in weights:
        blocks += 1
    if stem is None or first is None or not stem.ndim == first.ndim == 4:
        raise ValueError(f"{path} is not one of the public WideResNets; its first keys are {list(weights)[:4]}")
    sizes = dict(depth=6 * blocks + 4, width=first.shape[0] // 16, in_channels=stem.shape[1])
    classifier = built(path, WideResNet, sizes | dict(mean=mean, std=std), num_classes)
    load_state(classifier, weights, path)
    return classifier.eval()


def _strip_wrapping(checkpoint: dict) -> dict[str, torch.Tensor]:
    """Down to {public name: tensor}: unwrap nested dicts, drop prefixes and the left-overs of other training codes."""
    while isinstance(checkpoint, dict):
        inner = [key for key in ("model_state_dict", "state_dict", "model") if isinstance(checkpoint.get(key), dict)]
        if not inner:
            break
        checkpoint = checkpoint[inner[0]]
    if not isinstance(checkpoint, dict):
        return {}
    weights = {}
    for name, tensor in checkpoint.items():
        name = str(name).replace("_orig_mod.", "")  # torch.compile's
        while name.startswith(("module.", "model.", "0.")):
            name = name.split(".", 1)[1]
        if isinstance(tensor, torch.Tensor) and "sub_block" not in name and name != "n_averaged":
            weights[name] = tensor
    return weights


def load_published_purifier(carso: CARSO, repr_compressors, repr_fcn_compressor, decoder) -> CARSO:
    """Fill carso's purifier from the authors' three safetensors files and return carso.

    They published what inference needs and not the encoder, which keeps its initial weights: such a purifier can be
    evaluated, not trained further. Raises ValueError, naming the keys, when a file does not fit."""
    p = carso.purifier
    for module, path, renamed in (
        (p.layer_encoders, repr_compressors, ("", "")),
        (p.condition_head, repr_fcn_compressor, ("1.", "")),  # their block follows a flattening layer
        (p.decoder, decoder, ("0.1.", "0.0.")),  #              their Linear follows a concatenation
    ):
        theirs, ours = renamed
        weights = {
            ours + name.removeprefix(theirs) if name.startswith(theirs) else name: tensor
            for name, tensor in read_tensors(path).items()
        }
        load_state(module, weights, path)
    return carso.eval()


PUBLISHED_PARTS = ("repr_compressors", "repr_fcn_compressor", "decoder")


def load_published(folder, num_classes: int, image_shape, samples: int = 8) -> CARSO:
    """The authors' released defence from the folder that holds their four safetensors files: the classifier's, and
    those whose names end with PUBLISHED_PARTS. D, Z and the widths are read off the tensors. Raises ValueError."""
    files = sorted(Path(folder).glob("*.safetensors"))
    parts = {part: [f for f in files if f.stem.endswith(part)] for part in PUBLISHED_PARTS}
    classifiers = [f for f in files if not f.stem.endswith(PUBLISHED_PARTS)]
    for what, found in {**parts, "the classifier's weights": classifiers}.items():
        if len(found) != 1:
            raise ValueError(f"{folder} should hold exactly one .safetensors file of {what}, not {len(found)}")
    classifier = load_published_classifier(classifiers[0], num_classes)
    paths = {part: found[0] for part, found in parts.items()}
    shapes = {part: {k: v.shape for k, v in read_tensors(path).items()} for part, path in paths.items()}
    try:
        condition_dim = shapes["repr_fcn_compressor"]["1.0.weight"][0]
        latent_dim = shapes["decoder"]["0.1.weight"][1] - condition_dim
        decoder_width = shapes["decoder"]["1.0.weight"][0]
    except (KeyError, IndexError) as missing:
        raise ValueError(f"{folder} is not the authors' purifier: there is no such tensor as {missing}") from None
    sizes = dict(condition_dim=condition_dim, latent_dim=latent_dim, decoder_width=decoder_width)
    layers = representation_layers(classifier.config["depth"])
    carso = built(folder, build_carso, sizes, classifier, layers, image_shape, samples)
    return load_published_purifier(carso, **paths)
