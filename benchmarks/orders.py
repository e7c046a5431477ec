"""Is there a rule for these masks? `python benchmarks/orders.py cifar10`, and `shapes`.

A gate network is one rule for all pictures. What would simple rules cost? The best 30, 50 and 70 % of the patches of 500 test
pictures are kept, by several orders, some of which never look at the picture (every other patch, from the centre out), and one
that looks at it without asking what matters (kernel herding: those patches first that stand best for all). KL in nats, and the
share of pictures with KL ≤ ε and with the same class, under the fill of the DiffMask that ships.

How many are needed differs from picture to picture. "cut to fit" asks the classifier: of 16 sizes the smallest that keeps both
promises (`refine.cut_to_fit`). "by entropy" only looks at how unsure the answer on the whole picture is: for every tenth of
the validation pictures, in the order of that entropy, the smallest size that keeps both promises on 85 % of them. The last
rows show the masks of the DiffMask as they are, and of the one whose gates are told nothing, where one ships beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from shipped import DATASETS, promise, shipped
from torch.distributions import Categorical
from transformers.utils import logging as transformers_logging

from vdm_utils.attributions import METHODS
from vdm_utils.data import load_data
from vdm_utils.diffmask import Explanation, VisionDiffMask
from vdm_utils.explorers import with_mask
from vdm_utils.gates import herding_ranks
from vdm_utils.metrics import top_patches
from vdm_utils.notebook import CHECKPOINTS
from vdm_utils.objective import kl_divergence
from vdm_utils.refine import cut_to_fit, promise_held

SHARES = torch.arange(1, 17) / 16
BINS, ENOUGH = 10, 0.85
HERDING_LAYER = 2  # the state after the first layer


def fixed_orders(count: int, rows: int, cols: int) -> dict[str, torch.Tensor]:
    """Scores [count, rows, cols] that no picture had a say in; equal ones are put in a random order."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(count, rows, cols, generator=generator)
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    distance = (row - (rows - 1) / 2).square() + (col - (cols - 1) / 2).square()
    return {
        "random": noise,
        "every other patch": (row + col) % 2 + 0.5 * noise,
        "from the centre out": 1e-3 * noise - distance,
    }


def sizes(scores: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Masks 0/1 of the patches with the largest `scores` [B, rows, cols]: [B, S, rows, cols] for `shares` [S] or [B, S]."""
    return top_patches(scores, (shares * scores[0].numel()).round()).float()


@torch.no_grad()
def promises_kept(
    diffmask: VisionDiffMask, pixel_values: torch.Tensor, shown: Explanation, scores: torch.Tensor
) -> torch.Tensor:
    """For each of `SHARES` whether KL ≤ ε and the class is the same: bool [B, 16], true in the last column (all are kept)."""
    states, kept = diffmask.view.encode(pixel_values), []
    for mask in sizes(scores, SHARES).unbind(1):
        logits = diffmask.masked_logits(pixel_values, states, mask)
        kl = kl_divergence(shown.logits, logits)
        kept.append(promise_held(shown.logits, logits, kl, diffmask.config.eps))
    return torch.stack(kept, 1)


def size_by_entropy(entropy: torch.Tensor, kept: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Shares [A] for pictures of the entropies `asked` [A], learned from those [B] of which `promises_kept` [B, 16] is known."""
    edges = entropy.quantile(torch.arange(1, BINS) / BINS)
    groups, learned = torch.bucketize(entropy, edges), torch.ones(BINS)
    for group in range(BINS):
        learned[group] = SHARES[(kept[groups == group].float().mean(0) >= ENOUGH).int().argmax()]
    return learned[torch.bucketize(asked, edges)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=DATASETS)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--table", type=Path, help="CSV to write")
    wanted = parser.parse_args()
    transformers_logging.disable_progress_bar()
    diffmask, _, batch = shipped(wanted.task, wanted.images)
    eps, rows = diffmask.config.eps, {}
    validation, count = load_data(DATASETS[wanted.task], "validation"), len(batch["labels"])
    learning = validation.batch(range(min(wanted.images, len(validation))))
    parts, unseen = batch["pixel_values"].split(100), learning["pixel_values"].split(100)

    def note(order: str, kept: str, found: list[Explanation]) -> None:
        rows[order, kept] = pd.concat([promise(one, eps) for one in found]).mean()
        print(f"{order}, {kept}:", rows[order, kept].round(3).to_dict(), flush=True)

    def all_scores(pictures: tuple[torch.Tensor], seen: list[Explanation]) -> dict[str, list[torch.Tensor]]:
        scores = fixed_orders(sum(map(len, pictures)), *diffmask.view.grid)
        scores = {name: list(order.split(100)) for name, order in scores.items()}
        for name in ("Attention rollout", "Grad-CAM"):
            scores[name] = [METHODS[name](diffmask.base, part) for part in pictures]
        states = [diffmask.view.encode(part, HERDING_LAYER).hidden[HERDING_LAYER] for part in pictures]
        scores["kernel herding"] = [herding_ranks(state).unflatten(-1, diffmask.view.grid) for state in states]
        for name, one in plain.items():
            scores[name] = [one.explain(part, check=False).scores for part in pictures]
        return scores | {"Vision DiffMask": [one.scores for one in seen]}

    folder = CHECKPOINTS / wanted.task / "diffmask-votes"
    plain = (
        {"gates told nothing": VisionDiffMask.from_pretrained(folder, base=diffmask.base)} if folder.is_dir() else {}
    )
    shown, known = ([diffmask.explain(part) for part in pictures] for pictures in (parts, unseen))
    entropy, asked = (torch.cat([Categorical(logits=e.logits).entropy() for e in seen]) for seen in (known, shown))
    learned_from = all_scores(unseen, known)
    for name, order in all_scores(parts, shown).items():

        def cut(kept: str, shares: torch.Tensor, name: str = name, order: list[torch.Tensor] = order) -> None:
            masks = [sizes(scores, share)[:, 0] for scores, share in zip(order, shares[:, None].split(100))]
            note(name, kept, [with_mask(diffmask, *three) for three in zip(parts, shown, masks)])

        for share in (0.3, 0.5, 0.7):
            cut(f"{share:.0%}", torch.full((count,), share))
        note(name, "cut to fit", [cut_to_fit(diffmask, part, scores=scores) for part, scores in zip(parts, order)])
        before = torch.cat([promises_kept(diffmask, *three) for three in zip(unseen, known, learned_from[name])])
        cut("by entropy", size_by_entropy(entropy, before, asked))
    for name, one in plain.items():
        note(name, "as shown", [one.explain(part) for part in parts])
    note("Vision DiffMask", "as shown", shown)
    if wanted.table:
        pd.DataFrame.from_dict(rows, orient="index").rename_axis(["order", "patches"]).to_csv(
            wanted.table, float_format="%.4f"
        )


if __name__ == "__main__":
    main()
