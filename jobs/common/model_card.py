"""The model card of an image run: its training data, its scores, and the controls that qualify them.

It is rendered from the run's own files (recipe, record, scores) and rewritten after every evaluation. It follows
Mitchell et al., "Model cards for model reporting", arXiv 1810.03993, as far as the data allows.
"""

import logging
from pathlib import Path
from typing import Any

from jobs.common import home
from jobs.common.results import ScoresFile
from raylab.data.images.dataset import LUNG_BOX
from raylab.data.images.meta import MASKS, ImageMeta
from raylab.data.prepared import META
from raylab.documents import read_document, read_json
from raylab.errors import DataError
from raylab.evaluation.overlap import in_words
from raylab.files import write_text
from raylab.score import Score
from raylab.tasks.recipes import parse_recipe, update_recipe
from raylab.training.model_note import PLACE, read_model_note
from raylab.training.run_record import RunRecord
from tracking.outbox import Outbox

log = logging.getLogger(__name__)


class CardScores(ScoresFile):
    """What the card shows of such a file."""

    macro_recall: Score
    accuracy: Score
    auroc: Score
    ece: Score
    confusion_by_source: dict[str, list[list[int]]]
    within_source: list[dict[str, Any]]


TEMPLATE = """# Model card: {{ run.name }}
{% if run.synthetic %}
**SYNTHETIC DATA: these figures show that the software works; they say nothing about patients.**
{% endif %}
Not a medical device. Not for clinical use.

## Model
- network: {{ recipe.model.name }}{% if recipe.model.name.startswith("covidnet") %} (a reconstruction: no architecture \
was published){% endif %}, {{ "{:,}".format(parameters) }} parameters{% if recipe.model.width is defined %}, width \
{{ recipe.model.width }}, depth {{ recipe.model.depth }}{% endif %}
- input: {{ spec.size }} x {{ spec.size }} px, top 8% removed, central square\
{% if spec.mask is defined %}; {{ masks[spec.mask] }}{% endif %}
- classes: {{ spec.classes | join(", ") }}
- initial weights: {% if run.parent %}of {{ run.parent }}, {{ recipe.transfer.mode }}\
{% elif recipe.model.weights_path %}from a file, {{ recipe.transfer.mode }}{% else %}random{% endif %}
- seed {{ recipe.seed }}, {{ run.steps or 0 }} steps of {{ recipe.loop.global_batch_size }}; code \
{{ run.tags["raylab.code_revision"] }}; data {{ run.data_hash[:16] }}; split {{ run.split_hash[:16] }}; \
weights {{ (run.weights_sha256 or "")[:16] }}

## Training data
{% if meta %}| split | source | {{ spec.classes | join(" | ") }} |
|---|---|{% for _ in spec.classes %}---|{% endfor %}
{% for split, sources in meta.sources.items() if split != "test" %}{% for source, counts in sources.items() -%}
| {{ split }} | {{ source }} | {{ counts.values() | join(" | ") }} |
{% endfor %}{% endfor %}
{% for warning in meta.printable_warnings %}- warning: {{ warning }}
{% endfor %}If a class comes from a single source, the model may recognise the source instead: see the border probe.
{% else %}No longer available at its path.
{% endif %}
## Scores
{% for title, s in scored %}
### {{ title }}: {{ s.n }} images, {{ s.patients }} groups
- leakage: {{ s.leakage_words }}
- macro recall {{ shown(s.macro_recall) }}
- **minus the border probe** {% if s.minus_border is defined %}{{ shown(s.minus_border) }}; the probe alone \
{{ shown(s.border_macro_recall) }}{% else %}{{ s.border.why if s.border is defined else "not scored" }}{% endif %}
- accuracy {{ shown(s.accuracy) }}; AUROC {{ shown(s.auroc) }}
- calibration: ECE {{ shown(s.ece) }}{% if s.ece_calibrated is defined %}; at temperature \
{{ "%.2f" % s.temperature.temperature }}, fitted on val, {{ shown(s.ece_calibrated) }}{% endif %}

| class | n | sensitivity, Wilson 95% CI | PPV, Wilson 95% CI |
|---|---|---|---|
{% for c in spec.classes %}| {{ c }} | {{ s.classes[c] }} | {{ shown(s["sensitivity/" + c]) }} | \
{{ shown(s["ppv/" + c]) }} |
{% endfor %}
{% for name, by in (("source", s.confusion_by_source), ("view", s.get("confusion_by_view"))) if by -%}
Confusion matrices by {{ name }} (rows: true class, columns: prediction; {{ spec.classes | join(", ") }}):

{% for key, matrix in by.items() %}- {{ key }}: {{ matrix }}
{% endfor %}
{% endfor %}{% for w in s.within_source %}- within {{ w.source }}, {{ w.classes[0] }} against {{ w.classes[1] }} \
(n = {{ w.auroc.n | join(" and ") }}): AUROC {{ shown(w.auroc) }}{% if w.border %}, border probe \
{{ shown(w.border) }}{% endif %}

{% else %}- within a source: no source has two classes of at least 5 images
{% endfor %}{% endfor %}
## Controls
- border probe: logistic regression on the outermost 10 px of 64 x 64 px images, fitted on the same training rows
- lung field blacked out ({{ box }} of the view): {{ masked }}

## Limitations
Labels are those of the source collections and were not reviewed. A test score is unbiased only the first time: this \
model's own test split has been read {{ run.test_reads }} time(s).
"""


