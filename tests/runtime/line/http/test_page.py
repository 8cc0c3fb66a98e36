"""The page in a real browser: clicked through, at both widths, and every request stays on this machine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from line_parts import wait_until
from needs import need

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

PAGE = Path(__file__).resolve().parents[4] / "saae_runtime/line/http/page"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    webdriver = need("selenium.webdriver")
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = need("selenium.webdriver.chrome.service").Service(driver)
    found = webdriver.Chrome(options=options, service=service)
    yield found
    found.quit()


@pytest.fixture(params=[1280, 390])
def opened(
    browser: Any, serving: Callable[..., ExitStack], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[ExitStack]:
    """A line, and its page in the browser at one width."""
    size = {"width": request.param, "height": 900, "deviceScaleFactor": 1, "mobile": request.param < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    with serving(tmp_path) as stack:
        browser.get(f"http://127.0.0.1:{stack.http.port}/")
        yield stack
        browser.get("about:blank")


def text(browser: Any, name: str) -> str:
    return str(browser.execute_script(f"return document.getElementById('{name}').innerText"))


def click(browser: Any, name: str) -> None:
    browser.find_element("css selector", name).click()


def framed(browser: Any) -> str | None:
    """Key of the part whose frame is drawn; None for an empty canvas."""
    key, seen = browser.execute_script(
        "const c = document.getElementById('frame');"
        "const values = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return [c.dataset.key || null, values.some((value) => value > 0)]"
    )
    assert seen == (key is not None)
    return None if key is None else str(key)


def test_an_operator_works_with_it(browser: Any, opened: ExitStack, tmp_path: Path) -> None:
    # The last of the station's three parts is good.
    assert wait_until(lambda: text(browser, "word") == "OK", 60)
    assert wait_until(lambda: text(browser, "health") == "ready")
    assert wait_until(lambda: "2\t1\t33.3 %" in text(browser, "rows"))
    big = browser.execute_script("return document.getElementById('word').getBoundingClientRect().height")
    assert big > 140  # read from three metres
    wide = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1]

    # The bad one is looked at.
    click(browser, "#strip button")
    assert wait_until(lambda: text(browser, "word") == "NG")
    assert "HELD" in text(browser, "live")
    key = browser.execute_script("return page.held.key")
    assert wait_until(lambda: framed(browser) == key)
    drawn = browser.execute_script(
        "const c = document.getElementById('frame');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return new Set(Array.from(d)).size"
    )
    assert drawn > 20  # a picture with heat, not one colour

    # A person says that it is good, and takes that back.
    click(browser, "#override")
    assert wait_until(lambda: text(browser, "said") == "local says OK")
    overrides = opened.http.context.control.overrides
    assert overrides.pool("first") == {"good": 1, "bad": 0}
    click(browser, "#undo")
    assert wait_until(lambda: text(browser, "said") == "")
    assert overrides.pool("first") == {"good": 0, "bad": 0}
    click(browser, "#hold")
    assert wait_until(lambda: text(browser, "word") == "OK")

    # The slider shows before it changes.
    move = "const s = document.getElementById('slider'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    browser.execute_script(move, 7)
    assert wait_until(lambda: "40 → 20" in text(browser, "preview"))
    assert "1 were above it, 1 would be" in text(browser, "preview")
    assert opened.line.book.get("first").threshold == 40.0
    click(browser, "#cancel")
    assert wait_until(lambda: "Move the slider" in text(browser, "preview"))
    browser.execute_script(move, 7)
    assert wait_until(lambda: browser.find_element("id", "apply").is_enabled())
    click(browser, "#apply")
    assert wait_until(lambda: opened.line.book.get("first").threshold == 20.0)
    assert wait_until(lambda: "20 now" in text(browser, "message"))

    # New thresholds, for which nobody has confirmed a part yet.
    click(browser, "#try")
    assert wait_until(lambda: "no images of good parts" in text(browser, "job"))

    # The other station, whose next part comes while the page is open.
    browser.find_element("xpath", "//nav/button[text()='asked']").click()
    assert wait_until(lambda: text(browser, "part") == "no part yet")
    verdict = opened.client.post("/v1/trigger", {"station": "asked", "part_id": "<b>live</b>"}).json["verdict"]
    assert wait_until(lambda: text(browser, "part") == "<b>live</b>")
    assert text(browser, "word") == verdict
    select = need("selenium.webdriver.support.ui").Select
    select(browser.find_element("id", "recipe")).select_by_visible_text("other")
    assert wait_until(lambda: opened.line.stations["asked"].recipe == "other")

    folder = os.environ.get("SAAE_SCREENSHOTS")
    browser.save_screenshot(str((Path(folder) if folder else tmp_path) / f"page-{wide[1]}.png"))
    problems = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert problems == []
    hosts = asked_hosts(browser)
    assert hosts == {"127.0.0.1"}


def asked_hosts(browser: Any) -> set[str]:
    """Where every request since the last call went."""
    found = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = urlsplit(message["params"]["request"]["url"])
            if url.scheme in ("http", "https", "ws", "wss"):
                found.add(url.hostname or "")
    return found


@pytest.mark.parametrize("opened", [1280], indirect=True)
def test_an_old_verdict_does_not_look_like_a_new_one(browser: Any, opened: ExitStack) -> None:
    assert wait_until(lambda: text(browser, "word") == "OK", 60)
    opened.http.close()
    assert wait_until(lambda: "old" in browser.find_element("id", "verdict").get_attribute("class"), 30)
    assert browser.find_element("id", "lost").is_displayed()
    browser.get_log("browser")  # the refused reconnections


@pytest.mark.parametrize("opened", [1280], indirect=True)
def test_no_other_parts_frame_stands_beside_a_verdict(browser: Any, opened: ExitStack) -> None:
    assert wait_until(lambda: text(browser, "word") == "OK", 60)
    key = browser.execute_script("return page.shown.key")
    assert wait_until(lambda: framed(browser) == key)
    strip = browser.find_element("css selector", "#strip img").get_attribute("src")

    # After a restart, another part has the number.
    again = "page.parts = page.parts.map((part) => ({ ...part, key: part.key + arguments[0] })); showAll()"
    browser.execute_script(again, " of a later start")
    assert wait_until(lambda: framed(browser) is None)
    assert browser.find_element("css selector", "#strip img").get_attribute("src") != strip

    # A part that was held before keeps its verdict and its own frame.
    browser.execute_script("page.parts = []; return reload()")
    assert wait_until(lambda: framed(browser) == key)
    click(browser, "#hold")
    browser.execute_script(
        "const later = (part) => ({ ...part, key: 'later ' + part.key, part_id: 'later', verdict: 'NG' });"
        "page.parts = page.parts.map(later); showAll()"
    )
    assert text(browser, "word") == "OK"
    assert text(browser, "part") != "later"
    assert framed(browser) == key
    click(browser, "#hold")
    assert text(browser, "part") == "later"
    assert wait_until(lambda: framed(browser) is None)

    # A picture that failed is asked for again, and the layer that was chosen last is drawn.
    browser.execute_script("page.parts = []; return reload()")
    assert wait_until(lambda: framed(browser) == key)
    browser.execute_script("$('heat').click(); $('heat').click(); $('heat').click()")
    assert wait_until(lambda: browser.execute_script("return page.drawn") == f"frame {key}")

    # A station without a part has no frame.
    browser.find_element("xpath", "//nav/button[text()='asked']").click()
    assert wait_until(lambda: text(browser, "part") == "no part yet")
    assert wait_until(lambda: framed(browser) is None)

    # What a sink did not take is shown.
    browser.execute_script(
        "page.state.sinks = [{ name: 'mes', working: true, backlog: 3, lost: 0, refused: 2 }]; showState()"
    )
    assert "mes: 3 wait, 2 refused" in text(browser, "facts")
    browser.get_log("browser")  # the pictures that are not there


def test_a_token_opens_it(
    browser: Any, serving: Callable[..., ExitStack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "a-token-for-the-page"
    monkeypatch.setenv("TEST_PAGE", token)
    with serving(tmp_path, '[[http.user]]\nname = "olga"\nrole = "operator"\ntoken_env = "TEST_PAGE"') as stack:
        browser.get(f"http://127.0.0.1:{stack.http.port}/")
        field = browser.find_element("id", "token")
        assert wait_until(field.is_displayed)
        field.send_keys("a-wrong-one")
        click(browser, "#entry button")
        assert wait_until(lambda: "wrong" in text(browser, "refused"))
        field.clear()
        field.send_keys(token)
        click(browser, "#entry button")
        assert wait_until(lambda: "olga" in text(browser, "user"), 60)
        assert wait_until(lambda: text(browser, "word") == "OK", 60)
        assert not browser.find_element("id", "write").is_enabled()  # an engineer's
        browser.get("about:blank")
    browser.get_log("browser")


def test_the_page_names_no_other_place() -> None:
    """Without a browser, too: no address, no inline script or style, nothing made of text that came from a part."""
    html, script, style = ((PAGE / name).read_text(encoding="utf-8") for name in ("index.html", "page.js", "page.css"))
    for content in (html, script, style):
        assert "//" not in content.replace("http://www.w3.org/2000/svg", "").replace("// ", "")
    assert "style=" not in html
    assert " on" not in html.replace(" one", "").replace(" only", "")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in script
