"""What the tests share: no network, one thread, a tiny base on 3×3 toy grids, and one short run of each job."""

import gc
import importlib.util
import os
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # before transformers and torch are imported

import numpy as np
import pytest
import torch

from vdm_utils.__main__ import main
from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.vit import build_classifier, fingerprint

gc.freeze()  # every training collects garbage: what was imported is none
torch.set_num_threads(1)  # a tiny model is fastest on one, and bits only agree between equal numbers of threads


def words(line):
    """A command line as a list."""
    return line.split()


def load_tool(name):
    """A program of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "tools" / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


COMMON = words("--batch_size 256 --num_workers 0 --max_steps 12 --log_every_n_steps 4")
# 5 steps are an epoch of digits: 12 steps see the data order of three epochs, and checkpoint 8 lies inside the second
BASE = words("train-base --dataset digits --patch_size 8 --lr 1e-2 --patience 9") + COMMON
# warm-up, Adam's moments and a large lr: a resumed run that lost any of them would be elsewhere after four steps
DIFFMASK = words("train --dataset digits --lr 1e-2 --gate_warmup_steps 10 --sample_images 1 --eps 0.001") + COMMON
DIFFMASK += words("--lr_alpha 3 --weighted_layer_distribution")


def same(first, second):
    """Equal bit for bit, whatever it is made of."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return np.array_equal(first, second) if isinstance(first, (np.ndarray, torch.Tensor)) else first == second


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def toy():
    """3×3 toy grids with 4-pixel cells: 12×12 pictures."""
    return load_data("toy", "train", image_size=12, length=96)


@pytest.fixture(scope="session")
def pictures(toy):
    """Pixel values [8, 3, 12, 12]."""
    return toy.batch(range(8))["pixel_values"]


def randomize(model, std=0.3, seed=0):
    """Weights large enough for every patch to matter: a fresh ViT says nearly the same about all pictures."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def base(toy):
    """A ViT of 4 layers (K = 6 gates) and 64 dimensions; shared, so whoever changes its weights fails the session."""
    model = randomize(build_classifier(image_size=12, patch_size=4, id2label=toy.id2label)).eval()
    model.classifier.weight.data *= 5  # masks cost up to 1 nat
    before = fingerprint(model)
    yield model
    assert fingerprint(model) == before


@pytest.fixture
def diffmask(base):
    """An untrained DiffMask whose gates already differ from patch to patch and are not saturated."""
    return VisionDiffMask.for_classifier(base, add_activation=0.0, mul_activation=3.0, normalize=True)


@pytest.fixture(scope="session")
def base_run(tmp_path_factory):
    """The folder of a finished `train-base` run of 12 steps, with checkpoints at 8 and 12."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    assert main([*BASE, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def diffmask_run(base_run):
    """The folder of a finished `train` run of 12 steps around `base_run`, beside it."""
    folder = base_run.parent / "diffmask"
    assert main([*DIFFMASK, "--from_pretrained", str(base_run), "--output_dir", str(folder)]) == 0
    return folder
