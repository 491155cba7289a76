"""Checkpoints and progress: a run killed anywhere goes on as if never killed, and what cannot go on says why."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import accelerate.utils.other
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dq_hf.training.checkpoints import (
    CheckpointError,
    check_writable,
    list_checkpoints,
    resume,
    save_checkpoint,
    writing,
)
from dq_hf.training.progress import FiniteCheck, Progress, RunLog, StopSignal, batches, ignore_sigterm, progress_bar

# Processes of their own: a server imports the libraries once, and each run is a fork of it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["datasets", "dq_hf.training.progress", "pytest"])
FINAL = "checkpoint-12"


@pytest.fixture(autouse=True)
def no_accelerator_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# Runs


def make_accelerator():
    return Accelerator(
        cpu=True,
        gradient_accumulation_steps=2,
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
    )


def prepare_run(accelerator, hidden_size=8):
    """Model, optimizer, scheduler, loader of five batches an epoch and progress, as a training script has them."""
    images = torch.arange(18.0 * accelerator.num_processes)
    loader = DataLoader(TensorDataset(images), batch_size=4, shuffle=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(1, hidden_size), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(hidden_size)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    progress = Progress()
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(progress, scheduler)
    set_seed(1, device_specific=True)
    return model, optimizer, scheduler, loader, progress


def train(run_dir, die=None, stop_at=None):
    """Twelve steps, a checkpoint at every second one; `die` kills the process, `stop_at` is a step with a SIGTERM."""
    torch.set_num_threads(1)
    accelerator = make_accelerator()
    model, optimizer, scheduler, loader, progress = prepare_run(accelerator)
    check_writable(run_dir)
    with StopSignal() as stop:
        resume(accelerator, run_dir)
        log = RunLog(run_dir / "log.jsonl", progress.step) if accelerator.is_main_process else None
        finite = FiniteCheck(progress.step)
        deaths = Deaths(die)
        for (images,) in batches(loader, progress, accelerator):
            if progress.step == 12:
                break
            with accelerator.accumulate(model):
                noise = random.random() + np.random.rand()  # with the dropout: all three random states matter
                loss = (model(images[:, None]) - noise).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            finite.add(loss=loss)
            if not accelerator.sync_gradients:
                continue
            scheduler.step()
            progress.step += 1
            deaths.at("step")
            finite.raise_if_bad(progress.step, run_dir)
            if accelerator.is_main_process:
                log.write(progress.step, {"loss": loss.item(), "images": progress.images})
            if progress.step == stop_at and accelerator.process_index == accelerator.num_processes - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            (stopping,) = stop.ask(accelerator)
            if progress.step % 2 == 0 or stopping:
                save_checkpoint(accelerator, run_dir, progress.step)
            if stopping:
                break
    (Path(run_dir).parent / "counts.json").write_text(json.dumps(deaths.counts))


class Deaths:
    """Counts steps, calls that change the file system, and files of checkpoints; kills the process at one of them.

    Args:
        die: (kind, number), kind "step", "call" or "file", of which only half is written.
    """

    def __init__(self, die):
        self.die = die
        self.counts = dict.fromkeys(("step", "call", "file"), 0)
        sys.addaudithook(self.audit)
        torch.save = self.half_written(torch.save)
        accelerate.utils.other.safe_save_file = self.half_written(accelerate.utils.other.safe_save_file)

    def at(self, kind):
        self.counts[kind] += 1
        if self.die == (kind, self.counts[kind]):
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            self.at("call")

    def half_written(self, save):
        def save_or_die(state, path, **options):
            save(state, path, **options)
            if self.die == ("file", self.counts["file"] + 1):
                os.truncate(path, os.path.getsize(path) // 2)
            self.at("file")

        return save_or_die


def spawn(target, *arguments, processes=1):
    """Exit codes of processes that do `target(*arguments)`, and the messages of their errors."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    queue = FORKS.SimpleQueue()
    started = []
    for rank in range(processes):
        started.append(FORKS.Process(target=run_target, args=(queue, rank, processes, port, target, arguments)))
        started[-1].start()
    for process in started:
        process.join(60)
        process.kill()
    messages = []
    while not queue.empty():
        messages.append(queue.get())
    return [process.exitcode for process in started], messages


