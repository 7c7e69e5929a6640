"""What each lever of the dense part gives when one request ranks 500 candidates: python benchmarks/dense.py.

One thread, in process, on an MLPerf-size DLRM built of TorchRec's own modules (26 tables of D=64, 13 numbers, bottom
MLP 512-256-64, over-arch 1024-1024-512-256-1). Of the tables 16 belong to the request (user and context) and 10 to the
item; the numbers belong to the request. The model is trained first, on a synthetic log whose rows carry latent factors,
so that delta NE means something; embeddings are fixed there and the dense part learns. Every variant answers
the same requests, taken in turns, and one JSON object is printed: p50 and p99 ms, ratios, delta NE.

Legend: B batch, F features, D embedding dim, I dense inputs, K candidates, N rows.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

sys.path[:1] = [str(Path(__file__).resolve().parents[1])]  # this tree's packages, also where another one is installed

from compress.dense import Sides, make_runtime
from compress.lookup import Lookup, StoredTable, Tier, pieces_of, tier_views
from compress.methods.codec import quantize_rows
from compress.methods.dense import (
    DensePlan,
    LayerStep,
    distill_head,
    factor_layers,
    linears,
    prune_neurons,
    quantize_head,
    simplify,
)
from trainer.models.dlrm import pair_dots
from trainer.models.ranker import Head

FEATURES = [f"t{i:02}" for i in range(26)]
ITEM_FEATURES = set(FEATURES[16:])
DIM, NUM_DENSE, LATENT = 64, 13, 8
BOTTOM, OVER = [512, 256, DIM], [1024, 1024, 512, 256, 1]


class TorchRecHead(Head):
    """The dense part of TorchRec's DLRM as a head: what an adapter of a model trained elsewhere looks like."""

    def __init__(self, bottom: nn.Sequential, top: nn.Sequential, out: nn.Module) -> None:
        super().__init__()
        self.bottom, self.top, self.out = bottom, top, out
        vectors = len(FEATURES) + 1
        rows, columns = torch.triu_indices(vectors, vectors, offset=1)
        self.register_buffer("pairs", rows * vectors + columns, persistent=False)

    def logits(self, dense_BI: Tensor, looked_up_BL: Tensor) -> Tensor:
        """Logits (B, 1)."""
        bottom_BD = self.bottom(dense_BI)
        vectors = [bottom_BD, *looked_up_BL.split([DIM] * len(FEATURES), dim=1)]
        return self.out(self.top(torch.cat([bottom_BD, pair_dots(vectors, self.pairs)], dim=1)))


def head_of(model: DLRM) -> TorchRecHead:
    """The same weights, laid out as this project's heads are: Linear and ReLU in a row."""

    def flat(module: nn.Module) -> list[nn.Module]:
        perceptrons = [m for m in module.modules() if type(m).__name__ == "Perceptron"]
        return [layer for p in perceptrons for layer in (p._linear, nn.ReLU())]

    bottom, over = nn.Sequential(*flat(model.dense_arch)), nn.Sequential(*flat(model.over_arch))
    out = model.over_arch.model[-1]
    assert isinstance(out, nn.Linear)
    return TorchRecHead(bottom, over, out).eval()


