// D = {title, words, layers, n: experts a layer, k: experts a token, experts: base64 of uint8 (uint16 where n > 256)
// [L s k], weights: base64 of float32 [L s k], css}.
const s = D.words.length, L = D.layers.length, {n, k} = D;
const experts = n > 256 ? new Uint16Array(bytes(D.experts).buffer) : bytes(D.experts), weights = floats(D.weights);
const taken = (l, i) => [...experts.subarray((l * s + i) * k, (l * s + i + 1) * k)];
const weight = (l, i, j) => weights[(l * s + i) * k + j];

let chosen = s - 1, kept = null;
const {items, list} = tokens(D.words, "tokens; Enter keeps one to compare with", choose);
items.forEach((e, i) => e.onclick = () => { choose(i); kept = kept === i ? null : i; draw(); });
list.addEventListener("keydown", event => {
    const at = items.indexOf(shadow.activeElement);
    if (event.key === "Escape") kept = null;
    else if (at >= 0 && (event.key === "Enter" || event.key === " ")) kept = kept === at ? null : at;
    else return;
    event.preventDefault();
    event.stopPropagation();
    draw();
});
const river = make("div", {className: "river", tabIndex: 0}), scale = make("div", {className: "scale"});
river.setAttribute("role", "img");
const key = make("small", {textContent: "circle: an expert, as large as its weight; grey dot: the more tokens take the expert, the "
    + "stronger; bands only guide the eye: experts of one number in two layers have nothing to do with each other"});
const table = make("table"), details = make("details", {ontoggle: () => draw()},
    make("summary", {textContent: "experts and weights of the chosen token"}), make("div", {}, table));
mount(make("div", {className: "head"}, make("b", {textContent: D.title})), list, scale, river, key, says, details);

function choose(i) { if (i !== chosen) { chosen = i; draw(); } }

function shared(i, j) {  // experts that two tokens both take, over all layers
    let count = 0;
    for (let l = 0; l < L; l++) {
        const mine = taken(l, i);
        for (const e of taken(l, j)) count += mine.includes(e);
    }
    return count;
}

function draw() {
    const alike = items.map((_, i) => shared(chosen, i));
    items.forEach((e, i) => {
        paint(e, alike[i] / (L * k));
        e.classList.toggle("chosen", i === chosen);
        e.classList.toggle("kept", i === kept);
        e.tabIndex = i === chosen ? 0 : -1;
        e.setAttribute("aria-pressed", i === kept);
        e.setAttribute("aria-label", `${D.words[i]}: ${alike[i]} of ${L * k} experts shared`);
        e.title = `${alike[i]} of ${L * k} experts shared`;
    });
    scale.replaceChildren(`a token's colour: share of the chosen one's ${L * k} experts that it takes too`,
        ...legend({signed: false, limit: 1, root: false, values: [], unit: ""}));

    let top = [0, 0];
    for (let l = 0; l < L; l++) for (let j = 0; j < k; j++) if (weight(l, chosen, j) > weight(...[top[0], chosen, top[1]])) top = [l, j];
    const strongest = `layer ${D.layers[top[0]]}, expert ${taken(top[0], chosen)[top[1]]} with ${number(weight(top[0], chosen, top[1]))}`;
    const near = [...items.keys()].filter(i => i !== chosen).sort((a, b) => alike[b] - alike[a]).slice(0, 3);
    says.textContent = `${quoted(D.words[chosen])}, token ${chosen} (0 to ${s - 1}): its largest weight is in ${strongest}. `
        + (kept !== null && kept !== chosen
            ? `With the kept ${quoted(D.words[kept])} (token ${kept}) it shares ${alike[kept]} of ${L * k} experts.`
            : near.length ? "Most alike: " + near.map(i => `${quoted(D.words[i])} (token ${i}), ${alike[i]} of ${L * k}`).join("; ") + "." : "");
    picture();
    if (details.open) fill();
}

