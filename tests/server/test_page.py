"""The page at `/` in a real browser: a caption is embedded, curves move, errors are shown."""

import shutil

import pytest

from helpers.servers import serving

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, and a Chromium that is installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page(tmp_path):
    with serving(settings=dict(api_key="secret")) as (client, server), sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, said = browser.new_page(), []
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if "127.0.0.1" not in request.url else None)
        page.goto(str(client.base_url))
        page.fill("#caption", "a cat")
        page.click("button")
        page.wait_for_function("document.getElementById('answer').textContent.includes('401')")
        page.fill("#key", "secret")
        page.fill("#seed", "7")
        page.click("button")
        page.wait_for_function("document.getElementById('answer').textContent.includes('32 numbers in')")
        assert page.locator("#bar i").count() == 32
        page.fill("#steps", "99")
        page.click("button")
        page.wait_for_function(
            "document.getElementById('answer').textContent.includes('steps=99; the schedule has 20')"
        )
        page.wait_for_function("document.getElementById('now').textContent.includes('1 done')")
        drawn = "id => document.getElementById(id).getContext('2d').getImageData(0, 0, 900, 180).data.some(Boolean)"
        page.wait_for_function(f"({drawn})('rows') && ({drawn})('rate')")
        browser.close()
        assert said == [], "errors of scripts, or requests elsewhere"
        assert server.engine.stats()["done"] == 1
