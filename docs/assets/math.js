// pymdownx.arithmatex leaves \(..\) and \[..\] in elements of its own: KaTeX draws these and nothing else.
for (const e of document.querySelectorAll(".arithmatex")) {
    const tex = e.textContent.trim();
    katex.render(tex.slice(2, -2), e, {displayMode: tex.startsWith("\\["), throwOnError: false});
}
