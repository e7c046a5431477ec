"""A widget's picture follows its controls, and what goes wrong while drawing is shown instead of swallowed."""

import base64
import io
import re
import time
from functools import partial
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from vdm_utils import explorers, gallery, plots
from vdm_utils.attributions import attention_rollout, grad_cam
from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.errors import VDMError
from vdm_utils.explorers import (
    PatchGrid,
    captions,
    draw_hard_concrete,
    draw_mask_state,
    draw_what_if,
    hard_concrete_explorer,
    mask_explorer,
    what_if_explorer,
)
from vdm_utils.faithfulness import bootstrap
from vdm_utils.gallery import (
    comparison_explorer,
    draw_comparison,
    draw_epsilon,
    draw_replay,
    epsilon_explorer,
    layer_flipbook,
    ranks,
    replay_explorer,
    top_share,
)
from vdm_utils.notebook import checkpoint
from vdm_utils.objective import kl_divergence
from vdm_utils.plots import MASK_COLOURS, fade, masked_image, own_range, to_image
from vdm_utils.training import DiffMaskSettings, MaskRecorder, settings, train_diffmask
from vdm_utils.vit import build_classifier, load_classifier

PNG = b"\x89PNG\r\n\x1a\n"
DRAG = 0.15  # seconds: later than this, a picture no longer seems to follow the hand
GATE = {"temperature": 0.2, "log_alpha": 0.5, "low": -0.2, "high": 1.1}
OTHER_GATE = {"temperature": 0.6, "log_alpha": 2.0, "low": -0.5, "high": 1.4}
MASK = {"index": 0, "layer": 2, "aggregated": True, "threshold": 0.0, "overlay": False}
OTHER_MASK = {"index": 1, "layer": 1, "aggregated": False, "threshold": 0.5, "overlay": True}
WHAT_IF = {"index": 0, "zeros": False, "kept": (True,) * 9}
# in this order: nothing is replaced by zeros before a patch is gone, and a new image puts all patches back
OTHER_WHAT_IF = {"kept": (False, True, True) * 3, "zeros": True, "index": 1}
REPLAY, OTHER_REPLAY = {"index": 0, "moment": 0}, {"index": 1, "moment": 2}
COMPARISON = {"index": 0, "scale": "ranks", "percent": 25}
OTHER_COMPARISON = {"index": 1, "scale": "own range 0…1", "percent": 50}
EPSILON, OTHER_EPSILON = {"index": 0, "eps": 0.1}, {"index": 1, "eps": 0.5}
WIDGETS = {
    "gate_widget": OTHER_GATE,
    "mask_widget": OTHER_MASK,
    "what_if_widget": OTHER_WHAT_IF,
    "replay_widget": OTHER_REPLAY,
    "comparison_widget": OTHER_COMPARISON,
    "epsilon_widget": OTHER_EPSILON,
}


@pytest.fixture(scope="module")
def explained():
    torch.manual_seed(0)
    data = load_data("toy", "test", length=3)
    base = build_classifier(id2label=data.id2label)
    base.classifier.weight.data *= 20  # an untrained head says nearly the same about every mask
    diffmask = VisionDiffMask.for_classifier(base, add_activation=0.0)
    return diffmask, data.batch(range(3))["pixel_values"], data.id2label


@pytest.fixture
def gate_widget():
    return hard_concrete_explorer()


@pytest.fixture
def mask_widget(explained):
    return mask_explorer(*explained)


@pytest.fixture
def what_if_widget(explained):
    return what_if_explorer(*explained)


@pytest.fixture(scope="module")
def recorder(explained):
    """A recorder that looked on while every gate was closed a little further."""
    diffmask, pixel_values, _ = explained
    recorder = MaskRecorder(pixel_values)
    for step in (0, 20, 33):
        for gate in diffmask.gates:
            gate.add = -step / 20
        diffmask.multiplier.parameter.data.fill_(20 + step)
        recorder.record(diffmask, step)
    for gate in diffmask.gates:
        gate.add = 0.0
    return recorder


@pytest.fixture
def replay_widget(recorder):
    return replay_explorer(recorder)


@pytest.fixture(scope="module")
def scores():
    generator = torch.Generator().manual_seed(1)
    return {"smooth": torch.arange(27.0).view(3, 3, 3).cos(), "random": torch.rand(3, 3, 3, generator=generator)}


@pytest.fixture
def comparison_widget(explained, scores):
    return comparison_explorer(explained[1], scores)


@pytest.fixture(scope="module")
def by_epsilon(explained):
    """{ε: DiffMask}, not in order; a larger ε keeps less."""
    return {
        eps: VisionDiffMask.for_classifier(explained[0].base, add_activation=1 - 4 * eps, eps=eps) for eps in (0.5, 0.1)
    }


@pytest.fixture
def epsilon_widget(explained, by_epsilon):
    _, pixel_values, id2label = explained
    return epsilon_explorer(by_epsilon, pixel_values, id2label)


