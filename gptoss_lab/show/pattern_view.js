// D = {title, words, layers, heads, values: base64 of bytes [L H s 1+s], css}.
// A byte is probability * 255; the first of each row is the sink's.
const s = D.words.length, H = D.heads, values = bytes(D.values);
const row = q => { const at = ((+layer.value * H + +head.value) * s + q) * (s + 1); return values.subarray(at, at + s + 1); };

let query = s - 1;
const layer = menu("layer", D.layers), head = menu("head", [...Array(H).keys()]);
const wide = Math.max(1, Math.round(s / 12)), across = 2 * wide + s;  // the sink's column, a gap, the keys
const canvas = make("canvas", {width: across, height: s}), mark = make("div", {className: "mark"});
canvas.setAttribute("role", "img");
const sink = make("span", {className: "word sink", textContent: "sink"});
const {items: words, list} = tokens(D.words, "tokens; the chosen one is the query", choose);
list.prepend(sink);
canvas.onmousemove = canvas.onclick = event =>
    choose(within(Math.floor(event.offsetY / canvas.clientHeight * s), 0, s - 1));
mount(make("div", {className: "head"}, make("b", {textContent: D.title}), layer, head),
    make("div", {className: "map"}, canvas, mark), list, says);

function choose(q) { if (q !== query) { query = q; draw(); } }

function show(e, p) {
    paint(e, Math.sqrt(p));
    e.title = p.toFixed(2);
}

function draw() {
    const now = row(query), q = quoted(D.words[query]);
    show(sink, now[0] / 255);
    words.forEach((e, t) => {
        show(e, now[t + 1] / 255);
        e.classList.toggle("query", t === query);
        e.classList.toggle("later", t > query);
        e.tabIndex = t === query ? 0 : -1;
        e.setAttribute("aria-pressed", t === query);
        e.setAttribute("aria-label", `${D.words[t]}, read with ${(now[t + 1] / 255).toFixed(2)}`);
    });
    const best = [...D.words.keys()].slice(0, query + 1).sort((a, b) => now[b + 1] - now[a + 1]).slice(0, 4);
    says.textContent = `${q} spends ${(now[0] / 255).toFixed(2)} on the sink and reads `
        + best.map(t => `${quoted(D.words[t])} ${(now[t + 1] / 255).toFixed(2)}`).join(", ");

    const g = canvas.getContext("2d");
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
