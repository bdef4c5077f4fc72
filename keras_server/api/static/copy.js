// The same request as a command to copy.

import { key } from "./server.js";
import { say } from "./words.js";

/** Quote for a POSIX shell. */
const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** Return the form field as curl takes it, which splits a name at ; and , unless it is quoted. */
function field(name) {
  const plain = /^[^";,\\]+$/.test(name) ? name : `"${name.replace(/["\\]/g, "\\$&")}"`;
  return quoted(`image=@${plain}`);
}

export const asCurl = (url, name, out) =>
  `curl -X POST -F ${field(name)}${key && ' -H "Authorization: Bearer $KERAS_SERVER_API_KEY"'} ${quoted(url)}${out ? ` -o ${quoted(out)}` : ""}`;

export function asPython(url, name) {
  const headers = key && '        headers={"Authorization": "Bearer " + os.environ["KERAS_SERVER_API_KEY"]},\n';
  return `${key && "import os\n\n"}import requests

with open(${JSON.stringify(name)}, "rb") as image:
    answer = requests.post(
        ${JSON.stringify(url)},
        files={"image": image},
${headers}        timeout=60,
    )
print(answer.json())`;
}

/** Copy a box's text, also where the browser allows its clipboard only to pages with a certificate. */
export async function copy(box) {
  const [code, button] = [box.querySelector("code"), box.querySelector("button")];
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    getSelection().selectAllChildren(code);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  say("Copied");
  setTimeout(() => (button.textContent = "Copy"), 2000);
}