def draw_mask(explained, state):
    diffmask, pixel_values, id2label = explained
    return draw_mask_state(diffmask, pixel_values, id2label=id2label, **state)


def written(monkeypatch, draw):
    """Every text of the figure that `draw` makes."""
    figures = []
    for module in (explorers, gallery):
        monkeypatch.setattr(module, "to_png", lambda figure: figures.append(figure) or PNG)
    draw()
    (figure,) = figures
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


@pytest.mark.parametrize("name", GATE)
def test_gate_picture_depends_on_every_parameter(name):
    first, same = draw_hard_concrete(**GATE), draw_hard_concrete(**GATE)
    assert first.startswith(PNG) and first == same
    assert draw_hard_concrete(**GATE | {name: OTHER_GATE[name]}) != first


@pytest.mark.parametrize("name", MASK)
def test_mask_picture_depends_on_every_choice(explained, name):
    first, same = draw_mask(explained, MASK), draw_mask(explained, MASK)
    assert first.startswith(PNG) and first == same
    assert draw_mask(explained, MASK | {name: OTHER_MASK[name]}) != first


def test_gate_picture_states_the_closed_forms(monkeypatch):
    # sigmoid(0) at low = -high and log_alpha = 0; with high = 1 nothing reaches 1; the mean is that of z, by symmetry
    # of the logistic: E[z] = E[max(0, 2s - 1)], which is 1/2 · E|2s - 1|, at temperature 1 E|2u - 1| / 2 = 1/4
    texts = written(monkeypatch, lambda: draw_hard_concrete(1.0, 0.0, -1.0, 1.0))
    assert "P(z ≠ 0) = 0.500    P(z = 1) = 0.000    E[z] = 0.250" in texts


@pytest.mark.parametrize("log_alpha", [-8.0, 0.0, 8.0])
@pytest.mark.parametrize("high", [1.0, 1.3])
@pytest.mark.parametrize("temperature", [0.05, 2.0])
def test_bars_of_the_gate_picture_hold_every_sample(monkeypatch, temperature, log_alpha, high):
    figures = []
    monkeypatch.setattr(explorers, "to_png", lambda figure: figures.append(figure) or PNG)
    draw_hard_concrete(temperature, log_alpha, -0.2, high)
    axes = figures[0].axes[0]
    between = axes.patches[0].get_data().values.sum()
    zero, one = (bar.get_height() for bar in axes.patches[1:3])
    assert between + zero + one == pytest.approx(1, abs=0.02)  # the masses are exact, the rest is sampled


def test_mask_picture_says_what_explain_says(explained, monkeypatch):
    diffmask, pixel_values, id2label = explained
    shown = diffmask.explain(pixel_values[1:2], layer=1, aggregated=False)
    texts = written(monkeypatch, lambda: draw_mask(explained, {"index": 1, "layer": 1, "aggregated": False}))
    assert f"mask: kept {shown.kept.item():.0%}, KL {shown.kl.item():.3f}" in texts
    before, after = shown.logits.argmax().item(), shown.masked_logits.argmax().item()
    assert f"input: {id2label[before]}" in texts
    assert f"masked input: {id2label[after]}" + ("" if after == before else " (changed)") in texts


@torch.no_grad()
def test_a_cut_mask_is_measured_as_it_is_shown(explained, monkeypatch):
    diffmask, pixel_values, id2label = explained
    chosen, soft = pixel_values[1:2], diffmask.explain(pixel_values[1:2], layer=5, aggregated=False)
    cut = (soft.mask >= 0.5).float()
    assert 0 < cut.mean() < 1  # or there would be nothing to tell apart
    states = diffmask.view.encode(chosen)
    logits = diffmask.masked_logits(chosen, states, cut)
    kl = kl_divergence(states.logits, logits).item()
    assert abs(kl - soft.kl.item()) > 0.002
    texts = written(monkeypatch, lambda: draw_mask(explained, OTHER_MASK | {"layer": 5}))
    assert f"mask ≥ 0.50: kept {cut.mean().item():.0%}, KL {kl:.3f}" in texts
    after = id2label[logits.argmax().item()]
    assert any(text.startswith(f"overlay; masked input: {after}") for text in texts)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_changed_class_is_named(explained, monkeypatch, flipped):
    diffmask, pixel_values, id2label = explained
    logits = torch.eye(len(id2label))[4 if flipped else 2][None]
    monkeypatch.setattr(diffmask, "masked_logits", lambda *inputs: logits)
    monkeypatch.setattr(diffmask.view.model.classifier, "forward", lambda hidden: torch.eye(len(id2label))[2][None])
    texts = written(monkeypatch, lambda: draw_mask(explained, MASK))
    assert f"input: {id2label[2]}" in texts
    assert f"masked input: {id2label[4]} (changed)" in texts if flipped else f"masked input: {id2label[2]}" in texts


