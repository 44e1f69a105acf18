"""The documentation is executed: Python blocks run, recipe fragments resolve, links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from toughen.config import read_document, resolve

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
def test_the_recipe_fragments_of_a_page_resolve(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    for block in blocks(page, "yaml"):
        resolve({**read_document("cifar10_resnet18_pgdat_clat"), **yaml.safe_load(block)})


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_the_links_of_a_page_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())

    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_a_page_has_no_gap_left_to_fill(page: Path) -> None:
    assert re.findall(r"@@|TODO|TBD", page.read_text()) == []
