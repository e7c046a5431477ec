"""What every notebook of the course needs: a quiet start, the profile, shipped checkpoints, and graders."""

from __future__ import annotations

import json
import linecache
import os
import symtable
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from types import TracebackType

import torch
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from vdm_utils.errors import VDMError, unknown_name

REPOSITORY = Path(__file__).resolve().parent.parent
CHECKPOINTS = REPOSITORY / "data" / "checkpoints"
NOTEBOOKS = REPOSITORY / "notebooks"


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
        setup = linecache.getlines(sys._getframe(1).f_code.co_filename)  # the cell that calls this
        shell.set_custom_exc((NameError,), lambda *failure, **options: _explain_name(setup, *failure, **options))
    return PROFILES[name]


def _explain_name(setup: list[str], shell, kind: type, error: NameError, trace: TracebackType, tb_offset=None) -> None:
    """IPython's handler of NameError: its own traceback, with a last line that says which cell makes the name."""
    failed = ["".join(linecache.getlines(frame.f_code.co_filename)) for frame, _ in walk_tb(trace)]
    with suppress(OSError, ValueError):  # a notebook that is being written, say: then there is nothing to add
        if kind is NameError and error.name and (hint := _where_made(error.name, setup, failed)):
            error.args = (f"{error.args[0]}\n{hint}",)
    shell.showtraceback((kind, error, trace), tb_offset=tb_offset)


def _where_made(name: str, setup: list[str], failed: list[str]) -> str | None:
    """The cell above the failed one that last makes a name, in the notebook whose cells share most lines with `setup`."""
    known = {line.strip() for line in setup}
    notebooks = [json.loads(path.read_text("utf-8"))["cells"] for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))]
    shared = [len(known & {line.strip() for c in cells for line in c["source"]}) for cells in notebooks]
    if not known or max(shared, default=0) <= len(known) / 2:  # not a notebook of the course
        return None
    found, number, heading = None, 0, ""
    for cell in notebooks[shared.index(max(shared))]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = ([heading] + [line.strip("# \n") for line in cell["source"] if line.startswith("##")])[-1]
        elif source.strip() in [text.strip() for text in failed]:
            break
        else:
            number += 1
            if _makes(source, name):
                found = f"`{name}` is made in cell [{number}] (“{heading}”)"
    return found and f"{found}: run that one, or start at a “You can start here” above."


def _makes(source: str, name: str) -> bool:
    """Whether a cell binds a name at its top level."""
    try:
        table = symtable.symtable(source, "cell", "exec")
    except SyntaxError:  # a magic
        return False
    return name in table.get_identifiers() and (table.lookup(name).is_assigned() or table.lookup(name).is_imported())


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
