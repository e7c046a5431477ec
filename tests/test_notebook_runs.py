"""Notebooks that cannot lie: a wrong number or a false assertion fails, and every notebook stands on its own feet.

They run in kernels of their own, in a copy of the tree as a clone has it, without network or data folder. By default
those that take seconds; all of them with VDM_SLOW=1.
"""

import copy
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook, new_output
from test_notebooks import NOTEBOOKS, ROOT, code_cells, names_used_and_made, read, tagged

from vdm_utils.hints import where_made
from vdm_utils.notebook import busy_cores, start

FAST = ["01_toy_data", "03_gates_and_hard_concrete"]
SLOW = pytest.mark.skipif(not os.environ.get("VDM_SLOW"), reason="takes minutes: set VDM_SLOW=1")
EVERY = [p.stem if p.stem in FAST else pytest.param(p.stem, marks=SLOW) for p in NOTEBOOKS]
NBVAL = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "--nbval-kernel-startup-timeout=300"]
NBVAL += ["-p", "no:cacheprovider", "--color=no", "-rfE"]
# where the library lies and on how many threads it computes: a cell at the end of a copy prints both
ASKED = "import torch, vdm_utils.data\nprint(torch.get_num_threads(), vdm_utils.data.__file__)"


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    return make_clone(tmp_path_factory.mktemp("clone"))


