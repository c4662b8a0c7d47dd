"""The command ``yolofleet``: parse, delegate, and turn what comes back into an exit status. No logic of its own.

Imports stand inside the commands: ``--help`` must not wait for torch, and the environment must be prepared before Ray is
first imported.
"""

import json
import logging
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from actors.settings import Decode
from deploy.bench.cli import bench
from deploy.environment import prepare_environment, use_haproxy
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
    errors,
    explained,
    say,
    whole_numbers,
)
from deploy.settings import LogFormat, LogLevel

if TYPE_CHECKING:
    from actors.schemas import PredictParams
    from deploy.batch import JobSettings
    from deploy.settings import LogSettings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.split(":")[0])
app.add_typer(bench, name="bench")
EVAL_CONF = 0.001

Gpus = Annotated[float | None, typer.Option(help="GPU share of each, a fraction or a whole number; equal shares if left out")]
Level = Annotated[LogLevel, typer.Option("--log-level", case_sensitive=False, help="INFO has a line per request")]
Format = Annotated[LogFormat, typer.Option("--log-format", help="json for what collects logs")]
Actors = Annotated[str, typer.Option(metavar="N|MIN:MAX", help="actors, each with a private model; MAX as there is room")]
Background = Annotated[
    bool, typer.Option("--background", help="take only CPU time that nothing else wants, none while a replica computes")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="throw away what is committed in --out")]
Imgsz = Annotated[str | None, typer.Option(help="640, or HEIGHT,WIDTH; the model's own if left out")]
Iou = Annotated[float, typer.Option(help="highest overlap that suppression leaves")]
Classes = Annotated[str | None, typer.Option(help="class ids to keep, such as 0,2")]
MaxErrors = Annotated[str | None, typer.Option(metavar="N|P%", help="stop when more inputs fail")]
DecodeFlag = Annotated[Decode, typer.Option("--decode", help="reduced: large JPEGs by a faster way, boxes differ slightly")]


