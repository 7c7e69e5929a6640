"""`slimrank tune`: a checkpoint and a budget of quality become the smallest artifact that holds it.

    OUT/search.json    what was asked, of what, on which machine: written first
    OUT/trials.jsonl   every finished trial as it finishes, which --resume goes on from
    OUT/tune.json      the result: front, choice, gate, tables, peers;  OUT/plan.yaml  the chosen plan
    OUT/artifact/      its artifact

Reads like the recipe: prepare, search, look closely at a few, choose, gate, write. Ray must be connected.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from compress.artifact import load_artifact
from compress.compressor import compress, data_of, resolve
from compress.config import SearchConfig, Space
from compress.errors import ArtifactError, PlanError
from compress.methods.calibrate import Tuned, with_head
from compress.methods.dense import DensePlan
from compress.model import translate_rows, whole_table
from compress.peers import PEERS, Peer, whole_id_maps_bytes
from compress.search.budget import parse_budget
from compress.search.decide import candidates, chain, chance, described, front_of, gate, in_time, ms_of, why
from compress.search.finals import (
    Classroom,
    Finalist,
    calibrated,
    finalist_of,
    judged,
    measured_ms,
    tasks_of,
    tuned_control,
    worth_calibrating,
)
from compress.search.latency import MachineCosts
from compress.search.preparation import MEASURED_ROWS, Preparation, measured_loss, prepare
from compress.search.ray_tune import in_parallel, read_trials, run_trials
from compress.search.sampler import Limits
from compress.search.space import Params, grid, knobs, setting, start_points
from compress.search.trials import Sample, Shared, quality
from compress.search.working_set import score
from trainer.checkpoint import Checkpoint, open_checkpoint
from trainer.data.dataset import Dataset, open_dataset
from trainer.data.reader import Rows, spread_rows
from trainer.errors import DataError, SlimrankError
from trainer.files import check_new, write_json, write_text
from trainer.metrics import auc, normalized_entropy
from trainer.progress import ReportProgress
from trainer.storage import Location

SAME_SCORES = 1e-4  # log-odds: an artifact and its trial differ by the order of fp32 sums at most
CHECKED_ROWS = 20_000  # of the gate's: that the artifact is shown to score as its trial did
TUNED_ROWS = 200_000  # of the training split at most: a working set of them is held in memory


def tune(
    checkpoint_path: str | Location,
    data: str | Location,
    out: Path,
    search: SearchConfig,
    *,
    resume: bool,
    progress: ReportProgress,
    earlier: Path | None = None,
) -> dict[str, Any]:
    """Search for the smallest artifact that holds the NE budget, and write it; Ray must be connected.

    `earlier`: the folder of another search, whose front is tried first. Returns what `slimrank tune --json` prints.
    Raises: SlimrankError when checkpoint and data do not belong together, or `out` holds something and not `resume`.
    """
    started = time.monotonic()
    out = Path(out).absolute()
    if not resume:
        check_new(out)
    first = earlier_front(earlier, search) if earlier is not None else []
    if search.max_table_bytes is not None:
        parse_budget(search.max_table_bytes, 1)  # before the long work
    checkpoint = open_checkpoint(checkpoint_path)
    dataset = data_of(checkpoint, open_dataset(data))
    before = search_of(out)
    if before is not None:
        check_same_search(out, before, checkpoint, search)
    costs = None if before is None else MachineCosts.model_validate(before["machine_costs"])
    ready = prepare(checkpoint, dataset, search, in_parallel, progress, costs)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "search.json", asked_of(ready, checkpoint_path, data, before))
    search = search.model_copy(update={"space": ready.shared.space})
    first = [params for params in first if within(search.space, params)]
    limits = Limits(search.max_delta_ne, float("inf") if search.max_ms is None else search.max_ms)
    origins = {"earlier": first, "start": starts(ready.shared, search)}
    trials, interrupted = run_trials(ready.shared, search, limits, out, origins, progress)
    found = result_of(ready, trials, out, interrupted, progress)
    found["seconds"] = round(time.monotonic() - started, 1)
    write_json(out / "tune.json", found)
    return {**found, "artifact": str(out / "artifact")}


def starts(shared: Shared, search: SearchConfig) -> list[Params]:
    """What the search begins with; a grid has all its points here."""
    if search.algorithm == "grid":
        return grid(shared.space, search.trials, search.seed)
    return start_points(shared.space, min(search.start, search.trials))


def result_of(
    ready: Preparation,
    trials: Sequence[Mapping[str, Any]],
    out: Path,
    interrupted: bool,
    progress: ReportProgress,
) -> dict[str, Any]:
    """Look closely at the front, choose, gate, and write the artifact; returns tune.json but for its seconds."""
    search, shared = ready.search, ready.shared
    front = front_of(trials)
    if not front:
        failed = [t["error"] for t in trials if "error" in t]
        raise DataError(f"no plan could be tried: {failed[0] if failed else 'every trial was stopped or lost'}")
    finalists = [finalist_of(shared, t) for t in front]
    control: Tuned | None = None
    if search.calibrate is not None and not interrupted:
        more, control = calibrate_some(ready, front, trials, progress)
        with (out / "trials.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(f.trial) + "\n" for f in more)
        front = front_of([*front, *(f.trial for f in more)])
        every = {f.trial["number"]: f for f in [*finalists, *more]}
        finalists = [every[t["number"]] for t in front]
    progress("select", 0, len(finalists))
    judgements = in_parallel(judged, (shared, ready.selection), finalists)
    progress("select", len(finalists), len(finalists))
    points = [described(f.trial, j) for f, j in zip(finalists, judgements, strict=True)]
    order = candidates(points, search.max_delta_ne, None)
    for index in order[: search.finalists]:
        resolved = resolve(finalists[index].plan, shared.planner.profiles)
        points[index]["measured_ms"] = round(measured_ms(ready.selection, finalists[index], resolved), 4)
    order = candidates(points, search.max_delta_ne, search.max_ms)
    gate_sample = ready.sample(ready.gate_rows)
    gate_rows = len(gate_sample.labels)
    budget = search.max_delta_ne
    rows = (ready.rungs[-1], len(ready.selection.labels), gate_rows)
    chances = [chance(point, budget, rows) for point in points]
    links = chain(points, order, chances, search.gate_tries)
    progress("gate", 0, len(links))
    qualities = in_parallel(judged, (shared, gate_sample), [finalists[i] for i in links])
    progress("gate", len(links), len(links))
    chosen, verdict = gate(links, qualities, budget, gate_rows)
    verdict = in_time(verdict, ms_of(points[chosen]), search.max_ms)
    winner = finalists[chosen]
    if winner.tuned is not None and control is not None:
        verdict["control"] = control_on(gate_sample, control)
    write_winner(ready, winner, gate_sample, out, {"gate": verdict}, progress)
    return {
        "artifact": "artifact",
        "trials": len(trials),
        "failed_trials": sum("error" in t for t in trials),
        "stopped_trials": sum(bool(t.get("stopped")) for t in trials),
        "interrupted": interrupted,
        "front": points,
        "chosen": chosen,
        "why": why(points, chosen, verdict, search.max_delta_ne),
        "gate": verdict,
        "tables": tables_of(ready, winner, progress),
        "peers": peers_of(ready, progress),
        "table_bytes_fp32": shared.planner.fp32_bytes,
        "working_set_bytes": sum(r.working.bytes for r in shared.rungs),
        "lineage": json.loads((out / "artifact" / "manifest.json").read_text(encoding="utf-8"))["lineage"],
    }


def calibrate_some(
    ready: Preparation,
    front: Sequence[Mapping[str, Any]],
    trials: Sequence[Mapping[str, Any]],
    progress: ReportProgress,
) -> tuple[list[Finalist], Tuned | None]:
    """The finalists worth it with their heads fine-tuned, and the fp32 model's head fine-tuned the same way."""
    search, dataset, asked = ready.search, ready.dataset, ready.search.calibrate
    chosen = worth_calibrating(front, search.max_delta_ne, search.finalists)
    if asked is None or not chosen:
        return [], None
    taught = min(asked.steps * asked.batch_size, TUNED_ROWS)
    train = ready.sample(spread_rows(dataset, "train", taught))
    own_rows = np.arange(min(len(ready.search_rows), asked.held_rows))
    held = ready.sample(ready.search_rows.take(own_rows)).working  # the gate's rows have no part in a head
    room = Classroom(ready.shared, train, held, ready.lessons, asked, dataset.negative_rate)
    own = [finalist_of(ready.shared, t) for t in chosen]
    progress("calibrate", 0, len(own))
    *made, control = in_parallel(calibrated_or_control, room, [*own, None])
    progress("calibrate", len(own), len(own))
    return [
        replace(f, trial={**f.trial, "number": len(trials) + at, "finished_s": trials[-1]["finished_s"]})
        for at, f in enumerate(made)
    ], control


