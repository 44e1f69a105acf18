"""The page about runs in a real browser: nothing asked for, nothing complained of, values as in the files."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from written_runs import SETTINGS, make_family, result, write_examples, write_selection

from toughen.report import report_page
from toughen.run_folder import RunFolder

webdriver = pytest.importorskip("selenium.webdriver", reason='needs selenium: pip install "toughen[test]"')
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync", "no-first-run")
EVIL = "<img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with two branches, of which every figure can be made; its name and its layers are hostile."""
    run = make_family(tmp_path_factory.mktemp("runs") / EVIL.replace("/", ""), base=0.4, clat=0.3)
    clat = run.branch("clat")
    write_selection(clat, 30, {"conv1": 0.5, EVIL: 2.25, "fc": 9.0}, [EVIL])
    write_selection(clat, 40, {"conv1": 0.75, EVIL: 3.5, "fc": 9.0}, ["conv1"])
    write_examples(clat.examples("last"), [EVIL, "dog"])
    clat.strength("last").mkdir(parents=True)
    for value, accuracy in ((0.1, 0.625), (0.2, 0.25)):
        name = f"pgd-20:eps={value}"
        content = {"attack": name, **result(accuracy, settings=SETTINGS, n=1000)}
        (clat.strength("last") / f"{value}.json").write_text(json.dumps(content))
    return run


@pytest.fixture(scope="module")
def browser(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page, open."""
    matrix = {"attack": "pgd-20", "n": 100, "names": ["a", EVIL], "accuracy": [[0.1, 0.42], [0.5, 0.2]]}
    folder = tmp_path_factory.mktemp("page")
    (folder / "report.html").write_text(report_page([run], matrices=[matrix]), encoding="utf-8")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"user-data-dir={folder / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    opened.get((folder / "report.html").as_uri())
    yield opened
    opened.quit()


def screen(browser: Any, *, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_nothing_is_asked_for_and_nothing_complained_of(browser: Any) -> None:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        m["params"]["request"]["url"].partition(":")[0] for m in messages if m["method"] == "Network.requestWillBeSent"
    }
    assert asked - {"chrome"} == {"file", "data"}  # the browser begins with a page of its own
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "DEBUG"] == []


def test_names_are_shown_and_never_run(browser: Any) -> None:
    assert "owned" in browser.title.partition(":")[0]  # as a part of the name
    assert browser.title != "owned"
    assert browser.execute_script("return document.querySelectorAll('[onerror]').length") == 0
    assert EVIL in browser.find_element("css selector", "#criticality").text


def test_every_figure_is_there_and_has_a_size(browser: Any) -> None:
    screen(browser, width=1200)
    for section, figures in {"training": 3, "losses": 3, "strength": 1}.items():
        plots = browser.find_elements("css selector", f"#{section} svg.plot")
        assert len(plots) == figures
        assert all(plot.size["width"] > 200 and plot.size["height"] > 100 for plot in plots)
    for section in ("criticality", "transfer"):
        assert len(browser.find_elements("css selector", f"#{section} table.heat td")) == 4
    images = browser.find_elements("css selector", "#examples img")
    assert len(images) == 6
    assert all(browser.execute_script("return arguments[0].naturalWidth", image) == 4 for image in images)


def shown_values(figure: Any) -> list[float]:
    return [
        float(found.get_attribute("data-value"))
        for found in figure.find_elements("css selector", ".tip dd[data-value]")
    ]


@pytest.mark.parametrize("by", ["pointer", "keyboard"])
def test_values_at_a_place_are_those_of_the_log(browser: Any, run: RunFolder, by: str) -> None:
    screen(browser, width=1200)
    figure = browser.find_elements("css selector", "#training figure.chart")[2]
    assert figure.get_attribute("aria-label").endswith("/clat")
    plot = figure.find_element("css selector", "svg.plot")
    log = [*run.log(), *run.branch("clat").log()]
    expected = [log[-1][part][kind] for kind in ("clean", "robust") for part in ("validation", "training")]
    if by == "pointer":
        actions = webdriver.ActionChains(browser)
        actions.move_to_element_with_offset(plot, plot.size["width"] // 2 - 12, 0).perform()
        assert shown_values(figure) == expected
        actions.move_to_element(browser.find_element("tag name", "h1")).perform()
        assert not figure.find_element("css selector", ".tip").is_displayed()
    else:
        plot.send_keys("")  # focus
        assert shown_values(figure) == expected
        plot.send_keys("\ue012")  # the left arrow
        before = [log[-2][part][kind] for kind in ("clean", "robust") for part in ("validation", "training")]
        assert shown_values(figure) == before
        plot.send_keys("\ue00c")  # escape
        assert not figure.find_element("css selector", ".tip").is_displayed()


def test_a_strength_curve_shows_the_accuracies_of_the_evaluations(browser: Any) -> None:
    figure = browser.find_element("css selector", "#strength figure.chart")
    figure.find_element("css selector", "svg.plot").send_keys("\ue011")  # home
    assert shown_values(figure) == [0.625]
    assert "62.5 %" in figure.find_element("css selector", ".tip").text


def test_shaded_cells_hold_the_values_of_the_reports(browser: Any, run: RunFolder) -> None:
    cells = browser.find_elements("css selector", "#criticality table.heat td")
    reports = run.branch("clat").reports()
    expected = [reports[epoch]["layers"][layer]["criticality"] for layer in (0, 1) for epoch in (30, 40)]
    assert [float(cell.get_attribute("data-value")) for cell in cells] == expected
    assert [cell.get_attribute("class") for cell in cells] == ["", "marked", "marked", ""]


def test_a_dark_screen_has_a_dark_page(browser: Any) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        screen(browser, width=1200, scheme=scheme)
        colour = browser.find_element("tag name", "body").value_of_css_property("background-color")
        seen[scheme] = sum(int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    assert seen["dark"] < 150 < 700 < seen["light"]


def test_a_phone_needs_no_sideways_scrolling(browser: Any) -> None:
    screen(browser, width=360)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360


def test_everything_wide_can_be_reached_by_keyboard(browser: Any) -> None:
    wide = browser.find_elements("css selector", ".scroll, svg.plot")
    assert wide
    assert all(found.get_attribute("tabindex") == "0" for found in wide)