// Only numbers go into the markup of the picture: layers, experts, places.
function picture() {
    const step = within(620 / L, 26, 110), tall = within(14 * n, 180, 440), left = 52, high = 10;
    const X = l => left + step * (l + .5), Y = e => high + tall * (e + .5) / n;
    const r = w => Math.sqrt(Math.abs(w)) * Math.min(12, step * .3), width = left + step * L + 10;
    const line = `fill="none" stroke-linecap="round"`;
    const out = [];
    for (let l = 0; l < L; l++) {
        const load = new Array(n).fill(0);
        for (let i = 0; i < s; i++) for (const e of taken(l, i)) load[e]++;
        load.forEach((count, e) => out.push(`<circle cx="${X(l)}" cy="${Y(e).toFixed(1)}" r="${n > 64 ? 1.2 : 2.2}" fill="rgb(128,128,128)" fill-opacity="${(.15 + .85 * count / s).toFixed(2)}"/>`));
        out.push(`<text x="${X(l)}" y="${high + tall + 14}" text-anchor="middle">${D.layers[l]}</text>`);
    }
    for (let e = 0; e < n; e += Math.ceil(n / 16)) out.push(`<text x="${left - 4}" y="${Y(e) + 3.5}" text-anchor="end">${e}</text>`);
    out.push(`<text x="${(left + width) / 2}" y="${high + tall + 28}" text-anchor="middle">layer</text>`,
        `<text transform="translate(12 ${high + tall / 2}) rotate(-90)" text-anchor="middle">expert</text>`);
    const shown = kept === null || kept === chosen ? [[chosen, ink]] : [[kept, other], [chosen, ink]];
    for (const [i, rgb] of shown) {
        for (let l = 0; l + 1 < L; l++) taken(l, i).forEach((e, j) => taken(l + 1, i).forEach((f, m) => {
            const w = Math.abs(weight(l, i, j) * weight(l + 1, i, m)), middle = (X(l) + X(l + 1)) / 2;
            out.push(`<path ${line} stroke="${css(rgb)}" stroke-opacity=".35" stroke-width="${(.3 + 14 * w).toFixed(2)}" d="M${X(l)} ${Y(e).toFixed(1)}C${middle} ${Y(e).toFixed(1)} ${middle} ${Y(f).toFixed(1)} ${X(l + 1)} ${Y(f).toFixed(1)}"/>`);
        }));
        for (let l = 0; l < L; l++) taken(l, i).forEach((e, j) =>
            out.push(`<circle cx="${X(l)}" cy="${Y(e).toFixed(1)}" r="${(1.5 + r(weight(l, i, j))).toFixed(1)}" fill="${css(rgb)}" fill-opacity=".85" stroke="${css(back)}"/>`));
    }
    if (step >= 40) for (let l = 0; l < L; l++) {  // the chosen token's numbers beside the circles, none upon another
        let last = -Infinity;
        const order = taken(l, chosen).map((e, j) => [e, j]).sort((a, b) => a[0] - b[0]);
        for (const [e, j] of order) {
            last = Math.max(Y(e) + 3.5, last + 10);
            out.push(`<text x="${X(l) + 4 + r(weight(l, chosen, j))}" y="${last.toFixed(1)}">${e}</text>`);
        }
    }
    river.innerHTML = `<svg width="${width}" height="${high + tall + 34}" aria-hidden="true">${out.join("")}</svg>`;
    river.setAttribute("aria-label", `token ${chosen}: a circle for each of its ${k} experts in ${L} layers, as large as `
        + "the expert's weight; grey: the more tokens take an expert, the stronger. The numbers are in the table below.");
}

function fill() {
    const cell = (tag, text) => make(tag, {textContent: text});
    const head = make("tr", {}, cell("th", "layer"), ...[...Array(k).keys()].map(j => cell("th", `expert ${j + 1} of ${k}: weight`)));
    table.replaceChildren(head, ...D.layers.map((name, l) => {
        const order = taken(l, chosen).map((e, j) => [e, weight(l, chosen, j)]).sort((a, b) => b[1] - a[1]);
        return make("tr", {}, cell("th", name), ...order.map(([e, w]) => cell("td", `${e}: ${number(w)}`)));
    }));
}
