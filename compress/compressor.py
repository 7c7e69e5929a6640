"""Checkpoint + plan -> artifact. Reads like the recipe: profile, resolve, pack, write, seal.

Legend: N rows, D embedding dim, W bytes of a row, C centroids.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.artifact import GOLDEN_ROWS, golden_table, seal
from compress.catalogue import write_catalogue
from compress.config import Clip, CompressionPlan, TablePlan
from compress.dense import WEIGHTS, DenseRuntime, make_runtime, sides_of
from compress.errors import PlanError
from compress.ids import Layout, id_map_bytes, read_ids, target_rows, write_ids
from compress.lookup import StoredTable, Tier, map_block, pieces_of, tier_views
from compress.methods.codec import quantize_rows, row_bytes
from compress.methods.dense import DensePlan, compress_head
from compress.methods.fold import fold_decoders
from compress.methods.lowrank import energies, factor, rank_for_energy
from compress.methods.prune import keep_columns
from compress.model import SCORE_ROWS, CompressedModel, build_model, translate_rows
from compress.onnx_head import OnnxHead, head_of
from compress.score_reference import REFERENCE_ROWS, references_of
from compress.search.profile import TableProfile
from trainer.checkpoint import Checkpoint
from trainer.data.batch import to_batch
from trainer.data.dataset import Dataset
from trainer.data.reader import Rows, spread_rows
from trainer.data.transform import OOV_ROW, RESERVED_ROWS, IdMap, write_arrow
from trainer.errors import DataError
from trainer.files import new_directory, write_json
from trainer.metrics import row_losses, sigmoid
from trainer.progress import ReportProgress

SHARED_BITS: Final = 8
HEAD_ROWS = 65_536  # of each split, that a smaller head is made and gated on
WIDTH_STEP = 8  # columns: what INT2 rows fill whole bytes by, and FBGEMM takes at any bits


@dataclass(frozen=True)
class ResolvedTable:
    """What a plan means for one table.

    `layout` says where each training row lies; what grows with the table is empty in what trials get. `bits` of each
    segment of kept rows; `apart`: whether reserved rows and centroids are a tier of their own; `clips`: of rows of so
    many bits. `centroids` (C, D); `unknown` (D,): what the out-of-vocabulary row holds where ids that are forgotten
    read it too. `encoder` (D, width) makes narrow rows, `decoder` (width, D) widens them: after the lookup, or within
    the head where it is `folded`, and the stored table gives `width` columns.
    """

    stored: StoredTable
    layout: Layout
    bits: tuple[int, ...]
    apart: bool
    clips: Mapping[int, Clip]
    centroids: np.ndarray
    unknown: np.ndarray | None
    encoder: np.ndarray | None
    decoder: np.ndarray | None
    id_map_bytes: int

    @property
    def folded(self) -> bool:
        """Whether the head holds the decoder."""
        return self.decoder is not None and self.stored.dim == self.stored.width

    def unfolded(self) -> ResolvedTable:
        """The same table with its decoder after the lookup, for a head that reads it as it was trained to."""
        return self if self.decoder is None else replace(self, stored=replace(self.stored, dim=len(self.decoder.T)))

    def code(self, rows_ND: Tensor, tier: int) -> Tensor:
        """Rows (N, D) fp32 as a tier stores them: (N, W) uint8.

        Narrowed in fp64, as fp32 products round otherwise with few rows than with many, and trials code few.
        """
        narrow = (
            rows_ND if self.encoder is None else (rows_ND.double() @ torch.from_numpy(self.encoder).double()).float()
        )
        bits = self.stored.tiers[tier].bits
        return quantize_rows(narrow, bits, self.clips[bits])


def resolve(plan: CompressionPlan, profiles: Mapping[str, TableProfile]) -> dict[str, ResolvedTable]:
    """Turn shares of rows or lookups into cuts, and check that every table can do what it is asked.

    Raises: PlanError naming the table, the dim and what to use in its place.
    """
    for name in plan.tables:
        if name not in profiles:
            raise PlanError(f"plan names table {name!r}, the model has: {', '.join(profiles)}")
    resolved = {}
    for name, profile in profiles.items():
        try:
            resolved[name] = resolve_table(plan.of(name), profile)
        except PlanError as error:
            raise PlanError(f"table {name}: {error}") from None
    return resolved


def resolve_table(asked: TablePlan, profile: TableProfile) -> ResolvedTable:
    """What is asked of one table, in rows and bytes. Raises: PlanError."""
    info = profile.info
    rows, dim = info.num_embeddings, info.embedding_dim
    encoder, decoder = _narrowed(asked, profile)
    width = dim if encoder is None else encoder.shape[1]
    given = width if profile.foldable else dim
    ends, bits, zone = _tiers(asked, profile)
    for each in bits:
        row_bytes(width, each)
    book = profile.codebook(asked.centroids) if zone > ends[-1] else None
    if book is not None:
        centroids = book.centroids
    elif zone > ends[-1]:
        centroids = profile.centroid(ends[-1], zone)[None]
    else:
        centroids = np.zeros((0, dim), dtype=np.float32)
    count = len(centroids)
    numbers = np.zeros(0, dtype=np.uint8) if book is None else book.numbers
    sizes = [int(n) for n in np.diff([RESERVED_ROWS, *ends])]
    read = [zone - ends[-1]] if count else []
    if book is not None:
        first, last = np.searchsorted(profile.edges, [ends[-1], zone])
        read = [int(n) for n in book.sizes[first:last].sum(0)]
    apart = bits[0] < SHARED_BITS and (len(ends) > 1 or ends[-1] < rows)
    return ResolvedTable(
        StoredTable(info.name, given, width, physical_tiers(ends, bits, count, apart), info.features, count, len(ends)),
        Layout(profile.order, ends, zone, count, numbers),
        bits,
        apart,
        {SHARED_BITS: asked.clip, **{t.bits: t.clip or asked.clip for t in asked.all_tiers}},
        centroids,
        profile.fallback(zone) if zone < rows else None,
        encoder,
        decoder,
        id_map_bytes(rows, sizes, read, profile.key_bits),
    )


def physical_tiers(ends: Sequence[int], bits: Sequence[int], centroids: int, apart: bool) -> tuple[Tier, ...]:
    """The tiers in which a table of segments is stored; those without rows are left out.

    With `apart`, the reserved rows and the centroids, which many lookups read, are a tier of SHARED_BITS of their own.
    """
    sizes = [int(n) for n in np.diff([0, *ends])]
    sizes[0] += centroids
    kinds = list(bits)
    if apart:
        shared = RESERVED_ROWS + centroids
        sizes[:1] = [shared, sizes[0] - shared]
        kinds.insert(0, SHARED_BITS)
    return tuple(Tier(size, each) for size, each in zip(sizes, kinds, strict=True) if size)


def _tiers(asked: TablePlan, profile: TableProfile) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Ranks at which tiers of rows of their own end, their bits, and the rank at which rows that read centroids end."""
    rows = profile.info.num_embeddings
    ends: list[int] = []
    bits: list[int] = []
    zone = 0
    for tier in asked.all_tiers:
        end = profile.cut(tier)
        if tier.bits == 0:
            zone = end
        elif bits and (tier.bits == bits[-1] or end <= ends[-1]):
            ends[-1] = max(end, ends[-1])
        else:
            ends.append(end)
            bits.append(tier.bits)
    if not ends:
        ends, bits = [RESERVED_ROWS], [SHARED_BITS]
    if asked.unknown == "own":
        zone = rows
        if ends[-1] + 1 >= rows:  # a cut that saves no row once a centroid is counted is no cut
            ends[-1] = rows
    return tuple(ends), tuple(bits), max(zone, ends[-1])


