"""Token skipping: selected tokens alone are computed, skipped ones are not seen, thresholds keep the capacity."""

import copy

import pytest
import torch
from lahr_material import MODELS, close, lahr, left_padded, logits, selected, tokens
from tiny import gradients

from attention import append_cache, join_rows
from backbones.routing import Router, expert_choice, routing_rates, token_kinds, upper_quantile

# ---------------------------------------------------------------- token skipping


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("router", ["threshold", "predictor", "topk"])
@pytest.mark.parametrize("position_type", ["learned", "rope"])
def test_gathered_equals_masked(position_type, router, cached):
    if cached and router == "topk":
        return
    batch, results = left_padded([tokens(1, n, seed=n)[0] for n in (11, 5, 8)], 11), []
    for compute in ("gathered", "dense"):
        model = lahr("mod+memory", mod_router=router, position_type=position_type, mod_compute=compute)
        cache, start, parts = append_cache(model.config, 11) if cached else None, 0, []
        for stop in (4, 5, 6, 11) if cached else (11,):
            mask = batch["attention_mask"][:, :stop]
            ids = batch["input_ids"][:, start:stop]
            parts.append(model(ids, mask, past_key_values=cache, use_cache=cached).logits)
            start = stop
        loss = (torch.cat(parts, 1)[batch["attention_mask"].bool()].sin() ** 2).sum()
        loss.backward()
        results.append((loss, gradients(model)))
    close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        close(gradient, results[1][1][name], 1e-8)


def test_routed_blocks_compute_selected_tokens_only():
    model, ids = lahr("mod"), tokens(3, 16)
    rows = {}
    for layer, block in enumerate(model.model.layers):
        for name, part in (("query", block.attention.q), ("key", block.attention.k), ("mlp", block.mlp.w1)):
            part.register_forward_hook(lambda m, args, out, at=(layer, name): rows.__setitem__(at, out[..., 0].numel()))
    for batch in (ids, ids[:, :1]):
        chosen = selected(model, batch).sum((0, 1)).tolist()
        for routed, n in zip((1, 3), chosen):
            assert rows[routed, "query"] == rows[routed, "key"] == rows[routed, "mlp"] == n
            assert rows[routed - 1, "query"] == rows[routed - 1, "mlp"] == batch.numel()
    assert 0 < selected(model, ids).sum() < 3 * 16 * 2


@pytest.mark.parametrize("compute", ["gathered", "dense"])
def test_where_nothing_is_selected_the_blocks_are_passed_by(compute):
    model, ids = lahr("mod", mod_compute=compute), tokens(2, 6)
    for router in model.model.routers.values():
        router.threshold.fill_(1e6)
    without = copy.deepcopy(model)
    without.model.layers = torch.nn.ModuleList(without.model.layers[i] for i in (0, 2))
    for new, block in enumerate(without.model.layers):
        block.attention.layer = new
    without.model.routers = torch.nn.ModuleDict()
    close(logits(model, ids), logits(without, ids))
    loss = model(ids, labels=ids).loss
    loss.backward()  # also of the blocks that nothing entered
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("compute", ["gathered", "dense"])
@torch.no_grad()
def test_a_skipped_token_keeps_its_state_and_is_not_seen(compute):
    model, ids = lahr("mod", mod_compute=compute), tokens(2, 10)
    went_through = []
    for layer in (1, 3):
        model.model.layers[layer].register_forward_hook(lambda m, args, out: went_through.append((args[0], out)))
    cache = append_cache(model.config, 20)
    chosen = model(ids, past_key_values=cache).columns["mod_selected"]
    for n, (before, after) in enumerate(went_through):
        same = (before == after).all(-1)
        assert torch.equal(same, ~chosen[..., n]) and same.any() and not same.all()
        keys = cache.layers[1 + 2 * n].keys  # dense in position, one channel more than a head is wide
        assert keys.shape == (2, 4, 10, 5) and torch.equal(keys[:, 0, :, -1] == -1e3, same)
    later = tokens(2, 5, seed=9)

    def continued(skipped: bool):
        other = copy.deepcopy(cache)
        for n, layer in enumerate((1, 3)):
            states = other.layers[layer]
            change = (chosen[..., n] != skipped)[:, None, :, None].double()
            keys, values = states.keys.clone(), states.values + 3.0 * change
            keys[..., :-1] += 3.0 * change
            states.replace(keys, values)
        return model(later, past_key_values=other).logits

    expected = model(later, past_key_values=copy.deepcopy(cache)).logits
    close(continued(skipped=True), expected)
    assert (continued(skipped=False) - expected).abs().amax() > 1e-2


