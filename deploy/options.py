"""What several commands of ``yolofleet`` have in common: their options, each declared once, and how they speak and fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from actors.errors import BadRequest, FleetError
from actors.settings import Engine, EnginePrecision
from deploy.settings import Topology

console = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True)

Cpus = Annotated[float | None, typer.Option(help="CPUs of each, which also sets its threads; equal shares if left out")]
BatchSize = Annotated[int, typer.Option(min=1, max=256, help="most images in one forward pass")]
EngineFlag = Annotated[
    Engine,
    typer.Option("--engine", envvar="YOLOFLEET_ENGINE", help="what computes .pt weights; auto: the fastest that agrees"),
]
PrecisionFlag = Annotated[EnginePrecision, typer.Option("--precision", help="auto: fp32 on a CPU, fp16 on a GPU")]
Calibrate = Annotated[Path | None, typer.Option(metavar="FOLDER", help="images that --precision int8 is fitted to")]
Weights = Annotated[str | None, typer.Option(metavar="WEIGHTS", help="what ultralytics.YOLO loads")]
ServeTopology = Annotated[Topology, typer.Option(help="direct: the model lives in the ingress; auto: if it is the only one")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the report here too")]
HaProxy = Annotated[bool, typer.Option("--haproxy", help="Serve's HAProxy data plane instead of its Python proxy")]


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


def say(line: str) -> None:
    """Print a line as it is."""
    console.print(line, highlight=False, markup=False)


def whole_numbers(flag: str, text: str | None) -> list[int]:
    """The numbers of an option such as ``1,4,16``; none if it was left out.

    Raises:
        BadRequest: it is something else.
    """
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise BadRequest(f"{flag} is '{text}': give whole numbers separated by commas") from error


def engine_fields(engine: Engine, precision: EnginePrecision, calibrate: Path | None) -> dict[str, Any]:
    """The fields of a model that the three flags stand for; the folder with its whole path, as actors run elsewhere."""
    return {"engine": engine, "precision": precision, "calibrate": calibrate and str(calibrate.resolve())}
