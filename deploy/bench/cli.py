"""The commands ``yolofleet bench …``: parse, measure, and show what was measured. No logic of their own."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actors.settings import Engine, EnginePrecision
from deploy.options import (
    BatchSize,
    Calibrate,
    Cpus,
    EngineFlag,
    HaProxy,
    JsonFile,
    PrecisionFlag,
    ServeTopology,
    Weights,
    console,
    engine_fields,
    explained,
    say,
    whole_numbers,
)

if TYPE_CHECKING:
    from actors.settings import ModelSettings

bench = typer.Typer(no_args_is_help=True, help="Measure this machine, and what of its limit a user gets.")

PlotFile = Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="draw the report")]
BenchImages = Annotated[Path, typer.Argument(help="a folder of JPEG images")]
BenchCount = Annotated[int | None, typer.Option(min=1, help="how many of its images; all if left out")]
BenchRounds = Annotated[int, typer.Option(min=1, help="how often all sides are measured")]


@bench.command()
def limit(
    source: BenchImages,
    model: Weights = None,
    engine: EngineFlag = "auto",
    precision: PrecisionFlag = "auto",
    calibrate: Calibrate = None,
    images: BenchCount = None,
    batch_size: BatchSize = 8,
    streams: Annotated[str | None, typer.Option(metavar="N,N…", help="1 to the number of cores if left out")] = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """What this machine can do at most: everything in memory, one stream a core; each stage alone."""
    from actors.hardware import available_cpus
    from deploy.bench.limit import bench_limit

    with explained():
        settings = _benched(model, batch_size, engine, precision, calibrate)
        encoded = [path.read_bytes() for path in _jpegs(source, images)]
        counts = whole_numbers("--streams", streams) or [*range(1, available_cpus() + 1)]
        report = bench_limit(settings, encoded, counts, say)
        _show(report.as_dict(), json_file, plot_file)


@bench.command("serve")
def serve_under_load(
    source: BenchImages,
    url: Annotated[str | None, typer.Option(help="an endpoint that runs already, such as http://HOST:PORT/predict")] = None,
    model: Weights = None,
    engine: EngineFlag = "auto",
    precision: PrecisionFlag = "auto",
    calibrate: Calibrate = None,
    images: BenchCount = None,
    topology: ServeTopology = "auto",
    haproxy: HaProxy = False,
    replicas: Annotated[int, typer.Option(min=1, help="replicas of the model")] = 1,
    cpus_per_replica: Cpus = None,
    concurrency: Annotated[str, typer.Option(metavar="N,N…", help="callers of each closed loop")] = "1,4,16,64",
    requests: Annotated[int, typer.Option(min=1, help="of each closed loop; four a caller at least")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="how often each closed loop is run")] = 3,
    sweep: Annotated[bool, typer.Option(help="after that, rates up to saturation")] = True,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """The endpoint under closed and open loads, with what all of its processes take; the limit and YOLO.predict beside it."""
    from actors.hardware import available_cpus
    from deploy.bench.serve import Course, Fleet, bench_serve, bench_url

    with explained():
        callers = whole_numbers("--concurrency", concurrency)
        course = Course(_jpegs(source, images), callers, requests, rounds, sweep)
        if url:
            report = bench_url(url, course, say)
        else:
            settings = _benched(model, None, engine, precision, calibrate)
            fleet = Fleet(settings, topology, haproxy, replicas, cpus_per_replica)
            report = bench_serve(fleet, course, available_cpus(), say)
        _show(report.as_dict(), json_file, plot_file)


@bench.command()
def batch(
    source: BenchImages,
    model: Weights = None,
    engine: EngineFlag = "auto",
    precision: PrecisionFlag = "auto",
    calibrate: Calibrate = None,
    repeat: Annotated[int, typer.Option(min=1, help="how often each image is taken")] = 8,
    rounds: BenchRounds = 3,
    batch_size: BatchSize = 8,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """The dataset job against this machine's limit and against YOLO.predict in a loop, side by side."""
    from actors.hardware import available_cpus
    from deploy.bench.batch import bench_batch

    with explained():
        settings = _benched(model, batch_size, engine, precision, calibrate)
        report = bench_batch(settings, _jpegs(source, None), repeat, rounds, available_cpus(), say)
        _show(report.as_dict(), json_file, plot_file)


