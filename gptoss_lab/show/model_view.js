// D = {title, layers, of: layers of the model, points: [{name, panel, row, shape, what, also, key, edit, from, cost}],
// letters: {letter: name}, sizes: {letter: number}, start: [point, layer], words, positions, keys, ids, names, css,
// values: {name: {m, c, limit, data: base64 of int8 [S m c], or with exact: true of uint32; or another's name}}}.
// A level q stands for sign(q) (q / 127)^2 limit, -128 for -inf.
const S = D.words.length, STEPS = 127, HIDDEN = -128, hooked = name => name.split(".").pop().replace("hook_", "");
const P = D.points.map(p => {
    const leaf = hooked(p.name), axes = p.shape.split(" ").filter(x => !"bs".includes(x));
    const alike = D.points.filter(q => hooked(q.name) === leaf).length > 1;  // ln1, ln2 and ln_final have an out each
    const label = hooked(p.also.find(x => x.startsWith("hook_")) ?? leaf);
    const called = alike && label === leaf ? p.name.split(".").at(-2) + "." + leaf : label;
    return {...p, leaf, label, called, rows: axes[1] && axes[0], columns: axes.at(-1) ?? ""};
});
let at = D.start[0], token = S - 1, cursor = null;

const layer = menu("layer", D.layers);
layer.value = D.start[1];
layer.oninput = () => { cursor = null; draw(); };
const l = () => D.layers[layer.value];
const put = text => text.replaceAll("{l}", l());
const cache = new Map();
function kept(p) {  // the values of a point in the chosen layer, or undefined
    let name = put(p.name);
    if (typeof D.values[name] === "string") name = D.values[name];
    const row = D.values[name];
    if (row && !cache.has(name)) {
        const raw = bytes(row.data).buffer;
        const levels = row.exact ? new Uint32Array(raw) : new Int8Array(raw);
        cache.set(name, {...row, levels, signed: levels.some(q => q < 0 && q !== HIDDEN)});
    }
    return cache.get(name);
}
const level = (v, s, m, c) => v.levels[(s * v.m + m) * v.c + c];
const part = q => q === HIDDEN ? NaN : q / STEPS;
const told = (v, q) => v.exact ? String(q) : q === HIDDEN ? "-∞" : number(Math.sign(q) * (q / STEPS) ** 2 * v.limit);
const about = (v, q) => v.exact || q === HIDDEN ? told(v, q)
    : `${told(v, q)} ± ${((Math.abs(q) + .25) / STEPS ** 2 * v.limit).toPrecision(1)}`;

// ---- the map

const cell = p => {
    const e = make("button", {className: p.edit ? "box" : "box derived", type: "button", tabIndex: -1}, p.label);
    e.stripe = e.appendChild(make("canvas", {width: 24, height: 1}));
    e.onclick = () => { choose(P.indexOf(p)); if (narrow()) card.scrollIntoView({block: "start", behavior: "smooth"}); };
    return e;
};
const boxes = P.map(cell);
const map = make("div", {className: "map", role: "group", ariaLabel: "map of the model in reading order"});
const block = make("div", {className: "block"}, make("div", {className: "head lane first"}, make("b", {textContent: "block"}), layer, make("span", {className: "quiet", textContent: `of ${D.of}, one after the other`})));
const said = {attention: ["attention ", "reads earlier tokens"],
              experts: ["experts ", D.sizes.k ? `${D.sizes.k} of ${D.sizes.E ?? "the"} work on each token` : "a few work on each token"]};
let panel, row, last = "";
P.forEach((p, i) => {
    const writes = p.panel === "stream" && p.leaf.endsWith("_out");  // added to the stream: by the panel before it
    const group = writes ? last + " write" : p.panel;
    if (group !== panel?.group || p.panel === "stream") {
        const lane = make("div", {className: `lane ${group}`});
        if (i === 0) lane.classList.add("first");
        let inside = lane;
        if (said[p.panel]) {
            const [name, does] = said[p.panel];
            inside = make("div", {className: "panel", role: "group", ariaLabel: name + does},
                make("b", {}, name, make("span", {textContent: does})));
            lane.append(make("span", {className: "turn"}), inside);
            last = p.panel;
        }
        if (writes) lane.append(make("span", {className: "plus", textContent: "+", ariaHidden: "true"}));
        panel = {group, inside};
        (p.name.includes("{l}") ? block : map).append(lane);
        if (p.name.includes("{l}") && !block.parentNode) map.append(block);
        row = null;
    }
    if (!row || p.row) {
        row = make("div", {className: "boxes"});
        panel.inside.append(make("div", {className: "row"}, ...(p.row ? [make("span", {className: "does", textContent: p.row})] : []), row));
    }
    row.append(boxes[i]);
});
map.lastChild.classList.add("last");
map.append(make("p", {className: "quiet key", textContent: "Grey line: the residual stream. Dashed: derived, read only. Ringed: what the chosen one is made from."
    + (S ? " Stripe in a box: the chosen token's values." : "")}));
