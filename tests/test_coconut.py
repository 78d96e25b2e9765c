"""The rollout against a slow, obvious one; the pause modes are one function; loss, passes and state-dict keys."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from tiny import EOS, FAMILIES, LATENT, MODES, build, collate, filled, gradients, pause_variants, token_rows, wrap
from transformers import CohereConfig, Gemma2Config, GPT2Config, GraniteConfig

import coconut
from coconut import Coconut, canonical_mode, plan_passes

ANSWER = 4
RAGGED = [0, 3, 8, 1]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def run(model, batch, **options):
    """(outputs with full logits, gradients of the loss by name)."""
    model.zero_grad()
    out = model(**batch, full_logits=True, **options)
    out.loss.backward()
    return out, gradients(model)


def close_gradients(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        close(a[name], b[name])


# ---------------------------------------------------------------- the rollout


def oracle(model, rows):
    """Row by row, without padding and cache: (logits, embeddings) of each row and the loss over all answers."""
    logits, embeds, losses = [], [], []
    for row in rows:
        embeds.append(filled(model, row))
        logits.append(model.base_causallm(inputs_embeds=embeds[-1][None], use_cache=False).logits[0])
        losses.append(F.cross_entropy(logits[-1][-ANSWER - 1 : -1], torch.tensor(row[-ANSWER:]), reduction="none"))
    return logits, embeds, torch.cat(losses).mean()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("n_latents", [RAGGED, [8, 0], [2, 2, 2], [5], [0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_equals_the_slow_oracle(family, n_latents, left):
    rows, model = token_rows(n_latents, seed=sum(n_latents)), wrap(build(family))
    batch = collate(rows, ANSWER, left)
    logits, embeds, loss = oracle(model, rows)
    loss.backward()
    expected = gradients(model)

    out, got = run(model, batch)
    close(out.loss, loss)
    for b, real in enumerate(batch["attention_mask"].bool()):
        close(out.logits[b, real], logits[b])
        close(out.inputs_embeds[b, real], embeds[b])
    close_gradients(got, expected)


def test_gradients_flow_through_every_pass():
    model, batch = wrap(build("gpt2")), collate(token_rows([3, 3]), ANSWER)
    seen = []

    def watch(layer, pass_, x):
        x.retain_grad()
        seen.append(x)

    run(model, batch, edit=watch)
    assert len(seen) == 4
    assert all(x.grad.abs().amax() > 1e-6 for x in seen)


@pytest.mark.parametrize("mode", MODES)
def test_default_mask_and_positions_count_real_columns(mode):
    model, batch = wrap(build("gpt2"), mode), collate(token_rows(RAGGED), ANSWER)
    real = batch["attention_mask"].bool()
    expected = model(**batch).logits
    close(model(batch["input_ids"], batch["attention_mask"]).logits[real], expected[real])
    row = batch["input_ids"][1:2, real[1]]
    close(model(row).logits[0], expected[1, real[1]])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_one_plain_forward_over_what_it_fed(mode, family):
    model, batch = wrap(build(family), mode), collate(token_rows(RAGGED), ANSWER)
    out = model(**batch)
    keys = ("attention_mask", "position_ids")
    plain = model.base_causallm(inputs_embeds=out.inputs_embeds, use_cache=False, **{key: batch[key] for key in keys})
    real = batch["attention_mask"].bool()
    close(out.logits[real], plain.logits[real])


def test_plain_mode_is_the_base_model():
    base, ids = build("llama"), collate(token_rows([2, 2]))["input_ids"]
    for latent in (None, LATENT):
        model = Coconut(base, latent, None, None, EOS, feedback_mode="none")
        close(model(ids).logits, base(ids).logits)


# ---------------------------------------------------------------- the pause modes are one function


@pytest.mark.parametrize("n_latents", [RAGGED, [6, 6], [0, 0]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_pause_modes_are_one_function(family, n_latents):
    variants, batch = pause_variants(build(family)), collate(token_rows(n_latents), ANSWER)
    real = batch["attention_mask"].bool()
    reference, gradient = run(variants["learned_shared"].train(), batch)
    vector = gradient["feedback.pause_embedding"]
    assert (vector.abs().amax() > 1e-4) == any(n_latents)
    for name, model in variants.items():
        out, got = run(model.train(), batch)
        close(out.loss, reference.loss)
        close(out.logits[real], reference.logits[real])
        if name == "frozen":
            assert "feedback.pause_embedding" not in got and not model.pause_embedding.requires_grad
            got["feedback.pause_embedding"] = vector  # the rest of the gradients is that of the others
        close_gradients(got, gradient)


@pytest.mark.parametrize("name", ["frozen", "learned_shared", "pause_curriculum", "forced"])
def test_pause_slots_hold_the_vector_and_nothing_else_does(name):
    model, batch = pause_variants(build("gpt2"))[name], collate(token_rows(RAGGED))
    slots = batch["input_ids"] == LATENT
    embeds = model(**batch).inputs_embeds
    assert torch.equal(embeds[slots], model.pause_embedding.detach().expand_as(embeds[slots]))
    assert torch.equal(embeds[~slots], model.embedding(batch["input_ids"])[~slots])


def test_pause_vector_starts_as_the_row_of_the_latent_token():
    base = build("gpt2")
    for mode in MODES[1:]:
        model = wrap(base, mode)
        assert torch.equal(model.pause_embedding, base.get_input_embeddings().weight[LATENT])
        assert model.pause_embedding.data_ptr() != model.embedding.weight[LATENT].data_ptr()
    assert wrap(base).pause_embedding is None


def test_continuous_differs_from_a_constant():
    batch = collate(token_rows(RAGGED), ANSWER)
    logits = {name: model(**batch).logits for name, model in pause_variants(build("gpt2")).items()}
    difference = (wrap(build("gpt2"))(**batch).logits - logits["learned_shared"]).abs().amax((1, 2))
    assert difference[0] < 1e-9 and (difference[1:] > 1e-2).all()  # row 0 has no thought


@pytest.mark.parametrize(("mode", "moves"), [("frozen", False), ("learned_shared", True), ("pause_curriculum", True)])
def test_only_learned_vectors_move_in_a_step(mode, moves):
    model, batch = wrap(build("gpt2"), mode).train(), collate(token_rows(RAGGED), ANSWER)
    before = model.pause_embedding.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(**batch).loss.backward()
    optimizer.step()
    moved = (model.pause_embedding - before).abs()
    assert (moved > 1e-3).all() if moves else not moved.any()


def test_learned_vector_gets_a_zero_gradient_from_batches_without_latents():
    # Without one, AdamW would skip the vector on some ranks and stages and not on others.
    model = wrap(build("gpt2"), "learned_shared").train()
    model(**collate(token_rows([0, 0]), ANSWER)).loss.backward()
    assert model.pause_embedding.grad is not None and not model.pause_embedding.grad.any()


def test_pause_curriculum_does_not_recycle(monkeypatch):
    models = {mode: wrap(build("gpt2"), mode) for mode in ("pause_curriculum", "continuous")}
    batch = collate(token_rows(RAGGED), ANSWER)
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
    expected = models["pause_curriculum"](**batch).logits, models["pause_curriculum"].generate(**prompt)

    def broken(self, k, h_BD):
        raise RuntimeError("recycled")

    monkeypatch.setattr(coconut.Continuous, "forward", broken)
    assert torch.equal(models["pause_curriculum"](**batch).logits, expected[0])
    assert torch.equal(models["pause_curriculum"].generate(**prompt), expected[1])
    with pytest.raises(RuntimeError, match="recycled"):
        models["continuous"](**batch)


# ---------------------------------------------------------------- loss and logits


@pytest.mark.parametrize("family", FAMILIES)
def test_training_loss_is_the_cross_entropy_of_full_logits_and_meets_the_head_at_labels_only(family):
    model, batch = wrap(build(family)).train(), collate(token_rows(RAGGED), ANSWER)
    batch["labels"][2, -ANSWER:] = -100  # rows ask for different numbers of tokens
    through_head, head = [], model.base_causallm.get_output_embeddings()
    head.register_forward_hook(lambda m, args, out: through_head.append(out[..., 0].numel()))
    loss = model(**batch).loss
    assert sum(through_head) == (batch["labels"] != -100).sum()
    logits = model(**batch, full_logits=True).logits
    close(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100))


def test_logits_come_on_request_or_in_evaluation():
    model, batch = wrap(build("gpt2")), collate(token_rows(RAGGED), ANSWER)
    shape = (*batch["input_ids"].shape, 60)
    unlabelled = {key: value for key, value in batch.items() if key != "labels"}
    assert model(**batch).logits.shape == shape and model(**batch, full_logits=False).logits is None
    model.train()
    assert model(**batch).logits is None and model(**batch, full_logits=True).logits.shape == shape
    assert model(**unlabelled).logits.shape == shape and model(**unlabelled).loss is None


def test_loss_without_labels_is_zero_and_has_a_gradient():
    model, batch = wrap(build("gpt2")).train(), collate(token_rows([1, 2]), ANSWER)
    batch["labels"].fill_(-100)
    loss = model(**batch).loss
    loss.backward()
    assert loss == 0 and not model.embedding.weight.grad.any()


def test_loss_of_a_bfloat16_model_is_computed_in_float32():
    model, batch = wrap(build("gpt2", dtype=torch.bfloat16)).train(), collate(token_rows(RAGGED), ANSWER)
    assert model(**batch).loss.dtype == torch.float32


# ---------------------------------------------------------------- passes


def spans(passes):
    return [(p.index, p.start, p.stop, [(s.k, s.column, s.rows.tolist()) for s in p.slots]) for p in passes]


def test_passes_of_the_figure():
    # q1 q2 q3 <bot> t1 t2 t3 <eot> a1 a2: two rows, the second with two thoughts
    latent = torch.zeros(2, 10, dtype=torch.bool)
    latent[0, 4:7] = latent[1, 4:6] = True
    t1, t2, t3 = (0, 4, [True, True]), (1, 5, [True, True]), (2, 6, [True, False])
    four = [(0, 0, 4, []), (1, 4, 5, [t1]), (2, 5, 6, [t2]), (3, 6, 10, [t3])]
    assert spans(plan_passes(latent, True, (7, 9))) == four
    assert spans(plan_passes(latent, False, (7, 9))) == [(0, 0, 10, [t1, t2, t3])]
    assert spans(plan_passes(torch.zeros_like(latent), True, (7, 9))) == [(0, 0, 10, [])]
    assert {p.row_ids for p in plan_passes(latent, True, (7, 9))} == {(7, 9)}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([[2, 4]], "contiguous"),
        ([[2, 3], [3, 4]], r"start in one common column \(2 here\); rows \[1\] differ"),
        ([[3], [2, 3], []], r"rows \[0\] differ"),
        ([[0, 1]], "column 0"),
    ],
)
def test_passes_refuse_what_they_would_get_wrong(columns, message):
    ids = torch.zeros(len(columns), 6, dtype=torch.long)
    for row, where in enumerate(columns):
        ids[row, where] = LATENT
    for mode in MODES:
        with pytest.raises(ValueError, match=message):
            wrap(build("gpt2"), mode)(ids)


@pytest.mark.parametrize(
    ("mode", "forced", "passes"), [("continuous", False, 9), ("learned_shared", False, 1), ("learned_shared", True, 9)]
)
def test_every_column_is_computed_once(mode, forced, passes):
    model, batch = wrap(build("gpt2"), mode, force_multipass=forced), collate(token_rows(RAGGED))
    widths = []
    model.base_causallm.base_model.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model(**batch)
    assert len(widths) == passes and sum(widths) == batch["input_ids"].shape[1]


# ---------------------------------------------------------------- what is refused


def test_unknown_mode_lists_the_known_ones():
    with pytest.raises(ValueError, match="feedback_mode 'pauze' is unknown") as error:
        wrap(build("gpt2"), "pauze")
    assert all(name in str(error.value) for name in (*MODES, "none", "pause_multipass"))


def test_synonym_is_stored_under_its_canonical_name():
    assert wrap(build("gpt2"), "pause_multipass").feedback_mode == canonical_mode("pause_multipass") == "learned_shared"


def test_feedback_needs_a_latent_token():
    with pytest.raises(ValueError, match="needs a latent_token_id"):
        Coconut(build("gpt2"), None, None, None, EOS)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_is_refused_in_multi_pass_training_only(family):
    batch, base = collate(token_rows(RAGGED), ANSWER), build(family)
    base.gradient_checkpointing_enable()
    for options in ({"mode": "continuous"}, {"mode": "learned_shared", "force_multipass": True}):
        with pytest.raises(ValueError, match="gradient checkpointing"):
            wrap(base, **options).train()(**batch)
    expected = run(wrap(build(family)), batch)[0]  # evaluation keeps its cache
    close(wrap(base)(**batch).loss, expected.loss)
    plain, checkpointed = (run(wrap(b, "pause_curriculum").train(), batch) for b in (build(family), base))
    close(checkpointed[0].loss, plain[0].loss)
    close_gradients(checkpointed[1], plain[1])


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (Gemma2Config(), "final_logit_softcapping"),
        (CohereConfig(), "logit_scale"),
        (GraniteConfig(logits_scaling=8.0), "logits_scaling"),
        (GPT2Config(lm_head_multiplier=0.5), "lm_head_multiplier"),
    ],
)
def test_models_that_rescale_logits_are_refused(config, key):
    base = build("gpt2")
    base.config = config
    with pytest.raises(ValueError, match=f"rescale their logits.*{key}"):
        wrap(base)


# ---------------------------------------------------------------- state dict


@pytest.mark.parametrize("family", FAMILIES)
def test_pause_modes_add_two_top_level_keys_and_continuous_none(family):
    base = build(family)
    stock = {f"base_causallm.{key}" for key in base.state_dict()} | {"embedding.weight"}
    assert set(wrap(base).state_dict()) == stock
    for number, mode in enumerate(MODES[1:], 1):
        state = wrap(base, mode).state_dict()
        assert set(state) == stock | {"pause_embedding", "feedback_mode_id"}
        assert state["feedback_mode_id"] == number and state["pause_embedding"].shape == (16,)


def saved(model) -> dict:
    """The state dict through a file, as it is read back."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("mode", MODES)
