"""kill -9 at random moments, again and again: is the result bit for bit that of a run that was left alone?

    python -m lab.torture                          # train.py (all three stages) and evaluate.py, 25 kills each
    python -m lab.torture --kills 500 --seed 1     # longer
    python -m lab.torture --only evaluate

A tiny data set and tiny budgets, on the CPU, in one thread. A command is started, killed after a random time, started
again, ..., until it ends; then its result is compared, and the next round begins in an empty folder. Exit status 1 if
a result differs, 2 if a command fails.
"""

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from lab.presets import COUNT, check_bounds

ROOT = Path(__file__).parent.parent
TRAIN = (
    "--dataset ../tiny.npz --preset digits --name run --epochs 3 --batch-size 9 --classifier-epochs 2 --attack-steps 2 "
    "--attack-versions 2 --classifier-batch-size 24 --classifier-attack-steps 1 --device cpu --save-every 0 "
)
SIZES = "--condition-dim 8 --latent-dim 4 --decoder-width 8 --samples 2"
END = "--objective end-to-end --from ../carso.pt --end-epochs 2 --end-batch-size 9 --end-attack-steps 2"
EVALUATE = (
    "--ckpt ../carso.pt --out evaluation --pictures 8 --steps 2 --eot 2 --queries 3 --targets 1 --select 2 --draws 2 "
    "--chunk 2 --device cpu --attack standard rand apgd"
)


def weights(folder: Path) -> bytes:
    """A hash of all tensors of the result of a training, and its log."""
    content = torch.load(folder / "runs" / "run" / "carso.pt", weights_only=True)
    found = hashlib.blake2b()
    for part in ("classifier_weights", "purifier_weights"):
        for name, tensor in content[part].items():
            found.update(name.encode() + tensor.numpy().tobytes())
    for log in sorted((folder / "runs" / "run").glob("log*.tsv")):
        found.update(log.read_bytes())
    return found.digest()


def rows(folder: Path) -> bytes:
    return (folder / "evaluation" / "rows.tsv").read_bytes()


def survive(command: list, folder: Path, result, kills: int, rng: random.Random) -> tuple[int, bool]:
    """Run a command in new folders inside this one, killed at least so many times at random moments. How many it were,
    and whether result(folder) was each time that of a run that was left alone. RuntimeError if the command fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(inside: Path):
        return subprocess.Popen(command, cwd=inside, env=environment, stdout=log, stderr=subprocess.STDOUT)

    with tempfile.TemporaryDirectory(dir=folder) as left_alone, tempfile.TemporaryFile() as log:
        began = time.monotonic()
        _succeeded(start(Path(left_alone)), log)
        wanted, longest = result(Path(left_alone)), time.monotonic() - began
        done = 0
        while done < kills:
            with tempfile.TemporaryDirectory(dir=folder) as killed:
                while True:
                    process = start(Path(killed))
                    try:
                        process.wait(rng.uniform(0, longest) if done < kills else None)
                        break
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()
                        done += 1
                _succeeded(process, log)
                if result(Path(killed)) != wanted or list(Path(killed).rglob("*.part")):
                    return done, False
    return done, True


def _succeeded(process: subprocess.Popen, log) -> None:
    if process.wait() not in (0, 3):  # 3: an audit that failed, as it may on such a model
        log.seek(0)
        raise RuntimeError(log.read().decode(errors="replace")[-2000:])


def main() -> int:
    parser = argparse.ArgumentParser("torture", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="of each script, at least (default: 25)")
    parser.add_argument("--only", choices=["train", "end-to-end", "evaluate"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        check_bounds("--kills", args.kills, COUNT)
        return torture(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"torture: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("torture: stopped", file=sys.stderr)
        return 130


def torture(args: argparse.Namespace) -> int:
    script = {name: [sys.executable, str(ROOT / f"{name}.py")] for name in ("train", "evaluate")}
    work = {
        # two of the three stages
        "train": (script["train"] + (TRAIN + SIZES).split(), weights, (2 * args.kills + 2) // 3),
        "end-to-end": (script["train"] + (TRAIN + END).split(), weights, (args.kills + 2) // 3),
        "evaluate": (script["evaluate"] + EVALUATE.split(), rows, args.kills),
    }
    with tempfile.TemporaryDirectory() as folder:
        folder, generator = Path(folder), np.random.default_rng(0)
        labels = np.arange(72) % 3
        images = (40 * labels[:, None, None, None] + generator.integers(0, 60, (72, 32, 32, 1))).astype(np.uint8)
        arrays = dict(train_images=images, train_labels=labels, test_images=images[:12], test_labels=labels[:12])
        np.savez(folder / "tiny.npz", **arrays)
        if args.only != "train":  # something to go on from, and to attack
            (folder / "first").mkdir()
            with tempfile.TemporaryFile() as log:
                _succeeded(subprocess.Popen(work["train"][0], cwd=folder / "first", stdout=log, stderr=log), log)
            shutil.copy(folder / "first" / "runs" / "run" / "carso.pt", folder)
        for name, (command, result, kills) in work.items():
            if args.only in (None, name):
                done, survived = survive(command, folder, result, kills, random.Random(args.seed))
                print(
                    f"{name}: {done} kills, {'bitwise the same result' if survived else 'ANOTHER RESULT'}", flush=True
                )
                if not survived:
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
