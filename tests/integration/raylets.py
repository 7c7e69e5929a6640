"""A cluster of several raylets on this machine: a head that runs no trials, and two nodes of one CPU each.

python raylets.py TEMP_FOLDER. Prints its dashboard's URL as JSON, then answers each line of stdin with one of JSON:
`remove NODE` kills a node as a machine that loses power does, `status JOB` tells how a job is. The end of stdin ends
the cluster.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient

NODES = ("node1", "node2")
MEMORY = {"object_store_memory": 10**8}


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def add_node(cluster: Cluster, name: str, folder: str) -> Any:
    """A node with a temp folder of its own, as on a machine of its own: nodes unpack a job's files there."""
    return cluster.add_node(num_cpus=1, resources={name: 1}, temp_dir=f"{folder}/{name}", **MEMORY)


def say(answer: Any) -> None:
    """Answer with a line."""
    print(json.dumps(answer), flush=True)


def main(folder: str) -> None:
    """Start the cluster, and serve stdin."""
    port = free_port()
    head: dict[str, Any] = {
        "num_cpus": 0,
        "include_dashboard": True,
        "dashboard_port": port,
        "temp_dir": f"{folder}/head",
        **MEMORY,
    }
    head["dashboard_agent_listen_port"] = free_port()  # the default one may be another Ray's, and jobs start through it
    cluster = Cluster(initialize_head=True, head_node_args=head)
    # as `ray start` does; without it a job's driver takes any Ray that runs on this machine for its own
    Path(folder, "head", "ray_current_cluster").write_text(cluster.address, encoding="utf-8")
    try:
        nodes = {name: add_node(cluster, name, folder) for name in NODES}
        url = f"http://127.0.0.1:{port}"
        say({"url": url})
        for line in sys.stdin:
            what, _, of = line.strip().partition(" ")
            if what == "remove":
                cluster.remove_node(nodes[of], allow_graceful=False)
                say(of)
            else:
                say(JobSubmissionClient(url).get_job_status(of))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
