"""The files around the code agree with each other and with what they promise."""

import ast
import base64
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import load_tool
from PIL import Image

from vdm_utils.__main__ import main, parse
from vdm_utils.checkpoints import save_classifier
from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.notebook import PROFILES
from vdm_utils.settings import settings
from vdm_utils.training import ClassifierSettings, DiffMaskSettings
from vdm_utils.vit import build_classifier, fingerprint, load_classifier

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
             "attributions", "metrics", "refine", "faithfulness", "sanity", "settings", "runs", "training", "plots", "explorers", "gallery", "hints", "notebook",
             "__main__"]  # fmt: skip
    modules = {path.stem for path in (ROOT / "vdm_utils").glob("*.py")} - {"__init__"}
    assert modules == set(order)
    for name in modules:
        imported = re.findall(r"from vdm_utils\.(\w+) import", (ROOT / "vdm_utils" / f"{name}.py").read_text())
        assert all(order.index(other) < order.index(name) for other in imported), name


@pytest.mark.parametrize(
    "target", ["setup", "run", "lab", "test", "planted", "colab", "first-hour", "checkpoints", "benchmarks"]
)
def test_make_knows_its_targets(target):
    assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def pages():
    return load_tool("pages")


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
    parts = [part for part in ROOT.iterdir() if not _ignored(part)]  # .venv alone has tens of thousands of files
    files = [path for part in parts for path in (part.rglob("*") if part.is_dir() else [part])]
    sizes = [path.stat().st_size for path in files if path.is_file() and not _ignored(path)]
    assert max(sizes) < 12e6 and sum(sizes) < 40e6


def _ignored(path):
    skipped = (".venv", ".git", "build", "runs", "__pycache__", "cifar10", "MNIST", "cifar-10-batches-py")
    return any(part in skipped for part in path.relative_to(ROOT).parts)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "benchmarks" / "README.md"], ids=["readme", "benchmarks"])
def test_links_exist(page):
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)", text, re.M)
    anchors = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
    }  # as GitHub makes them
    for link in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        assert link.startswith("http") or (page.parent / file).exists(), link
        assert file or anchor in anchors, link


def asked(words):
    """What a command line asks for, but for folders and log lines: as parsed, so that the order of options is free."""
    told = vars(parse(DiffMaskSettings, "train", [word for word in words if word != "--bf16"]))
    return {
        name: value
        for name, value in told.items()
        if name not in ("start_from", "from_pretrained", "log_every_n_steps")
    }


@pytest.mark.parametrize("part", ["diffmask", "diffmask-eps-0.03", "diffmask-eps-0.3"])
def test_masks_of_photographs_are_trained_alike_wherever_it_is_written(part):
    """By the card, by `make checkpoints`, and live in notebook 05."""
    card = json.loads((ROOT / "data" / "checkpoints" / "cifar10" / part / "card.json").read_text())
    ran = [asked(shlex.split(command.partition(" train ")[2])) for command in card["command"]]
    stages = [asked(shlex.split(stage)[1:]) for stage in load_tool("checkpoints").TASKS["cifar10"][part]]
    assert ran == stages
    if part == "diffmask":
        quick = PROFILES["quick"]
        live = settings(DiffMaskSettings, quick.recipe, dataset="CIFAR10", seed=0, **quick.mask_options)
        differs = {name for name, value in ran[0].items() if getattr(live, name) != value}
        assert not differs


