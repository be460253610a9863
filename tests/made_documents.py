"""Made text: every domain has words of its own."""

import random

WORDS = {  # "common" ones stand in every set, the others in one
    "common": "the of and to in that it was for on with as at by from or an this not but",
    "public": "time year people way day man thing woman life child world school state family "
    "house water room mother area money story fact month lot right study book eye "
    "job word business issue side kind head night point home",
    "maths": "sum proof lemma prime root angle graph limit ring field group norm matrix vector "
    "axiom set map kernel",
    "news": "minister vote court budget strike police mayor border report union party crisis "
    "summit bank reform storm",
}


def write_documents(domain: str, count: int, seed: int) -> list[str]:
    """`count` texts of 80 words; half of the words are the domain's own.

    Public texts come in two kinds, for public text is broad.
    """
    rng = random.Random(f"{domain} {seed}")
    texts, common = [], WORDS["common"].split()
    for i in range(count):
        own = WORDS[domain].split()
        if domain == "public":
            own = own[: len(own) // 2] if i % 2 else own[len(own) // 2 :]
        words = [rng.choice(own if rng.random() < 0.5 else common) for _ in range(80)]
        texts.append(".\n".join(" ".join(words[j : j + 16]) for j in range(0, 80, 16)))
    return texts
