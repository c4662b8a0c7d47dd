"""What plan makes of its measurements: which are tried over HTTP, which one is written, and what is said of another node."""

from pathlib import Path
from typing import Any

import pytest

from actors.errors import BadRequest
from actors.settings import ActorSettings, ModelSettings
from deploy import nodes
from deploy.bench.share import Shared, equal_share
from deploy.config import read_config
from deploy.nodes import NODE_TYPES, Node, node_type, this_machine
from deploy.plan import Plan, Served, Wish, by_preference, candidates, expectations, numbers_of_actors, plan_for, write_config
from deploy.settings import AppSettings, Replicas, ServedModel

GB = 10**9
CPU = Node("this machine", "Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", 4, 0, 16)
T4 = Node("this machine", "Tesla T4", 4, 1, 16)
MODEL = ModelSettings(name="yolo26n", weights="yolo26n.pt")


def shared(actors: int, batch: int, rate: float, memory: int = GB, refused: str | None = None) -> Shared:
    return Shared(actors, ActorSettings(), batch, rate, 100.0, memory, None, refused)


def fleet(replicas: int, batch: int = 8, **actor: float) -> AppSettings:
    count = Replicas(min=replicas, max=replicas)
    model = ServedModel(name="yolo26n", weights="yolo26n.pt", max_batch=batch, replicas=count, actor=ActorSettings(**actor))
    return AppSettings(models=(model,))


def test_of_each_number_of_actors_the_fastest_batch_and_of_alike_ones_the_smaller() -> None:
    measured = [shared(1, 1, 20), shared(1, 8, 20.3), shared(2, 1, 25), shared(2, 8, 30), shared(4, 8, 28)]
    assert [(each.actors, each.batch) for each in candidates(measured, CPU, None)] == [(2, 8), (4, 8), (1, 1)]


def test_what_does_not_fit_is_left_out() -> None:
    measured = [shared(1, 1, 20), shared(2, 1, 30, 5 * GB), shared(4, 1, 40, 4 * GB), shared(1, 8, 50, refused="too large")]
    assert [(each.actors, each.batch) for each in candidates(measured, CPU, None)] == [(2, 1), (1, 1)]


def test_an_objective_leaves_no_more_in_hand_than_is_computed_in_its_time() -> None:
    measured = [shared(2, 1, 25), shared(2, 4, 30), shared(2, 8, 40)]
    assert [candidates(measured, CPU, slo)[0].batch for slo in (1000, 600, 100)] == [8, 4, 1]


def test_the_highest_rate_that_keeps_the_objective_and_of_alike_ones_the_fewest_callers() -> None:
    few, some, many, most = Served(1, 20, 50, 1), Served(2, 29.5, 80, 1), Served(4, 30, 150, 1), Served(8, 33, 300, 1)
    tried = [(fleet(1), served) for served in (few, some, many, most)]
    assert by_preference(tried, None)[0][1] is most
    assert by_preference(tried, 200)[0][1] is some
    assert by_preference(tried, 60)[0][1] is few
    assert by_preference(tried, 40) == []


@pytest.mark.parametrize(
    ("cores", "gpus", "numbers"), [(1, 0, [1]), (2, 0, [1, 2]), (6, 0, [1, 2, 4, 6]), (4, 1, [1, 2, 4, 8, 16])]
)
def test_actors_up_to_one_a_core_or_sixteen_on_a_gpu(cores: int, gpus: int, numbers: list[int]) -> None:
    assert numbers_of_actors(Node("this machine", "", cores, gpus, 16)) == numbers


@pytest.mark.parametrize("actors", [1, 2, 3, 4, 7, 16])
def test_equal_shares_fit_together(monkeypatch: pytest.MonkeyPatch, actors: int) -> None:
    monkeypatch.setattr("deploy.bench.share.available_cpus", lambda: 4)
    for gpu in (False, True):
        share = equal_share(actors, gpu=gpu)
        assert actors * share.num_cpus <= 4 and share.num_cpus > 0
        assert (actors * share.num_gpus <= 1 and share.num_gpus > 0) if gpu else share.num_gpus == 0
        assert share.num_cpus == 1 if gpu and actors <= 4 else True


