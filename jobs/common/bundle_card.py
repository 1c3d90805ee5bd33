"""The model card of a bundle: what it was trained on and how good it is, without a count below the limit."""

from typing import TYPE_CHECKING

from jobs.common.model_inputs import ModelInputs
from raylab.evaluation.site_report import LIMIT
from raylab.score import Score
from tracking.provenance import Provenance

if TYPE_CHECKING:  # it loads torch
    from raylab.training.bundle import Bundle

BUDGET = """\
Differential privacy of the weights and of the statistics of the inputs: {spent}. The unit is all rows of one patient,
left out; how many rows there are is not protected, and the scores and counts on this card are not part of it."""
LEAKS = """\
The bundle holds no row of a patient. Weights and statistics are functions of the training data, and are not proven to
tell nothing of a single patient."""


def render_card(bundle: "Bundle", origin: Provenance, inputs: ModelInputs, model: str, parameters: int) -> str:
    """The model card in Markdown, from what the bundle tells anyway. `model` is the name of the network."""
    lines = [
        f"# Model card: {bundle.name}",
        "",
        *(["**SYNTHETIC DATA: its scores say nothing about patients.**", ""] if bundle.synthetic else []),
        "Not a medical device. Not for clinical use.",
        "",
        f"- task: {bundle.task}; model: {model}, {parameters:,} parameters",
        *(f"- {line}" for line in inputs.describe()),
        f"- trained by raylab {bundle.raylab}, code {origin.code_revision}, on {origin.data_source}",
        "",
        "## Training data",
        "| split | " + " | ".join(next(iter(bundle.counts.values()), {})) + " |",
        "|---" * (1 + len(next(iter(bundle.counts.values()), {}))) + "|",
    ]
    lines += [
        f"| {split} | " + " | ".join("<10" if n is None else f"{n:,}" for n in of.values()) + " |"
        for split, of in bundle.counts.items()
    ]
    lines += ["", "## Scores on the val split, by which the epoch was chosen", ""]
    lines += [f"- {name}: {Score.model_validate(score)}" for name, score in bundle.scores.items()]
    if not bundle.scores:
        lines.append(f"Left out: they rest on fewer than {LIMIT} patients, or rows in or outside of a class.")
    units = bundle.units
    names = ", ".join(f"{name} ({units.get(name, 'derived')})" if units else name for name in bundle.concepts)
    lines += ["", "## Inputs", "", names, "", BUDGET.format(spent=bundle.privacy) if bundle.privacy else LEAKS]
    return "\n".join(lines) + "\n"
