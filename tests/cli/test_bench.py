"""``yolofleet bench`` from the command line to its report: that it measures everything, never how fast it is."""

import json
from contextlib import suppress
from pathlib import Path
from subprocess import Popen, run

import psutil
import pytest

from actors.images import encode_jpeg
from deploy.bench.contest import PEERS
from deploy.demo.scene import draw_scene
from deploy.weights import EMBEDDED
from tests.cli.test_command import COMMAND
from tests.conftest import until


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    folder = tmp_path / "scenes"
    folder.mkdir()
    for seed in range(4):
        (folder / f"{seed}.jpg").write_bytes(encode_jpeg(draw_scene(seed).image))
    return folder


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_serve_measures_the_endpoint_and_what_its_processes_take(scenes: Path, tmp_path: Path) -> None:
    given = ["--model", EMBEDDED.weights, "--concurrency", "1,16", "--requests", "20", "--rounds", "1", "--no-sweep"]
    files = ["--json", str(tmp_path / "serve.json"), "--plot", str(tmp_path / "serve.png")]
    done = run([*COMMAND, "bench", "serve", str(scenes), *given, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "serve.json").read_text())
    one, many = report["levels"]
    assert (one["offered"], one["sent"], many["offered"], many["sent"]) == (1, 20, 16, 64)
    assert not one["errors"] and not many["errors"]
    assert one["p50_ms"] <= one["p95_ms"] <= one["p99_ms"]
    assert {"driver", "ingress", "proxy", "controller", "ray"} <= set(one["cpu_ms"]) and one["cpu_ms"]["ingress"] > 0
    assert len(report["memory_mb"]["replicas"]) == 1 < report["memory_mb"]["all"][0]
    assert min(report["start_s"], report["restart_s"], report["in_a_loop_ms"], report["limit"]["images_per_s"]) > 0
    assert "| 16 callers |" in done.stdout and (tmp_path / "serve.png").stat().st_size > 0


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(200)
def test_a_bench_that_is_ended_ends_its_servers(scenes: Path) -> None:
    with Popen([*COMMAND, "bench", "serve", str(scenes), "--model", EMBEDDED.weights, "--no-sweep"]) as bench:
        until(lambda: any(_serves(child) for child in psutil.Process(bench.pid).children()))
        tree = psutil.Process(bench.pid).children(recursive=True)
        bench.terminate()
        assert bench.wait(90) == 130
    assert not psutil.wait_procs(tree, 30)[1]


def _serves(process: psutil.Process) -> bool:
    with suppress(psutil.Error):  # it ended meanwhile
        return "--port" in process.cmdline()
    return False


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_peers_measures_everybody(scenes: Path, tmp_path: Path) -> None:
    given = ["--model", EMBEDDED.weights, "--requests", "8", "--callers", "4", "--rounds", "1"]
    files = ["--json", str(tmp_path / "peers.json"), "--plot", str(tmp_path / "peers.png")]
    done = run([*COMMAND, "bench", "peers", str(scenes), *given, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "peers.json").read_text())
    sides = {(side["title"], side["setup"]): side for side in report["sides"]}
    assert len(sides) == 4 + 2 + sum(len(peer.setups) for peer in PEERS)
    assert not {name: side["reason"] for name, side in sides.items() if side["reason"]}
    assert report["boxes"]["documented"] > 0
    off = {name: side["boxes_off"] for name, side in sides.items() if side["boxes_off"]}
    assert not {name: share for name, share in off.items() if share > 0.05}
