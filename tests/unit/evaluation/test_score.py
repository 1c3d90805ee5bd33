"""A score as it reads, as it is written, and as it is named in MLflow."""

import json

import pytest
from pydantic import ValidationError

from raylab.documents import to_plain
from raylab.evaluation.clinical import Subgroup
from raylab.score import Score, fold_reasons, undefined, without_interval

KNOWN = Score(value=0.8123, low=0.76, high=0.861)


@pytest.mark.parametrize(
    ("score", "reads"),
    [
        (KNOWN, "0.812 [0.760, 0.861]"),
        (Score(value=0.99985, low=0.9997, high=0.9999), "0.9999 [0.9997, 0.9999]"),
        (Score(value=0.5, low=0.5, high=0.5), "0.500000 [0.500000, 0.500000]"),
        (without_interval(0.5, "too few: 3 patients"), "0.500 (too few: 3 patients)"),
        (Score(value=0.5, low=None, high=None), "0.500"),
        (undefined("no event"), "undefined: no event"),
    ],
)
def test_a_score_reads_alike_everywhere(score, reads):
    assert str(score) == reads


def test_differences_have_a_sign_and_tables_fewer_digits():
    assert Score(value=0.01, low=-0.02, high=0.04).text(2, sign="+") == "+0.01 [-0.02, +0.04]"


def test_a_reason_of_several_scores_is_given_once():
    few = "too few: 3 patients; an interval needs 10"
    scores = {
        "a": without_interval(0.5, few),
        "b": without_interval(0.25, few),
        "c": without_interval(0.1, "too few: all rows are of one patient"),
        "d": KNOWN,
    }
    texts, reasons = fold_reasons(scores)
    assert reasons == [few] and (texts["a"], texts["b"]) == ("0.500 (too few)", "0.250 (too few)")
    assert texts["c"] == str(scores["c"]) and texts["d"] == str(KNOWN)


def test_a_score_is_written_with_what_is_known_of_it():
    assert json.dumps(KNOWN.to_json()) == '{"value": 0.8123, "low": 0.76, "high": 0.861}'
    assert undefined("no event").to_json() == {"value": None, "low": None, "high": None, "why": "no event"}
    assert Score.model_validate(KNOWN.to_json()) == KNOWN
    nested = {"auroc": KNOWN, "rows": [{"lead": KNOWN}], "few": Subgroup(3, 1, why="few"), "n": 3}
    plain = KNOWN.to_json()
    assert to_plain(nested) == {
        "auroc": plain, "rows": [{"lead": plain}], "few": {"n": 3, "positive": 1, "why": "few"}, "n": 3,
    }  # fmt: skip
    with pytest.raises(ValidationError, match="frozen"):
        KNOWN.value = 1.0


def test_a_score_names_its_ends():
    assert dict(KNOWN.ends()) == {"": 0.8123, "_low": 0.76, "_high": 0.861}
    assert dict(without_interval(0.5, "too few").ends()) == {"": 0.5} and dict(undefined("no event").ends()) == {}
