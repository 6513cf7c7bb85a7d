"""Views hold the given numbers, load nothing, keep every token in its place, and can be read without scripts."""
import base64
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from models import one_thread, tiny_random  # noqa: F401

import gptoss_lab as lab
from gptoss_lab import show
from gptoss_lab.probes.lens import LogitLens
from gptoss_lab.probes.patching import Patching, logit_difference
from gptoss_lab.probes.router import Routing
from gptoss_lab.show.view import chip

TEXT = "One sunny day, Tom and Sue went to the park.\nSue found the blue"
EVIL = ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "<!--", "&amp;", "<|start|>", "'", "\\", "`${1}`",
        "</div>", "\ud800", "⏎", "עברית"]  # fmt: skip
CHROMIUM = shutil.which("chromium")
nan = math.nan


class Run:
    """One recorded pass, and every kind of view made of it."""

    def __init__(self):
        self.model = tiny_random()
        self.encoding = lab.tokenizer.tiny()
        self.tokens = torch.tensor([self.encoding.encode_ordinary(TEXT)])
        self.words = show.words(self.tokens, self.encoding)
        with torch.no_grad():
            logits, self.acts = self.model.run_with_cache(self.tokens, "*")
        log_p = logits[0].log_softmax(-1)
        self.loss = [nan, *(-log_p[:-1].gather(-1, self.tokens[0, 1:, None])[:, 0])]
        self.entropy = -(log_p.exp() * log_p).sum(-1)
        self.routing = Routing.of(self.acts)
        self.lens = LogitLens.of(self.acts, model=self.model, tokens=self.tokens)
        a, b = self.tokens[:, :6], self.tokens[:, 6:12]
        metric = logit_difference(torch.tensor([3]), torch.tensor([8]))
        self.patching = Patching.measure(self.model, a, other=b, metric=metric, points=["*.hook_resid_pre"])

    def views(self) -> dict[str, "show.view.View"]:
        note = "random weights"
        return {
            "token": show.TokenView(self.words, {"loss": self.loss, "entropy": self.entropy, "signed": self.entropy - 5}, gaps=True,
                                    title="what surprises the model?", unit={"loss": "nats", "entropy": "nats"}, note=note),
            "river": show.RiverView.of(self.routing, self.words, note=note),
            "lens": show.MapView.of_lens(self.lens, self.tokens, self.encoding, note=note),
            "patching": show.MapView.of_patching(self.patching, self.words[:6], note=note),
            "pattern": show.PatternView.recorded(self.acts, self.words, layers=[0, 2], note=note),
        }  # fmt: skip


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


@pytest.fixture(scope="module")
def views(run) -> dict:
    return run.views()


KINDS = ["token", "river", "lens", "patching", "pattern"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def evil_views() -> list:
    n = len(EVIL)
    experts = torch.arange(2).expand(1, n, 2)
    return [
        show.TokenView(EVIL, {name: torch.ones(n) for name in EVIL}, title=EVIL[0], unit=EVIL[1], note=EVIL[2]),
        show.RiverView(experts, torch.ones(1, n, 2), EVIL, n_experts=2, title=EVIL[0], note=EVIL[1]),
        show.MapView(torch.ones(n, n), EVIL, EVIL, title=EVIL[1], unit=EVIL[0], down=EVIL[0], across=EVIL[1], cells=[EVIL] * n),
    ]  # fmt: skip


def payload(view) -> dict:
    return json.loads(re.search(r"\bD = (\{.*\});", view._repr_html_())[1])


def array(text: str, dtype="<f4") -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def still(view) -> str:
    return re.search(r"<div data-view>(.*?)</div>", view._repr_html_(), re.S)[1]


# ------------------------------------------------------------------------------------------ what they hold


def test_the_token_view_holds_each_named_row_and_its_scale(run, views):
    data = payload(views["token"])
    assert data["words"] == run.words and data["title"] == "what surprises the model? (random weights)"
    rows = {row["name"]: row for row in data["rows"]}
    assert list(rows) == ["loss", "entropy", "signed"]
    assert np.array_equal(array(rows["loss"]["values"]), np.array(run.loss, np.float32), equal_nan=True)
    assert np.array_equal(array(rows["signed"]["values"]), (run.entropy - 5).numpy())
    assert [row["signed"] for row in rows.values()] == [False, False, True] and rows["loss"]["unit"] == "nats"
    assert rows["entropy"]["limit"] == run.entropy.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_any_kind_of_number_is_kept(dtype):
    values = torch.tensor([0, 1, 3]).to(dtype)
    [row] = payload(show.TokenView(list("abc"), values))["rows"]
    assert array(row["values"]).tolist() == values.tolist() and row["name"] == ""


def test_a_list_an_array_and_a_tensor_that_requires_a_gradient_are_one():
    numbers = [0.5, -2.0]
    pages = {show.TokenView(["a", "b"], x)._repr_html_()
             for x in (numbers, np.array(numbers), torch.tensor(numbers, requires_grad=True), [torch.tensor(x) for x in numbers])}
    assert len(pages) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0, nan, -0.0])
