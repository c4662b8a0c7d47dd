"""The pool's driver on actors that a test plays: which shards are given to whom, and that none is lost."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from actors import pool
from actors.dataset import Shard
from actors.ledger import Ledger, Manifest
from actors.pool import PoolSettings, run_pool


class PlayedRay:
    """What the driver uses of Ray. The first actor's node is drained as soon as it has work, with which the actor dies."""

    def __init__(self) -> None:
        self.started = 0
        self.draining: set[str] = set()
        self._private = SimpleNamespace(state=SimpleNamespace(state=self))

    def get_draining_nodes(self) -> set[str]:
        return self.draining

    def remote(self, cls: type) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self._start))

    def _start(self, settings: PoolSettings) -> Any:
        number = self.started = self.started + 1
        load = SimpleNamespace(remote=lambda: ("load", number))
        return SimpleNamespace(load=load, process=SimpleNamespace(remote=lambda shard: self._process(number)))

    def _process(self, number: int) -> tuple[str, int]:
        self.draining = {"node 1"}
        return "process", number

    def wait(self, references: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
        unseen = self.draining and self.started == 1
        return ([], references) if unseen else (references[:1], references[1:])

    def get(self, reference: tuple[str, int]) -> Any:
        call, number = reference
        if call == "load":
            return f"node {number}", None
        if number == 1:
            raise ActorDiedError
        return Manifest(1)

    def kill(self, actor: Any) -> None:
        pass


def test_a_shard_whose_actor_dies_while_its_node_is_drained_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played, committed = PlayedRay(), list[Manifest]()
    monkeypatch.setattr(pool, "ray", played)
    monkeypatch.setattr(pool, "WAIT_S", 0.0)
    settings: Any = SimpleNamespace(ledger=Ledger.open(tmp_path, {}), actor=SimpleNamespace(num_cpus=1, num_gpus=0))
    run_pool(settings, [Shard(("a",))], 1, committed.append)
    assert committed == [Manifest(1)]
    assert played.started == 3  # the second was beside the first, and let go as nothing was left to do
