"""Controls above a picture that follows them: a gate, a mask, and what happens when a patch is taken away.

Drawing is a plain function `state -> PNG bytes`; a widget only calls it. Everything used here is shared by ipywidgets 7
and 8, and a PNG pushed into `Image.value` looks the same in JupyterLab, Colab and Voilà.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import ipywidgets
import torch
import torch.nn.functional as F
import traitlets
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from vdm_utils.diffmask import Explanation, VisionDiffMask
from vdm_utils.gates import HardConcrete, hard_concrete_sample
from vdm_utils.objective import kl_divergence, mask_embeddings
from vdm_utils.plots import WIDTH, captions, fade, show_image, show_mask, show_overlay, to_image, to_png

NOISE = torch.rand(20_000, generator=torch.Generator().manual_seed(0))  # the same for every state: only sliders move it
BINS = 40


class Explorer(ipywidgets.VBox):
    """`controls` (name → widget) above `picture`, which shows `draw(**{name: value})` and follows every change.

    What goes wrong while drawing is shown in `message`: ipywidgets would swallow an exception raised in a callback.
    """

    def __init__(self, draw: Callable[..., bytes], controls: dict[str, ipywidgets.Widget]):
        super().__init__()
        self.draw, self.controls, self.drawn = draw, controls, None
        own_size = ipywidgets.Layout(align_self="flex-start", max_width="100%")  # a box would stretch it, and blur it
        self.message, self.picture = ipywidgets.HTML(), ipywidgets.Image(format="png", layout=own_size)
        self.children = (*controls.values(), self.message, self.picture)
        for control in controls.values():
            control.observe(self.redraw, names="value")
        self.redraw()

    def redraw(self, change: object = None) -> None:
        """Draw the present state; after a failure the last good picture stays and the message says what happened."""
        state = {name: control.value for name, control in self.controls.items()}
        if state == self.drawn:  # a control that moved another one has been answered already
            return
        self.drawn = None
        with self.telling():
            self.picture.value = self.draw(**state)
            self.message.value, self.drawn = "", state

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Show what goes wrong in the block, whatever it is: the reader has to see it."""
        try:
            yield
        except Exception as problem:
            self.message.value = f"<pre>{html.escape(f'{type(problem).__name__}: {problem}')}</pre>"

    def __repr__(self) -> str:
        return f"Explorer({', '.join(self.controls)}): run this cell to move its controls"


def slider(kind: type, name: str, value: float, low: float, high: float, step: float) -> ipywidgets.Widget:
    """A slider of ipywidgets, in the one size that all of them have here."""
    return kind(value=value, min=low, max=high, step=step, description=name, **_wide())


def named_slider(name: str, options: dict[str, object], value: object) -> ipywidgets.SelectionSlider:
    """A slider over values that have names (name → value)."""
    return ipywidgets.SelectionSlider(options=list(options.items()), value=value, description=name, **_wide())


def choice(options: dict[str, object]) -> ipywidgets.ToggleButtons:
    """A row of buttons (name → value) of which one is down; the first to begin with."""
    return ipywidgets.ToggleButtons(options=list(options.items()), style={"button_width": "190px"})


def _wide() -> dict:
    return {"style": {"description_width": "90px"}, "layout": ipywidgets.Layout(width="480px")}


def image_dropdown(count: int) -> ipywidgets.Dropdown:
    """Which of `count` pictures."""
    options = [(f"{i + 1} of {count}", i) for i in range(count)]
    return ipywidgets.Dropdown(options=options, value=0, description="image", **_wide())


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
        "temperature": slider(floats, "temperature", 0.2, 0.05, 2.0, 0.05),
        "log_alpha": slider(floats, "log_alpha", 0.0, -8.0, 8.0, 0.25),
        "low": slider(floats, "low", -0.2, -1.0, -0.05, 0.05),
        "high": slider(floats, "high", 1.0, 1.0, 2.0, 0.05),
    }
    return Explorer(draw_hard_concrete, controls)


@torch.no_grad()
def with_mask(
    diffmask: VisionDiffMask, pixel_values: torch.Tensor, shown: Explanation, mask: torch.Tensor
) -> Explanation:
    """`shown` with another mask [B, rows, cols]; `kept`, `kl` and `masked_logits` become those of that mask."""
    states = diffmask.view.encode(pixel_values)
    masked_logits = diffmask.masked_logits(pixel_values, states, mask)
    kl = kl_divergence(shown.logits.float(), masked_logits.float())
    return replace(shown, mask=mask, kept=mask.mean((1, 2)), masked_logits=masked_logits, kl=kl)


