"""Train CARSO on pictures that are attacked once, before the training, instead of anew for every batch (ours).

    python -m lab.attack_once --versions 4 --dataset cifar10        # and any other option of train.py

The classifier never changes, nor do the pictures: `--versions` adversarial versions of the training set are kept in
runs/NAME/attacked/, and every batch draws from them. Four are every kind of attack once. RESULTS.md says what it costs
in robustness.
"""

import argparse
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

import data as datasets
from attacks import KINDS, adversarially_balanced_batch, balanced_kinds, project
from models import load_tensors, run_script, save_tensors
from train import Preset, Run, Stopped, main

CHUNK = 256  # pictures that are attacked, and kept in a file, together, whatever the number of processes


def attack_once(versions: int, run: Run, data: datasets.Dataset, classifier: nn.Module, p: Preset, micro_batch):
    """Instead of train.attack_every_batch: the same share of each batch is perturbed, by kinds in the same turns, but
    the pictures are those of `attack_training_set`. A picture takes the version that has the kind whose turn it is;
    with fewer than four versions there is none for every turn, and the even split over the kinds holds over time.
    Beyond four, epochs take turns."""
    differences, share = attack_training_set(versions, run, data, classifier, p, micro_batch), run.ranks.share

    def perturb(clean, y, indices, epoch, first, generator):
        kinds = share(balanced_kinds(first, len(indices), p.fraction))
        rows = (kinds >= 0).nonzero().squeeze(1)
        pictures = share(indices)[rows]
        version = (kinds[rows] - pictures + len(KINDS) * epoch) % versions
        change = differences[version, pictures].to(clean)
        radius = p.eps * torch.where((pictures + version) % 2 == 0, 0.5, 1.0).to(clean)[:, None, None, None]
        rows = rows.to(clean.device)
        return clean.index_copy(0, rows, project(clean[rows] + change, clean[rows], radius))

    return perturb


def attack_training_set(versions: int, run: Run, data: datasets.Dataset, classifier, p: Preset, micro_batch):
    """Attacked minus clean pictures, float16, (versions, N, C, H, W), on the CPU. Version v has picture i attacked by
    kind (i + v) mod 4; PGD's random starts follow from seed, version and picture.

    Each process makes its share of the chunks, and all get all. A chunk is a file, so that a killed run goes on."""
    ranks, count = run.ranks, len(data.train_labels)
    differences = torch.zeros((versions, *data.train_images.shape), dtype=torch.float16)
    chunks = [(version, part) for version in range(versions) for part in torch.arange(count).split(CHUNK)]
    run.say(f"attack: {versions} version(s) of {count} pictures")
    with run.stopping_gently():
        for version, part in tqdm(chunks[ranks.rank :: ranks.count], "attack", leave=False, disable=None):
            path = run.folder / "attacked" / f"{version}-{int(part[0]):07}.pt"
            if not path.is_file():
                images, y = data.train_images[part], data.train_labels[part].to(ranks.device)
                x, generator = datasets.pixels(images.to(ranks.device)), run.generator("attack", version, int(part[0]))
                noise = 2 * torch.rand(x.shape, generator=generator, device=x.device) - 1
                for rows in torch.arange(len(x)).split(micro_batch or len(x)):
                    with torch.autocast(x.device.type, torch.bfloat16, enabled=p.bf16):
                        attacked = adversarially_balanced_batch(
                            classifier, x[rows], y[rows], p.eps, 1.0, p.attack_steps, p.attack_step_size,
                            first=int(part[0]) + version + int(rows[0]), noise=noise[rows],
                        )  # fmt: skip
                    differences[version, part[rows]] = (attacked - x[rows]).cpu().half()
                save_tensors(path, {"differences": differences[version, part]})
            differences[version, part] = load_tensors(path)["differences"]
            if run.stopping:
                break
        if ranks.sum(torch.tensor(float(run.stopping), device=ranks.device)) > 0:  # all stop where one is asked to
            raise Stopped("stopped in the attack on the training set, and saved")
    for whole in differences:  # the other processes' places hold zeros
        whole.copy_(ranks.sum(whole.to(ranks.device)))
    return differences


def train_on_versions(argv=None) -> int:
    parser = argparse.ArgumentParser("attack_once", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--versions", type=int, default=4, help="of the training set (default: 4, every kind once)")
    args, rest = parser.parse_known_args(argv)
    if args.versions < 1:
        raise ValueError(f"--versions {args.versions} is not 1 or more")
    return main(rest, partial(attack_once, args.versions), versions=args.versions)


if __name__ == "__main__":
    run_script("attack_once", train_on_versions)