@dataclass
class Log:
    """A synthetic log: fixed embeddings of N rows a feature, and the truth that labels are drawn from."""

    weights_FND: Tensor
    latents_FNR: Tensor
    effects_FN: Tensor
    strengths_FF: Tensor
    numbers: nn.Module

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers (B, I), ids (B, F) and labels (B, 1)."""
        dense_BI = torch.randn((rows, NUM_DENSE), generator=generator)
        size = self.weights_FND.shape[1]
        u = torch.rand((rows, len(FEATURES)), generator=generator)
        ids_BF = (torch.exp(u * math.log(size)) - 1).long().clamp_(max=size - 1)  # about Zipf's law
        return dense_BI, ids_BF, self.clicks(dense_BI, ids_BF, generator)

    def clicks(self, dense_BI: Tensor, ids_BF: Tensor, generator: torch.Generator) -> Tensor:
        """Labels (B, 1), drawn from what is true of these numbers and ids."""
        f = torch.arange(len(FEATURES))
        latents_BFR = self.latents_FNR[f, ids_BF]
        pairs = torch.einsum("bfr,fg,bgr->b", latents_BFR, self.strengths_FF, latents_BFR)
        with torch.no_grad():
            logit_B = self.effects_FN[f, ids_BF].sum(1) + pairs + self.numbers(dense_BI).squeeze(1) - 1.2
        return torch.bernoulli(torch.sigmoid(logit_B), generator=generator).unsqueeze(1)

    def looked_up(self, ids_BF: Tensor) -> Tensor:
        """Embeddings (B, F * D) of one id a feature."""
        return self.weights_FND[torch.arange(len(FEATURES)), ids_BF].flatten(1)


def make_log(rows: int, seed: int = 0) -> Log:
    """Rows are linear in latent factors and an effect of their own, with noise."""
    torch.manual_seed(seed)
    count = len(FEATURES)
    latents = torch.randn(count, rows, LATENT)
    effects = 0.25 * torch.randn(count, rows)
    mix = torch.randn(count, LATENT + 1, DIM) / math.sqrt(LATENT + 1)
    weights = torch.empty(count, rows, DIM)
    for f in range(count):
        weights[f] = 0.5 * torch.cat([latents[f], 4 * effects[f, :, None]], dim=1) @ mix[f]
        weights[f] += 0.05 * torch.randn(rows, DIM)
    chosen = torch.triu(torch.rand(count, count) < 0.12, diagonal=1)
    strengths = chosen * torch.randn(count, count) * 0.06
    numbers = nn.Sequential(nn.Linear(NUM_DENSE, 32), nn.Tanh(), nn.Linear(32, 1))
    nn.init.normal_(numbers[2].weight, std=0.2)
    return Log(weights, latents, effects, strengths, numbers)


def eager_model(log: Log) -> DLRM:
    """TorchRec's DLRM over the log's rows, as its user would build it."""
    tables = [
        EmbeddingBagConfig(name=f, embedding_dim=DIM, num_embeddings=log.weights_FND.shape[1], feature_names=[f])
        for f in FEATURES
    ]
    model = DLRM(EmbeddingBagCollection(tables=tables), NUM_DENSE, BOTTOM, OVER).eval()
    with torch.no_grad():
        for index, name in enumerate(FEATURES):
            model.sparse_arch.embedding_bag_collection.embedding_bags[name].weight.copy_(log.weights_FND[index])
    return model


def train_head(head: Head, log: Log, samples: int, batch: int = 1024, rate: float = 1e-3, seed: int = 1) -> None:
    """One pass over freshly drawn samples, in bf16 products."""
    generator = torch.Generator().manual_seed(seed)
    steps = samples // batch
    optimizer = torch.optim.Adam(head.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    head.train()
    head.autocast = torch.bfloat16
    for _ in range(steps):
        dense, ids, labels = log.draw(batch, generator)
        loss = F.binary_cross_entropy_with_logits(head(dense, log.looked_up(ids)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    head.autocast = None
    head.eval()


@dataclass
class Request:
    """One request and its candidates: numbers (1, I), ids of the request (1, 16) and of the items (K, 10)."""

    dense: Tensor
    request_ids: Tensor
    item_ids: Tensor


Variant = Callable[[Request], Tensor]


def jagged(ids_BF: Tensor, names: list[str]) -> KeyedJaggedTensor:
    """One id a feature and row."""
    rows = ids_BF.shape[0]
    offsets = torch.arange(0, rows * len(names) + 1)
    return KeyedJaggedTensor(keys=names, values=ids_BF.t().flatten(), offsets=offsets, stride=rows)


def repeated(request: Request) -> tuple[Tensor, Tensor]:
    """Numbers (K, I) and ids (K, F), the request's repeated for every candidate: what an ordinary batch holds."""
    rows = len(request.item_ids)
    ids = torch.cat([request.request_ids.expand(rows, -1), request.item_ids], dim=1)
    return request.dense.expand(rows, -1), ids


def int8_lookups(log: Log) -> tuple[Lookup, Lookup, Lookup]:
    """INT8 rows in one block, read by three lookups: all features, the request's, the items'."""
    size = log.weights_FND.shape[1]
    tables = [StoredTable(f, DIM, DIM, (Tier(size, 8),), (f,)) for f in FEATURES]
    block = torch.zeros(pieces_of(tables)[1], dtype=torch.uint8)
    for index, (view,) in enumerate(tier_views(block, tables)):
        view[:] = quantize_rows(log.weights_FND[index], 8)
    sides = (FEATURES, [f for f in FEATURES if f not in ITEM_FEATURES], [f for f in FEATURES if f in ITEM_FEATURES])
    whole, request, items = (Lookup(tables, names, set(), block) for names in sides)
    return whole, request, items


def plain(head: nn.Module, lookup: Lookup) -> Variant:
    """A head over the fused lookup, the request repeated for every candidate."""

    def rank(request: Request) -> Tensor:
        dense, ids = repeated(request)
        return head(dense, lookup(jagged(ids, FEATURES)))

    return rank


