"""LAHR as a language model: counts, configuration, first weights, the Hugging Face contract, causality, caches, padding."""

import pytest
import torch
from lahr_material import CELLS, MODELS, close, config, lahr, left_padded, logits, selected, tokens
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from attention import append_cache
from backbones.lahr import LahrConfig, LahrForCausalLM
from backbones.lahr_config import init_by_name
from coconut import decoder_blocks

# ---------------------------------------------------------------- counts and configuration

COUNTS = {  # vocabulary, size: plain, routers, memory, both
    (100, "tiny"): (1_095_296, 258, 75_840, 1_171_394),
    (100, "small"): (8_549_632, 1_028, 305_280, 8_855_940),
    (50_260, "tiny"): (7_515_776, 258, 75_840, 7_591_874),
    (50_260, "small"): (21_390_592, 1_028, 305_280, 21_696_900),
    (50_260, "medium"): (76_601_856, 3_078, 2_261_504, 78_866_438),
    (50_260, "base"): (152_651_520, 4_614, 5_235_456, 157_891_590),
    (50_260, "xl"): (287_425_536, 7_175, 9_569_280, 297_001_991),
}


def count(shape: LahrConfig) -> int:
    with torch.device("meta"):
        model = LahrForCausalLM(shape)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("vocab", "size"), COUNTS)
def test_exact_parameter_counts(vocab, size):
    def of(**flags):
        return count(LahrConfig.size(size, vocab_size=vocab, **flags))

    plain, both = of(), of(use_mod=True, use_memory=True)
    assert (plain, of(use_mod=True) - plain, of(use_memory=True) - plain, both) == COUNTS[vocab, size]


def test_counts_of_other_shapes():
    assert count(LahrConfig.size("small", vocab_size=100, max_position_embeddings=256)) == 8_484_096
    assert count(LahrConfig.size("medium", vocab_size=100, max_position_embeddings=256)) == 50_526_720
    wide = {"hidden_size": 384, "num_attention_heads": 6, "max_position_embeddings": 256, "vocab_size": 50_262}
    assert count(LahrConfig(num_hidden_layers=8, **wide)) == 38_279_808
    d, f, n, slots = 16, 24, 5, 7
    plain = count(config())
    assert count(config(position_type="rope")) == plain - 96 * d
    assert count(config("mod", mod_router="predictor")) == plain + 2 * (d + 1 + d * d // 4 + d // 2 + 1)
    bank = 2 * slots * d + 3 * d * d + d + 1
    assert count(config("memory", memory_type="bank", memory_slots=slots)) == plain + bank
    layer = 2 * 8 * d + 8 + 2 * n * 8 + 2 * d * d  # heads x key width
    two = {"memory_layers": [0, 2]}
    assert count(config("memory", **two)) == plain + 2 * layer + n * n * d
    assert count(config("memory", memory_share_values=False, **two)) == plain + 2 * (layer + n * n * d)
    assert count(config("memory", memory_mode="replace", **two)) == plain + 2 * (layer - 3 * d * f) + n * n * d


def test_routers_are_where_the_config_says_and_nowhere_else():
    for flags, layers in (({}, []), ({"use_mod": True}, [1, 3]), ({"use_mod": True, "mod_layers": [0, 2]}, [0, 2])):
        model = lahr("plain", **flags)
        assert [int(layer) for layer in model.model.routers] == model.config.routed == layers
        assert any("router" in name for name in model.state_dict()) == bool(layers)
        assert (model(tokens(1, 4)).columns is None) == (not layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_mod": True, "use_memory": True, "memory_layers": [1]}, r"disjoint; both name \[1\]"),
        ({"mod_layers": [0, 2], "memory_layers": [2]}, "disjoint"),
        ({"use_mod": True, "mod_layers": [4]}, r"mod_layers: \[4\] are not among the layers 0..3"),
        ({"use_mod": "false"}, "use_mod: 'false' must be true or false"),
        ({"mod_router": "random"}, "mod_router: 'random' is unknown; known: threshold, predictor, topk"),
        ({"mod_capacity": 0.0}, "mod_capacity"),
        ({"num_attention_heads": 3}, "no multiple of 3 heads"),
    ],
)
def test_what_can_not_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_sizes_refuse_unknown_names():
    with pytest.raises(ValueError, match="size: 'huge' is unknown; known: tiny, small"):
        LahrConfig.size("huge")
    with pytest.raises(ValueError, match="use_mood unknown to LahrConfig"):
        LahrConfig.size("tiny", use_mood=True)
    assert LahrConfig.size("xl", use_memory=True).remembering == [4, 10]


