"""The map of the model holds what was recorded, shows every hook point once, and says of each what is true of it."""
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
from test_views import EVIL, array, payload, still

import gptoss_lab as lab
from gptoss_lab import show
from gptoss_lab.config import published
from gptoss_lab.hooks import POINTS
from gptoss_lab.show.model_view import LOGITS, MADE_FROM, ROWS, STEPS, _short

CHROMIUM = shutil.which("chromium")
SHORTS = [_short(p) for p in POINTS]
POSITIONS = range(-5, 0)


class Run:
    def __init__(self):
        self.model, self.encoding = tiny_random(), lab.tokenizer.tiny()
        text = "One sunny day, Tom and Sue went to the park.\nSue found the blue"
        self.tokens = torch.tensor([self.encoding.encode_ordinary(text)])
        self.words = show.words(self.tokens, self.encoding)
        with torch.no_grad():
            _, self.acts = self.model.run_with_cache(self.tokens, "*")

    def view(self, **more) -> show.ModelView:
        more = {"positions": POSITIONS, "note": "random weights"} | more
        return show.ModelView.recorded(self.acts, self.words, tokenizer=self.encoding, **more)


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


@pytest.fixture(scope="module")
def view(run) -> show.ModelView:
    return run.view()


def decoded(data: dict, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The values [S m c] that the script of a view reads, and by how much each may be off."""
    row = data["values"][name]
    row = data["values"][row] if isinstance(row, str) else row
    shape = len(data["words"]), row["m"], row["c"]
    if row.get("exact"):
        return array(row["data"], "<u4").reshape(shape), np.zeros(shape)
    level = array(row["data"], "i1").reshape(shape).astype(float)
    x = np.sign(level) * (level / STEPS) ** 2 * row["limit"]
    return np.where(level == -128, -np.inf, x), (np.abs(level) + 0.25) / STEPS**2 * row["limit"]


def by_hand(point, x: torch.Tensor) -> np.ndarray:
    """The first row as [s m c], by the letters of the shape."""
    letters = point.shape.split()
    x = x[0] if "b" in letters else x
    letters = [letter for letter in letters if letter != "b"]
    x = x.movedim(letters.index("s"), 0)
    return x.reshape(len(x), *((1,) * (3 - x.dim())), *x.shape[1:]).numpy()


# ------------------------------------------------------------------------------------------ what it holds


def test_every_value_is_the_recorded_one_within_half_a_step(run, view):
    data, at = payload(view), list(POSITIONS)
    assert list(data["values"]) == list(run.acts)
    for name, x in run.acts.items():
        got, off = decoded(data, name)
        want = by_hand(run.acts.points[name], x)[at]
        want = want[..., data["ids"]] if name == "unembed.hook_out" else want
        assert got.shape == want.shape, name
        hidden = np.isneginf(want)
        assert (np.isneginf(got) == hidden).all(), name
        assert (np.abs(np.where(hidden, 0, got) - np.where(hidden, 0, want)) <= off * (1 + 1e-6)).all(), name
    assert data["positions"] == [i % len(run.words) for i in at] and data["words"] == run.words[-5:]
    assert data["keys"] == run.words


def test_the_logits_are_the_largest_in_the_order_of_the_last_token(run, view):
    data, logits = payload(view), run.acts["hook_logits"][0, -5:]
    assert len(data["ids"]) == LOGITS and data["names"] == show.words(data["ids"], run.encoding)
    assert set(data["ids"]) == set(logits.amax(dim=0).topk(LOGITS).indices.tolist())
    last = logits[-1, data["ids"]]
    assert (last.diff() <= 0).all()


def test_every_point_of_the_registry_stands_once_in_the_order_of_the_registry(view):
    assert [p["name"] for p in payload(view)["points"]] == [p.name for p in POINTS]
    assert set(ROWS) <= set(SHORTS) and set(MADE_FROM) <= set(SHORTS)
    for p, row in zip(POINTS, payload(view)["points"]):
        assert (row["shape"], row["what"], bool(row["edit"])) == (p.shape, p.what, p.writable)
        assert row["also"] == list(p.aliases)


def test_the_point_that_is_shown_first_can_be_chosen(run):
    place = lambda **more: payload(run.view(points="*.hook_q", **more))["start"]
    assert place() == [SHORTS.index("attn.pattern"), 0]
    assert place(layers=[1, 3], start=("scale", 3, "ln2")) == [SHORTS.index("ln2.scale"), 1]
    assert place(start="hook_logits") == [SHORTS.index("unembed.out"), 0]


def test_what_was_not_recorded_has_its_box_and_no_values(run):
    with lab.record(run.model, "*.hook_pattern", "blocks.1.attn.hook_q") as acts, torch.no_grad():
        run.model(run.tokens)
    data = payload(show.ModelView.recorded(acts, run.words, layers=[-3, 0]))
    assert data["layers"] == [1, 0]
    assert list(data["values"]) == ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_q", "blocks.1.attn.hook_pattern"]
    assert len(data["points"]) == len(POINTS) and data["sizes"]["h"] == run.model.config.d_head
    assert "E" not in data["sizes"] and [p for p in data["points"] if p["name"] == "unembed.hook_out"][0]["cost"] == ""
    few = payload(run.view(points=["*.hook_z", ("scale", 2, "ln1")], layers=[2], positions=None))
    assert list(few["values"]) == ["blocks.2.ln1.hook_scale", "blocks.2.attn.hook_z"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_batches_and_masks_are_shown(dtype, run):
    model = tiny_random().to(dtype)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        _, acts = model.run_with_cache(run.tokens[:, :8].reshape(2, 4), "*", attention_mask=mask)
    data = payload(show.ModelView.recorded(acts, run.words[4:8], row=1, layers=[3]))
    want = acts["q", 3][1].double().numpy()
    got, off = decoded(data, "blocks.3.attn.hook_q")
    assert (np.abs(got - want) <= off * (1 + 1e-6)).all()
    assert [p["cost"] for p in data["points"] if p["name"] == "hook_embed"] == [f"{96 * dtype.itemsize} bytes a position"]


def test_the_hook_points_of_a_model_and_of_a_config_stand_without_values(run):
    data = payload(show.ModelView.of(run.model))
    assert data["values"] == {} and data["layers"] == [0, 1, 2, 3] and data["sizes"]["V"] == 512
    big = payload(show.ModelView.of(published("gpt-oss-20b")))
    assert len(big["points"]) == len(POINTS) and len(big["layers"]) == 24 and big["sizes"]["E"] == 32
    with pytest.raises(TypeError, match="model must be a GptOss or a Config, got str"):
        show.ModelView.of("tiny")


def test_the_bytes_it_names_are_those_that_recording_takes(run):
    for row in payload(show.ModelView.of(run.model))["points"]:
        name, each = row["name"].replace("{l}", "0"), int(row["cost"].split()[0].replace(",", ""))
        assert lab.cost(run.model, name, 1, 7) == each * 7 * (7 if "key" in row["cost"] else 1), name


# ------------------------------------------------------------------------------------------ what it says is true


@pytest.mark.parametrize("target", MADE_FROM)
def test_a_value_is_made_from_those_that_are_named_and_from_no_others(target, run):
    full = {short: p.name.replace("{l}", "0") for short, p in zip(SHORTS, POINTS)}
    full["resid_post"] = "blocks.3.hook_resid_post"  # that ln_final reads
    target, sources = full[target], [full[short] for short in MADE_FROM[target].split()]
    sources = [name for name in sources if run.model.hook_points[name].writable]
    others = (run.tokens + 7) % 500
    with torch.no_grad(), lab.record(run.model, target, *sources) as here:
        run.model(run.tokens)
    here = dict(here.items())
    if sources:  # an other text, but these from this one
        with torch.no_grad(), lab.edit(run.model, {name: here[name] for name in sources}), lab.record(run.model, target) as there:
            run.model(others)
        torch.testing.assert_close(there[target], here[target], rtol=1e-4, atol=1e-5)
    for name in sources:
        move = lambda x: x.roll(1, dims=1) if x.dtype == torch.int64 else x + 0.1 * torch.randn_like(x)
        with torch.no_grad(), lab.edit(run.model, {name: move}), lab.record(run.model, target) as there:
            run.model(run.tokens)
        assert not torch.allclose(there[target].double(), here[target].double(), rtol=1e-3, atol=1e-3), name


def test_only_what_comes_first_and_the_weights_are_made_from_nothing():
    roots = [short for short in SHORTS if short not in MADE_FROM]
    assert roots == ["tokens", "rotary_emb.cos", "rotary_emb.sin", "attn.sink_scores"]


@pytest.mark.parametrize("place", range(len(POINTS)), ids=SHORTS)
def test_the_lines_to_copy_run_and_the_edit_has_an_effect(place, run):
    row, names = payload(show.ModelView.of(run.model))["points"][place], {}
    name = row["name"].replace("{l}", "1")
    given = {"lab": lab, "model": run.model, "tokens": run.tokens}
    with torch.no_grad():
        exec(f'with lab.record(model, "{name}") as acts: model(tokens)\nx = acts[{row["key"].replace("{l}", "1")}]', given, names)
        torch.testing.assert_close(names["x"], run.acts[name], rtol=1e-4, atol=1e-5)
        if row["edit"]:
            exec(f'with lab.edit(model, {{"{name}": lambda x: {row["edit"]}}}):\n    logits = model(tokens)', given, names)
            assert names["logits"].isfinite().all()
            assert (names["logits"] - run.acts["hook_logits"]).abs().max() > 0.01


# ------------------------------------------------------------------------------------------ self-contained and safe


def test_it_is_small_loads_nothing_and_is_the_same_each_time(run, view):
    page = view._repr_html_()
    assert len(page.encode()) < 150_000
    assert not re.search("https?:", page, re.I)
    besides = re.sub(r"\bD = \{.*\};", "", page) + payload(view)["css"]
    assert not re.search(r"//\w|\b(src|href|import|fetch|XMLHttpRequest|WebSocket|url)\b\s*[=(:]|@import", besides)
    assert page == run.view()._repr_html_()


def test_tokens_and_titles_cannot_leave_their_place(run):
    with torch.no_grad():
        _, acts = run.model.run_with_cache(run.tokens[:, : len(EVIL)], "*")
    view = show.ModelView.recorded(acts, EVIL, layers=[0], positions=[0, 1, 2, 9], title=EVIL[0], note=EVIL[1])

    class Tags(HTMLParser):
        seen = ()

        def handle_starttag(self, tag, attrs):
            self.seen += (tag,)

    page, tags = view._repr_html_(), Tags()
    tags.feed(page)
    assert set(tags.seen) == {"div", "script", "p", "b", "table", "tr", "th", "td"}
    assert page.count("<script") == page.count("</script>") == 1 and "<!--" not in page
    assert payload(view)["keys"][:9] == EVIL[:9]


def test_the_still_names_all_points_in_order_and_is_coloured(view):
    first = still(view)
    rows = re.findall(r"<tr><td[^>]*>(.*?)</td><td>(.*?)</td>", first)
    assert rows == [(p.name, p.shape) for p in POINTS]
    assert "<script" not in first and "class=" not in first and "<div" not in first
    assert len(set(re.findall(r"background-color:(#\w{6})", first))) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": [4]}, "layer 4 does not exist: there are 4, from 0"),
        ({"layers": []}, r"layers \[\]: give one or more"),
        ({"layers": [1, -3]}, r"layers \[1, -3\]: give one or more, each of them once"),
        ({"positions": [99]}, "position 99 does not exist"),
        ({"positions": [0, 0]}, "each of them once"),
        ({"row": 1}, "row 1 does not exist: there are 1"),
        ({"positions": None}, r"the view would take \d{3},\d{3} bytes, 150,000 are allowed: give fewer layers, positions or points"),
        ({"layers": [0], "start": ("q", 1)}, r"start is blocks.1.attn.hook_q: that layer is not among those shown, \[0\]"),
        ({"note": 3}, "title and note must be strings"),
    ],
)  # fmt: skip
def test_it_refuses(options, message, run):
    with pytest.raises(ValueError, match=message):
        run.view(**options)


def test_it_refuses_what_is_no_recording_words_that_do_not_fit_and_layers_that_were_not_recorded(run):
    make = show.ModelView.recorded
    with pytest.raises(ValueError, match="acts must be what record or .* gives, got dict"):
        make({}, run.words)
    with lab.record(run.model) as empty:
        pass
    with pytest.raises(ValueError, match="which holds nothing yet"):
        make(empty, run.words)
    with pytest.raises(ValueError, match=rf"3 words for {len(run.words)} recorded positions"):
        make(run.acts, run.words[:3])
    with pytest.raises(ValueError, match="words must be strings in a list"):
        make(run.acts, "abc")
    with lab.record(run.model, ("q", 0)) as acts, torch.no_grad():
        run.model(run.tokens)
    with pytest.raises(ValueError, match="layer 2 is not among those recorded: 0"):
        make(acts, run.words, layers=[0, 2])
    with pytest.raises(KeyError, match="no hook point matches"):
        make(acts, run.words, points="*.hook_nothing")
    nan = {("q", 0): lambda q: q * math.nan}
    with lab.edit(run.model, nan), lab.record(run.model, ("q", 0)) as acts, torch.no_grad():
        run.model(run.tokens)
    with pytest.raises(ValueError, match="blocks.0.attn.hook_q holds NaN"):
        make(acts, run.words)


def test_repr_is_one_line(view):
    assert repr(view) == f"ModelView of {view.title}: layers [0, 1, 2, 3], 5 tokens"


# ------------------------------------------------------------------------------------------ in a browser

PROBE = """<script>
const out = {}, errors = [];
for (const e of document.querySelectorAll("[data-view]")) {
    const root = e.shadowRoot, q = s => root.querySelector(s), all = s => [...root.querySelectorAll(s)];
    const key = name => root.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true, cancelable: true}));
    const menu = (name, i) => { const m = all("select").find(x => x.ariaLabel === name); m.value = i; m.dispatchEvent(new Event("input")); };
    const said = {boxes: all(".box").length, tab: all(".box[tabindex='0']").length, names: [], told: {}, from: {}, lines: []};
    menu("layer", 1);
    for (const box of all(".box")) {
        box.click();
        const name = q("h4").textContent;
        said.names.push(name);
        said.from[name] = all(".from button").map(b => b.textContent);
        if (q("canvas[role]") && q(".says").textContent) {
            q("canvas[role]").focus();
            for (const press of ["Home", "ArrowUp", "ArrowUp", "ArrowUp", "ArrowUp", "ArrowUp"]) key(press);
            said.told[name] = q(".says").textContent;
        }
    }
    all(".box")[3].focus();
    key("Home");
    key("ArrowRight");
    said.walked = q("h4").textContent;
    all(".box").find(b => b.textContent === "q").click();
    if (all(".word").length) {
        all(".word")[0].click();
        menu("rows", 1);
        menu("which", 2);
        said.head = q(".says").textContent;
        said.rows = all(".names > div").map(x => x.textContent);
    }
    said.code = all("pre").map(x => x.textContent);
    said.dark = e.hasAttribute("dark");
    out[Object.keys(out).length] = said;
}
const pre = document.createElement("pre");
pre.id = "out"; pre.textContent = JSON.stringify({out, errors});
document.body.append(pre);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH to look at the views with")
def test_in_a_browser_every_box_shows_its_point_and_its_numbers(run, view, tmp_path):
    import html

    page = tmp_path / "page.html"
    parts = f"{view._repr_html_()}{show.ModelView.of(run.model)._repr_html_()}{PROBE}"
    body = f'<!doctype html><meta charset="utf-8"><script>onerror = m => document.title = m</script><body style="color: #ddd; background: #111">{parts}'
    page.write_text(body, "utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000",
         "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)
    assert found and "<title>" not in done.stdout, done.stdout[:300] + done.stderr[-500:]
    told = json.loads(html.unescape(found[1]))
    values, alone = told["out"]["0"], told["out"]["1"]
    want = [p.name.replace("{l}", "1") for p in POINTS]
    assert values["names"] == alone["names"] == want and values["boxes"] == len(POINTS) and values["tab"] == 1
    assert values["dark"] and values["walked"] == "hook_embed" and alone["told"] == {}
    data = payload(view)
    for name in want:  # the first number of the chosen token, or, where there are no heads or slots, of the first one
        x, off = decoded(data, name)
        first, by = (x[-1, 0, 0], off[-1, 0, 0]) if x.shape[1] > 1 else (x[0, 0, 0], off[0, 0, 0])
        said = values["told"][name].rsplit(": ", 1)[1]
        if said == "-∞":
            assert first == -math.inf, name
        elif by == 0:
            assert int(said) == first, name
        else:
            number, around = map(float, said.split(" ± "))
            assert number == pytest.approx(first, rel=6e-3, abs=1e-12) and around == pytest.approx(by, rel=0.5), name
    assert values["from"]["blocks.1.hook_resid_pre"] == ["resid_post of layer 0"]
    assert values["from"]["blocks.1.hook_resid_mid"] == ["resid_pre", "attn_out"]
    assert values["rows"] == run.words[-5:] and "head 2" in values["head"] and f'"{run.words[-5]}"' in values["head"]
    assert values["code"] == alone["code"] == [
        'with lab.record(model, "blocks.1.attn.hook_q") as acts: model(tokens)\nacts["q", 1]',
        'with lab.edit(model, {"blocks.1.attn.hook_q": lambda x: 0 * x}):\n    logits = model(tokens)',
    ]  # fmt: skip
