"""A fleet over several hosts: spread, reached over every one; cut, killed, joined, drained, and without its head for a while.

One cluster for all. The tests are in an order: each leaves the fleet whole, on other hosts than before.
"""

import json
import math
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from websockets.sync.client import connect

from tests.cluster.network import why_not
from tests.cluster.raylets import ENDPOINT, Cluster, cluster_over_hosts
from tests.cluster.test_faults import INPUTS, assert_complete
from tests.conftest import picture, until
from tests.ray.test_routed import ask, load, wrong
from tests.ray.test_streams import WIDTHS, socket_of
from tests.ray.test_streams import ask as ask_stream

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(500)]

REPLICAS_BEFORE, REPLICAS = 6, 4  # the first rollout
LOOK_S = 5  # the fleet's list is a second old, and made slowly on a busy machine
SPREAD_S = 180  # a replica that moves may be put where it was
MODEL: dict[str, Any] = {
    "name": "fake",
    "weights": "fake:?slow_ms=5",
    "replicas": {"min": REPLICAS, "max": REPLICAS, "respread_s": 2},
    "actor": {"num_cpus": 1, "num_gpus": 0.25},
}
BEFORE = MODEL | {"weights": "fake:?slow_ms=6", "replicas": {"min": REPLICAS_BEFORE, "max": REPLICAS_BEFORE, "respread_s": 2}}


def configuration(model: dict[str, Any]) -> dict[str, Any]:
    """A fleet of it with an ingress on each host."""
    arguments = {"models": [model], "topology": "routed", "ingresses": 3, "health_check_s": 1}
    application = {"name": "yolofleet", "import_path": "deploy.app:build_app", "args": arguments}
    http = {"host": "0.0.0.0", "port": ENDPOINT}
    return {"proxy_location": "EveryNode", "http_options": http, "applications": [application]}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    config = tmp_path_factory.mktemp("config") / "serve.yaml"
    config.write_text(yaml.safe_dump(configuration(BEFORE)))
    with cluster_over_hosts() as cluster:
        cluster.join("one")
        cluster.join("two")
        assert cluster.run("yolofleet", "deploy", str(config)).wait(240) == 0, cluster.log("head").read_text()
        yield cluster


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(INPUTS):
        (folder / f"{number:03d}.png").write_bytes(picture(blue=number % 200, red=80 + number % 100))
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def replicas(cluster: Cluster, over: str = "head") -> list[dict[str, str]]:
    """The model's running replicas, as that host's proxy tells them."""
    (model,) = httpx.get(f"{cluster.url(over)}/fleet", timeout=60).json()["models"]
    return [replica for replica in model["replicas"] if replica["state"] == "RUNNING"]


def placed(cluster: Cluster, over: str = "head") -> Counter[str]:
    """Running replicas by host."""
    names = {host.address: name for name, host in cluster.hosts.items()}
    return Counter(names[replica["node"]] for replica in replicas(cluster, over))


def is_whole(cluster: Cluster, over: str = "head", wanted: int = REPLICAS) -> bool:
    """Whether all replicas run, each on a host that is there."""
    found = placed(cluster, over)
    return found.total() == wanted and set(found) <= cluster.workers


def is_even(cluster: Cluster, wanted: int = REPLICAS) -> bool:
    """Whether the loss of any host would take no more than its share of them."""
    found = placed(cluster)
    return is_whole(cluster, wanted=wanted) and max(found.values()) <= math.ceil(wanted / len(cluster.workers))


def is_whole_without(cluster: Cluster, leaving: str) -> bool:
    """Whether all replicas run elsewhere; there may be more, while one makes room for evenness."""
    found = placed(cluster)
    return found.total() >= REPLICAS and leaving not in found


def is_closed(address: str) -> bool:
    """Whether the proxy there tells load balancers to leave it, or has ended."""
    try:
        return httpx.get(f"{address}/-/healthz", timeout=10).status_code == 503
    except httpx.TransportError:
        return True


def has_ingresses(cluster: Cluster) -> bool:
    """Whether every host has one: who asks a host's proxy is answered by the ingress beside it."""
    alive = [cluster.hosts[name] for name in ("head", *cluster.workers)]
    return all(any("ServeReplica:yolofleet:ingress" in line for line in host.processes()) for host in alive)


def tracker_host(cluster: Cluster) -> str:
    """Where the one actor is that holds live streams."""
    (home,) = (name for name, host in cluster.hosts.items() if any("TrackerActor" in line for line in host.processes()))
    return home


def answers(address: str) -> bool:
    """Whether it answers there, and rightly."""
    try:
        return not wrong(ask(address, 2), 2)
    except httpx.HTTPError:
        return False


def job(cluster: Cluster, inputs: Path, slow_ms: int = 150) -> "subprocess.Popen[bytes]":
    """A dataset job whose actors have shares of pretended GPUs, begun on the head."""
    flags = ["--model", f"fake:?slow_ms={slow_ms}", "--actors", "4", "--cpus-per-actor", "0.5", "--gpus-per-actor", "0"]
    return cluster.run("yolofleet", "predict", str(inputs), "--out", str(inputs.parent / "out"), *flags)


def committed(inputs: Path) -> int:
    return len(list((inputs.parent / "out" / "detections").glob("*.parquet")))


def test_replicas_lie_evenly_over_the_hosts_and_every_host_answers(cluster: Cluster) -> None:
    until(lambda: is_even(cluster, REPLICAS_BEFORE), SPREAD_S)
    for host in cluster.hosts:
        until(lambda host=host: answers(cluster.url(host)))  # type: ignore[misc]
        seen = set[str]()

        def all_share(host: str = host, seen: set[str] = seen) -> bool:
            seen.add(ask(cluster.url(host)).headers["x-replica"])
            return len(seen) == REPLICAS_BEFORE

        until(all_share)  # whoever is asked


