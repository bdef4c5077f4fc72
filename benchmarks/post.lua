-- Posts one body again and again, and prints what came of it as one line of JSON.
local file = assert(io.open(os.getenv("BENCH_BODY"), "rb"))
wrk.method = "POST"
wrk.body = file:read("*a")
wrk.headers["Content-Type"] = os.getenv("BENCH_CONTENT_TYPE")
file:close()

function done(summary, latency, requests)
   local errors = summary.errors
   print(string.format(
      '{"seconds": %.3f, "answers": %d, "p50_ms": %.2f, "p99_ms": %.2f, "bad_status": %d, "socket_errors": %d}',
      summary.duration / 1e6, summary.requests, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
      errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
