// Which view is shown, and when it is asked for anew.
//
// The page polls. Each request to nameko takes one of the service's workers until it is
// answered: events that a server sends would keep one for as long as a page is open, and ten
// open pages would leave none for the calls.

import { health, Problem, token } from "./api.js";
import { h, show } from "./dom.js";
import { afterActions, field, heading, run, say } from "./parts.js";
import { auditLog } from "./audit.js";
import { failures } from "./failures.js";
import { message } from "./message.js";
import { messages } from "./messages.js";
import { queues } from "./queues.js";
import { nowhere } from "./nowhere.js";
import { schedules } from "./schedules.js";
import { subscriptions } from "./subscriptions.js";

const EVERY_MS = 2_000;
const HEALTH_EVERY_MS = 10_000;
const LONGEST_MS = 60_000;
const LONGEST_TROUBLE_MS = 10_000;

// of the time, one part in so many is spent in asking: a busy database is asked less often
const SHARE = 20;

const VIEWS = [
  ["queues", "Queues", queues],
  ["failures", "Failures", failures],
  ["messages", "Messages", messages],
  ["subscriptions", "Subscriptions", subscriptions],
  ["schedules", "Schedules", schedules],
  ["audit-log", "Audit log", auditLog],
];

const main = document.getElementById("view");
const trouble = document.getElementById("trouble");

let current = null; // { title, load, draw, drawn, isLive }
let turn = 0; // counts views and refreshes: an answer to an older one is not shown
let timer = 0;
let delay = EVERY_MS;
let healthAt = -Infinity;

function route() {
  const [place, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, id] = place.split("/");
  const parameters = new URLSearchParams(query);
  if (name === "messages" && id) return ["messages", message(decoded(id))];
  const [key, , make] = VIEWS.find(([each]) => each === (place ? name : VIEWS[0][0])) ?? [];
  return make && !id ? [key, make(parameters)] : [null, nowhere(decoded(place))];
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function navigate(isFirst = false) {
  // the link that skips what comes first names no view
  if (location.hash === "#view") return;
  const [name, view] = route();
  current = view;
  document.title = `${view.title} – queue_admin`;
  show(
    document.getElementById("nav"),
    VIEWS.map(([key, label]) =>
      h("a", { href: `#/${key}`, "aria-current": key === name ? "page" : null }, label),
    ),
  );
  if (!isFirst) say("");
  main.replaceChildren(heading(view.title), h("p", null, "Loading …"));
  if (!isFirst) main.querySelector("h1").focus();
  refresh();
}

function refresh() {
  clearTimeout(timer);
  turn += 1;
  delay = EVERY_MS;
  look(turn);
}

async function look(mine) {
  const begun = performance.now();
  const view = current;
  try {
    const data = await view.load();
    if (mine !== turn) return;
    show(main, view.draw(data));
    view.drawn?.();
    tellTrouble("");
    delay = document.hidden ? Math.min(delay * 2, LONGEST_MS) : EVERY_MS;
  } catch (error) {
    if (mine !== turn) return;
    if (error instanceof Problem && error.status === 401) return signIn();
    if (error instanceof Problem && error.status < 500) return refused(view, error);
    delay = Math.min(delay * 2, document.hidden ? LONGEST_MS : LONGEST_TROUBLE_MS);
    healthAt = -Infinity;
    tellTrouble(`queue_admin cannot tell: ${error.message}. What is shown is old; trying again.`);
  }
  lookAtHealth();
  if (view.isLive === false) return;
  timer = setTimeout(() => look(mine), Math.max(delay, (performance.now() - begun) * SHARE));
}

function refused(view, problem) {
  tellTrouble("");
  show(main, heading(view.title), h("p", { class: "error" }, problem.message));
}

function tellTrouble(text) {
  // said once, and not each time that it is tried
  if (trouble.textContent !== text) trouble.textContent = text;
}

async function lookAtHealth() {
  if (performance.now() - healthAt < HEALTH_EVERY_MS) return;
  healthAt = performance.now();
  const its = await health().catch(() => null);
  show(document.getElementById("state"), state(its), token.get() && signOutButton());
}

function state(its) {
  if (its === null) return h("span", { class: "status failed" }, "no answer");
  const ill = [
    its.provider.status === "up" ? null : `${its.provider.name} does not answer`,
    its.database.status === "up" ? null : "the database does not answer",
    its.consumers.silent.length
      ? `work waits, and nobody consumes: ${its.consumers.silent.join(", ")}`
      : null,
  ].filter(Boolean);
  const text = ill.length ? `unhealthy: ${ill.join("; ")}` : `healthy, on ${its.provider.name}`;
  return h("span", { class: `status ${ill.length ? "failed" : "completed"}` }, text);
}

// --- the token

function signIn() {
  const wasRefused = token.get() !== null;
  token.forget();
  turn += 1;
  clearTimeout(timer);
  const onsubmit = (event) => {
    event.preventDefault();
    const given = event.currentTarget.elements.token.value.trim();
    if (!given) return;
    token.keep(given);
    healthAt = -Infinity;
    say("");
    navigate();
  };
  main.replaceChildren(
    heading("Token"),
    wasRefused
      ? h("p", { class: "error", id: "refused" }, "This token is not known here.")
      : (null ?? ""),
    h(
      "p",
      null,
      "This queue_admin asks for one of its QUEUE_ADMIN_TOKENS. It is kept until this tab is closed.",
    ),
    h(
      "form",
      { onsubmit, "data-kept": true },
      field("Token", "token", {
        type: "password",
        required: true,
        "aria-describedby": wasRefused ? "refused" : null,
      }),
      h("button", null, "Go on"),
    ),
  );
  main.querySelector("input").focus();
  if (wasRefused) say("This token is not known here.", true);
}

function signOutButton() {
  const onclick = () => {
    token.forget();
    show(document.getElementById("state"));
    refresh();
  };
  return h("button", { type: "button", "data-key": "sign-out", onclick }, "Forget the token");
}

// --- from here on

afterActions(refresh);
addEventListener("hashchange", () => navigate());
document.addEventListener("visibilitychange", () => {
  if (
    !document.hidden &&
    current &&
    current.isLive !== false &&
    !main.querySelector("#field-token")
  )
    refresh();
});
document.getElementById("skip").onclick = (event) => {
  event.preventDefault();
  main.focus();
};
navigate(true);
