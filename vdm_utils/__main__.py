"""Command line: `python -m vdm_utils train-base | train | eval-base | explain`, with the reference's flags and defaults."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from safetensors.torch import save
from transformers import HfArgumentParser, PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

from vdm_utils.checkpoints import check_resumable, check_writable, save_classifier, write_whole
from vdm_utils.data import Pictures, load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.errors import VDMError, unknown_name
from vdm_utils.plots import SampleImages, explained_beside_others, to_png
from vdm_utils.refine import cut_to_fit, refine
from vdm_utils.runs import check_fit, load_weights
from vdm_utils.settings import RECIPES, ClassifierSettings, DataSettings, DiffMaskSettings, ExplainSettings, RunSettings
from vdm_utils.sources import read_pictures, reads_files
from vdm_utils.training import evaluate_classifier, train_classifier, train_diffmask
from vdm_utils.vit import build_classifier, load_classifier, mimetic_start, own_image_size, with_image_size

logger = logging.getLogger(__name__)


class Help(argparse.HelpFormatter):
    """One spelling per option, no argument after a switch, defaults only where there is one; 100 columns."""

    def __init__(self, prog: str):
        super().__init__(prog, width=100, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs in (0, "?"):  # --help, and switches
            return action.option_strings[-1 if action.nargs == 0 else 0]
        short = action.choices and len(action.choices) < 5
        return action.option_strings[0] + " " + ("{" + ",".join(action.choices) + "}" if short else action.dest.upper())

    def _expand_help(self, action: argparse.Action) -> str:
        text = action.help
        if action.choices and len(action.choices) >= 5:
            text += ": " + ", ".join(action.choices)
        silent = (None, False, [], argparse.SUPPRESS)
        return text if action.default in silent else f"{text} (default: {action.default})"


class Parser(HfArgumentParser):
    """Mistakes on the command line become a `VDMError` like all others, without a page of usage."""

    def error(self, message: str):
        raise VDMError("the command line cannot be understood", where=self.prog, expected="options as --help lists them", got=message,
                       fix="see --help")  # fmt: skip

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            raise unknown_name(action.option_strings[0], value, action.choices, self.prog)


# option: (does it do anything?, what it needs)
NEEDS = {
    **dict.fromkeys(
        ("grid_size", "class_idx"), (lambda c: c.dataset == "toy" or c.dataset.endswith("_QA"), "a counting dataset")
    ),
    "augment_cells": (lambda c: c.dataset.endswith("_QA") and c.augmentations(), "a _QA dataset and an augmentation"),
    "skip_unreadable": (lambda c: reads_files(c.dataset.removesuffix("_QA"), c.data_dir), "pictures in class folders"),
    "shortcut": (lambda c: getattr(c, "split", "train") != "test", "--split train or validation"),
    "block_size": (lambda c: c.block_share > 0, "--block_share"),
    **dict.fromkeys(
        ("alpha", "grey_start", "zero_start"), (lambda c: not c.start_from, "a fresh start, so no --start_from")
    ),
    "lr_placeholder": (lambda c: not c.no_placeholder, "a placeholder, so no --no_placeholder"),
    **dict.fromkeys(
        ("size", "patch_size", "mimetic_start"),
        (lambda c: not c.from_pretrained, "a base from scratch, so no --from_pretrained"),
    ),
    "split": (lambda c: not c.images, "a dataset, so no --images"),
    "dataset": (lambda c: not getattr(c, "images", None), "no --images"),
}
# what eval-base has no use for: of its own options all but these, and the tag, which no test picture has
EVALUATED = {"base_model", "from_pretrained", "checkpoint", "batch_size"}
TRAINING_ONLY = {*vars(ClassifierSettings())} - {*vars(DataSettings())} - EVALUATED | {"shortcut"}


def typed(words: list[str]) -> list[str]:
    """The names of the options on a command line, in their order, each once, however they are spelled (--base-model)."""
    return list(dict.fromkeys(word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")))


def parse(kind: type, job: str, words: list[str]) -> DataSettings:
    """Settings from a command line: the recipe's defaults, then the flags, which always win."""
    program = f"python -m vdm_utils {job}"
    parser = Parser(kind, prog=program, usage=f"{program} [options]", description=JOBS[job].__doc__, formatter_class=Help,
                    allow_abbrev=False)  # fmt: skip
    recipe, _ = parser.parse_known_args([w for w in words if w not in ("-h", "--help")])
    parser.set_defaults(**RECIPES[recipe.recipe].get(kind, {}))
    chosen, *rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if any(rest):
        raise unknown_name("option", rest[0][0], [f"--{name}" for name in vars(chosen)], program)
    if "num_epochs" in typed(words) and "max_steps" not in typed(words):
        chosen.max_steps = -1  # that of the recipe would win over the flag
    chosen.validate()
    for name in typed(words):
        works, needed = NEEDS.get(name, (lambda c: True, ""))
        if job == "eval-base" and name in TRAINING_ONLY:
            works, needed = (lambda c: False), "train-base"
        if not works(chosen):
            logger.warning("--%s has no effect here: it needs %s", name, needed)
    return chosen


