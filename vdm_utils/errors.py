"""The one exception that a user of this package has to know."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VDMError(ValueError):
    """Something that the caller can put right: says what, where, expected and got, and what to do next.

    At most five lines; the command line prints them without a traceback and exits with status 2.
    """

    def __init__(self, what: str, *, where: str = "", expected: object = "", got: object = "", fix: str = ""):
        parts = {"where": where, "expected": expected, "got": got, "what to do": fix}
        # repr-like values are cut so that a stray tensor in a message cannot fill the screen
        lines = [f"  {name}: {' '.join(str(value).split())[:300]}" for name, value in parts.items() if str(value) != ""]
        super().__init__("\n".join([what, *lines]))


def unknown_name(kind: str, name: object, known: Iterable[str], where: str) -> VDMError:
    """The error for a name that is not in a list: suggests the nearest one that is."""
    known = list(known)
    close = difflib.get_close_matches(str(name).lower(), [k.lower() for k in known], n=1, cutoff=0.5)
    nearest = next((k for k in known if close and k.lower() == close[0]), None)
    return VDMError(
        f"unknown {kind} {name!r}",
        where=where,
        expected=", ".join(known),
        got=name,
        fix=f"did you mean {nearest!r}?" if nearest else f"choose a {kind} from the list",
    )