map.onkeydown = event => {
    const now = boxes.indexOf(shadow.activeElement), end = P.length - 1;
    const to = {ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1, Home: 0, End: end}[event.key];
    if (now < 0 || to === undefined) return;
    event.preventDefault();
    event.stopPropagation();  // the notebook has plans of its own for arrow keys
    choose(within(to, 0, end));
    boxes[at].focus();
};

// ---- the chosen point

const name = make("h4"), what = make("div"), step = make("span", {className: "quiet"}), facts = make("dl");
const go = (text, label, by) => make("button", {type: "button", textContent: text, ariaLabel: label, onclick: () => choose(within(at + by, 0, P.length - 1))});
const rows = make("select", {ariaLabel: "rows", oninput: () => { cursor = null; draw(); }}), which = make("select", {ariaLabel: "which", oninput: () => draw()});
const scale = make("div", {className: "scale"}), names = make("div", {className: "names"}), canvas = make("canvas", {tabIndex: 0});
const along = make("div", {className: "along"}), room = make("div", {}, canvas), tensor = make("div", {className: "tensor"}, names, room, along);
canvas.setAttribute("role", "application");
const rounding = make("div", {className: "quiet", textContent: `Values are kept in ${STEPS} steps of each sign on a square-root scale: numbers are rounded, ± says how much.`});
const shown = make("div", {}, make("div", {className: "head"}, rows, which), tensor, scale, says, rounding);
const absent = make("p", {className: "quiet"});
const card = make("div", {className: "about", role: "group", ariaLabel: "the chosen hook point"},
    make("div", {className: "go"}, go("◀", "previous point", -1), go("▶", "next point", 1), step,
        make("button", {type: "button", className: "back", textContent: "▲ map", onclick: () => { map.scrollIntoView({block: "nearest"}); boxes[at].focus(); }})),
    name, what, shown, absent, facts);
const {items, list} = tokens(D.words, "tokens; the chosen one is shown", i => { if (i !== token) { token = i; cursor = null; draw(); } });
const fewer = D.values && S && D.keys.length > S ? `values of ${S} of ${D.keys.length} positions are kept` : "";
const narrow = () => card.offsetTop > map.offsetTop + 40;

function choose(i) {
    if (i === at) return;
    at = i;
    cursor = null;
    draw();
}

const letters = p => p.shape.split(" ");
const code = text => make("code", {textContent: text});
function draw() {
    const p = P[at], v = kept(p), full = put(p.name);
    const from = p.leaf === "resid_pre" && l() > 0 ? [P.findIndex(q => q.leaf === "resid_post")] : p.from;
    boxes.forEach((e, i) => {
        e.setAttribute("aria-pressed", i === at);
        e.tabIndex = i === at ? 0 : -1;
        e.classList.toggle("source", from.includes(i));
        e.setAttribute("aria-label", `${put(P[i].name)}, step ${i + 1} of ${P.length}` + (from.includes(i) ? ", read by the chosen one" : ""));
        stripe(e.stripe, kept(P[i]));
    });
    items.forEach((e, i) => {
        e.classList.toggle("chosen", i === token);
        e.setAttribute("aria-pressed", i === token);
        e.tabIndex = i === token ? 0 : -1;
    });
    name.textContent = full;
    what.textContent = p.what;
    step.textContent = `step ${at + 1} of ${P.length}`;
    const source = i => make("button", {type: "button", textContent: P[i].called + (P[i].leaf === "resid_post" && p.leaf === "resid_pre" ? ` of layer ${l() - 1}` : ""), onclick: () => choose(i)});
    const fact = (title, ...inside) => [make("dt", {textContent: title}), make("dd", {}, ...inside)];
    facts.replaceChildren(
        ...fact("shape", code(p.shape), " = ", letters(p).map(x => D.sizes[x] ?? x).join(" × "), make("div", {className: "quiet", textContent: letters(p).map(x => D.letters[x]).join(" × ")})),
        ...(from.length ? [make("dt", {textContent: "made from"}), make("dd", {className: "from"}, ...from.map(source))] : []),
        ...fact("record", make("pre", {textContent: `with lab.record(model, "${full}") as acts: model(tokens)\nacts[${put(p.key)}]`}), make("span", {className: "quiet", textContent: p.cost})),
        ...fact("edit", ...(p.edit ? [make("pre", {textContent: `with lab.edit(model, {"${full}": lambda x: ${p.edit}}):\n    logits = model(tokens)`})] : ["derived: it can be read, but nothing is computed from it"])),
        ...(p.also.length ? fact("also called", make("span", {className: "quiet"}, code(p.also.map(put).join(", ")))) : []));
    shown.hidden = !v;
    absent.hidden = !!v || !S;
    absent.textContent = "Its values are not in this view.";
    if (v) {
        const choices = v.m > 1 ? [`rows: ${axis(p)}s of the chosen token`, `rows: tokens, of one ${axis(p)}`] : [];
        fill(rows, choices);
        fill(which, v.m > 1 && rows.value === "1" ? [...Array(v.m).keys()].map(i => `${axis(p)} ${i}`) : []);
        scale.replaceChildren(...(v.exact ? [] : legend({limit: v.limit, signed: v.signed, root: !v.signed, unit: "", values: []})));
        heat();
    }
}
function fill(e, choices) {  // a menu with these choices, the chosen one kept where it can be
    const old = +e.value || 0;
    e.replaceChildren(...choices.map((text, i) => make("option", {value: i, textContent: text})));
    e.hidden = !choices.length;
    if (choices.length) e.value = Math.min(old, choices.length - 1);
}

