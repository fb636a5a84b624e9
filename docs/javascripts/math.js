// Typeset what pymdownx.arithmatex has marked. KaTeX is shipped with the site, so this works without a network.
for (const element of document.querySelectorAll(".arithmatex")) {
  const text = element.textContent.trim();
  katex.render(text.slice(2, -2), element, { displayMode: text.startsWith("\\["), throwOnError: false });
}
