"""What a fleet is: its models with their reservations, and the limits of its endpoint.

One schema for ``yolofleet serve``'s flags and for the ``args:`` of a Serve config file; an unknown key is an error.
"""

from typing import Annotated

from pydantic import Field, model_validator

from actors.errors import BadRequest
from actors.settings import ActorSettings, ImageLimits, ModelSettings, Settings


class Replicas(Settings):
    """How many replicas a model has: a fixed number where both are equal, else autoscaled between them."""

    min: Annotated[int, Field(ge=0)] = 1
    max: Annotated[int, Field(ge=1)] = 1

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


class HttpLimits(Settings):
    """What one request may ask for."""

    max_body_mb: Annotated[float, Field(gt=0)] = 100.0
    max_images_per_request: Annotated[int, Field(ge=1)] = 64
    request_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 256


class AppSettings(Settings):
    """The whole application. The first model is the primary one: it answers requests that name none."""

    models: Annotated[tuple[ServedModel, ...], Field(min_length=1)]
    images: ImageLimits = ImageLimits()
    http: HttpLimits = HttpLimits()

    @model_validator(mode="after")
    def _distinct_names(self) -> "AppSettings":
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"models {names}: each needs a name of its own; give --model NAME=WEIGHTS")
        return self
