"""What Cognate minimises, computed by hand, and where gradients go."""

import math

import pytest
import torch
import torch.nn.functional as F
from cognate_material import at_labels, close, cognate, tokens

from backbones import halting
from backbones.halting import divergence_from_prior, halting_log_probs, step_cross_entropy


def by_hand(logits, labels, real=None):
    """Cross-entropy of each labelled token, shifted."""
    losses = []
    for b in range(len(labels)):
        for t in range(1, labels.shape[1]):
            if labels[b, t] != -100 and (real is None or real[b, t]):
                losses.append(-logits[b, t - 1].log_softmax(-1)[labels[b, t]])
    return torch.stack(losses)


def some_labels(ids):
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, 6] = -100
    return labels


# ---------------------------------------------------------------- cross-entropy


def test_evaluation_measures_the_shifted_cross_entropy_of_its_logits():
    model, ids = cognate(specialization="speed"), tokens(3, 9)
    labels = some_labels(ids)
    out = model(ids, labels=labels)
    close(out.loss, by_hand(out.logits, labels).mean())
    assert out.loss_ce is out.loss
    every = model(ids, return_all_steps=True).all_logits
    close(out.step_losses, torch.stack([by_hand(logits, labels).mean() for logits in every]))


def test_padding_is_masked_by_the_mask_and_a_real_end_is_counted():
    model, ids = cognate(), tokens(2, 9)
    ids[0, 7:] = ids[1, 8] = 59  # the end token, which is the padding token too
    mask = torch.ones_like(ids)
    mask[0, 8] = 0
    out = model(ids, mask, labels=ids)
    losses = by_hand(out.logits, ids, mask)
    assert len(losses) == 7 + 8
    close(out.loss, losses.mean())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("act_loss", ["ponder", "bce"])
def test_padding_on_either_side_changes_no_loss(act_loss, training):
    model, ids = cognate(act_loss=act_loss).train(training), tokens(2, 9)
    expected = model(ids, labels=ids)
    for sides in ((5, 0), (0, 4), (3, 2)):
        padded, mask = F.pad(ids, sides, value=59), F.pad(torch.ones_like(ids), sides)
        out = model(padded, mask, labels=padded)
        for key in ("loss", "loss_ce", "loss_act", "loss_gate", "step_losses", "halting_steps"):
            close(getattr(out, key), getattr(expected, key))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("act_loss", ["ponder", "bce"])
def test_nothing_to_predict_is_a_finite_zero(act_loss, training):
    model, ids = cognate(act_loss=act_loss).train(training), tokens(2, 5)
    for inputs, labels in ((ids[:, :1], ids[:, :1]), (ids, torch.full_like(ids, -100))):
        loss = model(inputs, labels=labels).loss
        loss.backward()
        assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("at_once", [60, 130, 10**6])
