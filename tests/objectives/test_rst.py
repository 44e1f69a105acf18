"""Robust self-training: TRADES on images of which some have no label."""

import pytest
import torch

from objective_checks import MISSING, UNDER_CLAT, X_ADV, X, Y, assert_resumes, assert_trains, found, sharp
from small_runs import recipe
from toughen.engine import Trainer
from toughen.errors import InputError
from toughen.layers import ModelView
from toughen.objectives import METHODS, RST, TRADES
from toughen.types import AdversarialBatch, Batch


def test_where_every_image_has_a_label_it_is_trades():
    (rst, gradient), (trades, expected) = found(RST()), found(TRADES())
    assert torch.equal(rst.loss, trades.loss)
    assert all(torch.equal(a, b) for a, b in zip(gradient, expected, strict=True))


def test_images_without_a_label_add_to_the_divergence_and_not_to_the_cross_entropy():
    model = sharp().eval()

    def terms(x, y, x_adv):
        return RST().loss(ModelView(model), AdversarialBatch(Batch(x.double(), y), x_adv.double())).terms

    labelled = MISSING >= 0
    mixed, alone = terms(X, MISSING, X_ADV), terms(X[labelled], Y[labelled], X_ADV[labelled])
    torch.testing.assert_close(mixed["clean_ce"], alone["clean_ce"])
    torch.testing.assert_close(mixed["kl"], terms(X, Y, X_ADV)["kl"])
    assert not torch.allclose(mixed["kl"], alone["kl"], rtol=1e-3)


def test_its_defaults_and_label_are_the_published_ones():
    assert METHODS["rst"] is RST
    assert (RST().label, RST(label_smoothing=0.2).label) == ("RST", "RST (label smoothing 0.2)")
    assert RST() == RST(beta=6.0, start="gaussian", label_smoothing=0.0, target_grad="keep")
    assert RST.reads_unlabelled


def test_it_needs_extra_images(tmp_path):
    with pytest.raises(InputError, match=r"RST trains on extra images; name their file as data\.extra\.path"):
        Trainer(recipe(method=[{"name": "rst"}]), out=tmp_path).fit()


def test_settings_out_of_range_are_refused_by_its_own_name():
    with pytest.raises(InputError, match=r"rst beta is -2\.0; it must be a finite number >= 0"):
        RST(beta=-2.0)


@UNDER_CLAT
def test_it_trains_alone_and_under_clat_and_resumes(clat):
    assert_trains(RST(), *clat)
    assert_resumes(RST(), *clat)