def output_folder(chosen: DataSettings, job: str, resume: str | None = None) -> Path:
    """The run's folder: as asked for, else a new one under `runs/`; a finished run is never written over."""
    if resume not in (None, "last"):
        check_resumable(Path(resume), job)
    if not chosen.output_dir:
        if resume == "last":
            raise VDMError("the last checkpoint of which run?", where=job, expected="--output_dir beside 'last'", got="none",
                           fix="name the folder of that run")  # fmt: skip
        if resume is not None:
            return Path(resume).parent
        base = f"runs/{job}-{chosen.dataset}-seed{chosen.seed}"
        numbered = (Path(f"{base}-{n}") for n in range(2, 10_000))
        return Path(base) if not Path(base).exists() else next(p for p in numbered if not p.exists())
    folder = Path(chosen.output_dir)
    if folder.exists() and not folder.is_dir():
        raise VDMError("the output folder is a file", where=job, expected="a new or empty folder", got=folder,
                       fix="name another --output_dir")  # fmt: skip
    if resume is None and any(
        next(folder.glob(name), None) for name in ("config.json", "explanations.json", "checkpoint-*")
    ):
        raise VDMError("the output folder already holds a run", where=job, expected="an empty or new folder", got=folder,
                       fix="name another --output_dir, resume it, or remove it")  # fmt: skip
    return folder


def start_run(chosen: DataSettings, folder: Path) -> Path:
    """Make the run's folder and write its settings there at once, so that a run that is killed can be told apart."""
    check_writable(folder)
    write_whole(folder / "settings.json", json.dumps(vars(chosen), indent=2) + "\n")
    return folder


def data_options(chosen: DataSettings, image_size: int | None) -> dict:
    """Keyword arguments for `load_data`, with the model's `image_size` where none was asked for."""
    options = chosen.data_options()
    return options if options["image_size"] is not None else options | {"image_size": image_size}


def datasets(chosen: RunSettings, image_size: int | None = None) -> tuple[Pictures, Pictures]:
    """The training and validation split of a run."""
    options = data_options(chosen, image_size)
    return tuple(load_data(chosen.dataset, split, **options) for split in ("train", "validation"))


