"""``kill -9`` of a job's driver, of an actor and of a raylet, each at a random point, five seeds; always the same command.

    first run   ── shards commit ── kill -9 driver
    same again  ── shards commit ── kill -9 actor ── shards commit ── kill -9 raylet ── a node joins ── ends with 0
    same again  ── nothing is left to do

The drivers are forked from a process that has imported everything: a test starts ten of them, and Python takes seconds.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import pyarrow.dataset
import pytest

from actors.fake_model import fake_result
from actors.images import decode_image
from actors.schemas import PredictParams
from actors.settings import ImageLimits
from tests.conftest import REPOSITORY, picture, processes, until

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(240)]

SEEDS = (0, 1, 2, *(pytest.param(seed, marks=pytest.mark.long) for seed in (3, 4)))
INPUTS = 240
FIRST, THEN = 4, 3  # a fault comes before so many more shards of this run are committed, of eight or more


class Nodes:
    """The cluster: its address, and the raylets of its worker nodes."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin and process.stdout
        self._commands, self._answers = process.stdin, process.stdout
        self.address = next(line.strip() for line in self._answers if line[0].isdigit())
        self.raylets = [self.add(), self.add()]

    def add(self) -> int:
        print("add", file=self._commands, flush=True)
        return int(next(line for line in self._answers if line.strip().isdigit()))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    command = [sys.executable, "-m", "tests.cluster.nodes"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    yield Nodes(process)
    assert process.stdin
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(INPUTS):
        (folder / f"{number:03d}.png").write_bytes(picture(blue=number % 200, red=80 + number % 100))
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def start(nodes: Nodes, inputs: Path) -> BaseProcess:
    """The command, which computes while there is no file ``gate``; an actor needs a node of its own."""
    weights = f"fake:?slow_ms=100&gate={inputs.parent / 'gate'}"
    command = ["predict", str(inputs), "--out", str(inputs.parent / "out"), "--model", weights]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deploy.cli", "deploy.batch"])
    process = context.Process(target=_run, args=(nodes.address, [*command, "--actors", "2", "--cpus-per-actor", "2"]))
    process.start()
    return process


def _run(address: str, command: list[str]) -> None:
    from deploy.cli import main

    os.environ["RAY_ADDRESS"] = address
    sys.argv[1:] = command
    main()


def ended(process: BaseProcess) -> int | None:
    process.join(120)
    return process.exitcode


def wait_for(inputs: Path, rng: np.random.Generator, more: int, ignored: list[int]) -> list[int]:
    """Wait for a random point of a run: some more shards are committed, and a moment. Returns its actors."""

    def shards() -> int:
        return len(list((inputs.parent / "out" / "detections").glob("*.parquet")))

    def actors() -> list[int]:
        return [actor for actor in processes("ShardActor") if actor not in ignored]

    wanted = shards() + int(rng.integers(more))
    until(lambda: shards() >= wanted and actors(), 90)
    time.sleep(rng.uniform(0, 0.15))
    return actors()


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_is_killed_every_input_is_in_the_output_once(nodes: Nodes, inputs: Path, seed: int) -> None:
    rng, gate = np.random.default_rng(seed), inputs.parent / "gate"
    driver = start(nodes, inputs)
    orphans = wait_for(inputs, rng, FIRST, [])
    driver.kill()
    assert ended(driver) == -signal.SIGKILL

    driver = start(nodes, inputs)
    actors = wait_for(inputs, rng, THEN, orphans)
    os.kill(actors[rng.integers(len(actors))], signal.SIGKILL)

    wait_for(inputs, rng, THEN, orphans)
    gate.touch()
    os.kill(nodes.raylets.pop(rng.integers(len(nodes.raylets))), signal.SIGKILL)
    nodes.raylets.append(nodes.add())
    late = psutil.Process(nodes.raylets[-1])  # and its node is used
    until(lambda: {child.pid for child in late.children(recursive=True)} & set(processes("ShardActor")), 60)
    gate.unlink()
    assert ended(driver) == 0
    assert_complete(inputs)

    assert ended(start(nodes, inputs)) == 0
    assert_complete(inputs)


def assert_complete(inputs: Path) -> None:
    """Every input exactly once, equal to what FakeModel answers for it, and nothing temporary left."""
    out = inputs.parent / "out"
    rows = pyarrow.dataset.dataset(out / "detections").to_table().to_pylist()
    assert Counter(row["uri"] for row in rows) == {str(path): 1 for path in inputs.iterdir() if path.name != "broken.png"}
    for row in rows:
        expected = fake_result(decode_image(Path(row["uri"]).read_bytes(), ImageLimits()), PredictParams())
        assert [(found["class_id"], round(found["confidence"], 5)) for found in row["detections"]] == [
            (found.class_id, round(found.confidence, 5)) for found in expected.detections
        ]
    (letter,) = (json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines())
    assert letter["uri"] == str(inputs / "broken.png")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accounted_for"] and summary["inputs"] == INPUTS + 1 == summary["results"] + summary["dead_letters"]
    assert {path.name for path in out.iterdir()} == {"job.json", "detections", "errors.jsonl", "summary.json"}
    assert all(path.suffix == ".parquet" for path in (out / "detections").iterdir())
