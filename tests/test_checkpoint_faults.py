"""What was saved comes back as it was, or not at all: damaged, altered, foreign and malicious checkpoints are refused."""

import copy
import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BASE, DIFFMASK, load_tool, randomize
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_faults import complaint, contents

from vdm_utils import checkpoints
from vdm_utils.__main__ import main
from vdm_utils.checkpoints import CHECKSUMS, STATE, check_resumable, verify_checksums, write_checksums
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.errors import VDMError
from vdm_utils.vit import build_classifier, load_classifier

ROOT = Path(__file__).parent.parent
WEIGHTS = "model.safetensors"
LOAD = {"base": load_classifier, "mask": VisionDiffMask.from_pretrained}
NAMES = {"base": "classifier", "mask": "DiffMask"}


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """Folders `base` and `mask` side by side, both with checksums."""
    root = tmp_path_factory.mktemp("saved")
    model = copy.deepcopy(base)
    model.save_pretrained(root / "base")
    write_checksums(root / "base")
    model.name_or_path = str(root / "base")
    VisionDiffMask.for_classifier(model, normalize=True).save_pretrained(root / "mask")
    return root


@pytest.fixture
def run(saved, tmp_path):
    """A copy of them that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture(params=LOAD)
def kind(request):
    return request.param


def unsigned(folder):
    """The same folder without checksums, as one of other origin."""
    (folder / CHECKSUMS).unlink()
    return folder


def rewrite(folder, change):
    """Change the config of a folder."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))


