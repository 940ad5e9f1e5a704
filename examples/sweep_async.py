"""Sweep a service that answers over the network: an async run-function, on the event loop of the program itself.

The run-function talks to a server that runs on the same loop, so both share whatever lives there: connections, locks,
events. Sixteen requests are in flight at any time, in one thread.
"""

from __future__ import annotations

import anyio
import anyio.abc
from anyio.streams.buffered import BufferedByteReceiveStream

from paraval import RunningJob, SerialEvaluator


async def run(job: RunningJob, port: int) -> float:
    """Ask the service for the value at ``job["x"]``."""
    async with await anyio.connect_tcp("127.0.0.1", port) as connection:
        await connection.send(f"{job['x']}\n".encode())
        return float(await BufferedByteReceiveStream(connection).receive_until(b"\n", max_bytes=64))


async def serve(connection: anyio.abc.ByteStream) -> None:
    """Answer one request, as a service with some latency does."""
    async with connection:
        x = float(await BufferedByteReceiveStream(connection).receive_until(b"\n", max_bytes=64))
        await anyio.sleep(0.05)
        await connection.send(f"{1 / (1 + (x - 3) ** 2)}\n".encode())


async def main() -> None:
    """Start the service, sweep it, and print the best value."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as service:
        service.start_soon(listener.serve, serve)
        async with SerialEvaluator(run, num_workers=16, run_function_kwargs={"port": port}) as evaluator:
            await evaluator.submit_async([{"x": step / 20} for step in range(100)])
            jobs = [job async for job in evaluator.as_completed()]
        service.cancel_scope.cancel()
    best = max((job for job in jobs if job.error is None), key=lambda job: job.output)
    print(f"best of {len(jobs)}: {best.output:.4f} at x = {best.args['x']}")


if __name__ == "__main__":
    anyio.run(main)