def test_a_notebook_is_committed_without_its_machine_and_with_light_figures(pages):
    """Of the figure nothing is lost that can be seen; bytes go, and so does what another machine would write otherwise."""
    picture = np.full((120, 160, 4), 255, np.uint8)
    picture[20:90, 30:140, :3] = np.random.default_rng(0).integers(0, 40, (14, 22, 3)).repeat(5, 0).repeat(5, 1)
    Image.fromarray(picture).save(heavy := io.BytesIO(), "PNG")
    figure = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(heavy.getvalue()).decode()})
    cell = nbformat.v4.new_code_cell(
        "show()", execution_count=1, outputs=[figure, nbformat.v4.new_output("stream", text="3")]
    )
    there = {
        "kernelspec": {"name": "mine", "display_name": "Mine"},
        "language_info": {"name": "python", "version": "3.11.7"},
        "widgets": {},
    }
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("text"), cell], metadata=there)
    committed = pages.as_committed(notebook)
    assert committed.metadata == {"kernelspec": pages.KERNEL, "language_info": {"name": "python"}}
    light = base64.b64decode(committed.cells[1].outputs[0].data["image/png"])
    seen = Image.open(io.BytesIO(light))
    difference = np.abs(np.asarray(seen.convert("RGB"), int) - picture[..., :3])
    assert seen.mode == "P" and len(light) < len(heavy.getvalue()) and difference.mean() < 2
    assert committed.cells[1].outputs[1].text == "3" and notebook.metadata == there
    assert notebook.cells[1].outputs[0].data["image/png"] == figure.data["image/png"]  # a copy was changed
    assert pages.as_committed(committed) == committed


CHECKPOINTS = sorted(path.parent for path in (ROOT / "data" / "checkpoints").glob("*/*/card.json"))


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_checkpoints_are_what_their_cards_say(folder):
    card = json.loads((folder / "card.json").read_text())
    assert card["command"] and card["data"] and card["validation"]
    if folder.name.startswith("base"):
        assert fingerprint(load_classifier(folder)) == card["fingerprint"]
    else:
        diffmask = VisionDiffMask.from_pretrained(folder)  # refuses another base
        assert fingerprint(diffmask) == card["fingerprint"]
        assert fingerprint(diffmask.base) == card["fingerprint of the base"]
        assert diffmask.config.base_name_or_path.endswith("base")


def test_checkpoints_are_small_and_complete():
    assert sum(file.stat().st_size for folder in CHECKPOINTS for file in folder.iterdir()) < 12e6
    tool, distil = load_tool("checkpoints"), load_tool("distil")
    made = {(task, part) for task, parts in tool.TASKS.items() for part in parts}
    assert {(path.parent.name, path.name) for path in CHECKPOINTS} == made  # each can be made again
    for stages in [lines for parts in tool.TASKS.values() for lines in parts.values()]:
        for job, *words in map(str.split, stages):
            if job == "distil":
                distil.parse(
                    [*words, "--output_dir", "", *([] if "--from_pretrained" in words else ["--from_pretrained", ""])]
                )
                continue
            kind = ClassifierSettings if job == "train-base" else DiffMaskSettings
            parse(kind, job, words)


TINY = "--dataset toy --image_size 12 --batch_size 8 --num_workers 0 --max_steps 4 --log_every_n_steps 2"
STAGES = {
    "toy": {
        "base": [f"train-base {TINY} --patch_size 4 --seed {seed}" for seed in (0, 1)],
        "diffmask": [f"train --recipe quick {TINY} --sample_images 0 --seed 0"],
    }
}


def test_training_what_ships_goes_on_where_it_was_killed(tmp_path, monkeypatch, capsys):
    """Killed in the second stage of three, after its first checkpoint: the first is kept, and the end is the same."""
    tool, commands, steps = load_tool("checkpoints"), [], []
    monkeypatch.chdir(tmp_path)  # left again by the tool
    monkeypatch.setattr(tool, "REPOSITORY", tmp_path)
    monkeypatch.setattr(tool, "TASKS", STAGES)
    monkeypatch.setattr(tool, "CHECKPOINTS", tmp_path / "shipped")
    step = transformers.Trainer.training_step

    def counted(*args, **kwargs):
        steps.append(1)
        if len(steps) == dies_at:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    def in_this_process(command, **options):
        commands.append(" ".join(command[3:]))
        capsys.readouterr()
        assert main(command[3:]) == 0
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out)

    monkeypatch.setattr(transformers.Trainer, "training_step", counted)
    monkeypatch.setattr(tool.subprocess, "run", in_this_process)

    def make(*words):
        monkeypatch.setattr(sys, "argv", ["checkpoints.py", "toy", "--runs", "runs", *words])
        commands.clear(), steps.clear()
        tool.main()
        return {part: json.loads((tmp_path / "shipped/toy" / part / "card.json").read_text()) for part in STAGES["toy"]}

    dies_at = 0
    cards = make()
    assert len(steps) == 12 and len(commands) == 3 and "fingerprint of the base" in cards["diffmask"]
    dies_at = 7  # of the second stage the third step
    with pytest.raises(KeyboardInterrupt):
        make()
    assert sorted(path.name for path in (tmp_path / "runs/toy").iterdir()) == ["base-0", "base-1"]
    dies_at = 0
    resumed = make("--resume")
    assert len(steps) == 2 + 4 and [line.split()[0] for line in commands] == ["train-base", "train"]
    assert "base-0" in commands[0] and commands[0].endswith("--checkpoint last")
    for name in ("fingerprint", "validation", "command"):
        assert all(resumed[part][name] == cards[part][name] for part in cards), name
    assert make("--resume") == resumed and not commands  # all stages are finished


