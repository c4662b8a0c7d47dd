"""What is remembered for a second, who has died, and what the last minute held. No Ray: Serve's answers are made up."""

import asyncio

import pytest

from actors.schemas import ReplicaReport, Vitals
from deploy import roster
from deploy.api import recent
from deploy.api.recent import Recent
from deploy.roster import DEAD, RUNNING, Deployment, Remembered, Roster

ALIVE = ReplicaReport("r1", "a1", "10.0.0.1", "n1", RUNNING, 1.0, None)


async def test_an_answer_is_asked_for_once_by_all_who_come_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    async def ask() -> int:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return asked

    remembered = Remembered(ask)
    assert await asyncio.gather(*(remembered() for _ in range(5))) == [1] * 5
    monkeypatch.setattr(roster, "TTL_S", -1.0)
    assert await remembered() == 2


async def test_a_death_is_noted_once_whoever_sees_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "TTL_S", -1.0)
    seen = Roster()
    monkeypatch.setattr(roster, "deployments", lambda: {"model-a": Deployment(1, (ALIVE,))})
    assert (await seen.look())["model-a"].count(RUNNING) == 1
    assert seen.deaths("model-a").count == 0
    seen.lost("model-a", "a1")
    dead = ReplicaReport("r1", "a1", "10.0.0.1", "n1", DEAD, 1.0, None)
    monkeypatch.setattr(roster, "deployments", lambda: {"model-a": Deployment(1, (dead,))})
    await seen.look()
    (death,) = seen.deaths("model-a").latest
    assert (seen.deaths("model-a").count, death.actor, death.node) == (1, "a1", "10.0.0.1")


@pytest.mark.parametrize("crashed", [True, False])
async def test_a_replica_that_serve_no_longer_lists_is_dead_if_ray_says_that_it_crashed(
    monkeypatch: pytest.MonkeyPatch, crashed: bool
) -> None:
    monkeypatch.setattr(roster, "TTL_S", -1.0)
    monkeypatch.setattr(roster, "has_crashed", lambda actor: crashed and actor == "a1")
    seen = Roster()
    for replicas in ((ALIVE,), ()):  # Serve has noticed it between two looks
        monkeypatch.setattr(roster, "deployments", lambda replicas=replicas: {"model-a": Deployment(1, replicas)})
        await seen.look()
    assert [death.node for death in seen.deaths("model-a").latest] == ["10.0.0.1"] * crashed


def test_vitals_find_their_replica_and_others_stay_unknown() -> None:
    told = Vitals("a1", 1, None, ())
    silent = ReplicaReport("r2", None, None, None, "STARTING", 1.0, None)
    assert [each.vitals for each in Deployment(2, (ALIVE, silent)).with_vitals([told])] == [told, None]


def test_percentiles_are_values_that_occurred_and_errors_have_none() -> None:
    minute = Recent()
    assert minute.summary() == {"outcomes": {}, "latency_ms": {"p50": None, "p95": None, "p99": None}}
    for milliseconds in range(1, 101):
        minute.add("ok", milliseconds)
    minute.add("overloaded", 9999)
    assert minute.summary() == {
        "outcomes": {"ok": 100, "overloaded": 1},
        "latency_ms": {"p50": 50, "p95": 95, "p99": 99},
    }


def test_after_a_minute_it_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    minute = Recent()
    minute.add("ok", 5)
    monkeypatch.setattr(recent, "WINDOW_S", -1.0)
    assert minute.summary()["outcomes"] == {}