# ---------------------------------------------------------------- how weights begin


def test_shared_weights_begin_alike_whatever_is_added():
    models = {}
    for i, cell in enumerate(CELLS):
        torch.manual_seed(i)  # must not matter
        models[cell] = AutoModelForCausalLM.from_config(config(cell)).state_dict()
    assert len({frozenset(state) for state in models.values()}) == 4
    for state in models.values():
        for name in state.keys() & models["mod+memory"].keys():
            assert torch.equal(state[name], models["mod+memory"][name]), name
    weights = models["plain"]
    assert weights["model.layers.0.mlp.w1.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(weights["model.layers.0.mlp.w1.weight"], weights["model.layers.1.mlp.w1.weight"])
    other = AutoModelForCausalLM.from_config(config("mod", init_seed=1))
    assert not torch.equal(other.lm_head.weight, weights["lm_head.weight"])
    init_by_name(other, 0)
    assert all(torch.equal(value, models["mod"][name]) for name, value in other.state_dict().items())
    other = AutoModelForCausalLM.from_config(config(init_seed=None))
    assert not torch.equal(other.lm_head.weight, weights["lm_head.weight"])


# ---------------------------------------------------------------- the Hugging Face contract


@pytest.mark.parametrize("cell", CELLS)
def test_save_and_load(cell, tmp_path):
    model, ids = lahr(cell, dtype=torch.float32), tokens(2, 9)
    for router in model.model.routers.values():
        router.threshold.fill_(0.25)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LahrConfig)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    close(logits(again, ids), logits(model, ids), 1e-5)  # files lie in memory in another way, which rounds otherwise
    assert again.lm_head.weight is again.model.embed_tokens.weight
    again.resize_token_embeddings(63, mean_resizing=False)
    assert again.lm_head.weight is again.model.embed_tokens.weight and again.config.vocab_size == 63
    close(logits(again, ids)[..., :60], logits(model, ids), 1e-5)


def test_loading_into_more_parts_keeps_the_weights_there_are(tmp_path):
    lahr("plain", dtype=torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, use_mod=True, mod_layers=[1])
    assert torch.equal(model.lm_head.weight, lahr("plain", dtype=torch.float32).lm_head.weight)
    assert model.model.routers["1"].score.weight.std() < 0.05 and not model.model.routers["1"].threshold


@pytest.mark.parametrize(("cell", "router"), MODELS)
def test_generate_is_greedy_cached_or_not_and_padded_or_not(cell, router):
    model, rows = lahr(cell, mod_router=router), [tokens(1, n, seed=n)[0] for n in (9, 4)]
    model.generation_config.eos_token_id = None
    expected = []
    for row in rows:
        ids = row[None]
        for _ in range(6):
            ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
        expected.append(ids[0, len(row) :].tolist())
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 7}
    for row, new in zip(rows, expected):
        for use_cache in (True, False):
            assert model.generate(row[None], use_cache=use_cache, **options)[0, len(row) :].tolist() == new
    assert model.generate(**left_padded(rows, 9), **options)[:, 9:].tolist() == expected
    beams = [model.generate(rows[0][None], num_beams=3, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*beams)


def test_hidden_states_and_loss():
    model, ids = lahr("mod+memory"), tokens(2, 8)
    labels = ids.clone()
    labels[:, :3] = -100
    out = model(ids, labels=labels, output_hidden_states=True, use_cache=False)
    assert len(out.hidden_states) == 5
    close(model.lm_head(out.hidden_states[-1]), out.logits)
    losses = torch.nn.functional.cross_entropy(out.logits[:, 2:-1].flatten(0, 1), ids[:, 3:].flatten())
    close(out.loss, losses)
    close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:])
    assert model(ids, return_dict=False)[0].shape == (2, 8, 60)
    assert decoder_blocks(model) is model.model.layers


# ---------------------------------------------------------------- causality


def reaches_back(model, n=12, edited_from=7) -> float:
    """How far logits before an edit move because of it."""
    ids = tokens(2, n)
    other = ids.clone()
    other[:, edited_from:] = tokens(2, n - edited_from, seed=5)
    before, after = logits(model, ids), logits(model, other)
    assert (before[:, edited_from:] - after[:, edited_from:]).abs().amax() > 1e-3
    return (before[:, :edited_from] - after[:, :edited_from]).abs().amax().item()


@pytest.mark.parametrize(("cell", "router"), MODELS)
def test_later_tokens_change_nothing_before_them(cell, router):
    for dtype in (torch.float32, torch.float64):
        assert reaches_back(lahr(cell, mod_router=router, dtype=dtype)) < 1e-5


