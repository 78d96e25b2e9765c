"""Which tokens Mixture of Depths computes: the share of each kind of token in each routed layer.

    rates = routing_report(model, batches)        # model: a Coconut; batches: dicts of input_ids, attention_mask, labels, ...
    rates["rates"]["thought"]                     # one share a routed layer; also "question", "text", "all"
    rates["padding"], rates["n"], rates["layers"], rates["capacity"]

A model that is not routed has no report (None). Kinds: thoughts are the latent tokens, text is what is labelled, the rest is
question, markers among it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from analysis.health_patient import Patient, Result, not_applicable, real
from backbones.routing import KINDS

MOST_OFF = 0.05
MOST_OFF_WIDE = 0.1  # where the capacity is above WIDE
WIDE = 0.25


@torch.no_grad()
def routing_report(model, batches: Iterable[dict[str, Tensor]]) -> dict | None:
    """Selected shares of each kind of token in each routed layer over all batches; None where nothing is routed.

    `n`: tokens of each kind; `padding`: selections at padding, which should be none. A share is None where there is no token.
    """
    selected, n = {}, {}
    for batch in batches:
        out = model.rollout(batch["input_ids"], batch["attention_mask"], batch.get("position_ids"))
        if out.columns is None or "mod_selected" not in out.columns:
            return None
        chosen_BTM, real_BT, kinds_BT = out.columns["mod_selected"], real(batch), kinds(batch, model.latent_token_id)
        groups = {kind: real_BT & (kinds_BT == number) for number, kind in enumerate(KINDS)}
        for name, where_BT in (groups | {"all": real_BT, "padding": ~real_BT}).items():
            selected[name] = selected.get(name, 0) + chosen_BTM[where_BT].sum(0).cpu()
            n[name] = n.get(name, 0) + int(where_BT.sum())
    config = model.base_causallm.config
    padding = int(selected.pop("padding").sum())
    rates = {name: [count / n[name] if n[name] else None for count in counts.tolist()] for name, counts in selected.items()}
    return {"capacity": config.mod_capacity, "layers": list(config.routed), "rates": rates, "n": n, "padding": padding}


def kinds(batch: dict[str, Tensor], latent_id: int | None) -> Tensor:
    """The kind of each column (a number of `KINDS`, int64 [B, T]); padding counts as question."""
    text = batch["labels"] != -100
    kinds_BT = torch.where(text, KINDS.index("text"), KINDS.index("question"))
    return kinds_BT if latent_id is None else kinds_BT.masked_fill(batch["input_ids"] == latent_id, KINDS.index("thought"))


def routing(patient: Patient) -> list[Result]:
    """`routing_padding`: padding is never routed. `routing_rate`: the layer furthest from its capacity, once trained."""
    rates = routing_report(patient.model, patient.batches(patient.rows))
    if rates is None:
        return [not_applicable(name, "no routed layers") for name in ("routing_padding", "routing_rate")]
    n = rates["n"]["padding"]
    padding = Result("routing_padding", rates["padding"], "0 selected", rates["padding"] == 0, f"{n} columns of padding")
    if n == 0:
        padding = not_applicable("routing_padding", "all rows are equally long")
    if rates["capacity"] >= 1:
        return [padding, not_applicable("routing_rate", "every token is to be computed", None, "", **rates)]
    off = max(abs(rate - rates["capacity"]) for rate in rates["rates"]["all"])
    most = MOST_OFF_WIDE if rates["capacity"] > WIDE else MOST_OFF
    rule = f"<= {most} from capacity {rates['capacity']:g}"
    shown = ["/".join("-" if r is None else f"{r:.2f}" for r in rates["rates"][kind]) for kind in (*KINDS, "all")]
    detail = "layers " + "/".join(map(str, rates["layers"])) + ": "
    detail += ", ".join(f"{kind} {text}" for kind, text in zip((*KINDS, "all"), shown))
    if why := patient.why_not_judged:
        return [padding, not_applicable("routing_rate", f"{why} ({detail})", off, rule, **rates)]
    return [padding, Result("routing_rate", off, rule, off <= most, detail, rates)]
