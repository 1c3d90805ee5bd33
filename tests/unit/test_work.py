"""Records of work, and the counters behind them."""

import os
from pathlib import Path

import pytest

from raylab import energy, work
from raylab.energy import count_packages, has_whole_node, list_packages
from raylab.work import WorkMeter, append_work, read_work, write_to
from tests.wait import wait_for


def test_a_worker_reports_from_its_begin_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "WRITE_SECONDS", 0.02)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with WorkMeter("worker-0", 2.0, 0.5, False, write_to(tmp_path)) as meter:
        (first,) = read_work(tmp_path)
        assert (first.worker, first.job, first.cpus, first.share, first.training) == ("worker-0", "17", 2.0, 0.5, None)
        meter.note_training()
        wait_for(lambda: read_work(tmp_path)[0].training is not None, 5, "a record while it trains")
        between = read_work(tmp_path)[0]
        meter.note_training()
    (last,) = read_work(tmp_path)
    assert first.begin == last.begin <= last.training < last.end
    assert last.training == between.training and last.end > between.end


def test_of_a_killed_worker_the_last_record_counts(tmp_path):
    record = {"id": "a", "worker": "worker-0", "node": "n1", "cpus": 1.0, "share": 1.0, "begin": 10.0, "end": 10.0}
    append_work(tmp_path, record)
    append_work(tmp_path, {**record, "id": "b", "begin": 5.0})
    append_work(tmp_path, {**record, "end": 40.0})
    with (tmp_path / work.FILE).open("a") as file:
        file.write('{"id": "a", "end": 4')  # torn by a kill
    assert [(one.id, one.end) for one in read_work(tmp_path)] == [("b", 10.0), ("a", 40.0)]


def test_a_full_disk_does_not_end_a_run(tmp_path, caplog):
    with WorkMeter("worker-0", 1.0, 1.0, False, write_to(tmp_path / "missing")):
        pass
    assert "lacks a record" in caplog.text


def make_package(powercap, name, energy_uj, label="package-0"):
    (powercap / name).mkdir(parents=True)
    for file, text in {"name": label, "energy_uj": energy_uj, "max_energy_range_uj": 1_000_001}.items():
        (powercap / name / file).write_text(f"{text}\n")
    return powercap / name


def test_energy_of_processors_is_counted_across_the_end_of_the_counter(tmp_path):
    package = make_package(tmp_path, "intel-rapl:0", 900_000)
    make_package(tmp_path, "intel-rapl:0:0", 5, "core")
    make_package(tmp_path, "intel-rapl:1", 0, "psys")
    assert list_packages(tmp_path) == [package]
    read = count_packages([package])
    (package / "energy_uj").write_text("950000\n")
    assert read() == pytest.approx(0.05)
    (package / "energy_uj").write_text("50000\n")  # it has begun again
    assert read() == pytest.approx(0.150001)


def test_energy_is_not_measured_where_others_compute_too(monkeypatch, tmp_path):
    make_package(tmp_path, "intel-rapl:0", 0)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    assert energy.open_counters(False, 1.0)() == {}
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert not has_whole_node({"SLURM_CPUS_ON_NODE": "3"})
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "4")
    read = energy.open_counters(False, 0.25)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("800000\n")
    assert read() == {"cpu": pytest.approx(0.2)}


def test_without_a_card_no_energy_is_claimed():
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a card")
    assert energy.open_counters(True, 1.0)() == {}
