"""Notebooks 05 and 06 with VDM_PROFILE=paper and nothing else changed.

There is no network and no GPU here. Under the name that the Hub has for the paper's classifier lies one with its image size and
its patches, but two layers of 32 dimensions, and for 20 epochs stand three steps. By default the sections on photographs run, from
their restart points; the whole notebooks with VDM_SLOW=1.
"""

import colorsys
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize
from fake_hub import COMMIT
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from test_notebook_runs import SLOW, again, errors, from_restart, make_clone, run_in_one_kernel, surroundings
from test_notebooks import ROOT, code_cells, read
from transformers import ViTConfig, ViTForImageClassification

from vdm_utils.notebook import PROFILES, checkpoint, finished
from vdm_utils.settings import ClassifierSettings, DiffMaskSettings, settings
from vdm_utils.sources import read_pictures

PAPER = PROFILES["paper"]
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# the one documented way to other numbers: PROFILES. IPython runs it before the first cell; %reset must not see its names
FEWER_STEPS = """
def fewer_steps():
    from dataclasses import replace

    from vdm_utils.notebook import PROFILES

    paper = PROFILES["paper"]
    steps = {"max_steps": 3, "log_every_n_steps": 2, "batch_size": 4, "num_workers": 0}
    fewer = {"run_options": steps, "live_steps": 3, "curves": (10, 4)}
    PROFILES["paper"] = replace(paper, counting=paper.counting | {"length": 120}, **fewer)


fewer_steps()
del fewer_steps
"""
# a last cell: what the others have left behind
FACTS = {
    "05_cifar10": """
explained, shown, pictures = photo_mask, seen, photo_pixels
more = {"right": photo_right.float().mean().item(), "curves": live, "dial": {f"{way} {eps}": row for (eps, way), row in dial.items()}}
""",
    "06_counting_qa": """
explained, shown, pictures = counter, seen, photos["pixel_values"]
more = {"counted": counted}
""",
}
TOLD = """
import json
from vdm_utils.notebook import REPOSITORY
files = sorted((REPOSITORY / "runs").glob("cifar10*/*/config.json"))
print(json.dumps(more | {"base": explained.config.base_name_or_path, "width": explained.base.config.hidden_size,
    "pictures": list(pictures.shape), "mask": list(shown.mask.shape[1:]), "device": str(shown.mask.device),
    "written": {str(file): file.stat().st_mtime_ns for file in files}}))
"""
# in the cell that loads a DiffMask of photographs, or trains one first
LOADS = {"05_cifar10": "if not finished(folder):", "06_counting_qa": "from_pretrained(counter_folder())"}


def paint(label, rng):
    """A noisy picture [32, 32, 3] in the colour of its class."""
    colour = 255 * np.array(colorsys.hsv_to_rgb(label / 10, 1, 0.4 + 0.6 * (label % 2)))
    return Image.fromarray((colour + rng.normal(0, 20, (32, 32, 3))).clip(0, 255).astype(np.uint8))


