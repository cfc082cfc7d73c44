"""vLLM servers over HTTP: requests spread over several, tried again on another, a server that fails left out."""

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from posttrain.common.cli import UserError, first_line, require


class Failure(Exception):
    """What one server did wrong. Another, or the same one later, may do better."""


def field(answer: Any, *path: str | int) -> Any:
    """What an answer holds at the path."""
    try:
        for key in path:
            answer = answer[key]
    except (KeyError, IndexError, TypeError):
        raise Failure(f"an answer of another form than vLLM 0.32's (no {key!r})") from None
    return answer


@dataclass
class Server:
    url: str
    ready: bool = False  # prepared since it last failed
    failures: int = 0  # in a row
    retry_at: float = 0.0  # time.monotonic()
    cause: str = ""  # of the last failure


class Servers:
    """Requests to servers that are all alike. prepare(server, call) makes a server ready before its first request and
    after each failure, where call(path, body) asks that server.

    Each server has at most `in_flight` requests at a time and takes the next from a queue that all share: a slow one
    gets fewer. What fails goes back to the queue, and its server waits 1, 2, 4 s; after `patience` failures in a row
    it is left out and tried every `pause` seconds. Raises UserError when all are left out, or one request always fails.
    """

    in_flight, patience, pause, tries = 64, 4, 30.0, 8

    def __init__(self, urls: str, flag: str, seconds: float, prepare: Callable):
        self.flag, self.seconds, self.prepare = flag, seconds, prepare
        self.servers = [Server(url.strip().rstrip("/")) for url in urls.split(",")]
        for server in self.servers:
            try:
                url = httpx.URL(server.url)
                told = f"{flag} {server.url!r} names no host or no port; give http://host:port"
                require(url.host and (url.port or 0) < 2**16, told)
            except httpx.InvalidURL as error:
                raise UserError(f"{flag} {server.url!r}: {first_line(error)}; give http://host:port") from None
        key = os.environ.get("VLLM_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def ask(self, path: str, bodies: list[dict], check: Callable[[dict, int], Any]) -> list:
        """check(answer, i) of the i-th body, in their order; check raises Failure on an answer that is wrong."""
        return self.run(self.spread(path, bodies, check)) if bodies else []

    def prepare_all(self) -> None:
        """Make every server ready now that is not left out; one that fails is dealt with by ask()."""

        async def prepare_each(client: httpx.AsyncClient) -> None:
            await asyncio.gather(*(self.attempt(client, each) for each in self.servers if not self.left(each)))

        self.run(prepare_each)

    def first(self, path: str, check: Callable[[Any], Any]) -> Any:
        """check(answer) of the first server that answers a GET of the path; check raises Failure as in ask()."""

        async def look(client: httpx.AsyncClient) -> Any:
            for _ in range(self.patience):
                for server in self.servers:
                    try:
                        return check(await self.call(client, server.url, path))
                    except Failure as failure:
                        self.failed(server, failure)
                await asyncio.sleep(2.0 ** (self.servers[0].failures - 1))

        return self.run(look)

    def run(self, work: Callable) -> Any:
        async def connected() -> Any:
            # The servers' own addresses, whatever proxy the environment names; limits are ours.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            async with httpx.AsyncClient(headers=self.headers, timeout=None, limits=limits, trust_env=False) as client:
                return await work(client)

        try:
            return asyncio.run(connected())
        except BaseExceptionGroup as error:
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None

    def left(self, server: Server) -> bool:
        return server.failures >= self.patience and time.monotonic() < server.retry_at

    def failed(self, server: Server, cause: Failure) -> None:
        server.ready, server.failures, server.cause = False, server.failures + 1, " ".join(str(cause).split())
        wait = self.pause if server.failures >= self.patience else 2.0 ** (server.failures - 1)
        server.retry_at = time.monotonic() + wait
        if all(each.failures >= self.patience for each in self.servers):
            raise self.give_up()

    def give_up(self, what: str = "no server answers as it should") -> UserError:
        causes = "; ".join(f"{each.url}: {each.cause}" for each in self.servers if each.cause)
        return UserError(
            f"{self.flag}: {what} ({causes}): start them again, then this command, with --resume if its run had begun"
        )

    async def call(self, client: httpx.AsyncClient, url: str, path: str, body: dict | None = None) -> Any:
        """The JSON that a server answers, to a POST if there is a body. Raises UserError where it refuses."""
        seconds = self.seconds if body else min(self.seconds, 20.0)
        try:
            async with asyncio.timeout(seconds):  # of the whole answer: one that trickles in is cut too
                answer = await client.request("POST" if body else "GET", url + path, json=body)
        except TimeoutError:
            raise Failure(f"no answer within {seconds:g} s") from None
        except httpx.HTTPError as error:
            raise Failure(first_line(error)) from None
        try:
            content = answer.json()
        except ValueError:
            content = None
        if answer.status_code == 200 and content is not None:
            return content
        told = content.get("error") if isinstance(content, dict) else None
        told = told.get("message", "") if isinstance(told, dict) else answer.text[:200]
        told = f"HTTP {answer.status_code} to {path}: {told or 'no JSON'}"
        if 400 <= answer.status_code < 500 and answer.status_code not in (408, 429):
            raise UserError(f"{self.flag} {url} refuses: {told}{mend(path, answer.status_code, told)}")
        raise Failure(told)

    async def attempt(self, client: httpx.AsyncClient, server: Server) -> None:
        try:
            await self.prepare(server, lambda path, body=None: self.call(client, server.url, path, body))
            server.ready = True
        except Failure as failure:
            self.failed(server, failure)

    def spread(self, path: str, bodies: list[dict], check: Callable) -> Callable:
        results, tries = [None] * len(bodies), [0] * len(bodies)

        async def work(client: httpx.AsyncClient, server: Server, queue: asyncio.Queue) -> None:
            while True:
                i = await queue.get()
                try:
                    results[i] = check(await self.call(client, server.url, path, bodies[i]), i)
                    server.failures = 0
                except BaseException as error:  # cancelled too: another of this server's requests has failed
                    queue.put_nowait(i)
                    tries[i] += isinstance(error, Failure)
                    if tries[i] >= self.tries:
                        server.cause = str(error)
                        raise self.give_up(f"one request failed {self.tries} times") from None
                    raise
                finally:
                    queue.task_done()

        async def serve(client: httpx.AsyncClient, server: Server, queue: asyncio.Queue) -> None:
            while True:
                await asyncio.sleep(max(0.0, server.retry_at - time.monotonic()))
                if not server.ready:
                    await self.attempt(client, server)
                    continue
                try:
                    async with asyncio.TaskGroup() as group:  # the first failure ends what is in flight
                        for _ in range(self.in_flight):
                            group.create_task(work(client, server, queue))
                except* Failure as failures:
                    self.failed(server, failures.exceptions[0])

        async def spread_out(client: httpx.AsyncClient) -> list:
            queue: asyncio.Queue = asyncio.Queue()
            for i in range(len(bodies)):
                queue.put_nowait(i)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(serve(client, server, queue)) for server in self.servers]
                await queue.join()
                for task in tasks:
                    task.cancel()
            return results

        return spread_out


GENERATE = "/inference/v1/generate"  # token ids in, token ids out
MODELS = "/v1/models"


def mend(path: str, status: int, told: str) -> str:
    """What to do about a refusal."""
    if path == GENERATE and status in (403, 404):
        return "; start it by `vllm serve` of vLLM 0.32 with --enable-scale-out"
    if path == "/weight_info" and status == 404:
        return "; if it is vLLM's, start it with VLLM_SERVER_DEV_MODE=1, without which it takes no weights"
    if path == MODELS and status == 404:
        return "; give the address of a server that `vllm serve` of vLLM 0.32 has started, without a path behind it"
    if status == 401:
        return "; put its key into VLLM_API_KEY"
    return "; start it with a higher --max-logprobs, or lower --top-k" if "max allowed" in told else ""
