"""The one exception that a user of this package has to know."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral


class VDMError(ValueError):
    """Something that the caller can put right: says what, where, expected and got, and what to do next.

    At most five lines; the command line prints them without a traceback and exits with status 2.
    """

    def __init__(self, what: str, *, where: str = "", expected: object = "", got: object = "", fix: str = ""):
        # what a process that loads data raises, torch raises again in the main one, with the traceback in front
        if what.startswith("Caught VDMError in"):
            what = what.rsplit("VDMError: ", 1)[1].rstrip()
        parts = {"where": where, "expected": expected, "got": got, "what to do": fix}
        # repr-like values are cut so that a stray tensor in a message cannot fill the screen
        lines = [f"  {name}: {' '.join(str(value).split())[:300]}" for name, value in parts.items() if str(value) != ""]
        super().__init__("\n".join([what, *lines]))


def check_integer(name: str, value: object, low: int, high: int, where: str) -> None:
    """Raise `VDMError` unless `value` is a whole number from `low` to `high`; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        raise VDMError(f"{name} is out of range", where=where, expected=f"a whole number from {low} to {high}",
                       got=repr(value), fix=f"change {name}")  # fmt: skip


def unknown_name(kind: str, name: object, known: Iterable[str], where: str) -> VDMError:
    """The error for a name that is not in a list: suggests the nearest one that is."""
    known, text = list(known), str(name).lower()
    spelled = {k.lower(): k for k in known}
    # the beginning of a name can be too short to look like it: val, validation
    close = [k for k in spelled if len(text) > 2 and k.startswith(text)]
    close = close or difflib.get_close_matches(text, spelled, n=1, cutoff=0.5)
    fix = f"did you mean {spelled[close[0]]!r}?" if close else "choose one from the list"
    return VDMError(f"unknown {kind} {name!r}"[:100], where=where, expected=", ".join(known), got=repr(name), fix=fix)  # fmt: skip
