"""Every published failure, built into a real trained model, turns the check red that is there for it."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from health_material import TRAINED, examined, failing, results, trained

from analysis.health_patient import Patient
from backbones.halting import HaltingHead
from backbones.long_memory import EmaPool
from backbones.memory_layers import Memory
from backbones.routing import Router
from coconut import Coconut


@pytest.fixture(scope="module")
def folders(tmp_path_factory, own_cache):
    return trained(tmp_path_factory.getbasetemp())


def modules(patient: Patient, kind) -> list:
    return [module for module in patient.model.modules() if isinstance(module, kind)]


def rebuilt(kind, method: str, wrap, of=None):
    """A change that gives every module of a kind in the loaded model `wrap(its own method)` as that method."""

    def change(patient: Patient) -> None:
        for module in [patient.model] if kind is Coconut else modules(patient, kind):
            setattr(module, method, types.MethodType(wrap(getattr(type(module), method)), module))

    return change


# ---------------------------------------------------------------- the function


@pytest.mark.parametrize("model", ["lahr", "cognate", "gpt2"])
def test_attention_that_looks_both_ways(folders, monkeypatch, model):
    real = F.scaled_dot_product_attention

    def attend(q, k, v, *masks, scale=None, **others):
        return real(q, k, v, scale=scale)

    def two_way(patient):
        monkeypatch.setattr(F, "scaled_dot_product_attention", attend)

    assert {"causality", "padding", "cached"} <= failing(folders[model], two_way, "causality,padding,cached,repeat")


def test_a_model_that_is_told_the_next_token(folders):
    """Teacher-forced it is right, and on prefixes it is not: the accuracy that two-way training shows."""

    def told(real):
        def rollout(self, input_ids, *args, **kwargs):
            out = real(self, input_ids, *args, **kwargs)
            next_BTD = F.pad(self.embedding(input_ids)[:, 1:], (0, 0, 0, 1))
            return out._replace(hidden_BTD=out.hidden_BTD + 1e3 * F.normalize(next_BTD, dim=-1))

        return rollout

    assert failing(folders["gpt2"], rebuilt(Coconut, "rollout", told), "prefixes,repeat,permutation") == {"prefixes"}


def test_a_router_that_chooses_among_the_whole_row(folders):
    def whole_rows(patient):
        for router in modules(patient, Router):
            router.kind = "topk"

    assert "causality" in failing(folders["lahr"], whole_rows, "causality,repeat")

    def admitted(patient):
        whole_rows(patient)
        patient.bare.config.mod_router = "topk"

    code, said = examined(folders["lahr"], admitted, "cached,variety,questions")
    assert code == 0 and {check["detail"] for check in said["checks"]} == {"this backbone only takes whole rows"}


@pytest.mark.parametrize("model", ["cognate", "lahr", "gpt2"])
def test_labels_that_are_not_shifted(folders, model):
    """Where the wrapper takes its loss, in evaluation and training; and where a plain model takes `labels`."""

    def unshifted(real):
        def label_losses(self, hidden_BTD, labels_BT, labelled=None, columns=None):
            rows_N, columns_N = (labels_BT != -100).nonzero(as_tuple=True)
            logits_NV = self.head(hidden_BTD[rows_N, columns_N])
            return F.cross_entropy(logits_NV, labels_BT[rows_N, columns_N], reduction="none"), rows_N

        return label_losses

    both = {"loss", "training_targets"}
    assert failing(folders[model], rebuilt(Coconut, "label_losses", unshifted), "loss,training_targets,repeat") == both

    def shifted_back(patient):
        real = patient.bare.forward

        def forward(*args, labels=None, **kwargs):
            return real(*args, labels=None if labels is None else F.pad(labels[:, :-1], (1, 0), value=-100), **kwargs)

        patient.bare.forward = forward

    assert failing(folders[model], shifted_back, "loss,training_targets,repeat") == both


def test_a_state_that_outlives_the_call(folders):
    """A pool kept in a buffer and updated in evaluation."""

    def kept(real):
        def forward(self, y_BCD, window, shelf):
            out = real(self, y_BCD, window, shelf)
            mixed = out + self.pool
            self.pool.lerp_(out.detach().mean((0, 1)), 0.5)
            return mixed

        return forward

    def change(patient):
        for pool in modules(patient, EmaPool):
            pool.register_buffer("pool", torch.zeros(pool.up.out_features))
        rebuilt(EmaPool, "forward", kept)(patient)

    assert {"repeat", "state"} <= failing(folders["cognate"], change, "repeat,state,loss")


def test_a_memory_mixed_over_the_batch(folders):
    def mixed(real):
        def forward(self, *args):
            out = real(self, *args)
            return out.mean(0, keepdim=True).expand_as(out)

        return forward

    found = failing(folders["cognate"], rebuilt(EmaPool, "forward", mixed), "batch_size,repeat,state")
    assert found == {"batch_size"}


def test_rows_that_depend_on_their_place(folders):
    def placed(real):
        def rollout(self, input_ids, *args, **kwargs):
            out = real(self, input_ids, *args, **kwargs)
            place_B11 = torch.arange(len(input_ids)).view(-1, 1, 1)
            return out._replace(hidden_BTD=out.hidden_BTD * (1 + 0.1 * place_B11))

        return rollout

    assert failing(folders["lahr"], rebuilt(Coconut, "rollout", placed), "permutation,repeat") == {"permutation"}


def test_positions_that_slip_when_decoding(folders):
    def slipped(real):
        def extend(self, input_ids, cache, start, *args, **kwargs):
            kwargs["position_ids"] = torch.full_like(input_ids, start - 1)
            return real(self, input_ids, cache, start, *args, **kwargs)

        return extend

    assert failing(folders["gpt2"], rebuilt(Coconut, "extend", slipped), "cached,repeat") == {"cached"}


# ---------------------------------------------------------------- gradients


def test_a_router_without_gradient(folders):
    def detached(real):
        def forward(self, *args, **kwargs):
            route = real(self, *args, **kwargs)
            return route._replace(gate=route.gate.detach())

        return forward

    found = failing(folders["lahr"], rebuilt(Router, "forward", detached), "gradients,router_gradient,loss")
    assert found == {"gradients", "router_gradient"}


def test_a_halting_head_without_gradient(folders):
    def detached(real):
        return lambda self, z: real(self, z).detach()

    found = failing(folders["cognate"], rebuilt(HaltingHead, "forward", detached), "gradients,halting_gradient,loss")
    assert found == {"gradients", "halting_gradient"}
    _, said = examined(folders["cognate"], rebuilt(HaltingHead, "forward", detached), "gradients")
    assert results(said)["gradients"]["value"] == 2 and "act_head.logit.weight" in results(said)["gradients"]["detail"]


def test_a_parameter_that_is_not_finite(folders):
    def infinite(patient):
        patient.model.embedding.weight.register_hook(lambda grad: grad * math.inf)

    assert failing(folders["gpt2"], infinite, "gradients") == {"gradients"}


# ---------------------------------------------------------------- halting, routing, memory


def alive(patient: Patient) -> None:
    """A halting head that tells tokens apart."""
    for head in modules(patient, HaltingHead):
        head.logit.weight.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(3)


def test_halting_that_is_the_same_for_every_token(folders):
    def constant(patient):
        for head in modules(patient, HaltingHead):
            head.logit.weight.data.zero_()

    code, said = examined(folders["cognate"], constant, "halting", *TRAINED)
    assert code == 1 and {"halting_variance", "halting_values", "halting_rank"} == {*said["failed"]}
    assert results(said)["halting_variance"]["value"] < 1e-12 and results(said)["halting_values"]["value"] == 1
    _, said = examined(folders["cognate"], alive, "halting", *TRAINED)
    assert results(said)["halting_variance"]["status"] == results(said)["halting_values"]["status"] == "ok"
    _, said = examined(folders["cognate"], alive, "halting")
    assert all(check["status"] == "not applicable" and check["value"] is not None for check in said["checks"])


def test_a_variance_that_is_no_number_fails_even_untrained(folders):
    def broken(patient):
        for head in modules(patient, HaltingHead):
            head.logit.bias.data.fill_(math.nan)

    assert "halting_variance" in failing(folders["cognate"], broken, "halting")


def test_padding_that_is_routed(folders):
    def blind(real):
        return lambda self, x_BCD, real_BC=None, *args, **kwargs: real(self, x_BCD, None, *args, **kwargs)

    found = failing(folders["lahr"], rebuilt(Router, "forward", blind), "routing,repeat")
    assert found == {"routing_padding"}


def test_routers_far_from_their_capacity(folders):
    def never(patient):
        for router in modules(patient, Router):
            router.threshold.fill_(1e9)

    code, said = examined(folders["lahr"], never, "routing", *TRAINED)
    assert code == 1 and said["failed"] == ["routing_rate"] and results(said)["routing_rate"]["value"] == 0.5
    code, said = examined(folders["lahr"], never, "routing")
    assert code == 0 and "untrained: 6 updates" in results(said)["routing_rate"]["detail"]


@pytest.mark.parametrize("part", ["query", "out"])
def test_a_memory_that_is_dead(folders, part):
    """Every token reads the same rows; or what is read is thrown away."""

    def dead(patient):
        for memory in modules(patient, Memory):
            getattr(memory, part).weight.data.zero_()

    assert failing(folders["lahr"], dead, "memory") == {"memory.layer_2"}


@pytest.mark.parametrize("kill", ["reads", "gate"])
def test_a_long_term_memory_that_is_dead(folders, kill):
    def dead(patient):
        model = patient.bare.base_model
        if kill == "reads":
            model.memory.up.weight.data.zero_()
        else:
            model.gate.outer.bias.data.fill_(50.0)

    assert failing(folders["cognate"], dead, "memory") == {"memory"}


# ---------------------------------------------------------------- what it says


def test_a_model_that_says_one_token(folders):
    def stuck(real):
        def head(self, hidden):
            return real(self, hidden) + 1e4 * F.one_hot(torch.tensor(40), len(self.embedding.weight))

        return head

    code, said = examined(folders["gpt2"], rebuilt(Coconut, "head", stuck), "variety,questions", *TRAINED)
    red = {"variety.top_share", "variety.distinct_first", "variety.longest_run", "variety.distinct_1", "questions"}
    assert code == 1 and red == {*said["failed"]}
    assert [q["collapsed"] for q in said["questions"]] == [True] * 3 and "CCCC" in said["questions"][0]["output"]


def test_a_copier(folders):
    """What it is given is what it says: after "A:" comes ":"."""

    def copies(real):
        def backbone(self, x_BCD, *args):
            x_BCD, _, columns = real(self, x_BCD, *args)
            own_V = F.normalize(self.embedding.weight, dim=-1)
            nearest = (F.normalize(x_BCD, dim=-1) @ own_V.T).argmax(-1)
            return x_BCD, 1e3 * own_V[nearest], columns

        return backbone

    def change(patient):
        rebuilt(Coconut, "_backbone_pass", copies)(patient)
        patient.model.head = lambda hidden: hidden @ F.normalize(patient.model.embedding.weight, dim=-1).T

    code, said = examined(folders["gpt2"], change, "echo,variety,questions", *TRAINED)
    assert code == 1 and {"echo", "variety.echo", "variety.longest_run"} <= {*said["failed"]}
    assert results(said)["echo"]["value"] == 1.0