@torch.no_grad()
def stand_in(files, shown):
    """A ViT of random weights, whose head is fitted (least squares) to say which class's colour a picture has."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: label for label, name in enumerate(CLASSES)}}
    model = randomize(ViTForImageClassification(ViTConfig(**size, **labels)), std=0.1).eval()
    seen = [model.vit(part).last_hidden_state[:, 0] for part in read_pictures(files, (224, 224)).split(50)]
    seen, wanted = torch.cat(seen), torch.nn.functional.one_hot(torch.tensor(shown), 10) * 20.0
    weight = torch.linalg.lstsq(torch.cat([seen, torch.ones(len(seen), 1)], 1), wanted).solution  # [33, 10]
    model.classifier.weight.copy_(weight[:-1].T)
    model.classifier.bias.copy_(weight[-1])
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A clone beside pictures and a Hub's cache: its folder, and variables of the environment."""
    folder = make_clone(tmp_path_factory.mktemp("clone"))
    data, hub = (tmp_path_factory.mktemp(name) for name in ("data", "hub"))
    rng, files, colours = np.random.default_rng(0), [], []
    for split, count in (("train", 120), ("test", 20)):  # so many that nine cats are held out for validation
        for label, name in enumerate(CLASSES):
            home = data / "cifar10" / split / name
            home.mkdir(parents=True)
            for number in range(count):
                file, colour = home / f"{number:03}.png", (label + (number == 7)) % 10  # a mistake in every class
                paint(colour, rng).save(file)
                if split == "test":
                    files.append(file), colours.append(colour)
    model = hub / "hub" / f"models--{PAPER.photo_base.replace('/', '--')}"
    stand_in(files, colours).save_pretrained(model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    startup = surroundings(folder, 1)["IPYTHONDIR"]
    Path(startup, "profile_default", "startup", "z.py").write_text(FEWER_STEPS)
    return folder, {"VDM_PROFILE": "paper", "VDM_DATA_DIR": str(data), "HF_HOME": str(hub)}


def run(place, name, cells):
    """Execute cells of a notebook, forget all names, and go as far as the training again: what the cells have left behind.

    The second time must load what the first has trained.
    """
    folder, variables = place
    goal = next(i for i, cell in enumerate(cells) if LOADS[name] in cell.source)
    first, second = ([again(cell) for cell in part] for part in (cells, cells[: goal + 1]))
    told = new_code_cell(FACTS[name] + TOLD)
    run_in_one_kernel(folder, [*first, told, new_code_cell("%reset -f"), *second], **variables)
    assert not errors([*first, told, *second])
    left = json.loads(told.outputs[0]["text"])
    files = sorted((folder / "runs").glob("cifar10*/*/config.json"))
    assert left["written"] == {str(file): file.stat().st_mtime_ns for file in files}
    return left


def trained(folder):
    """Of a finished run: how many steps it took, and its configuration."""
    steps = json.loads((folder / "trainer_state.json").read_text())["global_step"]
    return steps, json.loads((folder / "config.json").read_text())


def photographs(name, heading):
    """The set-up cells of a notebook and those of the section on photographs, which begins at a restart point."""
    cells = read(ROOT / "notebooks" / f"{name}.ipynb").cells
    start = next(i for i, cell in enumerate(cells) if heading in cell.source) + 1
    end = next((i for i in range(start, len(cells)) if re.search("^## ", cells[i].source, re.M)), len(cells))
    notebook = new_notebook(cells=cells[: end + 1])
    assert "restart" in cells[start].metadata["tags"]
    return from_restart(notebook, notebook.cells[start])


def check_05(place, cells):
    """Section 5 has trained the paper's setting, once, and every later cell is about it."""
    left = run(place, "05_cifar10", cells)
    assert left["base"] == PAPER.photo_base and left["width"] == 32  # the stand-in, under its name on the Hub
    assert left["pictures"][1:] == [3, 224, 224] and left["mask"] == [14, 14]
    assert left["device"].startswith(PAPER.device) and 0.9 < left["right"] < 1
    assert set(left["dial"]) == {f"{way} {eps}" for way in ("gates", "cut to fit") for eps in (0.03, 0.1, 0.3)}
    assert all(row["KL ≤ ε"] == 1 for name, row in left["dial"].items() if "cut" in name)
    assert (
        len({row["kept"] for name, row in left["dial"].items() if "gates" in name}) == 1
    )  # one training serves three ε
    runs = place[0] / "runs"
    steps, config = trained(runs / "cifar10-paper" / "diffmask")
    assert steps == 3 and config["base_name_or_path"] == PAPER.photo_base
    assert (config["eps"], config["add_activation"], config["no_placeholder"]) == (0.1, 8.0, False)  # the paper's
    assert [folder.name for folder in runs.glob("cifar10*")] == ["cifar10-paper"]


def check_06(place, cells):
    """Section 8 has taught the Hub's classifier to count and explained it, once."""
    left = run(place, "06_counting_qa", cells)
    assert left["counted"] == "cat" and left["width"] == 32
    assert left["pictures"] == [120, 3, 224, 224] and left["mask"] == [14, 14]
    assert left["device"].startswith(PAPER.device)
    folder = place[0] / "runs" / "cifar10-count-paper"
    for part in ("base", "diffmask"):
        assert trained(folder / part)[0] == 3
    counts = trained(folder / "base")[1]["id2label"]
    assert counts == {str(count): f"{count} × cat" for count in range(10)}
    assert trained(folder / "diffmask")[1]["base_name_or_path"] == "../base"


@pytest.mark.parametrize(
    ("name", "heading", "check"),
    [("05_cifar10", "## 5. CIFAR-10", check_05), ("06_counting_qa", "## 8. Photographs", check_06)],
    ids=["05", "06"],
)
class TestInThePaperProfile:
    def test_photographs(self, place, name, heading, check):
        check(place, photographs(name, heading))

    @SLOW
    def test_the_whole_notebook(self, place, name, heading, check):
        shutil.rmtree(place[0] / "runs", ignore_errors=True)
        check(place, code_cells(read(ROOT / "notebooks" / f"{name}.ipynb")))


def test_the_paper_profile_is_the_paper_s_run():
    mask, counter = (
        settings(kind, PAPER.recipe, **PAPER.run_options) for kind in (DiffMaskSettings, ClassifierSettings)
    )
    assert mask.num_epochs == counter.num_epochs == 20 and mask.max_steps == counter.max_steps == -1
    assert mask.from_pretrained == PAPER.photo_base and mask.image_size == PAPER.photo_size == 224
    assert mask.log_every_n_steps == -(-45_000 // mask.batch_size)  # once in an epoch
    assert PAPER.counting == {"grid_size": 3, "class_idx": 3, "image_size": 224}


def test_profiles_differ_in_photographs_only(monkeypatch):
    quick = PROFILES["quick"]
    for task in ("toy", "digits-count", "shapes"):
        assert quick.checkpoint(task, "base") == PAPER.checkpoint(task, "base") == checkpoint(task, "base")
    assert finished(quick.checkpoint("cifar10", "diffmask")) and not finished(PAPER.checkpoint("cifar10", "base"))
    assert PAPER.checkpoint("cifar10-count", "base") == str(ROOT / "runs" / "cifar10-count-paper" / "base")
    for name in ("05_cifar10", "06_counting_qa"):  # the same cells: none asks which profile it is
        assert not any("profile.name" in cell.source for cell in code_cells(read(ROOT / "notebooks" / f"{name}.ipynb")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (quick.device, PAPER.device) == ("cpu", "cuda")
