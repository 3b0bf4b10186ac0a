// All queues at a glance.

import { alertList, firing } from "./alerts.js";
import { get, path, post } from "./api.js";
import { columns, line } from "./charts.js";
import { h } from "./dom.js";
import { age, button, counted, facts, heading, listLink, number } from "./parts.js";

const TREND = 150; // looks that are remembered: five minutes

// what waited at each look since the page was opened; the log keeps no such history
const waited = new Map();

export function queues() {
  return {
    title: "Queues",
    load: async () => {
      const [shown, alerts] = await Promise.all([get("/queue/stats"), firing()]);
      return { ...remember(shown), alerts };
    },
    draw: (shown) => [
      heading("Queues"),
      alertList(shown.alerts),
      shown.queues.length
        ? h(
            "div",
            { class: "cards" },
            shown.queues.map((queue) => card(queue, shown)),
          )
        : h(
            "p",
            null,
            "There is no queue yet. One is there once a service subscribes, or dispatches.",
          ),
    ],
  };
}

function remember(shown) {
  for (const queue of shown.queues) {
    const before = waited.get(queue.queueName) ?? [];
    waited.set(queue.queueName, [...before, queue.waiting].slice(-TREND));
  }
  return shown;
}

function card(queue, shown) {
  const name = queue.queueName;
  return h(
    "section",
    { class: "card", "data-key": name, "aria-label": `Queue ${name}` },
    h("div", { class: "heading" }, h("h2", null, listLink({ queue: name }, name)), badges(queue)),
    facts([
      ["Waiting", number(queue.waiting)],
      ["Oldest", age(queue.oldestWaitingSeconds)],
      ["In work", number(queue.active)],
      ["For later", number(queue.scheduled)],
      ["Dead", queue.dead ? listLink({ queue: name, status: "failed" }, number(queue.dead)) : "0"],
      ["Per second", rate(queue.dispatchedPerSecond)],
    ]),
    recent(queue, shown),
    trend(name),
    h(
      "div",
      { class: "buttons" },
      pause(queue),
      h(
        "a",
        { href: `#/subscriptions?${new URLSearchParams({ queue: name })}` },
        counted(queue.subscriptions, "subscription"),
      ),
    ),
  );
}

function badges(queue) {
  return [
    queue.silent > 0 &&
      h(
        "span",
        { class: "status failed", "data-key": "silent" },
        `${counted(queue.silent, "subscription")} without a consumer`,
      ),
    queue.paused > 0 &&
      h(
        "span",
        { class: "status retry", "data-key": "paused" },
        `${number(queue.paused)} of ${number(queue.subscriptions)} paused`,
      ),
  ];
}

function recent({ recent: its }, { recentSeconds, sliceSeconds }) {
  const open = its.pending.map((pending, n) => pending + its.processing[n] + its.retry[n]);
  const sums = [
    ["completed", its.completed],
    ["pending", open],
    ["failed", its.failed],
  ].map(([kind, numbers]) => [kind, numbers, sum(numbers)]);
  const words = { completed: "completed", pending: "under way", failed: "failed" };
  const most =
    Math.max(...its.completed.map((done, n) => done + open[n] + its.failed[n])) / sliceSeconds;
  const told = sums.map(([kind, , count]) => `${number(count)} ${words[kind]}`).join(", ");
  const label = `Stored in the last ${recentSeconds} s, and what became of it: ${told}; at most ${rate(most)} per second`;
  return h(
    "figure",
    null,
    columns(
      label,
      sums.map(([kind, numbers]) => [kind, numbers]),
    ),
    h(
      "figcaption",
      null,
      `Stored in the last ${recentSeconds} s, at most ${rate(most)} per second: `,
      sums.map(([kind, , count]) =>
        h("span", { class: `key ${kind}` }, `${number(count)} ${words[kind]}`),
      ),
    ),
  );
}

function trend(name) {
  const numbers = waited.get(name);
  const most = Math.max(...numbers);
  const label = `Waiting, since the page was opened: now ${number(numbers.at(-1))}, at most ${number(most)}`;
  return h(
    "figure",
    null,
    line(label, numbers, TREND),
    h("figcaption", null, `Waiting, since the page was opened: at most ${number(most)}`),
  );
}

function pause(queue) {
  const name = queue.queueName;
  if (queue.subscriptions === 0) return null;
  if (queue.paused === queue.subscriptions) {
    const resume = async () => {
      await post(path`/queue/queues/${name}/resume`);
      return `${name} goes on.`;
    };
    return button("Resume all", resume, { name: `Resume all of ${name}`, key: "pause" });
  }
  const act = async () => {
    const { subscriptions } = await post(path`/queue/queues/${name}/pause`);
    return `${counted(subscriptions.length, "subscription")} of ${name} paused.`;
  };
  const ask = {
    question: `Pause ${name}?`,
    text: "Nothing more is handed out to any of its subscriptions, until you resume them. What is dispatched waits.",
    yes: "Pause all",
  };
  return button("Pause all", act, { name: `Pause all of ${name}`, key: "pause", ask });
}

function sum(numbers) {
  return numbers.reduce((all, each) => all + each, 0);
}

function rate(perSecond) {
  return perSecond.toLocaleString("en", { maximumFractionDigits: perSecond < 10 ? 1 : 0 });
}
