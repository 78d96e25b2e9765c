"""Material for the tests of the gates: log fragments as recorded, metrics, checkpoints and result files."""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from analysis import gates  # noqa: E402
from analysis.runs import LOG_STEMS  # noqa: E402

D = 8
BASE = torch.linspace(-0.2, 0.3, D)
OTHER = torch.ones(D) - (torch.ones(D) @ BASE) / (BASE @ BASE) * BASE  # orthogonal to the base row
OTHER = OTHER / OTHER.norm()


def fragment(epoch: int, correct: int, total: int = 300, loss: float = 0.5) -> str:
    """One epoch of a recorded log: bars torn by carriage returns, then the lines of the validation."""
    bars = "\r".join(
        f"Training Epoch: {epoch + 1}/50, batch {i}/559 completed (loss: {loss:.4f}:  {i}%|#| {i}/139" for i in range(3)
    )
    return (
        f"Training Epoch: {epoch + 1}:   0%|          | 0/139 [00:00<?, ?it/s]\r{bars}\nsaving model.\neval loss 0.41\n"
        f"Test Accuracy:   0%|          | 0/{total}\rTest accuracy: 0.61: 100%|#| {total}/{total}\r"
        "Question 0: Answer = 'Tom is a nan.' CoT = 'inf'\nFull output: 'nan inf'\n"
        f"Device 0: Cor={correct}, CoT=0, Total={total}\n"
        f"Test accuracy: 0.61: 100%|#| {total}/{total}\rAccuracy on validation set: {correct} / {total} = 0.61\n"
        f"CoT match on validation set: 0 / {total} = 0.0\n"
    )


def log_text(corrects: list[int], **kwargs) -> str:
    return "Config: {'coconut': True, 'num_epochs': 50}\n" + "".join(
        fragment(epoch, correct, **kwargs) for epoch, correct in enumerate(corrects)
    )


def write_log(folder: Path, model: str, corrects: list[int], suffix: str = "", **kwargs) -> Path:
    path = folder / f"{LOG_STEMS[model]}{suffix}.log"
    path.write_text(log_text(corrects, **kwargs))
    return path


def ending(correct: int, lines: int = 50) -> list[int]:
    """`lines` validations, all unremarkable but the last."""
    return [200] * (lines - 1) + [correct]


def eval_record(epoch: int, correct: int, **more) -> dict:
    return {"event": "eval", "epoch": epoch, "correct": correct, "total": 300, "eval/loss": 0.4} | more


def write_metrics(folder: Path, records: list[dict], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def write_vector(folder: Path, number: int, vector: torch.Tensor | None, mode_id: int | None = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(BASE, folder / "pause_init")
    state = {"base_causallm.weight": torch.zeros(2, 2)}
    state |= {} if vector is None else {"pause_embedding": vector}
    state |= {} if mode_id is None else {"feedback_mode_id": torch.tensor(mode_id)}
    torch.save(state, folder / f"checkpoint_{number}")


def call(capsys, *argv) -> tuple[int, str]:
    code = gates.main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def records(folder: Path) -> list[dict]:
    return json.loads((folder / "gates.json").read_text())["records"]


def write_results(folder: Path, experiment: str, model: str, record: dict) -> None:
    (folder / experiment).mkdir(parents=True, exist_ok=True)
    (folder / experiment / f"{model}_{experiment}.json").write_text(json.dumps(record))


def write_test_accuracy(folder: Path, label: str, correct: int) -> None:
    write_results(folder, "ood", label, {"test": {"correct": correct, "n": 500}})
