"""The variables of a server's session: set while it lasts, gone after it, and no folder left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serve import fast_path
from serve.fast_path import FOLDER, applied, environment, without_haproxy


@pytest.fixture(autouse=True)
def haproxy_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with HAProxy, and an environment without variables of Serve."""
    monkeypatch.setattr(fast_path, "has_haproxy", lambda: True)
    for key in [k for k in os.environ if k.startswith("RAY_SERVE_")]:
        monkeypatch.delenv(key)


def test_applied_leaves_neither_variables_nor_a_folder() -> None:
    before = dict(os.environ)
    with applied(own_ray=True) as variables:
        folder = Path(variables[FOLDER])
        assert folder.stat().st_mode & 0o777 == 0o700
        assert os.environ[FOLDER] == str(folder)
        (folder / "haproxy.cfg").write_text("")
    assert not folder.exists()
    assert dict(os.environ) == before


def test_applied_keeps_what_is_set_and_passes_it_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "9999")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with applied(own_ray=True) as variables:
        assert variables["RAY_SERVE_HAPROXY_STATS_PORT"] == "9999"
    assert tmp_path.exists()
    assert os.environ["RAY_SERVE_HAPROXY_STATS_PORT"] == "9999"


def test_applied_makes_no_folder_for_a_cluster() -> None:
    with applied(own_ray=False) as variables:
        assert not Path(variables[FOLDER]).exists()


def test_environment_leaves_room_for_the_name_of_a_node() -> None:
    """HAProxy takes a socket's path of 97 characters; Ray puts the node's id of 56 in between."""
    sockets = [v for k, v in environment().items() if k.endswith("SOCKET_PATH")]
    assert len(sockets) == 2
    assert all(len(path) + 57 <= 97 for path in sockets)


def test_without_haproxy_says_so_and_asks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert without_haproxy() is None
    monkeypatch.setattr(fast_path, "has_haproxy", lambda: False)
    assert "x86-64 Linux" in (without_haproxy() or "")
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in environment()
    with applied(own_ray=True) as variables:
        assert FOLDER not in variables


def test_haproxy_that_outlives_its_ray_is_ended_with_the_session() -> None:
    wait = [sys.executable, "-c", "import time; time.sleep(60)"]
    with applied(own_ray=True) as variables:
        ours = subprocess.Popen([*wait, f"{variables[FOLDER]}/haproxy.cfg"])
        other = subprocess.Popen(wait)
    try:
        assert ours.wait(timeout=30) == -signal.SIGTERM
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
