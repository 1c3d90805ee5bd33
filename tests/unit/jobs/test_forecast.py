"""What a run will cost: the arithmetic, twenty real steps, and the refusal above a budget."""

from decimal import Decimal
from fractions import Fraction

import pytest

import raylab
from cluster.directory import Directory
from cluster.sites import Billing, NodeType, Site
from cluster.slurm import Slurm
from jobs import cli
from jobs.cluster import SlurmCluster, describe_cluster
from jobs.common import forecast
from jobs.common.forecast import Forecast, Measurement, measure, price, run_seconds, workers_per_node
from jobs.common.training import Work, inspect
from raylab.config.overrides import override
from raylab.errors import UsageError
from raylab.tasks.recipes import shipped_recipe
from raylab.training.shard_gradients import CHECKS

RECIPE = override(shipped_recipe("ards", True), {"loop.epochs": 10, "loop.shards": 6})


def test_a_step_lasts_as_long_as_that_of_the_worker_with_most_shards():
    measured = Measurement(start=5.0, step=0.3, validation=2.0)
    work = Work(samples=1000, steps=100)
    assert run_seconds(measured, RECIPE, work, 1) == pytest.approx(5 + 100 * 0.3 + 10 * 2)
    assert run_seconds(measured, RECIPE, work, 4) == pytest.approx(5 + 100 * 0.1 + 10 * 0.5)
    assert run_seconds(measured, RECIPE, Work(1000, 1), 1) == pytest.approx(5 + 0.3 + 2)


