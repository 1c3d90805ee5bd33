import numpy as np
import pytest

from raylab.evaluation.alarms import Rolling, counts, scores


def rolling(*stays: tuple[float | None, dict[float, float]], horizon: float = 6.0, gap: float = 0.0) -> Rolling:
    """Stays as (onset, {hour: p})."""
    rows = [
        (k, at, np.nan if onset is None else onset, p)
        for k, (onset, hours) in enumerate(stays)
        for at, p in hours.items()
    ]
    stay, at, onset, p = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    return Rolling(stay.astype(np.int64), at, onset, p, np.arange(len(stays)), gap, horizon)


def test_alarms_by_hand():
    rows = rolling(
        (20, {12: 0.9, 13: 0.9, 14: 0.2, 15: 0.9, 16: 0.9, 19: 0.9}),  # alarms at 12, 16 (silence of 4 h)
        (None, {12: 0.1, 13: 0.8}),  # a false one
        (18, {12: 0.1, 13: 0.1}),  # missed
        (40, {12: 0.1}),  # no event yet: its onset is beyond every horizon
    )
    found = counts(rows, 0.5)
    assert found["alarms"].tolist() == [2, 1, 0, 0]
    assert found["true"].tolist() == [1, 0, 0, 0]  # at 12 the onset at 20 is not within 6 h
    assert found["event"].tolist() == [1, 0, 1, 0] and found["recalled"].tolist() == [1, 0, 0, 0]
    assert found["lead"].tolist() == [4, 0, 0, 0] and found["hours"].tolist() == [6, 2, 2, 1]


def test_a_gap_moves_what_is_true():
    rows = rolling((20, {17: 0.9}), gap=3)
    assert counts(rows, 0.5)["true"].tolist() == [0]  # 20 is not after 17 + 3
    assert counts(rolling((20.5, {17: 0.9}), gap=3), 0.5)["true"].tolist() == [1]


def test_the_order_of_rows_does_not_matter():
    rows = rolling((20, {12: 0.9, 13: 0.9, 16: 0.9}), (None, {12: 0.8, 13: 0.1}))
    turned = Rolling(rows.stay[::-1], rows.at[::-1], rows.onset[::-1], rows.p[::-1], rows.group, rows.gap, rows.horizon)
    assert all((counts(rows, 0.5)[name] == counts(turned, 0.5)[name]).all() for name in counts(rows, 0.5))


def test_scores_at_each_recall():
    events = [(20.0, {15: 0.9 - k / 20, 16: 0.9 - k / 20}) for k in range(10)]
    others = [(None, {15: 0.6, 16: 0.6}) for _ in range(10)]
    table = {row.event_recall_at_least: row for row in scores(rolling(*events, *others), bootstraps=50)}
    assert table[0.5].event_recall.value >= 0.5 and table[0.5].alarm_precision.value == 1
    assert table[0.9].event_recall.value >= 0.9 and table[0.9].alarm_precision.value < 0.6
    assert table[0.9].threshold < table[0.5].threshold
    assert table[0.5].lead_h.value == pytest.approx(5)
    assert table[0.9].alarm_precision.low <= table[0.9].alarm_precision.value
    none = scores(rolling((None, {12: 0.5}), (None, {12: 0.2})), bootstraps=5)
    assert all("no threshold" in row.why for row in none)
