"""Both training jobs, thin over `transformers.Trainer`: the classifier, and the DiffMask that explains it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, default_collate
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from vdm_utils.checkpoints import save_classifier, write_checksums
from vdm_utils.data import Pictures
from vdm_utils.diffmask import DiffMaskOutput, VisionDiffMask
from vdm_utils.errors import VDMError
from vdm_utils.runs import check_dataset, check_fit, load_weights, run_to_the_end, training_arguments
from vdm_utils.settings import (
    RECIPES,
    ClassifierSettings,
    DataSettings,
    DiffMaskSettings,
    ExplainSettings,
    RunSettings,
    settings,
)
from vdm_utils.vit import PatchView, load_classifier

__all__ = [
    "RECIPES",
    "ClassifierSettings",
    "DataSettings",
    "DiffMaskSettings",
    "DiffMaskTrainer",
    "ExplainSettings",
    "MaskRecord",
    "MaskRecorder",
    "RunSettings",
    "check_fit",
    "evaluate_classifier",
    "evaluate_diffmask",
    "settings",
    "train_classifier",
    "train_diffmask",
]

# A layer counts as settled when its class is kept this often with this fraction of patches (De Cao et al. 2020's code);
# with --weighted_layer_distribution it is then drawn ten times less often.
SETTLED_ACCURACY, SETTLED_L0, SETTLED_WEIGHT = 0.75, 0.1, 0.1


@contextmanager
def dropped_patches(model: PreTrainedModel, fraction: float) -> Iterator[None]:
    """While training, leave a random `fraction` of the patches out of every image, after positions are added.

    The transformer then works on the rest: at 0.5 a step costs half. Liu et al. 2023 (arXiv 2208.07220) report no loss
    of accuracy, and the model learns to live with missing patches.
    """
    if not fraction:
        yield
        return
    places = dict(model.named_modules())
    owners = (m for name, m in places.items() if name.endswith("embeddings") and hasattr(m, "patch_embeddings"))
    embeddings = next(owners, None)
    countable = hasattr(getattr(embeddings, "patch_embeddings", None), "num_patches")
    if not countable or any("relative_position" in name for name in places):
        raise VDMError("patches cannot be left out of this classifier", where="--patch_dropout", expected="a ViT, DeiT or DINOv2, whose "
                       "positions are added before the first layer", got=type(model).__name__, fix="use --patch_masking, or leave it out")  # fmt: skip

    def drop(module: nn.Module, inputs, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        batch, tokens, _ = output.shape
        patches = module.patch_embeddings.num_patches
        prefix, kept = tokens - patches, max(1, round(patches * (1 - fraction)))
        order = torch.rand(batch, patches, device=output.device).argsort(dim=1)[:, :kept] + prefix  # [B, kept]
        index = torch.cat([torch.arange(prefix, device=output.device).expand(batch, -1), order], dim=1)
        return output.gather(1, index.unsqueeze(-1).expand(-1, -1, output.shape[-1]))

    handle = embeddings.register_forward_hook(drop)
    try:
        yield
    finally:
        handle.remove()


def regions(share: torch.Tensor, grid: tuple[int, int], coarser: int) -> torch.Tensor:
    """True on a `share` [B, 1] of the patches of every picture, [B, N]: the lowest of noise on a grid `coarser` times coarser."""
    (rows, cols), device = grid, share.device
    noise = torch.rand(len(share), 1, max(2, rows // coarser), max(2, cols // coarser), device=device)
    noise = nn.functional.interpolate(noise, size=grid, mode="bicubic").flatten(1)
    return noise.argsort(1).argsort(1) < share * rows * cols


@contextmanager
def masked_patches(model: PreTrainedModel, most: float) -> Iterator[None]:
    """While training, blank (zero) the embeddings of a random share of the patches, drawn per image from 0 to `most`.

    A classifier that never saw a missing patch answers to its absence with a class of its own ("missingness bias", Jain
    et al. 2022, arXiv 2204.08945); one that did can be asked what it does without. Masks leave whole regions out, so regions
    are blanked as often as specks: the patches that go are the lowest of noise drawn on a grid 1, 2 or 4 times coarser.
    """
    if not most:
        yield
        return
    view = PatchView(model)
    projection, (rows, cols) = view.projection, view.grid

    def blank(module: nn.Module, inputs, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        share = most * torch.rand(len(output), 1, device=output.device)
        stays = ~regions(share, (rows, cols), 2 ** int(torch.randint(3, ())))  # [B, N]
        # a projection puts out [B, N, d], or [B, d, rows, cols] where it is a bare convolution
        return output * (stays.unsqueeze(-1) if output.dim() == 3 else stays.view(-1, 1, rows, cols))

    handle = projection.register_forward_hook(blank)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def plain_attention(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Where `wanted`, on a CPU, attention as plain matrix products instead of torch's fused kernel.

    In bfloat16 on a CPU the fused one (torch 2.14) spends 40 % of a small ViT's step in its backward pass; in float32, and on
    a GPU, it is the faster one.
    """
    usual, wanted = model.config._attn_implementation, wanted and model.device.type == "cpu"
    if wanted:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if wanted:
            model.set_attn_implementation(usual)


