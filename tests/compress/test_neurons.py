"""compress/methods/neurons.py: narrower networks compute what masked wide ones do; scores find what matters.

Legend: B batch, H neurons of a hidden layer, O outputs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.errors import PlanError
from compress.methods.neurons import neuron_scores, shrink_mlp, watch_hidden
from trainer.models.ranker import BatchNorm, mlp


def trained_like(sizes: list[int], batch_norm: bool = False, seed: int = 0) -> nn.Sequential:
    """The trainer's own network in evaluation mode, with norms and biases off their starting values."""
    torch.manual_seed(seed)
    network = mlp(sizes, dropout=0.1, batch_norm=batch_norm)
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_(0.2, 0.5)
    return network.eval()


def activations(network: nn.Sequential, inputs: Tensor) -> list[Tensor]:
    """Activations of each hidden layer."""
    with torch.no_grad(), watch_hidden(network) as seen:
        network(inputs)
    return seen


def masked(network: nn.Sequential, keep: list[Tensor], means: list[Tensor] | None, inputs: Tensor) -> Tensor:
    """The wide network with removed neurons held at their means, or at zero."""
    linears = [i for i, layer in enumerate(network) if isinstance(layer, nn.Linear)]
    x = inputs
    for place, layer in enumerate(network):
        if place in linears[1:]:
            hidden = linears.index(place) - 1
            on = torch.zeros(x.shape[1], dtype=torch.bool)
            on[keep[hidden]] = True
            x = torch.where(on, x, 0.0 if means is None else means[hidden])
        x = layer(x)
    return x


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("fold", [False, True])
def test_shrink_mlp_equals_the_masked_network(batch_norm: bool, fold: bool) -> None:
    network, inputs = trained_like([10, 16, 12, 6], batch_norm), torch.randn(50, 10)
    keep = [torch.tensor([9, 0, 3, 4, 15]), torch.tensor([2, 7, 11])]
    means = [h.mean(0) for h in activations(network, inputs)] if fold else None
    before = {k: v.clone() for k, v in network.state_dict().items()}
    narrow = shrink_mlp(network, keep, means)
    with torch.no_grad():
        assert torch.allclose(narrow(inputs), masked(network, keep, means, inputs), atol=1e-5)
    linears = [m for m in narrow if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == [(10, 5), (5, 3), (3, 6)]
    assert sum(isinstance(m, BatchNorm) for m in narrow) == (3 if batch_norm else 0)
    assert not narrow.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_shrink_mlp_of_torch_layers_without_biases() -> None:
    torch.manual_seed(1)
    layers = (nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.PReLU(), nn.Linear(7, 2, bias=False))
    network, inputs = nn.Sequential(*layers), torch.randn(64, 5)
    network(inputs)  # moves the running statistics
    network.eval()
    means = [h.mean(0) for h in activations(network, inputs)]
    narrow = shrink_mlp(network, [torch.tensor([1, 2])], means)
    with torch.no_grad():
        assert torch.allclose(narrow(inputs), masked(network, [torch.tensor([1, 2])], means, inputs), atol=1e-5)
    narrow.train()(inputs).sum().backward()
    assert all(p.grad is not None for p in narrow.parameters())


def test_shrink_mlp_that_keeps_all_is_the_same() -> None:
    network, inputs = trained_like([4, 8, 3]), torch.randn(9, 4)
    with torch.no_grad():
        assert torch.equal(shrink_mlp(network, [torch.arange(8)])(inputs), network(inputs))


def test_folding_means_loses_less_than_dropping() -> None:
    network, inputs = trained_like([10, 64, 8]), torch.randn(500, 10)
    seen = activations(network, inputs)
    keep = [torch.arange(32)]
    with torch.no_grad():
        errors = [
            float((shrink_mlp(network, keep, m)(inputs) - network(inputs)).norm()) for m in (None, [seen[0].mean(0)])
        ]
    assert errors[1] < 0.7 * errors[0]


def test_watch_hidden_gives_what_the_next_layer_reads_and_lets_go() -> None:
    network, inputs = trained_like([4, 8, 6, 3]), torch.randn(5, 4)
    with watch_hidden(network) as seen:
        network(inputs)
        output = network(inputs)
        assert [tuple(h.shape) for h in seen] == [(5, 8), (5, 6)]
        assert torch.equal(seen[1], network[3:6](seen[0]))
        gradients = torch.autograd.grad(output.sum(), seen)
    assert [g.shape for g in gradients] == [h.shape for h in seen]
    network(inputs[:2])
    assert len(seen[0]) == 5


def test_neuron_scores_find_the_neurons_that_matter() -> None:
    """A third of the neurons are never on, a third constant, a third carry the signal."""
    torch.manual_seed(2)
    network, inputs = trained_like([6, 30, 1]), torch.randn(400, 6)
    with torch.no_grad():
        network[0].bias[:10] = -100.0
        network[0].weight[10:20] = 0.0
        network[0].bias[10:20] = 3.0
    labels = (inputs[:, 0] > 0).float()
    with watch_hidden(network) as seen:
        loss = nn.functional.binary_cross_entropy_with_logits(network(inputs)[:, 0], labels, reduction="sum")
        gradients = torch.autograd.grad(loss, seen)
    by_activation = neuron_scores(seen[0], next_weight_OH=network[3].weight)
    assert set(by_activation.topk(10).indices.tolist()) == set(range(20, 30))
    by_fisher = neuron_scores(seen[0], gradients_BH=gradients[0])
    assert (by_fisher[:10] == 0).all()
    expected = (seen[0].detach() * gradients[0]).square().mean(0)
    assert torch.allclose(by_fisher, expected)


def test_neuron_scores_take_one_of_the_two() -> None:
    for given in ({}, {"next_weight_OH": torch.ones(1, 3), "gradients_BH": torch.ones(2, 3)}):
        with pytest.raises(PlanError, match="and not both"):
            neuron_scores(torch.ones(2, 3), **given)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([], "0 layers to keep, the network has 1"),
        ([torch.tensor([], dtype=torch.int64)], "hidden layer 0: keep one neuron at least"),
        ([torch.tensor([0, 8])], "from 0 to 7"),
        ([torch.tensor([-1, 2])], "from 0 to 7"),
        ([torch.tensor([2, 2])], "each once"),
    ],
)
def test_shrink_mlp_refuses_neurons_that_do_not_fit(keep: list[Tensor], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        shrink_mlp(trained_like([4, 8, 3]), keep)


@pytest.mark.parametrize("layer", [nn.LayerNorm(8), nn.Softmax(dim=1), nn.GroupNorm(2, 8), nn.Conv1d(8, 8, 1)])
def test_shrink_mlp_refuses_layers_that_mix_neurons(layer: nn.Module) -> None:
    network = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 2))
    with pytest.raises(PlanError, match=rf"layer 1 \({type(layer).__name__}\) mixes neurons"):
        shrink_mlp(network, [torch.arange(3)])