@app.command()
def serve(
    context: typer.Context,
    model: Annotated[list[str] | None, typer.Option(metavar="NAME=WEIGHTS", help="repeat for several models")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for all")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
    replicas: Annotated[str, typer.Option(metavar="N|MIN:MAX", help="replicas of each model")] = "1",
    gpus_per_replica: Gpus = None,
    cpus_per_replica: Cpus = None,
    engine: EngineFlag = "auto",
    precision: PrecisionFlag = "auto",
    calibrate: Calibrate = None,
    decode: DecodeFlag = "exact",
    topology: ServeTopology = "auto",
    haproxy: HaProxy = False,
    api_keys: Annotated[Path | None, typer.Option(metavar="FILE", help="hashes of the keys that may ask; see 'key'")] = None,
    log_level: Level = "WARNING",
    log_format: Format = "text",
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML as deploy takes it, instead of the flags")] = None,
) -> None:
    """Serve models over HTTP until Ctrl-C."""
    if haproxy:
        with explained():
            use_haproxy(port)  # before Ray is imported
    from deploy.config import read_config
    from deploy.keys import KeyFile
    from deploy.launch import cluster_address, local_ray, reservation, running_app, stop_signals
    from deploy.settings import AppSettings, AuthSettings, LogSettings, Replicas, ServedModel
    from deploy.weights import models_from_flags

    def from_flags() -> AppSettings:
        count = Replicas.from_flag(replicas)
        models = models_from_flags(model or [], console.print, **engine_fields(engine, precision, calibrate), decode=decode)
        actor = reservation(len(models) * count.max, cpus_per_replica, gpus_per_replica)
        served = tuple(ServedModel(**each.model_dump(), replicas=count, actor=actor) for each in models)
        auth = AuthSettings(keys_file=None if api_keys is None else str(api_keys.resolve()))
        log = LogSettings(level=log_level, format=log_format)
        return AppSettings(models=served, topology=topology, auth=auth, log=log)

    with explained():
        if config:
            _alone(context, "config", "haproxy", "host", "port")
        written = config and read_config(config)[0]  # what is wrong shows now, not when everything has started
        if api_keys:
            KeyFile(api_keys, None)
        with local_ray():
            settings = written or from_flags()
            with running_app(settings, host, port) as address, stop_signals() as stop:
                console.print(f"ready: {address}", highlight=False)
                console.print(f"for 'yolofleet deploy': RAY_ADDRESS={cluster_address()}", highlight=False)
                stop.wait()
                console.print("draining: requests in flight are answered, new ones are refused")


@app.command()
def deploy(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML as in deploy/serve.yaml")],
    min_agreement: Annotated[float | None, typer.Option(min=0, max=1, help="instead of the config's")] = None,
    max_slowdown: Annotated[float | None, typer.Option(min=0.01, help="new median latency / old one, at most")] = None,
    replay: Annotated[int | None, typer.Option(min=1, help="recent requests to compare on, at most")] = None,
    force: Annotated[bool, typer.Option("--force", help="move traffic whatever the comparison says")] = False,
    json_file: JsonFile = None,
) -> None:
    """Let other settings run on a running cluster; other weights only if they agree with the running ones."""
    from deploy.config import read_config
    from deploy.launch import joined_ray
    from deploy.rollout import render, rollout

    with explained():
        settings, http = read_config(config)
        given = {"min_agreement": min_agreement, "max_slowdown": max_slowdown, "replay": replay}
        rules = settings.rollout.model_copy(update={name: value for name, value in given.items() if value is not None})
        with joined_ray():
            report = rollout(
                settings.model_copy(update={"rollout": rules}),
                http,
                lambda line: console.print(line, highlight=False, markup=False),
                force=force,
            )
    if report.comparisons:
        console.print(render(report))
    if json_file:
        json_file.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    if report.reason:
        errors.print(f"[red]not deployed:[/] {escape(report.reason)}", highlight=False)
        raise typer.Exit(1)
    console.print("deployed" + (", as forced" if report.forced else ""))


@app.command()
def predict(
    source: Annotated[
        list[str] | None,
        typer.Argument(help="folders, globs, lists, tables, tars, images, videos; paths, s3://, gs://, az://, http://"),
    ] = None,
    out: Annotated[str | None, typer.Option(help="folder or bucket for the results; the same command again resumes")] = None,
    model: Weights = None,
    actors: Actors = "1",
    gpus_per_actor: Gpus = None,
    cpus_per_actor: Cpus = None,
    batch_size: BatchSize = 8,
    engine: EngineFlag = "auto",
    precision: PrecisionFlag = "auto",
    calibrate: Calibrate = None,
    decode: DecodeFlag = "exact",
    imgsz: Imgsz = None,
    conf: Annotated[float, typer.Option(help="lowest confidence reported")] = 0.25,
    iou: Iou = 0.7,
    classes: Classes = None,
    max_det: Annotated[int, typer.Option(help="most detections per image")] = 300,
    rect: Annotated[bool, typer.Option(help="letterbox to the smallest rectangle, not to the whole of imgsz")] = True,
    multi_label: Annotated[bool, typer.Option("--multi-label", help="several classes per box, as YOLO.val counts")] = False,
    column: Annotated[str | None, typer.Option(help="the tables' column of URIs or bytes; found by name if left out")] = None,
    formats: Annotated[str, typer.Option("--format", help="any of parquet,jsonl,coco,yolo")] = "parquet",
    annotate: Annotated[bool, typer.Option("--annotate", help="draw a picture of every result")] = False,
    labels: Annotated[Path | None, typer.Option("--eval", metavar="LABELS", help="score against YOLO or COCO labels")] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="of all machines; tells the cost of a million images")] = None,
    max_errors: MaxErrors = None,
    background: Background = False,
    fresh: Fresh = False,
    retry_failed: Annotated[
        str | None, typer.Option(metavar="DIR", help="do the job of DIR again for its dead letters; all else is as it was")
    ] = None,
    log_level: Level = "WARNING",
    log_format: Format = "text",
) -> None:
    """Detect in a dataset on a pool of actors; Parquet out. The same command again goes on where it stopped."""
    from actors.errors import BadRequest
    from deploy.batch import JobSettings
    from deploy.settings import LogSettings

    with explained():
        if retry_failed is not None:
            if source or out or fresh:
                raise BadRequest("--retry-failed takes the job from its folder: give no sources, no --out and no --fresh")
            job = JobSettings.retried(retry_failed)
        elif not source or out is None:
            raise BadRequest("Give one source or more, and --out for the results")
        else:
            job = _job(
                source,
                out,
                model,
                actors,
                engine_fields(engine, precision, calibrate) | {"decode": decode, "max_batch": batch_size},
                max_errors,
                params=replace(_params(conf, iou, imgsz, classes, max_det), rect=rect, multi_label=multi_label),
                column=column,
                formats=tuple(formats.split(",")),
                annotate=annotate,
                labels=labels,
                price_per_hour=price_per_hour,
                background=background,
                fresh=fresh,
            )
        if job.labels and job.params.conf > EVAL_CONF:
            errors.print(
                f"[yellow]warning:[/] --conf {job.params.conf:g} cuts off what mAP counts; YOLO.val has {EVAL_CONF:g}"
            )
        log = LogSettings(level=log_level, format=log_format)
        _run_job(job, gpus_per_actor, cpus_per_actor, log, retry_failed=retry_failed is not None)


