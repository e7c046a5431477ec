"""Rationales, areas and intervals, against cases worked out by hand, scipy and captum."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from captum.attr import FeatureAblation

from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.errors import VDMError
from vdm_utils.faithfulness import (
    bootstrap,
    compare,
    curve_areas,
    paired_comparison,
    perturbation_areas,
    perturbation_curves,
    sufficiency_and_comprehensiveness,
    top_fractions,
)
from vdm_utils.metrics import FILLS, deletion_curves
from vdm_utils.notebook import checkpoint

PAINTED = ["mean colour", "noise"]


# ---------------------------------------------------------------- intervals


def test_bootstrap_is_that_of_scipy():
    values = torch.distributions.Exponential(1.0).sample((60,))
    mean, low, high = bootstrap(values, confidence=0.9, draws=20_000)
    theirs = scipy.stats.bootstrap((values.numpy(),), np.mean, confidence_level=0.9, n_resamples=20_000, method="percentile",
                                   rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
    assert mean == pytest.approx(values.mean().item())
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.01) and high - low > 0.2


def test_bootstrap_is_seeded_and_leaves_missing_values_out():
    values = torch.randn(30)
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)
    assert bootstrap(torch.cat([values, torch.full((5,), math.nan)])) == bootstrap(values)
    with pytest.raises(VDMError, match="nothing to average"):
        bootstrap(torch.full((5,), math.nan))


# ---------------------------------------------------------------- rationales


def test_rationales_grow_and_keep_at_least_one_patch():
    scores = torch.arange(64.0).view(1, 8, 8)
    kept = top_fractions(scores)
    assert kept.shape == (1, 5, 8, 8) and kept.sum((0, 2, 3)).tolist() == [1, 3, 6, 13, 32]
    assert kept[0, 1].flatten().nonzero()[:, 0].tolist() == [61, 62, 63]
    assert top_fractions(torch.rand(1, 2, 2), [0.01, 1.0]).sum((0, 2, 3)).tolist() == [1, 4]


def test_sufficiency_and_comprehensiveness_by_hand(diffmask, pictures):
    """Of two rationales per picture, and of each alone, with every patch replaced by the placeholder in a plain loop."""
    rationale = torch.rand(8, 2, 3, 3) < 0.4
    states = diffmask.view.encode(pictures)
    probability = states.logits.softmax(-1)
    predicted = probability.argmax(-1)
    results = []
    with torch.no_grad():
        for n in range(2):
            for mask in (rationale[:, n], ~rationale[:, n]):
                masked = diffmask.masked_logits(pictures, states, mask).softmax(-1)
                results.append(torch.stack([(probability - masked)[i, predicted[i]] for i in range(8)]))
    only = torch.stack(results).view(2, 2, 8)  # [rationale, (sufficiency, comprehensiveness), picture]
    for n in range(2):
        alone = sufficiency_and_comprehensiveness(diffmask, pictures, rationale[:, n], fill="placeholder")
        assert torch.allclose(torch.stack(alone), only[n], atol=1e-5)
    both = sufficiency_and_comprehensiveness(diffmask, pictures, rationale, fill="placeholder")
    assert torch.allclose(torch.stack(both), only.mean(0), atol=1e-5) and only.std() > 0.01


def test_comprehensiveness_of_one_patch_is_captums_ablation(base, pictures):
    """captum takes one patch after the other to the mean colour and reports how far the probability falls."""
    predicted = base(pictures).logits.argmax(-1)
    number = torch.arange(9).view(3, 3).repeat_interleave(4, 0).repeat_interleave(4, 1).expand(1, 3, -1, -1)
    ablation = FeatureAblation(lambda x: base(x).logits.softmax(-1))
    theirs = ablation.attribute(pictures, baselines=0, target=predicted, feature_mask=number)[
        :, 0, ::4, ::4
    ]  # [8, 3, 3]
    for patch in range(9):
        rationale = torch.zeros(8, 3, 3, dtype=torch.bool)
        rationale[:, patch // 3, patch % 3] = True
        _, ours = sufficiency_and_comprehensiveness(base, pictures, rationale, fill="mean colour")
        assert torch.allclose(ours, theirs[:, patch // 3, patch % 3], atol=1e-5)
    assert theirs.std() > 0.001


# ---------------------------------------------------------------- areas


def test_areas_are_the_means_of_the_curves(diffmask, pictures):
    scores = {"a": torch.rand(8, 3, 3), "b": torch.rand(8, 3, 3)}
    found = perturbation_curves(diffmask, pictures, scores, points=4)
    areas = curve_areas(found)
    assert areas.equals(perturbation_areas(diffmask, pictures, scores, points=4))
    assert len(areas) == 3 * 4 * 2 * 2 * 8 and set(areas["method"]) == {"random", "a", "b"}
    for fill in FILLS:
        for direction in ("important first", "unimportant first"):
            curves = deletion_curves(diffmask, pictures, scores["b"], direction == "important first", 4, fill=fill)
            for measure, curve in zip(("probability", "kl"), curves):
                assert torch.allclose(found["b", fill, direction, measure], curve, atol=1e-6)
                chosen = areas[
                    (areas[["method", "fill", "direction", "measure"]] == ["b", fill, direction, measure]).all(axis=1)
                ]
                assert chosen["picture"].tolist() == list(range(8))
                assert chosen["area"].to_numpy() == pytest.approx(curve.mean(1).numpy(), abs=1e-6)


def test_equal_scores_go_in_random_order(diffmask, pictures):
    """A constant map is a random order, not the reading order; where scores differ, chance has no say."""
    scores = torch.zeros(8, 3, 3)
    scores[:, 1, 1] = 1e-6
    options = dict(fills=["mean colour"], points=8)
    areas = perturbation_areas(diffmask, pictures, {"middle": scores}, **options)
    other = perturbation_areas(diffmask, pictures, {"middle": scores}, seed=1, **options)
    both = areas.merge(other, on=["method", "fill", "direction", "measure", "picture"]).query(
        "measure == 'probability'"
    )
    assert (both.groupby("method").apply(lambda t: (t["area_x"] - t["area_y"]).abs().max()) > 1e-3).all()
    points = dict(fills=["mean colour"], points=1)  # one of nine levels: 9/2 patches gone, rounded to 4
    ranked = torch.arange(9.0).view(1, 3, 3).expand(8, -1, -1)
    one, two = (perturbation_areas(diffmask, pictures, {"ranked": ranked}, seed=s, **points) for s in (0, 1))
    assert one.query("method == 'ranked'").equals(two.query("method == 'ranked'"))


@pytest.mark.parametrize(
    "scores", [{}, {"a": torch.rand(8, 3, 3), "b": torch.rand(8, 4, 4)}, {"a": torch.rand(7, 3, 3)}]
)
def test_scores_that_do_not_belong_together_are_refused(diffmask, pictures, scores):
    with pytest.raises(VDMError, match="cannot be compared"):
        perturbation_areas(diffmask, pictures, scores)


# ---------------------------------------------------------------- what may be claimed


def made_up(differences):
    """Areas of methods a and b on 50 pictures; {(direction, measure, fill): mean of a − b}, with a spread of 0.1."""
    rows, generator = [], np.random.default_rng(0)
    for (direction, measure, fill), difference in differences.items():
        picture, other = np.arange(50), 5 * generator.random(50)  # pictures differ more than methods do
        own = other + difference + 0.1 * scipy.stats.norm.ppf((picture + 0.5) / 50)
        for method, area in (("a", own), ("b", other)):
            rows.append(pd.DataFrame({"method": method, "fill": fill, "direction": direction, "measure": measure,
                                      "picture": picture, "area": area}))  # fmt: skip
    return pd.concat(rows, ignore_index=True)


CASES = [  # direction, measure, a − b under two fills, what is claimed
    ("important first", "probability", (-0.1, -0.2), "a"),
    ("important first", "probability", (0.1, 0.2), "b"),
    ("important first", "probability", (-0.1, 0.1), "undecided"),
    ("important first", "probability", (-0.1, -0.001), "undecided"),  # the second interval includes 0
    ("important first", "kl", (0.1, 0.2), "a"),
    ("unimportant first", "probability", (0.1, 0.2), "a"),
    ("unimportant first", "probability", (-0.1, -0.2), "b"),
    ("unimportant first", "kl", (-0.1, -0.2), "a"),
]


@pytest.mark.parametrize("direction, measure, differences, expected", CASES)
def test_a_win_needs_every_fill(direction, measure, differences, expected):
    areas = made_up({(direction, measure, fill): d for fill, d in zip(PAINTED, differences)})
    table = paired_comparison(areas, "a", "b")
    assert table["fill"].tolist() == PAINTED and set(table["better"]) == {expected}
    turned = paired_comparison(areas, "b", "a")
    assert turned["difference"].tolist() == pytest.approx((-table["difference"]).tolist())
    assert set(turned["better"]) == {expected}
    good = 1 if (direction, measure) in [("important first", "kl"), ("unimportant first", "probability")] else -1
    assert table["difference"].tolist() == pytest.approx([good * d for d in differences], abs=1e-6)
    assert ((table["low"] < table["difference"]) & (table["difference"] < table["high"])).all()
    assert (table["high"] - table["low"]).max() < 0.1  # paired: the pictures' own spread of 5 is gone
    single = compare(areas)
    assert (single["high"] - single["low"]).min() > 0.5 and len(single) == 4


def test_directions_and_measures_are_judged_apart():
    areas = made_up({("important first", "probability", f): -0.2 for f in PAINTED}
                    | {("unimportant first", "kl", f): 0.2 for f in PAINTED})  # fmt: skip
    table = paired_comparison(areas, "a", "b")
    assert table.set_index("direction")["better"].to_dict() == {"important first": "a", "unimportant first": "b"}


def test_an_unknown_method_is_named(diffmask, pictures):
    areas = perturbation_areas(diffmask, pictures, {"DiffMask": torch.rand(8, 3, 3)}, ["mean colour"], points=2)
    with pytest.raises(VDMError, match="did you mean 'DiffMask'"):
        paired_comparison(areas, "Diffmask", "random")


def test_a_fill_that_contradicts_the_others_leaves_it_undecided():
    """The classifier of the toy task sees the *share* of counted cells: without tokens of other colours it counts too many.

    So under token removal even the truth loses against a random order when unimportant patches go first.
    """
    diffmask = VisionDiffMask.from_pretrained(checkpoint("toy", "diffmask"))
    batch = load_data("toy", "test").batch(range(60))
    scores = {"DiffMask": diffmask.explain(batch["pixel_values"], check=False).scores, "truth": batch["truth"]}
    areas = perturbation_areas(diffmask, batch["pixel_values"], scores, points=8)
    table = (
        paired_comparison(areas, "DiffMask", "random")
        .set_index(["direction", "fill"])
        .query("measure == 'probability'")
    )
    assert (table.loc["important first", "better"] == "DiffMask").all()
    assert (table.loc["unimportant first", "better"] == "undecided").all()
    last = table.loc["unimportant first"]
    assert (last["low"].drop("token removal") > 0.05).all() and last.loc["token removal", "high"] < -0.05
    others = areas[areas["fill"] != "token removal"]
    for method in scores:
        assert set(paired_comparison(others, method, "random").query("measure == 'probability'")["better"]) == {method}
    true = paired_comparison(areas, "truth", "random").set_index(["direction", "measure", "fill"])
    assert true.loc[("unimportant first", "probability", "token removal"), "high"] < 0


def test_scores_without_a_number_are_not_compared(diffmask, pictures):
    scores = {"broken": torch.full((8, 3, 3), float("nan"))}
    with pytest.raises(VDMError, match="no ranking"):
        perturbation_areas(diffmask, pictures, scores, fills=("noise",), points=2)


def test_the_seed_of_the_areas_draws_the_noise(base, pictures):
    scores = {"a": torch.rand(8, 3, 3)}
    first, again, other = (
        perturbation_areas(base, pictures, scores, ["noise"], points=2, seed=s).query("method == 'a'")["area"].tolist()
        for s in (0, 0, 1)
    )
    assert first == again != other
