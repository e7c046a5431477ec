"""Notebooks are executed, alike in form, in step with the package, and their exercises can be solved."""

import ast
import io
import re
import symtable
from contextlib import redirect_stdout
from pathlib import Path

import nbformat
import pytest

from vdm_utils import gates, objective

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
DERIVED = {
    gates: ("hard_concrete_sample", "prob_nonzero"),
    objective: ("mask_embeddings", "kl_divergence", "expected_l0", "lagrangian"),
}
BOILERPLATE_TAG = "colab"


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    return [cell for cell in code_cells(notebook) if tag in cell.metadata.get("tags", [])]


def without_magics(source):
    return re.sub(r"^(\s*)[!%].*$", r"\1pass", source, flags=re.M)


def names_used_and_made(source):
    """The names that a cell reads from the notebook, inside functions as well, and those that it binds there."""
    tables = [symtable.symtable(without_magics(source), "cell", "exec")]
    made = {s.get_name() for s in tables[0].get_symbols() if s.is_assigned() or s.is_imported()}
    used = set()
    for table in tables:  # grows on the way
        tables += table.get_children()
        used |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and s.is_global()}
    return used, made


def printed_text(output):
    """What a student can read in an output and nbval compares: nothing for a figure or a widget."""
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    return "" if re.match(r"<|\w+\(", text) else text


def functions(source):
    """Name → syntax tree without docstring and annotations, for every function at the top level of `source`."""
    found = {}
    for node in ast.parse(without_magics(source)).body:
        if isinstance(node, ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            node.returns = None
            for argument in node.args.args:
                argument.annotation = None
            found[node.name] = ast.dump(node)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestForm:
    def test_is_executed(self, path):
        cells = code_cells(read(path))
        assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
        assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
        assert not [o for c in cells for o in c.outputs if o.get("name") == "stderr"]

    def test_metadata(self, path):
        notebook = read(path)
        assert notebook.metadata.kernelspec.name == "python3"
        assert "widgets" not in notebook.metadata

    def test_cells_are_short_and_explained(self, path):
        notebook = read(path)
        code, markdown = code_cells(notebook), [c for c in notebook.cells if c.cell_type == "markdown"]
        assert 25 <= len(notebook.cells) <= 55
        assert max(len(c.source.splitlines()) for c in code) <= 40
        assert 1.0 <= len(markdown) / len(code) <= 1.8

    def test_opens_and_closes(self, path):
        notebook = read(path)
        slug = re.search(r"github\.com/([\w-]+/[\w-]+)", (ROOT / "pyproject.toml").read_text()).group(1)
        assert f"colab.research.google.com/github/{slug}/blob/main/notebooks/{path.name}" in notebook.cells[0].source
        (colab,) = tagged(notebook, BOILERPLATE_TAG)
        assert colab.source == tagged(read(NOTEBOOKS[0]), BOILERPLATE_TAG)[0].source
        assert slug in colab.source
        end = "\n".join(c.source for c in notebook.cells[-3:])
        assert "What we learned" in end and "What surprised us" in end

    def test_much_is_compared_and_asserted(self, path):
        ignored = {"nbval-ignore-output", "grader"}
        cells = [c for c in code_cells(read(path)) if not ignored & set(c.metadata.get("tags", []))]
        assert sum(any(re.search(r"\w", printed_text(o)) for o in c.outputs) for c in cells) >= 6
        assert sum(len(re.findall(r"^\s*(?:assert |check\()", c.source, re.M)) for c in cells) >= 4

    def test_outputs_need_no_script(self, path):
        kinds = [
            (kind, text) for c in code_cells(read(path)) for o in c.outputs for kind, text in o.get("data", {}).items()
        ]
        assert not [kind for kind, _ in kinds if "javascript" in kind]
        assert not [kind for kind, text in kinds if kind == "text/html" and "<script" in text]

    def test_no_paths_of_a_machine(self, path):
        assert not re.findall(r"[\"' (](?:/root|/home|/work|/tmp|/usr|[A-Z]:\\\\)\b", path.read_text())


@pytest.mark.parametrize(
    ("module", "name"), [(m, n) for m, names in DERIVED.items() for n in names], ids=lambda v: getattr(v, "__name__", v)
)
def test_derived_functions_equal_the_module(module, name):
    ours = functions(Path(module.__file__).read_text())[name]
    copies = [functions(c.source).get(name) for path in NOTEBOOKS for c in code_cells(read(path))]
    copies = [copy for copy in copies if copy is not None]
    assert copies, f"no notebook derives {name}"
    assert all(copy == ours for copy in copies)


def exercises():
    for path in NOTEBOOKS:
        notebook = read(path)
        found = tagged(notebook, "exercise")
        for number in range(len(found)):
            yield pytest.param(path, number, id=f"{path.stem}-{number + 1}")


def solution_after(notebook, grader):
    """The python block of the first folded solution after a grader cell."""
    place = notebook.cells.index(grader)
    for cell in notebook.cells[place + 1 :]:
        block = re.search(r"<summary>Solution</summary>\s*```python\n(.*?)```\s*</details>", cell.source, re.S)
        if block:
            return block.group(1)
    raise AssertionError("no folded solution after the grader")


def run(scope, *sources):
    printed = io.StringIO()
    with redirect_stdout(printed):
        for source in sources:
            exec(compile(source, "cell", "exec"), scope)
    return printed.getvalue()


def test_every_notebook_has_exercises():
    for path in NOTEBOOKS:
        notebook = read(path)
        assert 2 <= len(tagged(notebook, "exercise")) == len(tagged(notebook, "grader"))


@pytest.mark.parametrize(("path", "number"), list(exercises()))
def test_solution_passes_and_stub_does_not(path, number):
    notebook = read(path)
    setup = "\n".join(c.source for c in tagged(notebook, "setup"))
    stub, grader = tagged(notebook, "exercise")[number].source, tagged(notebook, "grader")[number]
    scope = {"__name__": "exercise"}
    printed = run(scope, setup, stub, grader.source)
    assert "not yet" in printed and "passed" not in printed
    assert "passed" in run(scope, solution_after(notebook, grader), grader.source)