def mask_bar(figure: Figure, picture, place: tuple[float, float, float, float], label: str = "P(z ≠ 0)") -> None:
    """The colour bar of the masks at `place` (left, bottom, width, height, shares of the figure)."""
    bar = figure.colorbar(picture, cax=figure.add_axes(place), ticks=[0, 0.5, 1])
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def draw_mask_state(
    diffmask: VisionDiffMask,
    pixel_values: torch.Tensor,
    index: int,
    layer: int,
    aggregated: bool,
    id2label: dict[int, str],
    threshold: float = 0.0,
    overlay: bool = False,
) -> bytes:
    """Input, mask and masked input of image `index` of [B, C, H, W], from the votes up to `layer` (or its vote alone).

    `threshold`: patches with a mask below it are dropped and the others kept whole; 0 shows the soft mask. Kept, KL and
    class are of the mask that is shown. `overlay`: the mask over the input instead of the masked input.
    """
    chosen = pixel_values[index : index + 1].to(diffmask.device)
    shown = diffmask.explain(chosen, layer=layer, aggregated=aggregated, check=not threshold)
    if threshold:
        shown = with_mask(diffmask, chosen, shown, (shown.mask >= threshold).float())
    before, cost, after = captions(shown, 0, id2label)

    figure = Figure(figsize=(WIDTH, 2.7))
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.02, right=0.9, bottom=0.03, top=0.85, wspace=0.08)
    show_image(panels[0], chosen[0], f"input: {before}")
    bar = show_mask(panels[1], shown.mask[0], ("mask: " if not threshold else f"mask ≥ {threshold:.2f}: ") + cost)
    if overlay:
        show_overlay(panels[2], chosen[0], shown.mask[0], f"overlay; masked input: {after}")
    else:
        show_image(panels[2], fade(chosen[0], shown.mask[0]), f"masked input: {after}")
    mask_bar(figure, bar, (0.915, 0.1, 0.015, 0.68), "1 kept, 0 dropped" if threshold else "P(z ≠ 0)")
    return to_png(figure)


def mask_explorer(diffmask: VisionDiffMask, pixel_values: torch.Tensor, id2label: dict[int, str]) -> Explorer:
    """Which image of [B, C, H, W], how deep, the votes so far multiplied or one gate's vote alone, soft or cut."""
    last = diffmask.config.num_gates - 1
    cuts = {f"{cut / 20:.2f}": cut / 20 for cut in range(1, 20)}
    controls = {
        "index": image_dropdown(len(pixel_values)),
        "layer": slider(ipywidgets.IntSlider, "layer", last, 0, last, 1),
        "aggregated": choice({"all votes so far": True, "this vote alone": False}),
        "threshold": named_slider("threshold", {"none (soft)": 0.0} | cuts, 0.0),
        "overlay": choice({"masked input": False, "overlay": True}),
    }
    return Explorer(partial(draw_mask_state, diffmask, pixel_values, id2label=id2label), controls)


class PatchGrid(ipywidgets.GridBox):
    """A picture as a mosaic of buttons, one per patch: a click drops the patch, a second one brings it back.

    `value`: which patches are kept, a tuple of rows · cols booleans in reading order. `colours`: of the patches, "#rrggbb".
    """

    value, colours = traitlets.Tuple(), traitlets.Tuple()

    def __init__(self, rows: int, cols: int):
        side = f"{max(20, min(64, 200 // cols))}px"  # 14 × 14 buttons still fit beside a picture
        shape = ipywidgets.Layout(width=side, height=side, padding="0", margin="0", min_width="0")
        names = [f"row {i // cols + 1}, column {i % cols + 1}" for i in range(rows * cols)]
        buttons = [ipywidgets.Button(tooltip=name, layout=shape) for name in names]
        columns = {"grid_template_columns": f"repeat({cols}, {side})", "grid_gap": "1px"}
        # its own size, whatever stands beside it; a box would squeeze the columns and stretch the rows
        own = ipywidgets.Layout(**columns, flex="0 0 auto", align_self="flex-start", margin="8px", overflow="visible")
        super().__init__(buttons, layout=own)
        for place, button in enumerate(buttons):
            button.on_click(partial(self.toggle, place))
        self.value = (True,) * len(buttons)

    def toggle(self, place: int, button: ipywidgets.Button | None = None) -> None:
        """Drop patch `place`, or bring it back."""
        self.value = tuple(kept != (i == place) for i, kept in enumerate(self.value))

    @traitlets.observe("value", "colours")
    def paint(self, change: object = None) -> None:
        """Every button in the colour of its patch, or grey with a cross where it is dropped."""
        for button, kept, colour in zip(self.children, self.value, self.colours):
            button.style.button_color = colour if kept else "#808080"
            button.description = " " if kept else "×"  # "" would leave the old text on the page


