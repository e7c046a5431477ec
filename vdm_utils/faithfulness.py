"""Which explanation is more faithful? Areas under perturbation curves, rationales, and intervals that say when to claim it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from transformers import PreTrainedModel

from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.errors import VDMError, unknown_name
from vdm_utils.metrics import FILLS, check_scores, deletion_curves, logits_without, top_patches

# Of the patches that are kept as the rationale: the bins of ERASER (DeYoung et al. 2020, section 4.2).
FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)
# (direction of deletion, measure): +1 where a large area speaks for the order, −1 where a small one does.
BETTER = {
    ("important first", "probability"): -1,
    ("important first", "kl"): 1,
    ("unimportant first", "probability"): 1,
    ("unimportant first", "kl"): -1,
}


def bootstrap(
    values: torch.Tensor, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `values` [B] over pictures, and the ends of its bootstrap interval: (mean, low, high).

    Pictures are drawn with replacement, so the interval is about other pictures of the same kind, not about other
    trainings. For a paired comparison pass the differences. NaN marks a picture without a value and is left out.
    """
    values = values[~values.isnan()].double().cpu()
    if not len(values):
        raise VDMError("nothing to average", where="bootstrap", expected="at least one number", got="none, or NaN only",
                       fix="use pictures on which the measure is defined")  # fmt: skip
    drawn = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed))
    tail = (1 - confidence) / 2
    low, high = values[drawn].mean(1).quantile(torch.tensor([tail, 1 - tail], dtype=torch.double))
    return values.mean().item(), low.item(), high.item()


def top_fractions(scores: torch.Tensor, fractions: Sequence[float] = FRACTIONS) -> torch.Tensor:
    """Rationales of growing size, the patches with the largest `scores` [B, rows, cols]: bool [B, S, rows, cols].

    Each of the S fractions keeps at least one patch.
    """
    counts = (scores[0].numel() * torch.tensor(fractions, device=scores.device)).round().clamp(min=1)
    return top_patches(scores, counts)


