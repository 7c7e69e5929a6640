"""Control, Follower, Watch and Shelf together, on real artifacts, without Ray: deploy, refuse, roll back, recover."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import version_builders as build

from compress.artifact import Artifact
from serve.config import ServeConfig, SwapConfig
from serve.control import Control, Refused, remembered
from serve.errors import RequestError
from serve.fleet import LEAST_ERRORS, FleetError, Order, Report, begin, order_of
from serve.follower import Follower, follow, load_as
from serve.ranker import Ranker
from serve.request import RankRequest, RankResponse
from serve.service import Service
from serve.shelf import Shelf
from trainer.errors import SlimrankError

ITEMS = [f"i{n}" for n in range(40)]
REQUESTS = [RankRequest(user={"user_id": 1000 + n, "age": 30 + n}, candidates=ITEMS, k=10) for n in range(8)]


class Replica:
    """A Service that follows a fleet, as a Ray Serve replica does."""

    def __init__(self, name: str, order: Order, config: ServeConfig) -> None:
        self.service = Service(Shelf(load_as(order.live)), config)
        self.follower = Follower(name, self.service.watch, order)

    async def ask(self, request: RankRequest) -> RankResponse:
        return await self.service.rank(request)


class Server:
    """A control and its replicas in one loop."""

    def __init__(self, artifact: Artifact, file: Path, swap: SwapConfig) -> None:
        self.config = ServeConfig(swap=swap, max_wait_ms=60_000)
        self.file = file
        self.control = Control(begin(artifact.version, str(artifact.folder), 1.0), self.config, file, "run")
        self.replicas: list[Replica] = []
        self.tasks: list[asyncio.Task[None]] = []

    def add(self, name: str) -> Replica:
        replica = Replica(name, order_of(self.control.fleet), self.config)
        self.replicas.append(replica)
        self.tasks.append(asyncio.create_task(follow(replica.follower, self.sync, again_s=0.02)))
        return replica

    async def sync(self, report: Report) -> Order:
        return await self.control.sync(report)


def serving(
    artifact: Artifact, tmp_path: Path, story: Callable[[Server], Awaitable[None]], replicas: int = 1, **swap: Any
) -> None:
    """Run a story against a server of some replicas."""

    @contextlib.asynccontextmanager
    async def server() -> AsyncIterator[Server]:
        made = Server(artifact, tmp_path / "fleet.json", SwapConfig(**swap))
        made.tasks.append(asyncio.create_task(made.control.tick()))
        for at in range(replicas):
            made.add(f"r{at}")
        try:
            yield made
        finally:
            for task in made.tasks:
                task.cancel()
            for replica in made.replicas:
                replica.service.engine.stop()

    async def run() -> None:
        async with asyncio.timeout(120), server() as made:
            await story(made)

    asyncio.run(run())


async def until(true: Callable[[], object]) -> None:
    while not true():
        await asyncio.sleep(0.01)


def same_scores(answer: RankResponse, artifact: Artifact, request: RankRequest) -> bool:
    expected = Ranker(artifact).rank(request)
    return [i.id for i in answer.items] == [i.id for i in expected.items] and np.allclose(
        [i.score for i in answer.items], [i.score for i in expected.items], atol=1e-6
    )


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What artifacts of a session are named by."""
    return tmp_path_factory.getbasetemp()


def test_deploy_under_load_answers_each_request_with_one_version(
    artifact: Artifact, base: Path, tmp_path: Path
) -> None:
    new = build.finer(base)

    async def story(server: Server) -> None:
        answers: list[tuple[RankRequest, RankResponse]] = []

        async def load(replica: Replica) -> None:
            while server.control.fleet.live != new.version or answers[-1][1].version != new.version:
                for request in REQUESTS:
                    answers.append((request, await replica.ask(request)))
                await asyncio.sleep(0)

        loads = [asyncio.create_task(load(replica)) for replica in server.replicas]
        await until(lambda: len(answers) > 20)
        result = await server.control.deploy(str(new.folder), ())
        await asyncio.gather(*loads)
        assert (result["live"], result["previous"], result["probation"]) == (new.version, artifact.version, True)
        assert [r["live"] for r in result["replicas"]] == [new.version] * 2
        found = server.control.fleet.versions[new.version].agreement
        assert found is not None
        assert found.source == "requests"
        assert found.overlap > 0.5
        by_version = {artifact.version: artifact, new.version: new}
        assert {a.version for _, a in answers} == set(by_version)
        rankers = {name: Ranker(a) for name, a in by_version.items()}
        expected = {
            (name, id(r)): [(i.id, pytest.approx(i.score, abs=1e-6)) for i in ranker.rank(r).items]
            for name, ranker in rankers.items()
            for r in REQUESTS
        }
        for request, answer in answers:
            assert [(i.id, i.score) for i in answer.items] == expected[answer.version, id(request)]

    serving(artifact, tmp_path, story, replicas=2)


