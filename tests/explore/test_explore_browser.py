"""The explorer page in a real browser; run by scripts/quality/check_browser.sh."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import pytest
from explore_pages import recipe_texts
from explore_tables import TWENTY_SCHEMES, WALL, write_explore_table
from typer.testing import CliRunner

from mofq.cli.commands import app
from mofq.decision import Budgets, Request, decide
from mofq.decision.model_error import row_error
from mofq.decision.recipe import load_recipe, write_recipe
from mofq.evidence.table import read_table

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = pytest.mark.browser

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=document.title='taken'>."
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


def program(variable: str, name: str) -> str:
    path = os.environ.get(variable) or shutil.which(name)
    assert path, f"{name} is not installed; install Debian's, or name one with {variable}"
    return path


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[Chrome]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program("MOFQ_CHROMIUM", "chromium")
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    service = webdriver.ChromeService(program("MOFQ_CHROMEDRIVER", "chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    """Two corpora, names that are markup, a recipe to compare and a measurement."""
    path = write_explore_table(folder / "table.jsonl", corpora=("en", "pt"), prefix=HOSTILE)
    recipe = decide(read_table(path), Request(Budgets(max_bits=5.0))).recipe
    write_recipe(recipe, folder / "mine.yaml")
    validation = {
        "version": 1,
        "index_sha256": "a" * 64,
        "candidate": "mine.yaml",
        "text": "demo-en",
        "bits_per_weight": 5.0,
        "kl_nats_per_token": 0.01,
        "kl_stderr": 0.001,
    }
    (folder / "validation.json").write_text(json.dumps(validation))
    return explore(path, folder / "mine.yaml", "--validation", folder / "validation.json")


@pytest.fixture(scope="module")
def cached_page(folder: Path) -> Path:
    """The KV cache of 2000 tokens is part of the budget, and a recipe has one."""
    path = write_explore_table(folder / "cached.jsonl", caches=True)
    request = Request(Budgets(max_bits=5.0, max_kv_bits=7.0), kv_cache=True)
    write_recipe(decide(read_table(path), request).recipe, folder / "cached.yaml")
    return explore(path, folder / "cached.yaml", "--kv-tokens", "2000")


@pytest.fixture(scope="module")
def large_page(folder: Path) -> Path:
    path = write_explore_table(
        folder / "large.jsonl", decoder_layers=80, schemes=TWENTY_SCHEMES, size=8192
    )
    return explore(path)


def explore(table: Path, *arguments: object) -> Path:
    output = table.with_suffix(".html")
    result = CliRunner().invoke(
        app, ["explore", str(table), *map(str, arguments), "-o", str(output)]
    )
    assert result.exit_code == 0, result.output
    return output


def open_page(browser: Chrome, page: Path, *, width: int = 1280, dark: bool = False) -> None:
    browser.get_log("performance")
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 720}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(page.as_uri())


def requests(browser: Chrome) -> list[str]:
    messages = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    return [
        one["params"]["request"]["url"]
        for one in messages
        if one["method"] == "Network.requestWillBeSent"
    ]


def run(browser: Chrome, script: str, *arguments: object) -> Any:
    script = script.replace("texts)", "(one) => one.textContent)")
    return browser.execute_script(script, *arguments)  # type: ignore[no-untyped-call]


def text_of(browser: Chrome, selector: str) -> str:
    return str(run(browser, "return document.querySelector(arguments[0]).textContent", selector))


def colours(browser: Chrome) -> list[str]:
    script = "return [...document.querySelectorAll('.cell')].map((one) => one.style.background)"
    return list(run(browser, script))


def slide(browser: Chrome, point: int) -> None:
    script = (
        "const slider = document.getElementById('slider'); slider.value = arguments[0];"
        "slider.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    run(browser, script, str(point))


def download(browser: Chrome, folder: Path) -> bytes:
    target = folder / "recipe.yaml"
    target.unlink(missing_ok=True)
    # A real click: a browser asks before a script saves several files.
    browser.find_element("id", "download").click()
    end = monotonic() + 60
    while not target.exists():
        assert monotonic() < end, "the browser saved no recipe.yaml"
        sleep(0.05)
    return target.read_bytes()


def wait_for_nothing_on_the_console(browser: Chrome) -> None:
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_asks_for_nothing_complains_of_nothing_and_fits(
    browser: Chrome, page: Path, width: int, dark: bool
) -> None:
    open_page(browser, page, width=width, dark=dark)
    run(browser, "document.querySelectorAll('.cell')[4].click()")
    sleep(0.2)
    sent = [url for url in requests(browser) if not url.startswith("data:")]
    assert sent == [page.as_uri()]
    wait_for_nothing_on_the_console(browser)
    assert run(browser, "return document.documentElement.scrollWidth") <= width
    assert run(browser, "return document.querySelector('#chart canvas').width") > 250
    light = run(browser, "return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, light[4:-1].split(","))) < 150) == dark


def test_names_stay_text(browser: Chrome, page: Path) -> None:
    open_page(browser, page)
    run(browser, "document.querySelectorAll('.cell')[0].click()")
    assert HOSTILE in text_of(browser, "#panel-body")
    assert browser.title == "Tiny/model · mofq"
    assert run(browser, "return document.querySelectorAll('img').length") == 0
    wait_for_nothing_on_the_console(browser)


def test_the_slider_changes_map_command_and_recipe(
    browser: Chrome, page: Path, folder: Path
) -> None:
    open_page(browser, page)
    last = int(run(browser, "return document.getElementById('slider').max"))
    seen = []
    for point in (0, last // 3, last // 2, last):
        slide(browser, point)
        run(browser, "document.getElementById('show').value = 'frontier'")
        run(browser, "document.getElementById('show').dispatchEvent(new Event('change'))")
        command = text_of(browser, "#command")
        saved = download(browser, folder)
        assert saved == written_by(command, folder)
        assert len(load_recipe(folder / "recipe.yaml").groups) == 12
        seen.append((tuple(colours(browser)), command, saved))
    assert len({one[0] for one in seen}) == len({one[2] for one in seen}) == 4
    wait_for_nothing_on_the_console(browser)


@pytest.mark.parametrize("name", ["page", "cached_page"])
def test_the_script_writes_recipes_as_mofq_search_does(
    browser: Chrome, name: str, request: pytest.FixtureRequest
) -> None:
    open_page(browser, request.getfixturevalue(name))
    texts = run(browser, "return points.map((_, number) => recipeText(number))")
    assert len(texts) > 20
    data = json.loads(run(browser, "return JSON.stringify(data)"))
    assert texts == list(recipe_texts(data))


def written_by(command: str, folder: Path) -> bytes:
    """What the command that the page shows writes."""
    words = command.split(" ")
    output = folder / "by_command.yaml"
    assert (words[0], words[-2:]) == ("mofq", ["-o", "recipe.yaml"])
    result = CliRunner().invoke(app, [*words[1:-1], str(output)])
    assert result.exit_code == 0, result.output
    return output.read_bytes()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_slider_stays_where_it_is_while_it_moves_and_while_the_page_scrolls(
    browser: Chrome, page: Path, width: int
) -> None:
    open_page(browser, page, width=width)
    place = "return document.getElementById('slider').getBoundingClientRect().top"
    tops = []
    for point in (0, 9, 18, 27):
        slide(browser, point)
        sleep(0.1)
        tops.append(run(browser, place))
    assert len(set(tops)) == 1
    run(browser, "scrollTo(0, 700)")
    assert 0 <= run(browser, place) < 60


def test_a_typed_budget_goes_to_the_last_point_that_fits(browser: Chrome, page: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    open_page(browser, page)
    bits = [one["bits_per_weight"] for one in run(browser, "return points")]
    field = browser.find_element(By.ID, "bits")
    for typed, expected in (("6", max(b for b in bits if b <= 6)), ("1", bits[0])):
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(typed, Keys.ENTER)
        assert run(browser, "return points[state.point].bits_per_weight") == expected
    assert "smallest" in text_of(browser, "#bits-note")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("many", Keys.ENTER)
    assert "number" in text_of(browser, "#bits-note")


def test_every_control_is_reached_and_the_map_is_walked_with_the_keyboard(
    browser: Chrome, page: Path
) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    open_page(browser, page)
    reached = set()
    for _ in range(60):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        active = "const a = document.activeElement; return a.id || a.classList[0] || a.tagName"
        reached.add(run(browser, active))
        if "cell" in reached:
            break
    assert reached >= {"theme", "log", "whole", "slider", "bits", "download", "copy", "cell"}
    keys = ActionChains(browser).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    keys.send_keys(Keys.ENTER).perform()
    assert text_of(browser, "#panel-title") == "layers.1.attn.o"
    assert not run(browser, "return document.getElementById('tip').hidden")
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert run(browser, "return document.getElementById('tip').hidden")


def choose(browser: Chrome, menu: str, value: str) -> None:
    script = (
        "const menu = document.getElementById(arguments[0]); menu.value = arguments[1];"
        "menu.dispatchEvent(new Event('change'))"
    )
    run(browser, script, menu, value)


def test_the_page_opens_at_the_size_of_the_named_recipe_and_compares_nothing(
    browser: Chrome, page: Path
) -> None:
    open_page(browser, page)
    assert run(browser, "return [state.show, state.compare]") == ["frontier", "none"]
    named = run(browser, "return data.references.find((one) => one.kind === 'recipe').at")
    assert run(browser, "return state.point === pointAt(arguments[0])", named)
    assert (
        run(browser, "return document.querySelectorAll('.cell:is(.differs, .faded)').length") == 0
    )
    assert run(browser, "return document.getElementById('differences').hidden")


def test_a_compared_recipe_shows_where_it_differs(browser: Chrome, page: Path) -> None:
    open_page(browser, page)
    number = run(browser, "return data.references.findIndex((one) => one.kind === 'recipe')")
    choose(browser, "show", f"reference:{number}")
    choose(browser, "compare", "frontier")
    slide(browser, 0)
    marked = run(browser, "return document.querySelectorAll('.cell.differs').length")
    rows = run(browser, "return document.querySelectorAll('#differences tbody tr').length")
    assert marked == rows > 0
    assert f"{marked} of 12 fusion groups differ" in text_of(browser, "#differences-summary")


def test_a_recipe_has_one_row_with_its_prediction_and_its_measurement(
    browser: Chrome, page: Path
) -> None:
    open_page(browser, page)
    rows = run(
        browser,
        "return [...document.querySelectorAll('#points tbody tr')].map("
        "(row) => [...row.children].map(texts))",
    )
    (mine,) = [row for row in rows if row[0].startswith("mine")]
    assert mine[:2] == ["mine.yaml", "exact"]
    assert mine[3].startswith("0.00")
    assert mine[4] == "0.0100 ± 0.0010 on demo-en"
    named = run(browser, "return marks().filter((one) => !one.isNamed).map((one) => one.label)")
    assert named.count("mine.yaml") == 1


def test_numbers_have_one_notation(browser: Chrome, page: Path) -> None:
    open_page(browser, page)
    texts = "return arguments[0].map(([value, stderr]) => withError(value, stderr))"
    pairs = [[0.0169, 0.00027], [0.004381, 0.0000695], [1.58e-6, 2.7e-7], [0.0123, None], [0, 0]]
    assert run(browser, texts, pairs) == [
        "0.01690 ± 0.00027",
        "0.004381 ± 0.000069",
        "0.00000158 ± 0.00000027",
        "0.0123",
        "0",
    ]
    assert run(browser, texts, [[1.5e-7, 2e-8], [123456, 7]]) == [
        "(1.50 ± 0.20)·10⁻⁷",
        "(1.234560 ± 0.000070)·10⁵",
    ]


def test_a_row_is_shown_with_the_interval_that_the_command_line_says(
    browser: Chrome, page: Path
) -> None:
    open_page(browser, page)
    error, sampling = 0.01, 0.0005
    half = 2 * math.hypot(sampling, row_error().stderr(error))
    text = run(browser, "return rowText(...arguments[0])", [error, sampling])
    assert text == f"{error:.4f} ± {half:.4f}"
    shown = run(browser, "return tipOfCell(0), document.getElementById('tip').textContent")
    first = run(
        browser,
        "const error = optionError(sortedOptions(0)[0]), known = optionStderr(sortedOptions(0)[0]);"
        "return withInterval(error, rowStderr(error, known))",
    )
    assert "KL, 95 %" in shown
    assert first in shown


def test_rows_larger_than_any_that_was_compared_with_a_measurement_are_marked(
    browser: Chrome, page: Path
) -> None:
    open_page(browser, page)
    show = "openPanel(0); return document.getElementById('panel-body').textContent"
    note = "more than any single layer was compared with a measurement at"
    assert "†" not in run(browser, show)
    run(browser, "data.row_error.largest = 1e-9")
    marked = run(browser, show)
    assert "† Above 1e-9 nats per token" in marked
    assert note in marked
    assert marked.count("†") > 2


def test_recipes_at_one_place_have_one_label_there(browser: Chrome, page: Path) -> None:
    open_page(browser, page)
    script = (
        "const labels = []; for (const [text, x, colour] of arguments[0])"
        " addLabel(labels, text, [x, 5], colour, 1); return labels.map((one) => one.text)"
    )
    marks = [["b", 10, "red"], ["a", 11, "red"], ["c", 11, "blue"], ["d", 40, "red"]]
    assert run(browser, script, marks) == ["a, b", "c", "d"]


@pytest.mark.parametrize("name", ["page", "cached_page"])
def test_a_narrow_page_cuts_nothing_off(
    browser: Chrome, name: str, request: pytest.FixtureRequest
) -> None:
    open_page(browser, request.getfixturevalue(name), width=390)
    run(browser, "document.querySelectorAll('.cell')[4].click()")
    choose(browser, "compare", "reference:0")
    wider = (
        "return [...document.querySelectorAll('main *:not(#chart *, input)')].filter("
        "(one) => one.clientWidth && one.scrollWidth > one.clientWidth + 1).map("
        "(one) => one.id || one.className || one.tagName)"
    )
    assert run(browser, wider) == []


def test_the_panel_shows_the_walls_of_weights_and_inputs(browser: Chrome, page: Path) -> None:
    open_page(browser, page)
    run(browser, "document.querySelectorAll('.cell')[0].click()")
    titles = run(browser, "return [...document.querySelectorAll('.profile strong')].map(texts)")
    inputs = "inputs of q_proj, k_proj, v_proj"
    weights = [f"{name} weights" for name in ("q_proj", "k_proj", "v_proj")]
    assert titles == [*weights, f"{inputs}, en", f"{inputs}, pt"]
    walls = run(browser, "return [...document.querySelectorAll('.profile .walls')].map(texts)")
    assert [text.startswith("highest channel 4") for text in walls] == [True] * 3
    path = "document.querySelector('.profile path.amax')"
    assert run(browser, f"return {path}.getAttribute('d').split('L').length") == 256 + 1
    tops = run(browser, f"return {path}.getAttribute('d').match(/L[0-9]+ ([0-9.]+)/g)")
    heights = {int(top.split(" ")[0][1:]): float(top.split(" ")[1]) for top in tops}
    assert min(heights, key=lambda channel: heights[channel]) == WALL
    find = "data.references.findIndex((one) => one.label === 'int4.g32')"
    run(browser, f"state.show = 'reference:' + {find}; paint()")
    why = text_of(browser, "#panel-body")
    assert "FP of the same size: fp4_e2m1.g32, " in why
    assert "Crest factor 2.4 for the weights that share a scale. INT, with even steps," in why
    wait_for_nothing_on_the_console(browser)


def test_coloured_by_walls_the_map_shows_where_they_are(browser: Chrome, page: Path) -> None:
    open_page(browser, page)
    choose(browser, "colour", "weights")
    shares = [float(one.split("%")[0].split(" ")[-1]) for one in colours(browser)]
    assert shares[0] == 100
    assert max(shares[1:]) < 20
    legend = run(browser, "return [...document.querySelectorAll('#legend > *')].map(texts)")
    assert legend[0] == "Largest input channel of the weights, over the typical one"
    assert legend[1] == "1.0×"
    assert legend[-1].startswith("4")
    assert run(browser, "return document.querySelectorAll('#legend button').length") == 0
    choose(browser, "colour", "scheme")
    assert run(browser, "return document.querySelectorAll('#legend button').length") > 0


def test_the_chart_has_a_scale_of_sizes_and_greedy_choices(browser: Chrome, page: Path) -> None:
    open_page(browser, page)
    ticks = run(browser, "return sizeTicks(chart).map((bits) => sizeAt(bits))")
    assert len(ticks) > 2
    assert all(round(size) % 100_000 == 0 for size in ticks)
    shown = run(browser, "return marks().map((one) => one.kind)")
    assert set(shown) == {"uniform", "greedy", "recipe", "measured"}
    ends = "return [points[0], points.at(-1)]"
    for point in run(browser, ends):
        size = run(browser, "return sizeAt(arguments[0])", point["bits_per_weight"])
        # Bits per weight leave out the 16 bytes in which a packed layer notes its shape.
        assert abs(point["checkpoint_bytes"] - size) < 1e-4 * size


def test_each_corpus_shows_what_it_alone_would_choose(browser: Chrome, page: Path) -> None:
    open_page(browser, page)
    run(browser, "document.querySelector('#corpora button').click()")
    assert run(browser, "return [state.show, state.compare]") == ["frontier", "corpus:en"]
    differ = text_of(browser, "#corpora button").split(" ")[0]
    assert int(differ) == run(browser, "return document.querySelectorAll('.cell.differs').length")


def test_the_theme_button_switches_and_repaints(browser: Chrome, page: Path) -> None:
    open_page(browser, page)
    before = colours(browser)
    run(browser, "document.getElementById('theme').click()")
    assert run(browser, "return document.documentElement.dataset.theme") == "dark"
    assert colours(browser) != before


def test_a_70b_shaped_page_opens_in_two_seconds(
    browser: Chrome, large_page: Path, folder: Path
) -> None:
    assert large_page.stat().st_size < 6_000_000
    open_page(browser, large_page)
    timing = "const t = performance.timing; return t.loadEventEnd - t.navigationStart"
    assert run(browser, timing) < 2000
    assert len(colours(browser)) == 320
    slide(browser, 40)
    assert download(browser, folder) == written_by(text_of(browser, "#command"), folder)
    wait_for_nothing_on_the_console(browser)


def test_a_context_makes_the_cache_part_of_budget_map_and_recipe(
    browser: Chrome, cached_page: Path, folder: Path
) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    open_page(browser, cached_page)
    assert text_of(browser, "#axis") == "MB of checkpoint and KV cache of 2,000 tokens"
    field = browser.find_element(By.ID, "bits")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("5", Keys.ENTER)
    places = run(browser, "return points.map((one) => one.at)")
    assert run(browser, "return points[state.point].at") == max(p for p in places if p <= 5e6)
    assert "a token" in text_of(browser, "#figures")
    assert "layer" in text_of(browser, "#cache-list")
    saved = download(browser, folder)
    assert saved == written_by(text_of(browser, "#command"), folder)
    assert len(load_recipe(folder / "recipe.yaml").kv_cache) == 3
    run(browser, "openPanel(groups.findIndex((one) => one.name === 'layers.1.attn.kv_cache'))")
    panel = text_of(browser, "#panel-body")
    assert (
        "model.layers.1.self_attn: keys and values of 4 heads of 64 channels; 512 numbers" in panel
    )
    assert "bits per number" in panel
    assert "kv:fp8_e4m3.tensor" in panel
    names = run(browser, "return [...document.querySelectorAll('#map .name')].map(texts)")
    assert names[-1] == "attn.kv_cache"
    choose(browser, "compare", "reference:0")
    assert " of 3 KV caches differ" in text_of(browser, "#differences-summary")
    choose(browser, "colour", "weights")
    assert run(browser, "return document.querySelectorAll('.cell.unknown').length") == 3
    assert "not known" in text_of(browser, "#legend")
    wait_for_nothing_on_the_console(browser)
