"""Files that the version of 99cd9ac wrote (a training of digits-like pictures, an evaluation of four of them)."""

import shutil
import sys

import pytest
import torch
from conftest import TESTS
from test_train import here, refusal

import evaluate
import train
from lab import compare, plot
from lab.checkpoints import load_checkpoint

TRAINED = (
    "--dataset tiny.npz --preset digits --epochs 2 --batch-size 9 --classifier-epochs 1 --classifier-batch-size 24 "
    "--attack-steps 1 --classifier-attack-steps 1 --condition-dim 4 --latent-dim 2 --decoder-width 8 --samples 2 "
    "--device cpu --name old --tap init_conv --attack-versions 0"
).split()
EVALUATED = (
    "--ckpt runs/old/carso.pt --out evaluation --pictures 4 --steps 1 --eot 1 --queries 2 --targets 1 --select 2 "
    "--draws 2 --chunk 4 --device cpu --attack apgd standard"
).split()


@pytest.fixture
def folder(tmp_path):
    shutil.unpack_archive(TESTS / "written_by_99cd9ac.zip", tmp_path)
    return tmp_path


def test_a_checkpoint_loads(folder):
    carso, state = load_checkpoint(folder / "runs" / "old" / "carso.pt")
    assert state["dataset"] == "tiny.npz" and carso.layers == ["init_conv"] and carso.samples == 2
    x = torch.rand(2, 1, 32, 32)
    assert carso(x).shape == (2, 3) and carso.purifier.config["decoder_width"] == 8


def test_a_run_is_complete_and_other_settings_are_refused(folder, monkeypatch, capsys):
    assert "is complete" in here(train, folder, TRAINED, monkeypatch, capsys)
    assert "epochs: 2 there, 3 now" in refusal(train, folder, [*TRAINED, "--epochs", "3"], monkeypatch, capsys)
    other = [*TRAINED, "--bf16", "true"]
    assert "bf16: None there, True now" in refusal(train, folder, other, monkeypatch, capsys)


def test_an_evaluation_is_compared_and_drawn(folder, monkeypatch, capsys):
    report, _, clean, worst = compare.read(folder / "evaluation")
    assert report["n"] == 4 and clean.mean() == report["clean"]["accuracy"]
    assert worst.mean() == pytest.approx(report["robust"]["accuracy"])
    monkeypatch.setattr(sys, "argv", ["plot", str(folder / "evaluation")])
    assert plot.main() == 0 and (folder / "evaluation" / "attacks.png").is_file()


def test_an_evaluation_of_before_is_not_mixed_with_new_units(folder, monkeypatch, capsys):
    output = refusal(evaluate, folder, EVALUATED, monkeypatch, capsys)
    assert "units: None there, 2 now" in output and "choose another --out" in output
