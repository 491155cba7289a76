"""The training scripts when things go wrong, and on two processes: nothing is lost, and nothing comes out otherwise."""

import faulthandler
import gc
import io
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import accelerate.utils.other
import datasets
import numpy as np
import psutil
import pytest
import torch
import transformers.modeling_utils
from accelerate import DistributedType, PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import make_vae
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from dq_hf.modeling.layers_dqtransformer import DQTransformerLayer
from dq_hf.modeling.quantization_dq import DQQuantizer
from dq_hf.training.run import Run

EXAMPLES = Path(__file__).parents[2] / "examples"
# Processes of their own: a server imports the libraries once, and each run of a script is a fork of it.
FORKS = multiprocessing.get_context("forkserver")
LIBRARIES = ["accelerate.commands.launch", "datasets", "diffusers.optimization", "diffusers.training_utils"]
LIBRARIES += [
    "dq_hf.networks.perceptual",
    "PIL.ImageFont",
    "PIL.PngImagePlugin",
    "hypothesis",
    "psutil",
    "pytest",
    "transformers.modeling_utils",
]
LIBRARIES += [f"dq_hf.training.{name}" for name in ("calibration", "run")]
FORKS.set_forkserver_preload(LIBRARIES)

# 14 images in batches of 4: three steps an epoch, two images left over.
SCHEDULE = "--output_dir run --max_steps 7 --save_every 2 --sample_every 2 --log_every 1 --keep_checkpoints 3"
SCHEDULE += " --warmup_steps 2 --batch_size 4 --data ../images"
STAGE_1 = "train_dqvae.py --image_size 16 --granularities 4 2 --block_out_channels 8 8 16 --norm_num_groups 4"
STAGE_1 += " --z_channels 8 --codebook_size 16 --codebook_dim 8 --disc_layers 1 --disc_channels 4 --disc_start 1"
STAGE_1 += f" --disc_weight 0.01 --learning_rate 1e-3 {SCHEDULE}"
STAGE_2 = "train_dqtransformer.py --vae ../vae --hidden_size 16 --num_attention_heads 2 --num_position_layers 1"
STAGE_2 += f" --num_content_layers 1 {SCHEDULE}"
# All that a stage can do: every term of the objective, and all that is random.
WHOLE = {1: f"{STAGE_1} --router feature --disc_lecam 0.1", 2: f"{STAGE_2} --codes ../codes"}
NO_DROPOUT = "--dropout 0 --attention_dropout 0 --class_dropout 0"


# Runs


def run_script(folder, command, prepare, rank, processes, port):
    """In a process of its own: run an example in `folder`, after each `prepare()`."""
    os.chdir(folder)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = str(folder.parent / "cache")
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # as in conftest.py
    os.environ["ACCELERATE_USE_CPU"] = "true"
    faulthandler.enable(2)
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "localhost"}
    script, *arguments = command.split()
    sys.argv = [str(EXAMPLES / script), *arguments]
    for action in prepare:
        action()
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(folder, command, *prepare, processes=1):
    """The processes of a run that begins: of a script with its arguments, each after it has done `prepare`."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    places = [(rank, processes, port) for rank in range(processes)]
    started = [FORKS.Process(target=run_script, args=(folder, command, prepare, *place)) for place in places]
    for process in started:
        process.start()
    return started


def finish(started):
    """Exit codes of a run's processes, when they have ended; one that does not end leaves its stacks in `err-<rank>.txt`."""
    for process in started:
        process.join(240)
        if process.is_alive():
            os.kill(process.pid, signal.SIGABRT)  # for faulthandler
        process.join(10)
        process.kill()
        process.join()
    return [process.exitcode for process in started]


def run(folder, command, *prepare, processes=1):
    return finish(start(folder, command, *prepare, processes=processes))


def run_well(folder, command, *prepare, processes=1):
    exit_codes = run(folder, command, *prepare, processes=processes)
    errors = [(folder / f"err-{rank}.txt").read_text()[-3000:] for rank in range(processes)]
    assert exit_codes == [0] * processes, errors


