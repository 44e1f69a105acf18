import torch
from torch import nn

from small_runs import PGD_AT, recipe
from toughen import PGD, PGDAT, TWINS, AutoLoRA, ThreatModel, stack
from toughen.engine import Trainer, TrainSettings, checkpoint
from toughen.engine.optim import make_optimizer
from toughen.run_folder import RunFolder


def bound(model):
    return PGDAT().bind(model, attack=PGD(ThreatModel(eps=0.1), step_size=0.05, steps=1))


def test_decay_spares_batch_norm_where_it_is_told_to():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    settings = TrainSettings(epochs=1, lr=0.1, momentum=0.0, weight_decay=0.5, norm_decay="exclude")
    optimizer = make_optimizer(bound(model), settings)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [True, True, False, False]  # weight and bias of the convolution, scale and shift


def test_decay_spares_the_batch_norm_that_a_method_trains_beside_the_network():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(2, 1, 4, 4))
    pgd = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=1)
    settings = TrainSettings(epochs=1, norm_decay="exclude")
    counts = []
    for methods in ([PGDAT(), TWINS()], [AutoLoRA(rank=2)]):
        groups = make_optimizer(stack(*methods).bind(model, attack=pgd), settings).param_groups
        counts.append([len(group["params"]) for group in groups])
    assert counts == [[4, 4], [6, 2]]  # the frozen net's scale and shift too; the factors of an adapter are no norm


def test_nesterov_is_that_of_torch():
    settings = TrainSettings(epochs=1, lr=0.1, momentum=0.9, nesterov=True)
    [group] = make_optimizer(bound(nn.Linear(2, 2)), settings).param_groups
    assert (group["nesterov"], group["momentum"]) == (True, 0.9)


def test_a_branch_with_other_groups_goes_on_with_the_momentum_of_its_run_by_name(tmp_path):
    branch = {"train": {"norm_decay": "exclude", "epochs": 3}, "method": [PGD_AT]}
    wanted = recipe(train={"epochs": 3, "lr": 0.05, "batch_size": 20}, branch_epoch=1, branches={"spared": branch})
    trunk = Trainer(wanted, out=tmp_path / "run")
    run = trunk.fit()
    member = Trainer(wanted.branches["spared"], out=tmp_path / "other", start=RunFolder.open(run.path))
    state = checkpoint.read_state(run.checkpoints / "last")
    names = member.live.named_parameters()
    assert len(names) == len(state["parameter_names"])
    for number, name in enumerate(state["parameter_names"]):
        ours = member.optimizer.state[names[name]]["momentum_buffer"]
        assert torch.equal(ours, state["optimizer"]["state"][number]["momentum_buffer"]), name
