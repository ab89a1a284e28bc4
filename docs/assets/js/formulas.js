// arithmatex (generic mode) leaves \(...\) and \[...\] in elements of their own; the vendored KaTeX renders them in place.
for (const element of document.querySelectorAll(".arithmatex")) {
  const text = element.textContent.trim();
  try {
    katex.render(text.slice(2, -2), element, { displayMode: text.startsWith("\\["), throwOnError: true });
  } catch (error) {
    console.error(error.message); // one bad formula must not keep the others from being rendered
  }
}
