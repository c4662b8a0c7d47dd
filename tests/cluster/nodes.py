"""A cluster of pretended nodes on this machine, as a process of its own that a test commands.

stdout ADDRESS              of the cluster, which has a head without CPUs
stdin  add                  a worker node joins
stdout PID                  of its raylet
stdin  (end)                everything ends
"""

import sys

from deploy.environment import prepare_environment

SYSTEM = {
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 2,
    "enable_worker_prestart": False,  # processes that nobody here will use
    "prestart_worker_first_driver": False,
}


def main() -> None:
    """Run the cluster until standard input ends."""
    prepare_environment()  # before Ray is imported
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "_system_config": SYSTEM, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    print(cluster.address, flush=True)
    try:
        for _ in sys.stdin:
            node = cluster.add_node(num_cpus=2)
            print(node.all_processes["raylet"][0].process.pid, flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