def calibrated_or_control(room: Classroom, finalist: Finalist | None) -> Finalist | Tuned:
    """One item of what is fine-tuned side by side."""
    return tuned_control(room) if finalist is None else calibrated(room, finalist)


def control_on(sample: Sample, control: Tuned) -> dict[str, Any]:
    """Quality of the fp32 model with its head fine-tuned: what is gained there is not due to compression."""
    logits = score(with_head(sample.working, control.dense), None)
    return quality(sample.labels, logits, sample.reference, tasks_of(sample.working.transform), 0)


def write_winner(
    ready: Preparation,
    winner: Finalist,
    sample: Sample,
    out: Path,
    metrics: Mapping[str, Any],
    progress: ReportProgress,
) -> None:
    """Write the artifact and the plan; show that the artifact scores as the trial did, and only then let it be it.

    Raises: ArtifactError when it does not.
    """
    artifact = out / ".artifact"
    shutil.rmtree(artifact, ignore_errors=True)  # of a search that was killed here
    compress(
        ready.checkpoint,
        ready.dataset,
        winner.plan,
        artifact,
        ready.profiles,
        progress,
        metrics=metrics,
        dense=winner.tuned,
        head=winner.head if winner.plan.dense != DensePlan() else None,
    )
    rows = np.arange(min(len(sample.labels), CHECKED_ROWS))
    expected = score(sample.working.take(rows), resolve(winner.plan, ready.shared.planner.profiles), winner.head)
    check_artifact(artifact, ready.dataset, ready.gate_rows.take(rows), expected)
    shutil.rmtree(out / "artifact", ignore_errors=True)  # of the same search before it went on
    artifact.rename(out / "artifact")
    write_text(out / "plan.yaml", yaml.safe_dump(winner.plan.model_dump(mode="json"), sort_keys=False))


