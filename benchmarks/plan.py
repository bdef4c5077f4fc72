"""What `make bench` measures of whom, for how long, and how long all of it takes. Nothing is run here."""

import math
from dataclasses import dataclass

OURS = ("ours-float32", "ours-bfloat16", "ours-int8")
PEERS = ("fastapi", "litserve", "bentoml", "ray")
CONTESTANTS = ("tutorial", *OURS, *PEERS)
CLIENTS = {"resnet50": (1, 8, 32, 128), "bundled": (1, 8, 32, 128), "numbers": (1, 16, 64)}
MODELS = tuple(CLIENTS)
PAYLOADS = ("small", "large", "four")  # the 500x375 JPEG, the one of 12 megapixels, four numbers
LARGE_CLIENTS = 8  # that post the large picture, to ResNet50

SHARE = {"resnet50": 1.0, "bundled": 0.5, "numbers": 0.75}  # of the seconds: a fast model answers often enough
WARM_UP = ((1, 2), (8, 2))  # clients, seconds; BentoML measures its model with its first dozen batches

# What a load costs beside its seconds, and a contestant beside its loads: seconds, on two cores.
SETTLING = 1.0
STARTS = {"tutorial": 8, "ours": 3, "fastapi": 9, "litserve": 11, "bentoml": 12, "ray": 20}
ENDING = 3
LIMIT = 12  # of loading and compiling, beside what is measured
PREPARING = 90  # once: weights, and exports with int8 in them

Load = tuple[str, int]  # what is posted, from how many clients


@dataclass(frozen=True)
class Plan:
    """A run, or a part of one."""

    contestants: tuple[str, ...] = CONTESTANTS
    models: tuple[str, ...] = MODELS
    payloads: tuple[str, ...] = PAYLOADS
    clients: tuple[int, ...] = ()  # none: those of CLIENTS
    rounds: int = 3
    seconds: float = 3

    @property
    def complete(self) -> bool:
        """Whether nothing is left out."""
        return (self.contestants, self.models, self.payloads, self.clients) == (CONTESTANTS, MODELS, PAYLOADS, ())

    def loads(self, model: str, contestant: str) -> list[Load]:
        """Return the loads of a contestant; none where it is not measured with the model.

        Forty minutes are not enough for everything. Four numbers gain nothing from another precision; peers get one
        model for pictures, without the most clients, and without the large picture.
        """
        if contestant not in self.contestants or model not in self.models:
            return []
        every: list[Load] = []
        if model == "numbers":
            every = [("four", n) for n in CLIENTS[model] if contestant not in OURS[1:]]
        elif contestant not in PEERS:
            every = [("small", n) for n in CLIENTS[model]] + [("large", LARGE_CLIENTS)] * (model == "resnet50")
        elif model == "resnet50":
            every = [("small", n) for n in CLIENTS[model][:-1]]
        return [(what, n) for what, n in every if what in self.payloads and (not self.clients or n in self.clients)]

    def seconds_of(self, model: str, clients: int) -> int:
        """Return the whole seconds of a load: the more clients, the longer, for each to be answered a few times."""
        return math.ceil(self.seconds * SHARE[model] * (1 + clients / 32))

    def minutes(self) -> float:
        """Return what the whole run takes, with all that is not measuring."""
        seconds = 0.0
        for model in self.models:
            seconds += 0 if model == "numbers" else LIMIT + self.limit_seconds()
            for contestant in self.contestants:
                loads = self.loads(model, contestant)
                if loads:
                    seconds += STARTS[contestant.partition("-")[0]] + sum(s for _, s in WARM_UP) + ENDING
                seconds += SETTLING * len(loads)
                seconds += sum(self.seconds_of(model, clients) for _, clients in loads)
        return (self.rounds * seconds + PREPARING) / 60

    def limit_seconds(self) -> float:
        """Return what the engine alone is measured for, in three precisions and two ways, and four times decoding."""
        return self.seconds * (3 * (2 + 0.5) + 4 / 4)


def narrowed(words: str) -> dict[str, tuple[str, ...]]:
    """Return the fields of a Plan that a comma-separated list narrows down, as in "ours,resnet50,small".

    "ours" stands for all of ours. Raises ValueError for a word that is in none of the lists.
    """
    fields = {"contestants": CONTESTANTS, "models": MODELS, "payloads": PAYLOADS}
    chosen: dict[str, tuple[str, ...]] = {}
    wanted = words.split(",")
    for field, names in fields.items():
        if found := tuple(name for name in names if {name, name.partition("-")[0]} & set(wanted)):
            chosen[field] = found
    if unknown := [word for word in wanted if word not in known_words()]:
        raise ValueError(f"{', '.join(unknown)}: not among {', '.join(known_words())}")
    return chosen


def known_words() -> list[str]:
    """Return all that can be named, and what it is short for."""
    return ["ours", *CONTESTANTS, *MODELS, *PAYLOADS]
