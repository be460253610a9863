"""Write examples/records/: notes of a hospital that never was, for the README and the tutorials.

python examples/make_records.py [DIRECTORY]
"""

import json
import random
import sys
from pathlib import Path

NOTES, FILES = 240, 3
COMPLAINTS = """chest pain on climbing stairs; a dry cough for two weeks; headache and stiff
    neck; pain in the left knee after a fall; itching rash on both arms; shortness of breath at
    night; burning on passing water; dizziness on standing up; fever and sore throat; low back
    pain; swollen ankles in the evening; nausea after meals; blurred vision; palpitations at
    rest; numbness in two fingers; a cut on the right hand; ringing in the ear; poor sleep"""
FINDINGS = """The lungs are clear on both sides; The abdomen is soft and not tender; The pulse
    is regular at {n} beats a minute; Blood pressure is {p} over {q}; The throat is red without
    coating; Reflexes are equal; The knee is swollen and warm; No rash is seen today; The heart
    sounds are normal; The wound edges are clean; Oxygen saturation is {s} per cent; Temperature
    is {t} degrees; The ear drum is dull; Both pupils react to light; There is mild oedema of
    the shins; Straight leg raising is limited at {n} degrees; The neck moves freely; Weight is
    {w} kilograms"""
TESTS = """An electrocardiogram showed sinus rhythm; The chest film showed no shadow;
    Haemoglobin was {h} grams per decilitre; The urine dipstick was positive for nitrite;
    C-reactive protein was {n}; Creatinine was within range; A throat swab was sent; The film of
    the knee showed no fracture; Blood glucose was {h} millimoles per litre; The thyroid tests
    are pending; Ultrasound showed no stone; The white cell count was {h}; An eye test was
    booked; A blood culture was taken"""
PLANS = """Paracetamol up to four times a day; Amoxicillin for {d} days; Rest and ice for the
    knee; Compression stockings by day; A review in {d} weeks; Referral to the heart clinic;
    Ibuprofen with food for {d} days; A salt-poor diet was discussed; Physiotherapy twice a
    week; The dressing is to be changed every {d} days; Nitrofurantoin for {d} days; Return at
    once if breathing gets worse; Sleep hygiene was explained; Home blood pressure readings for
    {d} weeks; Hydrocortisone cream"""
HISTORIES = """has had high blood pressure for {d} years; takes no regular medicine; smokes {n}
    cigarettes a week; had an appendix removed in 19{y}; is allergic to penicillin; works as a
    teacher; lives alone on the third floor; is a retired baker; has type 2 diabetes; cares for
    two children; stopped smoking {d} years ago; drives a bus; had asthma as a child; takes a
    statin at night; swims weekly"""


def choices(words: str) -> list[str]:
    """The phrases in a text, parted by semicolons."""
    return [" ".join(phrase.split()) for phrase in words.split(";")]


def make_note(rng: random.Random) -> str:
    """One note of about 100 words."""

    def fill(phrase: str) -> str:
        return phrase.format(
            n=rng.randint(40, 110), p=rng.randint(100, 170), q=rng.randint(60, 100),
            s=rng.randint(90, 100), t=round(rng.uniform(36, 39.5), 1), w=rng.randint(48, 110),
            h=round(rng.uniform(4, 16), 1), d=rng.randint(2, 14), y=rng.randint(60, 99),
        )  # fmt: skip

    def some(words: str, number: int) -> list[str]:
        return [fill(phrase) for phrase in rng.sample(choices(words), number)]

    age = rng.randint(19, 79)
    who = f"A {age}-year-old {rng.choice(['man', 'woman'])}"
    complaint, other = some(COMPLAINTS, 2)
    history = some(HISTORIES, 3)
    parts = [
        f"{who} was seen at the clinic with {complaint}, and also reports {other}.",
        f"The patient {history[0]} and {history[1]}. The patient also {history[2]}.",
        "On examination: " + ". ".join(some(FINDINGS, 4)) + ".",
        "Tests: " + ". ".join(some(TESTS, 2)) + ".",
        "Plan: " + ". ".join(some(PLANS, 3)) + ".",
    ]
    return "\n\n".join(parts)


def main(directory: Path) -> None:
    """Write the notes, a third in each file."""
    rng = random.Random("records")
    notes = [{"id": f"note-{i:03}", "text": make_note(rng)} for i in range(NOTES)]
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(FILES):
        lines = [json.dumps(note) for note in notes[i::FILES]]
        (directory / f"ward-{i + 1}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "records"))