def test_save_and_load(mode):
    batch, model = collate(token_rows(RAGGED), ANSWER), wrap(build("gpt2", seed=1), mode)
    if model.pause_embedding is not None:
        model.pause_embedding.data += 0.5
    other = wrap(build("gpt2", seed=2), mode)
    copied = copy.deepcopy(other)
    expected = model(**batch).logits
    assert not torch.allclose(other(**batch).logits, expected)
    assert str(other.load_state_dict(saved(model), strict=True)) == "<All keys matched successfully>"
    assert torch.equal(other(**batch).logits, expected)
    assert not torch.allclose(copied(**batch).logits, expected)  # a copy keeps its own weights and takes its own file
    copied.load_state_dict(saved(model), strict=True)
    assert torch.equal(copied(**batch).logits, expected)


def test_keys_under_a_wrapper_keep_their_prefix():
    outer, other = (torch.nn.ModuleDict({"module": wrap(build("gpt2", seed=s), "learned_shared")}) for s in (1, 2))
    assert {"module.pause_embedding", "module.feedback_mode_id"} < set(outer.state_dict())
    other.load_state_dict(outer.state_dict(), strict=True)
    assert torch.equal(other["module"].pause_embedding, outer["module"].pause_embedding)


def test_strict_loading_tells_pause_files_from_stock_ones():
    stock, pause = wrap(build("gpt2")), wrap(build("gpt2"), "frozen")
    with pytest.raises(RuntimeError, match="Unexpected key.*pause_embedding"):
        stock.load_state_dict(pause.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="Missing key.*pause_embedding"):
        pause.load_state_dict(stock.state_dict(), strict=True)
