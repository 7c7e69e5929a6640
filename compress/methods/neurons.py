"""Structured pruning of a multilayer perceptron: whole neurons go, what they gave on average moves into a bias.

A hidden layer is what lies between two linear layers of one nn.Sequential; the outputs of the last linear layer are
read by others and stay. Layers between work on each neuron alone (activation, dropout, batch norm).

Legend: B batch, H neurons of a hidden layer, O outputs of the next linear layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.errors import PlanError


@contextmanager
def watch_hidden(mlp: nn.Sequential) -> Iterator[list[Tensor]]:
    """Yield a list that each forward fills with the activations (B, H) of all hidden layers, in order.

    They keep their graph: torch.autograd.grad(loss, activations) gives what `neuron_scores` takes as gradients.
    """
    seen: list[Tensor] = []

    def begin(_module: nn.Module, _inputs: tuple[Tensor, ...]) -> None:
        seen.clear()

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    handles = [mlp.register_forward_pre_hook(begin)]
    handles += [mlp[place].register_forward_pre_hook(keep) for place in _linears(mlp)[1:]]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def neuron_scores(
    activations_BH: Tensor,
    next_weight_OH: Tensor | None = None,
    gradients_BH: Tensor | None = None,
) -> Tensor:
    """What removing each neuron would cost: scores (H,) fp32, higher for neurons to keep.

    With the next layer's weight: spread of the activation times the norm of its column, since the mean moves into the
    bias. With gradients of each row's own loss: E[(h dL/dh)^2], the Fisher information of a gate on the neuron.
    Raises: PlanError unless exactly one of the two is given.
    Source: Molchanov et al., 1906.10771, for the second.
    """
    activations_BH = activations_BH.detach().float()
    if (next_weight_OH is None) == (gradients_BH is None):
        raise PlanError("neuron scores: give the next layer's weight or the gradients, and not both")
    if gradients_BH is not None:
        return (activations_BH * gradients_BH.detach().float()).square().mean(0)
    assert next_weight_OH is not None
    return activations_BH.std(0, correction=0) * next_weight_OH.detach().float().norm(dim=0)


def shrink_mlp(mlp: nn.Sequential, keep: Sequence[Tensor], means: Sequence[Tensor] | None = None) -> nn.Sequential:
    """A narrower copy that computes with the kept neurons alone.

    keep: of each hidden layer the indices (h,) of neurons that stay. means: of each the mean activation (H,), which
    takes the place of removed neurons; without it they count as zero.
    Raises: PlanError where keep does not fit the hidden layers, or a layer between mixes neurons.
    """
    linears = _linears(mlp)
    widths = [mlp[place].out_features for place in linears[:-1]]
    kept = _checked(keep, widths)
    layers = [copy.deepcopy(layer) for layer in mlp]
    for hidden, (indices, width) in enumerate(zip(kept, widths, strict=True)):
        before, after = linears[hidden], linears[hidden + 1]
        for place in range(before + 1, after):
            layers[place] = _narrowed(layers[place], indices, width, place)
        following = layers[after]
        if means is not None:
            gone = torch.ones(width, dtype=torch.bool)
            gone[indices] = False
            with torch.no_grad():
                shift = following.weight[:, gone] @ means[hidden].to(following.weight)[gone]
                bias = shift if following.bias is None else following.bias + shift
            following.bias = nn.Parameter(bias)
        layers[before] = _linear(layers[before].weight[indices], _at(layers[before].bias, indices))
        layers[after] = _linear(following.weight[:, indices], following.bias)
    return nn.Sequential(*layers).train(mlp.training)


def _linears(mlp: nn.Sequential) -> list[int]:
    return [place for place, layer in enumerate(mlp) if isinstance(layer, nn.Linear)]


def _checked(keep: Sequence[Tensor], widths: Sequence[int]) -> list[Tensor]:
    """Kept neurons, rising."""
    if len(keep) != len(widths):
        raise PlanError(f"neurons of {len(keep)} layers to keep, the network has {len(widths)} hidden layers")
    kept = [torch.unique(indices) for indices in keep]
    for layer, (indices, given, width) in enumerate(zip(kept, keep, widths, strict=True)):
        if not len(indices) or len(indices) != len(given) or int(indices[0]) < 0 or int(indices[-1]) >= width:
            raise PlanError(f"hidden layer {layer}: keep one neuron at least, each once, from 0 to {width - 1}")
    return kept


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _at(values: Tensor | None, indices: Tensor) -> Tensor | None:
    return None if values is None else values[indices]


def _narrowed(layer: nn.Module, indices: Tensor, width: int, place: int) -> nn.Module:
    """A layer that works on each neuron alone, for the kept ones: its vectors (H,) are cut, and the result is tried."""
    narrow = copy.deepcopy(layer)
    for module in narrow.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.shape == (width,):
                    cut = tensor.detach()[indices].clone()
                    tensors[name] = nn.Parameter(cut) if isinstance(tensor, nn.Parameter) else cut
    probe_BH = torch.randn((8, width), generator=torch.Generator().manual_seed(0))
    training = layer.training
    try:
        with torch.no_grad():
            same = torch.allclose(narrow.eval()(probe_BH[:, indices]), layer.eval()(probe_BH)[:, indices], atol=1e-5)
    except (RuntimeError, ValueError):  # it wants all of its inputs
        same = False
    layer.train(training)
    if not same:
        raise PlanError(
            f"layer {place} ({type(layer).__name__}) mixes neurons: only layers that do not can be narrowed"
        )
    return narrow.train(training)
