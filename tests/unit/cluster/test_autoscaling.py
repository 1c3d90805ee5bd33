"""What Ray's autoscaler is told, and what the locked Ray makes of it."""

import json
from pathlib import Path

import pytest

from cluster import autoscaling


@pytest.fixture
def configure(make_spec, site):
    """The configuration of a cluster of the site's two node types, whose nodes are allocated whole or not."""

    def make(low: int = 1, high: int = 8, idle: int = 90, whole: bool = False, **other: object) -> dict:
        head = site.head.model_copy(update={"memory_mb": 1000})
        changed = site.model_copy(update={"idle_seconds": idle, "whole_nodes": whole, "head": head})
        spec = make_spec(low=low, high=high, site=changed, **other)
        return json.loads(autoscaling.configuration(spec, Path("/p/ray"), 2))

    return make


def test_the_locked_rays_own_checks_take_the_autoscaling_configuration(configure):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = configure()
    prepared = prepare_config(dict(config))
    validate_config(prepared)
    validate_config(config)
    assert set(prepared) == set(config), "Ray fills in what is missing and its monitor then reads the file without it"


def test_the_locked_ray_reads_our_limits_from_it(configure):
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    read = AutoscalingConfig(configure())
    types = read.get_node_type_configs()
    assert read.get_head_node_type() == "head"
    assert types["head"].resources == {"CPU": 0}
    assert read.get_max_num_worker_nodes() == 8
    assert (types["cpu"].min_worker_nodes, types["cpu"].max_worker_nodes) == (1, 8)
    assert (types["gpu"].min_worker_nodes, types["gpu"].max_worker_nodes) == (0, 3)
    assert types["gpu"].resources == {"CPU": 8, "GPU": 2}
    assert types["cpu"].idle_timeout_s == 90


def test_a_head_that_works_counts_as_one_of_the_nodes(configure):
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    read = AutoscalingConfig(configure(low=2, high=4, whole=True, types=["gpu", "cpu"]))
    types = read.get_node_type_configs()
    assert types["head"].resources == {"CPU": 6, "GPU": 2}, "8 CPUs without the 2 of the head"
    assert read.get_max_num_worker_nodes() == 3
    assert (types["gpu"].min_worker_nodes, types["gpu"].max_worker_nodes) == (1, 2), "the site has 3 of this type"
    assert (types["cpu"].min_worker_nodes, types["cpu"].max_worker_nodes) == (0, 3)


def test_a_cluster_of_one_node_is_the_heads(configure):
    config = configure(low=0, high=1, whole=True, types=["cpu"])
    assert config["max_workers"] == 0 and config["available_node_types"]["cpu"]["max_workers"] == 0


def test_the_provider_finds_its_cluster_in_it(configure):
    provider = configure()["provider"]
    assert (provider["directory"], provider["generation"]) == ("/p/ray", 2)
    module, name = provider["module"].rsplit(".", 1)
    assert hasattr(__import__(module, fromlist=[name]), name)


def test_all_nodes_at_once_may_be_asked_for(configure):
    assert configure()["upscaling_speed"] >= 8


def test_the_largest_that_a_cluster_can_be(make_spec, site):
    cpu, gpu = {"CPU": 4}, {"CPU": 8, "GPU": 2}
    assert autoscaling.capacity(make_spec(high=5)) == {
        "max": 5,
        "types": [{"count": 5, "resources": cpu}, {"count": 3, "resources": gpu}],
    }
    whole = site.model_copy(update={"whole_nodes": True, "head": site.head.model_copy(update={"memory_mb": 1000})})
    assert autoscaling.capacity(make_spec(site=whole, high=5)) == {
        "max": 5,
        "types": [
            {"count": 1, "resources": {"CPU": 2}}, {"count": 4, "resources": cpu}, {"count": 3, "resources": gpu},
        ],
    }  # fmt: skip