def test_damaged_artifact_is_refused_and_the_old_one_serves(artifact: Artifact, base: Path, tmp_path: Path) -> None:
    bad = build.damaged(build.finer(base), tmp_path / "bad")

    async def story(server: Server) -> None:
        with pytest.raises(Refused, match="tables.bin: altered or cut short"):
            await server.control.deploy(str(bad), ())
        answer = await server.replicas[0].ask(REQUESTS[0])
        assert answer.version == artifact.version
        described = server.control.describe()
        assert described["candidate"] is None
        assert described["versions"][0]["state"] == "refused"
        await server.control.deploy(str(build.finer(base).folder), ())  # the whole one is taken afterwards

    serving(artifact, tmp_path, story)


@pytest.mark.parametrize("path", ["relative/folder", "/nowhere/at/all"])
def test_what_is_no_artifact_is_refused_before_any_replica_hears_of_it(
    artifact: Artifact, tmp_path: Path, path: str
) -> None:
    async def story(server: Server) -> None:
        with pytest.raises(SlimrankError, match="absolute path|not an artifact"):
            await server.control.deploy(path, ())
        assert server.control.fleet.generation == 1

    serving(artifact, tmp_path, story)


def test_version_that_ranks_otherwise_is_refused_then_overridden_by_name(
    artifact: Artifact, base: Path, tmp_path: Path
) -> None:
    other = build.stranger(base)

    async def story(server: Server) -> None:
        for request in REQUESTS:
            await server.replicas[0].ask(request)
        with pytest.raises(Refused, match=r"overlap 0\.\d+ with the live version on 8 recent requests"):
            await server.control.deploy(str(other.folder), ())
        assert (await server.replicas[0].ask(REQUESTS[0])).version == artifact.version
        await until(lambda: server.replicas[0].service.shelf.loaded.keys() == {artifact.version})  # it is let go
        await server.control.deploy(str(other.folder), ("overlap", "calibration"))
        assert same_scores(await server.replicas[0].ask(REQUESTS[0]), other, REQUESTS[0])
        assert "overlap" in server.control.fleet.versions[other.version].overridden

    serving(artifact, tmp_path, story, min_overlap=0.9)


def test_without_requests_the_golden_rows_are_compared(artifact: Artifact, base: Path, tmp_path: Path) -> None:
    async def story(server: Server) -> None:
        with pytest.raises(Refused, match="golden rows"):
            await server.control.deploy(str(build.stranger(base).folder), ())
        await server.control.deploy(str(build.finer(base).folder), ())
        found = server.control.fleet.versions[build.finer(base).version].agreement
        assert found is not None
        assert found.source == "golden rows"

    serving(artifact, tmp_path, story, min_overlap=0.8)


def test_damaged_copy_of_the_previous_version_is_refused_and_rollback_still_works(
    artifact: Artifact, base: Path, tmp_path: Path
) -> None:
    bad = build.damaged(artifact, tmp_path / "bad")

    async def story(server: Server) -> None:
        await server.control.deploy(str(build.finer(base).folder), ())
        with pytest.raises(Refused, match="altered"):
            await server.control.deploy(str(bad), ())
        assert (await server.control.roll_back())["live"] == artifact.version
        assert server.control.fleet.versions[artifact.version].path == str(artifact.folder)
        assert (await server.replicas[0].ask(REQUESTS[0])).version == artifact.version

    serving(artifact, tmp_path, story)


def test_rollback_is_a_flip_to_what_is_still_loaded(artifact: Artifact, base: Path, tmp_path: Path) -> None:
    new = build.finer(base)

    async def story(server: Server) -> None:
        with pytest.raises(FleetError, match="no version before"):
            await server.control.roll_back()
        await server.control.deploy(str(new.folder), ())
        held = {r.service.shelf.loaded[artifact.version] for r in server.replicas}
        result = await server.control.roll_back()
        assert (result["live"], result["previous"]) == (artifact.version, new.version)
        assert {r.service.shelf.live for r in server.replicas} == held  # the same objects: nothing was loaded
        for replica in server.replicas:
            assert same_scores(await replica.ask(REQUESTS[0]), artifact, REQUESTS[0])

    serving(artifact, tmp_path, story, replicas=2)