def shared(rank_with: Callable[..., Tensor], lookups: tuple[Lookup, Lookup, Lookup]) -> Variant:
    """The request looked up and computed once."""
    _, of_request, of_items = lookups

    def rank(request: Request) -> Tensor:
        request_BL = of_request(jagged(request.request_ids, of_request.names))
        items_BL = of_items(jagged(request.item_ids, of_items.names))
        return rank_with(request.dense, request_BL, items_BL[:, :0], items_BL)

    return rank


def onnx_variants(head: nn.Module, lookup: Lookup, calibration: list[tuple[Tensor, Tensor]]) -> dict[str, Variant]:
    """The whole head in ONNX Runtime as its own tools make it: fp32, dynamic int8, static int8."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter({"dense": d.numpy(), "looked_up": x.numpy()} for d, x in calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    folder = Path(tempfile.mkdtemp())
    files = {name: str(folder / f"{name}.onnx") for name in ("fp32", "dynamic", "static")}
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            head,
            calibration[0],
            buffer,
            input_names=["dense", "looked_up"],
            output_names=["logits"],
            dynamic_axes={"dense": {0: "K"}, "looked_up": {0: "K"}},
            opset_version=17,
            dynamo=False,
        )
    Path(files["fp32"]).write_bytes(buffer.getvalue())
    quantize_dynamic(files["fp32"], files["dynamic"], weight_type=QuantType.QInt8, per_channel=True)
    quantize_static(files["fp32"], files["static"], Reader(), weight_type=QuantType.QInt8, per_channel=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1

    def variant(file: str) -> Variant:
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])

        def run(dense: Tensor, looked_up: Tensor) -> Tensor:
            feed = {"dense": dense.contiguous().numpy(), "looked_up": looked_up.numpy()}
            return torch.from_numpy(session.run(None, feed)[0])

        return plain(run, lookup)  # type: ignore[arg-type]

    return {f"onnx_{name}": variant(file) for name, file in files.items()}


def samples(log: Log, rows: int, seed: int, lookup: Lookup | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of (dense, looked up, labels), through a lookup where one is given."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(0, rows, 1024):
        dense, ids, labels = log.draw(1024, generator)
        yield dense, log.looked_up(ids) if lookup is None else lookup(jagged(ids, FEATURES)), labels


def normalized_entropy(head: nn.Module, batches: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Log loss over the entropy of the base rate."""
    with torch.inference_mode():
        logits = torch.cat([head(dense, looked_up) for dense, looked_up, _ in batches])
    labels = torch.cat([y for _, _, y in batches])
    rate = labels.mean()
    entropy = -(rate * rate.log() + (1 - rate) * (1 - rate).log())
    return float(F.binary_cross_entropy_with_logits(logits, labels) / entropy)


def measure(variants: dict[str, Variant], requests: list[Request]) -> dict[str, dict[str, float]]:
    """p50, p99 and least ms of each variant on the same requests, in turns. On a shared machine trust the least."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode():
        for turn, request in enumerate(requests):
            for name, rank in variants.items():
                begun = time.perf_counter()
                rank(request)
                if turn >= 10:
                    taken[name].append((time.perf_counter() - begun) * 1e3)
    return {
        name: {"p50_ms": float(np.median(t)), "p99_ms": float(np.percentile(t, 99)), "least_ms": min(t)}
        for name, t in taken.items()
    }


def make_requests(log: Log, count: int, candidates: int) -> list[Request]:
    """Requests whose candidates are drawn as the log draws them."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        dense, ids, _ = log.draw(candidates, generator)
        made.append(Request(dense[:1], ids[:1, :16].contiguous(), ids[:, 16:].contiguous()))
    return made


