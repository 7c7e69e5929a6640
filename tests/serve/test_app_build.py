"""serve/app.py: what a Ray Serve config file builds. Starts no Ray."""

from __future__ import annotations

import pytest
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as built

from serve.app import build
from trainer.errors import ConfigError


@pytest.mark.filterwarnings("ignore:.*look_back_period_s.*:FutureWarning")  # Ray reads the interval elsewhere
def test_build_makes_an_application_of_two_deployments() -> None:
    application = built(build, {"artifact": "/a", "config": {"max_replicas": 3}})
    assert application._bound_deployment.name == "ranker"
    artifact, config, run, fleet = application._bound_deployment.init_args
    assert (artifact, config["max_replicas"], run) == ("/a", 3, "/a")
    assert fleet._bound_deployment.name == "fleet"


@pytest.mark.parametrize(
    ("args", "key"),
    [({}, "artifact"), ({"artifact": "/a", "config": {"ports": 1}}, "config.ports"), ({"artifact": "/a", "x": 1}, "x")],
)
def test_build_names_the_key_that_is_wrong(args: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=f"args.*{key}"):
        build(args)