def with_few_pictures(distil, monkeypatch):
    """The tool, on splits of 300 pictures."""
    monkeypatch.setattr(distil, "load_data", lambda *args, **options: load_data(*args, **options, length=300))
    return distil


SCHOOLS = {"pictures": [], "twice": ["--agreement", 3], "grids": ["--grid_size", 2, "--class_idx", 3]}


@pytest.mark.parametrize("school", SCHOOLS.values(), ids=SCHOOLS)
def test_a_vit_learns_from_a_convolutional_teacher(tmp_path, monkeypatch, capsys, school):
    """`tools/distil.py` from end to end, on drawn pictures: another classifier comes out, whole and without a trace of school."""
    torch.manual_seed(0)
    start = build_classifier("vit", "tiny", image_size=32, patch_size=4, num_labels=10)
    save_classifier(start, tmp_path / "start")
    words = ["--from_pretrained", tmp_path / "start", "--output_dir", tmp_path / "end", "--dataset", "shapes"]
    words += ["--teacher_steps", 2, "--steps", 4, "--halved", 2, *school]
    counting = "--grid_size" in school
    monkeypatch.setattr("sys.argv", ["distil.py", *map(str, words)])
    with_few_pictures(load_tool("distil"), monkeypatch).main()
    assert 0 <= json.loads(capsys.readouterr().out)["eval_accuracy"] <= 1  # nothing else is printed there
    end = load_classifier(tmp_path / "end")
    weights, before = end.state_dict(), start.state_dict()
    same = [name for name in before if weights[name].shape == before[name].shape and weights[name].equal(before[name])]
    assert not same and all(weight.isfinite().all() for weight in weights.values())
    assert end.config._attn_implementation == "sdpa"
    assert (end.config.image_size, end.config.num_labels) == ((64, 5) if counting else (32, 10))
    assert not counting or end.config.id2label == load_data("shapes_QA", "test", grid_size=2, class_idx=3).id2label


def test_an_interrupted_school_ends_as_one_that_was_not(tmp_path, monkeypatch, capsys):
    """Killed in the second step of the teacher, then in the third of the classifier, which is the first with blank patches."""
    distil, calls = with_few_pictures(load_tool("distil"), monkeypatch), []
    rate, dies_at = distil.learning_rate, 0

    def counted(*args):
        calls.append(args)
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        return rate(*args)

    def school(folder, *words):
        words = ["--output_dir", tmp_path / folder, "--dataset", "shapes", "--teacher_steps", 2, "--steps", 4, *words]
        words = ["--from_pretrained", tmp_path / "start", "--halved", 2, *words]
        monkeypatch.setattr("sys.argv", ["distil.py", *map(str, words)])
        calls.clear()
        distil.main()

    monkeypatch.setattr(distil, "learning_rate", counted)
    monkeypatch.setattr(distil, "BATCH", 16)
    monkeypatch.setattr(distil, "BOOKMARK_EVERY", 1)
    monkeypatch.setattr(distil, "evaluate_classifier", lambda model, data: {})
    save_classifier(build_classifier("vit", "tiny", image_size=32, patch_size=4, num_labels=10), tmp_path / "start")
    school("whole")
    for at, left in ((2, ["teacher.bookmark"]), (1 + 2 * 2 + 1, ["student.bookmark", "teacher.bookmark"])):
        dies_at = at
        with pytest.raises(KeyboardInterrupt):
            school("resumed", "--resume")
        assert sorted(path.name for path in (tmp_path / "resumed").iterdir()) == left
    dies_at = 0
    school("resumed", "--resume")
    assert len(calls) == 2 * 2  # two learning rates in each of the two last steps
    whole, resumed = (load_classifier(tmp_path / name).state_dict() for name in ("whole", "resumed"))
    assert all(resumed[name].equal(weight) for name, weight in whole.items())
    files = {folder: sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("whole", "resumed")}
    assert files["whole"] == files["resumed"] and "model.safetensors" in files["whole"]
    assert not any("bookmark" in name for name in files["whole"])


