"""The dense part made smaller: int8 or bf16 layers, fewer neurons, low-rank layers, and a short distillation after.

In: a head in fp32, inputs to calibrate by, and a loss on held-out rows. Out: a new head; the one given stays as it was.
What runs the result is compress/dense.py, what its layers compute is compress/layers.py.

Legend: B batch, I inputs, O outputs, H hidden neurons, S those that stay, R rank.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.errors import PlanError
from compress.layers import CODE_MAX, INPUT_MAX, Bf16Linear, Int8Linear, RowInt8Linear, fuse_chains, to_codes
from trainer.data.schema import Config
from trainer.models.ranker import BatchNorm, Dropout

Inputs = Sequence[tuple[Tensor, Tensor]]  # batches of (dense (B, I), looked up (B, L))
Kind = Literal["fp32", "bf16", "int8", "row8"]
NeuronScore = Literal["activation", "fisher"]

SAMPLE_ROWS = 4096  # rows of a layer's inputs that its scale is chosen on
CLIPS = (0.0, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # shares of the values that each end of a range leaves out
LEAST_WIDTH = 8  # a layer with fewer inputs or outputs costs next to nothing, and the logits deserve fp32
LEAST_SHARE = 0.01  # of a head's products: a layer with fewer of them stays fp32, for fewer bits would save no time
RIDGE = 1e-6  # of the mean variance: keeps the folding of neurons solvable where some are alike


class DensePlan(Config):
    """What to do to the dense part.

    `activations`: one calibrated scale a layer ("static"), or one a row ("row", torch only). `keep_neurons` is the
    share of each hidden layer's neurons that stay, by `neurons`: how much they vary and what reads them, or what the
    loss would lose. `rank` is the share of a layer's output energy that its low-rank form keeps (null: no factors).
    `distill_steps`: how long the smaller head then learns from the one it came from, with `rounds` little by little. A
    layer takes fewer bits where the held-out loss stays within `max_loss` (relative, all layers together). `backend`
    "auto" takes the faster one on the machine that loads it.
    """

    dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    activations: Literal["static", "row"] = "static"
    keep_neurons: float = Field(default=1.0, gt=0, le=1)
    neurons: NeuronScore = "activation"
    rank: float | None = Field(default=None, gt=0, le=1)
    distill_steps: int = Field(default=0, ge=0)
    rounds: int = Field(default=1, ge=1, le=100)
    max_loss: float = Field(default=0.0005, ge=0)
    backend: Literal["auto", "torch", "onnx"] = "auto"

    @model_validator(mode="after")
    def _onnx_can(self) -> DensePlan:
        if self.backend == "onnx" and (self.dtype == "bf16" or (self.dtype == "int8" and self.activations == "row")):
            raise ValueError("backend onnx has neither bf16 layers nor row scales: take backend auto or torch")
        return self

    @property
    def kind(self) -> Kind:
        """The kind of layer it asks for."""
        return "row8" if self.dtype == "int8" and self.activations == "row" else self.dtype


@dataclass(frozen=True)
class LayerStep:
    """One layer's conversion: what it became, and the relative loss that each kind tried added on its own."""

    name: str
    products: int
    kind: Kind
    delta: dict[Kind, float]


