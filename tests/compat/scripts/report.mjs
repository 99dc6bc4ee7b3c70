// For the scripts that drive a client: a line of JSON for each case.
export const { URL: url, GRPC: grpcAddress, MODEL: model } = process.env
export const question = 'What is 2 + 3?'

export async function run(cases) {
  for (const [name, ask] of Object.entries(cases)) {
    let detail = ''
    try {
      await ask()
    } catch (error) {
      detail = String(error?.stack ?? error).slice(0, 400) || 'failed'
    }
    console.log(JSON.stringify({ case: name, ok: !detail, detail }))
  }
  process.exit(0)
}

export function check(holds, what) {
  if (!holds) throw new Error(typeof what === 'string' ? what : JSON.stringify(what))
}