# ---------------------------------------------------------------- the classifier


class ClassifierTrainer(Trainer):
    """A Trainer that really loads what it saved.

    `save_pretrained` writes a ViT under its published weight names, and Trainer (5.23) reads a checkpoint back with
    `load_state_dict(strict=False)`, which skips every renamed weight: a resumed run would go on from whatever was in
    memory. `from_pretrained` knows the names.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_weights(self.model, load_classifier(resume_from_checkpoint), resume_from_checkpoint)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


# far below 1/number of validation images, so that it decides between equal accuracies only
TIE_BREAK = 1e-5


def _accuracy_and_score(prediction: EvalPrediction) -> dict[str, float]:
    """`accuracy`, and `score`: the accuracy, less a trace of the loss.

    A small task reaches 100 % long before training ends. By accuracy alone the *first* such weights would be kept, which are
    still unsure; a mask has to preserve the whole output, so an unsure classifier is hard to explain.
    """
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    loss = nn.functional.cross_entropy(logits.float(), labels).item()
    return {"accuracy": accuracy, "score": accuracy - TIE_BREAK * min(loss, 1.0)}


def train_classifier(
    model: PreTrainedModel,
    train_data: Pictures,
    eval_data: Pictures,
    chosen: ClassifierSettings,
    output_dir: str | Path,
    resume: str | None = None,
) -> dict[str, float]:
    """Train `model` in place, keep the best validation accuracy (of equal ones the lowest loss), and save it to `output_dir`.

    Returns the validation metrics of the kept weights (`eval_accuracy` in 0..1, `eval_loss` in nats).
    """
    chosen.validate()
    check_dataset(train_data, "train_classifier", Pictures), check_dataset(eval_data, "train_classifier")
    check_fit(model, train_data, "train_classifier")
    if "labels" not in inspect.signature(model.forward).parameters:  # DeiT's head for inference, with its teacher
        raise VDMError("this classifier computes no loss", where="train_classifier", expected="a model whose forward takes labels",
                       got=type(model).__name__, fix="load it as the class without a teacher, or use another classifier")  # fmt: skip
    output_dir, home = Path(output_dir), model.device
    arguments = training_arguments(
        chosen,
        output_dir,
        "steps" if chosen.max_steps > 0 else "epoch",
        weight_decay=chosen.weight_decay,
        # Trainer's "constant" leaves warm-up out
        lr_scheduler_type=chosen.lr_schedule.replace("constant", "constant_with_warmup"),
        warmup_steps=chosen.warmup_steps,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    trainer = ClassifierTrainer(
        model,
        arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=default_collate,
        compute_metrics=_accuracy_and_score,
        # no name of Trainer's stands for RAdam with decoupled weight decay
        optimizer_cls_and_kwargs=(torch.optim.RAdam, {"lr": chosen.lr, "decoupled_weight_decay": True})
        if chosen.optimizer == "RAdam"
        else None,
        callbacks=[EarlyStoppingCallback(chosen.patience, early_stopping_threshold=TIE_BREAK)],
    )
    with (
        dropped_patches(model, chosen.patch_dropout),
        masked_patches(model, chosen.patch_masking),
        plain_attention(model, chosen.bf16),
    ):
        run_to_the_end(trainer, resume)
    model.eval()
    metrics = trainer.evaluate()
    if not math.isfinite(metrics["eval_loss"]):
        raise VDMError("the training has diverged", where="train_classifier", expected="a finite loss", got=metrics["eval_loss"],
                       fix="lower --lr; nothing was saved but checkpoints")  # fmt: skip
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_checksums(output_dir)
    model.name_or_path = str(output_dir)
    model.to(home)  # Trainer has taken it to a GPU where there is one; its pictures are here
    return metrics


@torch.no_grad()
def evaluate_classifier(model: PreTrainedModel, data: Pictures, batch_size: int = 128) -> dict[str, float]:
    """`accuracy` (0..1) and mean `confidence` of the predicted class (0..1) over a dataset."""
    check_dataset(data, "evaluate_classifier")
    model.eval()
    parts = []
    for batch in DataLoader(data, batch_size):
        probability = model(batch["pixel_values"].to(model.device)).logits.float().softmax(-1).cpu()
        top = probability.max(-1)
        parts.append(torch.stack([(top.indices == batch["labels"]).float(), top.values]))
    return dict(zip(("accuracy", "confidence"), torch.cat(parts, 1).mean(1).tolist(), strict=True))


# ---------------------------------------------------------------- the DiffMask


class DiffMaskTrainer(Trainer):
    """One random layer per step, one backward pass for both players of the min–max game."""

    def __init__(self, diffmask: VisionDiffMask, arguments: TrainingArguments, chosen: DiffMaskSettings, **kwargs):
        super().__init__(diffmask, arguments, data_collator=default_collate, **kwargs)
        self.chosen = chosen
        self.recent: list[torch.Tensor] = []  # (KL, L0) of the steps since the last log line

    @staticmethod
    def make_optimizer(diffmask: VisionDiffMask, chosen: DiffMaskSettings) -> torch.optim.Optimizer:
        """One Adam with up to three groups: gates, placeholder (both descend) and multipliers (ascend)."""
        groups = [{"params": list(diffmask.gates.parameters()), "lr": chosen.lr}]
        if diffmask.placeholder is not None:
            groups.append({"params": [diffmask.placeholder], "lr": chosen.lr_placeholder})
        # the other player: maximize=True makes this group *ascend* the gradient of the same backward pass
        groups.append({"params": list(diffmask.multiplier.parameters()), "lr": chosen.lr_alpha, "maximize": True})
        return torch.optim.Adam(groups, betas=(0.9, chosen.adam_beta2), fused=True)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        saved = VisionDiffMask.from_pretrained(resume_from_checkpoint, base=self.model.base)
        load_weights(self.model, saved, resume_from_checkpoint)

    def create_optimizer(self, model=None):
        self.optimizer = self.make_optimizer(self.model, self.chosen)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        warmup, decay = self.chosen.gate_warmup_steps, self.chosen.lr_decay * num_training_steps

        def warm_up(step: int) -> float:
            return min(1.0, (step + 1) / warmup) if warmup else 1.0

        def slow_down(step: int) -> float:
            # Adam divides by the size of the gradient, so a placeholder with nothing left to learn walks at full speed
            return min(1.0, (num_training_steps - step) / decay) if decay else 1.0

        rules = [lambda step: warm_up(step) * slow_down(step)]
        if self.model.placeholder is not None:
            rules.append(slow_down)
        rules.append(lambda step: 1.0)  # the multipliers keep watch to the end
        self.lr_scheduler = LambdaLR(self.optimizer, rules)
        return self.lr_scheduler

    def draw_layer(self) -> int:
        """The depth of this step: uniform, but for `last_layer_share`, and by weight when settled layers are to be drawn
        less often."""
        count = self.model.config.num_gates
        if self.chosen.last_layer_share and torch.rand(()) < self.chosen.last_layer_share:
            return count - 1
        weight = torch.ones(count)
        if self.chosen.weighted_layer_distribution:
            accuracy, l0 = self.model.running.cpu()
            weight[(accuracy > SETTLED_ACCURACY) & (l0 < SETTLED_L0)] = SETTLED_WEIGHT
        return int(torch.multinomial(weight, 1))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        layer = self.draw_layer()
        # A cell or an object part fills several patches. Gates that decide for one patch at a time can get stuck at dropping
        # the same part of each; deciding for squares of patches first, then for single ones, they do not (measured on digits_QA).
        blocks = self.state.global_step < self.chosen.block_share * self.state.max_steps
        block, shared = self.chosen.block_size if blocks else 1, self.chosen.shared_noise
        output: DiffMaskOutput = model(inputs["pixel_values"], layer=layer, block=block, shared_noise=shared)
        self.recent.append(torch.stack([output.kl.mean(), output.l0.mean()]))
        with torch.no_grad():  # running averages over about 10 visits of the layer
            seen = torch.stack([output.unchanged.mean(), output.l0.mean()])
            self.model.running[:, layer] += 0.1 * (seen - self.model.running[:, layer])
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.recent and "loss" in logs:
            kl, l0 = torch.stack(self.recent).mean(0).tolist()
            alpha = self.model.multiplier.value
            logs |= {"train_kl": kl, "train_l0": l0, "alpha_mean": alpha.mean().item(), "alpha_last": alpha[-1].item()}
            self.recent.clear()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        metrics = evaluate_diffmask(self.model, eval_dataset or self.eval_dataset, self.args.per_device_eval_batch_size)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class ClampMultiplier(TrainerCallback):
    """Keeps the multipliers in their interval after every optimizer step."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        getattr(model, "module", model).multiplier.clamp_()


