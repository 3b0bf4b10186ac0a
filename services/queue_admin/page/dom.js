// Elements from data, and what is shown brought to what was made. A view is drawn anew every
// two seconds; as only what differs is changed, focus, selection and what was opened stay.

const SVG = "http://www.w3.org/2000/svg";
const SHAPES = new Set(["svg", "rect", "path"]);
const HANDLERS = ["onclick", "onsubmit"];

// the person's, or an action's: drawing leaves them alone
const OWN = new Set(["open", "aria-busy"]);

/** Make an element. Texts become text nodes: nothing is ever parsed as HTML. */
export function h(tag, attributes, ...children) {
  const made = SHAPES.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (HANDLERS.includes(name)) made[name] = value;
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  const given = children.flat(Infinity).filter((each) => each != null && each !== false);
  made.append(...given.map((each) => (each instanceof Node ? each : String(each))));
  return made;
}

/** Change the children of an element to those that were made. */
export function show(parent, ...children) {
  const focused = document.activeElement;
  fit(parent, h("div", null, ...children));
  if (!focused || focused === document.body || document.activeElement === focused) return;
  // moved, it lost the focus; gone, it leaves a reader of screens at the top of the page
  if (focused.isConnected) focused.focus({ preventScroll: true });
  else parent.querySelector("h1")?.focus({ preventScroll: true });
}

function fit(shown, made) {
  const keyed = new Map();
  for (const child of shown.children) if (keyOf(child)) keyed.set(keyOf(child), child);
  let place = shown.firstChild;
  for (const next of [...made.childNodes]) {
    const key = keyOf(next);
    // what has no place any more goes first, rather than that all that stays is moved
    while (place && keyOf(place) && keyOf(place) !== key && !hasKey(made, keyOf(place))) {
      place = removed(place);
    }
    const found = key ? keyed.get(key) : place;
    if (!found || !areAlike(found, next)) {
      shown.insertBefore(next, place);
      continue;
    }
    if (found === place) place = place.nextSibling;
    else shown.insertBefore(found, place);
    morph(found, next);
  }
  while (place) place = removed(place);
}

function morph(shown, made) {
  if (shown.nodeType === Node.TEXT_NODE) {
    if (shown.data !== made.data) shown.data = made.data;
    return;
  }
  // a form is the person's until another takes its place
  if (shown.hasAttribute("data-kept")) return;
  for (const { name } of [...shown.attributes]) {
    if (!made.hasAttribute(name) && !OWN.has(name)) shown.removeAttribute(name);
  }
  for (const { name, value } of [...made.attributes]) {
    if (shown.getAttribute(name) !== value && !OWN.has(name)) shown.setAttribute(name, value);
  }
  for (const name of HANDLERS) if (shown[name] !== made[name]) shown[name] = made[name];
  fit(shown, made);
}

function areAlike(one, other) {
  return one.nodeName === other.nodeName && keyOf(one) === keyOf(other);
}

function keyOf(node) {
  return node.dataset?.key;
}

function hasKey(parent, key) {
  return [...parent.children].some((child) => keyOf(child) === key);
}

function removed(node) {
  const next = node.nextSibling;
  node.remove();
  return next;
}
