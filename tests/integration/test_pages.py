"""The pages of `align inspect --web` in a real browser, with data that attacks it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from cluster.views.web.colours import LEVELS
from cluster.views.web.server import Server
from tests.fakes import web_runs
from tests.fakes.web_runs import HOSTILE, PIECES
from tests.harness.browser import MISSING, chromium, clipped_fields, open_page, overflow, resize

pytestmark = [pytest.mark.integration, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

PAGES = ("/", "/trajectories", "/step/1", "/step/1/ticket/0", "/step/1/ticket/0/repeat/0", "/report", "/step/77")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("pages") / "run"
    web_runs.write(folder, folder / "nowhere")
    web_runs.save_tokenizer(folder)
    with Server(folder, 0) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join(timeout=10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium() as found:
        yield found


def wait(browser: Chrome, selector: str, start: str) -> None:
    """Until the first such element of the page that comes begins with this text."""
    passing = (NoSuchElementException, StaleElementReferenceException)
    found = WebDriverWait(browser, 30, ignored_exceptions=passing)
    found.until(
        lambda page: page.find_element(By.CSS_SELECTOR, selector).text.startswith(start), f"{selector}: {start}"
    )


def click(browser: Chrome, text: str) -> None:
    browser.find_element(By.LINK_TEXT, text).click()


def test_the_hostile_text_would_run_if_it_were_markup(browser: Chrome) -> None:
    browser.get("data:text/html," + quote(f"<title>safe</title>{HOSTILE}"))
    assert browser.title == "owned", "so the next test can fail"


@pytest.mark.parametrize("target", PAGES)
def test_data_that_attacks_is_shown_and_does_nothing(browser: Chrome, served: Server, target: str) -> None:
    browser.get_log("browser")  # forget what came before
    browser.get(served.url + target)
    assert browser.title.endswith((" · Align", "Align run report"))
    assert browser.find_elements(By.CSS_SELECTOR, "script, img, [onload], [onerror]") == []
    problems = [entry["message"] for entry in browser.get_log("browser")]
    assert [p for p in problems if "404" not in p or target != "/step/77"] == [], "the policy had nothing to stop"
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith((served.url, "data:,")) for name in loaded)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("target", PAGES)
def test_no_page_is_wider_than_the_window(browser: Chrome, served: Server, target: str, width: int) -> None:
    resize(browser, width, 900)
    open_page(browser, served.url + target)
    assert overflow(browser) == 0
    assert clipped_fields(browser) == []


def test_a_text_that_is_wider_than_its_field_is_found(browser: Chrome) -> None:
    browser.get(
        "data:text/html," + quote("<input style='width: 2rem' placeholder='from here on'><button>Show</button>")
    )
    assert clipped_fields(browser) == ["from here on"], "so the last test can fail"


def test_a_reader_goes_from_the_steps_to_a_token_and_colours_it(browser: Chrome, served: Server) -> None:
    resize(browser, 1280, 900)
    browser.get(served.url)
    click(browser, "1")
    wait(browser, "h1", "Step 1")
    browser.find_element(By.CSS_SELECTOR, "a[href='/step/1/ticket/0']").click()
    wait(browser, "h1", "One prompt, 2 trajectories")
    click(browser, "repeat 0")
    wait(browser, "h1", "Token by token")
    click(browser, "log-prob")
    wait(browser, ".switch a[aria-current]", "log-prob")
    tokens = browser.find_elements(By.CSS_SELECTOR, ".said .tokens a")
    assert [token.text for token in tokens if token.text != "↵"][:3] == list(PIECES[:3])
    strongest = [token.value_of_css_property("background-color") for token in tokens][-1]
    legend = browser.find_element(By.CSS_SELECTOR, ".scale li:first-child")
    swatch = legend.find_element(By.TAG_NAME, "span")
    assert (legend.text, swatch.value_of_css_property("background-color")) == ("−0.9", strongest)
    assert "log-prob -0.9" in str(tokens[-1].get_attribute("title"))
    tokens[2].click()
    wait(browser, "tr:target td", "2")
    row = browser.find_element(By.CSS_SELECTOR, "tr:target")
    assert PIECES[2] in row.text and "−0.300" in row.text


def test_the_form_finds_what_its_fields_say(browser: Chrome, served: Server) -> None:
    browser.get(served.url)
    browser.find_element(By.NAME, "prompt").send_keys("quiet")
    browser.find_element(By.CSS_SELECTOR, "select[name=ending] option:nth-child(3)").click()
    browser.find_element(By.CSS_SELECTOR, "button[type=submit]").click()
    wait(browser, ".found", "2 match")
    assert browser.find_element(By.NAME, "prompt").get_attribute("value") == "quiet"
    click(browser, "clear")
    wait(browser, ".found", "10 match")


def test_the_report_leads_to_what_was_learned_from_its_prompt(browser: Chrome, served: Server) -> None:
    browser.get(served.url + "/report")
    click(browser, "its trajectories")
    wait(browser, ".found", "2 match")


@pytest.mark.parametrize("dark", [False, True])
def test_the_strongest_colours_leave_their_tokens_readable(browser: Chrome, served: Server, dark: bool) -> None:
    resize(browser, 1280, 900, dark)
    browser.get(served.url + "/step/1/ticket/0/repeat/0?colour=reward")
    card = browser.find_element(By.CSS_SELECTOR, ".card").value_of_css_property("background-color")
    ink = browser.find_element(By.TAG_NAME, "body").value_of_css_property("color")
    for level in (f"p{LEVELS}", f"n{LEVELS}"):
        behind = browser.find_element(By.CSS_SELECTOR, f".scale .{level}").value_of_css_property("background-color")
        assert contrast(rgba(ink), over(rgba(behind), rgba(card))) >= 4.5, "WCAG 2.2, contrast of text"


def rgba(colour: str) -> list[float]:
    """Red, green, blue and opacity, 0 to 1, of a computed colour."""
    numbers = [float(n) for n in re.findall(r"[\d.]+(?:e-\d+)?", colour.removeprefix("color(srgb"))]
    scale = 1 if colour.startswith("color") else 255
    return [n / scale for n in numbers[:3]] + (numbers[3:] or [1.0])


def over(front: list[float], back: list[float]) -> list[float]:
    """What a colour looks like on another one."""
    return [f * front[3] + b * (1 - front[3]) for f, b in zip(front[:3], back[:3], strict=True)] + [1.0]


def contrast(one: list[float], other: list[float]) -> float:
    """Ratio of the relative luminances."""
    light = [
        sum(
            w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
            for w, c in zip((0.2126, 0.7152, 0.0722), x[:3], strict=True)
        )
        for x in (one, other)
    ]
    return (max(light) + 0.05) / (min(light) + 0.05)
