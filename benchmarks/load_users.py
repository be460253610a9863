"""Clients of the load test, for locust: each takes the next request of a plan, asks it, and writes
down what came and when. `load.py` starts this and judges what it found.
"""

import json
import os
import time
from itertools import count
from pathlib import Path

from gevent import spawn
from locust import HttpUser, events, task
from locust.exception import StopUser

PLAN = json.loads(os.environ["FLEXOLMO_LOAD_PLAN"])
REQUESTS = [json.loads(line) for line in Path(PLAN["requests"]).read_text().splitlines()]
NEXT = count()
DONE = count(1)
FOUND = open(PLAN["found"], "w", encoding="utf-8")  # noqa: SIM115  (closed when locust ends)


@events.quitting.add_listener
def _close(**_):
    FOUND.close()


class Client(HttpUser):
    """Somebody who asks one request after the other, without a pause."""

    @task
    def ask(self) -> None:
        number = next(NEXT)
        if number >= len(REQUESTS):
            raise StopUser
        asked = REQUESTS[number]
        found = {"number": number, "text": "", "times": [], "status": 0, "scores": []}
        start = time.perf_counter()
        with self.client.post(
            "/v1/completions",
            json=asked["body"],
            headers={"Authorization": f"Bearer {asked['key']}"},
            name="stream" if asked["body"]["stream"] else "whole",
            stream=True,
            catch_response=True,
        ) as reply:
            found["status"] = reply.status_code
            if reply.status_code != 200:
                found["error"] = reply.text[:1000]
            elif asked["body"]["stream"]:
                self._read_stream(reply, found, start)
            else:
                body = reply.json()
                (choice,) = body["choices"]
                found["text"] = choice["text"]
                found["ended"] = choice["finish_reason"]
                found["scores"] = _scores_of(choice)
                found["cached"] = body["usage"]["prompt_tokens_details"]["cached_tokens"]
                found["told"] = body["flexolmo"]
                found["times"].append(time.perf_counter() - start)
            reply.success() if found.get("told") else reply.failure(found.get("error", "no end"))
        FOUND.write(json.dumps(found) + "\n")
        if next(DONE) == len(REQUESTS):
            FOUND.flush()
            spawn(self.environment.runner.quit)  # not in here: it ends this client, too

    def _read_stream(self, reply, found, start) -> None:
        for line in reply.iter_lines():
            if not line.startswith(b"data: ") or line == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                found["error"] = event["error"]["message"]
                return
            for choice in event["choices"]:
                if choice["text"]:
                    found["text"] += choice["text"]
                    found["times"].append(time.perf_counter() - start)
                found["ended"] = choice["finish_reason"] or found.get("ended")
                found["scores"] += _scores_of(choice)
            found["told"] = event.get("flexolmo") or found.get("told")


def _scores_of(choice) -> list[float]:
    """Log-probabilities of the tokens of a reply, if they were asked for."""
    return choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
