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
  time,
} from "./parts.js";

const AT_ONCE = 500;

export function failures() {
  return {
    title: "Failures",
    load: () => get("/queue/failures"),
    draw: ({ failures: groups }) => [
      heading("Failures"),
      h(
        "p",
        null,
        "Dead letters, by exception and place. Mend the cause first; what is retried runs again at once.",
      ),
      groups.length
        ? h("div", { class: "cards wide" }, groups.map(card))
        : h("p", null, "Nothing has failed."),
    ],
  };
}

function card(group) {
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
