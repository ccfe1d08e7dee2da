"""The page in Chromium: curves are drawn, nothing is asked for, and data is never more than text."""

import io
import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from pretrain.report.page import write_report

HOSTILE = (
    "</script><script>document.title='owned'</script>"
    "<img src=http://127.0.0.1:9/a onerror=document.title='owned'>"
    "<!--<script> \u2028 \u202e \0 ' \" &lt; ${1} <b>bold</b> <style>*{display:none}</style>"
)


def paths(browser, kind="line"):
    """How many there are in each figure."""
    count = f"figure => figure.querySelectorAll('path.{kind}').length"
    return browser.run(f"[...document.querySelectorAll('figure')].map({count})")


def press(browser, *runs):
    for run in runs:
        browser.run(f"document.querySelector('[data-run=\"{run}\"]').click()")


def clean(browser, path):
    """Nothing was complained about, and nothing asked for but the file and the pictures in it."""
    assert browser.complaints() == []
    asked = [url for url in browser.requests() if not url.startswith("data:image/png;base64,")]
    assert asked == [path.as_uri()]


def test_the_curves_of_one_run_are_drawn(browser, make_run, tmp_path):
    page = write_report([make_run()], tmp_path / "a.html")
    browser.open(page)
    clean(browser, page)
    assert paths(browser) == [1] * 13
    # Three losses, two gradient norms, speed and waiting are noisy.
    assert sum(paths(browser, "raw")) == 7
    # A curve is about as wide as its figure, and inside it.
    inside = """[...document.querySelectorAll('svg.chart')].every(svg => {
        const box = svg.getBoundingClientRect();
        const path = svg.querySelector('path.line').getBoundingClientRect();
        return path.width > box.width * .6 && path.left >= box.left && path.right <= box.right
            && path.top >= box.top && path.bottom <= box.bottom && path.height > 1;
    })"""
    assert browser.run(inside)
    assert browser.run("document.querySelector('svg.chart').textContent").endswith("020k40k60k")
    assert browser.run("[...document.images].map(image => image.naturalWidth)") == [40, 8]


def test_runs_are_overlaid_in_their_colours_and_can_be_switched_off(browser, make_run, tmp_path):
    roots = [make_run(name, seed=seed) for seed, name in enumerate("abc")]
    page = write_report(roots, tmp_path / "a.html")
    browser.open(page)
    clean(browser, page)
    assert set(paths(browser)) == {3}
    colours = """[...document.querySelector('svg.chart').querySelectorAll('path.line')]
        .map(path => getComputedStyle(path).stroke)"""
    assert len(set(browser.run(colours))) == 3
    press(browser, 1)
    assert set(paths(browser)) == {2}
    pressed = "[...document.querySelectorAll('[data-run]')].map(each => each.getAttribute('aria-pressed'))"
    assert browser.run(pressed) == ["true", "false", "true"]
    press(browser, 0, 2)
    assert set(paths(browser)) == {0}
    press(browser, 1)
    assert set(paths(browser)) == {1}
    assert browser.complaints() == []


def test_the_pointer_reads_all_runs_there(browser, make_run, tmp_path):
    # A metric without noise, so that what is read is what was written: 14 + step / 100.
    browser.open(write_report([make_run("a"), make_run("b", steps=500)], tmp_path / "a.html"))
    point = """(share => {
        const figures = [...document.querySelectorAll('figure')];
        const svg = figures.find(each => each.textContent.startsWith('logit scale')).querySelector('svg');
        const axis = svg.querySelector('.axis').getBoundingClientRect();
        const clientX = axis.left + axis.width * share, clientY = axis.top - 40;
        svg.dispatchEvent(new PointerEvent('pointermove', {clientX, clientY}));
        return document.querySelector('.tip').textContent;
    })"""
    assert browser.run(f"{point}(.25)") == "16k samplesa16.5b16.5"
    assert browser.run(f"{point}(.75)") == "48k samplesa21.5", "the other run ended before"
    assert browser.run("document.querySelectorAll('line.at').length") == len(paths(browser))
    browser.run("document.querySelector('svg.chart').dispatchEvent(new PointerEvent('pointerleave'))")
    assert browser.run("document.querySelector('.tip').hidden && !document.querySelector('line.at')")
    assert browser.complaints() == []


