import { readFileSync } from 'node:fs'
import grpc from '@grpc/grpc-js'
import loader from '@grpc/proto-loader'
import { check, grpcAddress, model, question, run } from './report.mjs'

const described = loader.loadFileDescriptorSetFromBuffer(readFileSync('v2.bin'), { longs: String, defaults: true })
const { GRPCInferenceService } = grpc.loadPackageDefinition(described).inference
const client = new GRPCInferenceService(grpcAddress, grpc.credentials.createInsecure())
const deadline = () => ({ deadline: Date.now() + 60_000 })
const request = (name = model, tokens = 8) => ({
  model_name: name,
  id: 'one',
  inputs: [{ name: 'text_input', datatype: 'BYTES', shape: [1], contents: { bytes_contents: [Buffer.from(question)] } }],
  // Described by a descriptor set, a map is a list of its entries here.
  parameters: [{ key: 'max_tokens', value: { int64_param: tokens } }, { key: 'temperature', value: { double_param: 0 } }],
})
const call = (method, body, metadata = new grpc.Metadata()) =>
  new Promise((resolve, reject) =>
    client[method](body, metadata, deadline(), (error, answer) => (error ? reject(error) : resolve(answer))))
const texts = (answer) =>
  answer.outputs.flatMap((output, index) =>
    output.name !== 'text_output' ? [] :
      answer.raw_output_contents.length ? [answer.raw_output_contents[index].subarray(4).toString()] :
        output.contents.bytes_contents.map(String))
const stream = (body) =>
  new Promise((resolve, reject) => {
    const answers = []
    const made = client.ModelStreamInfer(deadline())
    made.on('data', (each) => answers.push(each))
    made.on('error', reject)
    made.on('end', () => resolve(answers))
    made.write(body)
    made.end()
  })
const refused = async (asked, code) => {
  try {
    await asked
  } catch (error) {
    check(error.code === code, `${error.code} ${error.details}`)
    return
  }
  throw new Error('it was not refused')
}

await run({
  'live, ready and metadata': async () => {
    check((await call('ServerLive', {})).live && (await call('ServerReady', {})).ready, 'not ready')
    check((await call('ModelReady', { name: model })).ready, 'the model is not ready')
    check((await call('ModelMetadata', { name: model })).inputs.length > 0, 'no inputs')
  },
  'ModelReady of a model that is not there is false': async () => {
    check((await call('ModelReady', { name: 'nobody' })).ready === false, 'ready')
  },
  'a unary call answers': async () => {
    const answer = await call('ModelInfer', request())
    check(answer.id === 'one' && texts(answer)[0].length > 0, answer)
  },
  'a stream gives what a unary call gives': async () => {
    const whole = texts(await call('ModelInfer', request()))[0]
    const body = request()
    body.inputs.push({ name: 'stream', datatype: 'BOOL', shape: [1], contents: { bool_contents: [true] } })
    const answers = await stream(body)
    check(answers.every((each) => !each.error_message), answers)
    const text = answers.flatMap((each) => texts(each.infer_response)).join('')
    check(answers.length > 1 && whole.endsWith(text), { text, whole })
  },
  'an error in a stream is a message, and the stream goes on': async () => {
    const answers = await stream(request('nobody'))
    check(answers.length === 1 && answers[0].error_message.includes('nobody'), answers)
  },
  'an unknown model is NOT_FOUND': () => refused(call('ModelInfer', request('nobody')), grpc.status.NOT_FOUND),
  'no input is INVALID_ARGUMENT': () => refused(call('ModelInfer', { model_name: model }), grpc.status.INVALID_ARGUMENT),
  'a stream that is cancelled ends as cancelled': async () => {
    const made = client.ModelStreamInfer(deadline())
    const ended = new Promise((resolve) => made.on('error', (error) => resolve(error.code)))
    made.on('data', () => made.cancel())
    const body = request(model, 512)
    body.inputs.push({ name: 'stream', datatype: 'BOOL', shape: [1], contents: { bool_contents: [true] } })
    made.write(body)
    check((await ended) === grpc.status.CANCELLED, 'another code')
  },
  'x-request-id comes back': async () => {
    const metadata = new grpc.Metadata()
    metadata.set('x-request-id', 'mine')
    const found = await new Promise((resolve, reject) => {
      const made = client.ModelInfer(request(), metadata, deadline(), (error) => error && reject(error))
      made.on('metadata', (each) => resolve(each.get('x-request-id')[0]))
    })
    check(found === 'mine', found)
  },
})
