// Messages by filters, newest first.

import { get, post } from "./api.js";
import { h } from "./dom.js";
import {
  breakable,
  button,
  counted,
  field,
  heading,
  messageLink,
  number,
  option,
  say,
  status,
  table,
  time,
} from "./parts.js";

const STATUSES = ["pending", "processing", "completed", "failed", "retry"];
const PRIORITIES = ["urgent", "high", "normal", "low"];
const MORE = [
  "type",
  "subscriber",
  "exceptionType",
  "priority",
  "createdFrom",
  "createdTo",
  "payloadPath",
  "payloadValue",
];
const TIMES = ["createdFrom", "createdTo"];
const INDEXED = ["queue", "status", ...TIMES];

const PAGE = 50;

// a call looks through 500 messages at most for what has no index; so many follow by themselves
const MOST_CALLS = 20;

export function messages(parameters) {
  const filters = Object.fromEntries([...parameters].filter(([, value]) => value !== ""));
  const found = { rows: [], cursor: null, isAtEnd: false, problem: null, pages: 0 };
  const view = {
    title: "Messages",
    isLive: true,
    load: async () => {
      // what was fetched by hand stays as it is, with the cursor that belongs to it
      if (found.pages < 2) Object.assign(found, await search(filters, null, PAGE), { pages: 1 });
      return found;
    },
    draw: () => [
      heading("Messages"),
      form(filters, parameters.toString()),
      h("div", { "data-key": "found" }, results(filters, found)),
    ],
  };
  // what no index knows is looked for in thousands of messages: once is enough
  view.isLive = Object.keys(filters).every((name) => INDEXED.includes(name));
  return view;
}

async function search(filters, from, wanted) {
  const rows = [];
  let cursor = from;
  for (let calls = 0; calls < MOST_CALLS && rows.length < wanted; calls += 1) {
    const query = new URLSearchParams({
      ...filters,
      limit: wanted - rows.length,
      ...(cursor ? { cursor } : {}),
    });
    let page;
    try {
      page = await get(`/queue/messages?${query}`);
    } catch (error) {
      if (error.status === 422)
        return { rows, cursor: null, isAtEnd: true, problem: error.message };
      throw error;
    }
    rows.push(...page.messages);
    cursor = page.nextCursor;
    if (cursor === null) break;
  }
  return { rows, cursor, isAtEnd: cursor === null, problem: null };
}

function results(filters, found) {
  if (found.problem) return h("p", { class: "error" }, found.problem);
  return [
    found.rows.length
      ? table(
          `${counted(found.rows.length, "message")}${found.isAtEnd ? "" : " so far"}, newest first. Times are UTC.`,
          ["Message", "Queue", "Status", "Stored", "Retries", "Error"],
          found.rows.map(row),
        )
      : h("p", null, found.isAtEnd ? "No message fits." : "None so far."),
    h("div", { class: "buttons" }, more(filters, found), retry(filters, found)),
  ];
}

function row(each) {
  return {
    key: each.messageId,
    cells: [
      messageLink(each.messageId, breakable(each.messageType)),
      breakable(each.queueName),
      status(each.status),
      time(each.createdAt),
      number(each.retryCount),
      h("div", { class: "error-text" }, each.errorMessage ?? ""),
    ],
  };
}

function more(filters, found) {
  if (found.isAtEnd) return null;
  const act = async () => {
    const next = await search(filters, found.cursor, PAGE);
    found.rows.push(...next.rows);
    Object.assign(found, { cursor: next.cursor, isAtEnd: next.isAtEnd, pages: found.pages + 1 });
    return `${counted(next.rows.length, "more message", "more messages")}.`;
  };
  return button(found.rows.length ? "Show more" : "Search on", act, { key: "more" });
}

function retry(filters, found) {
  if (!found.rows.some((each) => each.status === "failed")) return null;
  const { status: _, payloadValue, ...its } = filters;
  if (payloadValue !== undefined) its.payloadValue = scalar(payloadValue);
  const act = async () => {
    let [cursor, retried] = [null, 0];
    do {
      const answer = await post("/queue/retry", {
        ...its,
        limit: 500,
        ...(cursor ? { cursor } : {}),
      });
      cursor = answer.nextCursor;
      retried += answer.retried;
      say(`${number(retried)} so far …`);
    } while (cursor !== null);
    return `${counted(retried, "dead letter")} retried.`;
  };
  const ask = {
    question: "Retry all that fit?",
    text: "Each dead letter of the messages that fit these filters runs again, also of those that are not shown here.",
    yes: "Retry all",
  };
  return button("Retry all dead letters that fit", act, { ask });
}

function scalar(text) {
  try {
    const value = JSON.parse(text);
    return typeof value === "object" && value !== null ? text : value;
  } catch {
    return text;
  }
}

// --- the form

function form(filters, key) {
  const onsubmit = (event) => {
    event.preventDefault();
    const given = new URLSearchParams();
    for (const [name, value] of new FormData(event.currentTarget)) {
      const text = TIMES.includes(name) && value ? `${value}Z` : value.trim();
      if (text) given.set(name, text);
    }
    const hash = `#/messages?${given}`;
    // the same once more is asked for once more
    if (location.hash === hash) dispatchEvent(new Event("hashchange"));
    else location.hash = hash;
  };
  const text = (name, label, attributes, hint) =>
    field(label, name, { value: filters[name] ?? "", ...attributes }, hint);
  const one = (name, label, values) =>
    field(label, name, {
      options: [
        option("", filters[name], "any"),
        ...values.map((each) => option(each, filters[name])),
      ],
    });
  const when = (name, label) =>
    field(label, name, {
      type: "datetime-local",
      step: 1,
      value: (filters[name] ?? "").replace(/Z$/, ""),
    });
  return h(
    "form",
    { class: "search", role: "search", "data-key": `form ${key}`, "data-kept": true, onsubmit },
    h(
      "div",
      { class: "fields" },
      text("queue", "Queue"),
      one("status", "Status", STATUSES),
      text("text", "Text in the payload", {}, "As it is written, capitals apart"),
    ),
    h(
      "details",
      { open: MORE.some((name) => name in filters) },
      h("summary", null, "More filters"),
      h(
        "div",
        { class: "fields" },
        text("type", "Event type"),
        text("subscriber", "Subscriber"),
        text("exceptionType", "Exception"),
        one("priority", "Priority", PRIORITIES),
        when("createdFrom", "Stored from (UTC)"),
        when("createdTo", "Stored before (UTC)"),
        text("payloadPath", "Path in the payload", { placeholder: "$.user.email" }),
        text("payloadValue", "Value there", {}, '7 is a number, "7" a text'),
      ),
    ),
    h(
      "div",
      { class: "buttons" },
      h("button", { class: "primary" }, "Search"),
      h("a", { href: "#/messages" }, "No filters"),
    ),
  );
}
