// Spans of an answer that occur word for word in sources' training text, and where. No library.
import { make } from "./elements.js";

// `text` cut where spans begin or end; with each piece, the numbers of those it is in, from 1.
// A span's `first` and `last` count characters, of which JavaScript's strings may have two.
export function cut(text, spans) {
  const characters = Array.from(text);
  const ends = new Set([0, characters.length, ...spans.flatMap((s) => [s.first, s.last])]);
  const cuts = [...ends].sort((a, b) => a - b);
  return cuts.slice(1).map((last, i) => ({
    words: characters.slice(cuts[i], last).join(""),
    first: cuts[i],
    numbers: spans.flatMap((s, n) => (s.first <= cuts[i] && last <= s.last ? [n + 1] : [])),
  }));
}

// Marks the spans of `trace` in the answer to `prompt`, and lists under it where each occurs;
// `looked` names the sources that were looked up.
export function showTrace(side, prompt, text, trace, looked) {
  const answer = side.querySelector(".answer");
  const list = make("div", "", "trace");
  list.append(make("h4", "Where it may come from"));
  const pieces = cut(text, trace.spans);
  const entries = trace.spans.map((span, n) => {
    const inside = pieces.filter((piece) => piece.numbers.includes(n + 1));
    return describe(n + 1, span, inside.map((piece) => piece.words).join(""), answer);
  });
  answer.replaceChildren(make("span", prompt, "asked"),
    ...pieces.flatMap((piece) => mark(piece, trace.spans, entries)));
  list.append(...entries);
  if (entries.length) {
    list.append(make("p", "A span that occurs in a source's text need not come from it: common "
      + "phrases occur everywhere.", "note"));
  } else {
    list.append(make("p", looked.length
      ? `No span of it occurs word for word in training text of ${looked.join(", ")}.`
      : "No source that took part may be looked up."));
  }
  for (const [name, why] of Object.entries(trace.untraced)) {
    list.append(make("p", `Not looked up in ${name}: ${why}`));
  }
  side.querySelector(".facts").append(list);
}

// A piece of the answer; before it, a button for each span that begins there.
function mark(piece, spans, entries) {
  if (!piece.numbers.length) return [piece.words];
  const marked = make("mark", piece.words);
  marked.dataset.spans = piece.numbers.join(" ");
  const begins = piece.numbers.filter((n) => spans[n - 1].first === piece.first);
  const buttons = begins.map((n) => {
    const button = make("button", String(n), "span");
    button.type = "button";
    button.dataset.span = n;
    button.setAttribute("aria-label", `Span ${n}, in ${spans[n - 1].source}: show where`);
    button.addEventListener("click", () => {
      entries[n - 1].open = true;
      entries[n - 1].querySelector("summary").focus();
    });
    return button;
  });
  return [...buttons, marked];
}

// What is told of one span; while it is open, its words stand out in the answer.
function describe(number, span, words, answer) {
  const entry = make("details");
  const title = make("summary", `${number}. ${span.source}: `);
  title.append(make("q", words.trim()));
  const figures = [
    `${span.tokens} tokens`,
    span.bits !== null && `${span.bits.toFixed(0)} bits`,
    span.count !== null && `in at least ${span.count} places`,
  ];
  const back = make("button", "Show in the answer");
  back.type = "button";
  back.addEventListener("click", () =>
    answer.querySelector(`button[data-span="${number}"]`).focus());
  entry.append(title, make("p", figures.filter(Boolean).join(", ")), back);
  if (span.places.length) entry.append(quoteAll(span.places));
  else if (span.documents.length) entry.append(make("p", `In ${span.documents.join(", ")}.`));
  entry.addEventListener("toggle", () => {
    for (const marked of answer.querySelectorAll("mark")) {
      if (marked.dataset.spans.split(" ").includes(String(number))) {
        marked.classList.toggle("chosen", entry.open);
      }
    }
  });
  return entry;
}

// Places of a span, each with the text around it; what scrolls can be reached with the keyboard.
function quoteAll(places) {
  const quotes = make("div", "", "places");
  quotes.tabIndex = 0;
  quotes.setAttribute("role", "region");
  quotes.setAttribute("aria-label", "Places");
  for (const place of places) {
    const quote = make("blockquote", place.before);
    quote.append(make("mark", place.text), place.after,
      make("footer", `${place.document}, byte ${place.position}`, "note"));
    quotes.append(quote);
  }
  return quotes;
}
