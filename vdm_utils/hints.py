"""An IPython extension: a name that is not defined is explained by the cell of the notebook that makes it.

`make setup` has every kernel of its environment load it (`ipython_kernel_config.py`), so that it helps before any cell has run;
elsewhere `vdm_utils.notebook.start` does.
"""

from __future__ import annotations

import json
import linecache
import os
import symtable
from contextlib import suppress
from pathlib import Path
from traceback import walk_tb
from types import TracebackType

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def load_ipython_extension(shell, setup: list[str] | None = None) -> None:
    """Explain every NameError of this shell; `setup`: the lines of the set-up cell, once it has run."""
    shell.set_custom_exc((NameError,), lambda *failure, **options: _explain_name(setup or [], *failure, **options))


def _explain_name(setup: list[str], shell, kind: type, error: NameError, trace: TracebackType, tb_offset=None) -> None:
    """IPython's handler of NameError: its own traceback, with a last line that says which cell makes the name."""
    files = {frame.f_code.co_filename for frame, _ in walk_tb(trace)}
    failed = ["".join(linecache.getlines(file)) for file in files if not os.path.exists(file)]  # cells are in no file
    with suppress(OSError, ValueError):  # a notebook that is being written, say: then there is nothing to add
        if kind is NameError and error.name and (hint := where_made(error.name, setup, failed)):
            error.args = (f"{error.args[0]}\n{hint}",)
    shell.showtraceback((kind, error, trace), tb_offset=tb_offset)


def where_made(name: str, setup: list[str], failed: list[str]) -> str | None:
    """The cell above the failed one that last makes a name, in the notebook that shares most lines with the set-up cell.

    In a fresh kernel, where no set-up cell has run (`setup` is empty), the failed cells themselves say which notebook it is.
    """
    known = {line.strip() for line in setup or "\n".join(failed).splitlines()} - {""}
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
    if found and not setup:
        return f"{found}. The set-up cell has not run in this kernel: begin with that one, at the top."
    return found and f"{found}: run that one, or start at a “You can start here” above."


def _makes(source: str, name: str) -> bool:
    """Whether a cell binds a name at its top level."""
    try:
        table = symtable.symtable(source, "cell", "exec")
    except SyntaxError:  # a magic
        return False
    return name in table.get_identifiers() and (table.lookup(name).is_assigned() or table.lookup(name).is_imported())
