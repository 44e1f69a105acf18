"""The live wrapper: whatever it does not change is the inner method's."""

from toughen.attacks import PGD
from toughen.criticality.selection import Selection
from toughen.methods import CLAT, LiveWrapper
from toughen.objectives import PGDAT, Live
from toughen.types import ThreatModel
from zoo import build, images

X, Y = images(4)
PGD2 = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=2)
# what is made of the others, and so need not be passed on
DERIVED = {"on", "named_parameters", "parameters", "trainable"}


def test_a_live_wrapper_passes_on_everything_that_a_live_method_can_be_asked():
    asked = {name for name in vars(Live) if not name.startswith("_")} - DERIVED
    assert asked <= set(vars(LiveWrapper))


def test_clat_passes_on_the_selection_of_its_inner_method_while_none_of_its_own_is_due():
    class Chooser(LiveWrapper):
        def epoch_start(self, epoch, probe=(), *, optimizer=None):
            return Selection(epoch, ("head",), None)

    model = build("normed")
    live = CLAT(k=1, start_epoch=1).bind(model, attack=PGD2, inner=Chooser(PGDAT().bind(model, attack=PGD2)))
    assert live.epoch_start(0, [(X, Y)]).layers == ("head",)
    assert live.epoch_start(1, [(X, Y)]).layers == live.selected
