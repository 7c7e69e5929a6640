"""A training run on a cluster of several raylets, from which a node is taken while it trains. Prints its summary.

python elastic_run.py CONFIG DATA OUT SAMPLES_BEFORE_THE_NODE_IS_LOST
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["OMP_NUM_THREADS"] = "1"

from cluster.session import ALWAYS, QUIET

os.environ.update(ALWAYS | QUIET)

import ray
from ray.cluster_utils import Cluster

from trainer.config import Workers, load_run
from trainer.ray_train import train


def main(config: str, data: str, out: str, after: int) -> None:
    """Two nodes with a worker each; one is lost."""
    folder = tempfile.mkdtemp(prefix="slimrank-elastic-", dir="/tmp")
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "temp_dir": folder, "object_store_memory": 10**8},
    )
    second = cluster.add_node(num_cpus=1, object_store_memory=10**8)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    lost = threading.Event()

    def show(latest: dict[str, Any], events: list[Any]) -> None:
        for event in events:
            print(event, file=sys.stderr, flush=True)
        if latest.get("samples", 0) >= after and not lost.is_set():
            lost.set()
            cluster.remove_node(second, allow_graceful=False)

    run = load_run(Path(config))
    run = run.model_copy(update={"train": run.train.model_copy(update={"workers": Workers(min=1, max=2)})})
    try:
        result = train(run, Path(data), Path(out), resume=False, show=show)
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps({**result, "node_lost": lost.is_set()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
