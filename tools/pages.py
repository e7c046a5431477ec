"""Execute notebooks in order and write, for each, the executed notebook and an HTML page, and an index of the pages.

python tools/pages.py notebooks/05_cifar10.ipynb --in_place   # and put what came out in place of the notebook itself
"""

from __future__ import annotations

import argparse
import base64
import copy
import html
import io
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from PIL import Image

INDEX = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Vision DiffMask in notebooks</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 42rem; margin: 3rem auto; padding: 0 1rem; }}
li {{ margin: .8rem 0; }} small {{ color: #555; }}</style></head>
<body><h1>Vision DiffMask in notebooks</h1>
<p>Explain a Vision Transformer by the patches it can do without.</p>
<ol>{items}</ol></body></html>
"""


KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def title_and_promise(notebook: nbformat.NotebookNode) -> tuple[str, str]:
    """The heading of the first cell and the first plain line below it."""
    lines = [line.strip() for line in notebook.cells[0].source.splitlines() if line.strip()]
    heading = next(line.lstrip("# ") for line in lines if line.startswith("# "))
    promise = next((line for line in lines if line[0].isalpha() or line[0] in "*_"), "")
    return heading, promise.strip("*_")


def with_mathml(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy whose formulas are MathML, which browsers draw themselves: MathJax would have to come from the web."""
    copied = copy.deepcopy(notebook)
    for cell in copied.cells:
        if cell.cell_type == "markdown":
            parts = re.split(r"(```.*?```|`[^`\n]*`)", cell.source, flags=re.S)  # formulas are not looked for in code
            parts[::2] = [FORMULA.sub(_mathml, text) for text in parts[::2]]
            cell.source = "".join(parts)
    return copied


FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$", re.S)


def _mathml(found: re.Match) -> str:
    block = found["block"] is not None
    return convert(found["block"] or found["inline"], display="block" if block else "inline").replace("*", "&#42;")


def execute(path: Path, timeout: int) -> tuple[nbformat.NotebookNode, float]:
    """The notebook with the outputs of a fresh kernel, and the seconds that took; raises `CellExecutionError`."""
    notebook, start = nbformat.read(path, as_version=4), time.perf_counter()
    place = {"metadata": {"path": str(path.parent)}}
    quiet = ["--IPKernelApp.log_level=ERROR"]  # newer kernels warn of their own transport, once per notebook
    options = {"resources": place, "extra_arguments": quiet, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", **options).execute()
    return notebook, time.perf_counter() - start


def as_committed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy without what differs from machine to machine, and whose figures have 256 colours: nobody sees it, and it is a third
    of the bytes, of which every version stays in the history."""
    copied = copy.deepcopy(notebook)
    copied.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for output in (one for cell in copied.cells for one in cell.get("outputs", [])):
        data = output.get("data", {})
        if "image/png" in data:
            figure = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
            if figure.mode != "P":
                figure.convert("RGB").quantize(256, kmeans=1).save(light := io.BytesIO(), "PNG", optimize=True)
                data["image/png"] = base64.b64encode(light.getvalue()).decode()
    return copied


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--output_dir", type=Path, default=Path("build"))
    parser.add_argument("--timeout", type=int, default=600, help="seconds a cell may take")
    parser.add_argument("--in_place", action="store_true", help="overwrite the notebooks as well")
    parser.add_argument("--workers", type=int, default=1, help="notebooks at a time")
    wanted = parser.parse_args()
    wanted.output_dir.mkdir(parents=True, exist_ok=True)
    # kernels must come from the environment that runs this script, activated or not
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    items = []
    with ThreadPoolExecutor(wanted.workers) as workers:
        running = [workers.submit(execute, path, wanted.timeout) for path in wanted.notebooks]
        for path, run in zip(wanted.notebooks, running):
            try:
                notebook, seconds = run.result()
            except CellExecutionError as error:
                print(f"{path.name}: FAILED\n{error}", file=sys.stderr)
                workers.shutdown(wait=False, cancel_futures=True)
                return 1
            heading, promise = title_and_promise(notebook)
            nbformat.write(notebook, wanted.output_dir / path.name)
            if wanted.in_place:
                nbformat.write(as_committed(notebook), path)
            page = wanted.output_dir / path.with_suffix(".html").name
            # the widgets' scripts are looked for on the web; without a network the page still reads
            page.write_text(HTMLExporter().from_notebook_node(with_mathml(notebook))[0], encoding="utf-8")
            items.append(
                f'<li><a href="{page.name}">{html.escape(heading)}</a><br><small>{html.escape(promise)}</small></li>'
            )
            print(f"{path.name}: {seconds:.0f} s", flush=True)
    index = wanted.output_dir / "index.html"
    index.write_text(INDEX.format(items="\n".join(items)), encoding="utf-8")
    print(f"open {index}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