def new_classifier(chosen: ClassifierSettings, data: Pictures):
    """The base that `train-base` starts from: a checkpoint, or random weights."""
    if chosen.from_pretrained:
        # a checkpoint in half precision loads as such, and would be trained to NaN
        model = load_classifier(chosen.from_pretrained, num_labels=data.num_labels).float()
        if chosen.image_size is not None and own_image_size(model) not in (None, data.image_size):
            model = with_image_size(model, data.image_size, chosen.grid_size if data.name.endswith("_QA") else 1)
        check_fit(model, data, "train-base", classes=False)
        model.config.id2label = dict(data.id2label)
        model.config.label2id = {name: label for label, name in data.id2label.items()}
        return model
    if chosen.mimetic_start and chosen.base_model != "ViT":
        raise VDMError("--mimetic_start sets attention weights", where="train-base", expected="--base_model ViT",
                       got=chosen.base_model, fix="leave --mimetic_start out")  # fmt: skip
    model = build_classifier(
        chosen.base_model,
        chosen.size,
        data.image_size,
        data.patch_size if chosen.patch_size is None else chosen.patch_size,
        data.num_channels,
        id2label=data.id2label,
    )
    if chosen.mimetic_start:
        mimetic_start(model)
    return model


def check_base_model(model: PreTrainedModel, words: list[str], chosen: ClassifierSettings) -> None:
    """Raise `VDMError` where --base_model was typed and is not what was loaded; its default contradicts nothing."""
    fits = {"ConvNeXt": "convnext" in model.config.model_type, "ViT": own_image_size(model) is not None}
    if "base_model" in typed(words) and not fits[chosen.base_model]:
        raise VDMError("this is another kind of classifier", where="--base_model", expected=chosen.base_model,
                       got=f"{type(model).__name__} in {chosen.checkpoint or chosen.from_pretrained}",
                       fix="leave --base_model out, or name another classifier")  # fmt: skip


def train_base(words: list[str]) -> dict:
    """Train the classifier that is to be explained."""
    chosen = parse(ClassifierSettings, "train-base", words)
    folder = output_folder(chosen, "train-base", chosen.checkpoint)
    train, validation = datasets(chosen)
    set_seed(chosen.seed)
    model = new_classifier(chosen, train)
    check_base_model(model, words, chosen)
    start_run(chosen, folder)
    metrics = train_classifier(model, train, validation, chosen, folder, chosen.checkpoint)
    return {"output_dir": str(folder)} | metrics


def train(words: list[str]) -> dict:
    """Train a Vision DiffMask around a frozen classifier."""
    chosen = parse(DiffMaskSettings, "train", words)
    folder = output_folder(chosen, "train", chosen.diffmask_checkpoint)
    model = load_classifier(chosen.from_pretrained)
    set_seed(chosen.seed)
    diffmask = VisionDiffMask.for_classifier(model, **chosen.config())
    if chosen.grey_start:
        diffmask.start_grey()
    if chosen.start_from:
        load_weights(diffmask, VisionDiffMask.from_pretrained(chosen.start_from), chosen.start_from, "--start_from")
    train, validation = datasets(chosen, image_size=diffmask.view.image_size[0])
    check_fit(model, train, "train")
    callbacks = (SampleImages(validation, chosen.sample_images),) if chosen.sample_images > 0 else ()
    start_run(chosen, folder)
    metrics = train_diffmask(diffmask, train, validation, chosen, folder, chosen.diffmask_checkpoint, callbacks)
    return {"output_dir": str(folder)} | metrics


def eval_base(words: list[str]) -> dict:
    """Measure a classifier on the test split; with --output_dir also save it for --from_pretrained."""
    chosen = parse(ClassifierSettings, "eval-base", words)
    source = chosen.checkpoint or chosen.from_pretrained
    if source is None:
        raise VDMError("nothing to evaluate", where="eval-base", expected="--checkpoint or --from_pretrained", got="neither",
                       fix="name a folder or a Hub name")  # fmt: skip
    folder = output_folder(chosen, "eval-base") if chosen.output_dir else None
    model = load_classifier(source)
    check_base_model(model, words, chosen)
    size = own_image_size(model)
    test = load_data(chosen.dataset, "test", **data_options(chosen, size and size[0]))
    check_fit(model, test, "eval-base")
    metrics = evaluate_classifier(model, test, chosen.batch_size)
    if folder:
        save_classifier(model, start_run(chosen, folder))
    return {"checkpoint": str(source), "dataset": chosen.dataset, "split": "test"} | metrics


