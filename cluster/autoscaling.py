"""The nodes that a cluster may have, as Ray's autoscaler is told: pure functions of the specification."""

import json
from pathlib import Path
from typing import Any

from cluster.sites import NodeType
from cluster.spec import ClusterSpec


def resources(node: NodeType) -> dict[str, int]:
    """The resources that Ray expects of a node before it starts. Memory is omitted: no raylab task requests it."""
    return {"CPU": node.cpus} | ({"GPU": node.gpus} if node.gpus else {})


def head_resources(spec: ClusterSpec) -> dict[str, int]:
    """The resources of the head's node that are for work: those of its type without the head's share, or none."""
    if not spec.head_type:
        return {"CPU": 0}
    node = spec.site.nodes[spec.head_type]
    return resources(node) | {"CPU": node.cpus - spec.site.head.cpus}


def max_workers(spec: ClusterSpec) -> dict[str, int]:
    """The maximum number of nodes of each type besides the head's."""
    total = spec.max - bool(spec.head_type)
    limits = {}
    for kind in spec.types:
        most = spec.site.nodes[kind].max
        limits[kind] = total if most is None else min(total, most - (kind == spec.head_type))
    return limits


def capacity(spec: ClusterSpec) -> dict[str, Any]:
    """The maximum size of this cluster, for clamping requests: {"max": nodes, "types": [{"count", "resources"}]}."""
    types = [{"count": 1, "resources": head_resources(spec)}] if spec.head_type else []
    types += [
        {"count": count, "resources": resources(spec.site.nodes[kind])} for kind, count in max_workers(spec).items()
    ]
    return {"max": spec.max, "types": types}


def configuration(spec: ClusterSpec, directory: Path, generation: int) -> str:
    """Ray's autoscaling configuration (JSON, which is YAML): our node provider and every key that Ray requires."""
    idle_seconds = spec.site.idle_seconds
    types: dict[str, Any] = {
        "head": {"resources": head_resources(spec), "node_config": {}, "min_workers": 0, "max_workers": 0},
    }
    low = max(0, spec.min - bool(spec.head_type))
    for at, (kind, most) in enumerate(max_workers(spec).items()):
        types[kind] = {
            "resources": resources(spec.site.nodes[kind]),
            "node_config": {"type": kind},
            "min_workers": low if at == 0 else 0,
            "max_workers": most,
            "idle_timeout_s": idle_seconds,
        }
    return json.dumps(
        {
            "cluster_name": spec.name,
            "max_workers": spec.max - bool(spec.head_type),
            "upscaling_speed": 100.0,
            "idle_timeout_minutes": max(1, round(idle_seconds / 60)),
            "provider": {
                "type": "external",
                "module": "cluster.provider.SlurmProvider",
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "directory": str(directory),
                "generation": generation,
            },
            "available_node_types": types,
            "head_node_type": "head",
            "auth": {},
            "docker": {},
            "initialization_commands": [],
            "setup_commands": [],
            "head_setup_commands": [],
            "worker_setup_commands": [],
            "head_start_ray_commands": [],
            "worker_start_ray_commands": [],
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
        },
        indent=1,
    )
