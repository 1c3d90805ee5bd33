"""The training that elastic.py compares raylab with, as a user of torchft would write it.

    python benchmarks/torchft_training.py DATA DIRECTORY WORKERS

torchft (0.2.0, with opentelemetry's OTLP exporter over HTTP) is not among raylab's packages: install it beside them.
torchft's DistributedDataParallel ends a survivor with an AssertionError under torch 2.15, so one call averages all
gradients here. Network, batch, clipping and moving average are those of stock_training.py, in WORKERS replica groups of
one process each; this process is torchft's lighthouse and starts a replica again that has died. A replica that returns
takes the state of another, so there are no checkpoints. The first participant appends a line per step to
DIRECTORY/ledger.jsonl, and one with all pids whenever the participants change.
"""

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

LOOK_SECONDS = 0.1  # as often as torchrun in elastic.py looks at its processes
SECONDS = 30.0  # torchft's time-outs


def train(data: Path, directory: Path, replica: str) -> None:
    """Be the replica named `replica`, without end."""
    import numpy as np
    import torch
    from torch.distributed import TCPStore
    from torch.nn.utils import parameters_to_vector, vector_to_parameters
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from torchft import Manager, Optimizer, ProcessGroupGloo

    from raylab.tasks import find_task
    from raylab.tasks.recipes import shipped_recipe

    torch.set_num_threads(1)
    recipe, task = shipped_recipe("ards"), find_task("ards")
    samples = task.load(data, "train", recipe.data, None)
    model = task.model(recipe, samples.spec).train()
    assert recipe.loop.ema_decay is not None and recipe.optim.max_grad_norm is not None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.loop.ema_decay))
    optim = recipe.optim
    betas = (optim.beta1, optim.beta2)
    adamw = torch.optim.AdamW(model.parameters(), optim.lr, betas, weight_decay=optim.weight_decay, fused=True)

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "average": average.state_dict(), "optim": adamw.state_dict()}

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        adamw.load_state_dict(state["optim"])

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    timeout = timedelta(seconds=SECONDS)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        load_state_dict=load,
        state_dict=state,
        min_replica_size=1,
        timeout=timeout,
        quorum_timeout=timeout,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        replica_id=replica,
        hostname="127.0.0.1",
    )
    optimizer = Optimizer(manager, adamw)
    (directory / f"pid-{replica}").write_text(str(os.getpid()))
    size = 0
    with (directory / "ledger.jsonl").open("a") as ledger:
        while True:
            step = manager.current_step()
            optimizer.zero_grad()  # begins a quorum
            rank = manager.participating_rank()
            now = manager.num_participants()
            order = np.random.default_rng((recipe.seed, step)).permutation(len(samples))
            own = np.array_split(order[: recipe.loop.global_batch_size], now)[rank or 0]
            loss = task.outcome.loss(model(samples.batch(own)), torch.from_numpy(samples.y[own]), None).mean()
            loss.backward()
            gradient = parameters_to_vector([weight.grad for weight in model.parameters()])
            manager.allreduce(gradient).wait()  # the mean over the participants
            vector_to_parameters(gradient, [weight.grad for weight in model.parameters()])
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
            optimizer.step()
            if manager.current_step() == step:
                continue  # not committed
            average.update_parameters(model)
            if rank == 0:
                entries: list[dict[str, Any]] = [{"step": step + 1, "loss": loss.item()}]
                if now != size:
                    others = sorted(int(path.read_text()) for path in directory.glob("pid-*"))
                    pids = others if now == len(others) else [os.getpid()]
                    entries.insert(0, {"start": step, "workers": now, "pids": pids})
                ledger.write("".join(json.dumps(entry) + "\n" for entry in entries))
                ledger.flush()
            size = now if rank == 0 else 0


def main() -> None:
    data, directory, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=100, heartbeat_timeout_ms=1000)
    environment = {**os.environ, "TORCHFT_LIGHTHOUSE": lighthouse.address()}

    def start(replica: int) -> "subprocess.Popen[bytes]":
        words = [sys.executable, __file__, str(data), str(directory), "--replica", str(replica)]
        return subprocess.Popen(words, env=environment)

    replicas = [start(number) for number in range(workers)]
    while True:
        time.sleep(LOOK_SECONDS)
        for number, process in enumerate(replicas):
            if process.poll() is not None:
                replicas[number] = start(number)


if __name__ == "__main__":
    if "--replica" in sys.argv:
        train(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[-1])
    else:
        main()
