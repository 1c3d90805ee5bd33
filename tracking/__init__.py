"""MLflow: the address, the server, the one writer with its outbox on disk, comparison and report.

    outbox.py   what a run wants to tell MLflow, on disk first
    forward.py  the one writer: sends outboxes to MLflow, again and again until they are empty
    runs.py     where MLflow is, and the runs there
    server.py   an MLflow server of one's own, on loopback
    secret.py   the home's token; guard.py lets its holders in, confine.py keeps the server in its store
    identity.py what clients make sure of before they send anything; auth.py: as MLflow's plugin
    model.py    models and the registry
    system.py   processor, memory, disk and GPU, sampled into an outbox
    compare.py  runs side by side as a frame; report.py writes them as one HTML page; plots.py draws

Nothing here knows of models, data or Ray.
"""