def test_cross_entropy_in_chunks(at_once, monkeypatch):
    monkeypatch.setattr(halting, "LOGITS_AT_ONCE", at_once)
    states = torch.randn(5, 4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(60, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 60, (5,))
    widest = []

    def watch(module_input, *args):
        widest.append(len(module_input))
        return plain(module_input, *args)

    plain = halting._cross_entropy
    monkeypatch.setattr(halting, "_cross_entropy", watch)
    loss, correct = step_cross_entropy(states, weight, targets)
    logits = states @ weight.T
    expected = -logits.log_softmax(-1)[torch.arange(5), :, targets]
    close(loss, expected)
    assert torch.equal(correct, logits.argmax(-1) == targets[:, None])
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (states, weight)) for x in (loss, expected))):
        close(a, b)
    assert max(widest) == min(20, max(1, at_once // 60))


def test_losses_of_a_bfloat16_model_are_float32():
    model, ids = cognate(dtype=torch.bfloat16).train(), tokens(2, 9)
    out = model(ids, labels=ids)
    assert {x.dtype for x in (out.loss, out.loss_ce, out.loss_act, out.loss_gate, out.step_losses)} == {torch.float32}
    assert out.logits.dtype == torch.bfloat16


# ---------------------------------------------------------------- what training minimises


def halting_distribution(logits):
    """p_1 .. p_R of one token, as products."""
    rates = [*torch.sigmoid(logits[1:-1]).tolist(), 1.0]
    return [rate * math.prod(1 - r for r in rates[:n]) for n, rate in enumerate(rates)]


def gate_term(out):
    return -0.001 * out.gate_entropy.mean()


def test_ponder_loss_by_hand():
    model, ids = cognate().train(), tokens(2, 8)
    labels = some_labels(ids)
    out, columns = model(ids, labels=labels, return_all_steps=True), model.model(input_ids=ids).columns
    p = torch.tensor([[halting_distribution(token) for token in row] for row in columns["halt_logits"]]).double()
    close(p.sum(-1), torch.ones(2, 8).double(), 1e-6)
    ce = torch.stack([by_hand(logits, labels) for logits in out.all_logits[1:]], 1)
    close(out.loss_ce, (at_labels(p, labels) * ce).sum(1).mean(), 1e-6)
    prior = torch.tensor([4 / 7, 2 / 7, 1 / 7]).double()
    close(out.loss_act, 0.01 * (p * (p / prior).log()).sum(-1).mean(), 1e-6)
    close(out.loss_gate, gate_term(out))
    close(out.loss, out.loss_ce + out.loss_act + out.loss_gate)


def test_bce_loss_by_hand():
    model, ids = cognate(act_loss="bce").train(), tokens(2, 8)
    labels = some_labels(ids)
    out = model(ids, labels=labels, return_all_steps=True)
    ce = torch.stack([by_hand(logits, labels) for logits in out.all_logits], 1)
    weights = torch.tensor([0.33, 0.5, 0.75, 1.0]).double()
    close(out.loss_ce, (ce @ weights / weights.sum()).mean(), 1e-6)
    q, target = at_labels(out.halt_probs, labels)[:, 1:], torch.ones(len(ce), 3).double()
    for token, losses in enumerate(ce):
        for n in (1, 2):
            target[token, n - 1] = losses[n] - losses[n + 1 :].min() <= 0.05
    assert 0.1 < target[:, :2].mean() < 0.9
    bce = F.binary_cross_entropy(q, target)
    every = out.halt_probs[..., 1:]
    entropy = -(every * every.log() + (1 - every) * (1 - every).log()).mean()
    variance = (every - every.mean(1, keepdim=True)).square().mean((0, 1))
    spread = 0.01 * (0.1 - variance).clamp(min=0).mean() - 0.001 * entropy
    close(out.loss_act, 0.01 * (bce + spread), 1e-8)
    close(out.loss, out.loss_ce + out.loss_act + gate_term(out))


def test_without_act_the_steps_are_weighted():
    model, ids = cognate(use_act=False).train(), tokens(2, 8)
    out = model(ids, labels=ids, return_all_steps=True)
    weights = torch.tensor([0.33, 0.5, 0.75, 1.0]).double()
    close(out.loss_ce, out.step_losses @ weights / weights.sum(), 1e-6)
    assert out.loss_act == 0 and set(out.token_halting_steps.flatten().tolist()) == {3}


@pytest.mark.parametrize("act_loss", ["ponder", "bce"])
def test_the_pieces_for_the_wrapper_add_up_to_the_loss(act_loss):
    model, ids = cognate(act_loss=act_loss).train(), tokens(3, 8)
    mask, labels = torch.ones_like(ids), some_labels(ids)
    mask[1, 6:], labels[1, 6:] = 0, -100
    out = model.model(input_ids=ids, attention_mask=mask)
    assert all(x.shape[:2] == (3, 8) for x in out.columns.values())
    n = {key: at_labels(x, labels) for key, x in out.columns.items()}
    targets = labels[:, 1:][labels[:, 1:] != -100]
    tokens_N = model.token_losses(at_labels(out.last_hidden_state, labels), n, targets)
    total = tokens_N.mean() + model.extra_loss(out.columns, mask.bool())
    close(total, model(ids, mask, labels=labels).loss)
    assert "states" not in model.eval().model(input_ids=ids).columns  # evaluation keeps no answers of all steps


def test_probabilities_and_prior_hold_at_extreme_logits():
    logits = torch.tensor([[60.0, 60.0, 60.0], [-60.0, -60.0, -60.0], [0.0, 0.0, 0.0]], requires_grad=True)
    p = halting_log_probs(logits).exp()
    close(p, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.25, 0.25]]), 1e-6)
    divergence = divergence_from_prior(logits, 0.5)
    close(divergence[:2], torch.tensor([7 / 4, 7.0]).log(), 1e-5)
    divergence.sum().backward()
    assert logits.grad.isfinite().all() and divergence[2] < 0.05


# ---------------------------------------------------------------- compute_act_loss