def check_artifact(path: Path, dataset: Dataset, rows: Rows, expected: np.ndarray) -> None:
    """Score rows with the written artifact itself.

    Raises: ArtifactError when it does not give the scores that its trial did.
    """
    model = load_artifact(path).model
    found = model.score_encoded(translate_rows(model, dataset, rows.encoded))
    worst = float(np.abs(found - expected).max())
    if worst > SAME_SCORES:
        raise ArtifactError(
            f"{path}: scores differ from the trial's by {worst:.2g}: this is a defect, please report it"
        )


def tables_of(ready: Preparation, winner: Finalist, progress: ReportProgress) -> dict[str, dict[str, Any]]:
    """What became of each table, and what that alone was predicted and measured to cost: nats of mean log loss."""
    planner = ready.shared.planner
    resolved = resolve(winner.plan, ready.profiles)
    some = ready.selection.take(np.arange(min(len(ready.selection.labels), MEASURED_ROWS)))
    slim = resolve(winner.plan, planner.profiles)
    progress("tables", 0, len(slim))
    measured = in_parallel(measured_loss, (some, slim), list(slim))
    progress("tables", len(slim), len(slim))
    believed = planner.plan(setting(ready.shared.space, winner.trial["params"])).predicted
    found = {}
    for (name, part), (loss, error) in zip(resolved.items(), measured, strict=True):
        info, layout = planner.profiles[name].info, part.layout
        found[name] = {
            "rows": info.num_embeddings,
            "dim": info.embedding_dim,
            "tiers": [asdict(tier) for tier in part.stored.tiers],
            "centroids": part.stored.centroids,
            "own_rows": layout.kept,
            "centroid_rows": layout.zone - layout.kept,
            "forgotten_rows": info.num_embeddings - layout.zone,
            "bytes": part.stored.bytes,
            "id_map_bytes": part.id_map_bytes,
            "fp32_bytes": info.fp32_bytes,
            "predicted": believed[name],
            "measured": loss,
            "error": error,
        }
    return found


def peers_of(ready: Preparation, progress: ReportProgress) -> list[dict[str, Any]]:
    """Other people's quantization of the same checkpoint, on the selection rows; what cannot be had is left out."""
    ids = whole_id_maps_bytes(ready.profiles)
    progress("peers", 0, len(PEERS))
    scored = in_parallel(peer_quality, (ready.selection, ready.shared.seed), PEERS)
    progress("peers", len(PEERS), len(PEERS))
    tables = ready.dataset.transform.tables
    return [
        {"name": peer.label, "table_bytes": peer.table_bytes(tables) + ids, "id_map_bytes": ids, **found}
        for peer, found in zip(PEERS, scored, strict=True)
        if found is not None
    ]