def contents(folder):
    """Every file under a folder, by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(folder, other):
    """That both left the same files with the same bytes: log, checkpoints, model, card, pictures."""
    files, others = contents(folder / "run"), contents(other / "run")
    assert files.keys() == others.keys()
    assert [name for name in files if files[name] != others[name]] == []


def rows_of(folder):
    log = folder / "run" / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def wait_for_step(folder, step):
    """Until a run has logged a step, for two minutes at most."""
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in rows_of(folder)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `images`, of different numbers of codes, `vae`, a tokenizer, and `codes`, the images encoded."""
    place = tmp_path_factory.mktemp("engine")
    source = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["moon", "sun"])})
    (place / "images").mkdir()
    for split, count in (("train", 14), ("test", 3)):
        images = []
        for _ in range(count):
            pixels = np.full((16, 16, 3), 255, dtype=np.uint8)
            top, left = 4 * source.integers(4, size=2)
            pixels[top:, left:] = source.integers(0, 256, (16 - top, 16 - left, 3))
            images.append(Image.fromarray(pixels))
        rows = {"image": images, "label": [i % 2 for i in range(count)]}
        datasets.Dataset.from_dict(rows, features).to_parquet(place / "images" / f"{split}-00000-of-00001.parquet")
    make_vae().save_pretrained(place / "vae")
    run_well(place / "encoding", "encode_dataset.py --vae ../vae --data ../images --output_dir ../codes")
    return place


@pytest.fixture(scope="module")
def wholes(place):
    """Folders of the runs that nothing disturbed, and how many seconds they took, by stage."""
    wholes = {}
    for stage, command in WHOLE.items():
        began = time.monotonic()
        run_well(place / f"whole-{stage}", command)
        wholes[stage] = place / f"whole-{stage}", time.monotonic() - began
    return wholes


both_stages = pytest.mark.parametrize("stage", [1, 2])


@both_stages
def test_a_run_leaves_log_checkpoints_model_and_pictures(wholes, stage):
    folder, _ = wholes[stage]
    names = {path.name for path in (folder / "run").iterdir()}
    pictures = {f"samples-{step:06d}.png" for step in (2, 4, 6, 7)}
    assert names == {".lock", "checkpoint-4", "checkpoint-6", "checkpoint-7", "log.jsonl", "model"} | pictures
    measured = "psnr" if stage == 1 else "test_loss"
    assert [row["step"] for row in rows_of(folder) if measured in row] == [2, 4, 6, 7]
    assert [row["step"] for row in rows_of(folder) if measured not in row] == [1, 2, 3, 4, 5, 6, 7]


# Killed