def write(directory: Path, parameters: int) -> Path:
    """Write `model_card.md` of a finished image run, add it to the outbox, and return its path."""
    import jinja2

    run_record = home.note(directory)
    note = read_model_note(directory)
    recipe = parse_recipe(update_recipe(note.recipe))
    place = Path(run_record.data) / META
    meta = read_document(place, ImageMeta) if place.is_file() else None
    if meta is not None and meta.data_hash != run_record.data_hash:
        meta = None
    scored = []
    for file in sorted((directory / "scores").glob("*.json")):
        if (s := _read_scores(file)) is None:
            continue
        where = "own data" if s["data"] == run_record.data_hash else f"data {s['data'][:12]}"
        unchecked = "these rows selected the epoch" if s["split"] == "val" else "not checked"
        s["leakage_words"] = in_words(s["leakage"]) if s.get("leakage") else unchecked
        scored.append((f"{s['split']}, {where}", s))
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    card = environment.from_string(TEMPLATE).render(
        run=run_record,
        recipe=recipe,
        spec=note.spec,
        masks=MASKS,
        parameters=parameters,
        meta=meta,
        scored=scored,
        shown=_shown,
        box=" to ".join(("({:.2f}, {:.2f})".format(*LUNG_BOX[:2]), "({:.2f}, {:.2f})".format(*LUNG_BOX[2:]))),
        masked=_masked(run_record),
    )
    path = directory / "model_card.md"
    write_text(path, card)
    Outbox(directory / "outbox").append({"kind": "artifact", "path": str(path), "to": ""})
    return path


def _read_scores(file: Path) -> dict[str, Any] | None:
    """A file of scores/; None, with a warning, if it is damaged: the card is then written without it."""
    try:
        content: dict[str, Any] = read_json(file, CardScores)
    except DataError as error:
        log.warning("skipped: %s", error)
        return None
    return content


def _shown(score: dict[str, Any]) -> str:
    return str(Score.model_validate(score))


def _masked(run_record: RunRecord) -> str:
    """The scores of runs on the same data with the lung field blacked out."""
    results = []
    for directory, other in home.records():
        if other.data_hash != run_record.data_hash or not (directory / PLACE).is_file():
            continue
        try:
            note = read_model_note(directory)
        except DataError as error:
            log.warning("skipped: %s", error)
            continue
        if note.spec.get("mask") == "centre":
            for file in sorted((directory / "scores").glob("*.json")):
                if (s := _read_scores(file)) is not None:
                    results.append(f"{other.name}, {s['split']}: macro recall {_shown(s['macro_recall'])}")
    again = "not trained; raylab train covidnet --data DIR --set data.mask=centre"
    return "; ".join(results) or again
