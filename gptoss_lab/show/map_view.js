// D = {title, rows, columns, down, across, maps: [{name, unit, limit, signed, root, values: base64 of float32 [R C]}], css}
// and, where words stand in the cells, {words, k, cells: base64 of uint32 [R C k], places in words; perhaps shares: of
// float32 [R C k]}.
const maps = decoded(D.maps), R = D.rows.length, C = D.columns.length;
const cells = D.cells && new Uint32Array(bytes(D.cells).buffer), shares = D.shares && floats(D.shares);
const words = i => [...cells.subarray(i * D.k, (i + 1) * D.k)].map(word => D.words[word]);
const which = menu("colour:", maps.map(map => map.name)), scale = make("div", {className: "scale"});

let chosen = null;
const header = (scope, text) => {
    const e = make("th", {scope, title: text}, scope === "col" ? make("div", {textContent: text}) : text);
    return e;
};
const across = D.columns.map(name => header("col", name)), down = D.rows.map(name => header("row", name));
const at = [...Array(R * C).keys()].map(i => make("td", {tabIndex: -1, textContent: cells ? words(i)[0] : ""}));
const corner = make("th", {textContent: [D.down && D.down + " ↓", D.across && D.across + " →"].filter(Boolean).join("  ")});
const table = make("table", {className: cells ? "" : "plain", ariaLabel: D.title},
    make("thead", {}, make("tr", {}, corner, ...across)),
    make("tbody", {}, ...down.map((name, y) => make("tr", {}, name, ...at.slice(y * C, (y + 1) * C)))));
table.setAttribute("role", "grid");
const place = new Map(at.map((e, i) => [e, i]));
const pointed = event => { const i = place.get(event.target.closest("td")); if (i !== undefined) choose(i); };
table.addEventListener("mouseover", pointed);
table.addEventListener("focusin", pointed);
table.addEventListener("click", event => event.target.closest("td")?.focus());
table.onkeydown = event => {
    const i = place.get(shadow.activeElement);
    if (i === undefined) return;
    const y = Math.floor(i / C), x = i % C;
    const to = {ArrowRight: [y, x + 1], ArrowLeft: [y, x - 1], ArrowDown: [y + 1, x], ArrowUp: [y - 1, x],
                Home: [y, 0], End: [y, C - 1], PageUp: [0, x], PageDown: [R - 1, x]}[event.key];
    if (!to) return;
    event.preventDefault();
    event.stopPropagation();  // the notebook has plans of its own for arrow keys
    at[within(to[0], 0, R - 1) * C + within(to[1], 0, C - 1)].focus();
};
const grid = make("div", {className: "grid"}, table);
mount(make("div", {className: "head"}, make("b", {textContent: D.title}), ...(maps.length > 1 ? [which] : [])),
    scale, grid, says);

function choose(i) {
    if (i === chosen) return;
    if (chosen !== null) mark(chosen, false);
    mark(chosen = i, true);
    tell();
}
function mark(i, on) {
    at[i].classList.toggle("chosen", on);
    at[i].tabIndex = on ? 0 : -1;
    down[Math.floor(i / C)].classList.toggle("now", on);
    across[i % C].classList.toggle("now", on);
}
function tell() {
    const values = maps.map(map => named(map, map.values[chosen])).join("; ");
    const list = cells && words(chosen).map((word, j) => quoted(word) + (shares ? " " + number(shares[chosen * D.k + j]) : ""));
    const name = (what, text) => (what ? what + " " : "") + quoted(text);
    says.textContent = `${name(D.down, D.rows[Math.floor(chosen / C)])}, ${name(D.across, D.columns[chosen % C])} (column ${chosen % C}): `
        + (list ? list.join(", ") + ". " : "") + values;
}

function draw() {
    const map = maps[which.value];
    at.forEach((e, i) => {
        paint(e, share(map, map.values[i]));
        e.setAttribute("aria-label", (cells ? words(i)[0] + ": " : "") + named(map, map.values[i]));
    });
    scale.replaceChildren(...legend(map));
    if (chosen === null) {
        const sizes = [...map.values].map(x => Number.isNaN(x) ? -1 : Math.abs(x));
        // to begin with: the last word, which is the model's answer, or the largest number
        choose(cells ? R * C - 1 : sizes.indexOf(sizes.reduce((a, b) => Math.max(a, b))));
        const e = at[chosen];
        grid.scrollTo(e.offsetLeft - grid.clientWidth / 2, e.offsetTop - grid.clientHeight / 2);
    }
}