def test_version_that_fails_on_probation_is_taken_back_and_no_request_fails(
    artifact: Artifact, base: Path, tmp_path: Path
) -> None:
    bad = build.without_catalogue(base)

    async def story(server: Server) -> None:
        await server.replicas[0].ask(REQUESTS[0])
        with pytest.raises(Refused, match="1 of them unreadable"):
            await server.control.deploy(str(bad.folder), ())
        await server.control.deploy(str(bad.folder), ("overlap", "calibration"))
        for at in range(2 * LEAST_ERRORS):
            answer = await server.replicas[0].ask(REQUESTS[at % 8])
            assert answer.version == artifact.version  # what the new version cannot answer, the one before does
        await until(lambda: server.control.fleet.live == artifact.version)
        entry = server.control.fleet.versions[bad.version]
        assert entry.state == "refused"
        assert "requests that the version before it answered" in str(entry.reason)
        assert server.control.fleet.previous is None
        await until(lambda: server.replicas[0].service.shelf.loaded.keys() == {artifact.version})

    serving(artifact, tmp_path, story)


def test_requests_that_no_version_can_read_take_none_back(artifact: Artifact, base: Path, tmp_path: Path) -> None:
    new = build.finer(base)
    wrong = RankRequest(user={"age": "old"}, candidates=ITEMS, k=1)

    async def story(server: Server) -> None:
        await server.control.deploy(str(new.folder), ())
        for _ in range(10 * LEAST_ERRORS):
            with pytest.raises(RequestError, match="age"):
                await server.replicas[0].ask(wrong)
        before = server.replicas[0].follower.report().health[new.version]
        assert (before.requests, before.errors) == (10 * LEAST_ERRORS, 0)
        await server.control.sync(server.replicas[0].follower.report())
        assert server.control.fleet.live == new.version

    serving(artifact, tmp_path, story)


def test_replica_that_starts_later_serves_what_is_live_and_holds_what_came_before(
    artifact: Artifact, base: Path, tmp_path: Path
) -> None:
    new = build.finer(base)

    async def story(server: Server) -> None:
        await server.control.deploy(str(new.folder), ())
        late = server.add("late")
        assert (await late.ask(REQUESTS[0])).version == new.version
        await until(lambda: artifact.version in late.service.shelf.loaded)
        await server.control.roll_back()
        assert (await late.ask(REQUESTS[0])).version == artifact.version

    serving(artifact, tmp_path, story)


@pytest.mark.parametrize("kept", [True, False])
def test_control_that_starts_again_goes_on(artifact: Artifact, base: Path, tmp_path: Path, kept: bool) -> None:
    """From its file, or where that is lost, from what a replica was last ordered."""
    new = build.finer(base)

    async def story(server: Server) -> None:
        await server.control.deploy(str(new.folder), ())
        old, server.control = server.control, None  # type: ignore[assignment]  # replicas find nobody
        await asyncio.sleep(0.1)
        assert (await server.replicas[0].ask(REQUESTS[0])).version == new.version
        if not kept:
            server.file.unlink()
        fleet = remembered(server.file, "run")
        assert (fleet == old.fleet) if kept else fleet is None
        first = begin(artifact.version, str(artifact.folder), 1.0)
        server.control = Control(fleet or first, server.config, server.file, "run")
        await until(lambda: server.control.fleet.live == new.version and server.control.living())
        assert (await server.replicas[0].ask(REQUESTS[0])).version == new.version
        result = await server.control.roll_back()
        assert result["live"] == artifact.version
        assert (await server.replicas[0].ask(REQUESTS[0])).version == artifact.version

    serving(artifact, tmp_path, story)


def test_memory_of_another_run_or_damaged_is_not_taken(artifact: Artifact, tmp_path: Path) -> None:
    Control(begin("v1", "/x", 0.0), ServeConfig(), tmp_path / "fleet.json", "run")
    assert remembered(tmp_path / "fleet.json", "run") is not None
    assert remembered(tmp_path / "fleet.json", "another") is None
    (tmp_path / "fleet.json").write_text('{"run": "run", "fleet"')
    assert remembered(tmp_path / "fleet.json", "run") is None
