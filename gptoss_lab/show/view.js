// ID and D are set by the page, D = {title, css, ...}. A view's own script follows: it calls mount() and defines draw().
const script = document.currentScript;  // null where a notebook runs scripts on its own
const hosts = script && script.dataset.for === ID ? [script.parentElement.querySelector("[data-view]")]
    : [...document.querySelectorAll(`[id="${ID}"] > [data-view]`)];
const host = hosts.find(e => !e.shadowRoot);  // the same view may stand in a page twice
if (!host) return;
const root = host.parentElement, shadow = host.attachShadow({mode: "open"});

const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const floats = text => new Float32Array(bytes(text).buffer);
const quoted = word => JSON.stringify(word);
const number = x => Number.isNaN(x) ? "no value" : x && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5)
    ? x.toExponential(1) : String(+x.toPrecision(3));
const within = (x, low, high) => Math.min(high, Math.max(low, x));
const make = (tag, set = {}, ...inside) => {
    const e = Object.assign(document.createElement(tag), set);
    e.append(...inside);
    return e;
};
const menu = (name, items) => make("select", {ariaLabel: name, oninput: () => draw()},
    ...items.map((item, i) => make("option", {value: i, textContent: `${name} ${item}`})));

// Tokens in reading order, one of them chosen: by pointing, or by Tab and then the arrow keys.
function tokens(words, label, choose) {
    const items = words.map((word, i) => {
        const e = make("span", {className: "word", textContent: word, tabIndex: -1});
        e.setAttribute("role", "button");
        e.onmouseenter = e.onfocus = e.onclick = () => choose(i);
        return e;
    });
    const list = make("div", {className: "words", role: "group", ariaLabel: label});
    items.forEach((e, i) => list.append(e, ...(words[i].includes("⏎") ? [make("br")] : [])));
    list.onkeydown = event => {
        const at = items.indexOf(shadow.activeElement), end = items.length - 1;
        const to = {ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: end}[event.key];
        if (at < 0 || to === undefined) return;
        event.preventDefault();
        event.stopPropagation();  // the notebook has plans of its own for arrow keys
        items[within(to, 0, end)].focus();
    };
    return {items, list};
}

let back, ink, other;  // red, green, blue; set by dress()
const mixed = share => back.map((c, i) => c + ((share < 0 ? other : ink)[i] - c) * Math.min(1, Math.abs(share)));
const css = rgb => `rgb(${rgb.map(Math.round)})`;
const light = rgb => {
    const [r, g, b] = rgb.map(c => c <= 10 ? c / 3294.6 : ((c / 255 + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b > .179;  // there black and white can be read equally well
};
function paint(e, share) {  // -1 to 1 of the full colour
    const none = Number.isNaN(share), rgb = none ? back : mixed(share);
    e.classList.toggle("none", none);
    e.style.background = none ? "" : css(rgb);
    e.style.color = light(rgb) ? "#000" : "#fff";
}

// Named arrays with a scale of colours, as view.py's Numbers writes them.
const decoded = rows => rows.map(row => ({...row, values: floats(row.values)}));
const share = (row, x) => {
    const part = within(x / row.limit, -1, 1);
    return row.root ? Math.sign(part) * Math.sqrt(Math.abs(part)) : part;
};
const named = (row, x) => [row.name, number(x), Number.isNaN(x) ? "" : row.unit].filter(Boolean).join(" ");
function legend(row) {
    const low = row.signed ? -1 : 0, stops = [...Array(9).keys()].map(i => css(mixed(low + (1 - low) * i / 8)));
    const value = part => number(row.limit * Math.sign(part) * (row.root ? part * part : Math.abs(part)));
    const middle = (low + 1) / 2, bar = make("span", {className: "bar"});
    bar.style.background = `linear-gradient(to right, ${stops})`;
    return [value(low), bar, [value(1), row.unit].filter(Boolean).join(" "), ...(row.name ? [row.name] : []), ...(row.root ? [`(half-way: ${value(middle)})`] : []),
            ...(row.values.some(Number.isNaN) ? ["(hatched: no value)"] : [])].map(x => x.nodeType ? x : make("span", {textContent: x}));
}

const says = make("div", {className: "says"});
says.setAttribute("aria-live", "polite");
function mount(...parts) {
    shadow.append(make("style", {textContent: D.css}), make("div", {className: "view"}, ...parts));
    const watch = new MutationObserver(() => setTimeout(dress, 60));
    for (const e of [document.documentElement, document.body]) watch.observe(e, {attributes: true});
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dress);
    dress();
}
function dress() {  // light or dark, as the text around it is
    const [r, g, b] = getComputedStyle(root).color.match(/[\d.]+/g).map(Number);
    host.toggleAttribute("dark", r + g + b > 384);
    const style = getComputedStyle(host);
    [back, ink, other] = ["--back", "--ink", "--other"].map(name => style.getPropertyValue(name).split(",").map(Number));
    draw();
}
