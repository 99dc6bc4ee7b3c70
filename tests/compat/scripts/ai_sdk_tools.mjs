import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { generateObject, generateText, jsonSchema, stepCountIs, streamText, tool } from 'ai'
import { check, model, run, url } from './report.mjs'

const provider = createOpenAICompatible({
  name: 'kserve-vllm', baseURL: `${url}/v1`, apiKey: 'none', includeUsage: true, supportsStructuredOutputs: true,
})
const chat = provider(model)
const few = { maxOutputTokens: 200, temperature: 0, maxRetries: 0 }
const prompt = 'What is the weather in Paris?'
const parameters = { type: 'object', properties: { location: { type: 'string' } }, required: ['location'] }
const weather = (places) => ({
  get_weather: tool({
    description: 'Current weather',
    inputSchema: jsonSchema(parameters),
    execute: async ({ location }) => {
      places.push(location)
      return 'snow'
    },
  }),
})
const went = (places, text) => check(places.join() === 'Paris' && /snow/.test(text), { places, text })

await run({
  'generateText calls the tool and answers from its result': async () => {
    const places = []
    const made = await generateText({ model: chat, prompt, tools: weather(places), stopWhen: stepCountIs(3), ...few })
    went(places, made.text)
    check(made.steps[0].finishReason === 'tool-calls' && made.finishReason === 'stop', made.steps.map((s) => s.finishReason))
  },
  'streamText does the same': async () => {
    const places = []
    const stream = streamText({ model: chat, prompt, tools: weather(places), stopWhen: stepCountIs(3), ...few })
    let text = ''
    for await (const part of stream.textStream) text += part
    went(places, text)
  },
  'a tool that is required is called': async () => {
    const places = []
    const made = await generateText({ model: chat, prompt, tools: weather(places), toolChoice: 'required', ...few })
    check(made.toolCalls.length === 1 && places.join() === 'Paris', { places })
  },
  'an object under a schema is complete': async () => {
    const schema = jsonSchema({
      type: 'object', properties: { sum: { type: 'integer' }, text: { type: 'string' } },
      required: ['sum', 'text'], additionalProperties: false,
    })
    const made = await generateObject({ model: chat, prompt: 'What is 17 + 25?', schema, ...few })
    check(Number.isInteger(made.object.sum) && typeof made.object.text === 'string', made.object)
    check(made.finishReason === 'stop', made.finishReason)
  },
})
