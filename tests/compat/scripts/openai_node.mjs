import OpenAI from 'openai'
import { check, model, question, run, url } from './report.mjs'

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none', maxRetries: 0 })
const messages = [{ role: 'user', content: question }]
const refused = async (asked, status) => {
  try {
    await asked
  } catch (error) {
    check(error instanceof OpenAI.APIError && error.status === status, `${error.status} ${error.message}`)
    return error
  }
  throw new Error('it was not refused')
}

await run({
  'models are listed and retrieved': async () => {
    const ids = []
    for await (const each of client.models.list()) ids.push(each.id)
    check(ids.includes(model), ids)
    check((await client.models.retrieve(model)).id === model, 'another model')
  },
  'chat answers with usage': async () => {
    const made = await client.chat.completions.create({ model, messages, max_tokens: 8, temperature: 0 })
    check(made.choices[0].message.content.length > 0 && made.usage.completion_tokens > 0, made)
  },
  'chat streams what it answers whole, and usage with the last chunk': async () => {
    const whole = await client.chat.completions.create({ model, messages, max_tokens: 8, temperature: 0 })
    const stream = await client.chat.completions.create({
      model, messages, max_tokens: 8, temperature: 0, stream: true, stream_options: { include_usage: true },
    })
    let text = ''
    let usage = null
    for await (const chunk of stream) {
      check(usage === null, 'usage came before the last chunk')
      text += chunk.choices[0]?.delta.content ?? ''
      usage = chunk.usage
    }
    check(text === whole.choices[0].message.content, text)
    check(usage.total_tokens === whole.usage.total_tokens, usage)
  },
  'the stream helper ends with a final answer': async () => {
    const stream = client.chat.completions.stream({ model, messages, max_tokens: 8, temperature: 0 })
    const made = await stream.finalChatCompletion()
    check(made.choices[0].message.role === 'assistant' && made.choices[0].message.content, made)
  },
  'a stream that is left is aborted': async () => {
    const stream = await client.chat.completions.create({ model, messages, max_tokens: 512, stream: true })
    for await (const _ of stream) break
    check(stream.controller.signal.aborted, 'not aborted')
  },
  'completions answer': async () => {
    const made = await client.completions.create({ model, prompt: question, max_tokens: 4, logprobs: 1 })
    check(made.choices[0].logprobs.tokens.length === made.usage.completion_tokens, made)
  },
  'responses answer and stream': async () => {
    const made = await client.responses.create({ model, input: question, max_output_tokens: 8, store: false, temperature: 0 })
    let text = ''
    const stream = await client.responses.create({
      model, input: question, max_output_tokens: 8, store: false, temperature: 0, stream: true,
    })
    for await (const event of stream) if (event.type === 'response.output_text.delta') text += event.delta
    check(made.output_text.length > 0 && made.output_text === text, { made, text })
  },
  'a schema gives JSON': async () => {
    const schema = { type: 'object', properties: { ok: { type: 'boolean' } }, required: ['ok'], additionalProperties: false }
    const made = await client.chat.completions.create({
      model, messages, max_tokens: 32, response_format: { type: 'json_schema', json_schema: { name: 'x', schema, strict: true } },
    })
    check(typeof JSON.parse(made.choices[0].message.content).ok === 'boolean', made.choices[0])
  },
  'a wrong value is a BadRequestError that names the field': async () => {
    const error = await refused(client.chat.completions.create({ model, messages, temperature: -1 }), 400)
    check(error instanceof OpenAI.BadRequestError && /temperature/.test(error.message), error.message)
    check(error.code === null || typeof error.code === 'string', error.code)
  },
  'an unknown model is a NotFoundError': async () => {
    const error = await refused(client.chat.completions.create({ model: 'nobody', messages }), 404)
    check(error instanceof OpenAI.NotFoundError && error.code === 'model_not_found', error.code)
  },
  'embeddings of a model that has none are refused': async () => {
    try {
      await client.embeddings.create({ model, input: 'a' })
    } catch (error) {
      check([400, 404].includes(error.status) && error.message.length > 10, `${error.status} ${error.message}`)
      return
    }
    throw new Error('it was not refused')
  },
  'tools of a model that has none are refused with a sentence': async () => {
    const tools = [{ type: 'function', function: { name: 'f', parameters: { type: 'object', properties: {} } } }]
    const error = await refused(client.chat.completions.create({ model, messages, tools, tool_choice: 'auto' }), 400)
    check(/tool/.test(error.message), error.message)
  },
})
