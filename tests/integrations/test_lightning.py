"""CLAT and its peers in Lightning's Trainer."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import toughen as tg

lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed: toughen[lightning]")

from lightning_module import PGD, Classifier, images, loader, trainer  # noqa: E402
from lightning_together import fit  # noqa: E402

from toughen.integrations.lightning import CLATCallback  # noqa: E402

# Lightning's advice about workers and validation, which is not about us
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


def test_clat_takes_the_place_of_the_loss_and_moves_only_what_it_selected(tmp_path):
    module = Classifier()
    before = copy.deepcopy(module.model.state_dict())
    clat = CLATCallback(tg.CLAT(k=1, every=2), attack=PGD)

    fit = trainer(tmp_path, clat)
    fit.fit(module, loader(), loader())

    assert list(clat.selections) == [0, 2]
    ever = {f"{layer}.weight" for selection in clat.selections.values() for layer in selection.layers}
    after = module.model.state_dict()
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == ever
    assert {"train/loss", "train/clean_ce", "train/feature"} <= fit.callback_metrics.keys()


def test_it_trains_as_the_same_method_does_in_a_plain_loop(tmp_path):
    module, plain = Classifier(), tg.models.create("small_cnn", num_classes=4, width=4, seed=0)
    method = tg.stack(tg.PGDAT(), tg.CLAT(k=1, start_epoch=1, every=1, lr_scale=0.5, probe_size=16))
    probe = [next(iter(loader()))]

    trainer(tmp_path, CLATCallback(method, attack=PGD, probe=probe)).fit(module, loader())

    live = method.bind(plain, attack=PGD)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)
    plain.train()
    for epoch, lr in enumerate((0.05, 0.05, 0.005)):
        live.epoch_start(epoch, probe, optimizer=optimizer)
        for x, y in loader():
            optimizer.param_groups[0]["lr"] = lr * live.lr_scale
            optimizer.zero_grad()
            live(x, y).loss.backward()
            optimizer.step()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, module.model.state_dict()[name]), name


def test_after_fit_the_module_is_the_users_again(tmp_path):
    module = Classifier()
    trainer(tmp_path, CLATCallback(tg.CLAT(k=1), attack=PGD), epochs=1).fit(module, loader())

    assert module.own_steps == 0
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert "training_step" not in vars(module)
    trainer(tmp_path, epochs=1).fit(module, loader())
    assert module.own_steps == 4


def test_a_training_step_of_the_users_own_can_call_it(tmp_path):
    clat = CLATCallback(tg.CLAT(k=1), attack=PGD, step="call")

    class Calls(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch["x"], batch["y"]
            return clat(x, y).loss

    data = [{"x": x, "y": y} for x, y in images()]
    module, wrapped = Calls(), Classifier()
    probe = [next(iter(loader()))]
    clat.probe = probe
    trainer(tmp_path, clat, epochs=1).fit(module, DataLoader(data, batch_size=16))
    trainer(tmp_path, CLATCallback(tg.CLAT(k=1), attack=PGD, probe=probe), epochs=1).fit(wrapped, loader())

    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), wrapped.parameters(), strict=True))


def test_a_resumed_fit_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path):
    def fit(epochs: int, name: str, ckpt_path: str | None = None) -> Classifier:
        module = Classifier()
        method = tg.stack(tg.PGDAT(), tg.CLAT(k=1, start_epoch=1, every=2, select="random"), tg.EMA())
        clat = CLATCallback(method, attack=PGD)
        fit = trainer(tmp_path, clat, epochs=epochs)
        fit.fit(module, loader(), ckpt_path=ckpt_path)
        fit.save_checkpoint(tmp_path / f"{name}.ckpt")
        module.average = clat.deployed()
        return module

    whole = fit(5, "whole")
    for stop in (1, 3):
        fit(stop, "part")
        resumed = fit(5, "resumed", ckpt_path=str(tmp_path / "part.ckpt"))
        assert whole.state_dict().keys() == resumed.state_dict().keys()
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), (stop, name)


def test_a_checkpoint_from_inside_an_epoch_does_not_select_again(tmp_path):
    class Saves(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def fit(**settings) -> CLATCallback:
        clat = CLATCallback(tg.CLAT(k=1, every=1, select="random"), attack=PGD)
        trainer(tmp_path, clat, Saves(), epochs=2).fit(Classifier(), loader(), **settings)
        return clat

    whole = fit()
    assert list(whole.selections) == [0, 1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before the epoch")
        resumed = fit(ckpt_path=str(tmp_path / "middle.ckpt"))
    assert list(resumed.selections) == [1]
    assert resumed.selections[1].layers == whole.selections[1].layers


def test_lora_and_averages_leave_a_plain_network_to_deploy(tmp_path):
    module = Classifier()
    names = list(module.state_dict())
    method = tg.stack(tg.PGDAT(), tg.LoRA(rank=2))
    clat = CLATCallback(method, attack=PGD)

    trainer(tmp_path, clat, epochs=1).fit(module, loader())

    assert list(module.state_dict()) == names
    x = images().tensors[0]
    assert torch.equal(clat.deployed().eval()(x), module.model.eval()(x))


@pytest.mark.filterwarnings(
    "ignore:.*was called without a model", "ignore:.*no last checkpoint", "ignore:.*ended before the epoch"
)
def test_what_is_saved_on_an_error_can_be_gone_on_from(tmp_path):
    class Fails(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 2:
                raise RuntimeError("the node is needed by somebody else")

    method = tg.stack(tg.PGDAT(), tg.LoRA(rank=2))
    whole, module = Classifier(), Classifier()
    trainer(tmp_path, CLATCallback(method, attack=PGD)).fit(whole, loader())
    clat = CLATCallback(method, attack=PGD)
    saves = lightning.callbacks.OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="the node"):
        trainer(tmp_path, clat, Fails(), saves, enable_checkpointing=True).fit(module, loader())
    assert "training_step" not in vars(module)

    trainer(tmp_path, clat).fit(module, loader(), ckpt_path=str(tmp_path / "on_exception.ckpt"))

    assert module.state_dict().keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


def test_it_trains_under_mixed_precision(tmp_path):
    module = Classifier()
    before = copy.deepcopy(module.model.state_dict())
    clat = CLATCallback(tg.stack(tg.PGDAT(), tg.CLAT(k=1, base="inner")), attack=PGD)

    trainer(tmp_path, clat, epochs=1, precision="bf16-mixed").fit(module, loader())

    assert any(not torch.equal(value, before[name]) for name, value in module.model.state_dict().items())
    assert all(bool(value.isfinite().all()) for value in module.model.state_dict().values())


def test_accumulated_gradients_are_one_step_of_the_method(tmp_path):
    clat = CLATCallback(tg.stack(tg.PGDAT(), tg.EMA()), attack=PGD)
    stepped = []

    class Counts(lightning.Callback):
        def on_fit_start(self, trainer, pl_module):
            step_end = clat.guest.live.step_end
            clat.guest.live.step_end = lambda: (stepped.append(1), step_end())

    trainer(tmp_path, clat, Counts(), epochs=1, accumulate_grad_batches=2).fit(Classifier(), loader())

    assert len(stepped) == 2


class TwoOptimizers(Classifier):
    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.model, self.model)]


class HeadOnly(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(list(self.parameters())[-2:], lr=0.1)


class ByHand(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Elsewhere(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = self.model
        del self.model


@pytest.mark.parametrize(
    ("module", "callback", "message"),
    [
        (HeadOnly, {}, "the optimizer lacks 18 parameters of the network, such as layer1.0.conv.weight; give it"),
        (ByHand, {}, "ByHand optimizes by hand; use CLATCallback(step='call')"),
        (Elsewhere, {}, "Elsewhere has no network 'model'; name one with network=, among: net"),
        (Classifier, {"step": "call"}, "training_step of Classifier has not called the callback"),
        (Classifier, {"method": tg.CLAT(k=99)}, "clat k is 99; SmallCNN has "),
        (Classifier, {"method": tg.FreeAT(replays=3)}, "uses each batch several times, and Lightning knows"),
        (Classifier, {"method": tg.stack(tg.PGDAT(), tg.TWINS())}, "trains parameters of its own"),
        (
            Classifier,
            {"method": tg.stack(tg.PGDAT(), tg.CLAT(start_epoch=1, lr="restart"))},
            "CLAT lr='restart' has no effect on Lightning's schedulers",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, module, callback, message):
    clat = CLATCallback(callback.pop("method", tg.CLAT(k=1)), attack=PGD, **callback)

    with pytest.raises(tg.InputError) as told:
        trainer(tmp_path, clat, epochs=2).fit(module(), loader())

    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_images_that_were_normalised_by_the_data_set_are_refused(tmp_path):
    x, y = images().tensors
    normalised = DataLoader(TensorDataset((x - 0.5) / 0.2, y), batch_size=16)

    with pytest.raises(tg.InputError, match="normalisation"):
        trainer(tmp_path, CLATCallback(tg.PGDAT(), attack=PGD)).fit(Classifier(), normalised)


def test_two_processes_under_ddp_train_as_one_does(tmp_path):
    worker = Path(__file__).with_name("lightning_together.py")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(worker), str(tmp_path / "two")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    fit(tmp_path / "one", 1)

    one, first, second = (torch.load(tmp_path / name) for name in ("one/0.pt", "two/0.pt", "two/1.pt"))

    assert len(set(one["selected"].values())) > 1, "layers change, or the test shows nothing"
    assert first["selected"] == second["selected"] == one["selected"]
    assert first["trained"] == second["trained"] == [[f"{name}.weight" for name in n] for n in one["selected"].values()]
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
        torch.testing.assert_close(value, one["weights"][name], rtol=1e-4, atol=1e-5)
