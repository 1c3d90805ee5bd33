"""What the elastic policy decides from numbers alone; Ray itself is in tests/ray and tests/slurm."""

import json
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from raylab.distributed.autoscaling import clamp
from raylab.distributed.elastic import has_handed_over
from raylab.distributed.train import Forward

CPU, BIG, GPU = {"CPU": 1}, {"CPU": 4}, {"CPU": 1, "GPU": 1}


def capacity(most, *types):
    return {"max": most, "types": [{"count": count, "resources": resources} for count, resources in types]}


def test_a_wish_is_cut_to_the_largest_cluster():
    assert clamp([CPU] * 9, capacity(8, (8, {"CPU": 1}))) == [CPU] * 8
    assert clamp([CPU] * 9, capacity(2, (8, {"CPU": 4}))) == [CPU] * 8
    assert clamp([GPU] * 3, capacity(4, (4, {"CPU": 2}))) == [], "no node has a GPU"


def test_what_does_not_fit_does_not_keep_out_what_does():
    assert clamp([GPU, BIG, CPU], capacity(3, (3, {"CPU": 2}))) == [CPU]
    mixed = capacity(2, (1, {"CPU": 4}), (1, {"CPU": 1, "GPU": 1}))
    assert clamp([GPU, GPU, CPU], mixed) == [GPU, CPU]


@given(st.lists(st.sampled_from([CPU, BIG, GPU]), max_size=12), st.integers(1, 5), st.integers(1, 5))
def test_what_is_left_is_a_part_of_the_wish_in_its_order_and_fits(bundles, most, count):
    fitting = clamp(bundles, capacity(most, (count, {"CPU": 4, "GPU": 1})))
    rest = iter(bundles)
    assert all(any(bundle is wished for wished in rest) for bundle in fitting)
    nodes = min(most, count)
    assert sum(bundle["CPU"] for bundle in fitting) <= 4 * nodes
    assert sum(bundle.get("GPU", 0) for bundle in fitting) <= nodes
    if len(bundles) <= nodes:
        assert fitting == bundles, "each could have a node of its own"


def test_a_run_has_moved_when_that_was_the_last_thing_it_did(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    assert not has_handed_over(tmp_path)
    for line, expected in (({"start": 0}, False), ({"moved": 5}, True), ({"start": 5}, False), ({"step": 6}, False)):
        more = {"attempt": 0, "workers": 1, "loss": 0.5, "why": "a node leaves"}
        with ledger.open("a") as file:
            file.write(json.dumps(more | line) + "\n")
        assert has_handed_over(tmp_path) is expected


def test_a_runs_controller_and_its_helpers_load_no_torch():
    """What Ray's actors beside the workers import: torch is 500 MB and half of a start."""
    code = "import sys; from raylab.distributed import autoscaling, rendezvous, train; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_controller_passes_on_rows_of_one_rank_and_the_load_of_every_node():
    rows, loads = [], []
    ranks = [{"rows": [{"step": 1}], "node": node} for node in ({}, {"n2/power": 80.0}, {}, {"n3/power": 90.0})]
    Forward(rows.extend, loads.append).after_report(None, ranks, None)
    assert rows == [{"step": 1}] and loads == [{"n2/power": 80.0}, {"n3/power": 90.0}]
