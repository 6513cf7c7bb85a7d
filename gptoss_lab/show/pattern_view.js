// ID and D are set by the page: D = {title, words, layers, heads, values: base64 of bytes [L H s 1+s], css}.
// A byte is probability * 255; the first of each row is the sink's.
const script = document.currentScript;  // null where a notebook runs scripts on its own
const root = script && script.dataset.for === ID ? script.parentElement : document.getElementById(ID);
const host = root.querySelector("[data-view]");
if (host.shadowRoot) return;
const shadow = host.attachShadow({mode: "open"});

const s = D.words.length, H = D.heads;
const bytes = Uint8Array.from(atob(D.values), c => c.charCodeAt(0));
const row = q => { const at = ((+layer.value * H + +head.value) * s + q) * (s + 1); return bytes.subarray(at, at + s + 1); };
const make = (tag, set = {}, ...inside) => { const e = Object.assign(document.createElement(tag), set); e.append(...inside); return e; };
const menu = (name, items) => make("select", {ariaLabel: name, oninput: () => draw()},
    ...items.map((item, i) => make("option", {value: i, textContent: `${name} ${item}`})));

let query = s - 1;
const layer = menu("layer", D.layers), head = menu("head", [...Array(H).keys()]);
const wide = Math.max(1, Math.round(s / 12)), across = 2 * wide + s;  // the sink's column, a gap, the keys
const canvas = make("canvas", {width: across, height: s}), mark = make("div", {className: "mark"});
canvas.setAttribute("role", "img");
const sink = make("span", {className: "word sink", textContent: "sink"});
const words = D.words.map((word, i) => {
    const e = make("span", {className: "word", textContent: word, tabIndex: i === query ? 0 : -1});
    e.setAttribute("role", "button");
    e.onmouseenter = e.onfocus = e.onclick = () => choose(i);
    return e;
});
const list = make("div", {className: "words", role: "group", ariaLabel: "tokens; the chosen one is the query"}, sink, ...words);
list.onkeydown = event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();  // the notebook has plans of its own for arrow keys
    words[Math.min(s - 1, Math.max(0, query + step))].focus();
};
const says = make("div", {className: "says"});
says.setAttribute("aria-live", "polite");
canvas.onmousemove = canvas.onclick = event =>
    choose(Math.min(s - 1, Math.max(0, Math.floor(event.offsetY / canvas.clientHeight * s))));
shadow.append(make("style", {textContent: D.css}), make("div", {className: "view"},
    make("div", {className: "head"}, make("b", {textContent: D.title}), layer, head),
    make("div", {className: "map"}, canvas, mark), list, says));

function choose(q) { if (q !== query) { query = q; draw(); } }

function paint(e, p) {
    const ink = Math.sqrt(p);
    e.style.background = `rgba(var(--ink), ${ink.toFixed(3)})`;
    e.style.color = ink > .6 ? "var(--back)" : "";
    e.title = p.toFixed(2);
}

function draw() {
    const now = row(query), q = JSON.stringify(D.words[query]);
    paint(sink, now[0] / 255);
    words.forEach((e, t) => {
        paint(e, now[t + 1] / 255);
        e.classList.toggle("query", t === query);
        e.classList.toggle("later", t > query);
        e.tabIndex = t === query ? 0 : -1;
        e.setAttribute("aria-pressed", t === query);
        e.setAttribute("aria-label", `${D.words[t]}, read with ${(now[t + 1] / 255).toFixed(2)}`);
    });
    const best = [...D.words.keys()].slice(0, query + 1).sort((a, b) => now[b + 1] - now[a + 1]).slice(0, 4);
    says.textContent = `${q} spends ${(now[0] / 255).toFixed(2)} on the sink and reads `
        + best.map(t => `${JSON.stringify(D.words[t])} ${(now[t + 1] / 255).toFixed(2)}`).join(", ");

    const ink = getComputedStyle(host).getPropertyValue("--ink"), g = canvas.getContext("2d");
    g.clearRect(0, 0, across, s);
    for (let y = 0; y < s; y++) row(y).forEach((byte, t) => {
        if (t > y + 1) return;  // a later key
        g.fillStyle = `rgba(${ink}, ${.08 + .92 * Math.sqrt(byte / 255)})`;
        g.fillRect(t ? 2 * wide + t - 1 : 0, y, t ? 1 : wide, 1);
    });
    mark.style.top = `${100 * query / s}%`;
    mark.style.height = `${100 / s}%`;
    canvas.setAttribute("aria-label", `layer ${D.layers[layer.value]}, head ${head.value}: queries downwards, `
        + "the sink and then the keys to the right");
}

function dress() {  // light or dark, as the text around it is
    const [r, g, b] = getComputedStyle(root).color.match(/[\d.]+/g).map(Number);
    host.toggleAttribute("dark", r + g + b > 384);
    draw();
}
const watch = new MutationObserver(() => setTimeout(dress, 60));
for (const e of [document.documentElement, document.body]) watch.observe(e, {attributes: true});
dress();
