// Acceptance checks 3, 7, 14, 22, 43, 50 and 53 with openai-node. Prints one JSON object, check name -> what came of it.
import assert from "node:assert/strict";
import fs from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const given = JSON.parse(process.argv[2]);
const found = createRequire(given.environment + "/package.json").resolve("openai");
const module = await import(pathToFileURL(found).href);
const OpenAI = module.default?.default ?? module.default;
const client = new OpenAI();
const asked = [{ role: "user", content: "colour 1?" }];

async function until(holds, seconds = 240) {
  const deadline = Date.now() + 1000 * seconds;
  for (;;) {
    const value = await holds();
    if (value) return value;
    assert(Date.now() < deadline, "it did not come true in time");
    await new Promise((go) => setTimeout(go, 200));
  }
}

async function begin(epochs) {
  const numbers = { n_epochs: epochs, batch_size: 1 };
  return client.fineTuning.jobs.create({
    model: "tiny",
    training_file: given.training,
    method: { type: "supervised", supervised: { hyperparameters: numbers } },
  });
}

async function told(id) {
  const steps = [];
  for await (const event of client.fineTuning.jobs.listEvents(id, { limit: 100 })) {
    if (event.type === "metrics") steps.push(event.data.step);
  }
  return steps.reverse();
}

async function check_03_07_a_stream_of_a_file() {
  const made = await client.files.create({ file: fs.createReadStream(given.train), purpose: "fine-tune" });
  const content = fs.readFileSync(given.train);
  assert(made.id.startsWith("file-"));
  assert.equal(made.bytes, content.length);
  assert.equal(made.filename, "train.jsonl");
  assert.equal(made.purpose, "fine-tune");
  assert.equal(await (await client.files.content(made.id)).text(), content.toString());
  const gone = await client.files.delete(made.id);
  assert.equal(gone.deleted, true);
  await assert.rejects(client.files.retrieve(made.id), (error) => {
    assert(error instanceof OpenAI.NotFoundError);
    assert.equal(error.status, 404);
    assert.equal(error.param, "id");
    assert(error.requestID);
    return true;
  });
}

