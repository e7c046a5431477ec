"""Imported once, in the process that test_interrupted forks its own from: everything that a run would import."""

import gc

import rich.progress  # noqa: F401
import sklearn.datasets  # noqa: F401
import test_interrupted  # noqa: F401

gc.freeze()  # else every process would go through a million objects of its parent's, and so copy their pages
