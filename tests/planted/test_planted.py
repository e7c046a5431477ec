"""The planted faults fit the code as it is, and a sample of them is noticed; `make planted` plants all."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
import run as planted

FAULTS = planted.read_faults()


def test_there_are_enough_of_them():
    assert len({fault["name"] for fault in FAULTS}) == len(FAULTS) >= 40
    assert len({fault["file"] for fault in FAULTS}) >= 12
    assert sum(map(planted.needs_a_notebook, FAULTS)) >= 2


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault["name"])
def test_a_fault_can_be_planted(fault):
    changed = planted.mutated(fault)  # the old text stands exactly once
    before, after = (planted.ROOT / fault["file"]).read_text(encoding="utf-8").splitlines(), changed.splitlines()
    assert len(before) == len(after) and sum(a != b for a, b in zip(before, after)) == 1  # one line
    ast.parse(changed) if fault["file"].endswith(".py") else json.loads(changed)  # what is wrong is not its syntax
    for test in fault["tests"]:
        file, _, name = test.partition("::")
        text = (planted.ROOT / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^def {name.split('[')[0]}\(", text, re.M), test


@pytest.mark.parametrize(("code", "noticed"), [(1, True), (0, False), (2, False), (4, False), (5, False), (-14, False)])
def test_only_failed_tests_notice_a_fault(code, noticed):
    """Not those that pass, hang, cannot be imported or do not exist."""
    result, text = planted.verdict(code, "FAILED tests/test_gates.py::test_a - b")
    assert result == noticed and text == (
        "red: test_gates.py::test_a" if noticed else f"SURVIVED (pytest exit code {code})"
    )


def test_texts_that_are_gone_are_reported():
    with pytest.raises(ValueError, match="stands 0 times"):
        planted.mutated(FAULTS[0] | {"old": "no such text"})


def test_a_sample_is_noticed():
    seed = os.environ.get("GITHUB_RUN_NUMBER", "0")  # other faults in every run of the continuous integration
    command = [sys.executable, planted.__file__, "--sample", "3", "--seed", seed]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "3 of 3 faults noticed" in done.stdout, done.stdout + done.stderr
