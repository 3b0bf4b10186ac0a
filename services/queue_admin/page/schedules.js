// What is dispatched at the times of cron expressions.

import { fetchText, get, path, post, remove } from "./api.js";
import { h } from "./dom.js";
import { member, pretty } from "./json.js";
import {
  breakable,
  button,
  field,
  heading,
  messageLink,
  number,
  option,
  run,
  say,
  status,
  table,
  time,
} from "./parts.js";

const COLUMNS = ["Schedule", "Queue and event type", "When", "Next", "Last", "Missed", "Do"];

const TEXTS = ["queueName", "messageType", "cron", "timeZone", "priority"];

const JSONS = ["payload", "metadata"];

const PRIORITIES = ["urgent", "high", "normal", "low"];

export function schedules() {
  // the names that there are: the form is drawn once, and asks before it changes one of them
  let names = new Set();
  return {
    title: "Schedules",
    load: () => get("/queue/schedules"),
    draw: ({ schedules: its }) => {
      names = new Set(its.map((each) => each.name));
      return [
        heading("Schedules"),
        its.length
          ? table("Times are UTC; an expression goes by its zone.", COLUMNS, its.map(row))
          : h("p", null, "There is none."),
        maker((name) => names.has(name)),
      ];
    },
  };
}

function maker(isThere) {
  const onsubmit = (event) => {
    event.preventDefault();
    const form = event.currentTarget;
    const value = (name) => form.elements[name].value.trim();
    const name = value("name");
    const ask = isThere(name) && {
      question: `Change ${name}?`,
      text: "There is a schedule of that name. All that it is now is replaced by what is in the form.",
      yes: "Change it",
    };
    run(form.querySelector("button"), () => make(form, name, value), ask);
  };
  return h(
    "details",
    { "data-key": "make" },
    h("summary", null, "Make or change a schedule"),
    h(
      "form",
      { class: "editor", "aria-label": "Make or change a schedule", "data-kept": true, onsubmit },
      h(
        "div",
        { class: "fields" },
        field("Name", "name", { required: true }),
        field("Queue", "queueName", { required: true }),
        field("Event type", "messageType", { required: true }),
        field(
          "Cron expression",
          "cron",
          { required: true, spellcheck: "false" },
          "Minute, hour, day, month, day of the week, such as 30 2 * * MON-FRI.",
        ),
        field("Time zone", "timeZone", { required: true, value: "UTC" }, "Such as Europe/Berlin."),
        field("Priority", "priority", {
          options: PRIORITIES.map((each) => option(each, "normal")),
        }),
      ),
      area("Payload", "payload"),
      area("Metadata", "metadata", "A JSON object that travels along."),
      h("div", { class: "buttons" }, h("button", { class: "primary" }, "Save")),
    ),
  );
}

function area(label, name, hint) {
  return field(label, name, { tag: "textarea", rows: 4, spellcheck: "false", options: ["{}"] }, hint);
}

async function make(form, name, value) {
  for (const each of JSONS) {
    try {
      JSON.parse(value(each));
    } catch (error) {
      say(`The ${each} is not JSON: ${error.message}`, true);
      return null;
    }
  }
  const texts = JSON.stringify(Object.fromEntries(TEXTS.map((each) => [each, value(each)])));
  // the text as it is: parsed and written again, long numbers would be others
  const body = `${texts.slice(0, -1)}, ${JSONS.map((each) => `"${each}": ${value(each)}`)}}`;
  const made = JSON.parse(await fetchText("PUT", path`/queue/schedules/${name}`, body));
  form.reset();
  return `${name}: ${made.sentence}.`;
}

function row(each) {
  return {
    key: each.name,
    cells: [
      h("strong", null, breakable(each.name)),
      [breakable(each.queueName), h("br"), breakable(each.messageType)],
      [h("code", null, each.cron), ` ${each.timeZone}`, h("br"), h("small", null, each.sentence)],
      each.enabled ? (time(each.nextAt) ?? "never") : status("paused"),
      last(each),
      number(each.skipped),
      h("div", { class: "buttons" }, pause(each), runNow(each), edit(each), removal(each)),
    ],
  };
}

function last(each) {
  return [
    each.lastMessageId ? messageLink(each.lastMessageId, time(each.lastAt)) : "never",
    each.error &&
      h("div", { class: "error-text" }, "failed ", time(each.errorAt), `: ${each.error}`),
  ];
}

function pause(each) {
  const [label, word, told] = each.enabled
    ? ["Pause", "pause", "is paused"]
    : ["Resume", "resume", "goes on"];
  const act = async () => {
    await post(path`/queue/schedules/${each.name}/` + word);
    return `${each.name} ${told}.`;
  };
  return button(label, act, { name: `${label} ${each.name}`, key: "pause" });
}

function runNow(each) {
  const act = async () => {
    await post(path`/queue/schedules/${each.name}/run`);
    return `${each.name} was dispatched. The message is under Last.`;
  };
  return button("Run now", act, { name: `Run now: ${each.name}` });
}

function edit(each) {
  const act = async () => {
    const text = await fetchText("GET", path`/queue/schedules/${each.name}`);
    const its = JSON.parse(text);
    const details = document.querySelector('[data-key="make"]');
    const { elements } = details.querySelector("form");
    for (const name of ["name", ...TEXTS]) elements[name].value = its[name];
    for (const name of JSONS) elements[name].value = pretty(member(text, name));
    details.open = true;
    elements.cron.focus();
    return `${each.name} is in the form below.`;
  };
  return button("Edit", act, { name: `Edit ${each.name}` });
}

function removal(each) {
  const act = async () => {
    await remove(path`/queue/schedules/${each.name}`);
    return `${each.name} is removed.`;
  };
  const ask = {
    question: `Remove ${each.name}?`,
    text: "It dispatches nothing any more. What it dispatched goes on.",
    yes: "Remove",
  };
  return button("Remove", act, { name: `Remove ${each.name}`, kind: "danger", ask });
}
