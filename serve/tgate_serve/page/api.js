// What the page asks of the server: JSON, server-sent events, and what went wrong in the server's own words.

const KEY = "tgate-key";

/** What went wrong. `status`: of the answer, 0 where there was none. `code`: the server's name for it, or "". */
export class Trouble extends Error {
  constructor(message, status = 0, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Send this key from now on, until the tab is closed. */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** The answer of the server, if it is a good one. Raises Trouble. */
export async function ask(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers["Authorization"] = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, cache: "no-store", body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("the server does not answer; see whether it runs, and draw again");
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw told?.error ? troubleOf(told.error, answer.status) : new Trouble(`the server answers ${answer.status}`, answer.status);
  }
  return answer;
}

/** What the server tells of an error. */
export function troubleOf(error, status = 0) {
  return new Trouble(String(error.message), status, error.code ?? "");
}

/** The events of an answer, as they come: the data of each, parsed. */
export async function* eventsOf(answer) {
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      text += decoder.decode(value, { stream: !done });
      const blocks = text.split(/\r?\n\r?\n/);
      text = blocks.pop(); // an event ends with an empty line: what has none yet is not all of it
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield JSON.parse(data.map((line) => line.slice(5)).join("\n"));
      }
      if (done) return;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof SyntaxError) throw error;
    throw new Trouble("the server hung up; see whether it runs, and draw again");
  } finally {
    await reader.cancel().catch(() => {});
  }
}
