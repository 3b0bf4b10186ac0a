// The alerts that go on, above all queues.

import { get } from "./api.js";
import { h } from "./dom.js";
import { time } from "./parts.js";

export const firing = async () => (await get("/queue/alerts")).firing;

/** What goes on. The region is there before there is anything in it, so that it is read out. */
export function alertList(shown) {
  return h(
    "section",
    { "aria-label": "Alerts", "data-key": "alerts", role: "status" },
    shown.length > 0 && h("ul", { class: "alerts" }, shown.map(item)),
  );
}

function item(alert) {
  return h(
    "li",
    { "data-key": `alert-${alert.id}` },
    h("span", { class: "status failed" }, `alert ${alert.id}`),
    ` ${alert.sentence} It began at `,
    time(alert.beganAt),
    ".",
  );
}