def run_target(queue, rank, processes, port, target, arguments):
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "localhost", "ACCELERATE_USE_CPU": "true"}
    try:
        target(*arguments)
    except RuntimeError as error:
        queue.put(str(error))
        sys.exit(1)


def contents(folder):
    """Every file under a folder, by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def end_of(run_dir):
    """What a run left in the end: its last two checkpoints and its log."""
    return [contents(folder) for folder in list_checkpoints(run_dir)[-2:]], (run_dir / "log.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run that was never killed, and how often it could have been, by kind."""
    place = tmp_path_factory.mktemp("whole")
    assert spawn(train, place / "run") == ([0], [])
    return place / "run", json.loads((place / "counts.json").read_text())


def test_a_run_leaves_its_newest_checkpoints_and_its_log(whole_run):
    run_dir, counts = whole_run
    assert sorted(path.name for path in run_dir.iterdir()) == ["checkpoint-10", FINAL, "log.jsonl"]
    rows = RunLog(run_dir / "log.jsonl").read()
    assert [row["step"] for row in rows] == list(range(1, 13))
    # Batches of 4, 4, 4, 4 and 2 images: three steps an epoch, of 8, 8 and 2 images.
    assert [row["images"] for row in rows[:4]] == [8, 16, 18, 26]
    assert counts["step"] == 12 and counts["file"] == 6 * 5 and counts["call"] > 60


KILLS = [("step", step) for step in (1, 2, 3, 8, 12)]
KILLS += [("file", number) for number in (1, 7, 18, 30)]
KILLS += [("call", share) for share in (0.02, 0.13, 0.31, 0.57, 0.68, 0.79, 0.88, 0.93, 1.0)]


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: f"{kill[0]}-{kill[1]}")
def test_a_killed_run_goes_on_as_if_never_killed(whole_run, tmp_path, kill):
    run_dir, counts = whole_run
    kind, number = kill
    if kind == "call":
        number = max(1, round(number * counts["call"]))
    assert spawn(train, tmp_path / "run", (kind, number)) == ([-signal.SIGKILL], [])
    assert spawn(train, tmp_path / "run") == ([0], [])
    assert end_of(tmp_path / "run") == end_of(run_dir)


def test_a_run_may_be_killed_again_and_again(whole_run, tmp_path):
    kills = [("call", 10), ("file", 4), ("step", 4), ("file", 9), ("call", 70)]
    for kill in kills:
        assert spawn(train, tmp_path / "run", kill) == ([-signal.SIGKILL], [])
    assert spawn(train, tmp_path / "run") == ([0], [])
    assert end_of(tmp_path / "run") == end_of(whole_run[0])


@pytest.mark.parametrize("stop_at", [1, 6, 9])
def test_sigterm_saves_and_ends_well(whole_run, tmp_path, stop_at):
    assert spawn(train, tmp_path / "run", None, stop_at) == ([0], [])
    assert list_checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{stop_at}"
    assert spawn(train, tmp_path / "run") == ([0], [])
    assert end_of(tmp_path / "run") == end_of(whole_run[0])


# Two processes


@pytest.fixture(scope="module")
def whole_pair(tmp_path_factory):
    """A run of two processes that was never stopped."""
    run_dir = tmp_path_factory.mktemp("pair") / "run"
    assert spawn(train, run_dir, processes=2) == ([0, 0], [])
    return run_dir


def test_sigterm_to_one_of_two_processes_stops_both_at_one_step(whole_pair, tmp_path):
    assert spawn(train, tmp_path / "run", None, 7, processes=2) == ([0, 0], [])
    assert list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-7"
    assert spawn(train, tmp_path / "run", processes=2) == ([0, 0], [])
    assert end_of(tmp_path / "run") == end_of(whole_pair)
    assert {"random_states_0.pkl", "random_states_1.pkl"} < {path.name for path in (whole_pair / FINAL).iterdir()}


