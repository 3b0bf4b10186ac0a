// What the views are made of: buttons that act, questions, times, tables, states.

import { h } from "./dom.js";

const said = document.getElementById("said");
const dialog = document.getElementById("dialog");

const SAID_MS = 30_000;

let refresh = () => {};
let forgetting = 0;

/** Have `function` called after each action. */
export function afterActions(function_) {
  refresh = function_;
}

/** Tell the person, also one who does not see it, what became of what they did. */
export function say(text, isError = false) {
  clearTimeout(forgetting);
  // what went well is soon old; what did not stays until something else is done
  if (!isError) forgetting = setTimeout(() => (said.textContent = ""), SAID_MS);
  said.className = isError ? "error" : "";
  said.textContent = text;
}

/**
 * A button. `act` does it and returns what to say then; `ask` is a question that comes before.
 * `name` tells it from others with the same label; `key` from what takes its place.
 */
export function button(label, act, { name = label, key = label, ask, kind = "" } = {}) {
  const onclick = (event) => run(event.currentTarget, act, ask);
  return h(
    "button",
    {
      type: "button",
      "aria-label": name === label ? null : name,
      "data-key": key,
      class: kind,
      onclick,
    },
    label,
  );
}

/** Do what a button or a form is for: once, however often it is pressed meanwhile. */
export async function run(pressed, act, ask) {
  // not disabled, which would take the focus from it
  if (pressed.hasAttribute("aria-busy")) return;
  pressed.setAttribute("aria-busy", "true");
  try {
    if (ask && !(await confirmed(ask))) return;
    const text = await act();
    if (text) say(text);
  } catch (error) {
    say(error.message, true);
  } finally {
    pressed.removeAttribute("aria-busy");
  }
  refresh();
}

function confirmed({ question, text, yes }) {
  return new Promise((resolve) => {
    const answer = (value) => () => {
      dialog.close();
      resolve(value);
    };
    dialog.replaceChildren(
      h("h2", { id: "asked" }, question),
      h("p", null, text),
      h(
        "div",
        { class: "buttons" },
        h("button", { type: "button", class: "danger", onclick: answer(true) }, yes),
        h(
          "button",
          { type: "button", autofocus: true, onclick: answer(false) },
          "Keep it as it is",
        ),
      ),
    );
    dialog.oncancel = () => resolve(false);
    dialog.showModal();
  });
}

export function heading(text, ...more) {
  return h("div", { class: "heading" }, h("h1", { tabindex: -1 }, text), ...more);
}

/** A field of a form, with its label and, where there is one, what is said about it. */
export function field(label, name, attributes = {}, hint = null) {
  const id = `field-${name}`;
  const described = hint ? `${id}-hint` : null;
  const { options, tag = options ? "select" : "input", ...rest } = attributes;
  return h(
    "div",
    { class: "field" },
    h("label", { for: id }, label),
    h(
      tag,
      { id, name, "aria-describedby": described, autocomplete: "off", ...rest },
      options ?? [],
    ),
    hint && h("small", { id: described }, hint),
  );
}

export function option(value, chosen, label = value) {
  return h("option", { value, selected: value === chosen }, label);
}

/** A table that stays one for a reader of screens where it is laid out as cards. */
export function table(caption, columns, rows) {
  const made = h(
    "table",
    { role: "table" },
    h("caption", null, caption),
    h(
      "thead",
      { role: "rowgroup" },
      h(
        "tr",
        { role: "row" },
        columns.map((name) => h("th", { scope: "col", role: "columnheader" }, name)),
      ),
    ),
    h(
      "tbody",
      { role: "rowgroup" },
      rows.map(({ key, cells }) =>
        h(
          "tr",
          { role: "row", "data-key": key },
          cells.map((cell, n) =>
            h("td", { role: "cell", "data-label": columns[n] }, h("div", null, cell)),
          ),
        ),
      ),
    ),
  );
  return h("div", { class: "wide-table" }, made);
}

/** A name that may be broken where its words end, rather than anywhere. */
export function breakable(name) {
  return name.split(/(?<=[._@-])/).flatMap((part) => [part, h("wbr")]);
}

/** Names and what they are. */
export function facts(pairs) {
  return h(
    "dl",
    { class: "facts" },
    pairs
      .filter(([, value]) => value != null)
      .map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))),
  );
}

export function status(text) {
  return h("span", { class: `status ${text}` }, text);
}

export function messageLink(id, text = id) {
  return h("a", { href: `#/messages/${encodeURIComponent(id)}` }, text);
}

export function listLink(filters, text) {
  return h("a", { href: `#/messages?${new URLSearchParams(filters)}` }, text);
}

/** A time, to the second, in UTC as everywhere in the suite. */
export function time(iso) {
  return iso == null
    ? null
    : h("time", { datetime: iso }, `${iso.slice(0, 10)} ${iso.slice(11, 19)}`);
}

const UNITS = [
  ["d", 86_400],
  ["h", 3_600],
  ["min", 60],
];

export function age(seconds) {
  if (seconds == null) return "–";
  const [unit, size] = UNITS.find(([, least]) => seconds >= least) ?? ["s", 1];
  return `${Math.floor(seconds / size)} ${unit}`;
}

export const number = (value) => value.toLocaleString("en");

/** A number with its noun. */
export function counted(value, noun, nouns = `${noun}s`) {
  return `${number(value)} ${value === 1 ? noun : nouns}`;
}