const axis = p => ({H: "head", K: "key head", k: "slot"})[p.rows] ?? "row";
const taken = (s, slot) => {
    const p = P.find(q => q.leaf === "expert_indices"), v = p && kept(p);
    return v ? level(v, s, 0, slot) : null;
};
const byToken = (p, v) => v.m === 1 || rows.value === "1";
const lines = (p, v) => byToken(p, v) ? S : v.m;
const value = (p, v, y, x) => byToken(p, v) ? level(v, y, v.m > 1 ? +which.value : 0, x) : level(v, token, y, x);
const slot = (p, s, i) => { const e = axis(p) === "slot" ? taken(s, i) : null; return e === null ? `${axis(p)} ${i}` : `expert ${e}`; };
const lineName = (p, v, y) => byToken(p, v) ? D.words[y] : slot(p, token, y);
function columnName(p, x, s) {
    const letter = p.columns;
    if (letter === "t") return D.keys.length ? `key ${quoted(D.keys[x])} (position ${x})` : `key ${x}`;
    if (letter === "V") return D.names[x] === String(D.ids[x]) ? `token id ${D.ids[x]}` : `token ${quoted(D.names[x])} (id ${D.ids[x]})`;
    if (letter === "k") return slot({rows: "k"}, s, x) + (taken(s, x) === null ? "" : ` (slot ${x})`);
    return {H: `head ${x}`, K: `key head ${x}`, E: `expert ${x}`, "1": "", "": "", p: `plane ${x}`}[letter] ?? `dimension ${x}`;
}

function stripe(e, v) {  // the chosen token's values, of each part the largest
    const g = e.getContext("2d");
    g.clearRect(0, 0, 24, 1);
    if (!v || v.exact || !back) return;
    const all = v.levels.subarray(token * v.m * v.c, (token + 1) * v.m * v.c), n = all.length;
    for (let i = 0; i < 24; i++) {
        let best = 0;
        for (let j = Math.floor(i * n / 24); j < Math.max(Math.floor((i + 1) * n / 24), Math.floor(i * n / 24) + 1); j++)
            if (all[j] !== HIDDEN && Math.abs(all[j]) > Math.abs(best)) best = all[j];
        g.fillStyle = css(mixed(best / STEPS));
        g.fillRect(i, 0, 1, 1);
    }
}

