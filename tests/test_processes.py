import os
import signal

import pytest
import torch

from toughen import processes
from toughen.errors import InputError
from toughen.processes import shared


def mistake() -> int:
    raise InputError("met here")


def test_one_process_has_its_own_part_alone():
    assert shared(lambda: 7) == [7]
    assert shared(None) == []


def test_a_mistake_of_another_process_ends_this_one_too(monkeypatch):
    monkeypatch.setattr(processes, "gathered", lambda mine: [mine, InputError("met elsewhere")])
    with pytest.raises(InputError, match="met elsewhere"):
        shared(lambda: 7)


def test_a_mistake_is_handed_to_the_others_before_it_is_raised(monkeypatch):
    handed = []
    monkeypatch.setattr(processes, "gathered", lambda mine: handed.append(mine) or [mine])
    with pytest.raises(InputError, match="met here"):
        shared(mistake)
    assert [str(one) for one in handed] == ["met here"]


def test_work_that_keeps_what_is_done_goes_on_when_it_is_asked_for_a_checkpoint():
    before = signal.getsignal(signal.SIGUSR1)
    with processes.sigterm_interrupts():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == before


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"4 processes on a machine with 2 GPUs.*--nproc-per-node 2"):
        processes.join()
