"""study.md: the blocks run one after another in one session, what the text says of any CARSO is so, and links lead to
functions."""

import ast
import contextlib
import copy
import io
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, fresh_carso

from purifier import save_carso

STUDY = (ROOT / "study.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", STUDY, re.M | re.S)
TITLES = ["set up", *re.findall(r"^\*\*(.*?)\*\*", STUDY, re.M)]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """What each block leaves: a function from the first words of its title to its names, and `printed`."""
    folder, names, after = tmp_path_factory.mktemp("study"), {}, {}
    carso = fresh_carso(10, samples=2, condition_dim=16, latent_dim=4, decoder_width=8)
    save_carso(folder / "runs/digits/carso.pt", carso, dataset="digits")
    torch.manual_seed(0)
    with contextlib.chdir(folder):
        for title, block in zip(TITLES, BLOCKS):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(block, f"study.md, {title}", "exec"), names)
            after[title] = SimpleNamespace(**names, printed=printed.getvalue(), folder=folder)
    return lambda title: next(after[known] for known in TITLES if known.startswith(title))


# ------------------------------------------------------------------------------------------------------- the page


def test_it_is_what_one_can_walk_through_in_an_hour():
    assert len(TITLES) == len(BLOCKS)
    sections = [re.match(r"[\d.]+", title).group() for title in TITLES[1:]]
    assert sections == sorted(sections), "not in the paper's order"
    assert all(len(block.splitlines()) <= 5 for block in BLOCKS[1:])


def test_the_blocks_can_be_pasted():
    """At a prompt, a loop or a function of several lines would wait for an empty line."""
    for block in BLOCKS:
        assert not any(hasattr(statement, "body") for statement in ast.parse(block).body), block


def test_every_link_leads_to_its_function():
    links = re.findall(r"\[([^][]*)\]\((?!http)(.*?)\)", STUDY)
    assert len(links) >= 20
    for name, file in links:
        text = (ROOT / file).read_text()
        for part in re.findall(r"\w+", name) if file.endswith(".py") else ():
            assert re.search(rf"^ *(def|class) {part}\b", text, re.M), f"{file} has no {name}"


# ------------------------------------------------------------------------------------------ what the text says is so


def test_attacks_stay_in_the_ball_and_a_larger_one_does_more(study):
    s = study("3 and App. A")
    clean, pgd_half, pgd, fgsm_half, fgsm = s.losses
    assert clean < fgsm_half < fgsm < pgd and clean < pgd_half < pgd
    for attacked, radius in zip(s.pictures, (0, s.eps / 2, s.eps, s.eps / 2, s.eps)):
        assert (attacked - s.x).abs().max() <= radius + 1e-6 and 0 <= attacked.min() <= attacked.max() <= 1
    assert len(s.printed.splitlines()) == 5


def test_a_perfect_reconstruction_costs_the_entropy_of_its_greys(study):
    s = study("3 and App. B")
    grey = s.x[(s.x > 0) & (s.x < 1)].double()
    entropy = -(grey * grey.log() + (1 - grey) * (1 - grey).log()).sum()
    torch.testing.assert_close(s.floor[0].double(), entropy, rtol=1e-4, atol=0)
    assert s.floor[2] == 0 and s.losses[1] > s.floor[1] > 0 and s.losses[2] > 0
    torch.testing.assert_close(s.losses[0], s.losses[1] + s.losses[2])


def test_26_layers_and_8_and_their_pictures(study):
    s = study("4.1")
    lines = s.printed.splitlines()
    assert lines[0] == "26" and len(lines) == 1 + 8 == 1 + len(s.layers)
    assert {path.name for path in s.folder.glob("runs/*.png")} == {"layers.png", "z.png", "kinds.png"}


def test_noise_is_as_strong_as_an_attack(study):
    s = study("4.2")
    assert (s.noise - s.x).abs().max() <= s.eps + 1e-6
    first, second = (ast.literal_eval(line) for line in s.printed.splitlines())
    assert len(first) == len(second) == 9 and second[0] >= first[0]
    assert first[-1] > second[-1]


def test_the_decision_is_the_papers_and_its_probability_is_1(study):
    s = study("4.5: the")
    exact = s.logits.double().exp().sum(1)
    assert torch.equal(exact.argmax(1), s.ours.argmax(1))
    leads = exact.sort(1).values.diff(dim=1)[:, -1]
    assert (s.P.amax(1)[leads > 18] == 1).all() and (leads > 18).any()
    one = torch.tensor([[17.4, 0.0], [16.0, 0.0]]).softmax(1).amax(1)
    assert one[0] == 1 and one[1] < 1
    assert s.printed.startswith("tensor(24) ")


def test_one_member_taken_over(study):
    s = study("4.5 and")
    (_, clean, down, up), mean, probabilities = (ast.literal_eval(line) for line in s.printed.splitlines())
    assert clean == down > 0 == up
    assert mean[1] > 0 and mean[2:] == (0.0, 0.0)
    assert probabilities[1] == probabilities[2] == probabilities[3] > 0


def test_schedules_and_lookahead(study):
    s = study("5.1: sch")
    schedule, steps = (ast.literal_eval(line) for line in s.printed.splitlines())
    assert schedule == [(0, 5e-9, 0), (25, 0.064, 0), (34, 0.064, 1), (50, 0.064, 1), (200, 8e-6, 1)]
    assert steps == pytest.approx([-1, -2, -3, -4, -5, -4.8, -5.8, -6.8])


def test_gradients_of_more_draws_agree_more(study):
    s = study("5.1: att")
    one, eight, alike = (float(number) for number in re.findall(r"tensor\((.*?)\)", s.printed))
    assert one < eight <= 1 and 0 <= alike <= 1 and s.votes.shape == (24, 32)


def test_gradients_explain_our_answers_and_neither_the_authors_nor_those_behind_steps(study):
    s = study("5.2: why")
    naive, ours, rounded = (eval(line, {"tensor": torch.tensor, "nan": torch.nan}) for line in s.printed.splitlines())
    confident = copy.deepcopy(s.carso)  # a trained one's logits are large
    confident.classifier.logits.weight.data *= 30
    saturated = s.evaluate.naive_log_odds(confident.member_logits(s.x[:8], s.z[:8]))
    assert saturated.isinf().any() and len(naive) == 8
    assert (ours < 0.5).all() and (rounded == 1).all()
    assert torch.tensor(torch.nan).sign() == 0


def test_one_attack_stands_still_and_the_other_moves(study):
    s = study("5.2: the")
    assert s.printed.startswith("True ") and len(s.printed.split()) == 4
    loss = [F.cross_entropy(s.carso(a), s.y).item() for a in (s.naive, s.seen)]
    assert loss[1] > 2 * loss[0]
    assert (s.seen - s.x).abs().max() <= s.eps + 1e-6


def test_layers_of_some_groups_are_those_of_the_attacked_picture(study):
    s = study("5.3")
    for groups in ("", "0", "12", "012"):
        for name, given, clean, attacked in zip(s.carso.layers, s.mixed(groups), s.layers, s.attacked):
            assert given is (attacked if name.split(".")[1] in groups else clean)
            assert not torch.equal(clean, attacked)
    torch.testing.assert_close(s.painted(""), s.carso.purify(s.x, s.z)[:, 0])
    torch.testing.assert_close(s.painted("012"), s.carso.purify(s.seen, s.z)[:, 0])
    assert [groups for groups, _ in ast.literal_eval(s.printed)] == ["0", "1", "2", "12"]
