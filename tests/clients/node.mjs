// What Node's own clients send, each in its own way: node node.mjs URL FILE; prints the first labels as JSON.
import http from "node:http";
import { readFileSync } from "node:fs";

const [url, file] = process.argv.slice(2);
const picture = readFileSync(file);
const predict = `${url}/predict?top=1`;
const form = new FormData();
form.append("image", new Blob([picture]), "dog.jpg");
const stream = new ReadableStream({
  start(controller) {
    controller.enqueue(picture.subarray(0, 1000));
    controller.enqueue(picture.subarray(1000));
    controller.close();
  },
});
const bodies = {
  "a buffer": { body: picture },
  "a blob": { body: new Blob([picture]) },
  "a form": { body: form },
  "text of JSON": { body: JSON.stringify({ image: picture.toString("base64") }) },
  "a stream": { body: stream, duplex: "half" },
};
const found = {};
for (const [name, options] of Object.entries(bodies)) {
  const answer = await fetch(predict, { method: "POST", ...options });
  found[name] = (await answer.json()).predictions?.[0].label;
}

/** Ask by the older client, and return its answer and whether its connection had been used before. */
const ask = (agent) =>
  new Promise((resolve, reject) => {
    const request = http.request(predict, { method: "POST", agent, headers: { Expect: "100-continue" } }, (answer) => {
      let text = "";
      answer.on("data", (piece) => (text += piece));
      answer.on("end", () => resolve([JSON.parse(text).predictions?.[0].label, request.reusedSocket]));
    });
    request.on("continue", () => request.end(picture)).on("error", reject);
    request.flushHeaders();
  });
const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
[found["a request that asks first"]] = await ask(agent);
const [label, reused] = await ask(agent);
found["a connection that is kept"] = reused && label;
agent.destroy();
console.log(JSON.stringify(found));
