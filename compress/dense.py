"""What executes a head: for a batch, or for one request and K candidates; in torch or in ONNX Runtime.

    dense.json          the layers: kind, widths, rank, and the plan they came from
    dense.safetensors   their weights
    dense.onnx          the graph of one request and K candidates, where ONNX Runtime has all layers

In: a head as compress/methods/dense.py makes it. Nothing that is loaded is code: the head is built from its
configuration, reshaped as dense.json says, and its weights copied in.

Legend: B batch, K candidates, I dense inputs, L sum of the lookups' widths, T tasks.
"""

from __future__ import annotations

import importlib.util
import io
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.errors import ArtifactError, PlanError
from compress.layers import QUANTIZED, Bf16Linear, Int8Linear, RowInt8Linear, fuse_chains
from compress.methods.dense import DensePlan, Kind, replace, simplify
from compress.shared import RequestHead
from trainer.config import describe
from trainer.data.schema import Config
from trainer.data.transform import Transform
from trainer.models import head_shape

SPEC, WEIGHTS, GRAPH = "dense.json", "dense.safetensors", "dense.onnx"
TRIAL_CANDIDATES = 500
TRIAL_RUNS = 9
MAX_WIDTH = 1 << 20
# log-odds by which the backends may differ: fp32 by the order of sums; int8 where a value lies between two codes
TOLERANCE = {"fp32": 1e-3, "int8": 2e-2}
NAMES = ("request_dense", "request_looked_up", "item_dense", "item_looked_up")
_KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: "fp32",
    Int8Linear: "int8",
    RowInt8Linear: "row8",
    Bf16Linear: "bf16",
}


class LayerSpec(Config):
    """One linear layer as stored."""

    kind: Kind
    inputs: int = Field(gt=0, le=MAX_WIDTH)
    outputs: int = Field(gt=0, le=MAX_WIDTH)
    bias: bool = True


