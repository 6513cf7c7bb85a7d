// D = {title, controls: [{name, labels}], start: [place of each control], alts, patches: base64 of WebPs, css}.
// A patch lies over the picture of the start, which is the still, and shows what differs. The last control runs fastest.
const sliders = D.controls.map(({name, labels}, i) =>
    make("input", {type: "range", min: 0, max: labels.length - 1, value: D.start[i], ariaLabel: name, oninput: () => draw()}));
const values = sliders.map(() => make("output"));
const rows = sliders.map((e, i) => make("label", {}, D.controls[i].name, e, values[i]));
sliders.forEach(e => e.onkeydown = event => event.stopPropagation());  // the notebook has plans of its own for arrow keys
const whole = make("img", {src: host.querySelector("img").src, alt: ""});
const patches = D.patches.map(webp => make("img", {src: "data:image/webp;base64," + webp, alt: ""}));
const stack = make("div", {className: "stack"}, whole, ...patches);
stack.setAttribute("role", "img");
const stage = make("div", {className: "stage"}, stack);
mount(make("div", {className: "head"}, make("b", {textContent: D.title}), ...rows), stage, says);

function draw() {
    const at = sliders.map(e => +e.value), place = at.reduce((sum, x, i) => sum * D.controls[i].labels.length + x, 0);
    sliders.forEach((e, i) => {
        values[i].textContent = D.controls[i].labels[at[i]];
        e.setAttribute("aria-valuetext", D.controls[i].labels[at[i]]);
    });
    patches.forEach((e, i) => e.style.visibility = i === place ? "visible" : "hidden");
    stack.setAttribute("aria-label", D.alts[place]);
    says.textContent = D.alts[place];
}