@app.command()
def track(
    source: Annotated[list[str], typer.Argument(help="videos, or folders, globs and list files (.txt) of videos")],
    out: Annotated[str, typer.Option(help="folder or bucket for the results; the same command again resumes")],
    model: Weights = None,
    tracker: Annotated[str, typer.Option(help="bytetrack or botsort")] = "botsort",
    formats: Annotated[str, typer.Option("--format", help="any of parquet,jsonl,coco,yolo,mot")] = "parquet",
    annotate: Annotated[bool, typer.Option("--annotate", help="write videos with boxes and ids too")] = False,
    actors: Actors = "1",
    gpus_per_actor: Gpus = None,
    cpus_per_actor: Cpus = None,
    batch_size: BatchSize = 8,
    engine: EngineFlag = "auto",
    precision: PrecisionFlag = "auto",
    calibrate: Calibrate = None,
    decode: DecodeFlag = "exact",
    imgsz: Imgsz = None,
    conf: Annotated[float, typer.Option(help="lowest confidence that the tracker sees")] = 0.1,
    iou: Iou = 0.7,
    classes: Classes = None,
    max_det: Annotated[int, typer.Option(help="most detections per frame")] = 300,
    max_errors: MaxErrors = None,
    background: Background = False,
    fresh: Fresh = False,
    log_level: Level = "WARNING",
    log_format: Format = "text",
) -> None:
    """Follow the objects of videos; the ids are those of a sequential YOLO.track. The same command again resumes."""
    from actors.settings import TrackerSettings
    from deploy.settings import LogSettings

    with explained():
        job = _job(
            source,
            out,
            model,
            actors,
            engine_fields(engine, precision, calibrate) | {"decode": decode, "max_batch": batch_size},
            max_errors,
            params=_params(conf, iou, imgsz, classes, max_det),
            tracker=TrackerSettings.model_validate({"kind": tracker}),
            formats=tuple(formats.split(",")),
            annotate=annotate,
            background=background,
            fresh=fresh,
        )
        _run_job(job, gpus_per_actor, cpus_per_actor, LogSettings(level=log_level, format=log_format))


@app.command()
def watch(
    source: Annotated[str, typer.Argument(help="a video, a camera's number, or an address such as rtsp://…")],
    to: Annotated[str, typer.Option(metavar="http://HOST:PORT", help="the endpoint")] = "http://127.0.0.1:8000",
    stream: Annotated[str, typer.Option(help="name of the stream; the same name again goes on with its ids")] = "watch",
    model: Annotated[str | None, typer.Option(help="a model that is served there; the primary one if left out")] = None,
    tracker: Annotated[str, typer.Option(help="bytetrack or botsort")] = "botsort",
    mode: Annotated[str, typer.Option(help="all: every frame is answered; latest: stale ones are skipped")] = "all",
    conf: Annotated[float, typer.Option(help="lowest confidence that the tracker sees")] = 0.1,
    lines: Annotated[str | None, typer.Option(metavar="JSON", help='count here: {"gate": [[0, 240], [640, 240]]}')] = None,
    zones: Annotated[str | None, typer.Option(metavar="JSON", help="the same with three points or more")] = None,
    anchor: Annotated[str | None, typer.Option(help="what of an object passes: center or bottom_center")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="YOLOFLEET_API_KEY", help="if the endpoint asks for one")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.mp4", help="write a video with boxes, ids and counts")] = None,
    fps: Annotated[float, typer.Option(help="frames per second of that video")] = 25.0,
) -> None:
    """Send a video or a camera to an endpoint as a live stream, and show what it follows and counts."""
    from actors.annotate import annotate, mark
    from actors.clips import write_clip
    from actors.settings import Regions
    from deploy.watch import Watcher, shown

    where = {"lines": lines, "zones": zones, "anchor": anchor}
    given = {"model": model, "tracker": tracker, "mode": mode, "conf": f"{conf:g}", "api_key": api_key, **where}
    with explained():
        regions = Regions.from_texts(**where) or Regions()
        query = {name: value for name, value in given.items() if value is not None}
        seen = shown(Watcher(source, to, stream, query).watch(), console)
        if out is None:
            for _ in seen:
                pass
        else:
            write_clip(out, (mark(annotate(each.frame.image, each.result), regions, each.counts) for each in seen), fps)


