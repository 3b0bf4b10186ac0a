// One message: why it is where it is, what became of it, and what can be done about it.

import { fetchText, get, path, post } from "./api.js";
import { h } from "./dom.js";
import { member, pretty } from "./json.js";
import {
  button,
  counted,
  facts,
  field,
  heading,
  messageLink,
  run,
  say,
  status,
  time,
} from "./parts.js";

export function message(id) {
  const its = path`/queue/messages/${id}`;
  const state = { isEditing: false, focus: null };
  return {
    title: "Message",
    load: async () => {
      const [text, why] = await Promise.all([fetchText("GET", its), get(`${its}/why`)]);
      return {
        ...JSON.parse(text),
        payloadText: pretty(member(text, "payload")),
        metadataText: pretty(member(text, "metadata")),
        reasons: why.reasons,
      };
    },
    // once what is to have the focus is there
    drawn: () => {
      if (state.focus) document.querySelector(state.focus)?.focus();
      state.focus = null;
    },
    draw: (shown) => [
      heading(shown.messageType, status(shown.status)),
      facts([
        ["Id", h("code", null, shown.messageId)],
        ["Queue", shown.queueName],
        ["Priority", shown.priority],
        ["Stored", time(shown.createdAt)],
        ["For", time(shown.scheduledAt)],
        ["Done", time(shown.processedAt)],
        ["In place of", shown.origin && messageLink(shown.origin)],
      ]),
      actions(shown, its, state),
      h("h2", null, "Why"),
      h("ul", { class: "reasons" }, shown.reasons.map(reason)),
      h("h2", null, "Payload"),
      state.isEditing
        ? editor(shown, its, state)
        : h(
            "pre",
            { tabindex: 0, "aria-label": "Payload", "data-key": "payload" },
            shown.payloadText,
          ),
      h("h2", null, "Deliveries"),
      shown.deliveries.length
        ? shown.deliveries.map(delivery)
        : h("p", null, "Nobody was subscribed."),
      causes(shown),
      h(
        "details",
        { "data-key": "metadata" },
        h("summary", null, "Metadata"),
        h("pre", { tabindex: 0 }, shown.metadataText),
      ),
    ],
  };
}

function has(shown, ...statuses) {
  return shown.deliveries.some((each) => statuses.includes(each.status));
}

function reason(each) {
  return h("li", null, each.subscriber && h("strong", null, `${each.subscriber}: `), each.sentence);
}

// --- what can be done

function actions(shown, its, state) {
  const isDead = has(shown, "failed");
  const waits = has(shown, "pending", "retry");
  if (!isDead && !waits) return h("div", { class: "buttons", "data-key": "actions" });
  return [
    h(
      "div",
      { class: "buttons", "data-key": "actions" },
      isDead && retry(shown),
      isDead && edit(state),
      isDead && discard(its),
      waits && now(its),
      waits && cancel(its),
    ),
    waits && later(its),
  ];
}

function retry(shown) {
  const act = async () => {
    const { retried } = await post(path`/queue/retry/${shown.messageId}`);
    return `${counted(retried, "delivery", "deliveries")} will run again.`;
  };
  return button("Retry", act, { kind: "primary" });
}

function edit(state) {
  const act = async () => {
    Object.assign(state, { isEditing: true, focus: "#field-payload" });
  };
  return state.isEditing ? null : button("Edit the payload", act);
}

function discard(its) {
  const act = async () => {
    const { discarded } = await post(`${its}/discard`);
    return `${counted(discarded, "dead letter")} discarded.`;
  };
  const ask = {
    question: "Discard it?",
    text: "Its dead letters are given up for good.",
    yes: "Discard",
  };
  return button("Discard", act, { kind: "danger", ask });
}

function now(its) {
  const act = async () => {
    const { rescheduled } = await post(`${its}/reschedule`, {
      scheduledAt: "2000-01-01T00:00:00Z",
    });
    return `${counted(rescheduled, "delivery", "deliveries")} may run now.`;
  };
  return button("Run now", act);
}

function cancel(its) {
  const act = async () => {
    const { cancelled } = await post(`${its}/cancel`);
    return `${counted(cancelled, "delivery", "deliveries")} cancelled.`;
  };
  const ask = {
    question: "Cancel it?",
    text: "What waits of it will not run. What a worker has goes on.",
    yes: "Cancel what waits",
  };
  return button("Cancel", act, { kind: "danger", ask });
}

