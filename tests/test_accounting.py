"""Seconds by phase, operations against a counter and published numbers, peaks by device name."""

import copy

import numpy as np
import pytest
import torch
from tiny import LATENT, build, collate, wrap
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from accounting import HostEvent, Shape, Stopwatch, Throughput, peak_by_name, peak_flops, training_flops
from coconut import decoder_blocks

GPT2 = Shape(n_layers=12, width=768, d_model=768, vocab=50257, block_parameters=12 * 12 * 768**2)


def shape_of(base) -> Shape:
    return Shape.of(base, decoder_blocks(base))


# ---------------------------------------------------------------- seconds


class FakeClock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeDevice:
    """A stream of kernels: events are stamped when the device gets there, which a query does not wait for."""

    def __init__(self):
        self.host = self.busy_until = 0.0
        self.made = self.waits = 0

    def launch(self, milliseconds: float) -> None:
        self.busy_until = max(self.busy_until, self.host) + milliseconds

    def event(self) -> "FakeEvent":
        self.made += 1
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, device: FakeDevice):
        self.device, self.at = device, None

    def record(self) -> None:
        self.at = max(self.device.busy_until, self.device.host)

    def query(self) -> bool:
        return self.at <= self.device.host

    def synchronize(self) -> None:
        self.device.waits += 1
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self.query() and end.query(), "CUDA raises where an event has not happened yet"
        return end.at - self.at


def test_phases_of_the_hosts_clock():
    clock = FakeClock()
    watch = Stopwatch("cpu", lambda: HostEvent(clock))
    for name, seconds in [("data", 1.0), ("backward", 4.0), ("data", 0.5)]:
        clock.now += seconds
        watch.mark(name)
    clock.now += 1000.0
    watch.restart()
    clock.now += 2.0
    watch.mark("backward")
    assert watch.read() == {"data": 1.5, "backward": 6.0}
    assert watch.read() == {}, "reading clears"
    clock.now += 3.0
    watch.mark("optimizer")
    assert watch.read() == {"optimizer": 3.0}, "after a read the clock runs on from the last mark"


def test_phases_of_a_device_that_runs_behind_the_host():
    device = FakeDevice()
    watch = Stopwatch("cuda", device.event)
    for _ in range(3):
        device.host += 2  # the loader: hidden behind the kernels except in the first round, when the device is idle
        watch.mark("data")
        device.launch(5)
        watch.mark("prefix")
        device.launch(20)
        watch.mark("backward")
    assert device.waits == 0, "marks never wait"
    seconds = watch.read()
    assert seconds == pytest.approx({"data": 0.002, "prefix": 0.015, "backward": 0.060})
    assert sum(seconds.values()) == pytest.approx(device.busy_until / 1000), "phases add up to the wall time"
    assert device.waits == 1


def test_a_long_epoch_holds_few_events():
    device = FakeDevice()
    watch = Stopwatch("cuda", device.event)
    for _ in range(5000):
        device.launch(1)
        watch.mark("thoughts")
        device.host += 1
    assert device.made <= Stopwatch.FOLD_AT + 3 and device.waits == 0
    assert watch.read() == pytest.approx({"thoughts": 5.0})
    made = device.made
    for _ in range(100):
        watch.mark("data")
    watch.read()
    assert device.made == made, "events are used again"


# ---------------------------------------------------------------- operations


def test_shapes():
    tiny = build("gpt2", dtype=torch.float32)
    assert shape_of(tiny) == Shape(3, 16, 16, 60, 12 * 3 * 16**2)
    config = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "max_position_embeddings": 16,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # attention wider than the model
    wide = AutoModelForCausalLM.from_config(Qwen3Config(**config, **heads))
    assert shape_of(wide) == Shape(2, 64, 32, 50, 2 * (32 * (64 + 32 + 32) + 64 * 32 + 3 * 32 * 48))


@pytest.fixture(scope="module")
def eager():
    """A tiny GPT-2 whose attention is plain products, which the counter sees (it does not know the CPU's fused kernel)."""
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=3, n_head=4, n_positions=64, attn_implementation="eager", **off)
    return AutoModelForCausalLM.from_config(config).train()


def counted(step) -> int:
    with FlopCounterMode(display=False) as counter:
        step().backward()
    return counter.get_total_flops()


def test_formula_against_a_counter(eager):
    """Eager attention computes the whole square of T^2 pairs, the formula half of it; nothing else may differ."""
    ids = torch.randint(60, (5, 24))
    shape, lengths = shape_of(eager), [24] * 5
    upper_half = 6 * shape.n_layers * shape.width * 5 * 24**2
    whole = counted(lambda: eager(input_ids=ids, labels=ids).loss)
    assert whole == training_flops(shape, lengths, labelled=5 * 4, full_head=True) + upper_half


