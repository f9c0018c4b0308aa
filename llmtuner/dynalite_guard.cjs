// Loaded before dynalite, to fix two of its weaknesses.
const crypto = require('crypto')
const http = require('http')
const { Readable } = require('stream')

// 1. dynalite exits with an exception if a client dies in the middle of a request (for example by kill -9). Such a request
// can be ignored, so it is no reason to stop the database.
process.on('uncaughtException', (error) => {
  if (error.code === 'ECONNRESET') return
  console.error(error)
  process.exit(1)
})

// 2. dynalite accepts any signature, so every account on this machine could read and write everything. With this file, a
// request must be signed with DYNAMODB_SECRET as for AWS (Signature Version 4, in the Authorization header). A GET request
// needs no signature, because its response is only "healthy".
const secret = process.env.DYNAMODB_SECRET
if (!secret) {
  console.error('DYNAMODB_SECRET must be set, because all requests must be signed with it.')
  process.exit(1)
}
const MOST_BYTES = 16 * 1024 * 1024 // the same limit as dynalite's
const AUTHORIZATION =
  /^AWS4-HMAC-SHA256 Credential=[^/,]+\/((\d{8})\/([^/,]+)\/(dynamodb)\/aws4_request), ?SignedHeaders=([^,]+), ?Signature=([0-9a-f]{64})$/

const sha256 = (data) => crypto.createHash('sha256').update(data).digest('hex')
const hmac = (key, data) => crypto.createHmac('sha256', key).update(data).digest()

function isSigned(request, body) {
  const parts = AUTHORIZATION.exec(request.headers.authorization || '')
  if (!parts) return false
  const [, scope, date, region, service, names, signature] = parts
  const headers = names.split(';').map((name) => `${name}:${(request.headers[name] || '').trim().replace(/\s+/g, ' ')}\n`)
  const [path, query = ''] = request.url.split('?')
  const canonical = [request.method, path, query, headers.join(''), names, sha256(body)].join('\n')
  const text = ['AWS4-HMAC-SHA256', request.headers['x-amz-date'], scope, sha256(canonical)].join('\n')
  const key = [date, region, service, 'aws4_request'].reduce(hmac, 'AWS4' + secret)
  return crypto.timingSafeEqual(hmac(key, text), Buffer.from(signature, 'hex'))
}

function refuse(response, status, type, message) {
  response.writeHead(status, { 'Content-Type': 'application/x-amz-json-1.0', Connection: 'close' })
  response.end(JSON.stringify({ __type: 'com.amazon.coral.service#' + type, message }))
}

const createServer = http.createServer
http.createServer = (handler) =>
  createServer((request, response) => {
    if (request.method === 'GET') return handler(request, response)
    if (!request.headers.authorization)
      return refuse(response, 400, 'MissingAuthenticationTokenException', 'Request is missing Authentication Token')
    const blocks = []
    let bytes = 0
    request.on('error', () => {}) // the client has disconnected
    request.on('data', (block) => {
      bytes += block.length
      if (bytes <= MOST_BYTES) blocks.push(block)
    })
    request.on('end', () => {
      const body = Buffer.concat(blocks)
      if (bytes > MOST_BYTES) return refuse(response, 413, 'RequestEntityTooLargeException', 'The request is too large')
      if (!isSigned(request, body))
        return refuse(response, 400, 'InvalidSignatureException', 'The signature does not match: check DYNAMODB_SECRET')
      const { method, url, headers } = request
      handler(Object.assign(Readable.from([body]), { method, url, headers }), response)
    })
  })
