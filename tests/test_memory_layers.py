"""Memories: product keys against every pair, reads that depend on context, the table's gradient, utilisation."""

import pytest
import torch
from lahr_material import close, lahr, tokens

from backbones.memory_layers import BankMemory, Memory, ProductKeyMemory, ValueTable, counting_reads, utilisation

KINDS = ({"memory_type": "product_key"}, {"memory_type": "bank", "memory_slots": 11})


def product_key(**changes) -> ProductKeyMemory:
    shape = {"width": 12, "key_dim": 8, "n_sub_keys": 7, "heads": 3, "topk": 4} | changes
    memory = ProductKeyMemory(**shape, values=ValueTable(shape["n_sub_keys"] ** 2, shape["width"])).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in memory.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return memory


def states(n: int, width: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def every_pair(memory: ProductKeyMemory, x_ND: torch.Tensor) -> torch.Tensor:
    """Scores of all n * n slots, [N, H, n * n], with whole keys written out."""
    n, half = memory.n_sub_keys, memory.sub_keys.shape[3]
    keys = torch.stack(
        [torch.cat([memory.sub_keys[0, :, i], memory.sub_keys[1, :, j]], -1) for i in range(n) for j in range(n)], 1
    )
    query = memory.query(x_ND).view(len(x_ND), memory.heads, 2 * half)
    rms = query.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
    return torch.einsum("nhk,hsk->nhs", query / rms * memory.query_norm.weight, keys)


@pytest.mark.parametrize("topk", [1, 4, 7, 20])
def test_the_best_pairs_are_the_best_of_all_keys(topk):
    memory, x = product_key(topk=topk), states(50)
    slots, weights = memory.read(x)
    n_read = min(topk, 7)  # there are no more sub-keys a side
    best, best_slots = every_pair(memory, x).topk(n_read)
    assert torch.equal(slots, best_slots) and slots.shape == (50, 3, n_read)
    close(weights, best.softmax(-1))


def test_what_a_token_gets_is_the_gated_sum_of_its_heads_reads():
    memory, x = product_key(), states(5)
    slots, weights = memory.read(x)
    expected = []
    for token in range(5):
        y = sum(w * memory.values.weight[s] for head in range(3) for s, w in zip(slots[token, head], weights[token, head]))
        gate = memory.gate(x[token])
        expected.append(memory.out(y * gate * gate.sigmoid()))
    close(memory(x[None])[0], torch.stack(expected))


def test_what_a_token_gets_from_a_bank():
    memory = BankMemory(12, n_slots=9, topk=4, values=ValueTable(9, 12)).double()
    for parameter in memory.parameters():
        parameter.data = states(*parameter.shape) if parameter.ndim == 2 else states(1, *parameter.shape)[0]
    x = states(5, seed=2)
    cosine = torch.cosine_similarity(memory.query(x)[:, None], memory.keys[None], -1)
    best, slots = cosine.topk(4)
    y = torch.einsum("ns,nsd->nd", (best * 12**0.5).softmax(-1), memory.values.weight[slots])
    gate = memory.gate(torch.cat([x, y], -1)).sigmoid()
    assert gate.shape == (5, 1)
    close(memory(x[None])[0], gate * y)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["memory_type"])
@torch.no_grad()
def test_a_token_reads_by_its_context_and_on_raw_embeddings_by_itself_and_position(kind):
    ids = tokens(1, 6)
    other = ids.clone()
    other[:, :5] = tokens(1, 5, seed=4)
    for where, by_context in (("hidden", True), ("embeddings", False)):
        model, got = lahr("memory", memory_input=where, **kind), []
        model.model.layers[2].memory.register_forward_hook(lambda m, args, out, got=got: got.append(out[:, -1]))
        for x in (ids, other):
            model(x, use_cache=False)
        assert (got[0] - got[1]).abs().amax() > 1e-3 if by_context else torch.equal(got[0], got[1])


def test_only_slots_that_were_read_get_a_gradient():
    memory, x = product_key(n_sub_keys=20), states(3)
    memory(x[None]).sum().backward()
    read = memory.values.weight.grad.abs().sum(1) > 0
    assert read.nonzero().flatten().tolist() == memory.read(x)[0].unique().tolist()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in memory.parameters())


def test_memories_of_a_model_share_one_table_or_own_theirs():
    def tables(model) -> dict:
        return {name: module.fixed_lr for name, module in model.named_modules() if isinstance(module, ValueTable)}

    options, used = {"memory_layers": [0, 2]}, []
    model = lahr("memory", **options)
    assert tables(model) == {"model.memory_values": 1e-3}
    for layer in (0, 2):
        model.model.layers[layer].memory.register_forward_hook(lambda m, args, out: used.append(args[1]))
    model(tokens(1, 4), labels=tokens(1, 4)).loss.backward()
    table = model.model.memory_values.weight
    assert used[0] is used[1] is table and table.grad.any() and table.shape == (25, 16)
    owned = lahr("memory", memory_share_values=False, memory_value_lr=0.5, **options)
    assert tables(owned) == {f"model.layers.{i}.memory.values": 0.5 for i in (0, 2)}
    assert tables(lahr("memory", memory_type="bank", memory_slots=6)) == {"model.layers.2.memory.values": 1e-3}
    assert not tables(lahr("plain"))


def test_replace_drops_the_feed_forward_part():
    parallel, replaced = (lahr("memory", memory_mode=mode) for mode in ("parallel", "replace"))
    blocks = replaced.model.layers
    assert blocks[2].mlp is None and blocks[1].mlp is not None and parallel.model.layers[2].mlp is not None
    ids, seen = tokens(1, 5), []
    for model in (parallel, replaced):
        block, got = model.model.layers[2], {}
        parts = [part for part in (block.attention, block.mlp, block.memory) if part is not None]
        for part in parts:
            part.register_forward_hook(lambda m, args, out, got=got: got.__setitem__(m, out))
        block.register_forward_hook(lambda m, args, out, got=got: got.__setitem__("change", out - args[0]))
        model(ids, use_cache=False)
        close(got["change"], sum(got[part] for part in parts))
        seen.append(len(parts))
    assert seen == [3, 2]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["memory_type"])
@torch.no_grad()
def test_utilisation_is_the_share_of_slots_read_by_real_tokens(kind):
    model, ids = lahr("memory", memory_layers=[0, 2], **kind), tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with counting_reads(model) as counts:
        model(ids, mask)
    n_read = {
        memory.layer: memory.topk * getattr(memory, "heads", 1) for memory in model.modules() if isinstance(memory, Memory)
    }
    assert counts.keys() == {0, 2} and all(counts[i].sum() == 14 * n_read[i] for i in counts)
    shares = [utilisation(counts[i]) for i in counts]
    assert all(0 < share <= 1 for share in shares)
    before = {i: count.clone() for i, count in counts.items()}
    model(ids)
    assert all(torch.equal(counts[i], before[i]) for i in counts), "counting has ended"
    with counting_reads(model) as one:
        model(ids[:1, :1])
    assert all(0 < utilisation(one[i]) < share for i, share in zip(one, shares))
    assert utilisation(torch.tensor([3, 0, 1, 0])) == 0.5 and utilisation(torch.zeros(4)) == 0