def test_frozen_weights_cost_no_gradients_of_their_own(eager):
    """As under LoRA: the gradient still passes through them, to the embeddings."""
    frozen = copy.deepcopy(eager)
    for block in decoder_blocks(frozen):
        block.requires_grad_(False)
    ids = torch.randint(60, (5, 24))
    shape = Shape.of(frozen, decoder_blocks(frozen), frozen=True)
    assert shape_of(frozen) == shape_of(eager), "unless it is asked for"
    assert shape.frozen_parameters == shape.block_parameters and not shape.frozen_head
    upper_half = 6 * shape.n_layers * shape.width * 5 * 24**2
    whole = counted(lambda: frozen(input_ids=ids, labels=ids).loss)
    assert whole == training_flops(shape, [24] * 5, labelled=5 * 4, full_head=True) + upper_half
    assert training_flops(shape, [7], 3) - training_flops(shape._replace(frozen_head=True), [7], 3) == 2 * 16 * 60 * 3


def test_thoughts_cost_their_tokens_only(eager):
    """Three thoughts in four passes: each pass looks at the columns up to its end; the head meets four labels a row."""
    model = wrap(eager).train()
    batch = collate([[*range(2, 12), *[LATENT] * 3, *range(5, 13)] for _ in range(5)], answer=4)
    shape = shape_of(eager)
    passes = [(10, 10), (1, 11), (1, 12), (9, 21)]  # columns computed, columns looked at
    pairs = 5 * sum(own * seen for own, seen in passes)
    flops = training_flops(shape, [21] * 5, labelled=20)
    triangle = 6 * shape.n_layers * shape.width * 5 * 21**2
    assert counted(lambda: model(**batch).loss) == flops - triangle + 12 * shape.n_layers * shape.width * pairs


def test_published_numbers():
    """From mean lengths alone, so sum T^2 is a little low; the last digits are those of the published table."""
    for rows, epochs, tokens, labelled, supervised, full in (
        (17_886, 50, 344e6, 0.050, 187e15, 263e15),  # ProsQA
        (385_620, 22, 620e6, 0.111, 335e15, 463e15),  # GSM8K-Aug
    ):
        n = rows * epochs
        one = np.array([tokens / n])
        assert n * training_flops(GPT2, one, labelled * one[0]) == pytest.approx(supervised, rel=0.005)
        assert n * training_flops(GPT2, one, 0, full_head=True) == pytest.approx(full, rel=0.005)
    # 857 MFLOP a token is 6 * 124M + 12 * 12 * 768 * 1024: all parameters, and attention without a causal mask.
    causal = training_flops(GPT2, [1024], 0, full_head=True) / 1024
    assert causal + 6 * 12 * 768 * 1024 == pytest.approx(857e6, rel=0.005)


def test_rows_count_by_their_own_length():
    rows = [training_flops(GPT2, [T], T // 2) for T in (10, 500)]
    assert training_flops(GPT2, np.array([10, 500], dtype=np.int32), 255) == pytest.approx(sum(rows))
    long = np.full((1000,), 100_000, dtype=np.int32)  # T^2 of which would overflow
    assert training_flops(GPT2, long, 0) == pytest.approx(1000 * training_flops(GPT2, [100_000], 0))


# ---------------------------------------------------------------- the peak


@pytest.mark.parametrize(
    "name, precision, tflops",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "tf32", 494),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA GeForce RTX 4090", "bf16", 165),
        ("Tesla V100-SXM2-32GB", "fp32", 15.7),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("NVIDIA H100 NVL", "bf16", None),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
    ],
)
def test_peaks_by_device_name(name, precision, tflops):
    assert peak_by_name(name, precision) == (None if tflops is None else tflops * 1e12)


def test_peak_of_a_device(monkeypatch):
    assert peak_flops(torch.device("cpu"), "bf16") is None
    assert peak_flops(torch.device("cpu"), "fp32", 0.1) == 1e11
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(torch.device("cuda", 0), "bf16") == 989e12
    assert peak_flops(torch.device("cuda", 0), "bf16", 500) == 500e12


# ---------------------------------------------------------------- rates


def test_rates_add_up_over_batches():
    work = Throughput()
    work.count(GPT2, np.array([30, 10]), labelled=8, positions=60)
    work.count(GPT2, [20], labelled=4, positions=20)
    flops = training_flops(GPT2, [30, 10, 20], 12)
    rates = work.rates(2.0, peak=4 * flops)
    assert rates == pytest.approx(
        {"seconds": 2.0, "tokens_per_s": 30.0, "samples_per_s": 1.5, "padded_share": 0.25, "supervised_share": 0.2,
         "flops": flops, "tflops_per_s": flops / 2e12, "mfu": 0.125}
    )  # fmt: skip
    assert "mfu" not in work.rates(2.0)


def test_rates_of_nothing_are_numbers():
    assert set(Throughput().rates(0.0, peak=1e12).values()) == {0.0}
    work = Throughput()
    work.count(GPT2, [10], labelled=1, positions=10)
    rates = work.rates(0.0, peak=1e12)
    assert rates["tokens_per_s"] == rates["mfu"] == 0.0 and rates["flops"] > 0
