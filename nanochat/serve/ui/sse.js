// Server-sent events from a stream of bytes. A network chunk may end anywhere, inside a line or inside a character:
// what is incomplete waits for the next chunk.

export class EventParser {
  #decoder = new TextDecoder("utf-8");
  #rest = ""; // of a line that has not ended
  #data = []; // lines of the event that has not ended

  // The data of every event that is complete with these bytes.
  push(bytes) {
    this.#rest += this.#decoder.decode(bytes, { stream: true });
    const lines = this.#rest.split("\n");
    this.#rest = lines.pop();
    const complete = [];
    for (const line of lines) {
      const text = line.endsWith("\r") ? line.slice(0, -1) : line;
      if (text.startsWith("data:")) {
        this.#data.push(text.slice(text[5] === " " ? 6 : 5));
      } else if (text === "" && this.#data.length) {
        complete.push(this.#data.join("\n"));
        this.#data = [];
      }
    }
    return complete;
  }
}

// The data of each event of a response, as it comes.
export async function* readEvents(response) {
  const parser = new EventParser();
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(value);
    }
  } finally {
    reader.releaseLock();
  }
}
