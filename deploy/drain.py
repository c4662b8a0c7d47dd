"""``yolofleet drain NODE``: nothing new is placed there, what is there moves or finishes, and then its machine may end.

NODE → Ray: draining ─┬→ Serve: replicas start elsewhere, then those there answer what they have; its proxy asks for no more
└→ jobs: their actors there finish the shards they have, others start elsewhere
wait until nothing of ours is left there, or the time is over
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray
import ray._private.state
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from actors.errors import BadRequest
from deploy.settings import APP_NAME

POLL_S = 1.0
REPLICA = f"SERVE_REPLICA::{APP_NAME}#"
HEAD = "node:__internal_head__"


def drain(node: str | None, timeout_s: float, say: Callable[[str], None]) -> dict[str, int]:
    """Drain a node of the cluster that this process has joined.

    Args:
        node: its id or the beginning of it, or its address; None for the one that this process is on.
        timeout_s: after which its machine ends in any case. Serve stops what has found no other place shortly before.
        say: tells the user what is left.

    Returns:
        What is left there after ``timeout_s``, and how many of each: nothing, if all went well.

    Raises:
        BadRequest: there is no such node, several are meant, or Ray refuses.
    """
    node_id, address = _find(node or ray.get_runtime_context().get_node_id())
    give_up = time.monotonic() + timeout_s
    accepted, reason = ray.worker.global_worker.gcs_client.drain_node(
        node_id,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),  # the other one is for nodes that are idle
        "yolofleet drain",
        int(1e3 * (time.time() + timeout_s)),
    )
    if not accepted:
        raise BadRequest(f"Ray does not drain {address}: {reason}")
    before: dict[str, int] | None = None
    while (left := _left(node_id)) and time.monotonic() < give_up:
        if left != before:
            say(f"{address} has " + ", ".join(f"{count} {name}" for name, count in left.items()))
        before = left
        time.sleep(POLL_S)
    return left


def _find(node: str) -> tuple[str, str]:
    """Id and address of the one node that is meant."""
    found = [
        each
        for each in ray.nodes()
        if each["Alive"] and (each["NodeID"].startswith(node) or each["NodeManagerAddress"] == node)
    ]
    if len(found) != 1:
        here = ", ".join(sorted(each["NodeManagerAddress"] for each in ray.nodes() if each["Alive"]))
        raise BadRequest(f"'{node}' is {len(found)} of this cluster's nodes: give the id or the address of one of {here}")
    if HEAD in found[0]["Resources"]:
        raise BadRequest(f"{found[0]['NodeManagerAddress']} is the head: it cannot be drained, see docs/operations.md")
    return found[0]["NodeID"], found[0]["NodeManagerAddress"]


def _left(node_id: str) -> dict[str, int]:
    """What of ours lives on a node, by kind."""
    actors = ray._private.state.actors(actor_state_name="ALIVE").values()  # without the dashboard's API; Ray is pinned
    kinds = Counter(_kind(each) for each in actors if each["Address"]["NodeID"] == node_id)
    return {kind: kinds[kind] for kind in sorted(filter(None, kinds))}


def _kind(actor: dict[str, Any]) -> str | None:
    if actor["ActorClassName"] == "ShardActor":
        return "actors of jobs"
    _, found, replica = actor["Name"].partition(REPLICA)
    return f"replicas of {replica.partition('#')[0]}" if found else None
