// Long streams over both protocols, of which none may be cut when the server is told to end; then new ones are refused.
import { readFileSync } from 'node:fs'
import grpc from '@grpc/grpc-js'
import loader from '@grpc/proto-loader'
import OpenAI from 'openai'
import { check, grpcAddress, model, question, run, url } from './report.mjs'

const tokens = 400
const described = loader.loadFileDescriptorSetFromBuffer(readFileSync('v2.bin'), { longs: String, defaults: true })
const { GRPCInferenceService } = grpc.loadPackageDefinition(described).inference
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none', maxRetries: 0 })
let begun = 0
// A line to the one that starts this, once all streams have begun.
const begin = () => ++begun === 8 && console.log('BEGUN')

const overHttp = async () => {
  const stream = await client.completions.create({
    model, prompt: question, max_tokens: tokens, stream: true, ignore_eos: true, stream_options: { include_usage: true },
  })
  let first = true
  let usage = null
  for await (const chunk of stream) {
    if (first) begin()
    first = false
    usage = chunk.usage ?? usage
  }
  check(usage?.completion_tokens === tokens, usage)
}
const overGrpc = () => new Promise((resolve, reject) => {
  const service = new GRPCInferenceService(grpcAddress, grpc.credentials.createInsecure(), { 'grpc.use_local_subchannel_pool': 1 })
  const made = service.ModelStreamInfer({ deadline: Date.now() + 90_000 })
  let messages = 0
  made.on('data', (each) => {
    if (each.error_message) return reject(new Error(each.error_message))
    if (messages++ === 0) begin()
  })
  made.on('error', reject)
  made.on('end', () => resolve(check(messages > tokens / 2, messages)))
  made.write({
    model_name: model,
    inputs: [
      { name: 'text_input', datatype: 'BYTES', shape: [1], contents: { bytes_contents: [Buffer.from(question)] } },
      { name: 'stream', datatype: 'BOOL', shape: [1], contents: { bool_contents: [true] } },
    ],
    parameters: [{ key: 'max_tokens', value: { int64_param: tokens } }, { key: 'ignore_eos', value: { bool_param: true } }],
  })
  made.end()
})

const all = [...Array(4)].flatMap(() => [overHttp(), overGrpc()])
const settled = Promise.allSettled(all)
await run({
  'no stream over HTTP is cut': async () => (await settled).forEach((each, at) => { if (at % 2 === 0 && each.reason) throw each.reason }),
  'no stream over gRPC is cut by its GOAWAY': async () => (await settled).forEach((each, at) => { if (at % 2 && each.reason) throw each.reason }),
})
