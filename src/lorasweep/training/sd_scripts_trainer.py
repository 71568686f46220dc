"""kohya's sd-scripts as trainer: one run after the other, each in a process of sd-scripts.

An epoch of sd-scripts is over once its TensorBoard log says so and goes on: by then the epoch's
files, which it writes in place, are whole. It waits while the checkpoint is scored. What it can't
go on from is trained again: it saves states at the ends of epochs alone.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorasweep import __version__
from lorasweep.adapters.kohya_names import adapted_parts
from lorasweep.adapters.pack import Pack
from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.progress import Bar, Show
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.settings import SettingsError
from lorasweep.core.text import listed
from lorasweep.lora_files import checkpoint
from lorasweep.lora_files.checkpoint import Checkpoint
from lorasweep.models.base_model import BaseModel, torch_dtype
from lorasweep.training import saved_states, sd_scripts_checkout, sd_scripts_config
from lorasweep.training.network_weights import first_adapters, is_kohyas
from lorasweep.training.saved_states import SavedState
from lorasweep.training.sd_scripts_config import Start
from lorasweep.training.sd_scripts_process import SdScriptsProcess
from lorasweep.training.tensorboard_log import Scalar, TensorBoardLog
from lorasweep.training.training_batches import steps_per_epoch
from lorasweep.training.training_run import (
    OnStep,
    SdScriptsTrainer,
    Stopped,
    TrainedEpoch,
    TrainerError,
    TrainingData,
    TrainingRun,
)
from lorasweep.training.training_state import Snapshot

log = logging.getLogger(__name__)

FOLDER = "sd_scripts"
"""Of the run's folder: what sd-scripts writes; beside it are sd_scripts.toml and sd_scripts.log."""
_POLL_SECONDS = 0.1
_GROUP = re.compile(r"lr/(d\*lr/)?group\d+")
_FINDS_RATES = re.compile("prodigy|dadapt", re.IGNORECASE)


def files_of(output_dir: Path) -> dict[Path, str | None]:
    """What sd-scripts was told in a run's folder, what it printed and drew; its place in MLflow."""
    said = [output_dir / f"{FOLDER}.toml", output_dir / f"{FOLDER}.log"]
    drawn = sorted((output_dir / FOLDER / "sample").glob("*.png"))
    return {
        **{path: None for path in said if path.is_file()},
        **dict.fromkeys(drawn, f"{FOLDER}_samples"),
    }


