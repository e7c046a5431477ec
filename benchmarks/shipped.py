"""What the programs that measure shipped masks share: a pair with test pictures, and what a mask keeps and promises."""

from __future__ import annotations

import pandas as pd
import torch

from vdm_utils.data import load_data
from vdm_utils.diffmask import Explanation, VisionDiffMask
from vdm_utils.notebook import checkpoint

DATASETS = {"cifar10": "CIFAR10", "shapes": "shapes", "digits": "digits"}


def shipped(task: str, count: int, part: str = "diffmask") -> tuple[VisionDiffMask, list[int], dict[str, torch.Tensor]]:
    """A DiffMask of a task, the indices of `count` test pictures spread over the classes, and their batch."""
    data = load_data(DATASETS[task], "test")
    chosen = torch.linspace(0, len(data) - 1, min(count, len(data))).long().tolist()
    return VisionDiffMask.from_pretrained(checkpoint(task, part)), chosen, data.batch(chosen)


def promise(shown: Explanation, eps: float) -> pd.DataFrame:
    """One row per picture: the share kept, the KL in nats, and whether KL ≤ ε and the class held."""
    same = shown.logits.argmax(-1) == shown.masked_logits.argmax(-1)
    return pd.DataFrame(
        {"kept": shown.kept, "KL": shown.kl, "KL ≤ ε": (shown.kl <= eps).int(), "same class": same.int()}
    )