def at(event, name, action, number=1):
    """Do `action` just before the n-th time that the process does this to a path that ends like that pattern.

    Args:
        event: of Python's audit hooks, such as "open" or "os.rename"; or "save", a file of tensors half written.
    """
    left = number

    def is_it(what, path):
        nonlocal left
        if what != event or not Path(str(path)).match(name):
            return False
        left -= 1
        return left == 0

    def half_written(save):
        def save_half(state, path, **options):
            save(state, path, **options)
            if is_it("save", path):
                os.truncate(path, os.path.getsize(path) // 2)
                action()

        return save_half

    sys.addaudithook(lambda what, arguments: what == event and is_it(what, arguments[0]) and action())
    torch.save = half_written(torch.save)
    accelerate.utils.other.safe_save_file = half_written(accelerate.utils.other.safe_save_file)
    transformers.modeling_utils.safe_save_file = half_written(transformers.modeling_utils.safe_save_file)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# Each is met by a run that the one before has killed.
MOMENTS = {
    1: [
        ("open", "run/log.jsonl"),
        ("save", "partial-checkpoint-2/optimizer_1.bin"),
        ("os.rename", "partial-checkpoint-2"),
        ("save", "partial-checkpoint-4/random_states_0.pkl"),
        ("open", "samples-000006.png"),
        ("save", "partial-checkpoint-6/model_1.safetensors"),
        ("os.rename", "partial-checkpoint-7"),
        ("os.remove", "optimizer.bin"),  # of the oldest checkpoint
        ("save", "partial-model/.partial/model.safetensors"),
        ("open", "model/.partial-*.md"),
    ],
    2: [
        ("save", "partial-model/.partial/transformer/model.safetensors"),
        ("save", "partial-checkpoint-2/optimizer.bin"),
        ("os.rename", "partial-model"),  # the old one is set aside
        ("save", "partial-checkpoint-4/custom_checkpoint_2.pkl"),
        ("os.rename", "partial-checkpoint-4"),
        ("save", "partial-checkpoint-7/model.safetensors"),
        ("os.remove", "model.safetensors"),
        ("open", "model/.partial-*.md"),
    ],
}


@both_stages
def test_a_run_that_is_killed_at_the_worst_moments_ends_as_if_never_killed(place, wholes, stage):
    folder = place / f"killed-{stage}"
    for event, name in MOMENTS[stage]:
        assert run(folder, WHOLE[stage], partial(at, event, name, die)) == [-signal.SIGKILL], (event, name)
    run_well(folder, WHOLE[stage])
    assert_same_run(folder, wholes[stage][0])


@both_stages
def test_a_run_that_is_killed_at_any_time_ends_as_if_never_killed(place, wholes, stage):
    folder, (whole, seconds) = place / f"timed-{stage}", wholes[stage]
    for share in (0.6, 0.7, 0.8):
        [process] = start(folder, WHOLE[stage])
        process.join(share * seconds)
        process.kill()
        process.join()
    run_well(folder, WHOLE[stage])
    assert_same_run(folder, whole)


@both_stages
def test_a_stream_goes_on_after_a_kill_in_the_middle_of_an_epoch(place, stage):
    command = f"{STAGE_1 if stage == 1 else STAGE_2} --streaming --gradient_accumulation_steps 2"
    whole, folder = place / f"stream-{stage}", place / f"stream-killed-{stage}"
    run_well(whole, command)
    assert run(folder, command, partial(at, "open", "samples-000006.png", die)) == [-signal.SIGKILL]
    run_well(folder, command)
    assert "starting at step 4" in (folder / "out-0.txt").read_text()
    assert_same_run(folder, whole)


@both_stages
def test_sigterm_saves_and_ends_well(place, wholes, stage):
    folder = place / f"stopped-{stage}"
    [process] = start(folder, WHOLE[stage])
    wait_for_step(folder, 1)
    process.terminate()
    assert finish([process]) == [0]
    [step] = re.findall(r"stopped at step (\d); the same command goes on", (folder / "out-0.txt").read_text())
    assert rows_of(folder)[-1]["step"] == int(step)
    assert (folder / "run" / f"checkpoint-{step}").is_dir()
    run_well(folder, WHOLE[stage])
    assert f"starting at step {step}" in (folder / "out-0.txt").read_text()
    assert_same_run(folder, wholes[stage][0])


def test_a_code_cache_that_is_replaced_is_lost_at_no_moment(place):
    folder = place / "replaced"
    folder.mkdir()
    shutil.copytree(place / "codes", folder / "codes")
    old = contents(folder / "codes")
    command = "encode_dataset.py --vae ../vae --data ../images --output_dir codes --max_images 2 --overwrite"
    for moment in (("open", "partial-codes/codes.json"), ("os.rename", "partial-codes")):
        assert run(folder, command, partial(at, *moment, die)) == [-signal.SIGKILL]
        assert old in [contents(path) for path in folder.glob("*codes")]
    run_well(folder, command)
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["codes"]
    assert json.loads((folder / "codes" / "codes.json").read_text())["num_rows"] == {"train": 4, "test": 2}


# In trouble


def test_a_second_run_in_the_folder_of_another_is_refused_at_once(place):
    folder, second = place / "shared", place / "shared-second"
    [first] = start(folder, f"{WHOLE[2]} --max_steps 1000")
    wait_for_step(folder, 1)
    assert run(second, f"{WHOLE[2]} --output_dir ../shared/run") == [1]
    assert "error: another run uses ../shared/run; wait for its end" in (second / "err-0.txt").read_text()
    first.kill()
    first.join()
    run_well(folder, f"{WHOLE[2]} --max_steps 1000", partial(at, "open", "run/log.jsonl", terminate, number=2))


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def limit_file_size(size):
    """From now on no file can grow beyond this many bytes, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def lose_rights():
    """From now on nothing can be changed in the run's folder, not even by root, which becomes nobody here."""
    Path("run").chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)


