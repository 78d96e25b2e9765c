"""The config of the Cognate backbone: its shape, its specializations, and what training asks of its halting.

CognateConfig()                                # 25,623,681 parameters
CognateConfig(specialization="speed")          # halts early; see SPECIALIZATIONS
CognateConfig.wide(vocab_size=32768)
"""

from typing import NamedTuple

from transformers import PreTrainedConfig


class Specialization(NamedTuple):
    """What the three published variants differ in."""

    halt_threshold: float  # of the cumulative probability
    memory_half_life: int  # tokens; of the slowest channel
    surprise_threshold: float  # of the Titans memory
    seed: int


SPECIALIZATIONS = {
    "reasoning": Specialization(0.95, 4096, 0.7, 42),
    "memory": Specialization(0.90, 8192, 0.5, 1337),
    "speed": Specialization(0.50, 2048, 0.3, 2023),
}
WIDE = {
    "hidden_size": 320,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "intermediate_size": 1280,
    "memory_size": 160,
    "gate_size": 160,
}
CHOICES = {
    "specialization": tuple(SPECIALIZATIONS),
    "memory_type": ("ema", "titans"),
    "act_loss": ("ponder", "bce"),
    "act_target": ("gain", "ema"),
}


class CognateConfig(PreTrainedConfig):
    """Shape, halting and losses of a Cognate model; every argument has a default.

    `halt_threshold`, `memory_half_life` and `surprise_threshold` are those of the `specialization` where not given.
    `memory_decay`: one λ for all channels of the EMA pool (the original's 0.99) instead of half-lives.
    `use_act: false`: always `max_recursions` steps, trained on the mean over steps weighted by `step_weights`.
    `early_exit: false`: halting is trained and reported, but the last step is what counts.
    `step_weights`: of the losses at steps 0 .. R; the last R + 1 of them. `act_target`: what `act_loss: bce` aims at.
    Raises ValueError for what is unknown or doesn't fit together.
    """

    model_type = "cognate"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50257
    hidden_size: int = 256
    num_hidden_layers: int = 10
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    max_position_embeddings: int = 2048
    attention_window: int = 1024  # no library cache layer reads this name and truncates
    memory_type: str = "ema"
    memory_size: int = 128
    memory_decay: float | None = None
    memory_half_life: float | None = None
    surprise_threshold: float | None = None
    gate_size: int = 128
    max_recursions: int = 3
    micro_steps: int = 2
    refiner_heads: int = 8
    specialization: str = "reasoning"
    use_act: bool = True
    early_exit: bool = True
    detach_between_steps: bool = False
    halt_threshold: float | None = None
    act_loss: str = "ponder"
    act_loss_weight: float = 0.01
    ponder_prior: float = 0.5
    act_target: str = "gain"
    act_delta: float = 0.05
    act_entropy_weight: float = 0.001
    act_diversity_weight: float = 0.01
    gate_entropy_weight: float = 0.001
    step_weights: list[float] | None = None
    attention_dropout: float = 0.1
    hidden_dropout: float = 0.1
    embedding_dropout: float = 0.1
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                raise ValueError(f"{key} {getattr(self, key)!r} is unknown; known: {', '.join(known)}")
        for key in ("halt_threshold", "memory_half_life", "surprise_threshold"):
            if getattr(self, key) is None:
                setattr(self, key, getattr(SPECIALIZATIONS[self.specialization], key))
        if self.step_weights is None:
            self.step_weights = [0.33, 0.5, 0.75, 1.0]
        if self.max_recursions >= len(self.step_weights):
            raise ValueError(
                f"step_weights has {len(self.step_weights)} entries; max_recursions {self.max_recursions} needs one for each "
                f"of {self.max_recursions + 1} steps"
            )
        for key in ("num_attention_heads", "refiner_heads"):
            if self.hidden_size % getattr(self, key):
                raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {key} {getattr(self, key)}")
        super().__post_init__(**kwargs)

    @property
    def seed(self) -> int:
        """The random seed that every entry point starts this specialization with."""
        return SPECIALIZATIONS[self.specialization].seed

    @classmethod
    def wide(cls, **changes) -> "CognateConfig":
        """The preset of width 320 (32,571,041 parameters), with changes."""
        return cls(**{**WIDE, **changes})
