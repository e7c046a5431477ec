"""What a DiffMask training step and an explanation cost, in forward passes of the base measured in the same process.

    python benchmarks/speed.py            # ViT-B/16 at 224×224, batch 4, random weights (speed does not depend on them)
    python benchmarks/speed.py --size small --image_size 32 --patch_size 4 --batch_size 64     # the classifier of CIFAR-10

Every round times all of them in turn, so that a drift of the machine's speed cancels in the ratios; medians are printed.
The bounds are those of the project: at most 3.3 for a step (reference: 5.9), 1.15 for a mask (reference: 2.2). Attention
rollout and Grad-CAM stand beside them.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from vdm_utils.attributions import attention_rollout, grad_cam
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.training import DiffMaskSettings, DiffMaskTrainer, settings
from vdm_utils.vit import build_classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=("tiny", "small", "base"))
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    wanted = parser.parse_args()
    model = build_classifier("vit", wanted.size, wanted.image_size, wanted.patch_size).eval()
    chosen = settings(DiffMaskSettings, "quick")
    diffmask = VisionDiffMask.for_classifier(model, **chosen.config())
    optimizer = DiffMaskTrainer.make_optimizer(diffmask, chosen)
    pixels = torch.randn(wanted.batch_size, 3, wanted.image_size, wanted.image_size)

    @torch.no_grad()
    def forward():
        model(pixels)

    def step():
        layer = int(torch.randint(diffmask.config.num_gates, ()))
        diffmask(pixels, layer).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    jobs = {
        "base forward": forward,
        "training step": step,
        "explain(check=False)": lambda: diffmask.explain(pixels, check=False),
        "attention rollout": lambda: attention_rollout(model, pixels),
        "Grad-CAM": lambda: grad_cam(model, pixels),
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(wanted.rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if round_:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["base forward"])
    bounds = {"training step": "; bound 3.3, reference 5.9", "explain(check=False)": "; bound 1.15, reference 2.2"}
    print(
        f"{wanted.size}, {wanted.image_size}×{wanted.image_size}, batch {wanted.batch_size}: base forward {base:.2f} s"
    )
    for name in list(jobs)[1:]:
        ratios = [t / f for t, f in zip(seconds[name], seconds["base forward"])]
        print(f"{name:<22} {statistics.median(ratios):.2f} base forwards "
              f"(min {min(ratios):.2f}, max {max(ratios):.2f}{bounds.get(name, '')})")  # fmt: skip


if __name__ == "__main__":
    main()
