"""What a release holds: the package, its recipes and its type marker; from the wheel and from the sources alike."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import toughen

pytest.importorskip("hatchling", reason='needs the builder: pip install "toughen[test]"')
ROOT = Path(__file__).parents[1]


def build(project: Path, target: Path) -> None:
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", target], cwd=project, check=True)


def names(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("toughen/")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("dist")
    build(ROOT, target)
    return target


def test_the_wheel_holds_every_module_recipe_and_the_type_marker(built: Path) -> None:
    [wheel] = built.glob(f"toughen-{toughen.__version__}-*.whl")
    files = (file for file in (ROOT / "src").rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    expected = {file.relative_to(ROOT / "src").as_posix() for file in files}
    assert names(wheel) == expected
    assert {"toughen/py.typed", "toughen/recipes/digits.yaml"} <= expected


def test_the_sources_build_the_same_wheel(built: Path, tmp_path: Path) -> None:
    [sources] = built.glob(f"toughen-{toughen.__version__}.tar.gz")
    with tarfile.open(sources) as archive:
        archive.extractall(tmp_path, filter="data")
    [project] = tmp_path.iterdir()
    build(project, tmp_path / "dist")
    [again], [wheel] = (tmp_path / "dist").glob("*.whl"), built.glob("*.whl")
    assert names(again) == names(wheel)
    assert (project / "tests").is_dir()