@pytest.mark.parametrize("n_rows", [1, 4])
def test_act_loss_takes_every_form_of_correct(n_rows):
    model, q = cognate(), torch.rand(n_rows, 6, 1, generator=torch.Generator().manual_seed(0)).double()
    by_row = torch.arange(n_rows) % 2
    spread = model.compute_act_loss(q, 1) - F.binary_cross_entropy(q, torch.full_like(q, 0.5))
    by_token = by_row[:, None].expand(-1, 6)
    for is_correct in (by_row, by_token, by_token[..., None], by_row.bool()):
        expected = F.binary_cross_entropy(q[..., 0], by_token.double()) + spread
        close(model.compute_act_loss(q, 1, is_correct), expected, 1e-8)
        close(model.compute_act_loss(q[..., 0], 1, is_correct), expected, 1e-8)


def test_the_hinge_asks_for_variance_within_sequences():
    q = torch.tensor([[0.2, 0.4], [0.9, 0.9]]).double()  # variance 0.01 in one row, none in the other: 0.005
    losses = {w: cognate(act_diversity_weight=w).compute_act_loss(q, 1) for w in (0.0, 0.01, 1.0)}
    close(losses[0.01] - losses[0.0], torch.tensor(0.01 * (0.1 - 0.005)).double())
    close(losses[1.0] - losses[0.0], torch.tensor(0.1 - 0.005).double())
    spread = torch.tensor([[0.05, 0.95], [0.95, 0.05]]).double()  # variance 0.2: nothing more to ask
    close(*(cognate(act_diversity_weight=w).compute_act_loss(spread, 1) for w in (0.0, 1.0)))


def test_accuracies_of_the_ema_rule_move_at_updates_only():
    model, ids = cognate(act_loss="bce", act_target="ema").train(), tokens(2, 8)
    head = model.model.act_head
    assert head.step_accuracy.shape == (4,) and "model.act_head.step_accuracy" in model.state_dict()
    out = model(ids, labels=ids, return_all_steps=True)
    model.eval()(ids, labels=ids)
    assert not head.step_accuracy.any()
    right = torch.stack([(logits[:, :-1].argmax(-1) == ids[:, 1:]).double().mean() for logits in out.all_logits])
    model.after_update(gather=lambda x: torch.cat([x, x]))  # two ranks with the same batch
    close(head.step_accuracy, 0.02 * right, 1e-6)
    before = head.step_accuracy.clone()
    model.after_update()  # nothing seen since
    assert torch.equal(head.step_accuracy, before)
    head.step_accuracy.copy_(torch.tensor([0.0, 0.3, 0.7, 0.5]))
    correct = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]])
    assert head.gain_targets(torch.zeros(2, 4), correct)[0].tolist() == [1, 0, 0]  # 0.5 > 0.3, 0.5 < 0.7, 0.5 = 0.5
    q = torch.tensor([[0.8, 0.6]])
    halves = model.compute_act_loss(q, 1, torch.tensor([1, 0])) - model.compute_act_loss(q, 2, torch.tensor([1, 0]))
    close(
        halves.double(),
        (F.binary_cross_entropy(q, torch.ones(1, 2)) - F.binary_cross_entropy(q, torch.zeros(1, 2))).double(),
        1e-5,
    )


def test_the_default_has_no_buffer():
    assert not list(cognate().buffers())
    assert cognate().after_update() is None


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "changes", [{}, {"act_loss": "bce"}, {"memory_type": "titans"}, {"detach_between_steps": True}], ids=str
)
@pytest.mark.parametrize("n_rows", [1, 3])
def test_every_parameter_learns(n_rows, changes):
    model, ids = cognate(**changes).train(), tokens(n_rows, 9)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not name.endswith("k_proj.bias"):  # which adds the same to all scores of a query: softmax doesn't see it
            assert parameter.grad.abs().amax() > 1e-12, name


@pytest.mark.parametrize("detached", [False, True])
def test_each_steps_loss_reaches_the_trunk_and_earlier_steps_unless_detached(detached):
    model, ids = cognate(detach_between_steps=detached).train(), tokens(2, 9)
    for n, loss in enumerate(model(ids, labels=ids).step_losses):
        first = model.model.layers[0].attention.q_proj.weight
        start = model.model.recursion.to_answer.weight
        of_trunk, of_start = torch.autograd.grad(loss, (first, start), retain_graph=True, allow_unused=True)
        assert of_trunk.abs().amax() > 1e-9  # the features stay attached
        assert (of_start is None or not of_start.any()) == (detached and n > 1)