def test_batches_of_a_resumed_school_are_those_that_were_left(toy):
    """Three of 32 are an epoch, and every epoch has its own order."""
    distil = load_tool("distil")
    whole, left = (
        [batch["pixel_values"] for batch in itertools.islice(distil.batches(toy, 0, 32, skip), count)]
        for skip, count in ((0, 8), (5, 3))
    )
    assert all(map(torch.equal, whole[5:], left)) and not torch.equal(whole[0], whole[3])


def test_patches_are_missing_from_the_second_of_two_views():
    distil = load_tool("distil")
    torch.manual_seed(0)
    model = build_classifier("vit", "tiny", image_size=32, patch_size=4, num_labels=10).eval()
    missing, pictures = distil.MissingPatches(model), torch.rand(300, 3, 32, 32)
    missing.draw_second(300)
    first, second = missing.blank.split(300)
    share = second.float().mean(1)
    assert not first.any() and 0.18 < share.min() < 0.25 and 0.8 < share.max() < 0.87
    board = missing.board[None].expand(300, -1)
    # 1: a whole colour of the board, and no other
    same_colour = ((second == board.bool()).float().mean(1) - 0.5).abs() * 2
    assert (same_colour > 0.8).any() and (same_colour < 0.05).sum() > 100
    # what is blank is without effect, and what is not is not
    views = pictures[:2].repeat(2, 1, 1, 1)
    missing.blank = torch.cat([first[:2], second[:2]])
    other = views.clone()
    hidden = second[0].view(8, 8).repeat_interleave(4, 0).repeat_interleave(4, 1)
    other[2] = torch.where(hidden, torch.rand_like(other[2]), other[2])
    with torch.no_grad():
        assert torch.equal(model(other).logits, model(views).logits)
        other[0] = torch.where(hidden, torch.rand_like(other[0]), other[0])
        assert not torch.equal(model(other).logits[0], model(views).logits[0])


def test_the_teacher_of_counters_sees_cells_and_answers_in_counts():
    distil = load_tool("distil")
    grids = load_data("shapes_QA", "test", grid_size=2, class_idx=3)
    batch = grids.batch(range(5))
    cells = distil.cut_into_cells(batch["pixel_values"], 2)
    assert torch.equal(cells[4 * 3 + 2], batch["pixel_values"][3, :, 32:, :32])  # row by row
    # pixels, taken for features of patches of one pixel, come back where they were, standardised
    back = distil.put_together(cells, 2)
    whole = batch["pixel_values"].flatten(2).transpose(1, 2)
    torch.testing.assert_close(back, (whole - whole.mean((0, 1))) / (whole.std((0, 1)) + 1e-3))
    chance = torch.rand(7, 4, generator=torch.Generator().manual_seed(0))
    by_hand = torch.zeros(7, 5)
    for outcome in itertools.product((0, 1), repeat=4):
        each = torch.where(torch.tensor(outcome, dtype=torch.bool), chance, 1 - chance)
        by_hand[:, sum(outcome)] += each.prod(1)
    torch.testing.assert_close(distil.count_probabilities(chance), by_hand)
    # the reader of cells averages over the patches of its own cell
    reader = distil.CellReader(3, (4, 4), 2)
    states = torch.randn(1, 4, 4, 3)
    moved = states.clone()
    moved[0, :2, 2:] += torch.randn(3)
    change = (reader(moved.flatten(1, 2)) - reader(states.flatten(1, 2)))[0] != 0
    assert change.tolist() == [False, True, False, False]


# ---------------------------------------------------------------- nothing runs what it was given

