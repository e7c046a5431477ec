"""Plant one fault at a time in a copy of the project, and see whether its tests turn red.

    python tests/planted/run.py                       # every fault of faults.toml, as a table
    python tests/planted/run.py dual                  # those with a word in their name
    python tests/planted/run.py --sample 3 --seed 7   # some of those that need no notebook

First all tests that are to turn red have to be green in an untouched copy.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
COPIED = ("vdm_utils", "tests", "tools", "notebooks", "data/checkpoints", "pyproject.toml")
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*")
SECONDS = 900  # for one fault; one that makes a test hang is not noticed by it
FAILED, PASSED = 1, 0  # exit codes of pytest: anything else means that the tests could not be run
# the copy decides, not the project; nothing is fetched; one thread, as several copies are tested at a time
SETTINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def read_faults() -> list[dict]:
    """The entries of faults.toml: `name`, `file`, `old` and `new` text, and the `tests` that have to turn red."""
    return tomllib.loads((ROOT / "tests" / "planted" / "faults.toml").read_text())["fault"]


def needs_a_notebook(fault: dict) -> bool:
    return any(test.endswith(".ipynb") for test in fault["tests"])


def mutated(fault: dict) -> str:
    """The text of the file with the fault in it; `ValueError` unless the old text stands there exactly once."""
    text = (ROOT / fault["file"]).read_text(encoding="utf-8")
    if (times := text.count(fault["old"])) != 1:
        raise ValueError(f"{fault['name']!r}: {fault['old']!r} stands {times} times in {fault['file']}")
    return text.replace(fault["old"], fault["new"])


def copy_project(place: Path) -> None:
    """What the tests need of the project."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name, ignore=LEFT_OUT)
        else:
            shutil.copy(ROOT / name, place / name)


def load_libraries() -> None:
    """Import once what takes seconds, and forget the project itself: every fault is tested in a fork of this process."""
    sys.dont_write_bytecode = True
    os.environ |= SETTINGS
    sys.path.insert(0, str(ROOT))
    import nbval.plugin  # noqa: F401
    import pytest  # noqa: F401

    import vdm_utils.__main__  # noqa: F401

    sys.path.remove(str(ROOT))
    for name in [name for name in sys.modules if name.partition(".")[0] == "vdm_utils"]:
        del sys.modules[name]


def run_tests(place: Path, tests: list[str]) -> int:
    """Run tests in a copy, up to the first that fails; their output goes to a file there. Returns pytest's exit code."""
    import pytest

    with open(place / "output", "w") as output:
        os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
    os.chdir(place)
    sys.path.insert(0, str(place))
    os.environ["PYTHONPATH"] = str(place)  # of new processes, such as the kernels of notebooks
    options = ["--nbval", "--nbval-current-env"] if tests[0].endswith(".ipynb") else []
    return pytest.main(["-x", "-p", "no:cacheprovider", *options, *tests])


def in_forks(jobs: list[dict], at_once: int, report: Callable[[dict, int, str, float], None]) -> None:
    """Run every job's `tests` in a copy of its own, and `report(job, exit code, output, seconds)` each when it is done."""
    waiting, running = list(jobs), {}
    while waiting or running:
        if waiting and len(running) < at_once:
            job, place = waiting.pop(0), tempfile.TemporaryDirectory()
            copy_project(Path(place.name))
            if "file" in job:
                Path(place.name, job["file"]).write_text(mutated(job), encoding="utf-8")
            sys.stdout.flush()
            if not (child := os.fork()):
                code = -1
                try:
                    signal.alarm(SECONDS)
                    code = run_tests(Path(place.name), job["tests"])
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            running[child] = job, place, time.perf_counter()
            continue
        child, status = os.wait()
        job, place, start = running.pop(child)
        output = Path(place.name, "output").read_text(errors="replace")
        place.cleanup()
        report(job, os.waitstatus_to_exitcode(status), output, time.perf_counter() - start)


def verdict(code: int, output: str) -> tuple[bool, str]:
    """Whether the tests noticed a fault, and which of them did: they have to fail, not to hang or to be impossible to run."""
    if code != FAILED:
        return False, f"SURVIVED (pytest exit code {code})"
    first = re.search(r"^FAILED (?:tests/|notebooks/)?(.+?)(?: - .*)?$", output, re.M)
    return True, f"red: {first.group(1) if first else 'an error'}"


def main(words: list[str] | None = None) -> int:
    """Plant the chosen faults; 0 when every one of them was noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="only the faults with this word in their name")
    parser.add_argument("--sample", type=int, help="so many of them, drawn at random, none that needs a notebook")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="copies at a time")
    chosen = parser.parse_args(words)
    faults = [fault for fault in read_faults() if chosen.word in fault["name"]]
    if chosen.sample:
        quick = [fault for fault in faults if not needs_a_notebook(fault)]
        faults = random.Random(chosen.seed).sample(quick, chosen.sample)
    for fault in faults:
        mutated(fault)  # complains before anything is run
    start = time.perf_counter()
    load_libraries()
    tests = sorted({test for fault in faults for test in fault["tests"]})
    # one file of tests at a time, and every notebook by itself
    groups = [
        [test for test in tests if test.partition("::")[0] == file]
        for file in sorted({t.partition("::")[0] for t in tests})
    ]
    broken, noticed = [], []

    def without(job: dict, code: int, output: str, seconds: float) -> None:
        print(
            f"without a fault: {job['tests'][0].partition('::')[0]:<58} {seconds:4.0f} s  {'green' if code == PASSED else code}",
            flush=True,
        )
        if code != PASSED:
            broken.append(output)

    def planted(fault: dict, code: int, output: str, seconds: float) -> None:
        red, text = verdict(code, output)
        print(f"{fault['name']:<58} {fault['file']:<46} {seconds:4.0f} s  {text}", flush=True)
        noticed.append(red)

    in_forks([{"tests": group} for group in groups], chosen.jobs, without)
    if broken:
        print(*broken, "the tests are not green without a fault", sep="\n")
        return 1
    in_forks(faults, chosen.jobs, planted)
    print(f"{sum(noticed)} of {len(noticed)} faults noticed, {time.perf_counter() - start:.0f} s")
    return 0 if all(noticed) else 1


if __name__ == "__main__":
    sys.exit(main())
