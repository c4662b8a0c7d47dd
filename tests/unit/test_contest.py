"""Everybody is measured in every round, in rotated order; who cannot run, or is wrong, is told apart. No models here."""

import sys
from pathlib import Path
from statistics import median

import pytest

from actors.settings import ModelSettings
from deploy.bench import contest
from deploy.bench.contest import Contest, Peer, bench_peers
from deploy.bench.limit import Limit
from deploy.bench.report import markdown
from deploy.bench.serve import Fleet, InALoop
from tests.conftest import picture

SERVER = """
# /// script
# dependencies = ["httptools"]
# ///
import argparse, http.server, json

parser = argparse.ArgumentParser()
parser.add_argument("--weights")
parser.add_argument("--port", type=int)
options = parser.parse_args()

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        answer = json.dumps({"boxes": [1, 2, 3], "weights": options.weights}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()
"""


class NoFleet(Fleet):
    """Ends at once."""

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit('not here')"]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three of them; what needs a model is replaced by figures, and the peers by small servers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "small.py").write_text(SERVER)
    (tmp_path / "never.py").write_text(SERVER.replace("httptools", "httptools>99"))
    monkeypatch.setattr(contest, "SCRIPTS", tmp_path)
    monkeypatch.setattr(
        contest,
        "PEERS",
        (
            Peer("right", "small.py", "httptools", lambda answer: len(answer["boxes"])),
            Peer("blind", "small.py", "httptools", lambda answer: 0, setups=("documented",)),
            Peer("strange", "small.py", "httptools", lambda answer: int(answer["found"]), setups=("documented",)),
            Peer("never", "never.py", "httptools", setups=("documented",)),
            Peer("of ONNX", "small.py", "httptools", setups=("documented",), onnx=True),
        ),
    )
    monkeypatch.setattr(contest, "_exports", lambda weights, *_: {"documented": weights, "same engine": Path("export")})
    monkeypatch.setattr(
        contest, "in_a_loop", lambda python, weights, images, seconds=0.0: InALoop(10.0, 100.0, [3] * len(images))
    )
    monkeypatch.setattr(contest, "measure_limit", lambda *_: Limit(2, 8, 20.0, {}, 100.0))
    made = [tmp_path / f"{blue}.jpg" for blue in range(3)]
    for blue, path in enumerate(made):
        path.write_bytes(picture(blue=blue))
    return made


def test_everybody_is_measured_in_every_round(images: list[Path]) -> None:
    lines: list[str] = []
    model = ModelSettings(name="w", weights="w.pt")
    fleets: dict[str, Fleet] = {title: NoFleet(model) for title in ("yolofleet one", "yolofleet other")}
    report = bench_peers(Contest(model, images, fleets, cores=2, callers=2, requests=6, rounds=2), lines.append)
    sides = {(side.title, side.setup): side for side in report.sides}
    assert report.boxes == {"documented": 9, "same engine": 9}
    for setup in ("documented", "same engine"):
        right = sides["right", setup]
        assert (len(right.per_s), len(right.levels), right.boxes_off, right.reason) == (2, 2, 0.0, None)
        assert right.levels[0].sent == 6 and min(*right.start_s, *right.memory_mb) > 0
        assert sides["limit of this machine", setup].per_s == [20.0, 20.0]
        assert "not here" in str(sides["yolofleet one", setup].reason)
    assert sides["blind", "documented"].boxes_off == 1.0
    assert "no boxes where they should be" in str(sides["strange", "documented"].reason)
    assert "httptools>99" in str(sides["never", "documented"].reason)
    assert sides["of ONNX", "documented"].reason == "there is no ONNX export"
    order = [line.partition(": ")[2].partition("): ")[0] for line in lines if line.startswith("round")]
    first, second = order[: len(sides)], order[len(sides) :]
    (limit, fleet), (its_limit, its_fleet), others = first[:2], first[2:4], first[4:]
    assert (limit, fleet) == ("limit of this machine (documented", "yolofleet one (documented")
    assert (its_limit, its_fleet) == ("limit of this machine (same engine", "yolofleet one (same engine")
    assert second == [its_fleet, its_limit, *others, fleet, limit]  # neighbours in another order
    table = markdown(report.as_dict())
    assert f"| right | {median(sides['right', 'documented'].per_s):.2f} |" in table
    assert "| blind, **wrong boxes** |" in table and "| 100.0 % |" in table
