"""What Ray's memory monitor says of a process that it has ended."""

import re

from ray.exceptions import OutOfMemoryError

NODE = re.compile(r"\(IP: ([^,]+),.*?was ([\d.]+)GB used / ([\d.]+)GB limit")
WORKER = re.compile(r"pid=(\d+), actual memory used=([\d.]+)GB")


def explain_memory_kill(error: BaseException) -> str:
    """`process 12 on 10.0.0.1 ran out of memory: Ray ended it, because ...`; empty if `error` has another cause."""
    if not isinstance(error, OutOfMemoryError):
        return ""
    text = str(error)
    node, worker = NODE.search(text), WORKER.search(text)
    if node is None or worker is None:
        return f"a worker ran out of memory: {text.strip().splitlines()[0][:300]}"
    return (
        f"process {worker[1]} on {node[1]} ran out of memory: Ray ended it, because {node[2]} GB of the node's "
        f"{node[3]} GB were in use, {worker[2]} GB of them by this process"
    )
