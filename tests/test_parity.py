"""What the authors have beside the paper's main line: two classifiers, plain training, z = 0, other public classifiers,
and their released defence fetched from a server."""

import functools
import http.server
import json
import re
import threading

import numpy as np
import pytest
import torch
from conftest import DEVICE, fill, formula_classifier, fresh_carso, picture, reference_name, uniform
from safetensors.torch import save_file
from test_models import public_weights
from test_purifier import published_folder
from test_train import TINY as TRAINING
from test_train import here, refusal
from torch.testing import assert_close

import data
import evaluate
import train
from aggregate import robust_logits
from lab import published
from lab.checkpoints import fingerprint_of, load_checkpoint, load_published_classifier, save_checkpoint
from lab.presets import PRESETS
from lab.ranks import Ranks
from models import WideResNet, representation_layers
from purifier import CARSO, build_carso

ATTACKING = (
    f"--pictures 4 --steps 2 --eot 2 --queries 3 --targets 2 --select 2 --draws 3 --chunk 2 --device {DEVICE}".split()
)


def other_classifier(seed=1, classes=5):
    """Of another size than tiny_carso's, so that one cannot stand for the other."""
    torch.manual_seed(seed)
    network = WideResNet(classes, 10, 2, in_channels=1)
    network.logits.weight.data *= 10
    return network.eval()


# ------------------------------------------------------------------------------------------------ two classifiers


def test_one_classifier_is_looked_into_and_another_labels(tiny_carso, tmp_path):
    final = other_classifier()
    both = CARSO(tiny_carso.classifier, tiny_carso.purifier, tiny_carso.layers, 3, final=final)
    x, z = torch.rand(2, 1, 32, 32), torch.randn(2, 3, 4)
    assert_close(both.purify(x, z), tiny_carso.purify(x, z))
    members = final(both.purify(x, z).flatten(0, 1)).unflatten(0, (2, 3))
    assert_close(both.member_logits(x, z), members)
    assert_close(both(x, z), robust_logits(members))
    assert not any(p.requires_grad for p in final.parameters()) and not both.train().final.training
    save_checkpoint(tmp_path / "two.pt", both.eval(), dataset="digits")
    loaded, _ = load_checkpoint(tmp_path / "two.pt")
    assert_close(loaded(x, z), both(x, z), rtol=0, atol=0)
    assert fingerprint_of(loaded) == fingerprint_of(both) != fingerprint_of(tiny_carso)


def test_a_damaged_second_classifier_is_refused(tiny_carso, tmp_path):
    both = CARSO(tiny_carso.classifier, tiny_carso.purifier, tiny_carso.layers, 3, final=other_classifier())
    save_checkpoint(tmp_path / "two.pt", both)
    content = torch.load(tmp_path / "two.pt", weights_only=True)
    torch.save(content | {"final_weights": {}}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="two.pt do not fit"):
        load_checkpoint(tmp_path / "two.pt")
    torch.save(content | {"final": {"depth": 11}}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="two.pt describes no WideResNet"):
        load_checkpoint(tmp_path / "two.pt")


def test_transfer_comes_from_both(tiny_carso, monkeypatch):
    """Each bare classifier is climbed; a single one only once."""
    from lab.suite import transfer
    from lab.target import Target

    both = CARSO(tiny_carso.classifier, tiny_carso.purifier, tiny_carso.layers, 3, final=other_classifier())
    x, y, budget = torch.rand(2, 1, 32, 32), torch.tensor([0, 1]), evaluate.BUDGETS["reduced"]
    for carso, sources in ((tiny_carso, 1), (both, 2)):
        candidates, _ = transfer("ce", Target(carso), x, y, 0.1, budget)
        assert len(candidates) == sources
    assert not torch.equal(*candidates)


@pytest.fixture
def digits_carso(tmp_path):
    """carso.pt and other.pt, a second classifier's weights, in a folder of their own; few.npz, grey pictures."""
    images = (255 * uniform("pictures", (40, 32, 32))).astype("uint8")
    labels = np.arange(40) % 10
    arrays = dict(train_images=images, train_labels=labels, test_images=images[:10], test_labels=labels[:10])
    np.savez(tmp_path / "few.npz", **arrays)
    carso = fresh_carso(10, samples=2, condition_dim=8, latent_dim=4, decoder_width=8)
    state = dict(dataset="digits", data_dir="data", config={"eps": 0.2})
    save_checkpoint(tmp_path / "carso.pt", carso, **state)
    torch.save({"state_dict": other_classifier(classes=10).state_dict()}, tmp_path / "other.pt")
    torch.save({"state_dict": other_classifier(classes=7).state_dict()}, tmp_path / "seven.pt")
    return tmp_path


