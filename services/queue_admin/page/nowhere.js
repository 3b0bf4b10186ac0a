// What is shown where an address names no view: it may have been cut off, or be of another version.

import { h } from "./dom.js";
import { heading } from "./parts.js";

export function nowhere(place) {
  return {
    title: "No such view",
    isLive: false,
    load: async () => null,
    draw: () => [
      heading("No such view"),
      h("p", null, "This page has no view ", h("code", null, place), "."),
      h("p", null, h("a", { href: "#/queues" }, "Show the queues")),
    ],
  };
}