@torch.no_grad()
def test_rows_of_other_lengths_join_in_one_cache():
    model, rows = lahr("mod+memory"), [tokens(1, n, seed=n) for n in (9, 4)]
    caches = [append_cache(model.config, 12) for _ in rows]
    for row, cache in zip(rows, caches):
        model(row, past_key_values=cache)
    join_rows(*caches)
    mask = left_padded([row[0] for row in rows], 9)["attention_mask"]
    new = tokens(2, 1, seed=3)
    out = model(new, torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1), past_key_values=caches[0])
    for b, row in enumerate(rows):
        close(out.logits[b], logits(model, torch.cat([row, new[b : b + 1]], 1))[0, -1:])


@pytest.mark.parametrize(("cell", "router"), [*MODELS, ("mod", "topk")])
def test_every_parameter_gets_a_gradient(cell, router):
    model, ids = lahr(cell, mod_router=router).train(), tokens(3, 20)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    rest = {name for name, p in model.named_parameters() if "router" in name and not (p.grad.abs() > 1e-9).all()}
    assert not rest


def test_thoughts_can_be_forced_through():
    model, ids = lahr("mod", mod_force_thoughts=True), tokens(2, 10)
    slots = torch.zeros(2, 10, dtype=torch.bool)
    slots[0, 3:6] = slots[1, 5:9] = True
    free, forced = selected(model, ids), selected(model, ids, thoughts=slots)
    assert forced[slots].all() and not free[slots].all()
    assert torch.equal(forced[..., 0], free[..., 0] | slots)
    assert torch.equal(selected(lahr("mod"), ids, thoughts=slots), free)


# ---------------------------------------------------------------- capacity


def test_the_threshold_follows_the_quantile_of_all_training_passes_since_the_last_update():
    model = lahr("mod", mod_capacity=0.25)
    router = model.model.routers["1"]
    router.threshold.fill_(0.5)
    batch = left_padded([tokens(1, n, seed=n)[0] for n in (9, 4)], 9)
    with torch.no_grad():
        model(**batch)
    model.after_update()
    assert router.threshold == 0.5, "evaluation is not counted"
    model.train()
    first = model(**batch).columns["mod_scores"][batch["attention_mask"].bool()]
    second = model(tokens(3, 7)).columns["mod_scores"].flatten(0, 1)
    assert router.threshold == 0.5, "no forward moves it"
    counted = torch.cat([first, second])[:, 0]
    other_process = torch.linspace(3, 4, 6).double()
    gathered = []

    def gather(scores):
        gathered.append(scores)
        return torch.cat([scores, other_process])

    model.after_update(gather)
    assert torch.equal(gathered[0], counted) and len(counted) == 13 + 21
    everyone = torch.cat([counted, other_process])
    quantile = everyone.sort().values[-11]  # 10 = 0.25 * 40 are above
    close(router.threshold, 0.98 * 0.5 + 0.02 * quantile)
    before = router.threshold.clone()
    model.after_update()
    assert router.threshold == before, "scores count once"
    model(tokens(3, 7))
    model.forget_scores()
    model.after_update()
    assert router.threshold == before


def test_upper_quantile_leaves_the_capacity_above_it():
    scores = torch.randn(80, generator=torch.Generator().manual_seed(0))
    for capacity, above in ((0.125, 10), (0.5, 40), (0.99, 79), (0.01, 0)):
        assert (scores > upper_quantile(scores, capacity)).sum() == above