def test_drawing_leaves_no_trace(explained):
    before, open_figures = torch.get_rng_state(), plt.get_fignums()
    draw_hard_concrete(**GATE), draw_mask(explained, MASK)
    assert torch.equal(torch.get_rng_state(), before)  # dragging a slider must not change what later cells compute
    assert plt.get_fignums() == open_figures  # an open figure would be shown below the cell a second time


@pytest.mark.parametrize(("widget", "state"), WIDGETS.items())
def test_every_control_moves_the_picture(request, widget, state):
    explorer = request.getfixturevalue(widget)
    assert bytes(explorer.picture.value).startswith(PNG)  # the first picture, before anything moved
    assert set(explorer.controls) == set(state)
    for name, value in state.items():
        before = explorer.picture.value
        explorer.controls[name].value = value
        assert bytes(explorer.picture.value).startswith(PNG) and explorer.picture.value != before, name
        assert explorer.message.value == ""


def inside(widget):
    """A widget and everything in it."""
    return [widget, *(found for child in getattr(widget, "children", ()) for found in inside(child))]


@pytest.mark.parametrize("widget", WIDGETS)
def test_everything_is_on_the_page(request, widget):
    explorer = request.getfixturevalue(widget)
    wanted = (explorer.picture, explorer.message, *explorer.controls.values(), *getattr(explorer, "buttons", ()))
    assert set(wanted) <= set(inside(explorer))


def test_widget_shows_the_state_of_its_controls(explained, gate_widget, mask_widget):
    for name, value in OTHER_GATE.items():
        gate_widget.controls[name].value = value
    assert gate_widget.picture.value == draw_hard_concrete(**OTHER_GATE)
    for name, value in OTHER_MASK.items():
        mask_widget.controls[name].value = value
    assert mask_widget.picture.value == draw_mask(explained, OTHER_MASK)


def test_mask_controls_cover_images_and_gates(explained, mask_widget):
    diffmask, pixel_values, _ = explained
    assert [value for _, value in mask_widget.controls["index"].options] == list(range(len(pixel_values)))
    layer = mask_widget.controls["layer"]
    assert (layer.min, layer.max, layer.value) == (0, diffmask.config.num_gates - 1, diffmask.config.num_gates - 1)


def test_failing_callback_shows_its_message(gate_widget):
    good, low = gate_widget.picture.value, gate_widget.controls["low"]
    low.max = 0.5
    low.value = 0.5  # HardConcrete refuses it
    assert gate_widget.message in gate_widget.children
    assert "temperature &gt; 0, low &lt; 0 and high &gt;= 1" in gate_widget.message.value
    assert gate_widget.picture.value == good
    low.value = -0.5
    assert gate_widget.message.value == "" and gate_widget.picture.value != good


def test_failing_mask_shows_its_message(explained, mask_widget):
    slider = mask_widget.controls["layer"]
    slider.max = 99
    slider.value = 99
    assert "no such layer" in mask_widget.message.value
    assert f"0..{explained[0].config.num_gates - 1}" in mask_widget.message.value


def test_message_goes_when_the_old_state_is_back(gate_widget):
    low = gate_widget.controls["low"]
    low.max, good = 0.5, low.value
    low.value = 0.5
    assert gate_widget.message.value
    low.value = good
    assert gate_widget.message.value == ""


@pytest.mark.parametrize("widget", [name for name in WIDGETS if name != "gate_widget"])
def test_failing_picture_shows_its_message(request, monkeypatch, widget):
    explorer = request.getfixturevalue(widget)
    good = explorer.picture.value

    def fail(*arguments):
        raise RuntimeError("no paint < left")

    for module in (explorers, gallery):
        monkeypatch.setattr(module, "fade", fail)
    explorer.controls["index"].value = 1
    assert "RuntimeError: no paint &lt; left" in explorer.message.value and explorer.picture.value == good


@pytest.mark.parametrize("widget", WIDGETS)
def test_text_form_is_short_and_always_the_same(request, widget):
    explorer = request.getfixturevalue(widget)
    before = repr(explorer)
    next(iter(explorer.controls.values())).value = 1
    assert repr(explorer) == before and before.startswith("Explorer(")
    assert len(before) <= 110  # what ipywidgets 7 and 8 write into a notebook before they cut


