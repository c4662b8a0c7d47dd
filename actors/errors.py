"""Every expected error, once: what went wrong, for whom, and what to do about it.

    FleetError                       500  internal
    ├── BadRequest                   422  bad_request        a field is missing, unknown or out of range
    │   └── PoisonedImage            422  poisoned_image     this image has killed the replica that computed it, twice
    ├── BadImage                     400  bad_image          not an image, truncated, empty
    │   └── ImageTooLarge            413  image_too_large    more bytes or pixels than the limits allow
    ├── UnknownModel                 404  unknown_model
    ├── UnknownStream                404  unknown_stream
    ├── StreamConflict               409  stream_conflict    somebody else has this stream, or has it otherwise
    ├── ModelError                   500  model_error        weights that cannot be loaded or served
    ├── ModelOwnershipError          500  model_ownership    a private model was called from elsewhere
    ├── EngineOutOfMemory            503  out_of_memory      even one image does not fit
    ├── ReplicaUnavailable           503  replica_unavailable
    ├── Overloaded                   429  overloaded         the model's queue is full
    ├── TooManyStreams               429  too_many_streams   no room for another one
    ├── DeadlineExceeded             504  deadline_exceeded  the request's time ran out before it was computed
    ├── BadSource                    422  bad_source         dataset inputs that cannot be listed
    │   └── OutputMismatch           409  output_mismatch    DIR holds the results of another job
    └── TooManyErrors                500  too_many_errors    a dataset job that is obviously wrong, stopped

An expected error carries its HTTP status and code on the class and one sentence that tells the reader what to do.
Whatever is not a FleetError is a defect: it is logged with its traceback and answered as an anonymous 500.

The constructor takes exactly one positional message. That is a rule, not a style: Ray rebuilds an exception on the
other side from its ``args``, and an error with any other signature arrives as ``UnserializableException``.
"""

from __future__ import annotations


class FleetError(Exception):
    """Base of all expected errors.

    Attributes:
        status: HTTP status that this error is answered with.
        code: stable machine-readable name, part of the public interface.
    """

    status = 500
    code = "internal"

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        """The sentence for the user. Unlike ``str(error)`` it never grows a remote traceback."""
        return str(self.args[0])


class BadRequest(FleetError):
    """A request that cannot be understood: a field missing, unknown or out of range."""

    status = 422
    code = "bad_request"


class PoisonedImage(BadRequest):
    """An image whose computation has killed the process that did it; it is not tried again for a while."""

    code = "poisoned_image"


class BadImage(FleetError):
    """Bytes that do not decode to one whole image."""

    status = 400
    code = "bad_image"


class ImageTooLarge(BadImage):
    """An image with more bytes or pixels than the limits allow, refused before it is decoded."""

    status = 413
    code = "image_too_large"


class UnknownModel(FleetError):
    """A model name that this fleet does not serve."""

    status = 404
    code = "unknown_model"


class UnknownStream(FleetError):
    """A stream that does not run, or has ended."""

    status = 404
    code = "unknown_stream"


class UnknownJob(FleetError):
    """A dataset job that this cluster does not know."""

    status = 404
    code = "unknown_job"


class StreamConflict(FleetError):
    """A stream that runs with another model or tracker, or that a newer connection has taken over."""

    status = 409
    code = "stream_conflict"


class ModelError(FleetError):
    """Weights that cannot be loaded, or a model that this fleet cannot serve."""

    code = "model_error"


class ModelOwnershipError(FleetError):
    """A private model was touched by a thread or process that does not own it."""

    code = "model_ownership"


class EngineOutOfMemory(FleetError):
    """The device ran out of memory for this batch."""

    status = 503
    code = "out_of_memory"


class ReplicaUnavailable(FleetError):
    """No replica could answer; the request may be sent again."""

    status = 503
    code = "replica_unavailable"


class Overloaded(FleetError):
    """The queue of a model is full; the request was not accepted and may be sent again later."""

    status = 429
    code = "overloaded"


class TooManyStreams(FleetError):
    """There is no room for another stream; one of those that run has to end first."""

    status = 429
    code = "too_many_streams"


class DeadlineExceeded(FleetError):
    """The request's time ran out before its inference began; nothing was computed for it."""

    status = 504
    code = "deadline_exceeded"


class BadSource(FleetError):
    """Dataset inputs that cannot be listed."""

    status = 422
    code = "bad_source"


class OutputMismatch(BadSource):
    """The output folder holds the results of another job: other weights or other arguments."""

    status = 409
    code = "output_mismatch"


class TooManyErrors(FleetError):
    """A dataset job was stopped because more of its inputs failed than its user allows."""

    code = "too_many_errors"
