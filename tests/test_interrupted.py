"""Interrupted work: killed processes, full and read-only disks, downloads at the same time, and a Hub out of reach.

Every scenario runs in a process of its own, forked from one that has imported everything already.
"""

import ctypes
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.datasets.utils
import transformers
from conftest import BASE, DIFFMASK, randomize, same
from fake_hub import MASK, MODEL, fake_hub
from huggingface_hub import constants
from safetensors.torch import load_file
from torchvision.datasets import CIFAR10, MNIST

from vdm_utils import checkpoints, training
from vdm_utils.__main__ import main
from vdm_utils.checkpoints import CHECKSUMS, STATE, last_checkpoint, write_whole
from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.errors import VDMError
from vdm_utils.training import ClassifierSettings, settings, train_classifier
from vdm_utils.vit import build_classifier, fingerprint, load_classifier

INTERVAL = 4  # steps between two saves, of 12
FORKS = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def imported():
    """The process that all others are forked from: it imports forked.py, which it finds by PYTHONPATH only."""
    FORKS.set_forkserver_preload(["forked"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


def _child(log, function, words):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.exit(function(*words))


class Forked:
    """A call in a new process: `wait()` gives its exit status (−9: killed), `log` what it wrote."""

    def __init__(self, folder, function, *words):
        self.file = Path(folder) / f"{time.monotonic_ns()}.log"
        self.process = FORKS.Process(target=_child, args=(self.file, function, words))
        self.process.start()

    def wait(self, seconds=300):
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.process.exitcode

    @property
    def log(self):
        return self.file.read_text() if self.file.exists() else ""


def run(folder, function, *words):
    """(exit status, log) of a call in a new process."""
    forked = Forked(folder, function, *words)
    return forked.wait(), forked.log


# ---------------------------------------------------------------- in the new process


def train(words, first_is_best=True):
    """A command line; with `first_is_best` a base never gets better than at its first evaluation."""
    if first_is_best:
        training._accuracy_and_score = lambda prediction: {"accuracy": 0.0, "score": 0.0}
    return main(words)


def train_aloud(words):
    """One that says of every step that it is done: a run that begins anew would end the same."""
    step = transformers.Trainer.training_step
    transformers.Trainer.training_step = lambda *args: print("a step") or step(*args)
    return train(words)


def intercept(name, act):
    """Where a file `name` of checkpoint-12 is written, or a folder `name` deleted, do `act(path, write)` instead.

    The checksums that a DiffMask writes beside its weights, before the checkpoint is whole, are left alone.
    """

    def patched(owner, attribute, place):
        write = getattr(owner, attribute)

        def call(*args, **kwargs):
            path = Path(args[place])
            meant = path.name == name and (attribute == "rmtree" or path.parent.name == "checkpoint-12")
            if meant and (name != CHECKSUMS or (path.parent / STATE).exists()):
                return act(path, lambda: write(*args, **kwargs))
            return write(*args, **kwargs)

        setattr(owner, attribute, call)

    patched(transformers.modeling_utils, "safe_save_file", 1)
    patched(torch, "save", 1)
    patched(transformers.TrainerState, "save_to_json", 1)
    patched(checkpoints, "write_whole", 0)
    patched(shutil, "rmtree", 0)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(path, write):
    die()


def die_halfway(path, write):
    if path.is_dir():
        (path / "optimizer.pt").unlink()
    else:
        write()
        os.truncate(path, path.stat().st_size // 2)
    die()


def train_and_die(words, name, act):
    intercept(name, act)
    return train(words)


# ---------------------------------------------------------------- SIGKILL


FLAG = {"train-base": "--checkpoint", "train": "--diffmask_checkpoint"}
# late stages first, so that a save finds what those before it have left
STAGES = [
    ("model.safetensors", die_before),
    (CHECKSUMS, die_before),
    (STATE, die_halfway),
    ("optimizer.pt", die_before),
    (STATE, die_before),
    ("rng_state.pth", die_halfway),
    ("optimizer.pt", die_halfway),
    ("model.safetensors", die_halfway),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{job: (its command line, without an output folder; the folder of an uninterrupted run)}."""
    folder, runs = tmp_path_factory.mktemp("whole"), {}
    # a base that gets no better stops early, after step 12, as well
    base = [*BASE, "--max_steps", "20", "--patience", "2"]
    # without figures, which take half of the time
    mask = [*DIFFMASK, "--from_pretrained", str(folder / "train-base"), "--sample_images", "0"]
    for job, words in (("train-base", base), ("train", mask)):
        runs[job] = words, folder / job
        status, log = run(folder, train, [*words, "--output_dir", str(folder / job)])
        assert status == 0, log
    return runs


def assert_same_run(first, second):
    """The last checkpoints, the finished models and everything that was logged, but for times, are equal."""
    for name in ("model.safetensors", "checkpoint-12/model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        states = [torch.load(folder / "checkpoint-12" / name, weights_only=False) for folder in (first, second)]
        assert same(*states), name
    tables = [pd.read_csv(folder / "metrics.csv") for folder in (first, second)]
    timed = (
        "_time",
        "_runtime",
        "_per_second",
        "train_loss",
        "total_flos",
    )  # of the time since the start or resumption
    tables = [table[[c for c in table if not c.endswith(timed)]].dropna(thresh=3) for table in tables]
    pd.testing.assert_frame_equal(*(table.reset_index(drop=True) for table in tables), check_like=True)
    verified = [last_checkpoint(folder).name for folder in (first, second)]
    assert verified == ["checkpoint-12"] * 2


@pytest.mark.parametrize("job", ["train-base", "train"])
def test_killed_at_every_stage_of_saving(whole, tmp_path, job):
    words, uninterrupted = whole[job]
    words = [*words, "--output_dir", str(tmp_path / "run"), FLAG[job], "last"]
    for number, (name, act) in enumerate(STAGES):
        status, log = run(tmp_path, train_and_die, words, name, act)
        assert status == -signal.SIGKILL, (name, act, log)
        assert last_checkpoint(tmp_path / "run").name == "checkpoint-8", (
            name,
            act,
        )  # nothing but the last save is lost
        assert log.count("passed over, not whole") == (number > 0) and log.count("checkpoint-12 (") == (number > 0)
    oldest = "checkpoint-8" if job == "train-base" else "checkpoint-4"  # of a base the best, 4, stays
    status, log = run(tmp_path, train_and_die, words, oldest, die_halfway)
    assert status == -signal.SIGKILL and last_checkpoint(tmp_path / "run").name == "checkpoint-12", log
    assert run(tmp_path, train, words)[0] == 0
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("job", ["train-base", "train"])
def test_killed_at_random_times(whole, tmp_path, job):
    words, uninterrupted = whole[job]
    folder, seed = tmp_path / "run", random.randrange(10**6)
    words, chance = [*words, "--output_dir", str(folder), FLAG[job], "last"], random.Random(seed)
    for save in (4, 8):  # somewhere in the steps before it or after it
        forked, before = Forked(tmp_path, train, words), time.monotonic()
        while not (folder / f"checkpoint-{save}").exists() and forked.process.is_alive():
            assert time.monotonic() < before + 300
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        forked.process.kill()
        assert forked.wait() in (-signal.SIGKILL, 0)
        logged = pd.read_csv(folder / "metrics.csv")["step"].max()
        kept = last_checkpoint(folder)
        assert int(kept.name[11:] if kept else 0) >= logged - INTERVAL, seed
    assert run(tmp_path, train, words)[0] == 0
    assert_same_run(uninterrupted, folder)


@pytest.mark.parametrize("job", ["train-base", "train"])
def test_a_run_resumed_in_a_new_process_is_the_uninterrupted_run(whole, tmp_path, job):
    """From a checkpoint by name, into another folder: the rows from before the break are there, too."""
    words, uninterrupted = whole[job]
    middle = uninterrupted / ("checkpoint-4" if job == "train-base" else "checkpoint-8")  # of a base the best, 4, stays
    words = [*words, FLAG[job], str(middle), "--output_dir", str(tmp_path / "resumed")]
    status, log = run(tmp_path, train_aloud, words)
    assert (status, log.count("a step")) == (0, 12 - int(middle.name[-1])), log
    assert_same_run(uninterrupted, tmp_path / "resumed")
    weights, before = (load_file(folder / "model.safetensors") for folder in (uninterrupted / "checkpoint-12", middle))
    assert not same(weights, before)  # there was something to learn
    if job == "train":
        moved = {"multiplier.parameter", "placeholder", "running"} <= set(weights)
        assert moved and weights["multiplier.parameter"].std() > 0


def test_killed_on_the_command_line(whole, tmp_path):
    words, uninterrupted = whole["train"]
    folder = tmp_path / "run"
    line = [sys.executable, "-m", "vdm_utils", *words, "--output_dir", str(folder)]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(line, stdout=log, stderr=log) as process:
        while not (folder / "checkpoint-8").exists() and process.poll() is None:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    status, log = run(tmp_path, main, [*line[3:], FLAG["train"], "last"])
    assert status == 0, log
    assert_same_run(uninterrupted, folder)


def test_the_last_checkpoint_is_a_whole_one(whole, tmp_path, caplog):
    folder = Path(shutil.copytree(whole["train"][1], tmp_path / "run"))
    (folder / "checkpoint-best").mkdir()
    shutil.copytree(folder / "checkpoint-8", folder / "checkpoint-100")
    assert last_checkpoint(folder).name == "checkpoint-100"  # by number, not by name
    for damage in (lambda f: f.unlink(), lambda f: os.truncate(f, f.stat().st_size // 2)):
        for name in (STATE, CHECKSUMS, "optimizer.pt", "model.safetensors", "config.json"):
            good = (folder / "checkpoint-100" / name).read_bytes()
            damage(folder / "checkpoint-100" / name)
            caplog.clear()
            assert last_checkpoint(folder).name == "checkpoint-12", name
            assert "passed over, not whole" in caplog.text and "checkpoint-100" in caplog.text
            (folder / "checkpoint-100" / name).write_bytes(good)
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / STATE).unlink(missing_ok=True)
    assert last_checkpoint(folder) is None


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, failing):
    (tmp_path / "metrics.csv").write_text("as it was")

    def half(file, text, **kwargs):
        with open(file, "wb") as opened:
            opened.write(b"ha")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(VDMError, match="No space left"):
        patch.setattr(Path, failing, half)
        write_whole(tmp_path / "metrics.csv", "half of it")
    assert (tmp_path / "metrics.csv").read_text() == "as it was"
    write_whole(tmp_path / "metrics.csv", "new")
    assert (tmp_path / "metrics.csv").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- disks


NO_MOUNT = 77


def mount(disk, options):
    """Mount a small disk, or change how it is mounted."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)


def own_disk(disk):
    """A new tmpfs that only this process sees; an exit status where the system does not allow that."""
    user = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER, CLONE_NEWNS
        sys.exit(NO_MOUNT)
    for name, text in zip(("setgroups", "uid_map", "gid_map"), ("deny", f"0 {user[0]} 1", f"0 {user[1]} 1")):
        Path("/proc/self", name).write_text(text)
    try:
        mount(disk, "size=20m")
    except subprocess.CalledProcessError:
        sys.exit(NO_MOUNT)


def fill(path):
    """Fill the disk to the last byte."""
    with open(path, "wb", buffering=0) as file:
        size = 2**20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def train_on_a_bad_disk(words, disk, trouble, name, copy):
    """Train on a disk that gets full or read-only when `name` is written, then again once it is as it was."""
    own_disk(disk)

    def act(path, write):
        if first and trouble == "full":
            fill(f"{disk}/filler")
        elif first:
            mount(disk, "remount,ro")
        return write()

    first = True
    intercept(name, act)
    status = train(words)
    print("second run", flush=True)
    if trouble == "full":
        Path(disk, "filler").unlink()
    else:
        mount(disk, "remount,rw")
    first, kept = False, last_checkpoint(Path(disk, "run"))
    again = train(words)
    shutil.copytree(f"{disk}/run", copy)
    return 0 if (status, kept.name, again) == (2, "checkpoint-8", 0) else 1


def skip_without_mount(status):
    if status == NO_MOUNT:
        pytest.skip("mounting a tmpfs needs root or user namespaces")


@pytest.mark.parametrize("trouble", ["full", "read-only"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", STATE, CHECKSUMS])
def test_a_bad_disk_leaves_the_last_checkpoint_and_a_message(whole, tmp_path, trouble, name):
    words, uninterrupted = whole["train"]
    (tmp_path / "disk").mkdir()
    words = [*words, "--output_dir", str(tmp_path / "disk/run"), FLAG["train"], "last"]
    status, log = run(tmp_path, train_on_a_bad_disk, words, tmp_path / "disk", trouble, name, tmp_path / "copy")
    skip_without_mount(status)
    assert status == 0, log
    message = log.split("second run")[0].splitlines()
    assert message[0] == "error: cannot save the run" and len(message) == 5, log
    assert str(tmp_path / "disk/run") in log and "resume from 'last'" in log and "Traceback" not in log
    assert_same_run(uninterrupted, tmp_path / "copy")


def train_read_only(words, disk):
    own_disk(disk)
    mount(disk, "remount,ro")
    training.Trainer.train = None  # too late
    return main(words)


@pytest.mark.parametrize("job", ["train-base", "train"])
def test_a_read_only_folder_is_refused_before_training(whole, tmp_path, job):
    words = [*whole[job][0], "--output_dir", str(tmp_path / "new" / "run")]
    (tmp_path / "new").mkdir()
    status, log = run(tmp_path, train_read_only, words, tmp_path / "new")
    skip_without_mount(status)
    assert status == 2 and log.startswith("error: ") and len(log.splitlines()) == 5, log
    assert "another folder" in log and str(tmp_path / "new") in log


@pytest.mark.parametrize("where", ["file", "file/run"])
def test_a_file_where_a_folder_should_be_is_refused_before_training(toy, tmp_path, monkeypatch, where):
    monkeypatch.setattr(training.Trainer, "train", None)
    (tmp_path / "file").write_text("mine")
    model = build_classifier(image_size=12, patch_size=4, id2label=toy.id2label)
    with pytest.raises(VDMError, match="cannot save the run") as caught:
        train_classifier(model, toy, toy, settings(ClassifierSettings, "quick"), tmp_path / where)
    assert str(tmp_path / where) in str(caught.value) and (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------- downloads


def md5(content):
    return hashlib.md5(content).hexdigest()


def idx(array):
    """An array of bytes as a file of MNIST."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """A server with a stand-in for MNIST and for CIFAR-10, and (class, what torchvision knows of it) by name."""
    folder, draw = tmp_path_factory.mktemp("mirror"), np.random.default_rng(0)
    resources = []
    for part, count in (("train", 60), ("t10k", 40)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            packed = gzip.compress(idx(draw.integers(0, 10, shape, dtype=np.uint8)))
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(packed)
            resources.append((f"{part}-{kind}-ubyte.gz", md5(packed)))
    files = {"batches.meta": pickle.dumps({"label_names": [str(n) for n in range(10)]})}
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        pixels = draw.integers(0, 256, (10, 3072), dtype=np.uint8)
        files[name] = pickle.dumps({"data": pixels, "labels": list(range(10))})
    with tarfile.open(folder / CIFAR10.filename, "w:gz") as archive:
        for name, content in files.items():  # the names first: also in the true archive they are not the last file
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    sums = [[name, md5(content)] for name, content in files.items()]
    with fake_hub(folder) as server:
        url = f"{server.url}/mirror/"
        cifar10 = {"url": url + CIFAR10.filename, "tgz_md5": md5((folder / CIFAR10.filename).read_bytes())}
        cifar10 |= {"train_list": sums[1:6], "test_list": sums[6:], "meta": CIFAR10.meta | {"md5": sums[0][1]}}
        server.known = {"MNIST": {"mirrors": [url], "resources": resources}, "CIFAR10": cifar10}
        yield server


def fetch(name, known, place, answer, function=None, count=0):
    """Load a dataset and write its digest to `answer`; die halfway through the `count`-th call of a torchvision function."""
    dataset = {"MNIST": MNIST, "CIFAR10": CIFAR10}[name]
    for attribute, value in known.items():
        setattr(dataset, attribute, value)
    os.environ["NO_PROXY"] = "127.0.0.1"
    os.environ.pop("VDM_DATA_DIR", None)
    os.chdir(Path(answer).parent)  # nor in data/
    calls, whole = [], getattr(torchvision.datasets.utils, function or "extract_archive")

    def half(*args, **kwargs):
        whole(*args, **kwargs)
        calls.append(args)
        if len(calls) == count:
            unpacked = [f for f in Path(place).rglob("*") if f.suffix not in (".gz", ".lock") and f.is_file()]
            newest = max(unpacked, key=lambda f: f.stat().st_ctime_ns) if function == "extract_archive" else args[1]
            os.truncate(newest, os.path.getsize(newest) // 2)
            die()

    if function:
        setattr(torchvision.datasets.utils, function, half)
    data = load_data(name, "test", data_dir=place)
    Path(answer).write_text(
        f"{len(data)} {hashlib.sha256(data.batch(range(len(data)))['pixel_values'].numpy()).hexdigest()}"
    )


def archives(name):
    return [CIFAR10.filename] if name == "CIFAR10" else [file for file, _ in MNIST.resources]


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10"])
def test_processes_that_download_at_once_do_it_once(mirror, tmp_path, name):
    mirror.asked.clear()
    both = [Forked(tmp_path, fetch, name, mirror.known[name], tmp_path / "data", tmp_path / f"{n}") for n in range(2)]
    assert [process.wait() for process in both] == [0, 0], [process.log for process in both]
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()
    assert mirror.asked == dict.fromkeys(archives(name), 2)  # where does it lead to?, and the file


@pytest.mark.parametrize(
    ("name", "function", "count"),
    [
        ("MNIST", "extract_archive", 4),
        ("MNIST", "_urlretrieve", 4),
        ("CIFAR10", "extract_archive", 1),
        ("CIFAR10", "_urlretrieve", 1),
    ],
)
def test_a_killed_download_is_not_taken_for_whole(mirror, tmp_path, name, function, count):
    call = name, mirror.known[name], tmp_path / "data"
    status, log = run(tmp_path, fetch, *call, tmp_path / "never", function, count)
    assert status == -signal.SIGKILL and not (tmp_path / "never").exists(), log
    mirror.asked.clear()
    status, log = run(tmp_path, fetch, *call, tmp_path / "again")
    assert status == 0, log
    assert sum(mirror.asked.values()) == (2 if function == "_urlretrieve" else 0)  # whole archives are kept
    assert run(tmp_path, fetch, name, mirror.known[name], tmp_path / "fresh", tmp_path / "first")[0] == 0
    assert (tmp_path / "again").read_text() == (tmp_path / "first").read_text()


# ---------------------------------------------------------------- the Hub


SECONDS = 10  # until there is a model or a sentence


def queued():
    """Seconds that this thread has waited for a processor, which other programs took (Linux)."""
    schedule = Path("/proc/self/schedstat")
    return int(schedule.read_text().split()[1]) / 1e9 if schedule.exists() else 0.0


def from_hub(endpoint, cache, answer, proxy=None, name=MODEL):
    """Load a model of the fake Hub and write to `answer` how long it took, its fingerprint, and the error if any."""
    constants.ENDPOINT, constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = endpoint, str(cache), False
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    os.environ |= {"HTTP_PROXY": proxy, "NO_PROXY": ""} if proxy else {"NO_PROXY": "127.0.0.1"}
    found, error, start = None, "", time.monotonic() - queued()
    try:
        found = fingerprint((load_classifier if name == MODEL else VisionDiffMask.from_pretrained)(name))
    except VDMError as raised:
        error = str(raised)
    Path(answer).write_text(json.dumps([time.monotonic() - queued() - start, found, error]))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A good Hub with a random tiny ViT and a DiffMask around it, their fingerprints, and the cache of someone who has loaded both."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    model = randomize(build_classifier(image_size=16, patch_size=8, num_channels=1))  # fit for digits
    model.save_pretrained(folder / "model")
    model.name_or_path = MODEL
    mask = VisionDiffMask.for_classifier(model)
    mask.save_pretrained(folder / "mask")
    with fake_hub(folder / "model") as server:
        server.models[MASK] = folder / "mask"
        server.fingerprint, server.mask_fingerprint, server.cache = (
            fingerprint(model),
            fingerprint(mask),
            folder / "cache",
        )
        for name, mark in ((MODEL, server.fingerprint), (MASK, server.mask_fingerprint)):
            status, log = run(folder, from_hub, f"{server.url}/hub", server.cache, folder / "answer", None, name)
            seconds, found, error = json.loads((folder / "answer").read_text())
            assert (status, found, error, seconds < SECONDS) == (0, mark, "", True), log
        assert server.asked[f"{MODEL}/resolve/main/model.safetensors"] >= 1
        yield server


@pytest.mark.parametrize("kind", ["refused", "proxy", "slow", "drip", "gone", "broken"])
def test_a_hub_out_of_reach(hub, tmp_path, kind):
    """Refused, a dead proxy, silence, a byte a second, a 404 and a 503: the copy in the cache, or one clear message."""
    closed = "http://127.0.0.1:9"  # discard: nobody listens
    endpoint, proxy = {"refused": (closed, None), "proxy": (f"{hub.url}/hub", closed)}.get(
        kind, (f"{hub.url}/{kind}", None)
    )
    caches = {True: hub.cache, False: tmp_path / "empty"}
    # on a busy machine a process may take long to start: what counts is the time that it measures itself
    started = {
        cached: Forked(tmp_path, from_hub, endpoint, cache, tmp_path / f"{cached}", proxy)
        for cached, cache in caches.items()
    }
    for cached, forked in started.items():
        assert forked.wait() == 0, forked.log
        seconds, found, error = json.loads((tmp_path / f"{cached}").read_text())
        assert seconds < SECONDS, (cached, seconds)
        assert found == (hub.fingerprint if cached else None), error
        if cached:
            assert forked.log.count("using the copy in the cache") == 1, forked.log
        else:
            assert error.startswith("cannot load the classifier") and 1 < len(error.splitlines()) <= 5, error
            assert MODEL in error and "check the name, or the network" in error
            reason = {"slow": "no answer within|Timeout", "drip": "no answer within", "gone": "404", "broken": "503"}
            assert any(word in error for word in reason.get(kind, "Connect").split("|")), error


@pytest.mark.parametrize("kind", ["slow", "drip"])
def test_a_silent_hub_is_waited_for_once(hub, tmp_path, kind):
    """A DiffMask and its base are two models: both are in the cache, and only the first is asked for."""
    status, log = run(tmp_path, from_hub, f"{hub.url}/{kind}", hub.cache, tmp_path / "answer", None, MASK)
    seconds, found, error = json.loads((tmp_path / "answer").read_text())
    assert (status, found, error) == (0, hub.mask_fingerprint, ""), log
    assert seconds < 7.5 and log.count("no answer within 5 s") == 2, (seconds, log)


def test_a_hub_that_was_silent_is_asked_again(monkeypatch):
    asked, answer = [], threading.Event()
    monkeypatch.setattr(checkpoints, "get_hf_file_metadata", lambda url, **how: asked.append(url) or answer.wait(60))
    monkeypatch.setattr(checkpoints, "HUB_SECONDS", 0.2)
    monkeypatch.setattr(checkpoints, "silent_until", 0.0)
    assert [checkpoints.hub_trouble(name) is None for name in ("a/mask", "a/base")] == [False, False]
    assert len(asked) == 1
    time.sleep(0.25)
    answer.set()
    assert checkpoints.hub_trouble("a/mask") is None and checkpoints.hub_trouble("a/base") is None and len(asked) == 3


def test_a_silent_hub_on_the_command_line(hub, tmp_path):
    """The same through the environment variables, which are read when the libraries are imported."""
    names = {"HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(hub.cache), "NO_PROXY": "127.0.0.1"}
    environment = os.environ | names | {"HF_ENDPOINT": f"{hub.url}/slow"}
    line = [sys.executable, "-m", "vdm_utils", "eval-base", "--dataset", "digits", "--from_pretrained", MODEL]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and json.loads(done.stdout)["checkpoint"] == MODEL, done.stderr
    assert "using the copy in the cache" in done.stderr and hub.asked[f"{MODEL}/resolve/main/config.json"]