def test_numbers_that_are_all_zero_or_all_missing_have_a_scale(value):
    assert payload(show.TokenView(["a"], [value], gaps=True))["rows"][0]["limit"] == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value, text", [(3e38, str(int(np.float32(3e38)))), (2.5e-5, "0.0000250"), (123.4, "123"), (-1.234, "-1.23")])
def test_a_still_has_three_digits_of_the_largest_number(value, text):
    first = still(show.TokenView(["a", "b"], [value, 0]))
    assert re.findall("<small>(.*?)</small>", first)[0] == text and "-0" not in first


def test_the_river_holds_the_experts_and_weights_of_the_chosen_layers(run):
    view = show.RiverView.of(run.routing, run.words, layers=[3, 1])
    data, at = payload(view), [3, 1]
    assert (data["layers"], data["n"], data["k"]) == (at, run.model.config.n_experts, run.routing.k)
    assert array(data["experts"], np.uint8).tolist() == run.routing.experts[at, 0].flatten().tolist()
    assert array(data["weights"]).tolist() == run.routing.weights[at, 0].flatten().tolist()
    assert payload(show.RiverView.recorded(run.acts, run.words, layers=[3, 1])) == data


def test_the_river_leaves_padding_out():
    experts, weights = torch.tensor([[[[0, 1], [7, 7], [2, 0]]]]), torch.tensor([[[[0.75, 0.25], [nan, nan], [0.5, 0.5]]]])
    routing = Routing.from_choices(experts, weights, 3, valid=torch.tensor([[True, False, True]]))
    data = payload(show.RiverView.of(routing, ["a", "pad", "c"]))
    assert data["words"] == ["a", "c"] and array(data["experts"], np.uint8).tolist() == [0, 1, 2, 0]


def test_the_river_of_more_than_256_experts_keeps_their_numbers():
    view = show.RiverView(torch.tensor([[[300, 2]]]), torch.tensor([[[0.9, 0.1]]]), ["a"], n_experts=301)
    assert array(payload(view)["experts"], "<u2").tolist() == [300, 2]


def test_the_map_of_patching_holds_the_mean_effect_on_a_scale_from_minus_one_to_one(run, views):
    data = payload(views["patching"])
    [effect] = data["maps"]
    assert np.array_equal(array(effect["values"]).reshape(4, 6), run.patching.mean.float().numpy())
    assert (effect["limit"], effect["signed"]) == (1, True)
    assert data["rows"] == [f"{layer}.resid_pre" for layer in range(4)] and data["columns"] == run.words[:6]