@pytest.fixture
def one_thread():
    """On a busy machine torch's threads wait for each other, and a tiny model takes 100 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photographs():
    """A fresh DiffMask of the CIFAR-10 classifier that ships, and noise of the size of its pictures."""
    diffmask = VisionDiffMask.for_classifier(load_classifier(checkpoint("cifar10", "base")), add_activation=0.0)
    return diffmask, torch.rand(4, 3, 32, 32) * 2 - 1, diffmask.base.config.id2label


def drags(name, photographs):
    """An explorer of 32×32 pictures, one of its controls and values to drag it over."""
    diffmask, pixel_values, id2label = photographs
    if name == "gate":
        return hard_concrete_explorer(), "log_alpha", (1, 2, 3, 4, 3)
    if name == "mask":
        return mask_explorer(*photographs), "layer", (1, 2, 3, 4, 3)
    if name == "cut mask":
        return mask_explorer(*photographs), "threshold", (0.9, 0.95, 0.8, 0.95, 0.9)
    if name == "what if":
        return what_if_explorer(*photographs), "kept", [(True,) * n + (False,) * (64 - n) for n in (60, 50, 30, 20, 9)]
    if name == "replay":
        recorder = MaskRecorder(pixel_values)
        for step in range(0, 240, 20):
            recorder.record(diffmask, step)
        return replay_explorer(recorder), "moment", (1, 2, 3, 4, 3)
    if name == "comparison":
        maps = {method: torch.rand(4, 8, 8) for method in ("DiffMask", "Grad-CAM", "rollout", "random")}
        return comparison_explorer(pixel_values, maps), "percent", (30, 35, 40, 45, 40)
    trained = {eps: VisionDiffMask.for_classifier(diffmask.base, eps=eps) for eps in (0.03, 0.1, 0.3, 1.0)}
    return epsilon_explorer(trained, pixel_values, id2label), "eps", (0.1, 0.3, 1.0, 0.3, 0.1)


@pytest.mark.parametrize("name", ["gate", "mask", "cut mask", "what if", "replay", "comparison", "epsilon"])
def test_answers_a_drag_in_time(photographs, one_thread, name):
    explorer, control, values = drags(name, photographs)
    taken = []  # in CPU seconds; beside other programs, which share the caches, they grow by half: one quiet moment will do
    until = time.monotonic() + 30
    while not taken or min(taken) >= DRAG and time.monotonic() < until:
        for value in values:
            start = time.thread_time()
            explorer.controls[control].value = value
            taken.append(time.thread_time() - start)
            assert explorer.drawn[control] == value and explorer.message.value == ""
    assert min(taken) < DRAG


# ---------------------------------------------------------------- what if this patch were missing


@torch.no_grad()
def test_what_if_says_what_the_classifier_says(explained, monkeypatch):
    diffmask, pixel_values, id2label = explained
    kept = (False, True, True) * 3
    states = diffmask.view.encode(pixel_values[1:2])
    for zeros in (False, True):
        state = {"index": 1, "zeros": zeros, "kept": kept}
        texts = written(monkeypatch, partial(draw_what_if, diffmask, pixel_values, id2label=id2label, **state))
        embeddings = states.embeddings.clone()
        embeddings[0, ::3] = 0 if zeros else diffmask.placeholder
        logits = diffmask.view.logits(pixel_values[1:2], embeddings)
        assert f"kept 6 of 9, KL {kl_divergence(states.logits, logits).item():.3f}" in texts
        (p, was), (q, now) = (output.softmax(-1).max(-1) for output in (states.logits, logits))
        title = f"{id2label[was.item()]} {p.item():.2f}, now {id2label[now.item()]} {q.item():.2f}"
        assert title + (" (changed)" if was != now else "") in texts


@pytest.mark.parametrize("name", WHAT_IF)
def test_what_if_picture_depends_on_every_choice(explained, name):
    diffmask, pixel_values, id2label = explained
    some = WHAT_IF | {"kept": (True,) * 4 + (False,) * 5}
    first, other = (
        draw_what_if(diffmask, pixel_values, id2label=id2label, **state)
        for state in (some, some | {name: OTHER_WHAT_IF[name]})
    )
    assert first.startswith(PNG) and first != other


def test_a_click_drops_a_patch_and_a_second_one_brings_it_back(what_if_widget):
    patches, whole = what_if_widget.controls["kept"], what_if_widget.picture.value
    colour = patches.children[5].style.button_color
    patches.children[5].click()
    assert patches.value == (True,) * 5 + (False,) + (True,) * 3 and what_if_widget.picture.value != whole
    assert (patches.children[5].style.button_color, patches.children[5].description) == ("#808080", "×")
    assert patches.children[4].description == " "
    patches.children[5].click()
    assert what_if_widget.picture.value == whole and patches.children[5].style.button_color == colour


def test_buttons_put_back_and_take_the_mask(explained, what_if_widget):
    diffmask, pixel_values, _ = explained
    put_back, take = what_if_widget.buttons
    patches, whole = what_if_widget.controls["kept"], what_if_widget.picture.value
    what_if_widget.controls["index"].value = 2
    take.click()
    mask = diffmask.explain(pixel_values[2:3]).mask[0]
    assert patches.value == tuple((mask >= 0.5).flatten().tolist()) and not all(patches.value)
    put_back.click()
    assert all(patches.value)
    what_if_widget.controls["index"].value = 0
    assert what_if_widget.picture.value == whole


def test_another_image_comes_whole_and_is_drawn_once(explained, what_if_widget, monkeypatch):
    patches, drawn = what_if_widget.controls["kept"], []
    patches.children[0].click()
    draw = what_if_widget.draw
    monkeypatch.setattr(what_if_widget, "draw", lambda **state: drawn.append(state) or draw(**state))
    what_if_widget.controls["index"].value = 1
    assert drawn == [WHAT_IF | {"index": 1}]
    cells = to_image(explained[1][1])[8::16, 8::16].reshape(-1, 3)  # toy cells have one colour each
    assert [button.style.button_color for button in patches.children] == [
        "#" + bytes((255 * cell).round().astype("uint8")).hex() for cell in cells
    ]


def test_a_base_without_a_placeholder_offers_zeros_only(explained):
    diffmask = VisionDiffMask.for_classifier(explained[0].base, no_placeholder=True)
    explorer = what_if_explorer(diffmask, *explained[1:])
    assert explorer.controls["zeros"].options == (("replaced by zeros", True),) and explorer.message.value == ""


def test_a_large_grid_fits_beside_its_picture():
    patches = PatchGrid(14, 14)
    side = int(patches.children[0].layout.width.removesuffix("px"))
    assert len(patches.children) == 196 and side >= 20 and 14 * (side + 1) <= 320
    assert patches.children[15].tooltip == "row 2, column 2"
    assert len({button.layout for button in patches.children}) == 1  # or each would be another message to the browser


# ---------------------------------------------------------------- replay of a training


def trained(toy, base, folder, callbacks):
    torch.manual_seed(0)
    diffmask = VisionDiffMask.for_classifier(base, add_activation=2.0)
    diffmask.config.base_name_or_path = "toy"  # or the base would be saved with it
    chosen = settings(DiffMaskSettings, "quick", max_steps=5, log_every_n_steps=5, batch_size=8)
    train_diffmask(diffmask, toy, toy, chosen, folder, callbacks=callbacks)
    return diffmask


def test_recorder_looks_on_and_changes_nothing(toy, base, pictures, tmp_path):
    recorder = MaskRecorder(pictures, every=2)
    watched, alone = (trained(toy, base, tmp_path / str(len(c)), c) for c in ((recorder,), ()))
    assert all(torch.equal(a, b) for a, b in zip(watched.state_dict().values(), alone.state_dict().values()))
    assert [record.step for record in recorder.records] == [0, 2, 4, 5]
    last, shown = recorder.records[-1], watched.explain(pictures)
    assert torch.equal(last.mask, shown.mask) and torch.equal(last.kl, shown.kl) and torch.equal(last.kept, shown.kept)
    assert last.alpha == watched.multiplier.value[-1].item() and last.eps == watched.config.eps
    assert not torch.equal(recorder.records[0].mask, last.mask)
    recorder.on_train_end(None, SimpleNamespace(global_step=5), None, model=watched)
    assert [record.step for record in recorder.records] == [0, 2, 4, 5]  # the last step is there already
    recorder.on_train_begin(None, SimpleNamespace(global_step=0), None, model=watched)
    assert [record.step for record in recorder.records] == [0]  # a second training starts a new record


@pytest.mark.parametrize("name", REPLAY)
def test_replay_picture_depends_on_every_choice(recorder, name):
    first, other = draw_replay(recorder, **REPLAY), draw_replay(recorder, **REPLAY | {name: OTHER_REPLAY[name]})
    assert first.startswith(PNG) and first != other


def test_replay_shows_the_record_and_the_curves_up_to_it(recorder, monkeypatch):
    figures = []
    monkeypatch.setattr(gallery, "to_png", lambda figure: figures.append(figure) or PNG)
    draw_replay(recorder, 2, 1)
    (figure,) = figures
    texts = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    now = recorder.records[1]
    assert "step 20 of 33" in texts and "α of the last gate: 40.0" in texts
    assert f"mask: kept {now.kept[2].item():.0%}, KL {now.kl[2].item():.3f}" in texts
    assert f"mean KL: {now.kl.mean().item():.3f} nats (dashed: ε)" in texts
    assert f"mean L0, fraction kept: {now.kept.mean().item():.0%}" in texts
    (alpha,) = [axes for axes in figure.axes if axes.get_title().startswith("α")]
    assert [list(line.get_xdata()) for line in alpha.lines] == [[0, 20, 33], [0, 20], [20]]
    assert list(alpha.lines[0].get_ydata()) == [20, 40, 53]


def test_replay_names_its_steps(replay_widget):
    assert replay_widget.controls["moment"].options == (("0", 0), ("20", 1), ("33", 2))


def test_replay_shown_before_a_training_follows_it(toy, base, pictures, tmp_path, monkeypatch):
    recorder, drawn = MaskRecorder(pictures, every=2), []
    monkeypatch.setattr(gallery, "draw_replay", lambda recorder, index, moment: drawn.append((index, moment)) or PNG)
    recorder.record(VisionDiffMask.for_classifier(base), 0)
    explorer = replay_explorer(recorder)
    explorer.controls["index"].value = 3
    drawn.clear()
    for again in range(2):
        trained(toy, base, tmp_path / str(again), (recorder,))
        assert drawn == [(3, 0), (3, 1), (3, 2), (3, 3)]  # every record once, the newest, of the chosen picture
        assert explorer.controls["moment"].options == (("0", 0), ("2", 1), ("4", 2), ("5", 3))
        drawn.clear()
    explorer.controls["moment"].value = 1  # and then it is a replay again
    assert drawn == [(3, 1)] and not explorer.message.value


def test_nothing_recorded_is_refused(pictures):
    with pytest.raises(VDMError, match="nothing was recorded"):
        replay_explorer(MaskRecorder(pictures))


# ---------------------------------------------------------------- several methods, several ε


def test_maps_are_brought_to_one_scale():
    scores = torch.tensor([[3.0, -1.0], [0.0, 0.0]])
    assert ranks(scores).tolist() == [[0.875, 0.125], [0.5, 0.5]]  # shares of four patches, ties in the middle
    assert own_range(scores).tolist() == [[1.0, 0.0], [0.25, 0.25]]
    assert ranks(torch.ones(2, 2)).tolist() == [[0.5, 0.5], [0.5, 0.5]]  # a flat map shows no order
    assert own_range(torch.ones(2, 2)).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("percent", "kept"), [(5, [1, 0, 0, 0]), (50, [1, 0, 1, 0]), (75, [1, 0, 1, 1]), (100, [1] * 4)]
)
def test_top_share(percent, kept):
    assert top_share(torch.tensor([[3.0, -1.0], [0.0, 0.0]]), percent).flatten().tolist() == kept


@pytest.mark.parametrize("name", COMPARISON)
def test_comparison_picture_depends_on_every_choice(explained, scores, name):
    first, other = (
        draw_comparison(explained[1], scores, **state)
        for state in (COMPARISON, COMPARISON | {name: OTHER_COMPARISON[name]})
    )
    assert first.startswith(PNG) and first != other


def test_comparison_names_methods_scale_and_share(explained, scores, monkeypatch):
    texts = written(monkeypatch, lambda: draw_comparison(explained[1], scores, **COMPARISON))
    assert {"input", "smooth", "random", "ranks", "top 25 %\nof each map"} <= set(texts)


def test_comparison_shows_each_map_above_its_top_patches(explained, scores, monkeypatch):
    pixel_values, figures = explained[1], []
    monkeypatch.setattr(gallery, "to_png", lambda figure: figures.append(figure) or PNG)
    draw_comparison(pixel_values, scores, 1, "own range 0…1", 50)
    _, *panels = figures[0].axes[0].images
    for (name, every), above, below in zip(scores.items(), panels[::2], panels[1::2], strict=True):
        assert (above.get_array() == own_range(every[1]).numpy()).all(), name
        expected = to_image(fade(pixel_values[1], top_share(every[1], 50)))
        assert abs(below.get_array() - expected).max() < 0.01, name
        assert above.get_extent()[2] >= below.get_extent()[3] and above.get_extent()[:2] == below.get_extent()[:2]


@pytest.mark.parametrize("shape", [(2, 3, 3), (3, 9)])
def test_scores_of_other_images_are_refused(explained, shape):
    with pytest.raises(VDMError, match="'other' do not belong"):
        comparison_explorer(explained[1], {"other": torch.zeros(shape)})


@pytest.mark.parametrize("name", EPSILON)
def test_epsilon_picture_depends_on_every_choice(explained, by_epsilon, name):
    _, pixel_values, id2label = explained
    shown = {eps: diffmask.explain(pixel_values) for eps, diffmask in by_epsilon.items()}
    first, other = (
        draw_epsilon(shown, pixel_values, id2label=id2label, **state)
        for state in (EPSILON, EPSILON | {name: OTHER_EPSILON[name]})
    )
    assert first.startswith(PNG) and first != other


def test_epsilon_dial_goes_up_and_says_what_explain_says(explained, by_epsilon, epsilon_widget, monkeypatch):
    assert epsilon_widget.controls["eps"].options == (("0.1", 0.1), ("0.5", 0.5))
    _, pixel_values, id2label = explained
    before, cost, after = captions(by_epsilon[0.5].explain(pixel_values), 2, id2label)
    texts = written(monkeypatch, lambda: epsilon_widget.draw(index=2, eps=0.5))
    assert {f"ε = 0.5    input: {before}", f"mask: {cost}", f"masked input: {after}"} <= set(texts)


def test_a_mislabelled_epsilon_is_refused(explained, by_epsilon):
    with pytest.raises(VDMError, match="another ε than its own"):
        epsilon_explorer({0.2: by_epsilon[0.5]}, *explained[1:])


# ---------------------------------------------------------------- without a kernel


class Tags(HTMLParser):
    """The opening tags of a page as (name, attributes)."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def flipbook(explained):
    return layer_flipbook(*explained)