@torch.no_grad()
def draw_what_if(
    diffmask: VisionDiffMask,
    pixel_values: torch.Tensor,
    index: int,
    zeros: bool,
    kept: tuple[bool, ...],
    id2label: dict[int, str],
) -> bytes:
    """Image `index` of [B, C, H, W] without the patches that are not `kept`, and its class probabilities before and after.

    Dropped patches are replaced by the DiffMask's placeholder, or by `zeros`. At most the ten likeliest classes.
    """
    chosen = pixel_values[index : index + 1].to(diffmask.device)
    states = diffmask.view.encode(chosen)
    mask = torch.tensor(kept, dtype=states.embeddings.dtype, device=chosen.device)[None]  # [1, N]
    blank = torch.zeros_like(states.embeddings[0, 0]) if zeros else diffmask.placeholder.to(mask.dtype)
    logits = diffmask.view.logits(chosen, mask_embeddings(states.embeddings, mask, blank))
    before, after = states.logits[0].float().softmax(-1).cpu(), logits[0].float().softmax(-1).cpu()
    kl = abs(kl_divergence(states.logits.float(), logits.float()).item())

    figure = Figure(figsize=(4.4, 2.6))
    left, right = figure.add_axes((0.01, 0.06, 0.43, 0.74)), figure.add_axes((0.66, 0.13, 0.31, 0.67))
    faded = fade(chosen[0], mask[0].unflatten(0, states.grid))
    show_image(left, faded, f"kept {sum(kept)} of {len(kept)}, KL {kl:.3f}")
    was, now = before.argmax().item(), after.argmax().item()
    changed = "" if was == now else " (changed)"
    title = f"{id2label[was]} {before[was]:.2f}, now {id2label[now]} {after[now]:.2f}{changed}"
    right.set_title(title, fontsize=8, y=1.0, x=1, ha="right")
    classes = (before + after).topk(min(10, len(before))).indices.sort().values.tolist()
    places = range(len(classes))
    right.barh(places, before[classes].tolist(), 0.8, color="0.85", label="all patches")
    right.barh(places, after[classes].tolist(), 0.4, color="#00204d", label="kept patches only")
    right.set(xlim=(0, 1), xticks=[0, 0.5, 1], ylim=(len(classes) - 0.5, -0.5))
    right.set_yticks(places, [id2label[c][:16] for c in classes], fontsize=7)
    right.tick_params(labelsize=7)
    figure.legend(fontsize=7, ncols=2, frameon=False, loc="upper right")
    return to_png(figure)


def what_if_explorer(diffmask: VisionDiffMask, pixel_values: torch.Tensor, id2label: dict[int, str]) -> Explorer:
    """Click away patches of one of the images [B, C, H, W] and see what the classifier says to the rest.

    `buttons`: put every patch back, or drop what the DiffMask drops (mask < 0.5).
    """
    grid = diffmask.view.grid
    patches = PatchGrid(*grid)
    everything = patches.value
    blanks = ({} if diffmask.placeholder is None else {"replaced by placeholder": False}) | {"replaced by zeros": True}
    controls = {"index": image_dropdown(len(pixel_values)), "zeros": choice(blanks), "kept": patches}

    def show_picture(change: object = None) -> None:
        colours = to_image(F.interpolate(pixel_values[[controls["index"].value]], size=grid, mode="area")[0])
        patches.value, patches.colours = everything, tuple(map(to_hex, colours.reshape(-1, 3)))

    def take_mask(button: ipywidgets.Button) -> None:
        index = controls["index"].value
        with explorer.telling():
            shown = diffmask.explain(pixel_values[index : index + 1].to(diffmask.device), check=False)
            patches.value = tuple((shown.mask >= 0.5).flatten().tolist())

    show_picture()
    controls["index"].observe(show_picture, names="value")  # before the explorer's own: it draws the new mosaic, once
    explorer = Explorer(partial(draw_what_if, diffmask, pixel_values, id2label=id2label), controls)
    texts, own_width = ("put all back", "drop what the mask drops"), ipywidgets.Layout(width="auto")
    put_back, take = (ipywidgets.Button(description=text, layout=own_width) for text in texts)
    put_back.on_click(lambda button: setattr(patches, "value", everything))
    take.on_click(take_mask)
    explorer.buttons = (put_back, take)
    beside = ipywidgets.HBox([patches, explorer.picture], layout=ipywidgets.Layout(flex_flow="row wrap"))
    above = (controls["index"], controls["zeros"], ipywidgets.HBox(explorer.buttons), explorer.message)
    explorer.children = (*above, beside)
    return explorer
