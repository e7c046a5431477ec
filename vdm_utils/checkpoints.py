"""Saved models: checksums beside them, and loading that refuses what was altered, is broken, or does not fit."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from vdm_utils.errors import VDMError

if TYPE_CHECKING:  # takes seconds to import, and only training needs it
    from transformers import Trainer

logger = logging.getLogger(__name__)

CHECKSUMS = "SHA256SUMS"  # its format is that of the program: `sha256sum -c SHA256SUMS` checks a folder as well
STATE = "trainer_state.json"  # the last file that a Trainer writes into a checkpoint
HUB_SECONDS = 5.0  # a Hub that has not answered one short question by then is taken for out of reach
silent_until = 0.0  # on the monotonic clock: a Hub that was silent is not asked for the base of a DiffMask right after

# ---------------------------------------------------------------- writing


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise `VDMError` where nothing can be written to `folder`: the disk is full, read-only or gone."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # what Python, torch and safetensors raise then
        raise VDMError("cannot save the run", where=str(folder), expected="a folder of yours on a disk with room", got=error,
                       fix="free some space, then resume from 'last': earlier checkpoints are whole; or name another folder") from error  # fmt: skip


def check_writable(folder: Path) -> None:
    """Make the folder, and raise `VDMError` now, not at the first checkpoint, where nothing can be written to it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(2**16))


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file under another name first: whoever is interrupted leaves the old file or the new one."""
    part = file.with_name(f"{file.name}.part")
    with writing(file.parent):
        try:
            # a text may hold file names, which need not be valid UTF-8
            part.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
            part.replace(file)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def guard_saving(trainer: Trainer) -> None:
    """Make a Trainer raise `VDMError` where it cannot save, and forget a checkpoint before it writes it anew.

    Without its `STATE` a checkpoint is not whole (`last_checkpoint`), whatever an earlier, interrupted save left in it.
    """
    folder, save_checkpoint = Path(trainer.args.output_dir), trainer._save_checkpoint

    def save_anew(*args, **kwargs):
        if trainer.is_world_process_zero():
            (folder / f"checkpoint-{trainer.state.global_step}" / STATE).unlink(missing_ok=True)
        save_checkpoint(*args, **kwargs)

    trainer._save_checkpoint = writing(folder)(save_anew)
    trainer.save_model = writing(folder)(trainer.save_model)
    trainer.save_state = writing(folder)(trainer.save_state)


# ---------------------------------------------------------------- checksums


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of the config, of every file of weights and, where a run can be resumed, of its state and its optimizer's."""
    kept = (f for f in folder.iterdir() if f.suffix in (".safetensors", ".pt", ".pth") or f.name == STATE)
    files = [folder / "config.json", *kept]
    contents = {file.name: file.read_bytes() for file in files}
    # git on Windows may have changed the line ends of a text
    contents["config.json"] = contents["config.json"].replace(b"\r\n", b"\n")
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}


def write_checksums(folder: Path) -> None:
    """Put `SHA256SUMS` beside a saved model, for `verify_checksums`."""
    with writing(folder):
        write_whole(folder / CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in _checksums(folder).items()))


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
    if STATE not in listed:  # saved before it was listed
        found.pop(STATE, None)
    altered = sorted({name for name, _ in listed.items() ^ found.items()})
    if altered:
        raise VDMError("cannot load the model: it was altered after it was saved", where=str(folder), expected=f"the files that {CHECKSUMS} lists",
                       got=f"{', '.join(altered)} differ", fix=f"copy the folder again; after a change of your own, delete {CHECKSUMS}")  # fmt: skip