def make_clone(folder):
    """The tree without anything that git ignores: what a clone would have after a commit."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what a clone has is not known")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # a deleted file stays listed until the commit
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def surroundings(folder, threads):
    """Environment variables: the package of `folder`, no data folder, and every way to the network closed."""
    startup = folder / f"{threads} threads" / "profile_default" / "startup" / "threads.py"  # IPython runs it first
    startup.parent.mkdir(parents=True, exist_ok=True)
    # of OMP_NUM_THREADS torch uses no more than there are cores; no name may be left behind, so no import statement
    startup.write_text(f"__import__('torch').set_num_threads({threads})")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VDM_")}
    kept |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "IPYTHONDIR": str(startup.parent.parent.parent)}
    kept["OMP_NUM_THREADS"] = str(threads)  # with a number asked for, `start` leaves it alone on a busy machine
    kept |= {"OMP_WAIT_POLICY": "PASSIVE"}  # more threads than cores must not spin
    closed = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    return kept | closed | {"NO_PROXY": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "no cache")}


def test_a_notebook_leaves_busy_cores_alone(monkeypatch):
    """Beside another program a second thread made notebook 02 ten times as slow, and one did not."""
    threads = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        for busy, left in ((0, 4), (3, 1), (9, 1)):
            torch.set_num_threads(4)
            monkeypatch.setattr("vdm_utils.notebook.busy_cores", lambda busy=busy: busy)
            start()
            assert torch.get_num_threads() == left
        torch.set_num_threads(4)
        monkeypatch.setenv("OMP_NUM_THREADS", "4")  # whoever asks for a number gets it
        start()
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)


def test_busy_cores_are_counted():
    cores = psutil.cpu_count()
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        time.sleep(0.5)  # until they run
        assert busy_cores(seconds=1) == cores
    finally:
        for other in others:
            other.kill()
            other.wait()


def answer(printed):
    """A printed line as the output of a cell."""
    return new_output("stream", name="stdout", text=printed + "\n")


@pytest.mark.parametrize("name", FAST)
def test_a_wrong_number_and_a_false_assertion_fail_and_nothing_else(clone, name):
    """On a fresh clone, without network, on four threads: every other cell prints what is committed."""
    notebook = read(clone / "notebooks" / f"{name}.ipynb")
    cells = code_cells(notebook)
    number, assertion = number_of_output(cells), next(i for i, c in enumerate(cells) if find_assert(c.source))
    changed, broken = cells[number].outputs[0], cells[assertion]
    changed.text = re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), changed.text)
    broken.source = re.sub(r"^assert (.*)$", r"assert not (\1\n)", broken.source, count=1, flags=re.M)
    asked = new_code_cell(ASKED, outputs=[answer(f"4 {clone / 'vdm_utils' / 'data.py'}")], execution_count=1)
    notebook.cells.append(asked)
    path = clone / "notebooks" / f"{name}_changed.ipynb"
    nbformat.write(notebook, path)
    done = subprocess.run([*NBVAL, str(path)], cwd=clone, env=surroundings(clone, 4), capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = re.findall(r"^(FAILED|ERROR) .*::Cell (\d+)", done.stdout, re.M)
    assert sorted(failed) == sorted(("FAILED", str(i)) for i in (number, assertion)), done.stdout
    assert f"Cell {number}: Cell outputs differ" in done.stdout
    assert f"Cell {assertion}: Cell execution caused an exception" in done.stdout and "AssertionError" in done.stdout


def number_of_output(cells):
    """The place of the first cell that starts by printing a number."""
    return next(i for i, cell in enumerate(cells) if cell.outputs and re.search(r"\d", cell.outputs[0].get("text", "")))


def find_assert(source):
    return re.search(r"^assert ", source, re.M)


def shown(cell):
    """What is compared of a cell: its text, stream by stream, and the name of its error."""
    found = {}
    for output in cell.outputs:
        texts = {output.get("name"): output.get("text")} if output.output_type == "stream" else output.get("data", {})
        for kind in ("stdout", "stderr", "text/plain", "text/html"):
            found[kind] = found.get(kind, "") + texts.get(kind, "")
    return {kind: text for kind, text in found.items() if text}


def errors(cells):
    return [f"{c.source.splitlines()[0]}: {o.ename}: {o.evalue}" for c in cells for o in c.outputs if "ename" in o]


def run_in_one_kernel(folder, cells, threads=1, **variables):
    """Execute cells in turn whatever fails, on `threads` threads, in the notebooks folder of a clone.

    `variables`: of the environment, on top of `surroundings`.
    """
    asked = new_code_cell(ASKED)
    notebook = new_notebook(cells=[asked, *cells], metadata={"kernelspec": {"name": "python3", "display_name": ""}})
    place = {"metadata": {"path": str(folder / "notebooks")}}
    client = NotebookClient(notebook, timeout=1800, startup_timeout=300, allow_errors=True, resources=place)
    client.execute(env=surroundings(folder, threads) | variables)
    assert shown(asked) == {"stdout": f"{threads} {folder / 'vdm_utils' / 'data.py'}\n"}
    return cells


def from_restart(notebook, cell):
    """The cells of somebody who begins at a restart point: set-up first, then this cell and all below."""
    cells = code_cells(notebook)
    before = [c for c in cells if {"colab", "setup"} & set(c.metadata.get("tags", []))]
    rest = cells[cells.index(cell) :]
    return [c for c in before if c not in rest] + rest


def again(cell):
    """A copy of a cell, to be executed once more."""
    return nbformat.from_dict(copy.deepcopy(cell) | {"id": new_code_cell().id})


@pytest.fixture(scope="module")
def runs(request, clone):
    """In one kernel: a notebook, again on two threads, then from each of its restart points with all names forgotten."""
    notebook = read(clone / "notebooks" / f"{request.param}.ipynb")
    plan = {"first": code_cells(notebook), "second": code_cells(notebook)}
    plan |= {cell.id: from_restart(notebook, cell) for cell in tagged(notebook, "restart")}
    ran = {name: [again(cell) for cell in cells] for name, cells in plan.items()}
    two = new_code_cell("__import__('torch').set_num_threads(2)\nprint(__import__('torch').get_num_threads())")
    in_turn = ran["first"] + [two] + ran["second"]
    for name in ran.keys() - {"first", "second"}:
        in_turn += [new_code_cell("%reset -f"), *ran[name]]
    run_in_one_kernel(clone, in_turn)
    assert shown(two) == {"stdout": "2\n"}
    return ran | {"committed": code_cells(notebook)}


def compared(cells):
    return [shown(c) for c in cells if "nbval-ignore-output" not in c.metadata.get("tags", [])]


@pytest.mark.parametrize("runs", EVERY, indirect=True)
class TestInOneKernel:
    def test_one_thread_prints_what_is_committed(self, runs):
        assert not errors(runs["first"])
        assert compared(runs["first"]) == compared(runs["committed"])

    def test_a_second_time_on_two_threads(self, runs):
        assert not errors(runs["second"])
        assert compared(runs["second"]) == compared(runs["first"])

    def test_from_every_restart_point(self, runs):
        for name in runs.keys() - {"first", "second", "committed"}:
            assert not errors(runs[name]), f"from {name}"


# the two quick ones are compared on four threads above, cell by cell, and on two in `runs`
@pytest.mark.parametrize("threads", [pytest.param(2, marks=SLOW), pytest.param(4, marks=SLOW)])
@pytest.mark.parametrize("name", EVERY)
def test_more_threads_print_what_is_committed(clone, name, threads):
    committed = code_cells(read(clone / "notebooks" / f"{name}.ipynb"))
    ran = run_in_one_kernel(clone, [again(cell) for cell in committed], threads)
    assert not errors(ran)
    assert compared(ran) == compared(committed)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestRestartPoints:
    def test_they_need_no_name_of_a_cell_left_out(self, path):
        notebook = read(path)
        for point in tagged(notebook, "restart"):
            cells = from_restart(notebook, point)
            elsewhere = [c for c in code_cells(notebook) if c not in cells]
            used, made = ({n for c in cells for n in names_used_and_made(c.source)[k]} for k in (0, 1))
            left_out = {n for c in elsewhere for n in names_used_and_made(c.source)[1]}
            assert not (used - made) & left_out, f"from {point.id}"

    def test_they_are_announced(self, path):
        cells = read(path).cells
        tags = [i for i, cell in enumerate(cells) if "restart" in cell.metadata.get("tags", [])]
        words = [i for i, cell in enumerate(cells) if re.search(r"^\*You can start here", cell.source, re.M)]
        assert [i - 1 for i in tags] == words


class TestMissingName:
    """A NameError says which cell makes the name: after the set-up cell, and where `make setup` was run before it too."""

    @pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
    def test_every_notebook_is_known_by_its_set_up(self, path):
        notebook = read(path)
        setup = tagged(notebook, "setup")[0].source.splitlines()
        for exercise in tagged(notebook, "exercise"):
            name = re.search(r"^def (\w+)", exercise.source, re.M)[1]
            made = f"`{name}` is made in cell [{exercise.execution_count}] (“"
            assert where_made(name, setup, []).startswith(made)
            assert where_made(name, setup, [exercise.source]) is None  # nothing above makes it

    def test_in_a_kernel(self, clone):
        notebook = read(clone / "notebooks" / "01_toy_data.ipynb")
        cells = {cell.id: cell for cell in code_cells(notebook)}
        inside = new_code_cell("def of_mine():\n    return codes(3)\n\n\nof_mine()")
        nowhere = new_code_cell("nowhere")
        wrong = new_code_cell("int('one')")
        tried = [cells["01-02"], cells["01-10"], inside, nowhere, wrong, again(cells["01-10"])]
        ran = run_in_one_kernel(clone, tried)
        hint = "`labels` is made in cell [5] (“1. The task: how many cells are yellow?”): run that one, or start at "
        for cell in (ran[1], ran[5]):  # the second time as well
            (error,) = cell.outputs
            assert error.evalue.startswith(f"name 'labels' is not defined\n{hint}")
            assert "i = (labels == 5)" in "".join(plain(error)) and hint in plain(error)[-1]
        assert "`codes` is made in cell [13]" in ran[2].outputs[0].evalue and "of_mine" in "".join(
            plain(ran[2].outputs[0])
        )
        assert ran[3].outputs[0].evalue == "name 'nowhere' is not defined"
        assert ran[4].outputs[0].ename == "ValueError" and "made in cell" not in ran[4].outputs[0].evalue

    def test_in_a_fresh_kernel(self, clone, monkeypatch):
        """Before any cell has run, with the configuration that `make setup` puts into the environment."""
        notebook = read(clone / "notebooks" / "01_toy_data.ipynb")
        cells = {cell.id: cell for cell in code_cells(notebook)}
        monkeypatch.setitem(globals(), "surroundings", with_config(surroundings))
        strange = new_code_cell("something_of(theirs)")
        tried = [cells["01-10"], strange, cells["01-02"], again(cells["01-10"])]
        ran = run_in_one_kernel(clone, tried)
        assert [c.outputs[0].evalue.split("\n")[1:] for c in (ran[0], ran[1], ran[3])] == [
            ["`labels` is made in cell [5] (“1. The task: how many cells are yellow?”). The set-up cell has not run in this kernel: "
             "begin with that one, at the top."],
            [],
            ["`labels` is made in cell [5] (“1. The task: how many cells are yellow?”): run that one, or start at a “You can start "
             "here” above."],
        ]  # fmt: skip

    def test_make_setup_installs_it(self):
        if Path(sys.prefix) != ROOT / ".venv":
            pytest.skip("this environment was not made by `make setup`")
        name = "ipython_kernel_config.py"
        assert (Path(sys.prefix) / "etc" / "ipython" / name).read_text() == (ROOT / "tools" / name).read_text()


def with_config(surroundings):
    """The same surroundings, with the kernel's configuration in the profile that IPython reads."""

    def more(folder, threads):
        found = surroundings(folder, threads)
        shutil.copy(ROOT / "tools" / "ipython_kernel_config.py", Path(found["IPYTHONDIR"]) / "profile_default")
        return found

    return more


