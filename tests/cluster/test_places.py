"""Places on the command line: paths and URIs, and where only a folder will do."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from cluster.options import FOLDER, PLACE
from trainer.storage import RemotePath


def test_a_place_is_a_path_or_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert PLACE.convert("run", None, None) == tmp_path / "run"
    assert PLACE.convert(f"file://{tmp_path}/run", None, None) == tmp_path / "run"
    found = PLACE.convert("mock:///bucket/run", None, None)
    assert isinstance(found, RemotePath)
    assert str(found) == "mock:///bucket/run"


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [(FOLDER, "s3://b/x", "must be a folder of this machine"), (PLACE, "none://b/x", "cannot be resolved")],
)
def test_a_uri_that_will_not_do_is_a_usage_error(kind: click.ParamType, value: str, words: str) -> None:
    with pytest.raises(click.BadParameter, match=words):
        kind.convert(value, None, None)
