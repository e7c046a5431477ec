"""Explorers of results that are there already: a training, several methods, several ε; and one without a kernel."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
from functools import partial

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vdm_utils.diffmask import Explanation, VisionDiffMask
from vdm_utils.errors import VDMError
from vdm_utils.explorers import Explorer, captions, choice, image_dropdown, mask_bar, named_slider, slider
from vdm_utils.faithfulness import top_fractions
from vdm_utils.metrics import share_below
from vdm_utils.plots import MASK_COLOURS, WIDTH, fade, own_range, show_course, show_image, show_mask, to_image, to_png
from vdm_utils.training import MaskRecorder

COPIES = itertools.count(1)  # of flip books shown by this process: two on one page must not answer each other's buttons


def draw_replay(recorder: MaskRecorder, index: int, moment: int) -> bytes:
    """Picture `index` and its mask at record `moment` of a training, beside the course of α, KL and L0 up to there.

    KL and L0 are means over the recorded pictures; what is still to come is grey.
    """
    records, now = recorder.records, recorder.records[moment]
    figure = Figure(figsize=(WIDTH, 3.2))
    panels = [figure.add_axes((left, 0.12, 0.25, 0.68)) for left in (0.01, 0.275)]
    chosen = recorder.pixel_values[index].cpu()
    bar = show_mask(
        panels[0], now.mask[index], f"mask: kept {now.kept[index].item():.0%}, KL {now.kl[index].item():.3f}"
    )
    show_image(panels[1], fade(chosen, now.mask[index]), "masked input")
    mask_bar(figure, bar, (0.54, 0.18, 0.012, 0.56))
    figure.suptitle(f"step {now.step} of {records[-1].step}", fontsize=11, x=0.27)

    alpha = [record.alpha for record in records]
    kl = [record.kl.mean().item() for record in records]
    l0 = [record.kept.mean().item() for record in records]
    steps, allowed = [record.step for record in records], [now.eps] * len(records)
    upper, middle, lower = (figure.add_axes((0.67, bottom, 0.31, 0.19)) for bottom in (0.73, 0.43, 0.13))
    show_course(upper, steps, alpha, moment, "#00204d", f"α of the last gate: {alpha[moment]:.1f}")
    show_course(middle, steps, kl, moment, "#b0413e", f"mean KL: {kl[moment]:.3f} nats (dashed: ε)", allowed)
    show_course(lower, steps, l0, moment, "#7a6a00", f"mean L0, fraction kept: {l0[moment]:.0%}", top=1)
    lower.set_xticks([steps[0], steps[-1]], [str(steps[0]), str(steps[-1])], fontsize=7)
    lower.set_xlabel("step", fontsize=8, labelpad=-6)
    return to_png(figure)


def replay_explorer(recorder: MaskRecorder) -> Explorer:
    """A slider over the steps at which a `MaskRecorder` looked on during a training, and which of its pictures.

    Shown before the training, after one `recorder.record(diffmask, 0)`, it follows it: every new record is drawn.
    """
    if not recorder.records:
        raise VDMError("nothing was recorded", where="replay_explorer", expected="a MaskRecorder that was part of a training",
                       got="no records", fix="give it to train_diffmask: callbacks=(recorder,)")  # fmt: skip

    def moments() -> dict[str, int]:
        return {str(record.step): i for i, record in enumerate(recorder.records)}

    moment = named_slider("step", moments(), 0)
    explorer = Explorer(
        partial(draw_replay, recorder), {"index": image_dropdown(len(recorder.pixel_values)), "moment": moment}
    )

    def follow() -> None:
        moment.unobserve(explorer.redraw, names="value")  # new options move a slider to the first of them
        moment.options = tuple(moments().items())
        moment.value = len(recorder.records) - 1
        moment.observe(explorer.redraw, names="value")
        explorer.drawn = None  # the same place may hold a record of another training
        explorer.redraw()

    recorder.followers.append(follow)
    return explorer


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """Scores [rows, cols] as the share of patches that score lower, 0..1; equal scores count half."""
    return share_below(scores[None])[0].view_as(scores).float()


def top_share(scores: torch.Tensor, percent: float) -> torch.Tensor:
    """1 for the highest `percent` of the scores [rows, cols] (at least one patch), else 0; ties in reading order."""
    return top_fractions(scores[None], [percent / 100])[0, 0].float()


SCALES = {"ranks": ranks, "own range 0…1": own_range}


def draw_comparison(
    pixel_values: torch.Tensor, scores: dict[str, torch.Tensor], index: int, scale: str, percent: int
) -> bytes:
    """Picture `index` of [B, C, H, W] and, per method, its map of `scores` [B, rows, cols] and its top patches alone.

    `scale`: a name of SCALES, how every map is brought to 0..1. `percent`: how many of the patches are kept.
    """
    image, (height, width) = pixel_values[index].cpu(), pixel_values.shape[-2:]
    cells = [("input", [to_image(image)])]
    for name, every in scores.items():
        own = every[index].detach().cpu()
        cells.append((name, [SCALES[scale](own).numpy(), to_image(fade(image, top_share(own, percent)))]))

    side, gap, columns = 1.22, 0.08, 6  # inches, and the cells of a line
    tall = side * height / width
    line_height = 2 * tall + gap + 0.3
    wide, high = min(len(cells), columns) * (side + gap) + 0.75, -(-len(cells) // columns) * line_height
    figure = Figure(figsize=(wide, high))
    # one axes for all panels, in inches: matplotlib needs 7 ms to make each, too long to follow a hand with many methods
    canvas = figure.add_axes((0, 0, 1, 1))
    canvas.axis("off")
    for number, (title, pictures) in enumerate(cells):
        line, column = divmod(number, columns)
        left, top = gap + column * (side + gap), high - 0.25 - line * line_height
        canvas.text(left + side / 2, top + 0.06, title, fontsize=8, ha="center")
        for row, pixels in enumerate(pictures):
            bottom = top - tall - row * (tall + gap)
            corners = (left, left + side, bottom, bottom + tall)
            canvas.imshow(pixels, MASK_COLOURS, vmin=0, vmax=1, extent=corners, interpolation="nearest")
            canvas.add_patch(Rectangle((left, bottom), side, tall, fill=False, linewidth=0.8))
    kept = f"top {percent} %\nof each map"
    canvas.text(gap + side / 2, high - 0.25 - 1.5 * tall - gap, kept, fontsize=9, ha="center", va="center")
    canvas.set(xlim=(0, wide), ylim=(0, high), aspect="auto")
    first_map = canvas.images[1]
    mask_bar(figure, first_map, (1 - 0.6 / wide, (high - 0.25 - tall) / high, 0.1 / wide, tall / high), scale)
    return to_png(figure)


def comparison_explorer(pixel_values: torch.Tensor, scores: dict[str, torch.Tensor]) -> Explorer:
    """Maps of several methods side by side: {name: scores [B, rows, cols]} of the images [B, C, H, W]."""
    for name, every in scores.items():
        if every.dim() != 3 or len(every) != len(pixel_values):
            raise VDMError(f"the scores of {name!r} do not belong to these images", where="comparison_explorer",
                           expected=f"[{len(pixel_values)}, rows, cols]", got=list(every.shape),
                           fix="compute them on the same batch")  # fmt: skip
    controls = {
        "index": image_dropdown(len(pixel_values)),
        "scale": choice({name: name for name in SCALES}),
        "percent": slider(ipywidgets.IntSlider, "top %", 25, 5, 100, 5),
    }
    return Explorer(partial(draw_comparison, pixel_values, scores), controls)


def draw_epsilon(
    shown: dict[float, Explanation], pixel_values: torch.Tensor, index: int, eps: float, id2label: dict[int, str]
) -> bytes:
    """The final mask of image `index` that was learned with KL ≤ `eps` allowed, and what each ε keeps and costs.

    shown: ε → what the DiffMask trained with it says about all images [B, C, H, W].
    """
    now = shown[eps]
    before, cost, after = captions(now, index, id2label)
    figure = Figure(figsize=(WIDTH, 2.7))
    panels = [figure.add_axes((left, 0.05, 0.24, 0.75)) for left in (0.01, 0.265)]
    bar = show_mask(panels[0], now.mask[index], f"mask: {cost}")
    show_image(panels[1], fade(pixel_values[index].cpu(), now.mask[index].cpu()), f"masked input: {after}")
    mask_bar(figure, bar, (0.515, 0.12, 0.012, 0.6))
    figure.suptitle(f"ε = {eps:g}    input: {before}", fontsize=11, x=0.26)

    trained, place, x = list(shown), list(shown).index(eps), list(range(len(shown)))
    kept, kl = ([getattr(each, name)[index].item() for each in shown.values()] for name in ("kept", "kl"))
    upper, lower = (figure.add_axes((0.66, bottom, 0.32, 0.26)) for bottom in (0.6, 0.17))
    show_course(upper, x, kept, place, "#7a6a00", f"fraction kept: {kept[place]:.0%}", top=1)
    show_course(lower, x, kl, place, "#b0413e", f"KL: {kl[place]:.3f} nats (dashed: ε)", trained)
    lower.set_xticks(x, [f"{e:g}" for e in trained], fontsize=7)
    lower.set_xlabel("ε", fontsize=8)
    return to_png(figure)


def epsilon_explorer(
    diffmasks: dict[float, VisionDiffMask], pixel_values: torch.Tensor, id2label: dict[int, str]
) -> Explorer:
    """A slider over the ε of DiffMasks {ε: one trained with it} of one classifier, on images [B, C, H, W].

    All images are explained once, before the first picture.
    """
    for eps, diffmask in diffmasks.items():
        if diffmask.config.eps != eps:
            raise VDMError("a DiffMask stands under another ε than its own", where="epsilon_explorer",
                           expected=diffmask.config.eps, got=eps, fix="use {d.config.eps: d for d in diffmasks}")  # fmt: skip
    shown = {eps: diffmasks[eps].explain(pixel_values.to(diffmasks[eps].device)) for eps in sorted(diffmasks)}
    controls = {
        "index": image_dropdown(len(pixel_values)),
        "eps": named_slider("ε", {f"{eps:g}": eps for eps in shown}, min(shown)),
    }
    return Explorer(partial(draw_epsilon, shown, pixel_values, id2label=id2label), controls)


def data_url(pixels: np.ndarray, **colours) -> str:
    """An array [H, W] or [H, W, 3 or 4] as a PNG inside a URL; keyword arguments are those of `plt.imsave`."""
    buffer = io.BytesIO()
    plt.imsave(buffer, pixels, format="png", **colours)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class Flipbook:
    """Ready-made masks to leaf through in a notebook without a kernel, or in its exported page: plain HTML and CSS.

    `pages`: (image, votes, gate) → what is shown where these three are chosen, as HTML. `choices`: their labels by name.
    `style`: CSS that all pages share. The chosen page is the one whose three radio buttons are `:checked`.
    """

    def __init__(self, choices: dict[str, list[str]], pages: dict[tuple[int, ...], str], style: str):
        self.choices, self.pages, self.style = choices, pages, style

    def __repr__(self) -> str:
        return f"Flipbook: {', '.join(f'{len(labels)} × {name}' for name, labels in self.choices.items())}"

    def _repr_html_(self) -> str:
        content = self.style + "".join(self.pages.values())
        own = f"flipbook-{hashlib.sha256(content.encode()).hexdigest()[:8]}-{next(COPIES)}"
        # all pages but this one are `hidden`, which is what still counts where a site takes the CSS away
        start = tuple(len(labels) - 1 if name == "gate" else 0 for name, labels in self.choices.items())
        fields, rules, divisions = [], [], []
        for (name, labels), first in zip(self.choices.items(), start):
            # without the last attribute JupyterLab takes the arrow keys for itself
            kind = f'type="radio" name="{own}-{name}" data-lm-suppress-shortcuts="true"'
            buttons = "".join(
                f'<input {kind} id="{own}-{name}-{i}"{" checked" * (i == first)}>'
                f'<label for="{own}-{name}-{i}">{html.escape(label)}</label>'
                for i, label in enumerate(labels)
            )
            fields.append(f"<fieldset><legend>{name}</legend>{buttons}</fieldset>")
        for place, page in self.pages.items():
            chosen = "".join(f":has(#{own}-{name}-{i}:checked)" for name, i in zip(self.choices, place))
            kind = "page-" + "-".join(map(str, place))
            rules.append(f"#{own}{chosen} .{kind}")
            divisions.append(f'<div class="page {kind}"{" hidden" * (place != start)}>{page}</div>')
        style = self.style.replace("FLIPBOOK", f"#{own}") + ",".join(rules) + "{display: flex !important}"
        bar = f'<img src="{data_url(np.linspace(0, 1, 64)[None], cmap=MASK_COLOURS)}" alt="">'
        scale = f'<p class="scale">P(z ≠ 0): 0 dropped {bar} 1 kept</p>'
        return f'<div id="{own}"><style>{style}</style>{"".join(fields)}{"".join(divisions)}{scale}</div>'


STYLE = """
FLIPBOOK {font-size: 13px; line-height: 1.4}
FLIPBOOK fieldset {border: 0; margin: 0; padding: 2px 0; display: flex; flex-wrap: wrap; align-items: center}
FLIPBOOK legend {float: left; width: 4em; padding: 0}
FLIPBOOK input {margin: 0 4px 0 0}
FLIPBOOK label {margin-right: 14px; cursor: pointer}
FLIPBOOK:has(:checked) .page {display: none !important}
FLIPBOOK .page {flex-wrap: wrap; gap: 16px; margin-top: 8px}
FLIPBOOK figure {margin: 0; width: 200px}
FLIPBOOK .panel {width: 200px; background-size: 100% 100%; print-color-adjust: exact}
FLIPBOOK .panel img {display: block; width: 100%; height: 100%; max-width: none; margin: 0; image-rendering: pixelated}
FLIPBOOK .scale {margin: 8px 0 0 216px}
FLIPBOOK .scale img {display: inline; width: 64px; height: 9px; margin: 0}
"""


def layer_flipbook(diffmask: VisionDiffMask, pixel_values: torch.Tensor, id2label: dict[int, str]) -> Flipbook:
    """The masks of images [B, C, H, W] after every gate, the votes so far or each vote alone, to leaf through.

    Every state is explained beforehand: 4 K passes of the base over the batch. A state costs about a kilobyte of HTML,
    an image as much as its PNG.
    """
    pixel_values = pixel_values.to(diffmask.device)
    (height, width), count = pixel_values.shape[-2:], diffmask.config.num_gates
    votes = {"all votes so far": True, "this vote alone": False}
    choices = {
        "image": [str(i + 1) for i in range(len(pixel_values))],
        "votes": list(votes),
        "gate": [str(k) for k in range(count)],
    }
    blown_up = "pixelated" if width < 200 else "auto"
    style = STYLE + f"FLIPBOOK .panel {{height: {200 * height // width}px; image-rendering: {blown_up}}}\n"
    for i, picture in enumerate(pixel_values):
        style += f"FLIPBOOK .input-{i} {{background-image: url({data_url(to_image(picture))})}}\n"
    pages = {}
    for v, aggregated in enumerate(votes.values()):
        for k in range(count):
            shown = diffmask.explain(pixel_values, layer=k, aggregated=aggregated)
            for i, mask in enumerate(shown.mask.cpu().numpy()):
                before, cost, after = captions(shown, i, id2label)
                # grey over the input, as opaque as the patch is dropped: the same blend as `masked_image`
                veil = np.stack([*[np.full_like(mask, 0.5)] * 3, 1 - mask], axis=-1)
                panels = (
                    (f"input: {before}", f"input-{i}", ""),
                    (f"mask: {cost}", "", data_url(mask, cmap=MASK_COLOURS, vmin=0, vmax=1)),
                    (f"masked input: {after}", f"input-{i}", data_url(veil)),
                )
                pages[i, v, k] = "".join(_panel(*panel) for panel in panels)
    return Flipbook(choices, dict(sorted(pages.items())), style)


def _panel(caption: str, kind: str, url: str) -> str:
    caption = html.escape(caption)
    picture = f'<img src="{url}" alt="">' if url else ""
    return (
        f'<figure><div class="panel {kind}" role="img" aria-label="{caption}">{picture}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