def students(head: Head, log: Log, args: argparse.Namespace) -> Iterator[tuple[str, nn.Module]]:
    """Narrower heads, each taught by the original on fresh samples in bf16 products, and one of lower rank."""
    calibration = [(d, x) for d, x, _ in samples(log, 16 * 1024, 31)]
    for keep in args.keep:
        small = prune_neurons(head, calibration, keep)
        yield f"width {keep:g} not taught", small
        taught = simplify(small)
        kept = args.students / f"width_{keep:g}.safetensors" if args.students else None
        if kept is not None and kept.exists():
            taught.load_state_dict(load_file(kept))
        else:
            head.autocast = taught.autocast = torch.bfloat16
            distill_head(taught, head, ((d, x) for d, x, _ in samples(log, args.steps * 1024, 41)), args.steps, 1e-3)
            head.autocast = taught.autocast = None
            if kept is not None:
                save_file(taught.state_dict(), kept)
        yield f"width {keep:g}", taught
    yield "rank .99", factor_layers(head, calibration, 0.99)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Train or read the head, make every variant, measure them in turns."""
    log = make_log(args.rows)
    torch.manual_seed(3)
    model = eager_model(log)
    head = head_of(model)
    if args.head is not None and args.head.exists():
        head.load_state_dict(load_file(args.head))
    else:
        train_head(head, log, args.samples)
        if args.head is not None:
            save_file(head.state_dict(), args.head)
    lookups = int8_lookups(log)
    sides = Sides((False,) * NUM_DENSE, tuple((DIM, f in ITEM_FEATURES) for f in FEATURES))
    held_out = list(samples(log, args.test_rows, 21, lookups[0]))
    gate = held_out[: len(held_out) // 4]
    calibration = [(d, x) for d, x, _ in samples(log, 8 * 1024, 31, lookups[0])]
    base = normalized_entropy(head, list(samples(log, args.test_rows, 21)))
    quality: dict[str, float] = {"fused_int8_tables": normalized_entropy(head, held_out) / base - 1}

    def bf16(request: Request) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return eager(request)

    def eager(request: Request) -> Tensor:
        dense, ids = repeated(request)
        return model(dense, jagged(ids, FEATURES))

    variants: dict[str, Variant] = {"torchrec_eager_fp32": eager, "torchrec_eager_bf16": bf16}
    variants |= onnx_variants(head, lookups[0], calibration[:2])
    variants["fused_int8_tables"] = plain(head, lookups[0])
    layers: dict[str, list[LayerStep]] = {}
    chosen: dict[str, Any] = {}

    def add(name: str, small: nn.Module, plan: DensePlan) -> None:
        converted, layers[name] = quantize_head(small, calibration, lambda h: normalized_entropy(h, gate), 1e-3, plan)
        runtime = make_runtime(converted, sides, plan)
        chosen[name] = {"backend": runtime.backend, "trials_ms": runtime.trials_ms}
        quality[name] = normalized_entropy(runtime, held_out) / base - 1
        variants[name] = shared(runtime.rank, lookups)

    add("shared_fp32", head, DensePlan(backend="torch"))
    add("shared_fp32_onnx", head, DensePlan(backend="onnx"))
    add("shared_int8", head, DensePlan(dtype="int8", backend="torch"))
    add("shared_int8_onnx", head, DensePlan(dtype="int8", backend="onnx"))
    for name, student in students(head, log, args):
        if "not taught" in name:
            quality[name] = normalized_entropy(student, held_out) / base - 1
            continue
        add(f"{name} fp32", student, DensePlan(backend="torch"))
        add(f"{name} int8", student, DensePlan(dtype="int8"))
    times = measure(variants, make_requests(log, args.requests + 10, args.candidates))
    against = ("torchrec_eager_fp32", "onnx_fp32", "onnx_dynamic", "onnx_static")
    results = [
        {
            "name": name,
            **{k: round(v, 3) for k, v in taken.items()},
            **{f"times_{a}": round(times[a]["p50_ms"] / taken["p50_ms"], 2) for a in against},
            **{f"least_times_{a}": round(times[a]["least_ms"] / taken["least_ms"], 2) for a in against},
            "delta_ne": quality.get(name),
            "layers": {s.name: s.kind for s in layers.get(name, [])},
            **chosen.get(name, {}),
        }
        for name, taken in times.items()
    ]
    return {
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {p: version(p) for p in ("torch", "torchrec", "fbgemm-gpu-cpu", "onnxruntime")},
        "candidates": args.candidates,
        "table_rows": args.rows,
        "ne_fp32": base,
        "test_rows": sum(len(y) for _, _, y in held_out),
        "delta_ne_untaught": {n: q for n, q in quality.items() if "not taught" in n},
        "products": sum(m.weight.numel() for m in linears(head).values()),
        "results": results,
    }


def main() -> None:
    """Parse, run on one thread, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000, help="rows of each table")
    parser.add_argument("--samples", type=int, default=2_000_000, help="samples the head is trained on")
    parser.add_argument("--head", type=Path, help="a safetensors file to keep the trained head in")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.5, 0.25], help="shares of the neurons that stay")
    parser.add_argument("--students", type=Path, help="a folder to keep the narrower heads in")
    parser.add_argument("--steps", type=int, default=1500, help="distillation steps of 1,024 rows")
    parser.add_argument("--test-rows", type=int, default=200_000)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--candidates", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(benchmark(args)))


if __name__ == "__main__":
    main()