def test_other_weights_and_another_size_leave_them_even(cluster: Cluster, tmp_path: Path) -> None:
    """A rollout starts all of them anew, and for a while there is an odd number a host."""
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(configuration(MODEL)))
    with load(cluster.url("head"), callers=2) as told:
        assert cluster.run("yolofleet", "deploy", str(config)).wait(240) == 0, cluster.log("head").read_text()
        until(lambda: is_even(cluster), SPREAD_S)
    assert told and not list(filter(None, told))


def test_a_slow_host_is_slow_and_no_more(cluster: Cluster) -> None:
    cluster.hosts["two"].slow(2)
    with load(cluster.url("head"), callers=4) as told:
        until(lambda: len(told) > 50)
    cluster.hosts["two"].slow(1000)
    assert not list(filter(None, told))


def test_a_host_that_is_cut_off_costs_no_answer_and_is_used_when_it_is_back(cluster: Cluster) -> None:
    with load(cluster.url("head"), callers=8) as told:
        until(lambda: len(told) > 50)
        cluster.hosts["two"].cut()
        until(lambda: set(placed(cluster)) == {"one"} and is_whole(cluster), SPREAD_S)  # one host must hold them all
        before = len(told)
        until(lambda: len(told) > before + 50)
        cluster.hosts["two"].mend()
        cluster.kill("two")  # the cluster had declared it dead: it must join anew
        cluster.join("two")
        until(lambda: is_even(cluster), SPREAD_S)
    assert not list(filter(None, told))


def test_a_stream_whose_trackers_host_dies_keeps_its_ids(cluster: Cluster) -> None:
    """Objects come one after the other, at places that do not touch; see tests/ray/test_streams."""
    first, second, third, _ = WIDTHS
    with connect(socket_of(cluster.url("head"), "moved"), open_timeout=60) as socket:
        assert [ask_stream(socket, width) for width in (first, first, second, second)] == [[1], [1], [], [2]]
        begun = time.monotonic()
        while time.monotonic() - begun < 2:  # until the second object is in a snapshot for sure
            assert ask_stream(socket, second) == [2]
        home = tracker_host(cluster)
        cluster.kill(home)
        assert [ask_stream(socket, width) for width in (second, third, third)] == [[2], [], [3]]
    assert tracker_host(cluster) != home
    cluster.join(home)


def test_a_host_that_dies_during_a_job_costs_no_input_and_no_answer(cluster: Cluster, inputs: Path) -> None:
    with load(cluster.url("head"), callers=4) as told:
        running = job(cluster, inputs)
        until(lambda: committed(inputs) >= 2)
        cluster.kill("two")
        assert running.wait(120) == 0, cluster.log("head").read_text()
    assert_complete(inputs)
    assert not list(filter(None, told))


def test_a_drained_host_gives_back_what_it_has_and_fails_nobody(cluster: Cluster, inputs: Path) -> None:
    cluster.join("three")
    cluster.join("four")
    until(lambda: is_even(cluster), SPREAD_S)
    assert cluster.run("yolofleet", "drain", cluster.head.address).wait(60) == 2  # the head cannot be
    said = len(cluster.log("head").read_text())
    running = job(cluster, inputs, slow_ms=400)
    until(lambda: any("ShardActor.process" in line for line in cluster.hosts["three"].processes()))  # as Ray calls them
    with load(cluster.url("head"), callers=4) as told:
        drain = cluster.run("yolofleet", "drain", cluster.hosts["three"].address)
        until(lambda: is_closed(cluster.url("three")))  # no load balancer sends more
        assert running.poll() is None
        assert drain.wait(200) == 0, cluster.log("head").read_text()
        assert not any("ShardActor" in line for line in cluster.hosts["three"].processes())
        until(lambda: is_whole_without(cluster, "three"), LOOK_S)  # their successors ran before they went
        cluster.kill("three")
        assert running.wait(120) == 0, cluster.log("head").read_text()
    assert "an actor died" not in cluster.log("head").read_text()[said:]
    assert_complete(inputs)
    assert not list(filter(None, told))


def test_while_the_head_is_away_the_others_answer_and_then_the_fleet_heals(cluster: Cluster, inputs: Path) -> None:
    until(lambda: is_even(cluster) and has_ingresses(cluster), SPREAD_S)
    other = min(cluster.workers - {"one"})
    for name in ("one", other):  # who has never been asked knows no replicas, and cannot ask the head then
        until(lambda name=name: answers(cluster.url(name)))  # type: ignore[misc]
    with load(cluster.url("one"), callers=4) as told:
        begun = job(cluster, inputs)
        until(lambda: committed(inputs) >= 2)
        cluster.head.kill()
        assert begun.wait(60) != 0
        before = len(told)
        until(lambda: len(told) > before + 100)
        assert answers(cluster.url(other))
        cluster.start_head()
        until(lambda: answers(cluster.url("head")), SPREAD_S)
    assert not list(filter(None, told))
    assert job(cluster, inputs).wait(240) == 0, cluster.log("head").read_text()
    assert_complete(inputs)
    summary = json.loads((inputs.parent / "out" / "summary.json").read_text())
    assert 0 < summary["this_run"]["inputs"] < INPUTS  # it went on from what was committed
    cluster.kill(other)  # and Serve's controller, which was on the head, is back at work
    until(lambda: is_whole(cluster, "one"), SPREAD_S)
