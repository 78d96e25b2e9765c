"""The shape of a LAHR model: sizes by name, which layers skip tokens, which read a memory; and how its weights begin.

    config = LahrConfig.size("small", vocab_size=100, use_mod=True)
    config = LahrConfig(hidden_size=384, num_hidden_layers=8, num_attention_heads=6, use_memory=True, memory_layers=[4])

Layer numbers begin at 0. Where weights begin from `init_seed`, each module's come from (init_seed, its name) alone, so models
that differ in routers or memories agree in every weight that they share.
"""

import hashlib
from dataclasses import fields

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from backbones.memory_layers import ValueTable
from backbones.routing import ROUTERS

SIZES = {  # width, heads, layers, positions; sub-keys a side, memory layers
    "tiny": (128, 4, 4, 256, 8, [2]),
    "small": (256, 8, 8, 512, 12, [4]),
    "medium": (512, 8, 12, 1024, 16, [4, 8]),
    "base": (768, 12, 12, 1024, 24, [4, 8]),
    "xl": (1024, 16, 14, 1024, 32, [4, 10]),
}
CHOICES = {
    "position_type": ("learned", "rope"),
    "mod_router": ROUTERS,
    "mod_compute": ("auto", "gathered", "dense"),
    "memory_mode": ("parallel", "replace"),
    "memory_type": ("product_key", "bank"),
    "memory_input": ("hidden", "embeddings"),
}
FLAGS = ("use_mod", "mod_force_thoughts", "use_memory", "memory_share_values", "tie_word_embeddings", "use_cache")


class LahrConfig(PreTrainedConfig):
    """See the fields. Raises ValueError for what can't be built; `mod_layers` and `memory_layers` must be disjoint."""

    model_type = "lahr"

    vocab_size: int = 50260
    hidden_size: int = 256
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    intermediate_size: int | None = None  # 4 x hidden_size
    max_position_embeddings: int = 512
    position_type: str = "learned"
    rms_norm_eps: float = 1e-6
    dropout: float = 0.1
    initializer_range: float = 0.02
    init_seed: int | None = None  # None: weights are drawn one after the other from torch's generator
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    # Mixture of Depths
    use_mod: bool = False
    mod_layers: list[int] | None = None  # the odd ones
    mod_capacity: float = 0.125
    mod_router: str = "threshold"
    mod_threshold_decay: float = 0.98
    mod_aux_coef: float = 0.01  # of the predictor's loss
    mod_force_thoughts: bool = False
    mod_compute: str = "auto"  # "gathered" and "dense" are one function; "auto" takes the one that suits device and pass

    # memory
    use_memory: bool = False
    memory_layers: list[int] | None = None  # one, in the middle
    memory_mode: str = "parallel"
    memory_type: str = "product_key"
    memory_input: str = "hidden"  # "embeddings" is a negative control: an embedding table in other words
    memory_sub_keys: int = 12
    memory_heads: int = 4
    memory_topk: int = 8
    memory_key_dim: int | None = None  # hidden_size / 2
    memory_share_values: bool = True
    memory_value_lr: float = 1e-3
    memory_slots: int | None = None  # of a bank: memory_sub_keys squared

    def __post_init__(self, **kwargs):
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: {getattr(self, name)!r} must be true or false")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is unknown; known: {', '.join(known)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size: {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if self.position_type == "rope" and self.head_dim % 2:
            raise ValueError(f"position_type: rope needs an even width of heads, not {self.head_dim}")
        if not 0 < self.mod_capacity <= 1:
            raise ValueError(f"mod_capacity: {self.mod_capacity} must be above 0 and at most 1")
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.memory_key_dim = self.memory_key_dim or self.hidden_size // 2
        self.memory_slots = self.memory_slots or self.memory_sub_keys**2
        if self.memory_key_dim % 2:
            raise ValueError(f"memory_key_dim: {self.memory_key_dim} must be even, for two halves")
        if self.use_mod and self.mod_layers is None:
            self.mod_layers = list(range(1, self.num_hidden_layers, 2))
        if self.use_memory and self.memory_layers is None:
            self.memory_layers = [self.num_hidden_layers // 4 * 2]
        for name in ("mod_layers", "memory_layers"):
            wrong = [i for i in getattr(self, name) or () if i not in range(self.num_hidden_layers)]
            if wrong:
                raise ValueError(f"{name}: {wrong} are not among the layers 0..{self.num_hidden_layers - 1}")
        both = sorted(set(self.mod_layers or ()) & set(self.memory_layers or ()))
        if both:
            raise ValueError(f"mod_layers and memory_layers must be disjoint; both name {both}")
        super().__post_init__(**kwargs)

    @classmethod
    def size(cls, name: str, **changes) -> "LahrConfig":
        """A size of `SIZES` with changes. ValueError where the size or a field is unknown."""
        if name not in SIZES:
            raise ValueError(f"size: {name!r} is unknown; known: {', '.join(SIZES)}")
        unknown = sorted(changes.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"model_config: {', '.join(unknown)} unknown to {cls.__name__}")
        width, heads, layers, positions, sub_keys, memory_layers = SIZES[name]
        shape = {
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "max_position_embeddings": positions,
            "memory_sub_keys": sub_keys,
        }
        if changes.get("use_memory"):
            shape["memory_layers"] = memory_layers
        return cls(**(shape | changes))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def routed(self) -> list[int]:
        """The layers that skip tokens."""
        return sorted(self.mod_layers) if self.use_mod else []

    @property
    def remembering(self) -> list[int]:
        """The layers that read a memory."""
        return sorted(self.memory_layers) if self.use_memory else []

    @property
    def shares_values(self) -> bool:
        """Whether one value table serves all memory layers."""
        return bool(self.remembering) and self.memory_type == "product_key" and self.memory_share_values


# ---------------------------------------------------------------- how weights begin


def drawn(config: LahrConfig, module: nn.Module, module_name: str, name: str, seed: int | None) -> Tensor:
    """Parameter `name` of a module as it begins, float32: ones in norms, zeros as biases, else normal.

    Sub-keys and values have vectors of unit length on average, so that scores begin with unit variance (arXiv 1907.05242);
    the deviation of all else is `initializer_range`. With a `seed` the draw depends on it and on the names alone.
    """
    shape = getattr(module, name).shape
    if isinstance(module, nn.RMSNorm):
        return torch.ones(shape)
    if name == "bias":
        return torch.zeros(shape)
    of_unit_length = name == "sub_keys" or isinstance(module, ValueTable)
    deviation = shape[-1] ** -0.5 if of_unit_length else config.initializer_range
    generator = None
    if seed is not None:
        whole_name = f"{module_name}.{name}".removeprefix("model.").removeprefix(".")
        digest = hashlib.sha256(f"{seed} {whole_name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return torch.randn(shape, generator=generator, device="cpu") * deviation


@torch.no_grad()
def init_by_name(model: nn.Module, seed: int) -> None:
    """Draw all weights of a LAHR model again, each from (seed, its name); a tied head keeps its tie."""
    done = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in done:
                parameter.copy_(drawn(model.config, module, module_name, name, seed))
                done.add(id(parameter))
