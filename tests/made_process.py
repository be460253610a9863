"""An engine's process without a model: `python made_process.py HOW NUMBER`.

HOW it behaves: serves; holds every answer until told to stop; refuses to open; ends at once; hangs
up but stays; breaks off in the middle of what it says of a request; babbles about it; hears calls
and does nothing; or reads nothing more. One that is started again in the same directory, where it
writes what it was told, takes its time if it "starts slowly".
"""

import os
import socket
import sys
import time

from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.errors import FlexOlmoError, MergeError
from flexolmo.files import write_json
from flexolmo.inference.messages import REQUEST, STATS, Line, write_error, write_event, write_facts
from flexolmo.inference.opening import Opening
from made_engine import MadeEngine, made_facts, with_expert

TOLD = "told.json"  # the settings that it was opened with
SEEN = {"notes": {"Ann": {"serial": 2, "bundle_digest": "b"}}}
SEEN_LATER = {"papers": {"Ben": {"serial": 1, "bundle_digest": "c"}}}


def main(how, number):
    """Do as a gateway says."""
    end = socket.socket(fileno=int(number))
    line = Line(end)
    messages = line.messages()
    _, (_, settings) = next(messages)
    opening = Opening.model_validate(settings)
    told = opening.model / TOLD
    if how == "starts slowly" and told.exists():
        time.sleep(60)
    write_json(told, settings)
    if how == "ends":
        os._exit(3)
    if how == "hangs up":
        line.close()
        time.sleep(60)
    if how == "refuses":
        line.send("failed", 0, *write_error(MergeError("not a mixture")))
        return
    names = opening.experts or ("notes", "trials")
    engine = MadeEngine(load_tokenizer(opening.model / "anchor"), {n: made_facts(n) for n in names})
    if how == "holds":
        engine.hold()
    line.send("opened", write_facts(engine.facts), SEEN)
    if how == "reads nothing":
        time.sleep(60)
    texts = {}
    for word, values in messages:
        if word not in ("submit", "cancel") and how == "does nothing":
            continue
        if word == "submit" and how == "breaks off":
            end.sendall(b'["said", 1, "PromptRe')
            os._exit(9)
        if word == "submit" and how == "babbles":
            end.sendall(b"a traceback\n")
        elif word == "submit":
            text, content = values
            say = Saying(line, text)
            texts[text] = engine.submit(REQUEST.validate_python(content), say)
        elif word == "cancel":
            texts[values[0]].cancel()
        else:
            call, *rest = values
            try:
                line.send("returned", call, answer(engine, opening, word, *rest))
            except FlexOlmoError as e:
                line.send("failed", call, *write_error(e))


class Saying:
    """Tells the gateway of one text."""

    def __init__(self, line, text):
        self.line, self.text = line, text

    def __call__(self, event):
        self.line.send("said", self.text, *write_event(event))


def answer(engine, opening, word, *values):
    """The value of a call."""
    if word == "withdraw":
        return engine.withdraw(*values)
    if word == "stats":
        return STATS.dump_python(engine.stats(), mode="json")
    if word == "reload":
        engine.next_facts = with_expert(engine.facts, "papers", made_facts("papers"))
        if (opening.model / "damaged").exists():
            engine.next_facts = MergeError("damaged")
        return [write_facts(engine.reload()), SEEN_LATER]
    return engine.close(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