let tall, wide;
function heat() {
    const p = P[at], v = kept(p);
    if (!v || !back) return;
    const R = lines(p, v), C = v.c, own = byToken(p, v) ? token : -1;
    tall = Math.round(within(300 / R, 7, 22));
    names.replaceChildren(...[...Array(R).keys()].map(y => {
        const e = make("div", {className: y === own ? "now" : "", textContent: tall > 9 ? lineName(p, v, y) : ""});
        e.style.height = `${tall}px`;
        return e;
    }));
    wide = Math.min(44, room.clientWidth / C);
    const dots = devicePixelRatio || 1, g = canvas.getContext("2d");
    canvas.width = Math.round(C * wide * dots);
    const feet = wide > 11 && {t: D.keys, V: D.names}[p.columns] || [], foot = feet.length && 62;  // names below the columns
    canvas.height = (R * tall + foot) * dots;
    canvas.style.width = `${C * wide}px`;
    canvas.style.height = `${R * tall + foot}px`;
    g.scale(dots, dots);
    g.font = "10px ui-monospace, Menlo, Consolas, monospace";
    g.textAlign = "center";
    g.textBaseline = "middle";
    const decimals = v.exact ? 0 : within(2 - Math.ceil(Math.log10(v.limit)), 0, 3);
    const gap = wide > 5 ? 1 : 0;
    for (let y = 0; y < R; y++) for (let x = 0; x < C; x++) {
        const q = value(p, v, y, x), share = v.exact ? 0 : part(q), none = Number.isNaN(share), rgb = none ? back : mixed(share);
        g.fillStyle = none ? "rgba(128, 128, 128, .22)" : v.exact ? "rgba(128, 128, 128, .12)" : css(rgb);
        g.fillRect(x * wide, y * tall, wide - gap, tall - (tall > 9));
        if (wide > 29 && R * C <= 100) {
            g.fillStyle = light(rgb) ? "#000" : "#fff";
            g.fillText(v.exact ? q : none ? "-∞" : (Math.sign(q) * (q / STEPS) ** 2 * v.limit).toFixed(decimals), (x + .5) * wide, (y + .5) * tall);
        }
    }
    const text = getComputedStyle(host).getPropertyValue("--text");
    g.strokeStyle = g.fillStyle = text;
    g.textAlign = "right";
    feet.forEach((word, x) => {
        g.save();
        g.translate((x + .5) * wide, R * tall + 4);
        g.rotate(-Math.PI / 2);
        g.fillText(word.length > 10 ? word.slice(0, 9) + "…" : word, 0, 0);
        g.restore();
    });
    if (own >= 0 && R > 1) g.strokeRect(.5, own * tall + .5, C * wide - 1, tall - 1);
    if (!cursor) {  // to begin with: the largest of the chosen token
        let most = -1;
        for (let y = Math.max(own, 0); y < (own < 0 ? R : own + 1); y++) for (let x = 0; x < C; x++) {
            const q = value(p, v, y, x), size = q === HIDDEN ? -.5 : Math.abs(q);
            if (size > most) [most, cursor] = [size, [y, x]];
        }
    }
    g.lineWidth = 2;
    g.strokeRect(cursor[1] * wide, cursor[0] * tall + 1, Math.max(wide - gap, 3), tall - 2);
    const shownOf = p.columns === "V" ? `the ${C} of ${D.sizes.V} tokens with the largest logits here, as they fall for the last position` : "";
    along.textContent = shownOf || (C > 1 ? `→ ${D.letters[p.columns]}, 0 to ${C - 1}` : "");
    canvas.setAttribute("aria-label", `values of ${put(p.name)}, ${R} rows of ${C}; the arrow keys read them`);
    tell(p, v);
}
function tell(p, v) {
    const [y, x] = cursor, s = byToken(p, v) ? y : token, i = v.m > 1 ? (byToken(p, v) ? +which.value : y) : null;
    const where = [`${quoted(D.words[s])} (position ${D.positions[s]})`, i === null ? "" : slot(p, s, i), columnName(p, x, s)];
    says.textContent = `${p.called} at ${where.filter(Boolean).join(", ")}: ${about(v, value(p, v, y, x))}`;
}
canvas.onmousemove = canvas.onclick = event => {
    const p = P[at], v = kept(p);
    point(within(Math.floor(event.offsetY / tall), 0, lines(p, v) - 1), within(Math.floor(event.offsetX / wide), 0, v.c - 1));
};
canvas.onkeydown = event => {
    const p = P[at], v = kept(p), [y, x] = cursor, end = v.c - 1;
    const to = {ArrowRight: [y, x + 1], ArrowLeft: [y, x - 1], ArrowDown: [y + 1, x], ArrowUp: [y - 1, x], Home: [y, 0], End: [y, end]}[event.key];
    if (!to) return;
    event.preventDefault();
    event.stopPropagation();
    point(within(to[0], 0, lines(p, v) - 1), within(to[1], 0, end));
};
function point(y, x) {
    if (cursor && cursor[0] === y && cursor[1] === x) return;
    cursor = [y, x];
    heat();
}
mount(make("div", {className: "head"}, make("b", {textContent: D.title}), make("span", {className: "quiet", textContent: fewer})), ...(S ? [list] : []), map, card);
new ResizeObserver(() => heat()).observe(room);
