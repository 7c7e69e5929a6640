"""What is wrong with a request: the field, and the rule it breaks."""

from __future__ import annotations

from trainer.errors import SlimrankError


class RequestError(SlimrankError):
    """A request that cannot be answered; `field` names the part of it, `status` is the HTTP status.

    `retry_after_s`: after how long it is worth asking again, where that helps.
    """

    def __init__(self, field: str, message: str, status: int = 422, retry_after_s: float | None = None) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
        self.status = status
        self.retry_after_s = retry_after_s

    @property
    def retry_after(self) -> str | None:
        """The value of a Retry-After header: whole seconds, at least one; None where asking again does not help."""
        return None if self.retry_after_s is None else str(max(1, round(self.retry_after_s + 0.5)))

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, str, int, float | None]]:
        return type(self), (self.field, self.message, self.status, self.retry_after_s)
