// Perfetto's trace processor, as its own build for browsers, behind a pipe: `node trace_processor.js FOLDER`.
//
// FOLDER holds engine_bundle.js and its .wasm files. Requests come on stdin and answers go to stdout, each a
// TraceProcessorRpcStream behind its length as 4 bytes, least first. That build is made to be a worker of a page, so it
// is shown what such a worker sees of the world, and no `process`.
"use strict";
const fs = require("fs");
const path = require("path");

const folder = process.argv[2];

function write(bytes) {
  let at = 0;
  while (at < bytes.length) at += fs.writeSync(1, bytes, at);
}

const port = {
  onmessage: null,
  postMessage(answer) {
    const length = Buffer.alloc(4);
    length.writeUInt32LE(answer.length);
    write(length);
    write(answer);
  },
};

class XMLHttpRequest {
  open(_method, name) {
    this.name = path.basename(name);
  }

  send() {
    const { buffer, byteOffset, length } = fs.readFileSync(path.join(folder, this.name));
    this.response = buffer.slice(byteOffset, byteOffset + length);
    this.status = 200;
  }
}

const say = (...words) => console.error(...words);
const self = { location: { href: "http://localhost/engine_bundle.js", pathname: "/engine_bundle.js" } };
const world = {
  self,
  location: self.location,
  WorkerGlobalScope: class {},
  importScripts() {},
  XMLHttpRequest,
  process: undefined,
  window: undefined,
  console: { log: say, warn: say, error: say, info: say, debug: say },
};
new Function(...Object.keys(world), fs.readFileSync(path.join(folder, "engine_bundle.js"), "utf8"))(
  ...Object.values(world),
);
self.onmessage({ data: port });

let held = Buffer.alloc(0);
process.stdin.on("data", (more) => {
  held = Buffer.concat([held, more]);
  while (held.length >= 4 && held.length >= 4 + held.readUInt32LE(0)) {
    const end = 4 + held.readUInt32LE(0);
    port.onmessage({ data: new Uint8Array(held.subarray(4, end)) });
    held = held.subarray(end);
  }
});
