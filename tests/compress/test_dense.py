"""The dense part made smaller: what each layer computes, what the gate decides, what goes to disk and comes back."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compress_builders import two_tasks_in, world_in
from rich_builders import rich_world_in
from safetensors.torch import load_file, save_file
from test_shared_request import SIDES, lookups, make_head, one_request
from torch import nn

from compress.dense import (
    GRAPH,
    SPEC,
    WEIGHTS,
    DenseRuntime,
    Sides,
    load_runtime,
    make_runtime,
    onnx_graph,
    onnx_runner,
    sides_of,
    traced,
)
from compress.errors import ArtifactError, PlanError
from compress.layers import Bf16Linear, Int8Linear, RowInt8Linear, fuse_chains
from compress.methods.dense import (
    DensePlan,
    compress_head,
    distill_head,
    factor_layers,
    input_scale,
    linears,
    neuron_fisher,
    prune_neurons,
    quantize_head,
    simplify,
    to_int8,
)

ARCHS = ("dcn", "deepfm", "dlrm", "mmoe")
INT8 = DensePlan(dtype="int8")
WIDTH = 6 * 8 - 4  # of the lookups of make_head


def paths_in(folder: Path) -> dict[str, Path]:
    """The files of a folder by name."""
    return {path.name: path for path in folder.iterdir()}


def batches(count: int, rows: int = 256, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs of make_head's heads."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn((rows, 4), generator=generator), torch.randn((rows, WIDTH), generator=generator))
        for _ in range(count)
    ]


def apart(one: nn.Module, other: nn.Module) -> float:
    """Root mean square difference of the logits of two heads."""
    with torch.inference_mode():
        return float(torch.cat([one(*b) - other(*b) for b in batches(2, seed=7)]).square().mean().sqrt())


def make_sides(shape, sides: str, dense_of_item=(False, True, False, True)) -> Sides:
    return Sides(tuple(dense_of_item), tuple(lookups(shape, sides)))


def flat_loss(_head: nn.Module) -> float:
    """A loss that never changes: every conversion passes."""
    return 1.0


# -- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 3.0, -2.0])
def test_int8_layer_equals_its_slow_twin(shift):
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 24), torch.randn(64, 40) + shift
    layer = to_int8(linear, x)
    with torch.inference_mode():
        fast = layer(x)
        layer.oracle = True
        torch.testing.assert_close(fast, layer(x), rtol=1e-5, atol=1e-5)
        error = (fast - linear(x)).square().mean().sqrt() / linear(x).std()
    assert 1e-4 < error < 0.02


def test_fused_chain_equals_its_layers():
    torch.manual_seed(0)
    x = torch.randn(50, 40)
    first, second = nn.Linear(40, 32), nn.Linear(32, 16)
    chain = nn.Sequential(to_int8(first, x), nn.ReLU(), to_int8(second, first(x).relu().detach()), nn.ReLU())
    with torch.inference_mode():
        apart = chain(x)
        fuse_chains(chain)
        assert chain[0].emit is not None
        assert chain[0](x).dtype == torch.uint8
        torch.testing.assert_close(chain(x), apart, rtol=0, atol=0.01)
        assert (chain(x) - apart).abs().mean() < 1e-4  # where rounding falls the other way, by one code


def test_int8_head_is_sent_to_another_process_without_what_is_packed():
    """Whether its layers were used before or not; packed weights belong to the process that packed them."""
    quantized, _ = quantize_head(make_head("dcn")[0], batches(2), flat_loss, 0.0, INT8)
    before = pickle.dumps(quantized)
    with torch.inference_mode():
        expected = [quantized(*b) for b in batches(2, seed=5)]
    layers = [m for m in quantized.modules() if isinstance(m, Int8Linear)]
    assert layers
    assert all(m.packed for m in layers)
    after = pickle.dumps(quantized)
    assert len(after) < 1.05 * len(before)
    for sent in (before, after):
        again = pickle.loads(sent)
        assert not any(m.packed for m in again.modules() if isinstance(m, Int8Linear))
        assert not any("packed" in name for m in again.modules() for name in m._buffers)
        assert again.state_dict().keys() == quantized.state_dict().keys()
        with torch.inference_mode():
            for inputs, logits in zip(batches(2, seed=5), expected, strict=True):
                assert torch.equal(again(*inputs), logits)
    with torch.inference_mode():  # the one that was sent works on
        assert torch.equal(quantized(*batches(2, seed=5)[0]), expected[0])


def test_input_scale_clips_what_is_rare():
    torch.manual_seed(0)
    even = torch.rand(1000, 8)
    scale, zero = input_scale(even)
    assert zero == 0
    assert scale == pytest.approx(1 / 255, rel=0.05)
    spiked = torch.randn(4000, 256)
    spiked[0, 0] = 12.0
    assert input_scale(spiked)[0] < (12 + 4) / 255 * 0.8


def test_input_scale_refuses_nan():
    with pytest.raises(PlanError, match="finite"):
        input_scale(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("plan", [INT8, DensePlan(dtype="int8", activations="row"), DensePlan(dtype="bf16")])
@pytest.mark.parametrize("arch", ARCHS)
def test_scores_do_not_depend_on_the_batch(arch, plan):
    head, _ = make_head(arch)
    small, _ = quantize_head(head, batches(2), flat_loss, 0.0, plan)
    dense, looked_up = batches(1, rows=64, seed=3)[0]
    with torch.inference_mode():
        whole = small(dense, looked_up)
        louder = small(torch.cat([dense, 100 * dense]), torch.cat([looked_up, 100 * looked_up]))[:64]
        alone = torch.cat([small(dense[i : i + 1], looked_up[i : i + 1]) for i in range(64)])
    torch.testing.assert_close(louder, whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone, whole, rtol=0, atol=2e-6)


# -- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_quantized_head_stays_close(arch):
    head, _ = make_head(arch, sequence=False, batch_norm=True)
    small, steps = quantize_head(head, batches(4), flat_loss, 0.0, INT8)
    assert {s.kind for s in steps} == {"int8"}
    assert not {n for n, m in small.named_modules() if isinstance(m, Int8Linear)} ^ {s.name for s in steps}
    spread = torch.cat([head(*b) for b in batches(2, seed=7)]).std()
    assert 0 < apart(small, head) < 0.05 * spread
    assert all(isinstance(m, nn.Linear) for m in linears(head).values())  # the one given stays as it was


def test_gate_keeps_wider_what_costs_too_much():
    head, _ = make_head("dlrm")

    def loss(candidate: nn.Module) -> float:
        """top.2 may be bf16 at most, bottom.0 neither."""
        modules = dict(candidate.named_modules())
        worse = isinstance(modules["top.2"], Int8Linear) or isinstance(modules["bottom.0"], Int8Linear | Bf16Linear)
        return 1.1 if worse else 1.0

    small, steps = quantize_head(head, batches(2), loss, 0.01, INT8)
    kinds = {s.name: s.kind for s in steps}
    assert kinds["top.0"] == "int8"
    assert kinds["top.2"] == "bf16"
    assert kinds.get("bottom.0", "fp32") == "fp32"
    assert loss(small) == 1.0


def test_plan_refuses_what_onnx_has_not():
    with pytest.raises(ValueError, match="backend onnx"):
        DensePlan(dtype="bf16", backend="onnx")
    with pytest.raises(ValueError, match="backend onnx"):
        DensePlan(dtype="int8", activations="row", backend="onnx")


# -- fewer neurons, lower rank, distillation -------------------------------------------------------------------------


def test_pruning_folds_the_others_into_what_stays():
    """Twin neurons and constant ones cost nothing to lose."""
    torch.manual_seed(0)
    head, _ = make_head("dlrm")
    first, second = head.top[0], head.top[2]
    wide_first, wide_second = nn.Linear(first.in_features, 48), nn.Linear(48, second.out_features)
    with torch.no_grad():
        wide_first.weight.copy_(torch.cat([first.weight, first.weight * 0]))
        wide_first.bias.copy_(torch.cat([first.bias, torch.full((24,), 0.7)]))
        wide_second.weight.copy_(torch.cat([second.weight, torch.randn(16, 24)], dim=1))
    head.top[0], head.top[2] = wide_first, wide_second
    small = prune_neurons(head, batches(4), 0.5, multiple=1)
    assert small.top[0].out_features == 24
    assert small.top[2].in_features == 24
    assert apart(small, head) < 0.02  # without the folding: above 1
    assert head.top[0].out_features == 48


def test_pruning_beats_dropping():
    head, _ = make_head("dcn")
    small = prune_neurons(head, batches(8), 0.5, multiple=1)
    dropped = prune_neurons(head, batches(8), 0.5, multiple=1)
    with torch.no_grad():
        score = torch.cat([head.deep[1](head.deep[0](torch.cat(b, dim=1))) for b in batches(8)]).var(0)
        stay = (score * head.deep[2].weight.square().sum(0)).topk(12).indices.sort().values
        dropped.deep[2].weight.copy_(head.deep[2].weight[:, stay])
        dropped.deep[2].bias.copy_(head.deep[2].bias)
    assert apart(small, head) < 0.95 * apart(dropped, head)


def test_full_energy_finds_the_true_rank():
    head, _ = make_head("mmoe")
    with torch.no_grad():
        layer = head.experts[0][0]
        layer.weight.copy_(torch.randn(24, 3) @ torch.randn(3, layer.in_features) * 0.1)
    small = factor_layers(head, batches(4), 0.999999)
    assert isinstance(small.experts[0][0], nn.Sequential)
    assert small.experts[0][0][0].out_features == 3
    assert apart(small, head) < 1e-2


def test_distillation_brings_a_pruned_head_back():
    head, _ = make_head("dlrm")
    small = prune_neurons(head, batches(8), 0.5, multiple=1)
    before = apart(small, head)
    endless = itertools.cycle(batches(16, seed=2))
    distill_head(small, head, endless, 150, rate=3e-3)
    assert apart(small, head) < 0.8 * before
    with pytest.raises(PlanError, match="3 batches of 5"):
        distill_head(small, head, batches(3), 5)


def test_plan_is_carried_out_in_order():
    head, _ = make_head("dlrm")
    plan = DensePlan(dtype="int8", keep_neurons=0.6, rank=0.9999)
    with torch.no_grad():
        head.bottom[0].bias.copy_(head.bottom[0].bias + 1)
    small, steps = compress_head(head, plan, batches(4), flat_loss, 0.0, batches(20, seed=3), 20)
    assert small.top[0].out_features == 16
    assert {s.kind for s in steps} == {"int8"}
    spread = torch.cat([head(*b) for b in batches(2, seed=7)]).std()
    assert 0 < apart(small, head) < 0.8 * spread  # a third of few neurons gone, and hardly a lesson


# -- one request, both backends, files -------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_int8_request_equals_int8_batch(arch, sequence):
    head, shape = make_head(arch, sequence)
    cut = [one_request(shape, SIDES["alternating"], [False, True, False, True], 90)[:2]]
    small, _ = quantize_head(head, cut, flat_loss, 0.0, INT8)
    sides = make_sides(shape, SIDES["alternating"])
    runtime = DenseRuntime(small, sides, DensePlan(dtype="int8", backend="torch"))
    graph = onnx_runner(onnx_graph(small, sides))
    for candidates in (1, 2, 33):
        dense, looked_up, *parts = one_request(shape, SIDES["alternating"], [False, True, False, True], candidates)
        with torch.inference_mode():
            plain = runtime(dense, looked_up)
        close = (runtime.rank(*parts) - plain).abs()
        assert close.max() < 0.02  # a value between two codes
        assert close.mean() < 1e-3
        assert (graph(*parts) - plain).abs().max() < 0.02
        alone = torch.cat([graph(*parts[:2], parts[2][i : i + 1], parts[3][i : i + 1]) for i in range(candidates)])
        torch.testing.assert_close(alone, graph(*parts), rtol=0, atol=1e-5)


@pytest.mark.parametrize("plan", [DensePlan(), INT8, DensePlan(dtype="int8", activations="row")])
def test_files_bring_the_same_scores_back(tmp_path, plan):
    head, shape = make_head("dlrm", batch_norm=True)
    with torch.no_grad():
        head.top[0].weight.copy_(torch.randn(24, 3) @ torch.randn(3, head.top[0].in_features) * 0.1)
    small = factor_layers(prune_neurons(head, batches(4), 0.7, multiple=1), batches(4), 0.99999)
    assert any(isinstance(m, nn.Sequential) and len(m) == 2 for m in small.modules()), small
    small, _ = quantize_head(small, batches(4), flat_loss, 0.0, plan)
    runtime = make_runtime(small, make_sides(shape, SIDES["grouped"]), plan)
    runtime.save(tmp_path)
    again = load_runtime(paths_in(tmp_path), make_head("dlrm", batch_norm=True)[0], runtime.sides)
    dense, looked_up = batches(1, seed=8)[0]
    with torch.inference_mode():
        assert torch.equal(again(dense, looked_up), runtime(dense, looked_up))
    kinds = {type(m) for m in again.head.modules()} & {Int8Linear, RowInt8Linear}
    assert kinds == ({Int8Linear if plan.activations == "static" else RowInt8Linear} if plan.dtype == "int8" else set())
    assert (tmp_path / GRAPH).exists() == (plan.activations == "static")
    assert {p.name for p in tmp_path.iterdir()} <= {SPEC, WEIGHTS, GRAPH}


def test_faster_backend_is_taken(tmp_path):
    head, shape = make_head("deepfm")
    runtime = make_runtime(simplify(head), make_sides(shape, SIDES["grouped"]), DensePlan())
    assert set(runtime.trials_ms) == {"torch", "onnx"}
    assert runtime.backend == min(runtime.trials_ms, key=runtime.trials_ms.get)
    forced = DenseRuntime(runtime.head, runtime.sides, DensePlan(backend="onnx"), runtime.graph)
    assert forced.backend == "onnx"
    with pytest.raises(PlanError, match="backend onnx"):
        DenseRuntime(runtime.head, runtime.sides, DensePlan(backend="onnx"))


@pytest.mark.parametrize("make", [world_in, two_tasks_in, lambda base: rich_world_in(base, "dcn")])
def test_sides_follow_the_schema(tmp_path_factory, make):
    model = make(tmp_path_factory.getbasetemp()).fp32
    sides = sides_of(model.transform)
    of_request, lookups_of_request, of_items, lookups_of_items = sides.widths()
    assert of_request + of_items == len(model.transform.dense_names)
    parts = sides.example(9)
    dense = torch.empty(9, of_request + of_items)
    looked_up = torch.empty(9, lookups_of_request + lookups_of_items)
    item_dense = torch.tensor(sides.dense_of_item, dtype=torch.bool)
    item_lookups = torch.tensor([item for width, item in sides.lookups for _ in range(width)])
    dense[:, ~item_dense], dense[:, item_dense] = parts[0], parts[2]
    looked_up[:, ~item_lookups], looked_up[:, item_lookups] = parts[1], parts[3]
    with torch.inference_mode():
        ranked = traced(model.head, sides)(*parts)
        torch.testing.assert_close(ranked, model.head(dense, looked_up), rtol=0, atol=1e-5)


def test_graph_holds_codes_not_floats():
    head, shape = make_head("deepfm")
    wide = nn.Linear(24, 2000)
    head.deep = nn.Sequential(head.deep[0], nn.ReLU(), wide, nn.ReLU(), nn.Linear(2000, 16), nn.ReLU())
    small, _ = quantize_head(head, batches(1), flat_loss, 0.0, INT8)
    assert len(onnx_graph(small, make_sides(shape, SIDES["grouped"]))) < 2.2 * (24 + 16) * 2000


def test_without_onnxruntime_torch_ranks(monkeypatch):
    head, shape = make_head("deepfm")
    made = make_runtime(simplify(head), make_sides(shape, SIDES["grouped"]), DensePlan())
    monkeypatch.setattr("compress.dense.has_onnxruntime", lambda: False)
    assert DenseRuntime(made.head, made.sides, DensePlan(), made.graph).backend == "torch"


def saved(folder):
    head, shape = make_head("dlrm")
    small, _ = quantize_head(head, batches(2), flat_loss, 0.0, INT8)
    runtime = make_runtime(small, make_sides(shape, SIDES["grouped"]), INT8)
    runtime.save(folder)
    return head, runtime.sides


def test_damaged_files_are_refused(tmp_path):
    head, sides = saved(tmp_path)
    spec = json.loads((tmp_path / SPEC).read_text())
    weights = load_file(tmp_path / WEIGHTS)

    def refused(match: str) -> None:
        with pytest.raises(ArtifactError, match=match):
            load_runtime(paths_in(tmp_path), head, sides)

    wrong = json.loads(json.dumps(spec))
    wrong["layers"]["top.0"]["outputs"] = 1 << 19
    (tmp_path / SPEC).write_text(json.dumps(wrong))
    refused("has shape")
    wrong = json.loads(json.dumps(spec))
    wrong["layers"]["../top"] = wrong["layers"].pop("top.0")
    (tmp_path / SPEC).write_text(json.dumps(wrong))
    refused("not those of this model")
    (tmp_path / SPEC).write_text("[" * 10_000)
    refused(SPEC)
    (tmp_path / SPEC).write_text(json.dumps(spec))
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-40])
    refused("cannot be read")
    save_file(weights | {"top.0.scale": weights["top.0.scale"] * float("nan")}, tmp_path / WEIGHTS)
    refused("not finite")
    save_file(weights | {"top.0.scale": weights["top.0.scale"] * 3}, tmp_path / WEIGHTS)
    refused("differ")  # the graph still holds the weights that were written
    save_file(weights, tmp_path / WEIGHTS)
    (tmp_path / GRAPH).write_bytes(b"\x08\x07 not a graph")
    refused(GRAPH)
    (tmp_path / GRAPH).unlink()
    assert load_runtime(paths_in(tmp_path), head, sides).backend == "torch"


def test_graph_that_reads_other_files_is_refused(tmp_path):
    import onnx

    head, sides = saved(tmp_path)
    model = onnx.load(tmp_path / GRAPH)
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    model.graph.initializer[0].external_data.add(key="location", value="../secret")
    (tmp_path / GRAPH).write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="other files"):
        load_runtime(paths_in(tmp_path), head, sides)
    model = onnx.load(tmp_path / GRAPH, load_external_data=False)
    model.graph.node[0].domain = "com.evil"
    (tmp_path / GRAPH).write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="code of its own"):
        load_runtime(paths_in(tmp_path), head, sides)


def test_row_scales_span_one_row():
    torch.manual_seed(0)
    layer = RowInt8Linear(16, 8)
    layer.codes.copy_(torch.randint(-127, 127, (8, 16)))
    x = torch.randn(4, 16) * torch.tensor([[1e-3], [1.0], [1e3], [0.0]])
    exact = x @ layer.codes.float().t()
    error = (layer(x) - exact).norm(dim=1)[:3] / exact.norm(dim=1)[:3]
    assert error.max() < 0.02
    assert torch.equal(layer(x)[3], torch.zeros(8))


def test_fisher_finds_the_neurons_that_the_loss_minds() -> None:
    """By hand for one hidden layer: the gradient of the logit by a neuron is its outgoing weight."""
    torch.manual_seed(3)
    head = TwoLayers()
    batches = [(torch.randn(300, 5), torch.randn(300, 3)) for _ in range(2)]
    hidden = torch.cat([torch.relu(head.mlp[0](torch.cat(b, dim=1))) for b in batches]).detach()
    p = torch.sigmoid(torch.cat([head(*b) for b in batches]).detach())
    expected = (p * (1 - p) * ((hidden - hidden.mean(0)) * head.mlp[2].weight.detach()).square()).mean(0)
    torch.testing.assert_close(neuron_fisher(head, "mlp.2", batches), expected, rtol=1e-4, atol=1e-8)
    kept = prune_neurons(head, batches, 0.5, "fisher", multiple=1).mlp[0].weight
    wanted = head.mlp[0].weight[expected.topk(8).indices.sort().values]
    torch.testing.assert_close(kept, wanted)


class TwoLayers(torch.nn.Module):
    """8 inputs, 16 neurons of very different weight, one logit."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        with torch.no_grad():
            self.mlp[2].weight *= torch.logspace(-2, 1, 16)

    def forward(self, dense: torch.Tensor, looked_up: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1)."""
        return self.mlp(torch.cat([dense, looked_up], dim=1))


def test_neurons_go_little_by_little_with_lessons_between() -> None:
    head = make_head("dlrm")[0]
    seen: list[int] = []

    def lessons() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            seen.append(1)
            yield batches(1)[0]

    plan = DensePlan(keep_neurons=0.25, rounds=2, distill_steps=6)
    small, _ = compress_head(head, plan, batches(4), lambda _head: 1.0, 0.0, lessons(), plan.distill_steps)
    widths = {n: m.out_features for n, m in linears(small).items()}
    once, _ = compress_head(head, DensePlan(keep_neurons=0.25), batches(4), lambda _head: 1.0, 0.0)
    assert widths == {n: m.out_features for n, m in linears(once).items()}
    assert 6 <= len(seen) <= 7
