"""A school for the CIFAR-10 classifiers: they learn from a convolutional network, answer by answer and patch by patch.

    python tools/distil.py --from_pretrained data/checkpoints/cifar10/base --output_dir runs/distilled
    python tools/distil.py --from_pretrained runs/distilled --output_dir runs/agreeing --agreement 3 --steps 1800
    python tools/distil.py --from_pretrained runs/distilled --output_dir runs/counter --grid_size 2 --class_idx 1

A ViT has to discover that neighbouring pixels belong together; a convolutional network is built on it, and gets further in the
same time. It is trained first, on labels alone (87 % of the validation pictures in 15 minutes on two CPU cores). Then the ViT is
taught its answers (Hinton et al. 2015, arXiv 1503.02531) and, from the patches of two of its layers, its features: both have 8×8
places (locality guidance, Li et al. 2022, arXiv 2207.10026). In the later steps whole regions of the pictures are blanked for
the ViT, not for its teacher. The teacher is not kept.

With `--agreement` every picture is seen twice, whole and with 20–85 % of its patches blank, and the two answers are drawn
together by so many times their KL divergence. What it learns there is to answer from a part as it answers from all.

With `--grid_size` the ViT learns to count the pictures of one class in a grid. The teacher looks at every cell by itself, and
what it thinks of each makes a distribution of counts; the tokens of a cell learn to tell whether theirs is counted. A classifier
of single pictures becomes a counter, its positions repeated in every cell. Nothing is blanked here but whole cells: a counter
that could do without any patch would have no use for one cell more than for another.

With `--resume` an interrupted school goes on from its last bookmark, every 200 steps, to the same end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.data_loader import skip_first_batches
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn
from torch.utils.data import DataLoader

from vdm_utils.__main__ import new_classifier
from vdm_utils.checkpoints import save_classifier, write_whole
from vdm_utils.data import Pictures, load_data
from vdm_utils.objective import kl_divergence
from vdm_utils.training import ClassifierSettings, evaluate_classifier, plain_attention, regions
from vdm_utils.vit import PatchView

BATCH = 128
BOOKMARK_EVERY = 200  # steps


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


def batches(data: Pictures, seed: int, size: int, skip: int) -> Iterator[dict[str, torch.Tensor]]:
    """Shuffled batches without end, but for the first `skip`; every epoch is augmented anew."""
    generator = torch.Generator().manual_seed(seed)
    for data.epoch in itertools.count():
        epoch = DataLoader(data, size, shuffle=True, drop_last=True, generator=generator)
        skipped = min(skip, len(epoch))
        skip -= skipped
        yield from skip_first_batches(epoch, skipped)


class Bookmark:
    """How far a training has come, in a safetensors file: one that was interrupted goes on from there, to the same end.

    What changes on the way are the modules and the moments of their optimizer; its learning rate is set in every step.
    """

    def __init__(self, file: Path, optimizer: torch.optim.Optimizer, **modules: nn.Module):
        self.file, self.optimizer, self.modules, self.step = file, optimizer, modules, 0
        if file.exists():
            saved: dict[str, dict] = {}
            for name, value in load_file(file).items():
                part, _, key = name.partition(".")
                saved.setdefault(part, {})[key] = value
            for name, module in modules.items():
                module.load_state_dict(saved[name])
            state: dict[int, dict] = {}
            for name, value in saved["optimizer"].items():
                number, _, key = name.partition(".")
                state.setdefault(int(number), {})[key] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
            torch.set_rng_state(saved["random state"][""])
            self.step = int(saved["step"][""])
            print(f"{file}: goes on after step {self.step}", file=sys.stderr)

    def save(self, step: int) -> None:
        saved = {"step": torch.tensor(step), "random state": torch.get_rng_state()}
        for name, module in self.modules.items():
            saved |= {f"{name}.{key}": value.contiguous() for key, value in module.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            saved |= {f"optimizer.{number}.{key}": value.contiguous() for key, value in moments.items()}
        write_whole(self.file, to_bytes(saved))

    def steps(self, data: Pictures, steps: int, seed: int, size: int = BATCH) -> Iterator[tuple[int, dict]]:
        """The steps that are left, each with its batch."""
        left = itertools.islice(batches(data, seed, size, self.step), steps - self.step)
        for step, batch in enumerate(left, self.step):
            yield step, batch
            if (step + 1) % BOOKMARK_EVERY == 0 or step + 1 == steps:
                self.save(step + 1)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Up in a line to `peak`, and down in another to 0."""
    warmup = max(1, min(warmup, steps // 2))
    return peak * min((step + 1) / warmup, (steps - step) / (steps - warmup))


def train_teacher(data: Pictures, steps: int, seed: int, file: Path) -> Teacher:
    torch.manual_seed(seed)
    teacher = Teacher()
    optimizer = torch.optim.SGD(teacher.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
    for step, batch in Bookmark(file, optimizer, teacher=teacher).steps(data, steps, seed):
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
        self.grid = rows, cols = view.grid
        self.board = ((torch.arange(rows)[:, None] + torch.arange(cols)) % 2).flatten().float()  # [N]
        view.projection.register_forward_hook(self.zero)
        view.layers[0].register_forward_pre_hook(self.leave_out)

    def draw(self, step: int, halved: int) -> None:
        """Half of the patches stay in the first `halved` steps; later 0–80 % are blank on three pictures in five."""
        self.kept = self.blank = None
        if step < halved:
            count = self.grid[0] * self.grid[1]
            self.kept = torch.rand(BATCH, count).argsort(1)[:, : count // 2]
        else:
            share = 0.8 * torch.rand(BATCH, 1) * (torch.rand(BATCH, 1) < 0.6)
            self.blank = regions(share, self.grid, (2, 4)[step % 2])

    def draw_second(self, pictures: int) -> None:
        """Pictures that come twice: the second time 20–85 % of the patches are blank, in regions or, twice as often, in specks;
        half of those go by the fields of a chessboard, whose colour is drawn."""
        share, noise = 0.2 + 0.65 * torch.rand(pictures, 1), torch.rand(pictures, len(self.board))
        colour, chess, specks = (torch.rand(pictures, 1) < chance for chance in (0.5, 0.5, 0.65))
        fields = (self.board - colour.float()).abs() + 0.7 * noise
        order = torch.where(chess, fields, noise).argsort(1).argsort(1)
        blobs = regions(share, self.grid, (2, 4)[int(torch.randint(2, ()))])
        blank = torch.where(specks, order < share * order.shape[1], blobs)
        self.blank = torch.cat([torch.zeros_like(blank), blank])

    def zero(self, module, inputs, output):
        return output if self.blank is None else output * ~self.blank.unsqueeze(-1)

    def leave_out(self, module, inputs):
        if self.kept is None:
            return inputs
        tokens = inputs[0]
        index = torch.cat([torch.zeros(len(tokens), 1, dtype=torch.long), self.kept + 1], dim=1)  # [CLS] stays
        return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])), *inputs[1:]


def cut_into_cells(pixel_values: torch.Tensor, side: int) -> torch.Tensor:
    """Grids [B, C, H, W] -> their cells [B·side², C, H/side, W/side], row by row."""
    cells = pixel_values.unflatten(3, (side, -1)).unflatten(2, (side, -1))  # [B, C, side, h, side, w]
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def put_together(features: torch.Tensor, side: int) -> torch.Tensor:
    """Features of the cells [B·side², d, rows, cols] -> of the patches of their grids [B, N, d], standardised over all."""
    plane = features.unflatten(0, (-1, side, side)).permute(0, 1, 4, 2, 5, 3)  # [B, side, rows, side, cols, d]
    patches = plane.flatten(1, 4)
    return (patches - patches.mean((0, 1))) / (patches.std((0, 1)) + 1e-3)


def count_probabilities(counted: torch.Tensor) -> torch.Tensor:
    """Independent probabilities [B, N] -> those of how many are true, [B, N + 1] (the Poisson binomial distribution)."""
    counts = torch.ones_like(counted[:, :1])
    for one in counted.unsqueeze(-1).unbind(1):  # [B, 1]
        counts = F.pad(counts, (0, 1)) * (1 - one) + F.pad(counts, (1, 0)) * one
    return counts


class CellReader(nn.Module):
    """Hidden states of the patches [B, N, d] of side × side cells -> the logit that a cell is counted, [B, side²]."""

    def __init__(self, width: int, grid: tuple[int, int], side: int):
        super().__init__()
        self.grid, self.side = grid, side
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        plane = patches.transpose(1, 2).unflatten(2, self.grid)  # [B, d, rows, cols]
        cells = F.adaptive_avg_pool2d(plane, self.side).flatten(2).transpose(1, 2)
        return self.read(cells).squeeze(-1)


def picture_loss(logits: torch.Tensor, wanted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The teacher's answers `wanted` [B, C], softened, and the labels."""
    soft = [(each / 2).log_softmax(1) for each in (logits, wanted)]
    return 0.7 * 4 * F.kl_div(*soft, log_target=True, reduction="batchmean") + 0.3 * F.cross_entropy(logits, labels)


def grid_loss(
    logits: torch.Tensor,
    read: torch.Tensor,
    counted: torch.Tensor,
    truth: torch.Tensor,
    cells: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """The count that the teacher's probabilities `counted` [B, N] make, the label, and every cell by itself (`read`, logits).

    Half is what the teacher thinks, half is `truth` [B, N]; an empty one of the `cells`, all of one colour, is not counted.
    """
    counted = (counted + truth) / 2
    counted = counted.masked_fill(cells.flatten(1).std(1).view_as(counted) < 1e-4, 0.0)
    count = 0.5 * F.cross_entropy(logits, count_probabilities(counted)) + 0.5 * F.cross_entropy(logits, labels)
    return count + F.binary_cross_entropy_with_logits(read, counted)


def teach(model: nn.Module, teacher: Teacher, data: Pictures, wanted: argparse.Namespace, file: Path) -> None:
    """Train `model` in place; single pictures with half of their patches in the first `halved` steps, which costs half as much,
    or, for `agreement`, all of them twice."""
    steps, seed, agreement = wanted.steps, wanted.seed, wanted.agreement
    torch.manual_seed(seed)
    model.train().requires_grad_(True)
    side, width, depth = getattr(data, "grid_size", 1), model.config.hidden_size, model.config.num_hidden_layers
    missing, wide = MissingPatches(model), teacher.head.in_features
    guides = nn.ModuleDict(
        {str(k): nn.Sequential(nn.LayerNorm(width), nn.Linear(width, wide)) for k in (depth // 2, depth)}
    )
    reader = CellReader(width, missing.grid, side)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1] + [*guides.parameters(), *reader.parameters()]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    views = 2 if agreement else 1
    bookmark = Bookmark(file, optimizer, model=model, guides=guides, reader=reader)
    for step, batch in bookmark.steps(data, steps, seed, BATCH // side**2 // views):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 100, wanted.lr)
        pixel_values, labels = batch["pixel_values"], batch["labels"]
        cells = cut_into_cells(pixel_values, side)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            thought, features = teacher(cells)
        thought, features = thought.float(), put_together(features.float(), side)  # [B, N, wide]
        if agreement:
            missing.draw_second(len(labels))
        elif side == 1:
            missing.draw(step, wanted.halved)
        if missing.kept is not None:
            features = features.gather(1, missing.kept.unsqueeze(-1).expand(-1, -1, wide))
        with torch.autocast("cpu", torch.bfloat16):
            output = model(pixel_values=pixel_values.repeat(views, 1, 1, 1), output_hidden_states=True)
            guesses = [guide(output.hidden_states[int(k)][: len(labels), 1:]) for k, guide in guides.items()]
            read = reader(output.hidden_states[depth - 1][:, 1:]) if side > 1 else None
        logits, *partial = output.logits.float().split(len(labels))  # of the whole, and of what is left of it
        if side == 1:
            answers = picture_loss(logits, thought, labels)
        else:
            counted = thought.softmax(1)[:, wanted.class_idx].view(-1, side**2)
            answers = grid_loss(logits, read.float(), counted, batch["truth"].flatten(1), cells, labels)
        for part in partial:  # both answers move
            apart = kl_divergence(logits, part).mean()
            answers = answers + agreement * apart + 0.3 * picture_loss(part, thought, labels)
        places = torch.stack([F.mse_loss(guess.float(), features) for guess in guesses]).mean()
        loss = answers + max(0.05, 1 - step / steps) * places
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            numbers = ", ".join(f"{x.item():.3f}" for x in (answers, places))
            print(f"step {step} of {steps}: answers, places {numbers}", file=sys.stderr)
    missing.kept = missing.blank = None
    model.eval()


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from_pretrained", required=True, help="the ViT, for pictures of 32×32 and patches of 4×4")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--dataset", default="CIFAR10")
    parser.add_argument("--teacher_steps", type=int, default=3510)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--halved", type=int, default=2000, help="steps in which the ViT sees half of the patches")
    parser.add_argument(
        "--agreement", type=float, default=0.0, help="weight of the KL between whole pictures and parts"
    )
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--grid_size", type=int, default=1, help="cells per side of the grids to count in")
    parser.add_argument("--class_idx", type=int, default=1, help="the class that is counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on where the last call was interrupted")
    wanted = parser.parse_args(words)
    if wanted.agreement and wanted.grid_size > 1:
        parser.error("--agreement is for single pictures: a counter that can do without a cell has no use for it")
    return wanted


def main() -> None:
    wanted = parse(sys.argv[1:])
    names, side = ("flip", "shift"), wanted.grid_size
    pictures, validation = (load_data(wanted.dataset, split, augment=names) for split in ("train", "validation"))
    folder = Path(wanted.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    bookmarks = [folder / f"{name}.bookmark" for name in ("teacher", "student")]
    for file in bookmarks if not wanted.resume else ():
        file.unlink(missing_ok=True)
    teacher = train_teacher(pictures, wanted.teacher_steps, wanted.seed, bookmarks[0])
    with torch.no_grad():
        right = [
            (teacher(b["pixel_values"])[0].argmax(1) == b["labels"]).float() for b in DataLoader(validation, BATCH)
        ]
    print(f"the teacher is right on {torch.cat(right).mean():.1%} of the validation pictures", file=sys.stderr)
    train = pictures
    if side > 1:
        shape = {"grid_size": side, "class_idx": wanted.class_idx, "augment": names, "augment_cells": True}
        train, validation = (
            load_data(f"{wanted.dataset}_QA", split, empty_cells=0.5, **shape) for split in ("train", "validation")
        )
    torch.manual_seed(wanted.seed)
    start = {"from_pretrained": wanted.from_pretrained, "image_size": train.image_size[0], "grid_size": side}
    model = new_classifier(ClassifierSettings(**start), train)
    with plain_attention(model, side == 1):  # the faster one where there are few patches
        teach(model, teacher, train, wanted, bookmarks[1])
    save_classifier(model, wanted.output_dir)
    for file in bookmarks:
        file.unlink()
    print(json.dumps({f"eval_{key}": value for key, value in evaluate_classifier(model, validation).items()}))


if __name__ == "__main__":
    main()