def test_the_map_of_the_lens_holds_its_words_their_probabilities_and_four_maps(run, views):
    data, s = payload(views["lens"]), len(run.words)
    cells = np.array(data["words"])[array(data["cells"], "<u4")].reshape(9, s, 3)
    assert cells[5, 3].tolist() == show.words(run.lens.top_ids[5, 0, 3, :3], run.encoding)
    assert np.array_equal(array(data["shares"]).reshape(9, s, 3), run.lens.top_prob[:, 0, :, :3].numpy())
    maps = [array(row["values"]).reshape(9, s) for row in data["maps"]]
    wanted = [run.lens.top_prob[..., 0], run.lens.target_prob, run.lens.entropy, run.lens.kl.clamp(min=0)]
    assert all(np.array_equal(x, y[:, 0].numpy(), equal_nan=True) for x, y in zip(maps, wanted, strict=True))
    assert data["rows"] == run.lens.labels and [row["root"] for row in data["maps"]] == [True, True, False, False]


def test_some_readings_and_positions_of_the_lens(run):
    data = payload(show.MapView.of_lens(run.lens, run.tokens, None, readings=[8, 0], positions=[2], top=1))
    assert (data["rows"], data["columns"], data["k"]) == (["3 experts", "embed"], [str(run.tokens[0, 2].item())], 1)
    assert array(data["shares"]).tolist() == run.lens.top_prob[[8, 0], 0, 2, 0].tolist()


# ------------------------------------------------------------------------------------------ self-contained and safe


@every_kind
def test_a_view_is_small_loads_nothing_and_is_the_same_each_time(kind, run, views, tmp_path):
    page = views[kind]._repr_html_()
    assert len(page.encode()) < 60_000
    assert not re.search("https?:", page, re.I)
    besides = re.sub(r"\bD = \{.*\};", "", page) + payload(views[kind])["css"]  # base64 may spell anything
    assert not re.search(r"//\w|\b(src|href|import|fetch|XMLHttpRequest|WebSocket|url)\b\s*[=(:]|@import", besides)
    assert page == run.views()[kind]._repr_html_()
    file = views[kind].save(tmp_path / "view.html")
    assert file.read_text("utf-8").count(page) == 1 and "default-src 'none'" in file.read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["view.html"]


def test_a_page_that_cannot_be_written_leaves_what_was_there(views, tmp_path):
    (tmp_path / "view.html").mkdir()
    with pytest.raises(OSError):
        views["token"].save(tmp_path / "view.html")
    assert [path.name for path in tmp_path.iterdir()] == ["view.html"]


@every_kind
def test_another_number_makes_another_id(kind, views):
    ident = re.search(r'id="([a-z]+-\w{12})"', views[kind]._repr_html_())[1]
    assert ident not in views["pattern" if kind == "token" else "token"]._repr_html_()


@pytest.mark.parametrize("view", evil_views(), ids=["token", "river", "map"])
def test_no_word_and_no_name_can_leave_its_place(view, tmp_path):
    class Tags(HTMLParser):
        seen = ()

        def handle_starttag(self, tag, attrs):
            self.seen += (tag,)
            assert {name for name, _ in attrs} <= {"id", "role", "aria-label", "data-view", "data-for", "style", "scope"}

    page, tags = view._repr_html_(), Tags()
    tags.feed(page)
    assert set(tags.seen) <= {"div", "script", "p", "b", "br", "small", "span", "table", "tr", "th", "td"}
    assert page.count("<script") == page.count("</script>") == 1 and "<!--" not in page
    assert page.count("</div>") == page.count("<div") == 2
    names = payload(view).get("words") or payload(view)["columns"]
    assert names == [word if word != "\ud800" else "\\ud800" for word in EVIL]
    view.save(tmp_path / "view.html")


def test_what_would_be_too_large_is_refused_with_its_size():
    with pytest.raises(ValueError, match=r"the view would take \d\d\d,\d\d\d bytes, 150,000 are allowed: give fewer tokens"):
        show.TokenView(["word"] * 20_000, torch.ones(20_000))
    with pytest.raises(ValueError, match="give fewer layers or tokens"):
        show.RiverView(torch.arange(4).expand(36, 400, 4), torch.ones(36, 400, 4), ["x"] * 400, n_experts=128)
    with pytest.raises(ValueError, match="give fewer rows, columns, maps or words a cell"):
        show.MapView(torch.ones(200, 200), ["x"] * 200, ["x"] * 200, title="")


