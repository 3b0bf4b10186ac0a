// Dead letters in groups.

import { get, path, post } from "./api.js";
import { h } from "./dom.js";
import {
  breakable,
  button,
  counted,
  facts,
  heading,
  listLink,
  messageLink,
  number,
  say,
  status,
  table,
  time,
} from "./parts.js";

const AT_ONCE = 500;
const RAMPS = 10;

export function failures() {
  return {
    title: "Failures",
    load: async () => {
      const [{ failures: groups }, { ramps }] = await Promise.all([
        get("/queue/failures"),
        get(`/queue/ramps?limit=${RAMPS}`),
      ]);
      return { groups, ramps };
    },
    draw: ({ groups, ramps }) => [
      heading("Failures"),
      h(
        "p",
        null,
        "Dead letters, by exception and place. Mend the cause first; what is retried runs again at once. ",
        "A ramp retries 1, then 10, then 100 and so on, and stops by itself when the same comes back.",
      ),
      groups.length
        ? h(
            "div",
            { class: "cards wide" },
            groups.map((group) => card(group, runningOf(group, ramps))),
          )
        : h("p", null, "Nothing has failed."),
      ramps.length > 0 && [h("h2", null, "Ramps"), rampTable(ramps)],
    ],
  };
}

function runningOf(group, ramps) {
  return ramps.find(
    (each) => each.status === "running" && each.fingerprint === group.fingerprint,
  );
}

function card(group, ramp) {
  const { example } = group;
  const name = `${group.errorType} of ${example.subscriber}`;
  const all = counted(group.count, "dead letter");
  return h(
    "section",
    { class: "card", "data-key": group.fingerprint, "aria-label": name },
    h(
      "div",
      { class: "heading" },
      h("h2", null, group.errorType),
      h("span", { class: "status failed" }, all),
    ),
    h("p", { class: "error-text" }, example.errorMessage ?? ""),
    facts([
      ["At", group.place && h("code", null, breakable(group.place))],
      ["Subscriber", breakable(example.subscriber)],
      ["First", time(group.firstSeenAt)],
      ["Last", time(group.lastSeenAt)],
      ["Newest message", messageLink(example.messageId, example.messageType)],
    ]),
    h(
      "div",
      { class: "buttons" },
      ramp ? stop(ramp) : begin(group, name),
      button("Retry all", () => each(group, "retry", "retried"), { name: `Retry all: ${name}` }),
      button("Discard all", () => each(group, "discard", "discarded"), {
        name: `Discard all: ${name}`,
        kind: "danger",
        ask: {
          question: `Discard ${all}?`,
          text: `${name}: they are given up for good.`,
          yes: "Discard all",
        },
      }),
      listLink(
        { status: "failed", exceptionType: group.errorType, subscriber: example.subscriber },
        "Show the messages",
      ),
    ),
  );
}

/** Change all of a group that are in it now, in parts: what fails again meanwhile stays. */
async function each(group, word, count) {
  let done = 0;
  while (done < group.count) {
    const limit = Math.min(AT_ONCE, group.count - done);
    const answer = await post(
      path`/queue/failures/${group.fingerprint}/${word}?limit=` + limit,
    ).catch((error) => {
      // somebody else was faster with the rest
      if (done > 0 && error.status === 409) return { [count]: 0, remaining: 0 };
      throw error;
    });
    done += answer[count];
    if (answer.remaining === 0 || answer[count] === 0) break;
    say(`${number(done)} of ${number(group.count)} ${count} …`);
  }
  return `${counted(done, "dead letter")} of ${group.errorType} ${count}.`;
}

function begin(group, name) {
  const act = async () => {
    const begun = await post(path`/queue/failures/${group.fingerprint}/ramp`);
    return `Ramp ${begun.id} of ${group.errorType} begins.`;
  };
  return button("Ramp up", act, { name: `Ramp up: ${name}`, key: "ramp" });
}

function stop(ramp) {
  const act = async () => {
    await post(path`/queue/ramps/${ramp.id}/cancel`);
    return `Ramp ${ramp.id} is cancelled; what it retried goes on.`;
  };
  return button("Cancel the ramp", act, { name: `Cancel ramp ${ramp.id}`, key: "ramp" });
}

function rampTable(ramps) {
  return table(
    "The newest. Times are UTC.",
    ["Ramp", "Status", "Begun", "Completed", "What came of it"],
    ramps.map((each) => ({
      key: each.id,
      cells: [
        number(each.id),
        status(each.status),
        [time(each.startedAt), h("br"), "by ", breakable(each.startedBy)],
        done(each),
        each.sentence,
      ],
    })),
  );
}

function done({ id, completed, total }) {
  return [
    h("progress", { max: total, value: completed, "aria-label": `Ramp ${id}` }),
    ` ${number(completed)} of ${number(total)}`,
  ];
}