@bench.command()
def peers(
    source: BenchImages,
    model: Annotated[str, typer.Option(metavar="WEIGHTS.pt", help="a detection model, which is exported for the others")],
    engine: EngineFlag = "auto",
    precision: PrecisionFlag = "auto",
    calibrate: Calibrate = None,
    images: BenchCount = None,
    fleet: Annotated[
        list[str] | None,
        typer.Option(
            metavar="auto|direct|routed[+haproxy]", help="yolofleet's own sides; repeatable, the first beside the limit"
        ),
    ] = None,
    callers: Annotated[int, typer.Option(min=1, help="who ask at the same time")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="of each measurement")] = 200,
    rounds: BenchRounds = 3,
    quick: Annotated[bool, typer.Option("--quick", help="2 rounds of 100 requests on 32 images")] = False,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """What else one would take, side by side: FastAPI, LitServe, BentoML, Ray Serve, Roboflow, a loop; each made by uv."""
    from actors.hardware import available_cpus
    from deploy.bench.contest import Contest, bench_peers
    from deploy.bench.serve import Fleet

    if quick:
        images, requests, rounds = images or 32, 100, 2
    with explained():
        settings = _benched(model, None, engine, precision, calibrate)
        fleets = {f"yolofleet {flags}": Fleet.from_flag(flags, settings) for flags in fleet or ["auto"]}
        contest = Contest(settings, _jpegs(source, images), fleets, available_cpus(), callers, requests, rounds)
        report = bench_peers(contest, say)
        _show(report.as_dict(), json_file, plot_file)


@bench.command("report")
def bench_report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="what --json has written")],
    plot_file: PlotFile = None,
) -> None:
    """Tables in Markdown, and a picture, of what was measured before."""
    from deploy.bench import BenchError

    with explained():
        if plot_file and len(files) > 1:
            raise BenchError("--plot draws one report: give one FILE with it")
        for file in files:
            try:
                report = json.loads(file.read_text())
            except (OSError, ValueError) as error:
                raise BenchError(f"Cannot read {file}: {error}") from error
            _show(report, None, plot_file)


@bench.command()
def share(
    source: BenchImages,
    model: Weights = None,
    engine: EngineFlag = "auto",
    precision: PrecisionFlag = "auto",
    calibrate: Calibrate = None,
    actors: Annotated[str, typer.Option(help="numbers of actors")] = "1,2,4,8,16",
    imgsz: Annotated[int, typer.Option(min=32, help="letterbox target")] = 640,
    batch_size: BatchSize = 8,
    rounds: BenchRounds = 3,
    seconds: Annotated[float, typer.Option(min=0.5, help="how long each measurement takes")] = 10,
    json_file: JsonFile = None,
) -> None:
    """Actors that share one GPU, or this machine's cores, against one with all of it and against YOLO.predict."""
    from actors.hardware import cuda_devices
    from deploy.bench.share import bench_share, render
    from deploy.launch import local_ray

    with explained():
        images, settings = _jpegs(source, None), _benched(model, batch_size, engine, precision, calibrate)
        with local_ray():
            report = bench_share(
                settings,
                images,
                imgsz,
                whole_numbers("--actors", actors),
                gpu=bool(cuda_devices()),
                rounds=rounds,
                seconds=seconds,
                report=say,
            )
    console.print(render(report))
    if json_file:
        json_file.write_text(json.dumps(report.as_dict(), indent=2) + "\n")


@bench.command()
def background(
    source: BenchImages,
    model: Weights = None,
    share: Annotated[float, typer.Option(min=0.05, max=1, help="of what the endpoint answers at most")] = 0.5,
    requests: Annotated[int, typer.Option(min=20, help="in each half of a round")] = 300,
    batch_size: BatchSize = 8,
    rounds: BenchRounds = 4,
    json_file: JsonFile = None,
) -> None:
    """An endpoint's latency with and without a dataset job beside it that has --background."""
    from actors.hardware import available_cpus
    from deploy.bench.background import bench_background, render

    with explained():
        settings, images = _benched(model, batch_size), _jpegs(source, None)
        report = bench_background(settings, images, share, requests, rounds, available_cpus(), say)
    console.print(render(report))
    if json_file:
        json_file.write_text(json.dumps(report.as_dict(), indent=2) + "\n")


def _benched(
    model: str | None,
    batch_size: int | None = None,
    engine: Engine = "auto",
    precision: EnginePrecision = "auto",
    calibrate: Path | None = None,
) -> "ModelSettings":
    from deploy.weights import models_from_flags

    how = engine_fields(engine, precision, calibrate) | ({"max_batch": batch_size} if batch_size else {})
    (weights,) = models_from_flags([model] if model else [], console.print, **how)
    return weights


def _jpegs(folder: Path, count: int | None) -> list[Path]:
    from deploy.bench import BenchError

    images = sorted(folder.glob("*.jpg"))[:count]
    if not images:
        raise BenchError(f"There is no .jpg in {folder}: give a folder of JPEG images")
    return images


def _show(report: dict[str, Any], json_file: Path | None, plot_file: Path | None) -> None:
    from deploy.bench.report import markdown, plot

    print(markdown(report))
    if json_file:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    if plot_file:
        plot(report, plot_file)
