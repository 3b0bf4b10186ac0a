// Who did what.

import { get } from "./api.js";
import { h } from "./dom.js";
import { breakable, button, counted, heading, messageLink, table, time } from "./parts.js";

export function auditLog() {
  const older = { entries: [], before: undefined };
  return {
    title: "Audit log",
    load: () => get("/queue/audit-log?limit=50"),
    draw: ({ entries, nextBefore }) => {
      const first = older.entries[0]?.id ?? 0;
      const shown = [...entries.filter((each) => each.id > first), ...older.entries];
      const before = older.before === undefined ? nextBefore : older.before;
      return [
        heading("Audit log"),
        shown.length
          ? table(
              "What was changed through queue_admin, newest first. Times are UTC.",
              ["When", "Who", "What", "Of", "Details"],
              shown.map(row),
            )
          : h("p", null, "Nothing was changed yet."),
        h(
          "div",
          { class: "buttons" },
          before !== null && button("Show older", () => fetchOlder(older, shown, before)),
        ),
      ];
    },
  };
}

async function fetchOlder(older, shown, before) {
  const page = await get(`/queue/audit-log?limit=50&before=${before}`);
  // what was shown stays, though newer ones come: there is no gap between them
  Object.assign(older, { entries: [...shown, ...page.entries], before: page.nextBefore });
  return `${counted(page.entries.length, "more entry", "more entries")}.`;
}

function row(each) {
  const [, id] = each.target.match(/^message (\S+)$/) ?? [];
  const detail = each.detail === null ? "" : h("code", null, JSON.stringify(each.detail));
  return {
    key: each.id,
    cells: [
      time(each.at),
      breakable(each.actor),
      each.action,
      id ? messageLink(id, each.target) : each.target,
      detail,
    ],
  };
}
