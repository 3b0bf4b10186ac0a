// What is dispatched at the times of cron expressions.

import { fetchText, get, path, post, remove } from "./api.js";
import { h } from "./dom.js";
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
      text: "There is a schedule of that name. All that it is now is replaced by what you wrote.",
      yes: "Change it",
    };
    run(form.querySelector("button"), () => make(form, name, value), ask);
  };
  return h(
    "details",
    { "data-key": "make" },
    h("summary", null, "Make a schedule"),
    h(
      "form",
      { class: "editor", "aria-label": "Make a schedule", "data-kept": true, onsubmit },
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
      field("Payload", "payload", {
        tag: "textarea",
        rows: 4,
        spellcheck: "false",
        options: ["{}"],
      }),
      h("div", { class: "buttons" }, h("button", { class: "primary" }, "Make it")),
    ),
  );
}

async function make(form, name, value) {
  const text = value("payload");
  try {
    JSON.parse(text);
  } catch (error) {
    say(`The payload is not JSON: ${error.message}`, true);
    return null;
  }
  const its = ["queueName", "messageType", "cron", "timeZone", "priority"];
  const others = JSON.stringify(Object.fromEntries(its.map((each) => [each, value(each)])));
  // the text as it is: parsed and written again, long numbers would be others
  const body = `${others.slice(0, -1)}, "payload": ${text}}`;
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
      h("div", { class: "buttons" }, pause(each), runNow(each), removal(each)),
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