def test_evaluate_with_a_second_classifier(digits_carso, monkeypatch, capsys):
    common = ["--ckpt", "carso.pt", *ATTACKING, "--attack", "transfer"]
    here(evaluate, digits_carso, [*common, "--out", "two", "--final", "other.pt"], monkeypatch, capsys)
    here(evaluate, digits_carso, [*common, "--out", "one"], monkeypatch, capsys)
    one, two = (json.loads((digits_carso / n / "report.json").read_text()) for n in ("one", "two"))
    assert two["config"]["final"] == "other.pt" and one["config"]["weights"] != two["config"]["weights"]
    assert one["attacks"]["transfer"]["candidates"] < two["attacks"]["transfer"]["candidates"]
    plans = [
        here(evaluate, digits_carso, [*common, *more, "--plan"], monkeypatch, capsys)
        for more in ([], ["--final", "other.pt"])
    ]
    gradients = [int(re.search(r"^transfer +(\d+)", plan, re.M)[1]) for plan in plans]
    assert gradients[1] == 2 * gradients[0]  # from both
    refused = refusal(evaluate, digits_carso, [*common, "--final", "seven.pt"], monkeypatch, capsys)
    assert "seven.pt do not fit" in refused
    bare = ["--ckpt", "other.pt", "--dataset", "digits", *ATTACKING, "--final", "other.pt"]
    assert "makes none" in refusal(evaluate, digits_carso, bare, monkeypatch, capsys)


def test_training_with_a_second_classifier(digits_carso, monkeypatch, capsys):
    common = ["--dataset", "few.npz", *TRAINING, "--epochs", "1", "--end-epochs", "1"]
    two, end = ["--name", "two", "--final", "other.pt"], ["--name", "end", "--objective", "end-to-end"]
    here(train, digits_carso, [*common, *two], monkeypatch, capsys)
    trained, end_to_end = [], train.train_end_to_end

    def watched(run, data, carso, *rest):
        trained.extend(weight.requires_grad for weight in carso.final.parameters())
        end_to_end(run, data, carso, *rest)

    monkeypatch.setattr(train, "train_end_to_end", watched)
    here(train, digits_carso, [*common, *end, "--from", "scratch", "--final", "other.pt"], monkeypatch, capsys)
    assert trained and not any(trained)  # it is as frozen as the other one
    for name in ("two", "end"):
        carso, _ = load_checkpoint(digits_carso / "runs" / name / "carso.pt")
        assert fingerprint_of(carso.final) == fingerprint_of(other_classifier(classes=10))
    (digits_carso / "runs" / "two" / "carso.pt").unlink()
    torch.save({"state_dict": other_classifier(2, 10).state_dict()}, digits_carso / "other.pt")  # under the same name
    assert "weights: " in refusal(train, digits_carso, [*common, *two], monkeypatch, capsys)


# ---------------------------------------------------------------------------------------- plain training, and z = 0


def test_plain_training_attacks_nothing(digits_carso, monkeypatch, capsys):
    def forbidden(*args, **kwargs):
        raise AssertionError("plain training was attacked")

    with monkeypatch.context() as m:
        m.setattr("lab.robust_training.piecewise", forbidden)
        options = ["--dataset", "few.npz", *TRAINING, "--classifier-attack-steps", "0", "--stage", "classifier"]
        here(train, digits_carso, [*options, "--name", "plain"], m, capsys)
    weights = torch.load(digits_carso / "runs" / "plain" / "classifier.pt", weights_only=True)["state_dict"]
    assert all(t.isfinite().all() for t in weights.values())


def test_no_draw_is_the_reconstruction_of_z_zero(tiny_carso, tmp_path):
    still = CARSO(tiny_carso.classifier, tiny_carso.purifier, tiny_carso.layers, samples=0)
    x = torch.rand(3, 1, 32, 32)
    z = torch.zeros(3, 1, 4)
    assert_close(still(x), tiny_carso(x, z), rtol=0, atol=0)
    assert_close(still.purify(x), tiny_carso.purify(x, z), rtol=0, atol=0)
    assert torch.equal(still(x), still(x))
    save_checkpoint(tmp_path / "still.pt", still)
    assert torch.equal(load_checkpoint(tmp_path / "still.pt")[0](x), still(x))
    with pytest.raises(ValueError, match="0 or more"):
        CARSO(tiny_carso.classifier, tiny_carso.purifier, tiny_carso.layers, samples=-1)


