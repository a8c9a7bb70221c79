// Calls a router from the .proto alone, as a client in any language may.
//
//   node client.mjs ADDRESS LAYER IN OUT
//
// IN holds hidden states as little-endian float32. OUT is a folder that receives the answers in the
// same form. What was described, answered and refused is printed as JSON.

import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const PROTOS = fileURLToPath(new URL("../../protos", import.meta.url));
const TIMEOUT_MS = 60_000;
const CHUNK_BYTES = 1 << 20;
const NO_SUCH_LAYER = 1_000_000;

function connect(address) {
  const definition = protoLoader.loadSync("expertmesh/v1/router.proto", {
    includeDirs: [PROTOS],
    keepCase: true,
    longs: Number,
    enums: String,
    defaults: true,
    oneofs: true,
  });
  const { RouterService } = grpc.loadPackageDefinition(definition).expertmesh.v1;
  return new RouterService(address, grpc.credentials.createInsecure());
}

const deadline = () => ({ deadline: Date.now() + TIMEOUT_MS });

function forwardRequest(layer, hiddenSize, data) {
  const shape = [data.length / 4 / hiddenSize, hiddenSize];
  return { layer, hidden_states: { data_type: "DATA_TYPE_FLOAT32", shape, data } };
}

// One ForwardStream: sends frames in chunks, and gives each its answer when that is complete.
class FrameStream {
  #call;
  #frames = new Map();

  constructor(call) {
    this.#call = call;
    call.on("data", (message) => this.#receive(message));
    call.on("error", (error) => this.#frames.forEach((frame) => frame.reject(error)));
  }

  send(frame_id, request) {
    const { data, ...tensor } = request.hidden_states;
    const prefix = { ...tensor, data: data.subarray(0, CHUNK_BYTES) };
    this.#call.write({ frame_id, forward: { ...request, hidden_states: prefix } });
    for (let at = CHUNK_BYTES; at < data.length; at += CHUNK_BYTES) {
      this.#call.write({ frame_id, chunk: { data: data.subarray(at, at + CHUNK_BYTES) } });
    }
    return new Promise((resolve, reject) =>
      this.#frames.set(frame_id, { resolve, reject, parts: [] }),
    );
  }

  close() {
    this.#call.end();
  }

  #receive({ frame_id, kind, forward, chunk, error }) {
    const frame = this.#frames.get(frame_id);
    if (kind === "error") {
      frame.reject(error);
      return;
    }
    frame.forward ??= forward;
    frame.parts.push(kind === "forward" ? forward.hidden_states.data : chunk.data);
    const { shape } = frame.forward.hidden_states;
    const data = Buffer.concat(frame.parts);
    if (data.length === 4 * shape[0] * shape[1]) {
      frame.resolve({ shape, data, messages: frame.parts.length });
    }
  }
}

const [address, layerText, inPath, outFolder] = process.argv.slice(2);
const layer = Number(layerText);
const router = connect(address);
const unary = (method) => promisify(router[method].bind(router));

const described = await unary("Describe")({}, deadline());
const hiddenSize = described.hidden_size;
const all = readFileSync(inPath);
const firstRow = all.subarray(0, 4 * hiddenSize);

const forward = await unary("Forward")(forwardRequest(layer, hiddenSize, all), deadline());
writeFileSync(join(outFolder, "forward"), forward.hidden_states.data);

const frames = new FrameStream(router.ForwardStream(deadline()));
const answers = await Promise.allSettled([
  frames.send(1, forwardRequest(layer, hiddenSize, all)),
  frames.send(2, forwardRequest(layer, hiddenSize, firstRow)),
  frames.send(3, forwardRequest(NO_SUCH_LAYER, hiddenSize, firstRow)),
]);
frames.close();
const [whole, single] = answers.slice(0, 2).map(({ value, reason }) => {
  if (reason) throw reason;
  return value;
});
writeFileSync(join(outFolder, "stream_whole"), whole.data);
writeFileSync(join(outFolder, "stream_single"), single.data);

const refused = await unary("Forward")(
  forwardRequest(NO_SUCH_LAYER, hiddenSize, firstRow),
  deadline(),
).then(
  () => null,
  ({ code, details }) => ({ code, details }),
);
router.close();

console.log(
  JSON.stringify({
    described,
    forward: { shape: forward.hidden_states.shape },
    stream: {
      whole: { shape: whole.shape, messages: whole.messages },
      single: { shape: single.shape, messages: single.messages },
    },
    refused: { unary: refused, frame: answers[2].reason },
  }),
);