def test_views_of_the_size_of_real_models_fit():
    experts = torch.rand(36, 120, 128).argsort(-1)[..., :4]
    show.RiverView(experts, torch.rand(36, 120, 4), ["␣word"] * 120, n_experts=128)
    show.TokenView(["␣word"] * 1000, {name: torch.rand(1000) for name in "abc"})
    show.MapView(torch.randn(73, 100), ["36 attention"] * 73, ["␣word"] * 100, title="")


# ------------------------------------------------------------------------------------------ without scripts, without sight


@every_kind
def test_the_still_is_coloured_in_each_cell_and_needs_no_style_sheet(kind, views):
    first = still(views[kind])
    assert len(re.findall(r'style="background-color:#[0-9a-f]{6};color:#(000|fff)"', first)) > 5
    assert "class=" not in first and "<style" not in first and views[kind].title in first


def test_the_stills_tell_the_numbers(run, views):
    written = re.findall(r"<small>(.*?)</small>", still(views["token"]))
    assert written == [f"{x:.2f}" if x == x else "" for x in run.loss]
    assert re.findall(r"<span[^>]*>(.*?)</span>", still(views["token"])) == run.words
    assert still(views["token"]).count("<br>") == "".join(run.words).count("⏎")
    experts, weights = run.routing.path()
    order = weights[2].argsort(descending=True)
    row = re.findall(r"<tr>.*?</tr>", still(views["river"]))[2]
    assert re.findall(r"<td[^>]*>(.*?)</td>", row) == [f"{experts[2, j]}: {weights[2, j]:.2f}" for j in order]
    rows = re.findall(r"<tr>.*?</tr>", still(views["patching"]))
    assert re.findall(r"<td[^>]*>(.*?)</td>", rows[1]) == [f"{round(x, 2) + 0.0:.2f}" for x in run.patching.mean[0].tolist()]
    assert "show" not in rows[0] and "a part" in still(views["lens"])


def test_black_or_white_can_be_read_on_every_colour_of_a_still():
    def light(text):
        c = [int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in c)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for share in np.linspace(-1, 1, 41):
        back, text = re.search(r"#(\w{6});color:#(\w{3})", chip("x", float(share))).groups()
        one, other = sorted([light(back), light(text * 2)])
        assert (other + 0.05) / (one + 0.05) >= 4.5, share


@every_kind
def test_a_view_has_a_name_for_screen_readers_and_says_what_it_is(kind, views):
    view = views[kind]
    assert view._repr_html_().startswith(f'<div id="{view.kind}-')
    assert f'role="group" aria-label="{view.title}"' in view._repr_html_()
    assert repr(view).startswith(f"{type(view).__name__} of {view.title}: ") and "\n" not in repr(view)


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "words, values, options, message",
    [
        ([], [], {}, "words is empty"),
        ("ab", [1, 2], {}, "words must be strings in a list, not 'ab'"),
        ([1, 2], [1, 2], {}, "words must be strings in a list, not 1"),
        (["a", "b"], [1], {}, r"values are torch.int64 \(1,\)|\(1,\): they must be real numbers, \(2,\)"),
        (["a", "b"], {"loss": [1, 2, 3]}, {}, r"values of 'loss' are .*\(3,\)"),
        (["a", "b"], torch.ones(1, 2), {}, r"\(1, 2\): they must be real numbers, \(2,\)"),
        (["a", "b"], {}, {}, "empty dict"),
        (["a", "b"], [1, nan], {}, "hold nan at 1: they must be finite; gaps=True"),
        (["a", "b"], [1, math.inf], {"gaps": True}, "hold inf at 1: they must be finite$"),
        (["a", "b"], [1, "x"], {}, "not an array of numbers"),
        (["a", "b"], [1, None], {}, "not an array of numbers"),
        (["a", "b"], [1, 2j], {}, "must be real numbers"),
        (["a", "b"], {3: [1, 2]}, {}, "names of the values must be strings"),
        (["a", "b"], {"x": [1, 2]}, {"unit": {"y": "nats"}}, "'y' names none of the values: 'x'"),
        (["a", "b"], [1, 2], {"limit": 0}, "limit is 0"),
        (["a", "b"], [1, 2], {"limit": nan}, "limit is nan"),
        (["a", "b"], [1, 2], {"title": 3}, "title and note must be strings"),
    ],
)
def test_the_token_view_refuses(words, values, options, message):
    with pytest.raises(ValueError, match=message):
        show.TokenView(words, values, **options)