def compress_head(
    head: nn.Module,
    plan: DensePlan,
    calibration: Inputs,
    loss: Callable[[nn.Module], float],
    budget: float,
    lessons: Iterable[tuple[Tensor, Tensor]] = (),
    steps: int = 0,
) -> tuple[nn.Module, list[LayerStep]]:
    """All that a plan asks for: fewer neurons, lower rank, `steps` of distillation on `lessons`, then fewer bits.

    Neurons go in the plan's `rounds`, the same share of those left in each, and the steps are divided among the rounds.

    `loss` and `budget` are those of `quantize_head`: the gate is on the last step alone, so whoever narrows a head
    compares its loss with the original's.
    Raises: PlanError as its parts do.
    """
    small = simplify(head)
    taught = iter(lessons)
    for number in range(plan.rounds if plan.keep_neurons < 1 else 1):
        if plan.keep_neurons < 1:
            small = prune_neurons(small, calibration, plan.keep_neurons ** (1 / plan.rounds), plan.neurons)
        last = number == plan.rounds - 1 or plan.keep_neurons == 1
        if plan.rank is not None and last:
            small = factor_layers(small, calibration, plan.rank)
        if steps:
            distill_head(small, head, taught, steps // plan.rounds if plan.keep_neurons < 1 else steps)
    return quantize_head(small, calibration, loss, budget, plan)


def linears(head: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a head by name."""
    return {name: m for name, m in head.named_modules() if isinstance(m, nn.Linear)}


def simplify(head: nn.Module) -> nn.Module:
    """A copy for inference: batch norms folded into the linear layers before them, dropout gone. Names stay."""
    head = copy.deepcopy(head).eval()
    for sequence in [m for m in head.modules() if isinstance(m, nn.Sequential)]:
        before: nn.Module | None = None
        for name, layer in list(sequence.named_children()):
            if isinstance(layer, BatchNorm):
                assert isinstance(before, nn.Linear)
                _fold_batch_norm(before, layer)
            if isinstance(layer, BatchNorm | Dropout | nn.Dropout):
                setattr(sequence, name, nn.Identity())
            else:
                before = layer
    return head


def _fold_batch_norm(linear: nn.Linear, norm: BatchNorm) -> None:
    with torch.no_grad():
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        linear.weight.mul_(scale.unsqueeze(1))
        linear.bias.mul_(scale).add_(norm.bias - norm.running_mean * scale)


def layer_inputs(head: nn.Module, names: Iterable[str], batches: Inputs, rows: int = SAMPLE_ROWS) -> dict[str, Tensor]:
    """The first `rows` inputs (rows, I) that each named layer sees on the batches."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if sum(map(len, seen[name])) < rows:
                seen[name].append(args[0].detach().float().flatten(0, -2))

        return hook

    hooks = [head.get_submodule(name).register_forward_pre_hook(keep(name)) for name in seen]
    try:
        with torch.inference_mode():
            for dense, looked_up in batches:
                head(dense, looked_up)
    finally:
        for hook in hooks:
            hook.remove()
    empty = [name for name, parts in seen.items() if not sum(map(len, parts))]
    if empty:
        raise PlanError(f"dense layers {empty}: no row of the calibration sample reaches them: give more rows")
    return {name: torch.cat(parts)[:rows].clone() for name, parts in seen.items()}


def input_scale(sample_BI: Tensor) -> tuple[float, int]:
    """Scale and zero point of uint8 codes with the least squared error on a sample, over a grid of clipped shares.

    Raises: PlanError for values that are not finite.
    """
    ordered = sample_BI.flatten().sort().values
    if not torch.isfinite(ordered[[0, -1]]).all():
        raise PlanError("dense inputs: a calibration sample must be finite, this one is not: look for NaN or huge rows")
    best, found = float("inf"), (1.0, 0)
    for left_out in CLIPS:
        at = int(left_out * (len(ordered) - 1))
        low, high = min(float(ordered[at]), 0.0), max(float(ordered[len(ordered) - 1 - at]), 0.0)
        scale = max((high - low) / INPUT_MAX, 1e-12)
        zero = round(-low / scale)
        error = float(((to_codes(sample_BI, scale, zero).float() - zero) * scale - sample_BI).square().mean())
        if error < best:
            best, found = error, (scale, zero)
    return found


def to_int8(linear: nn.Linear, sample_BI: Tensor) -> Int8Linear:
    """Per-channel int8 weights, the inputs' scale, and a bias that takes the mean error of both away."""
    made = Int8Linear(linear.in_features, linear.out_features)
    scale, zero = input_scale(sample_BI)
    _weight_codes(linear, made)
    made.in_scale.fill_(scale)
    made.in_zero.fill_(zero)
    rounded = (to_codes(sample_BI, scale, zero).float() - zero) * scale
    made.bias += linear.weight.detach() @ sample_BI.mean(0) - made.weight @ rounded.mean(0)
    return made


def to_row8(linear: nn.Linear) -> RowInt8Linear:
    """Per-channel int8 weights; each input row brings its own scale."""
    made = RowInt8Linear(linear.in_features, linear.out_features)
    _weight_codes(linear, made)
    return made


def to_bf16(linear: nn.Linear) -> Bf16Linear:
    """The weights rounded to bf16."""
    made = Bf16Linear(linear.in_features, linear.out_features, linear.bias is not None)
    made.weight.copy_(linear.weight.detach())
    if linear.bias is not None:
        made.bias.copy_(linear.bias.detach())
    return made


def _weight_codes(linear: nn.Linear, made: Int8Linear | RowInt8Linear) -> None:
    weight = linear.weight.detach()
    made.scale.copy_((weight.abs().amax(1) / CODE_MAX).clamp(min=1e-12))
    made.codes.copy_((weight / made.scale.unsqueeze(1)).round().to(torch.int8))
    if linear.bias is not None:
        made.bias.copy_(linear.bias.detach())


def replace(head: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of another, by name."""
    parent, _, own = name.rpartition(".")
    setattr(head.get_submodule(parent), own, layer)


def quantize_head(
    head: nn.Module,
    calibration: Inputs,
    loss: Callable[[nn.Module], float],
    budget: float,
    plan: DensePlan,
) -> tuple[nn.Module, list[LayerStep]]:
    """Convert layer by layer, the largest first; a layer whose own step of the loss exceeds its share stays wider.

    `loss` gives a head's held-out loss, `budget` the relative increase allowed to all layers together: each may use
    what the others left of it, in equal shares. Layers that fail are tried in bf16, then left in fp32.
    Returns: a new head with its chains fused, and the step of each layer.
    Raises: PlanError where the sample is empty or not finite.
    """
    head = simplify(head)
    layers = worth_fewer_bits(head)
    if plan.kind == "fp32" or not layers:
        return head, []
    samples = layer_inputs(head, layers, calibration)
    one = plan.kind == "bf16" or plan.backend == "onnx"  # ONNX Runtime has no bf16 layers on a CPU
    kinds: tuple[Kind, ...] = (plan.kind,) if one else (plan.kind, "bf16")
    base = now = loss(head)
    steps = []
    order = sorted(layers, key=lambda n: -layers[n].weight.numel())
    for at, name in enumerate(order):
        allowed = (budget * base - (now - base)) / (len(order) - at)
        delta: dict[Kind, float] = {}
        chosen: Kind = "fp32"
        for kind in kinds:
            replace(head, name, _converted(layers[name], kind, samples[name]))
            after = loss(head)
            delta[kind] = (after - now) / base
            if after - now <= allowed:
                chosen, now = kind, after
                break
            replace(head, name, layers[name])
        steps.append(LayerStep(name, layers[name].weight.numel(), chosen, delta))
    fuse_chains(head)
    return head, steps


def worth_fewer_bits(head: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that hold a noticeable share of a head's products."""
    layers = linears(head)
    least = LEAST_SHARE * sum(m.weight.numel() for m in layers.values())
    return {
        name: m
        for name, m in layers.items()
        if min(m.in_features, m.out_features) >= LEAST_WIDTH and m.weight.numel() >= least
    }


def _converted(linear: nn.Linear, kind: Kind, sample: Tensor) -> nn.Module:
    if kind == "int8":
        return to_int8(linear, sample)
    return to_row8(linear) if kind == "row8" else to_bf16(linear)


def prune_neurons(
    head: nn.Module, calibration: Inputs, keep: float, score: NeuronScore = "activation", multiple: int = 16
) -> nn.Module:
    """Take hidden neurons out of every MLP: those that the next layer can do without; the rest stand in for them.

    A neuron counts by its variance times the squared norm of its outgoing weights ("activation"), or by what the loss
    would lose if it stood at its mean ("fisher"). The next layer reads the best
    linear guess of what it loses: W_OS = W_OH C_HS C_SS^-1, means folded into the bias (least squares on the sample).
    Widths are rounded up to `multiple`. Only neurons between two Linear of one Sequential go.
    """
    head = simplify(head)
    for before, after in hidden_pairs(head):
        first, second = head.get_submodule(before), head.get_submodule(after)
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        width = min(-(-int(first.out_features * keep) // multiple) * multiple, first.out_features)
        if width == first.out_features:
            continue
        hidden_BH = layer_inputs(head, [after], calibration, rows=8 * SAMPLE_ROWS)[after]
        if score == "fisher":
            score_H = neuron_fisher(head, after, calibration)
        else:
            score_H = hidden_BH.var(0) * second.weight.detach().square().sum(0)
        stay_S = score_H.topk(width).indices.sort().values
        weight_OS, bias_O = _folded(second, hidden_BH, stay_S)
        replace(head, before, _linear(first.weight.detach()[stay_S], first.bias.detach()[stay_S]))
        replace(head, after, _linear(weight_OS, bias_O))
    return head


def neuron_fisher(head: nn.Module, reader: str, calibration: Inputs) -> Tensor:
    """E[p (1 - p) ((h - mean) dz/dh)^2] (H,) of the neurons h that a named layer reads, over rows and tasks.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, with the Gauss-Newton weight of a
    log loss in place of labels.
    """
    seen: list[Tensor] = []
    hook = head.get_submodule(reader).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    parts: list[tuple[Tensor, Tensor]] = []
    try:
        for dense, looked_up in calibration:
            logits_BT = head(dense.clone(), looked_up.clone())
            hidden_BH = seen.pop()
            spread_BT = torch.sigmoid(logits_BT.detach())
            spread_BT = (spread_BT * (1 - spread_BT)).sqrt()
            for task in range(logits_BT.shape[1]):
                total = (logits_BT[:, task] * spread_BT[:, task]).sum()
                (gradient_BH,) = torch.autograd.grad(total, hidden_BH, retain_graph=True)
                parts.append((hidden_BH.detach(), gradient_BH))
    finally:
        hook.remove()
    hidden, gradient = (torch.cat(part) for part in zip(*parts, strict=True))
    return ((hidden - hidden.mean(0)) * gradient).square().mean(0)


def hidden_pairs(head: nn.Module) -> list[tuple[str, str]]:
    """Names of linear layers that follow each other in one Sequential, with ReLU or nothing between them."""
    pairs = []
    for prefix, sequence in head.named_modules():
        if isinstance(sequence, nn.Sequential):
            kept = [(n, m) for n, m in sequence.named_children() if not isinstance(m, nn.Identity | nn.ReLU)]
            for (n, m), (n2, m2) in itertools.pairwise(kept):
                if isinstance(m, nn.Linear) and isinstance(m2, nn.Linear):
                    pairs.append((f"{prefix}.{n}".lstrip("."), f"{prefix}.{n2}".lstrip(".")))
    return pairs


def _folded(second: nn.Linear, hidden_BH: Tensor, stay_S: Tensor) -> tuple[Tensor, Tensor]:
    """The next layer's weight (O, S) and bias (O,) when only some neurons stay."""
    mean_H = hidden_BH.double().mean(0)
    centred_BH = hidden_BH.double() - mean_H
    kept_BS = centred_BH[:, stay_S]
    cov_SS = kept_BS.t() @ kept_BS
    cov_SS.diagonal().add_(RIDGE * cov_SS.diagonal().mean() + 1e-12)
    weight_OH = second.weight.detach().double()
    weight_OS = torch.linalg.solve(cov_SS, kept_BS.t() @ centred_BH @ weight_OH.t()).t()
    bias_O = weight_OH @ mean_H - weight_OS @ mean_H[stay_S]
    if second.bias is not None:
        bias_O = bias_O + second.bias.detach().double()
    return weight_OS.float(), bias_O.float()


def _linear(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None)
    with torch.no_grad():
        made.weight.copy_(weight_OI)
        if bias_O is not None:
            made.bias.copy_(bias_O)
    return made


def factor_layers(head: nn.Module, calibration: Inputs, energy: float) -> nn.Module:
    """Put two thin layers in the place of one where that is fewer products.

    The factors span the principal directions of the layer's outputs on the sample (the best rank-R guess of what the
    layer gives, not of its weight); R is the least rank that keeps a share `energy` of the outputs' variance.
    """
    head = simplify(head)
    layers = {n: m for n, m in linears(head).items() if min(m.in_features, m.out_features) >= LEAST_WIDTH}
    samples = layer_inputs(head, layers, calibration)
    for name, layer in layers.items():
        weight_OI = layer.weight.detach().double()
        centred_BI = samples[name].double() - samples[name].double().mean(0)
        outputs_BO = centred_BI @ weight_OI.t()
        values, vectors_OO = torch.linalg.eigh(outputs_BO.t() @ outputs_BO)
        share = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum().clamp(min=1e-300)
        rank = int((share < energy).sum()) + 1
        if rank * (layer.in_features + layer.out_features) >= weight_OI.numel():
            continue
        basis_OR = vectors_OO.flip(1)[:, :rank]
        mean_O = weight_OI @ samples[name].double().mean(0)
        bias_O = mean_O - basis_OR @ (basis_OR.t() @ mean_O)  # what the basis cannot carry of the mean
        if layer.bias is not None:
            bias_O = bias_O + layer.bias.detach().double()
        factors = _linear((basis_OR.t() @ weight_OI).float(), None), _linear(basis_OR.float(), bias_O.float())
        replace(head, name, nn.Sequential(*factors))
    return head


def distill_head(
    student: nn.Module, teacher: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], steps: int, rate: float = 5e-4
) -> nn.Module:
    """Teach a smaller fp32 head the original's probabilities: cross entropy with them as soft labels.

    `batches` gives (dense, looked up) and must last for `steps`; Adam under a rate that falls to zero by a cosine.
    Returns: the student, trained in place. Raises: PlanError when the batches end early.
    """
    optimizer = torch.optim.Adam(student.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    teacher.eval()
    student.train()
    done = 0
    for dense, looked_up in itertools.islice(batches, steps):
        with torch.no_grad():
            target = torch.sigmoid(teacher(dense, looked_up))
        loss = F.binary_cross_entropy_with_logits(student(dense, looked_up), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        done += 1
    student.eval()
    if done < steps:
        raise PlanError(f"distillation got {done} batches of {steps}: give more samples, or ask for fewer steps")
    return student
