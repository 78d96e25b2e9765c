"""What the mechanisms of LAHR and Cognate cost or save, each beside the same model without it, in one process.

MoD       training step of LAHR with 12.5 % of tokens through every other block, gathered / the dense model of equal width
memory    training step of LAHR with a product-key memory / without
EMA       the averages of Cognate's long-term memory over 512 tokens by a Python loop / in closed form, forward and backward
halting   Cognate scoring and generating: all refinement steps for every token / halting at the "speed" threshold

Thresholds have settled first, so that they select what they are to select (the note says how much). The halting head's weights
are drawn wide, so that tokens differ in their steps as those of a trained model do; the steps they take are in the note.
"""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from backbones.cognate import CognateConfig, CognateForCausalLM
from backbones.lahr import LahrConfig
from backbones.long_memory import EmaPool, decaying_average

from .timing import alternate, ratio, result

CPU = torch.device("cpu")
VOCABULARY = 1000
SPREAD, BIAS = 3.0, 1.0  # of the halting head's logits


def lahr(size: str, positions: int, **flags):
    """A LAHR of a named size with random weights, without dropout."""
    torch.manual_seed(0)
    changes = {"vocab_size": VOCABULARY, "max_position_embeddings": positions, "dropout": 0.0, "init_seed": 0}
    return AutoModelForCausalLM.from_config(LahrConfig.size(size, **changes | flags)).train()


def step(model, ids: Tensor) -> None:
    """Forward and backward of one batch [B, T]."""
    model(ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)
    model.forget_scores()


def batch(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def measure_routing(size: str, columns: int, rows: int, rounds: int, settle: int = 30) -> list[dict]:
    """MoD: the seconds of gathered routing over those of the dense model."""
    models = {"gathered": lahr(size, columns, use_mod=True, mod_threshold_decay=0.5), "dense": lahr(size, columns)}
    ids = batch(rows, columns)
    with torch.no_grad():
        for _ in range(settle):  # the thresholds, each on the scores that those below it bring about
            models["gathered"](ids, labels=ids)
            models["gathered"].after_update()
    works = {name: lambda i, model=model: step(model, ids) for name, model in models.items()}
    taken = alternate(works, rounds, CPU)
    with torch.no_grad():
        selected = models["gathered"].eval()(ids).columns["mod_selected"].float().mean()
    note = f"{100 * selected:.1f} % of tokens selected"
    return [result("MoD", f"LAHR {size}, T {columns}", batch_size=rows, note=note, **ratio(taken, "gathered", "dense"))]


def measure_memory(size: str, columns: int, rows: int, rounds: int) -> list[dict]:
    """The seconds of a step with memory layers over those without."""
    ids = batch(rows, columns)
    models = {"with": lahr(size, columns, use_memory=True), "without": lahr(size, columns)}
    taken = alternate({name: lambda i, m=m: step(m, ids) for name, m in models.items()}, rounds, CPU)
    return [result("memory", f"LAHR {size}, T {columns}", batch_size=rows, **ratio(taken, "with", "without"))]


def looped(c_BCm: Tensor, log_decay_m: Tensor) -> Tensor:
    """What `decaying_average` computes, token by token as the equation stands there."""
    decay_m, m_Bm, trace = log_decay_m.exp(), torch.zeros_like(c_BCm[:, 0]), []
    for c_Bm in c_BCm.unbind(1):
        m_Bm = decay_m * m_Bm + (1 - decay_m) * c_Bm
        trace.append(m_Bm)
    return torch.stack(trace, 1)


def measure_pool(rows: int, rounds: int, columns: int = 512) -> list[dict]:
    """EMA: the loop's seconds over those of the closed form, alone and between the projections that both have."""
    torch.manual_seed(0)
    config = CognateConfig()
    pool, y_BCD = EmaPool(config), torch.randn(rows, columns, config.hidden_size)
    log_decay_m = pool.log_decay(y_BCD)

    def closed(c_BCm: Tensor) -> Tensor:
        return decaying_average(c_BCm, log_decay_m, None, None, pool.chunk)

    c_BCm = pool.down(y_BCD).detach().requires_grad_()
    torch.testing.assert_close(closed(c_BCm), looped(c_BCm, log_decay_m), rtol=1e-3, atol=1e-5)
    works = {
        "loop": lambda i: looped(c_BCm, log_decay_m).sum().backward(),
        "closed": lambda i: closed(c_BCm).sum().backward(),
        "loop, projected": lambda i: pool.up(looped(pool.down(y_BCD), log_decay_m)).sum().backward(),
        "closed, projected": lambda i: pool.up(closed(pool.down(y_BCD))).sum().backward(),
    }
    taken = alternate(works, rounds, CPU)
    shape = f"Cognate, T {columns}"
    return [
        result("EMA", shape, batch_size=rows, **ratio(taken, "loop", "closed")),
        result("EMA projected", shape, batch_size=rows, **ratio(taken, "loop, projected", "closed, projected")),
    ]


def measure_halting(rows: int, columns: int, rounds: int, new_tokens: int) -> list[dict]:
    """Halting: all steps over those that tokens take, of scoring rows in one call and of generating behind them."""
    torch.manual_seed(0)
    config = CognateConfig(vocab_size=VOCABULARY, specialization="speed", bos_token_id=None, eos_token_id=None)
    model = CognateForCausalLM(config).eval()
    torch.nn.init.normal_(model.model.act_head.logit.weight, std=SPREAD / config.hidden_size**0.5)
    torch.nn.init.constant_(model.model.act_head.logit.bias, BIAS)
    ids = batch(rows, columns)

    def score(halts: bool) -> Tensor:
        model.config.early_exit = halts
        with torch.no_grad():
            return model(ids, use_cache=False).token_halting_steps.float().mean()

    def generate(halts: bool) -> Tensor:
        model.config.early_exit = halts
        return model.generate(ids[:, :32], max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)

    note = f"{score(True):.2f} of {config.max_recursions} steps a token"
    scoring = alternate({"all": lambda i: score(False), "halting": lambda i: score(True)}, rounds, CPU)
    generating = alternate({"all": lambda i: generate(False), "halting": lambda i: generate(True)}, rounds, CPU)
    return [
        result(
            "halting", f"Cognate speed, scoring T {columns}", batch_size=rows, note=note, **ratio(scoring, "all", "halting")
        ),
        result("halting", "Cognate speed, generating", batch_size=rows, **ratio(generating, "all", "halting")),
    ]


def measure_mechanisms(quick: bool) -> list[dict]:
    """All of them. `quick`: few rounds of the smallest."""
    if quick:
        rows = measure_routing("tiny", 64, 2, 1, settle=2) + measure_memory("tiny", 64, 2, 1)
        return rows + measure_pool(1, 1, columns=64) + measure_halting(1, 32, 1, new_tokens=2)
    found = [r for columns in (256, 512, 1024) for r in measure_routing("small", columns, 4, 9)]
    found += measure_memory("small", 256, 4, 15) + measure_memory("medium", 256, 2, 9)
    found += [r for rows in (1, 4, 16) for r in measure_pool(rows, 15)]
    return found + [r for rows in (1, 4) for r in measure_halting(rows, 512, 9, new_tokens=48)]
