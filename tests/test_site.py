"""The documentation site builds without a warning, and its notebooks run from top to bottom."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path: Path) -> None:
    for package in ("myst_nb", "furo", "sphinx_copybutton"):
        pytest.importorskip(package, reason='needs Sphinx: pip install "toughen[docs]"')
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E", "-d", tmp_path / "trees"]
    built = subprocess.run([*command, ROOT / "docs", tmp_path / "site"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = {file.relative_to(ROOT / "docs").with_suffix(".html") for file in (ROOT / "docs").rglob("*.md")}
    assert [str(page) for page in pages if not (tmp_path / "site" / page).is_file()] == []
    assert not any('src="http' in page.read_text() for page in (tmp_path / "site").rglob("*.html")), "not offline"
    criticality = (tmp_path / "site" / "reference" / "criticality.html").read_text()
    assert "toughen.criticality.analyze" in criticality
    assert "Eq. 3" in criticality


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[file.stem for file in NOTEBOOKS])
def test_a_notebook_runs_from_top_to_bottom(notebook: Path, tmp_path: Path) -> None:
    pytest.importorskip("nbclient", reason='needs Jupyter: pip install "toughen[docs]"')
    pytest.importorskip("ipykernel", reason='needs Jupyter: pip install "toughen[docs]"')
    script = "import sys; from nbclient import execute; from nbformat import read; execute(read(sys.argv[1], 4))"
    command = [sys.executable, "-c", script, notebook]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