def test_the_river_refuses(run):
    experts, weights = torch.arange(2).expand(1, 3, 2), torch.ones(1, 3, 2)
    make = lambda experts, weights, words, n=2, **more: show.RiverView(experts, weights, words, n_experts=n, **more)
    for bad in [(experts, weights[:, :2], "abc"), (experts, weights, "ab"), (experts[0], weights[0], "abc"), (experts[:, :0], weights[:, :0], "")]:
        with pytest.raises(ValueError, match="do not fit together"):
            make(bad[0], bad[1], list(bad[2]))
    with pytest.raises(ValueError, match="do not fit together"):
        make(experts, weights, list("abc"), layers=[0, 1])
    with pytest.raises(ValueError, match="from 0 to 1: they must be whole numbers from 0 to 0"):
        make(experts, weights, list("abc"), n=1)
    with pytest.raises(ValueError, match="whole numbers"):
        make(experts.float(), weights, list("abc"))
    with pytest.raises(ValueError, match="twice"):
        make(experts * 0, weights, list("abc"))
    with pytest.raises(ValueError, match="NaN"):
        make(experts, weights * nan, list("abc"))
    for make in lambda **more: show.RiverView.of(run.routing, run.words, **more), lambda **more: show.RiverView.recorded(run.acts, run.words, **more):
        with pytest.raises(ValueError, match="layer 9 is not among those recorded: 0, 1, 2, 3"):
            make(layers=[1, 9])
        with pytest.raises(ValueError, match="do not fit together"):
            make(layers=[])
        with pytest.raises(ValueError, match="row 1 does not exist"):
            make(row=1)
    with pytest.raises(ValueError, match="words for 16 positions|words for"):
        show.RiverView.of(run.routing, run.words[1:])


def test_the_map_refuses(run):
    make = lambda values, **more: show.MapView(values, ["a", "b"], ["x", "y", "z"], title="", **more)
    good = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"\(3, 2\): they must be real numbers, \(2, 3\)"):
        make(good.T)
    with pytest.raises(ValueError, match=r"values of 'kl' hold nan at \(1, 2\)"):
        make({"kl": torch.tensor([[1, 1, 1], [1, 1, nan]])})
    with pytest.raises(ValueError, match="0 rows and 3 columns"):
        show.MapView(torch.ones(0, 3), [], ["x", "y", "z"], title="")
    for cells in [["x", "y", "z"]], [["x", "y"]] * 2, [["x", "y", ["z", "w"]]] * 2, [["x", "y", []]] * 2:
        with pytest.raises(ValueError, match="cells must be 2 lists of 3 words"):
            make(good, cells=cells)
    with pytest.raises(ValueError, match="cells must be strings"):
        make(good, cells=[[["x"], ["y"], [3]]] * 2)
    with pytest.raises(ValueError, match="give cells too"):
        make(good, shares=torch.ones(2, 3, 1))
    with pytest.raises(ValueError, match=r"\(2, 3, 2\): they must be real numbers, \(2, 3, 1\)"):
        make(good, cells=[["x", "y", "z"]] * 2, shares=torch.ones(2, 3, 2))
    with pytest.raises(ValueError, match="5 words, but position 5 was patched"):
        show.MapView.of_patching(run.patching, run.words[:5])
    for name, option in [("row 1", {"row": 1}), ("reading 9", {"readings": [0, 9]}), ("position -1", {"positions": [-1]}),
                         ("top 6", {"top": 6}), ("top 0", {"top": 0})]:  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} does not exist"):
            show.MapView.of_lens(run.lens, run.tokens, run.encoding, **option)
    with pytest.raises(ValueError, match="the lens read"):
        show.MapView.of_lens(run.lens, run.tokens[:, 1:], run.encoding)


