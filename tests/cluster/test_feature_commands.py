"""`slimrank data users`, `slimrank catalogue build`, and where a serve section's paths point."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1] / "compress"))  # its builders; the package `compress` stays itself

from compress_builders import World, artifact_in, world_in  # noqa: E402

from cluster.cli import main  # noqa: E402
from cluster.runs import serve_config  # noqa: E402
from serve.shelf import load  # noqa: E402


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_in(tmp_path_factory.getbasetemp())


def run(*words: str | Path) -> Result:
    """The command's result; anything but a clean exit is a defect."""
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_data_users_writes_what_a_server_loads(world: World, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(world.run.model_dump(mode="json")))
    words = ["data", "users", "--config", tmp_path / "run.yaml", "--out", tmp_path / "deep" / "users.arrow"]
    told = json.loads(run(*words, "--json").stdout.splitlines()[-1])
    assert told["rows"] == len(world.raw)
    assert told["known"] == len(set(world.raw["user_id"].to_pylist()))
    assert told["columns"] == ["recent", "town", "age"]
    served = load(str(world.artifact(world.uniform(8)).folder), users=told["users"])
    assert served.ranker.reader.users is not None
    assert len(served.ranker.reader.users) == told["known"]
    assert f"{told['known']} users with recent, town, age" in run(*words).stdout.replace("\n", " ")


def test_data_users_names_an_input_that_is_not_there(world: World, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(world.run.model_dump(mode="json")))
    words = ["data", "users", "--config", tmp_path / "run.yaml", "--input", tmp_path / "no.parquet"]
    result = run(*words, "--out", tmp_path / "users.arrow")
    assert result.exit_code == 2
    assert "no file matches" in result.stderr
    assert not (tmp_path / "users.arrow").exists()


def test_catalogue_build_tells_the_version_that_will_serve(
    world: World, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    artifact = artifact_in(tmp_path_factory.getbasetemp()).folder
    items = world.dataset.items()
    assert items is not None
    pq.write_table(items.slice(0, 20), tmp_path / "items.parquet")
    words = ["catalogue", "build", "--artifact", artifact, "--items", tmp_path / "items.parquet"]
    told = json.loads(run(*words, "--out", tmp_path / "cat.arrow", "--json").stdout.splitlines()[-1])
    assert told["items"] == 20
    assert load(str(artifact), catalogue=told["catalogue"]).version == told["version"]
    pq.write_table(items.drop_columns(["price"]), tmp_path / "items.parquet")
    refused = run(*words, "--out", tmp_path / "cat.arrow")
    assert refused.exit_code == 2
    assert "'price'" in refused.stderr
    assert load(str(artifact), catalogue=told["catalogue"]).version == told["version"]  # what was there is still whole


def test_paths_of_a_serve_section_are_relative_to_its_yaml(world: World, tmp_path: Path) -> None:
    artifact = world.artifact(world.uniform(8)).folder
    (tmp_path / "serve.yaml").write_text("users: users.arrow\nreference: /elsewhere/fp32\n")
    options = serve_config(artifact, tmp_path / "serve.yaml", None, None)
    assert options.users == tmp_path / "users.arrow"
    assert options.reference == Path("/elsewhere/fp32")
    assert options.keys is None


@pytest.mark.parametrize(
    ("key", "words"), [("users", "no such file: write it with 'slimrank data users'"), ("reference", "not an artifact")]
)
def test_serve_names_a_file_that_is_not_there_before_it_starts(
    world: World, tmp_path: Path, key: str, words: str
) -> None:
    (tmp_path / "serve.yaml").write_text(f"{key}: nothing\n")
    artifact = world.artifact(world.uniform(8)).folder
    result = run("serve", "--artifact", artifact, "--config", tmp_path / "serve.yaml")
    assert result.exit_code == 2
    assert words in result.stderr
    assert str(tmp_path / "nothing") in result.stderr
