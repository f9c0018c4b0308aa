// A fine-tuning script for OpenAI's own Node client: it uses only the `openai` package, OPENAI_BASE_URL and
// OPENAI_API_KEY. Each step prints one line, which the test reads.

const fs = require('node:fs');
const { setTimeout: sleep } = require('node:timers/promises');
const OpenAI = require('openai');

const client = new OpenAI({ maxRetries: 0, timeout: 60_000 });
const [path] = process.argv.slice(2);
const print = (name, value) => console.log(`${name}: ${value}`);

async function main() {
  // The documented way to upload: the length of the stream is unknown, so the form is sent chunked.
  let file = await client.files.create({ file: fs.createReadStream(path), purpose: 'fine-tune' });
  print('Uploaded bytes', file.bytes);
  print('File name', file.filename);
  file = await client.files.waitForProcessing(file.id, { pollInterval: 300 });
  print('File status', file.status);
  const content = await client.files.content(file.id);
  print('Same bytes', Buffer.from(await content.arrayBuffer()).equals(fs.readFileSync(path)));

  const upload = await client.uploads.create({
    bytes: fs.statSync(path).size, filename: 'parts.jsonl', mime_type: 'application/jsonl', purpose: 'fine-tune',
  });
  const part = await client.uploads.parts.create(upload.id, { data: fs.createReadStream(path) });
  const completed = await client.uploads.complete(upload.id, { part_ids: [part.id] });
  print('Upload status', completed.status);
  print('Upload bytes', completed.file.bytes);

  let job = await client.fineTuning.jobs.create({
    model: 'starter',
    training_file: file.id,
    suffix: 'node',
    method: { type: 'supervised', supervised: { hyperparameters: { n_epochs: 2, batch_size: 8 } } },
    llmtuner: { sequence_length: 64, validation_fraction: 0.2 },
  });
  print('Created', job.id);
  while (!['succeeded', 'failed', 'cancelled'].includes(job.status)) {
    await sleep(500);
    job = await client.fineTuning.jobs.retrieve(job.id);
  }
  print('Job status', job.status);
  const events = [];
  for await (const event of client.fineTuning.jobs.listEvents(job.id, { limit: 5 })) events.push(event);
  print('Events', JSON.stringify(events));
  const checkpoints = await client.fineTuning.jobs.checkpoints.list(job.id);
  print('Newest checkpoint', checkpoints.data[0].fine_tuned_model_checkpoint);
  const model = job.fine_tuned_model;
  print('Model', model);

  const messages = [{ role: 'user', content: 'colour 1?' }];
  const response = await client.chat.completions.create({ model, messages, max_tokens: 4, temperature: 0 });
  print('Answer', JSON.stringify(response.choices[0].message.content));
  let streamed = '';
  const stream = await client.chat.completions.create({ model, messages, max_tokens: 4, temperature: 0, stream: true });
  for await (const chunk of stream) streamed += chunk.choices[0]?.delta?.content ?? '';
  print('Streamed answer', JSON.stringify(streamed));

  print('Model deleted', (await client.models.delete(model)).deleted);
  print('File deleted', (await client.files.delete(file.id)).deleted);
  await client.files.delete(completed.file.id);
  const errorName = await client.files.retrieve(file.id).catch((error) => error.constructor.name);
  print('Afterwards', errorName);
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
