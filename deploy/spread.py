"""How a model's replicas lie over the nodes, and which one gives up its place, so that they lie evenly.

    Serve's list of replicas ┐
                             ├─→ misplaced() ─→ the one that moves ─ its health check fails ─→ Serve drains it, starts another
    Ray's nodes and room     ┘

Serve places replicas by Ray's SPREAD, which goes round the nodes with one counter for all actors, and never moves them:
another actor between two replicas puts both on one node, scaling down empties one node first, and a node that joins late stays
empty. So each replica looks now and then, and by the same rule all of them come to the same one. Nobody moves while anybody
starts or stops, nor where no other node has room: on a small cluster one node holds them all.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.default_impl import create_cluster_node_info_cache
from ray.serve.exceptions import RayServeException

from actors.schemas import ReplicaReport
from actors.settings import ActorSettings
from deploy.roster import RUNNING, Deployment, deployments

EPSILON = 1e-6  # of resources, which Ray counts in ten-thousandths


class Misplaced(RuntimeError):
    """This replica's node has more of its kind than another with room: Serve replaces it, as that node's turn has come."""


class Place:
    """The place of the replica that this process is.

    Args:
        actor: what each replica of its deployment reserves.
        respread_s: how long a replica stays where it is before it may move, and how often it looks; None for ever.
    """

    def __init__(self, actor: ActorSettings, respread_s: float | None) -> None:
        self._actor, self._every_s = actor, respread_s
        self._next = time.monotonic() + (respread_s or 0.0)
        self._leaves = False

    def check(self) -> None:
        """Look at the others. Serve acts on the third failure in a row, so that once decided it stays so.

        Raises:
            Misplaced: this one shall move.
        """
        if self._every_s is None:
            return
        if not self._leaves and time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every_s
            with suppress(RayError, RayServeException):  # the head is away: another time
                self._leaves = self._is_misplaced()
        if self._leaves:
            raise Misplaced("This replica makes room on its node, since another one with room has fewer of its model")

    def _is_misplaced(self) -> bool:
        deployment = deployments().get(serve.get_replica_context().deployment, Deployment())
        moving = misplaced(deployment, nodes_with_room(self._actor))
        return moving is not None and moving.actor == ray.get_runtime_context().get_actor_id()


def misplaced(deployment: Deployment, with_room: Sequence[str]) -> ReplicaReport | None:
    """The replica whose move makes the deployment lie more evenly: the youngest one of the fullest node.

    Args:
        deployment: its replicas.
        with_room: ids of the nodes that could hold one more.

    Returns:
        None if they lie evenly, if no other node has room, or if anything is under way.
    """
    replicas = deployment.replicas
    if len(replicas) != deployment.target or any(found.state != RUNNING for found in replicas):
        return None
    held = Counter(found.node_id for found in replicas if found.node_id)
    fullest = max(sorted(held), key=lambda node: held[node], default=None)
    emptiest = min((held[node] for node in with_room), default=None)
    if fullest is None or emptiest is None or held[fullest] - emptiest < 2:
        return None
    return max((found for found in replicas if found.node_id == fullest), key=lambda found: (found.started_at, found.id))


def nodes_with_room(actor: ActorSettings) -> list[str]:
    """Ids of the nodes that live, are not being drained, and have free what a replica reserves, as Serve sees it."""
    nodes = create_cluster_node_info_cache(ray.worker.global_worker.gcs_client)
    nodes.update()
    free = nodes.get_available_resources_per_node()
    return [node for node in sorted(nodes.get_active_node_ids()) if _fits(actor, free.get(node, {}))]


def _fits(actor: ActorSettings, free: Mapping[str, float]) -> bool:
    return all(
        free.get(resource, 0.0) + EPSILON >= needed for resource, needed in (("CPU", actor.num_cpus), ("GPU", actor.num_gpus))
    )
