"""A further school for the CIFAR-10 classifier: it learns from a convolutional network, answer by answer and patch by patch.

    python tools/distil.py --from_pretrained data/checkpoints/cifar10/base --output_dir runs/distilled

A ViT has to discover that neighbouring pixels belong together; a convolutional network is built on it, and gets further in the
same time. It is trained first, on labels alone (87 % of the validation pictures in 15 minutes on two CPU cores). Then the ViT is
taught its answers (Hinton et al. 2015, arXiv 1503.02531) and, from the patches of two of its layers, its features: both have 8×8
places (locality guidance, Li et al. 2022, arXiv 2207.10026). In the later steps whole regions of the pictures are blanked for
the ViT, not for its teacher. The teacher is not kept. What ships did not go to this school.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from vdm_utils.checkpoints import save_classifier
from vdm_utils.data import Pictures, load_data
from vdm_utils.training import evaluate_classifier, regions
from vdm_utils.vit import PatchView, load_classifier

BATCH = 128


class Block(nn.Sequential):
    """3×3 convolution, halved in size where `pool`, normalised and rectified."""

    def __init__(self, inputs: int, outputs: int, pool: bool = False):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        super().__init__(convolution, nn.MaxPool2d(2) if pool else nn.Identity(), nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Teacher(nn.Module):
    """A small residual network; images [B, 3, 32, 32] -> logits [B, 10] and features [B, 4·width, 8, 8]."""

    def __init__(self, width: int = 48, classes: int = 10):
        super().__init__()
        layers, before = [Block(3, width // 2)], width // 2
        for after, pool in ((width, True), (2 * width, True), (4 * width, False)):
            layers += [Block(before, after, pool), Residual(Block(after, after), Block(after, after))]
            before = after
        self.features, self.head = nn.Sequential(*layers), nn.Linear(before, classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(pixel_values.contiguous(memory_format=torch.channels_last))
        return self.head(features.mean((2, 3))), features


def batches(data: Pictures, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Shuffled batches without end; every epoch is augmented anew."""
    generator = torch.Generator().manual_seed(seed)
    for data.epoch in itertools.count():
        yield from DataLoader(data, BATCH, shuffle=True, drop_last=True, generator=generator)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Up in a line to `peak`, and down in another to 0."""
    warmup = max(1, min(warmup, steps // 2))
    return peak * min((step + 1) / warmup, (steps - step) / (steps - warmup))


def train_teacher(data: Pictures, steps: int, seed: int) -> Teacher:
    torch.manual_seed(seed)
    teacher = Teacher()
    optimizer = torch.optim.SGD(teacher.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
    for step, batch in enumerate(itertools.islice(batches(data, seed), steps)):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, steps // 5, 0.2)
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = teacher(batch["pixel_values"])
        loss = F.cross_entropy(logits.float(), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"teacher, step {step} of {steps}: loss {loss.item():.3f}", file=sys.stderr)
    return teacher.eval()


class MissingPatches:
    """Leaves patches out of every picture: `kept` [B, n] are the indices of those that stay in the sequence, `blank` [B, N] is
    true on those whose embedding is zero."""

    def __init__(self, model: nn.Module):
        self.kept = self.blank = None
        view = PatchView(model)
        view.projection.register_forward_hook(self.zero)
        view.layers[0].register_forward_pre_hook(self.leave_out)

    def zero(self, module, inputs, output):
        return output if self.blank is None else output * ~self.blank.unsqueeze(-1)

    def leave_out(self, module, inputs):
        if self.kept is None:
            return inputs
        tokens = inputs[0]
        index = torch.cat([torch.zeros(len(tokens), 1, dtype=torch.long), self.kept + 1], dim=1)  # [CLS] stays
        return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])), *inputs[1:]


def teach(model: nn.Module, teacher: Teacher, data: Pictures, steps: int, halved: int, peak: float, seed: int) -> None:
    """Train `model` in place; in the first `halved` steps it sees half of the patches, which costs half as much."""
    torch.manual_seed(seed)
    model.train().requires_grad_(True)
    model.set_attn_implementation("eager")  # see vdm_utils.training.plain_attention
    missing, grid, width = MissingPatches(model), PatchView(model).grid, model.config.hidden_size
    depth, count, wide = model.config.num_hidden_layers, grid[0] * grid[1], teacher.head.in_features
    guides = nn.ModuleDict(
        {str(k): nn.Sequential(nn.LayerNorm(width), nn.Linear(width, wide)) for k in (depth // 2, depth)}
    )
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1] + list(guides.parameters())
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    for step, batch in enumerate(itertools.islice(batches(data, seed), steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 100, peak)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            wanted, features = teacher(batch["pixel_values"])
        features = features.float().flatten(2).transpose(1, 2)  # [B, N, wide]
        features = (features - features.mean((0, 1))) / (features.std((0, 1)) + 1e-3)
        missing.kept = missing.blank = None
        if step < halved:
            missing.kept = torch.rand(BATCH, count).argsort(1)[:, : count // 2]
            features = features.gather(1, missing.kept.unsqueeze(-1).expand(-1, -1, wide))
        else:  # 0–80 % of three pictures in five
            share = 0.8 * torch.rand(BATCH, 1) * (torch.rand(BATCH, 1) < 0.6)
            missing.blank = regions(share, grid, (2, 4)[step % 2])
        with torch.autocast("cpu", torch.bfloat16):
            output = model(pixel_values=batch["pixel_values"], output_hidden_states=True)
            guesses = [guide(output.hidden_states[int(k)][:, 1:]) for k, guide in guides.items()]
        soft = [(logits.float() / 2).log_softmax(1) for logits in (output.logits, wanted)]
        answers = 4 * F.kl_div(*soft, log_target=True, reduction="batchmean")
        labels = F.cross_entropy(output.logits.float(), batch["labels"])
        places = torch.stack([F.mse_loss(guess.float(), features) for guess in guesses]).mean()
        loss = 0.7 * answers + 0.3 * labels + max(0.05, 1 - step / steps) * places
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            numbers = ", ".join(f"{x.item():.3f}" for x in (answers, labels, places))
            print(f"step {step} of {steps}: answers, labels, places {numbers}", file=sys.stderr)
    missing.kept = missing.blank = None
    model.set_attn_implementation("sdpa")
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from_pretrained", required=True, help="the ViT, for pictures of 32×32 and patches of 4×4")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--dataset", default="CIFAR10")
    parser.add_argument("--teacher_steps", type=int, default=3510)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--halved", type=int, default=2000, help="steps in which the ViT sees half of the patches")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    train, validation = (
        load_data(wanted.dataset, "train", augment=["flip", "shift"]),
        load_data(wanted.dataset, "validation"),
    )
    teacher = train_teacher(train, wanted.teacher_steps, wanted.seed)
    with torch.no_grad():
        right = [
            (teacher(b["pixel_values"])[0].argmax(1) == b["labels"]).float() for b in DataLoader(validation, BATCH)
        ]
    print(f"the teacher is right on {torch.cat(right).mean():.1%} of the validation pictures", file=sys.stderr)
    model = load_classifier(wanted.from_pretrained)
    teach(model, teacher, train, wanted.steps, wanted.halved, wanted.lr, wanted.seed)
    save_classifier(model, wanted.output_dir)
    print(json.dumps({f"eval_{key}": value for key, value in evaluate_classifier(model, validation).items()}))


if __name__ == "__main__":
    main()
