"""Train again what ships under data/checkpoints, or what is as good: with the commands that the cards state, but for the last
schools of the CIFAR-10 classifier and of its counter, and the second stages of cifar10/diffmask-votes (chosen by its validation,
and left out here) and of cifar10-count/diffmask (which the one that ships did not need). One part is luck: the commands of
digits-count/diffmask-complement found the mirror image once, and the counted cells the next time.

    python tools/checkpoints.py            # all of them; hours on two CPU cores, nearly all of them for cifar10
    python tools/checkpoints.py toy        # one task
    python tools/checkpoints.py --resume   # go on after an interruption: finished stages are kept, and one that is not goes
                                           # on from its last checkpoint

Each part is copied from its run folder with a `card.json`: command, data, seconds, metrics, fingerprint. The seconds of a
resumed stage are those since then.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vdm_utils.checkpoints import write_checksums, write_whole
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.notebook import CHECKPOINTS, REPOSITORY
from vdm_utils.vit import fingerprint, load_classifier

PICTURES = "--batch_size 128 --weight_decay 0.05 --num_workers 0 --bf16 --patience 100 --add_flip --add_shift"
STRETCHED = (
    "--lr_schedule linear --warmup_steps 50 --weight_decay 0.05 --batch_size 128 --add_shift --add_rotation --add_stretch "
    "--augment_cells --num_epochs 4 --patience 100 --num_workers 0"
)
PHOTOS = "train --recipe pictures --dataset CIFAR10 --no_placeholder --shared_noise --bf16"
# gates that are told how sure the answer is, and how well a patch stands for the others
TOLD = (
    f"{PHOTOS} --num_gates 3 --herding_layer 2 --keep_class --kl_quantile 0.75 --mul_activation 60 --add_activation 30 "
    "--lr 4e-4 --lr_alpha 0.02 --max_steps 500 --seed 0"
)
SHAPES = (
    "train-base --dataset shapes --lr 8e-4 --lr_schedule linear --warmup_steps 50 --weight_decay 0.05 --batch_size 128 --add_flip "
    "--add_shift --patience 100 --num_workers 0"
)
# part: arguments of `python -m vdm_utils`, or of tools/distil.py after the word "distil", stage after stage; a later stage of a
# base goes on from the one before. The run folder is added, and for a DiffMask its base unless it names one. {runs}: where the
# stages of other parts are.
TASKS = {
    "toy": {
        "base": ["train-base --recipe quick --dataset toy --max_steps 600 --log_every_n_steps 200 --seed 0"],
        "diffmask": ["train --recipe quick --dataset toy --seed 0"],
        # for the stability check of notebook 07
        **{f"diffmask-seed-{n}": [f"train --recipe quick --dataset toy --seed {n}"] for n in (1, 2, 3, 4)},
    },
    "digits": {
        "base": [
            "train-base --recipe quick --dataset digits --mimetic_start --add_shift --add_rotation "
            "--num_epochs 150 --patience 150 --seed 0"
        ],
        "diffmask": ["train --recipe quick --dataset digits --max_steps 1500 --seed 0"],
    },
    # the same digits, but holes say nothing: the classifier learns to do without patches, and dropped ones become blank (notebook 07)
    "digits-holes": {
        "base": [
            "train-base --dataset digits --lr 5e-4 --lr_schedule linear --warmup_steps 50 --weight_decay 0.05 --batch_size 32 "
            "--add_shift --add_rotation --patch_masking 0.8 --num_epochs 100 --patience 100 --num_workers 0 --seed 1 "
            "--from_pretrained data/checkpoints/digits/base"
        ],
        "diffmask": ["train --recipe quick --dataset digits --no_placeholder --max_steps 1500 --seed 0"],
    },
    "shapes": {
        "base": [
            "train-base --dataset shapes --size tiny --mimetic_start --bf16 --lr 1e-3 --lr_schedule cosine --warmup_steps 200 "
            "--weight_decay 0.05 --batch_size 128 --num_epochs 12 --patience 100 --num_workers 0 --seed 7",
            f"{SHAPES} --num_epochs 6 --seed 8",
            # taught to do without specks and regions; every seed draws other pictures
            f"{SHAPES} --patch_masking 0.8 --num_epochs 6 --seed 9",
            f"{SHAPES} --patch_masking 0.8 --num_epochs 10 --seed 10",
            f"{SHAPES} --patch_masking 0.8 --num_epochs 10 --seed 11",
        ],
        "diffmask": ["train --recipe pictures --dataset shapes --max_steps 6000 --seed 0"],
        # the dial of notebook 05
        "diffmask-eps-0.03": ["train --recipe pictures --dataset shapes --eps 0.03 --max_steps 4000 --seed 0"],
        "diffmask-eps-0.3": ["train --recipe pictures --dataset shapes --eps 0.3 --max_steps 4000 --seed 0"],
    },
    # the same shapes with a coloured tag in a corner that gives the class away: a classifier that cheats (notebook 05)
    "shapes-tagged": {
        "base": [
            "train-base --recipe quick --dataset shapes --shortcut 1 --max_steps 600 --log_every_n_steps 200 --seed 0"
        ],
        "diffmask": ["train --recipe pictures --dataset shapes --shortcut 1 --seed 0"],
    },
    "digits-count": {
        "base": [
            "train-base --dataset digits_QA --size tiny --mimetic_start --bf16 --lr 1e-3 --lr_schedule cosine --warmup_steps 200 "
            "--weight_decay 0.05 --batch_size 128 --add_shift --add_rotation --augment_cells --num_epochs 10 --patience 100 "
            "--num_workers 0 --seed 0",
            # stretched from the first step on it learns the 1,078 digits by heart instead (77 %); as a second school it helps
            f"train-base --dataset digits_QA {STRETCHED} --lr 5e-4 --seed 1",
            f"train-base --dataset digits_QA {STRETCHED} --lr 3e-4 --seed 2",
        ],
        "diffmask": [
            "train --recipe pictures --dataset digits_QA --lr 1e-3 --block_share 0.6 --max_steps 2000 --seed 0"
        ],
        # the other solution (notebook 06), which keeps the cells that are not counted: found on the first state of the
        # base, and trained on for the last one
        "diffmask-complement": [
            "train --recipe pictures --dataset digits_QA --block_share 0.6 --max_steps 2000 --seed 12 "
            "--from_pretrained {runs}/digits-count/base-0",
            "train --recipe pictures --dataset digits_QA --lr 1e-3 --block_share 0.3 --max_steps 2000 --seed 12 "
            "--start_from {runs}/digits-count/diffmask-complement-0",
        ],
    },
    "cifar10": {
        "base": [
            f"train-base --dataset CIFAR10 {PICTURES} --size small --mimetic_start --lr 1e-3 --warmup_steps 500 "
            "--patch_dropout 0.5 --num_epochs 20 --seed 0",
            f"train-base --dataset CIFAR10 {PICTURES} --lr 1e-3 --lr_schedule linear --warmup_steps 100 "
            "--patch_dropout 0.5 --num_epochs 16 --seed 8",
            f"train-base --dataset CIFAR10 {PICTURES} --lr 2e-4 --lr_schedule linear --warmup_steps 20 --num_epochs 2 --seed 9",
            # taught to do without specks and whole regions of a picture
            f"train-base --dataset CIFAR10 {PICTURES} --lr 5e-4 --lr_schedule linear --warmup_steps 50 --patch_masking 0.8 "
            "--num_epochs 6 --seed 10",
            "distil --dataset CIFAR10",  # a convolutional network teaches it
            "distil --dataset CIFAR10 --agreement 3 --steps 2800 --lr 5e-4 --seed 3",  # as from all, so from a part
        ],
        "diffmask": [f"{TOLD} --alpha 1.5 --alpha_min 1.5"],
        # the dial of notebook 05
        "diffmask-eps-0.03": [f"{TOLD} --eps 0.03 --alpha 1.5 --alpha_min 1.5"],
        "diffmask-eps-0.3": [f"{TOLD} --eps 0.3 --alpha 0.6 --alpha_min 0.2"],
        # the paper's gates, which are told nothing
        "diffmask-votes": [f"{PHOTOS} --max_steps 1500 --seed 0"],
    },
    "cifar10-count": {
        # from what the convolutional network taught about single pictures, its positions repeated in every cell
        "base": [
            "distil --dataset CIFAR10 --grid_size 2 --class_idx 1 --steps 2800 --lr 5e-4 --from_pretrained {runs}/cifar10/base-4"
        ],
        # its truth costs more than 0.1; one gate for each of the four pictures first, and grey cells, which it knows
        "diffmask": [
            "train --recipe pictures --dataset CIFAR10_QA --grid_size 2 --class_idx 1 --grey_start --lr_placeholder 1e-5 "
            "--block_size 8 --block_share 0.7 --batch_size 16 --eps 0.3 --alpha 1.6 --alpha_min 1.3 --last_layer_share 0.9 "
            "--max_steps 1000 --seed 0",
            # that price is one classifier's; around another, masks stay too large until it may fall further
            "train --recipe pictures --dataset CIFAR10_QA --grid_size 2 --class_idx 1 --lr_placeholder 1e-5 --batch_size 16 "
            "--eps 0.3 --alpha_min 0.5 --last_layer_share 0.9 --max_steps 300 --seed 0 "
            "--start_from {runs}/cifar10-count/diffmask-0",
        ],
    },
}
KEPT = ("config.json", "model.safetensors")


def fewer_digits(weights: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """Every row of a matrix as multiples of one power of two, of at most `bits` bits with the sign: git packs that a third smaller."""
    if weights.dim() < 2:
        return weights
    step = torch.exp2(torch.ceil(torch.log2(weights.flatten(1).abs().amax(1).clamp(min=1e-6) / 2 ** (bits - 1))))
    step = step.view(-1, *[1] * (weights.dim() - 1))
    return (weights / step).round() * step


def ship(folder: Path, target: Path) -> None:
    """Copy what is needed to load a model, with checksums.

    Weights above ½ MB are stored in half precision (they are loaded in single), and so are the seeds of the stability check: their
    masks are the same to 4e-5.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        (target / name).unlink(
            missing_ok=True
        )  # a process that has these weights mapped would die if they changed in place
        shutil.copy(folder / name, target / name)
    weights = target / "model.safetensors"
    if weights.stat().st_size > 5e5 or "seed" in target.name:
        save_file(
            {k: fewer_digits(v).half() for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"}
        )
    config = json.loads((target / "config.json").read_text())
    if "base_name_or_path" in config:  # the base stands beside it wherever the two folders go
        config["base_name_or_path"] = "../base"
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_checksums(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=f"from {list(TASKS)}, or one part: toy/base")
    parser.add_argument("--runs", type=Path, default=Path("runs/checkpoints"))
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted call has finished")
    wanted = parser.parse_args()
    os.chdir(REPOSITORY)  # the commands on the cards name folders from here
    chosen = [
        (task, part)
        for task, _, only in (name.partition("/") for name in wanted.tasks)
        for part in TASKS[task]
        if only in ("", part)
    ]
    for task, part in chosen if not wanted.resume else []:  # all of them first: what is left was made since
        for folder in (wanted.runs / task).glob(f"{part}-[0-9]"):
            shutil.rmtree(folder)
    for task, part in chosen:
        stages = TASKS[task][part]
        target, source = CHECKPOINTS / task / part, CHECKPOINTS / task / "base" if part != "base" else None
        seconds, commands = 0.0, []
        for number, words in enumerate(stages):
            folder = wanted.runs / task / f"{part}-{number}"
            words = words.format(runs=wanted.runs)
            if source and "--from_pretrained" not in words:
                words += f" --from_pretrained {os.path.relpath(source)}"
            program = "tools/distil.py" if words.startswith("distil ") else "-m vdm_utils"
            words = words.removeprefix("distil ")
            commands.append(f"python {program} {words}")
            finished = folder / "finished.json"
            if not finished.exists():
                command = [sys.executable, *program.split(), *shlex.split(words), "--output_dir", str(folder)]
                if wanted.resume:
                    command += {"train-base": ["--checkpoint", "last"], "train": ["--diffmask_checkpoint", "last"]}.get(
                        words.split()[0], ["--resume"]
                    )
                start = time.perf_counter()
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                facts = {"seconds": time.perf_counter() - start, "metrics": json.loads(done.stdout)}
                write_whole(finished, json.dumps(facts))
            facts = json.loads(finished.read_text())
            seconds += facts["seconds"]
            source = folder if part == "base" else source
        ship(folder, target)
        card = {
            "command": commands,
            "data": stages[0].split("--dataset ")[1].split()[0],
            "seconds": round(seconds),
            "CPU threads": torch.get_num_threads(),
            "validation": {k: v for k, v in facts["metrics"].items() if k.startswith("eval_") and "second" not in k and k != "eval_runtime"},
            "fingerprint": fingerprint((load_classifier if part == "base" else VisionDiffMask.from_pretrained)(str(target))),
        }  # fmt: skip
        if part != "base":
            card["fingerprint of the base"] = json.loads((target / "config.json").read_text())["base_fingerprint"]
        (target / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")
        print(task, part, json.dumps(card["validation"]))


if __name__ == "__main__":
    main()
