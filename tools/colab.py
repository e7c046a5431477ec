"""The notebooks on an imitation of Google Colab: its old ipywidgets, its transformers, and none of this project.

    python tools/colab.py                      # notebooks 01, 03 and 04 whole; of the others the first cells
    python tools/colab.py --whole 07           # another one whole

An environment of its own in build/colab has ipywidgets 7.7.1, transformers 5.15 and a fake `google.colab`, borrows all
other libraries from the environment that runs this, and lacks what Colab lacks. The first cell of a notebook has to make it
work from an empty folder, without changing any version that was there. What is not imitated: Colab's torch, its Python and
its pages. The repository's address is answered by a local clone, and `/content` is a folder of our own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import nbformat
from first_hour import clone
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
PINNED = ("ipywidgets==7.7.1", "transformers==5.15.*")
# not borrowed: the project, what Colab does not have, and what belongs to ipywidgets 8
MISSING = re.compile(
    r"(__editable__.*|vdm_utils|captum|grad_cam|pytorch_grad_cam|ttach|ipywidgets|transformers|widgetsnbextension|"
    r"jupyterlab_widgets|pip)(-.*)?|.*\.pth|__pycache__",
    re.I,
)
VERSIONS = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
KERNEL = "import google.colab, runpy; runpy.run_module('ipykernel_launcher', run_name='__main__')"
UNTIL_SET_UP = ("colab", "setup")


def make_environment(place: Path) -> Path:
    """Build the environment; returns its python. Borrowed libraries are links in a folder outside it: pip leaves them alone."""
    venv.create(place / "env", with_pip=True)
    python, borrowed = place / "env" / "bin" / "python", place / "borrowed"
    borrowed.mkdir()
    for item in Path(sysconfig.get_path("purelib")).iterdir():
        if not MISSING.fullmatch(item.name):
            (borrowed / item.name).symlink_to(item)
    inside = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    site = Path(inside.strip())
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    (site / "google" / "colab").mkdir(parents=True)
    (site / "google" / "colab" / "__init__.py").write_text("")
    subprocess.run(
        [python, "-m", "pip", "uninstall", "-q", "-y", "setuptools"], check=True
    )  # the borrowed one is newer
    subprocess.run([python, "-m", "pip", "install", "-q", *PINNED], check=True)
    spec = place / "share" / "kernels" / "colab"
    spec.mkdir(parents=True)
    argv = [str(python), "-c", KERNEL, "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Colab", "language": "python"}))
    return python


def versions(python: Path) -> dict[str, str]:
    """What is installed: name -> version."""
    return json.loads(subprocess.check_output([python, "-I", "-c", VERSIONS], text=True))


def execute(path: Path, content: Path, whole: bool) -> str:
    """Run a notebook, or only its first cells, in `content`; returns what is wrong, or an empty text."""
    notebook = nbformat.read(path, as_version=4)
    if not whole:
        notebook.cells = [cell for cell in notebook.cells if set(UNTIL_SET_UP) & set(cell.metadata.get("tags", []))]
    for cell in notebook.cells:
        cell.source = cell.source.replace("/content", str(content))
    expected = sum("widget-view" in str(cell.get("outputs")) for cell in notebook.cells)
    try:
        place = {"metadata": {"path": str(content)}}
        NotebookClient(notebook, timeout=600, kernel_name="colab", resources=place).execute()
    except CellExecutionError as error:
        return str(error)
    shown = sum("widget-view" in str(cell.get("outputs")) for cell in notebook.cells)
    if shown != expected:
        return f"{shown} widgets are shown instead of {expected}"
    states = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    pictures = [one for one in states.values() if one["model_name"] == "ImageModel"]
    if expected > len(pictures) or not all(one.get("buffers") for one in pictures):
        return f"{expected} widgets, but {len(pictures)} pictures, or empty ones"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--whole", nargs="*", default=["01", "03", "04"], help="numbers of the notebooks to run to the end"
    )
    wanted, place = parser.parse_args(), ROOT / "build" / "colab"
    shutil.rmtree(place, ignore_errors=True)
    content = place / "content"
    for folder in (content, place / "home"):
        folder.mkdir(parents=True)
    clone(place / "origin.git", uncommitted=True)
    python = make_environment(place)
    address = re.search(r'Repository = "(.+)"', (ROOT / "pyproject.toml").read_text()).group(1)
    for name in [name for name in os.environ if name.startswith(("VDM_", "HF_", "PYTHONPATH"))]:
        del os.environ[name]
    os.environ |= {
        "HOME": str(place / "home"), "JUPYTER_PATH": str(place / "share"), "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{place}/origin.git.insteadOf", "GIT_CONFIG_VALUE_0": address,
    }  # fmt: skip
    before, failed = versions(python), 0
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        start, whole = time.perf_counter(), path.name[:2] in wanted.whole
        problem = execute(path, content, whole)
        failed += bool(problem)
        print(
            f"{path.name:<36} {'whole' if whole else 'first cells':<12} {time.perf_counter() - start:4.0f} s  ", end=""
        )
        print(f"FAILED\n{problem}" if problem else "ok", flush=True)
    after = versions(python)
    changed = {name: (before[name], after.get(name)) for name in before if after.get(name) != before[name]}
    print("installed:", ", ".join(f"{name} {after[name]}" for name in sorted(set(after) - set(before))) or "nothing")
    print("changed:", changed or "nothing")
    return 1 if failed or changed else 0


if __name__ == "__main__":
    sys.exit(main())