def test_a_logarithmic_axis(browser, make_run, tmp_path):
    browser.open(write_report([make_run()], tmp_path / "a.html"))
    labels = """[...document.querySelectorAll('figure')[1].querySelectorAll('text[text-anchor=end]')]
        .map(text => Number(text.textContent))"""
    before = browser.run(labels)
    assert len({round(b - a, 6) for a, b in pairwise(before)}) == 1, before
    browser.run("document.getElementById('log').click()")
    assert browser.run(labels) == [1, 2, 5]
    assert set(paths(browser)) == {1}
    assert not browser.run("/NaN|Infinity/.test(document.querySelector('main').innerHTML)")


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_show_the_run_in_colour(browser, make_run, tmp_path, dark):
    browser.open(write_report([make_run()], tmp_path / "a.html"), dark=dark)
    picture = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB")).astype(int)
    assert (picture[2, 2].max() < 60) if dark else (picture[2, 2].min() > 230)
    colour = browser.run("getComputedStyle(document.querySelector('path.line')).stroke")
    wanted = [int(each) for each in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    assert (abs(picture - wanted).max(-1) < 30).sum() > 500


def test_a_narrow_page_does_not_scroll_sideways(browser, make_run, tmp_path):
    roots = [make_run("a"), make_run("a-rather-long-name-of-a-run-that-somebody-wanted")]
    browser.open(write_report(roots, tmp_path / "a.html"), width=390)
    assert browser.run("document.documentElement.scrollWidth") == 390
    assert set(paths(browser)) == {2}


def hostile_run(root):
    stages = {HOSTILE: {"steps": 7}}
    (root / "run.yaml").write_text(json.dumps({"data": HOSTILE, HOSTILE: {HOSTILE: 1}, "stages": stages}))
    for path in (root / "samples").glob("*.json"):
        sheet = json.loads(path.read_text())
        row = {"key": HOSTILE, "image": HOSTILE, "said": HOSTILE, "references": [HOSTILE, "\ud800"]}
        path.write_text(json.dumps({**sheet, "said_by": HOSTILE, "sheet": HOSTILE, "rows": [row]}))
    values = {HOSTILE: {"value": 0.5, "chance": 0.1}}
    path = root / "evaluations" / "<img src=x onerror=alert(1)>.json"
    path.write_text(json.dumps({"step": 7, "data": HOSTILE, "values": values}))
    with (root / "metrics.jsonl").open("a") as file:
        for step in (1001, 1002):
            record = {"step": step, "samples": 64 * step, HOSTILE: step, f"eval/{HOSTILE}": step}
            file.write(json.dumps(record) + "\n")
    start = {"time": 1_800_000_900.0, "step": 1, "stage": HOSTILE, "lost": 1, "ranks": 1, "device": HOSTILE}
    with (root / "starts.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")
    return root


def test_data_is_never_more_than_text(browser, make_run, tmp_path):
    roots = [hostile_run(make_run("<b onclick=alert(1)>&amp;'\"")), make_run("b")]
    page = write_report(roots, tmp_path / "a.html")
    browser.open(page)
    clean(browser, page)
    assert browser.run("document.title") == "2 runs - Medley"
    assert browser.run("document.scripts.length") == 2
    assert browser.run("document.styleSheets.length") == 1
    made_of_data = "main b, main style, main script, [onclick], [onerror]"
    assert browser.run(f"document.querySelectorAll('{made_of_data}').length") == 0
    # Word for word: what was said and referred to, the key of a picture that is not there, metrics, settings.
    text = json.dumps(HOSTILE.replace("\0", ""))
    for selector, least in (("bdi", 3), ("code", 1), ("[title]", 1), ("dt", 1), ("th[scope=row]", 1)):
        said = f"each => (each.title || each.textContent).replaceAll('\\ufffd', '').includes({text})"
        found = f"[...document.querySelectorAll('{selector}')].filter({said}).length"
        assert browser.run(found) >= least, selector
    # Names of runs reach the page through its script as well.
    browser.run("document.querySelector('svg.chart').dispatchEvent(new PointerEvent('pointermove'))")
    assert browser.run("document.querySelector('.tip span').textContent") == roots[0].name
    assert browser.complaints() == []


def test_the_policy_stops_what_would_get_through(browser, make_run, tmp_path):
    """If something were not escaped after all, it could neither run nor reach anywhere."""
    page = write_report([make_run()], tmp_path / "a.html")
    injected = (
        b"<script>document.title='owned'</script>"
        b"<img src=http://127.0.0.1:9/a onerror=document.title='owned'>"
        b"<link rel=stylesheet href=http://127.0.0.1:9/b><iframe src=http://127.0.0.1:9/c></iframe>"
    )
    page.write_bytes(page.read_bytes().replace(b"</header>", injected + b"</header>"))
    browser.open(page)
    assert browser.run("document.title") == "alpha - Medley"
    assert len(browser.complaints()) >= 4
    assert set(paths(browser)) == {1}


def test_the_browser_would_notice(browser, tmp_path):
    """The controls of this file: a script that fails, one that speaks, and a request are all seen."""
    page = tmp_path / "bad.html"
    page.write_text("<script>console.log(1)</script><script>nowhere</script><img src=http://127.0.0.1:9/a>")
    browser.open(page)
    assert len(browser.complaints()) >= 2
    assert "http://127.0.0.1:9/a" in browser.requests()
