"""The page in a real browser, from the real app on bare uvicorn: a user is chosen by keyboard, the ranking appears."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import uvicorn

sys.path.insert(0, str(Path(__file__).parents[1] / "compress"))  # its builders; the package `compress` stays itself
sys.path.insert(0, str(Path(__file__).parent))

from browser import BROWSER, Tab, chromium  # noqa: E402
from compress_builders import artifact_in, quiet, world_in  # noqa: E402

from compress.item_file import build_catalogue  # noqa: E402
from serve.api import make_api  # noqa: E402
from serve.config import ServeConfig  # noqa: E402
from serve.fast_path import free_ports  # noqa: E402
from serve.service import Service  # noqa: E402
from serve.shelf import Shelf, load  # noqa: E402
from trainer.data.users import write_users  # noqa: E402

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
HOSTILE = '<img src=x onerror="document.title=\'hit\'"><script>document.title="hit"</script>'
RANKED = "document.body.dataset.ranked && !document.body.classList.contains('busy')"
SHOWN = "[...document.querySelectorAll('#{0} li')].map((li) => [li.dataset.id, li.children[1].textContent])"


@dataclass(frozen=True)
class Site:
    """The server's address, and the service behind it."""

    url: str
    service: Service


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A catalogue whose titles are hostile, users' features, and an fp32 reference."""
    folder = tmp_path_factory.mktemp("page")
    world, artifact = world_in(tmp_path_factory.getbasetemp()), artifact_in(tmp_path_factory.getbasetemp())
    items = world.dataset.items()
    assert items is not None
    titles = [f"{HOSTILE}{i}" for i in items["item_id"].to_pylist()]
    items = items.set_column(items.column_names.index("item_title"), "item_title", pa.array(titles))
    pq.write_table(items, folder / "items.parquet")
    build_catalogue(artifact.folder, folder / "items.parquet", folder / "cat.arrow")
    write_users(world.run.data, folder / "users.arrow", quiet)
    (port,) = free_ports(1)
    config = ServeConfig(
        port=port,
        users=folder / "users.arrow",
        reference=world.artifact(world.uniform(32)).folder,
        max_wait_ms=60_000,
    )
    service = Service(
        Shelf(load(str(artifact.folder), users=config.users, catalogue=str(folder / "cat.arrow"))), config
    )
    server = uvicorn.Server(uvicorn.Config(make_api(service), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended"
        time.sleep(0.02)
    yield Site(f"http://127.0.0.1:{port}", service)
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def expected(site: Site, user: str) -> dict[str, Any]:
    return httpx.post(f"{site.url}/v1/compare", json={"user": {"user_id": user}}, timeout=60).json()


def test_a_user_is_typed_and_the_ranking_appears(site: Site, tab: Tab) -> None:
    tab.open(f"{site.url}/")
    tab.wait(RANKED)
    first = tab.evaluate("at('user').value")
    chosen = next(u for u in (site_user(site, at) for at in (3, 4)) if u != first)
    tab.evaluate("at('user').focus(); at('user').select()")
    tab.type(chosen)
    tab.press("Enter")
    tab.wait(f"{RANKED} && location.hash === '#user={chosen}'")
    told = expected(site, chosen)
    for node, side in (("live", told["live"]), ("reference", told["reference"])):
        assert tab.evaluate(SHOWN.format(node)) == [[str(i["id"]), i["title"]] for i in side["items"]]
    text = tab.evaluate("document.body.innerText")
    assert told["live"]["version"] in text
    assert "+" in told["live"]["version"]  # the catalogue is named too
    assert told["reference"]["version"] in text
    moved = sum(i["other_rank"] != i["rank"] for i in told["live"]["items"])
    assert tab.evaluate("document.querySelectorAll('#live .up, #live .down, #live .new').length") == moved
    assert f"{round(told['overlap'] * 10)} of 10" in text
    age = told["user"].get("age", "")
    assert tab.evaluate("document.querySelector('[data-column=age]').value") == (json.dumps(age) if age else "")


def site_user(site: Site, at: int) -> str:
    users = site.service.shelf.live.ranker.reader.users
    assert users is not None
    return users.ids[at].as_py()


def test_a_changed_feature_changes_the_ranking(site: Site, tab: Tab) -> None:
    user = site_user(site, 5)
    tab.open("about:blank")
    tab.open(f"{site.url}/#user={user}")
    tab.wait(f"{RANKED} && state.took.length >= 5")
    before = tab.evaluate("[...document.querySelectorAll('#live .score')].map((s) => s.textContent).join()")
    tab.evaluate("at('more').open = true; document.querySelector('[data-column=age]').focus()")
    tab.evaluate("document.querySelector('[data-column=age]').select()")
    tab.type("99")
    tab.press("Enter")
    tab.wait(
        f"{RANKED} && [...document.querySelectorAll('#live .score')].map((s) => s.textContent).join() !== '{before}'"
    )
    assert tab.evaluate("document.querySelector('[data-column=age]').value") == "99"


def test_errors_are_shown_plainly_and_go_away(site: Site, tab: Tab) -> None:
    tab.open("about:blank")
    tab.open(f"{site.url}/")
    tab.wait(f"{RANKED} && state.took.length >= 5")
    tab.evaluate("document.querySelector('[data-column=age]').value = 'old'; rank()")
    tab.wait("!at('error').hidden && at('error').textContent.startsWith('user.age: must be a number')")
    tab.evaluate("document.querySelector('[data-column=age]').value = ''; rank()")
    tab.wait(f"at('error').hidden && {RANKED}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_page_fits_its_window(site: Site, tab: Tab, width: int, scheme: str, tmp_path: Path) -> None:
    tab.open("about:blank")
    tab.open(f"{site.url}/", width, 800, scheme)
    tab.wait(RANKED)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    cut = "[...document.querySelectorAll('main *')].filter((n) => n.getBoundingClientRect().right > innerWidth + 1)"
    assert tab.evaluate(f"{cut}.length") == 0
    beside = tab.evaluate("at('other').getBoundingClientRect().left > 300")
    assert beside == (width == 1200)
    tab.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"


def test_every_control_can_be_reached_by_keyboard(site: Site, tab: Tab) -> None:
    tab.open("about:blank")
    tab.open(f"{site.url}/")
    tab.wait(RANKED)
    reached = []
    for _ in range(8):
        tab.press("Tab")
        reached.append(tab.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"user", "next", "BUTTON", "SUMMARY", "A"} <= set(reached)


def test_page_asks_its_own_server_alone_and_runs_no_title(site: Site, tab: Tab) -> None:
    """Comes last: it judges all that the tab did before."""
    assert tab.evaluate("document.title") == "slimrank"
    assert tab.evaluate("document.querySelectorAll('main img, main script').length") == 0
    strangers = [url for url in tab.asked if not url.startswith((site.url, "data:", "about:"))]
    assert strangers == []
    assert tab.errors == []