def _narrowed(asked: TablePlan, profile: TableProfile) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Encoder (D, width) and decoder (width, D) of a table whose rows are stored narrower, else neither."""
    dim = profile.info.embedding_dim
    if asked.columns is not None:
        if _packable_width(asked.columns, dim) >= dim:
            return None, None
        kept, rebuild = keep_columns(torch.from_numpy(profile.moment), _packable_width(asked.columns, dim))
        return np.ascontiguousarray(np.eye(dim, dtype=np.float32)[:, kept.numpy()]), rebuild.contiguous().numpy()
    if asked.rank is None and asked.energy is None:
        return None, None
    moment, metric = torch.from_numpy(profile.moment), profile.fisher
    metric_DD = None if metric is None else torch.from_numpy(metric)
    rank = asked.rank or rank_for_energy(energies(moment, metric_DD), asked.energy or 1.0)
    if _packable_width(rank, dim) >= dim:
        return None, None
    narrow, wide = factor(moment, _packable_width(rank, dim), metric_DD=metric_DD)
    return narrow.contiguous().numpy(), wide.contiguous().numpy()


def _packable_width(width: int, dim: int) -> int:
    """The next width that FBGEMM packs at any bits."""
    return min(-(-width // WIDTH_STEP) * WIDTH_STEP, dim)


def table_bytes(resolved: Mapping[str, ResolvedTable]) -> int:
    """Bytes of packed tables as stored (rows, scale, bias, centroids, alignment), of their decoders and id maps.

    A folded decoder takes none: the head that has taken it in is smaller than it was.
    """
    decoders = sum(d.nbytes for d in decoders_of(resolved).values())
    return (
        pieces_of([r.stored for r in resolved.values()])[1] + decoders + sum(r.id_map_bytes for r in resolved.values())
    )


def decoders_of(resolved: Mapping[str, ResolvedTable], folded: bool = False) -> dict[str, Tensor]:
    """The decoders (width, D) fp32, by table, that stay after the lookup, or those that the head takes in."""
    return {n: torch.from_numpy(r.decoder) for n, r in resolved.items() if r.decoder is not None and r.folded == folded}


def pack_tables(
    path: Path,
    checkpoint: Checkpoint,
    id_maps: Mapping[str, IdMap],
    resolved: Mapping[str, ResolvedTable],
    progress: ReportProgress,
) -> None:
    """Write tables.bin a chunk of rows at a time; memory is one chunk and some numbers a row of one table."""
    tables = [r.stored for r in resolved.values()]
    size = pieces_of(tables)[1]
    with path.open("wb") as file:
        file.truncate(size)
    block = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
    views = tier_views(block, tables)
    for index, (name, part) in enumerate(resolved.items()):
        target = target_rows(id_maps[name], part.layout)
        kept = np.zeros(len(target), dtype=bool)
        kept[part.layout.order[: part.layout.kept]] = True
        for first, rows in checkpoint.table_chunks(name):
            own = torch.from_numpy(kept[first : first + len(rows)])
            where = torch.from_numpy(target[first : first + len(rows)].astype(np.int64))[own]
            put_rows(views[index], part, where, rows[own])
        put_shared(views[index], part)
        progress("pack", index + 1, len(tables))


def put_rows(views: Sequence[Tensor], part: ResolvedTable, where: Tensor, rows_ND: Tensor) -> None:
    """Code rows (N, D) into the tiers of one table, at its stored rows (N,)."""
    for tier, (first, view) in enumerate(zip(part.stored.firsts, views, strict=True)):
        inside = (where >= first) & (where < first + len(view))
        if bool(inside.any()):
            view[where[inside] - first] = part.code(rows_ND[inside], tier)


def put_shared(views: Sequence[Tensor], part: ResolvedTable) -> None:
    """Code the rows that cut ids read: centroids, or the out-of-vocabulary row; the first tier has them."""
    if len(part.centroids):
        views[0][RESERVED_ROWS : RESERVED_ROWS + len(part.centroids)] = part.code(torch.from_numpy(part.centroids), 0)
    if part.unknown is not None:
        views[0][OOV_ROW] = part.code(torch.from_numpy(part.unknown)[None], 0)[0]


def shrink_head(model: CompressedModel, dataset: Dataset, plan: DensePlan) -> DenseRuntime:
    """A model's head with fewer neurons, ranks or bits, calibrated on training rows read through its own tables.

    Layers pass the gate of `plan.max_loss` on validation rows. Raises: PlanError for a head that came as ONNX.
    """
    if isinstance(model.head, OnnxHead):
        raise PlanError("dense: a head that came as ONNX is run as it is: leave `dense` out of the plan")
    lessons = _head_inputs(model, dataset, spread_rows(dataset, "train", HEAD_ROWS))
    held = spread_rows(dataset, "val", HEAD_ROWS)
    head = convert_head(model.head, plan, lessons, _head_inputs(model, dataset, held), held.labels)
    return make_runtime(head, sides_of(model.transform), plan)


def convert_head(
    head: nn.Module,
    plan: DensePlan,
    lessons: Sequence[tuple[Tensor, Tensor]],
    held: Sequence[tuple[Tensor, Tensor]],
    labels_NT: np.ndarray,
) -> nn.Module:
    """A head as a plan asks, by batches of what it is given for some rows; `labels_NT` are those of the held rows."""

    @torch.inference_mode()
    def loss(head: nn.Module) -> float:
        logits = torch.cat([head(*inputs) for inputs in held]).numpy()
        return float(np.mean([row_losses(labels_NT[:, t], logits[:, t]).mean() for t in range(logits.shape[1])]))

    steps = plan.distill_steps
    again = itertools.islice(itertools.cycle(lessons), steps)
    return compress_head(head, plan, lessons, loss, plan.max_loss, again, steps)[0]


def _head_inputs(model: CompressedModel, dataset: Dataset, rows: Rows) -> list[tuple[Tensor, Tensor]]:
    """What the head is given for prepared rows: batches of (dense (B, I), looked up (B, L))."""
    encoded = translate_rows(model, dataset, rows.encoded)
    batches = [
        to_batch(encoded.take(np.arange(a, min(a + SCORE_ROWS, len(rows))))) for a in range(0, len(rows), SCORE_ROWS)
    ]
    return [(b.dense, model.lookup(b.sparse)) for b in batches]


def data_of(checkpoint: Checkpoint, dataset: Dataset) -> Dataset:
    """The prepared data a checkpoint was trained on, its tables as wide as the checkpoint's.

    Raises: DataError unless the checkpoint was trained on this prepared data; CheckpointError for one of an earlier
    training stage.
    """
    checkpoint.check_whole()
    if checkpoint.fingerprint != dataset.transform.fingerprint():
        raise DataError(
            f"{dataset.folder}: not the prepared data that {checkpoint.folder} was trained on: give that one to --data"
        )
    return dataset.sized(checkpoint.run.data, checkpoint.run.model.embedding_dim)


def check_made_for(plan: CompressionPlan, checkpoint: Checkpoint) -> None:
    """Raises: PlanError when a plan names another checkpoint than this one."""
    if plan.checkpoint not in (None, checkpoint.version):
        raise PlanError(
            f"the plan is for checkpoint {plan.checkpoint}, {checkpoint.folder} is {checkpoint.version}: make a plan "
            f"for it, or remove `checkpoint` from the plan"
        )


def compress(
    checkpoint: Checkpoint,
    dataset: Dataset,
    plan: CompressionPlan,
    out: Path,
    profiles: Mapping[str, TableProfile],
    progress: ReportProgress,
    metrics: Mapping[str, Any] | None = None,
    dense: Mapping[str, Tensor] | None = None,
    head: nn.Module | None = None,
) -> dict[str, Any]:
    """Write the artifact of a plan into the folder `out`, and return its manifest.

    `dense` is the head to write, calibrated and as wide as trained; the checkpoint's own by default. `head`: one
    that was converted as the plan's `dense` asks, which is done here by default.
    Raises: PlanError when a table cannot do what the plan asks; DataError when data and checkpoint do not belong
    together; SlimrankError when `out` holds something already.
    """
    dataset = data_of(checkpoint, dataset)
    transform = dataset.transform
    check_made_for(plan, checkpoint)
    resolved = resolve(plan, profiles)
    tables = [r.stored for r in resolved.values()]
    with new_directory(out) as staging:
        pack_tables(staging / "tables.bin", checkpoint, transform.id_maps, resolved, progress)
        decoders, folded = decoders_of(resolved), decoders_of(resolved, folded=True)
        if decoders:
            save_file(decoders, staging / "decoders.safetensors")
        state = checkpoint.dense_state() if dense is None else dict(dense)
        narrow, state = fold_decoders(checkpoint.run.model, transform, state, folded)
        write_json(staging / "transform.json", narrow.describe())
        write_ids(staging / "ids.arrow", transform.id_maps, {n: r.layout for n, r in resolved.items()})
        own = narrow.with_id_maps(read_ids(staging / "ids.arrow", transform.tables, tables))
        block = map_block(staging / "tables.bin", pieces_of(tables)[1])
        model = build_model(
            checkpoint.run, own, tables, block, head_of(checkpoint.run, own, state), "unsealed", decoders
        )
        if plan.dense == DensePlan():
            save_file(state, staging / WEIGHTS)
        else:
            model.head = (
                shrink_head(model, dataset, plan.dense)
                if head is None
                else make_runtime(head, sides_of(model.transform), plan.dense)
            )
            model.head.save(staging)
        items = dataset.items()
        if items is not None:
            write_catalogue(staging / "items.arrow", items, own)
        write_arrow(golden_table(dataset.sample().slice(0, GOLDEN_ROWS), model), staging / "golden.arrow")
        manifest = {
            "name": checkpoint.run.name,
            "run": checkpoint.run.model_dump(mode="json"),
            "plan": plan.model_dump(mode="json"),
            "tables": [asdict(t) for t in tables],
            "sizes": {
                "table_bytes": table_bytes(resolved),
                "table_bytes_fp32": sum(t.fp32_bytes for t in transform.tables.values()),
            },
            "lineage": {
                "checkpoint": checkpoint.version,
                "fingerprint": checkpoint.fingerprint,
                "samples": checkpoint.position.samples,
                **({"folded": {name: transform.tables[name].embedding_dim for name in folded}} if folded else {}),
            },
            "metrics": {**(metrics or {}), "score_reference": score_reference(model, dataset)},
        }
        return seal(staging, manifest)


def score_reference(model: CompressedModel, dataset: Dataset) -> dict[str, Any]:
    """How a model's probabilities are spread over validation rows, by task (compress/score_reference.py)."""
    rows = spread_rows(dataset, "val", REFERENCE_ROWS)
    logits = model.score_encoded(translate_rows(model, dataset, rows.encoded))
    return references_of(sigmoid(logits), model.tasks)