def explain(words: list[str]) -> dict:
    """Explain pictures with a trained DiffMask: a figure, a JSON file of facts, and the masks."""
    chosen = parse(ExplainSettings, "explain", words)
    if chosen.diffmask_checkpoint is None:
        raise VDMError("nothing to explain with", where="explain", expected="--diffmask_checkpoint", got="none",
                       fix="name the folder of a trained DiffMask")  # fmt: skip
    folder = output_folder(chosen, "explain")
    diffmask = VisionDiffMask.from_pretrained(chosen.diffmask_checkpoint)
    view, id2label = diffmask.view, dict(diffmask.base.config.id2label)
    if chosen.images:
        batch = {"pixel_values": read_pictures(chosen.images, view.image_size, view.num_channels)}
        names = chosen.images
    else:
        data = load_data(chosen.dataset, chosen.split, **data_options(chosen, view.image_size[0]))
        check_fit(diffmask.base, data, "explain")
        names = [f"{data.name}/{data.split}/{i}" for i in range(min(max(1, chosen.sample_images), len(data)))]
        batch = data.batch(range(len(names)))
    ways = {"fit": chosen.fit or None, "refine": chosen.refine or None, "layer": chosen.layer}
    taken = [f"--{name} {value}" for name, value in ways.items() if value is not None]
    if len(taken) > 1:
        raise VDMError("these do not go together", where="explain", expected="one of --fit, --refine and --layer",
                       got=" ".join(taken), fix="leave the others out: a mask that is checked has no layers")  # fmt: skip
    if chosen.from_nothing and not chosen.refine:
        raise VDMError("nothing is searched for", where="explain", expected="--from_nothing beside --refine",
                       got="no --refine", fix="add --refine 50")  # fmt: skip
    if chosen.fit:
        shown = cut_to_fit(diffmask, batch["pixel_values"], chosen.fit)
    elif chosen.refine:
        shown = refine(
            diffmask, batch["pixel_values"], chosen.refine, seed=chosen.seed, from_nothing=chosen.from_nothing
        )
    else:
        shown = diffmask.explain(batch["pixel_values"], chosen.layer)  # on the device of a model that was just loaded
    before, after = (logits.argmax(-1).tolist() for logits in (shown.logits, shown.masked_logits))
    facts = [
        {"picture": name, "class": id2label[c], "class_of_masked": id2label[a], "kept": round(k, 4), "kl": round(d, 4)}
        for name, c, a, k, d in zip(names, before, after, shown.kept.tolist(), shown.kl.tolist())
    ]
    start_run(chosen, folder)
    write_whole(folder / "explanations.png", to_png(explained_beside_others(diffmask, batch, shown, id2label)))
    write_whole(folder / "masks.safetensors", save({"mask": shown.mask, "scores": shown.scores.contiguous()}))
    write_whole(folder / "explanations.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return {"output_dir": str(folder), "pictures": len(facts), "kept": shown.kept.mean().item(), "kl": shown.kl.mean().item(),
            "feasible": (shown.kl <= diffmask.config.eps).float().mean().item()}  # fmt: skip


JOBS = {"train-base": train_base, "train": train, "eval-base": eval_base, "explain": explain}


def main(words: list[str] | None = None) -> int:
    """Run one job; 0 when it worked, 2 when the user can put something right."""
    words = sys.argv[1:] if words is None else words
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what a user has to know is said by this package
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        if not words or words[0] in ("-h", "--help"):
            print(f"usage: python -m vdm_utils {{{','.join(JOBS)}}} [--help] [options]")
            for job, function in JOBS.items():
                print(f"  {job:<12}{function.__doc__}")
            return 0
        if words[0] not in JOBS:
            raise unknown_name("job", words[0], JOBS, "python -m vdm_utils")
        print(json.dumps(JOBS[words[0]](words[1:]), indent=2))
    except VDMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
