"""The files around the code agree with each other and with what they promise."""

import importlib.util
import json
import re
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

from vdm_utils.__main__ import parse
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.training import ClassifierSettings, DiffMaskSettings
from vdm_utils.vit import fingerprint, load_classifier

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_installs_this_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert f"python{PROJECT['requires-python']}" in conda and "pip" in conda
    (entry,) = pip["pip"]
    extra = re.fullmatch(r"-e \.\[(\w+)\]", entry).group(1)
    assert extra in PROJECT["optional-dependencies"]
    assert f".[{extra}]" in (ROOT / "Makefile").read_text()  # make and conda install the same thing


def test_modules_import_only_what_stands_before_them():
    order = ["errors", "pictures", "shapes", "sources", "data", "checkpoints", "vit", "gates", "objective", "diffmask", "pixel_attributions",
             "attributions", "metrics", "faithfulness", "sanity", "training", "plots", "explorers", "gallery", "notebook",
             "__main__"]  # fmt: skip
    modules = {path.stem for path in (ROOT / "vdm_utils").glob("*.py")} - {"__init__"}
    assert modules == set(order)
    for name in modules:
        imported = re.findall(r"from vdm_utils\.(\w+) import", (ROOT / "vdm_utils" / f"{name}.py").read_text())
        assert all(order.index(other) < order.index(name) for other in imported), name


@pytest.mark.parametrize("target", ["setup", "run", "lab", "test", "planted", "checkpoints", "benchmarks"])
def test_make_knows_its_targets(target):
    assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "tools" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_show_formulas_without_a_network(pages):
    text = "As $a_1 < b$ says:\n\n$$\\frac{x}{2}$$\n\nand `$HOME` and\n```\n$c$ $d$\n```\n"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell("'$e$'")])
    shown = pages.with_mathml(notebook)
    source = shown.cells[0].source
    assert source.count("<math") == 2 and "<mfrac>" in source and 'display="block"' in source
    assert "`$HOME`" in source and "$c$ $d$" in source and shown.cells[1].source == "'$e$'"
    assert notebook.cells[0].source == text


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_formula_can_be_shown(pages, path):
    for cell in pages.with_mathml(nbformat.read(path, 4)).cells:
        if cell.cell_type == "markdown":
            assert not re.search(r"<mtext>\\|<mi>\\|&</mo>", cell.source), (
                cell.source
            )  # what the converter did not know


def test_repository_is_small():
    sizes = [path.stat().st_size for path in ROOT.rglob("*") if path.is_file() and not _ignored(path)]
    assert max(sizes) < 12e6 and sum(sizes) < 40e6


def _ignored(path):
    skipped = (".venv", ".git", "build", "runs", "__pycache__", "cifar10", "MNIST", "cifar-10-batches-py")
    return any(part in skipped for part in path.relative_to(ROOT).parts)


def test_readme_links_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert link.startswith("http") or (ROOT / link).exists(), link


CHECKPOINTS = sorted(path.parent for path in (ROOT / "data" / "checkpoints").glob("*/*/card.json"))


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_checkpoints_are_what_their_cards_say(folder):
    card = json.loads((folder / "card.json").read_text())
    assert card["command"] and card["data"] and card["validation"]
    if folder.name == "base":
        assert fingerprint(load_classifier(folder)) == card["fingerprint"]
    else:
        diffmask = VisionDiffMask.from_pretrained(folder)  # refuses another base
        assert fingerprint(diffmask.base) == card["fingerprint of the base"]
        assert diffmask.config.base_name_or_path.endswith("base")


def test_checkpoints_are_small_and_complete():
    assert sum(file.stat().st_size for folder in CHECKPOINTS for file in folder.iterdir()) < 12e6
    spec = importlib.util.spec_from_file_location("checkpoints", ROOT / "tools" / "checkpoints.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    made = {(task, part) for task, parts in tool.TASKS.items() for part in parts}
    assert {(path.parent.name, path.name) for path in CHECKPOINTS} == made  # each can be made again
    for stages in [lines for parts in tool.TASKS.values() for lines in parts.values()]:
        for job, *words in map(str.split, stages):
            kind = ClassifierSettings if job == "train-base" else DiffMaskSettings
            parse(kind, job, words)