def array(url):
    """The pixels of a PNG in a data URL, 0..1."""
    return torch.from_numpy(plt.imread(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


def test_flipbook_is_plain_html(flipbook):
    page = flipbook._repr_html_()
    assert not re.search(r"<script|javascript:|https?:|\son\w+=|@import", page)
    assert repr(flipbook) == "Flipbook: 3 × image, 2 × votes, 6 × gate"


def test_two_flipbooks_on_a_page_share_no_name(flipbook):
    pages = [Tags(flipbook._repr_html_()).found for _ in range(2)]
    for kind in ("id", "name"):
        first, second = ({attributes[kind] for _, attributes in page if kind in attributes} for page in pages)
        assert first and not first & second
    ids = [attributes["id"] for _, attributes in pages[0] if "id" in attributes]
    labels = [attributes["for"] for tag, attributes in pages[0] if tag == "label"]
    assert len(ids) == len(set(ids)) == 1 + len(labels) and set(labels) < set(ids)


def test_every_choice_has_one_page_and_the_first_is_open(flipbook):
    page = flipbook._repr_html_()
    tags = Tags(page).found
    pages = [attributes for tag, attributes in tags if tag == "div" and attributes.get("class", "").startswith("page ")]
    assert {attributes["class"] for attributes in pages} == {
        f"page page-{i}-{v}-{k}" for i in range(3) for v in range(2) for k in range(6)
    }
    assert [attributes["class"] for attributes in pages if "hidden" not in attributes] == ["page page-0-0-5"]
    own = tags[0][1]["id"]
    checked = [attributes["id"] for _, attributes in tags if "checked" in attributes]
    assert checked == [f"{own}-image-0", f"{own}-votes-0", f"{own}-gate-5"]
    assert (
        f"#{own}:has(#{own}-image-2:checked):has(#{own}-votes-1:checked):has(#{own}-gate-4:checked) .page-2-1-4" in page
    )


@pytest.mark.parametrize("place", [(0, 0, 5), (2, 1, 3)])
def test_flipbook_pages_say_and_show_what_explain_does(explained, flipbook, place):
    diffmask, pixel_values, id2label = explained
    image, votes, gate = place
    shown = diffmask.explain(pixel_values, layer=gate, aggregated=votes == 0)
    before, cost, after = captions(shown, image, id2label)
    page = flipbook.pages[place]
    assert re.findall("<figcaption>(.*?)</figcaption>", page) == [
        f"input: {before}",
        f"mask: {cost}",
        f"masked input: {after}",
    ]
    mask, veil = (array(attributes["src"]) for tag, attributes in Tags(page).found if tag == "img")
    expected = torch.from_numpy(plt.get_cmap(MASK_COLOURS)(shown.mask[image].numpy())).float()
    assert torch.allclose(mask, expected, atol=0.005)
    grey, opacity = veil[..., :3], veil[..., 3:]
    whole = torch.from_numpy(to_image(pixel_values[image]))[8::16, 8::16]  # toy cells have one colour each
    faded = masked_image(pixel_values[image : image + 1], shown.pixel_mask(48, 48)[image : image + 1])[0]
    assert torch.allclose(
        whole * (1 - opacity) + grey * opacity, torch.from_numpy(to_image(faded))[8::16, 8::16], atol=0.01
    )


def test_flipbook_holds_each_input_once_and_stays_small(photographs):
    diffmask, pixel_values, id2label = photographs
    page = layer_flipbook(diffmask, pixel_values, id2label)._repr_html_()
    assert page.count("background-image: url(") == len(pixel_values)
    (first,) = re.findall(r"\.input-0 {background-image: url\((.*?)\)}", page)
    assert torch.allclose(array(first)[..., :3], torch.from_numpy(to_image(pixel_values[0])), atol=0.005)
    assert len(page) < 1.5e6 / 8


def test_a_button_that_fails_says_so(diffmask, pictures, monkeypatch):
    explorer = what_if_explorer(diffmask, pictures, dict(diffmask.base.config.id2label))
    monkeypatch.setattr(diffmask, "explain", lambda *inputs, **options: 1 / 0)
    explorer.buttons[1].click()
    assert "ZeroDivisionError" in explorer.message.value


def drawn(monkeypatch, draw):
    figures = []
    for module in (explorers, gallery):
        monkeypatch.setattr(module, "to_png", lambda figure: figures.append(figure) or b"")
    draw()
    return figures[0]


@torch.no_grad()
def test_bars_of_what_if_are_the_probabilities(explained, monkeypatch):
    diffmask, pixel_values, id2label = explained
    kept = (False, True, True) * 3
    figure = drawn(monkeypatch, lambda: explorers.draw_what_if(diffmask, pixel_values, 1, False, kept, id2label))
    states = diffmask.view.encode(pixel_values[1:2])
    logits = diffmask.masked_logits(pixel_values[1:2], states, torch.tensor([kept]))
    (bars,) = [axes for axes in figure.axes if len(axes.containers) == 2]
    for container, output in zip(bars.containers, (states.logits, logits)):
        assert [bar.get_width() for bar in container] == pytest.approx(output.softmax(-1)[0].tolist(), abs=1e-5)


def test_gate_picture_draws_the_masses_and_the_distribution_function(monkeypatch):
    figure = drawn(monkeypatch, lambda: explorers.draw_hard_concrete(0.2, 1.0, -0.2, 1.3))
    left, right = figure.axes
    gate = explorers.HardConcrete(torch.tensor(1.0), 0.2, -0.2, 1.3)
    zero, one = left.patches[1:3]
    assert (zero.get_x() + zero.get_width() / 2 < 0) and zero.get_height() == pytest.approx(
        1 - gate.prob_nonzero.item(), abs=1e-5
    )
    assert (one.get_x() + one.get_width() / 2 > 1) and one.get_height() == pytest.approx(gate.prob_one.item(), abs=1e-5)
    t, cdf = (torch.tensor(np.asarray(values), dtype=torch.float) for values in right.lines[0].get_data())
    z = gate.sample((20_000,))
    for point in (0.25, 0.5, 0.75):
        assert cdf[(t - point).abs().argmin()].item() == pytest.approx((z <= point).float().mean().item(), abs=0.02)


def test_epsilon_curves_are_those_of_the_picture(explained, by_epsilon, monkeypatch):
    _, pixel_values, id2label = explained
    shown = {eps: by_epsilon[eps].explain(pixel_values) for eps in sorted(by_epsilon)}
    figure = drawn(monkeypatch, lambda: gallery.draw_epsilon(shown, pixel_values, 2, 0.5, id2label))
    for title, name in (("fraction kept", "kept"), ("KL", "kl")):
        (axes,) = [a for a in figure.axes if a.get_title().startswith(title)]
        values = [getattr(one, name)[2].item() for one in shown.values()]
        assert list(axes.lines[0].get_ydata()) == pytest.approx(values)
        assert list(axes.lines[2].get_xdata()) == [1]  # the marked point is ε = 0.5


def test_every_replay_curve_is_its_own(recorder, monkeypatch):
    figure = drawn(monkeypatch, lambda: gallery.draw_replay(recorder, 2, 1))
    expected = {"α": [r.alpha for r in recorder.records], "mean KL": [r.kl.mean().item() for r in recorder.records],
                "mean L0": [r.kept.mean().item() for r in recorder.records]}  # fmt: skip
    for title, values in expected.items():
        (axes,) = [a for a in figure.axes if a.get_title().startswith(title)]
        assert list(axes.lines[0].get_ydata()) == pytest.approx(values)


def test_an_explanation_grid_shows_what_it_names(base, diffmask, toy):
    batch = toy.batch(range(2))
    shown = diffmask.explain(batch["pixel_values"])
    figure = plots.explained_beside_others(diffmask, batch, shown, toy.id2label)
    axes = [
        a
        for a in figure.axes
        if a.images and a.get_ylabel() in ("input", "mask", "masked input", "Grad-CAM", "rollout", "truth")
    ]
    first = {a.get_ylabel(): a.images[0] for a in axes}
    expected = {
        "input": plots.to_image(batch["pixel_values"][0]), "mask": shown.mask[0],
        "masked input": plots.to_image(plots.fade(batch["pixel_values"][0], shown.mask[0])),
        "Grad-CAM": plots.own_range(grad_cam(base, batch["pixel_values"]))[0],
        "rollout": plots.own_range(attention_rollout(base, batch["pixel_values"]))[0], "truth": batch["truth"][0],
    }  # fmt: skip
    assert list(first) == list(expected)
    for name, pixels in expected.items():
        assert np.allclose(first[name].get_array(), np.asarray(pixels), atol=1e-5), name
    assert all(
        first[name].get_clim() == (0, 1) for name in ("mask", "Grad-CAM", "rollout", "truth")
    )  # one colour bar for all
    plt.close(figure)


def test_curves_are_drawn_as_given_in_bands_of_their_intervals():
    curves = {name: top * torch.rand(30, 4) for top, name in enumerate("abcde", start=1)}
    figure, axes = plt.subplots()
    plots.show_curves(axes, [0, 10, 20, 40], curves)
    for line, band, (name, values) in zip(axes.lines, axes.collections, curves.items(), strict=True):
        assert line.get_label() == name and list(line.get_xdata()) == [0, 10, 20, 40]
        assert line.get_ydata() == pytest.approx(values.mean(0).numpy())
        outline = band.get_paths()[0].vertices
        ends = [outline[outline[:, 0] == x, 1] for x in line.get_xdata()]
        drawn = [(end.min(), end.max()) for end in ends]
        assert np.array(drawn) == pytest.approx(np.array([bootstrap(value)[1:] for value in values.unbind(1)]))
        assert tuple(band.get_facecolor()[0, :3]) == pytest.approx(to_rgb(line.get_color()))
    assert len({to_rgb(line.get_color()) for line in axes.lines}) == 5
    plt.close(figure)
