"""raylab: elastic training and tuning of medical deep-learning models on Ray and Slurm.

What the verbs of the command line do, as functions, and trained models for new data:

    import raylab

    data = raylab.prepare("ards", "prepared/ards", source="synthetic").directory
    run = raylab.train("ards", data, workers=2, name="first")
    raylab.evaluate(run, data).scores["auroc"]
    raylab.compare()
    raylab.load(run).predict(events_of_new_patients)
    raylab.load_plugin("tcn.py")
    raylab.cluster("SITE").submit(raylab.tune, "ards", data, name="search").watch()

They live in `jobs`, which joins Ray and MLflow, and are loaded when they are first used: `import raylab` alone is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.cluster import cluster
    from jobs.compare import compare
    from jobs.evaluate import evaluate
    from jobs.load import load
    from jobs.load_plugin import load_plugin
    from jobs.predict import predict
    from jobs.prepare import prepare
    from jobs.resume import resume
    from jobs.train import train
    from jobs.transfer import transfer
    from jobs.tune import tune

__version__ = "0.1.0"
__all__ = [
    "cluster", "compare", "evaluate", "load", "load_plugin", "predict",
    "prepare", "resume", "train", "transfer", "tune",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"jobs.{name}"), name)
    raise AttributeError(f"module 'raylab' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
