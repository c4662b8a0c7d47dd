"""Every expected error, once: what went wrong, for whom, and what to do about it.

    FleetError                       500  internal
    ├── BadRequest                   422  bad_request        a field is missing, unknown or out of range
    ├── BadImage                     400  bad_image          not an image, truncated, empty
    │   └── ImageTooLarge            413  image_too_large    more bytes or pixels than the limits allow
    ├── UnknownModel                 404  unknown_model
    ├── ModelError                   500  model_error        weights that cannot be loaded or served
    ├── ModelOwnershipError          500  model_ownership    a private model was called from elsewhere
    ├── EngineOutOfMemory            503  out_of_memory      even one image does not fit
    ├── ReplicaUnavailable           503  replica_unavailable
    └── BadSource                    422  bad_source         dataset inputs that cannot be listed
        └── OutputMismatch           409  output_mismatch    DIR holds the results of another job

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


class BadSource(FleetError):
    """Dataset inputs that cannot be listed."""

    status = 422
    code = "bad_source"


class OutputMismatch(BadSource):
    """The output folder holds the results of another job: other weights or other arguments."""

    status = 409
    code = "output_mismatch"
