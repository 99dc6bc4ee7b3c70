import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { APICallError, embed, generateText, streamText } from 'ai'
import { check, model, question, run, url } from './report.mjs'

const provider = createOpenAICompatible({ name: 'kserve-vllm', baseURL: `${url}/v1`, apiKey: 'none', includeUsage: true })
const chat = provider(model)
const few = { maxOutputTokens: 8, temperature: 0, maxRetries: 0 }

await run({
  'generateText answers with usage': async () => {
    const made = await generateText({ model: chat, prompt: question, ...few })
    check(made.text.length > 0 && made.usage.outputTokens > 0, made.text)
    check(['stop', 'length'].includes(made.finishReason), made.finishReason)
  },
  'streamText streams what is answered whole, with usage': async () => {
    const whole = await generateText({ model: chat, prompt: question, ...few })
    const stream = streamText({ model: chat, prompt: question, ...few })
    let text = ''
    for await (const part of stream.textStream) text += part
    check(text === whole.text, text)
    check((await stream.usage).totalTokens === whole.usage.totalTokens, await stream.usage)
  },
  'a system prompt and a conversation are taken': async () => {
    const messages = [
      { role: 'user', content: [{ type: 'text', text: 'Hello' }] },
      { role: 'assistant', content: [{ type: 'text', text: 'Hello!' }] },
      { role: 'user', content: question },
    ]
    check((await generateText({ model: chat, system: 'Be brief.', messages, ...few })).text.length > 0, 'no text')
  },
  'the completion model answers': async () => {
    const made = await generateText({ model: provider.completionModel(model), prompt: question, ...few })
    check(made.text.length > 0, 'no text')
  },
  'a wrong model is an APICallError with our sentence': async () => {
    try {
      await generateText({ model: provider('nobody'), prompt: question, ...few })
    } catch (error) {
      check(APICallError.isInstance(error) && error.statusCode === 404 && /nobody/.test(error.message), error.message)
      return
    }
    throw new Error('it was not refused')
  },
  'a stream that is aborted ends': async () => {
    const abort = new AbortController()
    const stream = streamText({ model: chat, prompt: question, maxOutputTokens: 512, abortSignal: abort.signal, onError() {} })
    for await (const _ of stream.textStream) abort.abort()
  },
  'embeddings of a model that has none are refused': async () => {
    try {
      await embed({ model: provider.embeddingModel(model), value: 'a', maxRetries: 0 })
    } catch (error) {
      check(APICallError.isInstance(error) && [400, 404].includes(error.statusCode), error.message)
      return
    }
    throw new Error('it was not refused')
  },
})
