"""What every notebook of the course needs: a quiet start, the profile, shipped checkpoints, and graders."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
    recipe: of `vdm_utils.training.settings`.
    """

    name: str
    base_steps: int
    diffmask_steps: int
    images: int
    recipe: str


PROFILES = {
    "quick": Profile("quick", base_steps=600, diffmask_steps=800, images=500, recipe="quick"),
    "paper": Profile("paper", base_steps=6000, diffmask_steps=20_000, images=1_000, recipe="paper"),
}


def start(seed: int = 0) -> Profile:
    """Quiet libraries, seeded generators, and the profile named by `$VDM_PROFILE` (quick by default).

    Under IPython, a name that is not defined is from now on explained by the cell that makes it.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_printoptions(precision=3, sci_mode=False)
    set_seed(seed)
    name = os.environ.get("VDM_PROFILE", "quick")
    if name not in PROFILES:
        raise unknown_name("profile", name, PROFILES, "$VDM_PROFILE")
    if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()):
        load_ipython_extension(shell, setup=linecache.getlines(sys._getframe(1).f_code.co_filename))  # the calling cell
    return PROFILES[name]


def checkpoint(task: str, part: str) -> str:
    """The folder of a checkpoint that ships with the project: `part` is `base` or `diffmask`."""
    folder = CHECKPOINTS / task / part
    if not (folder / "config.json").is_file():
        raise VDMError("no such checkpoint", where="checkpoint", expected=f"{task}/{part} under data/checkpoints",
                       got=sorted(p.name for p in CHECKPOINTS.glob("*")), fix="name a task from the list")  # fmt: skip
    return str(folder)


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