def fill_picture():
    """The disk is full where a picture is to be written."""
    picture = Path("run/samples-000006.png")
    picture.unlink()
    picture.symlink_to("/dev/full")


CANNOT_WRITE = (
    r"error: run/{} could not be written: .*\. The last good checkpoint is run/checkpoint-{}\. Make sure that "
    r"run is a folder that can be written and has space \([\d,]+ MB are free\), then give the same command again"
)
NOT_FINITE = (
    r"error: not finite between steps [56] and 6: .*loss.*\. The last good checkpoint is run/checkpoint-4\. "
    r"To go on from there: lower the learning rate, or use bf16 instead of fp16"
)
FULL = partial(at, "os.mkdir", "partial-checkpoint-6", partial(limit_file_size, 100_000))
FULL_AT_MODEL = partial(at, "os.mkdir", "partial-model", partial(limit_file_size, 40_000))
READ_ONLY = partial(at, "os.mkdir", "partial-checkpoint-6", lose_rights)
READ_ONLY_LOG = partial(at, "open", "run/log.jsonl", lose_rights, number=4)
TROUBLES = [  # what is done, more options, the message, and the newest checkpoint then
    ([FULL], "", CANNOT_WRITE.format("checkpoint-6", 4), 4),
    ([READ_ONLY], "", CANNOT_WRITE.format("checkpoint-6", 4), 4),
    ([READ_ONLY_LOG], "", CANNOT_WRITE.format("log.jsonl", 4), 4),
    ([fill_picture], "", CANNOT_WRITE.format("samples-000006.png", 4), 4),
    ([], "--learning_rate 1e30", NOT_FINITE, 4),
    ([], "--learning_rate 1e30 --log_every 10", NOT_FINITE, 4),
]
AT_THE_MODEL = {  # stage 1 writes it at the end, stage 2 whenever it is the best so far
    1: ([FULL_AT_MODEL], "", CANNOT_WRITE.format("model", 7), 7),
    2: ([FULL_AT_MODEL], "", CANNOT_WRITE.format("model", 4), 4),
}


@both_stages
def test_trouble_is_told_and_leaves_the_last_good_checkpoint(place, wholes, stage):
    folder, whole = place / f"trouble-{stage}", wholes[stage][0]
    shutil.copytree(whole / "run", folder / "run")
    for step in (6, 7):
        shutil.rmtree(folder / "run" / f"checkpoint-{step}")
    for prepare, options, message, newest in [*TROUBLES, AT_THE_MODEL[stage]]:
        assert run(folder, f"{WHOLE[stage]} {options}", *prepare) == [1]
        (folder / "run").chmod(0o755)
        for link in filter(Path.is_symlink, (folder / "run").iterdir()):
            link.unlink()
        errors = (folder / "err-0.txt").read_text()
        assert re.search(f"{message}$", errors, re.MULTILINE), errors[-2000:]
        kept = {path.name: contents(path) for path in (folder / "run").glob("*checkpoint-*")}
        assert sorted(kept)[-1] == f"checkpoint-{newest}"
        assert all(files == contents(whole / "run" / name) for name, files in kept.items())
    run_well(folder, WHOLE[stage])
    assert_same_run(folder, whole)


# Two processes


def keep_state():
    """At the end of the script, write all that its process holds to `state-<rank>`."""
    end_run = Run.end

    def end(run):
        accelerator = run.accelerator
        modules = [accelerator.unwrap_model(model) for model in accelerator._models]
        parts = [*modules, *accelerator._optimizers, *accelerator._custom_objects]
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        Path(f"state-{accelerator.process_index}").write_bytes(file.getvalue())
        end_run(run)

    Run.end = end


def no_model_outlives_the_group():
    """Its destructor could wait for ever."""
    destroy = torch.distributed.destroy_process_group

    def destroyed():
        left = sum(type(each) is DistributedDataParallel for each in gc.get_objects())
        print(f"{left} models left")
        destroy()

    torch.distributed.destroy_process_group = destroyed


