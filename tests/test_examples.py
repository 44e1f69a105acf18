"""Every file in ``examples/`` runs, and does what its first lines say."""

import importlib

import pytest


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(request.config.rootpath / "examples")


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_clat_in_lightning(capsys):
    pytest.importorskip("lightning", reason="Lightning is not installed: toughen[lightning]")

    robust = importlib.import_module("lightning_clat").main()

    assert robust > 0.3
    assert "from epoch 2 on: layer" in capsys.readouterr().out


def test_clat_in_the_hugging_face_trainer(capsys):
    pytest.importorskip("transformers", reason="transformers is not installed: toughen[transformers]")

    robust = importlib.import_module("huggingface_trainer").main()

    assert robust > 0.3
    assert "from epoch 12 on: net." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["plain_loop", "timm_model", "timm_task"])
def test_clat_in_a_loop_of_ones_own(name, capsys):
    robust = importlib.import_module(name).main()

    assert robust > 0.3
    assert "from epoch 4 on: " in capsys.readouterr().out
