"""CLAT as a training task of timm."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.task import resume_task_checkpoint
from timm_together import batches, main, make_optimizer, make_task, train

import toughen as tg
from toughen.integrations.timm import CLATTask


def test_only_the_selected_layers_move_and_the_normalisation_is_inside():
    task = make_task()
    before = copy.deepcopy(task.get_trainable_module().state_dict())

    train(task, make_optimizer(task))

    layers = {layer for selection in task.guest.selections.values() for layer in selection.layers}
    after = task.get_trainable_module().state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {f"{layer}.weight" for layer in layers}
    assert after["normalize.mean"].flatten().tolist() == pytest.approx([0.5, 0.5, 0.5])  # as timm says of the network


def test_a_resumed_task_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path):
    whole = make_task()
    train(whole, make_optimizer(whole))

    part = make_task()
    optimizer = make_optimizer(part)
    train(part, optimizer, epochs=2)
    torch.save({**part.get_checkpoint_state(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pth.tar")
    resumed = make_task()
    optimizer = make_optimizer(resumed)
    resume_task_checkpoint(resumed, tmp_path / "last.pth.tar", log_info=False)
    optimizer.load_state_dict(torch.load(tmp_path / "last.pth.tar")["optimizer"])
    train(resumed, optimizer, start=2)

    for name, value in whole.get_eval_model().state_dict().items():
        assert torch.equal(value, resumed.get_eval_model().state_dict()[name]), name


def test_two_processes_train_as_one_does(tmp_path):
    worker = Path(__file__).with_name("timm_together.py")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(worker), str(tmp_path / "two")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    main(tmp_path / "one")

    one, first, second = (torch.load(tmp_path / name) for name in ("one/0.pt", "two/0.pt", "two/1.pt"))

    assert len(set(one["selected"].values())) > 1, "layers change, or the test shows nothing"
    assert first["selected"] == second["selected"] == one["selected"]
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
        torch.testing.assert_close(value, one["weights"][name], rtol=1e-4, atol=1e-5)


def test_an_average_of_the_scripts_own_follows_the_network():
    task = make_task()
    task.setup_ema(decay=0.5)
    optimizer = make_optimizer(task)
    train(task, optimizer, epochs=1)
    task.update_ema()

    assert "task_state_ema" not in task.get_checkpoint_state(ema=True)
    average = task.get_checkpoint_state(ema=True)["state_dict_ema"]
    assert average.keys() == task.get_checkpoint_state()["state_dict"].keys()


def loss_of(task: CLATTask, *, change=lambda x, y: (x, y)) -> None:
    optimizer = make_optimizer(task)
    task.epoch_start(0, probe=batches(), optimizer=optimizer)
    task(*change(*batches()[0]))


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: loss_of(make_task(), change=lambda x, y: (x, torch.eye(4)[y])), "labels are mixed"),
        (lambda: loss_of(make_task(tg.PGDAT()), change=lambda x, y: (2 * x - 1, y)), "normalisation"),
        (lambda: make_task().compile(), "leave out --torchcompile"),
        (lambda: make_task().load_task_state(None), "it was not written with CLATTask"),
        (lambda: make_task(tg.FreeAT()), "uses each batch several times, and timm's script knows nothing of it"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(work, message):
    with pytest.raises(tg.InputError) as told:
        work()

    assert message in str(told.value)
