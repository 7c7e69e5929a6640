"""What is wrong with a request: the field, and the rule it breaks."""

from __future__ import annotations

from trainer.errors import SlimrankError


class RequestError(SlimrankError):
    """A request that cannot be answered; `field` names the part of it, `status` is the HTTP status."""

    def __init__(self, field: str, message: str, status: int = 422) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
        self.status = status

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, str, int]]:
        return type(self), (self.field, self.message, self.status)