@pytest.mark.parametrize("settings", [{}, {"loop.global_batch_size": 8}, {"loop.global_batch_size": 4096}])
def test_real_steps_are_measured_and_leave_no_trace(ards_data, settings, monkeypatch, tmp_path):
    """With some, many and one step an epoch."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("jobs.common.forecast.STEPS", 6)
    recipe = override(RECIPE, {"loop.epochs": 30, **settings})
    measured = measure(recipe, ards_data, inspect(recipe, ards_data))
    assert measured.step > 0 and measured.validation >= 0 and measured.start >= 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("per_epoch", [27, 3, 2, 1])
def test_steps_in_which_passes_are_checked_count_once(per_epoch, monkeypatch, tmp_path):
    """The first CHECKS passes of a shape take twice the time. The forecast is the time of the whole run, exactly."""
    recipe = override(RECIPE, {"loop.epochs": 60})
    steps, validation, now = 60 * per_epoch, 5.0, [0.0]
    of_shape = {False: 0, True: 0}  # a batch that ends an epoch has a shape of its own
    seconds = [0.0]  # at which each step has ended
    for number in range(1, steps + 1):
        is_last = number % per_epoch == 0
        of_shape[is_last] += 1
        takes = 2.0 if per_epoch == 1 or not is_last else 1.0  # few rows: no passes, and nothing to check
        seconds.append(seconds[-1] + (takes if of_shape[is_last] <= CHECKS else 1.0) + validation * is_last)

    def execute(recipe, scratch, send, flush_seconds):
        for number in range(1, steps + 1):
            now[0] = 30 + seconds[number]
            send([{"step": number, "loss": 1.0, **({"val/loss": 1.0} if number % per_epoch == 0 else {})}])

    monkeypatch.setattr(forecast, "load_samples", lambda recipe, data: ())
    monkeypatch.setattr(forecast, "execute", execute)
    monkeypatch.setattr(forecast, "measure_validation", lambda *_: validation)
    work = Work(samples=1000, steps=steps)
    measured = measure(recipe, tmp_path, work, lambda: now[0])
    assert measured.step == pytest.approx(1.0 if per_epoch > 1 else 1.0 + validation)
    assert run_seconds(measured, recipe, work, 1) == pytest.approx(30 + seconds[-1])


def test_a_run_of_slow_steps_only_is_measured_by_them(monkeypatch, tmp_path):
    now = [0.0]

    def execute(recipe, scratch, send, flush_seconds):
        for number in range(1, CHECKS + 2):
            now[0] = 2.0 * number
            send([{"step": number, "loss": 1.0}])

    monkeypatch.setattr(forecast, "load_samples", lambda recipe, data: ())
    monkeypatch.setattr(forecast, "execute", execute)
    monkeypatch.setattr(forecast, "measure_validation", lambda *_: 0.0)
    measured = measure(override(RECIPE, {"loop.epochs": 1}), tmp_path, Work(100, CHECKS + 1), lambda: now[0])
    assert measured.step == pytest.approx(2.0)


def test_a_model_without_steps_is_fitted_once(ards_data):
    recipe = override(shipped_recipe("ards", True), {"model.name": "logistic"})
    work = inspect(recipe, ards_data)
    assert work.steps == 1 and measure(recipe, ards_data, work).step > 0


SITE = Site(name="here", partition="batch", head=NodeType(cpus=2, memory_mb=4000), nodes={
    "cpu": NodeType(cpus=4, memory_mb=8000), "gpu": NodeType(cpus=8, memory_mb=8000, gpus=2)
})  # fmt: skip
PLAIN = Forecast(seconds=7200.0, core_hours=6.0)


class Silent(Slurm):
    """A Slurm without weights and limits, but for those of a test."""

    def __init__(self, **answers):
        super().__init__()
        self.answers = answers

    def run(self, command, *arguments, **options):
        return self.answers.get(command, "")


def test_whole_nodes_and_the_head_are_billed():
    found = price(PLAIN, RECIPE, 5, SITE, SITE.nodes["cpu"], Silent())
    assert (found.nodes, found.amount, found.unit, found.left) == (2, 2 * (2 * 4 + 2), "core-hours", None)
    billing = Billing(unit="node-hours", rate={"batch": Decimal(1)})
    found = price(PLAIN, RECIPE, 5, SITE.model_copy(update={"billing": billing}), SITE.nodes["cpu"], Silent())
    assert (found.amount, found.unit) == (2 * 3, "node-hours")


def test_slurms_weights_are_used():
    slurm = Silent(scontrol="PartitionName=batch TRESBillingWeights=CPU=1.0,Mem=0,GRES/gpu=10")
    found = price(PLAIN, override(RECIPE, {"scaling.gpu": True}), 2, SITE, SITE.nodes["gpu"], slurm)
    assert (found.nodes, found.amount, found.unit) == (1, 2 * (8 + 20 + 2), "billing-hours")


def test_above_the_budget_of_the_site_it_is_refused_with_the_figures(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path))
    site = SITE.model_copy(update={"billing": Billing(budget=Decimal(20))})
    assert price(PLAIN, RECIPE, 5, site, site.nodes["cpu"], Silent()).left == 20
    with pytest.raises(UsageError, match="this will cost 28 core-hours, and 20 are left"):
        price(PLAIN, RECIPE, 9, site, site.nodes["cpu"], Silent())


def test_above_the_limit_of_the_account_it_is_refused():
    site = SITE.model_copy(update={"account": "lungs"})
    left = Silent(scontrol="GrpTRESMins=cpu=1200(0),mem=N(0)")
    assert price(PLAIN, RECIPE, 5, site, site.nodes["cpu"], left).amount == 20
    with pytest.raises(UsageError, match=r"this will cost 20 core-hours, and 19.98 are left") as caught:
        price(PLAIN, RECIPE, 5, site, site.nodes["cpu"], Silent(scontrol="GrpTRESMins=cpu=1200(1)"))
    assert "GrpTRESMins, cpu" in caught.value.why and caught.value.exit_code == 2


def test_a_limit_in_billing_is_compared_with_what_slurm_bills():
    site = SITE.model_copy(update={"account": "lungs"})
    with pytest.raises(UsageError, match="GrpTRESMins, billing"):
        price(PLAIN, RECIPE, 5, site, site.nodes["cpu"], Silent(scontrol="GrpTRESMins=billing=60(0)"))


def test_workers_that_fit_on_no_node_are_refused():
    assert workers_per_node(override(RECIPE, {"scaling.cpus_per_worker": 3}), SITE.nodes["gpu"]) == 2
    with pytest.raises(UsageError, match="does not fit"):
        workers_per_node(override(RECIPE, {"scaling.gpu": True}), SITE.nodes["cpu"])


def test_estimate_is_the_dry_run_of_a_verb_at_a_site(ards_data, capsys, monkeypatch, tmp_path):
    (tmp_path / "sites.toml").write_text("[here]\nbilling.budget = 0\n[here.nodes.cpu]\ncpus = 1\nmemory_mb = 2000\n")
    monkeypatch.setenv("RAYLAB_SITES", str(tmp_path / "sites.toml"))
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    words = ["train", "ards", "--data", str(ards_data), "--smoke", "--workers", "2"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "core-hours of workers" in capsys.readouterr().out
    assert cli.main(["estimate", *words, "--site", "here"]) == 2
    assert "and 0 are left" in capsys.readouterr().err
    assert cli.main(["estimate", *words, "--site", "here", "--node-type", "gpu"]) == 2
    assert "use one of: cpu" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_dry_run_of_a_search_starts_nothing(ards_data, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path))
    words = ["tune", "ards", "--data", str(ards_data), "--smoke", "--trials", "8", "--dry-run"]
    assert cli.main(words) == 0
    assert "8 trials" in capsys.readouterr().out
    assert cli.main([*words, "--scheduler", "nonsense"]) == 2
    assert not (tmp_path / "runs").exists()


def test_the_amount_is_exact_until_it_is_shown():
    assert isinstance(price(PLAIN, RECIPE, 1, SITE, SITE.nodes["cpu"], Silent()).amount, Fraction)


@pytest.mark.parametrize(("function", "options"), [(raylab.train, {"workers": 2}), (raylab.tune, {"trials": 8})])
def test_a_call_above_the_budget_is_not_submitted(ards_data, monkeypatch, tmp_path, function, options):
    (tmp_path / "sites.toml").write_text("[here]\nbilling.budget = 0\n[here.nodes.cpu]\ncpus = 1\nmemory_mb = 2000\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bash").symlink_to("/bin/bash")  # which Ray needs; no Slurm
    places = {"RAYLAB_SITES": "sites.toml", "RAYLAB_HOME": "", "PATH": "bin"}
    for name, place in places.items():
        monkeypatch.setenv(name, str(tmp_path / place))
    spec, _ = describe_cluster("here", "ray", 0, 1, (), None)
    directory = Directory(tmp_path / "clusters" / "ray")
    directory.create(spec)
    with pytest.raises(UsageError, match="and 0 are left"):
        SlurmCluster(directory).submit(function, "ards", ards_data, smoke=True, name="dear", quiet=True, **options)
    assert not list((tmp_path / "submitted").glob("*.json"))
