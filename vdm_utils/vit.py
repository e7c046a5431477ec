"""The classifier to explain: build one, load one, and see or replace its patch embeddings.

`PatchView` is the one place that touches a model's inside. It asks for nothing but what every Hugging Face vision
transformer has: a module that turns pixels into patch embeddings (found by its name) and a list of `num_hidden_layers`
layers. ViT, DeiT, DINOv2, BEiT and SigLIP therefore need no code of their own.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import cached_file

from vdm_utils.checkpoints import load_saved, refuse_misfits
from vdm_utils.errors import VDMError, check_integer, unknown_name

logger = logging.getLogger(__name__)

# hidden size, layers, heads, width of the MLP: `tiny` trains in a minute on a laptop, `base` is ViT-B
VIT_SIZES = {"tiny": (64, 4, 4, 128), "small": (192, 6, 6, 384), "base": (768, 12, 12, 3072)}
# standard deviation by which the cells of a grid differ at first, as the position embeddings of a new ViT do
CELL_OFFSET = 0.02
CONVNEXT_SIZES = {
    "tiny": ((32, 64), (2, 2)),
    "small": ((48, 96, 192), (2, 2, 4)),
    "base": ((96, 192, 384, 768), (3, 3, 9, 3)),
}


def build_classifier(
    architecture: str = "vit",
    size: str = "tiny",
    image_size: int | tuple[int, int] = 48,
    patch_size: int | tuple[int, int] = 16,
    num_channels: int = 3,
    num_labels: int = 10,
    id2label: dict[int, str] | None = None,
) -> PreTrainedModel:
    """A classifier with random weights, from torch's global random state.

    Args:
        architecture: `vit` (can be explained by Vision DiffMask) or `convnext` (a base for comparison).
        size: `tiny`, `small` or `base` (the published ViT-B / ConvNeXt-T).
        image_size, patch_size: pixels, one number or (height, width).
        id2label: class names; `num_labels` is taken from it when it is given.
    Raises:
        VDMError: for an unknown architecture or size, or patches that do not tile the image.
    """
    where, kind = "build_classifier", str(architecture).lower()
    if kind not in ("vit", "convnext"):
        raise unknown_name("architecture", architecture, ("vit", "convnext"), where)
    if size not in VIT_SIZES:
        raise unknown_name("size", size, VIT_SIZES, where)
    image, patch = as_pair(image_size), as_pair(patch_size)
    if min(*image, *patch) < 1 or image[0] % patch[0] or image[1] % patch[1]:
        raise VDMError("the patches do not tile the image", where=where, expected="image_size a multiple of patch_size",
                       got=f"image {image}, patch {patch}", fix="change one of the two")  # fmt: skip
    check_integer("number of patches", image[0] // patch[0] * (image[1] // patch[1]), 1, 2**16, where)
    check_integer("num_channels", num_channels, 1, 2**10, where)
    check_integer("num_labels", num_labels, 1, 2**20, where)
    id2label = id2label or {i: str(i) for i in range(num_labels)}
    if not isinstance(id2label, dict) or set(id2label) != set(range(len(id2label))):
        raise VDMError("the classes are not numbered", where=where, expected="id2label {0: name, 1: name, …}", got=id2label,
                       fix="number them from 0 on")  # fmt: skip
    shared = {"num_channels": num_channels, "id2label": id2label, "label2id": {v: k for k, v in id2label.items()}}
    if kind == "convnext":
        widths, depths = CONVNEXT_SIZES[size]
        shared |= {"patch_size": min(patch), "image_size": max(image), "num_stages": len(depths)}
        return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=widths, depths=depths, **shared))
    hidden, layers, heads, intermediate = VIT_SIZES[size]
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        image_size=image[0] if image[0] == image[1] else list(image),
        patch_size=patch[0] if patch[0] == patch[1] else list(patch),
        **shared,
    )
    return ViTForImageClassification(config)


@torch.no_grad()
def mimetic_start(model: ViTForImageClassification) -> None:
    """Start a ViT's attention where trained ones end up (Trockman and Kolter 2023, arXiv 2305.09828), in place.

    Per head W_q W_kᵀ ≈ 0.7 (Z + I) and W_v W_o ≈ 0.4 (Z − I) with Z ~ N(0, 1/d), and sinusoidal positions: patches
    look at themselves and their neighbours from the first step. It saves epochs where data is scarce.
    """
    config, width = model.config, model.config.hidden_size
    heads, size = config.num_attention_heads, width // config.num_attention_heads
    identity = torch.eye(width)

    def factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A, B with A Bᵀ the best approximation of `matrix` of that rank."""
        u, scale, v = torch.linalg.svd(matrix)
        return u[:, :rank] * scale[:rank].sqrt(), v[:rank].T * scale[:rank].sqrt()

    for layer in model.vit.layers:
        attention = layer.attention
        for head in range(heads):
            query, key = factors(0.7 * (torch.randn(width, width) / width**0.5 + identity), size)
            rows = slice(head * size, (head + 1) * size)
            attention.q_proj.weight[rows], attention.k_proj.weight[rows] = query.T, key.T
        value, output = factors(0.4 * (torch.randn(width, width) / width**0.5 - identity), width)
        attention.v_proj.weight.copy_(value.T)
        attention.o_proj.weight.copy_(output)
    rows, cols = PatchView(model).grid
    frequency = 10_000 ** -(torch.arange(width // 4) / (width // 4))

    def waves(count: int) -> torch.Tensor:
        angle = torch.arange(count)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)  # [count, d/2]

    grid = [waves(rows)[:, None].expand(-1, cols, -1), waves(cols)[None].expand(rows, -1, -1)]
    model.vit.embeddings.position_embeddings[0, 1:, : 4 * (width // 4)] = torch.cat(grid, dim=-1).flatten(0, 1)


def load_classifier(name_or_path: str | Path, num_labels: int | None = None) -> PreTrainedModel:
    """Load a classifier from a folder or the Hugging Face Hub (safetensors only, no remote code).

    With `num_labels` the head is replaced by a fresh one, and a warning says so, where the checkpoint has none for as
    many classes. Another warning tells of a model that wants pixels normalised otherwise than `load_data` does it.

    Raises:
        VDMError: when there is no such folder or Hub name, its files cannot be read or were altered after they were saved
            (`verify_checksums`), or weights are missing.
    """
    where, options = "load_classifier", {}
    if num_labels is not None:
        check_integer("num_labels", num_labels, 1, 2**20, where)
        options = {"num_labels": num_labels}

    def load(name: str, **options):
        optional = {f"_raise_exceptions_for_{why}": False for why in ("missing_entries", "connection_errors")}
        wanted = cached_file(name, "preprocessor_config.json", **optional)
        if wanted is not None:
            warn_of_normalisation(name, json.loads(Path(wanted).read_text(encoding="utf-8")))
        return AutoModelForImageClassification.from_pretrained(name, **options)

    model, misfits = load_saved(load, name_or_path, "classifier", where, **options)
    # what the classifier has no use for, such as the text half of SigLIP, is left out
    known = model.state_dict()
    misfits = [name for name in misfits if name in known]
    head = [name for name in misfits if name.split(".")[0].endswith("classifier")]
    refuse_misfits(misfits if num_labels is None else sorted({*misfits} - {*head}), name_or_path, "classifier", where)
    if head:
        logger.warning("new head: %s now predicts %s classes and must be fine-tuned", name_or_path, num_labels)
    return model.eval()


def warn_of_normalisation(name: str, wanted: dict) -> None:
    """Say so where a model wants pixels of another mean and deviation (`preprocessor_config.json`) than `load_data` gives."""
    for key in ("image_mean", "image_std"):
        numbers = wanted.get(key)
        if set(numbers if isinstance(numbers, list) else [numbers]) - {0.5, None}:
            logger.warning("%s wants pixels with %s %s; load_data gives 0.5: fold it into the first layer (notebook 08)",
                           name, key, numbers)  # fmt: skip


@torch.no_grad()
def with_image_size(model: PreTrainedModel, image_size: int | tuple[int, int], cells: int = 1) -> PreTrainedModel:
    """The same classifier for images of another size: its position embeddings are stretched over the new patch grid.

    Where the new image is a grid of `cells` × `cells` images of the old size, they are repeated in every cell instead, each
    with an offset of its own from torch's global random state: what was learned of one picture serves for each of them.

    Raises:
        VDMError: for a model without a table of position embeddings, or patches that do not tile the image.
    """
    height, width = as_pair(image_size)
    old = PatchView(model)
    name = next((n for n, _ in model.named_parameters() if n.endswith("embeddings.position_embeddings")), None)
    misfit = VDMError("the classifier cannot take another image size", where=type(model).__name__,
                      expected=f"position embeddings and a multiple of the patches {old.patch_size}", got=(height, width),
                      fix=f"use its own image size, {old.image_size}")  # fmt: skip
    if name is None or min(height, width) < 1 or height % old.patch_size[0] or width % old.patch_size[1]:
        raise misfit
    config = copy.deepcopy(model.config)
    config.image_size = height if height == width else [height, width]
    larger = type(model)(config)
    weights, (rows, cols) = model.state_dict(), old.grid
    table = weights[name]
    prefix, patches = table[:, : -rows * cols], table[:, -rows * cols :]
    plane = patches.unflatten(1, (rows, cols)).permute(0, 3, 1, 2)  # [1, d, rows, cols]
    if cells > 1 and (height, width) == tuple(cells * side for side in old.image_size):
        offset = CELL_OFFSET * torch.randn(1, plane.shape[1], cells, cells, device=plane.device)
        plane = plane.repeat(1, 1, cells, cells) + F.interpolate(offset, size=PatchView(larger).grid, mode="nearest")
    else:
        plane = F.interpolate(plane.float(), size=PatchView(larger).grid, mode="bicubic")
    weights[name] = torch.cat([prefix, plane.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)
    try:
        larger.load_state_dict(weights)
        PatchView(larger).encode(torch.zeros(1, old.num_channels, height, width))  # some only take squares
    except RuntimeError as error:
        raise misfit from error
    return larger.to(table.dtype).eval()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) of every weight of a model: name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        # viewed as bytes so that bfloat16, which numpy does not know, can be hashed too
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class PatchStates:
    """What a classifier computed on whole images.

    embeddings: [B, N, d] output of the patch projection, before positions are added.
    hidden: K = L + 2 tensors [B, N, d]: the embeddings, the input of each of the L layers, the output of the last;
        patches only, prefix tokens ([CLS], distillation, registers) left out.
    logits: [B, C]; None when the pass was left before the end.  grid: (rows, cols) with rows · cols = N.
    """

    embeddings: torch.Tensor
    hidden: list[torch.Tensor]
    logits: torch.Tensor | None
    grid: tuple[int, int]


class _SeenEnough(Exception):
    """Leaves a forward pass whose remaining layers nobody asked for."""


class PatchView:
    """See and replace the patch embeddings of a Hugging Face vision transformer.

    Every call runs the model in evaluation mode with frozen weights and leaves it as it was: same mode, same
    `requires_grad`, no hooks, also when the model raises.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        config = getattr(model, "config", None)
        config, name = getattr(config, "vision_config", config), type(model).__name__
        layer_count = getattr(config, "num_hidden_layers", None)
        modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
        stacks = [m for m in modules.values() if isinstance(m, nn.ModuleList) and len(m) == layer_count]
        projection = next((m for n, m in modules.items() if n.endswith(("patch_embeddings", "patch_embedding"))), None)
        # `depths`: a hierarchy of stages (Swin, ConvNeXt) merges patches on the way and has no one grid
        named = all(hasattr(config, key) for key in ("patch_size", "image_size", "hidden_size"))
        if not stacks or projection is None or not named or hasattr(config, "depths"):
            raise VDMError(f"{name} is not a vision transformer with one patch grid", where="PatchView",
                           expected="patch embeddings and a list of config.num_hidden_layers layers", got=name,
                           fix="use ViT, DeiT, DINOv2, BEiT or SigLIP")  # fmt: skip
        self.projection, self.layers = projection, stacks[0]
        self.patch_size, self.image_size = as_pair(config.patch_size), as_pair(config.image_size)
        self.num_channels, self.hidden_size = config.num_channels, config.hidden_size
        self.num_states = len(self.layers) + 2  # K
        # listed once: walking the tree at every call would cost a tiny model a tenth of its time
        self._all_modules, self._all_parameters = list(model.modules()), list(model.parameters())

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the patch grid at the model's own image size."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    def on_pixels(self, patches: torch.Tensor) -> torch.Tensor:
        """Values of patches [..., rows, cols] on the pixels that they see, [..., H, W]; pixels beyond the last patch get 0."""
        (height, width), (down, across) = self.image_size, self.patch_size
        pixels = patches.repeat_interleave(down, -2).repeat_interleave(across, -1)
        return F.pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]))

    def check(self, pixel_values: torch.Tensor) -> None:
        """Raise `VDMError` unless `pixel_values` is a finite float tensor [B, C, H, W] that this model takes."""
        expected = f"a float tensor [B, {self.num_channels}, {self.image_size[0]}, {self.image_size[1]}]"
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            got = getattr(pixel_values, "dtype", type(pixel_values).__name__)
        elif pixel_values.shape[1:] != (self.num_channels, *self.image_size) or not len(pixel_values):
            got = list(pixel_values.shape)
        elif not torch.isfinite(pixel_values).all():
            got = "NaN or infinite values"
        else:
            return
        raise VDMError("the images do not fit the classifier", where=type(self.model).__name__, expected=expected, got=got,
                       fix="resize and normalise them as load_data does")  # fmt: skip

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluation mode and no weight gradients while the block runs; what had to be changed is put back."""
        training = [module for module in self._all_modules if module.training]
        wanted = [parameter for parameter in self._all_parameters if parameter.requires_grad]
        try:
            for module in training:
                module.training = False
            for parameter in wanted:
                parameter.requires_grad_(False)
            yield
        finally:
            for module in training:
                module.training = True
            for parameter in wanted:
                parameter.requires_grad_(True)

    def encode(self, pixel_values: torch.Tensor, upto: int | None = None) -> PatchStates:
        """Run the model on whole images [B, C, H, W] and keep what the gates look at; no gradient is recorded.

        `upto` (0..K−1): leave the pass once that state is known; `hidden` ends with it, and there are no logits.

        Raises:
            VDMError: for images that do not fit (`check`), or from which the model computes NaN or infinite logits.
        """
        self.check(pixel_values)
        seen: dict[nn.Module | str, torch.Tensor] = {}
        wanted = [self.projection, "input", *self.layers][: None if upto is None else upto + 1]

        def keep(module, inputs, output):
            seen[module] = output[0] if isinstance(output, tuple) else output
            if upto is not None and module == wanted[-1]:
                raise _SeenEnough

        def keep_input(module, inputs):
            keep("input", None, inputs)

        logits = None
        with torch.no_grad(), self.frozen(), ExitStack() as hooks, suppress(_SeenEnough):
            hooks.enter_context(self.layers[0].register_forward_pre_hook(keep_input))
            for module in (self.projection, *self.layers):
                hooks.enter_context(module.register_forward_hook(keep))
            logits = self.model(pixel_values).logits
        if logits is not None and not torch.isfinite(logits).all():
            raise VDMError("the classifier's output is not finite", where=type(self.model).__name__, expected="finite logits",
                           got=f"NaN or infinite, from images up to {pixel_values.abs().max():.3g}",
                           fix="normalise the images as load_data does; if they are, the weights are broken")  # fmt: skip
        embeddings = seen[self.projection]
        if embeddings.dim() == 4:  # a bare convolution, [B, d, rows, cols]
            embeddings = embeddings.flatten(2).transpose(1, 2)  # [B, N, d]
        count, (rows, cols) = embeddings.shape[1], self.grid
        if count != rows * cols:
            raise VDMError("the patch embeddings do not fill the patch grid", where=type(self.model).__name__,
                           expected=f"{rows} · {cols} patches", got=count, fix="use a plain vision transformer")  # fmt: skip
        return PatchStates(embeddings, [embeddings, *(seen[key][:, -count:] for key in wanted[1:])], logits, self.grid)

    def logits(self, pixel_values: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Run the model with its patch embeddings replaced by `embeddings` [B, N, d]; gradients reach `embeddings`.

        `pixel_values` [B, C, H, W] only carries the shape. Returns logits [B, C].

        Raises:
            VDMError: for embeddings of another shape, or that are no floats.
        """
        floats = isinstance(embeddings, torch.Tensor) and embeddings.is_floating_point()
        got = list(embeddings.shape) if floats else getattr(embeddings, "dtype", type(embeddings).__name__)
        if got != (expected := [len(pixel_values), math.prod(self.grid), self.hidden_size]):
            raise VDMError("the embeddings do not fit the classifier", where=type(self.model).__name__,
                           expected=f"a float tensor {expected}", got=got, fix="take those of encode, and replace some")  # fmt: skip

        def replace(module, inputs, output):
            if output.dim() == 4:
                return embeddings.transpose(1, 2).reshape(output.shape).to(output.dtype)
            return embeddings.to(output.dtype)

        with self.frozen(), self.projection.register_forward_hook(replace):
            return self.model(pixel_values).logits

    @torch.no_grad()
    def logits_without_tokens(self, pixel_values: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
        """Run the model with patches left out of its sequence, after their positions were added: logits [B, C].

        `gone` bool [B, N] says which; prefix tokens stay, and every other patch keeps its place. No gradient is recorded.

        Raises:
            VDMError: for a model whose layers look positions up themselves (BEiT with relative position bias), or that
                has no token or nothing to average when no patch is left.
        """
        where = type(self.model).__name__
        names = " ".join([*dict(self.model.named_modules()), *dict(self.model.named_parameters())])
        if any(word in names for word in ("relative_position", "rope", "rotary")):
            raise VDMError("patches cannot be left out of this classifier", where=where, expected="positions that are added "
                           "before the first layer", got="positions inside the layers", fix="use another fill")  # fmt: skip
        nothing_left = VDMError("the classifier says nothing without patches", where=where, expected="at least one patch left",
                                got="none in some picture", fix="keep one, or use another fill")  # fmt: skip
        groups, parts = [(gone.sum(1) == count).nonzero()[:, 0] for count in gone.sum(1).unique()], []
        for chosen in groups:  # sequences of equal length make a batch
            kept = (~gone[chosen]).nonzero()[:, 1].view(len(chosen), -1)  # [b, N − count]

            def leave_out(module, inputs, kept=kept):
                tokens = inputs[0]
                prefix = torch.arange(tokens.shape[1] - gone.shape[1], device=kept.device).expand(len(kept), -1)
                index = torch.cat([prefix, kept + prefix.shape[1]], dim=1)  # [b, T − count]
                if not index.shape[1]:
                    raise nothing_left
                return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])), *inputs[1:]

            with self.frozen(), self.layers[0].register_forward_pre_hook(leave_out):
                parts.append(self.model(pixel_values[chosen]).logits)
        logits = torch.cat(parts)[torch.cat(groups).argsort()]
        if logits[gone.all(1)].isnan().any():  # a mean over no patch
            raise nothing_left
        return logits


def own_image_size(model: PreTrainedModel) -> tuple[int, int] | None:
    """(height, width) of the pictures that a classifier takes; None where it takes any, as a ConvNeXt does."""
    config = getattr(model.config, "vision_config", model.config)
    takes_any = hasattr(config, "depths") or not hasattr(config, "image_size")
    return None if takes_any else as_pair(config.image_size)


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) from one whole number or two; raises `VDMError` for anything else."""
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, Integral) for side in pair):
        raise VDMError("this is no size", where="image_size or patch_size", expected="a whole number, or (height, width)", got=repr(size),
                       fix="give pixels")  # fmt: skip
    return pair
