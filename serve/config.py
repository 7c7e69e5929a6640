"""The `serve` section: where to listen, how many replicas, what a request may hold, when a new version is taken."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator, model_validator

from serve.formula import read_formula
from trainer.data.schema import Config


class SwapConfig(Config):
    """When a new version may replace the one that answers, and when it is taken back."""

    requests: int = Field(default=64, ge=1)
    min_overlap: float = Field(default=0.5, ge=0, le=1)
    max_calibration: float = Field(default=1.25, ge=1)
    probation_s: float = Field(default=60.0, ge=0)
    max_error_share: float = Field(default=0.01, ge=0, le=1)
    max_slowdown: float = Field(default=2.0, ge=1)


class ServeConfig(Config):
    """Serving options. The server listens on loopback unless told otherwise."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    admin_port: int | None = Field(default=None, ge=1, le=65535)
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=2, ge=1)
    target_busy: float = Field(default=0.7, gt=0, le=1)
    upscale_delay_s: float = Field(default=1.0, ge=0)
    downscale_delay_s: float = Field(default=60.0, ge=0)
    max_wait_ms: float = Field(default=100.0, gt=0)
    timeout_ms: float | None = Field(default=None, gt=0)
    batch_candidates: int = Field(default=2048, ge=1)
    max_candidates: int = Field(default=10_000, ge=1)
    max_body_bytes: int = Field(default=4_000_000, ge=1000)
    score: str | None = None
    users: Path | None = None
    reference: Path | None = None
    page: bool = True
    keys: Path | None = None
    access_log: bool = False
    swap: SwapConfig = SwapConfig()
    ready_timeout_s: float = Field(default=120.0, gt=0)

    @field_validator("score")
    @classmethod
    def _is_a_formula(cls, value: str | None) -> str | None:
        if value is not None:
            read_formula(value)
        return value

    @model_validator(mode="after")
    def _replicas(self) -> ServeConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self

    @property
    def admin(self) -> int:
        """The port of the admin routes: that after the public one, unless another is named."""
        return self.admin_port or self.port + 1
