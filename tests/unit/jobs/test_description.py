"""The description of a run on its page in MLflow."""

import pytest

from jobs.common import description
from raylab.tasks import TASKS
from raylab.training.run_record import RunRecord

SCORES = {
    "test": {
        "n": 1200,
        "patients": 400,
        "auroc": {"value": 0.812, "low": 0.76, "high": 0.861},
        "brier": {"value": 0.1, "low": None, "high": None, "why": "too few: 2 patients"},
    },
    "val": {"n": 300, "patients": 100, "auroc": {"value": 0.9, "low": 0.85, "high": 0.95}},
}


def record(**more: object) -> RunRecord:
    fields = {
        "name": "first",
        "uri": "sqlite:////h/mlflow/mlflow.db",
        "experiment": "raylab",
        "kind": "train",
        "task": "ards",
        "data": "prepared/ards",
        "data_hash": "a" * 64,
        "split_hash": "b" * 64,
        "synthetic": True,
        "tags": {"raylab.data_source": "synthetic"},
    }
    return RunRecord(**{**fields, **more})


DESCRIPTION = r"""Training of a **gru** model, task **ards**.

Data: **synthetic**, aaaaaaaa, split bbbbbbbb, seed 0. This data is SYNTHETIC.

| split | rows | patients | score | value, 95% CI |
|---|---|---|---|---|
| test | 1,200 | 400 | auroc | 0\.812 \[0\.760, 0\.861\] |
| test | 1,200 | 400 | brier | 0\.100 \(too few\) |
| val (used to choose the model) | 300 | 100 | auroc | 0\.900 \[0\.850, 0\.950\] |

Next:

```
raylab resume first    # if it has not finished
raylab evaluate ards --run first --data prepared/ards --split test
raylab compare
```"""


def test_a_run_is_described_with_its_data_scores_and_next_commands() -> None:
    assert description.render(record(), TASKS["ards"].smoke, SCORES) == DESCRIPTION


def test_a_search_links_to_its_charts_and_an_evaluation_says_of_which_run_it_is() -> None:
    search = description.render(record(kind="tune", charts="#/experiments/1/runs?x=y"), TASKS["ards"].smoke, {})
    assert "](#/experiments/1/runs?x=y)" in search
    evaluation = description.render(record(kind="evaluate", parent="first"), TASKS["ards"].smoke, SCORES)
    assert evaluation.startswith("Evaluation of a **gru** model, task **ards**, from run **first**.")
    assert "used to choose" not in evaluation and "evaluate ards" not in evaluation


def test_names_cannot_write_markdown_and_paths_stay_out_of_a_teams_server() -> None:
    odd = "a`b*c|d\n# <img src=x onerror=alert(1)> [x](javascript:y)"
    text = description.render(
        record(parent=odd, data=f"/data/{odd}```", tags={"raylab.data_source": odd}), TASKS["ards"].smoke, {}
    )
    shown, _, commands = text.partition("Next:")
    assert "<img" not in shown and "\n#" not in text and "[x](" not in shown and "c|d" not in shown
    assert commands.count("````\n") == 1 and commands.endswith("\n````")  # the fence is longer than any in the path
    team = description.render(record(uri="https://team", data="/data/secret"), TASKS["ards"].smoke, {})
    assert "secret" not in team and "--data DIR" in team


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_has_a_description(task) -> None:
    assert task.name in description.render(record(task=task.name), task.full, {})