def last_checkpoint(folder: Path) -> Path | None:
    """The last `checkpoint-N` of a run that is whole; those after it are passed over with a warning.

    A save that was interrupted left a part of the files. Checksums are written last, so a checkpoint that has `STATE` and
    whose files are those that they list was saved to the end.
    """
    steps = {int(path.name[11:]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()}
    for _, checkpoint in sorted(steps.items(), reverse=True):
        try:
            json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
            (checkpoint / CHECKSUMS).stat()
            verify_checksums(checkpoint)
            return checkpoint
        except (OSError, ValueError) as error:  # missing; half a JSON text, or files that the checksums do not fit
            logger.warning("passed over, not whole: %s (%s)", checkpoint, " ".join(str(error).split())[:200])
    return None


def check_resumable(checkpoint: Path, where: str) -> None:
    """Raise `VDMError` unless this is a `checkpoint-N` folder that was saved to the end; a finished run's folder is none."""
    whole = all((checkpoint / name).is_file() for name in (STATE, CHECKSUMS))
    if not checkpoint.name.removeprefix("checkpoint-").isdecimal() or not whole:
        raise VDMError("nothing to resume", where=where, expected="a checkpoint-N folder of an earlier run", got=checkpoint,
                       fix="name one, or leave it out to start anew")  # fmt: skip


def save_classifier(model: PreTrainedModel, folder: str | Path) -> None:
    """`model.save_pretrained(folder)`, with checksums beside it."""
    with writing(Path(folder)):
        model.save_pretrained(folder)
        write_checksums(Path(folder))


# ---------------------------------------------------------------- loading


def hub_trouble(name: str, revision: str = "main") -> str | None:
    """Why the Hub does not give this model, or None when it does: asked for its config, once, within `HUB_SECONDS`.

    `from_pretrained` itself goes on asking a Hub that does not answer for minutes (huggingface_hub 2.4: 10 s for a file,
    then five times 60 s). One that was silent is not asked again at once: the time is that of a DiffMask with its base.
    """
    global silent_until
    answers = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=2 * HUB_SECONDS)
            answers.append(None)
        except Exception as error:  # httpx's, huggingface_hub's, OSError … depending on what is wrong
            answers.append(f"{type(error).__name__}: {str(error).strip()}".splitlines()[0])

    # a thread of its own: looking up a host's name obeys no timeout
    thread = threading.Thread(target=ask, daemon=True)
    if time.monotonic() >= silent_until:
        thread.start()
        thread.join(HUB_SECONDS)
        silent_until = 0.0 if answers else time.monotonic() + HUB_SECONDS
    return answers[0] if answers else f"no answer within {HUB_SECONDS:.0f} s"


def load_saved(
    load: Callable, name_or_path: str | Path, what: str, where: str, **options
) -> tuple[nn.Module, list[str]]:
    """A saved model through a `from_pretrained` of transformers, and which of its weights are missing, of another shape, or
    in the file only; safetensors only, no remote code.

    A model of the Hub is taken from the local cache, with a warning, where the Hub cannot be reached or has it no more.

    Raises:
        VDMError: when there is no such model, or it cannot be read, was altered, or holds NaN or infinite weights.
    """
    verify_checksums(Path(str(name_or_path)))
    name, trouble = str(name_or_path), None
    offline = constants.HF_HUB_OFFLINE
    if not (os.path.exists(name) or offline or options.get("local_files_only")):
        trouble = hub_trouble(name, options.get("revision", "main"))
    # more than local_files_only, with which huggingface_hub (2.4) still asks the Hub for other things
    constants.HF_HUB_OFFLINE = offline or trouble is not None
    try:
        # without ignore_mismatched_sizes transformers raises an error that names no weight
        model, report = load(name, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
                             ignore_mismatched_sizes=True, **options)  # fmt: skip
    except Exception as error:  # transformers raises OSError, ValueError, SafetensorError … depending on the cause
        raise VDMError(f"cannot load the {what}", where=where, expected="a folder written by save_pretrained or a Hub name",
                       got=f"{name} ({trouble or (str(error).splitlines()[0] if str(error) else repr(error))})",
                       fix="check the name, or the network") from error  # fmt: skip
    finally:
        constants.HF_HUB_OFFLINE = offline
    if trouble:
        logger.warning("the Hub does not give %s (%s): using the copy in the cache", name, trouble)
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