function later(its) {
  const onsubmit = (event) => {
    event.preventDefault();
    const form = event.currentTarget;
    run(form.querySelector("button"), async () => {
      const { rescheduled } = await post(`${its}/reschedule`, {
        scheduledAt: `${form.elements.at.value}Z`,
      });
      return `${counted(rescheduled, "delivery", "deliveries")} put off.`;
    });
  };
  return h(
    "form",
    { class: "inline", "data-key": "later", "data-kept": true, onsubmit },
    field("Run at (UTC)", "at", { type: "datetime-local", step: 1, required: true }),
    h("button", null, "Reschedule"),
  );
}

function editor(shown, its, state) {
  const close = (event) => {
    run(event.currentTarget, async () => {
      Object.assign(state, { isEditing: false, focus: "main h1" });
    });
  };
  const onsubmit = (event) => {
    event.preventDefault();
    const text = event.currentTarget.elements.payload.value;
    run(event.currentTarget.querySelector("button"), () => resend(text, its, state));
  };
  return h(
    "form",
    { class: "editor", "data-key": "editor", "data-kept": true, onsubmit },
    field(
      "Payload to send",
      "payload",
      {
        tag: "textarea",
        rows: Math.min(24, shown.payloadText.split("\n").length + 1),
        spellcheck: "false",
        options: [shown.payloadText],
      },
      "It goes to those subscriptions alone where this message failed, as a new message; the dead letters of this one are discarded.",
    ),
    h(
      "div",
      { class: "buttons" },
      h("button", { class: "primary" }, "Send in its place"),
      h("button", { type: "button", onclick: close }, "Leave it"),
    ),
  );
}

async function resend(text, its, state) {
  try {
    JSON.parse(text);
  } catch (error) {
    say(`This is not JSON: ${error.message}`, true);
    return null;
  }
  // the text as it is: parsed and written again, long numbers would be others
  const { messageId, sent } = JSON.parse(
    await fetchText("POST", `${its}/resend`, `{"payload": ${text}}`),
  );
  state.isEditing = false;
  location.hash = `#/messages/${encodeURIComponent(messageId)}`;
  // the new view says nothing yet
  addEventListener(
    "hashchange",
    () => say(`Sent to ${counted(sent, "subscription")}. This is the new message.`),
    { once: true },
  );
  return null;
}

// --- what became of it

function delivery(each, n) {
  return h(
    "section",
    {
      class: "card",
      "data-key": `${n} ${each.subscriber}`,
      "aria-label": `Delivery to ${each.subscriber}`,
    },
    h("div", { class: "heading" }, h("h3", null, each.subscriber), status(each.status)),
    facts([
      ["Attempts", String(each.attempts)],
      ["Taken over", each.takeovers ? String(each.takeovers) : null],
      ["Next", time(each.availableAt)],
      ["Begun", time(each.startedAt)],
      ["Ended", time(each.processedAt)],
      ["Worker", each.worker],
      ["Error", each.errorType && `${each.errorType}: ${each.errorMessage}`],
    ]),
    each.history.length > 0 && h("ol", { class: "history" }, each.history.map(attempt)),
  );
}

function attempt(each, n) {
  const error = each.errorType ? `${each.errorType}: ${each.errorMessage}` : "";
  return h(
    "li",
    { "data-key": n },
    `Attempt ${each.attempt}: ${each.outcome.replace("_", " ")}, `,
    time(each.endedAt),
    each.worker && `, by ${each.worker}`,
    error && h("div", { class: "error-text" }, error),
    each.traceback &&
      h(
        "details",
        null,
        h("summary", null, "Traceback"),
        h("pre", { tabindex: 0 }, each.traceback),
      ),
  );
}

function causes(shown) {
  if (!shown.causedBy.length && !shown.caused.length) return null;
  return h(
    "section",
    { "data-key": "causes" },
    h("h2", null, "Causes and effects"),
    shown.causedBy.length > 0 && [
      h("h3", null, "Caused by"),
      h(
        "ol",
        null,
        shown.causedBy.map((each) => h("li", null, link(each))),
      ),
    ],
    shown.caused.length > 0 && [h("h3", null, "Caused"), tree(shown.caused)],
    shown.causedMore && h("p", null, "There is more than is shown here."),
  );
}

function tree(effects) {
  return h(
    "ul",
    null,
    effects.map((each) => h("li", null, link(each), each.caused.length > 0 && tree(each.caused))),
  );
}

function link(each) {
  // a cause may be gone from the log
  return each.messageType
    ? [messageLink(each.messageId, each.messageType), " ", status(each.status)]
    : h("code", null, each.messageId);
}
