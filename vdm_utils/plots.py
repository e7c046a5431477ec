"""Every figure, in one language: masks in cividis on 0..1, the same widths, every panel titled."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from transformers import TrainerCallback

from vdm_utils.attributions import attention_rollout, grad_cam
from vdm_utils.checkpoints import write_whole
from vdm_utils.data import Pictures
from vdm_utils.diffmask import Explanation, VisionDiffMask
from vdm_utils.faithfulness import bootstrap

MASK_COLOURS = "cividis"  # readable in grey and with colour-blind eyes
PANEL = 1.6  # inches per small picture
WIDTH = 7.2  # inches of a full-width figure
# of several curves, in the colours of Okabe and Ito, which colour-blind eyes tell apart; the dashes do in grey
LINES = (("black", "-"), ("#0072B2", "--"), ("#D55E00", "-."), ("#009E73", ":"), ("0.55", "-"))


def to_image(pixel_values: torch.Tensor) -> np.ndarray:
    """A normalised picture [C, H, W] in −1..1 as an array [H, W, 3] in 0..1."""
    image = (pixel_values.detach().cpu().float() * 0.5 + 0.5).clamp(0, 1)
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy()


def masked_image(pixel_values: torch.Tensor, pixel_mask: torch.Tensor, grey: float = 0.0) -> torch.Tensor:
    """Pictures [B, C, H, W] with dropped pixels faded to `grey` (in −1..1) by the mask [B, H, W]."""
    mask = pixel_mask[:, None]
    return pixel_values * mask + grey * (1 - mask)


def own_range(scores: torch.Tensor) -> torch.Tensor:
    """Maps [..., rows, cols], each stretched from its smallest and largest value to 0..1; a flat map becomes 0."""
    low, high = scores.amin((-2, -1), keepdim=True), scores.amax((-2, -1), keepdim=True)
    return (scores - low) / (high - low).clamp(min=1e-12)


def show_image(axes, pixel_values: torch.Tensor, title: str = "") -> None:
    """One picture [C, H, W] without ticks."""
    axes.imshow(to_image(pixel_values), interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.set_xticks([]), axes.set_yticks([])


def show_mask(axes, mask: torch.Tensor, title: str = "", **how):
    """One mask [rows, cols] in 0..1; returns the picture, for a colour bar. `how`: more options of `imshow`."""
    pixels = mask.detach().cpu().numpy()
    picture = axes.imshow(pixels, cmap=MASK_COLOURS, vmin=0, vmax=1, interpolation="nearest", **how)
    axes.set_title(title, fontsize=8)
    axes.set_xticks([]), axes.set_yticks([])
    return picture


def show_overlay(axes, pixel_values: torch.Tensor, mask: torch.Tensor, title: str = "") -> None:
    """One mask [rows, cols] in its colours, half transparent, over a picture [C, H, W] in grey."""
    grey = to_image(pixel_values).mean(-1)
    height, width = grey.shape
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    corners = (-0.5, width - 0.5, height - 0.5, -0.5)  # of the picture, whose pixels are centred at whole numbers
    show_mask(axes, mask, title, alpha=0.5, extent=corners)


def fade(pixel_values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A picture [C, H, W] faded to grey where the mask [rows, cols] drops its patches."""
    pixel_mask = F.interpolate(mask[None, None].float(), size=pixel_values.shape[-2:], mode="nearest")[0]
    return masked_image(pixel_values[None], pixel_mask)[0]


def captions(shown: Explanation, index: int, id2label: dict[int, str]) -> tuple[str, str, str]:
    """Of one picture: its class, "kept … %, KL …" and the class of the masked picture, marked where it changed."""
    before, after = shown.logits[index].argmax().item(), shown.masked_logits[index].argmax().item()
    cost = f"kept {shown.kept[index].item():.0%}, KL {abs(shown.kl[index].item()):.3f}"
    return id2label[before], cost, id2label[after] + ("" if after == before else " (changed)")


def show_course(
    axes,
    x: Sequence[float],
    values: Sequence[float],
    now: int,
    colour: str,
    title: str,
    allowed: Sequence[float] = (),
    top: float | None = None,
) -> None:
    """A curve that is in colour as far as its point number `now`, which is marked, and grey from there on.

    `allowed`: a dashed curve of the same length. The y axis goes from 0 to `top`, the largest value by default. The x
    axis has no ticks: they cost more time than all the rest, so only the lowest of several panels should get some.
    """
    top = top or max(*values, *allowed, 1e-9)
    axes.plot(x, values, color="0.8")
    axes.plot(x[: now + 1], values[: now + 1], color=colour)
    axes.plot(x[now], values[now], "o", color=colour, markersize=5)
    if allowed:
        axes.plot(x, allowed, color="0.5", linestyle="--", linewidth=0.8)
    axes.set(ylim=(-0.06 * top, 1.15 * top), xticks=[])
    axes.set_yticks([0, top], ["0", f"{top:.2g}"], fontsize=7)
    axes.set_title(title, fontsize=8, y=1.0)


