// JSON as text. A number that was parsed and written again may be another one (1.0, or what has
// more than 15 digits), and who edits one field of a payload must not change the others.

const TOKEN = /"(?:[^"\\]|\\.)*"|[{}[\]:,]|[^\s{}[\]:,"]+/g;
const INDENT = "  ";

/** Return the text of one member of an object, as it was written. */
export function member(text, name) {
  let depth = 0;
  let begin = -1;
  let before = "";
  for (const { 0: token, index } of text.matchAll(TOKEN)) {
    if (begin >= 0 && depth === 1 && (token === "," || token === "}"))
      return text.slice(begin, index);
    if (token === ":" && depth === 1 && JSON.parse(before) === name) begin = index + 1;
    if (token === "{" || token === "[") depth += 1;
    if (token === "}" || token === "]") depth -= 1;
    before = token;
  }
  return "null";
}

/** Return JSON in lines, with all that is no space as it was. */
export function pretty(text) {
  const made = [];
  let depth = 0;
  let before = "";
  for (const [token] of text.matchAll(TOKEN)) {
    const isEnd = token === "}" || token === "]";
    const isEmpty = isEnd && (before === "{" || before === "[");
    if (isEnd) depth -= 1;
    if ((isEnd && !isEmpty) || (!isEnd && "{[,".includes(before) && before))
      made.push("\n", INDENT.repeat(depth));
    made.push(token === ":" ? ": " : token);
    if (token === "{" || token === "[") depth += 1;
    before = token;
  }
  return made.join("");
}