def assert_two_that_agree(folder):
    """That there were two processes, which ended with the same weights, optimizers and averages, bit for bit."""
    assert (folder / "state-0").read_bytes() == (folder / "state-1").read_bytes()
    assert "| processes | 2 |" in (folder / "run" / "model" / "README.md").read_text()


def assert_same_rows(folder, other):
    rows, others = rows_of(folder), rows_of(other)
    assert len(rows) == len(others) == 11
    for row, expected in zip(rows, others):
        norm = row.pop("d_grad_norm", 0)  # it jumps where rounding turns a leaky ReLU or the hinge around
        assert norm == pytest.approx(expected.pop("d_grad_norm", 0), rel=2e-3)
        assert row == pytest.approx(expected, rel=0, abs=1e-4)


def restart_no_codes():
    """Leave dead codes where they are: a restart takes vectors of the first process, which has others among two."""
    init = DQQuantizer.__init__

    def start(quantizer, config):
        init(quantizer, config)
        quantizer.restart_dead_codes = False

    DQQuantizer.__init__ = start


def draw_no_routes():
    """Take the likelier granularity, with the gradient of the softmax: each process draws its own routes."""

    def likelier(logits, tau, hard, dim):
        soft = logits.softmax(dim)
        return torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0) - soft.detach() + soft

    torch.nn.functional.gumbel_softmax = likelier


SETTINGS = {
    "stage-1": f"{STAGE_1} --perceptual_weight 0",
    "stage-1-regularised": f"{STAGE_1} --perceptual_weight 0 --disc_norm group --disc_r1 1 --disc_lecam 0.1",
    "stage-1-feature": f"{STAGE_1} --perceptual_weight 0 --router feature",
    "stage-1-accumulated": f"{STAGE_1} --perceptual_weight 0 --gradient_accumulation_steps 2",
    "stage-2-images": f"{STAGE_2} {NO_DROPOUT}",
    "stage-2-codes": f"{STAGE_2} {NO_DROPOUT} --codes ../codes",
    "stage-2-accumulated": f"{STAGE_2} {NO_DROPOUT} --gradient_accumulation_steps 2",
}


@pytest.fixture(scope="module")
def done(place):
    """Gives the folder of a run by the name of its settings and its number of processes, which share the batch."""

    @cache
    def done(name, processes):
        folder = place / f"{name}-{processes}"
        command = f"{SETTINGS[name]} --batch_size {4 // processes}"
        run_well(folder, command, keep_state, restart_no_codes, draw_no_routes, processes=processes)
        return folder

    return done


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_as_one_with_the_same_whole_batch(done, name):
    assert_two_that_agree(done(name, 2))
    assert_same_rows(done(name, 2), done(name, 1))
    if "stage-1" in name:
        rows = [row for row in rows_of(done(name, 1)) if "loss" in row]
        assert name == "stage-1-feature" or any(row["codebook_usage"] >= 2 / 16 for row in rows)
        assert all(0 < row["lambda"] < 0.75 and 0 < row["d_loss"] for row in rows[1:])
        assert all(0 < row["share_2"] < 1 for row in rows[2:])


def test_two_processes_agree_whatever_is_drawn_and_after_a_stop(place):
    """Each draws its own routes and dropouts; codes die and are restarted."""
    whole, folder = place / "random-whole", place / "random-stopped"
    command = f"{WHOLE[1]} --batch_size 2"
    run_well(whole, command, keep_state, no_model_outlives_the_group, processes=2)
    assert_two_that_agree(whole)
    assert (whole / "out-0.txt").read_text().splitlines()[-1] == "0 models left"
    assert any(row.get("codebook_usage", 1) < 1 for row in rows_of(whole))
    started = start(folder, command, processes=2)
    wait_for_step(folder, 1)
    started[1].terminate()
    assert finish(started) == [0, 0], [(folder / f"err-{rank}.txt").read_text()[-3000:] for rank in range(2)]
    assert "stopped at step" in (folder / "out-0.txt").read_text()
    run_well(folder, command, processes=2)
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_torchrun_ends_when_one_process_is_killed_and_the_next_run_goes_on(place, done):
    folder, whole = place / "torchrun", done("stage-2-codes", 2)
    folder.mkdir()
    script, *arguments = f"{SETTINGS['stage-2-codes']} --batch_size 2".split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(EXAMPLES / script), *arguments]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HOME": str(place / "hf")}
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL) as launcher:
        wait_for_step(folder, 3)
        workers = psutil.Process(launcher.pid).children()
        assert len(workers) == 2
        next(worker for worker in workers if worker.environ()["RANK"] == "1").kill()
    assert launcher.returncode == 1
    assert "checkpoint-2" in {path.name for path in (folder / "run").iterdir()}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "starting at step 0" not in ended.stdout
    assert_same_run(folder, whole)


