"""What is published, where it lies, and what was reported of it: classifiers, by RobustBench's names, and the CARSO
authors' released defence.

    file = fetch_classifier("cifar10", "Rebuffi2021Fixing_28_10_cutmix_ddpm", "data")
    folder = fetch_defence("cifar10", "data")              # the authors' four files, for checkpoints.load_published
    print(side_by_side({"naive-odds": report, "logsumexp": report}))

None of the hosts could be reached where this was written.
"""

from pathlib import Path

from torch import nn

from data import Dataset
from lab.checkpoints import PUBLISHED_PARTS
from lab.files import download
from lab.presets import Budget, budget_note, eps_text
from lab.run import accuracy

BUCKET = "https://bucket.ballarin.cc/aimldl/carso2024cnn/"  # of the CARSO authors
WANG = "https://huggingface.co/wzekai99/DM-Improves-AT/resolve/main/checkpoint/"  # of Wang et al. 2023
DEEPMIND = "https://storage.googleapis.com/dm-adversarial-robustness/"  # of Gowal et al. 2020 and Rebuffi et al. 2021
FOLDERS = {  # in the bucket
    "cifar10": BUCKET + "cifar_10_cuiwrn2810/models/",
    "cifar100": BUCKET + "cifar_100_cuiwrn2810/models/",
    "tinyimagenet": BUCKET + "tinyimagenet_wangwrn2810/models/",
}

# Data set -> RobustBench's name -> (address, clean accuracy). The paper's own comes first (table 2). The authors' plain
# WRN-28-10 has no address that we know of: give its file.
CLASSIFIERS = {
    "cifar10": {
        "Cui2023Decoupled_WRN-28-10": (FOLDERS["cifar10"] + "cifar10_a3_b10_t4_20m_w.safetensors", 0.9216),
        "Wang2023Better_WRN-28-10": (WANG + "cifar10_linf_wrn28-10.pt", 0.9244),
        "Rebuffi2021Fixing_28_10_cutmix_ddpm": (DEEPMIND + "cifar10_linf_wrn28-10_cutmix_ddpm_v2.pt", 0.8733),
        "Gowal2020Uncovering_28_10_extra": (DEEPMIND + "cifar10_linf_wrn28-10_with.pt", 0.8948),
    },
    "cifar100": {
        "Cui2023Decoupled_WRN-28-10": (FOLDERS["cifar100"] + "cifar100_a5_b12_t4_50m_w.safetensors", 0.7385),
        "Wang2023Better_WRN-28-10": (WANG + "cifar100_linf_wrn28-10.pt", 0.7258),
        "Rebuffi2021Fixing_28_10_cutmix_ddpm": (DEEPMIND + "cifar100_linf_wrn28-10_cutmix_ddpm.pt", 0.6241),
    },
    "tinyimagenet": {
        "Wang2023Better_WRN-28-10": (FOLDERS["tinyimagenet"] + "tiny_linf_wrn28_10_w.safetensors", 0.6519),
    },
}
# What the names of the authors' three files of the purifier begin with, in the bucket.
PURIFIERS = {
    "cifar10": "wrn_28_10_cifar_10_cui_2023_",
    "cifar100": "wrn_28_10_cifar_100_cui_2023_",
    "tinyimagenet": "wrn_28_10_tinyimagenet_200_wang_2023_",
}
# Accuracies in % that the paper reports (its tables 2, 3 and 15): classifier clean, AutoAttack; CARSO rand, PGD+EoT.
FIGURES = {
    "cifar10": {"classifier clean": 92.16, "standard": 67.73, "rand": 76.13, "pgd-eot": 76.89},
    "cifar100": {"classifier clean": 73.85, "standard": 39.18, "rand": 66.65},
    "tinyimagenet": {"classifier clean": 65.19, "standard": 31.30, "rand": 53.56},
}


def figures_of(report: dict) -> dict:
    """What the paper reports of what report.json is about: of whole defences, at its radius."""
    comparable = eps_text(report["eps"]) == "8/255" and not report["config"].get("control")
    return FIGURES.get(report["dataset"], {}) if comparable else {}


def names_of(data_name: str) -> list[str]:
    """Of the classifiers that can be had for a data set: 'published', which is the paper's, and each one's own."""
    return ["published", *CLASSIFIERS[data_name]] if data_name in CLASSIFIERS else []


def entry(data_name: str, name: str) -> tuple[str, float]:
    """Address and clean accuracy of a classifier in names_of(data_name)."""
    known = CLASSIFIERS[data_name]
    return known[next(iter(known)) if name == "published" else name]


def fetch(address: str, data_name: str, data_dir) -> Path:
    """A published file, downloaded into data_dir unless it is there. OSError, ValueError: see lab.files.download."""
    file = Path(data_dir) / "published" / data_name / address.rpartition("/")[2]
    download(address, file)
    return file


def fetch_classifier(data_name: str, name: str, data_dir) -> Path:
    """The file of a classifier in names_of(data_name)."""
    return fetch(entry(data_name, name)[0], data_name, data_dir)


def fetch_defence(data_name: str, data_dir) -> Path:
    """The folder with the authors' released defence for a data set."""
    for part in PUBLISHED_PARTS:
        fetch(f"{FOLDERS[data_name]}{PURIFIERS[data_name]}{part}.safetensors", data_name, data_dir)
    return fetch_classifier(data_name, "published", data_dir).parent


def check_reported(classifier: nn.Module, path, data: Dataset, name: str = "published") -> float:
    """Its clean accuracy on 1,000 test pictures. ValueError if it is one of names_of(data.name), and this is not what
    was reported of it."""
    clean = accuracy(classifier, data, 1000)
    expected = entry(data.name, name)[1] if name in names_of(data.name) else 0.0
    if clean < expected - 0.03:
        raise ValueError(
            f"{path} should classify {expected:.1%} of clean pictures: this is another file, or other data"
        )
    return clean


def side_by_side(reports: dict[str, dict], budget: Budget) -> str:
    """The same defence seen through several outputs, beside what the paper says of it; reports: view -> what its
    report.json holds."""
    first = next(iter(reports.values()))
    figures, rows = figures_of(first), {}
    rows["classifier, clean"] = "classifier clean", lambda r: r["classifier"]["clean"]
    rows["CARSO, clean"] = "", lambda r: r["clean"]
    for name, attack in first["attacks"].items():
        on = "the bare classifier" if attack["target"] == "classifier" else "CARSO"
        rows[f"{name} on {on}"] = name, lambda r, name=name: r["attacks"][name]
    rows["**worst of all**"] = "", lambda r: r["robust"]
    lines = [
        f"# The published defence on {first['dataset']}, {first['n']} test pictures, eps {eps_text(first['eps'])}",
        "",
        f"{budget_note(budget)} Accuracies in %, scored on fresh draws of the noise. Where the audit failed they say "
        "nothing about robustness.",
        "",
        f"| | published | {' | '.join(f'through {view}' for view in reports)} |",
        "|---|---|" + "---|" * len(reports),
    ]
    for label, (figure, part) in rows.items():
        cells = " | ".join(f"{100 * part(r)['accuracy']:.2f}" for r in reports.values())
        lines.append(f"| {label} | {figures.get(figure, '')} | {cells} |")
    audits = " | ".join("passed" if r["audit"]["passed"] else "**failed**" for r in reports.values())
    return "\n".join([*lines, f"| audit | | {audits} |", ""])