RUNS_TEXT = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}
UNPICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def dangers(source):
    """What in a Python text would run or unpickle something it was given, whatever name it was imported by."""
    tree, names, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in UNPICKLES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found += [node.module] if node.module.partition(".")[0] in UNPICKLES else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            root, dot, rest = ast.unparse(node.func).removeprefix("builtins.").partition(".")
            name, given = names.get(root, root) + dot + rest, {word.arg: word.value for word in node.keywords}
            safe = {
                key
                for key, value in given.items()
                if isinstance(value, ast.Constant) and value.value is (key != "shell")
            }
            found += [name] * (name in RUNS_TEXT or name == "torch.load" and "weights_only" not in safe)
            found += [f"{name} with shell"] * ("shell" in given and "shell" not in safe)
            found += [name] * (name.endswith(".load") and "allow_pickle" in given or name == "yaml.load")
    return found


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)", "exec(text)", "import builtins; builtins.eval(text)", "from os import system as s; s(text)",
        "import os as o; o.system(text)", "import subprocess; subprocess.run(text, shell=True)",
        "from subprocess import run; run(text, shell=wanted)", "import pickle; pickle.load(file)",
        "from pickle import loads; loads(data)", "import torch; torch.load(file)",
        "from torch import load; load(file, weights_only=False)", "import torch as t; t.load(file, weights_only=flag)",
        "import numpy as np; np.load(file, allow_pickle=True)", "import yaml; yaml.load(text)",
    ],
)  # fmt: skip
def test_a_planted_danger_is_seen(line):
    assert dangers(f"def innocent(text, file, data, flag, wanted):\n    {line}")


def test_harmless_lines_are_no_dangers():
    lines = (
        "model.eval()",
        "re.compile(text)",
        "subprocess.run(words, shell=False)",
        "torch.load(file, weights_only=True)",
    )
    assert [line for line in lines if dangers(line)] == []


def test_the_project_runs_nothing_that_it_was_given():
    files = [path for folder in ("vdm_utils", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 20
    found = {str(path.relative_to(ROOT)): dangers(path.read_text(encoding="utf-8")) for path in files}
    for path in NOTEBOOKS:  # apart from the cell that installs on Colab, they call no shell either
        cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        sources = [cell.source for cell in cells if "colab" not in cell.metadata.get("tags", [])]
        found[path.name] = [line for s in sources for line in re.findall(r"^\s*[!%].*", s, re.M)]
        found[path.name] += [danger for s in sources if not re.search(r"^\s*[!%]", s, re.M) for danger in dangers(s)]
    assert {name: what for name, what in found.items() if what} == {}


SCRIPT = re.compile(r"<script|javascript:|<iframe|<[^>]+\son\w+\s*=", re.I)
HOME = re.compile(r"(?<![\w.])(/(root|home|Users)/|~/|[A-Z]:\\\\Users)")


def refused(notebook):
    """Outputs of a notebook that would run in a reader's browser, and home folders anywhere in it."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [(kind, str(value)) for output in outputs for kind, value in output.get("data", {}).items()]
    found = [kind for kind, _ in data if "javascript" in kind]
    found += [
        text for kind, text in data if kind in ("text/html", "image/svg+xml", "text/markdown") and SCRIPT.search(text)
    ]
    printed = [text for kind, text in data if kind.startswith("text/")] + [str(o.get("text", "")) for o in outputs]
    return found + [match[0] for text in [c.source for c in notebook.cells] + printed for match in HOME.finditer(text)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_outputs_run_nothing_and_name_no_home(path):
    assert refused(nbformat.read(path, 4)) == []


@pytest.mark.parametrize(
    "output",
    [
        {"application/javascript": "alert(1)"}, {"text/html": "<b onclick='x()'>"}, {"text/html": "<SCRIPT>x()</SCRIPT>"},
        {"image/svg+xml": "<svg><script/></svg>"}, {"text/plain": "saved in /home/somebody/runs"}, {"text/plain": "~/runs"},
    ],
)  # fmt: skip
def test_a_planted_output_is_refused(output):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("display_data", output)])]
    )
    assert refused(notebook)


def test_actions_are_pinned():
    used = re.findall(r"uses:\s*(\S+)", "\n".join(p.read_text() for p in (ROOT / ".github").rglob("*.yml")))
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in used), used
