"""lab/end_to_end.py and lab/attack_once.py: the recipe in plain formulas, and the scripts on tiny budgets."""

import copy
import dataclasses
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, fresh_carso
from test_train import (
    CLOSE,
    CPU,
    OPTIONS,
    OneOfMany,
    assert_same,
    here,
    kill,
    pair,
    some_batches,
    some_digits,
    some_run,
    write_tiny,
)
from torch.testing import assert_close

import data as datasets
from attacks import KINDS, adversarially_balanced_batch, balanced_kinds
from lab import attack_once, end_to_end
from lab.end_to_end import EndToEndCARSO, load_end_to_end
from models import load_tensors, save_tensors
from purifier import load_carso, save_carso
from train import PRESETS, Batch, Stage

SIZES = {"condition_dim": 8, "latent_dim": 4, "decoder_width": 8}
train_end = {"main": end_to_end.main, "name": "end_to_end"}
train_once = {"main": attack_once.main, "name": "attack_once"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny data set; an untrained CARSO as train.py would leave it, and its classifier; one complete run of each
    script."""
    folder = tmp_path_factory.mktemp("training")
    write_tiny(folder)
    carso = fresh_carso(3, 2, **SIZES)
    config = dataclasses.asdict(dataclasses.replace(PRESETS["digits"], eps=1e-5))  # see TINY in test_train.py
    save_carso(folder / "start.pt", carso, dataset="tiny.npz", data_dir="data", classes=list("012"), config=config)
    normalisation = {"mean": torch.tensor([0.5]), "std": torch.tensor([0.5])}
    save_tensors(folder / "classifier.pt", {"state_dict": carso.classifier.state_dict() | normalisation})
    here(folder, *END, **train_end)
    here(folder, *ONCE, **train_once)
    return folder


# Their folders, so that the README's commands can follow each other: runs/tiny would be train.py's.
@pytest.fixture
def end(folder):
    return folder / "runs" / "tiny-end-to-end"


@pytest.fixture
def once(folder):
    return folder / "runs" / "tiny-once"


# ----------------------------------------------------------------------------------------------------------- end to end

END = "--from start.pt --epochs 2 --batch-size 9 --attack-steps 2 --learning-rate 3e-4 --device".split() + [DEVICE]
ADAM_CLOSE = 0.02  # of a rounding, too, Adam makes a step of full length


def test_end_to_end_trains_the_decoders_path_and_nothing_else(folder, end):
    before, after = (load_end_to_end(path)[0] for path in (folder / "start.pt", end / "carso.pt"))
    assert after.own_answer == 0.5 and before.own_answer == 0 and after.samples == 2
    frozen = ("classifier.", "purifier.image_encoder", "purifier.joint_head", "purifier.to_")
    new = after.state_dict()
    for key, old in before.state_dict().items():
        if key.startswith(frozen):
            assert torch.equal(old, new[key]), key
        elif key.endswith("weight"):
            assert not torch.equal(old, new[key]), key
    kept = {"carso.pt", "config.json", "log-end-to-end.tsv", "reconstructions.png"}
    assert {path.name for path in end.iterdir()} == kept
    assert "is complete" in here(folder, *END, **train_end)


def test_end_to_end_killed_goes_on_and_ends_as_if_it_had_not_been(folder, end):
    options = [*END, "--name", "end-killed"]
    kill(folder, "end-to-end.resume.pt", 8, *options, **train_end)
    assert "going on at epoch 1, step 2" in here(folder, *options, **train_end)
    assert_same(end, folder / "runs" / "end-killed")


def test_end_to_end_in_micro_batches_is_the_same_up_to_the_order_of_summation(folder, end):
    here(folder, *END, "--name", "micro", "--micro-batch", "4", **train_end)
    assert_same(end, folder / "runs" / "micro", ADAM_CLOSE)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--from", "nothing.pt"], "there is no file nothing.pt"),
        (["--from", "classifier.pt"], "classifier.pt is not a CARSO"),
        (["--dataset", "digits"], "start.pt takes pictures (1, 32, 32) of the classes 0, 1, 2; digits has"),
        (["--from", "stateless.pt"], "--from stateless.pt was not left by train.py"),
        (["--own-answer", "1"], "--own-answer 1 is not a share of at least 0 and less than 1"),
        (["--attack-steps", "0"], "--attack-steps 0 is not 1 or more"),
        (["--eps", "8"], "--eps 8 is not between 0 and 1"),
        (["--name", "tiny-end-to-end", "--samples", "2"], "runs/tiny-end-to-end holds other settings (end_to_end: "),
    ],
)
def test_end_to_end_refuses_before_anything_is_written(folder, options, sentence):
    save_carso(folder / "stateless.pt", load_carso(folder / "start.pt")[0])
    said = here(folder, *END, "--name", "refused", *options, code=2, **train_end).splitlines()[-1]
    assert said.startswith("end_to_end: ") and sentence in said
    assert not (folder / "runs" / "refused").exists()


@pytest.mark.parametrize("share", [0, 0.7])
def test_own_answer_is_a_share_of_the_exponentials(tiny_carso, share):
    """In float64: values, and gradients through the reconstruction and through the classifier's own answer."""
    carso = EndToEndCARSO(tiny_carso.classifier, tiny_carso.purifier, tiny_carso.layers).double()
    carso.own_answer = share
    x = torch.rand(3, 1, 32, 32, dtype=torch.double, requires_grad=True)
    z = torch.randn(3, 2, 4, dtype=torch.double)
    painted = carso.classifier(carso.purify(x, z).flatten(0, 1)).exp().unflatten(0, (3, 2))
    plain = ((1 - share) * painted + share * carso.classifier(x).exp()[:, None]).log()
    ours = carso.member_logits(x, z)
    assert_close(ours, plain)
    assert_close(*(torch.autograd.grad(logits.sin().sum(), x)[0] for logits in (ours, plain)))
    assert_close(carso(x, z), plain.exp().sum(1).log())


def test_the_root_refuses_what_it_would_evaluate_without_its_own_answer(folder, end):
    sentence = f"{end}/carso.pt holds an EndToEndCARSO, which is evaluated by python -m lab.evaluate"
    with pytest.raises(ValueError, match=sentence):
        load_carso(end / "carso.pt")
    (trained, state), (start, _) = load_end_to_end(end / "carso.pt"), load_carso(folder / "start.pt")
    x, z = torch.rand(2, 1, 32, 32), torch.randn(2, 3, 4)
    assert torch.equal(load_end_to_end(folder / "start.pt")[0](x, z), start(x, z))
    assert trained.own_answer == state["own_answer"] == 0.5 and not torch.equal(trained(x, z), start(x, z))


@pytest.fixture
def double_carso(monkeypatch):
    """In float64, like everything then: Adam's first steps are of full length, also where a gradient is a rounding."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(datasets, "pixels", lambda images: images / 255)
    carso = fresh_carso(10, samples=2, **SIZES)
    yield EndToEndCARSO(carso.classifier, carso.purifier, carso.layers, carso.samples)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("share, augment, mirror", [(0, False, False), (0.5, True, False), (0.7, True, True)])
def test_end_to_end_is_its_recipe(tmp_path, monkeypatch, double_carso, share, augment, mirror):
    """Three steps of two pictures, of two members each, in the second of two epochs, and their average."""
    settings = {"epochs": 2, "batch_size": 2, "learning_rate": 0.01, "eps": 0.1, "augment": augment, "mirror": mirror}
    p, data, pairs = dataclasses.replace(PRESETS["digits"], **settings), some_digits(6), torch.arange(6).view(3, 2)
    carso, plain = double_carso, copy.deepcopy(double_carso)
    carso.own_answer = share
    run = some_run(tmp_path, data, p)
    monkeypatch.setattr(datasets, "batches", lambda *_: pairs)
    saved = {"epoch": 1, "step": 0, "rows": [], "sums": torch.zeros(3), "parts": {}}
    save_tensors(tmp_path / "end-to-end.resume.pt", saved)
    end_to_end.train_end_to_end(run, carso, attack_steps=3, samples=2, reconstruction=3)

    def answer(x, z):
        members = plain.classifier(plain.purify(x, z).flatten(0, 1)).unflatten(0, z.shape[:2]).exp()
        return ((1 - share) * members + share * plain.classifier(x).exp()[:, None]).sum(1).log()

    used = ("layer_encoders", "condition_head", "decoder")
    adam = torch.optim.Adam([w for name, w in plain.purifier.named_parameters() if name.startswith(used)], 0.01)
    average = None
    for n in range(3):
        adam.param_groups[0]["lr"] = 0.01 * (1 - (3 + n) / 6)
        x, y = data.train_images[pairs[n]] / 255, data.train_labels[pairs[n]]
        random = run.make_generator("end-to-end", 1, n)
        start = 2 * torch.rand(x.shape, generator=random) - 1
        if augment:  # test_data.py compares it with slicing
            x = datasets.augment(x, torch.rand(len(x), 3, generator=random), mirror)
        z = torch.randn(4, 2, 2, 4, generator=random)
        plain.eval()
        attacked = (x + 0.1 * start).clamp(0, 1)
        for k in range(3):
            attacked.requires_grad_()
            gradient = torch.autograd.grad(F.cross_entropy(answer(attacked, z[k]), y), attacked)[0]
            attacked = attacked.detach() + 2.5 * 0.1 / 3 * gradient.sign()
            attacked = torch.clamp(attacked.clamp(x - 0.1, x + 0.1), 0, 1)
        plain.train()
        painted = plain.purify(attacked, z[3])
        bce = F.binary_cross_entropy(painted, x[:, None].expand_as(painted))
        adam.zero_grad()
        (F.cross_entropy(answer(attacked, z[3]), y) + 3 * bce).backward()
        adam.step()
        now = {k: v.clone() for k, v in plain.purifier.state_dict().items() if v.is_floating_point()}
        average = {k: v if average is None else torch.lerp(average[k], v, 1 / 3) for k, v in now.items()}
    for name, tensor in average.items():
        ours = carso.purifier.state_dict()[name]
        assert_close(ours, tensor, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------------- attack once

ONCE = [*OPTIONS, "--epochs", "1", "--classifier", "classifier.pt", "--versions", "4"]
P = dataclasses.replace(PRESETS["digits"], attack_steps=2, attack_step_size=0.1)


@pytest.fixture
def attack(tmp_path, monkeypatch, tiny_carso):
    """attack_training_set on 30 digits, in chunks of 8."""
    monkeypatch.setattr(attack_once, "CHUNK", 8)
    data = some_digits(30, 5)

    def attack(versions, folder="one", ranks=(0, 1), micro_batch=None):
        run = some_run(tmp_path / folder, data, P, ranks=OneOfMany(CPU, *ranks), micro_batch=micro_batch)
        return attack_once.attack_training_set(versions, run, tiny_carso.classifier)

    attack.data, attack.classifier = data, tiny_carso.classifier
    return attack


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_picture_gets_each_kind_once_and_stays_in_its_ball(attack, micro_batch):
    """Version v has picture i attacked by kind (i + v) mod 4; FGSM, without a random start, is the attack itself."""
    differences = attack(5, micro_batch=micro_batch)
    assert differences.shape == (5, 30, 1, 32, 32) and differences.dtype == torch.float16
    again = (differences[0] == differences[4]).flatten(1).all(1)  # the same kinds, and other random starts
    assert torch.equal(again, balanced_kinds(0, 30, 1.0) >= 2)
    assert all(balanced_kinds(v, 30, 1.0)[i] == (i + v) % 4 for v in range(4) for i in range(30))
    x, y = datasets.pixels(attack.data.train_images), attack.data.train_labels
    for version, change in enumerate(differences):
        kinds = balanced_kinds(version, 30, 1.0)
        fgsm, radius = kinds >= 2, torch.tensor([P.eps / 2, P.eps] * 2)[kinds]
        want = adversarially_balanced_batch(attack.classifier, x, y, P.eps, 1.0, first=version, steps=1)
        assert ((x + change.float() - want)[fgsm].abs() > 2e-4).float().mean() < 0.001
        largest = change.flatten(1).abs().amax(1)
        assert (largest <= radius + 2e-4).all() and (largest > 0.9 * radius).all()


@pytest.mark.parametrize("versions", [1, 4, 8])
@pytest.mark.parametrize("fraction", [0.5, 0.15])
def test_the_batch_is_balanced_as_it_was(attack, tmp_path, versions, fraction, monkeypatch):
    """The same places are perturbed; with four versions by the same kinds; the rest is clean."""
    version = torch.arange(versions)[:, None]
    code = 1 + (version + torch.arange(30)) % len(KINDS) + 4 * (version // 4)  # a change says its kind, and which four
    fake = code.half()[..., None, None, None].expand(versions, 30, 1, 32, 32) / 1000
    monkeypatch.setattr(attack_once, "attack_training_set", lambda *_: fake)
    monkeypatch.setattr(datasets, "pixels", lambda images: images / 512)  # no pixel is near 1
    run = some_run(tmp_path, attack.data, dataclasses.replace(P, fraction=fraction))
    stage, seen = Stage(run, "purifier", 4, 7, {}, ()), []
    for epoch in stage.epochs():
        for batch, perturbed in attack_once.attack_once(versions, run, None, stage.batches(epoch)):
            change = perturbed - run.load_pictures(batch)[0]
            code = (1000 * change.flatten(1).amax(1)).round().long() - 1
            want = balanced_kinds(batch.first, len(batch.indices), fraction)
            assert torch.equal(code >= 0, want >= 0)
            assert versions % 4 or torch.equal(code[code >= 0] % 4, want[want >= 0])
            seen += code[code >= 0].tolist()
    assert len(seen) == int(120 * fraction) and set(seen) == set(range(max(4, versions)))
    batches = [Batch(epoch, 0, torch.arange(30), 0, None) for epoch in (0, 1)]
    (_, one), (_, next_one) = attack_once.attack_once(versions, run, None, batches)
    assert torch.equal(one, next_one) == (versions <= 4)  # beyond four, epochs take turns


def test_pictures_from_files_are_projected(attack, tmp_path, monkeypatch):
    monkeypatch.setattr(attack_once, "attack_training_set", lambda *_: torch.full((1, 30, 1, 32, 32), 9.0).half())
    run = some_run(tmp_path, attack.data, dataclasses.replace(P, fraction=1.0))
    x = datasets.pixels(attack.data.train_images[:8])
    [(_, out)] = attack_once.attack_once(1, run, None, some_batches(run, 8))
    assert_close(out, (x + torch.tensor([P.eps / 2, P.eps] * 4)[:, None, None, None]).clamp(max=1))


def test_any_number_of_processes_makes_the_same_and_goes_on(attack, tmp_path, monkeypatch):
    """Each of three makes its share, which their sum joins. What is on disk is not made again."""
    whole = attack(4)
    with monkeypatch.context() as patch:
        patch.setattr(OneOfMany, "sum", lambda self, values: 2 * values)  # to see that it is called
        shares = [attack(4, f"{rank}", (rank, 3)) / 2 for rank in range(3)]
    assert torch.equal(sum(shares), whole) and all((share != 0).any() for share in shares)

    files = sorted((tmp_path / "one" / "attacked").iterdir())
    assert len(files) == 4 * 4
    files[5].unlink()
    files[9].unlink()
    made, real = [], adversarially_balanced_batch

    def note(*args, **how):
        made.append(len(args[1]))
        if len(made) == 2:
            raise KeyboardInterrupt
        return real(*args, **how)

    monkeypatch.setattr(attack_once, "adversarially_balanced_batch", note)
    with pytest.raises(KeyboardInterrupt):
        attack(4)
    assert torch.equal(attack(4), whole) and made == [8, 8, 8]  # the first was kept


# Both scripts in the same two processes, whose start is dear; the second script is interrupted in its attack.
END_TO_END_FIRST = f"""
import functools
from lab import end_to_end
end_to_end.start_ranks = train.start_ranks = functools.cache(train.start_ranks)
end_to_end.main({[*END, "--name", "two"]!r})
"""
INTERRUPT_AN_ATTACK = """
real, calls = lab.attack_once.adversarially_balanced_batch, []
def interrupted(*args, **how):
    calls.append(1)
    if len(calls) == 2:
        raise KeyboardInterrupt
    return real(*args, **how)
lab.attack_once.adversarially_balanced_batch = interrupted
"""


@pytest.fixture(scope="module")
def two_processes(folder):
    patches = [END_TO_END_FIRST + INTERRUPT_AN_ATTACK] * 2
    statuses = pair([folder] * 2, *ONCE, "--name", "once-two", patches=patches, script="lab.attack_once")
    assert statuses == [130, 130], (folder / "said-0.txt").read_text()


def test_end_to_end_is_the_same_on_two_processes(folder, end, two_processes):
    assert_same(end, folder / "runs" / "two", ADAM_CLOSE)


def assert_same_attacks(one, other) -> None:
    names = {f"{version}-0000000.pt" for version in range(4)}
    for run in (one, other):
        assert {path.name for path in (run / "attacked").iterdir()} == names
    for name in names:
        a, b = (load_tensors(run / "attacked" / name)["differences"] for run in (one, other))
        assert torch.equal(a, b), name


def test_attack_once_killed_goes_on_and_ends_as_if_it_had_not_been(folder, once):
    options, killed = [*ONCE, "--name", "once-killed"], folder / "runs" / "once-killed"
    kill(folder, "2-0000000.pt", 1, *options, **train_once)
    assert {path.name for path in (killed / "attacked").glob("*.pt")} == {"0-0000000.pt", "1-0000000.pt"}
    here(folder, *options, **train_once)
    assert_same_attacks(once, killed)
    assert_same(once, killed)


def test_attack_once_interrupted_on_two_processes_goes_on_alone(folder, once, two_processes):
    here(folder, *ONCE, "--name", "once-two", **train_once)
    assert_same_attacks(once, folder / "runs" / "once-two")
    assert_same(once, folder / "runs" / "once-two", CLOSE)


def test_attack_once_refuses_other_versions_and_damaged_files(folder, once, tmp_path):
    said = here(folder, *ONCE, "--versions", "2", code=2, **train_once)
    assert "attack_once: runs/tiny-once holds other settings (versions: 4 there, 2 now)" in said
    said = here(folder, *OPTIONS, "--name", "tiny-once", "--epochs", "1", "--classifier", "classifier.pt", code=2)
    assert "runs/tiny-once holds other settings (versions: 4 there, None now)" in said
    assert here(tmp_path, "--versions", "0", code=2, **train_once) == "attack_once: --versions 0 is not 1 or more\n"
    shutil.copytree(once, folder / "runs" / "damaged")
    (folder / "runs" / "damaged" / "carso.pt").unlink()
    (folder / "runs" / "damaged" / "attacked" / "1-0000000.pt").write_bytes(b"PK half a file")
    said = here(folder, *ONCE, "--name", "damaged", code=2, **train_once)
    assert re.search("attack_once: runs/damaged/attacked/1-0000000.pt is no file of tensors", said)