def test_another_number_of_processes_is_refused(whole_pair, tmp_path):
    shutil.copytree(whole_pair, tmp_path / "run")
    [exit_code], [message] = spawn(train, tmp_path / "run")
    assert exit_code == 1 and "expected random states of 1 processes, got 2; launch as many" in message


def fail_on_one(run_dir):
    """The second process cannot write, and then has a loss that is not finite: whatever fails must fail on both."""
    torch.set_num_threads(1)
    accelerator = make_accelerator()
    prepare_run(accelerator)
    save_checkpoint(accelerator, run_dir, 1)
    with limit_file_size(0 if accelerator.process_index == 1 else None):
        with pytest.raises(CheckpointError, match="checkpoint-2 could not be written: .*last good .*checkpoint-1"):
            save_checkpoint(accelerator, run_dir, 2)
    finite = FiniteCheck(1)
    finite.add(loss=torch.tensor([1.0, torch.nan][accelerator.process_index]))
    with pytest.raises(RuntimeError, match="not finite between steps 2 and 3: loss. The last good .*checkpoint-1"):
        finite.raise_if_bad(3, run_dir)
    (run_dir / "checkpoint-1" / "random_states_1.pkl").write_bytes(b"")
    accelerator.wait_for_everyone()
    resume(accelerator, run_dir)


def test_what_fails_on_one_process_fails_on_both(tmp_path):
    exit_codes, messages = spawn(fail_on_one, tmp_path, processes=2)
    assert exit_codes == [1, 1]
    assert len(messages) == 2 and all("checkpoint-1 cannot be loaded: EOFError" in message for message in messages)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


# Checkpoints