@pytest.mark.parametrize(("capacity", "tolerance"), [(0.125, 0.05), (0.5, 0.1)])
def test_realised_rate_after_training_is_the_capacity(capacity, tolerance):
    def batch(seed: int) -> dict:
        """Sorted tokens, which can be learned; every second row is padded."""
        ids, mask = tokens(8, 24, seed).sort(1).values, torch.ones(8, 24, dtype=torch.long)
        mask[::2, 18:] = 0
        return {"input_ids": ids, "attention_mask": mask}

    model = lahr("mod", noise=0.0, dtype=torch.float32, mod_capacity=capacity)
    optimizer, n_updates = torch.optim.AdamW(model.parameters()), 360
    model.train()
    for step in range(n_updates):
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 if step < n_updates // 2 else 6e-5  # the threshold trails a score that moves
        now = batch(step)
        model(**now, labels=now["input_ids"].masked_fill(now["attention_mask"] == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_update()
    chosen, real = [], []
    for seed in range(9000, 9020):
        now = batch(seed)
        chosen.append(model.eval()(**now, use_cache=False).columns["mod_selected"])
        real.append(now["attention_mask"].bool())
    chosen, real = torch.cat(chosen), torch.cat(real)
    assert not chosen[~real].any()
    rates = chosen[real].double().mean(0)
    assert (rates - capacity).abs().amax() < tolerance, rates


def test_the_predictor_learns_the_choice_from_the_token_alone():
    model = lahr("mod", mod_router="predictor", mod_capacity=0.25, mod_aux_coef=1.0).train()
    predictors = [p for router in model.model.routers.values() for p in router.predictor.parameters()]
    optimizer = torch.optim.Adam(predictors, lr=2e-2)

    def agreement() -> float:
        columns = model(tokens(16, 24, seed=9000), use_cache=False).columns
        best = torch.stack([expert_choice(scores, None, 0.25) for scores in columns["mod_scores"].unbind(2)], 2)
        return ((columns["mod_predicted"] > 0) == best).double().mean().item()

    model.train()
    before, losses = agreement(), []
    for step in range(60):
        out = model(tokens(16, 24, seed=step), use_cache=False)
        losses.append(model.extra_loss(out.columns, torch.ones(16, 24, dtype=torch.bool)))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert before < 0.75 < 0.85 < agreement()
    assert not any(p.grad.any() for p in model.model.layers.parameters() if p.grad is not None), "inputs are stop-gradient"


def test_the_gate_is_what_multiplies_the_block():
    router = Router(4, capacity=0.5).double()
    torch.nn.init.normal_(router.score.weight, generator=torch.Generator().manual_seed(0))
    router.threshold.fill_(0.3)
    x = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    route = router(x)
    close(route.scores, router.score(x)[..., 0].detach())
    close(route.gate, (router.score(x)[..., 0] - 0.3).sigmoid())
    assert torch.equal(route.selected, router.score(x)[..., 0] > 0.3)
    model, ids, seen = lahr("mod", mod_compute="dense"), tokens(1, 6), []
    model.model.layers[1].register_forward_hook(lambda m, args, kw, out: seen.append((args, kw, out)), with_kwargs=True)
    model(ids, use_cache=False)
    (args, kwargs, out), block = seen[0], model.model.layers[1]
    all_selected = kwargs["route"]._replace(gate=torch.ones_like(kwargs["route"].gate))
    whole = block(*args, **(kwargs | {"route": all_selected}))
    share = (kwargs["route"].gate * kwargs["route"].selected)[..., None]
    close(out, args[0] + share * (whole - args[0]))


def test_expert_choice_takes_the_best_real_tokens_of_each_row():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [4.0, 3.0, 2.0, 1.0]])
    real = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    assert expert_choice(scores, real, 0.5).int().tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]
    assert expert_choice(scores[..., None], None, 0.3).squeeze(-1).int().tolist() == [[0, 1, 0, 1], [1, 1, 0, 0]]


def test_rates_by_kind_of_token():
    ids = torch.tensor([[5, 6, 56, 58, 58, 57, 7, 8]])
    kinds = token_kinds(ids, latent_id=58, end_id=57)
    assert kinds.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    chosen = torch.tensor([[1, 0, 0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0, 0, 0]]).bool().T[None]
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])
    rates = routing_rates(chosen, kinds, real)
    assert {name: rate.tolist() for name, rate in rates.items() if name != "all"} == {
        "question": [pytest.approx(1 / 3), 0.0], "thought": [1.0, 0.5], "text": [0.0, 0.0],
    }  # fmt: skip
    close(rates["all"], torch.tensor([3 / 7, 1 / 7], dtype=torch.float64))
