// Elements of the page that hold text. No library.

export function make(tag, text = "", className = "") {
  const element = document.createElement(tag);
  element.textContent = text; // never as HTML: it may be what a model or an owner wrote
  if (className) element.className = className;
  return element;
}
