"""A FramesView shows each picture as it was, in few bytes, by its slider, and one of them without scripts."""
import base64
import html
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from gptoss_lab import show
from gptoss_lab.show.figures import _figure

CHROMIUM = shutil.which("chromium")
COLOURS = [(255, 255, 255), (0, 114, 178), (213, 94, 0), (20, 20, 20), (236, 236, 236)]


def png(x: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(x).save(file, "png")
    return file.getvalue()


def drawn(n: int, size=(40, 60), seed=0) -> list[np.ndarray]:
    """Pictures of five colours that differ in places."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 5, size)
    every = [np.where(rng.random(size) < 0.1, rng.integers(0, 5, size), first) for _ in range(n)]
    return [np.array(COLOURS, np.uint8)[x] for x in every]


def figure(title: str, height: float, width: float = 4):
    with _figure(width, 2, title) as fig:
        fig.subplots().bar([0, 1], [height, 1], color="#0072B2")
    return fig


def view(n=3, **about):
    return show.FramesView([png(x) for x in drawn(n)], {"size": range(n)}, **{"title": "grow", "alts": [f"size {i}" for i in range(n)]} | about)


def payload(view) -> dict:
    return json.loads(re.search(r"\bD = (\{.*\});", view._repr_html_())[1])


def seen(view) -> list[np.ndarray]:
    """What lies on top of what, as a browser would show it."""
    whole = Image.open(io.BytesIO(view.still)).convert("RGBA")
    patches = [Image.open(io.BytesIO(base64.b64decode(x))).convert("RGBA") for x in payload(view)["patches"]]
    return [np.asarray(Image.alpha_composite(whole, patch).convert("RGB")) for patch in patches]


def test_each_picture_is_seen_as_it_was_given_whichever_is_first():
    for start in range(3):
        for shown, given in zip(seen(view(start={"size": start})), drawn(3), strict=True):
            assert np.array_equal(shown, given)


def test_the_still_is_the_picture_at_the_start_and_stands_in_the_page_with_its_words():
    page = view(start={"size": 1})
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(page.still)).convert("RGB")), drawn(3)[1])
    still = re.search(r"<div data-view>(.*?)</div>", page._repr_html_(), re.S)[1]
    assert f'<img alt="size 1" style="max-width: 100%; height: auto" src="data:image/png;base64,{base64.b64encode(page.still).decode()}">' in still
    assert "<b>grow</b>: size 1." in still and page.alt == "size 1" and "class=" not in still


def test_smaller_pictures_get_a_white_margin():
    small, large = drawn(1, (30, 50))[0], drawn(1)[0]
    page = show.FramesView([png(small), png(large)], {"x": "ab"}, title="t", alts=["one", "two"])
    first, second = seen(page)
    assert np.array_equal(first[:30, :50], small) and (first[30:] == 255).all() and (first[:, 50:] == 255).all()
    assert np.array_equal(second, large)


def test_two_controls_make_a_grid_whose_last_runs_fastest():
    pictures = [figure(f"layer {layer}, head {head}", layer + head / 4) for layer in (0, 5) for head in range(3)]
    page = show.FramesView(pictures, {"layer": [0, 5], "head": range(3)}, title="t", start={"layer": 5, "head": 1}, note="random weights")
    data = payload(page)
    assert data["controls"] == [{"name": "layer", "labels": ["0", "5"]}, {"name": "head", "labels": ["0", "1", "2"]}]
    assert data["start"] == [1, 1] and data["alts"][4] == page.alt == "layer 5, head 1" and len(data["patches"]) == 6
    assert data["title"] == "t (random weights)" and repr(page) == "FramesView of t (random weights): 2 of layer x 3 of head"


def test_pictures_keep_their_colours_within_what_an_eye_sees():
    pictures = [figure("a picture", height) for height in (0.5, 1)]
    for shown, picture in zip(seen(show.FramesView(pictures, {"height": [0.5, 1]}, title="t")), pictures, strict=True):
        file = io.BytesIO()
        picture.savefig(file, format="png")
        given = np.asarray(Image.open(file).convert("RGB")).astype(int)
        assert np.abs(shown - given).max() <= 16 and np.abs(shown - given).mean() < 0.5


def test_a_thin_line_keeps_its_colour_beside_large_areas_of_many_others():
    x = np.random.default_rng(0).integers(0, 256, (50, 300, 1), dtype=np.uint8) * np.ones(3, np.uint8)
    x[25, 20:280] = 213, 94, 0
    [shown] = seen(show.FramesView([png(x)], {"x": [1]}, title="t", alts=["a"], most=10**6))
    assert np.abs(shown[25, 20:280].astype(int) - [213, 94, 0]).max() <= 12


def test_ten_pictures_that_differ_a_little_take_less_than_150_kb_and_the_same_bytes_each_time():
    make = lambda: show.FramesView([figure("does it grow?", i / 10, 10) for i in range(10)], {"i": range(10)}, title="t")
    page = make()._repr_html_()
    assert len(page.encode()) < 50_000 and page == make()._repr_html_()
    assert not re.search("https?:", page, re.I)


def test_a_page_of_its_own_may_show_images_that_it_holds_and_load_nothing(tmp_path):
    page = view().save(tmp_path / "view.html").read_text("utf-8")
    assert "default-src 'none'" in page and "img-src data:" in page and not re.search("https?:", page, re.I)


def test_no_name_can_leave_its_place():
    evil = "</script><script>alert(1)</script>"
    page = show.FramesView([png(x) for x in drawn(2)], {evil: [evil, '"><img src=x>']}, title=evil, alts=[evil, '"'])._repr_html_()
    assert page.count("<script") == page.count("</script>") == 1 and page.count("<img") == 1
    assert payload(show.FramesView([png(x) for x in drawn(1)], {evil: [evil]}, title="t", alts=[evil]))["alts"] == [evil]


@pytest.mark.parametrize("about, words", [
    ({"controls": {}}, "3 pictures for no values"), ({"controls": {"a": range(4)}}, "3 pictures for 4 values"),
    ({"controls": {"a": range(3), "b": range(2)}}, "3 pictures for 3 x 2 values"), ({"controls": {"a": []}}, "3 pictures for 0 values"),
    ({"controls": {"a": [0, 1, 2], "b": [0], "c": [0]}}, "give one or two controls"),
    ({"alts": None}, "0 of 3 pictures have words"), ({"alts": ["a", "b"]}, "2 of 3 pictures have words"),
    ({"alts": "abc"}, "alts must be strings in a list"), ({"start": {"size": 9}}, "start of size is 9: its values are 0, 1, 2"),
    ({"start": {"colour": 1}}, "start names 'colour': the controls are 'size'"), ({"title": 3}, "title and note must be strings"),
    ({"pictures": [b"no picture"] * 3}, "a picture of 10 bytes is no PNG"),
])  # fmt: skip
def test_what_does_not_fit_together_is_refused(about, words):
    args = {"pictures": [png(x) for x in drawn(3)], "controls": {"size": range(3)}, "title": "grow", "alts": list("abc")} | about
    with pytest.raises(ValueError, match=words):
        show.FramesView(args.pop("pictures"), args.pop("controls"), **args)


def test_what_would_be_too_large_is_refused_with_its_size():
    noise = [np.random.default_rng(i).integers(0, 256, (60, 60, 3), dtype=np.uint8) for i in range(2)]
    with pytest.raises(ValueError, match=r"the view would take 1\d,\d{3} bytes, 10,000 are allowed: give fewer or smaller pictures"):
        show.FramesView([png(x) for x in noise], {"x": range(2)}, title="t", alts=list("ab"), most=10_000)


def test_fewer_colours_are_taken_where_more_would_not_fit():
    pictures = [figure("a picture", height, 8) for height in (0.5, 1)]
    make = lambda most: show.FramesView(pictures, {"x": [0, 1]}, title="t", most=most)
    most = len(make(10**6)._repr_html_().encode()) - 1
    sizes = [make(most + 1), make(most)]
    counts = [len(np.unique(np.asarray(Image.open(io.BytesIO(one.still)).convert("RGB")).reshape(-1, 3), axis=0)) for one in sizes]
    assert counts[1] < counts[0] <= 64 and len(sizes[1]._repr_html_().encode()) <= most


PROBE = """<script>
const errors = []; onerror = m => errors.push(m);
addEventListener("load", () => {
    const root = document.querySelector("[data-view]").shadowRoot, all = s => [...root.querySelectorAll(s)], said = [];
    const tell = () => said.push({values: all("input").map(e => e.getAttribute("aria-valuetext")), outputs: all("output").map(e => e.textContent),
        label: root.querySelector("[role=img]").getAttribute("aria-label"), live: root.querySelector("[aria-live]").textContent,
        visible: all(".stack img").slice(1).map((e, i) => getComputedStyle(e).visibility === "visible" ? i : -1).filter(i => i >= 0),
        loaded: all("img").every(e => e.complete && e.naturalWidth === 60)});
    tell();
    for (const [i, value] of [[1, 2], [0, 1], [1, 0]]) {
        all("input")[i].value = value;
        all("input")[i].dispatchEvent(new Event("input"));
        tell();
    }
    let bubbled = 0;
    document.addEventListener("keydown", () => bubbled++);
    all("input")[0].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true, composed: true}));
    const pre = document.createElement("pre");
    pre.id = "out"; pre.textContent = JSON.stringify({said, errors, bubbled, names: all("input").map(e => e.ariaLabel)});
    document.body.append(pre);
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH to look at the view with")
def test_in_a_browser_each_slider_shows_its_picture_and_tells_it(tmp_path):
    alts = [f"{a}, {b}" for a in "xy" for b in "abc"]
    page = show.FramesView([png(x) for x in drawn(6)], {"one": ["x", "y"], "two": ["a", "b", "c"]}, title="t", alts=alts, start={"two": "b"})
    file = page.save(tmp_path / "view.html")
    file.write_text(file.read_text("utf-8").replace("</body>", PROBE + "</body>"), "utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000",
         "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[:300] + done.stderr[-500:]
    told = json.loads(html.unescape(found[1]))
    assert told["errors"] == [] and told["names"] == ["one", "two"] and told["bubbled"] == 0
    for one, (a, b) in zip(told["said"], ["xb", "xc", "yc", "ya"], strict=True):
        assert one["values"] == one["outputs"] == [a, b] and one["label"] == one["live"] == f"{a}, {b}" and one["loaded"]
        assert one["visible"] == [alts.index(f"{a}, {b}")]
