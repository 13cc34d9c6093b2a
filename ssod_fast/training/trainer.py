"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ssod_fast.data.batches import LabeledBatch, UnlabeledBatch
from ssod_fast.data.loader import LoaderConfig, TrainLoader
from ssod_fast.methods import SemiSupervisedDetector, StepOutput

from .backward import TrainingDriver, average_gradients, broadcast_weights, make_accelerator, pick_precision, wrap_for_processes
from .banner import banner
from .build import build_method, build_student
from .checkpoint import gather_ranks, rng_state, save_last, set_rng_state
from .config import TrainConfig, resolve, tree_of
from .console import Console, clock, eval_line, live_line, table
from .health import Health
from .metrics import Means, MetricsLog
from .monitor import PseudoMonitor
from .optim import MAX_SKIPPED, BufferGuard, StepGuard, build_optimizer, clip_gradients, set_learning_rate
from .referee import Referee
from .run_folder import RunStart, last_path, open_run, prepare
from .sets import TrainingData, load_sets
from .signals import StopSignal
from .tree import ConfigError

Status = Literal["finished", "already finished", "interrupted", "dry run"]


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why and what is left."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        status: what happened.
        folder: the run folder.
        it: iterations done.
        metrics: the last evaluation by model, as in metrics.jsonl.
        best: best AP by model.
    """

    status: Status
    folder: Path
    it: int
    metrics: dict[str, Any] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains a detector as a config says.

    Args:
        config: the settings; resolved here.
        quiet: print warnings only.

    Raises:
        ConfigError: settings that do not fit together.
        DataError: data that cannot be read.
    """

    def __init__(self, config: TrainConfig[Any], quiet: bool = False) -> None:
        self.config = config = resolve(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device cuda was asked for, but torch sees no GPU: use --device cpu")
        device = "cpu" if config.device == "auto" and not torch.cuda.is_available() else config.device
        precision, self.precision_note = pick_precision(config.precision, torch.device("cpu" if device == "cpu" else "cuda"))
        self.accelerator = make_accelerator(precision, device)
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.console = Console(active=self.rank == 0, quiet=quiet)
        self.it = 0

    def run(self) -> RunResult:
        """Trains to the end, or until a signal; continues where an earlier call of the same settings stopped."""
        config = self.config
        start = RunStart("new", None, []) if config.dry_run else open_run(config)
        for note in start.notes:
            self.console.say(note)
        if start.kind == "finished" and start.state is not None:
            self.console.say(f"{config.folder} is finished ({start.state['it']} iterations): nothing to do; --overwrite starts anew")
            return RunResult("already finished", config.folder, start.state["it"], start.state["metrics"], start.state["best"])
        self._build(start)
        if config.dry_run:
            return self._dry_run()
        with self.console, StopSignal() as stop:
            self._loop(stop)
        return self._close(stop)

    # Construction

    def _build(self, start: RunStart) -> None:
        """Data, networks, optimizer and logs; then the state of the checkpoint."""
        config = self.config
        self.data: TrainingData = load_sets(config)
        self.classes = list(self.data.labeled.classes)
        student = build_student(config, self.classes, self.console.say).to(self.device)
        self.model: SemiSupervisedDetector = build_method(config, student, self.rank).to(self.device)
        self.model.train()
        wrapped = wrap_for_processes(student, self.accelerator)
        broadcast_weights(self.model.trainable, self.processes)
        self.model.run_student = wrapped
        self.driver = TrainingDriver(self.accelerator, wrapped, config.accumulate)
        self.labeled_batch = config.per_batch[0] * config.accumulate * self.processes
        self.lr = config.lr or config.optimizer.learning_rate(self.labeled_batch, config.scale_lr)
        self.optimizer = build_optimizer(self.model.trained, config.optimizer, self.lr)
        self.parameters = [p for module in self.model.trained for p in module.parameters() if p.requires_grad]
        self.guard, self.buffer_guard = StepGuard(self.device), BufferGuard(self.model.trained)
        if self.accelerator.scaler is None:  # else the scaler tells the optimizer
            self.optimizer.found_inf = self.guard.found  # type: ignore[attr-defined]
        self._build_observers()
        torch.manual_seed(config.seed + 1000 * (self.rank + 1))  # ranks draw their own proposals
        if not config.dry_run and self.rank == 0:
            prepare(config, start, self.data.split)
        self.accelerator.wait_for_everyone()
        if start.state is not None:
            self._load(start.state)
        self.log = MetricsLog(config.folder, self.it, active=self.rank == 0 and not config.dry_run)
        self._open_data()
        self._banner(start)

    def _build_observers(self) -> None:
        """Everything that looks at training and does not take part in it."""
        config, data = self.config, self.data
        self.score_thr: float | None = getattr(config.method, "cls_pseudo_thr", None)
        self.means, self.diagnostics = Means(self.device), Means(self.device)
        self.monitor = PseudoMonitor(self.classes, self.score_thr, data.hidden, self.device)
        self.referee = Referee(config, data, self.device, self.rank, self.processes)
        boxes = sum(len(t["labels"]) for t in data.labeled.targets) / len(data.labeled)
        self.health = Health(self.classes, self.score_thr or 0.0, boxes, config.workers, hasattr(config.method, "burn_in"))
        self._seconds = self._data_seconds = self._elapsed = 0.0
        self._skipped_before = 0

    def _open_data(self) -> None:
        config = self.config
        labeled, unlabeled = config.per_batch
        semi = hasattr(config.method, "unlabeled_batch")
        self.loader = TrainLoader(
            self.data.labeled,
            self.data.unlabeled if semi else None,
            LoaderConfig(
                labeled_per_batch=labeled,
                unlabeled_per_batch=unlabeled if semi else 0,
                sampling=config.batch_draw,
                seed=config.seed,
                rank=self.rank,
                world_size=self.processes,
                aspect_groups=config.aspect_groups,
                resample_t=config.resample,
                views=config.views,
                workers=config.workers,
                cache_mb=config.cache_mb,
                pin_memory=self.device.type == "cuda",
            ),
            start_iteration=self.it * config.accumulate,
        )
        self.batches: Iterator[tuple[LabeledBatch, UnlabeledBatch | None]] | None = None

    def _banner(self, start: RunStart) -> None:
        config, data = self.config, self.data
        passes = self.loader.sampler.epochs(config.iters * config.accumulate)
        said = {"precision": f"{self.precision_note} on {self.device}", "evaluation": self.referee.description}
        self.console.say(banner(config, data, it=self.it, processes=self.processes, passes=passes, lr=self.lr, **said))
        for note in data.notes:
            self.console.say(note)
        if start.kind == "new":
            counts = dict(zip(self.classes, data.labeled.class_counts(), strict=True))
            self.log.write(
                "run",
                name=config.run_name,
                method=config.method_name,
                classes=self.classes,
                labeled=len(data.labeled),
                unlabeled=len(data.unlabeled or []),
                split_hash=data.split_hash,
                seed=config.seed,
                config=tree_of(config),
                labeled_counts=counts,
                precision=self.precision_note,
                lr=self.lr,
                score_thr=config.score_thr,
                evaluation=self.referee.description,
            )
            drawn = config.percent is not None
            for message in self.health.start(counts, self.labeled_batch, config.optimizer.reference_batch, self.lr, drawn):
                self._warn(message)

    # The loop

    def _loop(self, stop: StopSignal) -> None:
        config = self.config
        while self.it < config.iters and not stop:
            self._iterate(want_preview=(self.it + 1) % (config.eval_every or 1) == 0 or self.it + 1 == config.iters)
            last = self.it == config.iters
            if self.it % config.log_every == 0 or last:
                self._report_progress()
            if self.it % (config.eval_every or 1) == 0 or last:
                self._evaluate(final=last)
            stop.agree(self.device, self.it)
            if self.it % (config.save_every or 1) == 0 or last or stop:
                self._save()

    def _iterate(self, want_preview: bool) -> StepOutput:
        """One optimizer step."""
        began = time.perf_counter()
        set_learning_rate(self.optimizer, self.config.schedule.factor(self.it, self.config.iters))
        self.buffer_guard.save()
        for micro in range(self.config.accumulate):
            self.driver.last_micro_step = micro + 1 == self.config.accumulate
            output = self._method_step(want_preview and self.driver.last_micro_step)
        self._optimizer_step()
        self.model.update_teacher(self.it)
        self.it += 1
        self._seconds += time.perf_counter() - began
        return output

    def _method_step(self, want_preview: bool) -> StepOutput:
        labeled, unlabeled = self._next_batch()
        with self.accelerator.autocast():
            output = self.model.training_step(
                labeled.to(self.device),
                None if unlabeled is None else unlabeled.to(self.device),
                self.it,
                self.driver,
                want_preview=want_preview,
            )
        self.means.add({"loss": output.loss, **output.losses})
        if output.diagnostics:
            self.diagnostics.add(dict(output.diagnostics))
        self.monitor.add(output.stats)
        if want_preview and self.rank == 0 and not self.config.dry_run:
            self.referee.write_mixed(self.it + 1, output.previews, labeled, self.model.student.pixel_stats)
        return output

    def _next_batch(self) -> tuple[LabeledBatch, UnlabeledBatch | None]:
        began = time.perf_counter()
        if self.batches is None:
            self.batches = iter(self.loader)
        batch = next(self.batches)
        self._data_seconds += time.perf_counter() - began
        return batch

    def _optimizer_step(self) -> None:
        average_gradients(self.model.trainable, self.processes)  # before anyone looks at them: all ranks must come to the same verdict
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        self.buffer_guard.restore_if(self.guard.observe(clip_gradients(self.parameters, self.config.optimizer.clip_norm)))
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    # Logs, evaluation, checkpoints

    def _report_progress(self) -> None:
        """The only place between evaluations that waits for the device."""
        losses, broken = self.means.read()
        total = losses.pop("loss", float("nan"))
        broken.pop("loss", None)
        pseudo = self.monitor.read()
        diagnostics, _ = self.diagnostics.read()
        iterations = self._window()
        split = {"data": self._data_seconds / iterations, "step": (self._seconds - self._data_seconds) / iterations}
        rate = iterations / self._seconds if self._seconds else 0.0
        self._elapsed += self._seconds
        self._seconds = self._data_seconds = 0.0
        lr = self.optimizer.param_groups[-1]["lr"]
        line = {"losses": losses, "lr": lr, "pseudo": pseudo, "time_split": split, "it_per_s": rate}
        line |= {"diagnostics": diagnostics} if diagnostics else {}
        self.log.write("train", it=self.it, time=round(self._elapsed, 3), loss=total, **line)
        self._check_steps(broken)
        for message in self.health.after_log(self.it, line):
            self._warn(message)
        self._write_quality("hidden", self.monitor.read_quality(at_evaluation=False))
        share = split["data"] / max(sum(split.values()), 1e-12)
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        scores = {name: stats["AP"] for name, stats in self.referee.last.items()}
        thr = self.score_thr
        self.console.progress(live_line(self.it, self.config.iters, losses, pseudo, thr, scores, rate, share, memory, diagnostics))

    def _window(self) -> int:
        """Iterations since the last train line."""
        return (self.it - 1) % self.config.log_every + 1

    def _check_steps(self, broken: dict[str, int]) -> None:
        """Reports skipped steps, and gives up when nothing else happens any more."""
        skipped, row = self.guard.read()
        where = f" in {', '.join(broken)}" if broken else ""
        if skipped > self._skipped_before:
            self._warn(
                f"{skipped - self._skipped_before} steps were skipped: gradients were not finite (loss not finite{where or ' nowhere'})"
            )
        self._skipped_before = skipped
        if row >= MAX_SKIPPED:
            last = last_path(self.config.folder)
            left = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"
            raise TrainingFailed(
                f"gradients were not finite for {row} steps in a row (loss not finite{where or ' nowhere'}); {left}; lower --lr"
            )

    def _evaluate(self, final: bool) -> None:
        result = self.referee.evaluate(self.model, self.it, final, self.accelerator.autocast, self.config.method_name)
        self._write_quality("hidden", self.monitor.read_quality(at_evaluation=True))
        if result is not None and self.rank == 0:
            self.log.write("eval", it=self.it, teacher=result.models.get("teacher"), student=result.models.get("student"))
            self._write_quality("val", result.quality)
            self.console.say(eval_line(self.it, result.models, self.referee.best))
            teacher, student = result.models.get("teacher"), result.models["student"]
            for message in self.health.after_eval(teacher, student, self.monitor.read_classes()):
                self._warn(message)
        self.log.write_csv()

    def _write_quality(self, source: str, quality: dict[str, Any] | None) -> None:
        if quality is not None:
            self.log.write("quality", it=self.it, source=source, **quality)

    def _warn(self, message: str) -> None:
        self.console.warn(message)
        self.log.write("event", level="warning", it=self.it, message=message)

    def _save(self) -> None:
        """Writes last.pt: everything that the next iteration depends on."""
        own = {
            "rng": rng_state(),
            "method": self.model.method.state_dict(),
            "means": self.means.state_dict(),
            "diagnostics": self.diagnostics.state_dict(),
            "monitor": self.monitor.state_dict(),
        }
        ranks = gather_ranks(own)
        if self.rank != 0:
            return
        scaler = self.accelerator.scaler
        state = {
            "it": self.it,
            "model": self._networks(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "guard": self.guard.state_dict(),
            "skipped_before": self._skipped_before,
            "health": self.health.state_dict(),
            "seconds": (self._elapsed, self._seconds, self._data_seconds),
            "ranks": ranks,
            "best": self.referee.best,
            "metrics": self.referee.last,
            "classes": self.classes,
            "split": self.data.split_hash,
            "config": tree_of(self.config),
        }
        save_last(last_path(self.config.folder), state)

    def _networks(self) -> dict[str, Any]:
        """Student, teacher and EMA counters, without the method's state: that differs by rank and is saved for each."""
        state = self.model.state_dict()
        state["_extra_state"] = {**state["_extra_state"], "method": None}
        return state

    def _load(self, state: dict[str, Any]) -> None:
        """Restores :meth:`_save`."""
        if state["classes"] != self.classes:
            raise TrainingFailed(f"the checkpoint has the classes {state['classes']}, the labelled set {self.classes}")
        if state.get("split", self.data.split_hash) != self.data.split_hash:
            raise TrainingFailed(
                "the annotation file has changed, and other images are drawn as labelled: "
                f"the checkpoint has the ids {state['split']}, the data now give {self.data.split_hash}"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.guard.load_state_dict(state["guard"])
        self.health.load_state_dict(state["health"])
        self._skipped_before = state["skipped_before"]
        self._elapsed, self._seconds, self._data_seconds = state["seconds"]
        self.referee.best, self.referee.last = dict(state["best"]), dict(state["metrics"])
        self.it = state["it"]
        own = state["ranks"][self.rank % len(state["ranks"])]
        if len(state["ranks"]) != self.processes:
            self.console.warn(
                f"the run was saved by {len(state['ranks'])} processes and continues with {self.processes}: not exactly the same run"
            )
        state["model"]["_extra_state"]["method"] = own["method"]
        self.model.load_state_dict(state["model"])
        self.means.load_state_dict(own["means"])
        self.diagnostics.load_state_dict(own.get("diagnostics", {"sums": []}))
        self.monitor.load_state_dict(own["monitor"])
        set_rng_state(own["rng"])

    # Ends

    def _close(self, stop: StopSignal) -> RunResult:
        config = self.config
        result = RunResult(
            "interrupted" if self.it < config.iters else "finished", config.folder, self.it, self.referee.last, self.referee.best
        )
        if result.status == "interrupted":
            self.console.say(f"stopped after iteration {self.it} and saved; the same command continues")
            return result
        for where, loader in (("training", self.loader), ("evaluation", self.referee.loader)):
            for reason, count in (loader.report.dropped if loader is not None else {}).items():
                self._warn(f"{where}: {count} {reason}")
        self.log.write(
            "summary", it=self.it, seconds=round(self._elapsed, 1), best=result.best, metrics=result.metrics, skipped=self._skipped_before
        )
        if self.rank == 0 and config.report:
            self._write_report()
        self.console.say(f"finished in {clock(self._elapsed)}: {config.folder}")
        return result

    def _write_report(self) -> None:
        """A report that cannot be written is no reason to lose a run."""
        try:
            from ssod_fast.report import build_report

            self.console.say(f"report: {build_report([self.config.folder], None)}")
        except ImportError as error:
            self.console.warn(f"no report: {error}")
        except Exception as error:
            self.console.warn(f"no report: {type(error).__name__}: {error}")

    def _dry_run(self) -> RunResult:
        """Two steps: the first pays for start-up, the second is timed."""
        self._iterate(want_preview=False)
        before = self._seconds
        self._iterate(want_preview=False)
        seconds = self._seconds - before
        losses, _ = self.means.read()
        memory = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0
        rows = [
            ("loss", f"{losses.get('loss', float('nan')):.4g}"),
            ("step", f"{seconds:.3g} s"),
            ("memory", f"{memory:.2f} GiB on the GPU" if memory else None),
            ("estimated", f"{clock(seconds * self.config.iters)} without evaluations (the first steps may be faster than later ones)"),
        ]
        self.console.say("dry run, nothing was written\n" + table(rows))
        return RunResult("dry run", self.config.folder, 0)


def train(config: TrainConfig[Any], quiet: bool = False) -> RunResult:
    """Trains as the config says; see :class:`Trainer`."""
    return Trainer(config, quiet).run()