class DenseSpec(Config):
    """The layers of a head by name, those put in as two factors, and the plan."""

    version: Literal[1] = 1
    plan: DensePlan
    layers: dict[str, LayerSpec]
    factored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sides:
    """Whose each input is: of each dense input, and (width, whose) of each lookup; True is the item's."""

    dense_of_item: tuple[bool, ...]
    lookups: tuple[tuple[int, bool], ...]

    def widths(self) -> tuple[int, int, int, int]:
        """Columns of the four inputs: I of the request, L of the request, I of the items, L of the items."""
        items, lookups = sum(self.dense_of_item), sum(w for w, item in self.lookups if item)
        return len(self.dense_of_item) - items, sum(w for w, _ in self.lookups) - lookups, items, lookups

    def example(self, candidates: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs of one request, drawn from N(0, 1)."""
        generator = torch.Generator().manual_seed(0)
        rows = (1, 1, candidates, candidates)
        made = [torch.randn((r, w), generator=generator) for r, w in zip(rows, self.widths(), strict=True)]
        return made[0], made[1], made[2], made[3]


def sides_of(transform: Transform) -> Sides:
    """Whose the inputs of this data's head are, by the `side` of each feature."""
    item = {f.name: f.side == "item" for f in transform.schema.features}
    shape = head_shape(transform)
    numbers = [f.name for f in transform.schema.dense_features]
    dense = [item[n] for n in numbers for _ in range(1 + transform.numerics[n].has_missing)]  # a flag follows it
    spread = zip(shape.features, shape.dims, shape.positions, strict=True)
    return Sides(tuple(dense), tuple((dim * (count or 1), item[name]) for name, dim, count in spread))


class DenseRuntime(nn.Module):
    """A head that scores batches as any head does, and one request's candidates with the request computed once."""

    def __init__(self, head: nn.Module, sides: Sides, plan: DensePlan, graph: bytes | None = None) -> None:
        """`graph` is the ONNX graph of `rank`; without it, or without ONNX Runtime, torch ranks.

        Raises: PlanError when the plan insists on ONNX Runtime and there is no graph or no onnxruntime;
        ArtifactError when the backends disagree.
        """
        super().__init__()
        self.head = head.eval()
        self.sides = sides
        self.plan = plan
        self.graph = graph
        self.trials_ms: dict[str, float] = {}
        self.backend, self.rank_with = self._choose()

    def forward(self, dense_BI: Tensor, looked_up_BL: Tensor) -> Tensor:
        """Logits (B, T) float32."""
        return self.head(dense_BI, looked_up_BL)

    @torch.inference_mode()
    def rank(
        self, request_dense: Tensor, request_looked_up: Tensor, item_dense: Tensor, item_looked_up: Tensor
    ) -> Tensor:
        """Logits (K, T) of one request (1, I1), (1, L1) and its candidates (K, I2), (K, L2)."""
        return self.rank_with(request_dense, request_looked_up, item_dense, item_looked_up)

    def _choose(self) -> tuple[str, Callable[..., Tensor]]:
        """The backend of the plan, or the faster of both by a short trial; they must agree."""
        onnx = onnx_runner(self.graph) if self.graph is not None and has_onnxruntime() else None
        if self.plan.backend == "onnx" and onnx is None:
            missing = "its graph" if self.graph is None else "onnxruntime, which is not installed"
            raise PlanError(f"dense backend onnx needs {missing}: take backend auto or torch")
        torch_rank = traced(self.head, self.sides)
        if onnx is None or self.plan.backend == "torch":
            return "torch", torch_rank
        example = self.sides.example(TRIAL_CANDIDATES)
        apart = float((onnx(*example) - torch_rank(*example)).abs().max())
        allowed = TOLERANCE["int8" if any(isinstance(m, QUANTIZED) for m in self.head.modules()) else "fp32"]
        if not apart <= allowed:
            raise ArtifactError(
                f"{GRAPH}: its scores differ from the weights' by {apart:.3g} log-odds, more than {allowed}: "
                "write the artifact again, or take backend torch"
            )
        if self.plan.backend == "onnx":
            return "onnx", onnx
        self.trials_ms = try_in_turns({"torch": torch_rank, "onnx": onnx}, example)
        fastest = min(self.trials_ms, key=self.trials_ms.__getitem__)
        return fastest, {"torch": torch_rank, "onnx": onnx}[fastest]

    def save(self, folder: Path) -> None:
        """Write dense.json, dense.safetensors and, where there is a graph, dense.onnx into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in self.head.state_dict().items()}, folder / WEIGHTS)
        if self.graph is not None:
            (folder / GRAPH).write_bytes(self.graph)
        spec = spec_of(self.head, self.plan)
        (folder / SPEC).write_text(json.dumps(spec.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")


def make_runtime(head: nn.Module, sides: Sides, plan: DensePlan) -> DenseRuntime:
    """A runtime of a converted head, with its ONNX graph where all layers have one and the plan wants it."""
    portable = not any(isinstance(m, RowInt8Linear | Bf16Linear) for m in head.modules())
    wanted = plan.backend != "torch" and portable and importlib.util.find_spec("onnx") is not None
    return DenseRuntime(head, sides, plan, onnx_graph(head, sides) if wanted else None)


def load_runtime(paths: Mapping[str, Path], skeleton: nn.Module, sides: Sides) -> DenseRuntime:
    """What `save` wrote, on a head built from its configuration (its weights are not read). `paths`: of each file.

    Raises: ArtifactError for files that are damaged, disagree with each other or with the head.
    """
    try:
        spec = DenseSpec.model_validate_json(paths[SPEC].read_bytes())
        with safe_open(paths[WEIGHTS], "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            head = shaped(skeleton, spec, shapes)
            head.load_state_dict({name: file.get_tensor(name) for name in shapes})
    except ValidationError as error:
        raise ArtifactError(describe(error, SPEC)) from None
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{SPEC}: the dense part cannot be read ({error}): fetch the artifact again") from None
    if not all(torch.isfinite(t).all() for t in head.state_dict().values() if t.is_floating_point()):
        raise ArtifactError(f"{WEIGHTS}: has weights that are not finite: write the artifact again")
    fuse_chains(head)
    return DenseRuntime(head, sides, spec.plan, paths[GRAPH].read_bytes() if GRAPH in paths else None)


def spec_of(head: nn.Module, plan: DensePlan) -> DenseSpec:
    """The layers of a head, as dense.json says them."""
    layers = {
        name: LayerSpec(kind=kind, inputs=m.in_features, outputs=m.out_features, bias=m.bias is not None)
        for name, m in head.named_modules()
        if (kind := _KINDS.get(type(m))) is not None
    }
    factored = tuple(
        name
        for name, m in head.named_modules()
        if isinstance(m, nn.Sequential) and len(m) == 2 and all(type(layer) in _KINDS for layer in m)
    )
    return DenseSpec(plan=plan, layers=layers, factored=factored)


def shaped(skeleton: nn.Module, spec: DenseSpec, shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """A head's copy with the layers of a spec, not yet their weights. `shapes` are those of the file, checked first.

    Raises: ArtifactError when a layer is no layer of this head, or the file's shapes are others.
    """
    head = simplify(skeleton)
    own = {name for name, m in head.named_modules() if isinstance(m, nn.Linear)}
    expected = {n for n in spec.layers if n.rpartition(".")[0] not in spec.factored} | set(spec.factored)
    if expected != own:
        raise ArtifactError(
            f"{SPEC}: layers {sorted(expected ^ own)} are not those of this model: use its own artifact"
        )
    for name, layer in spec.layers.items():
        stored = shapes.get(f"{name}.codes", shapes.get(f"{name}.weight"))
        if stored != (layer.outputs, layer.inputs):
            raise ArtifactError(
                f"{WEIGHTS}: layer {name} has shape {stored}, {SPEC} says {layer.outputs, layer.inputs}"
            )
    for name in spec.factored:
        replace(head, name, nn.Sequential(nn.Identity(), nn.Identity()))
    for name, layer in spec.layers.items():
        replace(head, name, _blank(layer))
    return head.eval()


def _blank(layer: LayerSpec) -> nn.Module:
    if layer.kind == "int8":
        return Int8Linear(layer.inputs, layer.outputs)
    if layer.kind == "row8":
        return RowInt8Linear(layer.inputs, layer.outputs)
    kind = Bf16Linear if layer.kind == "bf16" else nn.Linear
    return kind(layer.inputs, layer.outputs, bias=layer.bias)


def traced(head: nn.Module, sides: Sides) -> Callable[..., Tensor]:
    """One request and K candidates as a flat graph: what Python would decide for each request is decided once."""
    shared = RequestHead(head, sides.dense_of_item, sides.lookups).eval()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # widths are constants, as they should be
        warnings.simplefilter("ignore", DeprecationWarning)
        example = sides.example(TRIAL_CANDIDATES)
        shared(*example)  # packs the int8 weights, which the graph then holds
        return torch.jit.freeze(torch.jit.trace(shared, example, check_trace=False))


def onnx_graph(head: nn.Module, sides: Sides) -> bytes:
    """The same as an ONNX graph with any K; int8 layers as QuantizeLinear and DequantizeLinear around the product."""
    shared = RequestHead(head, sides.dense_of_item, sides.lookups).eval()
    out = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            shared,
            sides.example(TRIAL_CANDIDATES),
            out,
            input_names=list(NAMES),
            output_names=["logits"],
            dynamic_axes={NAMES[2]: {0: "K"}, NAMES[3]: {0: "K"}, "logits": {0: "K"}},
            opset_version=17,
            dynamo=False,
        )
    return with_codes(out.getvalue())


def with_codes(graph: bytes) -> bytes:
    """The same graph with int8 weights stored as codes: a quarter of the bytes that the exporter writes."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load_model_from_string(graph)
    stored = {t.name: t for t in model.graph.initializer}
    values = {t.name: numpy_helper.to_array(t) for t in stored.values()}
    values |= {
        n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in model.graph.node if n.op_type == "Constant"
    }
    for node in [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in stored]:
        weight, scale = values[node.input[0]], values[node.input[1]]
        axis = node.attribute[0].i
        codes = np.rint(weight / np.expand_dims(scale, 1 - axis)).clip(-128, 127).astype(np.int8)
        model.graph.initializer.append(numpy_helper.from_array(codes, node.output[0]))
        model.graph.node.remove(node)
    used = {name for n in model.graph.node for name in n.input}
    for tensor in [t for t in model.graph.initializer if t.name not in used]:
        model.graph.initializer.remove(tensor)
    return model.SerializeToString()


def has_onnxruntime() -> bool:
    """Whether ONNX Runtime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def onnx_runner(graph: bytes) -> Callable[..., Tensor]:
    """A graph in ONNX Runtime: one thread, which sleeps when it has nothing to do.

    Raises: ArtifactError for bytes that are no such graph, or that name files of their own.
    """
    import onnxruntime as ort

    check_graph(graph)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        # a product and its sum made one fp32 Gemm would hide the integer product from the fusion after it
        session = ort.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"]
        )
    except Exception as error:  # onnxruntime has an exception class for each status, all plain Exceptions
        raise ArtifactError(f"{GRAPH}: ONNX Runtime refuses it ({error}): write the artifact again") from None
    wanted = {i.name for i in session.get_inputs()}

    def run(*inputs: Tensor) -> Tensor:
        feed = {n: x.numpy() for n, x in zip(NAMES, inputs, strict=True) if n in wanted}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def check_graph(graph: bytes) -> None:
    """Refuse a graph that is more than arithmetic: data in other files, operators of other domains, subgraphs."""
    import onnx

    try:
        model = onnx.load_model_from_string(graph)
    except Exception as error:  # protobuf's own
        raise ArtifactError(f"{GRAPH}: not an ONNX graph ({error}): fetch the artifact again") from None
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or any(a.HasField("g") or a.graphs for a in node.attribute):
            raise ArtifactError(
                f"{GRAPH}: has an operator {node.domain or 'ai.onnx'}.{node.op_type} with code of its own"
            )
        if any(a.HasField("t") and a.t.data_location == onnx.TensorProto.EXTERNAL for a in node.attribute):
            raise ArtifactError(f"{GRAPH}: reads other files: a graph must hold all its weights")
    if model.functions or any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer):
        raise ArtifactError(f"{GRAPH}: reads other files or defines functions: a graph must hold all its weights")


def try_in_turns(runners: dict[str, Callable[..., Tensor]], inputs: Sequence[Any]) -> dict[str, float]:
    """Median milliseconds of each runner on one thread, taken in turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken: dict[str, list[float]] = {name: [] for name in runners}
    with torch.inference_mode():
        for turn in range(TRIAL_RUNS + 2):
            for name, run in runners.items():
                begun = time.perf_counter()
                run(*inputs)
                if turn >= 2:  # the first ones settle memory and the graph's own optimization
                    taken[name].append((time.perf_counter() - begun) * 1e3)
    torch.set_num_threads(threads)
    return {name: statistics.median(values) for name, values in taken.items()}
