"""MLflow: the address, the server, the one writer with its outbox on disk, comparison and report.

    outbox.py     records of a run for MLflow, written to disk first
    forwarder.py  the one writer: sends outboxes to MLflow until they are empty
    runs.py       the address of MLflow, and the runs there
    server.py     the embedded MLflow server, on loopback
    access/       secret.py: the home's token; guard.py admits its holders; confine.py keeps the server in its store;
                  identity.py: checks before a client sends anything; plugin.py: MLflow's plugin; login.py: credentials
    models.py     models and the registry
    system.py     processor, memory, disk and GPU, sampled into an outbox
    compare.py    runs side by side as a frame; report.py writes them as one HTML page; plots.py draws

Nothing here knows of models, data or Ray.
"""
