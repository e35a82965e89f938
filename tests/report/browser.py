"""The report in a real browser, Chromium, without a network: ``make browser``.

Not collected by name: these tests need Chromium. Scripts, policy, layout at a desktop's and a phone's width, light and
dark, contrast, hovering, keys; and the page without scripts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import BLOCKED, Chromium
from PIL import Image
from report_helpers import HOSTILE, finetuning, noise, pretraining

from convnextv2.report import report

OVERFLOWING = """[...document.querySelectorAll('body *')].filter((element) => {
  const box = element.getBoundingClientRect();
  return (box.right > innerWidth + 1 || box.left < -1) && !element.closest('.scroll, .strip, svg, .legend legend');
}).map((element) => element.outerHTML.slice(0, 200))"""
FAINT = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((part) => part / 255)
    .map((part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    throw new Error('nothing behind');
  };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const found = [];
  let looked = 0;
  for (const element of document.querySelectorAll('body *')) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const drawn = element.matches('svg .line');
    if (!text && !drawn || element.closest('script, title')) continue;
    const style = getComputedStyle(element), svg = element.closest('svg');
    const colour = parse(drawn ? style.stroke : element.matches('text') ? style.fill : style.color);
    looked += 1;
    const contrast = ratio(colour, behind(svg ? svg.parentElement : element));
    if (contrast < (drawn ? 3 : 4.5)) found.push([element.outerHTML.slice(0, 80), contrast]);
  }
  return [looked, found];
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three runs, one with names and values that would rather be something else."""
    folder = tmp_path_factory.mktemp("page")
    runs = [
        pretraining(folder / "first", drawn=(1, 2, 4)),
        pretraining(folder / HOSTILE.replace("/", "∕") / ("long" * 40), mask_ratio=0.75),
        finetuning(folder / "finetune", classes=(HOSTILE, "a" * 300, "ok"), init=HOSTILE),
    ]
    noise(runs[0] / "neighbours.png", 900, 500)
    (runs[1] / "metrics.jsonl").open("a").write('{"epoch": 9, "loss": null, "<b>": 1}\nbroken\n')
    text, _ = report(runs)
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def quiet(browser: Chromium, page: Path) -> bool:
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.complaints == []
    return True


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_it_fits_fetches_nothing_and_complains_of_nothing(
    width: int, dark: bool, browser: Chromium, page: Path, tmp_path: Path
) -> None:
    browser.open(page, width, dark=dark)
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.run("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    assert browser.run(OVERFLOWING) == []
    broken = "[...document.images].filter((one) => !one.complete || !one.naturalWidth).length"
    assert browser.run(f"[document.images.length, {broken}]") == [7, 0]
    looked, faint = browser.run(FAINT)
    assert looked > 300
    assert faint == []
    browser.screenshot(tmp_path / "window.png", whole=False)
    with Image.open(tmp_path / "window.png") as picture:
        shown = float(np.asarray(picture.convert("L")).mean())
    assert shown < 80 if dark else shown > 180
    assert quiet(browser, page)


def test_names_are_text(browser: Chromium, page: Path) -> None:
    browser.open(page, 1280)
    assert browser.run("document.scripts.length") == 1
    assert browser.run("document.querySelectorAll('img[src=x]').length") == 0
    assert "onerror=alert(1)" in browser.run("document.body.innerText")
    assert quiet(browser, page)


def test_what_would_be_fetched_or_run_is_seen_and_stopped(browser: Chromium, page: Path) -> None:
    """So that the other tests would notice it; and the page's own policy does it without a test around it."""
    browser.open(page, 1280)
    added = "{{ const e = document.createElement('{}'); e.{} = '{}'; document.body.append(e); }}".format
    wait = "new Promise((done) => setTimeout(done, 100))"
    browser.run(added("img", "src", "https://example.org/blocked.png") + wait)
    assert browser.requests == [page.resolve().as_uri(), "https://example.org/blocked.png"]
    browser.call("Network.setBlockedURLs", urls=[])
    browser.run(added("img", "src", "https://example.org/free.png") + wait)
    browser.run(added("script", "text", "window.ran = 1") + wait)
    browser.call("Network.setBlockedURLs", urls=BLOCKED)
    assert browser.run("window.ran === undefined")
    told = [str(one) for one in browser.complaints]
    assert len(told) == 2
    assert all("Content Security Policy" in one for one in told)
    assert "free.png" in told[0]


def test_hovering_and_keys_tell_numbers(browser: Chromium, page: Path) -> None:
    browser.open(page, 1280)
    svg = "document.querySelector('.plot svg')"
    browser.run(f"{svg}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    left, top, width, height = browser.run(f"(b => [b.left, b.top, b.width, b.height])({svg}.getBoundingClientRect())")
    tip = "document.querySelector('.plot .tip')"
    assert browser.run(f"{tip}.hidden")
    browser.move(left + width * 54 / 360, top + height / 2)
    assert browser.run(f"{tip}.hidden") is False
    told = browser.run(f"{tip}.innerText")
    assert told.startswith("epoch 1\nfirst: 1\n")
    sizes = f"(t => [t.offsetHeight, t.querySelector('svg').getBoundingClientRect().width])({tip})"
    tall, swatch = browser.run(sizes)
    assert (tall < 120, swatch) == (True, 28)
    middle = browser.run(f"(b => [b.left + b.width / 2, b.top + b.height / 2])({tip}.getBoundingClientRect())")
    browser.run(f"{tip}.style.pointerEvents = 'auto'")
    assert browser.run(f"{tip}.contains(document.elementFromPoint({middle[0]}, {middle[1]}))"), "nothing lies over it"
    browser.run(f"{svg}.focus({{focusVisible: true}})")
    browser.press("ArrowRight")
    assert browser.run(f"{tip}.innerText").startswith("epoch 2\nfirst: 0.5\n")
    browser.press("End")
    assert browser.run(f"{tip}.innerText").startswith("epoch 4\nfirst: 0.25")
    browser.press("Escape")
    assert browser.run(f"{tip}.hidden")
    lines = "[...document.querySelectorAll('.plot g[data-run=\"0\"]')].map((one) => getComputedStyle(one).display)"
    assert "none" not in browser.run(lines)
    browser.run("document.querySelector('.toggle').click()")
    assert set(browser.run(lines)) == {"none"}
    browser.press("Home")
    assert "first" not in browser.run(f"{tip}.innerText")
    assert quiet(browser, page)


def test_reconstructions_follow_the_slider(browser: Chromium, page: Path) -> None:
    browser.open(page, 390)
    shown = (
        "[...document.querySelectorAll('.strip')].map((strip) => [...strip.children]"
        ".filter((one) => one.offsetParent).map((one) => one.dataset.epoch))"
    )
    assert browser.run(shown) == [["4"], ["4"]]
    browser.run("document.querySelector('.slider input').focus()")
    browser.press("Home")
    assert browser.run(shown) == [["1"], ["4"]]
    browser.press("ArrowRight")
    assert browser.run(shown) == [["2"], ["4"]]
    assert browser.run("document.querySelector('.slider output').textContent") == "epoch 2"
    assert quiet(browser, page)


def test_without_scripts_all_is_there(browser: Chromium, page: Path) -> None:
    browser.open(page, 390, scripts=False)
    root = browser.call("DOM.getDocument", depth=0)["root"]["nodeId"]

    def nodes(selector: str) -> list[int]:
        return list(browser.call("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"])

    def drawn(node: int) -> bool:
        try:
            return bool(browser.call("DOM.getBoxModel", nodeId=node)["model"]["width"])
        except AssertionError:  # it has no box
            return False

    assert len(nodes(".strip figure")) == 5
    assert all(map(drawn, nodes(".strip figure")))
    assert all(map(drawn, nodes(".plot svg")))
    assert not any(map(drawn, nodes(".toggle")))
    assert nodes("circle title")
    width = browser.call("Page.getLayoutMetrics")["cssContentSize"]["width"]
    assert width == 390
    assert quiet(browser, page)
