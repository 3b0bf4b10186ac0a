// What is dispatched at the times of cron expressions.

import { get, path, post } from "./api.js";
import { h } from "./dom.js";
import { breakable, button, heading, messageLink, number, status, table, time } from "./parts.js";

const COLUMNS = ["Schedule", "Queue and event type", "When", "Next", "Last", "Missed", "Do"];

export function schedules() {
  return {
    title: "Schedules",
    load: () => get("/queue/schedules"),
    draw: ({ schedules: its }) => [
      heading("Schedules"),
      its.length
        ? table("Times are UTC; an expression goes by its zone.", COLUMNS, its.map(row))
        : h("p", null, "There is none. ", h("code", null, "queuectl schedules set"), " makes one."),
    ],
  };
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
      h("div", { class: "buttons" }, pause(each), runNow(each)),
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
