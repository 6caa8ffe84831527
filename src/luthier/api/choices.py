"""What this server chose where OpenAI's documentation is silent or real clients contradict it. Words only, for
docs/compatibility.md (compatibility.py): a paragraph each.

Does not know: routes.
"""

from __future__ import annotations

# Routes of OpenAI's that this server does not have.
ELSEWHERE = """\
`/fine_tuning/alpha/graders/*`: graders come with reinforcement, which this version does not offer.

`/evals*`: not offered by this version.

`/batches*`: not offered by this version.

`/responses*`: not offered by this version; chat completions answer the same questions.

`/embeddings, /moderations, /audio/*, /images/*, /videos*, /realtime*, /assistants*, /threads*, /vector_stores*`: not
about fine-tuned text models.

`webhooks`: nothing is sent out; clients poll or follow events.
"""

CHOICES = """\
**Rows of training files.** OpenAI's specification no longer says what a line may hold. The guides and older revisions
do, and they are followed: messages, tools, functions, weights 0 and 1; prompt and completion; input with
`preferred_output` and `non_preferred_output`, or with the older names that end in `_completion`. `chosen` and
`rejected` beside a prompt are read too.

**`paused`.** Reported as a status although the published list lacks it: the pause route exists, and the clients pass
the word through.

**The data doctor.** `GET /luthier/files/{file_id}/check` is an extension: 200 with the report of `luthier data check
--json`, or 202 while it is being made. Jobs tell the same findings as events at level warn before they queue, and do
not wait longer than eight seconds for them.

**Result files.** `step_metrics.csv` of a job is served as base64 text, which OpenAI's notebooks decode without
asking, except to clients older than 1.0, which print what they get. `compiled_results.csv` of a fine-tune is always
plain. `LUTHIER_RESULTS=raw` or `base64` decides for all results of jobs.

**`error` of a job.** An object of three nulls while nothing failed, as the service answers, not `null` as the
specification says. Read `status`, or `error.code`.

**`hyperparameters`.** `auto` until a worker has set the job up, then numbers; the same under `method`. A fine-tune
shows the numbers that its client sent. Beside `method` the older place is heard too, for `dpo` as for `supervised`, and
`beta` stands under `method.dpo` alone. A job of method `dpo` shows null at the top, as the specification's examples do:
its numbers are under `method`.

**Measures of `dpo`.** No client knows them by a name, so they have the engine's: `reward_accuracy` (the share of pairs
whose preferred answer has gained on the other one), `reward_margin` (by how much, times `beta`, in the mean) and
`preference_accuracy` (the share whose preferred answer the model itself finds likelier), each behind `train_`, `valid_`
or `full_valid_`. They are in the metrics of events, checkpoints and trackers, and the last nine columns of
`step_metrics.csv`. Accuracies of tokens are not measured, so those keys are absent and those cells empty;
`train_accuracy` is the reward accuracy there.

**Defaults of fine-tunes.** The old texts describe them loosely and logs contradict each other. Here: 4 epochs; a
batch of 0.2 % of the rows, as the nearest power of two from 1 to 256; a multiplier of 0.1, 0.2 above a batch of 16,
0.05 for names that begin with davinci; a prompt loss weight of 0.01. A multiplier of 0.1 is the server's own rate and
the others are relative to it.

**Words of errors.** Status, type, param and code are kept stable; sentences may improve. Exceptions, because clients
look for them: `No such File object: ID`, `Could not find fine tune: ID`, `Invalid URL (METHOD PATH)`.

**Validation errors.** 400, never 422: clients older than 1.0 know no other. 409 is never sent: clients repeat it.

**Checkpoints as models.** The last three checkpoints of a job are listed by `GET /models` like its result, and answer
like it.

**Names of bases.** OpenAI's names mean a local base, by configuration or else the first on offer; an event of the job
says which, and the job's `model` shows it. A name with a colon is a tuned model or nothing.

**Cancel.** A running job is shown as cancelled at once, and its worker ends it within seconds. Cancel again before
that is answered like the first time; after it, 400.

**Pause and resume.** A running job stays `running` until it is saved. A job whose files are being checked cannot be
paused, one that is over can be neither: 400. Asked for twice, both say the same.

**Repeated creates.** No client sends an idempotency key, but the official ones count their tries. A create with
`x-stainless-retry-count` of 1 or more that repeats a request of the same key within two minutes is answered with the
job that was made.

**Too few rows.** A job with fewer than 10 examples is created and then fails with `invalid_n_examples`, as today's
service does.

**Deleted files.** A file that is deleted before its job starts makes the job fail. Fine-tunes show it with the status
`deleted`.

**Lists.** Jobs, events and checkpoints come newest first, at most 1000 at once. `starting_after` is another word for
`after`. The cursor of a row that was deleted goes on working for a day. Fine-tunes and their events come oldest
first, all of them.

**Streams of events.** `GET /fine_tuning/jobs/{id}/events?stream=true` is an extension: the whole history as
server-sent events, then live until the job is over, as fine-tunes have it. Silence is filled with a comment every 15
seconds. Fine-tunes tell sentences only, jobs measurements too.

**Proofs.** A job with a validation file ends by proving its model: some of the file's rows are answered by the base,
by the base with the nearest training rows in its prompt, and by the result, in at most a third of the training time.
As an extension the job's `proof` has what came of it (the metric and why, a score with a 95% interval for each way,
paired tests, rows that turned, costs), an event tells it in a sentence, and the result files are followed by
`report.json` (every row and answer) and `report.html`; the table of steps stays the first. `metric` and `proof_rows`
in the request choose otherwise. What a grader of one's own would run is code, so none can be named over the API.
Fine-tunes are proven too, and their one result file stays one.

**One organisation.** Every key sees every file, job and model; a key's role decides only over administration.
Permissions on checkpoints are kept and listed and open nothing more. Any key may manage them: the official client
sends its ordinary one. Organisation and project headers are accepted and not looked at.

**Engines.** `/engines` is another name for `/models`, and inference under an engine's path is the same as with
`model`.

**Deleted fine-tunes.** `DELETE /fine-tunes/{id}` forgets one that is over. Its model and files stay.

**Tools in prompts.** Tools and calls are written by the model's own template. One that has no place for them gets
them in words: tools at the end of the system turn and calls in assistant turns, as our own `chatml` template writes
them; results as user turns between `<tool_response>` tags, if the template knows no tool turns. A call in an answer is
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`; text that only looks like one, or that names a function
that was not offered, stays content. In a stream the content comes as it is made and the calls when the answer is whole.

**Calls that come back.** A conversation may repeat a call of the model whose arguments are no JSON, cut off or wrong as
they were: the model sees them as a string. Training files are held to JSON.

**Forced answers.** `tool_choice` required, or by name, and `response_format` bind the answer by a grammar. White space
in that JSON is bounded, and at most 4 calls follow each other. An answer that `max_tokens` cuts ends with `length`,
its last call with the arguments so far.

**`max_tokens`.** An upper bound: more than the context has room for is the rest of the context. A prompt that leaves
no room is refused with `context_length_exceeded`.

**Stop strings.** The tokens that completed one are counted as generated, those after it are not computed.

**Choices of one request.** With `seed`, choice 0 is the answer that `n: 1` would have given; the others have seeds of
their own that follow from it.

**Errors of streams.** What fails before the first chunk has its HTTP status; later it is a last event with `error`,
without `[DONE]`. Silence is filled with a comment every 15 seconds.

**Models that come and go.** A model deleted during an answer finishes it. While a base is being loaded its requests
wait; a base that cannot be loaded is 503. `best_of` ranks by the mean log-probability of a token.
"""
