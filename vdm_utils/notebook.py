"""What every notebook of the course needs: a quiet start, the profile, shipped checkpoints, and graders."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from vdm_utils.errors import VDMError, unknown_name
from vdm_utils.hints import load_ipython_extension

REPOSITORY = Path(__file__).resolve().parent.parent
CHECKPOINTS = REPOSITORY / "data" / "checkpoints"


@dataclass(frozen=True)
class Profile:
    """The numbers in which a laptop run and a paper-scale run differ; the cells are the same.

    base_steps, diffmask_steps: optimizer steps of the live training cells. images: how many are shown in tables.
    The others are about photographs (CIFAR-10, notebooks 05 and 06).
    photo_base: Hub name of the classifier; None: the small ones that ship. photo_size: side of its pictures in pixels; None:
    their own. counting: options of `load_data` for grids of them. recipe: of `vdm_utils.training.settings`, with
    `run_options` on top for every training and `mask_options` for that of a DiffMask of single pictures; `live_steps`: how
    long the one is that notebook 05 shows while it runs.
    curves: how many pictures get deletion curves, and of how many points. gpu: whether to compute on one where there is one.
    """

    name: str
    base_steps: int
    diffmask_steps: int
    images: int
    photo_base: str | None
    photo_size: int | None
    counting: dict
    recipe: str
    run_options: dict
    mask_options: dict
    live_steps: int
    curves: tuple[int, int]
    gpu: bool

    @property
    def device(self) -> str:
        """Where photographs and their classifier are to be: `cuda` or `cpu`."""
        return "cuda" if self.gpu and torch.cuda.is_available() else "cpu"

    def checkpoint(self, task: str, part: str) -> str:
        """Where the `base` or `diffmask` of a task is: in data/ what ships, a Hub name, or a folder of this profile under runs/.

        Only what explains photographs differs between profiles. A folder under runs/ may have to be filled first: `finished`.
        """
        if self.photo_base is None or not task.startswith("cifar10"):
            return checkpoint(task, part)
        if (task, part) == ("cifar10", "base"):
            return self.photo_base
        return str(REPOSITORY / "runs" / f"{task}-{self.name}" / part)


PROFILES = {
    "quick": Profile(
        "quick",
        base_steps=600,
        diffmask_steps=800,
        images=500,
        photo_base=None,
        photo_size=None,
        counting={"grid_size": 2, "class_idx": 1},  # of automobiles
        recipe="pictures",
        run_options={"log_every_n_steps": 10_000},
        mask_options={  # as what ships was trained
            "no_placeholder": True,
            "shared_noise": True,
            "num_gates": 3,
            "herding_layer": 2,
            "keep_class": True,
            "kl_quantile": 0.75,
            "mul_activation": 60.0,
            "add_activation": 30.0,
            "lr": 4e-4,
            "alpha": 1.5,
            "alpha_min": 1.5,
            "lr_alpha": 0.02,
            "max_steps": 500,
        },
        live_steps=120,
        curves=(10, 14),
        gpu=False,
    ),
    "paper": Profile(
        "paper",
        base_steps=6000,
        diffmask_steps=20_000,
        images=1_000,
        photo_base="tanlq/vit-base-patch16-224-in21k-finetuned-cifar10",
        photo_size=224,
        counting={"grid_size": 3, "class_idx": 3, "image_size": 224},  # of cats
        recipe="paper",  # 20 epochs
        run_options={"log_every_n_steps": 1_407},  # an epoch of CIFAR-10: 45,000 pictures, 32 at a time
        mask_options={},
        live_steps=120,
        curves=(200, 29),  # the paper's points
        gpu=True,
    ),
}


def start(seed: int = 0) -> Profile:
    """Quiet libraries, seeded generators, and the profile named by `$VDM_PROFILE` (quick by default).

    Computes on as many threads as there are idle cores, unless `$OMP_NUM_THREADS` says how many. Under IPython, a name that is
    not defined is from now on explained by the cell that makes it.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_printoptions(precision=3, sci_mode=False)
    set_seed(seed)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - busy_cores()))
    name = os.environ.get("VDM_PROFILE", "quick")
    if name not in PROFILES:
        raise unknown_name("profile", name, PROFILES, "$VDM_PROFILE")
    if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()):
        load_ipython_extension(shell, setup=linecache.getlines(sys._getframe(1).f_code.co_filename))  # the calling cell
    return PROFILES[name]


def busy_cores(seconds: float = 0.2) -> int:
    """On how many cores something computes just now, measured for so many seconds.

    Threads that share a core with another program make those that wait for them spin: notebook 02 took ten times as long.
    """
    return round(psutil.cpu_percent(seconds) / 100 * psutil.cpu_count())


def checkpoint(task: str, part: str) -> str:
    """The folder of a checkpoint that ships with the project: `part` is `base` or `diffmask`."""
    folder = CHECKPOINTS / task / part
    if not (folder / "config.json").is_file():
        raise VDMError("no such checkpoint", where="checkpoint", expected=f"{task}/{part} under data/checkpoints",
                       got=sorted(p.name for p in CHECKPOINTS.glob("*")), fix="name a task from the list")  # fmt: skip
    return str(folder)


def finished(folder: str) -> bool:
    """Whether a training has run to its end in this folder: its last act is to write `config.json`."""
    return Path(folder, "config.json").is_file()


@contextmanager
def grader(exercise: str) -> Iterator[None]:
    """Prints that an exercise is passed when the assertions inside hold, and what is missing when they do not.

    An unfinished exercise must not stop the notebook, so its own mistakes are reported instead of raised.
    """
    try:
        yield
    except Exception as problem:  # whatever a student's code does wrong
        reason = str(problem).splitlines()[0] if str(problem) else "see the task"
        print(f"{exercise}: not yet ({type(problem).__name__}: {reason})")
    else:
        print(f"{exercise}: passed")