def plain(error):
    return [re.sub(r"\x1b\[[\d;]*m", "", line) for line in error.traceback]


def test_a_killed_kernel_fails_within_a_minute(tmp_path):
    shutil.copy(ROOT / "notebooks" / "conftest.py", tmp_path)
    killed = "import os, pathlib, signal\n\npathlib.Path('at').touch()\nos.kill(os.getpid(), signal.SIGKILL)"
    cells = [new_code_cell(source, execution_count=1) for source in ("x = 1", killed, "x = 2")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "killed.ipynb")
    done = subprocess.run([*NBVAL, "killed.ipynb"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert time.time() - (tmp_path / "at").stat().st_mtime < 60
    assert done.returncode == 1 and re.findall(r"^FAILED .*::Cell (\d)", done.stdout, re.M) == ["1", "2"]
    assert "the kernel died in this cell" in done.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_set_up_cells_run_in_the_profile_for_a_gpu(path):
    if path.stem in ("05_cifar10", "06_counting_qa"):
        pytest.skip("more of them than that runs in test_paper_profile.py")
    cells = [cell.source for cell in tagged(read(path), "setup")]
    if not any("profile." in source for source in cells):
        pytest.skip("the profile has no say in them")
    environment = os.environ | {"VDM_PROFILE": "paper", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(cells)], cwd=path.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-800:]
