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

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, str, int, float | None]]:
        return type(self), (self.field, self.message, self.status, self.retry_after_s)