def test_evaluate_without_draws(digits_carso, monkeypatch, capsys):
    common = ["--ckpt", "carso.pt", *ATTACKING, "--samples", "0"]
    here(evaluate, digits_carso, [*common, "--out", "still", "--attack", "apgd", "rand"], monkeypatch, capsys)
    report = json.loads((digits_carso / "still" / "report.json").read_text())
    assert report["deterministic"] and report["samples"] == 0 and report["attacks"]["apgd"]["eot"] == 1
    for wrong in (["--control", "fixed-z"], ["--sweep", "samples"], ["--control", "classifier"]):
        assert "z = 0" in refusal(evaluate, digits_carso, [*common, *wrong], monkeypatch, capsys)
    here(evaluate, digits_carso, [*common, "--plan"], monkeypatch, capsys)


@pytest.mark.parametrize("decision", ["mean-sigmoids", "floored-ratios"])
def test_evaluate_by_the_authors_aggregations(digits_carso, monkeypatch, capsys, decision):
    options = ["--ckpt", "carso.pt", *ATTACKING, "--attack", "apgd-ce", "--aggregation", decision, "--out", decision]
    here(evaluate, digits_carso, options, monkeypatch, capsys)
    report = json.loads((digits_carso / decision / "report.json").read_text())
    assert report["config"]["view"] == {"mean-sigmoids": "mean-sigmoid", "floored-ratios": "mean-logit"}[decision]
    assert report["audit"]["passed"], report["audit"]["messages"]


# ---------------------------------------------------------------------------------------------- public classifiers


GOWAL = "Gowal2020Uncovering_28_10_extra"
PUBLIC = {
    "DeepMind's own": lambda w: w,  # bare state dicts
    "RobustBench's copy": lambda w: w | {"mean": torch.full((3, 1, 1), 0.4), "std": torch.full((3, 1, 1), 0.2)},
    "WRN_28_10_cifar10_09428.safetensors": None,
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_classifiers_by_their_files_layouts(tmp_path, wrn_10_2, name):
    weights, path = public_weights(), tmp_path / name
    if layout := PUBLIC[name]:
        torch.save(layout(weights), path)
    else:
        save_file({k: v.contiguous() for k, v in weights.items()}, path)
    loaded, x = load_published_classifier(path, 10), picture("x", (2, 3, 32, 32))
    if "copy" in name:
        assert loaded.config["mean"] == pytest.approx((0.4,) * 3)
        loaded.mean, loaded.std = wrn_10_2.mean, wrn_10_2.std
    assert_close(loaded(x), wrn_10_2(x), rtol=0, atol=0)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The authors' bucket on this machine, at its own paths, with formula weights; pictures in CIFAR-10's shape."""
    folder = tmp_path / "bucket" / "cifar_10_cuiwrn2810"
    folder.mkdir(parents=True)
    sizes = dict(condition_dim=16, latent_dim=4, decoder_width=16)
    confident = build_carso(formula_classifier(10, 1), representation_layers(10), (3, 32, 32), **sizes)
    fill(confident.purifier, reference_name)
    confident.classifier.logits.weight.data *= 30  # so that the reference's output saturates
    published_folder(folder / "models", confident)
    torch.save(public_weights(), tmp_path / "bucket" / "cifar10_linf_wrn28-10_with.pt")
    images = torch.from_numpy((255 * uniform("pictures", (12, 3, 32, 32))).astype("uint8"))
    labels, numbers = torch.arange(12) % 10, torch.arange(12)
    few = data.Dataset(
        "cifar10", images, labels, images, labels, numbers, list("0123456789"), *data.NORMALISATION["cifar10"]
    )
    monkeypatch.setattr(data, "load", lambda name, data_dir: few)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "bucket")
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *a: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{httpd.server_port}/"
        local = {k: v.replace(published.BUCKET, host) for k, v in published.FOLDERS.items()}
        monkeypatch.setattr(published, "FOLDERS", local)
        for name, (address, _) in published.CLASSIFIERS["cifar10"].items():
            address = address.replace(published.BUCKET, host).replace(published.DEEPMIND, host)
            monkeypatch.setitem(published.CLASSIFIERS["cifar10"], name, (address, 0.0))
        yield tmp_path
        httpd.shutdown()


def test_the_published_defence_in_one_command(bucket, monkeypatch, capsys):
    """Fetched, its classifier checked, planned, attacked through two outputs, set beside the paper's figures."""
    options = ["--published", "cifar10", "--samples", "2", "--pgd-steps", "2", *ATTACKING, "--out", "found"]
    output = here(evaluate, bucket, options, monkeypatch, capsys)
    folder = bucket / "data" / "published" / "cifar10"
    assert len(list(folder.glob("*.safetensors"))) == 4
    folder = bucket / "found"  # which holds both views, each in its own folder
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"naive-odds", "logsumexp"}
    assert output.index("TFLOP") < output.index("# cifar10") and output.count("TFLOP") == 1
    report = next(folder.glob("*-beside-naive-odds.md")).read_text()
    assert report in output and "| through naive-odds | through logsumexp |" in report.replace("| published ", "")
    rows = {line.split(" | ")[0].strip("| "): line for line in report.splitlines() if line.startswith("|")}
    assert "76.13" in rows["rand on CARSO"] and "67.73" in rows["standard on the bare classifier"]
    assert rows["audit"] == "| audit | | **failed** | passed |"
    naive, ours = (
        json.loads(p.read_text()) for p in sorted(folder.glob("*/report.json"), key=lambda p: p.stat().st_mtime)
    )
    assert (naive["config"]["view"], ours["config"]["view"]) == ("naive-odds", "logsumexp")
    assert naive["attacks"]["standard"] == ours["attacks"]["standard"]  # attacked once, since no view matters to it


