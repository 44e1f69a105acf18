"""The documentation is executed: Python blocks run, recipe fragments resolve, links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from documented_commands import check, commands
from small_runs import train
from toughen.config import read_document, resolve
from toughen.sweep import read_sweep

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# what the code of a page needs beyond the package itself
EXTRAS = {"docs/integrations.md": ("lightning", "onnxruntime", "transformers")}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")  # Lightning's
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=ids)
def test_the_python_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in EXTRAS.get(ids(page), ()):
        pytest.importorskip(package, reason=f"{package} is not installed; the extra test has it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    namespace: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=ids)
def test_the_recipe_fragments_of_a_page_resolve(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    for block in blocks(page, "yaml"):
        if "runs:" in block:  # a sweep
            (tmp_path / "sweep.yaml").write_text(block)
            assert len(read_sweep(str(tmp_path / "sweep.yaml")).runs) > 1
            continue
        resolve({**read_document("cifar10_resnet18_pgdat_clat"), **yaml.safe_load(block)})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "mine").path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=ids)
def test_the_commands_of_a_page_name_what_there_is(
    page: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    for block in blocks(page, "sh"):
        for words in commands(block):
            check(words, run)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_block_of_a_page_says_what_it_is(page: Path) -> None:
    """Python and YAML are run, shell is checked, text is shown; what is in braces belongs to the site."""
    fences = re.findall(r"^```(.*)$", page.read_text(), flags=re.MULTILINE)
    assert {kind for kind in fences[::2] if not kind.startswith("{")} <= {"python", "yaml", "sh", "text"}
    assert set(fences[1::2]) <= {""}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_the_links_of_a_page_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())

    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_a_page_has_no_gap_left_to_fill(page: Path) -> None:
    assert re.findall(r"@@|TODO|TBD", page.read_text()) == []