@dataclass(frozen=True)
class MaskRecord:
    """The shown masks of B pictures at one training step.

    mask: [B, rows, cols].  kl: [B] in nats.  kept: [B].  alpha: the last gate's multiplier.  eps: the KL allowed.
    """

    step: int
    mask: torch.Tensor
    kl: torch.Tensor
    kept: torch.Tensor
    alpha: float
    eps: float


class MaskRecorder(TrainerCallback):
    """Keeps the shown masks of a few pictures [B, C, H, W] before the first step, after every `every` steps and after the
    last: `records`, for `replay_explorer`. A loop of your own calls `record`. Nothing random is drawn: the training stays
    the same. After every record each of `followers` is called, without arguments."""

    def __init__(self, pixel_values: torch.Tensor, every: int = 20):
        self.pixel_values, self.every, self.records, self.followers = pixel_values, every, [], []

    def record(self, diffmask: VisionDiffMask, step: int) -> None:
        """Explain the pictures with the present gates and remember what they show."""
        shown = diffmask.explain(self.pixel_values.to(diffmask.device))
        alpha, eps = diffmask.multiplier.value[-1].item(), diffmask.config.eps
        self.records.append(MaskRecord(step, shown.mask.cpu(), shown.kl.cpu(), shown.kept.cpu(), alpha, eps))
        for follow in self.followers:
            follow()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.records = []
        self.record(model, state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self.record(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.records[-1].step != state.global_step:
            self.record(model, state.global_step)


def train_diffmask(
    diffmask: VisionDiffMask,
    train_data: Pictures,
    eval_data: Pictures,
    chosen: DiffMaskSettings,
    output_dir: str | Path,
    resume: str | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> dict[str, float]:
    """Train gates, placeholder and multipliers in place and save them to `output_dir`.

    Returns `evaluate_diffmask` on `eval_data`, with an `eval_` before every name.
    """
    chosen.validate()
    check_dataset(train_data, "train_diffmask", Pictures), check_dataset(eval_data, "train_diffmask")
    output_dir, home = Path(output_dir), diffmask.device
    if not diffmask.config.base_name_or_path:  # a base that was never saved goes with the run
        save_classifier(diffmask.base, output_dir / "base")
        diffmask.config.base_name_or_path = str(output_dir / "base")
    # weights do not depend on what ran before in this process
    set_seed(chosen.seed)
    arguments = training_arguments(
        chosen, output_dir, "steps", max_grad_norm=0.0, remove_unused_columns=False, ddp_find_unused_parameters=True
    )
    watching = [ClampMultiplier(), *callbacks]
    trainer = DiffMaskTrainer(
        diffmask, arguments, chosen, train_dataset=train_data, eval_dataset=eval_data, callbacks=watching
    )
    with plain_attention(diffmask.base, chosen.bf16):
        run_to_the_end(trainer, resume)
    trainer.save_model()
    diffmask.eval()
    metrics = trainer.evaluate()
    diffmask.to(home)  # and its base with it: see `train_classifier`
    return metrics


@torch.no_grad()
def evaluate_diffmask(diffmask: VisionDiffMask, data: Pictures, batch_size: int = 128) -> dict[str, float]:
    """Facts about the *shown* masks over a dataset.

    `kl`: mean in nats. `feasible`: share of images with KL ≤ ε. `unchanged`: share whose predicted class stays.
    `kept`: mean of the mask. Where the truth is known, `metrics.truth_report` says more.
    """
    check_dataset(data, "evaluate_diffmask")
    parts = []
    for batch in DataLoader(data, batch_size):
        shown = diffmask.explain(batch["pixel_values"].to(diffmask.device))
        unchanged = shown.masked_logits.argmax(-1) == shown.logits.argmax(-1)
        parts.append(torch.stack([shown.kl, (shown.kl <= diffmask.config.eps).float(), unchanged.float(), shown.kept]))
    return dict(zip(("kl", "feasible", "unchanged", "kept"), torch.cat(parts, 1).mean(1).tolist(), strict=True))