def reweigh(folder, change):
    """Change the weights of a folder, a dict by name."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def refused(kind, folder, *expected):
    message = complaint(lambda: LOAD[kind](folder))
    assert "cannot load the " in message and all(words in message for words in expected)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("signed", [True, False], ids=["with checksums", "without"])
@pytest.mark.parametrize("part", range(20))
def test_truncated_weights(run, kind, part, signed):
    file = run / kind / WEIGHTS
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    edges = [0, 1, 8, header // 2, header - 1, header, header + 1, len(content) - 1]
    offset = [*edges, *(header + n * (len(content) - header) // 13 for n in range(1, 13))][part]
    file.write_bytes(content[:offset])
    refused(kind, run / kind if signed else unsigned(run / kind))


@pytest.mark.parametrize("place", [0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98])
@pytest.mark.parametrize("name", [WEIGHTS, "config.json", CHECKSUMS])
def test_one_flipped_bit(run, kind, name, place):
    LOAD[kind](run / kind)
    content = bytearray((run / kind / name).read_bytes())
    content[int(place * len(content))] ^= 1
    (run / kind / name).write_bytes(content)
    refused(kind, run / kind, "altered" if name != CHECKSUMS else "", str(run / kind))


@pytest.mark.parametrize("place", [0.1, 0.4, 0.7, 0.999])
def test_a_flipped_bit_of_a_base_without_checksums_is_seen_by_its_diffmask(run, place):
    file = unsigned(run / "base") / WEIGHTS
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)
    assert "not the classifier that was explained" in complaint(lambda: VisionDiffMask.from_pretrained(run / "mask"))


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
@pytest.mark.parametrize("signed", [True, False], ids=["with checksums", "without"])
def test_missing_files(run, kind, name, signed):
    (run / kind / name).unlink()
    refused(kind, run / kind if signed else unsigned(run / kind))


def test_files_that_are_not_listed(run, kind):
    shutil.copy(run / kind / WEIGHTS, run / kind / "model-00002-of-00002.safetensors")
    refused(kind, run / kind, "altered", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("text", [b"", b"\xff\xfe\x00", b"nonsense", b"0" * 64 + b"  model.safetensors\n"])
def test_checksums_that_are_none(run, kind, text):
    (run / kind / CHECKSUMS).write_bytes(text)
    refused(kind, run / kind, "altered")


def test_weights_of_another_run(run, kind):
    """A file that is whole and fits, but is not the one that was saved here."""
    reweigh(run / kind, lambda weights: {name: weight + 1e-3 for name, weight in weights.items()})
    refused(kind, run / kind, "altered", WEIGHTS)
    if kind == "base":
        LOAD[kind](unsigned(run / kind))  # of other origin: nothing says what it has to be


@pytest.mark.parametrize("text", ["{", "[]", "null", "\0", "", "{}"])
def test_configs_that_are_none(run, kind, text):
    (unsigned(run / kind) / "config.json").write_text(text)
    refused(kind, run / kind)


def test_what_is_meant_to_change_is_no_damage(run, kind, pictures):
    (run / kind / "README.md").write_text("notes")  # not a part of the model
    config = run / kind / "config.json"
    config.write_bytes(config.read_bytes().replace(b"\n", b"\r\n"))  # git on Windows
    LOAD[kind](run / kind)
    loaded = LOAD[kind](unsigned(run / kind))
    if kind == "mask":
        assert loaded.explain(pictures).kl.isfinite().all()


# ---------------------------------------------------------------- weights that do not fit


MISFITS = {  # kind, name: (change of the weights, words of the message)
    ("base", "a missing layer"): (lambda w: {n: t for n, t in w.items() if "layer.2" not in n}, "layers.2"),
    ("base", "a missing head"): (lambda w: {n: t for n, t in w.items() if "classifier" not in n}, "classifier.bias"),
    ("base", "another width"): (lambda w: w | {"vit.layernorm.bias": torch.zeros(32)}, "vit.layernorm.bias"),
    ("base", "other labels"): (lambda w: w | {"classifier.bias": torch.zeros(4)}, "classifier.bias"),
    ("base", "a NaN"): (lambda w: w | {"vit.layernorm.bias": torch.full((64,), torch.nan)}, "NaN"),
    ("base", "nothing"): (lambda w: {}, "missing"),
    ("mask", "a missing gate"): (lambda w: {n: t for n, t in w.items() if "gates.5" not in n}, "gates.5"),
    ("mask", "a gate too many"): (lambda w: w | {n.replace("gates.5", "gates.6"): t.clone() for n, t in w.items()}, "gates.6"),
    ("mask", "another width"): (lambda w: w | {"placeholder": torch.zeros(32)}, "placeholder"),
    ("mask", "a missing placeholder"): (lambda w: {n: t for n, t in w.items() if n != "placeholder"}, "placeholder"),
    ("mask", "other multipliers"): (lambda w: w | {"multiplier.parameter": torch.ones(4)}, "multiplier.parameter"),
    ("mask", "infinity"): (lambda w: w | {"gates.0.outer.bias": torch.full((1,), torch.inf)}, "infinite"),
    ("mask", "nothing"): (lambda w: {}, "missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS, ids=lambda case: ", ".join(case))
def test_weights_that_do_not_fit(run, case):
    (kind, _), (change, expected) = case, MISFITS[case]
    reweigh(run / kind, change)
    write_checksums(run / kind)  # saved like this
    refused(kind, run / kind, expected, NAMES[kind])


def test_only_the_head_may_be_new(run, caplog):
    reweigh(unsigned(run / "base"), lambda w: {name: t for name, t in w.items() if not name.startswith("classifier")})
    assert load_classifier(run / "base", num_labels=3).num_labels == 3 and "new head" in caplog.text
    reweigh(run / "base", lambda w: {name: t for name, t in w.items() if "layer.3" not in name})
    assert "layers.3" in complaint(lambda: load_classifier(run / "base", num_labels=3))


def test_folders_of_the_other_kind(run):
    refused("mask", run / "base", "DiffMask", "missing")
    refused("base", run / "mask", "classifier")


CONFIGS = {  # a DiffMask's config: (change, words of the message)
    "more gates": ({"num_gates": 7}, "gates.6"),
    "fewer gates": ({"num_gates": 5}, "gates.5"),
    "another width": ({"hidden_size": 32}, "gates.0"),
    "width in words": ({"hidden_size": "wide"}, "DiffMask"),
    "negative gates": ({"num_gates": -1}, "DiffMask"),
    "no placeholder": ({"no_placeholder": True}, "placeholder"),
    "negative temperature": ({"temperature": -1.0}, "temperature is out of range"),
    "temperature in words": ({"temperature": "cold"}, "temperature is out of range"),
    "no eps": ({"eps": None}, "eps is out of range"),
    "huge alpha": ({"alpha": 1e9}, "DiffMask"),
    "no base": ({"base_name_or_path": ""}, "which classifier"),
    "null as a base": ({"base_name_or_path": None}, "which classifier"),
    "base that is gone": ({"base_name_or_path": "../gone"}, "cannot load the classifier"),
    "itself as a base": ({"base_name_or_path": "."}, "cannot load the classifier"),
    "no fingerprint": ({"base_fingerprint": ""}, "which classifier"),
    "fingerprint of another": ({"base_fingerprint": "0" * 64}, "not the classifier that was explained"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_do_not_fit(run, name):
    changes, expected = CONFIGS[name]
    rewrite(unsigned(run / "mask"), lambda config: config | changes)
    assert expected in complaint(lambda: VisionDiffMask.from_pretrained(run / "mask"))


@pytest.mark.parametrize(
    "missing", ["kl_quantile", "log_multiplier", "zero_start", "temperature", "transformers_version", "dtype", "all"]
)
def test_an_older_config_means_the_defaults(run, pictures, missing):
    before = VisionDiffMask.from_pretrained(run / "mask").explain(pictures)
    needed = {"model_type", "hidden_size", "num_gates", "base_name_or_path", "base_fingerprint", "normalize"}
    gone = {missing} if missing != "all" else set(json.loads((run / "mask" / "config.json").read_text())) - needed
    rewrite(run / "mask", lambda config: {name: value for name, value in config.items() if name not in gone})
    refused("mask", run / "mask", "altered", "config.json")
    write_checksums(run / "mask")  # saved like this by an older version
    assert torch.equal(VisionDiffMask.from_pretrained(run / "mask").explain(pictures).kl, before.kl)


# ---------------------------------------------------------------- the wrong base


def others(base):
    """Classifiers that are nearly the right one."""
    changed = copy.deepcopy(base)
    changed.classifier.bias.data[0] += 1e-6
    yield "a bias", changed
    yield "half precision", copy.deepcopy(base).half()
    yield "other weights", randomize(copy.deepcopy(base), seed=1)
    yield "another size", build_classifier(image_size=24, patch_size=4)


@pytest.mark.parametrize("number", range(4))
def test_another_base(base, run, number):
    _, other = list(others(base))[number]
    for attach in (
        lambda: VisionDiffMask.from_pretrained(run / "mask", base=other),
        lambda: VisionDiffMask.from_pretrained(run / "mask").attach(other),
    ):
        assert "not the classifier that was explained" in complaint(attach)
    other.save_pretrained(run / "base")
    refused("mask", run / "mask", "altered")  # the checksums of the base speak first …
    unsigned(run / "base")
    assert "not the classifier" in complaint(
        lambda: VisionDiffMask.from_pretrained(run / "mask")
    )  # … then its fingerprint


@pytest.mark.parametrize(
    "other", ["base", 3, torch.nn.Linear(2, 2), build_classifier("convnext", image_size=32, patch_size=4)]
)
def test_a_base_that_is_none(run, other):
    message = complaint(lambda: VisionDiffMask.from_pretrained(run / "mask", base=other))
    assert "is not a vision transformer" in message


# ---------------------------------------------------------------- code in a checkpoint


@pytest.fixture
def canary(tmp_path):
    """An object that leaves a file behind when it is unpickled, and that file."""
    file = tmp_path / "executed"

    class Canary:
        def __reduce__(self):
            return open, (str(file), "w")

    pickle.loads(pickle.dumps(Canary()))
    assert file.exists()  # it sings
    file.unlink()
    yield Canary(), file
    assert not file.exists()


PICKLES = {  # name: file names
    "in place of safetensors": (WEIGHTS,),
    "beside no safetensors": ("pytorch_model.bin",),
    "under every old name": ("pytorch_model.bin", "model.pt", "model.ckpt", "tf_model.h5", "flax_model.msgpack"),
    "in parts": ("pytorch_model-00001-of-00001.bin",),
    "as an adapter": ("adapter_model.bin",),
}


@pytest.mark.parametrize(
    "write", [lambda thing, file: file.write_bytes(pickle.dumps(thing)), torch.save], ids=["pickle", "torch"]
)
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_never_opened(run, kind, canary, name, write):
    folder = unsigned(run / kind)
    weights = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    for file in PICKLES[name]:
        write({weight: canary[0] for weight in weights}, folder / file)
    if name == "in parts":
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, PICKLES[name][0])}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(kind, folder, NAMES[kind])
    code = main(["eval-base", "--from_pretrained", str(folder), "--dataset", "toy"])
    assert code == 2


def test_a_pickle_beside_the_weights_is_left_alone(run, kind, canary):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.bin"):
        torch.save(canary[0], run / kind / name)
    LOAD[kind](run / kind)


@pytest.mark.parametrize("model_type", ["own", "foreign"])
def test_code_in_a_folder_is_never_run(run, kind, canary, model_type, monkeypatch):
    folder = unsigned(run / kind)
    classes = {name: "evil.Model" for name in ("AutoModel", "AutoModelForImageClassification")} | {
        "AutoConfig": "evil.Config"
    }
    rewrite(folder, lambda c: c | {"auto_map": classes} | ({"model_type": "evil"} if model_type == "foreign" else {}))
    imports = "from transformers import PreTrainedConfig as Config, ViTForImageClassification as Model"
    (folder / "evil.py").write_text(f"open({str(canary[1])!r}, 'w')\n{imports}\n")
    monkeypatch.setattr("builtins.input", lambda *a: "y")  # transformers would ask on a terminal
    if model_type == "foreign" and kind == "base":
        refused(kind, folder, "custom code")
    else:  # its own class is known and stays the one that is used
        assert type(LOAD[kind](folder)).__module__.startswith(("transformers.models.vit", "vdm_utils.diffmask"))


def test_no_line_of_the_project_opens_the_door():
    sources = [path for folder in ("vdm_utils", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    text = {path.name: path.read_text() for path in [*sources, *(ROOT / "notebooks").glob("*.ipynb")]}
    assert len(text) > 15
    for name, lines in text.items():
        doors = re.findall(
            r"trust_remote_code=(?!False)|torch\.load\(|\bimport pickle|weights_only|use_safetensors=(?!True)", lines
        )
        assert not doors, name


# ---------------------------------------------------------------- checksums are written, and true


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def listed(folder):
    return dict(reversed(line.split()) for line in (folder / CHECKSUMS).read_text().splitlines())


def test_every_job_leaves_checksums(base_run, diffmask_run, tmp_path):
    evaluated = ["--output_dir", str(tmp_path / "evaluated")]  # no line to be split: a path may have a space in it
    assert main(["eval-base", "--from_pretrained", str(base_run), "--dataset", "digits", *evaluated]) == 0
    for folder in (
        base_run,
        diffmask_run,
        base_run / "checkpoint-8",
        diffmask_run / "checkpoint-8",
        tmp_path / "evaluated",
    ):
        assert {"config.json", WEIGHTS} <= set(listed(folder))
        assert all(digest(folder / name) == value for name, value in listed(folder).items())


def test_a_base_that_goes_with_its_diffmask_has_checksums(diffmask, tmp_path):
    diffmask.save_pretrained(tmp_path / "mask")
    assert set(listed(tmp_path / "mask" / "base")) == {"config.json", WEIGHTS}
    reweigh(tmp_path / "mask" / "base", lambda w: {name: weight * 2 for name, weight in w.items()})
    refused("mask", tmp_path / "mask", "altered", "base")


def test_saving_again_renews_the_checksums(run, pictures):
    diffmask = VisionDiffMask.from_pretrained(run / "mask")
    with torch.no_grad():
        diffmask.placeholder += 1
    (run / "mask" / CHECKSUMS).write_text("of something else")
    diffmask.save_pretrained(run / "mask")
    again = VisionDiffMask.from_pretrained(run / "mask")
    assert torch.equal(again.explain(pictures).kl, diffmask.explain(pictures).kl)


@pytest.mark.parametrize("line", [
    "eval-base --from_pretrained base --dataset toy --image_size 12 --output_dir new",
    "train --from_pretrained base --dataset toy --image_size 12 --max_steps 1 --output_dir new",
    "train-base --from_pretrained base --dataset toy --image_size 12 --max_steps 1 --output_dir new",
    "explain --diffmask_checkpoint mask --dataset toy --output_dir new",
])  # fmt: skip
def test_altered_models_on_the_command_line(run, monkeypatch, capsys, line):
    monkeypatch.chdir(run)
    reweigh(run / "base", lambda weights: {name: weight + 1e-3 for name, weight in weights.items()})
    before = contents(run)
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot load the model: it was altered") and len(error.splitlines()) == 5
    assert contents(run) == before


@pytest.mark.parametrize("job", ["train-base", "train"])
@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "malicious", "missing"])
def test_runs_are_not_resumed_from_a_damaged_checkpoint(
    base_run, diffmask_run, tmp_path, capsys, canary, job, name, damage
):
    whole, words = (base_run, BASE) if job == "train-base" else (diffmask_run, DIFFMASK)
    checkpoint = Path(shutil.copytree(whole / "checkpoint-8", tmp_path / "run" / "checkpoint-8"))
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        (checkpoint / name).unlink()
    else:
        new = {"truncated": content[: len(content) // 2], "flipped": content, "malicious": pickle.dumps(canary[0])}
        (checkpoint / name).write_bytes(new[damage])
    before = contents(checkpoint)
    flag = "--checkpoint" if job == "train-base" else "--diffmask_checkpoint"
    words = [*words, flag, str(checkpoint), "--output_dir", str(tmp_path / "new")]
    assert main(words if job == "train-base" else [*words, "--from_pretrained", str(base_run)]) == 2
    error = capsys.readouterr().err
    assert "error: cannot load the model" in error and len(error.splitlines()) == 5 and contents(checkpoint) == before
    assert not list((tmp_path / "new").rglob("*.safetensors"))


@pytest.mark.parametrize("job", ["train-base", "train"])
def test_checkpoints_never_fall_back_to_a_pickle(base_run, diffmask_run, tmp_path, capsys, canary, job):
    whole, words = (base_run, BASE) if job == "train-base" else (diffmask_run, DIFFMASK)
    checkpoint = Path(shutil.copytree(whole / "checkpoint-8", tmp_path / "checkpoint-8"))
    weights = load_file(checkpoint / WEIGHTS)
    (checkpoint / WEIGHTS).unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")  # what Trainer would read instead
    write_checksums(checkpoint)  # by somebody who means it
    flag = "--checkpoint" if job == "train-base" else "--diffmask_checkpoint"
    words = [*words, flag, str(checkpoint), "--output_dir", str(tmp_path / "new")]
    assert main(words if job == "train-base" else [*words, "--from_pretrained", str(base_run)]) == 2
    assert "error: cannot load the " in capsys.readouterr().err


def test_a_run_is_not_resumed_with_another_model(base_run, tmp_path, capsys):
    words = [
        *BASE,
        "--size",
        "small",
        "--checkpoint",
        str(base_run / "checkpoint-8"),
        "--output_dir",
        str(tmp_path / "new"),
    ]
    assert main(words) == 2 and "these weights are of another model" in capsys.readouterr().err


SHIPPED = sorted(path.parent for path in (ROOT / "data" / "checkpoints").glob("*/*/config.json"))


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_shipped_checkpoints_have_true_checksums(folder):
    assert listed(folder) == {name: digest(folder / name) for name in ("config.json", WEIGHTS)}


def test_what_ships_next_has_checksums(pictures, tmp_path):
    tool = load_tool("checkpoints")
    randomize(build_classifier(size="small", image_size=12, patch_size=4)).save_pretrained(tmp_path / "base-run")
    for _ in range(2):  # the second time over the first
        tool.ship(tmp_path / "base-run", tmp_path / "task" / "base")
        base = load_classifier(tmp_path / "task" / "base")
    assert {weight.dtype for weight in load_file(tmp_path / "task" / "base" / WEIGHTS).values()} == {torch.half}
    diffmask = VisionDiffMask.for_classifier(base, normalize=True)
    diffmask.save_pretrained(tmp_path / "runs" / "mask")
    tool.ship(tmp_path / "runs" / "mask", tmp_path / "task" / "mask")
    assert set(listed(tmp_path / "task" / "mask")) == {"config.json", WEIGHTS}
    (tmp_path / "task").rename(tmp_path / "elsewhere")
    loaded = VisionDiffMask.from_pretrained(tmp_path / "elsewhere" / "mask")
    assert loaded.config.base_name_or_path == str(tmp_path / "elsewhere" / "base")
    # it is above ½ MB
    rounded = {name: tool.fewer_digits(weight).half().float() for name, weight in diffmask.state_dict().items()}
    for name, weight in diffmask.state_dict().items():
        if name.endswith(".weight"):
            off = (rounded[name] - weight).flatten(1).abs().amax(1) / weight.flatten(1).abs().amax(1)
            assert 1e-4 < off.max() <= 2**-7, name
    diffmask.load_state_dict(rounded)
    assert torch.equal(loaded.explain(pictures).kl, diffmask.explain(pictures).kl)


def test_a_state_that_was_changed_is_not_resumed(base_run, tmp_path):
    shutil.copytree(base_run, tmp_path / "run")
    state = tmp_path / "run" / "checkpoint-8" / STATE
    check_resumable(state.parent, "test"), verify_checksums(state.parent)
    state.write_text(state.read_text().replace('"global_step": 8', '"global_step": 7'))
    with pytest.raises(VDMError, match="altered"):
        verify_checksums(state.parent)


def test_a_checkpoint_without_checksums_is_not_resumed(base_run, tmp_path):
    shutil.copytree(base_run / "checkpoint-8", tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / CHECKSUMS).unlink()
    with pytest.raises(VDMError, match="nothing to resume"):
        check_resumable(tmp_path / "checkpoint-8", "test")


@pytest.mark.parametrize("fails", [True, False])
def test_the_hub_is_asked_again_the_next_time(base, tmp_path, monkeypatch, fails):
    asked = []

    def load(name, **options):
        asked.append(constants.HF_HUB_OFFLINE)
        if fails:
            raise OSError("not in the cache")
        return base, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checkpoints, "hub_trouble", lambda name, revision: "it is down")
    try:
        checkpoints.load_saved(load, "someone/some-vit", "classifier", "here")
    except VDMError:
        assert fails
    assert asked == [True] and constants.HF_HUB_OFFLINE is False