class SdScriptsTraining:
    """A training under way, with the interface of `NativeTraining`."""

    def __init__(
        self,
        settings: SdScriptsTrainer,
        base: BaseModel,
        runs: Sequence[TrainingRun],
        data: TrainingData,
        show: Show | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        sd_scripts_checkout.check_folder(settings)
        sd_scripts_config.check_base(base, settings.path)
        self._on_step = on_step or (lambda _run, _step, _values: None)
        self.settings, self.base, self.data = settings, base, data
        self.max_runs = SdScriptsTrainer.max_runs
        """Runs that train at once."""
        self.steps_per_epoch = steps_per_epoch(
            data.items, settings.batch_size, settings.gradient_accumulation_steps
        )
        """Optimizer steps of an epoch."""
        self._there = sd_scripts_checkout.ask(settings)
        self._members: dict[str, _Member] = {}
        self._bar = Bar(show)
        self._stopping = False
        for run in runs:
            self.join(run)

    def __iter__(self) -> Iterator[TrainedEpoch]:
        """Train, yielding each epoch once its checkpoint and its state are there."""
        while self._members:
            member = next(iter(self._members.values()))
            try:
                yield from self._epochs(member)
            except TrainerError as error:
                yield TrainedEpoch(checkpoints=[], failures={member.run.name: str(error)})
            self._members.pop(member.run.name, None)
            _delete_leftovers(member.folder)

    def join(self, run: TrainingRun, saved: SavedState | None = None) -> None:
        """Let `run` train once those before it have ended; with a saved state, from there on.

        Raises ValueError where it can't be trained on this base; the others go on.
        """
        sd_scripts_config.check(self.settings, run, self.base.settings, self.data.settings)
        run.check_schedule(self.base.noise_schedule)
        self._check_weights(run)
        if lacking := sd_scripts_checkout.missing(self.settings, run, self._there):
            raise SettingsError(
                f"trainer.python={sd_scripts_checkout.interpreter(self.settings)} lacks"
                f" {', '.join(lacking)}; install sd-scripts' requirements there, or give another"
                " trainer.python"
            )
        self._check_captions()
        adapters = Pack.new(
            self.base.parts,
            [(run.adapter, run.seed, run.optimizer.trained_parts)],
            [run.optimizer.trains],
        )
        numbers = sum(view.numel() for views in adapters.views(0).values() for view in views)
        total = run.num_steps(self.steps_per_epoch)
        member = _Member(run, numbers, _modules(adapters), total, rates=_first_rates(run, total))
        if saved is not None:
            member.rates = dict(saved.snapshot.lr_scheduler)
            member.started = saved.started
            member.num_epochs = saved.snapshot.num_epochs
            member.num_steps = saved.snapshot.num_steps
            if not member.state(member.num_epochs).is_dir():
                raise SettingsError(
                    f"{member.state(member.num_epochs)} is gone, from which {run.name} would go"
                    f" on; delete {run.output_dir} to train anew"
                )
        self._members[run.name] = member

    def drop(self, run: str) -> None:
        """Stop training `run`, its process too; the others go on. Its checkpoints stand."""
        member = self._members.pop(run, None)
        if member is not None:
            if member.process is not None:
                member.process.end()
            _delete_leftovers(member.folder)

    def stop(self) -> None:
        """End the process at once and raise Stopped: the state is that of the last epoch.

        May be called from a signal's handler.
        """
        self._stopping = True

    def disk_needs(self, run: str) -> int:
        """About the bytes that a run's checkpoints to come and its states will take."""
        member = self._members.get(run)
        if member is None:
            return 0
        epochs = member.run.num_epochs(self.steps_per_epoch) - member.num_epochs
        bytes_each = torch_dtype(self.settings.save_dtype).itemsize
        states = (self.settings.keep_states + 1) * 3 * 4 if self.settings.keep_states else 0
        return member.numbers * (epochs * bytes_each + states)

    def _check_weights(self, run: TrainingRun) -> None:
        """Files that it begins with are such as ours would begin with, under kohya's names."""
        merged = [file for file, _ in self.base.settings.merged_weights]
        start = [] if run.network_weights is None else [Path(run.network_weights).expanduser()]
        for file in (*merged, *start):
            if not is_kohyas(file):
                raise SettingsError(
                    f"{file} has names that sd-scripts doesn't read; `lorasweep export {file} --to"
                    " kohya` makes a file that it does"
                )
        if start:
            first_adapters(self.base, run)

    def _check_captions(self) -> None:
        for item in self.data.items:
            caption = item.path.with_suffix(self.data.settings.caption_extension)
            if caption.is_file() and caption.stat().st_size == 0:
                raise SettingsError(
                    f"{caption} is empty: trainer=sd_scripts refuses a file of zero bytes; put a"
                    " line end into it"
                )

    def _epochs(self, member: _Member) -> Iterator[TrainedEpoch]:
        run = member.run
        num_epochs = run.num_epochs(self.steps_per_epoch)
        start = self._start(member)
        toml = self._write_files(member, start)
        curves = TensorBoardLog(start.logging_dir)
        with SdScriptsProcess(self.settings, self.base.device, toml, member.log_file) as process:
            member.process = process
            while member.num_epochs < num_epochs:
                number = member.num_epochs + 1
                self._bar.epoch(number, num_epochs, self.steps_per_epoch, steps_done=0)
                self._wait_for_epoch(member, curves, is_last=number == num_epochs)
                process.pause()
                yield TrainedEpoch(checkpoints=[self._pick_up(member, start)])
                if run.name not in self._members:
                    return
                process.go_on()

    def _start(self, member: _Member) -> Start:
        is_cut = member.total_steps % self.steps_per_epoch > 0
        epochs = member.num_epochs
        return Start(
            output_dir=member.folder,
            logging_dir=member.folder / "logs" / f"from-epoch-{epochs + 1:06d}",
            num_steps=member.total_steps,
            # gone on with, it counts steps from 0 and would not end within an epoch
            save_state=self.settings.keep_states > 0 and not is_cut,
            epochs_behind=epochs,
            resume=member.state(epochs) if epochs else None,
        )

    def _write_files(self, member: _Member, start: Start) -> Path:
        """The TOML and what it names; what an earlier process left unfinished is deleted."""
        run, folder = member.run, member.folder
        _delete_leftovers(folder, but=start.resume)
        if start.resume is None:
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(start.logging_dir, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        if (datasets := sd_scripts_config.dataset_config(self.data)) is not None:
            write_atomically(folder / sd_scripts_config.DATASET, datasets.encode())
        if self.settings.sample_every_n_epochs:
            prompts = sd_scripts_config.sample_prompts(self.settings, self.data.settings.size)
            write_atomically(folder / sd_scripts_config.PROMPTS, prompts.encode())
        sections = sd_scripts_config.kohya_settings(self.settings, run, self.base, self.data, start)
        path = run.output_dir / f"{FOLDER}.toml"
        version = sd_scripts_checkout.commit(self.settings) or "an unknown commit"
        comment = f"{run.name}, by lorasweep {__version__} for sd-scripts {version}"
        write_atomically(path, sd_scripts_config.text_of(sections, comment))
        return path

    def _wait_for_epoch(self, member: _Member, curves: TensorBoardLog, *, is_last: bool) -> None:
        """Take in what the process logs until an epoch is over and its files are whole."""
        process, epoch = member.process, _Epoch()
        assert process is not None
        while True:
            if self._stopping:
                raise Stopped("stopped within an epoch, which is trained again")
            code = process.exit_code  # asked first: what it wrote before its end is read below
            member.unread.extend(curves.read())
            while member.unread and not epoch.is_over:
                self._take(member, epoch, member.unread.popleft())
            # what it logs after an epoch's end comes after the epoch's files
            if epoch.is_over and (code == 0 if is_last else member.unread):
                member.end_epoch(epoch)
                return
            if code is not None:
                raise TrainerError(self._why(member, process))
            time.sleep(_POLL_SECONDS)

    def _take(self, member: _Member, epoch: _Epoch, scalar: Scalar) -> None:
        """Take in one value of its log; the first of a step's brings the step."""
        if scalar.tag == "loss/epoch_average":
            epoch.is_over = True
            self._check_length(member, len(epoch.records))
        elif scalar.tag.startswith("lr/") and not _GROUP.fullmatch(scalar.tag):
            part = (
                scalar.tag.rpartition("/")[2]
                .replace("textencoder", "text_encoder")
                .replace(" ", "_")
            )
            member.rates[f"train/lr_{part}"] = scalar.value
        elif scalar.tag == "loss/current":
            epoch.losses.append(scalar.value)
            if scalar.step <= member.steps_seen:  # a batch whose gradients are added to the next
                return
            member.steps_seen, member.num_steps = scalar.step, member.num_steps + 1
            loss = sum(epoch.losses) / len(epoch.losses)
            # sd-scripts logs with a step the rates of the next one
            record = {"train/loss": loss, **member.rates}
            epoch.losses = []
            epoch.records.append((member.num_steps, record))
            self._on_step(member.run.name, member.num_steps, record)
            self._bar.step([loss])
            if not math.isfinite(loss):
                raise TrainerError(
                    f"{member.run.name}: loss {loss:g} in epoch {member.num_epochs + 1}, step"
                    f" {member.num_steps}; the checkpoints of the epochs before it stand. Try a"
                    " lower learning rate, or precision bf16 or fp32"
                )

    def _check_length(self, member: _Member, found: int) -> None:
        """Did sd-scripts read the folders as we do?"""
        begun = member.num_epochs * self.steps_per_epoch
        expected = min(self.steps_per_epoch, member.total_steps - begun)
        if found != expected:
            raise TrainerError(
                f"{member.run.name}: sd-scripts made {found} steps of epoch"
                f" {member.num_epochs + 1}, and its folders hold {expected}; see"
                f" {member.log_file}"
            )

    def _why(self, member: _Member, process: SdScriptsProcess) -> str:
        """Why a run fails whose process has ended too early."""
        name, epoch = member.run.name, member.num_epochs + 1
        said = f"{process.last_words()} (all of it in {member.log_file})"
        if process.ran_out_of_memory:
            return (
                f"{name}: out of memory in epoch {epoch}; try trainer.batch_size below"
                f" {self.settings.batch_size}, trainer.gradient_checkpointing=true,"
                f" trainer.precision=bf16 or a smaller dataset.resolution. sd-scripts ended with"
                f" {said}"
            )
        return f"{name}: sd-scripts ended in epoch {epoch} with {said}"

    def _pick_up(self, member: _Member, start: Start) -> Checkpoint:
        """Give an epoch's file our name and put what sd-scripts can't know into it; its state."""
        run, epoch = member.run, member.num_epochs
        is_last = member.num_steps == member.total_steps
        theirs = member.folder / f"{run.name}{'' if is_last else f'-{epoch:06d}'}.safetensors"
        path = checkpoint.checkpoint_path(run.output_dir, run.name, epoch)
        try:
            tensors, metadata = checkpoint.read(theirs)
        except CheckpointError as error:
            raise TrainerError(
                f"{run.name}: sd-scripts' checkpoint of epoch {epoch}: {error}"
            ) from None
        if epoch == 1:
            self._compare_modules(member, frozenset(name.partition(".")[0] for name in tensors))
        # of a run that goes on it counts the steps since
        ours = {"ss_steps": str(member.num_steps), "lorasweep_version": __version__}
        checkpoint.write(path, tensors, {**metadata, **ours})
        theirs.unlink()
        if start.save_state or is_last:
            self._note_state(member, epoch)
        return Checkpoint(path=path, run=run.name, epoch=epoch, step=member.num_steps)

    def _compare_modules(self, member: _Member, found: frozenset[str]) -> None:
        """Warn where its networks adapt other modules: LyCORIS's presets differ by version."""
        for what, names in (("also", found - member.modules), ("not", member.modules - found)):
            if names:
                log.warning(
                    "%s: sd-scripts does %s adapt %s, other than adapter.targets=%s says here",
                    *(member.run.name, what, listed(sorted(names)), member.run.adapter.targets),
                )

    def _note_state(self, member: _Member, epoch: int) -> None:
        """Note that sd-scripts' state of an epoch is whole, and delete older ones."""
        run, number = member.run, self.settings.keep_states
        if number == 0:
            return
        snapshot = Snapshot(
            parameters=[],
            optimizer={},
            lr_scheduler=dict(member.rates),
            scaler={},
            num_epochs=epoch,
            num_batches=0,
            num_steps=member.num_steps,
            num_micro_steps=0,
            records=tuple(member.records),
        )
        pack = ((run.name, epoch, member.num_steps),)
        saved_states.write(
            run.output_dir,
            SavedState(run=run.name, pack=pack, started=member.started, snapshot=snapshot),
        )
        saved_states.keep_last(run.output_dir, number)
        if epoch > number:
            shutil.rmtree(member.state(epoch - number), ignore_errors=True)


@dataclass
class _Epoch:
    """What is known of the epoch under way."""

    losses: list[float] = field(default_factory=list)
    """Of the batches of the step under way."""
    records: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    is_over: bool = False


@dataclass
class _Member:
    """A run that trains or waits to."""

    run: TrainingRun
    numbers: int
    """Trained ones."""
    modules: frozenset[str]
    """The adapted ones, by their names in LoRA files."""
    total_steps: int
    num_epochs: int = 0
    """Finished ones."""
    num_steps: int = 0
    started: float = field(default_factory=time.time)
    process: SdScriptsProcess | None = None
    unread: deque[Scalar] = field(default_factory=deque)
    steps_seen: int = 0
    """As sd-scripts counts them, from 0 in each process."""
    rates: dict[str, float] = field(default_factory=dict)
    """Of the next step, as they are logged."""
    records: Sequence[tuple[int, Mapping[str, float]]] = ()
    """Of the last finished epoch."""

    @property
    def folder(self) -> Path:
        """What sd-scripts writes to."""
        return self.run.output_dir / FOLDER

    @property
    def log_file(self) -> Path:
        """What it prints."""
        return self.run.output_dir / f"{FOLDER}.log"

    def state(self, epoch: int) -> Path:
        """sd-scripts' folder of its state after an epoch."""
        return self.folder / f"{self.run.name}-{epoch:06d}-state"

    def end_epoch(self, epoch: _Epoch) -> None:
        """An epoch is over, with its files."""
        self.num_epochs += 1
        self.records = epoch.records


def _first_rates(run: TrainingRun, num_steps: int) -> dict[str, float]:
    """Those of the first step, which sd-scripts doesn't log; none where the optimiser finds them.

    Its own is made elsewhere, and may not be installed here: any has the schedule's rates.
    """
    import torch

    optimizer = run.optimizer
    if run.lr_scheduler.type == "adafactor" or _FINDS_RATES.search(optimizer.type):
        return {}
    rates = {part: optimizer.part_rates[part] for part in ("unet", "text_encoder")}
    trained = adapted_parts(run.adapter.targets) & optimizer.trained_parts
    rates |= {f"{part}_plus": rates[part] * ratio for part, ratio in optimizer.plus_ratios.items()}
    parts = [name for name in rates if name.removesuffix("_plus") in trained]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rates[part]} for part in parts]
    any_kind = torch.optim.SGD(groups, lr=optimizer.main_rate)
    run.lr_scheduler.create(any_kind, num_steps)
    first = zip(parts, any_kind.param_groups, strict=True)
    return {f"train/lr_{part}": float(group["lr"]) for part, group in first}


def _modules(adapters: Pack) -> frozenset[str]:
    return frozenset(name.partition(".")[0] for name in adapters.file_tensors(0))


def _delete_leftovers(folder: Path, but: Path | None = None) -> None:
    """States that nothing goes on from, and files of epochs that weren't picked up."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for path in folder.glob("*-state"):
        if path != but:
            shutil.rmtree(path, ignore_errors=True)