@app.command()
def submit(
    command: Annotated[list[str], typer.Argument(metavar="-- predict|track …", help="what the job runs")],
    address: Annotated[str, typer.Option(help="http://HEAD:8265, the dashboard of the cluster")],
    working_dir: Annotated[Path | None, typer.Option(help="folder that is sent along and becomes the job's own")] = None,
    job_id: Annotated[str | None, typer.Option(help="a name for the job; a name is taken once")] = None,
) -> None:
    """Run predict or track as a job on a Ray cluster, show what it prints, and end with its exit status."""
    from deploy.submit import submit_job

    with explained():
        status = submit_job(address, command, working_dir, job_id, lambda text: print(text, end="", flush=True))
    raise typer.Exit(status)


@app.command()
def drain(
    node: Annotated[str | None, typer.Argument(metavar="[NODE]", help="its address or id; this one if left out")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="seconds, after which its machine ends in any case")] = 300,
) -> None:
    """Empty a node of a running cluster, so that its machine can end: no request fails and no shard is lost."""
    from deploy.drain import drain as empty
    from deploy.launch import joined_ray

    with explained(), joined_ray():
        left = empty(node, timeout, lambda line: console.print(line, highlight=False, markup=False))
    if left:
        errors.print(f"[red]not empty after {timeout:g} s:[/] {', '.join(f'{count} {name}' for name, count in left.items())}")
        raise typer.Exit(1)
    console.print("drained")


@app.command()
def race(
    model: Annotated[str | None, typer.Option(metavar="WEIGHTS", help="what ultralytics.YOLO loads")] = None,
    source: Annotated[list[str] | None, typer.Option(help="images, a folder or a glob; drawn scenes if left out")] = None,
    images: Annotated[int, typer.Option(min=1, help="how many images")] = 24,
    callers: Annotated[int, typer.Option(min=2, help="concurrent callers, each with thresholds of its own")] = 4,
    imgsz: Annotated[int, typer.Option(help="letterbox target")] = 320,
    json_file: JsonFile = None,
) -> None:
    """Show what sharing a YOLO object between threads does to its answers, and what the cures cost."""
    from deploy.race import pictures, render, run_race
    from deploy.weights import models_from_flags

    with explained():
        (weights,) = models_from_flags([model] if model else [], console.print)
        report = run_race(
            Path(weights.weights),
            pictures(source or [], images),
            imgsz=imgsz,
            callers=callers,
            report=lambda line: console.print(line, highlight=False),
        )
    console.print(render(report))
    if json_file:
        json_file.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    if not report.cure_holds:
        errors.print("[red]yolofleet's own actors gave wrong answers or failed: please report this with --json's file[/]")
        raise typer.Exit(1)


@app.command()
def plan(
    model: Annotated[str, typer.Option(metavar="NAME=WEIGHTS", help="what ultralytics.YOLO loads")],
    imgsz: Annotated[int, typer.Option(min=32, help="what the requests ask for, pixels")],
    slo_p95_ms: Annotated[float | None, typer.Option(min=1, help="95 % of the answers shall take no longer")] = None,
    gpu: Annotated[int | None, typer.Option(min=0, help="how many GPUs of this machine's kind; all if left out")] = None,
    node: Annotated[str | None, typer.Option(metavar="TYPE", help="a cloud's node type with this machine's device")] = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="of one node")] = None,
    load: Annotated[float | None, typer.Option(min=0, help="images/s that the fleet has to take")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="write the configuration here")] = None,
    source: Annotated[Path | None, typer.Option(help="a folder of JPEG images like yours; drawn ones if left out")] = None,
    seconds: Annotated[float, typer.Option(min=0.5, help="how long each measurement takes")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write everything measured here")] = None,
) -> None:
    """Measure a model on this hardware, and write the configuration with the highest rate that keeps the objective."""
    from actors.errors import BadRequest
    from deploy.plan import Wish, make_plan, render, write_config
    from deploy.weights import models_from_flags

    with explained():
        if gpu is not None and node is not None:
            raise BadRequest("Give --gpu for this machine, or --node for another one")
        (settings,) = models_from_flags([model], console.print)
        wish = Wish(settings, imgsz, slo_p95_ms, gpu, node, price_per_hour, load, seconds)
        made = make_plan(wish, source, say)
    console.print(render(made))
    if out:
        out.write_text(write_config(made))
        console.print(f"the configuration is in {out}: yolofleet deploy {out}", highlight=False)
    if json_file:
        json_file.write_text(json.dumps(made.as_dict(), indent=2) + "\n")