# ------------------------------------------------------------------------------------------ in a browser

PROBE = """<script>
const out = {}, errors = [];
onerror = message => errors.push(message);
for (const e of document.querySelectorAll("[data-view]")) {
    const root = e.shadowRoot, q = s => root.querySelector(s), all = s => [...root.querySelectorAll(s)];
    const key = name => root.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true, cancelable: true}));
    const said = {start: q(".says").textContent, dark: e.hasAttribute("dark"), tab: all("[tabindex='0']:not(.river)").length};
    (q("td[tabindex='0']") || q(".word[tabindex='0']")).focus();
    key("Home");
    said.home = q(".says").textContent;
    said.label = root.activeElement.getAttribute("aria-label");
    key("ArrowRight");
    said.right = q(".says").textContent;
    key("Enter");
    key("ArrowRight");
    said.kept = q(".says").textContent;
    if (q("select")) { q("select").value = q("select").options.length - 1; q("select").dispatchEvent(new Event("input")); }
    said.legend = q(".scale") && q(".scale").textContent;
    said.colours = new Set(all(".word, td").map(x => x.style.background)).size;
    said.circles = all("circle").length;
    if (q("details")) { q("details").open = true; q("details").ontoggle(); said.rows = all("tr").length; }
    said.last = q(".says").textContent;
    out[e.parentElement.id.split("-")[0] + Object.keys(out).length] = said;
}
const pre = document.createElement("pre");
pre.id = "out"; pre.textContent = JSON.stringify({out, errors, images: document.images.length});
document.body.append(pre);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH to look at the views with")
def test_in_a_browser_every_view_answers_to_the_keyboard(run, views, tmp_path):
    pages = [view._repr_html_() for view in [*views.values(), *evil_views()]]
    page = tmp_path / "all.html"
    body = f'<!doctype html><meta charset="utf-8"><body style="color: #ddd; background: #111">{"".join(pages)}{PROBE}'
    page.write_text(body.replace("<body", "<script>window.onerror = m => document.title = m</script><body"), "utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000",
         "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[:300] + done.stderr[-500:]
    import html

    told = json.loads(html.unescape(found[1]))
    assert told["errors"] == [] and "<title>" not in done.stdout and told["images"] == 0
    said, words, s = told["out"], run.words, len(run.words)
    assert list(said) == ["token0", "river1", "map2", "map3", "pattern4", "token5", "river6", "map7"]
    assert all(one["dark"] and one["tab"] == 1 and one["home"] != one["right"] for one in said.values())
    number = lambda x: f"{x:.3g}"
    token, river, lens, patching = (said[name] for name in ("token0", "river1", "map2", "map3"))
    assert token["home"].startswith(f'"{words[0]}", token 0 (0 to {s - 1}): loss no value; entropy {number(run.entropy[0])} nats')
    assert token["right"].startswith(f'"{words[1]}", token 1') and token["label"] == f"{words[0]}: loss no value"
    assert "signed" in token["legend"] and token["legend"].startswith("-") and token["colours"] > 5

    taken = [set(run.routing.experts[layer, 0, i].tolist()) for i in (1, 2) for layer in range(4)]
    both = sum(len(a & b) for a, b in zip(taken[:4], taken[4:]))
    assert river["kept"].endswith(f'With the kept "{words[1]}" (token 1) it shares {both} of {4 * run.routing.k} experts.')
    assert river["rows"] == 5 and river["circles"] == 4 * (run.model.config.n_experts + 2 * run.routing.k)

    top = show.words(run.lens.top_ids[8, 0, 0, :3], run.encoding)
    assert lens["home"].startswith(f'read after "3 experts", token "{words[0]}" (column 0): "{top[0]}" {number(run.lens.top_prob[8, 0, 0, 0])}')
    assert lens["legend"].endswith("KL from the output") and "position" in patching["home"] and patching["legend"] == "-11effect"
