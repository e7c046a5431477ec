"""Draw the README's picture: what the shipped masks keep of drawn shapes that nothing was trained on, beside the truth."""

from transformers.utils import logging as transformers_logging

from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.notebook import REPOSITORY, checkpoint
from vdm_utils.plots import explanation_grid, to_png

transformers_logging.disable_progress_bar()
diffmask = VisionDiffMask.from_pretrained(checkpoint("shapes", "diffmask"))
test = load_data("shapes", "test")
# the first test picture of each of eight classes
chosen = test.batch([(test.classes == label).nonzero()[0].item() for label in range(8)])
pictures = chosen["pixel_values"]
figure = explanation_grid(pictures, diffmask.explain(pictures), test.id2label, chosen["truth"])
target = REPOSITORY / "data" / "pictures" / "explanations.png"
target.parent.mkdir(exist_ok=True)
target.write_bytes(to_png(figure))
print(f"wrote {target.relative_to(REPOSITORY)}")