def test_topk_breaks_causality_and_refuses_caches():
    model, ids = lahr("mod", mod_router="topk", dtype=torch.float32), tokens(2, 8)
    assert reaches_back(model) > 1e-2
    assert selected(model, ids).sum(1).tolist() == [[4, 4], [4, 4]]
    assert model.single_pass_only and not lahr("mod").single_pass_only
    for refused in ({"use_cache": True}, {"past_key_values": DynamicCache(config=model.config)}):
        with pytest.raises(ValueError, match="topk"):
            model(ids, **refused)
    with pytest.raises(ValueError, match="topk"):
        model.generate(ids, max_new_tokens=2)


# ---------------------------------------------------------------- caches and padding


@pytest.mark.parametrize("position_type", ["learned", "rope"])
@pytest.mark.parametrize(("cell", "router"), MODELS)
@torch.no_grad()
def test_whole_in_chunks_and_token_by_token(cell, router, position_type):
    model, ids = lahr(cell, mod_router=router, position_type=position_type), tokens(2, 14)
    whole = model(ids, use_cache=False)
    for sizes in ([14], [5, 1, 4, 4], [1] * 14):
        for cache in (append_cache(model.config, 14), DynamicCache(config=model.config), None):
            parts, routed, start = [], [], 0
            for size in sizes:
                out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
                routed.append(out.columns["mod_selected"] if out.columns else None)
                start += size
            close(torch.cat(parts, 1), whole.logits)
            if whole.columns:
                assert torch.equal(torch.cat(routed, 1), whole.columns["mod_selected"])
            assert cache.get_seq_length() == 14


@pytest.mark.parametrize("compute", ["gathered", "dense"])
@pytest.mark.parametrize("position_type", ["learned", "rope"])
@pytest.mark.parametrize(("cell", "router"), MODELS)
@torch.no_grad()
def test_a_padded_batch_equals_each_row_alone(cell, router, position_type, compute):
    model = lahr(cell, mod_router=router, position_type=position_type, mod_compute=compute)
    rows = [tokens(1, n, seed=n)[0] for n in (9, 4, 1)]
    left = left_padded(rows, 9)
    right = {name: torch.stack([x.roll(len(row)) for x, row in zip(left[name], rows)]) for name in left}
    assert right["attention_mask"][1].tolist() == [1] * 4 + [0] * 5
    for batch in (left, right):
        out, real = model(**batch, use_cache=False), batch["attention_mask"].bool()
        assert out.logits.isfinite().all()
        for b, row in enumerate(rows):
            alone = model(row[None], use_cache=False)
            close(out.logits[b, real[b]], alone.logits[0])
            if out.columns:
                assert torch.equal(out.columns["mod_selected"][b, real[b]], alone.columns["mod_selected"][0])
        if out.columns:
            assert not out.columns["mod_selected"][~real].any()


def test_an_additive_mask_is_taken_where_no_token_is_skipped():
    batch = left_padded([tokens(1, n)[0] for n in (6, 3)], 6)
    real = batch["attention_mask"].bool()
    seen = real[:, None] & torch.ones(6, 6).tril().bool() | torch.eye(6).bool()
    bias = torch.zeros(2, 1, 6, 6, dtype=torch.float64).masked_fill(~seen[:, None], float("-inf"))
    positions = (real.cumsum(1) - 1).clamp(min=0)
    model = lahr("memory")
    close(model(batch["input_ids"], bias, positions).logits[real], model(**batch).logits[real])
    with pytest.raises(ValueError, match="attention_mask: token skipping"):
        lahr("mod")(batch["input_ids"], bias, positions)
    with pytest.raises(ValueError, match="attention_mask: 6 columns for 0 past and 4 present"):
        model(batch["input_ids"][:, :4], batch["attention_mask"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compute", ["gathered", "dense"])
@torch.no_grad()
def test_half_precision_stays_finite(dtype, compute):
    model = lahr("mod+memory", noise=0.1, dtype=torch.float32, mod_compute=compute)
    batch = left_padded([tokens(1, n)[0] for n in (9, 2)], 9)
    exact = model(**batch).logits
    with torch.autocast("cpu", dtype=dtype):
        automatic = model(**batch).logits
    for got in (automatic, model.to(dtype)(**batch).logits):
        assert got.isfinite().all()
        assert (got - exact)[batch["attention_mask"].bool()].abs().mean() < 0.1 * exact.abs().mean()