def test_a_public_classifier_may_label(bucket, monkeypatch, capsys):
    options = ["--published", "cifar10", "--final", GOWAL, "--attack", "clean", "--view", "logsumexp", "--samples", "1"]
    here(evaluate, bucket, [*options, *ATTACKING, "--out", "two"], monkeypatch, capsys)
    assert (bucket / "data" / "published" / "cifar10" / "cifar10_linf_wrn28-10_with.pt").is_file()
    assert json.loads((bucket / "two" / "report.json").read_text())["config"]["final"] == GOWAL


def test_another_defence_under_the_published_name_is_refused(bucket, monkeypatch, capsys):
    name, (address, _) = next(iter(published.CLASSIFIERS["cifar10"].items()))
    monkeypatch.setitem(published.CLASSIFIERS["cifar10"], name, (address, 0.9216))
    output = refusal(evaluate, bucket, ["--published", "cifar10", *ATTACKING], monkeypatch, capsys)
    assert "should classify 92.2% of clean pictures" in output
    output = refusal(evaluate, bucket, ["--published", "cifar10", "--dataset", "digits"], monkeypatch, capsys)
    assert "not for --dataset digits" in output


def test_a_public_classifier_is_fetched_by_its_name(bucket, monkeypatch):
    args = train.parse_arguments(
        ["--dataset", "cifar10", "--data-dir", str(bucket / "data"), "--classifier", "published"]
    )
    cifar, ranks, p = data.load("cifar10", None), Ranks(0, 1, torch.device("cpu")), PRESETS["cifar10"]
    for name in ("published", GOWAL):
        assert train.load_classifier(name, args, cifar, p, ranks).config["depth"] == 10
    assert (bucket / "data" / "published" / "cifar10" / "cifar10_linf_wrn28-10_with.pt").is_file()
    monkeypatch.setitem(published.CLASSIFIERS["cifar10"], GOWAL, (published.entry("cifar10", GOWAL)[0], 0.8948))
    with pytest.raises(ValueError, match="should classify 89.5%"):
        train.load_classifier(GOWAL, args, cifar, p, ranks)
    with pytest.raises(ValueError, match="no file Nobody2020; published for cifar10: published, Cui2023"):
        train.load_classifier("Nobody2020", args, cifar, p, ranks)


def test_the_papers_figures_stand_only_beside_what_they_are_of():
    whole = {"dataset": "cifar10", "eps": 8 / 255, "config": {"control": None}}
    assert published.figures_of(whole) == published.FIGURES["cifar10"]
    for other in ({"eps": 0.95}, {"config": {"control": "classifier"}}, {"dataset": "./cifar10"}):
        assert published.figures_of(whole | other) == {}


def test_every_published_name_has_an_address_and_an_accuracy():
    assert published.CLASSIFIERS.keys() == published.PURIFIERS.keys() == published.FIGURES.keys()
    for name, known in published.CLASSIFIERS.items():
        assert published.FIGURES[name]["classifier clean"] == pytest.approx(100 * published.entry(name, "published")[1])
        assert all(address.startswith("https://") and 0.5 < accuracy < 1 for address, accuracy in known.values())