# Configurations


def launch_arguments(name, *options):
    """What the launcher makes of `accelerate launch --config_file examples/configs/<name>.yaml ... script.py`."""
    options = ["--config_file", str(EXAMPLES / "configs" / f"{name}.yaml"), *options, "script.py"]
    return _validate_launch_command(launch_command_parser().parse_args(options))[0]


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("one_gpu", "NO", 1, 1),
        ("one_node", "MULTI_GPU", 1, 8),
        ("one_node_fsdp", "FSDP", 1, 8),
        ("several_nodes", "MULTI_GPU", 2, 16),
    ],
)
def test_accelerate_accepts_the_configurations(name, kind, machines, processes):
    assert load_config_from_file(str(EXAMPLES / "configs" / f"{name}.yaml")).distributed_type == kind
    arguments = launch_arguments(name, "--machine_rank", str(machines - 1), "--main_process_ip", "10.0.0.1")
    assert (arguments.num_machines, arguments.num_processes) == (machines, processes)
    assert (arguments.multi_gpu, arguments.use_fsdp) == (kind == "MULTI_GPU", kind == "FSDP")
    assert arguments.mixed_precision == "bf16"
    assert launch_arguments(name, "--num_processes", "4").num_processes == 4


def share_out():
    """Do as the launcher does with `one_node_fsdp.yaml`, but for CPUs: accelerate must take them for GPUs.

    Otherwise it shares no weights out (accelerate 1.15: `MULTI_CPU` never becomes `FSDP`), although gloo can.
    """
    environment = prepare_multi_gpu_env(launch_arguments("one_node_fsdp", "--num_processes", "2"))
    os.environ |= {name: value for name, value in environment.items() if "FSDP" in name}
    start_processes = PartialState.__init__

    def start_as_gpus(state, *arguments, **options):
        start_processes(state, *arguments, **options)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start_as_gpus


def check_shares():
    """At the end of the script, that the process held half of each layer's weights."""
    end_run = Run.end

    def end(run):
        assert run.accelerator.distributed_type == DistributedType.FSDP
        layers = [layer for layer in run.accelerator._models[0].modules() if isinstance(layer, DQTransformerLayer)]
        assert len(layers) == 2 and all(isinstance(layer, FSDPModule) for layer in layers)
        for weight in (parameter for layer in layers for parameter in layer.parameters()):
            assert 2 * weight.to_local().numel() == weight.numel()
        end_run(run)

    Run.end = end


def test_shared_out_weights_train_as_one_process_and_are_saved_whole(place, done):
    folder, alone = place / "fsdp", done("stage-2-images", 1)
    command = f"{SETTINGS['stage-2-images']} --batch_size 2"
    killed = run(folder, command, share_out, partial(at, "os.rename", "partial-checkpoint-6", die), processes=2)
    assert killed[0] == -signal.SIGKILL and killed[1] != 0
    run_well(folder, command, share_out, check_shares, processes=2)
    assert "starting at step 4" in (folder / "out-0.txt").read_text()
    assert_same_rows(folder, alone)
    saved, expected = (load_file(path / "run/model/transformer/model.safetensors") for path in (folder, alone))
    torch.testing.assert_close(saved, expected, rtol=0, atol=1e-3)  # a step of Adam moves a weight by 5e-4


def test_shared_out_weights_have_no_moving_average(place):
    """Each process would average its own shards, and a checkpoint has those of the main process for all."""
    folder = place / "fsdp-average"
    exit_codes = run(folder, f"{STAGE_2} --ema_decay 0.9", share_out, processes=2)
    assert exit_codes == [1, 1]
    assert "--ema_decay must be 0 under FSDP" in (folder / "err-0.txt").read_text()
