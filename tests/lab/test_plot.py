"""lab/plot.py on sweeps written by hand."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import exit_status

from lab import plot

SWEEP = "eps\tclean\tnoise\tapgd-ce\tn\n0\t1.0000\t1.0000\t1.0000\t20\n0.25\t1.0000\t0.9000\t0.0000\t20\n"


def write_sweep(folder, text=SWEEP, what="eps"):
    folder.mkdir(exist_ok=True)
    (folder / f"sweep-{what}.tsv").write_text(text)
    return folder


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_a_folder_becomes_its_curves(tmp_path):
    folder = write_sweep(tmp_path / "e")
    write_sweep(folder, "eot\tclean\tnoise\tapgd-ce\tn\n1\t1.0000\t1.0000\t0.5000\t20\n", "eot")  # a single point
    assert plot.main([str(folder)]) == 0
    assert is_png(folder / "sweep-eps.png") and is_png(folder / "sweep-eot.png")
    assert len(list(folder.iterdir())) == 4  # nothing temporary is left


def test_a_sweep_is_drawn_whatever_a_notebook_left_in_the_environment(tmp_path):
    folder, root = write_sweep(tmp_path / "e"), Path(__file__).parents[2]
    nonsense = os.environ | {"MPLBACKEND": "module://no_such_package.backend_inline"}
    subprocess.run([sys.executable, "-m", "lab.plot", str(folder)], cwd=root, env=nonsense, check=True)
    assert is_png(folder / "sweep-eps.png")


def test_curves_carry_their_intervals():
    curves = {"clean": [(1, 1.0, 20), (2, 0.5, 20)]}
    axes = plot.draw_curves(curves, "steps").axes[0]
    assert axes.get_xlabel() == "steps; shaded: 95 % intervals, 20 pictures" and axes.get_ylabel() == "accuracy (%)"
    shaded = axes.collections[0].get_paths()[0].vertices
    assert shaded[shaded[:, 0] == 2, 1].min() == pytest.approx(29.9, abs=0.1)  # Wilson's: 10 of 20
    assert shaded[shaded[:, 0] == 2, 1].max() == pytest.approx(70.1, abs=0.1)


def test_several_folders_in_one_figure(tmp_path, monkeypatch):
    figures, save_figure = [], plot.save_figure
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: (figures.append(figure), save_figure(figure, path)))
    one, two = write_sweep(tmp_path / "one"), write_sweep(tmp_path / "two", SWEEP + "0.5\t1\t1\t0.9\t50\n")
    named = [f"classifier={one}", f"CARSO, S = 8={two}"]  # the last = counts
    out = tmp_path / "finding.png"
    assert plot.main([*named, "--out", str(out), "--radius", "8/255", "--no-gradient", "CARSO, S = 8"]) == 0
    assert is_png(out)
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["classifier", "CARSO, S = 8"]
    classifier, carso, radius = axes.lines
    assert list(classifier.get_ydata()) == [100, 0] and list(carso.get_xdata()) == [0, 0.25, 0.5]
    assert (classifier.get_color(), classifier.get_linestyle()) == (plot.COLOURS[0], "-")
    assert (carso.get_color(), carso.get_markerfacecolor()) == (plot.GREY, "white")  # masked: it is not a result
    assert radius.get_xdata()[0] == pytest.approx(8 / 255)
    texts = " ".join(text.get_text() for text in axes.texts)
    assert "trained at 0.0314" in texts and "no gradient" in texts
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.25", "0.5"]


def test_what_cannot_be_drawn_is_refused(tmp_path, capsys):
    folder, out = write_sweep(tmp_path / "e"), ("--out", str(tmp_path / "finding.png"))
    cut = write_sweep(tmp_path / "cut", "eps\tclean\tnoise\tapgd-ce\tn\n0.1\t1\n")
    lean = write_sweep(tmp_path / "lean", "eps\tclean\tn\n0.1\t1\t9\n")
    for arguments, sentence in (
        ([str(tmp_path)], "holds no sweep-*.tsv"),
        ([str(cut)], "cut/sweep-eps.tsv is no table of lab.evaluate's"),
        ([str(lean)], "lean/sweep-eps.tsv has no curves of clean pictures, noise and an attack"),
        ([str(folder), *out], "is LABEL=FOLDER"),
        ([f"A={folder}", f"A={folder}", *out], "is LABEL=FOLDER"),
        ([f"A={folder}", *out, "--no-gradient", "B"], "none of the labels A"),
        ([f"A={folder}", "--out", str(tmp_path / "finding.doc")], "doc"),
    ):
        assert exit_status("plot", functools.partial(plot.main, arguments)) == 2
        error = capsys.readouterr().err
        assert error.startswith("plot: ") and sentence in error
    assert {path.name for path in tmp_path.rglob("*.*")} == {"sweep-eps.tsv"}
