"""A cluster of several raylets on this machine: a head that runs no trials, and two nodes of one CPU each.

python raylets.py TEMP_FOLDER. Prints where it is as JSON, then does what stdin says, a line each: `remove NODE` kills a
node as a machine that loses power does, and answers with its name; the end of stdin ends the cluster.
"""

from __future__ import annotations

import json
import socket
import sys

from ray.cluster_utils import Cluster

NODES = ("node1", "node2")
MEMORY = {"object_store_memory": 10**8}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main(folder: str) -> None:
    """Start the cluster, and serve stdin."""
    port = free_port()
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port, "temp_dir": folder, **MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = {name: cluster.add_node(num_cpus=1, resources={name: 1}, **MEMORY) for name in NODES}
        ids = {name: node.node_id for name, node in nodes.items()}
        print(json.dumps({"gcs": cluster.address, "url": f"http://127.0.0.1:{port}", "nodes": ids}), flush=True)
        for line in sys.stdin:
            name = line.split()[1]
            cluster.remove_node(nodes.pop(name), allow_graceful=False)
            print(name, flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