@contextmanager
def limit_file_size(size):
    """No file can grow beyond this many bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_rights(folder, mode=0o555):
    """In the folder nothing may be made, not even by root, which becomes nobody here."""
    user = os.geteuid()
    folder.parent.chmod(0o755)
    folder.chmod(mode)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


@pytest.fixture
def run():
    """An accelerator, and the objects of a run of one step."""
    accelerator = make_accelerator()
    model, optimizer, scheduler, loader, progress = prepare_run(accelerator)
    model(torch.randn(4, 1)).square().sum().backward()
    optimizer.step()
    return accelerator, model, progress


def save_steps(run, folder, steps, **options):
    accelerator, model, progress = run
    for step in steps:
        progress.step = step
        save_checkpoint(accelerator, folder, step, **options)


def test_the_newest_checkpoints_are_kept_and_the_newest_is_resumed(run, tmp_path):
    save_steps(run, tmp_path, [5, 10, 100, 20], keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-20", "checkpoint-100"]
    assert len(list(tmp_path.iterdir())) == 3
    assert resume(run[0], tmp_path) == 100 and run[2].step == 100


def test_a_run_without_checkpoints_starts_at_step_0(run, tmp_path):
    for choice in ("auto", "never"):
        assert resume(run[0], tmp_path, choice) == 0
        assert resume(run[0], tmp_path / "not-yet-there", choice) == 0


def test_a_run_may_start_from_any_checkpoint_but_loses_none(run, tmp_path):
    save_steps(run, tmp_path / "a", [10, 20])
    assert resume(run[0], tmp_path / "a", str(tmp_path / "a" / "checkpoint-20")) == 20
    assert resume(run[0], tmp_path / "b", tmp_path / "a" / "checkpoint-10") == 10 and run[2].step == 10
    with pytest.raises(CheckpointError, match="checkpoint-10 is not newer than, got checkpoint-20; move those away"):
        resume(run[0], tmp_path / "a", tmp_path / "a" / "checkpoint-10")
    with pytest.raises(CheckpointError, match="expected no checkpoint in .*a, got checkpoint-20; resume with 'auto'"):
        resume(run[0], tmp_path / "a", "never")
    for wrong in ("newest", tmp_path / "checkpoint-7", tmp_path / "a"):
        with pytest.raises(CheckpointError, match="expected 'auto', 'never' or a folder named checkpoint-<step>"):
            resume(run[0], tmp_path / "b", wrong)


def test_a_checkpoint_of_the_same_step_is_replaced(run, tmp_path):
    save_steps(run, tmp_path, [10])
    run[2].images = 77
    save_steps(run, tmp_path, [10], keep=1)
    run[2].images = 0
    assert resume(run[0], tmp_path) == 10 and run[2].images == 77
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


@pytest.mark.parametrize("renamed", ["old", "both"])
def test_a_replacement_that_was_cut_short_is_undone_or_completed(run, tmp_path, renamed):
    """Killed after the first or the second of the two renames."""
    save_steps(run, tmp_path, [10])
    shutil.copytree(tmp_path / "checkpoint-10", tmp_path / "replaced-checkpoint-10")
    if renamed == "old":
        (tmp_path / "checkpoint-10").rename(tmp_path / "partial-checkpoint-10")
    assert resume(run[0], tmp_path) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_copies_that_a_user_made_do_not_count(run, tmp_path):
    for name in ("checkpoint-best", "checkpoint-30.bak", "partial-results"):
        (tmp_path / name).mkdir()
    save_steps(run, tmp_path, [10, 20], keep=1)
    assert resume(run[0], tmp_path) == 20
    assert len(list(tmp_path.iterdir())) == 4


def test_gradients_under_accumulation_are_not_lost(run, tmp_path):
    accelerator, model, _ = run
    with accelerator.accumulate(model), pytest.raises(ValueError, match="save after an optimizer step"):
        save_steps(run, tmp_path, [10])


@pytest.mark.parametrize("size", [0, 100, 800, 1500, 3000])
def test_a_full_disk_leaves_the_last_good_checkpoint(run, tmp_path, size):
    save_steps(run, tmp_path, [10])
    before = contents(tmp_path)
    with limit_file_size(size), pytest.raises(CheckpointError) as caught:
        save_steps(run, tmp_path, [20], keep=1)
    assert "checkpoint-20 could not be written: " in str(caught.value)
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-10'}. Make sure that" in str(caught.value)
    assert "then give the same command again" in str(caught.value)
    assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == 1
    save_steps(run, tmp_path, [20], keep=1)
    assert resume(run[0], tmp_path) == 20


def test_a_read_only_folder_leaves_the_last_good_checkpoint(run):
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # the folders above are everybody's
        run_dir = Path(place) / "run"
        save_steps(run, run_dir, [10])
        before = contents(run_dir)
        with no_rights(run_dir):
            with pytest.raises(
                CheckpointError, match="PermissionError: .*The last good checkpoint is .*checkpoint-10"
            ):
                save_steps(run, run_dir, [20], keep=1)
            with pytest.raises(CheckpointError, match="log.jsonl could not be written: PermissionError"):
                RunLog(run_dir / "log.jsonl").write(11, {"loss": 1.0})
        with no_rights(run_dir, mode=0), pytest.raises(CheckpointError, match="cannot be listed: PermissionError"):
            save_steps(run, run_dir, [20], keep=1)
        assert contents(run_dir) == before


def test_a_run_that_cannot_write_says_so_at_its_start(tmp_path):
    check_writable(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(CheckpointError, match=f"{run_dir} could not be written: .*There is no checkpoint yet"):
            check_writable(run_dir)
    with limit_file_size(0), pytest.raises(CheckpointError, match="File too large"):
        check_writable(tmp_path)
    with tempfile.TemporaryDirectory(dir="/tmp") as place, no_rights(Path(place)):
        with pytest.raises(CheckpointError, match="Permission denied"):
            check_writable(Path(place) / "run")


def test_other_files_of_a_run_fail_as_clearly(run, tmp_path):
    save_steps(run, tmp_path, [10])
    with limit_file_size(10), pytest.raises(CheckpointError, match="picture.png could not be written.*checkpoint-10"):
        with writing(tmp_path / "picture.png", tmp_path):
            (tmp_path / "picture.png").write_bytes(bytes(100))


FILES = [
    "model.safetensors",
    "optimizer.bin",
    "random_states_0.pkl",
    "custom_checkpoint_0.pkl",
    "custom_checkpoint_1.pkl",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_damaged_checkpoint_is_named(run, tmp_path, name, damage):
    save_steps(run, tmp_path, [10, 20])
    path = tmp_path / "checkpoint-20" / name
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if damage == "truncated" else 0)
    with pytest.raises(
        CheckpointError, match="checkpoint-20 cannot be loaded: .*; if it is damaged, delete it, to go on"
    ):
        resume(run[0], tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-20")
    assert resume(run[0], tmp_path) == 10


def test_the_checkpoint_of_another_model_is_refused(run, tmp_path):
    save_steps(run, tmp_path, [10])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    other = make_accelerator()
    prepare_run(other, hidden_size=16)
    with pytest.raises(CheckpointError, match="checkpoint-10 cannot be loaded: .*size mismatch.*If settings changed"):
        resume(other, tmp_path)


# Batches


def make_loader(accelerator, count=18, **options):
    dataset = TensorDataset(torch.arange(float(count)))
    return accelerator.prepare(DataLoader(dataset, batch_size=4, shuffle=True, **options))


def take(count, loader, progress, accelerator, **options):
    """Batches, each with whether the gradients are applied after it."""
    model = torch.nn.Identity()
    taken = []
    for (images,) in batches(loader, progress, accelerator, **options):
        with accelerator.accumulate(model):
            taken.append((images.tolist(), accelerator.sync_gradients))
        if len(taken) == count:
            return taken


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("done", [2, 5, 7, 10])
def test_batches_go_on_from_any_place(done, num_workers):
    accelerator = make_accelerator()
    epochs, progress = [], Progress()
    whole = take(15, make_loader(accelerator), progress, accelerator, on_epoch=epochs.append)
    assert epochs == [0, 1, 2] and progress == Progress(step=0, epoch=2, batch=5, images=54)
    assert [applied for _, applied in whole] == 3 * [False, True, False, True, True]  # two batches, or the epoch's end
    for first in (0, 5, 10):
        assert sorted(sum((images for images, _ in whole[first : first + 5]), [])) == list(range(18))
    assert whole[0] != whole[5] != whole[10]

    first, rest = Progress(), Progress()
    accelerator = make_accelerator()
    taken = take(done, make_loader(accelerator), first, accelerator)
    rest.load_state_dict(first.state_dict())
    taken += take(15 - done, make_loader(accelerator, num_workers=num_workers), rest, accelerator)
    assert taken == whole and rest == progress


def test_measuring_between_batches_changes_nothing():
    accelerator = make_accelerator()
    loader, test_loader = make_loader(accelerator), make_loader(accelerator, count=9)
    model = torch.nn.Linear(1, 1)
    applied = []
    for _ in batches(loader, Progress(), accelerator):
        with accelerator.accumulate(model):
            applied.append(accelerator.sync_gradients)
        assert len(list(test_loader)) == 3
        if len(applied) == 10:
            break
    assert applied == 2 * [False, True, False, True, True]


def test_opening_the_data_draws_no_random_number():
    accelerator = make_accelerator()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(12, make_loader(accelerator), Progress(), accelerator)
    assert torch.equal(torch.get_rng_state(), before)


class Stream(IterableDataset):
    """Numbers that come one by one."""

    def __iter__(self):
        return ((number,) for number in torch.arange(18.0))


def test_a_stream_goes_on_where_it_was():
    accelerator = make_accelerator()
    whole = take(10, accelerator.prepare(DataLoader(Stream(), batch_size=4)), Progress(), accelerator)
    progress = Progress(epoch=0, batch=3, images=12)
    rest = take(7, accelerator.prepare(DataLoader(Stream(), batch_size=4)), progress, accelerator)
    assert [images for images, _ in rest] == [images for images, _ in whole[3:]] and progress.images == 36


def test_an_epoch_without_a_batch_is_an_error():
    accelerator = make_accelerator()
    with pytest.raises(ValueError, match="an epoch has no batch.*lower the batch size"):
        next(batches(make_loader(accelerator, count=3, drop_last=True), Progress(), accelerator))


# Stopping


def test_a_stop_is_asked_for_by_sigterm_and_only_there():
    accelerator = make_accelerator()
    previous = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.ask(accelerator, True) == [False, True]
        for _ in range(2):  # the second one does no harm
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.ask(accelerator) == [True]
    assert signal.getsignal(signal.SIGTERM) is previous


def save_while_bothered(run_dir):
    """Three saves, with a worker that loads data, while every process of the group gets SIGTERM again and again."""
    torch.set_num_threads(1)
    os.setpgrp()
    accelerator = make_accelerator()
    prepare_run(accelerator)
    loader = make_loader(accelerator, num_workers=1, worker_init_fn=ignore_sigterm, multiprocessing_context="fork")
    with StopSignal() as stop:
        signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGTERM))
        iterator = batches(loader, Progress(), accelerator)
        next(iterator)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        for step in (1, 2, 3):
            next(iterator)
            save_checkpoint(accelerator, run_dir, step, keep=3)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert stop.ask(accelerator) == [True]
        assert resume(accelerator, run_dir) == 3


def test_sigterm_to_all_processes_does_not_disturb_a_save(tmp_path):
    assert spawn(save_while_bothered, tmp_path / "run") == ([0], [])
    assert len(list_checkpoints(tmp_path / "run")) == 3


# Finite losses


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_term_that_was_not_finite_once_is_named_with_its_steps(tmp_path, value):
    (tmp_path / "checkpoint-20").mkdir()
    finite = FiniteCheck(20)
    finite.add(loss=torch.tensor(1.0), norm=torch.tensor([1e38, 2.0]))
    finite.raise_if_bad(30, tmp_path)
    finite.add(loss=torch.tensor(1.0), norm=torch.tensor([1.0, value]))
    finite.add(loss=torch.tensor(1.0), norm=torch.tensor([1.0, 1.0]))
    with pytest.raises(RuntimeError) as caught:
        finite.raise_if_bad(40, tmp_path)
    assert str(caught.value) == (
        f"not finite between steps 31 and 40: norm. The last good checkpoint is {tmp_path / 'checkpoint-20'}. "
        "To go on from there: lower the learning rate, or use bf16 instead of fp16"
    )


def test_terms_without_a_gradient_graph_are_kept():
    finite = FiniteCheck()
    weight = torch.ones(3, requires_grad=True)
    finite.add(loss=weight.sum())
    assert not any(bad.requires_grad for bad in finite.bad.values())


# Log


def test_the_log_goes_on_after_the_step_that_is_resumed(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1 / step, "lr": 1e-5 * step})
    whole = path.read_text()
    assert whole.splitlines()[1] == '{"step": 2, "loss": 0.5, "lr": 2e-05}'
    path.write_text(whole + '{"step": 4, "lo')
    assert [row["step"] for row in RunLog(path).read()] == [1, 2, 3]
    log = RunLog(path, 1)
    for step in (2, 3):
        log.write(step, {"loss": 1 / step, "lr": 1e-5 * step})
    assert path.read_text() == whole and len(list(tmp_path.iterdir())) == 1


def test_a_log_that_is_only_read_is_not_changed(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert RunLog(path).read() == [{"step": 1}]
    assert path.read_text() == '{"step": 1}\n{"st'


def test_a_damaged_log_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="log.jsonl, line 2: expected a JSON object.*repair or delete the file"):
        RunLog(path, 3)


def test_a_full_disk_stops_the_log_clearly(tmp_path):
    log = RunLog(tmp_path / "log.jsonl", 0)
    log.write(1, {"loss": 1.0})
    with limit_file_size(40), pytest.raises(CheckpointError, match="log.jsonl could not be written: .*too large"):
        log.write(2, {"loss": 2.0})
    log = RunLog(tmp_path / "log.jsonl", 1)
    assert log.read() == [{"step": 1, "loss": 1.0}]


def test_the_bar_counts_images():
    bar = progress_bar(total_steps=10, images_per_step=32, initial_step=4, disable=False)
    bar.update(32)
    assert (bar.n, bar.total, bar.unit) == (160, 320, "img")
    bar.close()
