"""Connect to Ray: a local one of our own, the cluster of the job we run in, or the one at an address.

Only a Ray that this process started is stopped again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from serve.fast_path import applied
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.storage import Location

# said before Ray is imported or started: they are read once
ALWAYS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would end a search half done as if it were whole
}
QUIET = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "TORCH_LOGS": "-torch.fx",
}


@contextlib.contextmanager
def ray_session(address: str | None = None, *, debug: bool = False) -> Iterator[None]:
    """Ray, connected for the length of the block.

    Without an address: the cluster named by RAY_ADDRESS (set inside a submitted job), else a local Ray of our own.
    Raises: ConfigError when there is no cluster at the address.
    """
    for key, value in ALWAYS.items():
        os.environ.setdefault(key, value)
    if not debug:
        quiet()
    import ray

    if ray.is_initialized():
        yield
        return
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    level = logging.INFO if debug else logging.ERROR
    own = where == "local"
    with applied(own_ray=own) as fast:  # a Ray of our own inherits it, on a cluster it goes with the driver
        try:
            ray.init(
                address=where,
                logging_level=level,
                log_to_driver=debug,
                **({"include_dashboard": False} if own else {"runtime_env": {"env_vars": beyond_the_job(fast)}}),
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"no Ray cluster at {where}: {str(error).splitlines()[0]}: check --address") from None
        # a request to terminate unwinds like Ctrl-C, so that what was started is stopped (Ray's own handler aborts)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            yield
        finally:
            ray.shutdown()


def beyond_the_job(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that the job we run in does not set for all its processes: Ray refuses a variable that both name."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    set_already = job.get("runtime_env", {}).get("env_vars", {})
    return {key: value for key, value in variables.items() if key not in set_already}


def check_scratch(out: Location) -> None:
    """Raises: ConfigError when results for a storage would be written into a scratch folder that workers lack."""
    import ray

    from trainer.results import SCRATCH

    if not isinstance(out, Path) and not os.environ.get(SCRATCH) and sum(n["Alive"] for n in ray.nodes()) > 1:
        raise ConfigError(
            f"{out}: workers on several nodes write into one folder before it is copied up: set {SCRATCH} to a folder "
            f"that all nodes share"
        )


def quiet() -> None:
    """Keep the libraries' notes off the user's terminal."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore")
    libraries = ("ray", "ray.data", "ray.train", "ray.tune", "ray.serve", "torchrec", "fbgemm_gpu", "torch")
    for name in libraries:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)