def sufficiency_and_comprehensiveness(
    model: PreTrainedModel | VisionDiffMask,
    pixel_values: torch.Tensor,
    rationale: torch.Tensor,
    fill: str = "noise",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rationale is worth (ERASER, DeYoung et al. 2020, arXiv 1911.03429, section 4.2): two tensors [B].

    With p the probability of the class predicted for the whole picture x and r the rationale,
    sufficiency = p(x) − p(only r), low is good, and comprehensiveness = p(x) − p(all but r), high is good.

    Args:
        rationale: bool [B, rows, cols], such as `mask > 0.5`, or several per picture, [B, S, rows, cols], over which the
            result is the mean: `top_fractions(scores)`.
        fill, seed: see `logits_without`.
    """
    kept = rationale.unsqueeze(1) if rationale.dim() == 3 else rationale
    kept = kept.flatten(2).bool()  # [B, S, N]
    gone = torch.cat([torch.zeros_like(kept[:, :1]), ~kept, kept], dim=1)  # the whole picture comes first
    probability = logits_without(model, pixel_values, gone, fill, seed).softmax(-1)
    predicted = probability[:, 0].argmax(-1)
    whole, only, without = probability[torch.arange(len(kept)), :, predicted].split([1, *[kept.shape[1]] * 2], dim=1)
    return (whole - only).mean(1), (whole - without).mean(1)


def break_ties(scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The same order with equal `scores` [B, rows, cols], as the many zeros of Grad-CAM, in random order: [B, rows, cols].

    In reading order, the corner above left would always go first.
    """
    level = scores.cpu().unique(return_inverse=True)[1]  # 0, 1, 2, … for the smallest value, the next one, …
    return (level + torch.rand(level.shape, generator=generator, dtype=torch.double)).to(scores.device)


def perturbation_curves(
    model: PreTrainedModel | VisionDiffMask,
    pixel_values: torch.Tensor,
    scores: Mapping[str, torch.Tensor],
    fills: Sequence[str] = FILLS,
    points: int = 29,
    seed: int = 0,
) -> dict[tuple[str, str, str, str], torch.Tensor]:
    """The deletion curves of several methods, beside a random order, picture by picture.

    Args:
        scores: the scores [B, rows, cols] of each method on the pictures [B, C, H, W]; "random" is added. Ties are broken.
        fills, points, seed: see `deletion_curves`.
    Returns:
        [B, points] for every (method, fill, direction, measure), with the directions `important first` and `unimportant
        first` (read from the end, the insertion curve), and the measures `probability` and `kl` in nats.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(pixel_values), *next(iter(scores.values())).shape[1:]) if scores else None
    if shape is None or any(tuple(one.shape) != shape for one in scores.values()):
        raise VDMError("these scores cannot be compared", where="perturbation_curves", expected="{name: [B, rows, cols]}",
                       got={name: list(one.shape) for name, one in scores.items()}, fix="score every picture with every method")  # fmt: skip
    found = {}
    for method, values in {"random": torch.zeros(shape), **scores}.items():
        check_scores(values, f"perturbation_curves, {method}")
        order = break_ties(values, generator).to(pixel_values.device)
        for fill in fills:
            for direction in ("important first", "unimportant first"):
                curves = deletion_curves(model, pixel_values, order, direction == "important first", points, seed, fill)
                found |= {(method, fill, direction, m): c for m, c in zip(("probability", "kl"), curves)}
    return found


def curve_areas(curves: Mapping[tuple[str, str, str, str], torch.Tensor]) -> pd.DataFrame:
    """The areas under `perturbation_curves`, the means over their points, picture by picture.

    Returns one row per number, with the columns method, fill, direction, measure, picture and area. The area of the
    insertion curve is that of `unimportant first`.
    """
    keys = ["method", "fill", "direction", "measure"]
    parts = []
    for key, curve in curves.items():  # [B, points]
        part = pd.DataFrame({"picture": range(len(curve)), "area": curve.mean(1).cpu().double()})
        parts.append(part.assign(**dict(zip(keys, key))))
    return pd.concat(parts, ignore_index=True)[[*keys, "picture", "area"]]


def perturbation_areas(*args, **options) -> pd.DataFrame:
    """`curve_areas` of the `perturbation_curves` that these arguments make."""
    return curve_areas(perturbation_curves(*args, **options))


def _intervals(areas: pd.DataFrame, keys: list[str], name: str) -> pd.DataFrame:
    """The bootstrap interval of the areas in each group: one row per group, columns `keys`, `name`, low and high."""
    groups = areas.groupby(keys, sort=False)["area"]
    rows = [(*key, *bootstrap(torch.tensor(values.to_numpy()))) for key, values in groups]
    return pd.DataFrame(rows, columns=[*keys, name, "low", "high"])


def compare(areas: pd.DataFrame) -> pd.DataFrame:
    """The table of `perturbation_areas`: mean over pictures and 95 % interval, one row per method, fill, direction and
    measure."""
    return _intervals(areas, ["method", "fill", "direction", "measure"], "area")


def paired_comparison(areas: pd.DataFrame, method: str, other: str) -> pd.DataFrame:
    """Is one method more faithful than another? The differences on the same pictures, and what may be claimed.

    Args:
        areas: of `perturbation_areas`, with as many fills as the claim is to hold for.
    Returns:
        One row per direction, measure and fill. `difference` with its 95 % interval (`low`, `high`) is positive where
        `method` is better. `better` is the same in all rows of a direction and measure: the method that is better under
        *every* fill with an interval that excludes 0, otherwise "undecided".
    """
    for name in (method, other):
        if name not in set(areas["method"]):
            raise unknown_name("method", name, dict.fromkeys(areas["method"]), "paired_comparison")
    keys = ["direction", "measure", "fill"]
    wide = areas.pivot(index=[*keys, "picture"], columns="method", values="area")
    paired = (wide[method] - wide[other]).rename("area").reset_index()
    paired["area"] *= [BETTER[key] for key in zip(paired["direction"], paired["measure"])]
    table = _intervals(paired, keys, "difference")
    groups = table.groupby(["direction", "measure"])
    won, lost = groups["low"].transform("min") > 0, groups["high"].transform("max") < 0
    return table.assign(better=pd.Series("undecided", table.index).mask(won, method).mask(lost, other))
