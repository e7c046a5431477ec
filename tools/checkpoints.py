"""Train again what ships under data/checkpoints, with the commands that its cards state.

    python tools/checkpoints.py            # all of them; about eight minutes on two CPU cores
    python tools/checkpoints.py toy        # one task

Each part is copied from its run folder with a `card.json`: command, data, seconds, metrics, fingerprint.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from vdm_utils.notebook import CHECKPOINTS
from vdm_utils.vit import fingerprint, load_classifier

# part: arguments of `python -m vdm_utils`; the run folder is added
TASKS = {
    "toy": {
        "base": "train-base --recipe quick --dataset toy --max_steps 600 --log_every_n_steps 200 --seed 0",
        "diffmask": "train --recipe quick --dataset toy --seed 0",
    },
    "digits": {
        "base": "train-base --recipe quick --dataset digits --mimetic_start --add_shift --add_rotation "
        "--num_epochs 150 --patience 150 --seed 0",
        "diffmask": "train --recipe quick --dataset digits --max_steps 1500 --seed 0",
    },
}
KEPT = ("config.json", "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=f"from {list(TASKS)}")
    parser.add_argument("--runs", type=Path, default=Path("runs/checkpoints"))
    wanted = parser.parse_args()
    for task in wanted.tasks:
        for part, words in TASKS[task].items():
            folder, target = wanted.runs / task / part, CHECKPOINTS / task / part
            shutil.rmtree(folder, ignore_errors=True)
            base = ["--from_pretrained", str(CHECKPOINTS / task / "base")] if part == "diffmask" else []
            command = [sys.executable, "-m", "vdm_utils", *shlex.split(words), *base, "--output_dir", str(folder)]
            start = time.perf_counter()
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            target.mkdir(parents=True, exist_ok=True)
            for name in KEPT:
                shutil.copy(folder / name, target / name)
            metrics = json.loads(done.stdout)
            card = {
                "command": f"python -m vdm_utils {words}" + (f" --from_pretrained data/checkpoints/{task}/base" if base else ""),
                "data": words.split("--dataset ")[1].split()[0],
                "seconds": round(time.perf_counter() - start),
                "CPU threads": torch.get_num_threads(),
                "validation": {k: v for k, v in metrics.items() if k.startswith("eval_") and "second" not in k and k != "eval_runtime"},
            }  # fmt: skip
            if part == "base":
                card["fingerprint"] = fingerprint(load_classifier(str(target)))
            else:  # the base stands beside it wherever the two folders go
                config = json.loads((target / "config.json").read_text())
                config["base_name_or_path"] = "../base"
                (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
                card["fingerprint of the base"] = config["base_fingerprint"]
            (target / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")
            print(task, part, json.dumps(card["validation"]))


if __name__ == "__main__":
    main()
