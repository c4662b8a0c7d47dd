"""The command ``yolofleet``: parse, delegate, and turn what comes back into an exit status. No logic of its own.

Imports stand inside the commands: ``--help`` must not wait for torch, and the environment must be prepared before Ray is
first imported.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from actors.errors import FleetError
from deploy.environment import prepare_environment

if TYPE_CHECKING:
    from actors.schemas import PredictParams

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.split(":")[0])
console = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True)

Gpus = Annotated[float | None, typer.Option(help="GPU share of each, a fraction or a whole number; equal shares if left out")]
Cpus = Annotated[float | None, typer.Option(help="CPUs of each, which also sets its threads; equal shares if left out")]


@app.command()
def serve(
    model: Annotated[list[str] | None, typer.Option(metavar="NAME=WEIGHTS", help="repeat for several models")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for all")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
    replicas: Annotated[str, typer.Option(metavar="N|MIN:MAX", help="replicas of each model")] = "1",
    gpus_per_replica: Gpus = None,
    cpus_per_replica: Cpus = None,
) -> None:
    """Serve models over HTTP until Ctrl-C."""
    from deploy.launch import local_ray, reservation, running_app, stop_signals
    from deploy.settings import AppSettings, Replicas, ServedModel
    from deploy.weights import models_from_flags

    with explained():
        count = Replicas.from_flag(replicas)
        models = models_from_flags(model or [], console.print)
        with local_ray():
            actor = reservation(len(models) * count.max, cpus_per_replica, gpus_per_replica)
            served = tuple(ServedModel(**each.model_dump(), replicas=count, actor=actor) for each in models)
            with running_app(AppSettings(models=served), host, port) as address, stop_signals() as stop:
                console.print(f"ready: {address}", highlight=False)
                stop.wait()
                console.print("draining: requests in flight are answered, new ones are refused")


@app.command()
def predict(
    source: Annotated[list[str], typer.Argument(help="folders, globs, list files (.txt) or images")],
    out: Annotated[Path, typer.Option(help="folder for the results; the same command again resumes")],
    model: Annotated[str | None, typer.Option(metavar="WEIGHTS", help="what ultralytics.YOLO loads")] = None,
    actors: Annotated[int, typer.Option(min=1, help="actors, each with a private model")] = 1,
    gpus_per_actor: Gpus = None,
    cpus_per_actor: Cpus = None,
    batch_size: Annotated[int, typer.Option(min=1, max=256, help="most images in one forward pass")] = 8,
    imgsz: Annotated[str | None, typer.Option(help="640, or HEIGHT,WIDTH; the model's own if left out")] = None,
    conf: Annotated[float, typer.Option(help="lowest confidence reported")] = 0.25,
    iou: Annotated[float, typer.Option(help="highest overlap that suppression leaves")] = 0.7,
    classes: Annotated[str | None, typer.Option(help="class ids to keep, such as 0,2")] = None,
    max_det: Annotated[int, typer.Option(help="most detections per image")] = 300,
    rect: Annotated[bool, typer.Option(help="letterbox to the smallest rectangle, not to the whole of imgsz")] = True,
    multi_label: Annotated[bool, typer.Option("--multi-label", help="several classes per box, as YOLO.val counts")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="throw away what is committed in --out")] = False,
) -> None:
    """Detect in a dataset on a pool of actors; Parquet out. The same command again goes on where it stopped."""
    from deploy.batch import JobSettings, run_job
    from deploy.launch import reservation
    from deploy.progress import job_progress
    from deploy.weights import models_from_flags

    with explained():
        (weights,) = models_from_flags([model] if model else [], console.print)
        job = JobSettings(
            sources=tuple(source),
            model=weights.model_copy(update={"max_batch": batch_size}),
            out=out,
            actors=actors,
            params=replace(_params(conf, iou, imgsz, classes, max_det), rect=rect, multi_label=multi_label),
            fresh=fresh,
        )
        with job_progress(console) as show:
            summary = run_job(job, lambda: reservation(actors, cpus_per_actor, gpus_per_actor), show)
    rate = summary["this_run"]["images_per_s"]
    console.print(
        f"{summary['inputs']} inputs: {summary['results']} results, {summary['dead_letters']} dead letters"
        f"{f', {rate}/s' if rate else ' (nothing was left to do)'} → {out}",
        highlight=False,
    )
    if not summary["accounted_for"]:
        raise typer.Exit(1)


@app.command()
def race(
    model: Annotated[str | None, typer.Option(metavar="WEIGHTS", help="what ultralytics.YOLO loads")] = None,
    source: Annotated[list[str] | None, typer.Option(help="images, a folder or a glob; drawn scenes if left out")] = None,
    images: Annotated[int, typer.Option(min=1, help="how many images")] = 24,
    callers: Annotated[int, typer.Option(min=2, help="concurrent callers, each with thresholds of its own")] = 4,
    imgsz: Annotated[int, typer.Option(help="letterbox target")] = 320,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the report here too")] = None,
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


@contextmanager
def explained() -> Iterator[None]:
    """Turn an expected error into one sentence on stderr and exit status 2; anything else keeps its traceback."""
    try:
        yield
    except FleetError as error:
        _leave(error.message)
    except ValidationError as error:
        first = error.errors()[0]
        _leave(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _leave(sentence: str) -> None:
    errors.print(f"[red]error:[/] {escape(sentence)}", highlight=False)
    raise typer.Exit(2) from None


def _params(conf: float, iou: float, imgsz: str | None, classes: str | None, max_det: int) -> "PredictParams":
    from actors.errors import BadRequest
    from actors.schemas import PredictParams

    def integers(flag: str, text: str | None) -> tuple[int, ...] | None:
        try:
            return None if text is None else tuple(int(part) for part in text.split(","))
        except ValueError as error:
            raise BadRequest(f"{flag} is '{text}': give whole numbers separated by commas") from error

    size = integers("--imgsz", imgsz)
    if size is not None and len(size) > 2:
        raise BadRequest(f"--imgsz is '{imgsz}': give one side, or HEIGHT,WIDTH")
    return PredictParams(
        conf=conf,
        iou=iou,
        imgsz=None if size is None else (size[0], size[-1]),
        classes=integers("--classes", classes),
        max_det=max_det,
    )


def main() -> None:
    """Entry point of the command."""
    prepare_environment()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    app()


if __name__ == "__main__":
    main()