async function check_43_50_streams() {
  const whole = await client.chat.completions.create({ model: "tiny", messages: asked, max_tokens: 6, temperature: 0 });
  const chunks = [];
  const stream = await client.chat.completions.create({
    model: "tiny", messages: asked, max_tokens: 6, temperature: 0, stream: true, stream_options: { include_usage: true },
  });
  for await (const chunk of stream) chunks.push(chunk);
  assert.equal(chunks[0].choices[0].delta.role, "assistant");
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.equal(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
  const said = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  assert.equal(said, whole.choices[0].message.content);
  const bare = [];
  const without = { model: "tiny", messages: asked, max_tokens: 6, temperature: 0, stream: true };
  for await (const chunk of await client.chat.completions.create(without)) bare.push(chunk);
  assert(bare.every((chunk) => chunk.choices.length === 1 && !chunk.usage));
  assert.equal(bare.at(-1).choices[0].finish_reason, whole.choices[0].finish_reason);
  const helper = client.chat.completions.stream({ model: "tiny", messages: asked, max_tokens: 6, temperature: 0 });
  assert.equal((await helper.finalChatCompletion()).choices[0].message.content, said);
}

async function check_22_53_a_job_paused_and_resumed() {
  const job = await begin(20);
  await until(async () => (await told(job.id)).length > 2);
  await client.fineTuning.jobs.pause(job.id);
  await until(async () => (await client.fineTuning.jobs.retrieve(job.id)).status === "paused", 30);
  const kept = await client.fineTuning.jobs.checkpoints.list(job.id);
  const at = kept.data[0].step_number;
  assert(at >= 3 && at < 240, String(at));
  assert.match(kept.data[0].fine_tuned_model_checkpoint, new RegExp(`:ckpt-step-${at}$`));
  await client.fineTuning.jobs.resume(job.id);
  const done = await until(async () => {
    const one = await client.fineTuning.jobs.retrieve(job.id);
    return ["succeeded", "failed", "cancelled"].includes(one.status) && one;
  });
  assert.equal(done.status, "succeeded");
  assert.deepEqual(await told(job.id), Array.from({ length: 240 }, (_, step) => step + 1));
}

async function check_53_a_job_cancelled() {
  const job = await begin(50);
  await until(async () => (await told(job.id)).length > 2);
  await client.fineTuning.jobs.cancel(job.id);
  await until(async () => (await client.fineTuning.jobs.retrieve(job.id)).status === "cancelled", 10);
  assert.equal((await client.fineTuning.jobs.retrieve(job.id)).fine_tuned_model, null);
}

// Begun first and waited for last: a held job's stream that says nothing for more than a minute.
async function check_50_a_stream_that_is_idle() {
  const job = await begin(50);
  await until(async () => ["queued", "running"].includes((await client.fineTuning.jobs.retrieve(job.id)).status));
  await client.fineTuning.jobs.pause(job.id);
  await until(async () => (await client.fineTuning.jobs.retrieve(job.id)).status === "paused");
  setTimeout(() => client.fineTuning.jobs.cancel(job.id), 62_000);
  const told = [];
  const stream = await client.get(`/fine_tuning/jobs/${job.id}/events`, { query: { stream: true }, stream: true });
  for await (const event of stream) told.push(event);
  assert.equal(told[0].message, `Created fine-tuning job: ${job.id}`);
  assert.equal((await client.fineTuning.jobs.retrieve(job.id)).status, "cancelled");
}

async function check_53_models_and_errors() {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert(names.includes("tiny"));
  await assert.rejects(client.models.retrieve("ft:tiny:luthier::nothere1"), (error) => {
    assert(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    assert.equal(error.param, "model");
    return true;
  });
  await assert.rejects(client.models.delete("tiny"), OpenAI.PermissionDeniedError);
  await assert.rejects(
    client.fineTuning.jobs.create({ model: "tiny", training_file: "file-nothere" }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === "training_file",
  );
  await assert.rejects(new OpenAI({ apiKey: "sk-wrong" }).models.list(), OpenAI.AuthenticationError);
  const listed = [];
  for await (const one of client.fineTuning.jobs.list({ limit: 1 })) listed.push(one.id);
  assert.equal(new Set(listed).size, listed.length);
}

async function check_14_a_job_of_method_dpo() {
  const hyperparameters = { n_epochs: 1, batch_size: 6, beta: 0.5 };
  const made = await client.fineTuning.jobs.create({
    model: "tiny",
    training_file: given.preferences,
    method: { type: "dpo", dpo: { hyperparameters } },
  });
  assert.equal(made.hyperparameters, null);
  assert.equal(made.method.dpo.hyperparameters.learning_rate_multiplier, "auto");
  const done = await until(async () => {
    const one = await client.fineTuning.jobs.retrieve(made.id);
    return ["succeeded", "failed", "cancelled"].includes(one.status) && one;
  });
  assert.equal(done.status, "succeeded");
  assert.deepEqual(done.method, { type: "dpo", dpo: { hyperparameters: { ...hyperparameters, learning_rate_multiplier: 1 } } });
  assert.deepEqual(await told(made.id), [1, 2]);
  await assert.rejects(
    client.fineTuning.jobs.create({
      model: "tiny",
      training_file: given.preferences,
      method: { type: "dpo", dpo: { hyperparameters: { beta: 3 } } },
    }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === "method.dpo.hyperparameters.beta",
  );
}

async function check_53_a_tuned_model_deleted() {
  const job = given.jobs.repeat.id;
  const done = await until(async () => {
    const one = await client.fineTuning.jobs.retrieve(job);
    return ["succeeded", "failed", "cancelled"].includes(one.status) && one;
  });
  assert.equal(done.status, "succeeded");
  const text = await (await client.files.content(done.result_files[0])).text();
  assert(Buffer.from(text, "base64").toString().startsWith("step,train_loss"));
  assert.equal((await client.models.delete(done.fine_tuned_model)).deleted, true);
  await assert.rejects(client.models.retrieve(done.fine_tuned_model), OpenAI.NotFoundError);
}

const checks = [
  check_03_07_a_stream_of_a_file,
  check_43_50_streams,
  check_22_53_a_job_paused_and_resumed,
  check_53_a_job_cancelled,
  check_53_models_and_errors,
  check_14_a_job_of_method_dpo,
  check_53_a_tuned_model_deleted,
];
const outcome = {};
const idle = check_50_a_stream_that_is_idle().then(() => null, (error) => error);
checks.push(async function check_50_a_stream_that_is_idle() {
  const error = await idle;
  if (error) throw error;
});
for (const check of checks) {
  const began = Date.now();
  try {
    await check();
    outcome[check.name] = { ok: true };
  } catch (error) {
    outcome[check.name] = { ok: false, error: error.stack ?? String(error) };
  }
  outcome[check.name].seconds = (Date.now() - began) / 1000;
}
console.log(JSON.stringify(outcome));
