// Loaded before dynalite. It throws, and so ends, when a client dies in the middle of a request (kill -9 of a worker or
// of the web process): such a request is nobody's any more, and no reason to take the record down.
process.on('uncaughtException', (error) => {
  if (error.code === 'ECONNRESET') return
  console.error(error)
  process.exit(1)
})