def show_curves(axes, x: Sequence[float], curves: Mapping[str, torch.Tensor]) -> None:
    """The means over pictures of up to five methods' curves [B, S] at `x` [S], in bands of 95 % bootstrap intervals."""
    for (name, values), (colour, line) in zip(curves.items(), LINES[: len(curves)], strict=True):
        mean, low, high = zip(*map(bootstrap, values.unbind(1)))
        axes.plot(x, mean, color=colour, linestyle=line, linewidth=1.4, label=name)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def picture_grid(
    rows: dict[str, Sequence[torch.Tensor]],
    titles: dict[str, Sequence[str]] | None = None,
    limit: int = 8,
    label: str = "0 dropped, 1 kept",
    cells: int = 1,
) -> Figure:
    """A grid of panels, one row per name; a tensor [C, H, W] is drawn as a picture, [rows, cols] as a mask.

    `titles` gives the panels of a row their titles. Masks share one colour bar, which `label` names. Pictures and masks that
    are grids of `cells` × `cells` get the borders of their cells drawn.
    """
    titles = titles or {}
    columns = min(limit, max(len(panels) for panels in rows.values()))
    size = (columns * PANEL + 0.9, len(rows) * (PANEL + 0.28))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    bar = None
    for line, (name, panels) in zip(axes, rows.items(), strict=True):
        for column, axis in enumerate(line):
            if column >= len(panels):
                axis.axis("off")
                continue
            text = titles.get(name, [""] * columns)[column]
            if panels[column].dim() == 2:
                bar = show_mask(axis, panels[column], text)
            else:
                show_image(axis, panels[column], text)
            for border in (n / cells for n in range(1, cells)):
                for ends in (((border, border), (0, 1)), ((0, 1), (border, border))):
                    axis.plot(*ends, color="tab:orange", linewidth=0.8, transform=axis.transAxes)
        line[0].set_ylabel(name, fontsize=9)
    if bar is not None:
        side = figure.colorbar(bar, ax=axes, shrink=0.7, ticks=[0, 0.5, 1])
        side.set_label(label, fontsize=8)
    return figure


def explanation_grid(
    pixel_values: torch.Tensor,
    shown: Explanation,
    id2label: dict[int, str],
    truth: torch.Tensor | None = None,
    others: dict[str, torch.Tensor] | None = None,
    cells: int = 1,
) -> Figure:
    """Input, mask (with kept % and KL), masked input (with the class before → after), and the truth when it is known.

    `others`: scores [B, rows, cols] of other methods by name; each picture's are scaled to 0..1, as they have no unit.
    `cells`: as in `picture_grid`.
    """
    pixel_mask = shown.pixel_mask(*pixel_values.shape[-2:])
    rows = {"input": pixel_values, "mask": shown.mask, "masked input": masked_image(pixel_values, pixel_mask)}
    titles = dict(zip(rows, zip(*(captions(shown, i, id2label) for i in range(len(pixel_values))))))
    rows |= {name: own_range(scores) for name, scores in (others or {}).items()}
    if truth is not None:
        rows["truth"] = truth
    label = "P(z ≠ 0): 0 dropped, 1 kept" + ("; other methods: scaled to 0…1" if others else "")
    return picture_grid(rows, titles, limit=len(pixel_values), label=label, cells=cells)


def to_png(figure: Figure, dpi: int = 100) -> bytes:
    """A figure as PNG bytes; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()


def explained_beside_others(
    diffmask: VisionDiffMask, batch: dict[str, torch.Tensor], shown: Explanation, id2label: dict[int, str]
) -> Figure:
    """`explanation_grid` of a batch, with Grad-CAM and attention rollout of the same pictures underneath."""
    pictures = batch["pixel_values"].to(diffmask.device)
    others = {"Grad-CAM": grad_cam, "rollout": attention_rollout}
    scores = {name: method(diffmask.base, pictures) for name, method in others.items()}
    return explanation_grid(pictures, shown, id2label, batch.get("truth"), scores)


def send_to_trackers(trackers: Sequence[str], file: Path, step: int) -> None:
    """Show a PNG file in the trackers that Trainer reports to; those without pictures (a CSV) are passed over."""
    if "tensorboard" in trackers:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(file.parent / "runs" / "samples")) as writer:
            writer.add_image(file.stem.split("-")[0], plt.imread(file)[..., :3], step, dataformats="HWC")
    for name in ("wandb", "trackio"):
        if name in trackers:
            tracker = importlib.import_module(name)
            tracker.log({"samples": tracker.Image(str(file))}, step=step)


class SampleImages(TrainerCallback):
    """Draws the first `count` pictures of a dataset, explained, at every evaluation: `samples-<step>.png`."""

    def __init__(self, data: Pictures, count: int):
        self.data, self.batch = data, data.batch(range(min(count, len(data))))

    def on_evaluate(self, args, state, control, model: VisionDiffMask, **kwargs):
        file = Path(args.output_dir, f"samples-{state.global_step}.png")
        shown = model.explain(self.batch["pixel_values"].to(model.device))
        write_whole(file, to_png(explained_beside_others(model, self.batch, shown, self.data.id2label)))
        send_to_trackers(args.report_to, file, state.global_step)