@app.command()
def doctor() -> None:
    """Tell what this machine offers, and what would stop serve or predict from working, with its mend."""
    from deploy.doctor import examine, render

    findings = examine()
    console.print(render(findings))
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)


@app.command()
def demo(
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
    leave: Annotated[bool, typer.Option("--exit", help="end after the checks, with their exit status")] = False,
) -> None:
    """Start everything on the embedded model, drive it, check it, and stay up until Ctrl-C."""
    from deploy.demo.guide import run_demo

    with explained():
        passed = run_demo(console, port, stay=not leave)
    if not passed:
        raise typer.Exit(1)


@app.command()
def key(name: Annotated[str, typer.Argument(help="whose key it is; appears in logs")]) -> None:
    """Make an API key: it goes to stderr, once, and its line for the file to stdout: yolofleet key NAME >> FILE."""
    from deploy.keys import fresh_key

    with explained():
        made, line = fresh_key(name)
    errors.print(f"the key of {name}, which is kept nowhere: {made}", highlight=False)
    print(line)


def _alone(context: typer.Context, option: str, *others: str) -> None:
    """Refuse flags beside ``option`` that it makes meaningless, all but ``others``."""
    from actors.errors import BadRequest

    allowed = {option, *others}
    for name in context.params.keys() - allowed:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = name.replace("_", "-")
            raise BadRequest(f"--{option} says what is served, and --{flag} does too: leave one of them out")


def _score_line(score: dict[str, Any]) -> str:
    values = (
        f"mAP50 {score['map50']:.3f}, mAP50-95 {score['map50_95']:.3f}, P {score['precision']:.3f}, R {score['recall']:.3f}"
    )
    return f"{values} over {score['labels']} labels in {score['images']} images"


def _params(conf: float, iou: float, imgsz: str | None, classes: str | None, max_det: int) -> "PredictParams":
    from actors.errors import BadRequest
    from actors.schemas import PredictParams

    size = None if imgsz is None else whole_numbers("--imgsz", imgsz)
    if size is not None and len(size) > 2:
        raise BadRequest(f"--imgsz is '{imgsz}': give one side, or HEIGHT,WIDTH")
    return PredictParams(
        conf=conf,
        iou=iou,
        imgsz=None if size is None else (size[0], size[-1]),
        classes=None if classes is None else tuple(whole_numbers("--classes", classes)),
        max_det=max_det,
    )


def _job(
    source: list[str], out: str, model: str | None, actors: str, how: dict[str, Any], max_errors: str | None, **settings: Any
) -> "JobSettings":
    from deploy.batch import ErrorBudget, JobSettings
    from deploy.settings import Replicas
    from deploy.weights import models_from_flags

    (weights,) = models_from_flags([model] if model else [], console.print, **how)
    count = Replicas.from_flag(actors)
    return JobSettings(
        sources=tuple(source),
        model=weights,
        out=out,
        actors=max(count.min, 1),
        max_actors=count.max,
        max_errors=ErrorBudget.from_flag(max_errors) if max_errors else ErrorBudget(),
        **settings,
    )


def _run_job(
    job: "JobSettings",
    gpus_per_actor: float | None,
    cpus_per_actor: float | None,
    log: "LogSettings",
    *,
    retry_failed: bool = False,
) -> None:
    from deploy.batch import run_job
    from deploy.launch import reservation
    from deploy.progress import job_progress

    cpus = 0.0 if job.background and cpus_per_actor is None else cpus_per_actor  # it takes what is left, and reserves none
    with job_progress(console) as show:
        reserve = partial(reservation, job.most_actors, cpus, gpus_per_actor)
        summary = run_job(job, reserve, show, log, retry_failed=retry_failed)
    rate = summary["this_run"]["images_per_s"]
    console.print(
        f"{summary['inputs']} inputs: {summary['results']} results, {summary['dead_letters']} dead letters"
        f"{f', {rate}/s' if rate else ' (nothing was left to do)'} → {job.out}",
        highlight=False,
    )
    if score := summary["eval"]:
        console.print(_score_line(score), highlight=False)
    if not summary["accounted_for"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the command."""
    prepare_environment()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends what a command has started, as Ctrl-C does
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    app()


if __name__ == "__main__":
    main()
