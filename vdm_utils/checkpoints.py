"""Saved models: checksums beside them, and loading that refuses what was altered, is broken, or does not fit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from vdm_utils.errors import VDMError

CHECKSUMS = "SHA256SUMS"  # its format is that of the program: `sha256sum -c SHA256SUMS` checks a folder as well


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of the config, of every file of weights and, where a run can be resumed, of its optimizer's state."""
    files = [
        folder / "config.json",
        *(file for kind in ("safetensors", "pt", "pth") for file in folder.glob(f"*.{kind}")),
    ]
    contents = {file.name: file.read_bytes() for file in files}
    # git on Windows may have changed the line ends of a text
    contents["config.json"] = contents["config.json"].replace(b"\r\n", b"\n")
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}


def write_checksums(folder: Path) -> None:
    """Put `SHA256SUMS` beside a saved model, for `verify_checksums`."""
    lines = [f"{digest}  {name}\n" for name, digest in _checksums(folder).items()]
    (folder / CHECKSUMS).write_text("".join(lines))


def verify_checksums(folder: Path) -> None:
    """Raise `VDMError` unless config and weights are those that `SHA256SUMS` lists.

    A folder without that file is accepted: models of other origin, such as those of the Hub, have none.
    """
    if not os.path.isfile(folder / CHECKSUMS):  # unlike Path.is_file, never raises, whatever the name is
        return
    lines = (folder / CHECKSUMS).read_text(errors="replace").splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    try:
        found = _checksums(folder)
    except OSError as error:
        raise VDMError("cannot load the model: a file is missing", where=str(folder), expected=", ".join(listed), got=error,
                       fix="copy the whole folder again") from error  # fmt: skip
    altered = sorted({name for name, _ in listed.items() ^ found.items()})
    if altered:
        raise VDMError("cannot load the model: it was altered after it was saved", where=str(folder), expected=f"the files that {CHECKSUMS} lists",
                       got=f"{', '.join(altered)} differ", fix=f"copy the folder again; after a change of your own, delete {CHECKSUMS}")  # fmt: skip


def save_classifier(model: PreTrainedModel, folder: str | Path) -> None:
    """`model.save_pretrained(folder)`, with checksums beside it."""
    model.save_pretrained(folder)
    write_checksums(Path(folder))


def load_saved(
    load: Callable, name_or_path: str | Path, what: str, where: str, **options
) -> tuple[nn.Module, list[str]]:
    """A saved model through a `from_pretrained` of transformers, and which of its weights are missing, of another shape, or
    in the file only; safetensors only, no remote code.

    Raises:
        VDMError: when there is no such model, or it cannot be read, was altered, or holds NaN or infinite weights.
    """
    verify_checksums(Path(str(name_or_path)))
    try:
        # without ignore_mismatched_sizes transformers raises an error that names no weight
        model, report = load(str(name_or_path), use_safetensors=True, trust_remote_code=False, output_loading_info=True,
                             ignore_mismatched_sizes=True, **options)  # fmt: skip
    except Exception as error:  # transformers raises OSError, ValueError, SafetensorError … depending on the cause
        raise VDMError(f"cannot load the {what}", where=where, expected="a folder written by save_pretrained or a Hub name",
                       got=f"{name_or_path} ({str(error).splitlines()[0] if str(error) else error!r})",
                       fix="check the name, or the network") from error  # fmt: skip
    misfits = {*report["missing_keys"], *report["unexpected_keys"], *(name for name, *_ in report["mismatched_keys"])}
    loaded = {name: weight for name, weight in model.state_dict().items() if name not in misfits}
    broken = [name for name, weight in loaded.items() if not weight.isfinite().all()]
    if broken:
        raise VDMError(f"cannot load the {what}", where=where, expected="finite weights", got=f"NaN or infinite {broken[0]} in "
                       f"{name_or_path}", fix="train it again, or get a whole copy")  # fmt: skip
    return model, sorted(misfits)


def refuse_misfits(misfits: list[str], name_or_path: str | Path, what: str, where: str) -> None:
    """Raise `VDMError` where weights do not fit: transformers would go on with random numbers in their place."""
    if misfits:
        raise VDMError(f"cannot load the {what}", where=where, expected="every weight once, in its shape",
                       got=f"{name_or_path} ({len(misfits)} missing, of another shape or unknown: {', '.join(misfits[:3])} …)",
                       fix=f"check that this is the folder of a {what}, with config.json and weights of one run")  # fmt: skip
