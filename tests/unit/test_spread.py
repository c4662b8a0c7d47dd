"""Which replica moves, so that a node's loss takes no more than its share. Serve's answers are made up."""

import pytest

from actors.schemas import ReplicaReport
from deploy.roster import RUNNING, Deployment
from deploy.spread import misplaced


def lying(placed: str, target: int | None = None, state: str = RUNNING) -> Deployment:
    """A deployment with a replica on each node that ``placed`` names; they started in this order."""
    replicas = [ReplicaReport(f"r{n}", f"a{n}", "10.0.0.1", node, RUNNING, n, None) for n, node in enumerate(placed)]
    if state != RUNNING:
        replicas.append(ReplicaReport("new", None, None, None, state, 99, None))
    return Deployment(target or len(replicas), tuple(replicas))


@pytest.mark.parametrize(
    ("placed", "with_room", "moves"),
    [
        ("aabb", "ab", None),
        ("aab", "ab", None),  # one of three would only change places
        ("abaa", "ab", "r3"),  # the youngest of the fullest node
        ("aaaa", "b", "r3"),  # a node has joined
        ("aaaa", "", None),  # one node must hold them all
        ("aaaa", "a", None),
        ("aaab", "a", None),  # the other one is full
        ("aaabbc", "c", "r2"),
        ("aaabbb", "abc", "r2"),  # of two alike the first by its id, for all who look
        ("aabbcc", "d", "r1"),
        ("a", "ab", None),
        ("", "ab", None),
    ],
)
def test_the_youngest_replica_of_the_fullest_node_moves_where_another_has_room(
    placed: str, with_room: str, moves: str | None
) -> None:
    found = misplaced(lying(placed), list(with_room))
    assert (found and found.id) == moves


@pytest.mark.parametrize("state", ["STARTING", "STOPPING", "DEAD", "PENDING_MIGRATION"])
def test_nobody_moves_while_anything_is_under_way(state: str) -> None:
    assert misplaced(lying("aaaa", state=state), ["b"]) is None
    assert misplaced(lying("aaaa", target=5), ["b"]) is None
    assert misplaced(lying("aaaa", target=3), ["b"]) is None


@pytest.mark.parametrize("start", ["aaaaaaaa", "aaaabb", "aaab", "aaaaaac"])
def test_moves_end_with_no_node_holding_more_than_its_share(start: str) -> None:
    placed = list(start)
    for _ in range(2 * len(placed)):
        moving = misplaced(lying("".join(placed)), ["a", "b", "c"])
        if moving is None:
            break
        del placed[int(moving.id[1:])]
        placed.append(min("abc", key=placed.count))
    assert max(placed.count(node) for node in "abc") <= -(-len(placed) // 3)
