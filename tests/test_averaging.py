"""The moving average of weights against its formula, and the exchange that leaves no trace."""

import pytest
import torch
from tiny import build, wrap

from averaging import WeightAverage


@pytest.fixture
def model():
    return wrap(build("gpt2"), "learned_shared")


def test_the_average_follows_its_formula(model):
    torch.manual_seed(0)
    names = dict(model.named_parameters())
    expected = {name: p.detach().clone() for name, p in names.items()}
    average = WeightAverage(model, decay=0.5)
    for step in range(6):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * names[name].detach() for name in names}
    raw = {name: p.detach().clone() for name, p in names.items()}
    with average.in_place_of(model):
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name])
        assert model.base_causallm.get_output_embeddings().weight.data_ptr() == model.embedding.weight.data_ptr(), "tie lost"
    assert all(torch.equal(p, raw[name]) for name, p in model.named_parameters()), "the weights themselves have moved"


def test_the_exchange_reaches_what_the_model_computes(model):
    ids = torch.tensor([[5, 9, 58, 57, 11]])
    average = WeightAverage(model, 0.9)
    first = model(ids).logits
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    moved = model(ids).logits
    with average.in_place_of(model):
        assert torch.equal(model(ids).logits, first)
    assert torch.equal(model(ids).logits, moved) and not torch.equal(first, moved)


def test_an_error_within_puts_the_weights_back(model):
    before = model.embedding.weight.detach().clone()
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model.embedding.weight.add_(1)
    with pytest.raises(RuntimeError), average.in_place_of(model):
        raise RuntimeError
    assert torch.equal(model.embedding.weight, before + 1)


def test_its_state_goes_on(model):
    average, again = WeightAverage(model, 0.9), WeightAverage(model, 0.9)
    with torch.no_grad():
        model.embedding.weight.add_(1)
    average.update(model, 3)
    again.load(model, average.state(model))
    assert all(torch.equal(a, b) for a, b in zip(average.values, again.values))
    state = average.state(model)
    state.pop("embedding.weight", None) or state.popitem()
    with pytest.raises(ValueError, match="other weights"):
        again.load(model, state)
