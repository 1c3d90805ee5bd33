"""Scores against scikit-learn and published figures; intervals against simulation."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    precision_recall_curve,
    precision_score,
    r2_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from raylab.documents import to_plain
from raylab.errors import DataError, UsageError
from raylab.evaluation import intervals, metrics
from raylab.evaluation.metrics import (
    binary_differences,
    binary_point,
    binary_scores,
    confusion,
    confusion_by,
    multiclass_differences,
    multiclass_point,
    multiclass_scores,
    paired_difference,
    regression_differences,
    regression_point,
    regression_scores,
    wilson,
)
from raylab.score import undefined, without_interval

CLASSES = ["normal", "pneumonia", "covid"]


def binary(seed=0, N=300, decimals=2):
    """y, p and group: p overconfident and, rounded, full of ties; four rows a patient."""
    rng = np.random.default_rng(seed)
    z = rng.normal(-1, 1.2, N)
    y = (rng.random(N) < 1 / (1 + np.exp(-z))).astype(int)
    p = 1 / (1 + np.exp(-(1.5 * z + 0.4 + rng.normal(0, 0.5, N))))
    return y, np.clip(p.round(decimals), 0.01, 0.99), np.arange(N) // 4


def three(seed=0, N=200):
    rng = np.random.default_rng(seed)
    y = rng.choice(3, N, p=[0.6, 0.3, 0.1])
    z = rng.normal(0, 1, (N, 3)) + 1.2 * np.eye(3)[y]
    return y, np.exp(z) / np.exp(z).sum(1, keepdims=True), np.arange(N) // 2


def logistic_slope(y, p, weight=None):
    x = np.log(p / (1 - p))[:, None]
    return LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x, y, sample_weight=weight).coef_[0, 0]


# Against scikit-learn


@pytest.mark.parametrize("decimals", [1, 2, 12])
def test_binary_values_are_sklearns(decimals):
    y, p, group = binary(decimals=decimals)
    found = {name: score.value for name, score in binary_scores(y, p, group, bootstraps=10).items()}
    assert found["auroc"] == pytest.approx(roc_auc_score(y, p), abs=1e-12)
    assert found["auprc"] == pytest.approx(average_precision_score(y, p), abs=1e-12)
    assert found["brier"] == pytest.approx(brier_score_loss(y, p), abs=1e-12)
    assert found["brier_scaled"] == pytest.approx(1 - found["brier"] / (y.mean() * (1 - y.mean())), abs=1e-12)
    assert found["prevalence"] == y.mean()
    assert found["calibration_slope"] == pytest.approx(logistic_slope(y, p), abs=1e-5)

    fpr, tpr, _ = roc_curve(y, p, drop_intermediate=False)
    assert found["sensitivity_at_specificity_90"] == pytest.approx(tpr[fpr <= 0.1 + 1e-12].max(), abs=1e-12)
    precision, recall, _ = precision_recall_curve(y, p)  # recall falls along the curve
    assert found["ppv_at_sensitivity_80"] == pytest.approx(precision[recall >= 0.8 - 1e-12][-1], abs=1e-12)


def test_the_intercept_makes_the_mean_prediction_the_prevalence():
    y, p, group = binary()
    a = binary_scores(y, p, group, bootstraps=10)["calibration_intercept"].value
    assert (1 / (1 + np.exp(-(a + np.log(p / (1 - p)))))).mean() == pytest.approx(y.mean(), abs=1e-12)


def test_every_resample_is_sklearns_weighted_score():
    y, p, group = binary()
    order = np.lexsort((y, -p))
    y, p, group = y[order], p[order], group[order]
    w = next(intervals.resample_weights(group, 20, seed=3))
    ranked = metrics._ranking(y, p, w)
    slope = metrics._calibration(y, metrics._logit(p), w, free_slope=True)[:, 1]
    for r in range(20):
        assert ranked["auroc"][r] == pytest.approx(roc_auc_score(y, p, sample_weight=w[r]), abs=1e-12)
        assert ranked["auprc"][r] == pytest.approx(average_precision_score(y, p, sample_weight=w[r]), abs=1e-12)
        assert metrics._brier(y, p, w)["brier"][r] == pytest.approx(brier_score_loss(y, p, sample_weight=w[r]))
        assert slope[r] == pytest.approx(logistic_slope(y, p, w[r]), abs=1e-5)


def test_a_resample_scores_like_the_rows_repeated():
    y, p, group = binary(N=80)
    order = np.lexsort((y, -p))
    y, p = y[order], p[order]
    w = next(intervals.resample_weights(group[order], 10, seed=0))
    ranked = metrics._ranking(y, p, w)
    for r in range(10):
        times = w[r].astype(int)
        repeated = binary_scores(np.repeat(y, times), np.repeat(p, times), np.arange(times.sum()), bootstraps=1)
        for name, values in ranked.items():
            assert values[r] == pytest.approx(repeated[name].value, abs=1e-12), name


def test_multiclass_values_are_sklearns():
    y, p, group = three()
    called = p.argmax(1)
    found = multiclass_scores(y, p, group, CLASSES, bootstraps=10)
    assert found["macro_recall"].value == pytest.approx(recall_score(y, called, average="macro"))
    assert found["accuracy"].value == (y == called).mean()
    assert found["auroc"].value == pytest.approx(roc_auc_score(y, p, multi_class="ovr"), abs=1e-12)
    assert found["brier"].value == pytest.approx(((p - np.eye(3)[y]) ** 2).sum(1).mean())
    for k, name in enumerate(CLASSES):
        assert found[f"sensitivity/{name}"].value == recall_score(y, called, labels=[k], average="macro")
        assert found[f"ppv/{name}"].value == precision_score(y, called, labels=[k], average="macro")


def test_ece_by_hand():
    y = np.array([0, 0, 1, 1])
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.3, 0.7]])
    found = multiclass_scores(y, p, np.arange(4), ["a", "b"], bootstraps=5)
    assert found["ece"].value == pytest.approx(0.75 * (0.9 - 2 / 3) + 0.25 * 0.3)


def test_confusion_has_truth_in_rows_and_splits_by_source():
    y, p, _ = three()
    source = np.where(np.arange(len(y)) % 3 == 0, "NIH", "Hannover")
    table, by_source = np.array(confusion(y, p)), confusion_by(source, y, p)
    assert table.sum(1).tolist() == np.bincount(y).tolist()
    assert sorted(by_source) == ["Hannover", "NIH"]
    assert (sum(np.array(c) for c in by_source.values()) == table).all()
    one_row_each = multiclass_scores(y, p, np.arange(len(y)), CLASSES, bootstraps=10)
    k, n = int(table[2, 2]), int(table[2].sum())
    sensitivity = one_row_each["sensitivity/covid"]
    assert (sensitivity.low, sensitivity.high) == pytest.approx(wilson(k, n), abs=1e-12)


# Intervals


def test_wilson_of_the_published_pneumonia_sensitivity():
    low, high = wilson(16, 26)  # the lecture's follow-up: .615, "43 to 78 %"
    assert (round(low, 2), round(high, 2)) == (0.43, 0.78)


def test_wilson_at_the_ends():
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1
    assert wilson(10, 10)[0] == pytest.approx(0.7225, abs=1e-4)
    for k, n in ((1, 0), (-1, 5), (6, 5), (0, 0)):
        with pytest.raises(DataError):
            wilson(k, n)


def clustered_data(rng, patients, rows):
    """The label and most of the prediction belong to the patient: its rows say nearly the same."""
    y = np.repeat(rng.random(patients) < 0.4, rows).astype(int)
    z = 0.9 * y + np.repeat(rng.normal(0, 1, patients), rows) + rng.normal(0, 0.2, patients * rows)
    return y, 1 / (1 + np.exp(-z)), np.repeat(np.arange(patients), rows)


def test_clustered_intervals_are_wider_than_naive_ones():
    y, p, group = clustered_data(np.random.default_rng(0), patients=60, rows=20)

    def width(group):
        score = binary_scores(y, p, group, bootstraps=300)["auroc"]
        return score.high - score.low

    assert 3 < width(group) / width(np.arange(len(y))) < 6  # sqrt(20) = 4.5 if rows were copies


def test_intervals_cover_the_truth():
    """95 % nominal; 60 patients x 10 rows, so that naive intervals (also counted) miss most of the time."""
    rng = np.random.default_rng(1)
    truth = roc_auc_score(*clustered_data(rng, 20_000, 1)[:2])
    covered = naive = 0
    for _ in range(100):
        y, p, group = clustered_data(rng, patients=60, rows=10)
        for clusters in (group, np.arange(len(y))):
            score = paired_difference(y, p, np.full(len(y), 0.5), clusters, bootstraps=200)
            hit = score.low <= truth - 0.5 <= score.high
            covered, naive = (covered + hit, naive) if clusters is group else (covered, naive + hit)
    assert 88 <= covered <= 99
    assert naive < 65


def test_parts_share_resamples_and_everybody_scores_as_alone():
    y, p, group = binary(N=400)
    inside = np.arange(400) % 2 == 0
    members = {"all": np.ones(400, dtype=bool), "half": inside, "again": inside}
    scores = metrics.binary_scores_by(y, p, group, members, 200, 3)
    assert scores["all"] == binary_scores(y, p, group, 200, 3)
    assert scores["half"] == scores["again"]
    alone = binary_scores(y[inside], p[inside], group[inside], 200, 3)
    for name, score in scores["half"].items():
        assert score.value == alone[name].value, name
    w = np.concatenate(list(intervals.resample_weights(group, 200, 3)))[:, inside]
    draws = metrics._auroc_unsorted(y[inside], p[inside], w)
    assert [scores["half"]["auroc"].low, scores["half"]["auroc"].high] == np.percentile(draws, [2.5, 97.5]).tolist()


def test_intervals_of_a_cohort_cover_the_truth():
    covered, truth = 0, 0.76  # of two normals with means 0 and 1: Phi(1 / sqrt(2))
    for seed in range(60):
        rng = np.random.default_rng(seed)
        y = (rng.random(300) < 0.4).astype(int)
        p = 1 / (1 + np.exp(-(rng.normal(size=300) + y)))
        score = metrics.binary_scores_by(y, p, np.arange(300), {"a": rng.random(300) < 0.3}, 200, seed)["a"]["auroc"]
        assert score.low is not None and score.high is not None
        covered += score.low <= truth <= score.high
    assert covered >= 52  # of 60, with 57 expected


def test_weights_count_patients_and_do_not_depend_on_blocks(monkeypatch):
    group = np.array([7, 7, 7, 3, 9, 9])
    w = np.concatenate(list(intervals.resample_weights(group, 50, seed=5)))
    assert w.shape == (50, 6)
    assert (w[:, 0] == w[:, 2]).all() and (w[:, 4] == w[:, 5]).all()
    assert (w[:, 0] + w[:, 3] + w[:, 4] == 3).all()
    assert len(np.unique(w, axis=0)) > 5
    monkeypatch.setattr(intervals, "CELLS", 24)
    blocks = list(intervals.resample_weights(group, 50, seed=5))
    assert len(blocks) == 13
    assert (np.concatenate(blocks) == w).all()


def test_paired_difference_is_narrower_than_the_parts_and_zero_with_itself():
    y, p, group = binary()
    q = np.clip(p + np.random.default_rng(9).normal(0, 0.02, len(p)), 0, 1)
    found = paired_difference(y, p, q, group, bootstraps=300)
    alone = binary_scores(y, p, group, bootstraps=300)["auroc"]
    assert found.value == pytest.approx(roc_auc_score(y, p) - roc_auc_score(y, q), abs=1e-12)
    assert found.high - found.low < (alone.high - alone.low) / 2
    itself = paired_difference(y, p, p, group, bootstraps=50)
    assert itself == without_interval(0, "no interval: all resamples score the same")


def test_paired_macro_recall_is_the_difference_of_the_scores():
    y, p, group = three()
    _, q, _ = three(seed=1)
    a, b = (multiclass_scores(y, x, group, CLASSES, bootstraps=5)["macro_recall"].value for x in (p, q))
    assert paired_difference(y, p, q, group, "macro_recall", bootstraps=50).value == a - b
    few = np.isin(group, np.unique(group)[:12])
    found = paired_difference(y[few], p[few], q[few], group[few], "macro_recall", bootstraps=5, classes=CLASSES)
    assert found.low is None and any(f"of class {name}" in found.why for name in CLASSES)


def test_differences_of_all_scores_are_differences_of_the_scores():
    y, p, group = binary()
    q = np.clip(p + np.random.default_rng(9).normal(0, 0.02, len(p)), 0.01, 0.99)
    found = binary_differences(y, p, q, group, bootstraps=100)
    a, b = (binary_scores(y, x, group, bootstraps=5) for x in (p, q))
    assert set(found) == {"auroc", "auprc", "brier", "sensitivity_at_specificity_90", "ppv_at_sensitivity_80"}
    assert all(score.value == a[name].value - b[name].value for name, score in found.items())
    assert found["auroc"] == paired_difference(y, p, q, group, bootstraps=100)

    y, p, group = three()
    _, q, _ = three(seed=1)
    found = multiclass_differences(y, p, q, group, CLASSES, bootstraps=50)
    a, b = (multiclass_scores(y, x, group, CLASSES, bootstraps=5) for x in (p, q))
    assert {"macro_recall", "accuracy", "auroc", "brier", "ece", "sensitivity/covid"} <= set(found)
    assert all(score.value == pytest.approx(a[name].value - b[name].value, abs=1e-12) for name, score in found.items())
    assert found["macro_recall"] == paired_difference(y, p, q, group, "macro_recall", bootstraps=50)

    y, p = np.random.default_rng(0).normal(size=(2, 60, 2))
    found = regression_differences(y, y + p, y - 2 * p, np.arange(60) // 2, ["a", "b"], bootstraps=50)
    assert found["mae/a"].value == pytest.approx(-np.abs(p[:, 0]).mean()) and found["mae/a"].high < 0
    assert found["r2_min"].low > 0


# What is undefined


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_ranking_and_says_so(label):
    _, p, group = binary()
    found = binary_scores(np.full(len(p), label), p, group, bootstraps=20)
    for name, score in found.items():
        if name == "prevalence":
            assert score.value == label and 0 < score.high - score.low < 0.06
        elif name == "brier":
            assert score.low is None and "too few: 0 patients with" in score.why
        else:
            assert score == undefined("only one class in the data")
    json.dumps(to_plain(found), allow_nan=False)


def test_undefined_resamples_are_left_out_and_counted_and_many_of_them_leave_no_interval():
    def mean_without(rows):
        """Mean of the group numbers; undefined where none of the first `rows` patients was drawn."""
        group = np.arange(20)

        def score(w):
            return {"score": np.where(w[:, :rows].any(axis=1), w @ group / w.sum(axis=1), np.nan)}

        return intervals.clustered(score, group, 1000, 0, {}, {})["score"]

    four, one = mean_without(4), mean_without(1)
    assert four.undefined == pytest.approx(1000 * (16 / 20) ** 20, abs=12) and four.low < 9.5 < four.high
    assert one.low is None and "undefined in " in one.why and one.value == 9.5
    json.dumps(to_plain([four, one]), allow_nan=False)


# Small samples


def small(positives, negatives, rows=1, perfect=False):
    rng = np.random.default_rng(0)
    y = np.repeat(np.repeat([1, 0], [positives, negatives]), rows)
    p = np.where(y == 1, 0.9, 0.1) if perfect else rng.random(len(y))
    return y, p + 0.01 * rng.random(len(y)) * perfect, np.repeat(np.arange(positives + negatives), rows)


@pytest.mark.parametrize(("positives", "negatives", "says"), [
    (2, 2, "too few: 2 patients with the outcome and 2 patients without it; an interval needs 10 of each"),
    (9, 40, "too few: 9 patients with the outcome; an interval needs 10 of each"),
    (40, 1, "too few: 1 patient without it; an interval needs 10 of each"),
])  # fmt: skip
def test_too_few_patients_leave_no_interval_but_the_counts(positives, negatives, says):
    for rows in (1, 25):  # many rows of the same patients are no more patients
        found = binary_scores(*small(positives, negatives, rows), bootstraps=20)
        for name in ("auroc", "auprc", "brier", "sensitivity_at_specificity_90", "calibration_intercept"):
            assert found[name].value is not None and (found[name].low, found[name].high) == (None, None)
            assert found[name].why == says
        assert str(found["auroc"]) == f"{found['auroc'].value:.3f} ({says})"
        assert found["prevalence"].low < found["prevalence"].value < found["prevalence"].high
    y, p, group = small(positives, negatives)
    assert paired_difference(y, p, 1 - p, group, bootstraps=20).why == says


@pytest.mark.parametrize("n", [2, 10, 200])
def test_perfect_separation_is_no_certainty(n):
    y, p, group = small(n, n, perfect=True)
    for name, score in binary_scores(y, p, group, bootstraps=50).items():
        assert score.low is None or score.high - score.low > 1e-4, name
    classes = multiclass_scores(y, np.stack([1 - p, p], 1), group, ["a", "b"], bootstraps=50)
    for name in ("macro_recall", "auroc"):
        assert (classes[name].value, classes[name].low) == (1, None), name
    for name in ("accuracy", "sensitivity/a", "ppv/b"):
        assert classes[name].value == classes[name].high == 1
        assert classes[name].low == pytest.approx(wilson(*[2 * n] * 2 if name == "accuracy" else [n] * 2)[0])


def test_a_rare_class_leaves_macro_recall_without_an_interval():
    y, p, _ = three()
    keep = (y != 2) | (np.cumsum(y == 2) <= 4)
    found = multiclass_scores(y[keep], p[keep], np.arange(keep.sum()), CLASSES, bootstraps=20)
    assert found["macro_recall"].why == "too few: 4 patients of class covid; an interval needs 10 of each"
    assert found["sensitivity/normal"].low is not None


def test_few_rows_of_a_regression_have_no_interval():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(9, 1))
    found = regression_scores(y, y + 0.1 * rng.normal(size=(9, 1)), np.arange(9), ["ph"], bootstraps=20)
    assert found["r2_min"].why == found["mae/ph"].why == "too few: 9 patients; an interval needs 10"


def test_a_proportion_counts_patients_where_their_rows_agree_and_rows_where_they_do_not():
    group = np.repeat(np.arange(40), 25)
    agree = np.repeat(np.arange(40) % 4 == 0, 25)
    differ = np.tile(np.arange(25) < 6, 40)
    ones = np.ones(1000)
    for hits, n in ((agree, 40), (differ, 1000)):
        found = intervals.proportion(hits, ones, group, "")
        assert (found.low, found.high) == pytest.approx(wilson(hits.mean() * n, n), abs=0.01)
    assert intervals.proportion(ones, ones, group, "").low == pytest.approx(wilson(40, 40)[0])
    assert intervals.proportion(0 * ones, 0 * ones, group, "no row").why == "no row"
    assert intervals.proportion(agree, ones, 0 * group, "").why == "too few: all rows are of one patient"
    assert intervals.proportion(agree, ones, 0 * group, "", "tile").why == "too few: all rows are of one tile"


def test_intervals_of_proportions_cover_the_truth_of_clustered_rows():
    rng = np.random.default_rng(2)
    covered = {}
    for patients in (5, 12, 60):
        covered[patients] = 0
        for _ in range(400):
            own = rng.beta(2, 2, patients)  # of each patient; .5 on average
            group = np.repeat(np.arange(patients), 10)
            score = intervals.proportion(rng.random(10 * patients) < own[group], np.ones(10 * patients), group, "")
            covered[patients] += score.low <= 0.5 <= score.high
    assert all(0.91 * 400 <= hits <= 400 for hits in covered.values()), covered


@pytest.mark.parametrize("p", [[0.1, 0.2, 0.8, 0.9], [0.9, 0.8, 0.2, 0.1], [0.1, 0.5, 0.5, 0.9], [0.3] * 4])
def test_no_slope_where_p_separates_or_is_constant(p):
    found = binary_scores([0, 0, 1, 1], p, [0, 1, 2, 3], bootstraps=20)
    assert found["calibration_slope"].value is None
    assert "separates" in found["calibration_slope"].why
    assert found["calibration_intercept"].value is not None


def test_probabilities_of_zero_and_one_stay_finite():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 60)
    p = np.where(rng.random(60) < 0.1, 1 - y, y).astype(float)  # only 0 and 1, some of them wrong
    found = binary_scores(y, p, np.arange(60), bootstraps=100)
    odds = np.log([y[p == 1].mean() / (1 - y[p == 1].mean()), y[p == 0].mean() / (1 - y[p == 0].mean())])
    clip = np.log((1 - metrics.LOGIT_CLIP) / metrics.LOGIT_CLIP)
    assert found["calibration_slope"].value == pytest.approx((odds[0] - odds[1]) / (2 * clip))


@pytest.mark.parametrize("start", [None, [0.0, 1.0], [50.0, 300.0], [-3.0, -9.0]])
def test_steep_fits_are_found_from_any_start(start):
    x, y = np.array([3, 2.01, 2, 1.99, 1, -10.0]), np.array([1, 1, 0, 1, 0, 0])  # all but separated
    (a, b), *_ = metrics._calibration(y, x, np.ones((1, 6)), True, None if start is None else np.array(start))
    left = y - (1 + np.tanh((a + b * x) / 2)) / 2
    assert b > 1.5
    assert [left.sum(), (left * x).sum()] == pytest.approx([0, 0], abs=1e-7)


def test_one_patient_has_values_but_no_interval():
    y, p, _ = binary(N=40)
    score = binary_scores(y, p, np.zeros(40), bootstraps=20)["auroc"]
    assert score.value is not None and score.low is None
    assert "one patient" in score.why


def test_an_absent_class_is_named_and_left_out_of_the_averages():
    y, p, group = three()
    keep = y != 1
    found = multiclass_scores(y[keep], p[keep], group[keep], CLASSES, bootstraps=50)
    assert found["sensitivity/pneumonia"].value is None
    assert found["sensitivity/pneumonia"].why == "no row of class pneumonia"
    present = [found[f"sensitivity/{name}"].value for name in ("normal", "covid")]
    assert found["macro_recall"].value == pytest.approx(np.mean(present))
    assert found["macro_recall"].note == "over normal, covid; no rows of pneumonia"
    assert confusion(y[keep], p[keep])[1] == [0, 0, 0]
    json.dumps(to_plain(found), allow_nan=False)


def test_a_class_never_predicted_has_no_ppv():
    found = multiclass_scores([0, 1, 0], [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]], [0, 1, 2], ["a", "b"], bootstraps=20)
    assert found["ppv/b"].why == "class b was never predicted"
    assert found["sensitivity/b"].value == 0


# Determinism


def test_the_same_seed_gives_the_same_scores_whatever_the_order_of_rows():
    y, p, group = binary()
    mixed = np.random.default_rng(2).permutation(len(y))
    first = binary_scores(y, p, group, bootstraps=100, seed=4)
    assert binary_scores(y, p, group, bootstraps=100, seed=4) == first
    assert binary_scores(y, p, group, bootstraps=100, seed=5) != first
    again = binary_scores(y[mixed], p[mixed], group[mixed], bootstraps=100, seed=4)
    for name, score in first.items():
        assert again[name].to_json() == pytest.approx(score.to_json(), rel=1e-9), name


def test_points_do_not_depend_on_the_order_of_rows_and_equal_the_full_scores():
    y, p, group = binary(decimals=12)
    y3, p3, group3 = three()
    first, first3 = binary_point(y, p), multiclass_point(y3, p3)
    for seed in range(20):
        mixed = np.random.default_rng(seed).permutation(len(y))
        assert binary_point(y[mixed], p[mixed]) == first
        mixed = np.random.default_rng(seed).permutation(len(y3))
        assert multiclass_point(y3[mixed], p3[mixed]) == first3
    full, full3 = binary_scores(y, p, group, bootstraps=2), multiclass_scores(y3, p3, group3, CLASSES, bootstraps=2)
    assert first == {name: full[name].value for name in ("auroc", "auprc", "brier")}
    assert first3 == {name: full3[name].value for name in ("macro_recall", "accuracy", "macro_f1")}


def test_points_leave_out_what_is_undefined():
    assert binary_point([0, 0], [0.5, 0.5]) == {"brier": 0.25}
    assert multiclass_point([0], [[0.2, 0.8]]) == {"macro_recall": 0, "accuracy": 0, "macro_f1": 0}


# Inputs


@pytest.mark.parametrize(
    ("y", "p", "group", "says"),
    [
        ([0, 1], [0.5, np.nan], [0, 1], "p is NaN in 1 of 2 places, first in row 1"),
        ([0, 1], [0.5, 1.5], [0, 1], "p is outside 0..1"),
        ([0, 1], [0.5, -0.1], [0, 1], "p is outside 0..1"),
        ([0, 1, 1], [0.5, 0.5], [0, 1], "y has the shape (3,), p has 2 rows"),
        ([0, 1], [0.5, 0.5], [0, 1, 2], "group has the shape (3,)"),
        ([0, 2], [0.5, 0.5], [0, 1], "y is 2 in row 1"),
        ([0, 0.5], [0.5, 0.5], [0, 1], "y is 0.5 in row 1"),
        ([0, np.nan], [0.5, 0.5], [0, 1], "y is NaN in row 1"),
        ([0, 1], [0.5, 0.5], [0, np.nan], "group is NaN in row 1"),
        ([], [], [], "p has the shape (0,)"),
        ([0, 1], [[0.5, 0.5]] * 2, [0, 1], "p has the shape (2, 2)"),
    ],
)
def test_bad_binary_inputs_are_named(y, p, group, says):
    with pytest.raises(DataError) as error:
        binary_scores(y, p, group, bootstraps=2)
    assert says in str(error.value)


def test_bad_multiclass_and_paired_inputs_are_named():
    y, p, group = three(N=10)
    with pytest.raises(DataError, match="do not sum to 1"):
        multiclass_scores(y, p / 2, group, CLASSES)
    with pytest.raises(DataError, match="p has 3 columns"):
        multiclass_scores(y, p, group, CLASSES[:2])
    with pytest.raises(DataError, match="strata has the shape"):
        confusion_by(["NIH"], y, p)
    with pytest.raises(DataError, match="p_b is NaN"):
        paired_difference([0, 1], [0.5, 0.5], [np.nan, 0.5], [0, 1])
    with pytest.raises(UsageError, match="unknown score 'aurok'"):
        paired_difference([0, 1], [0.5, 0.5], [0.5, 0.5], [0, 1], "aurok")
    with pytest.raises(UsageError, match="bootstraps = 0"):
        binary_scores([0, 1], [0.5, 0.5], [0, 1], bootstraps=0)


def test_regression_scores_of_each_output():
    rng = np.random.default_rng(0)
    y = rng.normal([50, 7.4], [20, 0.1], (400, 2))
    p = y + rng.normal(0, [2, 0.05], y.shape)
    found = regression_scores(y, p, np.arange(400), ["paco2", "ph"], bootstraps=200)
    for k, name in enumerate(("paco2", "ph")):
        assert found[f"r2/{name}"].value == pytest.approx(r2_score(y[:, k], p[:, k]), abs=1e-12)
        assert found[f"mae/{name}"].value == pytest.approx(np.abs(y - p)[:, k].mean())
        assert found[f"r2/{name}"].low < found[f"r2/{name}"].value < found[f"r2/{name}"].high
    assert found["r2_min"].value == found["r2/ph"].value
    assert regression_point(y, p)["r2_min"] == pytest.approx(found["r2_min"].value)
    shuffled = rng.permutation(400)
    assert regression_point(y[shuffled], p[shuffled]) == regression_point(y, p)
    with pytest.raises(DataError, match="outputs"):
        regression_scores(y, p, np.arange(400), ["paco2"])
