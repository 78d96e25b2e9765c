"""Halting that a small training on easy and hard tokens brings about: it follows difficulty, and costs no accuracy."""

import pytest
import torch
import torch.nn.functional as F
from cognate_material import SHAPE, at_labels

from backbones.cognate import SPECIALIZATIONS, CognateConfig, CognateForCausalLM


def reaching_back(n_rows: int, generator):
    """Symbols 0 .. 3, each marked easy (ask for the one before) or hard (ask for the one before that).

    With a window of two columns and no trunk, one refinement step reaches one column back, so hard tokens need two.
    """
    symbols = torch.randint(0, 4, (n_rows, 10), generator=generator)
    hard = torch.rand(n_rows, 10, generator=generator) < 0.5
    target = torch.where(hard, symbols.roll(2, 1), symbols.roll(1, 1))
    labels = torch.full_like(symbols, -100)
    labels[:, 3:] = target[:, 2:-1]
    return symbols + 4 * hard, labels, hard


@pytest.fixture(scope="module")
def trained():
    """(model that learned the above, fresh rows)."""
    n_updates, generator = 330, torch.Generator().manual_seed(1)
    shape = {"vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 0, "attention_window": 2, "memory_size": 2}
    shape |= {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = CognateForCausalLM(CognateConfig(**SHAPE | shape, specialization="speed")).train()
    optimizer = torch.optim.AdamW(model.parameters(), 6e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=n_updates)
    for _ in range(n_updates):
        ids, labels, _ = reaching_back(32, generator)
        optimizer.zero_grad()
        model(ids, labels=labels, return_logits=False).loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval(), reaching_back(256, generator)


def rank_correlation(a, b) -> float:
    """Spearman's, ties at their mean rank."""

    def ranks(x):
        values, where, n = x.unique(return_inverse=True, return_counts=True)
        return (n.cumsum(0) - (n + 1) / 2)[where].double()

    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


@torch.no_grad()
def test_trained_halting_follows_difficulty(trained):
    model, (ids, labels, hard) = trained
    out = model(ids, labels=labels)
    q = out.halt_probs[..., 1]
    assert (q - q.mean(1, keepdim=True)).square().mean() > 0.05
    asked, steps = labels.roll(-1, 1) != -100, out.token_halting_steps
    assert steps[asked].unique().numel() >= 2
    assert steps[asked & hard].double().mean() > steps[asked & ~hard].double().mean() + 0.7

    model.config.early_exit = False
    whole = model(ids, return_all_steps=True)
    model.config.early_exit = True
    targets = at_labels(labels.roll(-1, 1), labels)
    loss_of_step_1 = F.cross_entropy(at_labels(whole.all_logits[1], labels), targets, reduction="none")
    assert rank_correlation(at_labels(steps, labels), loss_of_step_1) > 0.3
    right, right_at_full_depth = (
        (at_labels(logits, labels).argmax(-1) == targets).double().mean() for logits in (out.logits, whole.logits)
    )
    assert right > 0.9 and right > right_at_full_depth - 0.01
    one = model(ids[:1], labels=labels[:1])
    assert one.loss.isfinite() and one.halt_probs.isfinite().all()


@torch.no_grad()
def test_trained_specializations_differ_in_steps(trained):
    model, (ids, _, _) = trained
    means = {}
    for name, special in SPECIALIZATIONS.items():
        model.config.halt_threshold = special.halt_threshold
        means[name] = model(ids).halting_steps.mean().item()
    model.config.halt_threshold = SPECIALIZATIONS["speed"].halt_threshold
    assert 1 < means["speed"] < means["memory"] < means["reasoning"] <= 3
