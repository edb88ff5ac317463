"""Train CARSO on pictures that are attacked once, before the training, instead of anew for every batch (ours).

    python -m lab.attack_once --versions 4 --dataset cifar10        # and any other option of train.py

The classifier never changes, nor do the pictures: `--versions` adversarial versions of the training set are kept in
runs/NAME/attacked/, and every batch draws from them. Four are every kind of attack once. RESULTS.md says what it costs
in robustness. NAME is the data set's and -once, unless --name says otherwise.
"""

import argparse
import functools

import torch
from torch import nn

import data as datasets
import train
from attacks import KINDS, adversarially_balanced_batch, balanced_kinds, project
from models import load_tensors, run_script, save_tensors
from train import Run, name_folder, parse_arguments, split_rows

CHUNK = 256  # pictures that are attacked, and kept in a file, together, whatever the number of processes


def attack_once(versions: int, run: Run, classifier: nn.Module, batches):
    """Instead of train.attack_batches: the same share of each batch is perturbed, by kinds in the same turns, but the
    pictures are those of `attack_training_set`. A picture takes the version that has the kind whose turn it is; with
    fewer than four versions there is none for every turn, and the even split over the kinds holds over time. Beyond
    four, epochs take turns."""
    differences = attack_training_set(versions, run, classifier)
    for batch in batches:
        clean, _ = run.load_pictures(batch)
        kinds = run.ranks.share(balanced_kinds(batch.first, len(batch.indices), run.p.fraction))
        rows = (kinds >= 0).nonzero().squeeze(1)
        pictures = run.ranks.share(batch.indices)[rows]
        version = (kinds[rows] - pictures + len(KINDS) * batch.epoch) % versions
        change = differences[version, pictures].to(clean)
        radius = run.p.eps * torch.where((pictures + version) % 2 == 0, 0.5, 1.0).to(clean)[:, None, None, None]
        rows = rows.to(clean.device)
        yield batch, clean.index_copy(0, rows, project(clean[rows] + change, clean[rows], radius))


@functools.cache  # each epoch asks for it
def attack_training_set(versions: int, run: Run, classifier: nn.Module) -> torch.Tensor:
    """Attacked minus clean pictures, float16, (versions, N, C, H, W), on the CPU. Version v has picture i attacked by
    kind (i + v) mod 4; PGD's random starts follow from seed, version and picture.

    Each process makes its share of the chunks, and all get all. A chunk is a file, so that a killed run goes on."""
    ranks, p = run.ranks, run.p
    differences = torch.zeros((versions, *run.images.shape), dtype=torch.float16)
    chunks = [(version, part) for version in range(versions) for part in torch.arange(len(run.labels)).split(CHUNK)]
    run.say(f"attack: {versions} version(s) of {len(run.labels)} pictures")
    for number, (version, part) in enumerate(chunks[ranks.rank :: ranks.count]):
        run.say(f"attack: chunk {number * ranks.count} of {len(chunks)}", after=60)
        path = run.folder / "attacked" / f"{version}-{int(part[0]):07}.pt"
        if not path.is_file():
            x, y = datasets.pixels(run.images[part]), run.labels[part]
            generator = run.make_generator("attack", version, int(part[0]))
            noise = 2 * torch.rand(x.shape, generator=generator, device=x.device) - 1
            for rows in split_rows(len(x), run.micro_batch):
                first = int(part[0]) + version + rows.start
                with run.autocast():
                    attacked = adversarially_balanced_batch(
                        classifier, x[rows], y[rows], p.eps, 1.0, p.attack_steps, p.attack_step_size,
                        first=first, noise=noise[rows],
                    )  # fmt: skip
                differences[version, part[rows]] = (attacked - x[rows]).cpu().half()
            save_tensors(path, {"differences": differences[version, part]})
        differences[version, part] = load_tensors(path)["differences"]
    for whole in differences:  # the other processes' places hold zeros
        whole.copy_(ranks.sum(whole.to(ranks.device)))
    return differences


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("attack_once", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--versions", type=int, default=4, help="of the training set (default: 4, every kind once)")
    own, rest = parser.parse_known_args(argv)
    if own.versions < 1:
        raise ValueError(f"--versions {own.versions} is not 1 or more")
    args = parse_arguments(rest)
    if args.name is None:  # not the folder of train.py's own pictures
        rest.append(f"--name={name_folder(args.dataset, None, '-once').name}")
    return train.main(rest, functools.partial(attack_once, own.versions), versions=own.versions)


if __name__ == "__main__":
    run_script("attack_once", main)
