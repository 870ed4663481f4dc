"""MemoryMonitor and TokenThroughput in a plain Trainer, on a model whose bytes and tokens can be counted by hand."""

import mmap
import time

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader

from lq_plugin import MemoryMonitor, TokenThroughput
from lq_plugin.callbacks.memory_monitor import device_bytes, static_bytes, tensors_in
from lq_plugin.callbacks.model_flops import kaplan_flops_per_token, utilisation
from lq_plugin.callbacks.peak_flops import bf16_peak
from lq_plugin.callbacks.token_throughput import count_tokens

CPU = torch.device("cpu")
BATCH, LENGTH = 4, 10
STEP_SECONDS = 0.02


class Recorder(Logger):
    """Keeps what is logged, with its step."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, metrics))

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def of(self, prefix: str) -> dict[int, dict[str, float]]:
        return {step: metrics for step, metrics in self.logged if any(name.startswith(prefix) for name in metrics)}


class Counted(LightningModule):
    """An embedding of 7 x 8 and a linear of 8 -> 7 with bias; a step takes STEP_SECONDS, validation ten times that."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.linear = nn.Linear(8, 7)

    def training_step(self, batch, batch_idx):
        time.sleep(STEP_SECONDS)
        return self.linear(self.embedding(batch["input_ids"])).square().mean()

    def validation_step(self, batch, batch_idx):
        time.sleep(10 * STEP_SECONDS)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        return DataLoader([{"input_ids": torch.zeros(LENGTH, dtype=torch.long)}] * (BATCH * 100), batch_size=BATCH)

    def val_dataloader(self):
        return self.train_dataloader()


EMBEDDING, LINEAR = 7 * 8, 8 * 7 + 7
FLOAT = 4  # bytes


def fit(tmp_path, *callbacks, module=None, loggers=1, **options) -> list[Recorder]:
    recorders = [Recorder() for _ in range(loggers)]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"max_steps": 6, "log_every_n_steps": 2, "accelerator": "cpu", "num_sanity_val_steps": 0}
    settings = {**quiet, **defaults, "default_root_dir": tmp_path, "limit_val_batches": 0, **options}
    Trainer(callbacks=list(callbacks), logger=recorders, **settings).fit(module or Counted())
    return recorders


def test_weights_gradients_and_optimizer_state_are_counted_to_the_byte(tmp_path):
    (recorder,) = fit(tmp_path, MemoryMonitor())
    megabytes = (EMBEDDING + LINEAR) * FLOAT / 1e6
    steps_of_adam = 3 * FLOAT / 1e6  # one float32 for each of three parameters
    assert list(recorder.of("memory")) == [1, 3, 5]
    for metrics in recorder.of("memory").values():
        assert metrics["memory/weights_mb"] == pytest.approx(megabytes)
        assert metrics["memory/gradients_mb"] == pytest.approx(megabytes)
        assert metrics["memory/optimizer_state_mb"] == pytest.approx(2 * megabytes + steps_of_adam)


def test_the_rest_is_what_the_peak_has_beyond_them(tmp_path):
    (recorder,) = fit(tmp_path, MemoryMonitor(every_n_steps=3))
    (metrics, _) = recorder.of("memory").values()
    parts = sum(metrics[f"memory/{name}_mb"] for name in ("weights", "gradients", "optimizer_state", "rest"))
    assert parts == pytest.approx(metrics["memory/peak_mb"], rel=1e-5)
    assert metrics["memory/peak_mb"] >= metrics["memory/current_mb"] > 50


def test_a_storage_is_counted_once_whoever_shows_it():
    linear, tied = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    tied.weight = nn.Parameter(linear.weight.detach().view(8, 8))
    assert static_bytes(nn.Sequential(linear, tied), [], CPU)["weights"] == 8 * 8 * FLOAT
    whole = torch.zeros(100)
    linear.weight.grad = whole[:64].view(8, 8)
    assert static_bytes(linear, [], CPU)["gradients"] == 100 * FLOAT, "a view keeps all of its storage"


def test_tensors_are_found_inside_lists_dicts_and_none():
    a, b = torch.zeros(1), torch.ones(2)
    assert [*map(len, tensors_in({"x": [a, None], "y": {"z": (b,)}, "n": 3}))] == [1, 2]


def test_the_memory_of_the_process_grows_with_what_it_holds():
    before = device_bytes(CPU)["current"]
    held = mmap.mmap(-1, 50_000_000)  # malloc would give out memory that earlier tests left
    held.write(b"1" * len(held))
    assert device_bytes(CPU)["current"] - before == pytest.approx(len(held), rel=0.2)


