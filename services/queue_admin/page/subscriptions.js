// Who consumes what.

import { get, path, post, put } from "./api.js";
import { h } from "./dom.js";
import {
  age,
  breakable,
  button,
  counted,
  field,
  heading,
  listLink,
  number,
  run,
  say,
  status,
  table,
  time,
} from "./parts.js";

const COLUMNS = [
  "Subscriber",
  "Queue and event type",
  "Consumer",
  "Waiting",
  "Oldest",
  "In work",
  "For later",
  "Dead",
  "Do",
];

export function subscriptions(parameters) {
  const queue = parameters.get("queue");
  const query = queue ? `?${new URLSearchParams({ queue })}` : "";
  return {
    title: "Subscriptions",
    load: () => get(`/queue/subscriptions${query}`),
    draw: ({ subscriptions: its }) => [
      heading("Subscriptions"),
      queue && h("p", null, `Of ${queue}. `, h("a", { href: "#/subscriptions" }, "Show all")),
      its.length
        ? table("Times are UTC.", COLUMNS, its.map(row))
        : h("p", null, "Nobody has subscribed."),
    ],
  };
}

function row(each) {
  const dead = { status: "failed", queue: each.queueName, subscriber: each.subscriber };
  return {
    key: each.id,
    cells: [
      h("strong", null, breakable(each.subscriber)),
      [breakable(each.queueName), h("br"), breakable(each.messageType)],
      consumer(each),
      number(each.waiting),
      age(each.oldestWaitingSeconds),
      number(each.active),
      number(each.scheduled),
      each.dead ? listLink(dead, number(each.dead)) : "0",
      [
        h("div", { class: "buttons" }, pause(each), each.consumer === "silent" && retire(each)),
        replay(each),
        limits(each),
      ],
    ],
  };
}

function consumer(each) {
  const seen = each.consumer === "silent" && [" last seen ", time(each.lastSeenAt) ?? "never"];
  const paused =
    each.pausedAt &&
    h(
      "div",
      null,
      status("paused"),
      " by ",
      breakable(each.pausedBy ?? "somebody"),
      " since ",
      time(each.pausedAt),
    );
  const limited =
    each.limits && h("div", { "data-key": "limits" }, `at most ${limitsText(each.limits)}`);
  return [status(each.consumer), seen, paused, limited];
}

function limitsText({ rate, concurrency }) {
  const its = [rate && `${number(rate)} a second`, concurrency && `${number(concurrency)} at once`];
  return its.filter(Boolean).join(", ");
}

function limits(each) {
  const [rate, concurrency] = [`rate-${each.id}`, `concurrency-${each.id}`];
  const known = each.limits ?? { rate: null, concurrency: null, burst: null };
  const asNumber = (input) => (input.value === "" ? null : Number(input.value));
  const onsubmit = (event) => {
    event.preventDefault();
    const form = event.currentTarget;
    run(form.querySelector("button"), async () => {
      const wanted = {
        rate: asNumber(form.elements[rate]),
        concurrency: asNumber(form.elements[concurrency]),
      };
      // a burst that goes with another rate is left to queue_admin
      if (wanted.rate !== null && wanted.rate === known.rate) wanted.burst = known.burst;
      const { limits: its } = await put(path`/queue/subscriptions/${each.id}/limits`, wanted);
      return its
        ? `${each.subscriber} runs at most ${limitsText(its)}.`
        : `${each.subscriber} is without limits.`;
    });
  };
  const value = (given) => (given === null ? {} : { value: String(given) });
  return h(
    "details",
    { "data-key": "limit" },
    h("summary", null, "Limit"),
    h(
      "form",
      {
        "aria-label": `Limit ${each.subscriber}, ${each.messageType}`,
        "data-key": `limit ${known.rate} ${known.concurrency}`,
        "data-kept": true,
        onsubmit,
      },
      field("A second", rate, { type: "number", min: 0, step: "any", ...value(known.rate) }),
      field("At once", concurrency, { type: "number", min: 1, ...value(known.concurrency) }),
      h("button", null, "Set limits"),
    ),
  );
}

function pause(each) {
  const its = path`/queue/subscriptions/${each.id}`;
  const isPaused = each.pausedAt !== null;
  const [label, word, told] = isPaused
    ? ["Resume", "resume", "goes on"]
    : ["Pause", "pause", "is paused"];
  const act = async () => {
    await post(`${its}/${word}`);
    return `${each.subscriber} ${told}.`;
  };
  return button(label, act, {
    name: `${label} ${each.subscriber}, ${each.messageType}`,
    key: "pause",
  });
}

function retire(each) {
  const act = async () => {
    await post(path`/queue/subscriptions/${each.id}/retire`);
    return `${each.subscriber} is retired.`;
  };
  const ask = {
    question: `Retire ${each.subscriber}?`,
    text: "For a handler that was renamed or removed: it gets no events any more, and what waits for it is discarded.",
    yes: "Retire",
  };
  return button("Retire", act, {
    name: `Retire ${each.subscriber}, ${each.messageType}`,
    kind: "danger",
    ask,
  });
}

function replay(each) {
  const [since, until] = [`since-${each.id}`, `until-${each.id}`];
  const onsubmit = (event) => {
    event.preventDefault();
    const { elements } = event.currentTarget;
    const stretch = { from: elements[since].value, to: elements[until].value };
    run(event.currentTarget.querySelector("button"), () => replayAll(each, stretch));
  };
  const attributes = { type: "datetime-local", step: 1 };
  return h(
    "details",
    { "data-key": "replay" },
    h("summary", { "aria-label": `Replay to ${each.subscriber}, ${each.messageType}` }, "Replay"),
    h(
      "form",
      { "data-key": "form", "data-kept": true, onsubmit },
      field("Stored since (UTC)", since, attributes),
      field("Stored before (UTC)", until, attributes, "Both may be left empty."),
      h("button", null, "Deliver what it never had"),
    ),
  );
}

/** Have all of a stretch delivered, in parts. */
async function replayAll(each, stretch) {
  const body = {};
  for (const [name, given] of Object.entries(stretch)) if (given) body[name] = `${given}Z`;
  let done = 0;
  do {
    const answer = await post(path`/queue/subscriptions/${each.id}/replay`, body);
    done += answer.replayed;
    body.cursor = answer.nextCursor;
    say(`${counted(done, "message")} replayed …`);
  } while (body.cursor !== null);
  return `${counted(done, "message")} replayed to ${each.subscriber}.`;
}
