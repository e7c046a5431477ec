"""Every ipywidget: controls above a picture that follows them.

Drawing is a plain function `state -> PNG bytes`; a widget only calls it. Everything used here is shared by ipywidgets 7
and 8, and a PNG pushed into `Image.value` looks the same in JupyterLab, Colab and Voilà.
"""

from __future__ import annotations

import html
from collections.abc import Callable

import ipywidgets
import torch
from matplotlib.figure import Figure

from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.gates import HardConcrete, hard_concrete_sample
from vdm_utils.plots import WIDTH, masked_image, show_image, show_mask, to_png

NOISE = torch.rand(20_000, generator=torch.Generator().manual_seed(0))  # the same for every state: only sliders move it
BINS = 40


class Explorer(ipywidgets.VBox):
    """`controls` (name → widget) above `picture`, which shows `draw(**{name: value})` and follows every change.

    What goes wrong while drawing is shown in `message`: ipywidgets would swallow an exception raised in a callback.
    """

    def __init__(self, draw: Callable[..., bytes], controls: dict[str, ipywidgets.Widget]):
        super().__init__()
        self.draw, self.controls = draw, controls
        own_size = ipywidgets.Layout(align_self="flex-start", max_width="100%")  # a box would stretch it, and blur it
        self.message, self.picture = ipywidgets.HTML(), ipywidgets.Image(format="png", layout=own_size)
        self.children = (*controls.values(), self.message, self.picture)
        for control in controls.values():
            control.observe(self.redraw, names="value")
        self.redraw()

    def redraw(self, change: object = None) -> None:
        """Draw the present state; after a failure the last good picture stays and the message says what happened."""
        try:
            self.picture.value = self.draw(**{name: control.value for name, control in self.controls.items()})
            self.message.value = ""
        except Exception as problem:  # whatever it is, the reader has to see it
            self.message.value = f"<pre>{html.escape(f'{type(problem).__name__}: {problem}')}</pre>"

    def __repr__(self) -> str:
        return f"Explorer({', '.join(self.controls)}): run this cell to move its controls"


def _slider(kind: type, name: str, value: float, low: float, high: float, step: float) -> ipywidgets.Widget:
    wide = {"style": {"description_width": "90px"}, "layout": ipywidgets.Layout(width="480px")}
    return kind(value=value, min=low, max=high, step=step, description=name, **wide)


def draw_hard_concrete(temperature: float, log_alpha: float, low: float, high: float) -> bytes:
    """Samples of z (share per bin, the masses at 0 and 1 as bars of their own) and its CDF, as PNG bytes."""
    gate = HardConcrete(torch.tensor(float(log_alpha), dtype=torch.float64), temperature, low, high)
    z = hard_concrete_sample(gate.log_alpha, NOISE.double(), temperature, low, high)
    nonzero, one = gate.prob_nonzero.item(), gate.prob_one.item()
    inside = z[(z > 0) & ((z < 1) | (high == 1))]  # with high = 1 a sample gets to 1 by rounding only
    share = torch.histc(inside, BINS, 0, 1) / len(z)
    t = torch.linspace(0, 1, 400, dtype=torch.float64)[1:-1]
    cdf = torch.sigmoid(temperature * torch.logit((t - low) / (high - low)) - gate.log_alpha)  # P(z <= t)

    figure = Figure(figsize=(WIDTH, 2.9))
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.17, top=0.77, wspace=0.22)
    figure.suptitle(f"P(z ≠ 0) = {nonzero:.3f}    P(z = 1) = {one:.3f}    E[z] = {gate.mean.item():.3f}", fontsize=11)
    left.stairs(share.tolist(), [i / BINS for i in range(BINS + 1)], fill=True, color="0.6", label="strictly between")
    left.bar([-0.03], [1 - nonzero], 0.04, color="#00204d", label="exactly 0")
    left.bar([1.03], [one], 0.04, color="#d4b83f", label="exactly 1")
    left.legend(fontsize=7, loc="upper center", frameon=False)
    right.plot([-0.08, 0, *t.tolist(), 1, 1, 1.08], [0, 0, *cdf.tolist(), 1 - one, 1, 1], color="black")
    names = ((left, f"{len(z):,} samples: share per bin", "z"), (right, "CDF: P(z ≤ t), closed form", "t"))
    for axes, title, variable in names:
        axes.set_title(title, fontsize=9, y=1.03)  # a given y spares matplotlib a search that costs a third of the time
        axes.set(xlabel=variable, xlim=(-0.08, 1.08), ylim=(0, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    return to_png(figure)


def hard_concrete_explorer() -> Explorer:
    """Sliders for the temperature, log_alpha and the stretch (low, high) of one hard concrete gate."""
    floats = ipywidgets.FloatSlider
    controls = {
        "temperature": _slider(floats, "temperature", 0.2, 0.05, 2.0, 0.05),
        "log_alpha": _slider(floats, "log_alpha", 0.0, -8.0, 8.0, 0.25),
        "low": _slider(floats, "low", -0.2, -1.0, -0.05, 0.05),
        "high": _slider(floats, "high", 1.0, 1.0, 2.0, 0.05),
    }
    return Explorer(draw_hard_concrete, controls)


def draw_mask_state(
    diffmask: VisionDiffMask,
    pixel_values: torch.Tensor,
    index: int,
    layer: int,
    aggregated: bool,
    id2label: dict[int, str],
) -> bytes:
    """Input, mask and masked input of image `index` of [B, C, H, W], from the votes up to `layer` (or its vote alone)."""
    chosen = pixel_values[index : index + 1].to(diffmask.device)
    shown = diffmask.explain(chosen, layer=layer, aggregated=aggregated)
    before, after = shown.logits.argmax(-1).item(), shown.masked_logits.argmax(-1).item()
    faded = masked_image(chosen, shown.pixel_mask(*chosen.shape[-2:]))

    figure = Figure(figsize=(WIDTH, 2.7))
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.02, right=0.9, bottom=0.03, top=0.85, wspace=0.08)
    show_image(panels[0], chosen[0], f"input: {id2label[before]}")
    bar = show_mask(panels[1], shown.mask[0], f"mask: kept {shown.kept.item():.0%}, KL {shown.kl.item():.3f}")
    show_image(panels[2], faded[0], f"masked input: {id2label[after]}" + ("" if after == before else " (changed)"))
    side = figure.add_axes((0.915, 0.1, 0.015, 0.68))
    figure.colorbar(bar, cax=side, ticks=[0, 0.5, 1]).set_label("P(z ≠ 0)", fontsize=8)
    return to_png(figure)


def mask_explorer(diffmask: VisionDiffMask, pixel_values: torch.Tensor, id2label: dict[int, str]) -> Explorer:
    """Which image of [B, C, H, W], how deep, and the votes so far multiplied or one gate's vote alone."""
    images = [(f"{i + 1} of {len(pixel_values)}", i) for i in range(len(pixel_values))]
    last = diffmask.config.num_gates - 1
    controls = {
        "index": ipywidgets.Dropdown(options=images, value=0, description="image"),
        "layer": _slider(ipywidgets.IntSlider, "layer", last, 0, last, 1),
        "aggregated": ipywidgets.ToggleButtons(options=[("all votes so far", True), ("this vote alone", False)]),
    }

    def draw(index: int, layer: int, aggregated: bool) -> bytes:
        return draw_mask_state(diffmask, pixel_values, index, layer, aggregated, id2label)

    return Explorer(draw, controls)