def test_tokens_and_samples_per_second_follow_from_the_time_of_a_step(tmp_path):
    (recorder,) = fit(tmp_path, TokenThroughput())
    assert list(recorder.of("throughput")) == [1, 3, 5]
    for metrics in recorder.of("throughput").values():
        seconds = metrics["throughput/step_seconds"]
        assert STEP_SECONDS <= seconds < 10 * STEP_SECONDS
        assert metrics["throughput/tokens_per_second"] == pytest.approx(BATCH * LENGTH / seconds)
        assert metrics["throughput/samples_per_second"] == pytest.approx(BATCH / seconds)


def test_validation_is_not_training_time(tmp_path):
    (recorder,) = fit(tmp_path, TokenThroughput(), limit_val_batches=1, val_check_interval=1)
    seconds = [metrics["throughput/step_seconds"] for metrics in recorder.of("throughput").values()]
    assert max(seconds) < 5 * STEP_SECONDS


def test_accumulated_batches_make_one_step(tmp_path):
    (recorder,) = fit(tmp_path, TokenThroughput(), MemoryMonitor(), accumulate_grad_batches=3, max_steps=4)
    assert list(recorder.of("memory")) == [1, 3]
    last = recorder.of("throughput")[3]
    assert last["throughput/step_seconds"] >= 3 * STEP_SECONDS
    tokens = 3 * BATCH * LENGTH
    assert last["throughput/tokens_per_second"] == pytest.approx(tokens / last["throughput/step_seconds"])


def test_every_logger_gets_each_metric_once(tmp_path):
    recorders = fit(tmp_path, MemoryMonitor(), TokenThroughput(), loggers=2)
    for recorder in recorders:
        names = [(step, name) for step, metrics in recorder.logged for name in metrics if "/" in name]
        assert len(names) == len(set(names))
        assert not any(name in ("tokens/s", "peak MB") for _, name in names), "those are for the progress bar"
    assert recorders[0].of("memory") == recorders[1].of("memory")


def test_the_progress_bar_shows_speed_and_memory(tmp_path):
    shown = {}

    class Look(MemoryMonitor):
        def on_train_end(self, trainer, pl_module):
            shown.update(trainer.progress_bar_metrics)

    fit(tmp_path, Look(), TokenThroughput())
    assert shown["tokens/s"] > 0
    assert shown["peak MB"] > 0


def test_no_utilisation_is_logged_for_a_cpu_and_the_reason_is_given_once(tmp_path, caplog):
    monitor = TokenThroughput()
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        for _ in range(2):
            (recorder,) = fit(tmp_path, monitor)
    assert not any("mfu" in name for _, metrics in recorder.logged for name in metrics)
    assert [message for message in caplog.messages if "no MFU" in message] == [
        "TokenThroughput: no MFU: the dense bf16 peak of 'cpu' is not in lq_plugin.callbacks.peak_flops"
    ]


def test_utilisation_is_the_share_of_the_named_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    used = utilisation(Counted(), flops_per_token=989.4e6, device=torch.device("cuda"))
    assert used.share(tokens_per_second=1e5) == pytest.approx(0.1)
    assert "989.4 TFLOP/s" in used.note
    assert "NVIDIA H200" in used.note


def test_flops_are_six_per_trained_and_four_per_frozen_parameter_outside_of_embeddings():
    module = Counted()
    assert kaplan_flops_per_token(module) == 6 * LINEAR
    module.linear.requires_grad_(False)
    assert kaplan_flops_per_token(module) == 4 * LINEAR
    module.codes = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    assert kaplan_flops_per_token(module) is None


@pytest.mark.parametrize(
    ("device", "teraflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA A10G", None),
        ("cpu", None),
    ],
)
def test_peaks_are_found_by_whole_words(device, teraflops):
    assert bf16_peak(device) == (None if teraflops is None else teraflops * 1e12)


def test_tokens_are_input_ids_or_the_first_integers():
    ids, floats = torch.zeros(2, 3, dtype=torch.long), torch.zeros(9, 9)
    assert count_tokens({"mask": torch.zeros(5, dtype=torch.bool), "input_ids": ids}) == 6
    assert count_tokens((floats, ids)) == 6
    with pytest.raises(ValueError, match="Pass tokens_fn"):
        count_tokens((floats,))


def test_an_interval_below_one_is_refused():
    with pytest.raises(ValueError, match="every_n_steps must be at least 1"):
        MemoryMonitor(every_n_steps=0)
