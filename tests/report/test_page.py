"""The page about runs, as its text tells; how it behaves in a browser is in test_browser.py."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from written_runs import (
    SETTINGS,
    make,
    make_family,
    result,
    row,
    write_evaluation,
    write_examples,
    write_selection,
)

from toughen.cli import main
from toughen.errors import InputError
from toughen.report import report_page
from toughen.run_folder import RunFolder

SECTIONS = [
    "accuracy",
    "training",
    "criticality",
    "losses",
    "strength",
    "transfer",
    "examples",
    "flags",
    "cost",
    "repeat",
]
MATRIX = {"attack": "pgd-20", "n": 100, "names": ["a", "b"], "accuracy": [[0.1, 0.42], [0.5, 0.2]]}


class Elements(HTMLParser):
    """The elements of a page: name and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def text(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def charts(page: str) -> list[dict]:
    return [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', page)]


def test_the_headline_table_is_that_of_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_family(tmp_path / "run", base=0.4, clat=0.3)
    assert main(["compare", str(run.path)]) == 0
    told = [word for word in capsys.readouterr().out.split() if not set(word) <= set("─━")]
    assert "43.4" in told
    assert set(told) - set(html.unescape(text(report_page([run]))).split()) == set()


def test_every_section_is_there_and_what_was_not_measured_names_its_command(tmp_path: Path) -> None:
    page = report_page([make(tmp_path / "run")])
    assert [attributes["id"] for name, attributes in Elements(page).found if name == "section"] == SECTIONS
    for command in ("toughen analyze", "--over eps=", "toughen transfer RUN RUN --json", "--again"):
        assert command in text(page)


def test_accuracy_over_epochs_begins_with_the_run_that_a_branch_continues(tmp_path: Path) -> None:
    run = make(tmp_path / "run", branches=("clat",))
    make(run.branch("clat").path).write_log([row(4), row(5)])
    _, branch, *_ = charts(report_page([run]))
    lines = {line["name"]: line["points"] for line in branch["lines"]}
    assert lines["robust, validation"] == [[epoch, 0.05 * epoch] for epoch in range(1, 6)]
    assert lines["clean, training"] == [[epoch, 0.12 * epoch] for epoch in range(1, 6)]


def test_loss_terms_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.write_log([row(1), row(2, losses={"loss": float("nan"), "clean_ce": 1.0}), row(3)])
    losses = charts(report_page([run]))[-1]
    assert [x for x, _ in losses["lines"][0]["points"]] == [1, 3]


def test_criticality_is_shown_by_layer_and_selection_with_the_selected_framed(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    write_selection(run, 0, {"conv1": 0.5, "conv2": 2.0, "fc": 9.0}, ["conv2"])
    write_selection(run, 10, {"conv1": None, "conv2": 8.0, "fc": 9.0}, ["conv2"])
    cells = [a for name, a in Elements(report_page([run])).found if name == "td" and "data-value" in a]
    assert [cell["data-value"] for cell in cells] == ["0.5", "", "2.0", "8.0"]
    assert [cell.get("title") for cell in cells] == [None, None, "selected", "selected"]
    assert [cell["style"] for cell in cells] == [f"--shade: {v}" for v in ("0.000", "0.000", "0.500", "1.000")]


def test_strength_curves_are_read_from_what_over_kept(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    for value, accuracy in (("2/255", 0.6), ("8/255", 0.3)):
        name = f"pgd-20:eps={value}"
        write = {"attack": name, **result(accuracy, settings=SETTINGS, n=100)}
        run.strength("last").mkdir(parents=True, exist_ok=True)
        (run.strength("last") / f"{accuracy}.json").write_text(json.dumps(write))
    [curve] = [chart for chart in charts(report_page([run])) if chart["x_label"] == "eps"]
    assert curve["lines"][0]["points"] == [[pytest.approx(2 / 255), 0.6], [pytest.approx(8 / 255), 0.3]]


def test_images_stand_with_what_the_network_says_and_mistakes_are_marked(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    write_examples(run.examples("last"), ["cat", "dog"])
    page = report_page([run])
    assert len([1 for name, a in Elements(page).found if name == "img" and a["src"].startswith("data:image/png")]) == 6
    assert re.findall(r'<span class="wrong">(.*?)</span>', page) == ["cat"]
    assert "&times;5" in text(page)  # the attack moves by 0.1


def test_runs_that_cannot_be_compared_stand_apart_and_the_page_says_why(tmp_path: Path) -> None:
    page = text(report_page([make(tmp_path / "a"), make(tmp_path / "b", data="cifar10")]))
    assert "Not comparable." in page
    assert ". The runs stand apart below." in page
    assert "were evaluated on different test images" in page
    assert page.count("accuracy on 1000 test images") == 2


def test_flags_are_shown_once_for_an_evaluation(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    flag = {"check": "zero-gradients", "seen": "7 % of gradients are zero", "advice": "attack without gradients"}
    for attack in ("clean", "pgd-20"):
        write_evaluation(run, "last", attack, result(0.5, settings={} if attack == "clean" else SETTINGS, flags=[flag]))
    page = text(report_page([run]))
    assert page.count("7 % of gradients are zero; attack without gradients") == 1
    assert "Nothing was seen" not in page


def test_what_a_run_is_called_is_text_wherever_it_stands(tmp_path: Path) -> None:
    evil = "</script><script>document.title='owned'</script>"
    run = make(tmp_path / "<img src=x onerror=alert(1)>", recipe=evil)
    run.write_log([row(1, method=evil, losses={evil: 1.0, "b": 2.0, "c": 3.0})])
    write_selection(run, 0, {evil: 1.0, "fc": 2.0}, [evil])
    write_examples(run.examples("last"), [evil, "dog"])
    flag = {"check": evil, "seen": evil, "advice": evil}
    write_evaluation(run, "last", "clean", result(0.5, flags=[flag]))
    page = report_page([run], matrices=[{**MATRIX, "names": [evil, "b"], "attack": evil}])
    found = Elements(page).found
    assert [a.get("type") for name, a in found if name == "script"] == ["application/json"] * 3 + [None]
    assert not any("onerror" in a for _, a in found)
    assert "owned" in text(page)


def test_the_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    run = make_family(tmp_path / "run", base=0.4)
    page = report_page([run], matrices=[MATRIX])
    for name, attributes in Elements(page).found:
        for key in ("src", "href", "action", "data"):
            assert str(attributes.get(key, "#")).startswith(("#", "data:")), name
    assert "url(" not in page
    [policy] = [a["content"] for name, a in Elements(page).found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:")


@pytest.mark.parametrize("several", [False, True])
def test_the_page_is_written_into_the_run_or_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], several: bool
) -> None:
    runs = [make(tmp_path / name, recipe=name) for name in ("one", "two")][: 1 + several]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["report", *(str(run.path) for run in runs)]) == 0
    file = Path("report.html") if several else runs[0].path / "report.html"
    assert str(file) in capsys.readouterr().err
    assert file.read_text().lstrip().startswith("<!doctype html>")


def test_a_transfer_matrix_is_read_from_its_file(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    (tmp_path / "transfer.json").write_text(json.dumps({"pgd-20": MATRIX}))
    words = ["report", str(run.path), "--transfer", str(tmp_path / "transfer.json"), "--out", str(tmp_path / "x.html")]
    assert main(words) == 0
    cells = [a for name, a in Elements((tmp_path / "x.html").read_text()).found if name == "td" and "data-value" in a]
    assert [(cell["data-value"], cell.get("title")) for cell in cells] == [
        ("0.1", "white-box"),
        ("0.42", None),
        ("0.5", None),
        ("0.2", "white-box"),
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--transfer", "no.json"], "can't read no.json"),
        (["--transfer", "list.json"], "list.json holds no transfer matrix; give what `toughen transfer --json` wrote"),
        (["--out", "page.pdf"], "its name must end in .html"),
        (["--out", "no/page.html"], "there is no folder no"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    run = make(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[1]")
    assert main(["report", str(run.path), *words]) == 2
    told = capsys.readouterr().err
    assert expected in told
    assert len(told.splitlines()) == 1


def test_damaged_images_are_named(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    write_examples(run.examples("last"), ["cat"])  # a label without a class
    with pytest.raises(InputError, match=r"last\.safetensors is damaged: it holds no example images"):
        report_page([run])
    run.examples("last").write_bytes(b"no")
    with pytest.raises(InputError, match=r"last\.safetensors is damaged"):
        report_page([RunFolder(run.path)])
