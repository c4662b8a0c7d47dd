"""What a fleet is: its models with their reservations, and the limits of its endpoint.

One schema for ``yolofleet serve``'s flags and for the ``args:`` of a Serve config file; an unknown key is an error.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from actors.errors import BadRequest
from actors.settings import ActorSettings, ImageLimits, ModelSettings, Settings

APP_NAME = "yolofleet"
Topology = Literal["auto", "direct", "routed"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogFormat = Literal["text", "json"]


class Replicas(Settings):
    """How many replicas a model has: a fixed number where both are equal, else autoscaled between them.

    With ``min`` 0 the last one ends after ``idle_s`` without work, and the next request waits until one has loaded and
    warmed up: allow it that time (``HttpLimits.request_timeout_s``). Being asked for readiness or for ``/models`` wakes
    nobody, but for one case: an ingress that never met the model awake has to learn for ``/models`` what it is.

    They are spread over the nodes. Where one node has two more than another with room, one that is there for ``respread_s``
    moves (``deploy/spread.py``). None leaves them where Serve puts them; then scaling down lets nodes fall idle.
    """

    min: Annotated[int, Field(ge=0)] = 1
    max: Annotated[int, Field(ge=1)] = 1
    idle_s: Annotated[float, Field(gt=0)] = 60.0
    respread_s: Annotated[float, Field(gt=0)] | None = 300.0

    @model_validator(mode="after")
    def _ordered(self) -> "Replicas":
        if self.min > self.max:
            raise ValueError(f"replicas {self.min}:{self.max}: the first number is the smaller one")
        return self

    @classmethod
    def from_flag(cls, flag: str) -> "Replicas":
        """Read ``N`` or ``MIN:MAX``."""
        low, separator, high = flag.partition(":")
        if not (low.isdigit() and (high.isdigit() or not separator)):
            raise BadRequest(f"'{flag}' is not a number of replicas: give N or MIN:MAX, such as 2 or 1:4")
        return cls(min=int(low), max=int(high or low))


class ServedModel(ModelSettings):
    """A model, the reservation of each of its replicas, and their number."""

    replicas: Replicas = Replicas()
    actor: ActorSettings = ActorSettings()

    @property
    def in_flight(self) -> int:
        """Images that a replica has in hand at most: a batch that is computed and the next one, decoded meanwhile."""
        return 2 * self.max_batch


class UrlLimits(Settings):
    """Which URLs are fetched for a client, and what one may cost. None are unless ``allow`` is set."""

    allow: bool = False
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = (80, 443)
    max_mb: Annotated[float, Field(gt=0)] = 20.0
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    max_redirects: Annotated[int, Field(ge=0, le=10)] = 3


class StreamLimits(Settings):
    """Live streams: how many, how large their frames, and how long one lives that nobody sends to.

    ``trackers`` are the actors over which streams are spread, each begun when it gets its first one; an actor holds up to
    ``max_per_tracker`` of them. ``window`` frames of a stream are computed at once.
    """

    trackers: Annotated[int, Field(ge=1)] = 4
    max_per_tracker: Annotated[int, Field(ge=1)] = 64
    window: Annotated[int, Field(ge=1, le=64)] = 4
    max_frame_mb: Annotated[float, Field(gt=0)] = 10.0
    idle_s: Annotated[float, Field(gt=0)] = 60.0


class HttpLimits(Settings):
    """What one request may ask for, and how many may wait: ``max_waiting_requests`` per model and ingress."""

    max_body_mb: Annotated[float, Field(gt=0)] = 100.0
    max_images_per_request: Annotated[int, Field(ge=1)] = 64
    request_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    max_waiting_requests: Annotated[int, Field(ge=0)] = 128
    max_connections: Annotated[int, Field(ge=1)] = 1024
    urls: UrlLimits = UrlLimits()
    streams: StreamLimits = StreamLimits()


class AuthSettings(Settings):
    """Who may ask. Without a file of keys everybody may; its format is in ``deploy/keys.py``."""

    keys_file: str | None = None
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None  # of a key whose line gives no number


class LogSettings(Settings):
    """What the fleet's processes log, and how (``deploy/logs.py``). At ``INFO`` every request has a line of Serve's own."""

    level: LogLevel = "WARNING"
    format: LogFormat = "text"


class RolloutRules(Settings):
    """When traffic moves to other weights (``deploy/rollout.py``); of no meaning to a fleet that only runs.

    ``min_agreement`` is the least share of objects on which old and new agree over up to ``replay`` recent requests;
    ``max_slowdown`` the highest ratio of the new median latency to the old one, None for any. New replicas that are not
    ready after ``ready_timeout_s`` are given up.
    """

    min_agreement: Annotated[float, Field(ge=0, le=1)] = 0.95
    max_slowdown: Annotated[float, Field(gt=0)] | None = None
    replay: Annotated[int, Field(ge=1)] = 64
    ready_timeout_s: Annotated[float, Field(gt=0)] = 600.0


class AppSettings(Settings):
    """The whole application. The first model is the primary one: it answers requests that name none.

    ``topology``: ``routed`` puts a stateless ingress before the models' replicas and survives the death of any of them;
    ``direct`` puts the primary model's replicas into the ingresses, one hop less, and a death costs open connections.
    ``auto`` is direct for a single model and routed for several. A model that scales to zero needs routed, and ``auto``
    takes it: somebody has to be there to receive the next request. ``ingresses`` counts routed's. Each replica proves itself
    every ``health_check_s`` by a batch or a tiny inference, and is replaced when it fails three times in a row. A death is
    noticed, and what has died replaced, within the same time.
    """

    models: Annotated[tuple[ServedModel, ...], Field(min_length=1)]
    topology: Topology = "auto"
    ingresses: Annotated[int, Field(ge=1)] = 1
    health_check_s: Annotated[float, Field(gt=0)] = 1.0
    images: ImageLimits = ImageLimits()
    http: HttpLimits = HttpLimits()
    auth: AuthSettings = AuthSettings()
    log: LogSettings = LogSettings()
    rollout: RolloutRules = RolloutRules()

    @model_validator(mode="after")
    def _distinct_names(self) -> "AppSettings":
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"models {names}: each needs a name of its own; give --model NAME=WEIGHTS")
        return self

    @model_validator(mode="after")
    def _somebody_is_there(self) -> "AppSettings":
        if self.topology == "direct" and not self.models[0].replicas.min:
            raise ValueError("topology 'direct' cannot scale its first model to zero: give --topology routed, or 1:N replicas")
        return self

    @property
    def direct(self) -> bool:
        """Whether the primary model lives in the ingress."""
        alone = len(self.models) == 1 and self.models[0].replicas.min > 0
        return self.topology == "direct" or (self.topology == "auto" and alone)