def plan(node: Node, measured: Node, settings: AppSettings, **wish: Any) -> Plan:
    served = Served(8, 100.0, 80.0, 0.02)
    return plan_for(Wish(MODEL, 640, **wish), settings, served, node, measured, (shared(1, 8, 110),))


def test_the_cost_and_the_nodes_follow_from_the_rate() -> None:
    made = plan(CPU, CPU, fleet(4), price_per_hour=0.36, load=250)
    assert made.nodes == 3
    assert made.per_million == pytest.approx(1.0)  # 0.36 an hour is 1e-4 a second, for 100 images


def test_a_node_with_more_gpus_of_the_same_kind_has_as_many_more_replicas() -> None:
    made = plan(NODE_TYPES["g4dn.12xlarge"], T4, fleet(2, num_gpus=0.5))
    assert (made.settings.models[0].replicas.max, made.expected.images_per_s, made.expected.callers) == (8, 400.0, 32)
    assert any("carried over from 100.0 images/s" in line for line in expectations(made))


def test_cores_that_cannot_feed_the_gpus_bound_what_is_expected() -> None:
    made = plan(Node("starved", "Tesla T4", 4, 4, 64), T4, fleet(2, num_gpus=0.5))
    assert made.expected.images_per_s == 4 / 0.02


def test_a_smaller_node_has_fewer_replicas_but_one() -> None:
    made = plan(Node("small", CPU.device, 1, 0, 8), CPU, fleet(2))
    assert (made.settings.models[0].replicas.max, made.expected.images_per_s) == (1, 50.0)


def test_a_node_holds_no_more_replicas_than_its_memory_does() -> None:
    made = plan(Node("narrow", CPU.device, 16, 0, 8), CPU, fleet(4))
    assert made.settings.models[0].replicas.max == 6  # of 1 GB each, in four fifths of 8 GB
    with pytest.raises(BadRequest, match=r"takes 1\.0 GB of memory, and tiny has 1\.0: it is too small"):
        plan(Node("tiny", CPU.device, 4, 0, 1), CPU, fleet(4))


def test_replicas_on_many_gpus_have_no_more_cores_than_there_are() -> None:
    made = plan(Node("starved", "Tesla T4", 4, 4, 64), T4, fleet(2, num_gpus=0.5, num_cpus=1))
    (model,) = made.settings.models
    assert (model.replicas.max, model.actor.num_cpus, model.actor.num_gpus) == (8, 0.5, 0.5)


def test_another_device_has_to_be_measured_there() -> None:
    assert node_type("g4dn.xlarge", T4) is NODE_TYPES["g4dn.xlarge"]
    with pytest.raises(
        BadRequest, match=r"g5\.xlarge computes on NVIDIA A10G and this machine on Tesla T4.*Run 'yolofleet plan'"
    ):
        node_type("g5.xlarge", T4)
    with pytest.raises(BadRequest, match="'g7' is not known: one of g4dn"):
        node_type("g7", T4)


def test_a_gpu_that_is_not_there_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "cuda_devices", lambda: [])
    with pytest.raises(BadRequest, match="--gpu 2: torch sees no CUDA GPU here"):
        this_machine(2)
    assert this_machine().gpus == this_machine(0).gpus == 0


def test_what_is_written_is_what_deploy_reads(tmp_path: Path) -> None:
    settings = fleet(2, batch=4, num_cpus=2.0, num_gpus=0.5)
    made = plan(T4, T4, settings, load=50.0)
    path = tmp_path / "fleet.yaml"
    path.write_text(write_config(made))
    assert read_config(path)[0] == settings
    assert "# this machine (Tesla T4, 4 cores, 1 GPUs): 100.0 images/s, p95 80 ms" in path.read_text()
