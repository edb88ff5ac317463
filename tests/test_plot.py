"""lab/plot.py on tables written by hand."""

import sys
import xml.etree.ElementTree as ElementTree

import pytest

from lab import plot

SWEEP = ["eps\tclean\tnoise\tapgd-ce\tn", "0\t1.0000\t1.0000\t1.0000\t20", "0.25\t1.0000\t0.9000\t0.0000\t20"]
ROWS = [
    "picture\tlabel\tattack\tduring\tright\tdraws\tselect",
    "0\t3\tclean\t1\t4\t4\t1.000",
    "0\t3\trand\t0\t1\t4\t0.000",
]


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str]:
        """Exit status and what was printed as an error."""
        monkeypatch.setattr(sys, "argv", ["plot", *map(str, arguments)])
        try:
            code = plot.main()
        except SystemExit as stop:  # argparse's own refusals
            code = stop.code
        return code, capsys.readouterr().err

    return run


def evaluation(folder, sweep=SWEEP, rows=None, what="eps"):
    folder.mkdir(exist_ok=True)
    if sweep:
        (folder / f"sweep-{what}.tsv").write_text("\n".join(sweep) + "\n")
    if rows:
        (folder / "rows.tsv").write_text("\n".join(rows) + "\n")
    return folder


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_a_folder_becomes_its_curves_and_bars(tmp_path, run):
    folder = evaluation(tmp_path / "e", rows=ROWS)
    evaluation(
        folder,
        [line.replace("eps", "eot").replace("0\t", "1\t", i == 1) for i, line in enumerate(SWEEP[:2])],
        None,
        "eot",
    )
    assert run(folder) == (0, "")
    assert is_png(folder / "sweep-eps.png") and is_png(folder / "sweep-eot.png") and is_png(folder / "attacks.png")
    assert not list(folder.glob("*.part"))


def test_several_folders_in_one_figure(tmp_path, run, monkeypatch):
    drawn = {}
    save = plot.save
    monkeypatch.setattr(
        plot, "save", lambda figure, path, **o: (drawn.update(axes=figure.axes[0]), save(figure, path, **o))
    )
    one, two = evaluation(tmp_path / "one"), evaluation(tmp_path / "two", SWEEP[:2] + ["0.5\t1\t1\t0.9\t50"])
    options = ("--out", tmp_path / "new" / "finding.png", "--radius", "8/255", "--no-gradient", "CARSO, S = 8")
    assert run(f"classifier={one}", f"CARSO, S = 8={two}", *options) == (0, "")  # the last = counts
    assert is_png(tmp_path / "new" / "finding.png")
    axes = drawn["axes"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["classifier", "CARSO, S = 8"]
    classifier, carso, radius = axes.lines
    assert list(classifier.get_ydata()) == [100, 0] and list(carso.get_xdata()) == [0, 0.5]
    assert classifier.get_linestyle() == "-" and carso.get_markerfacecolor() == "white"
    assert radius.get_xdata()[0] == pytest.approx(8 / 255)
    texts = " ".join(text.get_text() for text in axes.texts)
    assert "trained at 8/255" in texts and "no gradient" in texts
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.25", "0.5"]


def test_the_method_is_a_picture_whose_text_is_text(tmp_path, run):
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    assert run("--method", one) == (0, "") and run("--method", two) == (0, "")
    assert one.read_bytes() == two.read_bytes()  # nothing random in it, no date
    root = ElementTree.parse(one).getroot()
    assert root.get("viewBox") == "0 0 800 400" and one.stat().st_size < 50_000
    words = {element.text for element in root.iter() if element.tag.endswith("}text")}
    assert {"classifier", "condition", "decoder", "encoder", "logsumexp", "answer", "(B, D)", "(B, S, K)"} <= words
    assert run("--method", tmp_path / "method.png") == (0, "") and is_png(tmp_path / "method.png")


BROKEN = {
    "empty": ([], "no rows with the columns"),
    "header": (SWEEP[:1], "no rows with the columns"),
    "column": ([line.rsplit("\t", 1)[0] for line in SWEEP], "no rows with the columns eps, apgd-ce, noise, clean, n"),
    "word": (SWEEP + ["0.5\tgood\t1\t1\t20"], "'good' in the column clean"),
    "short": (SWEEP + ["0.5\t1"], "None in the column"),
    "nan": (SWEEP + ["0.5\t1\t1\tnan\t20"], "'nan' in the column apgd-ce"),
    "percent": (SWEEP + ["0.5\t1\t1\t99.0\t20"], "not a number from 0 to 1"),
    "nobody": (SWEEP + ["0.5\t1\t1\t1\t0"], "'0' in the column n"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_table_is_refused_in_one_sentence(case, tmp_path, run):
    lines, sentence = BROKEN[case]
    folder = evaluation(tmp_path / "e", lines)
    (folder / "sweep-eps.tsv").touch()
    for arguments in ((folder,), (f"A={folder}", "--out", tmp_path / "finding.png")):
        code, error = run(*arguments)
        assert code == 2 and error.startswith("plot: ") and error.count("\n") == 1
        assert sentence in error and "sweep-eps.tsv" in error
    assert not list(tmp_path.rglob("*.png"))


def test_broken_rows_are_refused(tmp_path, run):
    for i, rows in enumerate((ROWS[:1], ["attack\tright", "rand\t1"], ROWS + ["1\t3\trand\t0\t1\t0\t0"])):
        code, error = run(evaluation(tmp_path / str(i), None, rows))
        assert code == 2 and error.startswith("plot: ") and "rows.tsv" in error and error.count("\n") == 1


def test_what_is_no_evaluation_is_refused(tmp_path, run):
    folder = evaluation(tmp_path / "e")
    out = ("--out", tmp_path / "finding.png")
    for arguments, sentence in (
        ((tmp_path,), "neither rows.tsv nor sweep"),
        ((tmp_path / "nowhere",), "neither rows.tsv nor sweep"),
        ((), "give it a FOLDER"),
        ((folder, folder), "give it a FOLDER"),
        ((folder, "--method", tmp_path / "method.svg"), "give it a FOLDER"),
        ((folder, *out), "is LABEL=FOLDER"),
        ((f"A={folder}", f"A={folder}", *out), "is LABEL=FOLDER"),
        ((f"A={tmp_path}", *out), "sweep-eps.tsv"),
        ((f"A={folder}", *out, "--no-gradient", "B"), "none of the labels A"),
        ((f"A={folder}", *out, "--radius", "wide"), "'wide' is not a number"),
        ((f"A={folder}", "--out", tmp_path / "finding.doc"), "doc"),
        (("--method", folder), ""),
    ):
        code, error = run(*arguments)
        assert code == 2 and "plot: " in error and sentence in error and "Traceback" not in error
    assert [path.name for path in tmp_path.rglob("*.*")] == ["sweep-eps.tsv"]
