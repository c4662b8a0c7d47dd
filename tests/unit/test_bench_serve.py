"""What the endpoint is put through, in which order, against figures of the test's own: neither Ray nor models here."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from actors.settings import ModelSettings
from deploy.bench import serve
from deploy.bench.limit import MEASURED_S, Limit
from deploy.bench.load import Closed, Load, Open
from deploy.bench.processes import Usage
from deploy.bench.serve import SATURATED, SWEEP, Course, Fleet, InALoop, bench_serve, in_a_loop
from deploy.cli import app
from tests.conftest import picture

AT_MOST = 20.0  # what the endpoint answers a second when four ask


class Endpoint:
    """Answers ``most`` of what an open loop offers a second, and remembers what it was asked for."""

    def __init__(self, most: float) -> None:
        self.most = most
        self.plans: list[Closed | Open] = []

    def load(self, target: object, images: object, plan: Closed | Open) -> Load:
        self.plans.append(plan)
        rate = AT_MOST * min(1, plan.callers / 4) if isinstance(plan, Closed) else min(plan.rate, self.most)
        return Load(plan.requests, {}, plan.requests / rate, [50.0] * plan.requests, 0.01, [])


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    (tmp_path / "image.jpg").write_bytes(picture())
    return [tmp_path / "image.jpg"]


@pytest.mark.parametrize(
    ("most", "offered"), [(0.85 * AT_MOST, SWEEP[:4]), (0.6 * AT_MOST, SWEEP[:2]), (AT_MOST, SWEEP), (2 * AT_MOST, SWEEP)]
)
def test_rates_go_up_to_saturation(
    most: float, offered: Sequence[float], images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = Endpoint(most)
    monkeypatch.setattr(serve, "run_load", endpoint.load)
    where = ["--url", "http://127.0.0.1:9/predict", "--json", str(images[0].parent / "serve.json")]
    done = CliRunner().invoke(app, ["bench", "serve", str(images[0].parent), *where, "--concurrency", "1,4", "--rounds", "2"])
    assert done.exit_code == 0, done.output
    levels = json.loads((images[0].parent / "serve.json").read_text())["levels"]
    closed, opened = levels[:4], levels[4:]
    assert [(level["loop"], level["offered"]) for level in closed] == [("closed", callers) for callers in (1, 4, 1, 4)]
    assert [level["offered"] for level in opened] == pytest.approx([share * AT_MOST for share in offered])
    assert all(level["per_s"] >= SATURATED * level["offered"] for level in opened[:-1])
    assert f"| {AT_MOST * offered[-1]:.1f}/s offered |" in done.output


def test_a_rate_that_is_refused_ends_the_sweep(images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(target: object, images: object, plan: Closed | Open) -> Load:
        errors = {"http 429": 1} if isinstance(plan, Open) else {}
        return Load(plan.requests, errors, 1.0, [50.0] * plan.requests, 0.01, [])

    monkeypatch.setattr(serve, "run_load", refuse)
    report = serve.bench_url("http://127.0.0.1:9/predict", Course(images, (1,), rounds=1), lambda line: None)
    assert [level.loop for level in report.levels] == ["closed", "open"]


def test_limit_and_loop_are_measured_before_and_after_the_fleet(images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    limits = iter([Limit(2, 8, 30.0, {"engine": 50.0}, 60.0), Limit(2, 8, 34.0, {"engine": 54.0}, 56.0)])
    loops = iter([InALoop(10.0, 40.0, [1]), InALoop(10.0, 36.0, [1])])

    def limit(model: ModelSettings, encoded: Sequence[bytes], params: object, streams: int) -> Limit:
        done.append(f"limit of {streams}")
        return next(limits)

    def loop(python: str, weights: str, images: Sequence[Path], seconds: float) -> InALoop:
        done.append(f"loop of {seconds:g} s")
        return next(loops)

    def usage() -> Usage:
        return Usage(len(done), {1: 1.0}, {1: "driver"}, {1: 10.0})

    @contextmanager
    def fleet(*_: object) -> Iterator[SimpleNamespace]:
        done.append("fleet")
        yield SimpleNamespace(address="http://127.0.0.1:9", start_s=11.0, usage=usage)
        done.append("end")

    for name, fake in (("measure_limit", limit), ("in_a_loop", loop), ("running_fleet", fleet)):
        monkeypatch.setattr(serve, name, fake)
    monkeypatch.setattr(serve, "settled_engine", lambda address: "openvino fp32")
    monkeypatch.setattr(serve, "run_load", Endpoint(AT_MOST).load)
    monkeypatch.setattr(serve, "_idle", lambda server: {"driver": 0.02})
    monkeypatch.setattr(serve, "post", lambda url, image: SimpleNamespace(status_code=200))
    model = ModelSettings(name="m", weights="m.onnx")
    report = bench_serve(Fleet(model), Course(images, (16,), rounds=1, sweep=False), 2, lambda line: None)
    loop_of = f"loop of {MEASURED_S:g} s"
    assert done == [loop_of, "limit of 2", "fleet", "end", "limit of 2", loop_of]
    assert report.limit == Limit(2, 8, 32.0, {"engine": 52.0}, 58.0)
    assert (report.limit_per_s, report.in_a_loop_ms) == ([30.0, 34.0], 38.0)


LOOP = """
import json, os, sys
assert os.environ["OV_CPU_MAX_ISA"]
images = sys.argv[sys.argv.index("--seconds") + 2 :]
print("Ultralytics says something first")
print(json.dumps({"ms": [100.0, 300.0] * int(float(sys.argv[sys.argv.index("--seconds") + 1])), "boxes": [3] * len(images)}))
"""


def test_a_loop_has_the_rate_of_all_it_has_computed(images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (images[0].parent / "loop.py").write_text(LOOP)
    monkeypatch.setattr(serve, "LOOP", images[0].parent / "loop.py")
    assert in_a_loop(sys.executable, "m.pt", images, seconds=4) == InALoop(5.0, 100.0, [3])
