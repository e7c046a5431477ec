"""What both training jobs share: a run that leaves its metrics behind, can be killed at any moment, and goes on as if it had
not been."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import torch
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import rotate_checkpoints

from vdm_utils.checkpoints import (
    STATE,
    check_resumable,
    check_writable,
    guard_saving,
    last_checkpoint,
    verify_checksums,
    write_checksums,
    write_whole,
)
from vdm_utils.data import Pictures
from vdm_utils.errors import VDMError
from vdm_utils.settings import RunSettings
from vdm_utils.vit import own_image_size


class TellEpoch(TrainerCallback):
    """Tells the training data its epoch; Trainer does so too, but not for the rest of the epoch in which a run resumes."""

    def __init__(self, data: Pictures):
        self.data = data

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.data.set_epoch(int(state.epoch))


class MetricsFile(TrainerCallback):
    """Writes everything that was logged to `metrics.csv`; a resumed run keeps the rows from before."""

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_whole(Path(args.output_dir, "metrics.csv"), pd.DataFrame(state.log_history).to_csv(index=False))


class Checksums(TrainerCallback):
    """Puts checksums beside every checkpoint, once its last file is written: a damaged one is never resumed.

    Only then older ones are deleted (Trainer would do it before), but for two, the best included: one that is whole is
    always left.
    """

    def on_save(self, args, state, control, **kwargs):
        if args.world_size > 1:
            torch.distributed.barrier()  # every process writes its own random state
        if state.is_world_process_zero:
            write_checksums(Path(args.output_dir, f"checkpoint-{state.global_step}"))
            rotate_checkpoints(args.output_dir, 2, state.best_model_checkpoint, use_mtime=True)


def check_fit(model: PreTrainedModel, data: Pictures, job: str, classes: bool = True) -> None:
    """Raise `VDMError` unless the classifier takes this dataset's pictures and, with `classes`, predicts its classes."""

    def describe(labels: dict, channels: int, size: tuple[int, int]) -> str:
        named = f"{len(labels)} classes ({labels[0]}, …), " if classes else ""
        return f"{named}{channels} channel{'s' * (channels > 1)}, {size[0]}×{size[1]} pixels"

    config = getattr(model.config, "vision_config", model.config)
    size = own_image_size(model) or data.image_size
    fits = (config.num_channels, tuple(size)) == (data.num_channels, tuple(data.image_size))
    if classes:
        fits &= model.config.num_labels == data.num_labels
        # what a grid's classes count is in their names only; those of photographs are spelled differently by everyone
        names = dict(model.config.id2label)
        fits &= not data.has_truth or names[0].startswith("LABEL_") or names == dict(data.id2label)
    if not fits:
        raise VDMError("the classifier was not trained for this dataset", where=job,
                       expected=describe(data.id2label, data.num_channels, data.image_size),
                       got=describe(model.config.id2label, config.num_channels, size),
                       fix="train one with train-base, or change the data options or --from_pretrained")  # fmt: skip


def check_dataset(data: Dataset, job: str, kind: type[Dataset] = Dataset) -> None:
    """Raise `VDMError` unless `data` is a dataset of that kind."""
    if not isinstance(data, kind):
        raise VDMError("this is no dataset", where=job, expected=f"{kind.__name__} as load_data gives", got=type(data).__name__,
                       fix="give what load_data returns")  # fmt: skip


def training_arguments(chosen: RunSettings, output_dir: Path, rhythm: str, **more) -> TrainingArguments:
    """Trainer's options for a run that is evaluated and saved at the same moments: `rhythm` is `steps` or `epoch`."""
    check_writable(output_dir)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=chosen.batch_size,
        per_device_eval_batch_size=max(chosen.batch_size, 128),
        num_train_epochs=chosen.num_epochs,
        max_steps=chosen.max_steps,
        learning_rate=chosen.lr,
        optim="adamw_torch",
        logging_steps=chosen.log_every_n_steps,
        eval_strategy=rhythm,
        eval_steps=chosen.log_every_n_steps,
        save_strategy=rhythm,
        save_steps=chosen.log_every_n_steps,
        dataloader_num_workers=chosen.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not chosen.enable_progress_bar,
        report_to=chosen.report_to,
        seed=chosen.seed,
        bf16=chosen.bf16,
        use_cpu=not torch.accelerator.is_available(),  # Trainer wants to be told before it computes in bfloat16 there
        **more,
    )
    # Trainer would copy the model to all GPUs of a process, and every copy would look into the one base; torchrun gives each its own
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def run_to_the_end(trainer: Trainer, resume: str | None) -> None:
    """Run a Trainer from the start or from a checkpoint; `resume` is a folder, 'last' or None."""
    trainer.remove_callback(PrinterCallback)  # metrics go to metrics.csv, not to stdout
    trainer.add_callback(MetricsFile)
    trainer.add_callback(Checksums)
    trainer.add_callback(TellEpoch(trainer.train_dataset))
    guard_saving(trainer)
    if resume == "last":
        resume = last_checkpoint(Path(trainer.args.output_dir))
    elif resume is not None:
        check_resumable(Path(resume), "training")
    if resume is not None:
        verify_checksums(Path(resume))
    if resume is None or steps_left(trainer, Path(resume)):
        trainer.train(resume_from_checkpoint=resume and str(resume))
    trainer.save_state()


def steps_left(trainer: Trainer, checkpoint: Path) -> bool:
    """Whether a run goes on after a checkpoint. Where it does not, its state and best weights are loaded.

    Trainer (5.23) would take a step too many from a checkpoint at the end of `max_steps`, and would count the evaluations
    without progress, for early stopping, from zero again.
    """
    state, stopped = TrainerState.load_from_json(str(checkpoint / STATE)), False
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            vars(callback).update(state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {}))
            stopped = callback.early_stopping_patience_counter >= callback.early_stopping_patience
    args = trainer.args
    epochs = args.num_train_epochs * len(trainer.get_train_dataloader())
    if not stopped and state.global_step < (args.max_steps if args.max_steps > 0 else math.ceil(epochs)):
        return True
    state.is_world_process_zero, trainer.state = trainer.is_world_process_zero(), state
    best = state.best_model_checkpoint
    trainer._load_from_checkpoint(best if best and Path(best).is_dir() else str(checkpoint))
    return False


# settings without which the numbers of a DiffMask mean something else
MEANING = ("normalize", "mul_activation", "add_activation", "temperature", "low", "high", "log_multiplier", "no_placeholder", "herding_layer", "keep_class")  # fmt: skip


def load_weights(model: PreTrainedModel, saved: PreTrainedModel, source: str, where: str = "training") -> None:
    """Give `model` the weights of another one of its kind; `VDMError` unless they are all there, in the same shapes, and mean the
    same."""
    settings = [(name, getattr(saved.config, name, None), getattr(model.config, name, None)) for name in MEANING]
    if changed := [f"{name} {old}, not {new}" for name, old, new in settings if old != new]:
        raise VDMError("these weights were trained with other settings", where=where, expected="those of this run",
                       got=f"{source} ({', '.join(changed)})", fix="give the options, or the --recipe, of that run")  # fmt: skip
    try:
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise VDMError("these weights are of another model", where=where, expected=type(model).__name__ + " of the same shape",
                       got=f"{source} ({str(error).splitlines()[-1].strip()})", fix="give the options of that run") from error  # fmt: skip
