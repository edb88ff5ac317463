"""Every number of a training and of an evaluation: bounds, refusals, help."""

import argparse
import dataclasses

import pytest
from test_train import refusal

import train
from lab.presets import (
    BUDGETS,
    PRESETS,
    Budget,
    Preset,
    add_options,
    choose_preset,
    eps_text,
    fit_batches,
    overridden,
    parse_number,
)


@pytest.mark.parametrize("table, rows", [(Preset, PRESETS), (Budget, BUDGETS)])
def test_every_field_says_its_bounds_and_its_meaning_and_every_row_keeps_them(table, rows):
    for field in dataclasses.fields(table):
        sentence, allowed = field.metadata["bounds"]
        assert sentence and field.metadata["meaning"]
        for name, row in rows.items():
            assert allowed(getattr(row, field.name)), (name, field.name)
        if field.type is not bool:
            assert not allowed(-1) and not allowed(float("nan")), field.name


def arguments(*options) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, Preset)
    parser.set_defaults(objective="paper")
    return parser.parse_args(options)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--epochs", "0"], "--epochs 0 must be 1 or more"),
        (["--classifier-momentum", "-3"], "unrecognized arguments"),
        (["--classifier-bn-momentum", "-3"], "--classifier-bn-momentum -3 must be more than 0"),
        (["--warmup", "30"], "--warmup 30 and --plateau 6 are longer than the 24 epochs"),
        (["--kl-from", "5", "--kl-to", "4"], "--kl-to 4 is before --kl-from 5"),
        (["--learning-rate", "-1"], "--learning-rate -1 must be 0 or more"),
        (["--attack-steps", "0"], "--attack-steps 0 must be 1 or more"),
        (["--attack-step-size", "0"], "--attack-step-size 0 must be positive"),
        (["--decoder-width", "4"], "--decoder-width 4 must be 8 or more"),
        (["--latent-dim", "0"], "--latent-dim 0 must be 1 or more"),
        (["--end-batch-size", "1"], "--end-batch-size 1 must be 2 or more"),
        (["--eps", "1e400"], "not a number such as 8/255"),
        (["--eps", "1e99999999"], "not a number such as 8/255"),
        (["--eps", "1/0"], "not a number such as 8/255"),
        (["--eps", "8/"], "not a number such as 8/255"),
        (["--eps", "nan"], "not a number such as 8/255"),
        (["--eps", "0"], "write 8/255"),
        (["--mirror", "perhaps"], "neither true nor false"),
        (["--stage", "classifier", "--classifier", "x.pt"], "exclude each other"),
    ],
)  # fmt: skip
def test_what_is_out_of_bounds_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, options, sentence):
    assert sentence in refusal(train, tmp_path, options, monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("epochs", range(1, 30))
def test_a_run_of_any_length_has_a_schedule_that_fits(epochs):
    p = choose_preset("digits", arguments("--epochs", str(epochs)))
    assert 1 <= p.warmup and p.warmup + p.plateau <= epochs and p.kl_from <= p.kl_to


@pytest.mark.parametrize(
    "count, want", [(40, (16, 0.0036)), (300, (30, 0.0049)), (4200, (420, 0.018)), (25_600, (2560, 0.045)),
                    (46_081, (5120, 0.064)), (50_000, (5120, 0.064))],
)  # fmt: skip
def test_small_sets_get_ten_batches_an_epoch(count, want):
    p = fit_batches(PRESETS["cifar10"], count, arguments())
    assert (p.batch_size, p.learning_rate) == want
    assert fit_batches(PRESETS["cifar10"], count, arguments("--batch-size", "5120")).learning_rate == 0.064
    rate = fit_batches(PRESETS["cifar10"], count, arguments("--learning-rate", "0.01")).learning_rate
    assert rate == PRESETS["cifar10"].learning_rate  # choose_preset puts the given one there


def test_options_override_and_nothing_else_changes():
    p = choose_preset("cifar10", arguments("--eps", "4/255", "--augment", "false"))
    assert p == dataclasses.replace(PRESETS["cifar10"], eps=4 / 255, augment=False)
    assert overridden(p, arguments()) == p


def test_eps_is_typed_and_printed_as_people_do():
    assert parse_number("8/255") == 8 / 255 and parse_number("0.03") == 0.03
    assert eps_text(8 / 255) == "8/255" and eps_text(0.03) == "0.03" and float(eps_text(1 / 7)) == 1 / 7
    assert eps_text(0) == "0/255" and eps_text(1e-9) == "1e-09"