def peer_quality(shared: tuple[Sample, int], peer: Peer) -> dict[str, Any] | None:
    """Quality of a peer on a sample; None where a dim cannot be packed."""
    sample, seed = shared
    try:
        logits = peer.logits(sample.working)
        peer.table_bytes(sample.working.transform.tables)
    except PlanError:
        return None
    return quality(sample.labels, logits, sample.reference, tasks_of(sample.working.transform), seed)


# -- what a search says of itself --------------------------------------------------------------------------------------


def search_of(out: Path) -> dict[str, Any] | None:
    """The search.json of a search that goes on; None where one begins."""
    path = out / "search.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def asked_of(
    ready: Preparation,
    checkpoint_path: str | Location,
    data: str | Location,
    before: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """search.json: what was asked, of what, on which machine; one that goes on keeps its command and its beginning."""
    shared, checkpoint, selection = ready.shared, ready.checkpoint, ready.selection
    tables = [whole_table(t, t.num_embeddings) for t in ready.dataset.transform.tables.values()]
    plain, latency = shared.variants.get("fp32"), shared.planner.latency
    dense_bytes = sum(t.nbytes for t in checkpoint.dense_state().values())
    table_fp32 = shared.planner.fp32_bytes
    begun = {
        "command": shlex.join(["slimrank", *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {
        "version": 1,
        **(begun if before is None else {name: before[name] for name in begun}),
        "config": ready.search.model_dump(mode="json"),
        "checkpoint": {"path": str(checkpoint_path), "version": checkpoint.version, "name": checkpoint.run.name},
        "data": {"path": str(data), "fingerprint": checkpoint.fingerprint},
        "fp32": {
            "table_bytes": table_fp32,
            "artifact_bytes": table_fp32 + whole_id_maps_bytes(ready.profiles) + dense_bytes + shared.other_bytes,
            "ne": normalized_entropy(selection.labels[:, 0], selection.reference[:, 0]),
            "auc": auc(selection.labels[:, 0], selection.reference[:, 0]),
            "ms": None if plain is None else plain.ms + latency.request.lookup_ms(tables, latency.costs),
        },
        "samples": {
            "search": ready.rungs[-1],
            "selection": len(selection.labels),
            "gate": len(ready.gate_rows),
            "rungs": ready.rungs,
            "working_set_bytes": sum(r.working.bytes for r in shared.rungs),
        },
        "knobs": list(knobs(shared.space)),
        "machine_costs": latency.costs.model_dump(mode="json"),
        "hardware": {"machine": latency.costs.machine, "cpus": os.cpu_count()},
        "versions": {n: version(n) for n in ("torch", "torchrec", "fbgemm-gpu-cpu", "ray", "optuna")},
    }


def check_same_search(out: Path, before: Mapping[str, Any], checkpoint: Checkpoint, search: SearchConfig) -> None:
    """Raises: SlimrankError when `out` holds a search of another checkpoint, or over another space or sample."""
    asked = search.model_dump(mode="json")
    if before["checkpoint"]["version"] != checkpoint.version:
        raise SlimrankError(f"{out}: is a search of another checkpoint: give that one, or another --out")
    for name in ("space", "sample_rows", "selection_rows", "gate_rows", "rungs", "seed"):
        if before["config"][name] != asked[name]:
            raise SlimrankError(f"{out}: was searched with another tune.{name}: keep it, or give another --out")


def earlier_front(folder: Path, search: SearchConfig) -> list[Params]:
    """The settings on the front of an earlier search that are in this one's space, the smallest first.

    Raises: SlimrankError when the folder holds no search.
    """
    trials = read_trials(folder / "trials.jsonl")
    if not trials:
        raise SlimrankError(f"{folder}: no trials.jsonl with finished trials: give the --out of an earlier search")
    names = set(knobs(search.space))
    found = []
    for trial in front_of([t for t in trials if t.get("origin") != "calibrated"]):
        params = {k: v for k, v in trial["params"].items() if k in names}
        found += [params] if within(search.space, params) else []
    return found


def within(space: Space, params: Params) -> bool:
    """Whether a setting is in a space."""
    with contextlib.suppress(PlanError):
        return bool(setting(space, params))
    return False
