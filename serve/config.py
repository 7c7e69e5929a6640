"""The `serve` section: where to listen, how many replicas, what a request may hold."""

from __future__ import annotations

from pydantic import Field, model_validator

from trainer.data.schema import Config


class ServeConfig(Config):
    """Serving options. The server listens on loopback unless told otherwise."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=2, ge=1)
    target_ongoing_requests: float = Field(default=4.0, gt=0)
    max_ongoing_requests: int = Field(default=64, ge=1)
    max_queued_requests: int = Field(default=256, ge=1)
    batch_requests: int = Field(default=16, ge=1)
    batch_candidates: int = Field(default=2048, ge=1)
    max_candidates: int = Field(default=10_000, ge=1)
    max_body_bytes: int = Field(default=4_000_000, ge=1000)
    ready_timeout_s: float = Field(default=120.0, gt=0)

    @model_validator(mode="after")
    def _replicas(self) -> ServeConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self
