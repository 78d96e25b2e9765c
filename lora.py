"""LoRA (arXiv 2106.09685): a frozen causal LM, low-rank updates of its linear maps, and rows of its own for each new token.

    print(add_adapters(model, config.lora, new_ids=[50257, 50258, 50259], seed=0))      # from here on only these are trained
    weights = merged_weights(stored_model(model))       # what a checkpoint holds: names and shapes of the model as it was
    state = trained(stored_model(model))                # what training goes on from, with `fingerprint` of the frozen rest

The updates are those of `peft`. The rows of new tokens are ours: peft's trainable tokens copy the whole embedding table at
every call, and training the table itself would take gradient and optimizer state for all of its rows.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OWN = re.compile(r"(^|\.)(lora_[AB]\.|new_rows$)")  # names of what is added here
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---------------------------------------------------------------- what is trained


def add_adapters(model, options, new_ids: list[int], seed: int) -> str:
    """Freeze the backbone of a `Coconut` and add what is trained instead; returns a line that says what that is.

    `options`: r, alpha, dropout, target_modules ("auto": every linear map of the blocks; else names or ends of names).
    Pause vectors stay as they are. Updates begin at zero, so the function does not change. ValueError where a name is
    nowhere in the model, or the model is not one of the library's own.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import
    from transformers.pytorch_utils import Conv1D

    base = model.base_causallm
    if not type(base).__module__.startswith("transformers."):
        raise ValueError(f"lora: {type(base).__name__} is not one of the library's own models; leave lora out")
    maps = [name for name, module in base.base_model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    targets = options.target_modules
    for target in [] if targets == "auto" else targets:
        if not any(name == target or name.endswith(f".{target}") for name in maps):
            known = sorted({name.rpartition(".")[2] for name in maps})
            raise ValueError(f"lora.target_modules: {target!r} is no linear map of {type(base).__name__}: {', '.join(known)}")
    peft_config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules="all-linear" if targets == "auto" else list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(peft_config, base)
    base.requires_grad_(False)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head.weight is embedding.weight
    if new_ids:
        _add_rows(embedding, new_ids, nn.Parameter(embedding.weight[new_ids].clone()))
        _add_rows(head, new_ids, embedding.new_rows if tied else nn.Parameter(head.weight[new_ids].clone()))
    for name, parameter in base.named_parameters():
        if OWN.search(name):  # in float32 at least, whatever the frozen weights are kept in
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(True)
    parameters = list(model.parameters())
    n_trained = sum(p.numel() for p in parameters if p.requires_grad)
    n_all = sum(p.numel() for p in parameters)
    rows = f", {len(new_ids)} {'rows' if tied else 'rows in and out'} of new tokens" if new_ids else ""
    return f"LoRA: {n_trained} of {n_all} parameters are trained ({n_trained / n_all:.2%}): rank {options.r}{rows}"


def _add_rows(module: nn.Module, new_ids: list[int], rows: nn.Parameter) -> None:
    """Let an embedding or a head use `rows` in place of its own for these tokens."""
    module.new_rows = rows
    module.register_buffer("new_ids", torch.tensor(new_ids), persistent=False)
    module.register_forward_hook(_with_new_rows)


def _with_new_rows(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
    if not isinstance(module, nn.Embedding):
        bias = None if module.bias is None else module.bias[module.new_ids]
        return out.index_copy(-1, module.new_ids, F.linear(args[0], module.new_rows.to(args[0].dtype), bias).to(out.dtype))
    is_new_BT3 = args[0][..., None] == module.new_ids
    rows_BTD = F.embedding(is_new_BT3.long().argmax(-1), module.new_rows).to(out.dtype)
    return torch.where(is_new_BT3.any(-1, keepdim=True), rows_BTD, out)


# ---------------------------------------------------------------- files


def has_adapters(module: nn.Module) -> bool:
    """Whether `add_adapters` was here."""
    return any(OWN.search(name) for name, _ in module.named_parameters())


def trained(module: nn.Module) -> dict[str, Tensor]:
    """All that is trained, by its names in the state dict."""
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if value.requires_grad}


def fingerprint(module: nn.Module) -> int:
    """The sum of all that is frozen, read as integers, in [0, 2**63): tells base weights from others in one pass over them."""
    frozen = [value for value in module.state_dict(keep_vars=True).values() if not value.requires_grad]
    return sum(int(value.view(BITS[value.element_size()]).sum(dtype=torch.int64)) for value in frozen) % 2**63


def load_trained(module: nn.Module, state: dict[str, Tensor], base: int) -> None:
    """Go on from what `trained` gave. ValueError where the frozen weights are others than they were, or names differ."""
    own = {name: value.shape for name, value in trained(module).items()}
    if own != {name: value.shape for name, value in state.items()}:
        differing = sorted(own.keys() ^ state.keys()) or ["shapes"]
        raise ValueError(f"lora: the saved updates are of another model or another lora ({', '.join(differing[:5])} differ)")
    if fingerprint(module) != base:
        raise ValueError(
            "lora: model_id and load_model_path give other weights now than those that the updates were trained on"
        )
    module.load_state_dict(state, strict=False)


@torch.no_grad()
def merged_weights(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, on the CPU, of the same function without adapters; what is one storage stays one."""
    modules, weights, copies = dict(module.named_modules(remove_duplicate=False)), {}, {}
    for name, value in module.state_dict().items():
        if OWN.search(name):
            continue
        owner, _, leaf = name.rpartition(".")
        key = (value.data_ptr(), value.shape)
        if key not in copies or not value.numel():
            copies[key] = _merged(modules, owner, leaf, value).to("cpu", copy=True)
        weights[name.replace(".base_layer.", ".")] = copies[key]
    return weights


def _merged(modules: dict[str, nn.Module], owner: str, leaf: str, value: Tensor) -> Tensor:
    """A frozen weight with what was trained for it."""
    if leaf == "weight" and hasattr(modules[owner], "new_rows"):
        return value.index_copy(0, modules[owner].new_ids, modules[owner].new_rows.to(value.dtype))
    if leaf == "weight" and owner.endswith(".base_layer"):
        (adapter,) = modules[owner.removesuffix(".base_layer")].active_adapters
        delta = modules[owner.removesuffix(".base_layer")].get_delta_weight(adapter)
        return (value.to(delta.dtype) + delta).to(value.dtype)
    return value
