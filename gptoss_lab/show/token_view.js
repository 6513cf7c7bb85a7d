// D = {title, words, rows: [{name, unit, limit, signed, root, values: base64 of float32 [s]}], css}.
const rows = decoded(D.rows), s = D.words.length;
const which = menu("colour:", rows.map(row => row.name)), scale = make("div", {className: "scale"});
const box = make("input", {type: "checkbox", onchange: () => list.classList.toggle("numbers", box.checked)});
const sizes = [...rows[0].values].map(x => Number.isNaN(x) ? -1 : Math.abs(x));
let chosen = sizes.indexOf(sizes.reduce((a, b) => Math.max(a, b)));  // to begin with
const {items, list} = tokens(D.words, "tokens, coloured by their numbers", choose);
const numbers = items.map(e => e.appendChild(make("span", {className: "number"})));
mount(make("div", {className: "head"}, make("b", {textContent: D.title}), ...(rows.length > 1 ? [which] : []),
    make("label", {}, box, " write the numbers")), list, scale, says);

function choose(i) { if (i !== chosen) { chosen = i; mark(); } }

function mark() {
    items.forEach((e, i) => {
        e.classList.toggle("chosen", i === chosen);
        e.setAttribute("aria-pressed", i === chosen);
        e.tabIndex = i === chosen ? 0 : -1;
    });
    const row = rows[which.value], now = row.values[chosen];
    const rank = 1 + row.values.reduce((n, x) => n + (x > now), 0);
    says.textContent = `${quoted(D.words[chosen])}, token ${chosen} (0 to ${s - 1}): `
        + rows.map(row => named(row, row.values[chosen])).join("; ")
        + (Number.isNaN(now) || s < 2 ? "" : `. Of ${row.name || "all"} it is number ${rank} from the top.`);
}

function draw() {
    const row = rows[which.value];
    items.forEach((e, i) => {
        const x = row.values[i];
        paint(e, share(row, x));
        numbers[i].textContent = Number.isNaN(x) ? "–" : number(x);
        e.title = named(row, x);
        e.setAttribute("aria-label", `${D.words[i]}: ${named(row, x)}`);
    });
    scale.replaceChildren(...legend(row));
    mark();
}
